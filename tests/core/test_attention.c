/* Attention to long contexts, on every instruction set of this processor: against float64, the same bits
 * whole, in runs, token by token and on any number of threads. Short contexts are in test_kernels.c. */
#include "kernel_help.h"

#include "backend_cpu.h"
#include "ops.h"

#include <stdio.h>

static ql_err error;

#define OK(expr)                                                                                             \
    do {                                                                                                     \
        if ((expr) != QL_OK) fail_msg("%s: %s", #expr, error.message);                                       \
    } while (0)

/* The last `tokens` positions of a sequence, and before it in the batch one token of another, of `other`
 * keys. */
typedef struct {
    qk_attention a;
    int64_t tokens;
    int32_t *start, *pos;
    float *q, *k, *v, *y;
} context;

static context new_context(int heads, int kv_heads, int d, int64_t length, int64_t tokens, int64_t other)
{
    context c = {.tokens = tokens + 1};
    int64_t slots = length + other;
    c.start = new_bytes((size_t)c.tokens * 4);
    c.pos = new_bytes((size_t)c.tokens * 4);
    c.start[0] = (int32_t)length;
    c.pos[0] = (int32_t)other - 1;
    for (int64_t t = 0; t < tokens; t++) {
        c.start[t + 1] = 0;
        c.pos[t + 1] = (int32_t)(length - tokens + t);
    }
    c.q = new_floats((size_t)(c.tokens * heads * d));
    for (int64_t i = 0; i < c.tokens * heads * d; i++) c.q[i] *= 4;
    c.k = new_floats((size_t)(kv_heads * slots * d));
    c.v = new_floats((size_t)(kv_heads * slots * d));
    c.y = new_floats((size_t)(c.tokens * heads * d));
    c.a = (qk_attention){.q = c.q,
                         .k = c.k,
                         .v = c.v,
                         .start = c.start,
                         .pos = c.pos,
                         .y = c.y,
                         .heads = heads,
                         .kv_heads = kv_heads,
                         .d = d,
                         .slots = slots};
    return c;
}

static void free_context(context *c)
{
    free(c->start);
    free(c->pos);
    free(c->q);
    free(c->k);
    free(c->v);
    free(c->y);
}

static size_t outputs(const context *c)
{
    return (size_t)(c->tokens * c->a.heads * c->a.d);
}

/* Tokens [t0, t1) of all heads into y, NaN before. */
static void run_whole(const qk_cpu *cpu, const context *c, int64_t step, float *y)
{
    qk_attention a = c->a;
    void *scratch = new_bytes(QK_ATTENTION_SCRATCH);
    a.y = y;
    memset(y, 0xff, outputs(c) * sizeof *y);
    for (int64_t t = 0; t < c->tokens; t += step)
        for (int h = 0; h < a.kv_heads; h++)
            cpu->attention(&a, t, t + step < c->tokens ? t + step : c->tokens, h, scratch);
    free(scratch);
}

/* The same in runs, the last first, as threads may happen to do them. */
static void run_in_runs(const qk_cpu *cpu, const context *c, int64_t step, float *y)
{
    qk_attention a = c->a;
    int64_t longest = 0;
    for (int64_t t = 0; t < c->tokens; t++) longest = a.pos[t] + 1 > longest ? a.pos[t] + 1 : longest;
    a.runs = (longest + QK_ATTENTION_RUN - 1) / QK_ATTENTION_RUN;
    size_t bytes = (size_t)(c->tokens * a.heads * a.runs * QK_ATTENTION_RECORD(a.d)) * sizeof(float);
    void *scratch = new_bytes(QK_ATTENTION_SCRATCH);
    a.partial = new_bytes(bytes);
    memset(a.partial, 0xff, bytes);
    a.y = y;
    memset(y, 0xff, outputs(c) * sizeof *y);
    for (int64_t run = a.runs - 1; run >= 0; run--)
        for (int64_t t = 0; t < c->tokens; t += step)
            for (int h = a.kv_heads - 1; h >= 0; h--)
                cpu->attention_run(&a, t, t + step < c->tokens ? t + step : c->tokens, h, run, scratch);
    for (int h = 0; h < a.kv_heads; h++) cpu->attention_join(&a, 0, c->tokens, h);
    free(a.partial);
    free(scratch);
}

/* Values are below 1, weights add up to 1: each of n weights has the rounding of its score, of exp and of the
 * sums it goes through. */
static void check_values(const context *c, const float *y)
{
    const qk_attention *a = &c->a;
    double *p = malloc((size_t)a->slots * sizeof *p);
    for (int64_t t = 0; t < c->tokens; t++)
        for (int h = 0; h < a->heads; h++) {
            const int64_t row = (t * a->heads + h) * a->d;
            const int64_t first = h / (a->heads / a->kv_heads) * a->slots + c->start[t];
            double max = -INFINITY, sum = 0;
            for (int64_t j = 0; j <= c->pos[t]; j++) {
                p[j] = 0;
                for (int i = 0; i < a->d; i++)
                    p[j] += (double)c->q[row + i] * (double)c->k[(first + j) * a->d + i];
                p[j] /= sqrt(a->d);
                if (p[j] > max) max = p[j];
            }
            for (int64_t j = 0; j <= c->pos[t]; j++) sum += p[j] = exp(p[j] - max);
            for (int i = 0; i < a->d; i++) {
                double expect = 0;
                for (int64_t j = 0; j <= c->pos[t]; j++)
                    expect += p[j] / sum * (double)c->v[(first + j) * a->d + i];
                if (!(fabs(expect - (double)y[row + i]) <= 1e-6))
                    fail_msg("token %d head %d: %g, %g", (int)t, h, expect, (double)y[row + i]);
            }
        }
    free(p);
}

static void test_long_contexts(void **state)
{
    (void)state;
    /* heads, cache heads, head dimension, positions, tokens, positions of the other sequence */
    static const int cases[][6] = {{1, 1, 64, 4096, 3, 1},    {1, 1, 16, 32768, 1, 257},
                                   {4, 2, 48, 1000, 5, 4100}, {3, 1, 5, 257, 2, 256},
                                   {2, 1, 128, 513, 40, 255}, {1, 1, 2048, 600, 3, 10},
                                   {2, 2, 64, 4097, 1, 4096}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int *n = cases[i];
        context c = new_context(n[0], n[1], n[2], n[3], n[4], n[5]);
        float *other = new_floats(outputs(&c));
        run_whole(qk_cpu_select("scalar", NULL), &c, c.tokens, c.y);
        check_values(&c, c.y);
        FOR_EACH_CPU(cpu)
        {
            run_whole(cpu, &c, 1, other);
            assert_same_bits(other, c.y, outputs(&c));
            run_in_runs(cpu, &c, 1, other);
            assert_same_bits(other, c.y, outputs(&c));
            run_in_runs(cpu, &c, 3, other);
            assert_same_bits(other, c.y, outputs(&c));
        }
        free(other);
        free_context(&c);
    }
}

/* A large score in a late run makes all before it vanish, one in an early run all after it. */
static void test_scores_far_apart(void **state)
{
    (void)state;
    for (int at = 100; at < 1000; at += 800) {
        context c = new_context(1, 1, 16, 1000, 1, 1);
        for (int i = 0; i < 16; i++) c.k[at * 16 + i] = c.q[16 + i] * 100;
        FOR_EACH_CPU(cpu)
        {
            run_in_runs(cpu, &c, 2, c.y);
            check_values(&c, c.y);
            assert_same_bits(c.y + 16, c.v + at * 16, 16);
        }
        free_context(&c);
    }
}

/* NaN in a key of one run reaches that token's output and no other's. */
static void test_nan_is_kept(void **state)
{
    (void)state;
    context c = new_context(1, 1, 16, 1000, 1, 700);
    c.k[300 * 16] = NAN;
    FOR_EACH_CPU(cpu)
    {
        run_in_runs(cpu, &c, 2, c.y);
        for (int i = 0; i < 16; i++) assert_true(!isnan(c.y[i]) && isnan(c.y[16 + i]));
    }
    free_context(&c);
}

static ql_tensor upload(ql_device *dev, ql_dtype dtype, int ndim, const int64_t *dims, const void *values)
{
    ql_tensor t;
    OK(ql_tensor_new(dev, NULL, QL_MEM_ACTIVATIONS, dtype, ndim, dims, &t, &error));
    if (values) OK(ql_tensor_upload(&t, values, ql_tensor_bytes(&t), &error));
    return t;
}

/* Through the backend: it chooses runs on several threads and the whole on one. */
static void test_same_bits_on_threads(void **state)
{
    (void)state;
    int most;
    OK(ql_pool_decide_threads(0, &most, &error));
    context c = new_context(4, 2, 64, 5000, 2, 1300);
    float *got = new_floats(outputs(&c));
    run_whole(qk_cpu_select("scalar", NULL), &c, 1, c.y);
    for (int threads = 1; threads <= most && threads <= 4; threads++) {
        ql_device *dev;
        OK(ql_device_open("cpu", &(ql_device_options){.threads = threads}, &dev, &error));
        const int64_t rows[] = {c.tokens, 4 * 64}, cache[] = {2, c.a.slots, 64};
        ql_tensor q = upload(dev, QL_F32, 2, rows, c.q), y = upload(dev, QL_F32, 2, rows, NULL);
        ql_tensor k = upload(dev, QL_F32, 3, cache, c.k), v = upload(dev, QL_F32, 3, cache, c.v);
        ql_tensor start = upload(dev, QL_I32, 1, rows, c.start), pos = upload(dev, QL_I32, 1, rows, c.pos);
        for (int round = 0; round < 20; round++) {
            memset(y.data, 0xff, ql_tensor_bytes(&y));
            OK(ql_op_attention(&q, (ql_kv_view){&k, &v}, &start, &pos, 4, &y, &error));
            OK(ql_tensor_download(&y, got, ql_tensor_bytes(&y), &error));
            assert_same_bits(got, c.y, outputs(&c));
        }
        const cpu_context *inside = dev->ctx;
        assert_int_equal(inside->partial_bytes > 0, threads > 1);
        ql_tensor *all[] = {&q, &y, &k, &v, &start, &pos};
        for (int i = 0; i < 6; i++) ql_tensor_free(all[i]);
        ql_device_release(dev);
    }
    free(got);
    free_context(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_long_contexts),
        cmocka_unit_test(test_scores_far_apart),
        cmocka_unit_test(test_nan_is_kept),
        cmocka_unit_test(test_same_bits_on_threads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
