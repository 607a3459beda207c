#include "weights.h"

#include "interrupt.h"
#include "mem.h"
#include "ops.h"
#include "text.h"

#include <stdio.h>
#include <string.h>

static const char *const linear_names[QL_LINEARS] = {
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj",    "mlp.up_proj",      "mlp.down_proj"};

const char *ql_linear_name(int64_t layer, ql_linear kind, char text[64])
{
    snprintf(text, 64, "model.layers.%lld.%s", (long long)layer, linear_names[kind]);
    return text;
}

void ql_linear_shape(const ql_config *c, ql_linear kind, int64_t *n, int64_t *k)
{
    int64_t q = c->heads * c->head_dim, kv = c->kv_heads * c->head_dim;
    const int64_t out[QL_LINEARS] = {q, kv, kv, c->hidden, c->intermediate, c->intermediate, c->hidden};
    const int64_t in[QL_LINEARS] = {c->hidden, c->hidden, c->hidden,      q,
                                    c->hidden, c->hidden, c->intermediate};
    *n = out[kind];
    *k = in[kind];
}

bool ql_linear_has_bias(const ql_config *c, ql_linear kind)
{
    return kind <= QL_O ? c->attention_bias : c->mlp_bias;
}

/* Where the weights of a model come from. Random numbers are one stream: `drawn` counts those that earlier
 * matrices took. */
typedef struct {
    ql_device *dev;
    ql_arena *arena;
    const ql_checkpoint *ck; /* NULL: random */
    uint64_t seed, drawn;
    ql_dtype dtype;         /* of dense matrices; QL_DTYPE_COUNT: as stored */
    ql_quant_policy policy; /* may be NULL */
    void *ud;
} source;

/* A float tensor of the checkpoint with the shape given, converted to `dtype` (QL_DTYPE_COUNT: as stored). */
static ql_status load_tensor(const source *s, const char *name, int ndim, const int64_t *shape,
                             ql_dtype dtype, ql_tensor *out, ql_dtype *stored, ql_err *err)
{
    const ql_st_tensor *src;
    QL_TRY(ql_checkpoint_need(s->ck, name, &src, err));
    bool fits = src->ndim == ndim;
    for (int i = 0; fits && i < ndim; i++) fits = src->shape[i] == shape[i];
    if (!fits) {
        char want[64];
        snprintf(want, sizeof want, ndim == 1 ? "[%lld]" : "[%lld, %lld]", (long long)shape[0],
                 (long long)(ndim == 1 ? 0 : shape[1]));
        ql_err_set(err, QL_ERR_FORMAT, "%s: tensor '%s' has not the shape %s that config.json calls for",
                   ql_checkpoint_file(s->ck, src), name, want);
        return ql_err_hint(err, "config.json and the weights belong to different models");
    }
    if (!ql_dtype_is_weight(src->dtype)) {
        ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: tensor '%s' is %s", ql_checkpoint_file(s->ck, src), name,
                   ql_dtype_name(src->dtype));
        return ql_err_hint(err, "qlua runs F32, F16, BF16 and bitsandbytes 4-bit weights");
    }
    if (stored) *stored = src->dtype;
    if (dtype == QL_DTYPE_COUNT) dtype = src->dtype;
    ql_tensor raw = {0};
    QL_TRY(ql_tensor_new(s->dev, s->arena, QL_MEM_WEIGHTS, src->dtype, ndim, shape, &raw, err));
    ql_status status = ql_checkpoint_fill(s->ck, src, &raw, err);
    if (status == QL_OK && dtype != src->dtype) {
        ql_tensor converted = {0};
        status = ql_tensor_new(s->dev, s->arena, QL_MEM_WEIGHTS, dtype, ndim, shape, &converted, err);
        if (status == QL_OK) status = ql_op_convert(&raw, &converted, err);
        ql_tensor_free(&raw);
        raw = converted;
    }
    if (status != QL_OK) {
        ql_tensor_free(&raw);
        return status;
    }
    *out = raw;
    return QL_OK;
}

