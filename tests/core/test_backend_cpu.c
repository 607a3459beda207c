/* The CPU backend: threads, errors, memory. What the operations compute is in test_kernels*.c; here the
 * results of one and of two threads must have the same bits, through tensors and the operations' checks. */
#include "kernel_help.h"

#include "cpu_probe.h"
#include "mem.h"
#include "ops.h"
#include "pool.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

static ql_err error;

#define OK(expr)                                                                                             \
    do {                                                                                                     \
        if ((expr) != QL_OK) fail_msg("%s: %s", #expr, error.message);                                       \
    } while (0)

static ql_tensor new_tensor(ql_device *dev, ql_dtype dtype, int64_t rows, int64_t cols, const void *values)
{
    ql_tensor t;
    if (cols)
        OK(ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, dtype, rows, cols, &t, &error));
    else
        OK(ql_tensor_new_1d(dev, NULL, QL_MEM_ACTIVATIONS, dtype, rows, &t, &error));
    if (values)
        OK(ql_tensor_upload(&t, values, ql_tensor_bytes(&t), &error));
    else
        memset(t.data, 0xff, ql_tensor_bytes(&t));
    return t;
}

static ql_tensor new_random(ql_device *dev, int64_t rows, int64_t cols)
{
    float *v = new_floats((size_t)(rows * (cols ? cols : 1)));
    ql_tensor t = new_tensor(dev, QL_F32, rows, cols, v);
    free(v);
    return t;
}

static ql_tensor new_ids(ql_device *dev, int64_t n, const int32_t *values)
{
    return new_tensor(dev, QL_I32, n, 0, values);
}

/* ---- the pool ---- */

enum { PIECES = 1000 };

typedef struct {
    atomic_int hits[PIECES];
    atomic_int busy[64]; /* by worker number */
    atomic_int overlaps;
    useconds_t pause;
} tally;

static void count_piece(void *ud, int64_t piece, int worker)
{
    tally *t = ud;
    if (atomic_fetch_add(&t->busy[worker], 1) != 0) atomic_fetch_add(&t->overlaps, 1);
    atomic_fetch_add(&t->hits[piece], 1);
    if (t->pause) usleep(t->pause);
    atomic_fetch_sub(&t->busy[worker], 1);
}

static void test_pool_runs_every_piece_once(void **state)
{
    (void)state;
    for (int threads = 1; threads <= 5; threads += 2) {
        ql_pool *pool;
        OK(ql_pool_new(threads, &pool, &error));
        assert_int_equal(ql_pool_threads(pool), threads);
        for (int round = 0; round < 300; round++) {
            tally t = {.pause = round % 100 == 50};
            int64_t pieces = round % 100 == 50 ? 7 : round * 3;
            ql_pool_run(pool, count_piece, &t, pieces);
            for (int64_t i = 0; i < PIECES; i++) assert_int_equal(t.hits[i], i < pieces);
            assert_int_equal(t.overlaps, 0);
            if (round % 64 == 0) usleep(300); /* long enough for the workers to fall asleep */
        }
        ql_pool_free(pool);
    }
    ql_pool_free(NULL);
}

static void note_signals(void *ud, int64_t piece, int worker)
{
    sigset_t set;
    pthread_sigmask(SIG_SETMASK, NULL, &set);
    if (worker > 0 && !sigismember(&set, SIGINT)) atomic_store((atomic_bool *)ud, true);
    (void)piece;
    usleep(500);
}

static void test_workers_block_signals(void **state)
{
    (void)state;
    ql_pool *pool;
    atomic_bool open = false;
    OK(ql_pool_new(3, &pool, &error));
    ql_pool_run(pool, note_signals, &open, 12);
    assert_false(open);
    sigset_t set;
    pthread_sigmask(SIG_SETMASK, NULL, &set);
    assert_false(sigismember(&set, SIGINT));
    ql_pool_free(pool);
}

