/* Conversions, 4-bit codes, elementwise operations and rows of logits, on every instruction set. */
#include "kernel_help.h"

#include <stdio.h>

/* ---- float16 and bfloat16 ---- */

static void test_halves_survive_a_round_trip(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x10000; h++) {
        float b = qk_bf16_to_f32((uint16_t)h), f = qk_f16_to_f32((uint16_t)h);
        if (b == b) assert_int_equal(qk_f32_to_bf16(b), h);
        if (f == f) assert_int_equal(qk_f32_to_f16(f), h);
        if (b != b) assert_true(isnan(qk_bf16_to_f32(qk_f32_to_bf16(b))));
        if (f != f) assert_true(isnan(qk_f16_to_f32(qk_f32_to_f16(f))));
    }
    assert_true(qk_f16_to_f32(0x3c01) == 1.0f + 0x1p-10f && qk_f16_to_f32(0x0001) == 0x1p-24f);
    assert_true(qk_f16_to_f32(0x7bff) == 65504.0f && qk_bf16_to_f32(0x3f81) == 1.0f + 0x1p-7f);
}

/* Between two neighbours the nearer is taken, and the even one at equal distance. */
static void test_halves_round_to_nearest_even(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 0x7f80; h++) {
        float lo = qk_bf16_to_f32((uint16_t)h), middle = qk_from_bits((h << 16) + 0x8000);
        assert_int_equal(qk_f32_to_bf16(middle), h + (h & 1));
        assert_int_equal(qk_f32_to_bf16(nextafterf(middle, lo)), h);
        assert_int_equal(qk_f32_to_bf16(nextafterf(-middle, -INFINITY)), (h + 1) | 0x8000);
    }
    for (uint32_t h = 0; h < 0x7bff; h++) {
        float lo = qk_f16_to_f32((uint16_t)h), hi = qk_f16_to_f32((uint16_t)(h + 1)), middle = (lo + hi) / 2;
        assert_int_equal(qk_f32_to_f16(middle), h + (h & 1));
        assert_int_equal(qk_f32_to_f16(nextafterf(middle, lo)), h);
        assert_int_equal(qk_f32_to_f16(-nextafterf(middle, hi)), (h + 1) | 0x8000);
    }
    assert_int_equal(qk_f32_to_f16(65519.996f), 0x7bff);
    assert_int_equal(qk_f32_to_f16(65520.0f), 0x7c00);
    assert_int_equal(qk_f32_to_f16(1e30f), 0x7c00);
    assert_int_equal(qk_f32_to_f16(1e-30f), 0);
}

/* Vector conversions equal the plain ones, NaN bits included. */
static void test_convert(void **state)
{
    (void)state;
    enum { N = 0x10000 + 5 };
    uint16_t *h = new_bytes(N * 2), *back = new_bytes(N * 2);
    float *wide = new_bytes(N * 4), *random = new_bytes(N * 4);
    for (uint32_t i = 0; i < N; i++) h[i] = (uint16_t)i;
    for (uint32_t i = 0; i < N; i++) random[i] = qk_from_bits(random_u32());
    FOR_EACH_CPU(cpu)
    {
        for (qk_format f = QK_F16; f <= QK_BF16; f++) {
            cpu->convert(f, h, QK_F32, wide, 0, 1000);
            cpu->convert(f, h, QK_F32, wide, 1000, N);
            for (int i = 0; i < N; i++) {
                float expect = f == QK_F16 ? qk_f16_to_f32(h[i]) : qk_bf16_to_f32(h[i]);
                assert_same_bits(&wide[i], &expect, 1);
            }
            cpu->convert(QK_F32, random, f, back, 0, N);
            for (int i = 0; i < N; i++) {
                assert_int_equal(back[i], f == QK_F16 ? qk_f32_to_f16(random[i]) : qk_f32_to_bf16(random[i]));
            }
            cpu->convert(f, h, f, back, 0, N - 3);
            for (int i = 0; i < N - 3; i++) {
                float v = f == QK_F16 ? qk_f16_to_f32(h[i]) : qk_bf16_to_f32(h[i]);
                if (v == v) assert_int_equal(back[i], h[i]);
            }
        }
    }
    free(h);
    free(back);
    free(wide);
    free(random);
}

