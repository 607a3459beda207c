/* What both attention kernels share: 16-bit numbers, and where results go. */
#ifndef QK_ATTENTION_CUH
#define QK_ATTENTION_CUH

#include "launch.cuh"

/* Scores are kept in units of log2: exp(s) = exp2(s * log2(e)). */
static constexpr float qk_log2e = 1.44269504f;

/* The float16 in bits 0..15; those above are not looked at. */
__device__ __forceinline__ float qk_widen_f16(uint32_t bits)
{
#ifdef __CUDACC__
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((uint16_t)bits));
    return f;
#else
    return qk_f16_to_f32((uint16_t)bits);
#endif
}

/* The numbers in 16 bytes of format F: 4 in F32, else 8. */
template <qk_format F> __device__ __forceinline__ void qk_widen(float x[], uint4 bits)
{
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (F == QK_F32) {
            x[i] = __uint_as_float(word[i]);
        } else if (F == QK_BF16) {
            x[2 * i] = __uint_as_float(word[i] << 16);
            x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
        } else {
            x[2 * i] = qk_widen_f16(word[i]);
            x[2 * i + 1] = qk_widen_f16(word[i] >> 16);
        }
    }
}

__device__ __forceinline__ uint32_t qk_pair(qk_format f, float low, float high)
{
    return f == QK_BF16 ? qk_bf16x2(low, high) : qk_f16x2(low, high);
}

/* Place of a column of a token in a.y16. Both slabs are named so that divisions become shifts. */
__device__ __forceinline__ uint16_t *qk_attention_place(const qk_cuda_attention &a, int64_t token,
                                                        int64_t column)
{
    const int64_t width = (int64_t)a.heads * a.d;
    uint16_t *y = (uint16_t *)a.y16;
    if (a.slab == 0) return y + token * width + column;
    if (a.slab == QK_SLAB_16BIT) return y + qk_fragment_index(token, column, width, QK_SLAB_16BIT);
    return y + qk_fragment_index(token, column, width, QK_SLAB_4BIT);
}

/* Four columns of a token, the first a multiple of 4. */
__device__ __forceinline__ void qk_attention_store4(const qk_cuda_attention &a, int64_t token, int64_t column,
                                                    float4 x)
{
    if (a.y) {
        *(float4 *)(a.y + token * a.heads * a.d + column) = x;
    } else {
        const uint32_t low = qk_pair(a.y_format, x.x, x.y), high = qk_pair(a.y_format, x.z, x.w);
        *(uint2 *)qk_attention_place(a, token, column) = make_uint2(low, high);
    }
}

/* Zeros in columns [from, to) of a row of fragments, by the whole block. */
__device__ __forceinline__ void qk_attention_zero(const qk_cuda_attention &a, int64_t token, int64_t from,
                                                  int64_t to)
{
    for (int64_t i = from + 4 * threadIdx.x; i < to; i += 4 * blockDim.x) {
        *(uint2 *)qk_attention_place(a, token, i) = make_uint2(0, 0);
    }
}

/* Columns of a row with its padding. */
QK_HD int64_t qk_attention_padded(const qk_cuda_attention &a)
{
    const int64_t width = (int64_t)a.heads * a.d;
    return a.slab ? (width + a.slab - 1) / a.slab * a.slab : width;
}

/* What both kernels ask of their arguments. */
static inline bool qk_attention_valid(const qk_cuda_attention *a)
{
    return a->kv_heads > 0 && a->heads % a->kv_heads == 0 && a->d > 0 && a->d % 8 == 0 && a->d <= 256 &&
           (a->y || a->y_format == QK_F16 || a->y_format == QK_BF16) &&
           (a->slab == 0 || a->slab == QK_SLAB_16BIT || a->slab == QK_SLAB_4BIT);
}

#endif