static void test_thread_counts(void **state)
{
    (void)state;
    int all, n;
    unsetenv("OMP_NUM_THREADS");
    OK(ql_pool_decide_threads(0, &all, &error));
    assert_true(all >= 1);
    setenv("OMP_NUM_THREADS", "1,4", 1);
    OK(ql_pool_decide_threads(0, &n, &error));
    assert_int_equal(n, 1);
    setenv("OMP_NUM_THREADS", "nonsense", 1);
    OK(ql_pool_decide_threads(0, &n, &error));
    assert_int_equal(n, all);
    unsetenv("OMP_NUM_THREADS");
    OK(ql_pool_decide_threads(1, &n, &error));
    assert_int_equal(n, 1);
    assert_int_equal(ql_pool_decide_threads(100000, &n, &error), QL_ERR_ARG);
    assert_non_null(strstr(error.message, "100000"));
    assert_int_equal(ql_pool_decide_threads(-1, &n, &error), QL_ERR_ARG);
    ql_pool *pool;
    assert_int_equal(ql_pool_new(0, &pool, &error), QL_ERR_ARG);
    assert_null(pool);
}

/* ---- the device ---- */

static void test_open(void **state)
{
    (void)state;
    ql_device *dev;
    ql_device_info info;
    OK(ql_device_open("cpu", &(ql_device_options){.threads = 1}, &dev, &error));
    OK(dev->backend->info(dev->ctx, &info, &error));
    assert_int_equal(info.threads, 1);
    assert_true(info.name[0] && info.memory_total >= info.memory_free && info.memory_free > 0);
    assert_string_equal(info.isa, qk_cpu_select(NULL, NULL)->isa);
    ql_device_release(dev);

    assert_int_equal(ql_device_open("cpu", &(ql_device_options){.threads = 100000}, &dev, &error),
                     QL_ERR_ARG);
    assert_null(dev);
    setenv("QLUA_CPU", "scalar", 1);
    OK(ql_device_open("cpu", &(ql_device_options){.threads = 1}, &dev, &error));
    OK(dev->backend->info(dev->ctx, &info, &error));
    assert_string_equal(info.isa, "scalar");
    ql_device_release(dev);
    setenv("QLUA_CPU", "sse9", 1);
    assert_int_equal(ql_device_open("cpu", &(ql_device_options){.threads = 1}, &dev, &error), QL_ERR_ARG);
    assert_non_null(strstr(error.message, "sse9"));
    unsetenv("QLUA_CPU");
}

static void test_memory(void **state)
{
    (void)state;
    ql_device *dev;
    ql_tensor t;
    OK(ql_device_open("cpu", &(ql_device_options){.threads = 1}, &dev, &error));
    assert_int_equal(ql_tensor_new_1d(dev, NULL, QL_MEM_WEIGHTS, QL_F32, (int64_t)1 << 50, &t, &error),
                     QL_ERR_MEMORY);
    assert_non_null(strstr(error.message, "available"));
    assert_null(t.storage);
    for (int64_t n = 0; n <= 16 << 20; n = n * 8 + 1) {
        OK(ql_tensor_new_1d(dev, NULL, QL_MEM_WEIGHTS, QL_U8, n, &t, &error));
        assert_int_equal((uintptr_t)t.data % 64, 0);
        memset(t.data, 1, (size_t)n);
        ql_tensor_free(&t);
    }
    ql_device_release(dev);
}

/* Every allocation of opening a device and of the first product fails once. */
static void test_failed_allocations(void **state)
{
    (void)state;
    for (long n = 0; n < 40; n++) {
        ql_device *dev = NULL;
        ql_tensor x = {0}, y = {0};
        ql_matrix w = {.n = 40, .k = 33, .dtype = QL_F32};
        ql_mem_fail_after(n, false);
        ql_status status = ql_device_open("cpu", &(ql_device_options){.threads = 0}, &dev, &error);
        if (status == QL_OK)
            status = ql_tensor_new_2d(dev, NULL, QL_MEM_WEIGHTS, QL_F32, 40, 33, &w.data, &error);
        if (status == QL_OK)
            status = ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, 9, 33, &x, &error);
        if (status == QL_OK)
            status = ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, 9, 40, &y, &error);
        if (status == QL_OK) {
            memset(x.data, 0, ql_tensor_bytes(&x));
            memset(w.data.data, 0, ql_tensor_bytes(&w.data));
            status = ql_op_matmul(&x, &w, false, &y, &error);
        }
        bool injected = ql_mem_count() > n;
        ql_mem_fail_after(-1, false);
        assert_int_equal(status, injected ? QL_ERR_MEMORY : QL_OK);
        ql_tensor_free(&x);
        ql_tensor_free(&y);
        ql_matrix_free(&w);
        ql_device_release(dev);
        if (!injected) return;
    }
    fail();
}

