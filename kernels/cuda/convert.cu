/* Whole arrays of F32, F16 and BF16: conversion, random numbers, the search for what is not finite, and
 * reading for its own sake. */
#include "reduce.cuh"

#include "qk_random.h"

enum { THREADS = 256 };

static dim3 grid_of(int64_t count)
{
    return dim3((unsigned)qk_ceil_div(count, THREADS * 8));
}

__device__ __forceinline__ int64_t first_of_eight(void)
{
    return ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
}

/* ---- conversion ---- */

template <qk_format FROM, qk_format TO, bool WIDE>
static __global__ void convert(const void *src, void *dst, int64_t count)
{
    qk_wait_earlier();
    const int64_t i = first_of_eight();
    if (i >= count) return;
    float v[8];
    qk_load8<FROM, WIDE>(src, i, count, v);
    qk_store8<TO, WIDE>(dst, i, count, v);
}

template <qk_format FROM, qk_format TO>
static int launch_convert(qk_stream stream, const void *src, void *dst, int64_t count)
{
    bool wide = qk_is_wide(src) && qk_is_wide(dst);
    return qk_launch(wide ? convert<FROM, TO, true> : convert<FROM, TO, false>, grid_of(count), dim3(THREADS),
                     0, stream, src, dst, count);
}

template <qk_format FROM>
static int launch_convert_from(qk_stream stream, const void *src, qk_format to, void *dst, int64_t count)
{
    switch (to) {
    case QK_F32:
        return launch_convert<FROM, QK_F32>(stream, src, dst, count);
    case QK_F16:
        return launch_convert<FROM, QK_F16>(stream, src, dst, count);
    case QK_BF16:
        return launch_convert<FROM, QK_BF16>(stream, src, dst, count);
    default:
        return cudaErrorInvalidValue;
    }
}

int qk_cuda_convert(qk_stream stream, qk_format from, const void *src, qk_format to, void *dst, int64_t count)
{
    switch (from) {
    case QK_F32:
        return launch_convert_from<QK_F32>(stream, src, to, dst, count);
    case QK_F16:
        return launch_convert_from<QK_F16>(stream, src, to, dst, count);
    case QK_BF16:
        return launch_convert_from<QK_BF16>(stream, src, to, dst, count);
    default:
        return cudaErrorInvalidValue;
    }
}

/* ---- random numbers ---- */

template <qk_format F, bool WIDE>
static __global__ void random_numbers(uint64_t seed, uint64_t first, void *y, int64_t count)
{
    qk_wait_earlier();
    const int64_t i = first_of_eight();
    if (i >= count) return;
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = qk_random_normal(seed, first + (uint64_t)(i + j));
    qk_store8<F, WIDE>(y, i, count, v);
}

template <qk_format F>
static int launch_random(qk_stream stream, uint64_t seed, uint64_t first, int64_t count, void *y)
{
    return qk_launch(qk_is_wide(y) ? random_numbers<F, true> : random_numbers<F, false>, grid_of(count),
                     dim3(THREADS), 0, stream, seed, first, y, count);
}

int qk_cuda_random(qk_stream stream, uint64_t seed, uint64_t first, qk_format f, int64_t count, void *y)
{
    switch (f) {
    case QK_F32:
        return launch_random<QK_F32>(stream, seed, first, count, y);
    case QK_F16:
        return launch_random<QK_F16>(stream, seed, first, count, y);
    case QK_BF16:
        return launch_random<QK_BF16>(stream, seed, first, count, y);
    default:
        return cudaErrorInvalidValue;
    }
}

/* ---- what is not finite ---- */

static __global__ void find_nothing(unsigned long long *at)
{
    qk_wait_earlier();
    qk_next_may_start();
    *at = ~0ull;
}

/* -1 is the largest unsigned number: what was found takes its place by a minimum, in any order. */
template <qk_format F, bool WIDE>
static __global__ void find_bad(const void *x, int64_t count, unsigned long long *at)
{
    qk_wait_earlier();
    qk_next_may_start();
    const int64_t i = first_of_eight();
    int first = 8;
    if (i < count) {
        float v[8];
        qk_load8<F, WIDE>(x, i, count, v);
#pragma unroll
        for (int j = 7; j >= 0; j--)
            if (!isfinite(v[j])) first = j;
    }
    if (first < 8) atomicMin(at, (unsigned long long)(i + first));
}

template <qk_format F> static int launch_find_bad(qk_stream stream, const void *x, int64_t count, int64_t *at)
{
    unsigned long long *found = (unsigned long long *)at;
    int error = qk_launch(find_nothing, dim3(1), dim3(1), 0, stream, found);
    if (error) return error;
    return qk_launch(qk_is_wide(x) ? find_bad<F, true> : find_bad<F, false>, grid_of(count), dim3(THREADS), 0,
                     stream, x, count, found);
}

int qk_cuda_find_bad(qk_stream stream, qk_format f, const void *x, int64_t count, int64_t *at)
{
    switch (f) {
    case QK_F32:
        return launch_find_bad<QK_F32>(stream, x, count, at);
    case QK_F16:
        return launch_find_bad<QK_F16>(stream, x, count, at);
    case QK_BF16:
        return launch_find_bad<QK_BF16>(stream, x, count, at);
    default:
        return cudaErrorInvalidValue;
    }
}

/* ---- reading ---- */

enum { PROBE_LOADS = 8 }; /* 16-byte loads of a thread, all under way at once */

/* *sink ^= everything, as words; bytes past the last 16 are XORed each on its own. */
static __global__ void __launch_bounds__(THREADS)
    probe_read(const uint4 *p, int64_t pieces, int tail, uint32_t *sink)
{
    qk_wait_earlier();
    qk_next_may_start();
    const int64_t first = (int64_t)blockIdx.x * (THREADS * PROBE_LOADS) + threadIdx.x;
    uint4 v[PROBE_LOADS];
#pragma unroll
    for (int j = 0; j < PROBE_LOADS; j++) {
        const int64_t i = first + j * THREADS;
        v[j] = i < pieces ? qk_load_once(p + i) : make_uint4(0, 0, 0, 0);
    }
    uint32_t all = 0;
#pragma unroll
    for (int j = 0; j < PROBE_LOADS; j++) all ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    if (first < tail) all ^= ((const uint8_t *)(p + pieces))[first];
    all = qk_block_reduce<qk_parity>(all, 0u);
    if (threadIdx.x == 0) atomicXor(sink, all);
}

int qk_cuda_probe_read(qk_stream stream, const void *p, size_t bytes, uint32_t *sink)
{
    if (!qk_is_wide(p)) return cudaErrorInvalidValue;
    int64_t pieces = (int64_t)(bytes / 16), blocks = qk_ceil_div(pieces, THREADS * PROBE_LOADS);
    return qk_launch(probe_read, dim3((unsigned)(blocks ? blocks : 1)), dim3(THREADS), 0, stream,
                     (const uint4 *)p, pieces, (int)(bytes % 16), sink);
}
