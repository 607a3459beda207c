/* Rows of logits: top-k with its order on ties, and float64 sums, CUDA against kernels/cpu/softmax.c and
 * topk.c. */
#include "element_help.h"

/* ---- top-k ---- */

enum { PLAIN_ROW, TIES, MIXED, ALL_NAN, ALL_EQUAL, NEGATIVE, SMALL, ROW_KINDS };

static void fill_row(float *x, int64_t v, int kind)
{
    static const float special[] = {NAN, INFINITY, -INFINITY, 0, -0.0f, 1e-45f, -1e-45f};
    for (int64_t i = 0; i < v; i++) {
        x[i] = random_unit() * 12;
        if (kind == TIES) x[i] = (float)(int)(x[i] / 4) * 0.5f; /* both zeros among them */
        if (kind == TIES && x[i] == 0 && random_u32() % 2) x[i] = -0.0f;
        if (kind == MIXED && random_u32() % 3 == 0) x[i] = special[random_u32() % 7];
        if (kind == ALL_NAN) x[i] = NAN;
        if (kind == ALL_EQUAL) x[i] = 1.5f;
        if (kind == NEGATIVE) x[i] = -1 - fabsf(x[i]);
        if (kind == SMALL) x[i] *= 1e-39f;
    }
}

static void check_topk(const float *x, int64_t n, int64_t v, int64_t k, size_t shift)
{
    float *values = new_bytes((size_t)(n * k) * 4), *d_values = cuda_new((size_t)(n * k) * 4);
    int32_t *ids = new_bytes((size_t)(n * k) * 4), *d_ids = cuda_new((size_t)(n * k) * 4);
    for (int64_t i = 0; i < n; i++) qk_topk(x + i * v, v, k, values + i * k, ids + i * k);
    CUDA_RUN(qk_cuda_topk(NULL, shifted_put(x, (size_t)(n * v) * 4, shift), n, v, k, d_values, d_ids,
                          cuda_new(qk_cuda_topk_bytes(n, v, k))));
    float *got = cuda_copy(d_values, (size_t)(n * k) * 4);
    int32_t *found = cuda_copy(d_ids, (size_t)(n * k) * 4);
    for (int64_t i = 0; i < n * k; i++)
        if (found[i] != ids[i])
            fail_msg("%lld of %lld, row %lld, place %lld: column %d, not %d", (long long)k, (long long)v,
                     (long long)(i / k), (long long)(i % k), found[i], ids[i]);
    assert_same_bits(got, values, (size_t)(n * k));
    cuda_free_all();
    free(values);
    free(ids);
    free(got);
    free(found);
}

/* Rows of all kinds at once. */
static void check_topk_kinds(int64_t v, const int64_t *ks, int count, size_t shift)
{
    float *x = new_bytes((size_t)(ROW_KINDS * v) * 4);
    for (int kind = 0; kind < ROW_KINDS; kind++) fill_row(x + kind * v, v, kind);
    for (int i = 0; i < count; i++)
        if (ks[i] <= v) check_topk(x, ROW_KINDS, v, ks[i], shift);
    free(x);
}

static void test_topk(void **state)
{
    (void)state;
    const int64_t ks[] = {1, 2, 5, 50, 100, 777};
    const int64_t widths[] = {1, 2, 5, 33, 256, 777};
    for (size_t s = 0; s < sizeof widths / sizeof *widths; s++) check_topk_kinds(widths[s], ks, 6, s % 2 * 4);
}

/* Rows of more than one chunk of 8192; the last chunk may hold fewer than k. */
static void test_topk_chunks(void **state)
{
    (void)state;
    const int64_t few[] = {1, 3, 64}, all[] = {5000};
    check_topk_kinds(8192, few, 1, 0);
    check_topk_kinds(8193, few, 3, 0);
    check_topk_kinds(16384 + 40, few, 3, 4);
    float *x = new_bytes(20000 * 4);
    for (int kind = PLAIN_ROW; kind <= TIES;
         kind++) { /* sorted where they lie; larger than a chunk; everything */
        fill_row(x, 20000, kind);
        check_topk(x, 1, 8200, all[0], 0);
        check_topk(x, 1, 9000, 9000, 0);
    }
    fill_row(x, 20000, MIXED);
    check_topk(x, 2, 10000, 1024, 0);
    check_topk(x, 1, 20000, 8500, 0);
    free(x);
}

