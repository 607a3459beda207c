/* The sampler against the rules written out naively, and its draws against their distribution. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "mem.h"
#include "qk.h"
#include "sampler.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static const ql_sampling plain = {.temperature = 1, .top_p = 1};

static int32_t pick(const ql_sampling *s, const float *logits, int64_t n, uint64_t stream, uint64_t step)
{
    ql_sampler *sampler;
    ql_err err;
    int32_t id = -1;
    assert_int_equal(ql_sampler_new(n, &sampler, &err), QL_OK);
    assert_int_equal(ql_sampler_pick(sampler, s, logits, n, stream, step, &id, &err), QL_OK);
    ql_sampler_free(sampler);
    return id;
}

static void arguments(void **state)
{
    (void)state;
    ql_err err = {0};
    assert_int_equal(ql_sampling_check(&plain, &err), QL_OK);
    const ql_sampling bad[] = {
        {.temperature = -0.5, .top_p = 1},           {.temperature = NAN, .top_p = 1},
        {.temperature = INFINITY, .top_p = 1},       {.temperature = 1, .top_p = 0},
        {.temperature = 1, .top_p = 1.01},           {.temperature = 1, .top_p = NAN},
        {.temperature = 1, .top_p = 1, .top_k = -1},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(ql_sampling_check(&bad[i], &err), QL_ERR_ARG);
        assert_non_null(strstr(err.message, i < 3 ? "temperature" : i < 6 ? "top_p" : "top_k"));
    }
    ql_sampler *s;
    assert_int_equal(ql_sampler_new(0, &s, &err), QL_ERR_ARG);
    assert_null(s);
    assert_int_equal(ql_sampler_new(4, &s, &err), QL_OK);
    float row[5] = {0};
    int32_t id;
    assert_int_equal(ql_sampler_pick(s, &plain, row, 5, 0, 0, &id, &err), QL_ERR_ARG);
    row[2] = NAN;
    assert_int_equal(ql_sampler_pick(s, &plain, row, 4, 0, 0, &id, &err), QL_ERR_FORMAT);
    assert_non_null(strstr(err.message, "token 2"));
    assert_int_equal(id, -1);
    row[2] = INFINITY;
    assert_int_equal(ql_sampler_pick(s, &plain, row, 4, 0, 0, &id, &err), QL_ERR_FORMAT);
    for (int i = 0; i < 4; i++) row[i] = -INFINITY;
    assert_int_equal(ql_sampler_pick(s, &plain, row, 4, 0, 0, &id, &err), QL_ERR_FORMAT);
    row[3] = -1e30f; /* the one token that can be drawn */
    assert_int_equal(ql_sampler_pick(s, &plain, row, 4, 0, 0, &id, &err), QL_OK);
    assert_int_equal(id, 3);
    ql_sampler_free(s);
    ql_sampler_free(NULL);
}

static void greedy_takes_the_lowest_of_ties(void **state)
{
    (void)state;
    const float row[] = {-1, 3, 2, 3, 3};
    ql_sampling s = plain;
    s.temperature = 0;
    assert_int_equal(pick(&s, row, 5, 0, 0), 1);
    s.temperature = 1;
    s.top_k = 1;
    for (uint64_t i = 0; i < 50; i++) assert_int_equal(pick(&s, row, 5, i, 0), 1);
    s = plain;
    s.temperature = 1e-300; /* all of the mass on the largest, none of it lost to overflow */
    int seen[5] = {0};
    for (uint64_t i = 0; i < 200; i++) seen[pick(&s, row, 5, i, 0)]++;
    assert_int_equal(seen[0] + seen[2], 0);
    assert_true(seen[1] > 30 && seen[3] > 30 && seen[4] > 30);
}

static void uniform_is_a_function_of_its_arguments(void **state)
{
    (void)state;
    /* These bits are a promise: a seed written down in a result must give the same tokens later. */
    assert_true(ql_sampler_uniform(0, 0, 0) == 0x1.e35cdb4bf4f68p-4);
    assert_true(ql_sampler_uniform(1, 2, 3) == 0x1.9d5a3e5f51f14p-1);
    assert_true(ql_sampler_uniform(UINT64_MAX, 5, 7) == 0x1.899b5e13284bp-1);
    double sum = 0, lag = 0, last = 0;
    int bins[16] = {0};
    const int n = 64000;
    for (int i = 0; i < n; i++) {
        double u = ql_sampler_uniform(1, (uint64_t)i % 40, (uint64_t)i / 40);
        assert_true(u >= 0 && u < 1);
        sum += u;
        if (i) lag += (u - 0.5) * (last - 0.5);
        last = u;
        bins[(int)(u * 16)]++;
    }
    assert_true(fabs(sum / n - 0.5) < 0.005); /* 4 standard errors */
    assert_true(fabs(lag / n * 12) < 0.016);  /* correlation, 4 standard errors */
    double chi = 0;
    for (int i = 0; i < 16; i++) chi += (bins[i] - n / 16.0) * (bins[i] - n / 16.0) / (n / 16.0);
    assert_true(chi < 37.7); /* 15 degrees of freedom, p = 0.001 */
    assert_true(ql_sampler_uniform(1, 2, 3) != ql_sampler_uniform(1, 3, 2));
    assert_true(ql_sampler_uniform(1, 2, 3) != ql_sampler_uniform(2, 1, 3));
    assert_true(ql_sampler_uniform(1, 2, 3) == ql_sampler_uniform(1, 2, 3));
}

