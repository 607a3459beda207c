/* Metrics against their definitions written out naively in float64. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "backend.h"
#include "json.h"
#include "mem.h"
#include "metrics.h"
#include "safetensors.h"
#include "sampler.h"
#include "device_help.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static ql_tensor tensor(const float *data, int64_t rows, int64_t cols)
{
    ql_tensor t;
    assert_int_equal(ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, rows, cols, &t, NULL), QL_OK);
    assert_int_equal(ql_tensor_upload(&t, data, ql_tensor_bytes(&t), NULL), QL_OK);
    return t;
}

static float noise(uint64_t seed, uint64_t i)
{
    double u = ql_sampler_uniform(seed, 0, 2 * i) + 1e-12, v = ql_sampler_uniform(seed, 0, 2 * i + 1);
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

/* b is a with noise added. `grid` > 0 rounds both to its multiples, so that many logits tie. */
static void make_pair(int64_t rows, int64_t cols, float sd, float grid, ql_tensor *a, ql_tensor *b)
{
    float *x = malloc((size_t)(rows * cols) * sizeof *x), *y = malloc((size_t)(rows * cols) * sizeof *y);
    for (int64_t i = 0; i < rows * cols; i++) {
        x[i] = sd * noise(1, (uint64_t)i);
        y[i] = x[i] + 0.3f * noise(2, (uint64_t)i);
        if (grid > 0) {
            x[i] = grid * roundf(x[i] / grid);
            y[i] = grid * roundf(y[i] / grid);
        }
    }
    *a = tensor(x, rows, cols);
    *b = tensor(y, rows, cols);
    free(x);
    free(y);
}

static const float *row_of(const ql_tensor *t, int64_t r)
{
    return (const float *)t->data + r * t->shape[1];
}

/* rank[id] = how many tokens come before it: larger logits, and equal ones with a lower id. */
static void ranks(const float *row, int64_t n, int *rank)
{
    for (int64_t i = 0; i < n; i++) {
        rank[i] = 0;
        for (int64_t j = 0; j < n; j++) rank[i] += row[j] > row[i] || (row[j] == row[i] && j < i);
    }
}

static void softmax(const float *row, int64_t n, double temperature, double *p)
{
    double most = row[0], sum = 0;
    for (int64_t i = 0; i < n; i++) most = fmax(most, row[i]);
    for (int64_t i = 0; i < n; i++) sum += p[i] = exp((row[i] - most) / temperature);
    for (int64_t i = 0; i < n; i++) p[i] /= sum;
}

static double overlap(const bool *a, const bool *b, int64_t n)
{
    int both = 0, either = 0;
    for (int64_t i = 0; i < n; i++) {
        both += a[i] && b[i];
        either += a[i] || b[i];
    }
    return (double)both / either;
}

static void jaccard_and_agreement(void **state)
{
    (void)state;
    enum { ROWS = 9, COLS = 60, NK = 7 };
    const int ks[NK] = {5, 1, 3, 20, 10, COLS, 3};
    for (int grid = 0; grid < 2; grid++) {
        ql_tensor a, b;
        double out[ROWS * NK];
        uint8_t same[ROWS];
        make_pair(ROWS, COLS, 1, grid ? 0.5f : 0, &a, &b);
        assert_int_equal(ql_metrics_jaccard(&a, &b, ks, NK, out, NULL), QL_OK);
        assert_int_equal(ql_metrics_agreement(&a, &b, same, NULL), QL_OK);
        for (int64_t r = 0; r < ROWS; r++) {
            int ra[COLS], rb[COLS];
            ranks(row_of(&a, r), COLS, ra);
            ranks(row_of(&b, r), COLS, rb);
            for (int j = 0; j < NK; j++) {
                bool ina[COLS], inb[COLS];
                for (int i = 0; i < COLS; i++) {
                    ina[i] = ra[i] < ks[j];
                    inb[i] = rb[i] < ks[j];
                }
                assert_true(out[r * NK + j] == overlap(ina, inb, COLS));
            }
            assert_true(out[r * NK + 1] == same[r]); /* k = 1 is top-1 agreement */
            assert_true(out[r * NK + 5] == 1);       /* the whole vocabulary */
        }
        /* The control: a model against itself. */
        assert_int_equal(ql_metrics_jaccard(&a, &a, ks, NK, out, NULL), QL_OK);
        for (int i = 0; i < ROWS * NK; i++) assert_true(out[i] == 1);
        ql_tensor_free(&a);
        ql_tensor_free(&b);
    }
}

