/* Rotary positions and the cache. A rotation has the roundings of kernels/cpu/op_rope.c, so both devices give
 * the same bits; a cache entry is rounded to nearest even.
 *
 * A thread takes N neighbouring numbers: 4 where head_dim is a multiple of 8, by 16-byte loads, else 1.
 */
#include "launch.cuh"
#include "qk_nf4.h"

namespace
{

enum { THREADS = 256 };

template <int N> __device__ __forceinline__ void load(float (&x)[N], const float *p)
{
    if constexpr (N == 4) {
        const float4 v = *(const float4 *)p;
        x[0] = v.x;
        x[1] = v.y;
        x[2] = v.z;
        x[3] = v.w;
    } else {
        x[0] = *p;
    }
}

template <qk_format F, int N>
__device__ __forceinline__ void store(void *dst, int64_t at, const float (&x)[N])
{
    if constexpr (F == QK_F32 && N == 4) {
        *(float4 *)((float *)dst + at) = make_float4(x[0], x[1], x[2], x[3]);
    } else if constexpr (F == QK_F32) {
        ((float *)dst)[at] = x[0];
    } else if constexpr (N == 4) {
        const uint32_t low = F == QK_BF16 ? qk_bf16x2(x[0], x[1]) : qk_f16x2(x[0], x[1]);
        const uint32_t high = F == QK_BF16 ? qk_bf16x2(x[2], x[3]) : qk_f16x2(x[2], x[3]);
        *(uint2 *)((uint16_t *)dst + at) = make_uint2(low, high);
    } else {
        const uint32_t bits = F == QK_BF16 ? qk_bf16x2(x[0], 0) : qk_f16x2(x[0], 0);
        ((uint16_t *)dst)[at] = (uint16_t)bits;
    }
}

/* N pairs (i, i + half) of a head at `x`, turned by the angles of a position at `cos` and `sin` [half]. */
template <int N>
__device__ __forceinline__ void turn(float (&low)[N], float (&high)[N], const float *x, const float *cos,
                                     const float *sin, int half, int i)
{
    float a[N], b[N], c[N], s[N];
    load<N>(a, x + i);
    load<N>(b, x + half + i);
    load<N>(c, cos + i);
    load<N>(s, sin + i);
#pragma unroll
    for (int j = 0; j < N; j++) {
        low[j] = qk_add(qk_mul(a[j], c[j]), -qk_mul(b[j], s[j]));
        high[j] = qk_add(qk_mul(b[j], c[j]), qk_mul(a[j], s[j]));
    }
}

/* Item `item` of a token's heads, in place: [heads][half / N]. */
template <int N>
__device__ __forceinline__ void turn_in_place(float *x, const float *cos, const float *sin, int half,
                                              int item)
{
    const int each = half / N, i = item % each * N;
    float *head = x + item / each * 2 * half;
    float low[N], high[N];
    turn<N>(low, high, head, cos, sin, half, i);
    store<QK_F32, N>(head, i, low);
    store<QK_F32, N>(head, half + i, high);
}

template <int N>
__global__ void __launch_bounds__(THREADS)
    rope(float *x, const int32_t *pos, const float *cos, const float *sin, int heads, int d)
{
    const int half = d / 2, item = blockIdx.y * THREADS + threadIdx.x;
    const int64_t t = blockIdx.x;
    qk_next_may_start();
    qk_wait_earlier();
    if (item >= heads * half / N) return;
    const int64_t angle = (int64_t)pos[t] * half;
    turn_in_place<N>(x + t * heads * d, cos + angle, sin + angle, half, item);
}

/* Where a layer's keys and values go. */
struct cache {
    const float *k, *v; /* [T, kv_heads * d] */
    const int32_t *start, *pos;
    int kv_heads, d;
    int64_t slots;
    void *cache_k, *cache_v; /* [kv_heads, slots, d] */
};

/* N numbers of token t from `src` to `dst`: item of [kv_heads][d / N]. */
template <qk_format F, int N>
__device__ __forceinline__ void copy_item(const cache &c, const float *src, void *dst, int64_t t, int item)
{
    const int each = c.d / N, head = item / each, i = item % each * N;
    float x[N];
    load<N>(x, src + (t * c.kv_heads + head) * c.d + i);
    store<F, N>(dst, (head * c.slots + c.start[t] + c.pos[t]) * c.d + i, x);
}

template <qk_format F, int N> __global__ void __launch_bounds__(THREADS) kv_write(cache c)
{
    const int item = blockIdx.y * THREADS + threadIdx.x, count = c.kv_heads * c.d / N;
    qk_next_may_start();
    qk_wait_earlier();
    if (item < count) {
        copy_item<F, N>(c, c.k, c.cache_k, blockIdx.x, item);
    } else if (item < 2 * count) {
        copy_item<F, N>(c, c.v, c.cache_v, blockIdx.x, item - count);
    }
}

/* A token's items: pairs of q, pairs of k, numbers of v. */
template <qk_format F, int N>
__global__ void __launch_bounds__(THREADS)
    rope_kv(cache c, float *q, const float *cos, const float *sin, int heads)
{
    const int half = c.d / 2, each = half / N;
    const int64_t t = blockIdx.x;
    int item = blockIdx.y * THREADS + threadIdx.x;
    qk_next_may_start();
    qk_wait_earlier();
    const int64_t angle = (int64_t)c.pos[t] * half;
    if (item < heads * each) {
        turn_in_place<N>(q + t * heads * c.d, cos + angle, sin + angle, half, item);
        return;
    }
    item -= heads * each;
    if (item < c.kv_heads * each) {
        const int head = item / each, i = item % each * N;
        const int64_t at = (head * c.slots + c.start[t] + c.pos[t]) * c.d + i;
        float low[N], high[N];
        turn<N>(low, high, c.k + (t * c.kv_heads + head) * c.d, cos + angle, sin + angle, half, i);
        store<F, N>(c.cache_k, at, low);
        store<F, N>(c.cache_k, at + half, high);
        return;
    }
    item -= c.kv_heads * each;
    if (item < c.kv_heads * 2 * each) copy_item<F, N>(c, c.v, c.cache_v, t, item);
}

dim3 grid_for(int64_t t, int64_t items)
{
    return dim3((unsigned)t, (unsigned)((items + THREADS - 1) / THREADS));
}

template <qk_format F, int N> int launch_kv_write(qk_stream stream, int64_t t, const cache &c)
{
    return qk_launch(kv_write<F, N>, grid_for(t, 2 * (int64_t)c.kv_heads * c.d / N), dim3(THREADS), 0, stream,
                     c);
}

template <qk_format F> int launch_kv_write(qk_stream stream, int64_t t, const cache &c)
{
    return c.d % 8 == 0 ? launch_kv_write<F, 4>(stream, t, c) : launch_kv_write<F, 1>(stream, t, c);
}

template <qk_format F, int N>
int launch_rope_kv(qk_stream stream, int64_t t, const cache &c, float *q, const float *cos, const float *sin,
                   int heads)
{
    const int64_t items = ((int64_t)heads + 3 * (int64_t)c.kv_heads) * (c.d / 2 / N);
    return qk_launch(rope_kv<F, N>, grid_for(t, items), dim3(THREADS), 0, stream, c, q, cos, sin, heads);
}

template <qk_format F>
int launch_rope_kv(qk_stream stream, int64_t t, const cache &c, float *q, const float *cos, const float *sin,
                   int heads)
{
    return c.d % 8 == 0 ? launch_rope_kv<F, 4>(stream, t, c, q, cos, sin, heads)
                        : launch_rope_kv<F, 1>(stream, t, c, q, cos, sin, heads);
}

} // namespace

