#include "cases.h"

#include "ops.h"
#include "quant.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SEED_WEIGHT = 1, SEED_INPUT = 1000, SEED_CACHE = 2000 };

static ql_dtype dtype_of(ops_format f)
{
    switch (f) {
    case OPS_F32:
        return QL_F32;
    case OPS_F16:
    case OPS_NF4_F16:
        return QL_F16;
    default:
        return QL_BF16;
    }
}

static bool is_4bit(ops_format f)
{
    return f >= OPS_NF4;
}

static ql_status new_tensor(ops_run *run, ql_dtype dtype, int64_t rows, int64_t cols, ql_tensor *out,
                            ql_err *err)
{
    if (cols) return ql_tensor_new_2d(run->dev, NULL, QL_MEM_ACTIVATIONS, dtype, rows, cols, out, err);
    return ql_tensor_new_1d(run->dev, NULL, QL_MEM_ACTIVATIONS, dtype, rows, out, err);
}

/* Numbers of standard deviation `deviation`, of which every device makes the same bits. */
static ql_status random_tensor(ops_run *run, uint64_t seed, float deviation, ql_dtype dtype, int64_t rows,
                               int64_t cols, ql_tensor *out, ql_err *err)
{
    QL_TRY(new_tensor(run, dtype, rows, cols, out, err));
    if (!run->dev->backend->random)
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s makes no random numbers", run->dev->label);
    QL_TRY(ql_op_random(seed, 0, out, err));
    if (dtype != QL_F32) return QL_OK;
    return ql_op_binary_scalar(QL_BIN_MUL, out, deviation * 50, false, out, err);
}

/* Whatever was in the memory must not count: NaN in every float format. */
static ql_status poison(ql_tensor *t, ql_err *err)
{
    size_t bytes = ql_tensor_bytes(t);
    void *ones = malloc(bytes + 1);
    if (!ones) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    memset(ones, 0xff, bytes);
    ql_status status = ql_tensor_upload(t, ones, bytes, err);
    free(ones);
    return status;
}

static ql_status new_output(ops_run *run, ql_dtype dtype, int64_t rows, int64_t cols, ql_err *err)
{
    ql_tensor *t = &run->out[run->outputs++];
    QL_TRY(new_tensor(run, dtype, rows, cols, t, err));
    return poison(t, err);
}

/* `count` indices 0..below - 1, spread without order. */
static ql_status new_indices(ops_run *run, int64_t count, int64_t below, ql_tensor *out, ql_err *err)
{
    int32_t *host = malloc((size_t)count * sizeof *host);
    if (!host) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    for (int64_t i = 0; i < count; i++)
        host[i] = (int32_t)(((uint64_t)(i + 1) * 2654435761u + (uint64_t)count) % (uint64_t)below);
    if (count > 1) host[1] = (int32_t)(below - 1);
    ql_status status = new_tensor(run, QL_I32, count, 0, out, err);
    if (status == QL_OK) status = ql_tensor_upload(out, host, (size_t)count * sizeof *host, err);
    free(host);
    return status;
}

/* ---- weights ---- */

/* Put codes that quantizing left in the device's own order back into bitsandbytes'. */
static ql_status unpack(ops_run *run, ql_matrix *w, ql_err *err)
{
    ql_tensor plain;
    if (!w->layout) return QL_OK;
    QL_TRY(new_tensor(run, QL_U8, ql_tensor_count(&w->data), 0, &plain, err));
    ql_status status = run->dev->backend->unpack4(run->dev->ctx, w, &plain, err);
    if (status == QL_OK) {
        ql_tensor_free(&w->data);
        w->data = plain;
        w->layout = 0;
        return QL_OK;
    }
    ql_tensor_free(&plain);
    return status;
}

static ql_status make_spec(ops_format f, ql_quant_spec *spec, ql_err *err)
{
    if (f == OPS_CODEBOOK) {
        double code[16];
        for (int i = 0; i < 16; i++) code[i] = (i - 7) * (1 + 0.03 * i) / 11.25; /* no order of NF4's */
        code[3] = 1, code[15] = -0.9;
        return ql_quant_spec_codebook(code, spec, err);
    }
    QL_TRY(ql_quant_spec_init("nf4", spec, err));
    spec->double_quant = f == OPS_NF4_DOUBLE;
    return QL_OK;
}

