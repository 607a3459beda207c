/* Flash-decoding on the device: against float64 and the CPU kernel, bit for bit against itself in other
 * batches, and in every output layout. */
#include "attention_help.h"
#include "qk_attention_split.h"

static const int lengths[] = {1, 2, 63, 64, 65, 127, 128, 129, 300, 513};
enum { SEQUENCES = sizeof lengths / sizeof *lengths };

/* One token, the last, of a sequence of each length. */
static attention_case new_decode(int heads, int kv_heads, int d, qk_format kv)
{
    span spans[SEQUENCES];
    for (int i = 0; i < SEQUENCES; i++) spans[i] = (span){lengths[i] - 1, 1};
    return new_attention(heads, kv_heads, d, kv, spans, SEQUENCES);
}

static void *scratch_for(const attention_case *c)
{
    return new_scratch(c->tokens, c->heads, c->d, c->longest);
}

/* Queries and weights stay in float32, so the bound is float32's for every cache. */
static void check_values(const attention_case *c, const float *y)
{
    double *exact = malloc((size_t)c->d * sizeof *exact), *size = malloc((size_t)c->d * sizeof *size);
    double error = 0, total = 0, worst = 0;
    for (int64_t t = 0; t < c->tokens; t++)
        for (int h = 0; h < c->heads; h++) {
            const int64_t at = (t * c->heads + h) * c->d;
            exact_attention(c, c->q + at, t, h, exact, size);
            for (int i = 0; i < c->d; i++) {
                double off = fabs(y[at + i] - exact[i]);
                if (!(off <= worst)) worst = off; /* so that NaN shows */
                error += off * off;
                total += exact[i] * exact[i];
            }
        }
    double rms = sqrt(total / (double)case_size(c));
    if (!(worst <= 1e-5 * rms && error <= 1e-12 * total))
        fail_msg("d %d, format %d: worst %g of rms %g, NMSE %g", c->d, c->kv, worst, rms, error / total);
    free(exact);
    free(size);
}

static void check_against_cpu(const attention_case *c, const float *y)
{
    float *expect = cpu_attention(c);
    for (size_t i = 0; i < case_size(c); i++) assert_true(fabsf(y[i] - expect[i]) <= 5e-6f);
    free(expect);
}

static void check_decode(int heads, int kv_heads, int d, qk_format kv)
{
    attention_case c = new_decode(heads, kv_heads, d, kv);
    put_case(&c);
    void *scratch = scratch_for(&c);
    float *y = run_attention(qk_cuda_attention_decode, &c, scratch);
    check_values(&c, y);
    check_against_cpu(&c, y);
    free(y);
    free_attention(&c);
}

/* The four widths that kernels are made for in every format, those between in one; groups that fill four
 * heads and that do not. */
static void test_values(void **state)
{
    (void)state;
    const int full[][3] = {{5, 1, 32}, {9, 3, 64}, {4, 1, 128}, {2, 1, 256}};
    const int between[][3] = {{32, 8, 8},  {3, 1, 16},  {6, 2, 24}, {8, 8, 32}, {5, 1, 80},
                              {16, 1, 96}, {7, 1, 136}, {3, 1, 8},  {2, 1, 80}, {1, 1, 96}};
    for (int i = 0; i < 4; i++)
        for (qk_format f = QK_F32; f <= QK_BF16; f++) check_decode(full[i][0], full[i][1], full[i][2], f);
    for (int i = 0; i < 10; i++) {
        check_decode(between[i][0], between[i][1], between[i][2], (qk_format)(2 - i % 3));
    }
}

static void test_layouts(void **state)
{
    (void)state;
    const int shapes[][3] = {{3, 1, 24}, {2, 1, 128}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        attention_case c = new_decode(shapes[i][0], shapes[i][1], shapes[i][2], QK_BF16);
        put_case(&c);
        void *scratch = scratch_for(&c);
        float *y = run_attention(qk_cuda_attention_decode, &c, scratch);
        check_16bit(qk_cuda_attention_decode, &c, y, scratch);
        free(y);
        free_attention(&c);
    }
}

/* Token t of the batch alone, with a grid that has room for more: the same bits. */
static void check_alone(const attention_case *c, const float *y, int64_t t, int64_t longest, void *scratch)
{
    const int64_t width = (int64_t)c->heads * c->d;
    attention_case one = *c;
    one.tokens = 1;
    one.longest = longest;
    one.dev_q = c->dev_q + t * width;
    one.dev_start = c->dev_start + t;
    one.dev_pos = c->dev_pos + t;
    float *alone = run_attention(qk_cuda_attention_decode, &one, scratch);
    assert_same_bits(alone, y + t * width, (size_t)width);
    free(alone);
}

