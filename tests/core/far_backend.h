/* A device unlike the CPU, to prove that core asks a backend for everything: its addresses are not the host's
 * (touching one ends the program), fresh memory is poisoned, 4-bit codes lie in tiles, double-quantized
 * scales stay in 8 bits, whole passes run at once. The arithmetic is the CPU's, so results must be its bits.
 *
 * `far_backend` is a plain variable: a test may take an entry away or change a preference, and put it back.
 */
#ifndef FAR_BACKEND_H
#define FAR_BACKEND_H

#include "backend.h"
#include "mem.h"
#include "qk_pack.h"

#include <stdlib.h>
#include <string.h>

#define FAR_OFFSET ((uintptr_t)1 << 60) /* no address of x86-64 or arm64 */

static struct {
    long downloads;   /* copies to the host */
    size_t bytes;     /* in them */
    long passes;      /* whole passes */
    long moves;       /* of the workspace, from one pass to the next */
    const void *work; /* where the last one was */
    int64_t widest;   /* most tokens in a pass */
} far_seen;

static void *far_real(const void *p)
{
    return p ? (void *)((uintptr_t)p - FAR_OFFSET) : NULL;
}

/* The tensor as the CPU's functions take it. */
static ql_tensor near(const ql_tensor *t)
{
    ql_tensor n = *t;
    n.data = far_real(n.data);
    return n;
}

/* ---- memory ---- */

static int far_count(ql_err *err)
{
    (void)err;
    return 1;
}

static ql_status far_alloc(void *ctx, size_t bytes, void **out, ql_err *err)
{
    QL_TRY(ql_backend_cpu.alloc(ctx, bytes, out, err));
    memset(*out, 0xa5, bytes);
    *out = (void *)((uintptr_t)*out + FAR_OFFSET);
    return QL_OK;
}

static void far_free(void *ctx, void *p, size_t bytes)
{
    ql_backend_cpu.free(ctx, far_real(p), bytes);
}

static ql_status far_upload(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err)
{
    return ql_backend_cpu.upload(ctx, far_real(dst), src, bytes, err);
}

static ql_status far_download(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err)
{
    far_seen.downloads++;
    far_seen.bytes += bytes;
    return ql_backend_cpu.download(ctx, dst, far_real(src), bytes, err);
}

/* ---- matrices ---- */

/* Move the 16-byte pieces of `w` from tiles to rows, or back. */
static void far_permute(const ql_matrix *w, const uint8_t *from, uint8_t *to, bool into_tiles)
{
    for (int64_t row = 0; row < w->n; row++) {
        for (int64_t piece = 0; piece < w->k / 32; piece++) {
            int64_t plain = row * w->k / 2 + piece * 16, tiled = qk_tile_offset(row, piece, w->k);
            memcpy(to + (into_tiles ? tiled : plain), from + (into_tiles ? plain : tiled), 16);
        }
    }
}

static ql_status far_pack4(void *ctx, const ql_matrix *w, ql_tensor *dst, int *layout, ql_err *err)
{
    (void)ctx;
    (void)err;
    *layout = qk_tiles_fit(w->n, w->k, w->quant->block) ? QK_LAYOUT_TILES : QK_LAYOUT_ROWS;
    if (*layout) far_permute(w, far_real(w->data.data), far_real(dst->data), true);
    return QL_OK;
}

static ql_status far_unpack4(void *ctx, const ql_matrix *w, ql_tensor *dst, ql_err *err)
{
    (void)ctx;
    (void)err;
    if (w->layout)
        far_permute(w, far_real(w->data.data), far_real(dst->data), false);
    else
        memcpy(far_real(dst->data), far_real(w->data.data), ql_tensor_bytes(dst));
    return QL_OK;
}

