/* Rows of logits in float64: logsumexp, entropy, softmax, Kullback-Leibler divergence. A block a row
 * (logsumexp alone: several), which reads it two or three times: a row of 128256 does not fit in shared
 * memory, but it does in L2.
 *
 * The edge cases are those of kernels/cpu/softmax.c: minus infinity has probability 0, a NaN or an infinity
 * makes what depends on it NaN or infinite.
 */
#include "reduce.cuh"

#include <math.h>

/* f(column, logit) for each logit of this thread. WIDE: row is 16-byte aligned and v % 4 == 0; the order is
 * the same without. */
template <bool WIDE, class F>
__device__ __forceinline__ void each_logit(const float *row, int64_t v, const F &f)
{
    for (int64_t i = threadIdx.x * 4; i < v; i += blockDim.x * 4) {
        if (WIDE) {
            const float4 x = *(const float4 *)(row + i);
            f(i, x.x);
            f(i + 1, x.y);
            f(i + 2, x.z);
            f(i + 3, x.w);
        } else {
#pragma unroll 1
            for (int64_t j = i; j < i + 4 && j < v; j++) f(j, row[j]);
        }
    }
}

/* The larger, a NaN before all. */
struct largest_or_nan {
    static __device__ __forceinline__ float apply(float a, float b)
    {
        return a > b || a != a ? a : b;
    }
};

template <bool WIDE> __device__ __forceinline__ double row_max(const float *row, int64_t v)
{
    float max = -INFINITY;
    each_logit<WIDE>(row, v, [&](int64_t, float x) { max = largest_or_nan::apply(max, x); });
    return qk_block_reduce<largest_or_nan>(max, -INFINITY);
}

/* exp((x - max) / temperature). A division by 1 changes nothing, and is left out.
 */
__device__ __forceinline__ double share(float x, double max, double temperature)
{
    const double d = (double)x - max;
    return exp(temperature == 1.0 ? d : d / temperature);
}

template <bool WIDE>
__device__ __forceinline__ double sum_exp(const float *row, int64_t v, double max, double temperature)
{
    double sum = 0;
    each_logit<WIDE>(row, v, [&](int64_t, float x) { sum += share(x, max, temperature); });
    return qk_block_reduce<qk_sum>(sum, 0.0);
}

template <bool WIDE>
__device__ __forceinline__ double row_logsumexp(const float *row, int64_t v, double temperature)
{
    const double max = row_max<WIDE>(row, v);
    if (!isfinite(max)) return max; /* all minus infinity, one infinity, or a NaN */
    return max / temperature + log(sum_exp<WIDE>(row, v, max, temperature));
}

static bool is_wide_row(const void *x, int64_t v)
{
    return v % 4 == 0 && qk_is_wide(x);
}

static dim3 threads_of(int64_t v)
{
    return dim3(qk_row_threads(qk_ceil_div(v, 4), 1024));
}

/* logsumexp alone is asked for at every decoded token, where there may be one row: a row is cut into chunks,
 * so that more than one multiprocessor works on it. Which chunks there are depends on the row's length only.
 */
static constexpr int64_t CHUNK = 8192;

struct partial {
    double max, sum; /* of a chunk: sum exp((x - max) / temperature), 0 where max is not finite */
};

template <bool WIDE>
static __global__ void __launch_bounds__(1024)
    logsumexp_chunk(const float *x, int64_t v, unsigned chunks, double temperature, partial *out)
{
    qk_wait_earlier();
    qk_next_may_start();
    const int64_t from = (int64_t)(blockIdx.x % chunks) * CHUNK, count = v - from < CHUNK ? v - from : CHUNK;
    const float *part = x + (int64_t)(blockIdx.x / chunks) * v + from;
    const double max = row_max<WIDE>(part, count);
    const double sum = isfinite(max) ? sum_exp<WIDE>(part, count, max, temperature) : 0;
    if (threadIdx.x == 0) out[blockIdx.x] = partial{max, sum};
}

/* A warp a row. */
static __global__ void logsumexp_row(const partial *part, int chunks, double temperature, double *out)
{
    qk_wait_earlier();
    qk_next_may_start();
    part += (int64_t)blockIdx.x * chunks;
    float most = -INFINITY; /* a logit: exact */
    for (int i = threadIdx.x; i < chunks; i += 32) most = largest_or_nan::apply(most, (float)part[i].max);
    const double max = qk_warp_reduce<largest_or_nan>(most);
    double sum = 0;
    if (isfinite(max)) {
        for (int i = threadIdx.x; i < chunks; i += 32) {
            if (part[i].sum > 0) sum += part[i].sum * share((float)part[i].max, max, temperature);
        }
    }
    sum = qk_warp_reduce<qk_sum>(sum);
    /* not finite: all minus infinity, one infinity, or a NaN */
    if (threadIdx.x == 0) out[blockIdx.x] = isfinite(max) ? max / temperature + log(sum) : max;
}

size_t qk_cuda_logsumexp_bytes(int64_t n, int64_t v)
{
    return (size_t)(n * qk_ceil_div(v, CHUNK)) * sizeof(partial);
}

