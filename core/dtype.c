#include "dtype.h"

#include <string.h>

static const struct {
    size_t size;
    const char *name, *label;
} types[QL_DTYPE_COUNT] = {
    [QL_F32] = {4, "F32", "float32"},
    [QL_F16] = {2, "F16", "float16"},
    [QL_BF16] = {2, "BF16", "bfloat16"},
    [QL_F64] = {8, "F64", "float64"},
    [QL_F8_E4M3] = {1, "F8_E4M3", "float8_e4m3fn"},
    [QL_F8_E5M2] = {1, "F8_E5M2", "float8_e5m2"},
    [QL_U8] = {1, "U8", "uint8"},
    [QL_I8] = {1, "I8", "int8"},
    [QL_U16] = {2, "U16", "uint16"},
    [QL_I16] = {2, "I16", "int16"},
    [QL_U32] = {4, "U32", "uint32"},
    [QL_I32] = {4, "I32", "int32"},
    [QL_U64] = {8, "U64", "uint64"},
    [QL_I64] = {8, "I64", "int64"},
    [QL_BOOL] = {1, "BOOL", "bool"},
};

static bool known(ql_dtype dtype)
{
    return (unsigned)dtype < QL_DTYPE_COUNT;
}

size_t ql_dtype_size(ql_dtype dtype)
{
    return known(dtype) ? types[dtype].size : 0;
}

const char *ql_dtype_name(ql_dtype dtype)
{
    return known(dtype) ? types[dtype].name : "?";
}

const char *ql_dtype_label(ql_dtype dtype)
{
    return known(dtype) ? types[dtype].label : "?";
}

bool ql_dtype_parse(const char *text, ql_dtype *out)
{
    static const char torch[] = "torch.";
    if (!text) return false;
    const char *label = strncmp(text, torch, sizeof torch - 1) == 0 ? text + sizeof torch - 1 : text;
    for (int i = 0; i < QL_DTYPE_COUNT; i++) {
        if (strcmp(text, types[i].name) && strcmp(label, types[i].label)) continue;
        *out = (ql_dtype)i;
        return true;
    }
    return false;
}

bool ql_dtype_is_weight(ql_dtype dtype)
{
    return dtype == QL_F32 || dtype == QL_F16 || dtype == QL_BF16;
}
