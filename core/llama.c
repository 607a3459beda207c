#include "llama.h"

#include "interrupt.h"
#include "mem.h"
#include "ops.h"
#include "process.h"

#include <stdio.h>
#include <string.h>

/* Smaller requests are not worth asking the system how much memory is left. */
#define CHECKED_BYTES ((size_t)32 << 20)

/* Charged, not held: the backend keeps it for its next pass, whosever that is. */
static void charge_own(ql_llama *m, size_t bytes)
{
    ql_arena_refund(m->arena, QL_MEM_ACTIVATIONS, m->work.own);
    ql_arena_charge(m->arena, QL_MEM_ACTIVATIONS, bytes);
    m->work.own = bytes;
}

static void work_free(ql_llama *m)
{
    struct ql_llama_work *w = &m->work;
    charge_own(m, 0);
    ql_tensor *all[] = {&w->x, &w->h, &w->q, &w->k, &w->v, &w->att, &w->gate, &w->up, &w->workspace};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) ql_tensor_free(all[i]);
    w->tokens = 0;
}

/* Widths of the working tensors, in the order of work_reserve. */
static void work_widths(const ql_config *c, int64_t widths[8])
{
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    const int64_t all[8] = {c->hidden, c->hidden, q, kv, kv, q, c->intermediate, c->intermediate};
    memcpy(widths, all, sizeof all);
}

/* Working memory for exactly `tokens` rows: kept between passes of one size, so that decoding does not
 * allocate, and never larger than the pass in hand, so that its high-water mark says what the pass needs. */
static ql_status work_reserve(ql_llama *m, int64_t tokens, ql_err *err)
{
    struct ql_llama_work *w = &m->work;
    if (w->tokens == tokens) return QL_OK;
    work_free(m);
    ql_tensor *all[] = {&w->x, &w->h, &w->q, &w->k, &w->v, &w->att, &w->gate, &w->up};
    int64_t widths[8];
    work_widths(&m->config, widths);
    for (int i = 0; i < 8; i++) {
        ql_status status =
            ql_tensor_new_2d(m->device, m->arena, QL_MEM_ACTIVATIONS, QL_F32, tokens, widths[i], all[i], err);
        if (status != QL_OK) {
            work_free(m);
            return status;
        }
    }
    w->tokens = tokens;
    return QL_OK;
}

/* The same rule for a backend that runs whole passes. Its address stays while the size does: a backend may
 * replay a recorded pass that holds addresses. */
static ql_status workspace_reserve(ql_llama *m, size_t bytes, ql_err *err)
{
    struct ql_llama_work *w = &m->work;
    if (w->workspace.storage && ql_tensor_bytes(&w->workspace) == bytes) return QL_OK;
    work_free(m);
    return ql_tensor_new_1d(m->device, m->arena, QL_MEM_ACTIVATIONS, QL_U8, (int64_t)bytes, &w->workspace,
                            err);
}

/* The network's part of a pass. */
static ql_pass pass_of(const ql_llama *m, const ql_kv_view *cache)
{
    const ql_config *c = &m->config;
    const ql_weights *w = &m->weights;
    return (ql_pass){.hidden = c->hidden,
                     .intermediate = c->intermediate,
                     .vocab = c->vocab,
                     .head_dim = c->head_dim,
                     .heads = (int)c->heads,
                     .kv_heads = (int)c->kv_heads,
                     .layers = (int)w->layers,
                     .eps = (float)c->rms_eps,
                     .layer = w->layer,
                     .embed = &w->embed,
                     .lm_head = &w->lm_head,
                     .norm = &w->norm,
                     .cos = &m->rope.cos,
                     .sin = &m->rope.sin,
                     .cache = cache};
}

/* Of a pass over a piece: a workspace; or, as the steps take it, working tensors with the id, start and
 * position of each token, the wanted rows before and after the last norm with the index of each, and the
 * backend's own. */
static size_t expect_piece(const ql_llama *m, const ql_pass *p)
{
    const ql_backend *be = m->device->backend;
    size_t bytes = be->pass_bytes ? be->pass_bytes(m->device->ctx, p) : 0;
    if (be->pass) return bytes;
    int64_t widths[8], sum = 3;
    work_widths(&m->config, widths);
    for (int i = 0; i < 8; i++) sum += widths[i];
    return bytes + (size_t)(sum * p->tokens + p->outputs * (2 * p->hidden + 1)) * sizeof(float);
}

