/* Pre-tokenizers: cut a text into the words that BPE never joins. */
#include "tokenizer_impl.h"
#include "tokenizer_utf8.h"

#include <utf8proc.h>

/* GPT-2's byte alphabet: printable Latin-1 stands for itself, the other 68
 * bytes for U+0100 onwards in their order. */
uint32_t ql_tok_byte_char(unsigned char byte)
{
    if ((byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD)) return byte;
    if (byte <= 0x20) return 0x100u + byte;
    if (byte <= 0xA0) return 0x121u + (byte - 0x7Fu);
    return 0x143;
}

int ql_tok_char_byte(uint32_t c)
{
    if ((c >= 0x21 && c <= 0x7E) || (c >= 0xA1 && c <= 0xFF && c != 0xAD)) return (int)c;
    if (c >= 0x100 && c <= 0x120) return (int)(c - 0x100);
    if (c >= 0x121 && c <= 0x142) return (int)(c - 0x121 + 0x7F);
    return c == 0x143 ? 0xAD : -1;
}

static bool is_digit(uint32_t c) /* Rust's char::is_numeric */
{
    if (c < 0x80) return c >= '0' && c <= '9';
    utf8proc_category_t k = utf8proc_category((utf8proc_int32_t)c);
    return k == UTF8PROC_CATEGORY_ND || k == UTF8PROC_CATEGORY_NL || k == UTF8PROC_CATEGORY_NO;
}

static bool is_punctuation(uint32_t c)
{
    if (c < 0x80)
        return (c >= 0x21 && c <= 0x2F) || (c >= 0x3A && c <= 0x40) || (c >= 0x5B && c <= 0x60) ||
               (c >= 0x7B && c <= 0x7E);
    utf8proc_category_t k = utf8proc_category((utf8proc_int32_t)c);
    return k >= UTF8PROC_CATEGORY_PC && k <= UTF8PROC_CATEGORY_PO;
}

/* One piece of text being cut: what was found so far and how pieces join. */
typedef struct {
    ql_tok_spans *out;
    size_t mark; /* first span of this piece in out */
    ql_tok_behavior behavior;
    bool invert, previous;
} cutter;

/* Take the next part of the piece, a match or what lies between two. Empty
 * parts take part in joining and are dropped at the end, as Hugging Face has
 * it. */
static ql_status cut(cutter *c, size_t at, size_t end, bool match, ql_err *err)
{
    bool is = match != c->invert, joins = false;
    bool any = c->out->n > c->mark, previous = c->previous;
    c->previous = is;
    switch (c->behavior) {
    case QL_TOK_REMOVED:
        if (is) return QL_OK;
        break;
    case QL_TOK_ISOLATED:
        break;
    case QL_TOK_MERGED_WITH_PREVIOUS:
        joins = any && is && !previous;
        break;
    case QL_TOK_MERGED_WITH_NEXT:
        joins = any && !is && previous;
        break;
    case QL_TOK_CONTIGUOUS:
        joins = any && is == previous;
        break;
    }
    if (!joins) return ql_tok_spans_add(c->out, at, end - at, err);
    ql_tok_span *last = &c->out->v[c->out->n - 1];
    last->len = (uint32_t)(end - last->at);
    return QL_OK;
}

static void drop_empty(cutter *c)
{
    size_t n = c->mark;
    for (size_t i = c->mark; i < c->out->n; i++)
        if (c->out->v[i].len > 0) c->out->v[n++] = c->out->v[i];
    c->out->n = n;
}

static ql_status cut_by_regex(const ql_tok_regex *re, ql_tok_matcher *m, const char *base, ql_tok_span piece,
                              cutter *c, ql_err *err)
{
    const char *text = base + piece.at;
    size_t done = 0, from = 0;
    bool matched = false;
    while (from <= piece.len) {
        size_t start, end;
        bool found;
        ql_status status = ql_tok_regex_find(re, m, text, piece.len, from, &start, &end, &found, err);
        if (status != QL_OK) return status;
        if (!found) break;
        if (start == end && matched && start == done) { /* empty, right behind the last match */
            from += from < piece.len ? ql_utf8_width((unsigned char)text[from]) : 1;
            continue;
        }
        if (start > done) status = cut(c, piece.at + done, piece.at + start, false, err);
        if (status == QL_OK) status = cut(c, piece.at + start, piece.at + end, true, err);
        if (status != QL_OK) return status;
        done = from = end;
        matched = true;
    }
    return done < piece.len ? cut(c, piece.at + done, piece.at + piece.len, false, err) : QL_OK;
}

