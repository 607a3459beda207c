/* 4-bit codes: CUDA against the processor's kernels, every bit. */
#include "element_help.h"

/* ---- encoding ---- */

typedef struct {
    float thresholds[15];
    uint8_t order[16];
    int zero_code;
} code_book;

static code_book table_book(const uint32_t *bits, const uint8_t *order, int zero_code)
{
    code_book b = {.zero_code = zero_code};
    memcpy(b.thresholds, bits, sizeof b.thresholds);
    memcpy(b.order, order, sizeof b.order);
    return b;
}

static int ascending(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Thresholds anywhere, some twice; codes in any order. */
static code_book random_book(void)
{
    code_book b = {.zero_code = (int)(random_u32() % 16)};
    for (int i = 0; i < 15; i++) b.thresholds[i] = random_unit();
    b.thresholds[4] = b.thresholds[9];
    qsort(b.thresholds, 15, sizeof b.thresholds[0], ascending);
    for (int i = 0; i < 16; i++) b.order[i] = (uint8_t)i;
    for (int i = 15; i > 0; i--) {
        int j = (int)(random_u32() % (uint32_t)(i + 1));
        uint8_t code = b.order[i];
        b.order[i] = b.order[j];
        b.order[j] = code;
    }
    return b;
}

/* Weights with what may go wrong in a block: zeros, an infinity, NaN, subnormal numbers whose inverse
 * overflows, values on a threshold. */
static void awkward_weights(float *x, int64_t n, int block, const code_book *book)
{
    static const float special[] = {INFINITY, NAN, -INFINITY, 0, -0.0f, 1e-40f, 0x1p-149f};
    for (int64_t i = 0; i < n; i++) {
        int64_t b = i / block;
        x[i] = random_unit();
        switch (b % 7) {
        case 1:
            x[i] = 0;
            break;
        case 2:
            x[i] *= 1e-39f;
            break;
        case 3:
            if (random_u32() % 16 == 0) x[i] = special[random_u32() % 7];
            break;
        case 4:
            x[i] = NAN;
            break;
        case 5: /* absmax 1, so that x is a threshold or its neighbour */
            x[i] = i % block == 0 ? 1.0f : book->thresholds[random_u32() % 15];
            if (random_u32() % 2) x[i] = nextafterf(x[i], 2);
            if (fabsf(x[i]) > 1) x[i] = 1;
            break;
        default:
            break;
        }
    }
}

static void check_quantize(qk_format f, int64_t n, int block, const code_book *book, size_t shift)
{
    const qk_cpu *cpu = qk_cpu_select(NULL, NULL);
    size_t bytes = (size_t)(n + 1) / 2, blocks = (size_t)((n + block - 1) / block);
    float *x = new_bytes((size_t)n * 4), *absmax = new_bytes(blocks * 4);
    void *src = new_bytes((size_t)n * 4);
    uint8_t *packed = new_bytes(bytes);
    awkward_weights(x, n, block, book);
    cpu->convert(QK_F32, x, f, src, 0, n);
    cpu->quantize4(f, src, n, block, book->thresholds, book->order, book->zero_code, packed, absmax, 0,
                   (int64_t)blocks);
    uint8_t *d_packed = shifted_new(bytes, shift / 2);
    float *d_absmax = cuda_new(blocks * 4);
    CUDA_RUN(qk_cuda_quantize4(NULL, f, shifted_put(src, (size_t)n * format_size(f), shift), n, block,
                               book->thresholds, book->order, book->zero_code, d_packed, d_absmax));
    uint8_t *got = cuda_copy(d_packed, bytes);
    float *scales = cuda_copy(d_absmax, blocks * 4);
    for (size_t i = 0; i < bytes; i++)
        if (got[i] != packed[i])
            fail_msg("format %d, block %d, n %lld, byte %zu: %02x, not %02x", (int)f, block, (long long)n, i,
                     got[i], packed[i]);
    assert_same_bits(scales, absmax, blocks);
    cuda_free_all();
    free(x);
    free(src);
    free(absmax);
    free(packed);
    free(got);
    free(scales);
}

static void test_quantize4(void **state)
{
    (void)state;
    const int64_t sizes[] = {1, 2, 31, 33, 1000, 4097, 9001, 30000};
    const code_book books[] = {table_book(qk_nf4_threshold_bits, qk_nf4_order, 7),
                               table_book(qk_fp4_threshold_bits, qk_fp4_order, 0), random_book(),
                               random_book()};
    for (int block = 32, at = 0; block <= 4096; block *= 2)
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
            for (qk_format f = QK_F32; f <= QK_BF16; f++, at++)
                check_quantize(f, sizes[s], block, &books[at % 4], at % 5 == 0 ? 4 : 0);
}

/* Each value of the table, on its own, is encoded as itself; each threshold goes down, the next float goes
 * up. */
static void test_thresholds(void **state)
{
    (void)state;
    code_book book = table_book(qk_nf4_threshold_bits, qk_nf4_order, 7);
    float w[32] = {1.0f, 1.0f};
    for (int i = 0; i < 15; i++) {
        w[2 + 2 * i] = book.thresholds[i];
        w[3 + 2 * i] = nextafterf(book.thresholds[i], 2);
    }
    uint8_t *d = cuda_new(16), packed[16];
    CUDA_RUN(qk_cuda_quantize4(NULL, QK_F32, cuda_put(w, sizeof w), 32, 32, book.thresholds, book.order, 7, d,
                               cuda_new(4)));
    cuda_get(packed, d, sizeof packed);
    for (int i = 0; i < 15; i++) {
        assert_int_equal(qk_nibble(packed, 2 + 2 * i), i);
        assert_int_equal(qk_nibble(packed, 3 + 2 * i), i + 1);
    }
    cuda_free_all();
}

/* ---- decoding ---- */

/* A 4-bit weight on the host with its scales in 8 bits too, and on the device in every form. */
typedef struct {
    qk_matrix host; /* absmax: as the nested ones decode */
    uint8_t *absmax8;
    float *nested;
    int nested_block;
} nested_case;

static nested_case new_nested(int64_t n, int64_t k, int block, qk_format round_to)
{
    nested_case c = {.host = new_matrix(QK_4BIT, n, k, block, round_to), .nested_block = 256};
    int64_t blocks = (n * k + block - 1) / block;
    c.absmax8 = new_bytes((size_t)blocks);
    c.nested = new_floats(257 + (size_t)(blocks + 255) / 256);
    float *absmax = (float *)(uintptr_t)c.host.absmax;
    for (int64_t b = 0; b < blocks; b++) {
        c.absmax8[b] = (uint8_t)random_u32();
        absmax[b] = qk_nested_absmax(c.nested[c.absmax8[b]], c.nested[257 + b / 256], c.nested[256]);
    }
    return c;
}

static void free_nested(nested_case *c)
{
    free_matrix(&c->host);
    free(c->absmax8);
    free(c->nested);
}

static void check_dequantize(const nested_case *c, bool nested, int layout, qk_format to, size_t shift)
{
    const qk_matrix *h = &c->host;
    int64_t count = h->n * h->k, blocks = (count + h->block - 1) / h->block;
    size_t bytes = (size_t)(count + 1) / 2, out = (size_t)count * format_size(to);
    qk_cuda_weight w = {.w = *h, .layout = layout};
    w.w.absmax = nested ? NULL : cuda_put(h->absmax, (size_t)blocks * 4);
    if (nested) {
        w.absmax8 = cuda_put(c->absmax8, (size_t)blocks);
        w.nested = cuda_put(c->nested, (257 + (size_t)(blocks + 255) / 256) * 4);
        w.nested_block = c->nested_block;
    }
    if (layout == QK_LAYOUT_TILES) {
        uint8_t *tiled = cuda_new(bytes);
        CUDA_RUN(qk_cuda_tile4(NULL, cuda_put(h->data, bytes), h->n, h->k, false, tiled));
        w.w.data = tiled;
    } else {
        w.w.data = shifted_put(h->data, bytes, shift);
    }
    void *expect = new_bytes(out), *dst = shifted_new(out, shift);
    qk_cpu_select(NULL, NULL)->dequantize4(h, to, expect, 0, count);
    CUDA_RUN(qk_cuda_dequantize4(NULL, &w, to, dst));
    void *got = cuda_copy(dst, out);
    assert_memory_equal(got, expect, out);
    cuda_free_all();
    free(expect);
    free(got);
}

static void test_dequantize4(void **state)
{
    (void)state;
    const int64_t shapes[][2] = {{1, 1},   {3, 7},    {5, 13},   {37, 131},
                                 {16, 64}, {32, 192}, {16, 576}, {2, 9000}};
    const int blocks[] = {64, 32, 128, 4096};
    int at = 0;
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        for (qk_format round = QK_F32; round <= QK_BF16; round++) {
            for (qk_format to = QK_F32; to <= QK_BF16; to++, at++) {
                nested_case c = new_nested(shapes[s][0], shapes[s][1], blocks[at % 4], round);
                bool tiles = qk_tiles_fit(c.host.n, c.host.k, c.host.block);
                for (int nested = 0; nested < 2; nested++) {
                    check_dequantize(&c, nested, QK_LAYOUT_ROWS, to, 0);
                    check_dequantize(&c, nested, QK_LAYOUT_ROWS, to, 4);
                    if (tiles) check_dequantize(&c, nested, QK_LAYOUT_TILES, to, 4 * (size_t)nested);
                }
                free_nested(&c);
            }
        }
    }
}

