/* A packed batch through the whole network in one call.
 *
 * Per layer, where tensor cores take the weights and there are few tokens: pack (with the norm), q, k and v
 * in one launch, rope with the cache, attention straight to o's inputs, o onto the residual stream, pack,
 * gate and up straight to down's inputs, down onto the residual stream. More tokens, or other weights, take
 * the same steps by the kernels that backend_cuda_product.c chooses. Nothing waits for the device.
 */
#include "backend_cuda.h"

#include <string.h>

enum { EMBED_ARRAYS = 3 }; /* ids, start, pos */

/* Where everything lies in the workspace. */
typedef struct {
    int32_t *ids, *start, *pos, *out_token; /* in this order, in one piece */
    float *x, *q, *k, *v, *gate, *up;
    ql_cuda_room room;
    void *between; /* inputs of o, then of down, that a kernel before has written in 16 bits */
    void *attention;
    int64_t longest; /* the bound that launches depend on */
    size_t bytes;
} plan;

static void *take(char *base, size_t *at, size_t bytes)
{
    void *p = base ? base + *at : NULL;
    *at += ql_cuda_round(bytes);
    return p;
}

static bool fuses(ql_cuda *c, const ql_layer *layer, int64_t tokens)
{
    qk_cuda_weight gate = ql_cuda_weight(&layer->linear[QL_GATE], NULL);
    qk_cuda_weight up = ql_cuda_weight(&layer->linear[QL_UP], NULL);
    qk_cuda_weight down = ql_cuda_weight(&layer->linear[QL_DOWN], NULL);
    return ql_cuda_swiglu_fuses(c, &gate, &up, &down, tokens);
}

/* Whether two weights need the same. */
static bool alike(const ql_matrix *a, const ql_matrix *b)
{
    if (a->n != b->n || a->k != b->k || a->layout != b->layout || a->data.dtype != b->data.dtype)
        return false;
    if (!a->quant || !b->quant) return !a->quant && !b->quant;
    return a->quant->block == b->quant->block && a->quant->value_dtype == b->quant->value_dtype &&
           !a->nested.storage == !b->nested.storage;
}

static bool layers_alike(const ql_layer *a, const ql_layer *b)
{
    for (int i = 0; i < QL_LINEARS; i++) {
        if (!alike(&a->linear[i], &b->linear[i])) return false;
    }
    return true;
}

/* The largest need of all groups of products. Most layers are like the one before, and this is done for every
 * decoded token. */
static void needs(ql_cuda *c, const ql_pass *p, ql_cuda_need *need, size_t *between)
{
    for (int l = 0; l < p->layers; l++) {
        if (l > 0 && layers_alike(&p->layer[l], &p->layer[l - 1])) continue;
        for (int i = 0; i < QL_LINEARS; i++) {
            qk_cuda_weight w = ql_cuda_weight(&p->layer[l].linear[i], NULL);
            ql_cuda_product_need(c, &w, p->tokens, need);
            if (i != QL_O && !(i == QL_DOWN && fuses(c, &p->layer[l], p->tokens))) continue;
            size_t bytes = ql_cuda_form_bytes(ql_cuda_form_of(c, &w, p->tokens), p->tokens, w.w.k);
            if (*between < bytes) *between = bytes;
        }
    }
    qk_cuda_weight head = ql_cuda_weight(p->lm_head, NULL);
    if (p->outputs > 0) ql_cuda_product_need(c, &head, p->outputs, need);
}

static int64_t longest_row(const ql_pass *p)
{
    int64_t longest = 1;
    for (int64_t t = 0; t < p->tokens; t++) longest = p->pos[t] >= longest ? p->pos[t] + 1 : longest;
    return longest;
}

static qk_cuda_attention attention_of(const ql_pass *p, const plan *m, int layer)
{
    const ql_kv_view *cache = &p->cache[layer];
    return (qk_cuda_attention){
        .q = m->q,
        .k = cache->k->data,
        .v = cache->v->data,
        .kv = ql_cuda_format(cache->k->dtype),
        .start = m->start,
        .pos = m->pos,
        .heads = p->heads,
        .kv_heads = p->kv_heads,
        .d = (int)p->head_dim,
        .slots = cache->k->shape[1],
        .tokens = p->tokens,
        .longest = m->longest,
    };
}

/* One function lays out and counts, so that pass_bytes cannot differ from what pass uses. `base` may be NULL.
 */
