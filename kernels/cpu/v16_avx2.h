/* v16 on AVX2, FMA and F16C: two registers. Included by v16.h only. */
#include <immintrin.h>

#include "v16_transpose.h"

typedef struct {
    __m256 lo, hi;
} v16;

/* Register tile of the product, in vectors of 8 lanes: 12 accumulators, 3 weights and an activation in 16
 * registers. */
#define V16_TILE_ROWS 3
#define V16_TILE_COLS 4
#define V16_TILE_PIECE 1024
/* That of many activation rows, lane by lane: 12 accumulators, 2 weights and an activation; 16 KiB of weights
 * are passed over. */
#define V16_PREFILL_VECTORS 2
#define V16_PREFILL_COLS 6
#define V16_PREFILL_STEPS 256
#define V16_DIRECT_ROWS 2
#define V16_DIRECT_COLS 2
#define V16_DIRECT_STEP 32

#define V16_BOTH(expr_lo, expr_hi)                                                                           \
    (v16)                                                                                                    \
    {                                                                                                        \
        expr_lo, expr_hi                                                                                     \
    }

/* The first n of 8 lanes; n may be negative or above 8. */
QK_INLINE __m256i v16_tail8(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0));
}

QK_INLINE v16 v16_zero(void)
{
    return V16_BOTH(_mm256_setzero_ps(), _mm256_setzero_ps());
}

QK_INLINE v16 v16_set1(float f)
{
    return V16_BOTH(_mm256_set1_ps(f), _mm256_set1_ps(f));
}

QK_INLINE v16 v16_load(const float *p)
{
    return V16_BOTH(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8));
}

QK_INLINE v16 v16_load_n(const float *p, int n)
{
    return V16_BOTH(_mm256_maskload_ps(p, v16_tail8(n)), _mm256_maskload_ps(p + 8, v16_tail8(n - 8)));
}

QK_INLINE void v16_store(float *p, v16 v)
{
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
}

QK_INLINE void v16_store_n(float *p, v16 v, int n)
{
    _mm256_maskstore_ps(p, v16_tail8(n), v.lo);
    _mm256_maskstore_ps(p + 8, v16_tail8(n - 8), v.hi);
}

QK_INLINE v16 v16_fma(v16 a, v16 b, v16 c)
{
    return V16_BOTH(_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi));
}

QK_INLINE v16 v16_add(v16 a, v16 b)
{
    return V16_BOTH(_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi));
}

QK_INLINE v16 v16_sub(v16 a, v16 b)
{
    return V16_BOTH(_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi));
}

QK_INLINE v16 v16_mul(v16 a, v16 b)
{
    return V16_BOTH(_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi));
}

QK_INLINE v16 v16_div(v16 a, v16 b)
{
    return V16_BOTH(_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi));
}

QK_INLINE v16 v16_max(v16 a, v16 b)
{
    return V16_BOTH(_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi));
}

QK_INLINE v16 v16_min(v16 a, v16 b)
{
    return V16_BOTH(_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi));
}

QK_INLINE __m256 v16_pow2_8(__m256 n)
{
    __m256i e = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}

/* 2^n for whole -126 <= n <= 127. */
QK_INLINE v16 v16_pow2(v16 n)
{
    return V16_BOTH(v16_pow2_8(n.lo), v16_pow2_8(n.hi));
}

QK_INLINE __m256 v16_widen_bf16(const uint16_t *p)
{
    __m128i h = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

QK_INLINE v16 v16_load_bf16(const uint16_t *p)
{
    return V16_BOTH(v16_widen_bf16(p), v16_widen_bf16(p + 8));
}

QK_INLINE v16 v16_load_f16(const uint16_t *p)
{
    return V16_BOTH(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p)),
                    _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(p + 8))));
}

/* The number v rounded to bfloat16 in the upper half of each dword, anything in the lower. */
QK_INLINE __m256 v16_carry_bf16_8(__m256 v)
{
    __m256i u = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_castsi256_ps(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))));
}

QK_INLINE __m256 v16_round_bf16_number_8(__m256 v)
{
    return _mm256_and_ps(v16_carry_bf16_8(v), _mm256_castsi256_ps(_mm256_set1_epi32(-0x10000)));
}

/* For all but a NaN whose payload has its upper bits set. */
QK_INLINE v16 v16_round_bf16_number(v16 v)
{
    return V16_BOTH(v16_round_bf16_number_8(v.lo), v16_round_bf16_number_8(v.hi));
}

QK_INLINE __m256 v16_round_bf16_8(__m256 v)
{
    __m256i quiet = _mm256_or_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x400000));
    __m256i cut = _mm256_and_si256(quiet, _mm256_set1_epi32(-0x10000));
    return _mm256_blendv_ps(v16_round_bf16_number_8(v), _mm256_castsi256_ps(cut),
                            _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}

