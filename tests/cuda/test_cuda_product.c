/* Products for few tokens, against float64 sums of the same rounded operands. */
#include "cuda_help.h"

static qk_cuda_weight put_weight(const qk_matrix *w, int layout, bool nested, const float *bias,
                                 int64_t tokens)
{
    qk_cuda_weight d = {.w = *w, .layout = layout};
    const size_t bytes = (size_t)(w->format == QK_4BIT ? (w->n * w->k + 1) / 2
                                                       : w->n * w->k * (int64_t)format_size(w->format));
    uint8_t *data = new_bytes(bytes);
    memcpy(data, w->data, bytes);
    if (layout == QK_LAYOUT_TILES)
        for (int64_t row = 0; row < w->n; row++)
            for (int64_t piece = 0; piece < w->k / 32; piece++)
                memcpy(data + qk_tile_offset(row, piece, w->k),
                       (const uint8_t *)w->data + (row * w->k + 32 * piece) / 2, 16);
    d.w.data = cuda_put(data, bytes);
    free(data);
    if (w->format == QK_4BIT) {
        const int64_t blocks = (w->n * w->k + w->block - 1) / w->block;
        if (nested) { /* the scales that this gives are written back to w */
            const int64_t groups = (blocks + 255) / 256;
            float *table = new_floats((size_t)(257 + groups));
            uint8_t *index = new_bytes((size_t)blocks);
            for (int64_t b = 0; b < blocks; b++) {
                index[b] = (uint8_t)random_u32();
                ((float *)(uintptr_t)w->absmax)[b] =
                    qk_nested_absmax(table[index[b]], table[257 + b / 256], table[256]);
            }
            d.nested = cuda_put(table, (size_t)(257 + groups) * 4);
            d.absmax8 = cuda_put(index, (size_t)blocks);
            d.nested_block = 256;
            d.w.absmax = NULL;
            free(table);
            free(index);
        } else {
            d.w.absmax = cuda_put(w->absmax, (size_t)blocks * 4);
        }
    }
    d.bias = bias ? cuda_put(bias, (size_t)w->n * 4) : NULL;
    d.y = cuda_new((size_t)(tokens * w->n) * 4);
    return d;
}

/* x rounded to `f`, in place, and its fragments on the device. */
static void *put_fragments(float *x, int64_t tokens, int64_t k, qk_format f, int slab)
{
    const size_t count = (size_t)qk_fragment_count(tokens, k, slab);
    uint16_t *h = new_bytes(count * 2);
    memset(h, 0, count * 2);
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < k; i++) {
            float *v = &x[t * k + i];
            *v = f == QK_BF16 ? qk_round_bf16(*v) : qk_round_f16(*v);
            h[qk_fragment_index(t, i, k, slab)] = f == QK_BF16 ? qk_f32_to_bf16(*v) : qk_f32_to_f16(*v);
        }
    void *p = cuda_put(h, count * 2);
    free(h);
    return p;
}

/* Within what k float32 additions in any order may lose, twice. */
static void check_product(const float *y, const qk_matrix *w, const float *x, const float *bias,
                          const float *before, int64_t tokens)
{
    float *row = new_floats((size_t)w->k);
    for (int64_t j = 0; j < w->n; j++) {
        for (int64_t i = 0; i < w->k; i++) row[i] = weight(w, j * w->k + i);
        for (int64_t t = 0; t < tokens; t++) {
            double sum = 0, size = 0;
            for (int64_t i = 0; i < w->k; i++) {
                const double term = (double)row[i] * x[t * w->k + i];
                sum += term;
                size += fabs(term);
            }
            if (bias) sum += bias[j], size += fabs(bias[j]);
            if (before) sum += before[t * w->n + j], size += fabs(before[t * w->n + j]);
            const double error = fabs(y[t * w->n + j] - sum),
                         limit = 2 * 0x1p-24 * sqrt((double)w->k + 16) * size;
            if (!(error <= limit + 1e-37))
                fail_msg("n %d k %d token %d row %d: %.9g, not %.9g", (int)w->n, (int)w->k, (int)t, (int)j,
                         y[t * w->n + j], sum);
        }
    }
    free(row);
}