static void test_topk_refuses(void **state)
{
    (void)state;
    void *p = cuda_new(1024);
    assert_int_not_equal(qk_cuda_topk(NULL, p, 1, 8, 9, p, p, p), 0);
    assert_int_not_equal(qk_cuda_topk(NULL, p, 1, 8, 0, p, p, p), 0);
    cuda_free_all();
}

/* ---- sums ---- */

static bool close_to(double got, double expect, double scale)
{
    if (isnan(expect)) return isnan(got);
    if (isinf(expect)) return got == expect;
    return fabs(got - expect) <= 1e-12 * fmax(fabs(expect), scale);
}

#define ASSERT_CLOSE(got, expect, scale)                                                                     \
    do {                                                                                                     \
        if (!close_to(got, expect, scale)) fail_msg("%s: %.17g, not %.17g", #got, got, expect);              \
    } while (0)

/* Logits as a model makes them, with an offset that a maximum must take out. */
static float *new_logits(int64_t n, int64_t v, float offset)
{
    float *x = new_floats((size_t)(n * v));
    for (int64_t i = 0; i < n * v; i++) x[i] = x[i] * 20 + offset;
    return x;
}

static void check_sums(const float *a, const float *b, int64_t n, int64_t v, double temperature, size_t shift)
{
    size_t bytes = (size_t)(n * v) * 4;
    float *da = shifted_put(a, bytes, shift), *db = shifted_put(b, bytes, shift),
          *y = shifted_new(bytes, shift);
    double *d_lse = cuda_new((size_t)n * 8), *d_kl = cuda_new((size_t)n * 8);
    CUDA_RUN(qk_cuda_logsumexp(NULL, da, n, v, temperature, d_lse, cuda_new(qk_cuda_logsumexp_bytes(n, v))));
    CUDA_RUN(qk_cuda_kl(NULL, da, db, n, v, d_kl));
    CUDA_RUN(qk_cuda_softmax(NULL, da, n, v, temperature, y));
    CUDA_RUN(qk_cuda_softmax(NULL, da, n, v, temperature, da)); /* in place */
    double *lse = cuda_copy(d_lse, (size_t)n * 8), *kl = cuda_copy(d_kl, (size_t)n * 8);
    float *p = cuda_copy(y, bytes), *in_place = cuda_copy(da, bytes), *expect = new_bytes(bytes);
    for (int64_t i = 0; i < n; i++) {
        const float *row = a + i * v;
        double lse_b = qk_logsumexp(b + i * v, v, 1);
        ASSERT_CLOSE(lse[i], qk_logsumexp(row, v, temperature), 0);
        /* the terms are as exact as ln sum exp is, whatever is left of their sum */
        double scale = isfinite(lse_b) ? fmax(fabs(lse_b), fabs(qk_logsumexp(row, v, 1))) : 0;
        ASSERT_CLOSE(kl[i], qk_kl(row, b + i * v, v), isfinite(scale) ? scale * 0x1p-8 : 0);
        qk_softmax(row, v, temperature, expect + i * v);
    }
    for (int64_t i = 0; i < n * v; i++) {
        /* float64 rounded once: neighbours at most */
        bool same = fabsf(p[i] - expect[i]) <= fmaxf(0x1p-23f * expect[i], 0x1p-149f);
        if (!same && !(isnan(p[i]) && isnan(expect[i])))
            fail_msg("%.9g, not %.9g", (double)p[i], (double)expect[i]);
        assert_same_number(in_place[i], p[i], i);
    }
    cuda_free_all();
    free(lse);
    free(kl);
    free(p);
    free(in_place);
    free(expect);
}

static void test_sums(void **state)
{
    (void)state;
    const int64_t widths[] = {1, 2, 4, 7, 32, 1000, 1001, 4100, 9000};
    const double temperatures[] = {1, 0.1, 3};
    for (size_t s = 0; s < sizeof widths / sizeof *widths; s++) {
        int64_t v = widths[s];
        float *a = new_logits(3, v, 500), *b = new_logits(3, v, -500), *c = new_logits(3, v, 0);
        for (int t = 0; t < 3; t++) check_sums(a, b, 3, v, temperatures[t], s % 2 * 4);
        check_sums(c, c, 3, v, 0.7, 0);
        free(a);
        free(b);
        free(c);
    }
}

/* A distribution against one that differs in the last bits: the sum is many orders below its terms. */
static void test_kl_of_neighbours(void **state)
{
    (void)state;
    enum { V = 3000 };
    float *a = new_logits(1, V, 0), *b = new_bytes(V * 4);
    for (int i = 0; i < V; i++) b[i] = a[i] + random_unit() * 1e-3f;
    double *d = cuda_new(16), got[2];
    const float *da = cuda_put(a, V * 4), *db = cuda_put(b, V * 4);
    CUDA_RUN(qk_cuda_kl(NULL, da, db, 1, V, d));
    CUDA_RUN(qk_cuda_kl(NULL, da, da, 1, V, d + 1));
    cuda_get(got, d, sizeof got);
    long double za = 0, zb = 0, kl = 0;
    for (int i = 0; i < V; i++) za += expl(a[i]), zb += expl(b[i]);
    for (int i = 0; i < V; i++) kl += expl(a[i]) / za * ((a[i] - logl(za)) - (b[i] - logl(zb)));
    assert_true(kl > 0 && fabs(got[0] - (double)kl) <= 1e-13);
    assert_true(got[1] == 0);
    cuda_free_all();
    free(a);
    free(b);
}

/* Minus infinity, infinity and NaN in every place, alone and in company. */
static void test_edges(void **state)
{
    (void)state;
    static const float special[] = {-INFINITY, INFINITY, NAN, 0, -1e30f, 3e38f};
    enum { V = 5, ROWS = 6 * 6 * 6 };
    float a[ROWS * V], b[ROWS * V];
    for (int i = 0; i < ROWS; i++) {
        const float row[V] = {special[i % 6], special[i / 6 % 6], special[i / 36], special[i % 6], -3};
        for (int j = 0; j < V; j++) a[i * V + j] = i % 6 == 0 && i / 36 == 0 ? -INFINITY : row[j];
        for (int j = 0; j < V; j++) b[i * V + j] = row[(j + i) % V];
    }
    check_sums(a, b, ROWS, V, 1, 0);
    check_sums(b, a, ROWS, V, 0.5, 0);
}

/* Rows of two chunks of 8192, one of which has no finite number, or one bad one. */
static void test_edges_of_chunks(void **state)
{
    (void)state;
    enum { V = 8192 + 40, ROWS = 5 };
    float *a = new_logits(ROWS, V, 0);
    for (int i = 0; i < 8192; i++) a[i] = -INFINITY;
    for (int i = 8192; i < V; i++) a[V + i] = -INFINITY;
    a[2 * V + 8200] = NAN;
    a[3 * V + 8200] = INFINITY;
    for (int i = 0; i < V; i++) a[4 * V + i] = -INFINITY;
    check_sums(a, a, ROWS, V, 0.5, 0);
    free(a);
}

/* ---- a row's figures ---- */

typedef struct {
    double stats[3];
    int32_t found[2];
} row_figures;

static void run_stats(const float *x, const int32_t *targets, int64_t n, int64_t v, size_t shift,
                      row_figures *out)
{
    double *d_stats = cuda_new((size_t)n * 24), *stats;
    int32_t *d_found = cuda_new((size_t)n * 8), *found;
    const int32_t *d_targets = targets ? cuda_put(targets, (size_t)n * 4) : NULL;
    CUDA_RUN(qk_cuda_row_stats(NULL, shifted_put(x, (size_t)(n * v) * 4, shift), d_targets, n, v, d_stats,
                               d_found));
    stats = cuda_copy(d_stats, (size_t)n * 24);
    found = cuda_copy(d_found, (size_t)n * 8);
    for (int64_t i = 0; i < n; i++) {
        memcpy(out[i].stats, stats + 3 * i, sizeof out[i].stats);
        memcpy(out[i].found, found + 2 * i, sizeof out[i].found);
    }
    cuda_free_all();
    free(stats);
    free(found);
}

static double entropy_of(const float *x, int64_t v)
{
    long double sum = 0, h = 0, max = -INFINITY;
    for (int64_t i = 0; i < v; i++) max = x[i] > max ? x[i] : max;
    for (int64_t i = 0; i < v; i++) sum += expl(x[i] - max);
    for (int64_t i = 0; i < v; i++) {
        long double ln_p = x[i] - max - logl(sum);
        h -= expl(ln_p) * ln_p;
    }
    return (double)h;
}

static void test_row_stats(void **state)
{
    (void)state;
    const int64_t widths[] = {1, 2, 5, 64, 1000, 1003, 4100, 8200};
    enum { N = 4 };
    for (size_t s = 0; s < sizeof widths / sizeof *widths; s++) {
        int64_t v = widths[s];
        float *x = new_logits(N, v, s % 3 ? 0 : 800);
        fill_row(x + v, v, TIES); /* ties for the largest */
        int32_t targets[N], first;
        float largest;
        for (int i = 0; i < N; i++) targets[i] = (int32_t)(random_u32() % (uint32_t)v);
        row_figures with[N], without[N];
        run_stats(x, targets, N, v, 0, with);
        run_stats(x, NULL, N, v, 4, without);
        for (int i = 0; i < N; i++) {
            const float *row = x + i * v;
            qk_topk(row, v, 1, &largest, &first);
            ASSERT_CLOSE(with[i].stats[0], qk_logsumexp(row, v, 1), 0);
            ASSERT_CLOSE(with[i].stats[1], entropy_of(row, v), 1e-3);
            assert_true(with[i].stats[2] == row[targets[i]] && without[i].stats[2] == 0);
            assert_memory_equal(without[i].stats, with[i].stats, 16); /* wide or not, the same order */
            assert_int_equal(with[i].found[0], first);
            assert_int_equal(with[i].found[1], -1);
            assert_memory_equal(without[i].found, with[i].found, 8);
        }
        free(x);
    }
}

/* The first logit that is not finite is named, and the largest number is found all the same. */
static void test_row_stats_of_bad_rows(void **state)
{
    (void)state;
    enum { V = 2100, N = 6 };
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    const int32_t at[N] = {0, 3, 2099, 1024, 64, 500};
    float *x = new_logits(N, V, 0);
    for (int i = 0; i < N; i++)
        for (int j = at[i]; j < V; j += 700) x[i * V + j] = bad[i % 3];
    for (int j = 0; j < V; j++) x[5 * V + j] = NAN;
    row_figures got[N];
    run_stats(x, NULL, N, V, 0, got);
    for (int i = 0; i < N; i++) {
        float largest;
        int32_t first;
        qk_topk(x + i * V, V, 1, &largest, &first);
        assert_int_equal(got[i].found[0], first);
        assert_int_equal(got[i].found[1], i == 5 ? 0 : at[i]);
        if (i % 3 != 2) assert_false(isfinite(got[i].stats[0]));
    }
    /* minus infinity has no share: the figures are those of the others */
    ASSERT_CLOSE(got[2].stats[0], qk_logsumexp(x + 2 * V, V, 1), 0);
    ASSERT_CLOSE(got[2].stats[1], entropy_of(x + 2 * V, V - 1), 1e-3);
    free(x);
}

/* A row's bits do not depend on the rows beside it. */
static void test_rows_stand_alone(void **state)
{
    (void)state;
    enum { V = 3000, N = 5 };
    float *x = new_logits(N, V, 0), *y = new_logits(N, V, 0), *d = cuda_put(x, N * V * 4),
          *e = cuda_put(y, N * V * 4);
    double *all = cuda_new(N * 16), *one = cuda_new(N * 16);
    CUDA_RUN(qk_cuda_logsumexp(NULL, d, N, V, 0.7, all, cuda_new(qk_cuda_logsumexp_bytes(N, V))));
    CUDA_RUN(qk_cuda_kl(NULL, d, e, N, V, all + N));
    for (int i = 0; i < N; i++) {
        CUDA_RUN(
            qk_cuda_logsumexp(NULL, d + i * V, 1, V, 0.7, one + i, cuda_new(qk_cuda_logsumexp_bytes(1, V))));
        CUDA_RUN(qk_cuda_kl(NULL, d + i * V, e + i * V, 1, V, one + N + i));
    }
    double a[2 * N], b[2 * N];
    cuda_get(a, all, sizeof a);
    cuda_get(b, one, sizeof b);
    assert_memory_equal(a, b, sizeof a);
    cuda_free_all();
    free(x);
    free(y);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_topk),
        cmocka_unit_test(test_topk_chunks),
        cmocka_unit_test(test_topk_refuses),
        cmocka_unit_test(test_sums),
        cmocka_unit_test(test_kl_of_neighbours),
        cmocka_unit_test(test_edges),
        cmocka_unit_test(test_edges_of_chunks),
        cmocka_unit_test(test_row_stats),
        cmocka_unit_test(test_row_stats_of_bad_rows),
        cmocka_unit_test(test_rows_stand_alone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