static ql_status cut_by_string(const char *find, size_t n, const char *base, ql_tok_span piece, cutter *c,
                               ql_err *err)
{
    const char *text = base + piece.at, *hit;
    size_t done = 0;
    while (done < piece.len && (hit = memmem(text + done, piece.len - done, find, n)) != NULL) {
        size_t start = (size_t)(hit - text);
        ql_status status = QL_OK;
        if (start > done) status = cut(c, piece.at + done, piece.at + start, false, err);
        if (status == QL_OK) status = cut(c, piece.at + start, piece.at + start + n, true, err);
        if (status != QL_OK) return status;
        done = start + n;
    }
    return done < piece.len ? cut(c, piece.at + done, piece.at + piece.len, false, err) : QL_OK;
}

static ql_status cut_by_class(bool (*is)(uint32_t), const char *base, ql_tok_span piece, cutter *c,
                              ql_err *err)
{
    size_t done = piece.at, end = (size_t)piece.at + piece.len;
    unsigned n;
    for (size_t i = piece.at; i < end; i += n) {
        if (!is(ql_utf8_get(base + i, &n))) continue;
        ql_status status = QL_OK;
        if (done < i) status = cut(c, done, i, false, err);
        if (status == QL_OK) status = cut(c, i, i + n, true, err);
        if (status != QL_OK) return status;
        done = i + n;
    }
    return done < end ? cut(c, done, end, false, err) : QL_OK;
}

/* Cut every span of `in` by the step; spans point into the same text. */
static ql_status cut_all(const ql_tok_step *step, ql_tok_matcher *m, const char *base, const ql_tok_spans *in,
                         ql_tok_spans *out, ql_err *err)
{
    out->n = 0;
    for (size_t i = 0; i < in->n; i++) {
        cutter c = {.out = out, .mark = out->n, .behavior = step->behavior, .invert = step->invert};
        ql_status status;
        switch (step->kind) {
        case QL_TOK_DIGITS:
            status = cut_by_class(is_digit, base, in->v[i], &c, err);
            break;
        case QL_TOK_PUNCTUATION:
            status = cut_by_class(is_punctuation, base, in->v[i], &c, err);
            break;
        case QL_TOK_WHITESPACE_SPLIT:
            status = cut_by_class(ql_utf8_is_space, base, in->v[i], &c, err);
            break;
        default:
            status = step->regex != NULL ? cut_by_regex(step->regex, m, base, in->v[i], &c, err)
                                         : cut_by_string(step->find, step->find_len, base, in->v[i], &c, err);
        }
        if (status != QL_OK) return status;
        drop_empty(&c);
    }
    return QL_OK;
}

/* Each span with a space in front where it has none. */
static ql_status add_prefix_spaces(const char *base, const ql_tok_spans *in, ql_tok_buf *text,
                                   ql_tok_spans *out, ql_err *err)
{
    out->n = 0;
    text->n = 0;
    for (size_t i = 0; i < in->n; i++) {
        const char *s = base + in->v[i].at;
        size_t at = text->n;
        ql_status status = s[0] == ' ' ? QL_OK : ql_tok_buf_add(text, " ", 1, err);
        if (status == QL_OK) status = ql_tok_buf_add(text, s, in->v[i].len, err);
        if (status == QL_OK) status = ql_tok_spans_add(out, at, text->n - at, err);
        if (status != QL_OK) return status;
    }
    return QL_OK;
}

/* Each span with its bytes written in the printable alphabet: one or two bytes
 * for each. */
static ql_status to_byte_alphabet(const char *base, const ql_tok_spans *in, ql_tok_buf *text,
                                  ql_tok_spans *out, ql_err *err)
{
    out->n = 0;
    text->n = 0;
    for (size_t i = 0; i < in->n; i++) {
        const char *s = base + in->v[i].at;
        size_t at = text->n, len = in->v[i].len;
        if (text->cap - text->n < 2 * len) {
            ql_status status = ql_tok_buf_grow(text, 2 * len, err);
            if (status != QL_OK) return status;
        }
        char *to = text->p + text->n;
        for (size_t k = 0; k < len; k++) {
            uint32_t c = ql_tok_byte_char((unsigned char)s[k]);
            if (c >= 0x80) *to++ = (char)(0xC0 | c >> 6);
            *to++ = (char)(c >= 0x80 ? 0x80 | (c & 0x3F) : c);
        }
        text->n = (size_t)(to - text->p);
        ql_status status = ql_tok_spans_add(out, at, text->n - at, err);
        if (status != QL_OK) return status;
    }
    return QL_OK;
}

