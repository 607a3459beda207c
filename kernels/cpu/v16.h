/* Sixteen float32 lanes: the one vector type that kernel bodies are written in.
 *
 * Each instruction set gives the same operations in its own header; every operation has one IEEE result, so a
 * body compiled for all of them yields the same bits. v16_fma rounds once; v16_max(a, b) is a > b ? a : b,
 * which lets a NaN in b through; v16_hsum folds lanes by 8, 4, 2, 1.
 */
#ifndef QK_V16_H
#define QK_V16_H

#include "../qk.h"
#include "../qk_half.h"
#include "../qk_nf4.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
/* Every lane is instrumented: inlined into each other, the bodies would take minutes to compile. */
#define QK_INLINE static __attribute__((noinline, unused))
#define QK_UNROLL
#else
#define QK_INLINE static inline __attribute__((always_inline, unused))
#define QK_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(QK_ISA_avx512)
#include "v16_avx512.h"
#elif defined(QK_ISA_avx2)
#include "v16_avx2.h"
#else
#include "v16_scalar.h"
#endif

/* Name of a function of this instruction set: QK_NAME(matmul) is qk_matmul_avx2. */
#define QK_PASTE2(a, b) qk_##a##_##b
#define QK_PASTE(a, b) QK_PASTE2(a, b)
#define QK_NAME(op) QK_PASTE(op, QK_ISA)

/* 16 elements of a row stored in `format`; `n` < 16 of them, the other lanes 0. */
QK_INLINE v16 v16_load_as(qk_format format, const void *p, int64_t i)
{
    switch (format) {
    case QK_BF16:
        return v16_load_bf16((const uint16_t *)p + i);
    case QK_F16:
        return v16_load_f16((const uint16_t *)p + i);
    default:
        return v16_load((const float *)p + i);
    }
}

#if VT_LANES == 16
#define vt_load_as(format, p) v16_load_as(format, p, 0)
#endif

QK_INLINE v16 v16_load_as_n(qk_format format, const void *p, int64_t i, int n)
{
    if (format == QK_F32) return v16_load_n((const float *)p + i, n);
    uint16_t part[16] = {0};
    memcpy(part, (const uint16_t *)p + i, (size_t)n * sizeof *part);
    return format == QK_BF16 ? v16_load_bf16(part) : v16_load_f16(part);
}

QK_INLINE v16 v16_round_to(qk_format format, v16 v)
{
    switch (format) {
    case QK_BF16:
        return v16_round_bf16(v);
    case QK_F16:
        return v16_round_f16(v);
    default:
        return v;
    }
}

/* exp(x) to 2 units in the last place, after the usual reduction x = n ln 2 + r, |r| <= ln 2 / 2 (Cody &
 * Waite 1980, ln 2 split in two) and the Taylor polynomial of degree 7 in r, whose remainder is under 2^-27.
 */
QK_INLINE v16 v16_exp(v16 x)
{
    const v16 magic = v16_set1(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    /* Beyond these bounds the result is 0 or infinity; a NaN in the second operand stays. */
    x = v16_max(v16_set1(-104.0f), x);
    x = v16_min(v16_set1(89.0f), x);
    v16 n = v16_sub(v16_add(v16_mul(x, v16_set1(0x1.715476p+0f)), magic), magic);
    v16 r = v16_fma(n, v16_set1(-0x1.62e4p-1f), x);
    r = v16_fma(n, v16_set1(-0x1.7f7d1cp-20f), r);
    v16 p = v16_set1(0x1.a01a02p-13f); /* 1/5040 */
    p = v16_fma(p, r, v16_set1(0x1.6c16c2p-10f));
    p = v16_fma(p, r, v16_set1(0x1.111112p-7f));
    p = v16_fma(p, r, v16_set1(0x1.555556p-5f));
    p = v16_fma(p, r, v16_set1(0x1.555556p-3f));
    p = v16_fma(p, r, v16_set1(0.5f));
    p = v16_fma(p, r, v16_set1(1.0f));
    p = v16_fma(p, r, v16_set1(1.0f));
    /* 2^n in two exact steps, so that subnormal results round once and large ones reach infinity. */
    v16 half = v16_sub(v16_add(v16_mul(n, v16_set1(0.5f)), magic), magic);
    return v16_mul(v16_mul(p, v16_pow2(half)), v16_pow2(v16_sub(n, half)));
}

#endif
