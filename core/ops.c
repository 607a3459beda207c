#include "ops.h"

#define OP(dev, entry)                                                                                       \
    do {                                                                                                     \
        if (!(dev)->backend->entry)                                                                          \
            return ql_err_set(err, QL_ERR_UNSUPPORTED, "the %s backend has no operation '%s'",               \
                              (dev)->backend->name, #entry);                                                 \
    } while (0)

#define REQUIRE(condition, name, ...)                                                                        \
    do {                                                                                                     \
        if (!(condition)) return ql_err_set(err, QL_ERR_ARG, name ": " __VA_ARGS__);                         \
    } while (0)

static bool is(const ql_tensor *t, ql_dtype dtype, int ndim)
{
    return t && t->storage && t->dtype == dtype && t->ndim == ndim;
}

static bool same_shape(const ql_tensor *a, const ql_tensor *b)
{
    if (a->ndim != b->ndim) return false;
    for (int i = 0; i < a->ndim; i++) {
        if (a->shape[i] != b->shape[i]) return false;
    }
    return true;
}

/* Two handles of one device share its memory. */
static bool same_device(const ql_device *x, const ql_device *y)
{
    return x && y && x->backend == y->backend && x->index == y->index;
}

/* Every tensor lies on `dev`; those that an operation may do without are NULL. */
static ql_status check_devices(const char *name, const ql_device *dev, const ql_tensor *const *all,
                               size_t count, ql_err *err)
{
    for (size_t i = 0; i < count; i++) {
        if (all[i] && !same_device(dev, ql_tensor_device(all[i])))
            return ql_err_set(err, QL_ERR_ARG, "%s: a tensor is empty or on another device than the others",
                              name);
    }
    return QL_OK;
}

#define TOGETHER(name, dev, ...)                                                                             \
    do {                                                                                                     \
        const ql_tensor *const together[] = {__VA_ARGS__};                                                   \
        ql_status apart = check_devices(name, dev, together, sizeof together / sizeof *together, err);       \
        if (apart != QL_OK) return apart;                                                                    \
    } while (0)

static const ql_tensor *present(const ql_tensor *t)
{
    return t->storage ? t : NULL;
}

/* 4-bit codes with their scales, in a form that their device has. */
static bool is_matrix_4bit(const ql_matrix *w)
{
    if (!is(&w->data, QL_U8, 1)) return false;
    const ql_backend *be = ql_tensor_device(&w->data)->backend;
    if (w->layout != 0 && !be->unpack4) return false;
    if (!w->nested.storage) return is(&w->absmax, QL_F32, 1);
    return be->nested_scales && is(&w->absmax, QL_U8, 1) && is(&w->nested, QL_F32, 1);
}

/* Dense [n, k] floats, or 4-bit. */
static bool is_matrix(const ql_matrix *w)
{
    if (w->quant) return is_matrix_4bit(w);
    return w->data.storage && ql_dtype_is_weight(w->data.dtype) && w->data.ndim == 2 &&
           w->data.shape[0] == w->n && w->data.shape[1] == w->k;
}

ql_status ql_op_embed(const ql_matrix *table, const ql_tensor *ids, ql_tensor *y, ql_err *err)
{
    ql_device *dev = ql_tensor_device(y);
    REQUIRE(is(ids, QL_I32, 1) && is(y, QL_F32, 2), "embed", "ids are I32 [T], output is F32 [T, H]");
    REQUIRE(!table->quant && is_matrix(table) && table->k == y->shape[1] && ids->shape[0] == y->shape[0],
            "embed", "the table is dense [V, H]");
    TOGETHER("embed", dev, y, ids, &table->data);
    OP(dev, embed);
    return dev->backend->embed(dev->ctx, table, ids, y, err);
}

ql_status ql_op_rmsnorm(const ql_tensor *x, const ql_tensor *w, float eps, ql_tensor *y, ql_err *err)
{
    ql_device *dev = ql_tensor_device(y);
    REQUIRE(is(x, QL_F32, 2) && is(w, QL_F32, 1) && is(y, QL_F32, 2) && same_shape(x, y) &&
                w->shape[0] == x->shape[1],
            "rmsnorm", "x and output are F32 [T, H], weight is F32 [H]");
    TOGETHER("rmsnorm", dev, y, x, w);
    OP(dev, rmsnorm);
    return dev->backend->rmsnorm(dev->ctx, x, w, eps, y, err);
}

ql_status ql_op_matmul(const ql_tensor *x, const ql_matrix *w, bool add, ql_tensor *y, ql_err *err)
{
    ql_device *dev = ql_tensor_device(y);
    REQUIRE(is(x, QL_F32, 2) && is(y, QL_F32, 2) && x->shape[0] == y->shape[0], "matmul",
            "x is F32 [T, k], output is F32 [T, n]");
    REQUIRE(is_matrix(w), "matmul", "the weight is neither dense [n, k] nor 4-bit");
    REQUIRE(x->shape[1] == w->k && y->shape[1] == w->n, "matmul",
            "the weight is [%lld, %lld], x has %lld columns", (long long)w->n, (long long)w->k,
            (long long)x->shape[1]);
    TOGETHER("matmul", dev, y, x, &w->data, present(&w->absmax), present(&w->nested), present(&w->bias));
    OP(dev, matmul);
    return dev->backend->matmul(dev->ctx, x, w, add, y, err);
}

ql_status ql_op_rope(ql_tensor *x, const ql_tensor *pos, const ql_tensor *cos, const ql_tensor *sin,
                     int heads, ql_err *err)
{
    ql_device *dev = ql_tensor_device(x);
    REQUIRE(is(x, QL_F32, 2) && is(pos, QL_I32, 1) && pos->shape[0] == x->shape[0], "rope",
            "x is F32 [T, heads*D], pos is I32 [T]");
    REQUIRE(is(cos, QL_F32, 2) && is(sin, QL_F32, 2) && same_shape(cos, sin) && heads > 0 &&
                x->shape[1] == 2 * cos->shape[1] * heads,
            "rope", "cos and sin are F32 [positions, D/2]");
    TOGETHER("rope", dev, x, pos, cos, sin);
    OP(dev, rope);
    return dev->backend->rope(dev->ctx, x, pos, cos, sin, heads, err);
}

/* [kv_heads, slots, D] of one float type, kv_heads * D = kv_columns. */
static bool cache_fits(ql_kv_view cache, int64_t kv_columns)
{
    return cache.k && ql_dtype_is_weight(cache.k->dtype) && is(cache.k, cache.k->dtype, 3) &&
           is(cache.v, cache.k->dtype, 3) && same_shape(cache.k, cache.v) &&
           cache.k->shape[0] * cache.k->shape[2] == kv_columns;
}

ql_status ql_op_kv_write(const ql_tensor *k, const ql_tensor *v, const ql_tensor *start, const ql_tensor *pos,
                         ql_kv_view cache, ql_err *err)
{
    ql_device *dev = ql_tensor_device(k);
    REQUIRE(is(k, QL_F32, 2) && is(v, QL_F32, 2) && same_shape(k, v) && is(start, QL_I32, 1) &&
                is(pos, QL_I32, 1) && start->shape[0] == k->shape[0] && pos->shape[0] == k->shape[0],
            "kv_write", "k and v are F32 [T, kv_heads*D], start and pos are I32 [T]");
    REQUIRE(cache_fits(cache, k->shape[1]), "kv_write",
            "keys and values of the cache are floats of one type, [kv_heads, slots, D]");
    TOGETHER("kv_write", dev, k, v, start, pos, cache.k, cache.v);
    OP(dev, kv_write);
    return dev->backend->kv_write(dev->ctx, k, v, start, pos, cache, err);
}

static bool is_run(const ql_tensor *cache, int64_t first, int64_t n)
{
    return first >= 0 && n >= 0 && first <= cache->shape[1] - n;
}

ql_status ql_op_kv_copy(ql_kv_view src, int64_t from, ql_kv_view dst, int64_t to, int64_t n, ql_err *err)
{
    REQUIRE(src.k && src.k->ndim == 3 && cache_fits(src, src.k->shape[0] * src.k->shape[2]) && dst.k &&
                dst.k->ndim == 3 && cache_fits(dst, dst.k->shape[0] * dst.k->shape[2]) &&
                src.k->dtype == dst.k->dtype && src.k->shape[0] == dst.k->shape[0] &&
                src.k->shape[2] == dst.k->shape[2],
            "kv_copy", "both caches hold keys and values of one type, [kv_heads, slots, D]");
    REQUIRE(is_run(src.k, from, n) && is_run(dst.k, to, n), "kv_copy",
            "%lld slots from %lld to %lld do not fit", (long long)n, (long long)from, (long long)to);
    ql_device *dev = ql_tensor_device(dst.k);
    TOGETHER("kv_copy", dev, src.k, src.v, dst.k, dst.v);
    OP(dev, kv_copy);
    return dev->backend->kv_copy(dev->ctx, src, from, dst, to, n, err);
}

ql_status ql_op_attention(const ql_tensor *q, ql_kv_view cache, const ql_tensor *start, const ql_tensor *pos,
                          int heads, ql_tensor *y, ql_err *err)
{
    ql_device *dev = ql_tensor_device(q);
    REQUIRE(is(q, QL_F32, 2) && is(y, QL_F32, 2) && same_shape(q, y) && is(start, QL_I32, 1) &&
                is(pos, QL_I32, 1) && start->shape[0] == q->shape[0] && pos->shape[0] == q->shape[0],
            "attention", "q and output are F32 [T, heads*D], start and pos are I32 [T]");
    REQUIRE(cache.k && cache.k->ndim == 3 && cache_fits(cache, cache.k->shape[0] * cache.k->shape[2]) &&
                heads > 0 && heads % cache.k->shape[0] == 0 && q->shape[1] == heads * cache.k->shape[2],
            "attention",
            "keys and values of the cache are floats of one type, [kv_heads, slots, D], and kv_heads divides "
            "heads");
    TOGETHER("attention", dev, q, y, start, pos, cache.k, cache.v);
    OP(dev, attention);
    return dev->backend->attention(dev->ctx, q, cache, start, pos, heads, y, err);
}

ql_status ql_op_swiglu(const ql_tensor *gate, const ql_tensor *up, ql_tensor *y, ql_err *err)
{
    ql_device *dev = ql_tensor_device(y);
    REQUIRE(is(gate, QL_F32, 2) && is(up, QL_F32, 2) && is(y, QL_F32, 2) && same_shape(gate, up) &&
                same_shape(gate, y),
            "swiglu", "gate, up and output are F32 [T, F]");
    TOGETHER("swiglu", dev, gate, up, y);
    OP(dev, swiglu);
    return dev->backend->swiglu(dev->ctx, gate, up, y, err);
}

ql_status ql_op_gather_rows(const ql_tensor *x, const ql_tensor *rows, ql_tensor *y, ql_err *err)
{
    ql_device *dev = ql_tensor_device(x);
    REQUIRE(is(x, QL_F32, 2) && is(rows, QL_I32, 1) && is(y, QL_F32, 2) && y->shape[0] == rows->shape[0] &&
                y->shape[1] == x->shape[1],
            "gather_rows", "x is F32 [T, H], rows is I32 [n], output is F32 [n, H]");
    TOGETHER("gather_rows", dev, x, rows, y);
    OP(dev, gather_rows);
    return dev->backend->gather_rows(dev->ctx, x, rows, y, err);
}

ql_status ql_op_pass(ql_device *dev, const ql_pass *p, ql_err *err)
{
    REQUIRE(is(p->workspace, QL_U8, 1) && is(p->logits, QL_F32, 2) && p->logits->shape[0] == p->outputs &&
                p->logits->shape[1] == p->vocab,
            "pass", "the workspace is U8, logits are F32 [outputs, V]");
    REQUIRE(p->tokens > 0 && p->outputs >= 0 && p->outputs <= p->tokens, "pass",
            "%lld logits of %lld tokens are wanted", (long long)p->outputs, (long long)p->tokens);
    REQUIRE(!p->embed->quant && is_matrix(p->embed) && is_matrix(p->lm_head) && is(p->norm, QL_F32, 1) &&
                is(p->cos, QL_F32, 2) && is(p->sin, QL_F32, 2) && same_shape(p->cos, p->sin),
            "pass", "embedding, head, norm and rotary tables do not make a network");
    TOGETHER("pass", dev, p->workspace, p->logits, &p->embed->data, &p->lm_head->data, p->norm, p->cos,
             p->sin);
    for (int i = 0; i < p->layers; i++) {
        const ql_matrix *linear = p->layer[i].linear;
        ql_kv_view cache = p->cache[i];
        REQUIRE(cache_fits(cache, (int64_t)p->kv_heads * p->head_dim), "pass",
                "layer %d: keys and values of the cache are floats of one type, [kv_heads, slots, D]", i);
        TOGETHER("pass", dev, cache.k, cache.v, &p->layer[i].input_norm, &p->layer[i].post_norm);
        for (int kind = 0; kind < QL_LINEARS; kind++) {
            REQUIRE(is_matrix(&linear[kind]), "pass", "layer %d: a weight is neither dense [n, k] nor 4-bit",
                    i);
            TOGETHER("pass", dev, &linear[kind].data, present(&linear[kind].absmax),
                     present(&linear[kind].nested), present(&linear[kind].bias));
        }
    }
    OP(dev, pass);
    return dev->backend->pass(dev->ctx, p, err);
}

ql_status ql_op_topk(const ql_tensor *x, int k, ql_tensor *values, ql_tensor *ids, ql_err *err)
{
    ql_device *dev = ql_tensor_device(x);
    REQUIRE(is(x, QL_F32, 2) && is(values, QL_F32, 2) && is(ids, QL_I32, 2) && same_shape(values, ids) &&
                values->shape[0] == x->shape[0] && values->shape[1] == k,
            "topk", "x is F32 [n, V], outputs are F32 and I32 [n, k]");
    REQUIRE(k >= 1 && k <= x->shape[1], "topk", "k = %d is outside 1..%lld", k, (long long)x->shape[1]);
    TOGETHER("topk", dev, x, values, ids);
    OP(dev, topk);
    return dev->backend->topk(dev->ctx, x, k, values, ids, err);
}

ql_status ql_op_logsumexp(const ql_tensor *x, double temperature, ql_tensor *out, ql_err *err)
{
    ql_device *dev = ql_tensor_device(x);
    REQUIRE(is(x, QL_F32, 2) && is(out, QL_F64, 1) && out->shape[0] == x->shape[0], "logsumexp",
            "x is F32 [n, V], output is F64 [n]");
    REQUIRE(temperature > 0, "logsumexp", "temperature %g is not above 0", temperature);
    TOGETHER("logsumexp", dev, x, out);
    OP(dev, logsumexp);
    return dev->backend->logsumexp(dev->ctx, x, temperature, out, err);
}

ql_status ql_op_row_stats(const ql_tensor *x, const ql_tensor *targets, ql_tensor *stats, ql_tensor *found,
                          ql_err *err)
{
    ql_device *dev = ql_tensor_device(x);
    REQUIRE(is(x, QL_F32, 2) && is(stats, QL_F64, 2) && stats->shape[0] == x->shape[0] &&
                stats->shape[1] == 3 && is(found, QL_I32, 2) && found->shape[0] == x->shape[0] &&
                found->shape[1] == 2,
            "row_stats", "x is F32 [n, V], outputs are F64 [n, 3] and I32 [n, 2]");
    REQUIRE(!targets || (is(targets, QL_I32, 1) && targets->shape[0] == x->shape[0]), "row_stats",
            "targets are I32 [n]");
    TOGETHER("row_stats", dev, x, targets, stats, found);
    OP(dev, row_stats);
    return dev->backend->row_stats(dev->ctx, x, targets, stats, found, err);
}

ql_status ql_op_softmax(const ql_tensor *x, double temperature, ql_tensor *y, ql_err *err)
{
    ql_device *dev = ql_tensor_device(x);
    REQUIRE(is(x, QL_F32, 2) && is(y, QL_F32, 2) && same_shape(x, y), "softmax",
            "x and output are F32 [n, V]");
    REQUIRE(temperature > 0, "softmax", "temperature %g is not above 0", temperature);
    TOGETHER("softmax", dev, x, y);
    OP(dev, softmax);
    return dev->backend->softmax(dev->ctx, x, temperature, y, err);
}

ql_status ql_op_gather_cols(const ql_tensor *x, const ql_tensor *cols, ql_tensor *out, ql_err *err)
{
    ql_device *dev = ql_tensor_device(x);
    REQUIRE(is(x, QL_F32, 2) && is(cols, QL_I32, 1) && is(out, QL_F32, 1) && cols->shape[0] == x->shape[0] &&
                out->shape[0] == x->shape[0],
            "gather_cols", "x is F32 [n, V], cols is I32 [n], output is F32 [n]");
    TOGETHER("gather_cols", dev, x, cols, out);
    OP(dev, gather_cols);
    return dev->backend->gather_cols(dev->ctx, x, cols, out, err);
}

ql_status ql_op_kl(const ql_tensor *a, const ql_tensor *b, ql_tensor *out, ql_err *err)
{
    ql_device *dev = ql_tensor_device(a);
    REQUIRE(is(a, QL_F32, 2) && is(b, QL_F32, 2) && same_shape(a, b) && is(out, QL_F64, 1) &&
                out->shape[0] == a->shape[0],
            "kl", "both logits are F32 [n, V], output is F64 [n]");
    TOGETHER("kl", dev, a, b, out);
    OP(dev, kl);
    return dev->backend->kl(dev->ctx, a, b, out, err);
}

ql_status ql_op_binary(ql_binary_op op, const ql_tensor *a, const ql_tensor *b, ql_tensor *y, ql_err *err)
{
    ql_device *dev = ql_tensor_device(a);
    REQUIRE(a->dtype == QL_F32 && b->dtype == QL_F32 && y->dtype == QL_F32 && same_shape(a, b) &&
                same_shape(a, y),
            "arithmetic", "operands are F32 tensors of one shape");
    TOGETHER("arithmetic", dev, a, b, y);
    OP(dev, binary);
    return dev->backend->binary(dev->ctx, op, a, b, 0, false, y, err);
}

ql_status ql_op_binary_scalar(ql_binary_op op, const ql_tensor *a, float scalar, bool reversed, ql_tensor *y,
                              ql_err *err)
{
    ql_device *dev = ql_tensor_device(a);
    REQUIRE(a->dtype == QL_F32 && y->dtype == QL_F32 && same_shape(a, y), "arithmetic",
            "the operand is an F32 tensor");
    TOGETHER("arithmetic", dev, a, y);
    OP(dev, binary);
    return dev->backend->binary(dev->ctx, op, a, NULL, scalar, reversed, y, err);
}

ql_status ql_op_convert(const ql_tensor *src, ql_tensor *dst, ql_err *err)
{
    ql_device *dev = ql_tensor_device(src);
    REQUIRE(ql_dtype_is_weight(src->dtype) && ql_dtype_is_weight(dst->dtype) && same_shape(src, dst),
            "convert", "source and destination are F32, F16 or BF16 of one shape");
    TOGETHER("convert", dev, src, dst);
    OP(dev, convert);
    return dev->backend->convert(dev->ctx, src, dst, err);
}

ql_status ql_op_find_bad(const ql_tensor *x, int64_t *at, ql_err *err)
{
    ql_device *dev = ql_tensor_device(x);
    *at = -1;
    REQUIRE(x->storage && ql_dtype_is_weight(x->dtype), "find_bad", "the tensor is not F32, F16 or BF16");
    OP(dev, find_bad);
    return dev->backend->find_bad(dev->ctx, x, at, err);
}

ql_status ql_op_random(uint64_t seed, uint64_t first, ql_tensor *y, ql_err *err)
{
    ql_device *dev = ql_tensor_device(y);
    REQUIRE(y->storage && ql_dtype_is_weight(y->dtype), "random", "the output is not F32, F16 or BF16");
    OP(dev, random);
    return dev->backend->random(dev->ctx, seed, first, y, err);
}

ql_status ql_op_quantize4(const ql_tensor *src, int block, const float thresholds[15],
                          const uint8_t order[16], int zero_code, ql_tensor *packed, ql_tensor *absmax,
                          ql_err *err)
{
    ql_device *dev = ql_tensor_device(src);
    int64_t n = ql_tensor_count(src);
    REQUIRE(block >= 32 && block <= 4096 && (block & (block - 1)) == 0, "quantize4",
            "block %d is not a power of two from 32 to 4096", block);
    REQUIRE(ql_dtype_is_weight(src->dtype) && is(packed, QL_U8, 1) && is(absmax, QL_F32, 1) &&
                packed->shape[0] == (n + 1) / 2 && absmax->shape[0] == (n + block - 1) / block,
            "quantize4",
            "source is F32, F16 or BF16, codes are U8 [ceil(n/2)], absmax is F32 [ceil(n/block)]");
    TOGETHER("quantize4", dev, src, packed, absmax);
    OP(dev, quantize4);
    return dev->backend->quantize4(dev->ctx, src, block, thresholds, order, zero_code, packed, absmax, err);
}

ql_status ql_op_dequantize4(const ql_matrix *w, ql_tensor *dst, ql_err *err)
{
    ql_device *dev = ql_tensor_device(dst);
    REQUIRE(w->quant && is_matrix(w) && ql_dtype_is_weight(dst->dtype) && dst->ndim == 2 &&
                dst->shape[0] == w->n && dst->shape[1] == w->k,
            "dequantize4", "the matrix is 4-bit and the output is a float tensor [n, k]");
    TOGETHER("dequantize4", dev, dst, &w->data, &w->absmax, present(&w->nested));
    OP(dev, dequantize4);
    return dev->backend->dequantize4(dev->ctx, w, dst, err);
}

/* `dst` takes the codes of a 4-bit matrix in another order. */
static bool takes_codes(const ql_matrix *w, const ql_tensor *dst)
{
    return w->quant && is_matrix(w) && is(dst, QL_U8, 1) && same_shape(&w->data, dst);
}

ql_status ql_op_pack4(const ql_matrix *w, ql_tensor *dst, int *layout, ql_err *err)
{
    ql_device *dev = ql_tensor_device(dst);
    *layout = 0;
    REQUIRE(takes_codes(w, dst) && w->layout == 0, "pack4",
            "the matrix is 4-bit in bitsandbytes' order and the output has its size");
    TOGETHER("pack4", dev, dst, &w->data);
    OP(dev, pack4);
    return dev->backend->pack4(dev->ctx, w, dst, layout, err);
}

ql_status ql_op_unpack4(const ql_matrix *w, ql_tensor *dst, ql_err *err)
{
    ql_device *dev = ql_tensor_device(dst);
    REQUIRE(takes_codes(w, dst), "unpack4", "the matrix is 4-bit and the output has the size of its codes");
    TOGETHER("unpack4", dev, dst, &w->data);
    OP(dev, unpack4);
    return dev->backend->unpack4(dev->ctx, w, dst, err);
}
