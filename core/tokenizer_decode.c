/* Token ids -> text: each decoder step turns a list of token texts into
 * another; the last list is joined. */
#include "tokenizer_impl.h"

void ql_tok_list_free(ql_tok_list *list)
{
    for (int i = 0; i < 2; i++) {
        ql_free(list->text[i].p);
        ql_free(list->spans[i].v);
    }
    ql_tok_matcher_free(list->matcher);
    *list = (ql_tok_list){0};
}

void ql_tok_list_clear(ql_tok_list *list)
{
    for (int i = 0; i < 2; i++) list->text[i].n = list->text[i].limit = list->spans[i].n = 0;
    list->cur = 0;
}

ql_status ql_tok_list_add(ql_tok_list *list, const char *s, size_t len, ql_err *err)
{
    ql_tok_buf *text = &list->text[list->cur];
    ql_status status = ql_tok_spans_add(&list->spans[list->cur], text->n, len, err);
    return status == QL_OK ? ql_tok_buf_add(text, s, len, err) : status;
}

static ql_status mend_byte(ql_utf8_partial *p, bool each_byte, unsigned char byte, ql_tok_buf *out,
                           ql_err *err)
{
    if (p->n > 0) {
        if (ql_utf8_continues(p->byte[0], p->n, byte)) {
            p->byte[p->n++] = byte;
            if (p->n < ql_utf8_width(p->byte[0])) return QL_OK;
            p->n = 0;
            return ql_tok_buf_add(out, (const char *)p->byte, ql_utf8_width(p->byte[0]), err);
        }
        ql_status status = ql_tok_mend_end(p, each_byte, out, err);
        if (status != QL_OK) return status;
    }
    switch (ql_utf8_width(byte)) {
    case 0:
        return ql_tok_buf_add(out, QL_UTF8_REPLACEMENT, 3, err);
    case 1:
        return ql_tok_buf_add(out, (const char *)&byte, 1, err);
    default:
        p->byte[p->n++] = byte;
        return QL_OK;
    }
}

ql_status ql_tok_mend(ql_utf8_partial *partial, bool each_byte, const char *s, size_t n, ql_tok_buf *out,
                      ql_err *err)
{
    ql_status status = QL_OK;
    for (size_t i = 0; i < n && status == QL_OK; i++)
        status = mend_byte(partial, each_byte, (unsigned char)s[i], out, err);
    return status;
}

ql_status ql_tok_mend_end(ql_utf8_partial *partial, bool each_byte, ql_tok_buf *out, ql_err *err)
{
    unsigned marks = partial->n == 0 ? 0 : each_byte ? partial->n : 1;
    partial->n = 0;
    ql_status status = QL_OK;
    while (marks-- > 0 && status == QL_OK) status = ql_tok_buf_add(out, QL_UTF8_REPLACEMENT, 3, err);
    return status;
}

ql_status ql_tok_bytes_of(const char *s, size_t len, ql_tok_buf *out, ql_err *err)
{
    size_t mark = out->n;
    unsigned n;
    for (size_t i = 0; i < len; i += n) {
        int byte = ql_tok_char_byte(ql_utf8_get(s + i, &n));
        if (byte < 0) {
            out->n = mark;
            return ql_tok_buf_add(out, s, len, err);
        }
        char c = (char)byte;
        ql_status status = ql_tok_buf_add(out, &c, 1, err);
        if (status != QL_OK) return status;
    }
    return QL_OK;
}

