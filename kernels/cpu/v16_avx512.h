/* v16 on AVX-512 (F, BW, DQ, VL): one register. Included by v16.h only. */
#include <immintrin.h>

#include "v16_transpose.h"

typedef __m512 v16;

/* Register tile of the product: 24 accumulators, 4 weights and an activation in 32 registers. */
#define V16_TILE_ROWS 4
#define V16_TILE_COLS 6
#define V16_TILE_PIECE 512
/* That of many activation rows, lane by lane: 24 accumulators, 3 weights and an activation; 12 KiB of weights
 * are passed over. */
#define V16_PREFILL_VECTORS 3
#define V16_PREFILL_COLS 8
#define V16_PREFILL_STEPS 64
/* Weight rows taken at once, and most activation rows, when 4-bit weights are decoded in registers. */
#define V16_DIRECT_ROWS 4
#define V16_DIRECT_COLS 4
#define V16_DIRECT_STEP 16

#define V16_TAIL(n) ((__mmask16)((1u << (n)) - 1u)) /* 0 <= n <= 16 */

QK_INLINE v16 v16_zero(void)
{
    return _mm512_setzero_ps();
}

QK_INLINE v16 v16_set1(float f)
{
    return _mm512_set1_ps(f);
}

QK_INLINE v16 v16_load(const float *p)
{
    return _mm512_loadu_ps(p);
}

QK_INLINE v16 v16_load_n(const float *p, int n)
{
    return _mm512_maskz_loadu_ps(V16_TAIL(n), p);
}

QK_INLINE void v16_store(float *p, v16 v)
{
    _mm512_storeu_ps(p, v);
}

QK_INLINE void v16_store_n(float *p, v16 v, int n)
{
    _mm512_mask_storeu_ps(p, V16_TAIL(n), v);
}

QK_INLINE v16 v16_fma(v16 a, v16 b, v16 c)
{
    return _mm512_fmadd_ps(a, b, c);
}

QK_INLINE v16 v16_add(v16 a, v16 b)
{
    return _mm512_add_ps(a, b);
}

QK_INLINE v16 v16_sub(v16 a, v16 b)
{
    return _mm512_sub_ps(a, b);
}

QK_INLINE v16 v16_mul(v16 a, v16 b)
{
    return _mm512_mul_ps(a, b);
}

QK_INLINE v16 v16_div(v16 a, v16 b)
{
    return _mm512_div_ps(a, b);
}

QK_INLINE v16 v16_max(v16 a, v16 b)
{
    return _mm512_max_ps(a, b);
}

QK_INLINE v16 v16_min(v16 a, v16 b)
{
    return _mm512_min_ps(a, b);
}

/* 2^n for whole -126 <= n <= 127. */
QK_INLINE v16 v16_pow2(v16 n)
{
    __m512i e = _mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
}

/* One vpermw spreads the halves and zeroes the low words. */
QK_INLINE v16 v16_load_bf16(const uint16_t *p)
{
    const __m512i spread = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7,
                                            6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, spread, _mm512_castsi256_si512(h)));
}

QK_INLINE v16 v16_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

/* For all but a NaN whose payload has its upper bits set. */
QK_INLINE v16 v16_round_bf16_number(v16 v)
{
    __m512i u = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_castsi512_ps(_mm512_and_si512(r, _mm512_set1_epi32(-0x10000)));
}

QK_INLINE v16 v16_round_bf16(v16 v)
{
    __m512i quiet = _mm512_or_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x400000));
    __m512i cut = _mm512_and_si512(quiet, _mm512_set1_epi32(-0x10000));
    return _mm512_mask_mov_ps(v16_round_bf16_number(v), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                              _mm512_castsi512_ps(cut));
}

QK_INLINE v16 v16_round_f16(v16 v)
{
    return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

QK_INLINE void v16_store_bf16(uint16_t *p, v16 v)
{
    __m512i u = _mm512_srli_epi32(_mm512_castps_si512(v16_round_bf16(v)), 16);
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(u));
}