/* The most among the pieces of a batch of rows of `longest` tokens. */
static ql_status expect_work(const ql_llama *m, int64_t tokens, int64_t longest, int64_t outputs,
                             size_t *bytes, ql_err *err)
{
    const ql_backend *be = m->device->backend;
    int64_t step = tokens < be->pass_tokens ? tokens : be->pass_tokens;
    ql_tensor slots = {
        .dtype = ql_llama_kv_dtype(m), .ndim = 3, .shape = {m->config.kv_heads, tokens, m->config.head_dim}};
    ql_kv_view *views = ql_calloc((size_t)m->config.layers, sizeof *views);
    int32_t *index = ql_calloc((size_t)step, 4 * sizeof *index);
    *bytes = 0;
    if (longest < 1) longest = 1;
    for (int64_t i = 0; views && i < m->config.layers; i++) views[i] = (ql_kv_view){&slots, &slots};
    for (int64_t first = 0; views && index && first < tokens; first += step) {
        ql_pass p = pass_of(m, views);
        p.tokens = tokens - first < step ? tokens - first : step;
        p.outputs = outputs < p.tokens ? outputs : p.tokens;
        for (int64_t i = 0; i < p.tokens; i++) {
            index[step + i] = (int32_t)((first + i) / longest * longest);
            index[2 * step + i] = (int32_t)((first + i) % longest);
            if (i < p.outputs) index[3 * step + i] = (int32_t)(p.tokens - p.outputs + i);
        }
        p.ids = index;
        p.start = index + step;
        p.pos = index + 2 * step;
        p.out_token = index + 3 * step;
        size_t need = expect_piece(m, &p);
        if (need > *bytes) *bytes = need;
    }
    bool complete = views && index;
    ql_free(views);
    ql_free(index);
    return complete ? QL_OK : ql_err_set(err, QL_ERR_MEMORY, "out of memory");
}

ql_dtype ql_llama_kv_dtype(const ql_llama *m)
{
    /* float16 has three bits more than bfloat16: a model that has them must not lose them in its cache */
    return m->device->backend->kv_dtype == QL_F32 ? QL_F32 : m->weights.dtype;
}

/* Keys and values of one token in all layers. */
static size_t slot_bytes(const ql_llama *m)
{
    const ql_config *c = &m->config;
    return (size_t)(2 * c->layers * c->kv_heads * c->head_dim) * ql_dtype_size(ql_llama_kv_dtype(m));
}

ql_status ql_llama_expect(const ql_llama *m, int64_t tokens, int64_t longest, int64_t outputs,
                          ql_llama_size *out, ql_err *err)
{
    const ql_config *c = &m->config;
    *out = (ql_llama_size){0};
    QL_TRY(expect_work(m, tokens, longest, outputs, &out->activations, err));
    int64_t tables = ql_rope_positions(longest) * (c->head_dim / 2) * 2;
    out->activations += (size_t)(tables + outputs * c->vocab) * sizeof(float);
    out->slot = slot_bytes(m);
    return QL_OK;
}

/* Where each token of a batch sits: host arrays of one pass, [tokens] each, in one block. */
typedef struct {
    int64_t tokens;
    int64_t outputs;    /* logits wanted */
    int32_t *start;     /* first cache slot of the token's sequence */
    int32_t *pos;       /* position in its sequence */
    int32_t *out_token; /* [outputs] token index of each wanted row, ascending */
    void *block;
} layout;

static ql_status check_context(const ql_llama *m, int row, int64_t tokens, ql_err *err)
{
    if (tokens <= m->max_context) return QL_OK;
    ql_err_set(err, QL_ERR_ARG, "row %d has %lld tokens, the model's context is %lld", row + 1,
               (long long)tokens, (long long)m->max_context);
    return ql_err_hint(err, "shorten the prompt, or load with a larger max_context if the model allows it");
}