static ql_status make_weight(ops_run *run, int copy, ql_matrix *w, ql_err *err)
{
    const ops_case *c = run->c;
    *w = (ql_matrix){.n = c->n, .k = c->k, .dtype = dtype_of(c->format)};
    QL_TRY(random_tensor(run, (uint64_t)(SEED_WEIGHT + copy), 0.02f, w->dtype, c->n, c->k, &w->data, err));
    if (c->bias) QL_TRY(random_tensor(run, 77, 0.5f, QL_F32, c->n, 0, &w->bias, err));
    if (!is_4bit(c->format)) return QL_OK;
    ql_quant_spec spec;
    ql_matrix dense = *w;
    *w = (ql_matrix){0};
    ql_status status = make_spec(c->format, &spec, err);
    if (status == QL_OK) status = ql_quant_matrix(&dense, &spec, NULL, w, err);
    ql_matrix_free(&dense);
    if (status == QL_OK && (c->rows || c->kind == OPS_PACK4)) status = unpack(run, w, err);
    return status;
}

static ql_status make_weights(ops_run *run, ql_err *err)
{
    run->w = calloc((size_t)run->copies, sizeof *run->w);
    if (!run->w) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    for (int i = 0; i < run->copies; i++) QL_TRY(make_weight(run, i, &run->w[i], err));
    return QL_OK;
}

/* ---- attention ---- */

/* Slots of all sequences with a gap before each, and the places of their new tokens, or of all positions. */
static ql_status make_places(ops_run *run, bool all, int64_t *slots, int64_t *count, ql_tensor *start,
                             ql_tensor *pos, ql_err *err)
{
    const ops_case *c = run->c;
    int64_t most = ops_case_tokens(c, NULL) + c->sequences * c->context, n = 0, at = 0;
    int32_t *host = malloc((size_t)most * 2 * sizeof *host);
    if (!host) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    int32_t *first = host, *place = host + most;
    for (int s = 0; s < c->sequences; s++) {
        int64_t fresh = c->tokens - 3 * s > 1 ? c->tokens - 3 * s : 1;
        int64_t before = c->context - 7 * s > 0 ? c->context - 7 * s : 0;
        at += 5;
        for (int64_t i = all ? 0 : before; i < before + fresh; i++, n++) {
            first[n] = (int32_t)at;
            place[n] = (int32_t)i;
        }
        at += before + fresh;
    }
    *slots = at + 3;
    *count = n;
    ql_status status = new_tensor(run, QL_I32, n, 0, start, err);
    if (status == QL_OK) status = ql_tensor_upload(start, first, (size_t)n * sizeof *first, err);
    if (status == QL_OK) status = new_tensor(run, QL_I32, n, 0, pos, err);
    if (status == QL_OK) status = ql_tensor_upload(pos, place, (size_t)n * sizeof *place, err);
    free(host);
    return status;
}

/* A cache in the case's format, or in float32 where the device has only that. Slots that belong to no
 * sequence are NaN. */
static ql_status new_cache(ops_run *run, int64_t slots, ql_tensor *out, ql_err *err)
{
    const ops_case *c = run->c;
    ql_dtype dtype = run->dev->backend->kv_dtype == QL_F32 ? QL_F32 : dtype_of(c->format);
    QL_TRY(
        ql_tensor_new(run->dev, NULL, QL_MEM_KV, dtype, 3, (int64_t[]){c->kv_heads, slots, c->k}, out, err));
    return poison(out, err);
}

