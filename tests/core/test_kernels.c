/* The products and attention on every instruction set of this processor: against a float64 oracle with its
 * error bound, and bit for bit against the order of sums that qk.h states. */
#include "kernel_help.h"

#include <stdio.h>

/* y = x W^T + bias (+ y) on `cpu`, outputs in pieces of `step`. */
static void run_matmul(const qk_cpu *cpu, const qk_matrix *w, const float *bias, const float *x, int64_t m,
                       bool add, float *y, int64_t step)
{
    size_t bytes = cpu->matmul_scratch(w, m);
    void *scratch = new_bytes(bytes);
    float *packed = cpu->matmul_packed(w, m) ? new_bytes(cpu->matmul_packed(w, m)) : NULL;
    for (int64_t t = 0; packed && t < m; t += step) {
        cpu->matmul_pack(w, x, m, t, t + step < m ? t + step : m, packed);
    }
    for (int64_t n = 0; n < w->n; n += step) {
        cpu->matmul(w, bias, packed ? packed : x, m, add, y, n, n + step < w->n ? n + step : w->n, scratch);
    }
    free(packed);
    free(scratch);
}

static void check_product(const qk_matrix *w, int64_t m)
{
    float *x = new_floats((size_t)(m * w->k)), *y = new_floats((size_t)(m * w->n));
    float *bits = new_floats((size_t)(m * w->n));
    for (int64_t t = 0; t < m; t++)
        for (int64_t n = 0; n < w->n; n++) {
            float r = reference_dot(w, n, x + t * w->k);
            double exact = 0, size = 0;
            for (int64_t i = 0; i < w->k; i++) {
                double p = (double)weight(w, n * w->k + i) * x[t * w->k + i];
                exact += p;
                size += fabs(p);
            }
            /* one rounding a step of a lane's chain, then four of the fold (Higham 2002, 3.5) */
            double bound = ((double)w->k / 16 + 6) * 0x1p-24 * size;
            assert_true(fabs(r - exact) <= bound);
            bits[t * w->n + n] = r;
        }
    FOR_EACH_CPU(cpu)
    {
        for (int step = 16; step <= 160; step += 144) {
            memset(y, 0xff, (size_t)(m * w->n) * sizeof *y);
            run_matmul(cpu, w, NULL, x, m, false, y, step);
            assert_same_bits(y, bits, (size_t)(m * w->n));
        }
    }
    free(x);
    free(y);
    free(bits);
}

static void test_dense_products(void **state)
{
    (void)state;
    const int64_t shapes[][2] = {{1, 1},    {3, 7},    {16, 16},  {17, 33},   {50, 64},  {5, 15},
                                 {100, 48}, {33, 100}, {64, 576}, {19, 1040}, {2, 1535}, {130, 31}};
    for (qk_format f = QK_F32; f <= QK_BF16; f++) {
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            qk_matrix w = new_matrix(f, shapes[i][0], shapes[i][1], 0, QK_F32);
            for (int64_t m = 1; m <= 14; m += m < 8 ? 1 : 5) check_product(&w, m);
            free_matrix(&w);
        }
    }
}

static void test_4bit_products(void **state)
{
    (void)state;
    /* rows that begin in the middle of a block, of a byte, and of neither; the last block short */
    const int64_t shapes[][2] = {{1, 1},     {3, 7},   {17, 33},  {50, 64},  {5, 15},
                                 {9, 16},    {20, 48}, {33, 100}, {40, 96},  {64, 576},
                                 {19, 1040}, {7, 513}, {130, 32}, {12, 160}, {57, 1056}};
    const int blocks[] = {32, 64, 128, 1024, 4096};
    for (size_t b = 0; b < sizeof blocks / sizeof *blocks; b++) {
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            for (qk_format round_to = QK_F32; round_to <= QK_BF16; round_to++) {
                qk_matrix w = new_matrix(QK_4BIT, shapes[i][0], shapes[i][1], blocks[b], round_to);
                for (int64_t m = 1; m <= 13; m += m < 6 ? 1 : 6) check_product(&w, m);
                free_matrix(&w);
            }
        }
    }
}

