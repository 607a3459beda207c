/* 4-bit quantization against bitsandbytes: its tables, its quantizer on the CPU, its CUDA dequantizer on
 * slices of real checkpoints. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "backend.h"
#include "json.h"
#include "mem.h"
#include "ops.h"
#include "quant.h"
#include "sampler.h"
#include "device_help.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GOLDEN QLUA_SOURCE_DIR "/tests/golden/"
#define DATA QLUA_SOURCE_DIR "/../shared/data/nf4/"

static float noise(uint64_t seed, uint64_t i)
{
    double u = ql_sampler_uniform(seed, 0, 2 * i) + 1e-12, v = ql_sampler_uniform(seed, 0, 2 * i + 1);
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

static ql_matrix dense(const void *data, ql_dtype dtype, int64_t n, int64_t k)
{
    ql_matrix m = {.n = n, .k = k, .dtype = dtype};
    assert_int_equal(ql_tensor_new_2d(dev, NULL, QL_MEM_WEIGHTS, dtype, n, k, &m.data, NULL), QL_OK);
    assert_int_equal(ql_tensor_upload(&m.data, data, ql_tensor_bytes(&m.data), NULL), QL_OK);
    return m;
}

static ql_matrix dense_noise(uint64_t seed, int64_t n, int64_t k)
{
    float *x = malloc((size_t)(n * k) * sizeof *x);
    for (int64_t i = 0; i < n * k; i++) x[i] = noise(seed, (uint64_t)i);
    ql_matrix m = dense(x, QL_F32, n, k);
    free(x);
    return m;
}

/* Bit-equal, zeros of either sign apart: the goldens have them all positive. */
static void assert_same_value(const void *got, const void *want, size_t size)
{
    uint8_t x[4] = {0}, y[4] = {0}, minus[4] = {0}, zero[4] = {0};
    memcpy(x, got, size);
    memcpy(y, want, size);
    minus[size - 1] = 0x80;
    if (memcmp(x, minus, 4) == 0) memcpy(x, zero, 4);
    if (memcmp(y, minus, 4) == 0) memcpy(y, zero, 4);
    assert_memory_equal(x, y, 4);
}

static ql_quant_spec spec_of(const char *scheme, int block, bool double_quant)
{
    ql_quant_spec spec;
    assert_int_equal(ql_quant_spec_init(scheme, &spec, NULL), QL_OK);
    spec.block = block;
    spec.double_quant = double_quant;
    return spec;
}

static unsigned code_at(const ql_matrix *m, int64_t i)
{
    uint8_t byte = ((const uint8_t *)m->data.data)[i / 2];
    return i % 2 ? byte & 15u : byte >> 4;
}

/* --- schemes ---------------------------------------------------------------------------------------------
 */

static void schemes(void **state)
{
    (void)state;
    ql_err err = {0};
    ql_quant_spec spec = spec_of("nf4", 64, false);
    assert_int_equal(spec.block, 64);
    assert_int_equal(spec.value_dtype, QL_QUANT_VALUE_DENSE);
    assert_int_equal(ql_quant_spec_check(&spec, &err), QL_OK);
    assert_int_equal(ql_quant_spec_init("int4", &spec, &err), QL_ERR_ARG);
    assert_non_null(strstr(err.message, "int4"));
    assert_non_null(strstr(err.hint, "nf4"));

    const int blocks[] = {0, 16, 31, 33, 48, 8192, -64};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) {
        spec = spec_of("nf4", blocks[i], false);
        assert_int_equal(ql_quant_spec_check(&spec, &err), QL_ERR_ARG);
        assert_non_null(strstr(err.message, "block size"));
    }
    for (int block = 32; block <= 4096; block *= 2) {
        spec = spec_of("fp4", block, true);
        assert_int_equal(ql_quant_spec_check(&spec, &err), QL_OK);
    }
    spec = spec_of("nf4", 64, false);
    spec.value_dtype = QL_I32;
    assert_int_equal(ql_quant_spec_check(&spec, &err), QL_ERR_ARG);
    spec = spec_of("nf4", 64, false);
    spec.code[3] = -0.4f; /* not NF4 any more */
    assert_int_equal(ql_quant_spec_check(&spec, &err), QL_ERR_ARG);
    spec.code[3] = NAN;
    assert_int_equal(ql_quant_spec_check(&spec, &err), QL_ERR_ARG);
}