static plan plan_make(ql_cuda *c, const ql_pass *p, char *base)
{
    const size_t t = (size_t)p->tokens, d = (size_t)p->head_dim, number = sizeof(float);
    ql_cuda_need need = {0};
    size_t between = 0, at = 0;
    needs(c, p, &need, &between);
    plan m = {.longest = ql_cuda_attention_bound(longest_row(p))};
    m.ids = take(base, &at, (EMBED_ARRAYS * t + (size_t)p->outputs) * sizeof *m.ids);
    if (base) {
        m.start = m.ids + t;
        m.pos = m.start + t;
        m.out_token = m.pos + t;
    }
    m.x = take(base, &at, t * (size_t)p->hidden * number);
    m.between = take(base, &at, between);
    m.room.packed = take(base, &at, need.packed);
    m.room.plain = take(base, &at, need.plain);
    m.room.slice[0] = take(base, &at, need.slice);
    m.room.slice[1] = take(base, &at, need.slice);
    m.room.blas = take(base, &at, need.blas);
    /* Attention and the gated layer take turns in what follows. */
    size_t mlp = at;
    m.q = take(base, &at, t * (size_t)p->heads * d * number);
    m.k = take(base, &at, t * (size_t)p->kv_heads * d * number);
    m.v = take(base, &at, t * (size_t)p->kv_heads * d * number);
    m.gate = take(base, &mlp, t * (size_t)p->intermediate * number);
    m.up = take(base, &mlp, t * (size_t)p->intermediate * number);
    if (at < mlp) at = mlp;
    qk_cuda_attention a = p->layers > 0 ? attention_of(p, &m, 0) : (qk_cuda_attention){0};
    m.attention = take(base, &at, p->layers > 0 ? ql_cuda_attention_need(c, &a) : 0);
    m.bytes = at;
    return m;
}

size_t ql_cuda_pass_bytes(void *ctx, const ql_pass *p)
{
    return plan_make(ctx, p, NULL).bytes;
}

/* ---- one layer ---- */

/* Attention into what o reads, then o onto x. */
static ql_status attend(ql_cuda *c, const ql_pass *p, const plan *m, int layer, ql_err *err)
{
    qk_cuda_weight o = ql_cuda_weight(&p->layer[layer].linear[QL_O], m->x);
    ql_cuda_form form = ql_cuda_form_of(c, &o, p->tokens);
    qk_cuda_attention a = attention_of(p, m, layer);
    if (form.plain) {
        a.y = m->between;
    } else {
        a.y16 = m->between;
        a.y_format = form.format;
        a.slab = form.slab;
    }
    QL_TRY(ql_cuda_attention_run(c, &a, m->attention, err));
    ql_cuda_input input = {.ready = m->between, .form = form};
    return ql_cuda_product_group(c, &m->room, &input, p->tokens, &o, 1, true, err);
}

/* silu(gate) * up, then down onto x. */
static ql_status gated(ql_cuda *c, const ql_pass *p, const plan *m, const ql_layer *layer, ql_err *err)
{
    qk_cuda_weight both[2] = {ql_cuda_weight(&layer->linear[QL_GATE], m->gate),
                              ql_cuda_weight(&layer->linear[QL_UP], m->up)};
    qk_cuda_weight down = ql_cuda_weight(&layer->linear[QL_DOWN], m->x);
    ql_cuda_input input = {
        .source = {.kind = QK_SOURCE_NORM, .x = m->x, .w = layer->post_norm.data, .eps = p->eps}};
    ql_cuda_input middle = {.source = {.kind = QK_SOURCE_SWIGLU, .x = m->gate, .up = m->up}};
    if (ql_cuda_swiglu_fuses(c, &both[0], &both[1], &down, p->tokens)) {
        middle.ready = m->between;
        middle.form = ql_cuda_form_of(c, &down, p->tokens);
        QL_TRY(ql_cuda_product_swiglu(c, &m->room, &input, p->tokens, &both[0], &both[1], middle.form,
                                      m->between, err));
    } else {
        QL_TRY(ql_cuda_product_group(c, &m->room, &input, p->tokens, both, 2, false, err));
    }
    return ql_cuda_product_group(c, &m->room, &middle, p->tokens, &down, 1, true, err);
}