QK_INLINE void v16_store_f16(uint16_t *p, v16 v)
{
    _mm256_storeu_si256((__m256i *)(void *)p,
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* The 16 nibbles of 8 bytes, high one first, looked up in `lut`. vpermps reads the low 4 bits of an index, so
 * lane l only needs its byte l/2, shifted by 4 when l is even. */
QK_INLINE v16 v16_lut4(const uint8_t *p, v16 lut)
{
    const __m512i spread = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    const __m512i shift = _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4);
    uint64_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    __m512i x = _mm512_shuffle_epi8(_mm512_set1_epi64((long long)bytes), spread);
    return _mm512_permutexvar_ps(_mm512_srlv_epi32(x, shift), lut);
}

/* As assembler text, because the rest of this file must run without VBMI. */
#ifndef v16_multishift
QK_INLINE __m512i v16_multishift(__m512i from, __m512i bytes)
{
    __m512i x;
    __asm__("vpmultishiftqb %2, %1, %0" : "=v"(x) : "v"(from), "v"(bytes));
    return x;
}
#endif

/* The same in one step where the processor has AVX-512 VBMI, which the caller has checked: qword i of the
 * result takes 8 bits from bit 8i + 4 into its low lane and from bit 8i into its high one. */
#define V16_HAS_VBMI 1
QK_INLINE v16 v16_lut4_vbmi(const uint8_t *p, v16 lut)
{
    const __m512i from = _mm512_set_epi32(56, 60, 48, 52, 40, 44, 32, 36, 24, 28, 16, 20, 8, 12, 0,
                                          4); /* in byte 0 of each lane */
    uint64_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    return _mm512_permutexvar_ps(v16_multishift(from, _mm512_set1_epi64((long long)bytes)), lut);
}

QK_INLINE float v16_hsum(v16 v)
{
    __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

/* The largest lane, by any order: for numbers only. */
QK_INLINE float v16_hmax(v16 v)
{
    __m256 a = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(b, _mm_movehdup_ps(b)));
}

/* Halves of a and b side by side, lanes folded by 8: [a0+a8 .. a7+a15, b0+b8 .. b7+b15]. */
QK_INLINE v16 v16_fold8(v16 a, v16 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}

/* From four pairs of 4 lanes each, fold by 4: 128-bit lanes of the result hold a's two, then b's two. */
QK_INLINE v16 v16_fold4(v16 a, v16 b)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

/* Lane r of the result is v16_hsum of rows[16 * r .. 16 * r + 15]: the same additions, transposed. */
QK_INLINE v16 v16_hsum16(const float *rows)
{
    v16 f[4];
    QK_UNROLL for (int i = 0; i < 4; i++)
    {
        const float *p = rows + 64 * i;
        f[i] = v16_fold4(v16_fold8(v16_load(p), v16_load(p + 16)),
                         v16_fold8(v16_load(p + 32), v16_load(p + 48)));
    }
    /* f[i] holds, in 128-bit lane j, four partial sums of row 4i+j. Fold by 2, then by 1, within lanes. */
    v16 g0 = _mm512_add_ps(_mm512_shuffle_ps(f[0], f[1], 0x44), _mm512_shuffle_ps(f[0], f[1], 0xee));
    v16 g1 = _mm512_add_ps(_mm512_shuffle_ps(f[2], f[3], 0x44), _mm512_shuffle_ps(f[2], f[3], 0xee));
    v16 h = _mm512_add_ps(_mm512_shuffle_ps(g0, g1, 0x88), _mm512_shuffle_ps(g0, g1, 0xdd));
    /* h's 128-bit lane j holds rows j, 4+j, 8+j, 12+j: transpose the 4x4. */
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    return _mm512_permutexvar_ps(order, h);
}

/* The product's register tile holds whole v16. */
typedef v16 vt;
#define VT_LANES 16
#define vt_zero v16_zero
#define vt_set1 v16_set1
#define vt_load v16_load
#define vt_store v16_store
#define vt_add v16_add
#define vt_fma v16_fma
