/* Attention for prompts on the device: each number within the rounding of its weights, bit for bit against
 * itself in other batches, and in every output layout. */
#include "attention_help.h"

/* Largest relative error of rounding to the format, and the largest error of a number below its normals. */
static double unit(qk_format f)
{
    return f == QK_BF16 ? 0x1p-8 : 0x1p-11;
}

static double below(qk_format f)
{
    return f == QK_BF16 ? 0x1p-134 : 0x1p-25;
}

/* Two references. With the queries rounded as the kernel rounds them, only the weights differ, each by its
 * rounding: every number has a bound. With the queries as they are, and against the CPU's float32, the whole
 * has one: the square of a rounding. */
static void check_values(const attention_case *c, const float *y)
{
    const int d = c->d;
    float *q = new_bytes((size_t)d * sizeof *q);
    double *exact = malloc((size_t)d * sizeof *exact), *size = malloc((size_t)d * sizeof *size);
    double error = 0, total = 0, rounded_error = 0, cpu_error = 0;
    float *cpu = cpu_attention(c);
    for (int64_t t = 0; t < c->tokens; t++)
        for (int h = 0; h < c->heads; h++) {
            const int64_t at = (t * c->heads + h) * d;
            for (int i = 0; i < d; i++) {
                q[i] = c->kv == QK_BF16 ? qk_round_bf16(c->q[at + i]) : qk_round_f16(c->q[at + i]);
            }
            double sum = exact_attention(c, q, t, h, exact, size);
            for (int i = 0; i < d; i++) {
                double off = fabs(y[at + i] - exact[i]);
                double bound = unit(c->kv) * size[i] + below(c->kv) * (c->pos[t] + 1) / sum + 2e-6;
                if (!(off <= bound))
                    fail_msg("d %d, token %d, head %d: %g, not %g within %g", d, (int)t, h, y[at + i],
                             exact[i], bound);
                rounded_error += off * off;
            }
            exact_attention(c, c->q + at, t, h, exact, size);
            for (int i = 0; i < d; i++) {
                error += (y[at + i] - exact[i]) * (y[at + i] - exact[i]);
                total += exact[i] * exact[i];
                cpu_error += ((double)y[at + i] - cpu[at + i]) * ((double)y[at + i] - cpu[at + i]);
            }
        }
    const double u = unit(c->kv);
    if (!(error <= u * u * total && rounded_error <= u * u / 4 * total && cpu_error <= u * u * total))
        fail_msg("d %d, format %d: NMSE %g, with rounded queries %g, against the CPU %g", d, c->kv,
                 error / total, rounded_error / total, cpu_error / total);
    free(cpu);
    free(q);
    free(exact);
    free(size);
}

static void check_prefill(int heads, int kv_heads, int d, qk_format kv, const span *spans, int count)
{
    attention_case c = new_attention(heads, kv_heads, d, kv, spans, count);
    put_case(&c);
    float *y = run_attention(qk_cuda_attention_prefill, &c, NULL);
    check_values(&c, y);
    free(y);
    free_attention(&c);
}

static void test_values(void **state)
{
    (void)state;
    const span mixed[] = {{0, 1}, {0, 70}, {0, 3}, {37, 20}, {0, 65}};
    const int widths[] = {32, 64, 80, 96, 128};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        assert_true(qk_cuda_attention_prefill_fits(widths[i]));
        check_prefill(2, 1, widths[i], QK_BF16, mixed, 5);
        check_prefill(3, 1, widths[i], QK_F16, mixed, 5);
    }
    check_prefill(9, 3, 64, QK_BF16, mixed, 3);
    check_prefill(4, 4, 32, QK_F16, mixed, 4);
}

/* Around the borders of tiles of queries and of keys. */
static void test_lengths(void **state)
{
    (void)state;
    const span each[] = {{0, 1},   {0, 2},  {0, 63},  {0, 64},  {0, 65},
                         {0, 129}, {62, 1}, {127, 2}, {299, 1}, {500, 13}};
    for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
        check_prefill(1, 1, i % 2 ? 64 : 32, i % 2 ? QK_F16 : QK_BF16, &each[i], 1);
    }
}

static void test_layouts(void **state)
{
    (void)state;
    const span spans[] = {{0, 50}, {5, 17}};
    const int shapes[][3] = {{3, 1, 32}, {2, 1, 80}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        attention_case c = new_attention(shapes[i][0], shapes[i][1], shapes[i][2], QK_BF16, spans, 2);
        put_case(&c);
        float *y = run_attention(qk_cuda_attention_prefill, &c, NULL);
        check_16bit(qk_cuda_attention_prefill, &c, y, NULL);
        free(y);
        free_attention(&c);
    }
}