static ql_status make_caches(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    ql_tensor start = {0}, pos = {0}, k = {0}, v = {0};
    int64_t slots, count;
    ql_status status = make_places(run, true, &slots, &count, &start, &pos, err);
    run->k = calloc((size_t)run->copies, sizeof *run->k);
    run->v = calloc((size_t)run->copies, sizeof *run->v);
    if (!run->k || !run->v) status = ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    for (int i = 0; status == QL_OK && i < run->copies; i++) {
        int64_t width = c->kv_heads * c->k;
        uint64_t seed = (uint64_t)(SEED_CACHE + 2 * i);
        status = random_tensor(run, seed, 1, QL_F32, count, width, &k, err);
        if (status == QL_OK) status = random_tensor(run, seed + 1, 1, QL_F32, count, width, &v, err);
        if (status == QL_OK) status = new_cache(run, slots, &run->k[i], err);
        if (status == QL_OK) status = new_cache(run, slots, &run->v[i], err);
        if (status == QL_OK)
            status = ql_op_kv_write(&k, &v, &start, &pos, (ql_kv_view){&run->k[i], &run->v[i]}, err);
        if (status == QL_OK) status = run->dev->backend->sync(run->dev->ctx, err);
        ql_tensor_free(&k);
        ql_tensor_free(&v);
    }
    ql_tensor_free(&start);
    ql_tensor_free(&pos);
    return status;
}

static ql_status open_attention(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    int64_t slots, count;
    QL_TRY(make_places(run, false, &slots, &count, &run->start, &run->pos, err));
    QL_TRY(make_caches(run, err));
    QL_TRY(random_tensor(run, SEED_INPUT, 1, QL_F32, count, c->heads * c->k, &run->in[0], err));
    return new_output(run, QL_F32, count, c->heads * c->k, err);
}

static ql_status open_kv_write(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    int64_t slots, count, width = c->kv_heads * c->k;
    QL_TRY(make_places(run, false, &slots, &count, &run->start, &run->pos, err));
    for (int i = 0; i < 2; i++) {
        QL_TRY(random_tensor(run, (uint64_t)(SEED_INPUT + i), 1, QL_F32, count, width, &run->in[i], err));
        QL_TRY(new_cache(run, slots, &run->out[run->outputs++], err));
    }
    return QL_OK;
}

static ql_status open_rope(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    enum { POSITIONS = 700 };
    QL_TRY(new_indices(run, c->tokens, POSITIONS, &run->pos, err));
    QL_TRY(random_tensor(run, SEED_INPUT + 1, 0.5f, QL_F32, POSITIONS, c->k / 2, &run->in[0], err));
    QL_TRY(random_tensor(run, SEED_INPUT + 2, 0.5f, QL_F32, POSITIONS, c->k / 2, &run->in[1], err));
    run->outputs = 1; /* rotated in place */
    return random_tensor(run, SEED_INPUT, 1, QL_F32, c->tokens, c->heads * c->k, &run->out[0], err);
}

/* ---- logits ---- */

/* Random logits; in those whose order counts, multiples of 1/8 so that there are ties, and in the second row
 * what a network should not give. */
static ql_status make_logits(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    bool ordered = c->kind == OPS_TOPK || c->kind == OPS_ROW_STATS;
    QL_TRY(random_tensor(run, SEED_INPUT, 3, QL_F32, c->tokens, c->n, &run->in[0], err));
    if (!ordered) return QL_OK;
    size_t count = (size_t)(c->tokens * c->n);
    float *host = malloc(count * sizeof *host);
    if (!host) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    ql_status status = ql_tensor_download(&run->in[0], host, count * sizeof *host, err);
    for (size_t i = 0; i < count; i++) host[i] = rintf(host[i] * 8) / 8;
    if (c->tokens > 1) {
        float *row = host + c->n;
        row[c->n / 3] = NAN;
        row[c->n / 2] = INFINITY;
        row[c->n - 1] = -INFINITY;
    }
    if (status == QL_OK) status = ql_tensor_upload(&run->in[0], host, count * sizeof *host, err);
    free(host);
    return status;
}