QK_INLINE v16 v16_round_bf16(v16 v)
{
    return V16_BOTH(v16_round_bf16_8(v.lo), v16_round_bf16_8(v.hi));
}

QK_INLINE __m128i v16_narrow_f16(__m256 v)
{
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

QK_INLINE v16 v16_round_f16(v16 v)
{
    return V16_BOTH(_mm256_cvtph_ps(v16_narrow_f16(v.lo)), _mm256_cvtph_ps(v16_narrow_f16(v.hi)));
}

QK_INLINE void v16_store_bf16(uint16_t *p, v16 v)
{
    v16 r = v16_round_bf16(v);
    __m256i lo = _mm256_srli_epi32(_mm256_castps_si256(r.lo), 16);
    __m256i hi = _mm256_srli_epi32(_mm256_castps_si256(r.hi), 16);
    /* packus works in 128-bit halves: bring the quarters back in order. */
    __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
    _mm256_storeu_si256((__m256i *)(void *)p, packed);
}

QK_INLINE void v16_store_f16(uint16_t *p, v16 v)
{
    _mm_storeu_si128((__m128i *)(void *)p, v16_narrow_f16(v.lo));
    _mm_storeu_si128((__m128i *)(void *)(p + 8), v16_narrow_f16(v.hi));
}

#define V16_HAS_TABLE 1
/* 16 values by 4-bit code, for v16_lookup64: byte p of every value, in both 128-bit halves. vpshufb looks 32
 * bytes up at once where vpermps does 8 values and knows only 8 codes: 6 (bfloat16) to 8 operations for 16
 * weights and not 10, four of which are double. */
typedef struct {
    __m256i byte[4];
} v16_table;

/* `high`: the lower halves of all values are zero. */
QK_INLINE v16_table v16_make_table(v16 values, bool high)
{
    const __m256i apart = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12,
                                           1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i even = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
    const __m256i odd = _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7);
    __m256i lo = _mm256_shuffle_epi8(_mm256_castps_si256(values.lo), apart);
    __m256i hi = _mm256_shuffle_epi8(_mm256_castps_si256(values.hi), apart);
    v16_table t;
    __m256i upper = _mm256_unpackhi_epi32(lo, hi);
    t.byte[2] = _mm256_permutevar8x32_epi32(upper, even);
    t.byte[3] = _mm256_permutevar8x32_epi32(upper, odd);
    if (high) return t;
    __m256i lower = _mm256_unpacklo_epi32(lo, hi);
    t.byte[0] = _mm256_permutevar8x32_epi32(lower, even);
    t.byte[1] = _mm256_permutevar8x32_epi32(lower, odd);
    return t;
}

/* 32 codes, a byte each, to two v16. In each 128-bit half of `codes`: 8 codes of the first, 8 of the second;
 * of each, the low half has lanes 0-3 and 8-11, the high half lanes 4-7 and 12-15, as unpacking wants them.
 */
QK_INLINE void v16_lookup32(__m256i codes, const v16_table *t, bool high, v16 *out)
{
    __m256i b2 = _mm256_shuffle_epi8(t->byte[2], codes), b3 = _mm256_shuffle_epi8(t->byte[3], codes);
    __m256i upper0 = _mm256_unpacklo_epi8(b2, b3), upper1 = _mm256_unpackhi_epi8(b2, b3);
    __m256i lower0 = _mm256_setzero_si256(), lower1 = _mm256_setzero_si256();
    if (!high) {
        __m256i b0 = _mm256_shuffle_epi8(t->byte[0], codes), b1 = _mm256_shuffle_epi8(t->byte[1], codes);
        lower0 = _mm256_unpacklo_epi8(b0, b1);
        lower1 = _mm256_unpackhi_epi8(b0, b1);
    }
    out[0].lo = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower0, upper0));
    out[0].hi = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower0, upper0));
    out[1].lo = _mm256_castsi256_ps(_mm256_unpacklo_epi16(lower1, upper1));
    out[1].hi = _mm256_castsi256_ps(_mm256_unpackhi_epi16(lower1, upper1));
}

/* The 64 nibbles of 32 bytes, high one of each byte first. */
QK_INLINE void v16_lookup64(const uint8_t *p, const v16_table *t, bool high, v16 *out)
{
    const __m256i halves = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5,
                                            8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)p);
    x = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(x, halves), 0xd8);
    __m256i first = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble), second = _mm256_and_si256(x, nibble);
    v16_lookup32(_mm256_unpacklo_epi8(first, second), t, high, out);
    v16_lookup32(_mm256_unpackhi_epi8(first, second), t, high, out + 2);
}

/* Eight nibbles of 4 bytes, high one first. vpermps reads the low 3 bits of an index; bit 3, moved to the
 * sign, picks the half of the table. */