static ql_status check_row(const ql_llama *m, const ql_kvcache *cache, const ql_batch *b, int row,
                           ql_err *err)
{
    int seq = b->seq ? b->seq[row] : row;
    if (b->lengths[row] < 1)
        return ql_err_set(err, QL_ERR_ARG, "row %d has no tokens: a forward pass needs at least one",
                          row + 1);
    if (b->outputs[row] < 0 || b->outputs[row] > b->lengths[row])
        return ql_err_set(err, QL_ERR_ARG, "row %d asks for %d logits of %d tokens", row + 1, b->outputs[row],
                          b->lengths[row]);
    if (seq < 0 || seq >= cache->sequences)
        return ql_err_set(err, QL_ERR_ARG, "row %d names sequence %d of a cache of %d", row + 1, seq + 1,
                          cache->sequences);
    int64_t end = (int64_t)cache->length[seq] + b->lengths[row];
    QL_TRY(check_context(m, row, end, err));
    if (end > cache->capacity[seq])
        return ql_err_set(err, QL_ERR_ARG, "row %d needs %lld cache slots, its sequence has %d", row + 1,
                          (long long)end, cache->capacity[seq]);
    return QL_OK;
}

static ql_status layout_make(const ql_llama *m, const ql_kvcache *cache, const ql_batch *b, layout *out,
                             ql_err *err)
{
    memset(out, 0, sizeof *out);
    if (b->rows < 1) return ql_err_set(err, QL_ERR_ARG, "an empty batch");
    for (int row = 0; row < b->rows; row++) {
        QL_TRY(check_row(m, cache, b, row, err));
        out->tokens += b->lengths[row];
        out->outputs += b->outputs[row];
    }
    for (int64_t t = 0; t < out->tokens; t++) {
        if (b->ids[t] < 0 || b->ids[t] >= m->config.vocab)
            return ql_err_set(err, QL_ERR_ARG, "token id %d is outside the vocabulary of %lld", b->ids[t],
                              (long long)m->config.vocab);
    }
    size_t n = (size_t)out->tokens;
    int32_t *block = ql_malloc((2 * n + (size_t)out->outputs) * sizeof *block);
    if (!block) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a batch of %zu tokens", n);
    *out = (layout){out->tokens, out->outputs, block, block + n, block + 2 * n, block};
    int64_t t = 0, o = 0;
    for (int row = 0; row < b->rows; row++) {
        int seq = b->seq ? b->seq[row] : row;
        for (int32_t i = 0; i < b->lengths[row]; i++, t++) {
            out->start[t] = cache->start[seq];
            out->pos[t] = cache->length[seq] + i;
            if (i >= b->lengths[row] - b->outputs[row]) out->out_token[o++] = (int32_t)t;
        }
    }
    return QL_OK;
}

static ql_status traced(const ql_trace *trace, ql_err *err, const ql_tensor *value, const char *name)
{
    return trace ? trace->fn(trace->ud, name, value, err) : QL_OK;
}

static ql_status traced_layer(const ql_trace *trace, ql_err *err, const ql_tensor *value, int64_t layer,
                              const char *part)
{
    if (!trace) return QL_OK;
    char name[64];
    snprintf(name, sizeof name, "layers.%lld.%s", (long long)layer, part);
    return trace->fn(trace->ud, name, value, err);
}

/* The product whose result joins the residual stream: fused, unless a trace wants to see it apart. */
static ql_status residual_matmul(const ql_tensor *in, const ql_matrix *w, ql_tensor *x, ql_tensor *spare,
                                 const ql_trace *trace, int64_t layer, const char *part, ql_err *err)
{
    if (!trace) return ql_op_matmul(in, w, true, x, err);
    QL_TRY(ql_op_matmul(in, w, false, spare, err));
    QL_TRY(traced_layer(trace, err, spare, layer, part));
    return ql_op_binary(QL_BIN_ADD, x, spare, x, err);
}

typedef struct {
    ql_tensor ids, start, pos; /* I32 [T] on the device */
} chunk;

