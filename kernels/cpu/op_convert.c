/* Element types: F32, F16, BF16, to nearest even. */
#include "ops.h"

QK_INLINE void store_as(qk_format to, void *dst, int64_t i, v16 v)
{
    switch (to) {
    case QK_BF16:
        v16_store_bf16((uint16_t *)dst + i, v);
        break;
    case QK_F16:
        v16_store_f16((uint16_t *)dst + i, v);
        break;
    default:
        v16_store((float *)dst + i, v);
        break;
    }
}

QK_INLINE void convert(qk_format from, const void *src, qk_format to, void *dst, int64_t i0, int64_t i1)
{
    int64_t i = i0;
    for (; i + 16 <= i1; i += 16) store_as(to, dst, i, v16_load_as(from, src, i));
    if (i == i1) return;
    size_t tail = (size_t)(i1 - i), size = to == QK_F32 ? 4 : 2;
    float part[16];
    store_as(to, part, 0, v16_load_as_n(from, src, i, (int)tail));
    memcpy((char *)dst + (size_t)i * size, part, tail * size);
}

QK_INLINE void convert_from(qk_format from, const void *src, qk_format to, void *dst, int64_t i0, int64_t i1)
{
    switch (to) {
    case QK_BF16:
        convert(from, src, QK_BF16, dst, i0, i1);
        break;
    case QK_F16:
        convert(from, src, QK_F16, dst, i0, i1);
        break;
    default:
        convert(from, src, QK_F32, dst, i0, i1);
        break;
    }
}

void QK_NAME(convert)(qk_format from, const void *src, qk_format to, void *dst, int64_t i0, int64_t i1)
{
    switch (from) {
    case QK_BF16:
        convert_from(QK_BF16, src, to, dst, i0, i1);
        break;
    case QK_F16:
        convert_from(QK_F16, src, to, dst, i0, i1);
        break;
    default:
        convert_from(QK_F32, src, to, dst, i0, i1);
        break;
    }
}
