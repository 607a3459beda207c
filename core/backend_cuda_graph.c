/* CUDA graphs for passes of few tokens: the launches of a pass are queued by one call where they would take
 * longer to queue than to run.
 *
 * A graph is replayed only for a pass whose launches would be the same, argument by argument: the key lists
 * all that they depend on, and nothing is hashed. So memory that was freed and allocated again does no harm.
 * What differs from token to token (ids, slots, positions) lies in the workspace, copied there before. The
 * first pass of a key runs as it is, which also loads the kernels, the second is captured, later ones are
 * replayed.
 */
#include "backend_cuda.h"

#include <stdlib.h>
#include <string.h>

enum { PASS_WORDS = 10, LAYER_WORDS = 5, MATRIX_WORDS = 16 }; /* of a key, at most */
enum { MOST_FAILURES = 4 };

typedef struct {
    uint64_t *words;
    size_t count, capacity;
} key;

typedef struct {
    key key; /* empty: the entry is free */
    cudaGraphExec_t exec;
    unsigned ran; /* kernels that its launches note */
    uint64_t used;
} entry;

struct ql_cuda_graphs {
    entry entries[QL_CUDA_GRAPHS];
    key wanted; /* of the pass in hand */
    uint64_t clock;
    int failures; /* captures that gave no graph; after MOST_FAILURES none is tried again */
};

/* ---- keys ---- */

/* Room for `words` more; the puts that follow do not check. */
static bool reserve(key *k, size_t words)
{
    if (words <= k->capacity) return true;
    uint64_t *grown = realloc(k->words, words * sizeof *grown);
    if (!grown) return false;
    k->words = grown;
    k->capacity = words;
    return true;
}

static inline void put(key *k, uint64_t word)
{
    k->words[k->count++] = word;
}

static void put_pointer(key *k, const void *p)
{
    put(k, (uintptr_t)p);
}

static void put_matrix(key *k, const ql_matrix *m)
{
    put_pointer(k, m->data.data);
    put_pointer(k, m->bias.storage ? m->bias.data : NULL);
    put(k, (uint64_t)m->n << 32 | (uint64_t)m->k);
    put(k, (uint64_t)m->layout << 32 | (uint64_t)m->data.dtype << 1 | (m->quant != NULL));
    if (!m->quant) return;
    put_pointer(k, m->absmax.data);
    put_pointer(k, m->nested.storage ? m->nested.data : NULL);
    put(k, (uint64_t)m->quant->block << 32 | (uint64_t)m->quant->nested_block);
    put(k, m->quant->value_dtype);
    for (int i = 0; i < 16; i += 2)
        put(k, (uint64_t)qk_bits(m->quant->code[i]) << 32 | qk_bits(m->quant->code[i + 1]));
}

static void put_shape(key *k, const ql_pass *p, int64_t longest)
{
    put(k, (uint64_t)p->tokens << 32 | (uint64_t)p->outputs);
    put(k, (uint64_t)p->hidden << 32 | (uint64_t)p->intermediate);
    put(k, (uint64_t)p->head_dim << 32 | (uint64_t)p->layers);
    put(k, (uint64_t)p->heads << 32 | (uint64_t)p->kv_heads);
    put(k, (uint64_t)longest << 32 | qk_bits(p->eps));
}

/* False when there is no memory for it: then the pass runs without a graph. */
static bool key_make(key *k, const ql_pass *p, int64_t longest)
{
    const size_t matrices = 2 + (size_t)p->layers * QL_LINEARS;
    if (!reserve(k, PASS_WORDS + matrices * MATRIX_WORDS + (size_t)p->layers * LAYER_WORDS)) return false;
    k->count = 0;
    put_shape(k, p, longest);
    put_pointer(k, p->workspace->data);
    put_pointer(k, p->outputs > 0 ? p->logits->data : NULL);
    put_pointer(k, p->norm->data);
    put_pointer(k, p->cos->data);
    put_pointer(k, p->sin->data);
    put_matrix(k, p->embed);
    put_matrix(k, p->lm_head);
    for (int i = 0; i < p->layers; i++) {
        const ql_layer *layer = &p->layer[i];
        put_pointer(k, layer->input_norm.data);
        put_pointer(k, layer->post_norm.data);
        for (int j = 0; j < QL_LINEARS; j++) put_matrix(k, &layer->linear[j]);
        put_pointer(k, p->cache[i].k->data);
        put_pointer(k, p->cache[i].v->data);
        put(k, (uint64_t)p->cache[i].k->shape[1] << 8 | (uint64_t)p->cache[i].k->dtype);
    }
    return true;
}

static bool key_equal(const key *a, const key *b)
{
    return a->count == b->count && memcmp(a->words, b->words, a->count * sizeof *a->words) == 0;
}