static ql_status run_layer(ql_llama *m, int64_t i, const ql_kvcache *cache, const chunk *c,
                           const ql_trace *trace, ql_err *err)
{
    struct ql_llama_work *w = &m->work;
    const ql_layer *layer = &m->weights.layer[i];
    const ql_matrix *linear = layer->linear;
    ql_kv_view kv = cache->view[i];
    int heads = (int)m->config.heads, kv_heads = (int)m->config.kv_heads;
    float eps = (float)m->config.rms_eps;

    QL_TRY(ql_op_rmsnorm(&w->x, &layer->input_norm, eps, &w->h, err));
    QL_TRY(traced_layer(trace, err, &w->h, i, "input_norm"));
    QL_TRY(ql_op_matmul(&w->h, &linear[QL_Q], false, &w->q, err));
    QL_TRY(ql_op_matmul(&w->h, &linear[QL_K], false, &w->k, err));
    QL_TRY(ql_op_matmul(&w->h, &linear[QL_V], false, &w->v, err));
    QL_TRY(ql_op_rope(&w->q, &c->pos, &m->rope.cos, &m->rope.sin, heads, err));
    QL_TRY(ql_op_rope(&w->k, &c->pos, &m->rope.cos, &m->rope.sin, kv_heads, err));
    QL_TRY(traced_layer(trace, err, &w->q, i, "q"));
    QL_TRY(traced_layer(trace, err, &w->k, i, "k"));
    QL_TRY(ql_op_kv_write(&w->k, &w->v, &c->start, &c->pos, kv, err));
    QL_TRY(ql_op_attention(&w->q, kv, &c->start, &c->pos, heads, &w->att, err));
    QL_TRY(residual_matmul(&w->att, &linear[QL_O], &w->x, &w->h, trace, i, "attn", err));

    QL_TRY(ql_op_rmsnorm(&w->x, &layer->post_norm, eps, &w->h, err));
    QL_TRY(traced_layer(trace, err, &w->h, i, "post_norm"));
    QL_TRY(ql_op_matmul(&w->h, &linear[QL_GATE], false, &w->gate, err));
    QL_TRY(ql_op_matmul(&w->h, &linear[QL_UP], false, &w->up, err));
    QL_TRY(ql_op_swiglu(&w->gate, &w->up, &w->gate, err));
    QL_TRY(residual_matmul(&w->gate, &linear[QL_DOWN], &w->x, &w->h, trace, i, "mlp", err));
    return traced_layer(trace, err, &w->x, i, "out");
}

static ql_status upload_i32(ql_llama *m, const int32_t *src, int64_t n, ql_tensor *out, ql_err *err)
{
    QL_TRY(ql_tensor_new_1d(m->device, m->arena, QL_MEM_ACTIVATIONS, QL_I32, n, out, err));
    return ql_tensor_upload(out, src, (size_t)n * sizeof *src, err);
}

/* Final norm and logits of tokens out_token[0 .. count) of the piece at hand. */
static ql_status run_head(ql_llama *m, const int32_t *out_token, int64_t count, const ql_trace *trace,
                          ql_tensor *logits, ql_err *err)
{
    struct ql_llama_work *w = &m->work;
    float eps = (float)m->config.rms_eps;
    if (trace) {
        QL_TRY(ql_op_rmsnorm(&w->x, &m->weights.norm, eps, &w->h, err));
        QL_TRY(traced(trace, err, &w->h, "norm"));
    }
    if (count == 0) return QL_OK;

    ql_tensor rows = {0}, picked = {0}, normed = {0};
    int64_t hidden = m->config.hidden;
    ql_status status = upload_i32(m, out_token, count, &rows, err);
    if (status != QL_OK) goto fail;
    status = ql_tensor_new_2d(m->device, m->arena, QL_MEM_ACTIVATIONS, QL_F32, count, hidden, &picked, err);
    if (status != QL_OK) goto fail;
    status = ql_tensor_new_2d(m->device, m->arena, QL_MEM_ACTIVATIONS, QL_F32, count, hidden, &normed, err);
    if (status != QL_OK) goto fail;
    status = ql_op_gather_rows(&w->x, &rows, &picked, err);
    if (status != QL_OK) goto fail;
    status = ql_op_rmsnorm(&picked, &m->weights.norm, eps, &normed, err);
    if (status != QL_OK) goto fail;
    status = ql_op_matmul(&normed, &m->weights.lm_head, false, logits, err);
fail:
    ql_tensor_free(&rows);
    ql_tensor_free(&picked);
    ql_tensor_free(&normed);
    return status;
}

/* A piece of a batch: host arrays, tokens counted from the piece's first. */
typedef struct {
    int64_t tokens, outputs;
    const int32_t *ids, *start, *pos, *out_token;
} piece;

static ql_pass pass_over(const ql_llama *m, const ql_kvcache *cache, const piece *p)
{
    ql_pass pass = pass_of(m, cache->view);
    pass.tokens = p->tokens;
    pass.outputs = p->outputs;
    pass.ids = p->ids;
    pass.start = p->start;
    pass.pos = p->pos;
    pass.out_token = p->out_token;
    return pass;
}

