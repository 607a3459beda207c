/* The tokenizer's inside, shared by core/tokenizer*.c and by nobody else.
 *
 * Data flow of encode: text -> added tokens cut out -> normalisers ->
 * normalised added tokens cut out -> pre-tokenizers
 * -> words -> BPE -> ids -> post-processor's prefix and suffix. Decode: ids ->
 * token texts -> decoder steps -> joined.
 */
#ifndef QL_TOKENIZER_IMPL_H
#define QL_TOKENIZER_IMPL_H

#include <string.h>

#include "mem.h"
#include "tokenizer.h"
#include "tokenizer_utf8.h"

/* Bounds on what a file or text may ask for. Gemma's tokenizer.json, the
 * largest in use, has 33 MB, 1.8 million JSON values and 262,145 tokens. */
#define QL_TOK_MAX_FILE ((size_t)128 << 20)
#define QL_TOK_MAX_VALUES ((size_t)4 << 20)
#define QL_TOK_MAX_ID ((int32_t)(1 << 22))
#define QL_TOK_MAX_TEXT ((size_t)256 << 20)
#define QL_TOK_MAX_STEPS 32
#define QL_TOK_MAX_NEST 8

/* Most bytes that the steps may make of `len`. NFKC makes 11 of 1 (U+FDFA), a
 * hostile Replace without bound. */
static inline size_t ql_tok_expansion(size_t len)
{
    return len < (size_t)1 << 24 ? 64 * (len + 1024) : (size_t)1 << 30;
}

/* ---- growing memory: a byte buffer, spans of a text, ids ---- */

typedef struct {
    char *p;
    size_t n, cap;
    size_t limit; /* growing beyond is an error; 0: UINT32_MAX, so that spans can
                     address it */
} ql_tok_buf;

typedef struct {
    uint32_t at, len;
} ql_tok_span;

typedef struct {
    ql_tok_span *v;
    size_t n, cap;
} ql_tok_spans;

typedef struct {
    int32_t *v;
    size_t n, cap;
} ql_tok_ids;

/* Room for `extra` more bytes; the macro keeps the common case inline. */
ql_status ql_tok_buf_grow(ql_tok_buf *b, size_t extra, ql_err *err);
ql_status ql_tok_spans_grow(ql_tok_spans *s, ql_err *err);
ql_status ql_tok_ids_grow(ql_tok_ids *ids, size_t extra, ql_err *err);

static inline ql_status ql_tok_buf_add(ql_tok_buf *b, const char *s, size_t n, ql_err *err)
{
    if (b->cap - b->n < n) {
        ql_status status = ql_tok_buf_grow(b, n, err);
        if (status != QL_OK) return status;
    }
    if (n > 0) memcpy(b->p + b->n, s, n);
    b->n += n;
    return QL_OK;
}

static inline ql_status ql_tok_spans_add(ql_tok_spans *s, size_t at, size_t len, ql_err *err)
{
    if (s->n == s->cap) {
        ql_status status = ql_tok_spans_grow(s, err);
        if (status != QL_OK) return status;
    }
    s->v[s->n++] = (ql_tok_span){(uint32_t)at, (uint32_t)len};
    return QL_OK;
}

static inline ql_status ql_tok_ids_add(ql_tok_ids *ids, int32_t id, ql_err *err)
{
    if (ids->n == ids->cap) {
        ql_status status = ql_tok_ids_grow(ids, 1, err);
        if (status != QL_OK) return status;
    }
    ids->v[ids->n++] = id;
    return QL_OK;
}

/* ---- vocabulary: id -> bytes, bytes -> id, pair of ids -> merge ---- */

enum {
    QL_TOK_USED = 1,    /* this id has a token */
    QL_TOK_MODEL = 2,   /* in model.vocab: BPE may produce it */
    QL_TOK_ADDED = 4,   /* in added_tokens: cut out of the text before BPE */
    QL_TOK_SPECIAL = 8, /* an added token marked special */
};

typedef struct {
    uint32_t at, len; /* in pool; a NUL follows */
    uint32_t flags;
} ql_tok_entry;

