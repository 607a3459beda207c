/* Normalisers: what is done to a text before it is cut into words. */
#include "tokenizer_impl.h"
#include "tokenizer_utf8.h"

#include <stdlib.h>
#include <utf8proc.h>

/* utf8proc orders combining marks by exchanging neighbours, quadratic in a
 * run's length. Unicode's stream-safe text format allows 30. */
#define MAX_MARKS 1024

ql_status ql_tok_replace(const ql_tok_step *step, ql_tok_matcher *m, const char *text, size_t len,
                         ql_tok_buf *out, ql_err *err)
{
    size_t at = 0, from = 0;
    bool matched = false;
    while (len > 0 && from <= len) { /* nothing is found in an empty text, not even an empty match */
        size_t start, end;
        bool found;
        if (step->regex != NULL) {
            ql_status status = ql_tok_regex_find(step->regex, m, text, len, from, &start, &end, &found, err);
            if (status != QL_OK) return status;
            if (found && start == end && matched && start == at) {
                from += from < len ? ql_utf8_width((unsigned char)text[from]) : 1;
                continue; /* an empty match right behind another one does not count */
            }
        } else {
            const char *hit = memmem(text + from, len - from, step->find, step->find_len);
            found = hit != NULL;
            start = found ? (size_t)(hit - text) : len;
            end = start + step->find_len;
        }
        if (!found) break;
        ql_status status = ql_tok_buf_add(out, text + at, start - at, err);
        if (status == QL_OK) status = ql_tok_buf_add(out, step->with, step->with_len, err);
        if (status != QL_OK) return status;
        at = from = end;
        matched = true;
    }
    return ql_tok_buf_add(out, text + at, len - at, err);
}

static ql_status check_marks(const char *text, size_t len, ql_err *err)
{
    unsigned n;
    size_t run = 0;
    for (size_t i = 0; i < len; i += n) {
        uint32_t c = ql_utf8_get(text + i, &n);
        run = c >= 0x300 && utf8proc_get_property((utf8proc_int32_t)c)->combining_class != 0 ? run + 1 : 0;
        if (run > MAX_MARKS)
            return ql_err_set(err, QL_ERR_FORMAT, "more than %d combining marks on one character at byte %zu",
                              MAX_MARKS, i);
    }
    return QL_OK;
}

static ql_status unicode_form(ql_tok_kind kind, const char *text, size_t len, ql_tok_buf *out, ql_err *err)
{
    size_t ascii = 0;
    while (ascii < len && (unsigned char)text[ascii] < 0x80) ascii++;
    if (ascii == len) return ql_tok_buf_add(out, text, len, err);
    ql_status status = check_marks(text, len, err);
    if (status != QL_OK) return status;

    int options = UTF8PROC_STABLE;
    options |= kind == QL_TOK_NFC || kind == QL_TOK_NFKC ? UTF8PROC_COMPOSE : UTF8PROC_DECOMPOSE;
    if (kind == QL_TOK_NFKC || kind == QL_TOK_NFKD) options |= UTF8PROC_COMPAT;
    utf8proc_uint8_t *made = NULL;
    utf8proc_ssize_t n = utf8proc_map((const utf8proc_uint8_t *)text, (utf8proc_ssize_t)len, &made,
                                      (utf8proc_option_t)options);
    if (n < 0)
        status = ql_err_set(err, n == UTF8PROC_ERROR_NOMEM ? QL_ERR_MEMORY : QL_ERR_FORMAT,
                            "Unicode normalisation failed: %s", utf8proc_errmsg(n));
    else
        status = ql_tok_buf_add(out, (const char *)made, (size_t)n, err);
    free(made);
    return status;
}

static ql_status lowercase(const char *text, size_t len, ql_tok_buf *out, ql_err *err)
{
    unsigned n;
    for (size_t i = 0; i < len; i += n) {
        uint32_t c = ql_utf8_get(text + i, &n);
        char made[4];
        ql_status status;
        if (c == 0x130) { /* the one letter whose lower case is two characters
                             (SpecialCasing.txt) */
            status = ql_tok_buf_add(out, "i\xCC\x87", 3, err);
        } else {
            unsigned m = ql_utf8_put((uint32_t)utf8proc_tolower((utf8proc_int32_t)c), made);
            status = ql_tok_buf_add(out, made, m, err);
        }
        if (status != QL_OK) return status;
    }
    return QL_OK;
}

static ql_status trim(const ql_tok_step *step, const char *text, size_t len, ql_tok_buf *out, ql_err *err)
{
    unsigned n;
    size_t start = 0, end = len;
    while (step->left && start < end && ql_utf8_is_space(ql_utf8_get(text + start, &n))) start += n;
    while (step->right && end > start) {
        size_t before = ql_utf8_before(text, end);
        if (!ql_utf8_is_space(ql_utf8_get(text + before, &n))) break;
        end = before;
    }
    return ql_tok_buf_add(out, text + start, end - start, err);
}

static ql_status prepend(const ql_tok_step *step, const char *text, size_t len, ql_tok_buf *out, ql_err *err)
{
    if (len == 0) return QL_OK;
    ql_status status = ql_tok_buf_add(out, step->with, step->with_len, err);
    return status == QL_OK ? ql_tok_buf_add(out, text, len, err) : status;
}

static ql_status apply(const ql_tok_step *step, ql_tok_matcher *m, const char *text, size_t len,
                       ql_tok_buf *out, ql_err *err)
{
    switch (step->kind) {
    case QL_TOK_NFC:
    case QL_TOK_NFD:
    case QL_TOK_NFKC:
    case QL_TOK_NFKD:
        return unicode_form(step->kind, text, len, out, err);
    case QL_TOK_LOWERCASE:
        return lowercase(text, len, out, err);
    case QL_TOK_TRIM:
        return trim(step, text, len, out, err);
    case QL_TOK_PREPEND:
        return prepend(step, text, len, out, err);
    case QL_TOK_REPLACE:
        return ql_tok_replace(step, m, text, len, out, err);
    default:
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "step %d is no normaliser", (int)step->kind);
    }
}

ql_status ql_tok_normalize(const ql_tok_steps *steps, ql_tok_matcher *m, ql_tok_buf bufs[2], const char *text,
                           size_t len, const char **out, size_t *out_len, ql_err *err)
{
    int to = 0;
    for (size_t i = 0; i < steps->n; i++, to ^= 1) {
        bufs[to].n = 0;
        ql_status status = apply(&steps->v[i], m, text, len, &bufs[to], err);
        if (status != QL_OK) return status;
        text = bufs[to].p != NULL ? bufs[to].p : "";
        len = bufs[to].n;
    }
    *out = text;
    *out_len = len;
    return QL_OK;
}