/* Tiles of every width, their last group of outputs short or not, rows of one piece and of several. */
static void test_many_activations(void **state)
{
    (void)state;
    const int64_t shapes[][2] = {{1, 1},    {5, 15},  {17, 33},   {50, 32},  {16, 256},
                                 {33, 100}, {64, 48}, {19, 1040}, {7, 2063}, {3, 4128}};
    for (qk_format f = QK_F32; f <= QK_4BIT; f++) {
        for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
            qk_matrix w = new_matrix(f, shapes[i][0], shapes[i][1], 64, QK_BF16);
            for (int64_t m = 41; m <= 76; m += shapes[i][1] > 1000 ? 7 : 3) check_product(&w, m);
            free_matrix(&w);
        }
    }
}

/* More activations than one pass over the weights takes, rows longer than one piece and strips of few rows.
 */
static void test_large_products(void **state)
{
    (void)state;
    for (qk_format f = QK_BF16; f <= QK_4BIT; f++) {
        qk_matrix w = new_matrix(f, 5, 16400, 64, QK_BF16);
        check_product(&w, 98);
        free_matrix(&w);
        w = new_matrix(f, 5, 40, 64, QK_BF16);
        check_product(&w, 1031);
        free_matrix(&w);
    }
}

/* Row t of a batch of any size has the bits of row t alone. */
static void test_batch_invariance(void **state)
{
    (void)state;
    FOR_EACH_CPU(cpu)
    {
        for (qk_format f = QK_F32; f <= QK_4BIT; f++) {
            qk_matrix w = new_matrix(f, 70, 704, 64, QK_BF16);
            float *x = new_floats(70 * 704), *alone = new_floats(70 * 70), *y = new_floats(70 * 70);
            for (int64_t t = 0; t < 70; t++)
                run_matmul(cpu, &w, NULL, x + t * 704, 1, false, alone + t * 70, 70);
            for (int64_t m = 1; m <= 70; m += m < 44 ? 1 : 5) {
                run_matmul(cpu, &w, NULL, x, m, false, y, 70);
                assert_same_bits(y, alone, (size_t)(m * 70));
            }
            free(x);
            free(y);
            free(alone);
            free_matrix(&w);
        }
    }
}

static void test_bias_and_add(void **state)
{
    (void)state;
    FOR_EACH_CPU(cpu)
    {
        for (int64_t m = 1; m <= 45; m += 4) {
            qk_matrix w = new_matrix(QK_BF16, 37, 50, 0, QK_F32);
            float *x = new_floats((size_t)m * 50), *bias = new_floats(37), *y = new_floats((size_t)m * 37);
            float *before = new_bytes((size_t)m * 37 * sizeof *y);
            memcpy(before, y, (size_t)m * 37 * sizeof *y);
            run_matmul(cpu, &w, bias, x, m, true, y, m % 8 == 1 ? 37 : 11);
            for (int64_t i = 0; i < m * 37; i++) {
                float expect = before[i] + (reference_dot(&w, i % 37, x + i / 37 * 50) + bias[i % 37]);
                assert_same_bits(&y[i], &expect, 1);
            }
            free(x);
            free(bias);
            free(y);
            free(before);
            free_matrix(&w);
        }
    }
}

/* A one-hot activation reads a weight back: every byte value, all roundings, few and many rows. */
static void test_one_hot_reads_weights(void **state)
{
    (void)state;
    enum { N = 12, K = 64 };
    FOR_EACH_CPU(cpu)
    {
        for (qk_format f = QK_F32; f <= QK_4BIT; f++) {
            for (qk_format round_to = QK_F32; round_to <= QK_BF16; round_to++) {
                qk_matrix w = new_matrix(f, N, K, 64, round_to);
                for (int i = 0; i < N * K / 2 && f == QK_4BIT; i++)
                    ((uint8_t *)(uintptr_t)w.data)[i] = (uint8_t)i;
                float *x = new_bytes(K * K * sizeof *x), *y = new_bytes(K * N * sizeof *y);
                for (int i = 0; i < K * K; i++) x[i] = i / K == i % K;
                for (int m = 1; m <= K; m += K - 1) {
                    for (int t = 0; t < K; t += m)
                        run_matmul(cpu, &w, NULL, x + t * K, m, false, y + t * N, N);
                    for (int i = 0; i < K * N; i++) {
                        if (y[i] != weight(&w, (int64_t)(i % N) * K + i / N)) fail_msg("weight %d", i);
                    }
                }
                free(x);
                free(y);
                free_matrix(&w);
            }
        }
    }
}

