/* AVX-512 in C, so that the kernels written for it run on any x86-64 processor with AVX2, FMA and F16C:
 * SIMDe's (github.com/simd-everywhere/simde), under the names of Intel's, and below what its version of
 * Debian 12 lacks. Included before the first line of every kernel of the emulated table.
 */
#ifndef SIMD_EMU_AVX512_H
#define SIMD_EMU_AVX512_H

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include "features.h"

#include <string.h>

#if !defined(SIMDE_X86_AVX2_NATIVE) || !defined(SIMDE_X86_FMA_NATIVE) || !defined(SIMDE_X86_F16C_NATIVE)
#error "SIMDe would round twice in a fused multiply-add, or narrow float16 by a rule of its own"
#endif
#ifdef SIMDE_X86_AVX512F_NATIVE
#error "this compiler may use AVX-512 itself: nothing would be emulated"
#endif

#define EMU static inline __attribute__((always_inline, unused))

/* Lanes that the mask leaves out are not touched: they may lie beyond an array. */
EMU simde__m512 emu_maskz_loadu_ps(uint16_t mask, const float *p)
{
    simde__m512_private r;
    for (int l = 0; l < 16; l++) r.f32[l] = mask >> l & 1 ? p[l] : 0.0f;
    return simde__m512_from_private(r);
}

EMU void emu_mask_storeu_ps(float *p, uint16_t mask, simde__m512 v)
{
    simde__m512_private a = simde__m512_to_private(v);
    for (int l = 0; l < 16; l++) {
        if (mask >> l & 1) p[l] = a.f32[l];
    }
}

/* The processor's own conversions, eight lanes at a time. */
EMU simde__m512i emu_cvttps_epi32(simde__m512 v)
{
    simde__m512_private a = simde__m512_to_private(v);
    simde__m512i_private r;
    for (int h = 0; h < 2; h++) r.m256i[h] = _mm256_cvttps_epi32(a.m256[h]);
    return simde__m512i_from_private(r);
}

EMU simde__m512 emu_cvtph_ps(__m256i halves)
{
    simde__m512_private r;
    r.m256[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    r.m256[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    return simde__m512_from_private(r);
}

/* A macro: the rounding is part of the instruction. */
#define emu_cvtps_ph(v, rounding)                                                                            \
    __extension__({                                                                                          \
        simde__m512_private a_ = simde__m512_to_private(v);                                                  \
        _mm256_set_m128i(_mm256_cvtps_ph(a_.m256[1], rounding), _mm256_cvtps_ph(a_.m256[0], rounding));      \
    })

EMU __m256i emu_cvtepi32_epi16(simde__m512i v)
{
    simde__m512i_private a = simde__m512i_to_private(v);
    uint16_t low[16];
    for (int l = 0; l < 16; l++) low[l] = (uint16_t)a.u32[l];
    __m256i r;
    memcpy(&r, low, sizeof r);
    return r;
}

EMU __m256 emu_extractf32x8_ps(simde__m512 v, int half)
{
    return simde__m512_to_private(v).m256[half & 1];
}

/* Two 128-bit lanes of a, then two of b, as the four pairs of bits say. */
EMU simde__m512 emu_shuffle_f32x4(simde__m512 a, simde__m512 b, int order)
{
    simde__m512_private from[2] = {simde__m512_to_private(a), simde__m512_to_private(b)}, r;
    for (int j = 0; j < 4; j++) r.m128[j] = from[j / 2].m128[order >> 2 * j & 3];
    return simde__m512_from_private(r);
}

/* Later versions of SIMDe may have these too. Its masked ones may read all lanes: ours instead, always. */
#undef _mm512_maskz_loadu_ps
#undef _mm512_mask_storeu_ps
#define _mm512_maskz_loadu_ps emu_maskz_loadu_ps
#define _mm512_mask_storeu_ps emu_mask_storeu_ps
#ifndef _mm512_cvttps_epi32
#define _mm512_cvttps_epi32 emu_cvttps_epi32
#endif
#ifndef _mm512_cvtph_ps
#define _mm512_cvtph_ps emu_cvtph_ps
#endif
#ifndef _mm512_cvtps_ph
#define _mm512_cvtps_ph emu_cvtps_ph
#endif
#ifndef _mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi16 emu_cvtepi32_epi16
#endif
#ifndef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emu_extractf32x8_ps
#endif
#ifndef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 emu_shuffle_f32x4
#endif

/* The one instruction that the kernels have as assembler text: byte j of a result's qword is 8 bits of the
 * qword of `bytes`, from bit from[j] on and around its end. SIMDe's shifts by 64 where from[j] is 0. */
EMU simde__m512i emu_multishift(simde__m512i from, simde__m512i bytes)
{
    simde__m512i_private f = simde__m512i_to_private(from), b = simde__m512i_to_private(bytes), r;
    for (int j = 0; j < 64; j++) {
        const uint64_t q = b.u64[j / 8];
        const int n = f.u8[j] & 63;
        r.u8[j] = (uint8_t)(q >> n | q << (-n & 63));
    }
    return simde__m512i_from_private(r);
}
#define v16_multishift emu_multishift

#endif
