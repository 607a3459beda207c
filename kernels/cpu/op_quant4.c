/* 4-bit codes: encoding blocks, decoding ranges. The rules are those of qk.h; both are exact, so every
 * instruction set gives the same bytes. */
#include "ops.h"

#include <math.h>

enum { CHUNK = 4096 }; /* the largest block */

/* Codes of `count` <= CHUNK weights of one block. Plain loops over integers and comparisons: the compiler
 * makes vectors of them. */
static void encode_block(const float *v, int count, float a, const float *thresholds, const uint8_t *order,
                         uint8_t *codes)
{
    float inverse = 1.0f / a;
    int32_t above[64];
    for (int i = 0; i < count; i += 64) {
        int n = count - i < 64 ? count - i : 64;
        float x[64];
        for (int j = 0; j < n; j++) x[j] = v[i + j] * inverse;
        for (int j = n; j < 64; j++) x[j] = 0;
        for (int j = 0; j < 64; j++) above[j] = 0;
        for (int t = 0; t < 15; t++)
            for (int j = 0; j < 64; j++) above[j] += x[j] > thresholds[t];
        for (int j = 0; j < n; j++) codes[i + j] = order[above[j]];
    }
}

void QK_NAME(quantize4)(qk_format from, const void *src, int64_t n, int block, const float *thresholds,
                        const uint8_t *order, int zero_code, uint8_t *packed, float *absmax, int64_t b0,
                        int64_t b1)
{
    float v[CHUNK];
    uint8_t codes[CHUNK + 1];
    for (int64_t b = b0; b < b1; b++) {
        int64_t i0 = b * block;
        int count = n - i0 < block ? (int)(n - i0) : block;
        QK_NAME(convert)(from, (const char *)src + i0 * (from == QK_F32 ? 4 : 2), QK_F32, v, 0, count);
        float a = 0;
        for (int j = 0; j < count; j++) {
            float magnitude = fabsf(v[j]);
            a = magnitude > a ? magnitude : a;
        }
        absmax[b] = a;
        if (a > 0)
            encode_block(v, count, a, thresholds, order, codes);
        else
            memset(codes, zero_code, sizeof codes);
        codes[count] = (uint8_t)zero_code; /* pads an odd n */
        for (int j = 0; j < count; j += 2) packed[(i0 + j) / 2] = (uint8_t)(codes[j] << 4 | codes[j + 1]);
    }
}

bool QK_NAME(is_finite)(const qk_matrix *w, int64_t n0, int64_t n1)
{
    const int64_t b0 = n0 * w->k / w->block, b1 = (n1 * w->k + w->block - 1) / w->block;
    const v16 zero = v16_zero();
    v16 sum = v16_mul(v16_load(w->code), zero); /* NaN from a NaN or an infinity */
    int64_t b = b0;
    for (; b + 16 <= b1; b += 16) sum = v16_fma(v16_load(w->absmax + b), zero, sum);
    if (b < b1) sum = v16_fma(v16_load_n(w->absmax + b, (int)(b1 - b)), zero, sum);
    return v16_hsum(sum) == 0;
}

/* The part of [i, end) within one block that can go 64 at a time, from an even i; returns where it ends. */
QK_INLINE int64_t decode_64(const uint8_t *packed, v16 lut, bool high, int64_t i, int64_t end, float *dst)
{
#ifdef V16_HAS_TABLE
    const uint8_t *from = packed + i / 2;
    const v16_table table = v16_make_table(lut, high);
    for (; i + 64 <= end; i += 64, from += 32, dst += 64) {
        v16 v[4];
        v16_lookup64(from, &table, high, v);
        QK_UNROLL for (int j = 0; j < 4; j++) v16_store(dst + 16 * j, v[j]);
    }
#else
    (void)high;
    for (; i + 16 <= end; i += 16, dst += 16) v16_store(dst, v16_lut4(packed + i / 2, lut));
#endif
    return i;
}

QK_INLINE void decode_range(const qk_matrix *w, bool finite, bool high, int64_t i0, int64_t i1, float *dst)
{
    const uint8_t *packed = w->data;
    const v16 code = v16_load(w->code);
    const int shift = __builtin_ctz((unsigned)w->block);
    for (int64_t i = i0; i < i1;) {
        int64_t block_index = i >> shift, end = (block_index + 1) << shift;
        if (end > i1) end = i1;
        v16 lut = qk_block_lut(w, code, block_index, finite);
        if (i % 2 == 0 && end - i >= 64) i = decode_64(packed, lut, high, i, end, dst + (i - i0));
        if (i == end) continue;
        float values[16];
        v16_store(values, lut);
        if (i % 2) {
            dst[i - i0] = values[qk_nibble(packed, i)];
            i++;
        }
        for (; i + 16 <= end; i += 16) v16_store(dst + (i - i0), v16_lut4(packed + i / 2, lut));
        for (; i < end; i++) dst[i - i0] = values[qk_nibble(packed, i)];
    }
}

void QK_NAME(decode4)(const qk_matrix *w, bool finite, int64_t i0, int64_t i1, float *dst)
{
    if (w->round_to == QK_BF16)
        decode_range(w, finite, true, i0, i1, dst);
    else
        decode_range(w, finite, false, i0, i1, dst);
}

void QK_NAME(dequantize4)(const qk_matrix *w, qk_format to, void *dst, int64_t i0, int64_t i1)
{
    if (to == QK_F32) {
        QK_NAME(decode4)(w, false, i0, i1, (float *)dst + i0);
        return;
    }
    float part[CHUNK];
    for (int64_t i = i0; i < i1; i += CHUNK) {
        int64_t n = i1 - i < CHUNK ? i1 - i : CHUNK;
        QK_NAME(decode4)(w, false, i, i + n, part);
        QK_NAME(convert)(QK_F32, part, to, (uint16_t *)dst + i, 0, n);
    }
}