static void code_books(void **state)
{
    (void)state;
    ql_err err = {0};
    ql_quant_spec spec, nf4 = spec_of("nf4", 64, false), fp4 = spec_of("fp4", 64, false);
    double code[16] = {0};
    assert_int_equal(ql_quant_spec_codebook(code, &spec, &err), QL_ERR_ARG);
    code[4] = INFINITY;
    assert_int_equal(ql_quant_spec_codebook(code, &spec, &err), QL_ERR_ARG);
    assert_non_null(strstr(err.message, "entry 5"));

    /* Any unit: FP4 given in its own units is FP4, and tiny or huge ones neither vanish nor overflow. */
    const double units[] = {0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3};
    const double scales[] = {1, 1e-300, 1e300, 0.37};
    for (int s = 0; s < 4; s++) {
        for (int i = 0; i < 16; i++) code[i] = units[i] * scales[s];
        assert_int_equal(ql_quant_spec_codebook(code, &spec, &err), QL_OK);
        assert_int_equal(ql_quant_spec_check(&spec, &err), QL_OK);
        for (int i = 0; i < 16; i++) assert_true(spec.code[i] == fp4.code[i]);
    }

    /* NF4's numbers given as a free code book make NF4's codes. */
    ql_quant_tables a, b;
    for (int i = 0; i < 16; i++) code[i] = nf4.code[i];
    assert_int_equal(ql_quant_spec_codebook(code, &spec, &err), QL_OK);
    assert_string_equal(spec.scheme, "codebook");
    ql_quant_tables_make(nf4.code, &a);
    ql_quant_tables_make(spec.code, &b);
    assert_memory_equal(a.thresholds, b.thresholds, sizeof a.thresholds);
    assert_memory_equal(a.order, b.order, sizeof a.order);
}

static void encoder_tables(void **state)
{
    (void)state;
    ql_quant_tables t;
    ql_quant_tables_make(spec_of("nf4", 64, false).code, &t);
    assert_int_equal(t.zero_code, 7);
    uint32_t bits[15];
    memcpy(bits, t.thresholds, sizeof bits);
    assert_int_equal(bits[0], 0xbf591cd9); /* the midpoint is bf591cda */
    assert_int_equal(bits[14], 0x3f5c89d9);
    for (int i = 0; i < 16; i++) assert_int_equal(t.order[i], i);

    /* torch.argsort of the table and (a + b) / 2, as bitsandbytes' CPU path has them. */
    const uint8_t order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
    const uint32_t want[15] = {0xbf555556, 0xbf155556, 0xbed55556, 0xbe955556, 0xbe555556,
                               0xbdb00000, 0xbb2aaaab, 0,          0x3b2aaaab, 0x3db00000,
                               0x3e555556, 0x3e955556, 0x3ed55556, 0x3f155556, 0x3f555556};
    ql_quant_tables_make(spec_of("fp4", 64, false).code, &t);
    assert_memory_equal(t.order, order, sizeof order);
    memcpy(bits, t.thresholds, sizeof bits);
    assert_memory_equal(bits, want, sizeof want);
    assert_int_equal(t.zero_code, 0);

    /* Descending, with repeats, without a zero, all of one sign. */
    const float odd[16] = {1,    0.9f, 0.8f, 0.7f, 0.6f, 0.5f,  0.5f,  0.5f,
                           0.4f, 0.3f, 0.2f, 0.1f, 0.1f, 0.05f, 0.05f, 0.01f};
    ql_quant_tables_make(odd, &t);
    for (int i = 0; i < 15; i++) {
        assert_true(odd[t.order[i]] <= odd[t.order[i + 1]]);
        if (odd[t.order[i]] == odd[t.order[i + 1]]) assert_true(t.order[i] < t.order[i + 1]);
        if (i) assert_true(t.thresholds[i - 1] <= t.thresholds[i]);
    }
    assert_int_equal(t.zero_code, 15);
}

/* --- quantizing ------------------------------------------------------------------------------------------
 */

/* bitsandbytes' own errors on normal numbers at block 64: 0.07280 +- 0.00007 in the mean, 0.2033 +- 0.0003
 * relative to |w| + 1e-8. */
static void error_on_normal_numbers(void **state)
{
    (void)state;
    enum { N = 1024 };
    ql_matrix m = dense_noise(42, N, N), q;
    ql_quant_spec spec = spec_of("nf4", 64, false);
    assert_int_equal(ql_quant_matrix(&m, &spec, NULL, &q, NULL), QL_OK);
    float *decoded = malloc((size_t)N * N * sizeof *decoded);
    const float *x = m.data.data;
    assert_int_equal(ql_quant_decode(&q, decoded, NULL), QL_OK);
    double sum = 0, relative = 0;
    for (int i = 0; i < N * N; i++) {
        sum += fabs((double)decoded[i] - x[i]);
        relative += fabs((double)decoded[i] - x[i]) / (fabs((double)x[i]) + 1e-8);
    }
    sum /= (double)N * N;
    relative /= (double)N * N;
    print_message("NF4 on N(0, 1): mean |error| %.5f, relative %.4f\n", sum, relative);
    assert_true(fabs(relative - 0.2033) <= 0.0003);
    assert_true(fabs(sum - 0.07280) <= 0.00007);
    free(decoded);
    ql_matrix_free(&m);
    ql_matrix_free(&q);
}