static void test_nan_scale_is_not_lost(void **state)
{
    (void)state;
    FOR_EACH_CPU(cpu)
    {
        for (qk_format round_to = QK_F32; round_to <= QK_BF16; round_to++) {
            qk_matrix w = new_matrix(QK_4BIT, 1, 64, 64, round_to);
            *(float *)(uintptr_t)w.absmax = qk_from_bits(0x7fffffff);
            float x[64 * 43], y[43];
            for (int i = 0; i < 64 * 43; i++) x[i] = 1;
            for (int m = 1; m <= 43; m += 7) {
                run_matmul(cpu, &w, NULL, x, m, false, y, 1);
                assert_true(isnan(y[0]));
            }
            free_matrix(&w);
        }
    }
}

/* Scales that are bfloat16 have tables of their own where there are many: at the edges of their range, beyond
 * it, and where a row's are something else. */
static void test_bfloat16_scales(void **state)
{
    (void)state;
    enum { N = 68, K = 4096 };
    const float odd[] = {0,       0x1p-60f,  0x1.fep-61f, 0x1p60f,       0x1.02p60f,
                         -0x1p3f, 0x1p-140f, 0x1p-126f,   0x1.01fffep0f, 0x1p100f};
    const float codes[][2] = {{0, 1}, {-0.0f, 0.5f}, {0x1p-60f, 0x1p60f}, {0x1p-61f, 1}, {-1, 0x1.8p60f}};
    qk_matrix w = new_matrix(QK_4BIT, N, K, 64, QK_BF16);
    float *absmax = (float *)(uintptr_t)w.absmax;
    /* the scales of a row near each other: every one tells in the sum */
    for (int i = 0; i < N * K / 64; i++) {
        int exponent = i / (K / 64) % 30 * 4 - 60 + (int)(random_u32() % 3);
        absmax[i] = ldexpf(qk_round_bf16(1 + fabsf(absmax[i])), exponent);
    }
    for (size_t c = 0; c < sizeof codes / sizeof *codes; c++) {
        w.code[3] = codes[c][0];
        w.code[12] = codes[c][1];
        for (int64_t m = 1; m <= 5; m++) check_product(&w, m);
    }
    memcpy(w.code, qk_nf4_code, sizeof w.code);
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        float *row = absmax + (int)(random_u32() % N) * (K / 64), before[K / 64];
        memcpy(before, row, sizeof before);
        for (int j = 0; j < K / 64; j++) row[j] = odd[i];
        check_product(&w, 1);
        check_product(&w, 3);
        memcpy(row, before, sizeof before);
    }
    free_matrix(&w);
}

/* ---- attention ---- */

typedef struct {
    int heads, kv_heads, d;
    int64_t tokens, slots;
    float *q, *k, *v, *y;
    int32_t *start, *pos;
} attention_case;

/* Sequences of the lengths given, all their tokens in one packed batch, each in a run of slots of its own. */
static attention_case new_attention(int heads, int kv_heads, int d, const int *lengths, int sequences)
{
    attention_case c = {.heads = heads, .kv_heads = kv_heads, .d = d, .slots = 3};
    for (int s = 0; s < sequences; s++) c.tokens += lengths[s];
    c.start = new_bytes((size_t)c.tokens * 4);
    c.pos = new_bytes((size_t)c.tokens * 4);
    int64_t t = 0;
    for (int s = 0; s < sequences; s++) {
        for (int i = 0; i < lengths[s]; i++, t++) {
            c.start[t] = (int32_t)c.slots;
            c.pos[t] = i;
        }
        c.slots += lengths[s] + 2;
    }
    c.q = new_floats((size_t)(c.tokens * heads * d));
    for (int64_t i = 0; i < c.tokens * heads * d; i++) c.q[i] *= 4;
    c.k = new_floats((size_t)(kv_heads * c.slots * d));
    c.v = new_floats((size_t)(kv_heads * c.slots * d));
    c.y = new_floats((size_t)(c.tokens * heads * d));
    return c;
}

static void free_attention(attention_case *c)
{
    free(c->q);
    free(c->k);
    free(c->v);
    free(c->y);
    free(c->start);
    free(c->pos);
}