static ql_status run_steps(ql_llama *m, const ql_kvcache *cache, const piece *p, const ql_trace *trace,
                           ql_tensor *logits, ql_err *err)
{
    const ql_backend *be = m->device->backend;
    chunk c = {0};
    ql_status status = work_reserve(m, p->tokens, err);
    if (status != QL_OK) goto fail;
    if (!be->pass && be->pass_bytes) {
        ql_pass pass = pass_over(m, cache, p);
        charge_own(m, be->pass_bytes(m->device->ctx, &pass));
    }
    status = upload_i32(m, p->ids, p->tokens, &c.ids, err);
    if (status != QL_OK) goto fail;
    status = upload_i32(m, p->start, p->tokens, &c.start, err);
    if (status != QL_OK) goto fail;
    status = upload_i32(m, p->pos, p->tokens, &c.pos, err);
    if (status != QL_OK) goto fail;
    status = ql_op_embed(&m->weights.embed, &c.ids, &m->work.x, err);
    if (status != QL_OK) goto fail;
    status = traced(trace, err, &m->work.x, "embed");
    for (int64_t i = 0; i < m->weights.layers && status == QL_OK; i++) {
        status = ql_interrupt_check(err);
        if (status == QL_OK) status = run_layer(m, i, cache, &c, trace, err);
    }
    if (status == QL_OK) status = run_head(m, p->out_token, p->outputs, trace, logits, err);
fail:
    ql_tensor_free(&c.ids);
    ql_tensor_free(&c.start);
    ql_tensor_free(&c.pos);
    return status;
}

static ql_status run_pass(ql_llama *m, const ql_kvcache *cache, const piece *p, ql_tensor *logits,
                          ql_err *err)
{
    QL_TRY(ql_interrupt_check(err));
    ql_pass pass = pass_over(m, cache, p);
    QL_TRY(workspace_reserve(m, m->device->backend->pass_bytes(m->device->ctx, &pass), err));
    pass.workspace = &m->work.workspace;
    pass.logits = logits;
    return ql_op_pass(m->device, &pass, err);
}

/* Tokens first .. first + n of a batch, whose wanted rows start at *done; `l` loses what it said of them. */
static ql_status run_chunk(ql_llama *m, const ql_kvcache *cache, layout *l, const int32_t *ids, int64_t first,
                           int64_t n, int64_t *done, const ql_trace *trace, ql_tensor *logits, ql_err *err)
{
    int64_t count = 0;
    int32_t *out_token = l->out_token + *done;
    while (*done + count < l->outputs && out_token[count] < first + n) out_token[count++] -= (int32_t)first;
    piece p = {n, count, ids + first, l->start + first, l->pos + first, out_token};
    ql_tensor view;
    QL_TRY(ql_tensor_rows(logits, *done, count, &view, err));
    *done += count;
    ql_status status = m->device->backend->pass && !trace ? run_pass(m, cache, &p, &view, err)
                                                          : run_steps(m, cache, &p, trace, &view, err);
    ql_tensor_free(&view);
    return status;
}

/* Linux hands out more memory than there is and ends the process once it is touched, so on the CPU a request
 * is refused here, as a whole: its parts might each pass. Other devices refuse by themselves. */
static ql_status check_room(const ql_llama *m, size_t need, const char *what, int64_t tokens, ql_err *err)
{
    if (m->device->backend != &ql_backend_cpu || need < CHECKED_BYTES) return QL_OK;
    size_t available = ql_process_memory_available();
    if (need <= available) return QL_OK;
    ql_err_set(err, QL_ERR_MEMORY,
               "out of memory: %zu bytes (%.1f MiB) needed for %s %lld tokens, %.1f MiB available", need,
               (double)need / 0x1p20, what, (long long)tokens, (double)available / 0x1p20);
    return ql_err_hint(err, "close models that are no longer needed, or use a smaller batch or context");
}

/* Working memory, logits and the cache's slots that a pass is the first to write. */
static ql_status check_pass(const ql_llama *m, const layout *l, int64_t longest, const ql_tensor *logits,
                            ql_err *err)
{
    if (m->device->backend != &ql_backend_cpu) return QL_OK;
    ql_llama_size size;
    QL_TRY(ql_llama_expect(m, l->tokens, longest, l->outputs, &size, err));
    size_t need = size.activations + (size_t)l->tokens * size.slot;
    size_t held = m->work.own + (logits->storage ? ql_tensor_bytes(logits) : 0);
    const struct ql_llama_work *w = &m->work;
    const ql_tensor *const all[] = {&w->x, &w->h, &w->q, &w->k, &w->v, &w->att, &w->gate, &w->up};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) held += ql_tensor_bytes(all[i]);
    return check_room(m, need > held ? need - held : 0, "a pass over", l->tokens, err);
}