static float noise(uint64_t seed, uint64_t i)
{
    double u = ql_sampler_uniform(seed, 99, 2 * i) + 1e-12, v = ql_sampler_uniform(seed, 99, 2 * i + 1);
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

/* p[id] after temperature, top-k and top-p, by repeated search for the most likely token left. */
static void naive(const ql_sampling *s, const float *logits, int n, double *p)
{
    bool taken[64] = {0};
    int order[64], kept = s->top_k && s->top_k < n ? (int)s->top_k : n;
    double w[64], total = 0, mass = 0, sum = 0;
    for (int i = 0; i < n; i++) {
        int best = -1;
        for (int j = 0; j < n; j++) {
            if (!taken[j] && (best < 0 || logits[j] > logits[best])) best = j;
        }
        taken[order[i] = best] = true;
    }
    for (int i = 0; i < kept; i++) total += w[i] = exp(logits[order[i]] / s->temperature);
    int last = 0;
    for (; last < kept && (last == 0 || mass < s->top_p * total); last++) mass += w[last];
    for (int i = 0; i < n; i++) p[i] = 0;
    for (int i = 0; i < last; i++) sum += w[i];
    for (int i = 0; i < last; i++) p[order[i]] = w[i] / sum;
}

static void draws_follow_the_rules(void **state)
{
    (void)state;
    const ql_sampling cases[] = {
        {1, 0, 1, 7},     {0.5, 0, 1, 7},  {2, 0, 1, 7},   {1, 5, 1, 7},
        {1, 0, 0.6, 7},   {3, 0, 0.6, 7},  {1, 6, 0.5, 7}, {0.7, 20, 0.9, 7},
        {1, 0, 0.999, 7}, {1, 0, 1e-9, 7}, {1, 24, 1, 7},  {1, 10000, 1, 7},
    };
    enum { N = 24, DRAWS = 20000 };
    float logits[N];
    for (int i = 0; i < N; i++) logits[i] = 1.5f * noise(3, (uint64_t)i);
    logits[4] = logits[9] = logits[17]; /* ties */
    ql_sampler *sampler;
    ql_err err;
    assert_int_equal(ql_sampler_new(N, &sampler, &err), QL_OK);
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        double p[N], chi = 0;
        int seen[N] = {0}, cells = 0;
        naive(&cases[c], logits, N, p);
        for (uint64_t i = 0; i < DRAWS; i++) {
            int32_t id;
            assert_int_equal(ql_sampler_pick(sampler, &cases[c], logits, N, i % 8, i / 8, &id, &err), QL_OK);
            seen[id]++;
        }
        for (int i = 0; i < N; i++) {
            if (p[i] == 0) assert_int_equal(seen[i], 0);
            if (p[i] * DRAWS < 5) continue;
            cells++;
            chi += (seen[i] - p[i] * DRAWS) * (seen[i] - p[i] * DRAWS) / (p[i] * DRAWS);
        }
        assert_true(chi < cells + 4 * sqrt(2.0 * cells)); /* seeded: the same value on every run */
    }
    ql_sampler_free(sampler);
}

/* The pruning before the sort must not change which tokens are kept, near-flat rows included. */
static void large_rows(void **state)
{
    (void)state;
    enum { N = 5000 };
    float *logits = malloc(N * sizeof *logits);
    ql_sampler *sampler;
    ql_err err;
    assert_int_equal(ql_sampler_new(N, &sampler, &err), QL_OK);
    for (int flat = 0; flat < 2; flat++) {
        for (int i = 0; i < N; i++) logits[i] = flat ? 0 : noise(5, (uint64_t)i);
        ql_sampling s = {1, 0, 0.5, 11};
        int32_t highest = 0;
        float lowest = 100;
        for (uint64_t i = 0; i < 4000; i++) {
            int32_t id;
            assert_int_equal(ql_sampler_pick(sampler, &s, logits, N, i, 0, &id, &err), QL_OK);
            if (id > highest) highest = id;
            if (logits[id] < lowest) lowest = logits[id];
        }
        if (flat) assert_in_range(highest, 2490, 2499); /* ties go to the lower ids */
        /* A normal logit weighs e^x: the nucleus of one half is x > 1. */
        else
            assert_true(lowest > 0.95f && lowest < 1.1f);
    }
    ql_sampler_free(sampler);
    free(logits);
}