/* One scratch for calls of many shapes, never cleared between them. */
static void test_batch_invariance(void **state)
{
    (void)state;
    attention_case c = new_decode(6, 2, 64, QK_BF16);
    put_case(&c);
    void *scratch = new_scratch(64, 6, 64, 1000);
    float *y = run_attention(qk_cuda_attention_decode, &c, scratch);
    for (int64_t t = 0; t < c.tokens; t++) {
        check_alone(&c, y, t, c.pos[t] + 1, scratch);
        check_alone(&c, y, t, 1000, scratch);
    }
    float *again = run_attention(qk_cuda_attention_decode, &c, scratch);
    assert_same_bits(again, y, case_size(&c));
    free(again);
    free(y);
    free_attention(&c);
}

/* More tokens than a launch takes, several of them with more than one piece; the last launch pads. */
static void test_several_launches(void **state)
{
    (void)state;
    const span spans[] = {{100, 60}, {0, 10}, {256, 3}};
    attention_case c = new_attention(2, 1, 16, QK_F32, spans, 3);
    put_case(&c);
    assert_true(c.tokens > QK_ATTENTION_TOKENS && c.tokens % 8);
    void *scratch = scratch_for(&c);
    float *y = run_attention(qk_cuda_attention_decode, &c, scratch);
    check_values(&c, y);
    check_16bit(qk_cuda_attention_decode, &c, y, scratch);
    free(y);
    free_attention(&c);
}

/* A key that dominates returns its value exactly, from any piece. */
static void test_one_hot(void **state)
{
    (void)state;
    const int targets[] = {0, 127, 128, 255, 256, 299};
    for (qk_format f = QK_F32; f <= QK_BF16; f++)
        for (size_t i = 0; i < sizeof targets / sizeof *targets; i++) {
            const span last = {299, 1};
            attention_case c = new_attention(2, 1, 64, f, &last, 1);
            int64_t slot = c.start[0] + targets[i];
            for (int j = 0; j < 64; j++) {
                float sign = random_unit() < 0 ? -1 : 1;
                c.k[slot * 64 + j] = 64 * sign;
                c.q[j] = c.q[64 + j] = 64 * sign;
            }
            put_case(&c);
            float *y = run_attention(qk_cuda_attention_decode, &c, scratch_for(&c));
            assert_same_bits(y, c.v + slot * 64, 64);
            assert_same_bits(y + 64, c.v + slot * 64, 64);
            free(y);
            free_attention(&c);
        }
}

/* Scores far apart and far from zero: the running maximum is the piece's own. */
static void test_large_scores(void **state)
{
    (void)state;
    const span last = {299, 1};
    attention_case c = new_attention(2, 2, 64, QK_F32, &last, 1);
    for (int64_t i = 0; i < 2 * c.slots * 64; i++) c.k[i] = c.k[i] * 0.25f + 100; /* scores near +-10^4 */
    for (int i = 0; i < 64; i++) {
        c.q[i] = 12.5f;
        c.q[64 + i] = -12.5f;
    }
    put_case(&c);
    float *y = run_attention(qk_cuda_attention_decode, &c, scratch_for(&c));
    for (int h = 0; h < 2; h++) {
        double exact[64], size[64];
        exact_attention(&c, c.q + 64 * h, 0, h, exact, size);
        /* a float32 score of 10^4 is good to about 10^-2 in the weights */
        for (int i = 0; i < 64; i++) assert_true(fabs(y[64 * h + i] - exact[i]) <= 2e-2 * size[i]);
    }
    free(y);
    free_attention(&c);
}

static void test_bad_arguments_are_refused(void **state)
{
    (void)state;
    const qk_cuda_attention good = {.kv = QK_F32, .heads = 4, .kv_heads = 2, .d = 8, .longest = 1};
    qk_cuda_attention bad[6];
    for (int i = 0; i < 6; i++) {
        bad[i] = good;
        bad[i].tokens = 1;
    }
    bad[0].d = 12;
    bad[1].d = 264;
    bad[2].kv = QK_4BIT;
    bad[3].kv_heads = 3;
    bad[4].y_format = QK_F32; /* 16-bit output that is none */
    bad[5].slab = 48;
    for (int i = 0; i < 6; i++) {
        if (i != 4) bad[i].y_format = QK_BF16;
        assert_int_not_equal(qk_cuda_attention_decode(NULL, &bad[i]), 0);
    }
    assert_int_equal(qk_cuda_attention_decode(NULL, &good), 0); /* no tokens, no work */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_layouts),
        cmocka_unit_test(test_batch_invariance),
        cmocka_unit_test(test_several_launches),
        cmocka_unit_test(test_one_hot),
        cmocka_unit_test(test_large_scores),
        cmocka_unit_test(test_bad_arguments_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
