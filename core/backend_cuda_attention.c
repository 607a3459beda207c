/* Attention: flash-decoding token by token, or tiles of queries on tensor cores for prompts. */
#include "backend_cuda.h"

int64_t ql_cuda_attention_bound(int64_t longest)
{
    int64_t bound = QK_ATTENTION_SPLIT;
    while (bound < longest) bound *= 2;
    return bound;
}

/* Tokens of one launch, so that the partials of its pieces stay within QL_CUDA_PARTIALS. A token's bits do
 * not depend on which others are in its launch. */
static int64_t tokens_at_once(int64_t tokens, int heads, int d, int64_t longest)
{
    while (tokens > 8 && qk_cuda_attention_bytes(tokens, heads, d, longest) > QL_CUDA_PARTIALS)
        tokens = (tokens + 15) / 16 * 8; /* half of it, in whole tiles of fragments */
    return tokens;
}

int64_t ql_cuda_attention_pieces(const qk_cuda_attention *a)
{
    int64_t step = tokens_at_once(a->tokens, a->heads, a->d, a->longest);
    return (a->tokens + step - 1) / step;
}

static bool by_tiles(const ql_cuda *c, const qk_cuda_attention *a)
{
    return a->tokens > QK_PRODUCT_TOKENS && c->numerics == QL_NUMERICS_FAST && a->kv != QK_F32 &&
           qk_cuda_attention_prefill_fits(a->d);
}

size_t ql_cuda_attention_need(const ql_cuda *c, const qk_cuda_attention *a)
{
    if (by_tiles(c, a)) return 0;
    return qk_cuda_attention_bytes(tokens_at_once(a->tokens, a->heads, a->d, a->longest), a->heads, a->d,
                                   a->longest);
}

ql_status ql_cuda_attention_clear(ql_cuda *c, const qk_cuda_attention *a, void *scratch, ql_err *err)
{
    if (by_tiles(c, a)) {
        c->zeroed.p = NULL; /* its pass lays other things where the scratch of a smaller one was */
        return QL_OK;
    }
    const int64_t tokens = tokens_at_once(a->tokens, a->heads, a->d, a->longest);
    if (c->zeroed.p == scratch && c->zeroed.tokens == tokens && c->zeroed.heads == a->heads &&
        c->zeroed.d == a->d && c->zeroed.longest == a->longest)
        return QL_OK;
    size_t bytes = qk_cuda_attention_bytes(tokens, a->heads, a->d, a->longest);
    if (bytes > 0) QL_CUDA_RUN("memset", cudaMemsetAsync(scratch, 0, bytes, c->lane->stream));
    c->zeroed.p = scratch;
    c->zeroed.tokens = tokens;
    c->zeroed.heads = a->heads;
    c->zeroed.d = a->d;
    c->zeroed.longest = a->longest;
    return QL_OK;
}

/* The result from token `first` on; that is a multiple of 8, so that whole tiles of fragments are skipped. */
static void skip_tokens(qk_cuda_attention *a, int64_t first)
{
    const int64_t width = (int64_t)a->heads * a->d;
    a->q += first * width;
    a->start += first;
    a->pos += first;
    if (a->y)
        a->y += first * width;
    else
        a->y16 = (char *)a->y16 + 2 * (a->slab ? qk_fragment_count(first, width, a->slab) : first * width);
}

ql_status ql_cuda_attention_run(ql_cuda *c, const qk_cuda_attention *a, void *scratch, ql_err *err)
{
    if (a->d % 8 != 0 || a->d > 256) {
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: head_dim %d is not a multiple of 8 up to 256",
                          c->label, a->d);
    }
    if (by_tiles(c, a)) {
        ql_cuda_note(c, QL_CUDA_RAN_ATTENTION_PREFILL);
        QL_CUDA_RUN("attention", qk_cuda_attention_prefill(c->lane->stream, a));
        return QL_OK;
    }
    ql_cuda_note(c, QL_CUDA_RAN_ATTENTION_DECODE);
    const int64_t step = tokens_at_once(a->tokens, a->heads, a->d, a->longest);
    for (int64_t first = 0; first < a->tokens; first += step) {
        qk_cuda_attention piece = *a;
        skip_tokens(&piece, first);
        piece.tokens = a->tokens - first < step ? a->tokens - first : step;
        piece.scratch = scratch;
        QL_TRY(ql_cuda_attention_clear(c, &piece, scratch, err));
        QL_CUDA_RUN("attention", qk_cuda_attention_decode(c->lane->stream, &piece));
    }
    if (a->tokens > step) c->zeroed.p = NULL; /* the last piece may have been a smaller one */
    return QL_OK;
}

/* The longest row is known on the device alone; the cache's slots bound it. */
ql_status ql_cuda_attention_step(void *ctx, const ql_tensor *q, ql_kv_view cache, const ql_tensor *start,
                                 const ql_tensor *pos, int heads, ql_tensor *y, ql_err *err)
{
    ql_cuda *c = ctx;
    QL_TRY(ql_cuda_enter(c, err));
    if (q->shape[0] == 0) return QL_OK;
    qk_cuda_attention a = {
        .q = q->data,
        .k = cache.k->data,
        .v = cache.v->data,
        .kv = ql_cuda_format(cache.k->dtype),
        .start = start->data,
        .pos = pos->data,
        .heads = heads,
        .kv_heads = (int)cache.k->shape[0],
        .d = (int)cache.k->shape[2],
        .slots = cache.k->shape[1],
        .tokens = q->shape[0],
        .longest = ql_cuda_attention_bound(cache.k->shape[1]),
        .y = y->data,
    };
    char *scratch;
    QL_TRY(ql_cuda_scratch(c, ql_cuda_attention_need(c, &a), &scratch, err));
    c->zeroed.p = NULL; /* other steps use the scratch too */
    return ql_cuda_attention_run(c, &a, scratch, err);
}