static ql_status open_logits(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    QL_TRY(make_logits(run, err));
    switch (c->kind) {
    case OPS_TOPK:
        QL_TRY(new_output(run, QL_F32, c->tokens, c->k, err));
        return new_output(run, QL_I32, c->tokens, c->k, err);
    case OPS_ROW_STATS:
        run->skipped = !run->dev->backend->row_stats;
        QL_TRY(new_indices(run, c->tokens, c->n, &run->in[1], err));
        QL_TRY(new_output(run, QL_F64, c->tokens, 3, err));
        return new_output(run, QL_I32, c->tokens, 2, err);
    case OPS_SOFTMAX:
        return new_output(run, QL_F32, c->tokens, c->n, err);
    case OPS_GATHER_COLS:
        QL_TRY(new_indices(run, c->tokens, c->n, &run->in[1], err));
        return new_output(run, QL_F32, c->tokens, 0, err);
    case OPS_KL:
        QL_TRY(random_tensor(run, SEED_INPUT + 1, 3, QL_F32, c->tokens, c->n, &run->in[1], err));
        return new_output(run, QL_F64, c->tokens, 0, err);
    default:
        return new_output(run, QL_F64, c->tokens, 0, err);
    }
}

/* ---- elements ---- */

static ql_status open_find_bad(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    ql_dtype dtype = dtype_of(c->format);
    QL_TRY(random_tensor(run, SEED_INPUT, 1, dtype, c->tokens, c->n, &run->in[0], err));
    run->outputs = 1;
    QL_TRY(new_tensor(run, QL_I64, 1, 0, &run->out[0], err));
    if (c->k < 0) return QL_OK;
    size_t bytes = ql_tensor_bytes(&run->in[0]), size = ql_dtype_size(dtype);
    char *host = malloc(bytes);
    if (!host) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    ql_status status = ql_tensor_download(&run->in[0], host, bytes, err);
    /* the first a NaN, the last an infinity of the other sign bit */
    const float infinity = -INFINITY;
    const uint16_t short_infinity = dtype == QL_F16 ? 0xfc00 : 0xff80;
    memset(host + (size_t)c->k * size, 0xff, size);
    if (c->k + 1 < c->tokens * c->n)
        memcpy(host + bytes - size, size == 4 ? (const void *)&infinity : &short_infinity, size);
    if (status == QL_OK) status = ql_tensor_upload(&run->in[0], host, bytes, err);
    free(host);
    return status;
}

static ql_status open_elements(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    ql_dtype dtype = dtype_of(c->format);
    bool wide = c->kind == OPS_WIDEN;
    if (c->kind == OPS_RANDOM) return new_output(run, dtype, c->tokens, c->n, err);
    QL_TRY(random_tensor(run, SEED_INPUT, 1, wide ? dtype : QL_F32, c->tokens, c->n, &run->in[0], err));
    if (c->kind != OPS_NARROW && !wide)
        QL_TRY(random_tensor(run, SEED_INPUT + 1, 1, QL_F32, c->tokens, c->n, &run->in[1], err));
    return new_output(run, c->kind == OPS_NARROW ? dtype : QL_F32, c->tokens, c->n, err);
}

/* ---- one case ---- */

static ql_status open_products(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    QL_TRY(make_weights(run, err));
    switch (c->kind) {
    case OPS_MATMUL:
        QL_TRY(random_tensor(run, SEED_INPUT, 1, QL_F32, c->tokens, c->k, &run->in[0], err));
        QL_TRY(random_tensor(run, SEED_INPUT + 1, 1, QL_F32, c->tokens, c->n, &run->out[0], err));
        run->outputs = 1;
        return c->add ? QL_OK : poison(&run->out[0], err);
    case OPS_EMBED:
        QL_TRY(new_indices(run, c->tokens, c->n, &run->in[0], err));
        return new_output(run, QL_F32, c->tokens, c->k, err);
    case OPS_DEQUANTIZE4:
        QL_TRY(new_output(run, QL_BF16, c->n, c->k, err));
        return new_output(run, QL_F32, c->n, c->k, err);
    case OPS_PACK4:
        run->skipped = !run->dev->backend->pack4;
        QL_TRY(new_output(run, QL_U8, ql_tensor_count(&run->w[0].data), 0, err));
        return new_output(run, QL_U8, ql_tensor_count(&run->w[0].data), 0, err);
    default: /* OPS_QUANTIZE4: what making the weight gave */
        QL_TRY(random_tensor(run, SEED_WEIGHT, 0.02f, run->w[0].dtype, c->n, c->k, &run->in[0], err));
        QL_TRY(new_output(run, QL_U8, (c->n * c->k + 1) / 2, 0, err));
        return new_output(run, QL_F32, (c->n * c->k + 63) / 64, 0, err);
    }
}

