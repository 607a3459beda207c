/* The 4-bit formats of bitsandbytes, for host and device: nibble order, code tables, decoding.
 *
 * Layout and rules are read off bitsandbytes 0.50 (functional.py, csrc/kernels.cu): decoded values equal its
 * dequantize_4bit bit for bit, provided this is compiled without contraction of a * b + c.
 */
#ifndef QK_NF4_H
#define QK_NF4_H

#include "qk_half.h"

/* Value of each code in units of the block's absmax. */
static const float qk_nf4_code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

static const float qk_fp4_code[16] = {
    0.0f,  0.0625f / 12,  8.0f / 12,  12.0f / 12,  4.0f / 12,  6.0f / 12,  2.0f / 12,  3.0f / 12,
    -0.0f, -0.0625f / 12, -8.0f / 12, -12.0f / 12, -4.0f / 12, -6.0f / 12, -2.0f / 12, -3.0f / 12,
};

/* Bit patterns of the 15 thresholds between neighbouring values, ascending: code = order[number of t < x].
 * NF4: the constants of the CUDA quantizer, four of which are one unit off the float32 midpoints. */
static const uint32_t qk_nf4_threshold_bits[15] = {
    0xbf591cd9, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871, 0x3d22faff,
    0x3df64863, 0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d03, 0x3f248daf, 0x3f5c89d9,
};
static const uint8_t qk_nf4_order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* FP4: its quantizer compares |x| > t and gives every x < 0 the sign bit. On the signed axis a negative
 * threshold is therefore the number just below -t, and zero's is the number just below zero. */
static const uint32_t qk_fp4_threshold_bits[15] = {
    0xbf555556, 0xbf155551, 0xbed55557, 0xbe955556, 0xbe555556, 0xbdb00001, 0xbb2aaaba, 0x80000001,
    0x3b2aaab9, 0x3db00000, 0x3e555555, 0x3e955555, 0x3ed55556, 0x3f155550, 0x3f555555,
};
static const uint8_t qk_fp4_order[16] = {11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3};

/* Code of element i of a packed array: even elements lie in the high nibble. */
QK_HD unsigned qk_nibble(const uint8_t *packed, int64_t i)
{
    uint8_t byte = packed[i >> 1];
    return i & 1 ? byte & 15u : byte >> 4;
}

/* One float32 product, and the sum of another, each rounded on its own. */
QK_HD float qk_mul(float a, float b)
{
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

QK_HD float qk_add(float a, float b)
{
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

/* absmax of a block under double quantization: two roundings. */
QK_HD float qk_nested_absmax(float map_value, float nested_absmax, float offset)
{
    return qk_add(qk_mul(map_value, nested_absmax), offset);
}

QK_HD float qk_round_bf16(float f)
{
    return qk_bf16_to_f32(qk_f32_to_bf16(f));
}

QK_HD float qk_round_f16(float f)
{
    return qk_f16_to_f32(qk_f32_to_f16(f));
}

#endif