static void divergence_and_probabilities(void **state)
{
    (void)state;
    enum { ROWS = 12, COLS = 777 };
    ql_tensor a, b;
    double kl[ROWS], dp[ROWS], ll[ROWS], h[ROWS], p[COLS], q[COLS];
    uint8_t greedy[ROWS];
    int32_t targets[ROWS];
    make_pair(ROWS, COLS, 3, 0.25f, &a, &b);
    int ra[COLS];
    for (int r = 0; r < ROWS; r++) {
        ranks(row_of(&a, r), COLS, ra);
        for (int i = 0; i < COLS; i++) {
            if (ra[i] == r % 3) targets[r] = i; /* the most likely token of every third row */
        }
    }
    assert_int_equal(ql_metrics_kl(&a, &b, kl, NULL), QL_OK);
    assert_int_equal(ql_metrics_delta_p(&a, &b, targets, dp, NULL), QL_OK);
    assert_int_equal(ql_metrics_loglik(&a, targets, ll, greedy, NULL), QL_OK);
    assert_int_equal(ql_metrics_entropy(&a, h, NULL), QL_OK);
    for (int r = 0; r < ROWS; r++) {
        double want_kl = 0, want_h = 0;
        softmax(row_of(&a, r), COLS, 1, p);
        softmax(row_of(&b, r), COLS, 1, q);
        for (int i = 0; i < COLS; i++) {
            want_kl += p[i] * (log(p[i]) - log(q[i]));
            want_h -= p[i] * log(p[i]);
        }
        assert_true(fabs(kl[r] - want_kl) < 1e-12);
        assert_true(fabs(h[r] - want_h) < 1e-12);
        assert_true(fabs(dp[r] - (q[targets[r]] - p[targets[r]])) < 1e-13);
        assert_true(fabs(ll[r] - log(p[targets[r]])) < 1e-12);
        assert_int_equal(greedy[r], r % 3 == 0);
    }
    assert_int_equal(ql_metrics_loglik(&a, targets, p, NULL, NULL), QL_OK);
    assert_memory_equal(p, ll, sizeof ll);
    assert_int_equal(ql_metrics_kl(&a, &a, kl, NULL), QL_OK);
    for (int r = 0; r < ROWS; r++) assert_true(kl[r] == 0);
    ql_tensor_free(&a);
    ql_tensor_free(&b);
}

/* ln 4 for a flat row of 4; sure rows have no entropy and their KL to each other is their distance. */
static void values_known_by_hand(void **state)
{
    (void)state;
    const float x[] = {0, 0, 0, 0, 1000, 0, 0, 0}, y[] = {0, 0, 0, 0, 0, 1000, 0, 0};
    ql_tensor a = tensor(x, 2, 4), b = tensor(y, 2, 4);
    double h[2], kl[2], ll[2], dp[2];
    const int32_t targets[] = {2, 1};
    assert_int_equal(ql_metrics_entropy(&a, h, NULL), QL_OK);
    assert_true(fabs(h[0] - log(4)) < 1e-15 && h[1] == 0);
    assert_int_equal(ql_metrics_kl(&a, &b, kl, NULL), QL_OK);
    assert_true(kl[0] == 0 && fabs(kl[1] - 1000) < 1e-9);
    assert_int_equal(ql_metrics_loglik(&a, targets, ll, NULL, NULL), QL_OK);
    assert_true(fabs(ll[0] + log(4)) < 1e-15 && ll[1] == -1000);
    assert_int_equal(ql_metrics_delta_p(&a, &b, targets, dp, NULL), QL_OK);
    assert_true(dp[0] == 0 && dp[1] == 1);
    ql_tensor_free(&a);
    ql_tensor_free(&b);
}

