/* Byte-pair encoding of one word: start from characters, join the pair of
 * lowest rank, leftmost first, until none of the neighbours can be joined
 * (Sennrich et al. 2016, as GPT-2 and SentencePiece apply it).
 */
#include "hash.h"
#include "tokenizer_impl.h"
#include "tokenizer_utf8.h"

#include <stdio.h>

/* Up to here a scan over all pairs for each join is faster than a heap. */
#define SHORT_WORD 32
#define MARK "\xE2\x96\x81" /* U+2581, the SentencePiece space */

/* Does s have a mark behind another character? */
static bool mark_inside(const char *s, size_t len)
{
    for (size_t i = 1; i + 3 <= len; i++)
        if (memcmp(s + i, MARK, 3) == 0 && (i < 3 || memcmp(s + i - 3, MARK, 3) != 0)) return true;
    return false;
}

void ql_tok_bpe_prepare(ql_tokenizer *t)
{
    const ql_tok_vocab *v = &t->vocab;
    for (uint32_t c = 0; c < 0x800; c++) {
        char s[4];
        t->char_id[c] = ql_tok_vocab_find_model(v, s, ql_utf8_put(c, s));
    }
    for (unsigned b = 0; b < 256; b++) {
        char s[8];
        snprintf(s, sizeof s, "<0x%02X>", b);
        t->byte_id[b] = ql_tok_vocab_find_model(v, s, 6);
    }
    bool keeps_all = t->unk >= 0 || t->byte_fallback;
    for (unsigned b = 0; b < 256 && t->unk < 0; b++) keeps_all = keeps_all && t->byte_id[b] >= 0;
    /* A character that is dropped would let the marks around it meet. */
    t->cut_at_mark = keeps_all && ql_tok_vocab_find_model(v, MARK, 3) >= 0;
    for (size_t i = 0; i <= v->merge_mask && t->cut_at_mark; i++) {
        if (v->merge[i].key == QL_TOK_NO_PAIR) continue;
        const ql_tok_entry *e = &v->entry[v->merge[i].id];
        if (mark_inside(v->pool + e->at, e->len)) t->cut_at_mark = false;
    }
}

/* The word's characters as ids into scratch.symbols, with unknown ones as byte
 * tokens or unk. The order of a pending unk and byte tokens behind it is
 * Hugging Face's. */
static ql_status start_symbols(ql_tokenizer *t, const char *w, size_t len, ql_err *err)
{
    ql_tok_ids *out = &t->scratch.symbols;
    out->n = 0;
    bool unk_pending = false;
    unsigned n;
    if (out->cap < len + 1) { /* at most one id a byte, and an unk */
        ql_status status = ql_tok_ids_grow(out, len + 1, err);
        if (status != QL_OK) return status;
    }
    for (size_t i = 0; i < len; i += n) {
        uint32_t c = ql_utf8_get(w + i, &n);
        int32_t id = c < 0x800 ? t->char_id[c] : ql_tok_vocab_find_model(&t->vocab, w + i, n);
        if (id >= 0) {
            if (unk_pending) out->v[out->n++] = t->unk;
            unk_pending = false;
            out->v[out->n++] = id;
            continue;
        }
        if (t->byte_fallback) {
            bool all = true;
            for (unsigned k = 0; k < n; k++) all = all && t->byte_id[(unsigned char)w[i + k]] >= 0;
            if (all) {
                for (unsigned k = 0; k < n; k++) out->v[out->n++] = t->byte_id[(unsigned char)w[i + k]];
                continue;
            }
        }
        if (t->unk < 0) continue; /* no unk token: the character is dropped */
        if (unk_pending && !t->fuse_unk) out->v[out->n++] = t->unk;
        unk_pending = true;
    }
    if (unk_pending) out->v[out->n++] = t->unk;
    return QL_OK;
}