/* The matrix in the CPU's form; `codes` and `scales` are the caller's to free. */
static ql_matrix near_matrix(const ql_matrix *w, void **codes, void **scales)
{
    ql_matrix n = *w;
    n.data = near(&w->data);
    n.absmax = near(&w->absmax);
    n.bias = near(&w->bias);
    *codes = *scales = NULL;
    if (w->layout) {
        *codes = malloc(ql_tensor_bytes(&w->data));
        far_permute(w, n.data.data, *codes, false);
        n.data.data = *codes;
    }
    if (w->nested.storage) {
        const float *map = far_real(w->nested.data);
        const uint8_t *byte = n.absmax.data;
        float *absmax = malloc(w->quant->blocks * sizeof *absmax);
        for (size_t b = 0; b < w->quant->blocks; b++) {
            float scaled = map[byte[b]] * map[257 + b / (size_t)w->quant->nested_block];
            absmax[b] = scaled + map[256];
        }
        n.absmax.data = *scales = absmax;
    }
    return n;
}

/* ---- operations ---- */

static ql_status far_embed(void *ctx, const ql_matrix *table, const ql_tensor *ids, ql_tensor *y, ql_err *err)
{
    ql_matrix m = *table;
    ql_tensor a = near(ids), b = near(y);
    m.data = near(&table->data);
    return ql_backend_cpu.embed(ctx, &m, &a, &b, err);
}

static ql_status far_rmsnorm(void *ctx, const ql_tensor *x, const ql_tensor *w, float eps, ql_tensor *y,
                             ql_err *err)
{
    ql_tensor a = near(x), b = near(w), c = near(y);
    return ql_backend_cpu.rmsnorm(ctx, &a, &b, eps, &c, err);
}

static ql_status far_matmul(void *ctx, const ql_tensor *x, const ql_matrix *w, bool add, ql_tensor *y,
                            ql_err *err)
{
    void *codes, *scales;
    ql_tensor a = near(x), b = near(y);
    ql_matrix m = near_matrix(w, &codes, &scales);
    ql_status status = ql_backend_cpu.matmul(ctx, &a, &m, add, &b, err);
    free(codes);
    free(scales);
    return status;
}

static ql_status far_rope(void *ctx, ql_tensor *x, const ql_tensor *pos, const ql_tensor *cos,
                          const ql_tensor *sin, int heads, ql_err *err)
{
    ql_tensor a = near(x), b = near(pos), c = near(cos), d = near(sin);
    return ql_backend_cpu.rope(ctx, &a, &b, &c, &d, heads, err);
}

static ql_status far_kv_write(void *ctx, const ql_tensor *k, const ql_tensor *v, const ql_tensor *start,
                              const ql_tensor *pos, ql_kv_view cache, ql_err *err)
{
    ql_tensor a = near(k), b = near(v), c = near(start), d = near(pos), e = near(cache.k), f = near(cache.v);
    return ql_backend_cpu.kv_write(ctx, &a, &b, &c, &d, (ql_kv_view){&e, &f}, err);
}

static ql_status far_kv_copy(void *ctx, ql_kv_view src, int64_t from, ql_kv_view dst, int64_t to, int64_t n,
                             ql_err *err)
{
    ql_tensor a = near(src.k), b = near(src.v), c = near(dst.k), d = near(dst.v);
    return ql_backend_cpu.kv_copy(ctx, (ql_kv_view){&a, &b}, from, (ql_kv_view){&c, &d}, to, n, err);
}

static ql_status far_attention(void *ctx, const ql_tensor *q, ql_kv_view cache, const ql_tensor *start,
                               const ql_tensor *pos, int heads, ql_tensor *y, ql_err *err)
{
    ql_tensor a = near(q), b = near(start), c = near(pos), d = near(y), e = near(cache.k), f = near(cache.v);
    return ql_backend_cpu.attention(ctx, &a, (ql_kv_view){&e, &f}, &b, &c, heads, &d, err);
}

static ql_status far_swiglu(void *ctx, const ql_tensor *gate, const ql_tensor *up, ql_tensor *y, ql_err *err)
{
    ql_tensor a = near(gate), b = near(up), c = near(y);
    return ql_backend_cpu.swiglu(ctx, &a, &b, &c, err);
}