/* ---- 4-bit ---- */

static void thresholds_of(const uint32_t *bits, float *t)
{
    for (int i = 0; i < 15; i++) t[i] = qk_from_bits(bits[i]);
}

/* Each value of the table, on its own, is encoded as itself; each threshold goes down, the next float goes
 * up. */
static void test_code_tables(void **state)
{
    (void)state;
    const struct {
        const float *code;
        const uint32_t *bits;
        const uint8_t *order;
    } tables[] = {{qk_nf4_code, qk_nf4_threshold_bits, qk_nf4_order},
                  {qk_fp4_code, qk_fp4_threshold_bits, qk_fp4_order}};
    for (int s = 0; s < 2; s++) {
        float t[15];
        thresholds_of(tables[s].bits, t);
        uint32_t seen = 0;
        for (int i = 0; i < 15; i++) {
            float lo = tables[s].code[tables[s].order[i]], hi = tables[s].code[tables[s].order[i + 1]];
            bool to_zero = t[i] == -0x1p-149f; /* FP4 has two zeros: what is below 0 gets the sign */
            assert_true((lo <= t[i] || to_zero) && t[i] <= hi && (i == 0 || t[i] > t[i - 1]));
            assert_true(fabsf(t[i] - (lo + hi) / 2) <= 1e-6f);
        }
        for (int i = 0; i < 16; i++) seen |= 1u << tables[s].order[i];
        assert_int_equal(seen, 0xffff);
        FOR_EACH_CPU(cpu)
        {
            float w[32] = {1.0f, 1.0f}, absmax;
            uint8_t packed[16];
            for (int i = 0; i < 15; i++) {
                w[2 + 2 * i] = t[i];
                w[3 + 2 * i] = nextafterf(t[i], 2);
            }
            cpu->quantize4(QK_F32, w, 32, 32, t, tables[s].order, 7, packed, &absmax, 0, 1);
            assert_true(absmax == 1);
            for (int i = 0; i < 15; i++) {
                assert_int_equal(qk_nibble(packed, 2 + 2 * i), tables[s].order[i]);
                assert_int_equal(qk_nibble(packed, 3 + 2 * i), tables[s].order[i + 1]);
            }
            for (int i = 0; i < 16; i++) w[i] = tables[s].code[i];
            cpu->quantize4(QK_F32, w, 16, 32, t, tables[s].order, 7, packed, &absmax, 0, 1);
            for (int i = 0; i < 16; i++) assert_int_equal(qk_nibble(packed, i), w[i] == 0 ? (s ? 0 : 7) : i);
        }
    }
}

static void test_quantize4(void **state)
{
    (void)state;
    float t[15];
    thresholds_of(qk_nf4_threshold_bits, t);
    const int64_t sizes[] = {1, 31, 32, 33, 64, 1000, 4097, 9001};
    for (int block = 32; block <= 4096; block *= 8) {
        for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
            int64_t n = sizes[s], blocks = (n + block - 1) / block;
            for (qk_format f = QK_F32; f <= QK_BF16; f++) {
                qk_matrix src = new_matrix(f, 1, n, 0, QK_F32);
                if (n > 4096)
                    memset((char *)(uintptr_t)src.data, 0,
                           (size_t)block * format_size(f)); /* a block of zeros */
                uint8_t *expect = new_bytes((size_t)n / 2 + 1), *packed = new_bytes((size_t)n / 2 + 1);
                float *scales = new_bytes((size_t)blocks * 4), *absmax = new_bytes((size_t)blocks * 4);
                for (int64_t b = 0; b < blocks; b++) {
                    float a = 0;
                    for (int64_t i = b * block; i < n && i < (b + 1) * block; i++)
                        a = fmaxf(a, fabsf(weight(&src, i)));
                    scales[b] = a;
                    for (int64_t i = b * block; i < n && i < (b + 1) * block; i++) {
                        float x = weight(&src, i) * (1.0f / a);
                        unsigned code = 0;
                        for (int j = 0; j < 15; j++) code += x > t[j];
                        if (a == 0) code = 7;
                        expect[i / 2] = (uint8_t)(i % 2 ? (expect[i / 2] & 0xf0) | code : code << 4 | 7);
                    }
                }
                FOR_EACH_CPU(cpu)
                {
                    cpu->quantize4(f, src.data, n, block, t, qk_nf4_order, 7, packed, absmax, 0, blocks / 2);
                    cpu->quantize4(f, src.data, n, block, t, qk_nf4_order, 7, packed, absmax, blocks / 2,
                                   blocks);
                    assert_memory_equal(packed, expect, (size_t)(n + 1) / 2);
                    assert_same_bits(absmax, scales, (size_t)blocks);
                }
                free(expect);
                free(packed);
                free(scales);
                free(absmax);
                free_matrix(&src);
            }
        }
    }
}