/* ---- operations ---- */

/* A 4-bit or dense matrix from random float weights, owned by the caller. */
static ql_matrix make_matrix(ql_device *dev, int64_t n, int64_t k, ql_dtype dtype, int block)
{
    ql_matrix w = {.n = n, .k = k, .dtype = dtype};
    ql_tensor src = new_random(dev, n, k);
    ql_tensor dense = new_tensor(dev, dtype, n, k, NULL);
    OK(ql_op_convert(&src, &dense, &error));
    ql_tensor_free(&src);
    if (!block) {
        w.data = dense;
        return w;
    }
    float t[15];
    for (int i = 0; i < 15; i++) t[i] = qk_from_bits(qk_nf4_threshold_bits[i]);
    w.data = new_tensor(dev, QL_U8, (n * k + 1) / 2, 0, NULL);
    w.absmax = new_tensor(dev, QL_F32, (n * k + block - 1) / block, 0, NULL);
    OK(ql_op_quantize4(&dense, block, t, qk_nf4_order, 7, &w.data, &w.absmax, &error));
    ql_tensor_free(&dense);
    w.quant = ql_calloc(1, sizeof *w.quant);
    w.quant->refs = 1;
    w.quant->block = block;
    w.quant->value_dtype = dtype;
    memcpy(w.quant->code, qk_nf4_code, sizeof w.quant->code);
    return w;
}

