/* How the CPU backend cuts operations into pieces: all outputs once, and even shares for 1 to 64 threads on
 * the shapes of Llama-3.2-1B and Llama-3-8B. Threads are simulated as the pool works: each takes the pieces
 * of its share in order, then what others have left. */
#include "backend_cpu.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

enum { MOST_THREADS = 64, ROWS_MULTIPLE = 48 };

typedef struct {
    const char *name;
    int64_t hidden, ffn, kv, vocab, layers, head_dim, heads, kv_heads;
} shape;

static const shape shapes[] = {
    {"1B", 2048, 8192, 512, 128256, 16, 64, 32, 8},
    {"8B", 4096, 14336, 1024, 128256, 32, 128, 32, 8},
};

typedef double cost_fn(const void *split, int64_t piece);

/* When the last thread is done, in the unit of `cost`. The thread that is done with its piece first takes the
 * next: of its own share, else of the next thread's that has one. */
static double simulate(int threads, int64_t pieces, cost_fn *cost, const void *split)
{
    double busy[MOST_THREADS] = {0}, last = 0;
    int64_t next[MOST_THREADS], end[MOST_THREADS];
    for (int i = 0; i < threads; i++) ql_pool_share(pieces, threads, i, &next[i], &end[i]);
    for (int64_t left = pieces; left > 0; left--) {
        int who = 0;
        for (int i = 1; i < threads; i++)
            if (busy[i] < busy[who]) who = i;
        int from = who;
        while (next[from] == end[from]) from = (from + 1) % threads;
        busy[who] += cost(split, next[from]++);
        if (busy[who] > last) last = busy[who];
    }
    return last;
}

static double product_cost(const void *split, int64_t piece)
{
    int64_t i0, i1;
    ql_cpu_piece(split, piece, &i0, &i1);
    return (double)(i1 - i0 + 3 - (i1 - i0 + 3) % 4); /* kernels read rows by four */
}

/* Time over that of perfectly even threads, for n outputs of k inputs each from m activation rows. */
static double product_unevenness(int threads, int64_t n, int64_t k, int64_t m)
{
    cpu_split s =
        ql_cpu_split(threads, n, ql_cpu_product_unit(threads, n, ROWS_MULTIPLE), (double)k * (double)m);
    return simulate(threads, s.pieces, product_cost, &s) / ((double)n / threads);
}

static void test_every_output_once(void **state)
{
    (void)state;
    const int64_t totals[] = {1, 3, 16, 47, 48, 49, 515, 2048, 128256}, units[] = {1, 4, 16, 48, 64};
    const double works[] = {1, 100, 2048, 1e6};
    for (int threads = 1; threads <= MOST_THREADS; threads++)
        for (int i = 0; i < 9; i++)
            for (int u = 0; u < 5; u++)
                for (int w = 0; w < 4; w++) {
                    cpu_split s = ql_cpu_split(threads, totals[i], units[u], works[w]);
                    int64_t at = 0, i0, i1;
                    for (int64_t p = 0; p < s.pieces; p++) {
                        ql_cpu_piece(&s, p, &i0, &i1);
                        assert_int_equal(i0, at);
                        assert_int_equal(i0 % units[u], 0);
                        assert_true(i1 > i0);
                        at = i1;
                    }
                    assert_int_equal(at, totals[i]);
                }
}

static void test_shares(void **state)
{
    (void)state;
    for (int threads = 1; threads <= MOST_THREADS; threads++)
        for (int64_t pieces = 0; pieces < 300; pieces += 7) {
            int64_t at = 0, first, end;
            for (int i = 0; i < threads; i++) {
                ql_pool_share(pieces, threads, i, &first, &end);
                assert_int_equal(first, at);
                assert_in_range(end - first, pieces / threads, (pieces + threads - 1) / threads);
                at = end;
            }
            assert_int_equal(at, pieces);
        }
}

/* Rows go by four, so one thread has at least the mean rounded up to four: for the 512 and 1024 rows of keys
 * and values that may be more than 1.15 times the mean (512 on 63 threads: 12 rows, the mean is 8.1). */
static double least_bound(int threads, int64_t n)
{
    int64_t units = (n + 3) / 4, most = (units + threads - 1) / threads;
    double best = (double)(most * 4 * threads) / (double)n;
    return n > 1024 || best < 1.15 ? 1.15 : best + 1e-9;
}

/* A step's products: the slowest thread has at most 1.15 times the mean where the shape permits, and 1.07
 * times in the step as a whole, to which keys and values contribute little. */
static void test_products_are_even(void **state)
{
    (void)state;
    const int64_t batches[] = {1, 16, 128, 512};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const shape *s = &shapes[i];
        const struct {
            const char *name;
            int64_t n, k, times;
        } products[] = {{"q", s->hidden, s->hidden, s->layers}, {"k", s->kv, s->hidden, s->layers},
                        {"v", s->kv, s->hidden, s->layers},     {"o", s->hidden, s->hidden, s->layers},
                        {"gate", s->ffn, s->hidden, s->layers}, {"up", s->ffn, s->hidden, s->layers},
                        {"down", s->hidden, s->ffn, s->layers}, {"head", s->vocab, s->hidden, 1}};
        for (int b = 0; b < 4; b++)
            for (int threads = 1; threads <= MOST_THREADS; threads++) {
                double slowest = 0, mean = 0;
                for (int p = 0; p < 8; p++) {
                    double uneven = product_unevenness(threads, products[p].n, products[p].k, batches[b]);
                    double work = (double)(products[p].n * products[p].k * products[p].times);
                    double bound = least_bound(threads, products[p].n);
                    if (uneven > bound)
                        fail_msg("%s %s, %d rows, %d threads: %.3f times the mean", s->name, products[p].name,
                                 (int)batches[b], threads, uneven);
                    slowest += work * uneven;
                    mean += work;
                }
                if (slowest / mean > 1.07)
                    fail_msg("%s, %d rows, %d threads: %.3f", s->name, (int)batches[b], threads,
                             slowest / mean);
            }
    }
}

