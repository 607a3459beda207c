/* Flash-decoding (Dao et al. 2023): a block takes QK_ATTENTION_SPLIT positions of one token and cache head
 * for all query heads of the group, so that keys and values are read once; the last block of a token and head
 * to finish merges the pieces in their order. Queries, weights and sums stay in float32.
 *
 * Which pieces there are depends on the token's own position only, and so do the bits of its result.
 */
#include "attention.cuh"
#include "qk_attention_split.h"

namespace
{

enum {
    THREADS = 256,
    WARPS = THREADS / 32,
    SPLIT = QK_ATTENTION_SPLIT,
    PAIR = 2, /* query heads scored together: registers for their queries and sums */
    FOUR = 4, /* query heads whose weights lie together, and whose values are summed together */
};

/* How lanes share rows of up to DMAX numbers. */
template <qk_format F, int DMAX> struct shape {
    static constexpr int WIDE = F == QK_F32 ? 4 : 8; /* numbers of a 16-byte load */
    static constexpr int LANES = DMAX / WIDE < 32 ? DMAX / WIDE : 32;
    static constexpr int LOADS = DMAX / WIDE / LANES; /* of a lane for a row */
    static constexpr int ROWS = THREADS / LANES;      /* that the block reads at a time */
    static constexpr int STEPS = SPLIT / ROWS;
    static constexpr int TILE = STEPS * LOADS <= 8 ? STEPS : 8 / LOADS; /* steps in flight: 8 loads */
    static constexpr int COUNT = WIDE * LOADS;                          /* numbers of a row in a lane */
    static_assert(STEPS % TILE == 0 && TILE <= LANES, "a lane holds the score of one row of a tile");
};

/* A piece, as every thread of the block knows it. */
struct piece {
    int64_t token;
    int kv_head, group, d;
    int count; /* positions */
};

template <class S>
__device__ __forceinline__ void load_rows(uint4 (&x)[S::TILE][S::LOADS], const uint4 *rows, int vectors,
                                          int count, int step)
{
    const int lane = threadIdx.x % S::LANES, first = threadIdx.x / S::LANES;
#pragma unroll
    for (int r = 0; r < S::TILE; r++) {
        const int row = (step + r) * S::ROWS + first;
#pragma unroll
        for (int i = 0; i < S::LOADS; i++) {
            const int vector = lane + i * S::LANES;
            x[r][i] = make_uint4(0, 0, 0, 0);
            if (row < count && vector < vectors) x[r][i] = rows[row * vectors + vector];
        }
    }
}

/* The lane's part of query head `head`. */
template <class S> __device__ __forceinline__ void load_query(float (&q)[S::COUNT], const float *query, int d)
{
#pragma unroll
    for (int i = 0; i < S::COUNT; i += 4) {
        const int column = (threadIdx.x % S::LANES + i / S::WIDE * S::LANES) * S::WIDE + i % S::WIDE;
        float4 v = make_float4(0, 0, 0, 0);
        if (column < d) v = *(const float4 *)(query + column);
        q[i] = v.x;
        q[i + 1] = v.y;
        q[i + 2] = v.z;
        q[i + 3] = v.w;
    }
}

/* Sums of s[r] over the lanes that share a row; lane l is left with that of step fold_step(l). Each exchange
 * halves the rows a lane is responsible for, so TILE sums cost TILE - 1 + log2(LANES / TILE) shuffles. */
template <class S> __device__ __forceinline__ float fold(float (&s)[S::TILE])
{
    const int lane = threadIdx.x % S::LANES;
    int width = S::LANES / 2;
#pragma unroll
    for (int n = S::TILE; n > 1; n /= 2, width /= 2) {
        const bool upper = lane & width;
#pragma unroll
        for (int r = 0; r < n / 2; r++) {
            const float send = upper ? s[r] : s[r + n / 2], keep = upper ? s[r + n / 2] : s[r];
            s[r] = keep + __shfl_xor_sync(0xffffffffu, send, width);
        }
    }
#pragma unroll
    for (; width > 0; width /= 2) s[0] += __shfl_xor_sync(0xffffffffu, s[0], width);
    return s[0];
}

/* The step whose sum fold() leaves: the lane's highest log2(TILE) bits. */
template <class S> __device__ __forceinline__ int fold_step()
{
    return threadIdx.x % S::LANES / (S::LANES / S::TILE);
}

/* Place of the weight of a row in shared memory: [group / FOUR][SPLIT][FOUR]. */
__device__ __forceinline__ int weight_at(int head, int row)
{
    return (head / FOUR * SPLIT + row) * FOUR + head % FOUR;
}

/* Scores of the piece in units of log2, minus infinity beyond its end. */
template <qk_format F, class S>
__device__ __forceinline__ void score(const piece &p, const uint4 *keys, const float *q, float *weights)
{
    const float scale = qk_log2e / sqrtf((float)p.d);
    uint4 k[S::TILE][S::LOADS];
#pragma unroll 1
    for (int step = 0; step < S::STEPS; step += S::TILE) {
        load_rows<S>(k, keys, p.d / S::WIDE, p.count, step);
#pragma unroll 1
        for (int head = 0; head < p.group; head += PAIR) {
            float query[PAIR][S::COUNT], s[PAIR][S::TILE];
#pragma unroll
            for (int h = 0; h < PAIR; h++) {
                const int at = head + h < p.group ? head + h : head;
                load_query<S>(query[h], q + at * p.d, p.d);
            }
#pragma unroll
            for (int r = 0; r < S::TILE; r++) {
                float key[S::COUNT];
#pragma unroll
                for (int i = 0; i < S::LOADS; i++) qk_widen<F>(key + i * S::WIDE, k[r][i]);
#pragma unroll
                for (int h = 0; h < PAIR; h++) {
                    s[h][r] = 0;
#pragma unroll
                    for (int i = 0; i < S::COUNT; i++) s[h][r] = fmaf(key[i], query[h][i], s[h][r]);
                }
            }
            const int row = (step + fold_step<S>()) * S::ROWS + threadIdx.x / S::LANES;
            const bool one = threadIdx.x % (S::LANES / S::TILE) == 0;
#pragma unroll
            for (int h = 0; h < PAIR; h++) {
                const float sum = fold<S>(s[h]);
                if (one && head + h < p.group) {
                    weights[weight_at(head + h, row)] = row < p.count ? sum * scale : -INFINITY;
                }
            }
        }
    }
}

/* Scores to weights 2^(s - max), a warp a head; stats[head] = max, sum. Weights of heads that only pad the
 * last four are zero. */
__device__ __forceinline__ void soften(const piece &p, float *weights, float2 *stats)
{
    const int lane = threadIdx.x % 32, heads = (p.group + FOUR - 1) / FOUR * FOUR;
    for (int head = threadIdx.x / 32; head < heads; head += WARPS) {
        float s[SPLIT / 32], max = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < SPLIT / 32; i++) {
            s[i] = head < p.group ? weights[weight_at(head, lane + 32 * i)] : 0;
            max = fmaxf(max, s[i]);
        }
        for (int width = 16; width > 0; width /= 2) {
            max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, width));
        }
