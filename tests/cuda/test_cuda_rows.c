/* A layer's steps on rows, whole arrays, and what a 16-bit product reads: CUDA against the processor's
 * kernels, bit for bit where nothing is summed, and against float64. */
#include "element_help.h"
#include "qk_random.h"

/* ---- data movement ---- */

static void test_embed(void **state)
{
    (void)state;
    const int64_t widths[] = {1, 7, 8, 64, 100, 576, 4100};
    const int32_t ids[] = {3, 0, 10, 3, 9};
    enum { V = 11, T = 5 };
    for (qk_format f = QK_F32; f <= QK_BF16; f++) {
        for (size_t s = 0; s < sizeof widths / sizeof *widths; s++) {
            int64_t h = widths[s];
            size_t bytes = (size_t)(T * h) * 4;
            qk_matrix table = new_matrix(f, V, h, 0, QK_F32);
            float *got = new_bytes(bytes);
            for (size_t shift = 0; shift <= 4; shift += 4) {
                const void *d = shifted_put(table.data, (size_t)(V * h) * format_size(f), shift);
                float *y = shifted_new(bytes, shift);
                CUDA_RUN(qk_cuda_embed(NULL, f, d, cuda_put(ids, sizeof ids), T, h, y));
                cuda_get(got, y, bytes);
                for (int64_t i = 0; i < T * h; i++) {
                    float expect = element(f, table.data, ids[i / h] * h + i % h);
                    assert_same_bits(&got[i], &expect, 1);
                }
                if (f == QK_F32) { /* the same movement */
                    CUDA_OK(cudaMemset(y, 0xff, bytes));
                    CUDA_RUN(qk_cuda_gather_rows(NULL, d, cuda_put(ids, sizeof ids), T, h, y));
                    cuda_get(got, y, bytes);
                    for (int64_t i = 0; i < T * h; i++)
                        assert_same_bits(&got[i], (const float *)table.data + ids[i / h] * h + i % h, 1);
                }
                cuda_free_all();
            }
            free(got);
            free_matrix(&table);
        }
    }
}

static void test_gather_cols(void **state)
{
    (void)state;
    enum { N = 200, V = 33 };
    float *x = new_floats(N * V), got[N];
    int32_t cols[N];
    for (int i = 0; i < N; i++) cols[i] = (int32_t)(random_u32() % V);
    float *y = cuda_new(sizeof got);
    CUDA_RUN(qk_cuda_gather_cols(NULL, cuda_put(x, N * V * 4), cuda_put(cols, sizeof cols), N, V, y));
    cuda_get(got, y, sizeof got);
    for (int i = 0; i < N; i++) assert_same_bits(&got[i], &x[i * V + cols[i]], 1);
    cuda_free_all();
    free(x);
}

static void test_convert(void **state)
{
    (void)state;
    enum { N = 0x10000 + 5 };
    const qk_cpu *cpu = qk_cpu_select(NULL, NULL);
    uint32_t *src = new_bytes(N * 4);
    void *expect = new_bytes(N * 4), *got = new_bytes(N * 4);
    for (qk_format from = QK_F32; from <= QK_BF16; from++) {
        /* every pattern of 16 bits; of 32 bits, the two halves' neighbourhood of every pattern */
        for (uint32_t i = 0; i < N; i++) {
            if (from == QK_F32)
                src[i] = i << 16 | (random_u32() % 4 ? 0x8000 + random_u32() % 3 - 1 : random_u32() & 0xffff);
            else
                ((uint16_t *)src)[i] = (uint16_t)i;
        }
        for (qk_format to = QK_F32; to <= QK_BF16; to++) {
            cpu->convert(from, src, to, expect, 0, N);
            for (size_t shift = 0; shift <= 4; shift += 4) {
                int64_t n = shift ? 1003 : N;
                size_t in = (size_t)n * format_size(from), out = (size_t)n * format_size(to);
                void *y = shifted_new(out, shift);
                CUDA_RUN(qk_cuda_convert(NULL, from, shifted_put(src, in, shift), to, y, n));
                cuda_get(got, y, out);
                assert_same_elements(to, got, expect, n);
                cuda_free_all();
            }
        }
    }
    free(src);
    free(expect);
    free(got);
}

/* ---- arithmetic ---- */

