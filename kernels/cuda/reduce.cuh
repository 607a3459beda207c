/* Reductions over a warp and over a block. The order is a fixed tree: it depends on the number of threads
 * alone, so a block sized by its row gives the row the same bits whatever else a launch does. */
#ifndef QK_REDUCE_CUH
#define QK_REDUCE_CUH

#include "element.cuh"

#define QK_ALL_LANES 0xffffffffu

struct qk_sum {
    template <class T> static __device__ __forceinline__ T apply(T a, T b)
    {
        return a + b;
    }
};
struct qk_largest {
    template <class T> static __device__ __forceinline__ T apply(T a, T b)
    {
        return a > b ? a : b;
    }
};
struct qk_smallest {
    template <class T> static __device__ __forceinline__ T apply(T a, T b)
    {
        return a < b ? a : b;
    }
};
struct qk_parity {
    template <class T> static __device__ __forceinline__ T apply(T a, T b)
    {
        return a ^ b;
    }
};

/* Every lane gets the same bits: at each step of the butterfly both partners combine the same two numbers,
 * and the operations commute. */
template <class Op, class T> __device__ __forceinline__ T qk_warp_reduce(T v)
{
#pragma unroll
    for (int step = 16; step; step /= 2) v = Op::apply(v, __shfl_xor_sync(QK_ALL_LANES, v, step));
    return v;
}

/* Every thread gets the same bits. Called by all threads of a block of whole warps; `none` is what Op leaves
 * the other number unchanged with. */
template <class Op, class T> __device__ __forceinline__ T qk_block_reduce(T v, T none)
{
    __shared__ T part[32];
    const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
    v = qk_warp_reduce<Op>(v);
    __syncthreads(); /* the call before may still be reading */
    if (lane == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    return qk_warp_reduce<Op>(lane < warps ? part[lane] : none);
}

/* Where a number stands among those of its row, as an integer: the larger number first, -0 equal to 0, NaN
 * below all, ties to the lower column. No two columns share a rank, and none has rank 0. */
__device__ __forceinline__ uint64_t qk_rank(float x, int64_t column)
{
    const uint32_t bits = qk_bits(x + 0.0f), sign = 0x80000000u;
    const uint32_t key = x != x ? 0 : bits & sign ? ~bits : bits | sign;
    return (uint64_t)key << 32 | ~(uint32_t)column;
}

__device__ __forceinline__ int32_t qk_rank_column(uint64_t rank)
{
    return (int32_t) ~(uint32_t)rank;
}

/* 1 / sqrt(mean(x^2) + eps) of a row of k (Zhang & Sennrich 2019). Threads take eights of neighbours, wide or
 * not in the same order. */
template <bool WIDE> __device__ __forceinline__ float qk_norm_scale(const float *row, int64_t k, float eps)
{
    float sum = 0;
    for (int64_t i = threadIdx.x * 8; i < k; i += blockDim.x * 8) {
        float v[8];
        qk_load8<QK_F32, WIDE>(row, i, k, v);
#pragma unroll
        for (int j = 0; j < 8; j++) sum = fmaf(v[j], v[j], sum);
    }
    sum = qk_block_reduce<qk_sum>(sum, 0.0f);
    return 1.0f / sqrtf(sum / (float)k + eps);
}

/* Threads of a block that normalises rows of k. */
static inline unsigned qk_norm_threads(int64_t k)
{
    return qk_row_threads(qk_ceil_div(k, 8), 1024);
}

#endif
