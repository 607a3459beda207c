#include "quant.h"

#include "mem.h"
#include "ops.h"
#include "qk_nf4.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Smallest scale that is divided by: below it 1 / scale is infinite. bitsandbytes clamps at the same value.
 */
#define SCALE_MIN 1e-38f

/* FP4: sign, two bits of exponent, one of mantissa, in twelfths; bitsandbytes/functional.py, get_4bit_type.
 */
static const float fp4_twelfths[16] = {0, 0.0625f, 8, 12, 4, 6, 2, 3, 0, -0.0625f, -8, -12, -4, -6, -2, -3};

static bool table_of(const char *scheme, float code[16])
{
    if (strcmp(scheme, "nf4") == 0) {
        memcpy(code, qk_nf4_code, sizeof qk_nf4_code);
        return true;
    }
    if (strcmp(scheme, "fp4") == 0) {
        for (int i = 0; i < 16; i++) code[i] = fp4_twelfths[i] / 12.0f;
        return true;
    }
    return false;
}

static bool same_table(const float a[16], const float b[16], float tolerance)
{
    for (int i = 0; i < 16; i++) {
        if (!(fabsf(a[i] - b[i]) <= tolerance)) return false;
    }
    return true;
}

/* bitsandbytes' defaults. */
static void spec_new(const char *scheme, ql_quant_spec *spec)
{
    *spec = (ql_quant_spec){.block = 64, .value_dtype = QL_QUANT_VALUE_DENSE};
    snprintf(spec->scheme, sizeof spec->scheme, "%s", scheme);
}

ql_status ql_quant_spec_init(const char *scheme, ql_quant_spec *spec, ql_err *err)
{
    spec_new(scheme, spec);
    if (!table_of(scheme, spec->code)) {
        ql_err_set(err, QL_ERR_ARG, "unknown quantization scheme '%s'", scheme);
        return ql_err_hint(err, "schemes are nf4 and fp4; any other 4-bit code book is given as 16 numbers");
    }
    return QL_OK;
}

ql_status ql_quant_spec_codebook(const double code[16], ql_quant_spec *spec, ql_err *err)
{
    spec_new("codebook", spec);
    double most = 0;
    for (int i = 0; i < 16; i++) {
        if (!isfinite(code[i]))
            return ql_err_set(err, QL_ERR_ARG, "code book entry %d is not a finite number", i + 1);
        if (fabs(code[i]) > most) most = fabs(code[i]);
    }
    if (most == 0) return ql_err_set(err, QL_ERR_ARG, "every entry of the code book is zero");
    for (int i = 0; i < 16; i++) spec->code[i] = (float)(code[i] / most);
    return QL_OK;
}

ql_status ql_quant_spec_check(const ql_quant_spec *spec, ql_err *err)
{
    float table[16], most = 0;
    bool named = table_of(spec->scheme, table);
    if (!named && strcmp(spec->scheme, "codebook") != 0)
        return ql_err_set(err, QL_ERR_ARG, "unknown quantization scheme '%.15s'", spec->scheme);
    if (!ql_quant_block_ok(spec->block))
        return ql_err_set(err, QL_ERR_ARG, "block size %d is not a power of two from %d to %d", spec->block,
                          QL_QUANT_BLOCK_MIN, QL_QUANT_BLOCK_MAX);
    if (spec->value_dtype != QL_QUANT_VALUE_DENSE && !ql_dtype_is_weight(spec->value_dtype))
        return ql_err_set(err, QL_ERR_ARG, "4-bit weights decode to float32, float16 or bfloat16, not %s",
                          ql_dtype_label(spec->value_dtype));
    for (int i = 0; i < 16; i++) {
        if (!isfinite(spec->code[i]))
            return ql_err_set(err, QL_ERR_ARG, "code book entry %d is not a finite number", i + 1);
        most = fmaxf(most, fabsf(spec->code[i]));
    }
    if (most != 1)
        return ql_err_set(err, QL_ERR_ARG, "the largest magnitude of the code book is %g, not 1",
                          (double)most);
    if (named && !same_table(spec->code, table, 0))
        return ql_err_set(err, QL_ERR_ARG, "the code book is not that of scheme '%s'", spec->scheme);
    return QL_OK;
}