static ql_status far_gather_rows(void *ctx, const ql_tensor *x, const ql_tensor *rows, ql_tensor *y,
                                 ql_err *err)
{
    ql_tensor a = near(x), b = near(rows), c = near(y);
    return ql_backend_cpu.gather_rows(ctx, &a, &b, &c, err);
}

static ql_status far_topk(void *ctx, const ql_tensor *x, int k, ql_tensor *values, ql_tensor *ids,
                          ql_err *err)
{
    ql_tensor a = near(x), b = near(values), c = near(ids);
    return ql_backend_cpu.topk(ctx, &a, k, &b, &c, err);
}

static ql_status far_logsumexp(void *ctx, const ql_tensor *x, double temperature, ql_tensor *out, ql_err *err)
{
    ql_tensor a = near(x), b = near(out);
    return ql_backend_cpu.logsumexp(ctx, &a, temperature, &b, err);
}

static ql_status far_row_stats(void *ctx, const ql_tensor *x, const ql_tensor *targets, ql_tensor *stats,
                               ql_tensor *found, ql_err *err)
{
    ql_tensor a = near(x), b = {0}, c = near(stats), d = near(found);
    if (targets) b = near(targets);
    return ql_backend_cpu.row_stats(ctx, &a, targets ? &b : NULL, &c, &d, err);
}

static ql_status far_softmax(void *ctx, const ql_tensor *x, double temperature, ql_tensor *y, ql_err *err)
{
    ql_tensor a = near(x), b = near(y);
    return ql_backend_cpu.softmax(ctx, &a, temperature, &b, err);
}

static ql_status far_gather_cols(void *ctx, const ql_tensor *x, const ql_tensor *cols, ql_tensor *out,
                                 ql_err *err)
{
    ql_tensor a = near(x), b = near(cols), c = near(out);
    return ql_backend_cpu.gather_cols(ctx, &a, &b, &c, err);
}

static ql_status far_kl(void *ctx, const ql_tensor *a, const ql_tensor *b, ql_tensor *out, ql_err *err)
{
    ql_tensor p = near(a), q = near(b), c = near(out);
    return ql_backend_cpu.kl(ctx, &p, &q, &c, err);
}

static ql_status far_binary(void *ctx, ql_binary_op op, const ql_tensor *a, const ql_tensor *b, float scalar,
                            bool reversed, ql_tensor *y, ql_err *err)
{
    ql_tensor p = near(a), q = {0}, c = near(y);
    if (b) q = near(b);
    return ql_backend_cpu.binary(ctx, op, &p, b ? &q : NULL, scalar, reversed, &c, err);
}

static ql_status far_convert(void *ctx, const ql_tensor *src, ql_tensor *dst, ql_err *err)
{
    ql_tensor a = near(src), b = near(dst);
    return ql_backend_cpu.convert(ctx, &a, &b, err);
}

static ql_status far_find_bad(void *ctx, const ql_tensor *x, int64_t *at, ql_err *err)
{
    ql_tensor a = near(x);
    return ql_backend_cpu.find_bad(ctx, &a, at, err);
}

static ql_status far_random(void *ctx, uint64_t seed, uint64_t first, ql_tensor *y, ql_err *err)
{
    ql_tensor a = near(y);
    return ql_backend_cpu.random(ctx, seed, first, &a, err);
}

static ql_status far_quantize4(void *ctx, const ql_tensor *src, int block, const float *thresholds,
                               const uint8_t *order, int zero_code, ql_tensor *packed, ql_tensor *absmax,
                               ql_err *err)
{
    ql_tensor a = near(src), b = near(packed), c = near(absmax);
    return ql_backend_cpu.quantize4(ctx, &a, block, thresholds, order, zero_code, &b, &c, err);
}