static void test_binary(void **state)
{
    (void)state;
    enum { N = 2051 };
    const qk_cpu *cpu = qk_cpu_select(NULL, NULL);
    float *a = new_floats(N), *b = new_floats(N), *got = new_bytes(N * 4), *expect = new_bytes(N * 4);
    const float special[] = {0, -0.0f, INFINITY, -INFINITY, NAN, 1e-45f, 3e38f, -1};
    for (int i = 0; i < 64; i++) {
        a[i] = special[i / 8];
        b[i] = special[i % 8];
    }
    for (int op = QK_ADD; op <= QK_DIV; op++) {
        for (int form = 0; form < 3; form++) { /* two arrays, a op 3, 3 op a */
            bool arrays = form == 0, reversed = form == 2;
            cpu->binary((qk_binary)op, a, arrays ? b : NULL, 3, reversed, expect, 0, N);
            for (size_t shift = 0; shift <= 4; shift += 4) {
                float *y = shifted_new(N * 4, shift), *left = shifted_put(a, N * 4, shift);
                const float *right = arrays ? shifted_put(b, N * 4, shift) : NULL;
                CUDA_RUN(qk_cuda_binary(NULL, (qk_binary)op, left, right, 3, reversed, N, y));
                cuda_get(got, y, N * 4);
                assert_same_elements(QK_F32, got, expect, N);
                CUDA_RUN(
                    qk_cuda_binary(NULL, (qk_binary)op, left, right, 3, reversed, N, left)); /* in place */
                cuda_get(got, left, N * 4);
                assert_same_elements(QK_F32, got, expect, N);
                cuda_free_all();
            }
        }
    }
    free(a);
    free(b);
    free(got);
    free(expect);
}

static void test_add_bias(void **state)
{
    (void)state;
    const int64_t shapes[][2] = {{1, 1}, {3, 7}, {5, 64}, {2, 1100}, {4, 1096}};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        int64_t t = shapes[s][0], n = shapes[s][1];
        float *y = new_floats((size_t)(t * n)), *bias = new_floats((size_t)n),
              *got = new_bytes((size_t)(t * n) * 4);
        float *d = cuda_put(y, (size_t)(t * n) * 4);
        CUDA_RUN(qk_cuda_add_bias(NULL, cuda_put(bias, (size_t)n * 4), t, n, d));
        cuda_get(got, d, (size_t)(t * n) * 4);
        for (int64_t i = 0; i < t * n; i++) {
            float expect = y[i] + bias[i % n];
            assert_same_bits(&got[i], &expect, 1);
        }
        cuda_free_all();
        free(y);
        free(bias);
        free(got);
    }
    /* more rows than a grid has in y */
    enum { ROWS = 65536 + 2 };
    float *y = new_floats(ROWS), *got = new_bytes(ROWS * 4), one = 1;
    float *d = cuda_put(y, ROWS * 4);
    CUDA_RUN(qk_cuda_add_bias(NULL, cuda_put(&one, 4), ROWS, 1, d));
    cuda_get(got, d, ROWS * 4);
    for (int i = 0; i < ROWS; i++) assert_true(got[i] == y[i] + 1);
    cuda_free_all();
    free(y);
    free(got);
}

static void test_swiglu(void **state)
{
    (void)state;
    enum { N = 3001 };
    float *gate = new_floats(N), *up = new_floats(N), *got = new_bytes(N * 4);
    for (int i = 0; i < N; i++) gate[i] *= i % 3 ? 8 : 120;
    gate[0] = 0;
    gate[1] = 200;
    gate[2] = -200;
    for (size_t shift = 0; shift <= 4; shift += 4) {
        float *g = shifted_put(gate, N * 4, shift), *u = shifted_put(up, N * 4, shift);
        CUDA_RUN(qk_cuda_swiglu(NULL, g, u, N, g)); /* y may be gate */
        cuda_get(got, g, N * 4);
        for (int i = 0; i < N; i++) {
            double exact = gate[i] / (1 + exp(-(double)gate[i])) * up[i];
            /* exp two units off, then three roundings; where exp overflows 88.8 exp(-88.8) < 2^-121 is lost
             */
            if (!(fabs(got[i] - exact) <= 5 * 0x1p-24 * fabs(exact) + 0x1p-121))
                fail_msg("silu(%.9g) * %.9g: %.9g, not %.9g", gate[i], up[i], got[i], exact);
        }
        cuda_free_all();
    }
    free(gate);
    free(up);
    free(got);
}