static void test_dequantize4(void **state)
{
    (void)state;
    enum { N = 37, K = 131, COUNT = N * K };
    float out[COUNT];
    FOR_EACH_CPU(cpu)
    {
        for (qk_format to = QK_F32; to <= QK_BF16; to++) {
            for (qk_format round_to = QK_F32; round_to <= QK_BF16; round_to++) {
                qk_matrix w = new_matrix(QK_4BIT, N, K, 128, round_to);
                cpu->dequantize4(&w, to, out, 0, 1001);
                cpu->dequantize4(&w, to, out, 1001, COUNT);
                qk_matrix got = {.format = to, .n = N, .k = K, .data = out};
                for (int i = 0; i < COUNT; i++) {
                    float expect = weight(&w, i), v = weight(&got, i);
                    if (to == QK_BF16) expect = qk_round_bf16(expect);
                    if (to == QK_F16) expect = qk_round_f16(expect);
                    assert_same_bits(&v, &expect, 1);
                }
                free_matrix(&w);
            }
        }
    }
}

static uint8_t *read_file(const char *path, size_t *bytes)
{
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    uint8_t *p = new_bytes(1 << 16);
    *bytes = fread(p, 1, 1 << 16, f);
    fclose(f);
    return p;
}

/* Slices of two published checkpoints, decoded by bitsandbytes on a GPU. */
static void test_decode_equals_bitsandbytes(void **state)
{
    (void)state;
    const char *names[] = {"llama_1b_nf4.bin", "llama_1b_nf4_double_quant.bin"};
    for (int s = 0; s < 2; s++) {
        char path[512];
        size_t bytes;
        snprintf(path, sizeof path, "%s/../shared/data/nf4/%s", QLUA_SOURCE_DIR, names[s]);
        uint8_t *file = read_file(path, &bytes);
        if (!file) skip();
        /* u32 x 9: format, n, block, lengths of weight, absmax, map, nested absmax, nested map, expected */
        uint32_t head[9];
        float offset;
        memcpy(head, file, sizeof head);
        memcpy(&offset, file + 36, 4);
        size_t at = 40, starts[6];
        for (int i = 0; i < 6; i++) {
            starts[i] = at;
            at += head[3 + i];
        }
        assert_int_equal(at, bytes);
        int64_t n = head[1], blocks = n / head[2];
        qk_matrix w = {.format = QK_4BIT, .n = 1, .k = n, .block = (int)head[2], .round_to = QK_BF16};
        w.data = file + starts[0];
        float *absmax = new_bytes((size_t)blocks * 4), nested, map[256];
        memcpy(w.code, file + starts[2], sizeof w.code);
        assert_memory_equal(w.code, qk_nf4_code, sizeof w.code);
        if (head[0] == 0) memcpy(absmax, file + starts[1], (size_t)blocks * 4);
        for (int64_t b = 0; b < blocks && head[0] == 2; b++) {
            memcpy(&nested, file + starts[3] + b / 256 * 4, 4);
            memcpy(map, file + starts[4], sizeof map);
            absmax[b] = qk_nested_absmax(map[file[starts[1] + b]], nested, offset);
        }
        w.absmax = absmax;
        uint16_t *out = new_bytes((size_t)n * 2);
        FOR_EACH_CPU(cpu)
        {
            cpu->dequantize4(&w, QK_BF16, out, 0, n);
            assert_memory_equal(out, file + starts[5], (size_t)n * 2);
        }
        free(out);
        free(absmax);
        free(file);
    }
}

