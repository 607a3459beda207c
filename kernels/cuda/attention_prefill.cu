/* FlashAttention-2 (Dao 2023) for prompts, on tensor cores: a block takes 64 tokens of the packed batch for
 * one query head against tiles of 64 keys counted from the sequence's first position.
 *
 * A run is a stretch of tokens with one start and pos ascending by one. The block finds the runs within its
 * tile and takes them one by one, with the rows of the others masked, so no schedule comes from the host. A
 * row of a product depends on its own operands only, and a tile of keys beyond a row's position multiplies
 * its sums by one and adds zeros: bits depend on the token's own sequence, not on its place in the batch (as
 * long as values are finite).
 *
 * Queries and weights are rounded to the cache's format, sums are in float32.
 */
#include "attention.cuh"

namespace
{

enum {
    QUERIES = 64, /* tokens a block, 16 a warp */
    KEYS = 64,    /* a tile, which lies in shared memory twice: one is read while the next comes */
    WARPS = QUERIES / 16,
    THREADS = 32 * WARPS,
};

template <int D> struct shape {
    static constexpr int CHUNKS = D / 8; /* 16-byte pieces of a row */
    /* In shared memory eight rows' pieces of a column must lie in different banks, as ldmatrix reads them: by
     * exchanging pieces where a row is a multiple of 128 bytes, else by an odd number of pieces a row. */
    static constexpr bool SWIZZLE = D % 64 == 0;
    static constexpr int STRIDE = SWIZZLE ? CHUNKS : CHUNKS | 1;
    static constexpr int TILE = KEYS * STRIDE;      /* pieces */
    static constexpr int ACROSS = CHUNKS & -CHUNKS; /* threads that copy a row together */
    static_assert(!SWIZZLE || (ACROSS == CHUNKS && THREADS / ACROSS % 8 == 0), "a thread keeps its exchange");
    static_assert(D % 16 == 0, "a step of the product takes 16 numbers");
};

template <int D> __device__ __forceinline__ int chunk_at(int row, int chunk)
{
    typedef shape<D> S;
    return row * S::STRIDE + (S::SWIZZLE ? chunk ^ (row & 7) : chunk);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
/* Turing spells a bfloat16 product out in some 130 instructions: called, not repeated 128 times, or ptxas
 * takes a minute for each width. */
__device__ __noinline__ float4 product_bf16(float4 sum, uint4 a, uint2 b)
{
    float d[4] = {sum.x, sum.y, sum.z, sum.w};
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[2] = {b.x, b.y};
    qk_mma_bf16(d, left, right);
    return make_float4(d[0], d[1], d[2], d[3]);
}
#endif

template <qk_format F>
__device__ __forceinline__ void product(float d[4], const uint32_t a[4], const uint32_t b[2])
{
    if (F == QK_F16) {
        qk_mma_f16(d, a, b);
        return;
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    const float4 sum = product_bf16(make_float4(d[0], d[1], d[2], d[3]), make_uint4(a[0], a[1], a[2], a[3]),
                                    make_uint2(b[0], b[1]));
    d[0] = sum.x;
    d[1] = sum.y;
    d[2] = sum.z;
    d[3] = sum.w;
#else
    qk_mma_bf16(d, a, b);
#endif
}

template <qk_format F> __device__ __forceinline__ uint32_t pair(float low, float high)
{
    return F == QK_BF16 ? qk_bf16x2(low, high) : qk_f16x2(low, high);
}

/* Rows key .. key + KEYS - 1 of a cache head, zeros from `count` on. A thread's pieces lie a constant apart
 * on both sides, so that one address each is enough. */
template <int D> __device__ __forceinline__ void copy_tile(uint4 *tile, const uint4 *rows, int key, int count)
{
    typedef shape<D> S;
    const int row = threadIdx.x / S::ACROSS, chunk = threadIdx.x % S::ACROSS;
    const uint4 *from = rows + (int64_t)(key + row) * S::CHUNKS + chunk;
    uint4 *to = tile + chunk_at<D>(row, chunk);
#pragma unroll
    for (int i = 0; i < KEYS; i += THREADS / S::ACROSS) {
#pragma unroll
        for (int j = 0; j < S::CHUNKS; j += S::ACROSS) {
            qk_copy_async(to + i * S::STRIDE + j, from + i * S::CHUNKS + j, key + row + i < count);
        }
    }
}

/* Bit i: token first + i does not continue token first + i - 1; bit 0 is set, and all at and beyond
 * `tokens`. All warps find the same. */
__device__ __forceinline__ uint64_t find_runs(const qk_cuda_attention &a, int64_t first)
{
    uint64_t begins = 1;
#pragma unroll
    for (int half = 0; half < QUERIES; half += 32) {
        const int64_t t = first + half + (threadIdx.x & 31);
        const bool begin =
            t == first || t >= a.tokens || a.start[t] != a.start[t - 1] || a.pos[t] != a.pos[t - 1] + 1;
        begins |= (uint64_t)__ballot_sync(0xffffffffu, begin) << half;
    }
    return begins;
}

/* What a warp holds: lane 4g + t has columns 2t, 2t + 1 of every eight, of rows g (upper) and g + 8. */
template <int D> struct state {
    uint32_t q[D / 16][4];
    float acc[D / 8][4];
    float max[2], sum[2]; /* scores in units of log2; the lane's own part of the sum */
    int limit[2];         /* last position that the row sees */
};

template <qk_format F, int D>
__device__ __forceinline__ void begin_rows(state<D> &w, const qk_cuda_attention &a, const float *q,
                                           int64_t stride, const bool (&used)[2])
{
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        w.max[h] = -INFINITY;
        w.sum[h] = 0;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            float2 x = make_float2(0, 0);
            if (used[h]) x = *(const float2 *)(q + h * 8 * stride + 8 * i + 2 * t);
            w.q[i / 2][i % 2 * 2 + h] = pair<F>(x.x, x.y);
            w.acc[i][2 * h] = w.acc[i][2 * h + 1] = 0;
        }
    }
}

/* One tile of keys, the first at position `key`. */
template <qk_format F, int D>
__device__ __forceinline__ void through_tile(state<D> &w, const uint4 *keys, const uint4 *values, int key,
                                             float scale)
{
    const int lane = threadIdx.x & 31, t = lane & 3;
    float s[KEYS / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) { /* matrices: keys 0..7 low, high columns; keys 8..15 */
            uint32_t b[4];
            qk_ldmatrix_x4(b, keys + chunk_at<D>(16 * j + lane / 16 * 8 + lane % 8, 2 * i + lane / 8 % 2));
            product<F>(s[2 * j], w.q[i], b);
            product<F>(s[2 * j + 1], w.q[i], b + 2);
        }
    }
    uint32_t p[KEYS / 16][4];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float max = w.max[h];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float *x = &s[j][2 * h + c];
                *x = key + 8 * j + 2 * t + c <= w.limit[h] ? *x * scale : -INFINITY;
                max = fmaxf(max, *x);
            }
        }
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
        max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
        const float factor = exp2f(w.max[h] - max);
        float sum = 0;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
            const float x0 = exp2f(s[j][2 * h] - max), x1 = exp2f(s[j][2 * h + 1] - max);
            sum += x0 + x1;
            p[j / 2][j % 2 * 2 + h] = pair<F>(x0, x1);
        }
        w.max[h] = max;
        w.sum[h] = w.sum[h] * factor + sum;
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            w.acc[i][2 * h] *= factor;
            w.acc[i][2 * h + 1] *= factor;
        }
    }