static ql_status far_dequantize4(void *ctx, const ql_matrix *w, ql_tensor *dst, ql_err *err)
{
    void *codes, *scales;
    ql_tensor a = near(dst);
    ql_matrix m = near_matrix(w, &codes, &scales);
    ql_status status = ql_backend_cpu.dequantize4(ctx, &m, &a, err);
    free(codes);
    free(scales);
    return status;
}

/* ---- a whole pass ---- */

/* The next piece of the workspace, as a tensor of the device. */
static ql_tensor far_take(const ql_pass *p, size_t *used, ql_dtype dtype, int64_t rows, int64_t cols)
{
    ql_tensor t = {.dtype = dtype, .ndim = cols ? 2 : 1, .shape = {rows, cols}};
    if (p->workspace) {
        t.storage = p->workspace->storage;
        t.data = (char *)p->workspace->data + *used;
    }
    *used += (size_t)(rows * (cols ? cols : 1)) * ql_dtype_size(dtype);
    return t;
}

typedef struct {
    ql_tensor ids, start, pos, rows, x, h, q, k, v, att, gate, up, picked;
    size_t bytes;
} far_work;

static far_work far_layout(const ql_pass *p)
{
    far_work w = {.bytes = 0};
    int64_t heads = p->heads * p->head_dim, kv = p->kv_heads * p->head_dim;
    ql_tensor *index[] = {&w.ids, &w.start, &w.pos};
    for (int i = 0; i < 3; i++) *index[i] = far_take(p, &w.bytes, QL_I32, p->tokens, 0);
    w.rows = far_take(p, &w.bytes, QL_I32, p->outputs, 0);
    w.x = far_take(p, &w.bytes, QL_F32, p->tokens, p->hidden);
    w.h = far_take(p, &w.bytes, QL_F32, p->tokens, p->hidden);
    w.q = far_take(p, &w.bytes, QL_F32, p->tokens, heads);
    w.k = far_take(p, &w.bytes, QL_F32, p->tokens, kv);
    w.v = far_take(p, &w.bytes, QL_F32, p->tokens, kv);
    w.att = far_take(p, &w.bytes, QL_F32, p->tokens, heads);
    w.gate = far_take(p, &w.bytes, QL_F32, p->tokens, p->intermediate);
    w.up = far_take(p, &w.bytes, QL_F32, p->tokens, p->intermediate);
    w.picked = far_take(p, &w.bytes, QL_F32, p->outputs, p->hidden);
    return w;
}

static size_t far_pass_bytes(void *ctx, const ql_pass *p)
{
    (void)ctx;
    ql_pass shape = *p;
    shape.workspace = NULL;
    return far_layout(&shape).bytes;
}

static ql_status far_layer(void *ctx, const ql_pass *p, const far_work *work, int i, ql_err *err)
{
    far_work w = *work;
    const ql_layer *layer = &p->layer[i];
    const ql_matrix *linear = layer->linear;
    QL_TRY(far_rmsnorm(ctx, &w.x, &layer->input_norm, p->eps, &w.h, err));
    QL_TRY(far_matmul(ctx, &w.h, &linear[QL_Q], false, &w.q, err));
    QL_TRY(far_matmul(ctx, &w.h, &linear[QL_K], false, &w.k, err));
    QL_TRY(far_matmul(ctx, &w.h, &linear[QL_V], false, &w.v, err));
    QL_TRY(far_rope(ctx, &w.q, &w.pos, p->cos, p->sin, p->heads, err));
    QL_TRY(far_rope(ctx, &w.k, &w.pos, p->cos, p->sin, p->kv_heads, err));
    QL_TRY(far_kv_write(ctx, &w.k, &w.v, &w.start, &w.pos, p->cache[i], err));
    QL_TRY(far_attention(ctx, &w.q, p->cache[i], &w.start, &w.pos, p->heads, &w.att, err));
    QL_TRY(far_matmul(ctx, &w.att, &linear[QL_O], true, &w.x, err));
    QL_TRY(far_rmsnorm(ctx, &w.x, &layer->post_norm, p->eps, &w.h, err));
    QL_TRY(far_matmul(ctx, &w.h, &linear[QL_GATE], false, &w.gate, err));
    QL_TRY(far_matmul(ctx, &w.h, &linear[QL_UP], false, &w.up, err));
    QL_TRY(far_swiglu(ctx, &w.gate, &w.up, &w.gate, err));
    return far_matmul(ctx, &w.gate, &linear[QL_DOWN], true, &w.x, err);
}