/* Random norms and biases are ones. */
static ql_status ones(const source *s, int64_t n, ql_tensor *out, ql_err *err)
{
    float *host = ql_malloc((size_t)n * sizeof *host);
    if (!host) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    for (int64_t i = 0; i < n; i++) host[i] = 1.0f;
    ql_status status = ql_tensor_new_1d(s->dev, s->arena, QL_MEM_WEIGHTS, QL_F32, n, out, err);
    if (status == QL_OK) status = ql_tensor_upload(out, host, (size_t)n * sizeof *host, err);
    ql_free(host);
    return status;
}

static ql_status make_vector(const source *s, const char *name, int64_t n, ql_tensor *out, ql_dtype *stored,
                             ql_err *err)
{
    return s->ck ? load_tensor(s, name, 1, &n, QL_F32, out, stored, err) : ones(s, n, out, err);
}

static ql_status random_dense(source *s, int64_t n, int64_t k, ql_tensor *out, ql_err *err)
{
    QL_TRY(ql_tensor_new_2d(s->dev, s->arena, QL_MEM_WEIGHTS, s->dtype, n, k, out, err));
    QL_TRY(ql_op_random(s->seed, s->drawn, out, err));
    s->drawn += (uint64_t)(n * k);
    return QL_OK;
}

/* After a failure `out` may hold something still. */
static ql_status make_dense(source *s, const char *name, int64_t n, int64_t k, ql_matrix *out, ql_err *err)
{
    const int64_t shape[] = {n, k};
    memset(out, 0, sizeof *out);
    out->n = n;
    out->k = k;
    QL_TRY(s->ck ? load_tensor(s, name, 2, shape, s->dtype, &out->data, NULL, err)
                 : random_dense(s, n, k, &out->data, err));
    out->dtype = out->data.dtype;
    return QL_OK;
}

static ql_status load_4bit(const source *s, const char *name, int64_t n, int64_t k, ql_matrix *out,
                           ql_err *err)
{
    QL_TRY(ql_quant_load(s->ck, name, s->dev, s->arena, out, err));
    if (out->n == n && out->k == k) return QL_OK;
    return ql_err_set(
        err, QL_ERR_FORMAT, "%s: tensor '%s' is [%lld, %lld], config.json calls for [%lld, %lld]",
        ql_checkpoint_path(s->ck), name, (long long)out->n, (long long)out->k, (long long)n, (long long)k);
}

/* Is `name` a tensor that the model of `config` reads? */
static bool expected(const ql_config *c, const ql_checkpoint *ck, const char *name)
{
    if (ql_checkpoint_is_companion(ck, name)) return true;
    /* Buffers that old exporters saved beside the parameters, and a head that tying makes superfluous. */
    if (ql_text_ends_with(name, ".rotary_emb.inv_freq") || strcmp(name, "lm_head.weight") == 0) return true;
    if (strcmp(name, "model.embed_tokens.weight") == 0 || strcmp(name, "model.norm.weight") == 0) return true;
    long long layer;
    char prefix[64];
    if (sscanf(name, "model.layers.%lld.", &layer) != 1 || layer < 0 || layer >= c->layers) return false;
    /* " 1", "+1" and "01" scan as 1 too. */
    int used = snprintf(prefix, sizeof prefix, "model.layers.%lld.", layer);
    if (strncmp(name, prefix, (size_t)used) != 0) return false;
    const char *rest = name + used;
    if (strcmp(rest, "input_layernorm.weight") == 0 || strcmp(rest, "post_attention_layernorm.weight") == 0)
        return true;
    for (int kind = 0; kind < QL_LINEARS; kind++) {
        size_t n = strlen(linear_names[kind]);
        if (strncmp(rest, linear_names[kind], n) != 0) continue;
        return strcmp(rest + n, ".weight") == 0 ||
               (strcmp(rest + n, ".bias") == 0 && ql_linear_has_bias(c, kind));
    }
    return false;
}

static ql_status check_extra(const ql_checkpoint *ck, const ql_config *c, ql_err *err)
{
    for (size_t i = 0; i < ql_checkpoint_count(ck); i++) {
        const ql_st_tensor *t = ql_checkpoint_at(ck, i);
        if (expected(c, ck, t->name)) continue;
        ql_err_set(err, QL_ERR_FORMAT, "%s: tensor '%s' has no place in the model that config.json describes",
                   ql_checkpoint_file(ck, t), t->name);
        return ql_err_hint(err, "check num_hidden_layers, attention_bias and mlp_bias in config.json");
    }
    return QL_OK;
}