/* Everything one device computes from the same seed, appended to `out` (the same order each time). */
static size_t compute_everything(ql_device *dev, float *out, size_t room)
{
    size_t used = 0;
    random_state = 12345;
#define KEEP(t)                                                                                              \
    do {                                                                                                     \
        size_t bytes_ = ql_tensor_bytes(&(t));                                                               \
        assert_true(used + bytes_ <= room);                                                                  \
        OK(ql_tensor_download(&(t), (char *)out + used, bytes_, &error));                                    \
        used += (bytes_ + 3) / 4 * 4;                                                                        \
    } while (0)
    const ql_dtype dtypes[] = {QL_F32, QL_F16, QL_BF16, QL_BF16};
    for (int i = 0; i < 4; i++) {
        ql_matrix w = make_matrix(dev, 515, 320, dtypes[i], i == 3 ? 64 : 0);
        w.bias = new_random(dev, 515, 0);
        for (int64_t m = 1; m <= 33; m += 8) {
            ql_tensor x = new_random(dev, m, 320), y = new_random(dev, m, 515);
            OK(ql_op_matmul(&x, &w, true, &y, &error));
            KEEP(y);
            ql_tensor_free(&x);
            ql_tensor_free(&y);
        }
        if (w.quant) {
            ql_tensor dense = new_tensor(dev, QL_BF16, 515, 320, NULL);
            OK(ql_op_dequantize4(&w, &dense, &error));
            KEEP(w.data);
            KEEP(w.absmax);
            KEEP(dense);
            ql_tensor_free(&dense);
        } else {
            int32_t ids[300];
            for (int j = 0; j < 300; j++) ids[j] = (int32_t)(random_u32() % 515);
            ql_tensor index = new_ids(dev, 300, ids), y = new_tensor(dev, QL_F32, 300, 320, NULL);
            OK(ql_op_embed(&w, &index, &y, &error));
            KEEP(y);
            ql_tensor_free(&index);
            ql_tensor_free(&y);
        }
        ql_matrix_free(&w);
    }

    enum { T = 150, HEADS = 6, KV = 2, D = 48, SLOTS = 160 };
    int32_t start[T], pos[T];
    for (int t = 0; t < T; t++) {
        start[t] = t < 100 ? 0 : 105;
        pos[t] = t < 100 ? t : t - 100;
    }
    ql_tensor q = new_random(dev, T, HEADS * D), k = new_random(dev, T, KV * D),
              v = new_random(dev, T, KV * D);
    ql_tensor first = new_ids(dev, T, start), at = new_ids(dev, T, pos),
              y = new_tensor(dev, QL_F32, T, HEADS * D, NULL);
    ql_tensor c = new_random(dev, 100, D / 2), s = new_random(dev, 100, D / 2),
              norm = new_random(dev, HEADS * D, 0);
    ql_tensor ck, cv;
    OK(ql_tensor_new(dev, NULL, QL_MEM_KV, QL_F32, 3, (int64_t[]){KV, SLOTS, D}, &ck, &error));
    OK(ql_tensor_new(dev, NULL, QL_MEM_KV, QL_F32, 3, (int64_t[]){KV, SLOTS, D}, &cv, &error));
    ql_kv_view cache = {&ck, &cv};
    OK(ql_op_rope(&q, &at, &c, &s, HEADS, &error));
    OK(ql_op_rope(&k, &at, &c, &s, KV, &error));
    OK(ql_op_kv_write(&k, &v, &first, &at, cache, &error));
    OK(ql_op_attention(&q, cache, &first, &at, HEADS, &y, &error));
    KEEP(y);
    OK(ql_op_rmsnorm(&q, &norm, 1e-6f, &y, &error));
    KEEP(y);
    OK(ql_op_swiglu(&q, &y, &y, &error));
    KEEP(y);
    OK(ql_op_binary(QL_BIN_SUB, &q, &y, &y, &error));
    OK(ql_op_binary_scalar(QL_BIN_DIV, &y, 3, true, &y, &error));
    KEEP(y);

    ql_tensor values = new_tensor(dev, QL_F32, T, 9, NULL), ids = new_tensor(dev, QL_I32, T, 9, NULL);
    ql_tensor sums = new_tensor(dev, QL_F64, T, 0, NULL), picked = new_tensor(dev, QL_F32, T, 0, NULL);
    ql_tensor rows = new_tensor(dev, QL_F32, T, HEADS * D, NULL);
    OK(ql_op_topk(&q, 9, &values, &ids, &error));
    KEEP(values);
    KEEP(ids);
    OK(ql_op_logsumexp(&q, 0.7, &sums, &error));
    KEEP(sums);
    OK(ql_op_kl(&q, &y, &sums, &error));
    KEEP(sums);
    OK(ql_op_softmax(&q, 0.7, &y, &error));
    KEEP(y);
    OK(ql_op_gather_cols(&q, &at, &picked, &error));
    KEEP(picked);
    OK(ql_op_gather_rows(&q, &at, &rows, &error));
    KEEP(rows);
    ql_tensor stats = new_tensor(dev, QL_F64, T, 3, NULL), found = new_tensor(dev, QL_I32, T, 2, NULL);
    OK(ql_op_row_stats(&q, &at, &stats, &found, &error));
    KEEP(stats);
    KEEP(found);
    ql_tensor_free(&stats);
    ql_tensor_free(&found);
    for (int i = 0; i < 3; i++) {
        ql_tensor drawn = new_tensor(dev, dtypes[i], 77, 1003, NULL);
        OK(ql_op_random(UINT64_MAX - 4, UINT64_C(1) << 40, &drawn, &error));
        KEEP(drawn);
        ql_tensor_free(&drawn);
    }
    OK(dev->backend->sync(dev->ctx, &error));
    ql_tensor *all[] = {&q,    &k,  &v,  &first,  &at,  &y,    &c,      &s,
                        &norm, &ck, &cv, &values, &ids, &sums, &picked, &rows};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ql_tensor_free(all[i]);
    return used;
#undef KEEP
}