int qk_cuda_rope(qk_stream stream, float *x, const int32_t *pos, const float *cos, const float *sin,
                 int heads, int d, int64_t t)
{
    const int64_t items = (int64_t)heads * (d / 2);
    if (d % 8 == 0) {
        return qk_launch(rope<4>, grid_for(t, items / 4), dim3(THREADS), 0, stream, x, pos, cos, sin, heads,
                         d);
    }
    return qk_launch(rope<1>, grid_for(t, items), dim3(THREADS), 0, stream, x, pos, cos, sin, heads, d);
}

int qk_cuda_kv_write(qk_stream stream, const float *k, const float *v, const int32_t *start,
                     const int32_t *pos, int kv_heads, int d, int64_t slots, int64_t t, qk_format f,
                     void *cache_k, void *cache_v)
{
    const cache c = {k, v, start, pos, kv_heads, d, slots, cache_k, cache_v};
    switch (f) {
    case QK_F32:
        return launch_kv_write<QK_F32>(stream, t, c);
    case QK_F16:
        return launch_kv_write<QK_F16>(stream, t, c);
    case QK_BF16:
        return launch_kv_write<QK_BF16>(stream, t, c);
    default:
        return cudaErrorInvalidValue;
    }
}

int qk_cuda_rope_kv(qk_stream stream, float *q, const float *k, const float *v, const int32_t *start,
                    const int32_t *pos, const float *cos, const float *sin, int heads, int kv_heads, int d,
                    int64_t slots, int64_t t, qk_format f, void *cache_k, void *cache_v)
{
    const cache c = {k, v, start, pos, kv_heads, d, slots, cache_k, cache_v};
    switch (f) {
    case QK_F32:
        return launch_rope_kv<QK_F32>(stream, t, c, q, cos, sin, heads);
    case QK_F16:
        return launch_rope_kv<QK_F16>(stream, t, c, q, cos, sin, heads);
    case QK_BF16:
        return launch_rope_kv<QK_BF16>(stream, t, c, q, cos, sin, heads);
    default:
        return cudaErrorInvalidValue;
    }
}