static ql_status run_layer(ql_cuda *c, const ql_pass *p, const plan *m, int i, ql_err *err)
{
    const ql_layer *layer = &p->layer[i];
    const ql_kv_view *cache = &p->cache[i];
    qk_cuda_weight qkv[3] = {ql_cuda_weight(&layer->linear[QL_Q], m->q),
                             ql_cuda_weight(&layer->linear[QL_K], m->k),
                             ql_cuda_weight(&layer->linear[QL_V], m->v)};
    ql_cuda_input input = {
        .source = {.kind = QK_SOURCE_NORM, .x = m->x, .w = layer->input_norm.data, .eps = p->eps}};
    QL_TRY(ql_cuda_product_group(c, &m->room, &input, p->tokens, qkv, 3, false, err));
    QL_CUDA_RUN("rope_kv",
                qk_cuda_rope_kv(c->lane->stream, m->q, m->k, m->v, m->start, m->pos, p->cos->data,
                                p->sin->data, p->heads, p->kv_heads, (int)p->head_dim, cache->k->shape[1],
                                p->tokens, ql_cuda_format(cache->k->dtype), cache->k->data, cache->v->data));
    QL_TRY(attend(c, p, m, i, err));
    return gated(c, p, m, layer, err);
}

/* ---- the pass ---- */

static ql_status body(ql_cuda *c, const ql_pass *p, const void *laid, ql_err *err)
{
    const plan *m = laid;
    QL_CUDA_RUN("embed", qk_cuda_embed(c->lane->stream, ql_cuda_format(p->embed->data.dtype),
                                       p->embed->data.data, m->ids, p->tokens, p->hidden, m->x));
    for (int i = 0; i < p->layers; i++) QL_TRY(run_layer(c, p, m, i, err));
    if (p->outputs == 0) return QL_OK;
    qk_cuda_weight head = ql_cuda_weight(p->lm_head, p->logits->data);
    ql_cuda_input input = {
        .source = {
            .kind = QK_SOURCE_NORM, .x = m->x, .w = p->norm->data, .eps = p->eps, .rows = m->out_token}};
    return ql_cuda_product_group(c, &m->room, &input, p->outputs, &head, 1, false, err);
}

static ql_status send_indices(ql_cuda *c, const ql_pass *p, const plan *m, ql_err *err)
{
    const size_t each = (size_t)p->tokens * sizeof(int32_t), outputs = (size_t)p->outputs * sizeof(int32_t);
    if (EMBED_ARRAYS * each + outputs > QL_CUDA_STAGE)
        return ql_err_set(err, QL_ERR_ARG, "%s: %lld tokens in one pass", c->label, (long long)p->tokens);
    ql_cuda_stage *s;
    QL_TRY(ql_cuda_stage_take(c, &s, err));
    memcpy(s->host, p->ids, each);
    memcpy(s->host + each, p->start, each);
    memcpy(s->host + 2 * each, p->pos, each);
    if (outputs > 0) memcpy(s->host + 3 * each, p->out_token, outputs);
    return ql_cuda_stage_send(c, s, m->ids, EMBED_ARRAYS * each + outputs, err);
}

ql_status ql_cuda_pass(void *ctx, const ql_pass *p, ql_err *err)
{
    ql_cuda *c = ctx;
    QL_TRY(ql_cuda_enter(c, err));
    if (p->tokens == 0) return QL_OK;
    plan m = plan_make(c, p, p->workspace->data);
    if (m.bytes > (size_t)ql_cuda_count(p->workspace))
        return ql_err_set(err, QL_ERR_ARG, "%s: the workspace has %lld bytes, the pass needs %zu", c->label,
                          (long long)ql_cuda_count(p->workspace), m.bytes);
    QL_TRY(send_indices(c, p, &m, err));
    qk_cuda_attention first = attention_of(p, &m, 0);
    if (p->layers > 0) QL_TRY(ql_cuda_attention_clear(c, &first, m.attention, err));
    if (p->tokens > QK_PRODUCT_TOKENS) { /* fewer never decode on the side stream */
        QL_TRY(ql_cuda_product_begin(c, err));
        return body(c, p, &m, err);
    }
    ql_status status = ql_cuda_graph_run(c, p, m.longest, body, &m, err);
    /* A replay leaves no trace in the record of what is zero: forget it where it may have changed. */
    if (ql_cuda_attention_pieces(&first) > 1) c->zeroed.p = NULL;
    return status;
}
