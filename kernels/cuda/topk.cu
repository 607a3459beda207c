/* The k largest of each row, by ranks (reduce.cuh): integers that are all different, so that ties need no
 * care and the result does not depend on the order in which threads come by.
 *
 * A row is cut into chunks. A block finds the k best of a chunk by a radix select in shared memory; then one
 * block a row does the same with what the chunks kept, and sorts the winners. The row is read once. For k = 1
 * the selection is a maximum.
 */
#include "reduce.cuh"

/* Columns: 32 KB of keys, within the 48 KB that every device gives. */
static constexpr int64_t CHUNK = 8192;
/* Winners sorted in shared memory (32 KB); more are sorted where they lie. */
static constexpr int64_t SORT_SHARED = 4096;
static constexpr int THREADS = 512;

/* ---- host: sizes ---- */

static int64_t kept_of(int64_t v, int64_t k)
{
    int64_t most = k < CHUNK ? k : CHUNK, last = v % CHUNK;
    return v / CHUNK * most + (last < most ? last : most);
}

static int64_t power_of_two(int64_t k)
{
    int64_t p = 1;
    while (p < k) p *= 2;
    return p;
}

size_t qk_cuda_topk_bytes(int64_t n, int64_t v, int64_t k)
{
    int64_t a_row = k == 1 ? qk_ceil_div(v, CHUNK) : kept_of(v, k);
    if (k > SORT_SHARED) a_row += power_of_two(k);
    return (size_t)n * (size_t)a_row * sizeof(uint64_t);
}

/* ---- k = 1 ---- */

template <bool WIDE>
static __global__ void __launch_bounds__(THREADS)
    argmax_chunk(const float *x, int64_t v, unsigned chunks, uint64_t *best)
{
    qk_wait_earlier();
    qk_next_may_start();
    const float *row = x + (int64_t)(blockIdx.x / chunks) * v;
    const int64_t from = (int64_t)(blockIdx.x % chunks) * CHUNK, end = from + CHUNK < v ? from + CHUNK : v;
    uint64_t rank = 0;
    for (int64_t i = from + threadIdx.x * 8; i < end; i += blockDim.x * 8) {
        float a[8];
        qk_load8<QK_F32, WIDE>(row, i, end, a);
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (i + j < end) rank = qk_largest::apply(rank, qk_rank(a[j], i + j));
    }
    rank = qk_block_reduce<qk_largest>(rank, (uint64_t)0);
    if (threadIdx.x == 0) best[blockIdx.x] = rank;
}

static __global__ void argmax_row(const float *x, int64_t v, unsigned chunks, const uint64_t *best,
                                  float *values, int32_t *ids)
{
    qk_wait_earlier();
    qk_next_may_start();
    uint64_t rank = 0;
    for (unsigned i = threadIdx.x; i < chunks; i += 32)
        rank = qk_largest::apply(rank, best[(int64_t)blockIdx.x * chunks + i]);
    rank = qk_warp_reduce<qk_largest>(rank);
    if (threadIdx.x > 0) return;
    const int32_t column = qk_rank_column(rank);
    values[blockIdx.x] = x[(int64_t)blockIdx.x * v + column];
    ids[blockIdx.x] = column;
}

static int argmax(qk_stream stream, const float *x, int64_t n, int64_t v, float *values, int32_t *ids,
                  uint64_t *scratch)
{
    unsigned chunks = (unsigned)qk_ceil_div(v, CHUNK);
    unsigned threads = qk_row_threads(qk_ceil_div(v < CHUNK ? v : CHUNK, 8), THREADS);
    bool wide = v % 8 == 0 && qk_is_wide(x);
    int error = qk_launch(wide ? argmax_chunk<true> : argmax_chunk<false>, dim3((unsigned)n * chunks),
                          dim3(threads), 0, stream, x, v, chunks, scratch);
    if (error) return error;
    return qk_launch(argmax_row, dim3((unsigned)n), dim3(32), 0, stream, x, v, chunks, scratch, values, ids);
}

/* ---- selection ---- */

/* What one round of the selection found: the byte, how many ranks lie above it, and how many have it. */
struct bucket {
    int digit, above, count;
};

/* One warp: the largest digit for which at least `left` ranks have it or a larger one. */
__device__ __forceinline__ void find_bucket(const int *histogram, int left, bucket *found)
{
    const int lane = threadIdx.x, top = 255 - 8 * lane;
    int own = 0;
    for (int j = 0; j < 8; j++) own += histogram[top - j];
    int upto = own;
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(QK_ALL_LANES, upto, step);
        if (lane >= step) upto += other;
    }
    int above = upto - own;
    if (above >= left || upto < left) return;
    int digit = top;
    while (above + histogram[digit] < left) above += histogram[digit--];
    *found = bucket{digit, above, histogram[digit]};
}

/* A rank that exactly k of the `count` different ranks rank(0), rank(1), ... reach: found byte by byte from
 * the top, until all that share the bytes found so far win. So the column's bytes matter to ties only. */