static int hex(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

int ql_tok_fallback_byte(const char *s, size_t len)
{
    if (len != 6 || memcmp(s, "<0x", 3) != 0 || s[5] != '>') return -1;
    int high = hex(s[3]), low = hex(s[4]);
    return high >= 0 && low >= 0 ? high * 16 + low : -1;
}

/* All tokens' bytes as one text, mended. */
static ql_status decode_bytes(const char *base, const ql_tok_spans *in, ql_tok_list *out, ql_err *err)
{
    ql_tok_buf bytes = {0}, *text = &out->text[out->cur];
    ql_utf8_partial partial = {0};
    ql_status status = QL_OK;
    for (size_t i = 0; i < in->n && status == QL_OK; i++) {
        bytes.n = 0;
        status = ql_tok_bytes_of(base + in->v[i].at, in->v[i].len, &bytes, err);
        if (status == QL_OK) status = ql_tok_mend(&partial, false, bytes.p, bytes.n, text, err);
    }
    if (status == QL_OK) status = ql_tok_mend_end(&partial, false, text, err);
    if (status == QL_OK) status = ql_tok_spans_add(&out->spans[out->cur], 0, text->n, err);
    ql_free(bytes.p);
    return status;
}

/* A run of byte tokens becomes one token if it is UTF-8 as a whole, else a
 * U+FFFD for each byte. */
static ql_status end_run(const ql_tok_buf *run, ql_tok_list *out, ql_err *err)
{
    ql_status status = QL_OK;
    if (run->n == 0) return QL_OK;
    if (ql_utf8_check(run->p, run->n) == run->n) return ql_tok_list_add(out, run->p, run->n, err);
    for (size_t i = 0; i < run->n && status == QL_OK; i++)
        status = ql_tok_list_add(out, QL_UTF8_REPLACEMENT, 3, err);
    return status;
}

static ql_status decode_fallback(const char *base, const ql_tok_spans *in, ql_tok_list *out, ql_err *err)
{
    ql_tok_buf run = {0};
    ql_status status = QL_OK;
    for (size_t i = 0; i < in->n && status == QL_OK; i++) {
        const char *s = base + in->v[i].at;
        int byte = ql_tok_fallback_byte(s, in->v[i].len);
        if (byte >= 0) {
            char c = (char)byte;
            status = ql_tok_buf_add(&run, &c, 1, err);
            continue;
        }
        status = end_run(&run, out, err);
        run.n = 0;
        if (status == QL_OK) status = ql_tok_list_add(out, s, in->v[i].len, err);
    }
    if (status == QL_OK) status = end_run(&run, out, err);
    ql_free(run.p);
    return status;
}

/* The mark is a space, except in the first token, where it goes if the scheme
 * had put one in front. */
static ql_status decode_marks(const ql_tok_step *step, bool first, const char *base, const ql_tok_spans *in,
                              ql_tok_list *out, ql_err *err)
{
    ql_tok_buf *text = &out->text[out->cur];
    ql_status status = QL_OK;
    for (size_t i = 0; i < in->n && status == QL_OK; i++) {
        const char *s = base + in->v[i].at;
        size_t at = text->n;
        unsigned n;
        for (size_t k = 0; k < in->v[i].len && status == QL_OK; k += n) {
            ql_utf8_get(s + k, &n);
            if (n != step->with_len || memcmp(s + k, step->with, n) != 0)
                status = ql_tok_buf_add(text, s + k, n, err);
            else if (i > 0 || !first || step->scheme == QL_TOK_NEVER)
                status = ql_tok_buf_add(text, " ", 1, err);
        }
        if (status == QL_OK) status = ql_tok_spans_add(&out->spans[out->cur], at, text->n - at, err);
    }
    return status;
}

/* Up to `start` of the character off the front and up to `stop` off the end of
 * each token. */
static ql_status decode_strip(const ql_tok_step *step, const char *base, const ql_tok_spans *in,
                              ql_tok_list *out, ql_err *err)
{
    size_t n = step->with_len;
    ql_status status = QL_OK;
    for (size_t i = 0; i < in->n && status == QL_OK; i++) {
        const char *s = base + in->v[i].at;
        size_t from = 0, to = in->v[i].len;
        for (size_t k = 0; k < step->start && to - from >= n && memcmp(s + from, step->with, n) == 0; k++)
            from += n;
        for (size_t k = 0; k < step->stop && to - from >= n && memcmp(s + to - n, step->with, n) == 0; k++)
            to -= n;
        status = ql_tok_list_add(out, s + from, to - from, err);
    }
    return status;
}

static ql_status decode_replace(const ql_tok_step *step, const char *base, const ql_tok_spans *in,
                                ql_tok_list *out, ql_err *err)
{
    ql_tok_buf *text = &out->text[out->cur];
    ql_status status = QL_OK;
    if (step->regex != NULL && out->matcher == NULL) status = ql_tok_matcher_new(&out->matcher, err);
    for (size_t i = 0; i < in->n && status == QL_OK; i++) {
        size_t at = text->n;
        status = ql_tok_replace(step, out->matcher, base + in->v[i].at, in->v[i].len, text, err);
        if (status == QL_OK) status = ql_tok_spans_add(&out->spans[out->cur], at, text->n - at, err);
    }
    return status;
}

ql_status ql_tok_decode_steps(const ql_tok_steps *steps, size_t from, size_t to, bool first,
                              ql_tok_list *list, ql_err *err)
{
    ql_status status = QL_OK;
    for (size_t i = from; i < to && status == QL_OK; i++) {
        const ql_tok_step *step = &steps->v[i];
        const ql_tok_buf *text = &list->text[list->cur];
        const ql_tok_spans *in = &list->spans[list->cur];
        const char *base = text->p != NULL ? text->p : "";
        list->cur ^= 1;
        list->text[list->cur].n = 0;
        list->text[list->cur].limit = ql_tok_expansion(text->n);
        list->spans[list->cur].n = 0;
        switch (step->kind) {
        case QL_TOK_BYTE_LEVEL:
            status = decode_bytes(base, in, list, err);
            break;
        case QL_TOK_BYTE_FALLBACK:
            status = decode_fallback(base, in, list, err);
            break;
        case QL_TOK_METASPACE:
            status = decode_marks(step, first, base, in, list, err);
            break;
        case QL_TOK_STRIP:
            status = decode_strip(step, base, in, list, err);
            break;
        case QL_TOK_REPLACE:
            status = decode_replace(step, base, in, list, err);
            break;
        default: /* Fuse: the texts stand one behind the other already */
            status = ql_tok_buf_add(&list->text[list->cur], base, text->n, err);
            if (status == QL_OK) status = ql_tok_spans_add(&list->spans[list->cur], 0, text->n, err);
        }
    }
    return status;
}

ql_status ql_tokenizer_decode(const ql_tokenizer *t, const int32_t *ids, size_t n, bool skip_special,
                              char **out, size_t *len, ql_err *err)
{
    *out = NULL;
    *len = 0;
    ql_tok_list list = {0};
    ql_status status = QL_OK;
    for (size_t i = 0; i < n && status == QL_OK; i++) {
        if (ids[i] < 0) {
            status = ql_err_set(err, QL_ERR_ARG, "id %d at position %zu is negative", (int)ids[i], i + 1);
            break;
        }
        size_t token_len;
        const char *token = ql_tokenizer_token(t, ids[i], &token_len);
        if (token == NULL || (skip_special && ql_tokenizer_is_special(t, ids[i]))) continue;
        if (!t->has_decoder && list.spans[0].n > 0) status = ql_tok_list_add(&list, " ", 1, err);
        if (status == QL_OK) status = ql_tok_list_add(&list, token, token_len, err);
    }
    if (status == QL_OK) status = ql_tok_decode_steps(&t->decoders, 0, t->decoders.n, true, &list, err);
    if (status == QL_OK) {
        list.text[list.cur].limit = 0;
        status = ql_tok_buf_add(&list.text[list.cur], "", 1, err);
    }
    if (status == QL_OK) {
        *out = list.text[list.cur].p; /* every step leaves the joined list in the buffer */
        *len = list.text[list.cur].n - 1;
        list.text[list.cur].p = NULL;
    }
    ql_tok_list_free(&list);
    return status;
}
