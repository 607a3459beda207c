/* The scale of a run of 64 4-bit weights, and the 16 values that it makes of a code book. */
#ifndef QK_DECODE4_CUH
#define QK_DECODE4_CUH

#include "ptx.cuh"
#include "qk_decode4.h"

/* Where a weight's scales are, nested or not, so that both are decoded by the same instructions: scale =
 * map[index] * absmax + offset. Not nested: map[0] is 1 and the offset -0, which changes no number. */
struct qk_scales {
    const float *absmax;  /* of blocks, or of nested blocks */
    const uint8_t *index; /* nested: entry of the map of each block; else NULL, entry 0 */
    const float *map;     /* nested: [257], the offset last; else NULL */
    int absmax_shift;     /* log2 of the runs of 64 that share an absmax */
    int index_shift;      /* nested: ... and an index */
};

/* What is loaded of a run's scale, long before it is needed: neither value waits for the other. */
struct qk_raw_scale {
    float absmax;
    uint32_t index;
};

/* run: number of the run in the flattened weight. */
__device__ __forceinline__ qk_raw_scale qk_fetch_scale(const qk_scales &s, uint32_t run)
{
    qk_raw_scale raw = {__ldg(s.absmax + (run >> s.absmax_shift)), 0};
    if (s.index) raw.index = __ldg(s.index + (run >> s.index_shift));
    return raw;
}

/* A block's copy of the map, [257] in shared memory; all its threads, at least 256. */
__device__ __forceinline__ void qk_copy_map(const qk_scales &s, float *map)
{
    if (threadIdx.x < 256) map[threadIdx.x] = s.map ? __ldg(s.map + threadIdx.x) : 1.0f;
    if (threadIdx.x == 0) map[256] = s.map ? __ldg(s.map + 256) : -0.0f;
}

__device__ __forceinline__ float qk_scale(const qk_raw_scale &raw, const float *map)
{
    return qk_nested_absmax(map[raw.index], raw.absmax, map[256]);
}

/* Values of the 16 codes, rounded as dequantize_4bit rounds: one float32 product, then to bf16 or f16. */
template <bool BF16> __device__ __forceinline__ qk_planes qk_decode_table(const float code[16], float absmax)
{
    uint32_t pair[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float low = qk_mul(code[2 * i], absmax), high = qk_mul(code[2 * i + 1], absmax);
        pair[i] = BF16 ? qk_bf16x2(low, high) : qk_f16x2(low, high);
    }
    return qk_planes_of(pair);
}

#endif