static void test_same_bits_for_any_threads_and_instruction_set(void **state)
{
    (void)state;
    enum { ROOM = 16 << 20 };
    float *expect = new_bytes(ROOM), *got = new_bytes(ROOM);
    size_t bytes = 0;
    int most;
    OK(ql_pool_decide_threads(0, &most, &error));
    for (int i = 0; qk_cpu_name(i); i++) {
        if (!qk_cpu_select(qk_cpu_name(i), NULL)) continue;
        for (int threads = 1; threads <= most && threads <= 4; threads++) {
            ql_device *dev;
            setenv("QLUA_CPU", qk_cpu_name(i), 1);
            OK(ql_device_open("cpu", &(ql_device_options){.threads = threads}, &dev, &error));
            size_t used = compute_everything(dev, bytes ? got : expect, ROOM);
            if (bytes) assert_int_equal(used, bytes);
            if (bytes) assert_memory_equal(got, expect, bytes);
            bytes = used;
            ql_device_release(dev);
        }
    }
    unsetenv("QLUA_CPU");
    free(expect);
    free(got);
}

/* Each figure of a row against the operation or the loop that gives it alone. */
static void test_row_stats(void **state)
{
    (void)state;
    enum { N = 7, V = 501 };
    ql_device *dev;
    OK(ql_device_open("cpu", &(ql_device_options){.threads = 2}, &dev, &error));
    float *x = new_floats(N * V);
    for (int i = 0; i < N * V; i++) x[i] *= 20;
    x[2 * V + 8] = x[2 * V + 3] = 90; /* a tie */
    x[3 * V + 100] = NAN;
    x[4 * V] = -INFINITY;
    x[5 * V + 500] = INFINITY;
    x[5 * V + 77] = NAN;
    const int32_t targets[N] = {0, 500, 3, 7, 1, 2, 250}, bad[N] = {-1, -1, -1, 100, 0, 77, -1};
    ql_tensor t = new_tensor(dev, QL_F32, N, V, x), ids = new_ids(dev, N, targets),
              stats = new_tensor(dev, QL_F64, N, 3, NULL), found = new_tensor(dev, QL_I32, N, 2, NULL),
              lse = new_tensor(dev, QL_F64, N, 0, NULL), best = new_tensor(dev, QL_I32, N, 1, NULL),
              most = new_tensor(dev, QL_F32, N, 1, NULL);
    OK(ql_op_row_stats(&t, &ids, &stats, &found, &error));
    OK(ql_op_logsumexp(&t, 1, &lse, &error));
    OK(ql_op_topk(&t, 1, &most, &best, &error));
    for (int i = 0; i < N; i++) {
        const double *row = (const double *)stats.data + 3 * i, sum = ((const double *)lse.data)[i];
        const int32_t *at = (const int32_t *)found.data + 2 * i;
        assert_int_equal(at[0], ((const int32_t *)best.data)[i]);
        assert_int_equal(at[1], bad[i]);
        assert_true(row[2] == (double)x[i * V + targets[i]]);
        if (bad[i] >= 0) continue;
        double entropy = 0;
        for (int j = 0; j < V; j++) entropy -= exp((double)x[i * V + j] - sum) * ((double)x[i * V + j] - sum);
        assert_true(row[0] == sum);
        assert_true(row[1] == entropy);
    }
    assert_int_equal(((const int32_t *)found.data)[4], 3);
    OK(ql_op_row_stats(&t, NULL, &stats, &found, &error));
    assert_true(((const double *)stats.data)[2] == 0);
    ql_tensor outside = new_ids(dev, N, (const int32_t[]){0, 0, 0, V, 0, 0, 0});
    assert_int_equal(ql_op_row_stats(&t, &outside, &stats, &found, &error), QL_ERR_ARG);
    assert_int_equal(ql_op_row_stats(&t, &best, &stats, &found, &error), QL_ERR_ARG);
    assert_int_equal(ql_op_row_stats(&t, &ids, &stats, &ids, &error), QL_ERR_ARG);
    ql_tensor *all[] = {&t, &ids, &stats, &found, &lse, &best, &most, &outside};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ql_tensor_free(all[i]);
    ql_device_release(dev);
    free(x);
}