static void edges(void **state)
{
    (void)state;
    ql_err err = {0};
    ql_matrix q;
    float x[129];
    for (int i = 0; i < 129; i++) x[i] = i < 64 ? 0 : noise(9, (uint64_t)i);
    ql_matrix m = dense(x, QL_F32, 3, 43);
    for (int d = 0; d < 2; d++) {
        ql_quant_spec spec = spec_of("nf4", 64, d);
        assert_int_equal(ql_quant_matrix(&m, &spec, NULL, &q, &err), QL_OK);
        assert_int_equal(q.n, 3);
        assert_int_equal(q.k, 43);
        assert_int_equal(q.dtype, QL_F32);
        assert_int_equal(q.quant->blocks, 3);
        assert_int_equal(q.quant->nested, d);
        for (int i = 0; i < 64; i++) assert_int_equal(code_at(&q, i), 7); /* a block of zeros */
        assert_int_equal(code_at(&q, 129), 7);                            /* the nibble that pads */
        float decoded[129];
        assert_int_equal(ql_quant_decode(&q, decoded, &err), QL_OK);
        for (int i = 0; i < 64; i++) assert_true(decoded[i] == 0);
        /* One value alone in its block is the absmax; its scale is exact without double quantization. */
        if (!d) assert_true(decoded[128] == x[128]);
        /* A 4-bit matrix is not quantized again. */
        ql_matrix again;
        assert_int_equal(ql_quant_matrix(&q, &spec, NULL, &again, &err), QL_ERR_ARG);
        assert_null(again.quant);
        ql_matrix_free(&q);
    }
    ql_matrix_free(&m);

    const float bad[] = {NAN, INFINITY, -INFINITY};
    const uint16_t bad_bf16[] = {0x7fc0, 0x7f80, 0xff80}, bad_f16[] = {0x7e00, 0x7c00, 0xfc00};
    ql_quant_spec spec = spec_of("nf4", 64, true);
    for (int i = 0; i < 3; i++) {
        float f[2 * 70] = {0};
        uint16_t b[2 * 70] = {0}, h[2 * 70] = {0};
        f[70 + 4] = bad[i];
        b[70 + 4] = bad_bf16[i];
        h[70 + 4] = bad_f16[i];
        ql_matrix ms[] = {dense(f, QL_F32, 2, 70), dense(b, QL_BF16, 2, 70), dense(h, QL_F16, 2, 70)};
        for (int j = 0; j < 3; j++) {
            assert_int_equal(ql_quant_matrix(&ms[j], &spec, NULL, &q, &err), QL_ERR_FORMAT);
            assert_non_null(strstr(err.message, "row 2, column 5"));
            assert_null(q.quant);
            ql_matrix_free(&ms[j]);
        }
    }
}

/* Nested scales by hand: equal absmax have deviation 0, and decode to their mean exactly. */
static void double_quantization(void **state)
{
    (void)state;
    float x[64 * 4];
    for (int i = 0; i < 256; i++) x[i] = i % 64 ? 0.1f : 0.75f;
    ql_matrix m = dense(x, QL_F32, 4, 64), q;
    ql_quant_spec spec = spec_of("nf4", 64, true);
    assert_int_equal(ql_quant_matrix(&m, &spec, NULL, &q, NULL), QL_OK);
    assert_true(q.quant->nested_offset == 0.75f);
    assert_true(q.quant->nested_absmax[0] == 0);
    for (int i = 0; i < 4; i++) {
        assert_true(q.quant->nested_map[q.quant->absmax8[i]] == 0);
        assert_true(((const float *)q.absmax.data)[i] == 0.75f);
    }
    ql_matrix_free(&m);
    ql_matrix_free(&q);

    /* Every scale is the nearest entry of the map, decoded with two roundings. */
    m = dense_noise(77, 300, 128);
    assert_int_equal(ql_quant_matrix(&m, &spec, NULL, &q, NULL), QL_OK);
    ql_quant_spec single = spec_of("nf4", 64, false);
    ql_matrix plain;
    assert_int_equal(ql_quant_matrix(&m, &single, NULL, &plain, NULL), QL_OK);
    assert_memory_equal(q.data.data, plain.data.data, ql_tensor_bytes(&q.data));
    const float *exact = plain.absmax.data, *decoded = q.absmax.data;
    assert_int_equal(q.quant->nested_blocks, 3);
    for (size_t i = 0; i < q.quant->blocks; i++) {
        double s = q.quant->nested_absmax[i / 256], y = ((double)exact[i] - q.quant->nested_offset) / s;
        double best = 9;
        for (int j = 0; j < 256; j++) best = fmin(best, fabs(q.quant->nested_map[j] - y));
        assert_true(fabs(q.quant->nested_map[q.quant->absmax8[i]] - y) <= best + 1e-6);
        volatile float product = q.quant->nested_map[q.quant->absmax8[i]] * q.quant->nested_absmax[i / 256];
        assert_true(decoded[i] == product + q.quant->nested_offset);
    }
    ql_matrix_free(&m);
    ql_matrix_free(&q);
    ql_matrix_free(&plain);
}