typedef struct {
    uint64_t key; /* left id << 32 | right id; QL_TOK_NO_PAIR in an empty slot */
    uint32_t rank;
    int32_t id; /* of the merged token */
} ql_tok_merge;

#define QL_TOK_NO_PAIR UINT64_MAX

typedef struct {
    int32_t id;   /* -1: empty */
    uint32_t tag; /* upper half of the hash: strings are compared only where it is equal */
} ql_tok_slot;

typedef struct {
    char *pool;
    size_t pool_n, pool_cap;
    ql_tok_entry *entry; /* [size] */
    int32_t size;
    ql_tok_slot *slot; /* [slot_mask + 1], open addressing */
    size_t slot_mask;
    ql_tok_merge *merge; /* [merge_mask + 1] */
    size_t merge_mask;
    uint64_t seed; /* of the string hash: a file cannot aim at one slot */
} ql_tok_vocab;

/* Tables for ids below `size`, `count` strings of `bytes` bytes altogether, and
 * `merges` merges. */
ql_status ql_tok_vocab_init(ql_tok_vocab *v, int32_t size, size_t count, size_t bytes, size_t merges,
                            ql_err *err);
void ql_tok_vocab_free(ql_tok_vocab *v);

/* Give `id` the token `s`, or add `flags` where both already belong together.
 * Errors name what clashes. */
ql_status ql_tok_vocab_put(ql_tok_vocab *v, int32_t id, const char *s, size_t len, uint32_t flags,
                           ql_err *err);
int32_t ql_tok_vocab_find(const ql_tok_vocab *v, const char *s, size_t len);       /* any token, or -1 */
int32_t ql_tok_vocab_find_model(const ql_tok_vocab *v, const char *s, size_t len); /* of model.vocab, or -1 */
void ql_tok_vocab_put_merge(ql_tok_vocab *v, int32_t left, int32_t right, uint32_t rank, int32_t id);

static inline const ql_tok_merge *ql_tok_vocab_merge(const ql_tok_vocab *v, int32_t left, int32_t right)
{
    uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t i = (size_t)((key ^ v->seed) * 0x9E3779B97F4A7C15u >> 20) & v->merge_mask;
    for (; v->merge[i].key != QL_TOK_NO_PAIR; i = (i + 1) & v->merge_mask)
        if (v->merge[i].key == key) return &v->merge[i];
    return NULL;
}

/* ---- regular expressions ---- */

typedef struct ql_tok_regex ql_tok_regex;     /* a compiled pattern: constant */
typedef struct ql_tok_matcher ql_tok_matcher; /* scratch of matching: one per thread */

/* Compile a pattern as Hugging Face's engine (Oniguruma, Ruby syntax) reads it;
 * what would mean another thing to PCRE2 is refused. Free with
 * ql_tok_regex_free. */
ql_status ql_tok_regex_new(const char *pattern, ql_tok_regex **out, ql_err *err);
void ql_tok_regex_free(ql_tok_regex *re);
ql_status ql_tok_matcher_new(ql_tok_matcher **out, ql_err *err);
void ql_tok_matcher_free(ql_tok_matcher *m);

/* First match in text [len, valid UTF-8] at or after `from`: *start, *end
 * [OUT], *found [OUT]. */
ql_status ql_tok_regex_find(const ql_tok_regex *re, ql_tok_matcher *m, const char *text, size_t len,
                            size_t from, size_t *start, size_t *end, bool *found, ql_err *err);

/* ---- steps: normalisers, pre-tokenizers and decoders as read from the file
 * ---- */

typedef enum {
    QL_TOK_NFC,
    QL_TOK_NFD,
    QL_TOK_NFKC,
    QL_TOK_NFKD,
    QL_TOK_LOWERCASE,
    QL_TOK_TRIM,    /* normaliser Strip: left, right */
    QL_TOK_PREPEND, /* with */
    QL_TOK_REPLACE, /* find or regex, with; normaliser and decoder */
    QL_TOK_SPLIT,   /* find or regex, behavior, invert */
    QL_TOK_BYTE_LEVEL,
    QL_TOK_METASPACE,
    QL_TOK_DIGITS,
    QL_TOK_PUNCTUATION,
    QL_TOK_WHITESPACE_SPLIT,
    QL_TOK_BYTE_FALLBACK,
    QL_TOK_FUSE,
    QL_TOK_STRIP, /* decoder Strip: with (one character), start, stop */
} ql_tok_kind;