typedef struct {
    qk_format format, round_to;
    int block;
    bool nested, add, bias;
    int64_t n[3], k, tokens;
    int count;
} product_case;

static void check_case(const product_case *c)
{
    const bool four = c->format == QK_4BIT;
    const qk_format f = four ? c->round_to : c->format;
    qk_matrix w[3];
    qk_cuda_weight d[3];
    float *bias[3] = {0}, *before[3] = {0}, *x = new_floats((size_t)(c->tokens * c->k));
    for (int i = 0; i < c->count; i++) {
        w[i] = new_matrix(c->format, c->n[i], c->k, c->block, c->round_to);
        if (c->bias) bias[i] = new_floats((size_t)c->n[i]);
        d[i] = put_weight(&w[i], four ? QK_LAYOUT_TILES : QK_LAYOUT_ROWS, c->nested, bias[i], c->tokens);
        assert_int_equal(qk_cuda_product_kind(&d[i]), four ? QK_PRODUCT_4BIT : QK_PRODUCT_16BIT);
        assert_int_equal(qk_cuda_product_format(&d[i]), f);
        if (!c->add) continue;
        before[i] = new_floats((size_t)(c->tokens * c->n[i]));
        CUDA_OK(cudaMemcpy(d[i].y, before[i], (size_t)(c->tokens * c->n[i]) * 4, cudaMemcpyHostToDevice));
    }
    void *fragments = put_fragments(x, c->tokens, c->k, f, four ? QK_SLAB_4BIT : QK_SLAB_16BIT);
    CUDA_RUN(qk_cuda_product(0, d, c->count, fragments, c->tokens, c->add));
    for (int i = 0; i < c->count; i++) {
        float *y = cuda_copy(d[i].y, (size_t)(c->tokens * c->n[i]) * 4);
        check_product(y, &w[i], x, bias[i], before[i], c->tokens);
        free(y);
        free(bias[i]);
        free(before[i]);
        free_matrix(&w[i]);
    }
    free(x);
    cuda_free_all();
}

