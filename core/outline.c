#include "outline.h"

#include "mem.h"
#include "qk_pack.h"

#include <stdio.h>
#include <string.h>

/* ---- a device that has no memory and computes nothing ---- */

typedef struct {
    ql_backend backend;
    ql_device *real; /* one reference */
} outline_device;

static ql_status refuse(ql_err *err)
{
    ql_err_set(err, QL_ERR_UNSUPPORTED, "the outline of a model has no weights: it cannot be run or saved");
    return ql_err_hint(err, "load the model");
}

static ql_status outline_alloc(void *ctx, size_t bytes, void **out, ql_err *err)
{
    static char nothing[64];
    (void)ctx;
    (void)bytes;
    (void)err;
    *out = nothing; /* an address for those who ask whether there is one */
    return QL_OK;
}

static void outline_free(void *ctx, void *p, size_t bytes)
{
    (void)ctx;
    (void)p;
    (void)bytes;
}

static ql_status outline_upload(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err)
{
    (void)ctx;
    (void)dst;
    (void)src;
    (void)bytes;
    return refuse(err);
}

static ql_status outline_download(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err)
{
    (void)ctx;
    (void)dst;
    (void)src;
    (void)bytes;
    return refuse(err);
}

static ql_status outline_find_bad(void *ctx, const ql_tensor *x, int64_t *at, ql_err *err)
{
    (void)ctx;
    (void)x;
    *at = -1;
    return refuse(err);
}

static ql_status outline_sync(void *ctx, ql_err *err)
{
    (void)ctx;
    (void)err;
    return QL_OK;
}

static ql_status outline_info(void *ctx, ql_device_info *out, ql_err *err)
{
    const outline_device *o = ctx;
    return o->real->backend->info(o->real->ctx, out, err);
}

static size_t outline_pass_bytes(void *ctx, const ql_pass *p)
{
    const outline_device *o = ctx;
    return o->real->backend->pass_bytes(o->real->ctx, p);
}

static ql_status outline_pass(void *ctx, const ql_pass *p, ql_err *err)
{
    (void)ctx;
    (void)p;
    return refuse(err);
}

static void outline_close(void *ctx)
{
    outline_device *o = ctx;
    ql_device_release(o->real);
    ql_free(o);
}

/* One reference for the caller. */
static ql_status device_new(ql_device *real, ql_device **out, ql_err *err)
{
    const ql_backend *be = real->backend;
    ql_device *dev = ql_calloc(1, sizeof *dev);
    outline_device *o = ql_calloc(1, sizeof *o);
    if (!dev || !o) {
        ql_free(dev);
        ql_free(o);
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    }
    o->real = ql_device_retain(real);
    o->backend = (ql_backend){.name = be->name,
                              .abi = be->abi,
                              .kv_dtype = be->kv_dtype,
                              .pass_tokens = be->pass_tokens,
                              .nested_scales = be->nested_scales,
                              .close = outline_close,
                              .info = outline_info,
                              .alloc = outline_alloc,
                              .free = outline_free,
                              .upload = outline_upload,
                              .download = outline_download,
                              .sync = outline_sync,
                              .find_bad = outline_find_bad,
                              .pass_bytes = be->pass_bytes ? outline_pass_bytes : NULL,
                              .pass = be->pass ? outline_pass : NULL};
    *dev = (ql_device){.backend = &o->backend, .ctx = o, .index = real->index, .refs = 1};
    memcpy(dev->label, real->label, sizeof dev->label);
    *out = dev;
    return QL_OK;
}

/* ---- weights ---- */

typedef struct {
    ql_device *dev, *real;
    ql_arena *arena;
    const ql_config *config;
    const ql_checkpoint *ck; /* NULL: random weights */
    ql_dtype dtype;          /* QL_DTYPE_COUNT: as stored */
    ql_quant_policy policy;  /* may be NULL */
    void *ud;
} drawing;

static ql_status outline_vector(const drawing *d, int64_t n, ql_tensor *out, ql_err *err)
{
    return ql_tensor_new_1d(d->dev, d->arena, QL_MEM_WEIGHTS, QL_F32, n, out, err);
}

/* The type that a dense matrix will have. */
static ql_status dense_dtype(const drawing *d, const char *module, ql_dtype *out, ql_err *err)
{
    *out = d->dtype;
    if (*out != QL_DTYPE_COUNT || !d->ck) return QL_OK;
    char name[96];
    const ql_st_tensor *stored;
    snprintf(name, sizeof name, "%s.weight", module);
    QL_TRY(ql_checkpoint_need(d->ck, name, &stored, err));
    *out = stored->dtype;
    if (ql_dtype_is_weight(*out)) return QL_OK;
    return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: tensor '%s' is %s", ql_checkpoint_file(d->ck, stored),
                      name, ql_dtype_name(*out));
}