static ql_status open_rows(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    int64_t rows = c->kind == OPS_GATHER_ROWS ? c->n : c->tokens;
    QL_TRY(random_tensor(run, SEED_INPUT, 2, QL_F32, rows, c->k, &run->in[0], err));
    if (c->kind == OPS_RMSNORM)
        QL_TRY(random_tensor(run, SEED_INPUT + 1, 1, QL_F32, c->k, 0, &run->in[1], err));
    else if (c->kind == OPS_SWIGLU)
        QL_TRY(random_tensor(run, SEED_INPUT + 1, 1, QL_F32, rows, c->k, &run->in[1], err));
    else
        QL_TRY(new_indices(run, c->tokens, c->n, &run->in[1], err));
    return new_output(run, QL_F32, c->tokens, c->k, err);
}

ql_status ops_run_open(ql_device *dev, const ops_case *c, int copies, ops_run *run, ql_err *err)
{
    *run = (ops_run){.c = c, .dev = dev, .copies = copies, .at = -2};
    ql_status status;
    switch (c->kind) {
    case OPS_MATMUL:
    case OPS_EMBED:
    case OPS_QUANTIZE4:
    case OPS_DEQUANTIZE4:
    case OPS_PACK4:
        status = open_products(run, err);
        break;
    case OPS_RMSNORM:
    case OPS_SWIGLU:
    case OPS_GATHER_ROWS:
        status = open_rows(run, err);
        break;
    case OPS_ROPE:
        status = open_rope(run, err);
        break;
    case OPS_KV_WRITE:
        status = open_kv_write(run, err);
        break;
    case OPS_ATTENTION:
        status = open_attention(run, err);
        break;
    case OPS_TOPK:
    case OPS_LOGSUMEXP:
    case OPS_ROW_STATS:
    case OPS_SOFTMAX:
    case OPS_KL:
    case OPS_GATHER_COLS:
        status = open_logits(run, err);
        break;
    case OPS_FIND_BAD:
        status = open_find_bad(run, err);
        break;
    default:
        status = open_elements(run, err);
    }
    return status == QL_OK ? dev->backend->sync(dev->ctx, err) : status;
}

static ql_status step_elements(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    ql_tensor *x = &run->in[0], *y = &run->out[0];
    switch (c->kind) {
    case OPS_NARROW:
    case OPS_WIDEN:
        return ql_op_convert(x, y, err);
    case OPS_SCALE:
        return ql_op_binary_scalar(QL_BIN_MUL, x, 0.3f, false, y, err);
    case OPS_INVERT:
        return ql_op_binary_scalar(QL_BIN_DIV, x, 3, true, y, err);
    case OPS_RANDOM:
        return run->dev->backend->random(run->dev->ctx, 42, (uint64_t)c->k, y, err);
    case OPS_FIND_BAD:
        QL_TRY(run->dev->backend->find_bad(run->dev->ctx, x, &run->at, err));
        return ql_tensor_upload(y, &run->at, sizeof run->at, err);
    default:
        return ql_op_binary((ql_binary_op)(QL_BIN_ADD + (c->kind - OPS_ADD)), x, &run->in[1], y, err);
    }
}