static ql_status far_pass(void *ctx, const ql_pass *p, ql_err *err)
{
    far_work w = far_layout(p);
    if (ql_tensor_bytes(p->workspace) != w.bytes)
        return ql_err_set(err, QL_ERR_ARG, "a workspace of %zu bytes where %zu were asked for",
                          ql_tensor_bytes(p->workspace), w.bytes);
    far_seen.passes++;
    far_seen.moves += far_seen.work != p->workspace->data;
    far_seen.work = p->workspace->data;
    if (p->tokens > far_seen.widest) far_seen.widest = p->tokens;
    memcpy(far_real(w.ids.data), p->ids, (size_t)p->tokens * sizeof *p->ids);
    memcpy(far_real(w.start.data), p->start, (size_t)p->tokens * sizeof *p->start);
    memcpy(far_real(w.pos.data), p->pos, (size_t)p->tokens * sizeof *p->pos);
    memcpy(far_real(w.rows.data), p->out_token, (size_t)p->outputs * sizeof *p->out_token);
    QL_TRY(far_embed(ctx, p->embed, &w.ids, &w.x, err));
    for (int i = 0; i < p->layers; i++) QL_TRY(far_layer(ctx, p, &w, i, err));
    QL_TRY(far_gather_rows(ctx, &w.x, &w.rows, &w.picked, err));
    QL_TRY(far_rmsnorm(ctx, &w.picked, p->norm, p->eps, &w.picked, err));
    return far_matmul(ctx, &w.picked, p->lm_head, false, p->logits, err);
}

static ql_backend far_backend = {
    .name = "far",
    .abi = QL_BACKEND_ABI,
    .kv_dtype = QL_F32,
    .pass_tokens = 24,
    .nested_scales = true,
    .count = far_count,
    .alloc = far_alloc,
    .free = far_free,
    .upload = far_upload,
    .download = far_download,
    .embed = far_embed,
    .rmsnorm = far_rmsnorm,
    .matmul = far_matmul,
    .rope = far_rope,
    .kv_write = far_kv_write,
    .kv_copy = far_kv_copy,
    .attention = far_attention,
    .swiglu = far_swiglu,
    .gather_rows = far_gather_rows,
    .pass_bytes = far_pass_bytes,
    .pass = far_pass,
    .topk = far_topk,
    .logsumexp = far_logsumexp,
    .row_stats = far_row_stats,
    .softmax = far_softmax,
    .gather_cols = far_gather_cols,
    .kl = far_kl,
    .binary = far_binary,
    .convert = far_convert,
    .find_bad = far_find_bad,
    .random = far_random,
    .quantize4 = far_quantize4,
    .dequantize4 = far_dequantize4,
    .pack4 = far_pack4,
    .unpack4 = far_unpack4,
};

/* Released as any device, by ql_device_release. */
static ql_status far_open(ql_device **out, ql_err *err)
{
    ql_device *dev = ql_calloc(1, sizeof *dev);
    if (!dev) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    far_backend.open = ql_backend_cpu.open;
    far_backend.close = ql_backend_cpu.close;
    far_backend.info = ql_backend_cpu.info;
    far_backend.sync = ql_backend_cpu.sync;
    dev->backend = &far_backend;
    dev->refs = 1;
    strcpy(dev->label, "far:0");
    *out = dev;
    return ql_backend_cpu.open(0, &(ql_device_options){.threads = 1}, &dev->ctx, err);
}

#endif