/* Every place and kind of a bad number, the first of several, on one thread and on two. */
static void test_find_bad(void **state)
{
    (void)state;
    enum { N = 200003 };
    static const uint32_t bad[3][4] = {{0x7f800000, 0xff800000, 0x7fc00000, 0xff800001},
                                       {0x7c00, 0xfc00, 0x7e00, 0xfc01},
                                       {0x7f80, 0xff80, 0x7fc0, 0xff81}};
    static const uint32_t largest[3] = {0x7f7fffff, 0x7bff, 0x7f7f};
    static const int64_t places[] = {0, 1, 63, 4095, 4096, 99999, 131072, N - 1};
    static const ql_dtype dtypes[] = {QL_F32, QL_F16, QL_BF16};
    for (int threads = 1; threads <= 2; threads++) {
        ql_device *dev;
        OK(ql_device_open("cpu", &(ql_device_options){.threads = threads}, &dev, &error));
        for (int d = 0; d < 3; d++) {
            ql_tensor t = new_tensor(dev, dtypes[d], N, 0, NULL);
            size_t size = ql_dtype_size(dtypes[d]);
            char *bytes = t.data;
            int64_t at;
            for (int64_t i = 0; i < N; i++) memcpy(bytes + (size_t)i * size, &largest[d], size);
            OK(ql_op_find_bad(&t, &at, &error));
            assert_int_equal(at, -1);
            for (int i = (int)(sizeof places / sizeof *places) - 1; i >= 0;
                 i--) { /* the first of ever more */
                memcpy(bytes + (size_t)places[i] * size, &bad[d][i % 4], size);
                OK(ql_op_find_bad(&t, &at, &error));
                assert_int_equal(at, places[i]);
            }
            ql_tensor_free(&t);
        }
        ql_tensor ids = new_ids(dev, 1, (const int32_t[]){1});
        int64_t at;
        assert_int_equal(ql_op_find_bad(&ids, &at, &error), QL_ERR_ARG);
        assert_int_equal(ql_op_random(1, 0, &ids, &error), QL_ERR_ARG);
        ql_tensor_free(&ids);
        ql_device_release(dev);
    }
}

/* Any part of the stream is the stream's, and its numbers are near normal with standard deviation 0.02. */
static void test_random(void **state)
{
    (void)state;
    enum { N = 100000 };
    ql_device *dev;
    OK(ql_device_open("cpu", &(ql_device_options){.threads = 2}, &dev, &error));
    ql_tensor whole = new_tensor(dev, QL_F32, N, 0, NULL), part = new_tensor(dev, QL_F32, 777, 0, NULL);
    OK(ql_op_random(9, 0, &whole, &error));
    const float *x = whole.data;
    for (uint64_t first = 0; first + 777 <= N; first += 9999) {
        OK(ql_op_random(9, first, &part, &error));
        assert_memory_equal(part.data, x + first, 777 * sizeof *x);
    }
    double sum = 0, squares = 0;
    for (int i = 0; i < N; i++) {
        sum += (double)x[i];
        squares += (double)x[i] * (double)x[i];
    }
    /* Five standard errors; that of a square is 0.0004 sqrt(1.7), the sum of four uniforms having
     * kurtosis 2.7. */
    assert_true(fabs(sum / N) < 5 * 0.02 / sqrt(N));
    assert_true(fabs(squares / N - 0.0004) < 5 * 0.0004 * sqrt(1.7) / sqrt(N));
    ql_tensor_free(&whole);
    ql_tensor_free(&part);
    ql_device_release(dev);
}