/* ---- entries ---- */

static entry *find(struct ql_cuda_graphs *g)
{
    for (int i = 0; i < QL_CUDA_GRAPHS; i++) {
        if (g->entries[i].key.count > 0 && key_equal(&g->entries[i].key, &g->wanted)) return &g->entries[i];
    }
    return NULL;
}

/* A free entry, or the one not used for longest: it keeps its graph, which may be updated in place. */
static entry *oldest(struct ql_cuda_graphs *g)
{
    entry *e = &g->entries[0];
    for (int i = 1; i < QL_CUDA_GRAPHS; i++) {
        if (g->entries[i].used < e->used) e = &g->entries[i];
    }
    return e;
}

static void forget(entry *e)
{
    if (e->exec) cudaGraphExecDestroy(e->exec);
    free(e->key.words);
    memset(e, 0, sizeof *e);
}

/* Updates the entry's old graph, or makes a new one in its place. */
static bool trade(entry *e, cudaGraph_t graph)
{
    cudaGraphExecUpdateResultInfo why;
    if (e->exec && cudaGraphExecUpdate(e->exec, graph, &why) == cudaSuccess) return true;
    cudaGetLastError();
    if (e->exec) cudaGraphExecDestroy(e->exec);
    e->exec = NULL;
    if (cudaGraphInstantiate(&e->exec, graph, 0) == cudaSuccess) return true;
    cudaGetLastError();
    e->exec = NULL;
    return false;
}

/* Captures `run` and makes the entry's graph of it. Relaxed, because a kernel's first launch may load it.
 * False where no graph can be had (no memory for it, or a driver that refuses what is in it): the launches
 * can still be queued one by one, and tell what is wrong with them if it is they. */
static bool capture(ql_cuda *c, entry *e, const ql_pass *p, ql_cuda_body *run, const void *plan)
{
    cudaStream_t stream = c->lane->stream;
    cudaGraph_t graph = NULL;
    ql_err ignored;
    unsigned before = c->ran;
    if (cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed) != cudaSuccess) {
        cudaGetLastError();
        return false;
    }
    c->capturing = true;
    c->ran = 0;
    ql_status status = run(c, p, plan, &ignored);
    e->ran = c->ran;
    c->ran = before;
    c->capturing = false;
    bool ended = cudaStreamEndCapture(stream, &graph) == cudaSuccess;
    if (!ended) cudaGetLastError();
    bool made = ended && graph && status == QL_OK && trade(e, graph);
    if (graph) cudaGraphDestroy(graph);
    if (!made) e->ran = 0;
    return made;
}

static ql_status replay(ql_cuda *c, entry *e, ql_err *err)
{
    c->ran |= e->ran;
    ql_cuda_note(c, QL_CUDA_RAN_GRAPH);
    return ql_cuda_ran(c, cudaGraphLaunch(e->exec, c->lane->stream), "a pass replayed from a graph", err);
}

ql_status ql_cuda_graph_run(ql_cuda *c, const ql_pass *p, int64_t longest, ql_cuda_body *run,
                            const void *plan, ql_err *err)
{
    struct ql_cuda_graphs *g = c->graphs;
    if (!g || g->failures >= MOST_FAILURES || !key_make(&g->wanted, p, longest)) return run(c, p, plan, err);
    entry *e = find(g);
    if (e) {
        e->used = ++g->clock;
        if (e->exec && e->ran) return replay(c, e, err);
        if (capture(c, e, p, run, plan)) return replay(c, e, err);
        g->failures++;
        if (!c->lane->given_up) forget(e);
        c->zeroed.p = NULL; /* what was captured has zeroed nothing */
        return run(c, p, plan, err);
    }
    QL_TRY(run(c, p, plan, err));
    e = oldest(g);
    key old = e->key;
    e->key = g->wanted;
    e->used = ++g->clock;
    e->ran = 0; /* an exec that is there is another key's, for `trade` */
    g->wanted = old;
    return QL_OK;
}

void ql_cuda_graph_open(ql_cuda *c)
{
    const char *wish = getenv("QLUA_CUDA_GRAPHS");
    if (c->sync_each || (wish && strcmp(wish, "0") == 0)) return;
    c->graphs = calloc(1, sizeof *c->graphs); /* NULL: passes run without */
}

void ql_cuda_graph_close(ql_cuda *c)
{
    if (!c->graphs) return;
    for (int i = 0; i < QL_CUDA_GRAPHS; i++) {
        if (c->lane->given_up) c->graphs->entries[i].exec = NULL; /* gone with the device's context */
        forget(&c->graphs->entries[i]);
    }
    free(c->graphs->wanted.words);
    free(c->graphs);
    c->graphs = NULL;
}