typedef enum {
    QL_TOK_REMOVED,
    QL_TOK_ISOLATED,
    QL_TOK_MERGED_WITH_PREVIOUS,
    QL_TOK_MERGED_WITH_NEXT,
    QL_TOK_CONTIGUOUS,
} ql_tok_behavior;

typedef enum { QL_TOK_FIRST, QL_TOK_ALWAYS, QL_TOK_NEVER } ql_tok_scheme;

typedef struct {
    ql_tok_kind kind;
    ql_tok_regex *regex; /* owned, or NULL; then `find` is searched as it is */
    char *find;          /* owned, or NULL */
    size_t find_len;
    char *with; /* owned: replacement, prefix or character */
    size_t with_len;
    ql_tok_behavior behavior;
    ql_tok_scheme scheme;
    bool invert;
    bool left, right;  /* Strip */
    bool prefix_space; /* ByteLevel */
    bool split;        /* Metaspace: cut before each mark; ByteLevel: cut with GPT-2's
                          pattern, in regex */
    size_t start, stop;
} ql_tok_step;

typedef struct {
    ql_tok_step v[QL_TOK_MAX_STEPS];
    size_t n;
} ql_tok_steps;

void ql_tok_steps_free(ql_tok_steps *steps);

/* ---- added tokens ---- */

typedef struct {
    const char *text; /* borrowed: pool of the vocabulary, or the tokenizer's
                         added_text */
    size_t len;
    int32_t id;
    bool single_word, lstrip, rstrip, special;
} ql_tok_added;

typedef struct {
    ql_tok_added *v; /* sorted by text */
    size_t n;
    uint32_t first[257]; /* v[first[b]] .. v[first[b + 1]] begin with byte b */
} ql_tok_added_set;

/* Sort and index by first byte. Two tokens of the same text are refused: which one was meant cannot be told.
 */
ql_status ql_tok_added_index(ql_tok_added_set *set, ql_err *err);

/* Next added token in text [len] whose bytes start at or after *scan. *start
 * and *end [OUT] include the white space that the token takes up, never
 * reaching before `done`. *scan moves behind the token. NULL: none left. */
const ql_tok_added *ql_tok_added_next(const ql_tok_added_set *set, const char *text, size_t len, bool special,
                                      size_t done, size_t *scan, size_t *start, size_t *end);

/* ---- the tokenizer ---- */

#define QL_TOK_CACHE_WORD 44 /* bytes of the longest cached word, in the model's alphabet */
#define QL_TOK_CACHE_IDS 12
#define QL_TOK_CACHE_BITS 14

typedef struct {
    uint8_t len; /* 0: empty slot */
    uint8_t n;
    char word[QL_TOK_CACHE_WORD];
    int32_t id[QL_TOK_CACHE_IDS];
} ql_tok_cached;

typedef struct {
    uint32_t rank, at;
    int32_t left, right, id;
} ql_tok_candidate;

typedef struct {
    int32_t id, prev, next;
} ql_tok_symbol;

/* Grown by encode and kept for the next call. */
typedef struct {
    ql_tok_buf text[2];
    ql_tok_buf norm[2];
    ql_tok_spans spans[2];
    ql_tok_ids symbols; /* a word's ids before merging */
    ql_tok_symbol *chain;
    ql_tok_candidate *heap;
    size_t chain_cap, heap_cap;
    ql_tok_cached *cache; /* [1 << QL_TOK_CACHE_BITS], made at the first encode */
    ql_tok_matcher *matcher;
} ql_tok_scratch;