void ql_quant_tables_make(const float code[16], ql_quant_tables *tables)
{
    for (int i = 0; i < 16; i++) {
        int j = i;
        while (j > 0 && code[tables->order[j - 1]] > code[i]) {
            tables->order[j] = tables->order[j - 1];
            j--;
        }
        tables->order[j] = (uint8_t)i;
    }
    for (int i = 0; i < 15; i++) {
        float sum = code[tables->order[i]] + code[tables->order[i + 1]];
        tables->thresholds[i] = sum / 2;
    }
    if (same_table(code, qk_nf4_code, 0))
        memcpy(tables->thresholds, qk_nf4_threshold_bits, sizeof qk_nf4_threshold_bits);
    int below = 0;
    while (below < 15 && 0 > tables->thresholds[below]) below++;
    tables->zero_code = tables->order[below];
}

static int by_size(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* For i = 0..6: the centres of 2^i equal bins of [0.1, 1] times 10^(i - 6), with both signs; 0 and 1. The bin
 * edges are a float32 linspace filled from both ends with one rounding a value, as torch fills it: with other
 * roundings 40 to 70 of the 256 entries come out an ulp away from the tables that checkpoints hold. */
void ql_quant_dynamic_map(float map[256])
{
    int count = 0;
    map[count++] = 0;
    map[count++] = 1;
    for (int i = 0; i < 7; i++) {
        int bins = 1 << i;
        float step = (1.0f - 0.1f) / (float)bins, scale = (float)pow(10, i - 6), left = 0.1f;
        for (int j = 1; j <= bins; j++) {
            float right =
                j < (bins + 1) / 2 ? fmaf(step, (float)j, 0.1f) : fmaf(-step, (float)(bins - j), 1.0f);
            float centre = (left + right) / 2;
            map[count++] = scale * centre;
            map[count++] = -(scale * centre);
            left = right;
        }
    }
    qsort(map, 256, sizeof *map, by_size);
}

/* Index of the entry nearest to y; half-way goes to the even index. Without branches: none of them could be
 * guessed. */
static uint8_t nearest(const float map[256], float y)
{
    int lo = 0;
    for (int step = 128; step > 0; step /= 2) lo += step & -(map[lo + step] <= y);
    if (lo == 255) return 255;
    double left = (double)y - map[lo], right = (double)map[lo + 1] - y;
    return (uint8_t)(lo + ((right < left) | ((right == left) & lo % 2)));
}

/* absmax [q->blocks] as kernels multiply by it: two roundings, no fused multiply-add. */
static void nested_decode(const ql_quant *q, float *absmax)
{
    for (size_t i = 0; i < q->blocks; i++) {
        float scaled = q->nested_map[q->absmax8[i]] * q->nested_absmax[i / (size_t)q->nested_block];
        absmax[i] = scaled + q->nested_offset;
    }
}

static ql_status nested_alloc(ql_quant *q, ql_err *err)
{
    q->nested = true;
    q->nested_blocks = (q->blocks + (size_t)q->nested_block - 1) / (size_t)q->nested_block;
    q->absmax8 = ql_malloc(q->blocks);
    q->nested_absmax = ql_calloc(q->nested_blocks, sizeof *q->nested_absmax);
    if (!q->absmax8 || !q->nested_absmax)
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory for the scales of %zu blocks", q->blocks);
    return QL_OK;
}

/* Quantize absmax [q->blocks] to 8 bits and put what they decode to in its place. */
static ql_status nested_encode(ql_quant *q, float *absmax, ql_err *err)
{
    q->nested_block = QL_QUANT_NESTED_BLOCK;
    ql_status status = nested_alloc(q, err);
    if (status != QL_OK) return status;
    double sum = 0;
    for (size_t i = 0; i < q->blocks; i++) sum += absmax[i];
    q->nested_offset = (float)(sum / (double)q->blocks);
    ql_quant_dynamic_map(q->nested_map);
    for (size_t j = 0; j < q->nested_blocks; j++) {
        size_t first = j * QL_QUANT_NESTED_BLOCK;
        size_t last = first + QL_QUANT_NESTED_BLOCK < q->blocks ? first + QL_QUANT_NESTED_BLOCK : q->blocks;
        float scale = 0;
        for (size_t i = first; i < last; i++) scale = fmaxf(scale, fabsf(absmax[i] - q->nested_offset));
        q->nested_absmax[j] = scale;
        float inverse = 1.0f / fmaxf(scale, SCALE_MIN);
        for (size_t i = first; i < last; i++) {
            float d = absmax[i] - q->nested_offset;
            q->absmax8[i] = nearest(q->nested_map, d * inverse);
        }
    }
    nested_decode(q, absmax);
    return QL_OK;
}

static ql_quant *quant_new(ql_err *err)
{
    ql_quant *q = ql_calloc(1, sizeof *q);
    if (q)
        q->refs = 1;
    else
        ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    return q;
}

static ql_status alloc_codes(ql_device *dev, ql_arena *arena, int64_t n, int64_t k, const ql_quant *q,
                             ql_matrix *out, ql_err *err)
{
    out->n = n;
    out->k = k;
    out->dtype = q->value_dtype;
    return ql_tensor_new_1d(dev, arena, QL_MEM_WEIGHTS, QL_U8, (n * k + 1) / 2, &out->data, err);
}

/* Scales in F32, one a block. */
static ql_status alloc_absmax(ql_device *dev, ql_arena *arena, const ql_quant *q, ql_matrix *out, ql_err *err)
{
    return ql_tensor_new_1d(dev, arena, QL_MEM_WEIGHTS, QL_F32, (int64_t)q->blocks, &out->absmax, err);
}

/* Double-quantized scales go to the device as they are, and the host forgets them. */
static ql_status upload_nested(ql_device *dev, ql_arena *arena, ql_quant *q, ql_matrix *out, ql_err *err)
{
    size_t count = 257 + q->nested_blocks;
    float *nested = ql_malloc(count * sizeof *nested);
    if (!nested) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %zu scales", count);
    memcpy(nested, q->nested_map, sizeof q->nested_map);
    nested[256] = q->nested_offset;
    memcpy(nested + 257, q->nested_absmax, q->nested_blocks * sizeof *nested);
    ql_status status =
        ql_tensor_new_1d(dev, arena, QL_MEM_WEIGHTS, QL_U8, (int64_t)q->blocks, &out->absmax, err);
    if (status == QL_OK) status = ql_tensor_upload(&out->absmax, q->absmax8, q->blocks, err);
    if (status == QL_OK)
        status = ql_tensor_new_1d(dev, arena, QL_MEM_WEIGHTS, QL_F32, (int64_t)count, &out->nested, err);
    if (status == QL_OK) status = ql_tensor_upload(&out->nested, nested, count * sizeof *nested, err);
    ql_free(nested);
    if (status != QL_OK) return status;
    ql_free(q->absmax8);
    ql_free(q->nested_absmax);
    q->absmax8 = NULL;
    q->nested_absmax = NULL;
    return QL_OK;
}

/* `absmax` [q->blocks] in the form that the device keeps. */
static ql_status upload_scales(ql_device *dev, ql_arena *arena, ql_quant *q, const float *absmax,
                               ql_matrix *out, ql_err *err)
{
    if (q->nested && dev->backend->nested_scales) return upload_nested(dev, arena, q, out, err);
    QL_TRY(alloc_absmax(dev, arena, q, out, err));
    return ql_tensor_upload(&out->absmax, absmax, q->blocks * sizeof *absmax, err);
}

/* Double quantization of a matrix that has its scales: on the host, there are few of them. */
static ql_status nest(ql_matrix *m, ql_arena *arena, ql_quant *q, ql_err *err)
{
    size_t bytes = q->blocks * sizeof(float);
    float *absmax = ql_malloc(bytes);
    if (!absmax)
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory for the scales of %zu blocks", q->blocks);
    ql_status status = ql_tensor_download(&m->absmax, absmax, bytes, err);
    if (status == QL_OK) status = nested_encode(q, absmax, err);
    ql_tensor_free(&m->absmax);
    if (status == QL_OK) status = upload_scales(ql_tensor_device(&m->data), arena, q, absmax, m, err);
    ql_free(absmax);
    return status;
}

/* The last step of a 4-bit matrix: its codes in the order that the device reads best. */
static ql_status pack(ql_matrix *m, ql_arena *arena, ql_err *err)
{
    ql_device *dev = ql_tensor_device(&m->data);
    if (!dev->backend->pack4) return QL_OK;
    ql_tensor packed = {0};
    int layout = 0;
    ql_status status = ql_tensor_new_1d(dev, arena, QL_MEM_WEIGHTS, QL_U8, m->data.shape[0], &packed, err);
    if (status == QL_OK) status = ql_op_pack4(m, &packed, &layout, err);
    if (status != QL_OK || layout == 0) {
        ql_tensor_free(&packed);
        return status;
    }
    ql_tensor_free(&m->data);
    m->data = packed;
    m->layout = layout;
    return QL_OK;
}

/* Quantizers pass over a NaN without a word: it would become some code. */
static ql_status check_finite(const ql_matrix *dense, ql_err *err)
{
    int64_t at;
    QL_TRY(ql_op_find_bad(&dense->data, &at, err));
    if (at < 0) return QL_OK;
    return ql_err_set(err, QL_ERR_FORMAT, "the weight in row %lld, column %lld is not a finite number",
                      (long long)(at / dense->k) + 1, (long long)(at % dense->k) + 1);
}

ql_status ql_quant_matrix(const ql_matrix *dense, const ql_quant_spec *spec, ql_arena *arena, ql_matrix *out,
                          ql_err *err)
{
    memset(out, 0, sizeof *out);
    ql_quant *q = NULL;
    ql_status status = ql_quant_spec_check(spec, err);
    if (status != QL_OK) return status;
    if (dense->quant || !ql_dtype_is_weight(dense->data.dtype))
        return ql_err_set(err, QL_ERR_ARG, "a %s weight cannot be quantized to 4 bits",
                          dense->quant ? "4-bit" : ql_dtype_label(dense->data.dtype));
    int64_t count = ql_tensor_count(&dense->data);
    if (count < 1 || count != dense->n * dense->k)
        return ql_err_set(err, QL_ERR_ARG, "a weight [%lld, %lld] holds %lld elements", (long long)dense->n,
                          (long long)dense->k, (long long)count);
    status = check_finite(dense, err);
    if (status != QL_OK) return status;
    if (!(q = quant_new(err))) return QL_ERR_MEMORY;
    out->quant = q;
    memcpy(q->scheme, spec->scheme, sizeof q->scheme);
    memcpy(q->code, spec->code, sizeof q->code);
    q->block = spec->block;
    q->blocks = (size_t)((count + spec->block - 1) / spec->block);
    q->value_dtype = spec->value_dtype == QL_QUANT_VALUE_DENSE ? dense->data.dtype : spec->value_dtype;

    ql_quant_tables tables;
    ql_quant_tables_make(spec->code, &tables);
    ql_device *dev = ql_tensor_device(&dense->data);
    status = alloc_codes(dev, arena, dense->n, dense->k, q, out, err);
    if (status == QL_OK) status = alloc_absmax(dev, arena, q, out, err);
    if (status != QL_OK) goto fail;
    status = ql_op_quantize4(&dense->data, spec->block, tables.thresholds, tables.order, tables.zero_code,
                             &out->data, &out->absmax, err);
    if (status != QL_OK) goto fail;

    if (spec->double_quant) status = nest(out, arena, q, err);
    if (status == QL_OK) status = pack(out, arena, err);
    if (status != QL_OK) goto fail;
    out->bias = ql_tensor_ref(&dense->bias);
    ql_quant_charge(q, arena);
    return QL_OK;
fail:
    ql_matrix_free(out);
    return status;
}

static ql_status read_floats(const ql_checkpoint *ck, const ql_st_tensor *tensor, size_t count, float *dst,
                             ql_err *err)
{
    ql_status status = ql_checkpoint_read(ck, tensor, 0, count * sizeof *dst, dst, err);
    for (size_t i = 0; i < count && status == QL_OK; i++) {
        if (!isfinite(dst[i]))
            status = ql_err_set(err, QL_ERR_FORMAT, "%s: tensor '%s': element %zu is not a finite number",
                                ql_checkpoint_file(ck, tensor), tensor->name, i + 1);
    }
    return status;
}

static ql_status read_scales(const ql_checkpoint *ck, const ql_quant_tensor *qt, ql_quant *q, float *absmax,
                             ql_err *err)
{
    if (!qt->state.nested) return read_floats(ck, qt->absmax, q->blocks, absmax, err);
    q->nested_block = qt->state.nested_block;
    q->nested_offset = qt->state.nested_offset;
    ql_status status = nested_alloc(q, err);
    if (status == QL_OK) status = ql_checkpoint_read(ck, qt->absmax, 0, q->blocks, q->absmax8, err);
    if (status == QL_OK) status = read_floats(ck, qt->nested, q->nested_blocks, q->nested_absmax, err);
    if (status == QL_OK) status = read_floats(ck, qt->nested_map, 256, q->nested_map, err);
    if (status != QL_OK) return status;
    nested_decode(q, absmax);
    for (size_t i = 0; i < q->blocks; i++) {
        if (!isfinite(absmax[i]))
            return ql_err_set(err, QL_ERR_FORMAT, "%s: tensor '%s': the scale of block %zu overflows",
                              ql_checkpoint_file(ck, qt->nested), qt->nested->name, i + 1);
    }
    return QL_OK;
}

ql_status ql_quant_load(const ql_checkpoint *ck, const char *name, ql_device *dev, ql_arena *arena,
                        ql_matrix *out, ql_err *err)
{
    memset(out, 0, sizeof *out);
    ql_quant_tensor qt;
    ql_quant *q = NULL;
    float *absmax = NULL, table[16];
    ql_status status = ql_checkpoint_quant(ck, name, &qt, err);
    if (status != QL_OK) return status;
    if (!(q = quant_new(err))) return QL_ERR_MEMORY;
    out->quant = q;
    q->block = qt.state.block;
    q->blocks = (size_t)ql_quant_state_blocks(&qt.state);
    q->value_dtype = qt.state.dtype;
    status = read_floats(ck, qt.map, 16, q->code, err);
    if (status != QL_OK) goto fail;
    bool as_named = table_of(qt.state.type, table) && same_table(q->code, table, 1e-6f);
    strcpy(q->scheme, as_named ? qt.state.type : "codebook");

    absmax = ql_calloc(q->blocks, sizeof *absmax);
    if (!absmax) {
        status = ql_err_set(err, QL_ERR_MEMORY, "out of memory for the scales of '%s'", name);
        goto fail;
    }
    status = read_scales(ck, &qt, q, absmax, err);
    if (status == QL_OK) status = alloc_codes(dev, arena, qt.state.shape[0], qt.state.shape[1], q, out, err);
    if (status == QL_OK) status = upload_scales(dev, arena, q, absmax, out, err);
    if (status == QL_OK) status = ql_checkpoint_fill(ck, qt.weight, &out->data, err);
    if (status == QL_OK) status = pack(out, arena, err);
    if (status != QL_OK) goto fail;
    ql_quant_charge(q, arena);
    ql_free(absmax);
    return QL_OK;
fail:
    ql_free(absmax);
    ql_matrix_free(out);
    return status;
}

ql_status ql_quant_decode(const ql_matrix *m, float *out, ql_err *err)
{
    ql_tensor t = {0};
    ql_status status =
        ql_tensor_new_2d(ql_tensor_device(&m->data), NULL, QL_MEM_ACTIVATIONS, QL_F32, m->n, m->k, &t, err);
    if (status == QL_OK) status = ql_op_dequantize4(m, &t, err);
    if (status == QL_OK) status = ql_tensor_download(&t, out, ql_tensor_bytes(&t), err);
    ql_tensor_free(&t);
    return status;
}

ql_status ql_quant_expect(int64_t n, int64_t k, const ql_quant_spec *spec, ql_quant_size *size, ql_err *err)
{
    memset(size, 0, sizeof *size);
    ql_status status = ql_quant_spec_check(spec, err);
    if (status != QL_OK) return status;
    int64_t weights, bound; /* 8 bytes a weight bound every sum below */
    if (n < 1 || k < 1 || __builtin_mul_overflow(n, k, &weights) ||
        __builtin_mul_overflow(weights, 8, &bound))
        return ql_err_set(err, QL_ERR_ARG, "a weight [%lld, %lld] cannot be", (long long)n, (long long)k);
    size->weights = weights;
    size->blocks = (weights - 1) / spec->block + 1;
    size->nested_blocks = spec->double_quant ? (size->blocks - 1) / QL_QUANT_NESTED_BLOCK + 1 : 0;
    size_t codes = (size_t)(weights / 2 + weights % 2), blocks = (size_t)size->blocks;
    size->device_bytes = codes + blocks * sizeof(float);
    size->stored_bytes = size->device_bytes;
    if (spec->double_quant)
        size->stored_bytes = codes + blocks + ((size_t)size->nested_blocks + 1) * sizeof(float);
    size->stored_bits = 4 + (spec->double_quant ? 8 + 32.0 / QL_QUANT_NESTED_BLOCK : 32.0) / spec->block;
    return QL_OK;
}
