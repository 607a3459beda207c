/* Arrays of F32, F16 and BF16 in the CUDA tests: their elements, and device memory at addresses that wide
 * accesses do not fit. */
#ifndef ELEMENT_HELP_H
#define ELEMENT_HELP_H

#include "cuda_help.h"

/* Device memory that begins `shift` bytes after a multiple of 256: outputs (0xff bytes) and copies. */
static inline void *shifted_new(size_t bytes, size_t shift)
{
    return (char *)cuda_new(bytes + shift) + shift;
}

static inline void *shifted_put(const void *host, size_t bytes, size_t shift)
{
    void *p = shifted_new(bytes, shift);
    CUDA_OK(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice));
    return p;
}

/* Element i of an array in `f`. */
static inline float element(qk_format f, const void *p, int64_t i)
{
    if (f == QK_F32) return ((const float *)p)[i];
    uint16_t bits = ((const uint16_t *)p)[i];
    return f == QK_F16 ? qk_f16_to_f32(bits) : qk_bf16_to_f32(bits);
}

static inline float round_to(qk_format f, float v)
{
    return f == QK_F16 ? qk_round_f16(v) : f == QK_BF16 ? qk_round_bf16(v) : v;
}

/* Equal bits, or both a NaN: its payload differs between processors. */
static inline void assert_same_number(float got, float expect, int64_t i)
{
    if (qk_bits(got) != qk_bits(expect) && !(isnan(got) && isnan(expect)))
        fail_msg("element %lld: %.9g, not %.9g", (long long)i, (double)got, (double)expect);
}

static inline void assert_same_elements(qk_format f, const void *got, const void *expect, int64_t n)
{
    for (int64_t i = 0; i < n; i++) assert_same_number(element(f, got, i), element(f, expect, i), i);
}

#endif