static void nucleus_against_its_definition(int64_t rows, int64_t cols, float sd, float grid)
{
    const double top_ps[] = {0.1, 0.5, 0.9, 0.99, 0.9999}, temperatures[] = {0.1, 1, 3};
    ql_tensor a, b;
    make_pair(rows, cols, sd, grid, &a, &b);
    double *out = malloc((size_t)rows * sizeof *out);
    int *rank[2] = {malloc((size_t)(rows * cols) * sizeof(int)), malloc((size_t)(rows * cols) * sizeof(int))};
    bool *in[2] = {malloc((size_t)cols), malloc((size_t)cols)};
    int *at = malloc((size_t)cols * sizeof *at);
    const ql_tensor *models[2] = {&a, &b};
    for (int m = 0; m < 2; m++) {
        for (int64_t r = 0; r < rows; r++) ranks(row_of(models[m], r), cols, rank[m] + r * cols);
    }
    double *weight[2] = {malloc((size_t)cols * sizeof(double)), malloc((size_t)cols * sizeof(double))};
    ql_nucleus_pair *pairs = malloc((size_t)rows * 15 * sizeof *pairs);
    assert_int_equal(ql_metrics_nuclei(&a, &b, top_ps, 5, temperatures, 3, pairs, NULL), QL_OK);
    for (int c = 0; c < 15; c++) {
        double top_p = top_ps[c % 5], temperature = temperatures[c / 5];
        assert_int_equal(ql_metrics_nucleus(&a, &b, top_p, temperature, out, NULL), QL_OK);
        for (int64_t r = 0; r < rows; r++) {
            for (int m = 0; m < 2; m++) {
                double mass = 0, *p = weight[m];
                softmax(row_of(models[m], r), cols, temperature, p);
                for (int64_t i = 0; i < cols; i++) at[rank[m][r * cols + i]] = (int)i;
                for (int64_t i = 0; i < cols; i++) {
                    in[m][at[i]] = mass < top_p;
                    mass += p[at[i]];
                }
            }
            assert_true(out[r] == overlap(in[0], in[1], cols));
            const ql_nucleus_pair *pair = &pairs[r * 15 + c];
            assert_true(pair->overlap == out[r]);
            for (int m = 0; m < 2; m++) {
                double mass = 0;
                int64_t size = 0;
                for (int64_t i = 0; i < cols; i++) {
                    size += in[m][i];
                    if (in[1 - m][i]) mass += weight[m][i];
                }
                assert_true(pair->size[m] == size);
                assert_true(fabs(pair->mass[m] - mass) < 1e-12);
            }
            int64_t top = 0;
            while (rank[0][r * cols + top] != 0) top++;
            assert_true(pair->has_top == in[1][top]);
        }
    }
    free(pairs);
    free(at);
    for (int m = 0; m < 2; m++) {
        free(weight[m]);
        free(in[m]);
        free(rank[m]);
    }
    free(out);
    ql_tensor_free(&a);
    ql_tensor_free(&b);
}

static void nucleus(void **state)
{
    (void)state;
    nucleus_against_its_definition(6, 100, 2, 0);
    nucleus_against_its_definition(6, 100, 2, 0.5f);
    nucleus_against_its_definition(2, 3000, 1, 0); /* nuclei larger than the 1024 that topk gives */
    nucleus_against_its_definition(1, 2500, 0.5f, 0.25f);
    ql_tensor a, b;
    double out[3];
    make_pair(3, 40, 1, 0, &a, &b);
    assert_int_equal(ql_metrics_nucleus(&a, &b, 1, 1, out, NULL), QL_OK);
    for (int r = 0; r < 3; r++) assert_true(out[r] == 1);
    ql_nucleus_pair pairs[3];
    assert_int_equal(ql_metrics_nuclei(&a, &b, (const double[]){1}, 1, (const double[]){0.5}, 1, pairs, NULL),
                     QL_OK);
    for (int r = 0; r < 3; r++) {
        assert_true(pairs[r].size[0] == 40 && pairs[r].size[1] == 40 && pairs[r].has_top);
        assert_true(pairs[r].mass[0] == 1 && pairs[r].mass[1] == 1 && pairs[r].overlap == 1);
    }
    ql_tensor_free(&a);
    ql_tensor_free(&b);
}

