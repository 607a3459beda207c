/* The CUDA backend's steps that are one launch each: tensors to pointers. Shapes have been checked by ops.c;
 * indices in device tensors by those who made them, except where noted.
 */
#include "backend_cuda.h"

#include <stdlib.h>

/* Each function below sees the context as `c`, on its device. */
#define ENTER                                                                                                \
    ql_cuda *c = ctx;                                                                                        \
    QL_TRY(ql_cuda_enter(c, err))
#define STREAM c->lane->stream

/* ---- a layer's steps ---- */

ql_status ql_cuda_embed(void *ctx, const ql_matrix *table, const ql_tensor *ids, ql_tensor *y, ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("embed", qk_cuda_embed(STREAM, ql_cuda_format(table->data.dtype), table->data.data, ids->data,
                                       ids->shape[0], table->k, y->data));
    return QL_OK;
}

ql_status ql_cuda_rmsnorm(void *ctx, const ql_tensor *x, const ql_tensor *w, float eps, ql_tensor *y,
                          ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("rmsnorm", qk_cuda_rmsnorm(STREAM, x->data, w->data, eps, x->shape[0], x->shape[1], y->data));
    return QL_OK;
}

ql_status ql_cuda_rope(void *ctx, ql_tensor *x, const ql_tensor *pos, const ql_tensor *cos,
                       const ql_tensor *sin, int heads, ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("rope", qk_cuda_rope(STREAM, x->data, pos->data, cos->data, sin->data, heads,
                                     (int)(x->shape[1] / heads), x->shape[0]));
    return QL_OK;
}

ql_status ql_cuda_kv_write(void *ctx, const ql_tensor *k, const ql_tensor *v, const ql_tensor *start,
                           const ql_tensor *pos, ql_kv_view cache, ql_err *err)
{
    ENTER;
    const int64_t *shape = cache.k->shape;
    QL_CUDA_RUN("kv_write", qk_cuda_kv_write(STREAM, k->data, v->data, start->data, pos->data, (int)shape[0],
                                             (int)shape[2], shape[1], k->shape[0],
                                             ql_cuda_format(cache.k->dtype), cache.k->data, cache.v->data));
    return QL_OK;
}

/* A head's slots lie together: one copy of kv_heads rows for the keys, one for the values. */
ql_status ql_cuda_kv_copy(void *ctx, ql_kv_view src, int64_t from, ql_kv_view dst, int64_t to, int64_t n,
                          ql_err *err)
{
    ENTER;
    const ql_tensor *const pairs[2][2] = {{src.k, dst.k}, {src.v, dst.v}};
    const size_t slot = (size_t)src.k->shape[2] * ql_dtype_size(src.k->dtype);
    const size_t in_pitch = (size_t)src.k->shape[1] * slot, out_pitch = (size_t)dst.k->shape[1] * slot;
    if (n == 0) return QL_OK;
    for (int i = 0; i < 2; i++) {
        QL_CUDA_RUN("kv_copy", cudaMemcpy2DAsync((char *)pairs[i][1]->data + (size_t)to * slot, out_pitch,
                                                 (const char *)pairs[i][0]->data + (size_t)from * slot,
                                                 in_pitch, (size_t)n * slot, (size_t)src.k->shape[0],
                                                 cudaMemcpyDeviceToDevice, STREAM));
    }
    return QL_OK;
}

ql_status ql_cuda_swiglu(void *ctx, const ql_tensor *gate, const ql_tensor *up, ql_tensor *y, ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("swiglu", qk_cuda_swiglu(STREAM, gate->data, up->data, ql_cuda_count(y), y->data));
    return QL_OK;
}

ql_status ql_cuda_gather_rows(void *ctx, const ql_tensor *x, const ql_tensor *rows, ql_tensor *y, ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("gather_rows",
                qk_cuda_gather_rows(STREAM, x->data, rows->data, rows->shape[0], x->shape[1], y->data));
    return QL_OK;
}

/* ---- rows of logits ---- */

ql_status ql_cuda_topk(void *ctx, const ql_tensor *x, int k, ql_tensor *values, ql_tensor *ids, ql_err *err)
{
    ENTER;
    char *scratch;
    QL_TRY(ql_cuda_scratch(c, qk_cuda_topk_bytes(x->shape[0], x->shape[1], k), &scratch, err));
    QL_CUDA_RUN("topk",
                qk_cuda_topk(STREAM, x->data, x->shape[0], x->shape[1], k, values->data, ids->data, scratch));
    return QL_OK;
}

ql_status ql_cuda_logsumexp(void *ctx, const ql_tensor *x, double temperature, ql_tensor *out, ql_err *err)
{
    ENTER;
    char *scratch;
    QL_TRY(ql_cuda_scratch(c, qk_cuda_logsumexp_bytes(x->shape[0], x->shape[1]), &scratch, err));
    QL_CUDA_RUN("logsumexp", qk_cuda_logsumexp(STREAM, x->data, x->shape[0], x->shape[1], temperature,
                                               out->data, scratch));
    return QL_OK;
}

ql_status ql_cuda_row_stats(void *ctx, const ql_tensor *x, const ql_tensor *targets, ql_tensor *stats,
                            ql_tensor *found, ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("row_stats", qk_cuda_row_stats(STREAM, x->data, targets ? targets->data : NULL, x->shape[0],
                                               x->shape[1], stats->data, found->data));
    return QL_OK;
}

ql_status ql_cuda_softmax(void *ctx, const ql_tensor *x, double temperature, ql_tensor *y, ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("softmax", qk_cuda_softmax(STREAM, x->data, x->shape[0], x->shape[1], temperature, y->data));
    return QL_OK;
}