/* The same draw from the row and from its best: *settled counts those that needed no row. */
static void draw_both_ways(ql_sampler *sampler, const ql_sampling *s, const float *logits, int64_t n,
                           uint64_t stream, long *settled)
{
    static float values[5000];
    static int32_t ids[5000];
    ql_err err;
    int32_t want, got;
    int64_t k = ql_sampler_candidates(s, n);
    double lse = qk_logsumexp(logits, n, ql_sampler_temperature(s));
    qk_topk(logits, n, k, values, ids);
    ql_status status = ql_sampler_pick(sampler, s, logits, n, stream, 3, &want, &err);
    assert_int_equal(ql_sampler_pick_top(sampler, s, values, ids, k, n, lse, stream, 3, &got, &err), QL_OK);
    if (status != QL_OK) assert_int_equal(got, -1);
    if (got < 0) return;
    assert_int_equal(got, want);
    ++*settled;
}

/* Rows of every kind: normal, in steps (ties), flat, with one token far ahead, with few that can be drawn. */
static void make_row(float *logits, int n, int kind, uint64_t seed)
{
    for (int i = 0; i < n; i++) {
        float x = 2 * noise(seed, (uint64_t)i);
        logits[i] = kind == 0   ? x
                    : kind == 1 ? roundf(2 * x) / 2
                    : kind == 2 ? 0
                    : kind == 3 ? (i == n / 2 ? 40 : x)
                                : (i % 9 == 4 ? x : -INFINITY);
    }
}

static void the_best_of_a_row_pick_as_the_row(void **state)
{
    (void)state;
    const ql_sampling cases[] = {{0, 0, 1, 7},      {1, 1, 1, 7},       {1, 5, 1, 7},     {0.6, 20, 0.9, 7},
                                 {1, 0, 0.5, 7},    {3, 0, 0.75, 7},    {0.1, 0, 0.9, 7}, {1, 0, 0.25, 7},
                                 {1, 0, 0.999, 7},  {1, 0, 1e-9, 7},    {1, 16, 0.5, 7},  {1, 17, 1, 7},
                                 {1, 149, 0.25, 7}, {0.01, 50, 0.9, 7}, {50, 0, 0.9, 7},  {1, 9999, 0.5, 7}};
    enum { N = 150, WIDE = 5000, CASES = sizeof cases / sizeof *cases };
    static float logits[WIDE];
    ql_sampler *sampler;
    ql_err err;
    long settled = 0, all = 0;
    assert_int_equal(ql_sampler_new(WIDE, &sampler, &err), QL_OK);
    for (uint64_t row = 0; row < 500; row++) {
        make_row(logits, N, (int)(row % 5), row);
        for (size_t c = 0; c < CASES; c++, all++)
            draw_both_ways(sampler, &cases[c], logits, N, row, &settled);
    }
    assert_true(settled >
                all * 8 / 10); /* flat rows at 0.5, and few tokens with a large top_k, need theirs */
    settled = 0;
    for (uint64_t row = 0; row < 40; row++) { /* a nucleus may be larger than the candidates */
        make_row(logits, WIDE, (int)(row % 5), row);
        for (size_t c = 0; c < CASES; c++) draw_both_ways(sampler, &cases[c], logits, WIDE, row, &settled);
    }
    assert_true(settled > 40 * CASES / 2);

    /* No candidates: the row. Bad logits: the row, which says so. */
    const ql_sampling top = {1, 0, 0.9, 7};
    assert_int_equal(ql_sampler_candidates(&plain, WIDE), 0);
    assert_int_equal(ql_sampler_candidates(&top, WIDE), 1024);
    assert_int_equal(ql_sampler_candidates(&top, N), N);
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        settled = 0;
        for (int j = 0; j < N; j++) logits[j] = i < 2 ? (float)j : bad[i];
        logits[77] = bad[i];
        for (size_t c = 0; c < CASES; c++) draw_both_ways(sampler, &cases[c], logits, N, 1, &settled);
        assert_int_equal(settled, 0);
    }
    int32_t id;
    assert_int_equal(ql_sampler_pick_top(sampler, &plain, logits, &id, 1, N, 0, 0, 0, &id, &err), QL_ERR_ARG);
    ql_sampler_free(sampler);
}

static void memory_runs_out(void **state)
{
    (void)state;
    for (long n = 0; n < 3; n++) {
        ql_sampler *s;
        ql_err err;
        ql_mem_fail_after(n, false);
        assert_int_equal(ql_sampler_new(10, &s, &err), QL_ERR_MEMORY);
        assert_null(s);
    }
    ql_mem_fail_after(-1, false);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(arguments),
        cmocka_unit_test(greedy_takes_the_lowest_of_ties),
        cmocka_unit_test(uniform_is_a_function_of_its_arguments),
        cmocka_unit_test(draws_follow_the_rules),
        cmocka_unit_test(large_rows),
        cmocka_unit_test(the_best_of_a_row_pick_as_the_row),
        cmocka_unit_test(memory_runs_out),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