/* Each span with spaces written as the mark, and a mark in front as the scheme
 * says. */
static ql_status to_marks(const ql_tok_step *step, bool first, const char *base, const ql_tok_spans *in,
                          ql_tok_buf *text, ql_tok_spans *out, ql_err *err)
{
    out->n = 0;
    text->n = 0;
    for (size_t i = 0; i < in->n; i++) {
        const char *s = base + in->v[i].at;
        size_t at = text->n, len = in->v[i].len;
        bool marked = s[0] == ' ' || (len >= step->with_len && memcmp(s, step->with, step->with_len) == 0);
        bool wanted = step->scheme == QL_TOK_ALWAYS || (step->scheme == QL_TOK_FIRST && first && i == 0);
        ql_status status = wanted && !marked ? ql_tok_buf_add(text, step->with, step->with_len, err) : QL_OK;
        for (size_t k = 0; k < len && status == QL_OK;) {
            const char *space = memchr(s + k, ' ', len - k);
            size_t n = space != NULL ? (size_t)(space - s) - k : len - k;
            status = ql_tok_buf_add(text, s + k, n, err);
            k += n + 1;
            if (status == QL_OK && space != NULL)
                status = ql_tok_buf_add(text, step->with, step->with_len, err);
        }
        if (status == QL_OK) status = ql_tok_spans_add(out, at, text->n - at, err);
        if (status != QL_OK) return status;
    }
    return QL_OK;
}

/* The state of a run through the steps: which spans and which text are current.
 */
typedef struct {
    ql_tok_scratch *s;
    const char *base;
    int spans, text; /* spans: current; text: the one to write next */
} run;

static void rewrote(run *r)
{
    r->base = r->s->text[r->text].p != NULL ? r->s->text[r->text].p : "";
    r->spans ^= 1;
    r->text ^= 1;
}

static ql_status one_step(run *r, const ql_tok_step *step, bool first, ql_err *err)
{
    ql_tok_scratch *s = r->s;
    ql_status status = QL_OK;
    if (step->kind == QL_TOK_BYTE_LEVEL && step->prefix_space) {
        status =
            add_prefix_spaces(r->base, &s->spans[r->spans], &s->text[r->text], &s->spans[r->spans ^ 1], err);
        if (status != QL_OK) return status;
        rewrote(r);
    }
    if (step->kind == QL_TOK_METASPACE) {
        status = to_marks(step, first, r->base, &s->spans[r->spans], &s->text[r->text],
                          &s->spans[r->spans ^ 1], err);
        if (status != QL_OK) return status;
        rewrote(r);
    }
    if (step->split) {
        status = cut_all(step, s->matcher, r->base, &s->spans[r->spans], &s->spans[r->spans ^ 1], err);
        if (status != QL_OK) return status;
        r->spans ^= 1;
    }
    if (step->kind == QL_TOK_BYTE_LEVEL) {
        status =
            to_byte_alphabet(r->base, &s->spans[r->spans], &s->text[r->text], &s->spans[r->spans ^ 1], err);
        if (status != QL_OK) return status;
        rewrote(r);
    }
    return QL_OK;
}

ql_status ql_tok_pretokenize(ql_tokenizer *t, const char *text, size_t len, bool first, const char **base,
                             const ql_tok_spans **words, ql_err *err)
{
    run r = {.s = &t->scratch, .base = text};
    t->scratch.spans[0].n = 0;
    ql_status status = len > 0 ? ql_tok_spans_add(&t->scratch.spans[0], 0, len, err) : QL_OK;
    for (size_t i = 0; i < t->pretokenizers.n && status == QL_OK; i++)
        status = one_step(&r, &t->pretokenizers.v[i], first, err);
    *base = r.base;
    *words = &t->scratch.spans[r.spans];
    return status;
}
