#include "generate.h"

#include "clock.h"
#include "mem.h"

#include <string.h>

typedef struct {
    ql_llama *m;
    const ql_generate_options *options;
    const uint64_t *streams;
    ql_generated *out;
    ql_kvcache cache;
    ql_sampler *sampler;
    ql_tensor logits;
    float *host;      /* [rows, vocab] */
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

/* Draw one token for every active row from the logits at hand; rows that end leave the batch. */
static ql_status draw(run *r, ql_err *err)
{
    int64_t vocab = r->m->config.vocab;
    ql_status status =
        ql_tensor_download(&r->logits, r->host, (size_t)(r->active * vocab) * sizeof *r->host, err);
    int kept = 0;
    for (int i = 0; i < r->active && status == QL_OK; i++) {
        int row = r->seq[i];
        int32_t id;
        uint64_t stream = r->streams ? r->streams[row] : (uint64_t)row;
        status = ql_sampler_pick(r->sampler, &r->options->sampling, r->host + i * vocab, vocab, stream,
                                 (uint64_t)r->out->counts[row], &id, err);
        if (status != QL_OK || !take(r, row, id)) continue;
        r->seq[kept] = row;
        r->ids[kept++] = id;
    }
    r->active = kept;
    return status;
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
    r->host = ql_malloc(n * (size_t)r->m->config.vocab * sizeof *r->host);
    if (!out->ids || !out->counts || !out->stops || !r->seq || !r->lengths || !r->outputs || !r->ids ||
        !r->host)
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
    status = ql_sampler_new(r->m->config.vocab, &r->sampler, err);
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