ql_status ql_weights_new(int64_t layers, ql_weights *out, ql_err *err)
{
    memset(out, 0, sizeof *out);
    out->layer = ql_calloc((size_t)layers, sizeof *out->layer);
    if (!out->layer)
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %lld layers", (long long)layers);
    out->layers = layers;
    return QL_OK;
}

ql_status ql_weights_ask(ql_quant_policy policy, void *ud, const char *name, int64_t n, int64_t k,
                         const ql_quant *now, ql_quant_spec *spec, bool *wanted, ql_err *err)
{
    ql_err asked = {.code = QL_OK};
    *wanted = policy && policy(ud, name, n, k, spec, &asked);
    if (asked.code != QL_OK) {
        if (err) *err = asked;
        return asked.code;
    }
    if (!*wanted || !now) return QL_OK;
    ql_err_set(err, QL_ERR_ARG, "%s is already quantized (%s)", name, now->scheme);
    return ql_err_hint(err, "quantize a model that was loaded in 16 or 32 bits");
}

/* `out` is the 4-bit form of `m`, or `m` itself: what the policy says. */
static ql_status apply_policy(const ql_matrix *m, const char *name, ql_arena *arena, ql_quant_policy policy,
                              void *ud, ql_matrix *out, ql_err *err)
{
    QL_TRY(ql_interrupt_check(err));
    bool wanted;
    ql_quant_spec spec;
    QL_TRY(ql_weights_ask(policy, ud, name, m->n, m->k, m->quant, &spec, &wanted, err));
    if (!wanted) {
        *out = ql_matrix_ref(m);
        return QL_OK;
    }
    ql_status status = ql_quant_matrix(m, &spec, arena, out, err);
    if (status != QL_OK) ql_err_prefix(err, "%s: ", name);
    return status;
}

static ql_status make_matrix(source *s, const char *module, int64_t n, int64_t k, ql_matrix *out, ql_err *err)
{
    char name[96];
    snprintf(name, sizeof name, "%s.weight", module);
    ql_matrix made = {0};
    ql_status status = s->ck && ql_checkpoint_is_quantized(s->ck, name)
                           ? load_4bit(s, name, n, k, &made, err)
                           : make_dense(s, name, n, k, &made, err);
    if (status == QL_OK) status = apply_policy(&made, module, s->arena, s->policy, s->ud, out, err);
    ql_matrix_free(&made);
    return status;
}

static ql_status make_layer(source *s, const ql_config *c, int64_t i, ql_weights *w, ql_err *err)
{
    char module[64], name[96];
    ql_layer *layer = &w->layer[i];
    snprintf(name, sizeof name, "model.layers.%lld.input_layernorm.weight", (long long)i);
    QL_TRY(make_vector(s, name, c->hidden, &layer->input_norm, &w->norm_dtype, err));
    snprintf(name, sizeof name, "model.layers.%lld.post_attention_layernorm.weight", (long long)i);
    QL_TRY(make_vector(s, name, c->hidden, &layer->post_norm, &w->norm_dtype, err));
    for (int kind = 0; kind < QL_LINEARS; kind++) {
        int64_t n, k;
        ql_linear_shape(c, kind, &n, &k);
        QL_TRY(make_matrix(s, ql_linear_name(i, kind, module), n, k, &layer->linear[kind], err));
        if (!ql_linear_has_bias(c, kind)) continue;
        snprintf(name, sizeof name, "%s.bias", module);
        QL_TRY(make_vector(s, name, n, &layer->linear[kind].bias, &w->bias_dtype, err));
    }
    return QL_OK;
}