#pragma unroll
        for (int i = 0; i < SPLIT / 32; i++) {
            s[i] = head < p.group ? exp2f(s[i] - max) : 0;
            sum += s[i];
            weights[weight_at(head, lane + 32 * i)] = s[i];
        }
        for (int width = 16; width > 0; width /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, width);
        if (lane == 0 && head < p.group) stats[head] = make_float2(max, sum);
    }
}

/* acc[h] += the values of the steps in `v`, weighted for head h of the four at `weights`. */
template <qk_format F, class S>
__device__ __forceinline__ void add_values(float (&acc)[FOUR][S::COUNT], const uint4 (&v)[S::TILE][S::LOADS],
                                           const float4 *weights, int step)
{
#pragma unroll
    for (int r = 0; r < S::TILE; r++) {
        const float4 w = weights[(step + r) * S::ROWS + threadIdx.x / S::LANES];
        float value[S::COUNT];
#pragma unroll
        for (int i = 0; i < S::LOADS; i++) qk_widen<F>(value + i * S::WIDE, v[r][i]);
#pragma unroll
        for (int i = 0; i < S::COUNT; i++) {
            acc[0][i] = fmaf(w.x, value[i], acc[0][i]);
            acc[1][i] = fmaf(w.y, value[i], acc[1][i]);
            acc[2][i] = fmaf(w.z, value[i], acc[2][i]);
            acc[3][i] = fmaf(w.w, value[i], acc[3][i]);
        }
    }
}

