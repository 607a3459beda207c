/* float16 and bfloat16 <-> float32, round to nearest even, for host and device.
 *
 * The bits equal those of x86 F16C and of the hardware converters of NVIDIA GPUs for every finite value and
 * infinity. A NaN stays one: its payload is cut and its quiet bit set.
 */
#ifndef QK_HALF_H
#define QK_HALF_H

#include <stdint.h>
#include <string.h>

#ifndef QK_HD
#ifdef __CUDACC__
#define QK_HD __host__ __device__ static inline
#else
#define QK_HD static inline
#endif
#endif

QK_HD uint32_t qk_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, sizeof u);
    return u;
}

QK_HD float qk_from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, sizeof f);
    return f;
}

QK_HD float qk_bf16_to_f32(uint16_t h)
{
    return qk_from_bits((uint32_t)h << 16);
}

QK_HD uint16_t qk_f32_to_bf16(float f)
{
    uint32_t u = qk_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

QK_HD float qk_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
    if (exponent == 31)
        return qk_from_bits(sign | 0x7f800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
    if (exponent == 0) /* subnormal: mantissa * 2^-24, exact */
        return qk_from_bits(sign | qk_bits((float)mantissa * 5.9604644775390625e-8f));
    return qk_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

QK_HD uint16_t qk_f32_to_f16(float f)
{
    uint32_t u = qk_bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above */
    if (a < 0x38800000u) /* below 2^-14: one ulp of 0.5 is the f16 subnormal step 2^-24 */
        return (uint16_t)(sign | (qk_bits(qk_from_bits(a) + 0.5f) - 0x3f000000u));
    return (uint16_t)(sign | ((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13));
}

#endif