static ql_status make_all(source *s, const ql_config *c, ql_weights *w, ql_err *err)
{
    QL_TRY(make_dense(s, "model.embed_tokens.weight", c->vocab, c->hidden, &w->embed, err));
    w->dtype = w->embed.dtype;
    QL_TRY(make_vector(s, "model.norm.weight", c->hidden, &w->norm, &w->norm_dtype, err));
    if (c->tie_embeddings)
        QL_TRY(apply_policy(&w->embed, "lm_head", s->arena, s->policy, s->ud, &w->lm_head, err));
    else
        QL_TRY(make_matrix(s, "lm_head", c->vocab, c->hidden, &w->lm_head, err));
    for (int64_t i = 0; i < c->layers; i++) QL_TRY(make_layer(s, c, i, w, err));
    return QL_OK;
}

static ql_status check_names(const ql_checkpoint *ck, const ql_config *c, ql_err *err)
{
    if (ql_checkpoint_is_quantized(ck, "model.embed_tokens.weight"))
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: the embedding is stored in 4 bits",
                          ql_checkpoint_path(ck));
    return check_extra(ck, c, err);
}

ql_status ql_weights_load(ql_device *dev, ql_arena *arena, const ql_checkpoint *ck, const ql_config *config,
                          ql_dtype dtype, ql_quant_policy policy, void *ud, ql_weights *out, ql_err *err)
{
    QL_TRY(ql_weights_new(config->layers, out, err));
    source s = {.dev = dev, .arena = arena, .ck = ck, .dtype = dtype, .policy = policy, .ud = ud};
    ql_status status = check_names(ck, config, err);
    if (status == QL_OK) status = make_all(&s, config, out, err);
    if (status != QL_OK) ql_weights_free(out);
    return status;
}

ql_status ql_weights_random(ql_device *dev, ql_arena *arena, const ql_config *c, ql_dtype dtype,
                            uint64_t seed, ql_quant_policy policy, void *ud, ql_weights *out, ql_err *err)
{
    QL_TRY(ql_weights_new(c->layers, out, err));
    out->norm_dtype = out->bias_dtype = dtype;
    source s = {.dev = dev, .arena = arena, .seed = seed, .dtype = dtype, .policy = policy, .ud = ud};
    ql_status status = make_all(&s, c, out, err);
    if (status != QL_OK) ql_weights_free(out);
    return status;
}

/* --- the quantized twin ----------------------------------------------------------------------------------
 */

ql_status ql_weights_quantize(const ql_weights *full, ql_arena *arena, ql_quant_policy policy, void *ud,
                              ql_weights *out, ql_err *err)
{
    QL_TRY(ql_weights_new(full->layers, out, err));
    out->dtype = full->dtype;
    out->norm_dtype = full->norm_dtype;
    out->bias_dtype = full->bias_dtype;
    out->embed = ql_matrix_ref(&full->embed);
    out->norm = ql_tensor_ref(&full->norm);
    ql_status status = apply_policy(&full->lm_head, "lm_head", arena, policy, ud, &out->lm_head, err);
    for (int64_t i = 0; i < full->layers && status == QL_OK; i++) {
        ql_layer *layer = &out->layer[i];
        layer->input_norm = ql_tensor_ref(&full->layer[i].input_norm);
        layer->post_norm = ql_tensor_ref(&full->layer[i].post_norm);
        for (int kind = 0; kind < QL_LINEARS && status == QL_OK; kind++) {
            char name[64];
            status = apply_policy(&full->layer[i].linear[kind], ql_linear_name(i, kind, name), arena, policy,
                                  ud, &layer->linear[kind], err);
        }
    }
    if (status != QL_OK) ql_weights_free(out);
    return status;
}

/* --- listing ---------------------------------------------------------------------------------------------
 */

#define NAME_BYTES 96

typedef struct {
    ql_save_entry *entries;
    char *names;
    size_t count;
} listing;

static void list(listing *l, const ql_matrix *matrix, const ql_tensor *tensor, ql_dtype dtype,
                 const char *prefix, const char *suffix)
{
    char *name = l->names + l->count * NAME_BYTES;
    snprintf(name, NAME_BYTES, "%s%s", prefix, suffix);
    l->entries[l->count++] = (ql_save_entry){name, matrix, tensor, dtype};
}

