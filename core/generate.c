#include "generate.h"

#include "clock.h"
#include "mem.h"
#include "ops.h"

#include <string.h>

typedef struct {
    ql_llama *m;
    const ql_generate_options *options;
    const uint64_t *streams;
    ql_generated *out;
    ql_kvcache cache;
    ql_sampler *sampler;
    ql_tensor logits;
    int64_t k;        /* logits a row that a draw takes from the device; 0: all of them */
    ql_tensor best;   /* U8 on the device: what draw_best takes, one row after the other by kind */
    char *best_host;  /* the same */
    float *host;      /* [rows, vocab], or one row where k > 0 */
    int active;       /* rows still running */
    int32_t *seq;     /* [active] sequence (= row) numbers */
    int32_t *ids;     /* [prompt tokens], later [active] */
    int32_t *lengths; /* [rows] */
    int32_t *outputs; /* [rows] */
} run;

static bool is_stop(const ql_generate_options *o, int32_t id)
{
    for (int i = 0; i < o->stop_count; i++) {
        if (o->stop_ids[i] == id) return true;
    }
    return false;
}

/* Take token `id` for `row`; true while the row goes on. */
static bool take(run *r, int row, int32_t id)
{
    ql_generated *out = r->out;
    if (is_stop(r->options, id)) {
        out->stops[row] = QL_STOP_TOKEN;
        return false;
    }
    out->ids[row][out->counts[row]++] = id;
    if (r->options->on_token && r->options->on_token(r->options->ud, row, id)) {
        out->stops[row] = QL_STOP_CALLER;
        return false;
    }
    if (out->counts[row] >= r->options->max_new_tokens) {
        out->stops[row] = QL_STOP_LENGTH;
        return false;
    }
    if (r->cache.length[row] >= r->cache.capacity[row]) {
        out->stops[row] = QL_STOP_CONTEXT;
        return false;
    }
    return true;
}

/* The row whose logits are the i-th at hand draws `id`; rows that end leave the batch. */
static void advance(run *r, int i, int32_t id, int *kept)
{
    int row = r->seq[i];
    if (!take(r, row, id)) return;
    r->seq[*kept] = row;
    r->ids[(*kept)++] = id;
}

static uint64_t stream_of(const run *r, int row)
{
    return r->streams ? r->streams[row] : (uint64_t)row;
}

static ql_status pick(run *r, int row, const float *logits, int32_t *id, ql_err *err)
{
    return ql_sampler_pick(r->sampler, &r->options->sampling, logits, r->m->config.vocab, stream_of(r, row),
                           (uint64_t)r->out->counts[row], id, err);
}

/* From whole rows. */
static ql_status draw_rows(run *r, int *kept, ql_err *err)
{
    int64_t vocab = r->m->config.vocab;
    QL_TRY(ql_tensor_download(&r->logits, r->host, (size_t)(r->active * vocab) * sizeof *r->host, err));
    for (int i = 0; i < r->active; i++) {
        int32_t id;
        QL_TRY(pick(r, r->seq[i], r->host + i * vocab, &id, err));
        advance(r, i, id, kept);
    }
    return QL_OK;
}

/* A part of `best`, which holds the reference. */
static ql_tensor part_of(const ql_tensor *best, size_t at, ql_dtype dtype, int ndim, int64_t rows,
                         int64_t cols)
{
    ql_tensor t = *best;
    t.data = (char *)best->data + at;
    t.dtype = dtype;
    t.ndim = ndim;
    t.shape[0] = rows;
    t.shape[1] = cols;
    return t;
}

/* Where the parts of `best` start, for `rows` rows: each as aligned as a tensor of its own. */
typedef struct {
    size_t values, ids, end; /* the logsumexps lie at 0 */
} best_layout;

static best_layout best_parts(int64_t rows, int64_t k)
{
    const size_t n = (size_t)rows, align = 64;
    best_layout l;
    l.values = (n * sizeof(double) + align - 1) / align * align;
    l.ids = l.values + (n * (size_t)k * sizeof(float) + align - 1) / align * align;
    l.end = l.ids + n * (size_t)k * sizeof(int32_t);
    return l;
}

/* From the k largest logits of each row and the logsumexp of all: one copy, so the device is waited for once.
 * A row that these do not settle follows alone. */