/* ---- elementwise ---- */

static void test_exp(void **state)
{
    (void)state;
    enum { N = 200003 };
    float *x = new_bytes(N * 4), *y = new_bytes(N * 4), *first = new_bytes(N * 4);
    for (int i = 0; i < N; i++) x[i] = -104.5f + 194.5f * (float)i / N;
    const float special[] = {0,     -0.0f,     1,         -1,         -INFINITY, INFINITY, -1e30f,
                             1e30f, 88.72283f, 88.72284f, -87.33655f, -103.97f,  1e-40f};
    memcpy(x, special, sizeof special);
    double worst = 0;
    FOR_EACH_CPU(cpu)
    {
        cpu->exp(x, y, 0, N);
        if (cpu == qk_cpu_select(NULL, NULL)) memcpy(first, y, N * 4);
        assert_same_bits(y, first, N);
        for (int i = 0; i < N; i++) {
            double exact = exp((double)x[i]);
            if (exact > (double)0x1.fffffep127f) {
                assert_true(y[i] == INFINITY || y[i] == 0x1.fffffep127f);
                continue;
            }
            double unit = fmax(ldexp(1, ilogb(fmax(exact, 0x1p-149)) - 23), 0x1p-149);
            double off = fabs(y[i] - exact) / unit;
            if (off > worst) worst = off;
        }
        float nan = NAN;
        cpu->exp(&nan, &nan, 0, 1);
        assert_true(isnan(nan));
    }
    if (!(worst <= 2)) fail_msg("exp is off by %.2f units in the last place", worst);
    free(x);
    free(y);
    free(first);
}

static void test_elementwise(void **state)
{
    (void)state;
    enum { N = 1003 };
    float *a = new_floats(N), *b = new_floats(N), *y = new_floats(N), *first = new_floats(N);
    for (int i = 0; i < N; i++) a[i] *= 30;
    a[0] = 200;
    a[1] = -200;
    FOR_EACH_CPU(cpu)
    {
        cpu->swiglu(a, b, y, 0, 500);
        cpu->swiglu(a, b, y, 500, N);
        if (cpu == qk_cpu_select(NULL, NULL)) memcpy(first, y, N * 4);
        assert_same_bits(y, first, N);
        for (int i = 0; i < N; i++) {
            double exact = a[i] / (1 + exp(-(double)a[i])) * b[i];
            assert_true(fabs(y[i] - exact) <= 5 * 0x1p-24 * fabs(exact) + 1e-37);
        }
        for (int i = 0; i < N; i++) {
            float expect[] = {a[i] + b[i], a[i] - b[i], a[i] * b[i], a[i] / b[i]};
            for (int op = QK_ADD; op <= QK_DIV; op++) {
                cpu->binary((qk_binary)op, a, b, 0, false, y, i, i + 1);
                assert_same_bits(&y[i], &expect[op], 1);
            }
        }
        cpu->binary(QK_SUB, a, NULL, 3, false, y, 0, N);
        for (int i = 0; i < N; i++) assert_true(y[i] == a[i] - 3);
        cpu->binary(QK_DIV, a, NULL, 3, true, y, 0, N);
        for (int i = 0; i < N; i++) assert_true(y[i] == 3 / a[i]);
    }
    free(a);
    free(b);
    free(y);
    free(first);
}