ql_status ql_weights_entries(const ql_weights *w, const ql_config *c, ql_save_entry **entries, size_t *count,
                             ql_err *err)
{
    *entries = NULL;
    *count = 0;
    if (c->tie_embeddings && w->lm_head.quant)
        return ql_err_set(err, QL_ERR_UNSUPPORTED,
                          "lm_head is quantized but tied to the embedding: a checkpoint can not hold both");
    size_t capacity = 3 + (size_t)w->layers * (2 + 2 * QL_LINEARS);
    char *block = ql_malloc(capacity * (sizeof(ql_save_entry) + NAME_BYTES));
    if (!block) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    listing l = {(ql_save_entry *)(void *)block, block + capacity * sizeof(ql_save_entry), 0};
    list(&l, &w->embed, NULL, w->embed.dtype, "model.embed_tokens", ".weight");
    for (int64_t i = 0; i < w->layers; i++) {
        const ql_layer *layer = &w->layer[i];
        char prefix[64];
        snprintf(prefix, sizeof prefix, "model.layers.%lld", (long long)i);
        list(&l, NULL, &layer->input_norm, w->norm_dtype, prefix, ".input_layernorm.weight");
        list(&l, NULL, &layer->post_norm, w->norm_dtype, prefix, ".post_attention_layernorm.weight");
        for (int kind = 0; kind < QL_LINEARS; kind++) {
            const ql_matrix *m = &layer->linear[kind];
            list(&l, m, NULL, m->dtype, ql_linear_name(i, kind, prefix), ".weight");
            if (m->bias.storage) list(&l, NULL, &m->bias, w->bias_dtype, prefix, ".bias");
        }
    }
    list(&l, NULL, &w->norm, w->norm_dtype, "model.norm", ".weight");
    if (!c->tie_embeddings) list(&l, &w->lm_head, NULL, w->lm_head.dtype, "lm_head", ".weight");
    *entries = l.entries;
    *count = l.count;
    return QL_OK;
}

void ql_weights_free(ql_weights *w)
{
    for (int64_t i = 0; w->layer && i < w->layers; i++) {
        ql_tensor_free(&w->layer[i].input_norm);
        ql_tensor_free(&w->layer[i].post_norm);
        for (int kind = 0; kind < QL_LINEARS; kind++) ql_matrix_free(&w->layer[i].linear[kind]);
    }
    ql_free(w->layer);
    ql_matrix_free(&w->embed);
    ql_matrix_free(&w->lm_head);
    ql_tensor_free(&w->norm);
    memset(w, 0, sizeof *w);
}

static bool is_tied(const ql_weights *w)
{
    return w->lm_head.data.storage == w->embed.data.storage;
}

size_t ql_weights_bytes(const ql_weights *w)
{
    size_t sum = ql_matrix_resident(&w->embed) + ql_tensor_bytes(&w->norm);
    if (!is_tied(w)) sum += ql_matrix_resident(&w->lm_head);
    for (int64_t i = 0; i < w->layers; i++) {
        sum += ql_tensor_bytes(&w->layer[i].input_norm) + ql_tensor_bytes(&w->layer[i].post_norm);
        for (int kind = 0; kind < QL_LINEARS; kind++) sum += ql_matrix_resident(&w->layer[i].linear[kind]);
    }
    return sum;
}

int64_t ql_weights_params(const ql_weights *w)
{
    int64_t sum = w->embed.n * w->embed.k + ql_tensor_count(&w->norm);
    if (!is_tied(w)) sum += w->lm_head.n * w->lm_head.k;
    for (int64_t i = 0; i < w->layers; i++) {
        sum += ql_tensor_count(&w->layer[i].input_norm) + ql_tensor_count(&w->layer[i].post_norm);
        for (int kind = 0; kind < QL_LINEARS; kind++) {
            const ql_matrix *m = &w->layer[i].linear[kind];
            sum += m->n * m->k + ql_tensor_count(&m->bias);
        }
    }
    return sum;
}

bool ql_weights_is_quantized(const ql_weights *w)
{
    if (w->lm_head.quant) return true;
    for (int64_t i = 0; i < w->layers; i++) {
        for (int kind = 0; kind < QL_LINEARS; kind++) {
            if (w->layer[i].linear[kind].quant) return true;
        }
    }
    return false;
}