/* Every byte of an 8-bit scale against map values, nested scales and offsets of all sizes. */
static void test_nested_scales(void **state)
{
    (void)state;
    enum { N = 16, K = 64 * 256 / 16 * 4 }; /* 1024 blocks of 64: four nested blocks */
    nested_case c = new_nested(N, K, 64, QK_BF16);
    static const float scales[] = {1, 1e-30f, 3e8f, 0x1.fffffep-3f};
    for (int b = 0; b < N * K / 64; b++) c.absmax8[b] = (uint8_t)b;
    for (int j = 0; j < 4; j++) c.nested[257 + j] = scales[j];
    float *absmax = (float *)(uintptr_t)c.host.absmax;
    for (int b = 0; b < N * K / 64; b++)
        absmax[b] = qk_nested_absmax(c.nested[c.absmax8[b]], c.nested[257 + b / 256], c.nested[256]);
    for (qk_format to = QK_F32; to <= QK_BF16; to++) {
        check_dequantize(&c, true, QK_LAYOUT_ROWS, to, 0);
        check_dequantize(&c, true, QK_LAYOUT_TILES, to, 0);
    }
    free_nested(&c);
}

/* Another size of nested blocks. */
static void test_nested_block(void **state)
{
    (void)state;
    nested_case c = new_nested(16, 2048, 64, QK_F16);
    c.nested_block = 512;
    float *absmax = (float *)(uintptr_t)c.host.absmax;
    for (int b = 0; b < 512; b++)
        absmax[b] = qk_nested_absmax(c.nested[c.absmax8[b]], c.nested[257], c.nested[256]);
    check_dequantize(&c, true, QK_LAYOUT_TILES, QK_F16, 0);
    free_nested(&c);
}