ql_status ql_llama_forward(ql_llama *m, ql_kvcache *cache, const ql_batch *b, const ql_trace *trace,
                           ql_tensor *logits, ql_err *err)
{
    layout l;
    ql_status status = layout_make(m, cache, b, &l, err);
    if (status != QL_OK) {
        ql_tensor_free(logits);
        return status;
    }
    /* A trace shows whole tensors, so it takes the batch in one piece. */
    int64_t step = trace ? l.tokens : m->device->backend->pass_tokens;
    /* What an earlier pass of another size left is not held beside the new logits. */
    if (m->work.tokens != 0 && m->work.tokens != (l.tokens < step ? l.tokens : step)) work_free(m);
    int64_t longest = 0, done = 0;
    for (int64_t t = 0; t < l.tokens; t++) longest = l.pos[t] >= longest ? l.pos[t] + 1 : longest;
    status = check_pass(m, &l, longest, logits, err);
    if (status != QL_OK) goto fail;
    status = ql_rope_reserve(&m->rope, m->device, m->arena, longest, err);
    if (status != QL_OK) goto fail;
    if (!logits->storage || logits->shape[0] != l.outputs) {
        ql_tensor_free(logits);
        status = ql_tensor_new_2d(m->device, m->arena, QL_MEM_ACTIVATIONS, QL_F32, l.outputs, m->config.vocab,
                                  logits, err);
        if (status != QL_OK) goto fail;
    }
    for (int64_t first = 0; first < l.tokens; first += step) {
        int64_t n = l.tokens - first < step ? l.tokens - first : step;
        status = run_chunk(m, cache, &l, b->ids, first, n, &done, trace, logits, err);
        if (status != QL_OK) goto fail;
    }
    for (int row = 0; row < b->rows; row++) cache->length[b->seq ? b->seq[row] : row] += b->lengths[row];
    ql_free(l.block);
    return QL_OK;
fail:
    ql_tensor_free(logits);
    ql_free(l.block);
    return status;
}

void ql_llama_reset_peak(ql_llama *m)
{
    work_free(m);
    ql_rope_drop(&m->rope);
    ql_arena_reset_peak(m->arena);
}

ql_status ql_llama_cache(ql_llama *m, int sequences, const int32_t *capacity, ql_kvcache *out, ql_err *err)
{
    memset(out, 0, sizeof *out);
    int64_t slots = 0;
    for (int i = 0; i < sequences; i++) {
        QL_TRY(check_context(m, i, capacity[i], err));
        slots += capacity[i];
    }
    QL_TRY(check_room(m, (size_t)slots * slot_bytes(m), "a cache of", slots, err));
    return ql_kvcache_new(m->device, m->arena, (int)m->config.layers, m->config.kv_heads, m->config.head_dim,
                          ql_llama_kv_dtype(m), sequences, capacity, out, err);
}

ql_status ql_llama_new(ql_device *dev, ql_config *config, ql_llama **out, ql_err *err)
{
    *out = NULL;
    ql_llama *m = ql_calloc(1, sizeof *m);
    if (!m) {
        ql_config_free(config);
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    }
    m->config = *config;
    memset(config, 0, sizeof *config);
    m->device = ql_device_retain(dev);
    m->max_context = m->config.max_positions;
    m->arena = ql_arena_new();
    ql_status status =
        m->arena ? ql_rope_init(&m->config, &m->rope, err) : ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    if (status != QL_OK) {
        ql_llama_free(m);
        return status;
    }
    *out = m;
    return QL_OK;
}

ql_status ql_llama_place(ql_llama *m, const char *folder, int64_t max_context, ql_err *err)
{
    if (max_context > m->config.max_positions)
        return ql_err_set(err, QL_ERR_ARG, "max_context %lld is above the model's %lld positions",
                          (long long)max_context, (long long)m->config.max_positions);
    if (max_context > 0) m->max_context = max_context;
    m->folder = ql_strdup(folder);
    return m->folder ? QL_OK : ql_err_set(err, QL_ERR_MEMORY, "out of memory");
}