/* Rows of h: rmsnorm in float64, y. */
static void exact_norm(const float *x, const float *w, double eps, int64_t h, double *y)
{
    double sum = 0;
    for (int64_t i = 0; i < h; i++) sum += (double)x[i] * x[i];
    for (int64_t i = 0; i < h; i++) y[i] = x[i] / sqrt(sum / (double)h + eps) * w[i];
}

static void test_rmsnorm(void **state)
{
    (void)state;
    const int64_t widths[] = {1, 7, 8, 100, 576, 2048, 4100, 8200};
    enum { T = 3 };
    for (size_t s = 0; s < sizeof widths / sizeof *widths; s++) {
        int64_t h = widths[s];
        size_t bytes = (size_t)(T * h) * 4;
        float *x = new_floats((size_t)(T * h)), *w = new_floats((size_t)h), *got = new_bytes(bytes);
        float *alone = new_bytes(bytes);
        double *exact = new_bytes((size_t)h * 8);
        for (int64_t i = 0; i < h; i++) x[i] *= 1e-3f; /* where eps matters */
        for (size_t shift = 0; shift <= 4; shift += 4) {
            float *d = shifted_put(x, bytes, shift), *dw = shifted_put(w, (size_t)h * 4, shift);
            float *y = shifted_new(bytes, shift);
            for (int t = 0; t < T; t++)
                CUDA_RUN(qk_cuda_rmsnorm(NULL, d + t * h, dw, 1e-5f, 1, h, y + t * h));
            cuda_get(alone, y, bytes);
            CUDA_RUN(qk_cuda_rmsnorm(NULL, d, dw, 1e-5f, T, h, d)); /* y may be x */
            cuda_get(got, d, bytes);
            assert_same_bits(got, alone, (size_t)(T * h));
            for (int t = 0; t < T; t++) {
                exact_norm(x + t * h, w, (double)1e-5f, h, exact);
                for (int64_t i = 0; i < h; i++) {
                    double off = fabs(got[t * h + i] - exact[i]);
                    /* eights, the loop over them and two trees of five: at most 8 + h/8192 * 8 + 10 roundings
                     * of the sum, halved by the root; then six more */
                    assert_true(off <= (18 / 2 + 4 + 6) * 0x1p-24 * fabs(exact[i]));
                }
            }
            cuda_free_all();
        }
        free(x);
        free(w);
        free(got);
        free(alone);
        free(exact);
    }
}

/* ---- what a 16-bit product reads ---- */

/* Source and launch of one packing, on the host and on the device. */
typedef struct {
    qk_cuda_source host, device;
    int64_t rows, k; /* of x and up */
} pack_case;

/* The value before its last rounding, as the kernels for F32 make it. */
static float *prepare(const pack_case *c, int64_t t)
{
    size_t bytes = (size_t)(c->rows * c->k) * 4;
    float *d = cuda_new(bytes), *all = new_bytes(bytes), *y = new_bytes((size_t)(t * c->k) * 4);
    const qk_cuda_source *s = &c->device;
    if (s->kind == QK_SOURCE_NORM)
        CUDA_RUN(qk_cuda_rmsnorm(NULL, s->x, s->w, s->eps, c->rows, c->k, d));
    else if (s->kind == QK_SOURCE_SWIGLU)
        CUDA_RUN(qk_cuda_swiglu(NULL, s->x, s->up, c->rows * c->k, d));
    else
        CUDA_OK(cudaMemcpy(d, s->x, bytes, cudaMemcpyDeviceToDevice));
    cuda_get(all, d, bytes);
    for (int64_t i = 0; i < t; i++)
        memcpy(y + i * c->k, all + (c->host.rows ? c->host.rows[i] : i) * c->k, (size_t)c->k * 4);
    free(all);
    return y;
}