/* Tokens [from, to) of the batch in a call of their own: the same bits. */
static void check_part(const attention_case *c, const float *y, int64_t from, int64_t to)
{
    const int64_t width = (int64_t)c->heads * c->d;
    attention_case part = *c;
    part.tokens = to - from;
    part.dev_q = c->dev_q + from * width;
    part.dev_start = c->dev_start + from;
    part.dev_pos = c->dev_pos + from;
    float *alone = run_attention(qk_cuda_attention_prefill, &part, NULL);
    assert_same_bits(alone, y + from * width, (size_t)((to - from) * width));
    free(alone);
}

/* Each sequence alone, in pieces, a token at a time, and behind other tokens. */
static void test_batch_invariance(void **state)
{
    (void)state;
    const span spans[] = {{0, 9}, {0, 130}, {20, 30}, {0, 1}, {100, 3}};
    for (qk_format f = QK_F16; f <= QK_BF16; f++) {
        attention_case c = new_attention(2, 1, 64, f, spans, 5);
        put_case(&c);
        float *y = run_attention(qk_cuda_attention_prefill, &c, NULL);
        for (int64_t s = 0, t = 0; s < 5; t += spans[s].count, s++) check_part(&c, y, t, t + spans[s].count);
        const int64_t cuts[] = {0, 5, 40, 41, 100, 138, 139, 150, c.tokens};
        for (size_t i = 0; i + 1 < sizeof cuts / sizeof *cuts; i++) check_part(&c, y, cuts[i], cuts[i + 1]);
        check_part(&c, y, 9 + 129, 9 + 130);
        check_part(&c, y, 3, c.tokens);
        free(y);
        free_attention(&c);
    }
}

/* Tokens in any order: neighbours that do not continue one another are runs of their own. */
static void test_any_order(void **state)
{
    (void)state;
    const span whole = {0, 90};
    attention_case c = new_attention(2, 2, 64, QK_BF16, &whole, 1);
    for (int64_t t = 0; t < c.tokens; t++) {
        c.pos[t] = (int32_t)(t < 10 ? 89 - t : t < 20 ? 64 : t < 60 ? t : t * 7 % 90);
        if (t == 30) c.pos[t] = 3;
    }
    put_case(&c);
    float *y = run_attention(qk_cuda_attention_prefill, &c, NULL);
    check_values(&c, y);
    for (int64_t t = 0; t < c.tokens; t += 13) check_part(&c, y, t, t + 1);
    free(y);
    free_attention(&c);
}

/* A key that dominates returns its value exactly; those behind a token's position do not count. */
static void test_one_hot(void **state)
{
    (void)state;
    const span whole = {0, 130};
    for (qk_format f = QK_F16; f <= QK_BF16; f++) {
        attention_case c = new_attention(1, 1, 128, f, &whole, 1);
        for (int64_t t = 0; t < 130; t++) {
            const int64_t target = t * 37 % (t + 1);
            for (int j = 0; j < 128; j++) c.k[(c.start[0] + t) * 128 + j] = random_unit() < 0 ? -32 : 32;
            memcpy(c.q + t * 128, c.k + (c.start[0] + target) * 128, 128 * sizeof(float));
        }
        put_case(&c);
        float *y = run_attention(qk_cuda_attention_prefill, &c, NULL);
        for (int64_t t = 0; t < 130; t++) {
            assert_same_bits(y + t * 128, c.v + (c.start[0] + t * 37 % (t + 1)) * 128, 128);
        }
        free(y);
        free_attention(&c);
    }
}

static void test_bad_arguments_are_refused(void **state)
{
    (void)state;
    const int widths[] = {8, 16, 48, 72, 112, 136, 256};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) {
        assert_false(qk_cuda_attention_prefill_fits(widths[i]));
        qk_cuda_attention a = {.kv = QK_BF16,
                               .heads = 2,
                               .kv_heads = 1,
                               .d = widths[i],
                               .tokens = 1,
                               .longest = 1,
                               .y_format = QK_BF16};
        assert_int_not_equal(qk_cuda_attention_prefill(NULL, &a), 0);
    }
    qk_cuda_attention a = {
        .kv = QK_F32, .heads = 2, .kv_heads = 1, .d = 64, .tokens = 1, .y_format = QK_BF16};
    assert_int_not_equal(qk_cuda_attention_prefill(NULL, &a), 0);
    a.kv = QK_BF16;
    a.tokens = 0;
    assert_int_equal(qk_cuda_attention_prefill(NULL, &a), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_values),
        cmocka_unit_test(test_lengths),
        cmocka_unit_test(test_layouts),
        cmocka_unit_test(test_batch_invariance),
        cmocka_unit_test(test_any_order),
        cmocka_unit_test(test_one_hot),
        cmocka_unit_test(test_bad_arguments_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