static void free_code_book(void **state)
{
    (void)state;
    ql_quant_spec spec;
    double code[16];
    for (int i = 0; i < 16; i++) code[i] = (i * 7 % 16) - 5; /* -5..10 in no order, asymmetric */
    assert_int_equal(ql_quant_spec_codebook(code, &spec, NULL), QL_OK);
    spec.block = 32;
    spec.value_dtype = QL_F32;
    ql_matrix m = dense_noise(5, 40, 33), q;
    assert_int_equal(ql_quant_matrix(&m, &spec, NULL, &q, NULL), QL_OK);
    assert_string_equal(q.quant->scheme, "codebook");
    const float *x = m.data.data, *absmax = q.absmax.data;
    for (int i = 0; i < 40 * 33; i++) {
        double y = (double)x[i] / absmax[i / 32], best = 9;
        for (int c = 0; c < 16; c++) best = fmin(best, fabs(spec.code[c] - y));
        assert_true(fabs(spec.code[code_at(&q, i)] - y) <= best + 1e-6);
    }
    ql_matrix_free(&m);
    ql_matrix_free(&q);
}

static void bias_is_shared(void **state)
{
    (void)state;
    ql_matrix m = dense_noise(1, 8, 64), q;
    assert_int_equal(ql_tensor_new_1d(dev, NULL, QL_MEM_WEIGHTS, QL_F32, 8, &m.bias, NULL), QL_OK);
    ql_quant_spec spec = spec_of("nf4", 64, false);
    spec.value_dtype = QL_BF16;
    assert_int_equal(ql_quant_matrix(&m, &spec, NULL, &q, NULL), QL_OK);
    assert_ptr_equal(q.bias.data, m.bias.data);
    assert_int_equal(q.dtype, QL_BF16);
    ql_matrix_free(&m);
    ql_matrix_free(&q);
}

static void sizes(void **state)
{
    (void)state;
    ql_quant_spec spec = spec_of("nf4", 64, true);
    ql_quant_size size;
    /* One weight of Llama-3-8B; 4.127 bits with double quantization (QLoRA, section 3). */
    assert_int_equal(ql_quant_expect(4096, 14336, &spec, &size, NULL), QL_OK);
    assert_true(fabs(size.stored_bits - 4.127) < 0.0005);
    assert_true(fabs(8.0 * (double)size.stored_bytes / (double)size.weights - size.stored_bits) < 1e-5);
    assert_int_equal(ql_quant_expect(0, 5, &spec, &size, NULL), QL_ERR_ARG);
    assert_int_equal(ql_quant_expect(INT64_MAX, 2, &spec, &size, NULL), QL_ERR_ARG);
    const int64_t shapes[][2] = {{1, 1}, {3, 43}, {257, 64}};
    for (int i = 0; i < 6; i++) {
        spec = spec_of("nf4", i < 3 ? 64 : 32, i % 2);
        ql_matrix m = dense_noise(1, shapes[i % 3][0], shapes[i % 3][1]), q;
        assert_int_equal(ql_quant_expect(m.n, m.k, &spec, &size, NULL), QL_OK);
        assert_int_equal(ql_quant_matrix(&m, &spec, NULL, &q, NULL), QL_OK);
        assert_int_equal(size.device_bytes, ql_matrix_bytes(&q));
        assert_int_equal(size.blocks, q.quant->blocks);
        assert_int_equal(size.nested_blocks, q.quant->nested_blocks);
        ql_matrix_free(&m);
        ql_matrix_free(&q);
    }
}

/* --- slices of real checkpoints, decoded by bitsandbytes on a GPU -----------------------------------------
 */

static const uint8_t *take(const uint8_t **at, size_t bytes)
{
    const uint8_t *p = *at;
    *at += bytes;
    return p;
}