/* The operations take caches of any float type, the CPU only its own. */
static void test_cache_types(void **state)
{
    (void)state;
    ql_device *dev;
    OK(ql_device_open("cpu", &(ql_device_options){.threads = 1}, &dev, &error));
    ql_tensor x = new_random(dev, 2, 8), zero = new_ids(dev, 2, (const int32_t[]){0, 0}), k, v;
    const ql_dtype types[][2] = {{QL_F32, QL_F32},  {QL_BF16, QL_BF16}, {QL_F16, QL_F16},
                                 {QL_BF16, QL_F16}, {QL_F32, QL_BF16},  {QL_F64, QL_F64}};
    const ql_status want[] = {QL_OK,      QL_ERR_UNSUPPORTED, QL_ERR_UNSUPPORTED,
                              QL_ERR_ARG, QL_ERR_ARG,         QL_ERR_ARG};
    for (int i = 0; i < 6; i++) {
        OK(ql_tensor_new(dev, NULL, QL_MEM_KV, types[i][0], 3, (int64_t[]){1, 5, 8}, &k, &error));
        OK(ql_tensor_new(dev, NULL, QL_MEM_KV, types[i][1], 3, (int64_t[]){1, 5, 8}, &v, &error));
        ql_kv_view cache = {&k, &v};
        assert_int_equal(ql_op_kv_write(&x, &x, &zero, &zero, cache, &error), want[i]);
        assert_int_equal(ql_op_attention(&x, cache, &zero, &zero, 1, &x, &error), want[i]);
        if (want[i] == QL_ERR_UNSUPPORTED) assert_non_null(strstr(error.message, "in float32, not"));
        ql_tensor_free(&k);
        ql_tensor_free(&v);
    }
    ql_tensor_free(&x);
    ql_tensor_free(&zero);
    ql_device_release(dev);
}

static void test_indices_are_checked(void **state)
{
    (void)state;
    ql_device *dev;
    OK(ql_device_open("cpu", &(ql_device_options){.threads = 1}, &dev, &error));
    ql_matrix table = make_matrix(dev, 10, 8, QL_F32, 0);
    ql_tensor x = new_random(dev, 2, 8), y = new_random(dev, 2, 8), one = new_random(dev, 2, 0);
    ql_tensor c = new_random(dev, 3, 4), cache = {0};
    OK(ql_tensor_new(dev, NULL, QL_MEM_KV, QL_F32, 3, (int64_t[]){1, 5, 8}, &cache, &error));
    ql_kv_view view = {&cache, &cache};
    ql_tensor zero = new_ids(dev, 2, (const int32_t[]){0, 0});
    const int32_t bad[][2] = {{0, -1}, {10, 0}, {0, INT32_MAX}, {INT32_MIN, 0}};
    for (int i = 0; i < 4; i++) {
        ql_tensor ids = new_ids(dev, 2, bad[i]);
        assert_int_equal(ql_op_embed(&table, &ids, &y, &error), QL_ERR_ARG);
        assert_non_null(strstr(error.message, "outside 0..9"));
        assert_int_equal(ql_op_rope(&x, &ids, &c, &c, 1, &error), QL_ERR_ARG);
        assert_int_equal(ql_op_gather_rows(&x, &ids, &y, &error), QL_ERR_ARG);
        assert_int_equal(ql_op_gather_cols(&x, &ids, &one, &error), QL_ERR_ARG);
        assert_int_equal(ql_op_kv_write(&x, &x, &ids, &zero, view, &error), QL_ERR_ARG);
        assert_int_equal(ql_op_kv_write(&x, &x, &zero, &ids, view, &error), QL_ERR_ARG);
        assert_int_equal(ql_op_attention(&x, view, &ids, &zero, 1, &y, &error), QL_ERR_ARG);
        assert_int_equal(ql_op_attention(&x, view, &zero, &ids, 1, &y, &error), QL_ERR_ARG);
        ql_tensor_free(&ids);
    }
    ql_tensor *all[] = {&x, &y, &one, &c, &cache, &zero};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ql_tensor_free(all[i]);
    ql_matrix_free(&table);
    ql_device_release(dev);
}