/* ---- tiles ---- */

static void test_tile4(void **state)
{
    (void)state;
    const int64_t shapes[][2] = {{16, 64}, {16, 128}, {32, 256}, {48, 320}, {16, 576}, {16, 9216}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int64_t n = shapes[s][0], k = shapes[s][1];
        size_t bytes = (size_t)(n * k / 2);
        uint8_t *src = new_bytes(bytes);
        for (size_t i = 0; i < bytes; i++) src[i] = (uint8_t)random_u32();
        uint8_t *d = cuda_put(src, bytes), *tiled = cuda_new(bytes), *back = cuda_new(bytes);
        CUDA_RUN(qk_cuda_tile4(NULL, d, n, k, false, tiled));
        CUDA_RUN(qk_cuda_tile4(NULL, tiled, n, k, true, back));
        uint8_t *got = cuda_copy(tiled, bytes), *again = cuda_copy(back, bytes);
        for (int64_t row = 0; row < n; row++)
            for (int64_t piece = 0; piece < k / 32; piece++)
                assert_memory_equal(got + qk_tile_offset(row, piece, k), src + (row * k / 32 + piece) * 16,
                                    16);
        assert_memory_equal(again, src, bytes);
        cuda_free_all();
        free(src);
        free(got);
        free(again);
    }
}

static void test_refuses(void **state)
{
    (void)state;
    code_book book = random_book();
    uint8_t *p = cuda_new(4096);
    const int blocks[] = {0, 16, 48, 8192};
    for (int i = 0; i < 4; i++)
        assert_int_not_equal(qk_cuda_quantize4(NULL, QK_F32, p, 64, blocks[i], book.thresholds, book.order, 0,
                                               p + 2048, (float *)(p + 3072)),
                             0);
    assert_int_not_equal(qk_cuda_tile4(NULL, p, 8, 64, false, p + 2048), 0);
    assert_int_not_equal(qk_cuda_tile4(NULL, p, 16, 96, false, p + 2048), 0);
    qk_cuda_weight w = {.w = {.format = QK_BF16, .n = 16, .k = 64}};
    assert_int_not_equal(qk_cuda_dequantize4(NULL, &w, QK_BF16, p), 0);
    cuda_free_all();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_quantize4),    cmocka_unit_test(test_thresholds),
        cmocka_unit_test(test_dequantize4),  cmocka_unit_test(test_nested_scales),
        cmocka_unit_test(test_nested_block), cmocka_unit_test(test_tile4),
        cmocka_unit_test(test_refuses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