/* ---- attention ---- */

typedef struct {
    cpu_attention_split split;
    int64_t first; /* position of token 0; tokens are of one sequence */
    bool apart;    /* each token is a sequence of its own, of first + 1 positions */
} attention;

static int64_t positions_in(const attention *a, int64_t t, int64_t run)
{
    int64_t length = a->first + 1 + (a->apart ? 0 : t);
    if (a->split.runs == 1) return length;
    int64_t left = length - run * QK_ATTENTION_RUN;
    return left < 0 ? 0 : left < QK_ATTENTION_RUN ? left : QK_ATTENTION_RUN;
}

static double attention_cost(const void *split, int64_t piece)
{
    const attention *a = split;
    int64_t t0, t1, run, sum = 0;
    int head;
    if (!ql_cpu_attention_piece(&a->split, piece, &t0, &t1, &head, &run)) return 0;
    for (int64_t t = t0; t < t1; t++) sum += positions_in(a, t, run);
    return (double)sum;
}

static attention new_attention(const shape *s, int threads, int64_t tokens, int64_t first, bool apart)
{
    attention a = {.first = first, .apart = apart};
    int64_t longest = first + (apart ? 1 : tokens);
    double work = 2.0 * (double)(s->heads * s->head_dim) * (double)tokens * (double)longest;
    a.split = ql_cpu_split_attention(threads, tokens, (int)s->kv_heads, longest, work,
                                     s->heads * QK_ATTENTION_RECORD(s->head_dim) * 4);
    return a;
}

static double attention_unevenness(const attention *a, int threads)
{
    double all = 0;
    for (int64_t p = 0; p < a->split.pieces; p++) all += attention_cost(a, p);
    return simulate(threads, a->split.pieces, attention_cost, a) / (all / threads);
}

/* Every token, head and run once. */
static void test_attention_is_whole(void **state)
{
    (void)state;
    const int64_t cases[][3] = {{1, 0, 0},     {1, 4095, 0}, {1, 32767, 0},
                                {33, 1000, 1}, {512, 0, 0},  {512, 32256, 0}};
    for (int threads = 1; threads <= MOST_THREADS; threads += 3)
        for (int i = 0; i < 6; i++) {
            attention a = new_attention(&shapes[0], threads, cases[i][0], cases[i][1], cases[i][2] != 0);
            const int64_t runs = a.split.runs, count = cases[i][0] * 8 * runs;
            char *seen = calloc((size_t)count, 1);
            for (int64_t p = 0; p < a.split.pieces; p++) {
                int64_t t0, t1, run;
                int head;
                if (!ql_cpu_attention_piece(&a.split, p, &t0, &t1, &head, &run)) continue;
                assert_true(0 <= t0 && t0 < t1 && t1 <= cases[i][0] && run < runs && head < 8);
                for (int64_t t = t0; t < t1; t++) seen[(t * 8 + head) * runs + run]++;
            }
            for (int64_t j = 0; j < count; j++) assert_int_equal(seen[j], 1);
            free(seen);
        }
}

/* Runs of 256 positions of 8 heads: one token at 4,096 positions is 128 pieces, so 1.15 holds up to 16
 * threads and where 128 divides well, 2 for one of 63; at 32,768 positions there are 1,024. A prompt's pieces
 * are dealt out the dearest first. */
static void test_attention_is_even(void **state)
{
    (void)state;
    static const struct {
        int64_t tokens, first;
        bool apart;
        int threads; /* up to which the bound holds */
        double bound;
    } cases[] = {{1, 4095, false, 16, 1.15}, {1, 4095, false, 64, 1.5},    {1, 32767, false, 64, 1.15},
                 {1, 8191, false, 64, 1.26}, {16, 1023, true, 64, 1.15},   {128, 0, false, 64, 1.15},
                 {512, 0, false, 64, 1.15},  {512, 3584, false, 64, 1.15}, {512, 32256, false, 64, 1.15}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (size_t c = 0; c < sizeof cases / sizeof *cases; c++)
            for (int threads = 1; threads <= cases[c].threads; threads++) {
                attention a =
                    new_attention(&shapes[i], threads, cases[c].tokens, cases[c].first, cases[c].apart);
                double uneven = attention_unevenness(&a, threads);
                if (uneven > cases[c].bound)
                    fail_msg("%d tokens from position %d, %d threads: %.3f times the mean",
                             (int)cases[c].tokens, (int)cases[c].first, threads, uneven);
            }
}

/* The partial results of a long context are bounded: a call that would need more keeps its runs together. */
static void test_partial_results_are_bounded(void **state)
{
    (void)state;
    attention a = new_attention(&shapes[1], 64, 48, 1 << 20, true);
    assert_int_equal(a.split.runs, 1);
    a = new_attention(&shapes[1], 64, 1, 131071, false);
    assert_int_equal(a.split.runs, 512);
    a = new_attention(&shapes[1], 1, 1, 131071, false);
    assert_int_equal(a.split.runs, 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_output_once), cmocka_unit_test(test_shares),
        cmocka_unit_test(test_products_are_even), cmocka_unit_test(test_attention_is_whole),
        cmocka_unit_test(test_attention_is_even), cmocka_unit_test(test_partial_results_are_bounded),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