static void test_16bit(void **state)
{
    (void)state;
    static const int64_t shapes[][3] = {{16, 8, 1},     {24, 40, 2},   {40, 64, 7},   {16, 192, 8},
                                        {24, 256, 9},   {40, 320, 16}, {72, 576, 17}, {16, 1024, 33},
                                        {24, 2112, 64}, {576, 64, 1}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (qk_format f = QK_F16; f <= QK_BF16; f++)
            check_case(&(product_case){.format = f,
                                       .n = {shapes[i][0], 40, 16},
                                       .k = shapes[i][1],
                                       .tokens = shapes[i][2],
                                       .count = i % 3 == 0 ? 3 : 1,
                                       .add = i % 2,
                                       .bias = i % 4 > 1});
}

static void test_4bit(void **state)
{
    (void)state;
    static const int64_t shapes[][4] = {
        {16, 64, 1, 64},    {48, 192, 2, 64},    {16, 256, 7, 128}, {32, 320, 8, 256},  {48, 576, 9, 64},
        {16, 1024, 16, 64}, {32, 2112, 17, 128}, {16, 320, 33, 64}, {48, 192, 64, 256}, {576, 64, 1, 64}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        for (int kind = 0; kind < 4; kind++)
            check_case(&(product_case){.format = QK_4BIT,
                                       .round_to = kind % 2 ? QK_BF16 : QK_F16,
                                       .nested = kind > 1,
                                       .block = (int)shapes[i][3],
                                       .n = {shapes[i][0], 16, 48},
                                       .k = shapes[i][1],
                                       .tokens = shapes[i][2],
                                       .count = i % 3 == 0 ? 3 : 1,
                                       .add = i % 2,
                                       .bias = i % 4 > 1});
}

/* Token i reads column i of the weight back, exactly. */
static void test_one_hot(void **state)
{
    (void)state;
    for (int kind = 0; kind < 4; kind++) {
        const bool four = kind < 2;
        const int64_t n = 32, k = 320;
        const qk_format f = kind % 2 ? QK_BF16 : QK_F16;
        qk_matrix w = new_matrix(four ? QK_4BIT : f, n, k, 64, f);
        qk_cuda_weight d = put_weight(&w, four ? QK_LAYOUT_TILES : QK_LAYOUT_ROWS, kind == 1, NULL, 64);
        for (int64_t first = 0; first < k; first += 64) {
            float *x = new_floats((size_t)(64 * k));
            for (int64_t i = 0; i < 64 * k; i++) x[i] = i % k == first + i / k;
            void *fragments = put_fragments(x, 64, k, f, four ? QK_SLAB_4BIT : QK_SLAB_16BIT);
            CUDA_RUN(qk_cuda_product(0, &d, 1, fragments, 64, false));
            float *y = cuda_copy(d.y, (size_t)(64 * n) * 4);
            for (int64_t t = 0; t < 64; t++)
                for (int64_t j = 0; j < n; j++)
                    if (y[t * n + j] != weight(&w, j * k + first + t))
                        fail_msg("kind %d input %d row %d", kind, (int)(first + t), (int)j);
            free(x);
            free(y);
        }
        free_matrix(&w);
        cuda_free_all();
    }
}

/* A token's bits depend neither on how many there are nor on its place. */
static void test_same_bits_in_every_batch(void **state)
{
    (void)state;
    static const int64_t sizes[] = {1, 2, 7, 8, 9, 16, 17, 33};
    for (int four = 0; four < 2; four++) {
        const int64_t n = 48, k = 1088;
        qk_matrix w = new_matrix(four ? QK_4BIT : QK_BF16, n, k, 64, QK_BF16);
        qk_cuda_weight d = put_weight(&w, four, false, NULL, 64);
        float *x = new_floats((size_t)(64 * k)), *all = NULL;
        for (int s = -1; s < (int)(sizeof sizes / sizeof *sizes); s++) {
            const int64_t tokens = s < 0 ? 64 : sizes[s], from = s < 0 ? 0 : 64 - tokens - s;
            void *fragments =
                put_fragments(x + from * k, tokens, k, QK_BF16, four ? QK_SLAB_4BIT : QK_SLAB_16BIT);
            CUDA_RUN(qk_cuda_product(0, &d, 1, fragments, tokens, false));
            float *y = cuda_copy(d.y, (size_t)(tokens * n) * 4);
            if (s < 0) {
                all = y;
                continue;
            }
            assert_same_bits(y, all + from * n, (size_t)(tokens * n));
            free(y);
        }
        free(all);
        free(x);
        free_matrix(&w);
        cuda_free_all();
    }
}

static void test_swiglu(void **state)
{
    (void)state;
    static const int64_t shapes[][3] = {{48, 320, 1}, {16, 64, 9}, {80, 192, 17}, {32, 256, 40}};
    for (int i = 0; i < 8; i++) {
        const int64_t n = shapes[i / 2][0], k = shapes[i / 2][1], tokens = shapes[i / 2][2];
        const bool four = i % 2;
        const int slab = i % 4 < 2 ? QK_SLAB_4BIT : QK_SLAB_16BIT;
        qk_matrix w[2];
        qk_cuda_weight d[2];
        float *bias[2], *y[2], *x = new_floats((size_t)(tokens * k));
        void *fragments = put_fragments(x, tokens, k, QK_BF16, four ? QK_SLAB_4BIT : QK_SLAB_16BIT);
        for (int j = 0; j < 2; j++) {
            w[j] = new_matrix(four ? QK_4BIT : QK_BF16, n, k, 64, QK_BF16);
            bias[j] = new_floats((size_t)n);
            d[j] = put_weight(&w[j], four, four && j, bias[j], tokens);
            CUDA_RUN(qk_cuda_product(0, &d[j], 1, fragments, tokens, false));
            y[j] = cuda_copy(d[j].y, (size_t)(tokens * n) * 4);
        }
        const size_t count = (size_t)qk_fragment_count(tokens, n, slab);
        void *dst = cuda_new(count * 2);
        CUDA_RUN(qk_cuda_product_swiglu(0, &d[0], &d[1], fragments, tokens, QK_BF16, slab, dst));
        uint16_t *got = cuda_copy(dst, count * 2), *expect = new_bytes(count * 2);
        memset(expect, 0, count * 2);
        for (int64_t e = 0; e < tokens * n; e++)
            expect[qk_fragment_index(e / n, e % n, n, slab)] =
                qk_f32_to_bf16(y[0][e] / (1.0f + expf(-y[0][e])) * y[1][e]);
        for (size_t e = 0; e < count; e++) { /* a device's expf may round otherwise: one unit of bfloat16 */
            if (abs(got[e] - expect[e]) > (expect[e] != 0)) fail_msg("case %d, number %zu", i, e);
        }
        for (int j = 0; j < 2; j++) {
            free_matrix(&w[j]);
            free(bias[j]);
            free(y[j]);
        }
        free(got);
        free(expect);
        free(x);
        cuda_free_all();
    }
}

static void test_plain(void **state)
{
    (void)state;
    static const int64_t shapes[][3] = {{5, 7, 1}, {33, 130, 9}, {40, 576, 8}, {16, 320, 3}};
    for (int i = 0; i < 4; i++)
        for (int kind = 0; kind < 7; kind++) {
            const int64_t n = shapes[i][0], k = shapes[i][1], tokens = shapes[i][2];
            const qk_format f = kind < 3 ? (qk_format)kind : QK_4BIT;
            const bool tiles = kind == 6 && qk_tiles_fit(n, k, 64);
            qk_matrix w = new_matrix(f, n, k, kind == 6 ? 64 : 32, kind == 4 ? QK_F32 : QK_BF16);
            float *bias = new_floats((size_t)n), *x = new_floats((size_t)(tokens * k));
            float *before = new_floats((size_t)(tokens * n));
            qk_cuda_weight d = put_weight(&w, tiles, kind == 5, bias, tokens);
            CUDA_OK(cudaMemcpy(d.y, before, (size_t)(tokens * n) * 4, cudaMemcpyHostToDevice));
            const float *input = cuda_put(x, (size_t)(tokens * k) * 4);
            CUDA_RUN(qk_cuda_product_plain(0, &d, input, tokens, i % 2));
            float *y = cuda_copy(d.y, (size_t)(tokens * n) * 4);
            check_product(y, &w, x, bias, i % 2 ? before : NULL, tokens);
            for (int64_t t = 0; t < tokens; t++) { /* alone: the same bits */
                if (i % 2) break;
                CUDA_RUN(qk_cuda_product_plain(0, &d, input + t * k, 1, false));
                float *one = cuda_copy(d.y, (size_t)n * 4);
                assert_same_bits(one, y + t * n, (size_t)n);
                free(one);
            }
            free(y);
            free(x);
            free(bias);
            free(before);
            free_matrix(&w);
            cuda_free_all();
        }
}

static void test_what_does_not_fit(void **state)
{
    (void)state;
    qk_cuda_weight w = {.w = {.format = QK_BF16, .n = 16, .k = 20}};
    assert_int_equal(qk_cuda_product_kind(&w), QK_PRODUCT_PLAIN);
    assert_int_not_equal(qk_cuda_product(0, &w, 1, &w, 1, false), 0);
    w.w.k = 24;
    assert_int_equal(qk_cuda_product_kind(&w), QK_PRODUCT_16BIT);
    assert_int_not_equal(qk_cuda_product(0, &w, 1, &w, QK_PRODUCT_TOKENS + 1, false), 0);
    assert_int_not_equal(qk_cuda_product(0, &w, 4, &w, 1, false), 0);
    assert_int_equal(qk_cuda_product(0, &w, 1, &w, 0, false), 0);
    w = (qk_cuda_weight){.w = {.format = QK_4BIT, .n = 16, .k = 64, .block = 64, .round_to = QK_F32},
                         .layout = 1};
    assert_int_equal(qk_cuda_product_kind(&w), QK_PRODUCT_PLAIN);
    w.w.round_to = QK_F16;
    assert_int_equal(qk_cuda_product_kind(&w), QK_PRODUCT_4BIT);
    w.layout = QK_LAYOUT_ROWS;
    assert_int_equal(qk_cuda_product_kind(&w), QK_PRODUCT_PLAIN);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_16bit),
        cmocka_unit_test(test_4bit),
        cmocka_unit_test(test_one_hot),
        cmocka_unit_test(test_same_bits_in_every_batch),
        cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_plain),
        cmocka_unit_test(test_what_does_not_fit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
