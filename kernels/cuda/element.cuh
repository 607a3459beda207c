/* Elements of F32, F16 and BF16 arrays as float32, one by one and eight at a time by 16-byte accesses. */
#ifndef QK_ELEMENT_CUH
#define QK_ELEMENT_CUH

#include "launch.cuh"

template <qk_format F> struct qk_stored {
    typedef uint16_t type;
};
template <> struct qk_stored<QK_F32> {
    typedef float type;
};

/* Whether 16-byte accesses may start at p; NULL: it is not accessed. */
static inline bool qk_is_wide(const void *p)
{
    return (uintptr_t)p % 16 == 0;
}

static inline int64_t qk_ceil_div(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

/* Threads of a block that works on one row of `items`: whole warps, at most `most`. The number depends on the
 * row's length alone, and so does the order of the row's sums. */
static inline unsigned qk_row_threads(int64_t items, int most)
{
    return (unsigned)(items >= most ? most : items < 1 ? 32 : qk_ceil_div(items, 32) * 32);
}

/* Two floats rounded to `to` (F16 or BF16), `low` in bits 0..15. */
__device__ __forceinline__ uint32_t qk_round_pair(qk_format to, float low, float high)
{
    return to == QK_F16 ? qk_f16x2(low, high) : qk_bf16x2(low, high);
}

/* Eight of them, the first in the lowest bits. One branch for all: with one a pair, the compiler stores each
 * pair on its own. */
__device__ __forceinline__ uint4 qk_round_eight(qk_format to, const float v[8])
{
    if (to == QK_F16)
        return make_uint4(qk_f16x2(v[0], v[1]), qk_f16x2(v[2], v[3]), qk_f16x2(v[4], v[5]),
                          qk_f16x2(v[6], v[7]));
    return make_uint4(qk_bf16x2(v[0], v[1]), qk_bf16x2(v[2], v[3]), qk_bf16x2(v[4], v[5]),
                      qk_bf16x2(v[6], v[7]));
}

template <qk_format F> __device__ __forceinline__ float qk_widen(uint32_t bits)
{
    return F == QK_F16 ? qk_f16_to_f32((uint16_t)bits) : qk_bf16_to_f32((uint16_t)bits);
}

template <qk_format F> __device__ __forceinline__ float qk_load_one(const void *p, int64_t i)
{
    if constexpr (F == QK_F32)
        return ((const float *)p)[i];
    else
        return qk_widen<F>(((const uint16_t *)p)[i]);
}

template <qk_format F> __device__ __forceinline__ void qk_store_one(void *p, int64_t i, float v)
{
    if constexpr (F == QK_F32)
        ((float *)p)[i] = v;
    else
        ((uint16_t *)p)[i] = (uint16_t)qk_round_pair(F, v, 0.0f);
}

/* v[j] = element i + j, 0 from element `end` on. i is a multiple of 8; WIDE: p is 16-byte aligned. */
template <qk_format F, bool WIDE>
__device__ __forceinline__ void qk_load8(const void *p, int64_t i, int64_t end, float v[8])
{
    if (!WIDE || i + 8 > end) {
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = i + j < end ? qk_load_one<F>(p, i + j) : 0.0f;
        return;
    }
    if constexpr (F == QK_F32) {
        const float4 a = ((const float4 *)p)[i / 4], b = ((const float4 *)p)[i / 4 + 1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        const uint4 a = ((const uint4 *)p)[i / 8];
        const uint32_t word[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = qk_widen<F>(word[j / 2] >> j % 2 * 16 & 0xffffu);
    }
}

/* Element i + j = v[j], up to element `end`; as qk_load8. */
template <qk_format F, bool WIDE>
__device__ __forceinline__ void qk_store8(void *p, int64_t i, int64_t end, const float v[8])
{
    if (!WIDE || i + 8 > end) {
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (i + j < end) qk_store_one<F>(p, i + j, v[j]);
        return;
    }
    if constexpr (F == QK_F32) {
        ((float4 *)p)[i / 4] = make_float4(v[0], v[1], v[2], v[3]);
        ((float4 *)p)[i / 4 + 1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
        ((uint4 *)p)[i / 8] = qk_round_eight(F, v);
    }
}

/* silu(gate) * up in float32. Where exp overflows the quotient is -0. */
__device__ __forceinline__ float qk_silu_times(float gate, float up)
{
    return gate / (1.0f + expf(-gate)) * up;
}

#endif
