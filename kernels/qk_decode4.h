/* Decoding 4-bit codes in registers, for host and device: tests/core/test_pack.c proves it for every byte.
 *
 * A run of 64 weights shares one absmax, so its 16 possible values are made once, rounded as dequantize_4bit
 * rounds them, and kept as two planes of 16 bytes: low bytes and high bytes. A code is then looked up by byte
 * permutes, which pick 4 bytes of 8 by the low 3 bits of 4 codes: one permute in each half of a plane, one
 * that takes bit 3, for each of two planes, and two that put the planes together: 8 instructions for 4 codes.
 * With the selectors that is 21 for 8 codes (16 PRMT, 2 LOP3, 3 SHF in the machine code for sm_90), 168 for a
 * run, and 32 more for its table (16 FMUL, 8 F2FP, 8 PRMT): 3.1 a weight. A count, not a speed.
 */
#ifndef QK_DECODE4_H
#define QK_DECODE4_H

#include "qk_nf4.h"

/* Bytes of the pair (a: 0..3, b: 4..7) picked by the 4 low digits of `s`, none above 7. On a device PTX's
 * own:
 * __byte_perm masks `s` first, which costs as much as the permute. */
QK_HD uint32_t qk_byte_perm(uint32_t a, uint32_t b, uint32_t s)
{
    uint32_t r = 0;
#if defined(__CUDACC__) && defined(__CUDA_ARCH__)
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(s));
#else
    const uint64_t pair = (uint64_t)b << 32 | a;
    for (int i = 0; i < 4; i++) r |= (uint32_t)(pair >> (s >> 4 * i & 7) * 8 & 0xff) << 8 * i;
#endif
    return r;
}

/* (a & b) | c: one instruction, which the compiler makes two of when b and c are constants. */
QK_HD uint32_t qk_and_or(uint32_t a, uint32_t b, uint32_t c)
{
#if defined(__CUDACC__) && defined(__CUDA_ARCH__)
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
#else
    return (a & b) | c;
#endif
}

typedef struct {
    uint32_t low[4], high[4]; /* byte j of low[i]: the low byte of value 4i + j */
} qk_planes;

/* pair[i]: value 2i in the low half, value 2i + 1 in the high one. */
QK_HD qk_planes qk_planes_of(const uint32_t pair[8])
{
    qk_planes p;
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int i = 0; i < 4; i++) {
        p.low[i] = qk_byte_perm(pair[2 * i], pair[2 * i + 1], 0x6420);
        p.high[i] = qk_byte_perm(pair[2 * i], pair[2 * i + 1], 0x7531);
    }
    return p;
}

/* The 8 weights of 4 packed bytes (little-endian): out[i] has element 2i in its low half. An element 2i is
 * the high nibble of byte i, hence the order in the last two permutes. */
QK_HD void qk_decode8(const qk_planes *p, uint32_t bytes, uint32_t out[4] /* [OUT] */)
{
    /* byte i of the first half, or byte 4 + i, of the second, by bit 3 of code i */
    const uint32_t index = bytes & 0x77777777u, half = qk_and_or(bytes >> 1, 0x44444444u, 0x32103210u);
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
    for (int i = 0; i < 2; i++) {
        const uint32_t s = index >> 16 * i, h = half >> 16 * i;
        const uint32_t low =
            qk_byte_perm(qk_byte_perm(p->low[0], p->low[1], s), qk_byte_perm(p->low[2], p->low[3], s), h);
        const uint32_t high =
            qk_byte_perm(qk_byte_perm(p->high[0], p->high[1], s), qk_byte_perm(p->high[2], p->high[3], s), h);
        out[2 * i] = qk_byte_perm(low, high, 0x4051);
        out[2 * i + 1] = qk_byte_perm(low, high, 0x6273);
    }
}

#endif
