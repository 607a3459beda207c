#include "widen.h"

#include "qk_half.h"

#include <stdint.h>
#include <string.h>

bool ql_widen_fits_f32(ql_dtype dtype)
{
    switch (dtype) {
    case QL_F32:
    case QL_F16:
    case QL_BF16:
    case QL_U8:
    case QL_I8:
    case QL_U16:
    case QL_I16:
    case QL_BOOL:
        return true;
    default:
        return false;
    }
}

#define WIDEN(type, expression)                                                                              \
    for (size_t i = 0; i < n; i++) {                                                                         \
        type v;                                                                                              \
        memcpy(&v, (const char *)src + i * sizeof v, sizeof v);                                              \
        dst[i] = expression;                                                                                 \
    }                                                                                                        \
    return true

#define CASES(to)                                                                                            \
    switch (dtype) {                                                                                         \
    case QL_F32:                                                                                             \
        WIDEN(float, (to)v);                                                                                 \
    case QL_F64:                                                                                             \
        WIDEN(double, (to)v);                                                                                \
    case QL_F16:                                                                                             \
        WIDEN(uint16_t, (to)qk_f16_to_f32(v));                                                               \
    case QL_BF16:                                                                                            \
        WIDEN(uint16_t, (to)qk_bf16_to_f32(v));                                                              \
    case QL_BOOL:                                                                                            \
    case QL_U8:                                                                                              \
        WIDEN(uint8_t, (to)v);                                                                               \
    case QL_I8:                                                                                              \
        WIDEN(int8_t, (to)v);                                                                                \
    case QL_U16:                                                                                             \
        WIDEN(uint16_t, (to)v);                                                                              \
    case QL_I16:                                                                                             \
        WIDEN(int16_t, (to)v);                                                                               \
    case QL_U32:                                                                                             \
        WIDEN(uint32_t, (to)v);                                                                              \
    case QL_I32:                                                                                             \
        WIDEN(int32_t, (to)v);                                                                               \
    case QL_U64:                                                                                             \
        WIDEN(uint64_t, (to)v);                                                                              \
    case QL_I64:                                                                                             \
        WIDEN(int64_t, (to)v);                                                                               \
    default:                                                                                                 \
        return false;                                                                                        \
    }

bool ql_widen_f32(ql_dtype dtype, const void *src, size_t n, float *dst)
{
    CASES(float)
}

bool ql_widen_f64(ql_dtype dtype, const void *src, size_t n, double *dst)
{
    CASES(double)
}
