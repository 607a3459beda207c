/* Decoding one id at a time. The decoder's steps fall into those that look at
 * single tokens, then bytes becoming characters, then what is stripped from the
 * front of the text; a decoder that does not is run at flush.
 */
#include "tokenizer_impl.h"

typedef enum { PLAIN, BYTE_LEVEL, BYTE_FALLBACK } sink;

struct ql_token_stream {
    const ql_tokenizer *t;
    bool skip_special;
    bool at_flush;    /* keep the ids, decode them all at flush */
    size_t per_token; /* decoder steps before the sink */
    sink sink;
    const ql_tok_step *strip; /* Strip behind Fuse, or NULL */

    bool started; /* a token came */
    size_t to_strip;
    ql_utf8_partial partial;
    ql_tok_ids kept;
    ql_tok_list list;
    ql_tok_buf bytes, out;
};

/* Sort the steps; false where the text of a token depends on later ones. */
static bool plan(ql_token_stream *s)
{
    const ql_tok_steps *d = &s->t->decoders;
    size_t i = 0;
    while (i < d->n && (d->v[i].kind == QL_TOK_REPLACE || d->v[i].kind == QL_TOK_STRIP ||
                        d->v[i].kind == QL_TOK_METASPACE))
        i++;
    s->per_token = i;
    if (i < d->n && d->v[i].kind == QL_TOK_BYTE_LEVEL) s->sink = BYTE_LEVEL, i++;
    if (s->sink == PLAIN && i < d->n && d->v[i].kind == QL_TOK_BYTE_FALLBACK) s->sink = BYTE_FALLBACK, i++;
    bool one = s->sink == BYTE_LEVEL; /* the list is a single text from here on */
    while (i < d->n && d->v[i].kind == QL_TOK_FUSE) one = true, i++;
    if (one && i < d->n && d->v[i].kind == QL_TOK_STRIP && d->v[i].stop == 0) s->strip = &d->v[i++];
    return i == d->n;
}

static void restart(ql_token_stream *s)
{
    s->started = false;
    s->to_strip = s->strip != NULL ? s->strip->start : 0;
    s->partial.n = 0;
    s->kept.n = 0;
}

ql_status ql_token_stream_new(const ql_tokenizer *t, bool skip_special, ql_token_stream **out, ql_err *err)
{
    *out = NULL;
    ql_token_stream *s = ql_calloc(1, sizeof *s);
    if (s == NULL) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a token stream");
    s->t = t;
    s->skip_special = skip_special;
    s->at_flush = !plan(s);
    restart(s);
    *out = s;
    return QL_OK;
}

void ql_token_stream_free(ql_token_stream *s)
{
    if (s == NULL) return;
    ql_tok_list_free(&s->list);
    ql_free(s->kept.v);
    ql_free(s->bytes.p);
    ql_free(s->out.p);
    ql_free(s);
}

/* Hand out what this call made, without what is stripped from the front of the
 * text. */
static void give(ql_token_stream *s, const char **text, size_t *len)
{
    const char *p = s->out.p != NULL ? s->out.p : "";
    size_t n = s->out.n;
    while (s->to_strip > 0 && n > 0) {
        size_t width = s->strip->with_len;
        if (n < width || memcmp(p, s->strip->with, width) != 0) {
            s->to_strip = 0;
            break;
        }
        p += width;
        n -= width;
        s->to_strip--;
    }
    *text = p;
    *len = n;
}

static ql_status into_sink(ql_token_stream *s, const char *token, size_t len, ql_err *err)
{
    ql_status status;
    int byte;
    switch (s->sink) {
    case BYTE_LEVEL:
        s->bytes.n = 0;
        status = ql_tok_bytes_of(token, len, &s->bytes, err);
        return status == QL_OK ? ql_tok_mend(&s->partial, false, s->bytes.p, s->bytes.n, &s->out, err)
                               : status;
    case BYTE_FALLBACK:
        byte = ql_tok_fallback_byte(token, len);
        if (byte >= 0) return ql_tok_mend(&s->partial, true, &(char){(char)byte}, 1, &s->out, err);
        status = ql_tok_mend_end(&s->partial, true, &s->out, err);
        return status == QL_OK ? ql_tok_buf_add(&s->out, token, len, err) : status;
    default:
        return ql_tok_buf_add(&s->out, token, len, err);
    }
}

ql_status ql_token_stream_push(ql_token_stream *s, int32_t id, const char **text, size_t *len, ql_err *err)
{
    *text = NULL;
    *len = 0;
    if (id < 0) return ql_err_set(err, QL_ERR_ARG, "id %d is negative", (int)id);
    s->out.n = 0;
    size_t token_len;
    const char *token = ql_tokenizer_token(s->t, id, &token_len);
    ql_status status = QL_OK;
    if (token == NULL || (s->skip_special && ql_tokenizer_is_special(s->t, id))) {
        give(s, text, len);
        return QL_OK;
    }
    if (s->at_flush) {
        status = ql_tok_ids_add(&s->kept, id, err);
    } else {
        if (!s->t->has_decoder && s->started) status = ql_tok_buf_add(&s->out, " ", 1, err);
        ql_tok_list_clear(&s->list);
        if (status == QL_OK) status = ql_tok_list_add(&s->list, token, token_len, err);
        if (status == QL_OK)
            status = ql_tok_decode_steps(&s->t->decoders, 0, s->per_token, !s->started, &s->list, err);
        const ql_tok_buf *made = &s->list.text[s->list.cur];
        if (status == QL_OK) status = into_sink(s, made->p != NULL ? made->p : "", made->n, err);
        s->started = true;
    }
    if (status == QL_OK) give(s, text, len);
    return status;
}

ql_status ql_token_stream_flush(ql_token_stream *s, const char **text, size_t *len, ql_err *err)
{
    *text = NULL;
    *len = 0;
    s->out.n = 0;
    ql_status status;
    if (s->at_flush) {
        char *all;
        size_t n;
        status = ql_tokenizer_decode(s->t, s->kept.v, s->kept.n, s->skip_special, &all, &n, err);
        if (status == QL_OK) status = ql_tok_buf_add(&s->out, all, n, err);
        ql_free(all);
    } else {
        status = ql_tok_mend_end(&s->partial, s->sink == BYTE_FALLBACK, &s->out, err);
    }
    if (status == QL_OK) give(s, text, len);
    restart(s);
    return status;
}