static ql_status draw_best(run *r, int *kept, ql_err *err)
{
    const int64_t n = r->active, k = r->k, vocab = r->m->config.vocab;
    const ql_sampling *sampling = &r->options->sampling;
    const best_layout at = best_parts(n, k);
    const double *lse_host = (const void *)r->best_host;
    const float *values_host = (const void *)(r->best_host + at.values);
    const int32_t *ids_host = (const void *)(r->best_host + at.ids);
    ql_tensor lse = part_of(&r->best, 0, QL_F64, 1, n, 0);
    ql_tensor values = part_of(&r->best, at.values, QL_F32, 2, n, k);
    ql_tensor ids = part_of(&r->best, at.ids, QL_I32, 2, n, k);
    ql_tensor used = part_of(&r->best, 0, QL_U8, 1, (int64_t)at.end, 0);
    QL_TRY(ql_op_logsumexp(&r->logits, ql_sampler_temperature(sampling), &lse, err));
    QL_TRY(ql_op_topk(&r->logits, (int)k, &values, &ids, err));
    QL_TRY(ql_tensor_download(&used, r->best_host, at.end, err));
    for (int i = 0; i < n; i++) {
        int row = r->seq[i];
        int32_t id;
        QL_TRY(ql_sampler_pick_top(r->sampler, sampling, values_host + i * k, ids_host + i * k, k, vocab,
                                   lse_host[i], stream_of(r, row), (uint64_t)r->out->counts[row], &id, err));
        if (id < 0) {
            ql_tensor whole;
            QL_TRY(ql_tensor_rows(&r->logits, i, 1, &whole, err));
            ql_status status = ql_tensor_download(&whole, r->host, (size_t)vocab * sizeof *r->host, err);
            ql_tensor_free(&whole);
            if (status == QL_OK) status = pick(r, row, r->host, &id, err);
            if (status != QL_OK) return status;
        }
        advance(r, i, id, kept);
    }
    return QL_OK;
}

/* Draw one token for every active row from the logits at hand. */
static ql_status draw(run *r, ql_err *err)
{
    int kept = 0;
    ql_status status = r->k > 0 ? draw_best(r, &kept, err) : draw_rows(r, &kept, err);
    r->active = kept;
    return status;
}

/* Room for draws. Logits that lie far away stay there where their best suffice. */
static ql_status prepare_draws(run *r, int rows, ql_err *err)
{
    const int64_t vocab = r->m->config.vocab;
    ql_device *dev = r->m->device;
    if (dev->backend != &ql_backend_cpu) r->k = ql_sampler_candidates(&r->options->sampling, vocab);
    r->host = ql_malloc((size_t)(r->k > 0 ? 1 : rows) * (size_t)vocab * sizeof *r->host);
    if (!r->host) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a batch of %d rows", rows);
    QL_TRY(ql_sampler_new(vocab, &r->sampler, err));
    if (r->k == 0) return QL_OK;
    r->best_host = ql_malloc(best_parts(rows, r->k).end);
    if (!r->best_host) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a batch of %d rows", rows);
    return ql_tensor_new_1d(dev, r->m->arena, QL_MEM_ACTIVATIONS, QL_U8, (int64_t)best_parts(rows, r->k).end,
                            &r->best, err);
}

