#include "tokenizer_impl.h"

ql_status ql_tokenizer_load(const char *path, ql_tokenizer **out, ql_err *err)
{
    *out = NULL;
    ql_tokenizer *t = ql_calloc(1, sizeof *t);
    if (t == NULL) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for the tokenizer");
    ql_status status = ql_tok_load(t, path, err);
    if (status != QL_OK) {
        ql_tokenizer_free(t);
        return status;
    }
    *out = t;
    return QL_OK;
}

static void free_scratch(ql_tok_scratch *s)
{
    for (int i = 0; i < 2; i++) {
        ql_free(s->text[i].p);
        ql_free(s->norm[i].p);
        ql_free(s->spans[i].v);
    }
    ql_free(s->symbols.v);
    ql_free(s->chain);
    ql_free(s->heap);
    ql_free(s->cache);
    ql_tok_matcher_free(s->matcher);
}

void ql_tokenizer_free(ql_tokenizer *t)
{
    if (t == NULL) return;
    ql_tok_vocab_free(&t->vocab);
    ql_tok_steps_free(&t->normalizers);
    ql_tok_steps_free(&t->pretokenizers);
    ql_tok_steps_free(&t->decoders);
    ql_free(t->raw.v);
    ql_free(t->normalized.v);
    for (size_t i = 0; i < t->added_text_n; i++) ql_free(t->added_text[i]);
    ql_free(t->added_text);
    ql_free(t->prefix.v);
    ql_free(t->suffix.v);
    free_scratch(&t->scratch);
    ql_free(t);
}

/* Text without added tokens -> words -> ids. */
static ql_status encode_plain(ql_tokenizer *t, const char *text, size_t len, bool first, ql_tok_ids *out,
                              ql_err *err)
{
    const char *base;
    const ql_tok_spans *words;
    if (len == 0) return QL_OK;
    ql_status status = ql_tok_pretokenize(t, text, len, first, &base, &words, err);
    for (size_t i = 0; i < words->n && status == QL_OK; i++)
        status = ql_tok_bpe(t, base + words->v[i].at, words->v[i].len, out, err);
    return status;
}

/* A stretch between two added tokens, or all of the text: normalise it and cut
 * out the normalised added tokens. */
static ql_status encode_stretch(ql_tokenizer *t, const char *text, size_t len, bool first, bool special,
                                ql_tok_ids *out, ql_err *err)
{
    size_t done = 0, scan = 0, start, end;
    const ql_tok_added *token;
    if (len == 0) return QL_OK;
    ql_status status =
        ql_tok_normalize(&t->normalizers, t->scratch.matcher, t->scratch.norm, text, len, &text, &len, err);
    if (status != QL_OK) return status;
    while ((token = ql_tok_added_next(&t->normalized, text, len, special, done, &scan, &start, &end)) !=
           NULL) {
        status = encode_plain(t, text + done, start - done, first && done == 0, out, err);
        if (status == QL_OK) status = ql_tok_ids_add(out, token->id, err);
        if (status != QL_OK) return status;
        done = end;
    }
    return encode_plain(t, text + done, len - done, first && done == 0, out, err);
}

static ql_status encode_all(ql_tokenizer *t, const char *text, size_t len, bool special, ql_tok_ids *out,
                            ql_err *err)
{
    size_t done = 0, scan = 0, start, end;
    const ql_tok_added *token;
    while ((token = ql_tok_added_next(&t->raw, text, len, special, done, &scan, &start, &end)) != NULL) {
        ql_status status = encode_stretch(t, text + done, start - done, done == 0, special, out, err);
        if (status == QL_OK) status = ql_tok_ids_add(out, token->id, err);
        if (status != QL_OK) return status;
        done = end;
    }
    return encode_stretch(t, text + done, len - done, done == 0, special, out, err);
}

static ql_status check_text(const char *text, size_t len, ql_err *err)
{
    if (len > QL_TOK_MAX_TEXT)
        return ql_err_set(err, QL_ERR_ARG, "a text of %zu bytes is longer than %zu", len, QL_TOK_MAX_TEXT);
    size_t bad = ql_utf8_check(text, len);
    if (bad == len) return QL_OK;
    ql_err_set(err, QL_ERR_FORMAT, "the text is not UTF-8: byte 0x%02X at offset %zu",
               (unsigned char)text[bad], bad);
    return ql_err_hint(err, "convert the text to UTF-8 first");
}

static ql_status add_many(const ql_tok_ids *from, ql_tok_ids *to, ql_err *err)
{
    ql_status status = QL_OK;
    for (size_t i = 0; i < from->n && status == QL_OK; i++) status = ql_tok_ids_add(to, from->v[i], err);
    return status;
}

ql_status ql_tokenizer_encode(ql_tokenizer *t, const char *text, size_t len, unsigned flags, int32_t **ids,
                              size_t *n, ql_err *err)
{
    *ids = NULL;
    *n = 0;
    ql_tok_ids out = {0};
    ql_tok_scratch *s = &t->scratch;
    ql_status status = check_text(text, len, err);
    if (status != QL_OK) goto fail;
    /* Without memory for the cache words are merged anew. */
    if (s->cache == NULL) s->cache = ql_calloc((size_t)1 << QL_TOK_CACHE_BITS, sizeof *s->cache);
    for (int i = 0; i < 2; i++) s->text[i].limit = s->norm[i].limit = ql_tok_expansion(len);
    if (flags & QL_TOKENIZER_BOS) status = add_many(&t->prefix, &out, err);
    if (status == QL_OK) status = encode_all(t, text, len, flags & QL_TOKENIZER_SPECIAL, &out, err);
    if (status == QL_OK && flags & QL_TOKENIZER_BOS) status = add_many(&t->suffix, &out, err);
    if (status != QL_OK) goto fail;
    *ids = out.v;
    *n = out.n;
    out.v = NULL;
fail:
    ql_free(out.v);
    return status;
}

int32_t ql_tokenizer_vocab_size(const ql_tokenizer *t)
{
    return t->vocab.size;
}

const char *ql_tokenizer_token(const ql_tokenizer *t, int32_t id, size_t *len)
{
    bool used = id >= 0 && id < t->vocab.size && (t->vocab.entry[id].flags & QL_TOK_USED);
    if (len != NULL) *len = used ? t->vocab.entry[id].len : 0;
    return used ? t->vocab.pool + t->vocab.entry[id].at : NULL;
}

int32_t ql_tokenizer_id(const ql_tokenizer *t, const char *token, size_t len)
{
    return ql_tok_vocab_find(&t->vocab, token, len);
}

bool ql_tokenizer_is_special(const ql_tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->vocab.size && (t->vocab.entry[id].flags & QL_TOK_SPECIAL);
}

ql_tokenizer_roles ql_tokenizer_special(const ql_tokenizer *t)
{
    return t->roles;
}