#define GOLDEN QLUA_SOURCE_DIR "/tests/golden/metrics"

static ql_tensor golden_logits(const ql_st *st, const char *name)
{
    const ql_st_tensor *t = ql_st_find(st, name);
    assert_non_null(t);
    size_t bytes = ql_st_tensor_bytes(t);
    float *data = malloc(bytes);
    assert_int_equal(ql_st_read(st, t, 0, bytes, data, NULL), QL_OK);
    ql_tensor out = tensor(data, t->shape[0], t->shape[1]);
    free(data);
    return out;
}

static double number(const cJSON *row, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(row, key);
    assert_true(cJSON_IsNumber(item));
    return item->valuedouble;
}

static double item(const cJSON *row, const char *key, int i)
{
    return cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(row, key), i)->valuedouble;
}

static bool close_to(double got, double want, double tolerance)
{
    return fabs(got - want) <= tolerance * fmax(1, fabs(want));
}

/* Near and far pairs, flat and peaked, ties, large offsets; values by NumPy and SciPy in float64. */
static void golden(void **state)
{
    (void)state;
    enum { MAX = 64 };
    ql_st *st;
    cJSON *root;
    assert_int_equal(ql_st_open(GOLDEN ".safetensors", &st, NULL), QL_OK);
    assert_int_equal(ql_json_load(GOLDEN ".json", 1 << 20, &root, NULL), QL_OK);
    ql_tensor a = golden_logits(st, "a"), b = golden_logits(st, "b");
    const cJSON *rows = cJSON_GetObjectItemCaseSensitive(root, "rows"), *row;
    int n = cJSON_GetArraySize(rows), nk = 0, ks[8], r = 0;
    assert_int_equal(n, a.shape[0]);
    assert_in_range(n, 1, MAX);
    cJSON_ArrayForEach(row, cJSON_GetObjectItemCaseSensitive(root, "ks")) ks[nk++] = row->valueint;
    double jaccard[MAX * 8], kl[MAX], dp[MAX], ll[MAX], h[MAX], nuclei[8][MAX];
    uint8_t same[MAX], greedy[MAX];
    int32_t targets[MAX];
    cJSON_ArrayForEach(row, rows) targets[r++] = (int32_t)number(row, "target");
    assert_int_equal(ql_metrics_jaccard(&a, &b, ks, nk, jaccard, NULL), QL_OK);
    assert_int_equal(ql_metrics_agreement(&a, &b, same, NULL), QL_OK);
    assert_int_equal(ql_metrics_kl(&a, &b, kl, NULL), QL_OK);
    assert_int_equal(ql_metrics_delta_p(&a, &b, targets, dp, NULL), QL_OK);
    assert_int_equal(ql_metrics_loglik(&a, targets, ll, greedy, NULL), QL_OK);
    assert_int_equal(ql_metrics_entropy(&a, h, NULL), QL_OK);
    int settings = 0;
    const cJSON *setting;
    cJSON_ArrayForEach(setting, cJSON_GetObjectItemCaseSensitive(root, "nuclei"))
    {
        assert_int_equal(ql_metrics_nucleus(&a, &b, number(setting, "top_p"), number(setting, "temperature"),
                                            nuclei[settings], NULL),
                         QL_OK);
        settings++;
    }
    r = 0;
    cJSON_ArrayForEach(row, rows)
    {
        for (int j = 0; j < nk; j++) assert_true(jaccard[r * nk + j] == item(row, "jaccard", j));
        assert_int_equal(same[r], (int)number(row, "agreement"));
        assert_int_equal(greedy[r], (int)number(row, "greedy"));
        assert_true(close_to(kl[r], number(row, "kl"), 1e-12));
        assert_true(close_to(h[r], number(row, "entropy"), 1e-12));
        assert_true(close_to(ll[r], number(row, "loglik"), 1e-12));
        assert_true(close_to(dp[r], number(row, "delta_p"), 1e-12));
        for (int j = 0; j < settings; j++) {
            if (item(row, "nucleus_margin", j) > 1e-12) assert_true(nuclei[j][r] == item(row, "nucleus", j));
        }
        r++;
    }
    cJSON_Delete(root);
    ql_st_close(st);
    ql_tensor_free(&a);
    ql_tensor_free(&b);
}