/* The columns may be a script's own, so they are checked here; there is one a row. */
static ql_status check_columns(ql_cuda *c, const ql_tensor *cols, int64_t limit, ql_err *err)
{
    const int64_t n = cols->shape[0];
    int32_t *host = malloc((size_t)(n > 0 ? n : 1) * sizeof *host);
    if (!host) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    ql_status status = ql_cuda_download(c, host, cols->data, (size_t)n * sizeof *host, err);
    for (int64_t i = 0; i < n && status == QL_OK; i++) {
        if (host[i] < 0 || host[i] >= limit)
            status = ql_err_set(err, QL_ERR_ARG, "column %d at %lld is outside 0..%lld", host[i],
                                (long long)i, (long long)limit - 1);
    }
    free(host);
    return status;
}

ql_status ql_cuda_gather_cols(void *ctx, const ql_tensor *x, const ql_tensor *cols, ql_tensor *out,
                              ql_err *err)
{
    ENTER;
    QL_TRY(check_columns(c, cols, x->shape[1], err));
    QL_CUDA_RUN("gather_cols",
                qk_cuda_gather_cols(STREAM, x->data, cols->data, x->shape[0], x->shape[1], out->data));
    return QL_OK;
}

ql_status ql_cuda_kl(void *ctx, const ql_tensor *a, const ql_tensor *b, ql_tensor *out, ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("kl", qk_cuda_kl(STREAM, a->data, b->data, a->shape[0], a->shape[1], out->data));
    return QL_OK;
}

/* ---- elements ---- */

ql_status ql_cuda_binary(void *ctx, ql_binary_op op, const ql_tensor *a, const ql_tensor *b, float scalar,
                         bool reversed, ql_tensor *y, ql_err *err)
{
    static const qk_binary ops[] = {
        [QL_BIN_ADD] = QK_ADD, [QL_BIN_SUB] = QK_SUB, [QL_BIN_MUL] = QK_MUL, [QL_BIN_DIV] = QK_DIV};
    ENTER;
    QL_CUDA_RUN("binary", qk_cuda_binary(STREAM, ops[op], a->data, b ? b->data : NULL, scalar, reversed,
                                         ql_cuda_count(y), y->data));
    return QL_OK;
}

ql_status ql_cuda_convert(void *ctx, const ql_tensor *src, ql_tensor *dst, ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("convert", qk_cuda_convert(STREAM, ql_cuda_format(src->dtype), src->data,
                                           ql_cuda_format(dst->dtype), dst->data, ql_cuda_count(src)));
    return QL_OK;
}

ql_status ql_cuda_find_bad(void *ctx, const ql_tensor *x, int64_t *at, ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("find_bad",
                qk_cuda_find_bad(STREAM, ql_cuda_format(x->dtype), x->data, ql_cuda_count(x), c->cells));
    return ql_cuda_download(c, at, c->cells, sizeof *at, err);
}

ql_status ql_cuda_random(void *ctx, uint64_t seed, uint64_t first, ql_tensor *y, ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("random",
                qk_cuda_random(STREAM, seed, first, ql_cuda_format(y->dtype), ql_cuda_count(y), y->data));
    return QL_OK;
}

/* ---- 4-bit formats ---- */

ql_status ql_cuda_quantize4(void *ctx, const ql_tensor *src, int block, const float *thresholds,
                            const uint8_t *order, int zero_code, ql_tensor *packed, ql_tensor *absmax,
                            ql_err *err)
{
    ENTER;
    QL_CUDA_RUN("quantize4",
                qk_cuda_quantize4(STREAM, ql_cuda_format(src->dtype), src->data, ql_cuda_count(src), block,
                                  thresholds, order, zero_code, packed->data, absmax->data));
    return QL_OK;
}

ql_status ql_cuda_dequantize4(void *ctx, const ql_matrix *m, ql_tensor *dst, ql_err *err)
{
    ENTER;
    qk_cuda_weight w = ql_cuda_weight(m, NULL);
    QL_CUDA_RUN("dequantize4", qk_cuda_dequantize4(STREAM, &w, ql_cuda_format(dst->dtype), dst->data));
    return QL_OK;
}

/* Tiles are what the tensor-core product reads; a weight that it does not take stays as it is. */
ql_status ql_cuda_pack4(void *ctx, const ql_matrix *m, ql_tensor *dst, int *layout, ql_err *err)
{
    ENTER;
    *layout = QK_LAYOUT_ROWS;
    if (m->quant->value_dtype == QL_F32 || !qk_tiles_fit(m->n, m->k, m->quant->block)) return QL_OK;
    QL_CUDA_RUN("pack4", qk_cuda_tile4(STREAM, m->data.data, m->n, m->k, false, dst->data));
    *layout = QK_LAYOUT_TILES;
    return QL_OK;
}

ql_status ql_cuda_unpack4(void *ctx, const ql_matrix *m, ql_tensor *dst, ql_err *err)
{
    ENTER;
    if (m->layout == QK_LAYOUT_TILES) {
        QL_CUDA_RUN("unpack4", qk_cuda_tile4(STREAM, m->data.data, m->n, m->k, true, dst->data));
        return QL_OK;
    }
    QL_CUDA_RUN("unpack4", cudaMemcpyAsync(dst->data, m->data.data, (size_t)(m->n * m->k + 1) / 2,
                                           cudaMemcpyDeviceToDevice, STREAM));
    return QL_OK;
}