static ql_status prepare(run *r, int rows, const int32_t *const *prompts, const int32_t *lengths, ql_err *err)
{
    const ql_generate_options *o = r->options;
    ql_status status = ql_sampling_check(&o->sampling, err);
    if (status != QL_OK) return status;
    if (rows < 1) return ql_err_set(err, QL_ERR_ARG, "no prompts");
    if (o->max_new_tokens < 1)
        return ql_err_set(err, QL_ERR_ARG, "max_new_tokens = %lld is below 1", (long long)o->max_new_tokens);
    size_t n = (size_t)rows, total = 0;
    for (int i = 0; i < rows; i++) total += lengths[i] > 0 ? (size_t)lengths[i] : 0;
    ql_generated *out = r->out;
    out->ids = ql_calloc(n, sizeof *out->ids);
    out->counts = ql_calloc(n, sizeof *out->counts);
    out->stops = ql_calloc(n, sizeof *out->stops);
    r->seq = ql_malloc(n * sizeof *r->seq);
    r->lengths = ql_malloc(n * sizeof *r->lengths);
    r->outputs = ql_malloc(n * sizeof *r->outputs);
    r->ids = ql_malloc((total > n ? total : n) * sizeof *r->ids);
    if (!out->ids || !out->counts || !out->stops || !r->seq || !r->lengths || !r->outputs || !r->ids)
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a batch of %d rows", rows);
    out->rows = rows;
    out->prompt_tokens = (int64_t)total;
    size_t at = 0;
    for (int i = 0; i < rows; i++) {
        int64_t room = r->m->max_context - lengths[i];
        /* The last token drawn is never fed back: it needs no slot. */
        int64_t fed = o->max_new_tokens - 1 < room ? o->max_new_tokens - 1 : room;
        if (fed < 0) fed = 0; /* a prompt beyond the context: ql_llama_cache refuses it */
        out->ids[i] = ql_malloc((size_t)(fed + 1) * sizeof **out->ids);
        if (!out->ids[i]) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a batch of %d rows", rows);
        r->lengths[i] = lengths[i] + (int32_t)fed;
        r->seq[i] = i;
        r->outputs[i] = 1;
        if (lengths[i] > 0) memcpy(r->ids + at, prompts[i], (size_t)lengths[i] * sizeof **prompts);
        at += lengths[i] > 0 ? (size_t)lengths[i] : 0;
    }
    r->active = rows;
    status = prepare_draws(r, rows, err);
    if (status == QL_OK) status = ql_llama_cache(r->m, rows, r->lengths, &r->cache, err);
    if (status == QL_OK) memcpy(r->lengths, lengths, n * sizeof *lengths);
    return status;
}

static ql_status decode(run *r, ql_err *err)
{
    ql_status status = QL_OK;
    for (int i = 0; i < r->out->rows; i++) r->lengths[i] = 1;
    while (status == QL_OK && r->active > 0) {
        ql_batch step = {r->active, r->ids, r->lengths, r->outputs, r->seq};
        status = ql_llama_forward(r->m, &r->cache, &step, NULL, &r->logits, err);
        r->out->decode_steps++;
        r->out->decode_tokens += r->active;
        if (status == QL_OK) status = draw(r, err);
    }
    return status;
}

ql_status ql_generate(ql_llama *m, int rows, const int32_t *const *prompts, const int32_t *lengths,
                      const uint64_t *streams, const ql_generate_options *options, ql_generated *out,
                      ql_err *err)
{
    memset(out, 0, sizeof *out);
    run r = {.m = m, .options = options, .streams = streams, .out = out};
    ql_status status = prepare(&r, rows, prompts, lengths, err);
    if (status == QL_OK) {
        const ql_backend *be = m->device->backend;
        ql_batch prefill = {rows, r.ids, lengths, r.outputs, NULL};
        double begin = ql_clock_seconds();
        status = ql_llama_forward(m, &r.cache, &prefill, NULL, &r.logits, err);
        if (status == QL_OK) status = be->sync(m->device->ctx, err);
        if (status == QL_OK) status = draw(&r, err);
        double middle = ql_clock_seconds();
        if (status == QL_OK) status = decode(&r, err);
        if (status == QL_OK) status = be->sync(m->device->ctx, err);
        out->prefill_seconds = middle - begin;
        out->decode_seconds = ql_clock_seconds() - middle;
    }
    ql_kvcache_free(&r.cache);
    ql_sampler_free(r.sampler);
    ql_tensor_free(&r.logits);
    ql_tensor_free(&r.best);
    ql_free(r.best_host);
    ql_free(r.host);
    ql_free(r.seq);
    ql_free(r.ids);
    ql_free(r.lengths);
    ql_free(r.outputs);
    if (status != QL_OK) ql_generated_free(out);
    return status;
}

void ql_generated_free(ql_generated *g)
{
    for (int i = 0; g->ids && i < g->rows; i++) ql_free(g->ids[i]);
    ql_free(g->ids);
    ql_free(g->counts);
    ql_free(g->stops);
    memset(g, 0, sizeof *g);
}

const char *ql_stop_name(ql_stop stop)
{
    static const char *const names[] = {"length", "token", "caller", "context"};
    return names[stop];
}