static void decode_golden(const char *path)
{
    FILE *f = fopen(path, "rb");
    if (!f) skip();
    static uint8_t file[1 << 16];
    size_t size = fread(file, 1, sizeof file, f);
    fclose(f);
    const uint8_t *at = file;
    uint32_t h[9];
    float offset;
    memcpy(h, take(&at, sizeof h), sizeof h);
    memcpy(&offset, take(&at, 4), 4);
    bool nested = h[0] == 2;
    int64_t n = h[1];
    ql_quant *q = ql_calloc(1, sizeof *q);
    q->refs = 1;
    q->block = (int)h[2];
    q->blocks = (size_t)(n / q->block);
    q->value_dtype = QL_BF16;
    const uint8_t *codes = take(&at, h[3]), *absmax = take(&at, h[4]), *map = take(&at, h[5]);
    const uint8_t *nested_absmax = take(&at, h[6]), *nested_map = take(&at, h[7]),
                  *expected = take(&at, h[8]);
    assert_int_equal(at - file, size);
    memcpy(q->code, map, sizeof q->code);
    ql_quant_spec spec = spec_of("nf4", 64, false);
    assert_memory_equal(map, spec.code, sizeof spec.code);

    float *scales = malloc(q->blocks * sizeof *scales);
    if (nested) {
        float file_map[256], s[64], own[256];
        memcpy(file_map, nested_map, sizeof file_map);
        assert_true(h[6] <= sizeof s);
        memcpy(s, nested_absmax, h[6]);
        ql_quant_dynamic_map(own);
        assert_memory_equal(own, file_map, sizeof own);
        for (size_t i = 0; i < q->blocks; i++) {
            volatile float product = file_map[absmax[i]] * s[i / 256];
            scales[i] = product + offset;
        }
    } else {
        memcpy(scales, absmax, h[4]);
    }
    ql_matrix m = {.n = 1, .k = n, .quant = q, .dtype = QL_BF16};
    assert_int_equal(ql_tensor_new_1d(dev, NULL, QL_MEM_WEIGHTS, QL_U8, h[3], &m.data, NULL), QL_OK);
    assert_int_equal(ql_tensor_new_1d(dev, NULL, QL_MEM_WEIGHTS, QL_F32, (int64_t)q->blocks, &m.absmax, NULL),
                     QL_OK);
    assert_int_equal(ql_tensor_upload(&m.data, codes, h[3], NULL), QL_OK);
    assert_int_equal(ql_tensor_upload(&m.absmax, scales, q->blocks * sizeof *scales, NULL), QL_OK);
    float *decoded = malloc((size_t)n * sizeof *decoded);
    assert_int_equal(ql_quant_decode(&m, decoded, NULL), QL_OK);
    int64_t wrong = 0;
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)expected[2 * i] << 16 | (uint32_t)expected[2 * i + 1] << 24, got;
        memcpy(&got, &decoded[i], 4);
        wrong += got != bits;
    }
    assert_int_equal(wrong, 0);
    free(decoded);
    free(scales);
    ql_matrix_free(&m);
}

static void decode_real_slice(void **state)
{
    (void)state;
    decode_golden(DATA "llama_1b_nf4.bin");
}

static void decode_real_slice_double(void **state)
{
    (void)state;
    decode_golden(DATA "llama_1b_nf4_double_quant.bin");
}

/* --- bitsandbytes' quantizer ------------------------------------------------------------------------------
 */

typedef struct {
    const ql_st *st;
    const cJSON *meta;
    const char *name;
} golden_case;

/* The tensor "<case>.<what>" in fresh memory; NULL when the case has none. */
static void *golden_read(const golden_case *g, const char *what, size_t *count)
{
    char key[256];
    snprintf(key, sizeof key, "%s%s%s", g->name ? g->name : "", g->name ? "." : "", what);
    const ql_st_tensor *t = ql_st_find(g->st, key);
    if (!t) return NULL;
    size_t bytes = ql_st_tensor_bytes(t);
    void *data = malloc(bytes ? bytes : 1);
    assert_int_equal(ql_st_read(g->st, t, 0, bytes, data, NULL), QL_OK);
    if (count) *count = (size_t)ql_st_tensor_elements(t);
    return data;
}

/* flags[i] = 1 for the indices that the case lists under `key`. */
static uint8_t *golden_flags(const golden_case *g, const char *key, size_t n)
{
    uint8_t *flags = calloc(n, 1);
    const cJSON *i;
    cJSON_ArrayForEach(i, cJSON_GetObjectItemCaseSensitive(g->meta, key)) flags[i->valueint] = 1;
    return flags;
}