static void test_rmsnorm(void **state)
{
    (void)state;
    const int64_t sizes[] = {1, 15, 16, 33, 64, 288, 2048, 2079};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        int64_t h = sizes[s];
        float *x = new_floats((size_t)h * 3), *w = new_floats((size_t)h), *y = new_floats((size_t)h * 3);
        float *first = new_floats((size_t)h * 3);
        FOR_EACH_CPU(cpu)
        {
            cpu->rmsnorm(x, w, 1e-5f, h, y, 0, 1);
            cpu->rmsnorm(x, w, 1e-5f, h, y, 1, 3);
            if (cpu == qk_cpu_select(NULL, NULL)) memcpy(first, y, (size_t)h * 12);
            assert_same_bits(y, first, (size_t)h * 3);
        }
        for (int64_t t = 0; t < 3; t++) {
            double sum = 0;
            for (int64_t i = 0; i < h; i++) sum += (double)x[t * h + i] * x[t * h + i];
            double scale = 1 / sqrt(sum / (double)h + (double)1e-5f);
            for (int64_t i = 0; i < h; i++) {
                double exact = x[t * h + i] * scale * w[i];
                assert_true(fabs(y[t * h + i] - exact) <= 1e-6 * fabs(exact));
            }
        }
        free(x);
        free(w);
        free(y);
        free(first);
    }
}

static void test_rope(void **state)
{
    (void)state;
    enum { HEADS = 3, TOKENS = 4, POSITIONS = 9 };
    const int32_t pos[TOKENS] = {0, 8, 3, 3};
    for (int d = 2; d <= 130; d += 32) {
        size_t n = (size_t)(TOKENS * HEADS * d);
        float *x = new_floats(n), *y = new_bytes(n * 4);
        float *c = new_floats((size_t)(POSITIONS * d / 2)), *s = new_floats((size_t)(POSITIONS * d / 2));
        FOR_EACH_CPU(cpu)
        {
            memcpy(y, x, n * 4);
            cpu->rope(y, pos, c, s, HEADS, d, 0, 1);
            cpu->rope(y, pos, c, s, HEADS, d, 1, TOKENS);
            for (int i = 0; i < (int)n; i++) {
                int t = i / (HEADS * d), e = i % d, half = d / 2, angle = pos[t] * half + e % half;
                float lo = x[i - e + e % half], hi = x[i - e + e % half + half];
                float p = e < half ? lo * c[angle] : hi * c[angle],
                      q = e < half ? hi * s[angle] : lo * s[angle];
                float expect = e < half ? p - q : p + q;
                assert_same_bits(&y[i], &expect, 1);
            }
        }
        free(x);
        free(y);
        free(c);
        free(s);
    }
}

/* ---- rows of logits ---- */

static const float *sort_row;

static int by_value(const void *a, const void *b)
{
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    float x = sort_row[i], y = sort_row[j];
    if (isnan(x) != isnan(y)) return isnan(x) ? 1 : -1;
    if (x != y && !isnan(x)) return x > y ? -1 : 1;
    return i < j ? -1 : 1;
}

static void test_topk(void **state)
{
    (void)state;
    enum { N = 777 };
    float x[N], values[N];
    int32_t ids[N], order[N];
    for (int kind = 0; kind < 4; kind++) {
        for (int i = 0; i < N; i++) {
            x[i] = random_unit();
            if (kind == 1) x[i] = (float)(int)(x[i] * 5) * 0.5f; /* many ties, both zeros */
            if (kind == 2 && random_u32() % 3 == 0)
                x[i] = random_u32() % 2 ? NAN : random_u32() % 2 ? INFINITY : -INFINITY;
            if (kind == 3) x[i] = NAN;
            order[i] = i;
        }
        sort_row = x;
        qsort(order, N, sizeof *order, by_value);
        const int ks[] = {1, 2, 5, 20, 100, N};
        for (size_t s = 0; s < sizeof ks / sizeof *ks; s++) {
            qk_topk(x, N, ks[s], values, ids);
            for (int i = 0; i < ks[s]; i++) {
                assert_int_equal(ids[i], order[i]);
                assert_same_bits(&values[i], &x[ids[i]], 1);
            }
        }
    }
}