/* Each warp's sums to partial [WARPS][FOUR][d]: rows fold within the warp first. */
template <class S>
__device__ __forceinline__ void gather_warp(float (&acc)[FOUR][S::COUNT], int d, float *partial)
{
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < FOUR; h++) {
#pragma unroll
        for (int i = 0; i < S::COUNT; i++) {
#pragma unroll
            for (int width = S::LANES; width < 32; width *= 2) {
                acc[h][i] += __shfl_xor_sync(0xffffffffu, acc[h][i], width);
            }
        }
        float *to = partial + (threadIdx.x / 32 * FOUR + h) * d;
#pragma unroll
        for (int i = 0; i < S::COUNT; i += 4) {
            const int column = (lane + i / S::WIDE * S::LANES) * S::WIDE + i % S::WIDE;
            if (lane < S::LANES && column < d) {
                *(float4 *)(to + column) =
                    make_float4(acc[h][i], acc[h][i + 1], acc[h][i + 2], acc[h][i + 3]);
            }
        }
    }
}

__device__ __forceinline__ float4 over(float4 x, float y)
{
    return make_float4(x.x / y, x.y / y, x.z / y, x.w / y);
}

/* Sum of the pieces of query head `head` at four columns, in the order of the pieces. */
__device__ __forceinline__ float4 merge(const float2 *stats, const float *values, int d, int64_t splits)
{
    float max = -INFINITY, sum = 0;
    float4 y = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int64_t i = 0; i < splits; i++) max = fmaxf(max, stats[i].x);
#pragma unroll 4
    for (int64_t i = 0; i < splits; i++) {
        const float2 s = stats[i];
        const float4 v = *(const float4 *)(values + i * d);
        const float w = exp2f(s.x - max);
        sum = fmaf(w, s.y, sum);
        y.x = fmaf(w, v.x, y.x);
        y.y = fmaf(w, v.y, y.y);
        y.z = fmaf(w, v.z, y.z);
        y.w = fmaf(w, v.w, y.w);
    }
    return over(y, sum);
}

/* Whether this block is the last of its token and cache head; what the others wrote is then visible. */
__device__ __forceinline__ bool last_of(int *counter, int64_t splits, int *flag)
{
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *flag = atomicAdd(counter, 1) == (int)splits - 1;
        if (*flag) *counter = 0; /* nobody else comes: ready for the next launch */
    }
    __syncthreads();
    __threadfence();
    return *flag;
}

/* Grid: (pieces, cache heads, tokens from `first_token`, with the rows that pad fragments). */
template <qk_format F, int DMAX>
__global__ void __launch_bounds__(THREADS, 2)
    decode(qk_cuda_attention a, qk_attention_plan plan, int64_t first_token)
{
    typedef shape<F, DMAX> S;
    QK_SHARED(float, shared);
    __shared__ int flag;
    qk_next_may_start();
    piece p = {first_token + blockIdx.z, (int)blockIdx.y, a.heads / a.kv_heads, a.d, 0};
    const int64_t column = (int64_t)p.kv_head * p.group * p.d;
    const bool last_head = p.kv_head == a.kv_heads - 1;
    qk_wait_earlier();
    if (p.token >= a.tokens) {
        const int64_t end = last_head ? qk_attention_padded(a) : column + p.group * p.d;
        if (blockIdx.x == 0) qk_attention_zero(a, p.token, column, end);
        return;
    }
    const int64_t length = (int64_t)a.pos[p.token] + 1, splits = qk_attention_splits(length);
    if (blockIdx.x >= splits) return;
    p.count = (int)qk_attention_count(length, blockIdx.x);
    const int64_t row = p.kv_head * a.slots + a.start[p.token] + (int64_t)blockIdx.x * SPLIT;
    const uint4 *keys = (const uint4 *)a.k + row * (a.d / S::WIDE);
    const uint4 *values = (const uint4 *)a.v + row * (a.d / S::WIDE);
    const float *q = a.q + p.token * a.heads * a.d + column;

    float *weights = shared;
    float *partial = weights + (p.group + FOUR - 1) / FOUR * FOUR * SPLIT;
    float2 *stats = (float2 *)(partial + WARPS * FOUR * p.d);
    float2 *all_stats = (float2 *)((char *)a.scratch + plan.stats);
    float *all_values = (float *)((char *)a.scratch + plan.partial);

    uint4 v[S::TILE][S::LOADS]; /* under way while keys are scored */
    load_rows<S>(v, values, p.d / S::WIDE, p.count, 0);
    score<F, S>(p, keys, q, weights);
    __syncthreads();
    soften(p, weights, stats);
    __syncthreads();

    /* after the sums over rows, a thread owns four columns of one of four heads */
    const int own = threadIdx.x / (p.d / 4), at = threadIdx.x % (p.d / 4) * 4;
#pragma unroll 1
    for (int head = 0; head < p.group; head += FOUR) {
        const float4 *w = (const float4 *)weights + head / FOUR * SPLIT;
        float acc[FOUR][S::COUNT] = {};
#pragma unroll 1
        for (int step = 0; step < S::STEPS; step += S::TILE) {
            if (S::STEPS > S::TILE && (head > 0 || step > 0))
                load_rows<S>(v, values, p.d / S::WIDE, p.count, step);
            add_values<F, S>(acc, v, w, step);
        }
        gather_warp<S>(acc, p.d, partial);
        __syncthreads();
        if (own < FOUR && head + own < p.group) {
            float4 y = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < WARPS; i++) {
                const float4 x = *(const float4 *)(partial + (i * FOUR + own) * p.d + at);
                y.x += x.x;
                y.y += x.y;
                y.z += x.z;
                y.w += x.w;
            }
            const float2 s = stats[head + own];
            if (splits == 1) {
                qk_attention_store4(a, p.token, column + (head + own) * p.d + at, over(y, s.y));
            } else {
                const int64_t record = qk_attention_record(
                    blockIdx.z, a.heads, p.kv_head * p.group + head + own, plan.splits, blockIdx.x);
                *(float4 *)(all_values + record * p.d + at) = y;
                if (at == 0) all_stats[record] = s;
            }
        }
        __syncthreads();
    }
    if (splits > 1) {
        int *counter = (int *)a.scratch + blockIdx.z * a.kv_heads + p.kv_head;
        if (!last_of(counter, splits, &flag)) return;
        for (int head = own; own < FOUR && head < p.group; head += FOUR) {
            const int64_t record =
                qk_attention_record(blockIdx.z, a.heads, p.kv_head * p.group + head, plan.splits, 0);
            const float4 y = merge(all_stats + record, all_values + record * p.d + at, p.d, splits);
            qk_attention_store4(a, p.token, column + head * p.d + at, y);
        }
    }
    if (!a.y && last_head) {
        qk_attention_zero(a, p.token, (int64_t)a.heads * a.d, qk_attention_padded(a));
    }
}