static void compare_values(const golden_case *g, const ql_matrix *q, const uint8_t *same)
{
    static const struct {
        const char *name;
        ql_dtype dtype;
    } outputs[] = {{"out_f32", QL_F32}, {"out_bf16", QL_BF16}, {"out_f16", QL_F16}};
    size_t n = (size_t)(q->n * q->k);
    for (int o = 0; o < 3; o++) {
        uint8_t *want = golden_read(g, outputs[o].name, NULL);
        if (!want) continue;
        size_t size = ql_dtype_size(outputs[o].dtype);
        q->quant->value_dtype = outputs[o].dtype;
        ql_tensor t;
        assert_int_equal(
            ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, outputs[o].dtype, q->n, q->k, &t, NULL), QL_OK);
        assert_int_equal(ql_op_dequantize4(q, &t, NULL), QL_OK);
        for (size_t i = 0; i < n; i++) {
            if (same[i]) assert_same_value((const uint8_t *)t.data + i * size, want + i * size, size);
        }
        ql_tensor_free(&t);
        free(want);
    }
}

static size_t compare_case(const golden_case *g, const ql_matrix *m)
{
    bool is_double = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(g->meta, "double"));
    int block = cJSON_GetObjectItemCaseSensitive(g->meta, "block")->valueint;
    ql_quant_spec spec =
        spec_of(cJSON_GetObjectItemCaseSensitive(g->meta, "type")->valuestring, block, is_double);
    ql_matrix q;
    assert_int_equal(ql_quant_matrix(m, &spec, NULL, &q, NULL), QL_OK);
    size_t n = (size_t)(m->n * m->k), differ = 0, blocks = q.quant->blocks, count;
    uint8_t *near = golden_flags(g, "near", n), *same = calloc(n, 1),
            *codes = golden_read(g, "codes", &count);
    assert_int_equal(count, (n + 1) / 2);
    for (size_t i = 0; i < n; i++) {
        unsigned want = i % 2 ? codes[i / 2] & 15u : codes[i / 2] >> 4;
        same[i] = want == code_at(&q, (int64_t)i);
        if (same[i]) continue;
        assert_true(near[i]);
        differ++;
    }
    if (n % 2) assert_int_equal(code_at(&q, (int64_t)n), codes[n / 2] & 15u);

    float *plain = golden_read(g, is_double ? "absmax_plain" : "absmax", &count);
    assert_int_equal(count, blocks);
    ql_quant_spec single = spec;
    single.double_quant = false;
    ql_matrix p;
    assert_int_equal(ql_quant_matrix(m, &single, NULL, &p, NULL), QL_OK);
    for (size_t i = 0; i < blocks; i++) {
        float got = ((const float *)p.absmax.data)[i];
        /* Their CPU path writes 1e-38 for a last block of zeros that is not whole, 0 elsewhere. */
        assert_true(got == plain[i] || (got == 0 && plain[i] == 1e-38f));
    }
    ql_matrix_free(&p);

    if (is_double) {
        float *offset = golden_read(g, "offset", NULL), *nested = golden_read(g, "nested_absmax", &count);
        float *map = golden_read(g, "nested_map", NULL);
        uint8_t *absmax8 = golden_read(g, "absmax", NULL), *near8 = golden_flags(g, "near_absmax", blocks);
        assert_memory_equal(map, q.quant->nested_map, sizeof q.quant->nested_map);
        assert_int_equal(count, q.quant->nested_blocks);
        /* torch sums absmax in float32 in an order of its own: the mean may be an ulp away. */
        float ulp = nextafterf(*offset, INFINITY) - *offset;
        assert_true(fabsf(q.quant->nested_offset - *offset) <= ulp);
        for (size_t i = 0; i < count; i++) assert_true(fabsf(q.quant->nested_absmax[i] - nested[i]) <= ulp);
        for (size_t i = 0; i < blocks; i++) {
            if (nested[i / 256] > 0 && !near8[i]) assert_int_equal(q.quant->absmax8[i], absmax8[i]);
        }
        /* Given bitsandbytes' own scales, the values must be bit-equal. */
        for (size_t i = 0; i < blocks; i++) {
            volatile float product = map[absmax8[i]] * nested[i / 256];
            ((float *)q.absmax.data)[i] = product + *offset;
        }
        free(offset);
        free(nested);
        free(map);
        free(absmax8);
        free(near8);
    }
    compare_values(g, &q, same);
    free(plain);
    free(codes);
    free(same);
    free(near);
    ql_matrix_free(&q);
    return differ;
}