static void check_pack(const pack_case *c, qk_format to, int slab, int64_t t)
{
    int64_t k = c->k, count = slab ? qk_fragment_count(t, k, slab) : t * k;
    uint16_t *got = new_bytes((size_t)count * 2), *expect = new_bytes((size_t)count * 2);
    float *value = prepare(c, t);
    memset(expect, 0, (size_t)count * 2);
    for (int64_t i = 0; i < t * k; i++)
        expect[slab ? qk_fragment_index(i / k, i % k, k, slab) : i] =
            to == QK_F16 ? qk_f32_to_f16(value[i]) : qk_f32_to_bf16(value[i]);
    void *dst = cuda_new((size_t)count * 2);
    CUDA_RUN(qk_cuda_pack(NULL, &c->device, to, slab, t, k, dst));
    cuda_get(got, dst, (size_t)count * 2);
    for (int64_t i = 0; i < count; i++)
        if (got[i] != expect[i] && !(isnan(element(to, got, i)) && isnan(element(to, expect, i))))
            fail_msg("slab %d, %lld tokens of %lld, number %lld: %04x, not %04x", slab, (long long)t,
                     (long long)k, (long long)i, got[i], expect[i]);
    free(got);
    free(expect);
    free(value);
}

static void check_packs(int64_t k, size_t shift, bool poisoned)
{
    enum { ROWS = 13 };
    static const int32_t rows[11] = {12, 3, 3, 0, 7, 1, 2, 11, 4, 5, 6};
    float *x = new_floats((size_t)(ROWS * k)), *up = new_floats((size_t)(ROWS * k)),
          *w = new_floats((size_t)k);
    for (int64_t i = 0; i < ROWS * k; i++) x[i] *= 4;
    if (poisoned) x[3 * k] = NAN; /* row 3 is NaN under the norm; padding stays zero */
    for (qk_source_kind kind = QK_SOURCE_PLAIN; kind <= QK_SOURCE_SWIGLU; kind++) {
        for (int gathered = 0; gathered < 2; gathered++) {
            pack_case c = {.host = {.kind = kind, .rows = gathered ? rows : NULL}, .rows = ROWS, .k = k};
            c.device = c.host;
            c.device.x = shifted_put(x, (size_t)(ROWS * k) * 4, shift);
            c.device.up = shifted_put(up, (size_t)(ROWS * k) * 4, shift);
            c.device.w = shifted_put(w, (size_t)k * 4, shift);
            c.device.eps = 1e-5f;
            if (gathered) c.device.rows = cuda_put(rows, sizeof rows);
            const int slabs[] = {0, QK_SLAB_16BIT, QK_SLAB_4BIT};
            for (int s = 0; s < 3; s++)
                for (int64_t t = 1; t <= 11; t += t < 8 ? 7 : 3)
                    check_pack(&c, (s + t) % 2 ? QK_F16 : QK_BF16, slabs[s], t);
            cuda_free_all();
        }
    }
    free(x);
    free(up);
    free(w);
}

static void test_pack(void **state)
{
    (void)state;
    const int64_t widths[] = {8, 32, 33, 100, 256, 264, 1031, 1536};
    for (size_t s = 0; s < sizeof widths / sizeof *widths; s++) check_packs(widths[s], s % 2 ? 4 : 0, s == 3);
    check_packs(264, 4, false);
}

/* One wide row: more than a block's threads take at once. */
static void test_pack_wide(void **state)
{
    (void)state;
    enum { K = 14336 };
    float *x = new_floats(K), *w = new_floats(K);
    pack_case c = {.host = {.kind = QK_SOURCE_NORM}, .rows = 1, .k = K};
    c.device = (qk_cuda_source){.kind = QK_SOURCE_NORM, .eps = 1e-6f};
    c.device.x = cuda_put(x, K * 4);
    c.device.up = c.device.w = cuda_put(w, K * 4);
    check_pack(&c, QK_BF16, QK_SLAB_4BIT, 1);
    c.host.kind = c.device.kind = QK_SOURCE_SWIGLU;
    check_pack(&c, QK_F16, QK_SLAB_16BIT, 1);
    cuda_free_all();
    free(x);
    free(w);
}

static void test_pack_refuses(void **state)
{
    (void)state;
    qk_cuda_source s = {.kind = QK_SOURCE_PLAIN, .x = cuda_new(64)};
    void *dst = cuda_new(4096);
    assert_int_not_equal(qk_cuda_pack(NULL, &s, QK_F32, 0, 1, 16, dst), 0);
    assert_int_not_equal(qk_cuda_pack(NULL, &s, QK_BF16, 64, 1, 16, dst), 0);
    assert_int_not_equal(qk_cuda_pack(NULL, &s, QK_BF16, 32, 1, 16, (char *)dst + 2), 0);
    cuda_free_all();
}

/* ---- whole arrays ---- */