static void run_attention(const qk_cpu *cpu, const attention_case *c, int64_t step, float *y)
{
    qk_attention a = {.q = c->q,
                      .k = c->k,
                      .v = c->v,
                      .start = c->start,
                      .pos = c->pos,
                      .y = y,
                      .heads = c->heads,
                      .kv_heads = c->kv_heads,
                      .d = c->d,
                      .slots = c->slots};
    void *scratch = new_bytes(QK_ATTENTION_SCRATCH);
    for (int64_t t = 0; t < c->tokens; t += step)
        for (int h = 0; h < c->kv_heads; h++)
            cpu->attention(&a, t, t + step < c->tokens ? t + step : c->tokens, h, scratch);
    free(scratch);
}

static void check_attention_values(const attention_case *c)
{
    double *p = malloc((size_t)c->slots * sizeof *p);
    for (int64_t t = 0; t < c->tokens; t++)
        for (int h = 0; h < c->heads; h++) {
            const float *q = c->q + (t * c->heads + h) * c->d, *y = c->y + (t * c->heads + h) * c->d;
            int64_t first = (h / (c->heads / c->kv_heads)) * c->slots + c->start[t];
            double max = -INFINITY, sum = 0;
            for (int j = 0; j <= c->pos[t]; j++) {
                p[j] = 0;
                for (int i = 0; i < c->d; i++) p[j] += (double)q[i] * c->k[(first + j) * c->d + i];
                p[j] /= sqrt(c->d);
                if (p[j] > max) max = p[j];
            }
            for (int j = 0; j <= c->pos[t]; j++) sum += p[j] = exp(p[j] - max);
            for (int i = 0; i < c->d; i++) {
                double expect = 0;
                for (int j = 0; j <= c->pos[t]; j++) expect += p[j] / sum * c->v[(first + j) * c->d + i];
                if (!(fabs(expect - y[i]) <= 4e-6))
                    fail_msg("token %d head %d: %g, %g", (int)t, h, expect, y[i]);
            }
        }
    free(p);
}

static void test_attention(void **state)
{
    (void)state;
    const int shapes[][3] = {{1, 1, 1},  {4, 2, 5},   {9, 3, 64}, {8, 2, 16},
                             {6, 1, 80}, {4, 4, 128}, {2, 1, 150}};
    const int lengths[] = {1, 70, 3, 130, 64};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        attention_case c = new_attention(shapes[i][0], shapes[i][1], shapes[i][2], lengths, 5);
        size_t n = (size_t)(c.tokens * c.heads * c.d);
        float *one = new_floats(n);
        run_attention(qk_cpu_select("scalar", NULL), &c, c.tokens, c.y);
        check_attention_values(&c);
        FOR_EACH_CPU(cpu)
        {
            /* token by token, in small groups, everything at once: the same bits */
            const int64_t steps[] = {1, 5, 16, c.tokens};
            for (size_t s = 0; s < 4; s++) {
                memset(one, 0xff, n * sizeof *one);
                run_attention(cpu, &c, steps[s], one);
                assert_same_bits(one, c.y, n);
            }
        }
        free(one);
        free_attention(&c);
    }
}

/* Slots beyond a token's position and outside its sequence may hold anything. */
static void test_attention_reads_its_own_slots(void **state)
{
    (void)state;
    const int lengths[] = {5, 66};
    attention_case c = new_attention(4, 2, 24, lengths, 2);
    for (int64_t slot = 0; slot < c.slots; slot++) {
        bool used = false;
        for (int64_t t = 0; t < c.tokens; t++) used |= slot >= c.start[t] && slot <= c.start[t] + c.pos[t];
        for (int i = 0; i < 24 && !used; i++)
            for (int h = 0; h < 2; h++)
                c.k[(h * c.slots + slot) * 24 + i] = c.v[(h * c.slots + slot) * 24 + i] = NAN;
    }
    FOR_EACH_CPU(cpu)
    {
        run_attention(cpu, &c, c.tokens, c.y);
        check_attention_values(&c);
    }
    free_attention(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_dense_products),
        cmocka_unit_test(test_4bit_products),
        cmocka_unit_test(test_many_activations),
        cmocka_unit_test(test_large_products),
        cmocka_unit_test(test_batch_invariance),
        cmocka_unit_test(test_bias_and_add),
        cmocka_unit_test(test_one_hot_reads_weights),
        cmocka_unit_test(test_nan_scale_is_not_lost),
        cmocka_unit_test(test_bfloat16_scales),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_attention_reads_its_own_slots),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