static void test_tensors_are_checked(void **state)
{
    (void)state;
    ql_device *dev;
    OK(ql_device_open("cpu", &(ql_device_options){.threads = 1}, &dev, &error));
    ql_tensor none = {.dtype = QL_F32, .ndim = 2, .shape = {2, 32}}, x = new_random(dev, 2, 32),
              y = new_random(dev, 2, 8), same = new_random(dev, 2, 32);
    assert_int_equal(ql_op_binary_scalar(QL_BIN_ADD, &none, 1, false, &same, &error), QL_ERR_ARG);
    assert_int_equal(ql_op_binary(QL_BIN_ADD, &x, &none, &same, &error), QL_ERR_ARG);
    assert_int_equal(ql_op_convert(&none, &same, &error), QL_ERR_ARG);
    assert_int_equal(ql_op_convert(&x, &none, &error), QL_ERR_ARG);
    ql_matrix w = make_matrix(dev, 8, 32, QL_F32, 0);
    OK(ql_op_matmul(&x, &w, false, &y, &error));
    w.data.dtype = QL_I32;
    assert_int_equal(ql_op_matmul(&x, &w, false, &y, &error), QL_ERR_ARG);
    w.data.dtype = QL_F32;
    w.data.shape[0] = 7; /* fewer rows than the matrix claims */
    assert_int_equal(ql_op_matmul(&x, &w, false, &y, &error), QL_ERR_ARG);
    ql_matrix_free(&w);
    ql_tensor_free(&x);
    ql_tensor_free(&y);
    ql_tensor_free(&same);
    ql_device_release(dev);
}

static void test_nothing_to_do(void **state)
{
    (void)state;
    ql_device *dev;
    OK(ql_device_open("cpu", &(ql_device_options){.threads = 0}, &dev, &error));
    ql_matrix w = make_matrix(dev, 10, 8, QL_BF16, 0);
    ql_tensor x = new_tensor(dev, QL_F32, 0, 8, NULL), y = new_tensor(dev, QL_F32, 0, 10, NULL);
    x.ndim = y.ndim = 2;
    OK(ql_op_matmul(&x, &w, false, &y, &error));
    OK(ql_op_swiglu(&x, &x, &x, &error));
    ql_tensor_free(&x);
    ql_tensor_free(&y);
    ql_matrix_free(&w);
    ql_device_release(dev);
}

static void test_probe(void **state)
{
    (void)state;
    ql_cpu_ceiling c;
    OK(ql_cpu_probe(1, 1 << 20, 1, &c, &error));
    assert_true(c.threads == 1 && c.read_bytes_per_second > 0 && c.flops_per_second > 0 && c.isa[0]);
    setenv("QLUA_CPU", "scalar", 1);
    OK(ql_cpu_probe(1, 1 << 20, 1, &c, &error));
    assert_string_equal(c.isa, "scalar");
    setenv("QLUA_CPU", "z80", 1);
    assert_int_equal(ql_cpu_probe(1, 1 << 20, 1, &c, &error), QL_ERR_ARG);
    unsetenv("QLUA_CPU");
    for (long n = 0; n < 3; n++) {
        ql_mem_fail_after(n, true);
        assert_int_equal(ql_cpu_probe(1, 1 << 20, 1, &c, &error), QL_ERR_MEMORY);
        ql_mem_fail_after(-1, false);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_pool_runs_every_piece_once),
        cmocka_unit_test(test_workers_block_signals),
        cmocka_unit_test(test_thread_counts),
        cmocka_unit_test(test_open),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_failed_allocations),
        cmocka_unit_test(test_same_bits_for_any_threads_and_instruction_set),
        cmocka_unit_test(test_row_stats),
        cmocka_unit_test(test_find_bad),
        cmocka_unit_test(test_random),
        cmocka_unit_test(test_cache_types),
        cmocka_unit_test(test_indices_are_checked),
        cmocka_unit_test(test_tensors_are_checked),
        cmocka_unit_test(test_nothing_to_do),
        cmocka_unit_test(test_probe),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