static void as_bitsandbytes_quantizes(void **state)
{
    (void)state;
    ql_st *st;
    cJSON *root;
    assert_int_equal(ql_st_open(GOLDEN "quant.safetensors", &st, NULL), QL_OK);
    assert_int_equal(ql_json_load(GOLDEN "quant.json", 1 << 20, &root, NULL), QL_OK);
    golden_case g = {.st = st};
    int cases = 0;
    size_t differ[2] = {0, 0}, total = 0;
    float *book = golden_read(&g, "book.nf4", NULL), *fp4 = golden_read(&g, "book.fp4", NULL);
    float *map = golden_read(&g, "book.dynamic", NULL), own[256];
    ql_quant_dynamic_map(own);
    assert_memory_equal(map, own, sizeof own);
    assert_memory_equal(book, spec_of("nf4", 64, false).code, 64);
    assert_memory_equal(fp4, spec_of("fp4", 64, false).code, 64);
    free(book);
    free(fp4);
    free(map);
    cJSON_ArrayForEach(g.meta, cJSON_GetObjectItemCaseSensitive(root, "cases"))
    {
        const char *input = cJSON_GetObjectItemCaseSensitive(g.meta, "input")->valuestring;
        const ql_st_tensor *t = ql_st_find(st, input);
        g.name = NULL;
        void *data = golden_read(&g, input, NULL);
        g.name = cJSON_GetObjectItemCaseSensitive(g.meta, "name")->valuestring;
        ql_matrix m = dense(data, t->dtype, t->ndim == 2 ? t->shape[0] : 1, t->shape[t->ndim - 1]);
        bool is_fp4 = strcmp(cJSON_GetObjectItemCaseSensitive(g.meta, "type")->valuestring, "fp4") == 0;
        differ[is_fp4] += compare_case(&g, &m);
        total += (size_t)(m.n * m.k);
        cases++;
        ql_matrix_free(&m);
        free(data);
    }
    print_message("%d cases, %zu weights; near-ties decided otherwise: nf4 %zu, fp4 %zu\n", cases, total,
                  differ[0], differ[1]);
    assert_true(cases >= 40);
    assert_true(differ[1] <= 2); /* only where their tail block divides and ours multiplies by a reciprocal */
    cJSON_Delete(root);
    ql_st_close(st);
}

/* --- loading ---------------------------------------------------------------------------------------------
 */

/* Every 4-bit weight that a golden model gives decoded. */
static void load_golden_models(void **state)
{
    (void)state;
    static const char *const models[] = {"nf4", "nf4_double", "nf4_f16", "nf4_f32", "nf4_storage_bf16",
                                         "fp4", "fp4_double"};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        char folder[512], file[600];
        snprintf(folder, sizeof folder, GOLDEN "models/%s", models[i]);
        snprintf(file, sizeof file, "%s/golden.safetensors", folder);
        ql_checkpoint *ck;
        ql_st *want;
        ql_err err = {0};
        ql_status status = ql_checkpoint_open(folder, &ck, &err);
        if (status != QL_OK) print_message("%s\n", err.message);
        assert_int_equal(status, QL_OK);
        assert_int_equal(ql_st_open(file, &want, NULL), QL_OK);
        int compared = 0;
        for (size_t j = 0; j < ql_st_count(want); j++) {
            const ql_st_tensor *t = ql_st_at(want, j);
            if (strncmp(t->name, "dequant.", 8) != 0) continue;
            ql_matrix m;
            assert_int_equal(ql_quant_load(ck, t->name + 8, dev, NULL, &m, &err), QL_OK);
            assert_int_equal(m.n, t->shape[0]);
            assert_int_equal(m.k, t->shape[1]);
            assert_int_equal(m.dtype, t->dtype);
            assert_memory_equal(m.quant->scheme, models[i], 3);
            size_t bytes = ql_st_tensor_bytes(t);
            void *expected = malloc(bytes);
            assert_int_equal(ql_st_read(want, t, 0, bytes, expected, NULL), QL_OK);
            ql_tensor got;
            assert_int_equal(ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, t->dtype, m.n, m.k, &got, NULL),
                             QL_OK);
            assert_int_equal(ql_op_dequantize4(&m, &got, NULL), QL_OK);
            size_t size = ql_dtype_size(t->dtype);
            for (size_t e = 0; e < bytes; e += size)
                assert_same_value((const uint8_t *)got.data + e, (const uint8_t *)expected + e, size);
            ql_tensor_free(&got);
            free(expected);
            ql_matrix_free(&m);
            compared++;
        }
        assert_true(compared > 0);
        ql_st_close(want);
        ql_checkpoint_close(ck);
    }
}

/* A dense weight and an unknown name are errors that leave nothing behind. */
static void load_refuses(void **state)
{
    (void)state;
    ql_checkpoint *ck;
    ql_err err = {0};
    ql_matrix m;
    assert_int_equal(ql_checkpoint_open(GOLDEN "models/nf4_double", &ck, NULL), QL_OK);
    assert_int_not_equal(ql_quant_load(ck, "lm_head.weight", dev, NULL, &m, &err), QL_OK);
    assert_null(m.quant);
    assert_int_not_equal(ql_quant_load(ck, "none.weight", dev, NULL, &m, &err), QL_OK);
    assert_non_null(strstr(err.message, "none.weight"));
    ql_checkpoint_close(ck);
}