static void test_softmax_logsumexp_kl(void **state)
{
    (void)state;
    const int64_t sizes[] = {1, 2, 7, 1000, 32003};
    const double temperatures[] = {1, 0.1, 3};
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        int64_t n = sizes[s];
        float *a = new_floats((size_t)n), *b = new_floats((size_t)n), *y = new_bytes((size_t)n * 4);
        for (int64_t i = 0; i < n; i++) {
            a[i] = a[i] * 20 + 500;
            b[i] = b[i] * 20 - 500;
        }
        for (int t = 0; t < 3; t++) {
            long double sum = 0, total = 0;
            for (int64_t i = 0; i < n; i++) sum += expl((a[i] - 500.0L) / temperatures[t]);
            double exact = (double)(logl(sum) + 500.0L / temperatures[t]);
            assert_true(fabs(qk_logsumexp(a, n, temperatures[t]) - exact) <= 1e-13 * fabs(exact));
            qk_softmax(a, n, temperatures[t], y);
            for (int64_t i = 0; i < n; i++) {
                double p = (double)(expl((a[i] - 500.0L) / temperatures[t]) / sum);
                assert_true(fabs(y[i] - p) <= 0x1p-24 * p * 1.001 + 0x1p-149);
                total += y[i];
            }
            assert_true(fabs((double)total - 1) <= 1e-6);
        }
        long double za = 0, zb = 0, kl = 0;
        for (int64_t i = 0; i < n; i++) za += expl(a[i] - 500.0L), zb += expl(b[i] + 500.0L);
        for (int64_t i = 0; i < n; i++) {
            long double ln_p = a[i] - 500.0L - logl(za), ln_q = b[i] + 500.0L - logl(zb);
            kl += expl(ln_p) * (ln_p - ln_q);
        }
        assert_true(fabs(qk_kl(a, b, n) - (double)kl) <= 1e-11 * fabs((double)kl) + 1e-15);
        assert_true(qk_kl(a, a, n) == 0);
        free(a);
        free(b);
        free(y);
    }
    const float inf[] = {INFINITY, 0}, low[] = {-INFINITY, -INFINITY}, half[] = {0, -INFINITY},
                nan[] = {0, NAN}, zero[] = {0, 0};
    assert_true(qk_logsumexp(inf, 2, 1) == INFINITY);
    assert_true(qk_logsumexp(low, 2, 1) == -INFINITY);
    assert_true(qk_logsumexp(half, 2, 1) == 0);
    assert_true(isnan(qk_logsumexp(nan, 2, 1)) && isnan(qk_kl(nan, zero, 2)));
    assert_true(fabs(qk_kl(half, zero, 2) - log(2)) < 1e-15);
    assert_true(qk_kl(zero, half, 2) == INFINITY);
}

static void test_selection(void **state)
{
    (void)state;
    int status = -1;
    assert_null(qk_cpu_select("sse9", &status));
    assert_int_equal(status, QK_ERR_NAME);
    assert_non_null(qk_cpu_select(NULL, &status));
    assert_int_equal(status, QK_OK);
    assert_string_equal(qk_cpu_select("scalar", NULL)->isa, "scalar");
    float sink = 0.25f;
    FOR_EACH_CPU(cpu)
    {
        assert_true(cpu->probe_fma(10, &sink) >= 320);
        float ones[300];
        for (int i = 0; i < 300; i++) ones[i] = 1;
        assert_true(cpu->probe_read(ones, sizeof ones) == 256); /* whole steps of 128 floats */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_halves_survive_a_round_trip),
        cmocka_unit_test(test_halves_round_to_nearest_even),
        cmocka_unit_test(test_convert),
        cmocka_unit_test(test_code_tables),
        cmocka_unit_test(test_quantize4),
        cmocka_unit_test(test_dequantize4),
        cmocka_unit_test(test_decode_equals_bitsandbytes),
        cmocka_unit_test(test_exp),
        cmocka_unit_test(test_elementwise),
        cmocka_unit_test(test_rmsnorm),
        cmocka_unit_test(test_rope),
        cmocka_unit_test(test_topk),
        cmocka_unit_test(test_softmax_logsumexp_kl),
        cmocka_unit_test(test_selection),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