#pragma unroll
    for (int j = 0; j < KEYS / 16; j++) {
#pragma unroll
        for (int i = 0; i < D / 16; i++) { /* matrices: low, high keys of columns 0..7; of 8..15 */
            uint32_t b[4];
            qk_ldmatrix_x4_t(b, values + chunk_at<D>(16 * j + lane % 16, 2 * i + lane / 16));
            product<F>(w.acc[2 * i], p[j], b);
            product<F>(w.acc[2 * i + 1], p[j], b + 2);
        }
    }
}

/* Results of the warp's rows [from, to) of the block, by way of its own part of shared memory: whole rows go
 * out together, and one address serves four numbers. Rows there are D + 8 floats apart: no bank twice. */
template <int D>
__device__ __forceinline__ void end_rows(const state<D> &w, const qk_cuda_attention &a, float *rows,
                                         int64_t first, int64_t column, int from, int to)
{
    constexpr int APART = D + 8;
    static_assert(QUERIES * APART * sizeof(float) <= 4 * shape<D>::TILE * sizeof(uint4), "results fit");
    const int lane = threadIdx.x & 31, top = threadIdx.x / 32 * 16;
    rows += top * APART;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = w.sum[h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        float *row = rows + (lane / 4 + 8 * h) * APART + 2 * (lane & 3);
#pragma unroll
        for (int i = 0; i < D / 8; i++) {
            *(float2 *)(row + 8 * i) = make_float2(w.acc[i][2 * h] / sum, w.acc[i][2 * h + 1] / sum);
        }
    }
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < 16 * D / 4; i += 32) {
        const int row = i / (D / 4), at = i % (D / 4) * 4;
        if (top + row < from || top + row >= to) continue;
        qk_attention_store4(a, first + top + row, column + at, *(const float4 *)(rows + row * APART + at));
    }
}

/* Zeros where fragments are padded: beyond the last input, and in the rows that fill the last tile of 8. */
__device__ __forceinline__ void pad(const qk_cuda_attention &a, int64_t first, int head)
{
    const int64_t column = (int64_t)head * a.d, width = (int64_t)a.heads * a.d;
    const bool last = head == a.heads - 1;
    for (int64_t t = first; t < first + QUERIES && t < (a.tokens + 7) / 8 * 8; t++) {
        qk_attention_zero(a, t, t < a.tokens ? (last ? width : column + a.d) : column,
                          last ? qk_attention_padded(a) : column + a.d);
    }
}