static void bad_arguments(void **state)
{
    (void)state;
    ql_err err = {0};
    ql_tensor a, b, c, d;
    double out[8];
    uint8_t same[8];
    make_pair(4, 10, 1, 0, &a, &b);
    make_pair(4, 11, 1, 0, &c, &d);
    const int32_t high[] = {0, 1, 10, 2}, low[] = {0, -1, 1, 2};
    assert_int_equal(ql_metrics_kl(&a, &c, out, &err), QL_ERR_ARG);
    assert_non_null(strstr(err.message, "[4, 10]"));
    assert_non_null(strstr(err.message, "[4, 11]"));
    assert_int_equal(ql_metrics_agreement(&a, &c, same, &err), QL_ERR_ARG);
    assert_int_equal(ql_metrics_jaccard(&a, &b, (const int[]){3, 0}, 2, out, &err), QL_ERR_ARG);
    assert_int_equal(ql_metrics_jaccard(&a, &b, (const int[]){3, 11}, 2, out, &err), QL_ERR_ARG);
    assert_non_null(strstr(err.message, "k = 11"));
    assert_int_equal(ql_metrics_loglik(&a, high, out, NULL, &err), QL_ERR_ARG);
    assert_non_null(strstr(err.message, "row 3"));
    assert_int_equal(ql_metrics_delta_p(&a, &b, low, out, &err), QL_ERR_ARG);
    const double bad[] = {0, -1, 1.5, NAN};
    for (int i = 0; i < 4; i++)
        assert_int_equal(ql_metrics_nucleus(&a, &b, bad[i], 1, out, &err), QL_ERR_ARG);
    assert_int_equal(ql_metrics_nucleus(&a, &b, 0.9, 0, out, &err), QL_ERR_ARG);
    assert_int_equal(ql_metrics_nucleus(&a, &b, 0.9, INFINITY, out, &err), QL_ERR_ARG);
    ql_nucleus_pair pairs[8];
    assert_int_equal(
        ql_metrics_nuclei(&a, &b, (const double[]){0.9, 2}, 2, (const double[]){1}, 1, pairs, &err),
        QL_ERR_ARG);
    assert_non_null(strstr(err.message, "top_p 2"));
    ql_tensor ids;
    assert_int_equal(ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_I32, 4, 10, &ids, NULL), QL_OK);
    assert_int_equal(ql_metrics_entropy(&ids, out, &err), QL_ERR_ARG);
    ql_tensor_free(&ids);
    ql_tensor_free(&a);
    assert_int_equal(ql_metrics_entropy(&a, out, &err), QL_ERR_ARG);
    ql_tensor_free(&b);
    ql_tensor_free(&c);
    ql_tensor_free(&d);
}