struct ql_tokenizer {
    ql_tok_vocab vocab;
    int32_t char_id[0x800]; /* model's id of a character below U+0800, or -1: all
                               of the byte-level alphabet */
    int32_t byte_id[256];   /* id of <0xNN>, or -1 */
    int32_t unk;            /* model.unk_token, or -1 */
    bool byte_fallback, fuse_unk, ignore_merges;
    bool cut_at_mark; /* no merge joins a character with a following U+2581: words
                         can be cut there */

    ql_tok_steps normalizers, pretokenizers, decoders;
    bool has_decoder; /* without one, tokens are joined with spaces */
    ql_tok_added_set raw, normalized;
    char **added_text; /* [added_text_n] normalised texts of added tokens */
    size_t added_text_n;
    ql_tok_ids prefix, suffix; /* of the post-processor */
    ql_tokenizer_roles roles;

    ql_tok_scratch scratch;
};

/* tokenizer_load.c: fill a zeroed tokenizer from the file; the caller frees it
 * on failure. */
ql_status ql_tok_load(ql_tokenizer *t, const char *path, ql_err *err);

/* tokenizer_norm.c: apply the normalisers to text [len]; *out [OUT] is borrowed
 * from `bufs` or is `text` itself. */
ql_status ql_tok_normalize(const ql_tok_steps *steps, ql_tok_matcher *m, ql_tok_buf bufs[2], const char *text,
                           size_t len, const char **out, size_t *out_len, ql_err *err);
/* Append text [len] with every match of a Replace step exchanged. */
ql_status ql_tok_replace(const ql_tok_step *step, ql_tok_matcher *m, const char *text, size_t len,
                         ql_tok_buf *out, ql_err *err);

/* tokenizer_pretok.c: cut text [len] into words. *base and *words [OUT] are
 * borrowed from the scratch. `first`: the text starts where the whole input
 * starts. */
ql_status ql_tok_pretokenize(ql_tokenizer *t, const char *text, size_t len, bool first, const char **base,
                             const ql_tok_spans **words, ql_err *err);
/* Printable stand-in of a byte (GPT-2's table), U+0021..U+0143, and back: -1
 * for other characters. */
uint32_t ql_tok_byte_char(unsigned char byte);
int ql_tok_char_byte(uint32_t c);

/* tokenizer_bpe.c: append the ids of one word [len]. */
ql_status ql_tok_bpe(ql_tokenizer *t, const char *word, size_t len, ql_tok_ids *out, ql_err *err);
/* Once the vocabulary is complete: the tables char_id, byte_id, cut_at_mark. */
void ql_tok_bpe_prepare(ql_tokenizer *t);

/* tokenizer_decode.c */

/* A list of token texts on its way through the decoder: spans[cur] into
 * text[cur]; the other two are written next. */
typedef struct {
    ql_tok_buf text[2];
    ql_tok_spans spans[2];
    int cur;
    ql_tok_matcher *matcher; /* made when a pattern needs it */
} ql_tok_list;

void ql_tok_list_free(ql_tok_list *list);
void ql_tok_list_clear(ql_tok_list *list);
ql_status ql_tok_list_add(ql_tok_list *list, const char *s, size_t len, ql_err *err);

/* Run steps [from, to) over the list. `first`: its first token is the first of
 * the output. */
ql_status ql_tok_decode_steps(const ql_tok_steps *steps, size_t from, size_t to, bool first,
                              ql_tok_list *list, ql_err *err);

/* Append the token's bytes: its characters through the byte alphabet, or as
 * they are if one is outside of it. */
ql_status ql_tok_bytes_of(const char *s, size_t len, ql_tok_buf *out, ql_err *err);
int ql_tok_fallback_byte(const char *s, size_t len); /* value of "<0xNN>", else -1 */

/* Append the whole characters of partial + s, keeping an unfinished one in
 * *partial. What belongs to no character becomes U+FFFD: one for each maximal
 * part of a character (as Rust and WHATWG do), or one for each byte. */
ql_status ql_tok_mend(ql_utf8_partial *partial, bool each_byte, const char *s, size_t n, ql_tok_buf *out,
                      ql_err *err);
ql_status ql_tok_mend_end(ql_utf8_partial *partial, bool each_byte, ql_tok_buf *out, ql_err *err);

#endif