/* Grid: (heads, tiles of tokens). The last tokens of a prompt see the most keys: they go first. */
template <qk_format F, int D>
__global__ void __launch_bounds__(THREADS, 2) prefill(qk_cuda_attention a, float scale)
{
    typedef shape<D> S;
    QK_SHARED(uint4, tiles); /* [2][keys, values][S::TILE] */
    qk_next_may_start();
    qk_wait_earlier();
    const int head = blockIdx.x, kv_head = head / (a.heads / a.kv_heads), lane = threadIdx.x & 31;
    const int64_t first = (int64_t)(gridDim.y - 1 - blockIdx.y) * QUERIES, stride = (int64_t)a.heads * D;
    const int row = threadIdx.x / 32 * 16 + lane / 4; /* upper; the other is row + 8 */
    const int end = a.tokens - first < QUERIES ? (int)(a.tokens - first) : QUERIES;
    const uint64_t begins = find_runs(a, first);
#pragma unroll 1
    for (int from = 0, to; from < end; from = to) {
        for (to = from + 1; to < end && !(begins >> to & 1); to++) {}
        const int first_pos = a.pos[first + from], count = first_pos + to - from; /* keys that the run sees */
        const int64_t slot = kv_head * a.slots + a.start[first + from];
        const uint4 *keys = (const uint4 *)a.k + slot * S::CHUNKS;
        const uint4 *values = (const uint4 *)a.v + slot * S::CHUNKS;
        const bool used[2] = {row >= from && row < to, row + 8 >= from && row + 8 < to};
        /* rows of other runs see one key: their numbers stay finite and go nowhere */
        state<D> w;
        w.limit[0] = used[0] ? first_pos + row - from : 0;
        w.limit[1] = used[1] ? first_pos + row + 8 - from : 0;
        begin_rows<F, D>(w, a, a.q + (first + row) * stride + (int64_t)head * D, stride, used);
        /* the last position that any row of this warp sees, or -1 */
        const int top = row - lane / 4, last = (to < top + 16 ? to : top + 16) - 1;
        const int warp_limit = last >= from && last >= top ? first_pos + last - from : -1;

        copy_tile<D>(tiles, keys, 0, count);
        copy_tile<D>(tiles + S::TILE, values, 0, count);
        qk_copy_commit();
#pragma unroll 1
        for (int key = 0, at = 0; key < count; key += KEYS, at ^= 1) {
            const uint4 *now = tiles + at * 2 * S::TILE;
            if (key + KEYS < count) {
                uint4 *next = tiles + (at ^ 1) * 2 * S::TILE;
                copy_tile<D>(next, keys, key + KEYS, count);
                copy_tile<D>(next + S::TILE, values, key + KEYS, count);
            }
            qk_copy_commit();
            qk_copy_wait<1>();
            __syncthreads();
            if (key <= warp_limit) through_tile<F, D>(w, now, now + S::TILE, key, scale);
            __syncthreads();
        }
        if (warp_limit >= 0) end_rows<D>(w, a, (float *)tiles, first, (int64_t)head * D, from, to);
        __syncthreads();
    }
    if (!a.y && a.slab) pad(a, first, head);
}

template <qk_format F, int D> int launch(qk_stream stream, const qk_cuda_attention *a)
{
    const int64_t tiles = (a->tokens + QUERIES - 1) / QUERIES;
    return qk_launch(prefill<F, D>, dim3((unsigned)a->heads, (unsigned)tiles), dim3(THREADS),
                     4 * sizeof(uint4) * shape<D>::TILE, stream, *a, qk_log2e / sqrtf((float)D));
}

template <qk_format F> int launch_width(qk_stream stream, const qk_cuda_attention *a)
{
    switch (a->d) {
    case 32:
        return launch<F, 32>(stream, a);
    case 64:
        return launch<F, 64>(stream, a);
    case 80:
        return launch<F, 80>(stream, a);
    case 96:
        return launch<F, 96>(stream, a);
    case 128:
        return launch<F, 128>(stream, a);
    default:
        return cudaErrorInvalidValue;
    }
}

} // namespace

bool qk_cuda_attention_prefill_fits(int d)
{
    return d == 32 || d == 64 || d == 80 || d == 96 || d == 128;
}

int qk_cuda_attention_prefill(qk_stream stream, const qk_cuda_attention *a)
{
    if (!qk_attention_valid(a)) return cudaErrorInvalidValue;
    if (a->kv == QK_F16) return launch_width<QK_F16>(stream, a);
    if (a->kv == QK_BF16) return launch_width<QK_BF16>(stream, a);
    return cudaErrorInvalidValue;
}