template <class Rank> __device__ __forceinline__ uint64_t bound_of(const Rank &rank, int count, int k)
{
    __shared__ int histogram[256];
    __shared__ bucket found;
    if (k >= count) return 0;
    uint64_t prefix = 0;
    int left = k;
    for (int shift = 56; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) histogram[i] = 0;
        __syncthreads();
        /* Neighbours often share a sign and exponent: runs are counted before they reach shared memory. */
        int last = 0, run = 0;
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            const uint64_t r = rank(i);
            if (shift < 56 && (r ^ prefix) >> (shift + 8)) continue;
            const int digit = (int)(r >> shift & 255);
            if (digit != last && run) {
                atomicAdd(&histogram[last], run);
                run = 0;
            }
            last = digit;
            run++;
        }
        if (run) atomicAdd(&histogram[last], run);
        __syncthreads();
        if (threadIdx.x < 32) find_bucket(histogram, left, &found);
        __syncthreads();
        prefix |= (uint64_t)found.digit << shift;
        left -= found.above;
        if (found.count == left) break;
    }
    return prefix;
}

/* Those that reach the bound to `winners`, in any order. */
template <class Rank>
__device__ __forceinline__ void collect(const Rank &rank, int count, uint64_t bound, uint64_t *winners)
{
    __shared__ int taken;
    if (threadIdx.x == 0) taken = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const uint64_t r = rank(i);
        if (r >= bound) winners[atomicAdd(&taken, 1)] = r;
    }
    __syncthreads();
}

/* The k best of each chunk to kept[row], chunk by chunk. */
static __global__ void __launch_bounds__(THREADS)
    select_chunk(const float *x, int64_t v, unsigned chunks, int k, int64_t kept_of_row, uint64_t *kept)
{
    QK_SHARED(uint32_t, keys);
    qk_wait_earlier();
    qk_next_may_start();
    const int64_t row = blockIdx.x / chunks, chunk = blockIdx.x % chunks, from = chunk * CHUNK;
    const int count = (int)(v - from < CHUNK ? v - from : CHUNK);
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        keys[i] = (uint32_t)(qk_rank(x[row * v + from + i], 0) >> 32);
    __syncthreads();
    const auto rank = [=](int i) { return (uint64_t)keys[i] << 32 | ~(uint32_t)(from + i); };
    const uint64_t bound = bound_of(rank, count, k);
    collect(rank, count, bound, kept + row * kept_of_row + chunk * (k < CHUNK ? k : CHUNK));
}

/* Bitonic sort, largest first; n a power of two (Batcher 1968). */
__device__ __forceinline__ void sort(uint64_t *a, int n)
{
    for (int size = 2; size <= n; size *= 2)
        for (int stride = size / 2; stride; stride /= 2) {
            for (int i = threadIdx.x; i < n / 2; i += blockDim.x) {
                const int low = 2 * i - (i & (stride - 1)), high = low + stride;
                const uint64_t p = a[low], q = a[high];
                if ((p < q) == !(low & size)) {
                    a[low] = q;
                    a[high] = p;
                }
            }
            __syncthreads();
        }
}

/* The k best of what the chunks of a row kept, sorted. room: [n, padded] for the winners, or NULL: shared
 * memory has it. */
static __global__ void __launch_bounds__(THREADS)
    select_row(const float *x, int64_t v, int k, int padded, const uint64_t *kept, int64_t kept_of_row,
               uint64_t *room, float *values, int32_t *ids)
{
    QK_SHARED(uint64_t, shared);
    qk_wait_earlier();
    qk_next_may_start();
    const int64_t row = blockIdx.x;
    uint64_t *winners = room ? room + row * padded : shared;
    const uint64_t *mine = kept + row * kept_of_row;
    const auto rank = [=](int i) { return mine[i]; };
    const uint64_t bound = bound_of(rank, (int)kept_of_row, k);
    for (int i = k + threadIdx.x; i < padded; i += blockDim.x) winners[i] = 0; /* behind all ranks */
    collect(rank, (int)kept_of_row, bound, winners);
    sort(winners, padded);
    for (int i = threadIdx.x; i < k; i += blockDim.x) {
        const int32_t column = qk_rank_column(winners[i]);
        values[row * k + i] = x[row * v + column];
        ids[row * k + i] = column;
    }
}

int qk_cuda_topk(qk_stream stream, const float *x, int64_t n, int64_t v, int64_t k, float *values,
                 int32_t *ids, void *scratch)
{
    if (k < 1 || k > v || v > INT32_MAX / 2) return cudaErrorInvalidValue;
    uint64_t *kept = (uint64_t *)scratch;
    if (k == 1) return argmax(stream, x, n, v, values, ids, kept);
    unsigned chunks = (unsigned)qk_ceil_div(v, CHUNK);
    int64_t chunk = v < CHUNK ? v : CHUNK, kept_of_row = kept_of(v, k), padded = power_of_two(k);
    uint64_t *room = k > SORT_SHARED ? kept + n * kept_of_row : NULL;
    int error = qk_launch(select_chunk, dim3((unsigned)n * chunks), dim3(qk_row_threads(chunk, THREADS)),
                          (size_t)chunk * sizeof(uint32_t), stream, x, v, chunks, (int)k, kept_of_row, kept);
    if (error) return error;
    return qk_launch(select_row, dim3((unsigned)n), dim3(qk_row_threads(kept_of_row, THREADS)),
                     room ? 0 : (size_t)padded * sizeof(uint64_t), stream, x, v, (int)k, (int)padded, kept,
                     kept_of_row, room, values, ids);
}
