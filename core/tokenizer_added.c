/* Finding added tokens in text: the leftmost, and of those the longest, as
 * Hugging Face's automaton does. */
#include "tokenizer_impl.h"
#include "tokenizer_utf8.h"

#include <stdlib.h>
#include <utf8proc.h>

static int by_text(const void *a, const void *b)
{
    const ql_tok_added *x = a, *y = b;
    int order = memcmp(x->text, y->text, x->len < y->len ? x->len : y->len);
    if (order != 0) return order;
    if (x->len != y->len) return x->len < y->len ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

ql_status ql_tok_added_index(ql_tok_added_set *set, ql_err *err)
{
    if (set->n > 1) qsort(set->v, set->n, sizeof *set->v, by_text);
    for (size_t i = 1; i < set->n; i++) {
        const ql_tok_added *a = &set->v[i - 1], *b = &set->v[i];
        if (a->len == b->len && memcmp(a->text, b->text, a->len) == 0)
            return ql_err_set(err, QL_ERR_UNSUPPORTED,
                              "added_tokens: %d and %d are the same text when normalised", (int)a->id,
                              (int)b->id);
    }
    size_t at = 0;
    for (unsigned b = 0; b < 256; b++) {
        set->first[b] = (uint32_t)at;
        while (at < set->n && (unsigned char)set->v[at].text[0] == b) at++;
    }
    set->first[256] = (uint32_t)set->n;
    return QL_OK;
}

/* First of v[lo, hi) whose byte number `depth` is at least c; all of them share
 * the bytes before and are longer. */
static size_t lower(const ql_tok_added *v, size_t lo, size_t hi, size_t depth, unsigned c)
{
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if ((unsigned char)v[mid].text[depth] < c)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* Longest token that text [len > 0] begins with, or NULL. The sorted range
 * narrows byte by byte. */
static const ql_tok_added *longest(const ql_tok_added_set *set, const char *text, size_t len)
{
    unsigned c = (unsigned char)text[0];
    size_t lo = set->first[c], hi = set->first[c + 1];
    const ql_tok_added *best = NULL;
    for (size_t depth = 1; lo < hi; depth++) {
        if (set->v[lo].len == depth) best = &set->v[lo++];
        if (depth == len) break;
        c = (unsigned char)text[depth];
        lo = lower(set->v, lo, hi, depth, c);
        hi = lower(set->v, lo, hi, depth, c + 1);
    }
    return best;
}

/* \w of Rust's regex crate, which decides on single_word: Alphabetic, M, Nd,
 * Pc, Join_Control. utf8proc has no Alphabetic; Other_Alphabetic outside L, M
 * and Nl are the circled and squared letters of So. */
static bool is_word(uint32_t c)
{
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
        return true;
    case UTF8PROC_CATEGORY_SO:
        return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
               (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189);
    default:
        return c == 0x200C || c == 0x200D;
    }
}

static bool stands_alone(const char *text, size_t len, size_t start, size_t end)
{
    unsigned n;
    if (start > 0 && is_word(ql_utf8_get(text + ql_utf8_before(text, start), &n))) return false;
    return end == len || !is_word(ql_utf8_get(text + end, &n));
}

const ql_tok_added *ql_tok_added_next(const ql_tok_added_set *set, const char *text, size_t len, bool special,
                                      size_t done, size_t *scan, size_t *start, size_t *end)
{
    while (set->n > 0 && *scan < len) {
        size_t at = *scan;
        const ql_tok_added *found = longest(set, text + at, len - at);
        if (found == NULL) {
            *scan = at + 1;
            continue;
        }
        *scan = at + found->len;
        if (found->special && !special) continue;
        if (found->single_word && !stands_alone(text, len, at, *scan)) continue;
        if (*scan <= done && at < done) continue; /* in white space that the token before took up */
        unsigned n;
        *start = at < done ? done : at;
        *end = *scan;
        while (found->lstrip && *start > done) {
            size_t before = ql_utf8_before(text, *start);
            if (!ql_utf8_is_space(ql_utf8_get(text + before, &n))) break;
            *start = before;
        }
        while (found->rstrip && *end < len && ql_utf8_is_space(ql_utf8_get(text + *end, &n))) *end += n;
        return found;
    }
    return NULL;
}