static ql_status outline_dense(const drawing *d, const char *module, int64_t n, int64_t k, ql_matrix *out,
                               ql_err *err)
{
    QL_TRY(dense_dtype(d, module, &out->dtype, err));
    out->n = n;
    out->k = k;
    return ql_tensor_new_2d(d->dev, d->arena, QL_MEM_WEIGHTS, out->dtype, n, k, &out->data, err);
}

/* Scales in the form that the device keeps, see ql_matrix; `q` has its blocks. */
static ql_status outline_scales(const drawing *d, ql_quant *q, ql_matrix *out, ql_err *err)
{
    const int64_t blocks = (int64_t)q->blocks;
    if (q->nested) {
        q->nested_blocks = (q->blocks + (size_t)q->nested_block - 1) / (size_t)q->nested_block;
        if (d->dev->backend->nested_scales) {
            QL_TRY(ql_tensor_new_1d(d->dev, d->arena, QL_MEM_WEIGHTS, QL_U8, blocks, &out->absmax, err));
            return ql_tensor_new_1d(d->dev, d->arena, QL_MEM_WEIGHTS, QL_F32, 257 + (int64_t)q->nested_blocks,
                                    &out->nested, err);
        }
        q->absmax8 = ql_malloc(q->blocks); /* never written: it costs addresses only */
        if (!q->absmax8)
            return ql_err_set(err, QL_ERR_MEMORY, "out of memory for the scales of %zu blocks", q->blocks);
    }
    return ql_tensor_new_1d(d->dev, d->arena, QL_MEM_WEIGHTS, QL_F32, blocks, &out->absmax, err);
}

static ql_status outline_4bit(const drawing *d, const ql_quant *like, int64_t n, int64_t k, ql_matrix *out,
                              ql_err *err)
{
    ql_quant *q = ql_calloc(1, sizeof *q);
    if (!q) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    *q = *like;
    q->refs = 1;
    q->blocks = (size_t)((n * k - 1) / q->block + 1);
    out->quant = q;
    out->n = n;
    out->k = k;
    out->dtype = q->value_dtype;
    QL_TRY(ql_tensor_new_1d(d->dev, d->arena, QL_MEM_WEIGHTS, QL_U8, (n * k + 1) / 2, &out->data, err));
    QL_TRY(outline_scales(d, q, out, err));
    /* Where there is an order of the device's own, products ask for other workspaces. */
    if (d->real->backend->pack4 && qk_tiles_fit(n, k, q->block)) out->layout = QK_LAYOUT_TILES;
    ql_quant_charge(q, d->arena);
    return QL_OK;
}

/* A weight that is stored in 4 bits. */
static ql_status outline_stored(const drawing *d, const char *name, int64_t n, int64_t k, ql_matrix *out,
                                ql_err *err)
{
    ql_quant_tensor qt;
    QL_TRY(ql_checkpoint_quant(d->ck, name, &qt, err));
    ql_quant like = {.block = qt.state.block,
                     .value_dtype = qt.state.dtype,
                     .nested = qt.state.nested,
                     .nested_block = qt.state.nested_block};
    snprintf(like.scheme, sizeof like.scheme, "%s", qt.state.type);
    return outline_4bit(d, &like, n, k, out, err);
}

/* What the policy wants of a matrix, in `like`; like->block is 0 where it leaves the matrix alone. */
static ql_status ask_policy(const drawing *d, const char *module, int64_t n, int64_t k, const char *dense,
                            const ql_quant *now, ql_quant *like, ql_err *err)
{
    memset(like, 0, sizeof *like);
    bool wanted;
    ql_quant_spec spec;
    QL_TRY(ql_weights_ask(d->policy, d->ud, module, n, k, now, &spec, &wanted, err));
    if (!wanted) return QL_OK;
    *like = (ql_quant){.block = spec.block,
                       .value_dtype = spec.value_dtype,
                       .nested = spec.double_quant,
                       .nested_block = QL_QUANT_NESTED_BLOCK};
    memcpy(like->scheme, spec.scheme, sizeof like->scheme);
    if (spec.value_dtype != QL_QUANT_VALUE_DENSE) return QL_OK;
    return dense_dtype(d, dense, &like->value_dtype, err);
}

static ql_status outline_matrix(const drawing *d, const char *module, int64_t n, int64_t k, ql_matrix *out,
                                ql_err *err)
{
    char name[96];
    ql_quant like;
    snprintf(name, sizeof name, "%s.weight", module);
    bool stored = d->ck && ql_checkpoint_is_quantized(d->ck, name);
    if (stored) QL_TRY(outline_stored(d, name, n, k, out, err));
    QL_TRY(ask_policy(d, module, n, k, module, out->quant, &like, err));
    if (stored) return QL_OK;
    return like.block ? outline_4bit(d, &like, n, k, out, err) : outline_dense(d, module, n, k, out, err);
}