int qk_cuda_logsumexp(qk_stream stream, const float *x, int64_t n, int64_t v, double temperature, double *out,
                      void *scratch)
{
    const int64_t chunks = qk_ceil_div(v, CHUNK);
    partial *parts = (partial *)scratch;
    int error = qk_launch(is_wide_row(x, v) ? logsumexp_chunk<true> : logsumexp_chunk<false>,
                          dim3((unsigned)(n * chunks)), threads_of(v < CHUNK ? v : CHUNK), 0, stream, x, v,
                          (unsigned)chunks, temperature, parts);
    if (error) return error;
    return qk_launch(logsumexp_row, dim3((unsigned)n), dim3(32), 0, stream, parts, (int)chunks, temperature,
                     out);
}

/* y may be x: a thread writes what it alone has read, after all have read it for the sum. */
template <bool WIDE>
static __global__ void __launch_bounds__(1024)
    softmax(const float *x, int64_t v, double temperature, float *y)
{
    qk_wait_earlier();
    qk_next_may_start();
    const float *row = x + (int64_t)blockIdx.x * v;
    float *out = y + (int64_t)blockIdx.x * v;
    const double max = row_max<WIDE>(row, v), sum = sum_exp<WIDE>(row, v, max, temperature);
    each_logit<WIDE>(row, v, [&](int64_t i, float l) { out[i] = (float)(share(l, max, temperature) / sum); });
}

int qk_cuda_softmax(qk_stream stream, const float *x, int64_t n, int64_t v, double temperature, float *y)
{
    return qk_launch(is_wide_row(x, v) ? softmax<true> : softmax<false>, dim3((unsigned)n), threads_of(v), 0,
                     stream, x, v, temperature, y);
}

/* With s = sum exp(x - max), the entropy is ln s - sum exp(x - max) (x - max) / s: two terms that are not
 * negative, so nothing cancels. */
template <bool WIDE>
static __global__ void __launch_bounds__(1024)
    row_stats(const float *x, const int32_t *targets, int64_t v, double *stats, int32_t *found)
{
    qk_wait_earlier();
    qk_next_may_start();
    const float *row = x + (int64_t)blockIdx.x * v;
    uint64_t best = 0;
    uint32_t bad = ~0u;
    each_logit<WIDE>(row, v, [&](int64_t i, float l) {
        best = qk_largest::apply(best, qk_rank(l, i));
        if (!isfinite(l)) bad = qk_smallest::apply(bad, (uint32_t)i);
    });
    best = qk_block_reduce<qk_largest>(best, (uint64_t)0);
    bad = qk_block_reduce<qk_smallest>(bad, ~0u);
    const int32_t column = qk_rank_column(best);
    const double max = row[column];
    double sum = 0, weighted = 0;
    each_logit<WIDE>(row, v, [&](int64_t, float l) {
        const double d = (double)l - max, e = exp(d);
        sum += e;
        weighted += e != 0 ? e * d : 0.0; /* minus infinity has no share */
    });
    sum = qk_block_reduce<qk_sum>(sum, 0.0);
    weighted = qk_block_reduce<qk_sum>(weighted, 0.0);
    if (threadIdx.x > 0) return;
    double *out = stats + (int64_t)blockIdx.x * 3;
    out[0] = max + log(sum);
    out[1] = log(sum) - weighted / sum;
    out[2] = targets ? row[targets[blockIdx.x]] : 0.0;
    found[2 * (int64_t)blockIdx.x] = column;
    found[2 * (int64_t)blockIdx.x + 1] = (int32_t)bad;
}

int qk_cuda_row_stats(qk_stream stream, const float *x, const int32_t *targets, int64_t n, int64_t v,
                      double *stats, int32_t *found)
{
    return qk_launch(is_wide_row(x, v) ? row_stats<true> : row_stats<false>, dim3((unsigned)n), threads_of(v),
                     0, stream, x, targets, v, stats, found);
}

template <bool WIDE>
static __global__ void __launch_bounds__(1024) kl(const float *a, const float *b, int64_t v, double *out)
{
    qk_wait_earlier();
    qk_next_may_start();
    a += (int64_t)blockIdx.x * v;
    b += (int64_t)blockIdx.x * v;
    const double lse_a = row_logsumexp<WIDE>(a, v, 1.0), lse_b = row_logsumexp<WIDE>(b, v, 1.0);
    double sum = 0;
    each_logit<WIDE>(a, v, [&](int64_t i, float l) {
        const double ln_p = (double)l - lse_a, ln_q = (double)b[i] - lse_b, p = exp(ln_p);
        if (p != 0) sum += p * (ln_p - ln_q);
    });
    sum = qk_block_reduce<qk_sum>(sum, 0.0);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

int qk_cuda_kl(qk_stream stream, const float *a, const float *b, int64_t n, int64_t v, double *out)
{
    bool wide = is_wide_row(a, v) && is_wide_row(b, v);
    return qk_launch(wide ? kl<true> : kl<false>, dim3((unsigned)n), threads_of(v), 0, stream, a, b, v, out);
}