/* What joining a pair gives; rank NO_RANK where it cannot be joined. */
typedef struct {
    uint32_t rank;
    int32_t id;
} joined;

#define NO_RANK UINT32_MAX

static joined join(const ql_tok_vocab *v, int32_t left, int32_t right)
{
    const ql_tok_merge *m = ql_tok_vocab_merge(v, left, right);
    return m != NULL ? (joined){m->rank, m->id} : (joined){NO_RANK, -1};
}

/* Join in place by scanning for the lowest rank; returns the number of ids left. */
static size_t join_short(const ql_tok_vocab *v, int32_t *id, size_t n)
{
    joined pair[SHORT_WORD]; /* pair[i]: id[i] and id[i + 1] joined */
    for (size_t i = 0; i + 1 < n; i++) pair[i] = join(v, id[i], id[i + 1]);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (pair[i].rank < pair[best].rank) best = i;
        if (pair[best].rank == NO_RANK) break;
        id[best] = pair[best].id;
        n--;
        memmove(id + best + 1, id + best + 2, (n - best - 1) * sizeof *id);
        if (best + 2 < n) memmove(pair + best + 1, pair + best + 2, (n - best - 2) * sizeof *pair);
        if (best + 1 < n) pair[best] = join(v, id[best], id[best + 1]);
        if (best > 0) pair[best - 1] = join(v, id[best - 1], id[best]);
    }
    return n;
}

static bool before(const ql_tok_candidate *a, const ql_tok_candidate *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void sift_up(ql_tok_candidate *heap, size_t i)
{
    ql_tok_candidate x = heap[i];
    for (; i > 0 && before(&x, &heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = x;
}

static void sift_down(ql_tok_candidate *heap, size_t n, size_t i)
{
    ql_tok_candidate x = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(&heap[child + 1], &heap[child])) child++;
        if (!before(&heap[child], &x)) break;
        heap[i] = heap[child];
    }
    heap[i] = x;
}

/* A candidate for the pair that starts at `at`, if it can be joined. */
static bool candidate(const ql_tok_vocab *v, const ql_tok_symbol *chain, int32_t at, ql_tok_candidate *out)
{
    int32_t next = chain[at].next;
    if (next < 0) return false;
    const ql_tok_merge *m = ql_tok_vocab_merge(v, chain[at].id, chain[next].id);
    if (m == NULL) return false;
    *out = (ql_tok_candidate){m->rank, (uint32_t)at, chain[at].id, chain[next].id, m->id};
    return true;
}

/* Room for n symbols and the candidates: n - 1 at first, and each of at most n
 * - 1 joins takes one out and puts two in. */
static ql_status chain_room(ql_tok_scratch *s, size_t n, ql_err *err)
{
    if (s->chain_cap >= n) return QL_OK;
    if (n > INT32_MAX / 2) return ql_err_set(err, QL_ERR_FORMAT, "a word of %zu symbols is too long", n);
    ql_tok_symbol *chain = ql_realloc(s->chain, n * sizeof *chain);
    if (chain == NULL) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a word of %zu symbols", n);
    s->chain = chain;
    ql_tok_candidate *heap = ql_realloc(s->heap, 2 * n * sizeof *heap);
    if (heap == NULL) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a word of %zu symbols", n);
    s->heap = heap;
    s->chain_cap = n;
    return QL_OK;
}

/* Join with a chain of symbols and a heap of candidates, n log n; ids end up in
 * id[0 .. *n). */
static ql_status join_long(ql_tokenizer *t, int32_t *id, size_t *n, ql_err *err)
{
    ql_tok_scratch *s = &t->scratch;
    ql_status status = chain_room(s, *n, err);
    if (status != QL_OK) return status;
    ql_tok_symbol *chain = s->chain;
    ql_tok_candidate *heap = s->heap;
    size_t waiting = 0;
    int32_t count = (int32_t)*n;
    for (int32_t i = 0; i < count; i++) chain[i] = (ql_tok_symbol){id[i], i - 1, i + 1 < count ? i + 1 : -1};
    for (int32_t i = 0; i < count; i++)
        if (candidate(&t->vocab, chain, i, &heap[waiting])) waiting++;
    for (size_t i = waiting / 2; i-- > 0;) sift_down(heap, waiting, i);

    while (waiting > 0) {
        ql_tok_candidate best = heap[0];
        heap[0] = heap[--waiting];
        if (waiting > 0) sift_down(heap, waiting, 0);
        ql_tok_symbol *left = &chain[best.at];
        if (left->id != best.left || left->next < 0 || chain[left->next].id != best.right)
            continue; /* outdated */
        ql_tok_symbol *right = &chain[left->next];
        left->id = best.id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0) chain[left->next].prev = (int32_t)best.at;
        if (candidate(&t->vocab, chain, (int32_t)best.at, &heap[waiting])) sift_up(heap, waiting++);
        if (left->prev >= 0 && candidate(&t->vocab, chain, left->prev, &heap[waiting]))
            sift_up(heap, waiting++);
    }
    size_t kept = 0;
    for (int32_t i = 0; i >= 0; i = chain[i].next) id[kept++] = chain[i].id;
    *n = kept;
    return QL_OK;
}