/* A head that is tied to the embedding parts from it when it is quantized. */
static ql_status outline_tied_head(const drawing *d, ql_weights *w, ql_err *err)
{
    ql_quant like;
    QL_TRY(ask_policy(d, "lm_head", w->embed.n, w->embed.k, "model.embed_tokens", NULL, &like, err));
    if (like.block) return outline_4bit(d, &like, w->embed.n, w->embed.k, &w->lm_head, err);
    w->lm_head = ql_matrix_ref(&w->embed);
    return QL_OK;
}

static ql_status outline_layer(const drawing *d, int64_t i, ql_layer *layer, ql_err *err)
{
    const ql_config *c = d->config;
    QL_TRY(outline_vector(d, c->hidden, &layer->input_norm, err));
    QL_TRY(outline_vector(d, c->hidden, &layer->post_norm, err));
    for (int kind = 0; kind < QL_LINEARS; kind++) {
        char module[64];
        int64_t n, k;
        ql_linear_shape(c, kind, &n, &k);
        QL_TRY(outline_matrix(d, ql_linear_name(i, kind, module), n, k, &layer->linear[kind], err));
        if (ql_linear_has_bias(c, kind)) QL_TRY(outline_vector(d, n, &layer->linear[kind].bias, err));
    }
    return QL_OK;
}

static ql_status outline_weights(const drawing *d, ql_weights *w, ql_err *err)
{
    const ql_config *c = d->config;
    QL_TRY(ql_weights_new(c->layers, w, err));
    QL_TRY(outline_dense(d, "model.embed_tokens", c->vocab, c->hidden, &w->embed, err));
    w->dtype = w->embed.dtype;
    QL_TRY(outline_vector(d, c->hidden, &w->norm, err));
    if (c->tie_embeddings)
        QL_TRY(outline_tied_head(d, w, err));
    else
        QL_TRY(outline_matrix(d, "lm_head", c->vocab, c->hidden, &w->lm_head, err));
    for (int64_t i = 0; i < c->layers; i++) QL_TRY(outline_layer(d, i, &w->layer[i], err));
    return QL_OK;
}

/* ---- models ---- */

static ql_status draw(ql_device *real, ql_llama *m, const ql_checkpoint *ck, ql_dtype dtype,
                      ql_quant_policy policy, void *ud, ql_err *err)
{
    drawing d = {.dev = m->device,
                 .real = real,
                 .arena = m->arena,
                 .config = &m->config,
                 .ck = ck,
                 .dtype = dtype,
                 .policy = policy,
                 .ud = ud};
    return outline_weights(&d, &m->weights, err);
}

/* `config` is moved in and emptied. */
static ql_status model_new(ql_device *real, ql_config *config, ql_llama **out, ql_err *err)
{
    ql_device *dev = NULL;
    ql_status status = device_new(real, &dev, err);
    if (status != QL_OK) {
        ql_config_free(config);
        return status;
    }
    status = ql_llama_new(dev, config, out, err);
    ql_device_release(dev);
    return status;
}

ql_status ql_outline_load(ql_device *dev, const char *folder, const ql_load_options *options,
                          ql_quant_policy policy, void *ud, ql_llama **out, ql_err *err)
{
    *out = NULL;
    ql_config config;
    ql_llama *m = NULL;
    ql_checkpoint *ck = NULL;
    QL_TRY(ql_config_load(folder, &config, err));
    QL_TRY(model_new(dev, &config, &m, err));
    ql_status status = ql_llama_place(m, folder, options->max_context, err);
    if (status == QL_OK) status = ql_checkpoint_open(folder, &ck, err);
    if (status == QL_OK) status = draw(dev, m, ck, options->dtype, policy, ud, err);
    ql_checkpoint_close(ck);
    if (status != QL_OK) {
        ql_llama_free(m);
        return status;
    }
    *out = m;
    return QL_OK;
}

ql_status ql_outline_random(ql_device *dev, const ql_config *config, ql_dtype dtype, ql_quant_policy policy,
                            void *ud, ql_llama **out, ql_err *err)
{
    *out = NULL;
    ql_config copy = *config; /* shapes of random models own nothing */
    ql_llama *m = NULL;
    QL_TRY(model_new(dev, &copy, &m, err));
    ql_status status = draw(dev, m, NULL, dtype, policy, ud, err);
    if (status != QL_OK) {
        ql_llama_free(m);
        return status;
    }
    *out = m;
    return QL_OK;
}