static void bad_logits_name_their_row(void **state)
{
    (void)state;
    const float bad[] = {NAN, INFINITY, -INFINITY};
    const int ks[] = {1};
    const int32_t targets[] = {0, 0, 0};
    double out[3];
    uint8_t same[3];
    for (int i = 0; i < 3; i++) {
        for (int side = 0; side < 2; side++) {
            ql_tensor a, b;
            make_pair(3, 17, 1, 0, &a, &b);
            ((float *)(side ? b : a).data)[17 + 5] = bad[i];
            for (int m = 0; m < 5; m++) {
                ql_err err = {0};
                ql_status status = m == 0   ? ql_metrics_jaccard(&a, &b, ks, 1, out, &err)
                                   : m == 1 ? ql_metrics_agreement(&a, &b, same, &err)
                                   : m == 2 ? ql_metrics_kl(&a, &b, out, &err)
                                   : m == 3 ? ql_metrics_delta_p(&a, &b, targets, out, &err)
                                            : ql_metrics_nucleus(&a, &b, 0.9, 1, out, &err);
                assert_int_equal(status, QL_ERR_FORMAT);
                assert_non_null(strstr(err.message, "row 2"));
                assert_non_null(strstr(err.message, "token 5"));
                assert_non_null(strstr(err.message, side ? "tested" : "reference"));
            }
            ql_err err = {0};
            const ql_tensor *one = side ? &b : &a;
            assert_int_equal(ql_metrics_loglik(one, targets, out, NULL, &err), QL_ERR_FORMAT);
            assert_int_equal(ql_metrics_entropy(one, out, &err), QL_ERR_FORMAT);
            assert_non_null(strstr(err.message, "row 2"));
            ql_tensor_free(&a);
            ql_tensor_free(&b);
        }
    }
}

static void no_rows(void **state)
{
    (void)state;
    ql_tensor a, b;
    double out[1];
    uint8_t same[1];
    make_pair(0, 5, 1, 0, &a, &b);
    assert_int_equal(ql_metrics_jaccard(&a, &b, (const int[]){2}, 1, out, NULL), QL_OK);
    assert_int_equal(ql_metrics_agreement(&a, &b, same, NULL), QL_OK);
    assert_int_equal(ql_metrics_kl(&a, &b, out, NULL), QL_OK);
    assert_int_equal(ql_metrics_nucleus(&a, &b, 0.5, 1, out, NULL), QL_OK);
    assert_int_equal(ql_metrics_loglik(&a, NULL, out, same, NULL), QL_OK);
    ql_tensor_free(&a);
    ql_tensor_free(&b);
}

static void memory_runs_out(void **state)
{
    (void)state;
    ql_tensor a, b;
    double out[6];
    uint8_t same[3];
    ql_nucleus_pair pairs[6];
    const int32_t targets[] = {1, 2, 3};
    make_pair(3, 1500, 0.01f, 0, &a, &b); /* flat: the nucleus needs the whole row sorted */
    for (int m = 0; m < 8; m++) {
        ql_status status = QL_ERR_MEMORY;
        long n = 0;
        for (; status != QL_OK && n < 100; n++) {
            ql_err err = {0};
            ql_mem_fail_after(n, false);
            status = m == 0   ? ql_metrics_jaccard(&a, &b, (const int[]){3, 9}, 2, out, &err)
                     : m == 1 ? ql_metrics_agreement(&a, &b, same, &err)
                     : m == 2 ? ql_metrics_kl(&a, &b, out, &err)
                     : m == 3 ? ql_metrics_delta_p(&a, &b, targets, out, &err)
                     : m == 4 ? ql_metrics_nucleus(&a, &b, 0.9, 1, out, &err)
                     : m == 5 ? ql_metrics_loglik(&a, targets, out, same, &err)
                     : m == 6 ? ql_metrics_nuclei(&a, &b, (const double[]){0.1, 0.9}, 2, (const double[]){1},
                                                  1, pairs, &err)
                              : ql_metrics_entropy(&a, out, &err);
            ql_mem_fail_after(-1, false);
            assert_true(status == QL_OK || status == QL_ERR_MEMORY);
        }
        assert_true(n > 1 && n < 100);
    }
    ql_tensor_free(&a);
    ql_tensor_free(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(jaccard_and_agreement),
        cmocka_unit_test(divergence_and_probabilities),
        cmocka_unit_test(values_known_by_hand),
        cmocka_unit_test(nucleus),
        cmocka_unit_test(golden),
        cmocka_unit_test(bad_arguments),
        cmocka_unit_test(bad_logits_name_their_row),
        cmocka_unit_test(no_rows),
        cmocka_unit_test(memory_runs_out),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