static void test_random(void **state)
{
    (void)state;
    const int64_t counts[] = {1, 8, 1000, 4099};
    for (qk_format f = QK_F32; f <= QK_BF16; f++) {
        for (size_t s = 0; s < sizeof counts / sizeof *counts; s++) {
            int64_t n = counts[s];
            uint64_t seed = 7 + (uint64_t)f, first = s ? UINT64_C(1) << 33 : 0;
            size_t bytes = (size_t)n * format_size(f);
            void *y = shifted_new(bytes, s % 2 * 4), *got = new_bytes(bytes);
            CUDA_RUN(qk_cuda_random(NULL, seed, first, f, n, y));
            cuda_get(got, y, bytes);
            for (int64_t i = 0; i < n; i++) {
                float v = qk_random_normal(seed, first + (uint64_t)i), g = element(f, got, i);
                assert_same_number(g, round_to(f, v), i);
            }
            cuda_free_all();
            free(got);
        }
    }
}

static void test_find_bad(void **state)
{
    (void)state;
    enum { N = 5003 };
    const int64_t places[] = {-1, 0, 7, 8, 2048, N - 1};
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (qk_format f = QK_F32; f <= QK_BF16; f++) {
        for (size_t p = 0; p < sizeof places / sizeof *places; p++) {
            float *x = new_floats(N);
            void *y = new_bytes(N * 4);
            x[11] = 65504; /* finite in every format */
            for (int64_t i = places[p]; i >= 0 && i < N; i += 3) x[i] = bad[(p + (size_t)i) % 3];
            qk_cpu_select(NULL, NULL)->convert(QK_F32, x, f, y, 0, N);
            int64_t found, *at = cuda_new(sizeof *at);
            CUDA_OK(cudaMemset(at, 1, sizeof *at));
            CUDA_RUN(qk_cuda_find_bad(NULL, f, shifted_put(y, N * format_size(f), p % 2 * 4), N, at));
            cuda_get(&found, at, sizeof found);
            assert_int_equal(found, places[p]);
            cuda_free_all();
            free(x);
            free(y);
        }
    }
}

static void test_probe_read(void **state)
{
    (void)state;
    enum { BYTES = 70003 };
    uint8_t *p = new_bytes(BYTES);
    for (int i = 0; i < BYTES; i++) p[i] = (uint8_t)random_u32();
    const size_t sizes[] = {5, 16, 32768, BYTES};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        uint32_t expect = 0, got = 0, *sink = cuda_put(&got, sizeof got);
        size_t whole = sizes[s] / 16 * 16;
        for (size_t i = 0; i < sizes[s]; i++) expect ^= (uint32_t)p[i] << (i < whole ? 8 * (i % 4) : 0);
        CUDA_RUN(qk_cuda_probe_read(NULL, cuda_put(p, sizes[s]), sizes[s], sink));
        cuda_get(&got, sink, sizeof got);
        assert_int_equal(got, expect);
        cuda_free_all();
    }
    free(p);
}

/* No rows are no work, and no error. */
static void test_nothing(void **state)
{
    (void)state;
    CUDA_RUN(qk_cuda_embed(NULL, QK_BF16, NULL, NULL, 0, 64, NULL));
    CUDA_RUN(qk_cuda_rmsnorm(NULL, NULL, NULL, 1e-5f, 0, 64, NULL));
    CUDA_RUN(qk_cuda_swiglu(NULL, NULL, NULL, 0, NULL));
    CUDA_RUN(qk_cuda_gather_cols(NULL, NULL, NULL, 0, 64, NULL));
    CUDA_RUN(qk_cuda_convert(NULL, QK_F32, NULL, QK_BF16, NULL, 0));
    CUDA_RUN(qk_cuda_add_bias(NULL, NULL, 0, 64, NULL));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_embed),      cmocka_unit_test(test_gather_cols),
        cmocka_unit_test(test_convert),    cmocka_unit_test(test_binary),
        cmocka_unit_test(test_add_bias),   cmocka_unit_test(test_swiglu),
        cmocka_unit_test(test_rmsnorm),    cmocka_unit_test(test_pack),
        cmocka_unit_test(test_pack_wide),  cmocka_unit_test(test_pack_refuses),
        cmocka_unit_test(test_random),     cmocka_unit_test(test_find_bad),
        cmocka_unit_test(test_probe_read), cmocka_unit_test(test_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