static ql_status word_ids(ql_tokenizer *t, const char *w, size_t len, ql_tok_ids *out, ql_err *err)
{
    ql_tok_cached *cached = NULL;
    if (len <= QL_TOK_CACHE_WORD && t->scratch.cache != NULL) {
        uint64_t h = ql_hash(t->vocab.seed, w, len);
        cached = &t->scratch.cache[h >> (64 - QL_TOK_CACHE_BITS)];
        if (cached->len == len && memcmp(cached->word, w, len) == 0) {
            for (unsigned i = 0; i < cached->n; i++) {
                ql_status status = ql_tok_ids_add(out, cached->id[i], err);
                if (status != QL_OK) return status;
            }
            return QL_OK;
        }
    }
    ql_status status = start_symbols(t, w, len, err);
    if (status != QL_OK) return status;
    int32_t *id = t->scratch.symbols.v;
    size_t n = t->scratch.symbols.n;
    if (n <= SHORT_WORD)
        n = join_short(&t->vocab, id, n);
    else
        status = join_long(t, id, &n, err);
    if (status != QL_OK) return status;
    if (cached != NULL && n <= QL_TOK_CACHE_IDS) {
        cached->len = (uint8_t)len;
        cached->n = (uint8_t)n;
        memcpy(cached->word, w, len);
        memcpy(cached->id, id, n * sizeof *id);
    }
    if (out->cap - out->n < n) status = ql_tok_ids_grow(out, n, err);
    if (status != QL_OK) return status;
    if (n > 0) memcpy(out->v + out->n, id, n * sizeof *id);
    out->n += n;
    return QL_OK;
}

ql_status ql_tok_bpe(ql_tokenizer *t, const char *word, size_t len, ql_tok_ids *out, ql_err *err)
{
    if (len == 0) return QL_OK;
    if (t->ignore_merges) {
        int32_t id = ql_tok_vocab_find_model(&t->vocab, word, len);
        if (id >= 0) return ql_tok_ids_add(out, id, err);
    }
    if (!t->cut_at_mark) return word_ids(t, word, len, out, err);
    size_t at = 0;
    for (size_t i = 1; i + 3 <= len;) {
        const char *mark = memmem(word + i, len - i, MARK, 3);
        if (mark == NULL) break;
        size_t found = (size_t)(mark - word);
        i = found + 3;
        if (found >= 3 && memcmp(mark - 3, MARK, 3) == 0) continue;
        ql_status status = word_ids(t, word + at, found - at, out, err);
        if (status != QL_OK) return status;
        at = found;
    }
    return word_ids(t, word + at, len - at, out, err);
}