/* A file whose quant_map is not the table of its type, or holds what is no number. */
static void load_foreign_map(void **state)
{
    (void)state;
    char folder[] = "/tmp/test_quantXXXXXX", path[64];
    assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    for (int bad = 0; bad < 3; bad++) {
        static const char json[] =
            "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"float32\", \"shape\": [1, 64]}";
        float map[16], absmax = bad == 2 ? INFINITY : 2;
        uint8_t codes[32];
        for (int i = 0; i < 16; i++) map[i] = (float)i / 15;
        if (bad == 1) map[3] = NAN;
        for (int i = 0; i < 32; i++) codes[i] = 0x5f;
        ql_st_writer *w;
        assert_int_equal(ql_st_writer_open(path, &w, NULL), QL_OK);
        const struct {
            const char *name;
            ql_dtype dtype;
            const void *data;
            int64_t count;
        } parts[] = {{"w.weight", QL_U8, codes, 32},
                     {"w.weight.absmax", QL_F32, &absmax, 1},
                     {"w.weight.quant_map", QL_F32, map, 16},
                     {"w.weight.quant_state.bitsandbytes__nf4", QL_U8, json, sizeof json - 1}};
        for (int i = 0; i < 4; i++)
            assert_int_equal(
                ql_st_writer_add(w, parts[i].name, parts[i].dtype, 1, &parts[i].count, NULL, NULL), QL_OK);
        assert_int_equal(ql_st_writer_begin(w, NULL), QL_OK);
        for (size_t i = 0; i < 4; i++)
            assert_int_equal(ql_st_writer_write(w, i, parts[i].data,
                                                (size_t)parts[i].count * ql_dtype_size(parts[i].dtype), NULL),
                             QL_OK);
        assert_int_equal(ql_st_writer_finish(w, NULL), QL_OK);
        ql_st_writer_close(w);
        ql_checkpoint *ck;
        ql_matrix m;
        ql_err err = {0};
        assert_int_equal(ql_checkpoint_open(path, &ck, NULL), QL_OK);
        ql_status status = ql_quant_load(ck, "w.weight", dev, NULL, &m, &err);
        if (bad) {
            assert_int_equal(status, QL_ERR_FORMAT);
            assert_non_null(strstr(err.message, bad == 1 ? "w.weight.quant_map" : "w.weight.absmax"));
            assert_null(m.quant);
        } else {
            assert_int_equal(status, QL_OK);
            assert_string_equal(m.quant->scheme, "codebook");
            float decoded[64];
            assert_int_equal(ql_quant_decode(&m, decoded, NULL), QL_OK);
            assert_true(decoded[0] == 2 * map[5] && decoded[1] == 2 * map[15]);
            ql_matrix_free(&m);
        }
        ql_checkpoint_close(ck);
        remove(path);
    }
    remove(folder);
}

static void memory_runs_out(void **state)
{
    (void)state;
    ql_checkpoint *ck;
    assert_int_equal(ql_checkpoint_open(GOLDEN "models/nf4_double", &ck, NULL), QL_OK);
    ql_matrix m = dense_noise(3, 64, 64);
    ql_quant_spec spec = spec_of("nf4", 64, true);
    for (int what = 0; what < 2; what++) {
        ql_status status = QL_ERR_MEMORY;
        long n = 0;
        for (; status != QL_OK && n < 200; n++) {
            ql_matrix q;
            ql_err err = {0};
            ql_mem_fail_after(n, false);
            status = what ? ql_quant_load(ck, "model.layers.0.mlp.down_proj.weight", dev, NULL, &q, &err)
                          : ql_quant_matrix(&m, &spec, NULL, &q, &err);
            ql_mem_fail_after(-1, false);
            if (status == QL_OK) {
                ql_matrix_free(&q);
                continue;
            }
            assert_int_equal(status, QL_ERR_MEMORY);
            assert_null(q.quant);
            assert_null(q.data.storage);
        }
        assert_in_range(n, 4, 199);
    }
    ql_matrix_free(&m);
    ql_checkpoint_close(ck);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(schemes),
        cmocka_unit_test(code_books),
        cmocka_unit_test(encoder_tables),
        cmocka_unit_test(error_on_normal_numbers),
        cmocka_unit_test(edges),
        cmocka_unit_test(double_quantization),
        cmocka_unit_test(free_code_book),
        cmocka_unit_test(bias_is_shared),
        cmocka_unit_test(sizes),
        cmocka_unit_test(decode_real_slice),
        cmocka_unit_test(decode_real_slice_double),
        cmocka_unit_test(as_bitsandbytes_quantizes),
        cmocka_unit_test(load_golden_models),
        cmocka_unit_test(load_refuses),
        cmocka_unit_test(load_foreign_map),
        cmocka_unit_test(memory_runs_out),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