QK_INLINE __m256 v16_lut4_8(const uint8_t *p, v16 lut)
{
    const __m256i shift = _mm256_set_epi32(24, 28, 16, 20, 8, 12, 0, 4);
    int32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    __m256i x = _mm256_srlv_epi32(_mm256_set1_epi32(bytes), shift);
    __m256 lo = _mm256_permutevar8x32_ps(lut.lo, x), hi = _mm256_permutevar8x32_ps(lut.hi, x);
    return _mm256_blendv_ps(lo, hi, _mm256_castsi256_ps(_mm256_slli_epi32(x, 28)));
}

/* Few activation rows take two 4-bit rows at a time: pair_avx2.h. */
#define V16_HAS_PAIR 1

/* The 16 nibbles of 8 bytes, high one first, looked up in `lut`. */
QK_INLINE v16 v16_lut4(const uint8_t *p, v16 lut)
{
    return V16_BOTH(v16_lut4_8(p, lut), v16_lut4_8(p + 4, lut));
}

QK_INLINE float v16_hsum(v16 v)
{
    __m256 a = _mm256_add_ps(v.lo, v.hi);
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

/* The largest lane, by any order: for numbers only. */
QK_INLINE float v16_hmax(v16 v)
{
    __m256 a = _mm256_max_ps(v.lo, v.hi);
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

/* Rows p and q folded by 8 and by 4: low half 4 sums of p, high half 4 of q. */
QK_INLINE __m256 v16_fold_pair(const float *p, const float *q)
{
    v16 a = v16_load(p), b = v16_load(q);
    __m256 x = _mm256_add_ps(a.lo, a.hi), y = _mm256_add_ps(b.lo, b.hi);
    return _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
}

/* Sums of rows 0-3 (low half) and 4-7 (high half) of eight rows of 16. */
QK_INLINE __m256 v16_hsum8(const float *rows)
{
    __m256 f0 = v16_fold_pair(rows, rows + 64), f1 = v16_fold_pair(rows + 16, rows + 80);
    __m256 f2 = v16_fold_pair(rows + 32, rows + 96), f3 = v16_fold_pair(rows + 48, rows + 112);
    __m256 g0 = _mm256_add_ps(_mm256_shuffle_ps(f0, f1, 0x44), _mm256_shuffle_ps(f0, f1, 0xee));
    __m256 g1 = _mm256_add_ps(_mm256_shuffle_ps(f2, f3, 0x44), _mm256_shuffle_ps(f2, f3, 0xee));
    return _mm256_add_ps(_mm256_shuffle_ps(g0, g1, 0x88), _mm256_shuffle_ps(g0, g1, 0xdd));
}

/* Lane r of the result is v16_hsum of rows[16 * r .. 16 * r + 15]: the same additions, transposed. */
QK_INLINE v16 v16_hsum16(const float *rows)
{
    return V16_BOTH(v16_hsum8(rows), v16_hsum8(rows + 128));
}

typedef __m256 vt;
#define VT_LANES 8

QK_INLINE vt vt_zero(void)
{
    return _mm256_setzero_ps();
}

QK_INLINE vt vt_set1(float f)
{
    return _mm256_set1_ps(f);
}

QK_INLINE vt vt_load(const float *p)
{
    return _mm256_loadu_ps(p);
}

QK_INLINE void vt_store(float *p, vt v)
{
    _mm256_storeu_ps(p, v);
}

QK_INLINE vt vt_add(vt a, vt b)
{
    return _mm256_add_ps(a, b);
}

QK_INLINE vt vt_fma(vt a, vt b, vt c)
{
    return _mm256_fmadd_ps(a, b, c);
}

/* v16_widen_bf16 by one vpshufb, each half picking its four of the eight: vpmovzxwd crosses halves, and FMAs
 * wait for its two operations. As assembler text, so that the pattern stays in memory: the tile leaves it no
 * register.
 */
QK_INLINE vt vt_widen_bf16(const void *p)
{
    static const int8_t spread[32]
        __attribute__((aligned(32))) = {-1, -1, 0, 1, -1, -1, 2,  3,  -1, -1, 4,  5,  -1, -1, 6,  7,
                                        -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15};
    __m256i x = _mm256_broadcastsi128_si256(_mm_loadu_si128(p));
    __asm__("vpshufb %1, %0, %0" : "+x"(x) : "m"(spread));
    return _mm256_castsi256_ps(x);
}

/* 8 lanes of a row stored in `format`. */
QK_INLINE vt vt_load_as(qk_format format, const void *p)
{
    switch (format) {
    case QK_BF16:
        return vt_widen_bf16(p);
    case QK_F16:
        return _mm256_cvtph_ps(_mm_loadu_si128(p));
    default:
        return _mm256_loadu_ps(p);
    }
}