static ql_status step_logits(ops_run *run, ql_err *err)
{
    const ops_case *c = run->c;
    ql_tensor *x = &run->in[0], *y = &run->out[0];
    switch (c->kind) {
    case OPS_TOPK:
        return ql_op_topk(x, (int)c->k, y, &run->out[1], err);
    case OPS_LOGSUMEXP:
        return ql_op_logsumexp(x, 0.7, y, err);
    case OPS_ROW_STATS:
        return run->dev->backend->row_stats(run->dev->ctx, x, &run->in[1], y, &run->out[1], err);
    case OPS_SOFTMAX:
        return ql_op_softmax(x, 0.7, y, err);
    case OPS_GATHER_COLS:
        return ql_op_gather_cols(x, &run->in[1], y, err);
    default:
        return ql_op_kl(x, &run->in[1], y, err);
    }
}

static ql_status step_quantize(ops_run *run, ql_err *err)
{
    ql_quant_spec spec;
    ql_quant_tables tables;
    QL_TRY(make_spec(run->c->format, &spec, err));
    ql_quant_tables_make(spec.code, &tables);
    return ql_op_quantize4(&run->in[0], spec.block, tables.thresholds, tables.order, tables.zero_code,
                           &run->out[0], &run->out[1], err);
}

static ql_status step_pack(ops_run *run, int copy, ql_err *err)
{
    const ql_backend *b = run->dev->backend;
    ql_matrix w = run->w[copy];
    QL_TRY(b->pack4(run->dev->ctx, &w, &run->out[1], &w.layout, err));
    if (!w.layout) { /* best left as it is */
        run->skipped = 1;
        return QL_OK;
    }
    w.data = run->out[1];
    return b->unpack4(run->dev->ctx, &w, &run->out[0], err);
}

ql_status ops_run_step(ops_run *run, int copy, ql_err *err)
{
    const ops_case *c = run->c;
    ql_tensor *in = run->in, *y = &run->out[0];
    if (run->skipped) return QL_OK;
    switch (c->kind) {
    case OPS_EMBED:
        return ql_op_embed(&run->w[copy], &in[0], y, err);
    case OPS_RMSNORM:
        return ql_op_rmsnorm(&in[0], &in[1], 1e-5f, y, err);
    case OPS_MATMUL:
        return ql_op_matmul(&in[0], &run->w[copy], c->add, y, err);
    case OPS_ROPE:
        return ql_op_rope(y, &run->pos, &in[0], &in[1], c->heads, err);
    case OPS_KV_WRITE:
        return ql_op_kv_write(&in[0], &in[1], &run->start, &run->pos, (ql_kv_view){y, &run->out[1]}, err);
    case OPS_ATTENTION:
        return ql_op_attention(&in[0], (ql_kv_view){&run->k[copy], &run->v[copy]}, &run->start, &run->pos,
                               c->heads, y, err);
    case OPS_SWIGLU:
        return ql_op_swiglu(&in[0], &in[1], y, err);
    case OPS_GATHER_ROWS:
        return ql_op_gather_rows(&in[0], &in[1], y, err);
    case OPS_QUANTIZE4:
        return step_quantize(run, err);
    case OPS_DEQUANTIZE4:
        QL_TRY(ql_op_dequantize4(&run->w[copy], y, err));
        return ql_op_dequantize4(&run->w[copy], &run->out[1], err);
    case OPS_PACK4:
        return step_pack(run, copy, err);
    case OPS_TOPK:
    case OPS_LOGSUMEXP:
    case OPS_ROW_STATS:
    case OPS_SOFTMAX:
    case OPS_KL:
    case OPS_GATHER_COLS:
        return step_logits(run, err);
    default:
        return step_elements(run, err);
    }
}

void ops_run_close(ops_run *run)
{
    for (int i = 0; i < run->copies; i++) {
        if (run->w) ql_matrix_free(&run->w[i]);
        if (run->k) ql_tensor_free(&run->k[i]);
        if (run->v) ql_tensor_free(&run->v[i]);
    }
    free(run->w);
    free(run->k);
    free(run->v);
    ql_tensor *all[] = {&run->start, &run->pos,   &run->in[0],  &run->in[1],  &run->in[2],
                        &run->in[3], &run->in[4], &run->out[0], &run->out[1], &run->out[2]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ql_tensor_free(all[i]);
    *run = (ops_run){0};
}
