#include "tokenizer_impl.h"

#include "hash.h"

static ql_status out_of_memory(ql_err *err, const char *what)
{
    return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %s", what);
}

ql_status ql_tok_buf_grow(ql_tok_buf *b, size_t extra, ql_err *err)
{
    size_t limit = b->limit > 0 ? b->limit : UINT32_MAX;
    size_t need;
    if (!ql_add(b->n, extra, &need) || need > limit)
        return ql_err_set(err, QL_ERR_FORMAT, "the tokenizer's steps expand this text beyond %zu bytes",
                          limit);
    size_t cap = b->cap < 256 ? 256 : b->cap * 2;
    if (cap < need) cap = need;
    char *p = ql_realloc(b->p, cap);
    if (p == NULL) return out_of_memory(err, "text");
    b->p = p;
    b->cap = cap;
    return QL_OK;
}

ql_status ql_tok_spans_grow(ql_tok_spans *s, ql_err *err)
{
    size_t cap = s->cap < 64 ? 64 : s->cap * 2, bytes;
    ql_tok_span *v = ql_mul(cap, sizeof *v, &bytes) ? ql_realloc(s->v, bytes) : NULL;
    if (v == NULL) return out_of_memory(err, "words");
    s->v = v;
    s->cap = cap;
    return QL_OK;
}

ql_status ql_tok_ids_grow(ql_tok_ids *ids, size_t extra, ql_err *err)
{
    size_t need, bytes;
    if (!ql_add(ids->n, extra, &need)) return out_of_memory(err, "token ids");
    size_t cap = ids->cap < 64 ? 64 : ids->cap * 2;
    if (cap < need) cap = need;
    int32_t *v = ql_mul(cap, sizeof *v, &bytes) ? ql_realloc(ids->v, bytes) : NULL;
    if (v == NULL) return out_of_memory(err, "token ids");
    ids->v = v;
    ids->cap = cap;
    return QL_OK;
}

/* Smallest power of two that leaves half of the slots empty. */
static size_t slots_for(size_t count)
{
    size_t slots = 16;
    while (slots < count * 2) slots *= 2;
    return slots;
}

ql_status ql_tok_vocab_init(ql_tok_vocab *v, int32_t size, size_t count, size_t bytes, size_t merges,
                            ql_err *err)
{
    *v = (ql_tok_vocab){0};
    size_t slots = slots_for(count), merge_slots = slots_for(merges);
    if (bytes + count > UINT32_MAX) return ql_err_set(err, QL_ERR_FORMAT, "the vocabulary exceeds 4 GiB");
    v->seed = ql_hash_key();
    v->pool_cap = bytes + count; /* a NUL after each */
    v->pool = ql_malloc(v->pool_cap);
    v->entry = ql_calloc((size_t)size, sizeof *v->entry);
    v->slot = ql_malloc(slots * sizeof *v->slot);
    v->merge = ql_malloc(merge_slots * sizeof *v->merge);
    if (v->pool == NULL || v->entry == NULL || v->slot == NULL || v->merge == NULL) {
        ql_tok_vocab_free(v);
        return out_of_memory(err, "the vocabulary");
    }
    v->size = size;
    v->slot_mask = slots - 1;
    v->merge_mask = merge_slots - 1;
    memset(v->slot, 0xFF, slots * sizeof *v->slot);
    memset(v->merge, 0xFF, merge_slots * sizeof *v->merge);
    return QL_OK;
}

void ql_tok_vocab_free(ql_tok_vocab *v)
{
    ql_free(v->pool);
    ql_free(v->entry);
    ql_free(v->slot);
    ql_free(v->merge);
    *v = (ql_tok_vocab){0};
}

/* Slot of the string, or the empty one where it belongs. */
static ql_tok_slot *find_slot(const ql_tok_vocab *v, const char *s, size_t len, uint32_t *tag)
{
    uint64_t h = ql_hash(v->seed, s, len);
    *tag = (uint32_t)(h >> 32);
    for (size_t i = (size_t)h & v->slot_mask;; i = (i + 1) & v->slot_mask) {
        ql_tok_slot *slot = &v->slot[i];
        if (slot->id < 0) return slot;
        if (slot->tag != *tag) continue;
        const ql_tok_entry *e = &v->entry[slot->id];
        if (e->len == len && memcmp(v->pool + e->at, s, len) == 0) return slot;
    }
}

ql_status ql_tok_vocab_put(ql_tok_vocab *v, int32_t id, const char *s, size_t len, uint32_t flags,
                           ql_err *err)
{
    uint32_t tag;
    ql_tok_slot *slot = find_slot(v, s, len, &tag);
    ql_tok_entry *e = &v->entry[id];
    if (slot->id >= 0) {
        if (slot->id != id)
            return ql_err_set(err, QL_ERR_FORMAT, "token \"%.60s\" has two ids, %d and %d", s, (int)slot->id,
                              (int)id);
        if (e->flags & flags & (QL_TOK_MODEL | QL_TOK_ADDED))
            return ql_err_set(err, QL_ERR_FORMAT, "token \"%.60s\" stands there twice", s);
        e->flags |= flags;
        return QL_OK;
    }
    if (e->flags & QL_TOK_USED)
        return ql_err_set(err, QL_ERR_FORMAT, "id %d is used twice, for \"%.60s\" and \"%.60s\"", (int)id,
                          v->pool + e->at, s);
    *e = (ql_tok_entry){(uint32_t)v->pool_n, (uint32_t)len, flags | QL_TOK_USED};
    memcpy(v->pool + v->pool_n, s, len);
    v->pool[v->pool_n + len] = '\0';
    v->pool_n += len + 1;
    *slot = (ql_tok_slot){id, tag};
    return QL_OK;
}

int32_t ql_tok_vocab_find(const ql_tok_vocab *v, const char *s, size_t len)
{
    uint32_t tag;
    return find_slot(v, s, len, &tag)->id;
}

int32_t ql_tok_vocab_find_model(const ql_tok_vocab *v, const char *s, size_t len)
{
    int32_t id = ql_tok_vocab_find(v, s, len);
    return id >= 0 && (v->entry[id].flags & QL_TOK_MODEL) ? id : -1;
}

void ql_tok_vocab_put_merge(ql_tok_vocab *v, int32_t left, int32_t right, uint32_t rank, int32_t id)
{
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t i = (size_t)((key ^ v->seed) * 0x9E3779B97F4A7C15u >> 20) & v->merge_mask;
    while (v->merge[i].key != QL_TOK_NO_PAIR && v->merge[i].key != key) i = (i + 1) & v->merge_mask;
    v->merge[i] = (ql_tok_merge){key, rank, id};
}