template <qk_format F, int DMAX>
int launch(qk_stream stream, const qk_cuda_attention *a, const qk_attention_plan &plan, int64_t first)
{
    const int group = a->heads / a->kv_heads;
    const size_t shared =
        ((size_t)(group + FOUR - 1) / FOUR * FOUR * SPLIT + WARPS * FOUR * (size_t)a->d + 2 * (size_t)group) *
        sizeof(float);
    const int64_t rows = a->slab && !a->y ? (a->tokens + 7) / 8 * 8 : a->tokens;
    const int64_t left = a->tokens - first;
    const int64_t count = left <= plan.tokens ? rows - first : plan.tokens;
    return qk_launch(decode<F, DMAX>, dim3((unsigned)plan.splits, (unsigned)a->kv_heads, (unsigned)count),
                     dim3(THREADS), shared, stream, *a, plan, first);
}

template <qk_format F>
int launch_width(qk_stream stream, const qk_cuda_attention *a, const qk_attention_plan &plan, int64_t first)
{
    if (a->d <= 32) return launch<F, 32>(stream, a, plan, first);
    if (a->d <= 64) return launch<F, 64>(stream, a, plan, first);
    if (a->d <= 128) return launch<F, 128>(stream, a, plan, first);
    return launch<F, 256>(stream, a, plan, first);
}

} // namespace

size_t qk_cuda_attention_bytes(int64_t tokens, int heads, int d, int64_t longest)
{
    return (size_t)qk_attention_plan_for(tokens, heads, d, longest).bytes;
}

int qk_cuda_attention_decode(qk_stream stream, const qk_cuda_attention *a)
{
    if (a->tokens == 0) return cudaSuccess;
    const qk_attention_plan plan = qk_attention_plan_for(a->tokens, a->heads, a->d, a->longest);
    if (!qk_attention_valid(a) || plan.tokens == 0) return cudaErrorInvalidValue;
    for (int64_t first = 0; first < a->tokens; first += plan.tokens) {
        int error = a->kv == QK_F32    ? launch_width<QK_F32>(stream, a, plan, first)
                    : a->kv == QK_F16  ? launch_width<QK_F16>(stream, a, plan, first)
                    : a->kv == QK_BF16 ? launch_width<QK_BF16>(stream, a, plan, first)
                                       : (int)cudaErrorInvalidValue;
        if (error) return error;
    }
    return cudaSuccess;
}