ql_status ql_llama_load(ql_device *dev, const char *folder, const ql_load_options *options,
                        ql_quant_policy policy, void *ud, ql_llama **out, ql_err *err)
{
    *out = NULL;
    ql_checkpoint *ck = NULL;
    ql_llama *m = NULL;
    ql_config config;
    QL_TRY(ql_config_load(folder, &config, err));
    QL_TRY(ql_llama_new(dev, &config, &m, err));
    ql_status status = ql_llama_place(m, folder, options->max_context, err);
    if (status != QL_OK) goto fail;
    status = ql_checkpoint_open(folder, &ck, err);
    if (status != QL_OK) goto fail;
    status = ql_weights_load(dev, m->arena, ck, &m->config, options->dtype, policy, ud, &m->weights, err);
    if (status != QL_OK) goto fail;
    ql_checkpoint_close(ck);
    *out = m;
    return QL_OK;
fail:
    ql_checkpoint_close(ck);
    ql_llama_free(m);
    return status;
}

/* Copy a config with what it owns. */
static ql_status config_copy(const ql_config *src, ql_config *out, ql_err *err)
{
    *out = *src;
    out->quant.skip = NULL;
    out->quant.skip_count = 0;
    if (src->quant.skip_count == 0) return QL_OK;
    out->quant.skip = ql_calloc(src->quant.skip_count, sizeof *out->quant.skip);
    if (!out->quant.skip) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    for (size_t i = 0; i < src->quant.skip_count; i++) {
        out->quant.skip[i] = ql_strdup(src->quant.skip[i]);
        out->quant.skip_count = i + 1;
        if (!out->quant.skip[i]) {
            ql_config_free(out);
            return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
        }
    }
    return QL_OK;
}

static ql_status model_like(ql_device *dev, const ql_config *src, ql_llama **out, ql_err *err)
{
    ql_config config;
    *out = NULL;
    QL_TRY(config_copy(src, &config, err));
    return ql_llama_new(dev, &config, out, err);
}

ql_status ql_llama_random(ql_device *dev, const ql_config *config, ql_dtype dtype, uint64_t seed,
                          ql_quant_policy policy, void *ud, ql_llama **out, ql_err *err)
{
    ql_llama *m = NULL;
    *out = NULL;
    QL_TRY(model_like(dev, config, &m, err));
    ql_status status =
        ql_weights_random(dev, m->arena, &m->config, dtype, seed, policy, ud, &m->weights, err);
    if (status != QL_OK) {
        ql_llama_free(m);
        return status;
    }
    *out = m;
    return QL_OK;
}

ql_status ql_llama_quantize(const ql_llama *full, ql_quant_policy policy, void *ud, ql_llama **out,
                            ql_err *err)
{
    ql_llama *m = NULL;
    *out = NULL;
    QL_TRY(model_like(full->device, &full->config, &m, err));
    m->max_context = full->max_context;
    ql_status status = QL_OK;
    if (full->folder && !(m->folder = ql_strdup(full->folder)))
        status = ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    if (status == QL_OK) status = ql_weights_quantize(&full->weights, m->arena, policy, ud, &m->weights, err);
    if (status != QL_OK) {
        ql_llama_free(m);
        return status;
    }
    *out = m;
    return QL_OK;
}

void ql_llama_free(ql_llama *m)
{
    if (!m) return;
    work_free(m);
    ql_weights_free(&m->weights);
    ql_rope_free(&m->rope);
    ql_config_free(&m->config);
    ql_arena_release(m->arena);
    ql_device_release(m->device);
    ql_free(m->folder);
    ql_free(m);
}

ql_status ql_llama_save(const ql_llama *m, const char *folder, const ql_save_options *options, ql_err *err)
{
    ql_save_entry *entries = NULL;
    size_t count = 0;
    if (!m->folder && !options->source) {
        ql_err_set(err, QL_ERR_ARG, "a synthetic model has no folder to take config.json and tokenizer from");
        return ql_err_hint(err, "save a model that was loaded from a folder");
    }
    ql_save_options filled = *options;
    if (!filled.source) filled.source = m->folder;
    QL_TRY(ql_weights_entries(&m->weights, &m->config, &entries, &count, err));
    ql_status status = ql_save_model(folder, entries, count, &filled, err);
    ql_free(entries);
    return status;
}
