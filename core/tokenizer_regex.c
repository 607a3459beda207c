/* Patterns of tokenizer.json through PCRE2.
 *
 * Hugging Face runs them with Oniguruma in Ruby syntax. Most of what tokenizers
 * use means the same to PCRE2; the shorthands for classes differ a little and
 * are spelled out, and what would silently mean another thing is refused.
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>

#include "tokenizer_impl.h"

#define MAX_PATTERN 32768u
/* Steps of backtracking that one search may take. Whitespace runs need about
 * two a byte; a pattern that needs more than this for a constant part is of the
 * exponential kind. */
#define MATCH_STEPS 5000000u
#define HEAP_KIB 65536u
#define JIT_STACK_MAX ((size_t)8 << 20)

struct ql_tok_regex {
    pcre2_code *code;
};

struct ql_tok_matcher {
    pcre2_match_data *data;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

/* Oniguruma's shorthands by Unicode property, compared with it at every code point. PCRE2's own \s has U+180E
 * too and its \w lacks marks; Oniguruma's \w, but not inside a class, has the Latin-1 superscripts and
 * fractions. What is left is Unicode's version: characters younger than PCRE2's (10.42: Unicode 14) are
 * unassigned to it. */
#define SPACE "\\p{White_Space}"
#define NOT_SPACE "\\P{White_Space}"
#define WORD "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"
#define LATIN1 "\\xB2\\xB3\\xB9\\xBC-\\xBE"

static ql_status foreign(ql_err *err, const char *pattern, size_t at, const char *what)
{
    return ql_err_set(err, QL_ERR_UNSUPPORTED, "pattern offset %zu (\"%.12s\"): %s is not supported", at,
                      pattern + at, what);
}

/* Translate the escape at p[i] == '\\'; advances *i past it. */
static ql_status translate_escape(const char *p, size_t *i, bool in_class, ql_tok_buf *out, ql_err *err)
{
    size_t at = *i;
    char c = p[at + 1];
    const char *text = NULL;
    char plain[3] = {'\\', c, '\0'};
    switch (c) {
    case '\0':
        return foreign(err, p, at, "a backslash at the end");
    case 's':
        text = SPACE;
        break;
    case 'S':
        text = NOT_SPACE;
        break;
    case 'w':
        text = in_class ? WORD : "[" WORD LATIN1 "]";
        break;
    case 'W':
        if (in_class) return foreign(err, p, at, "\\W inside a class");
        text = "[^" WORD LATIN1 "]";
        break;
    case 'v':
        text = "\\x0b";
        break;
    case 'd':
    case 'D':
    case 'p':
    case 'P':
    case 'r':
    case 'n':
    case 't':
    case 'f':
    case 'a':
    case 'e':
    case 'x':
        text = plain;
        break;
    case 'A':
    case 'z':
    case 'Z':
        if (in_class) return foreign(err, p, at, "an anchor inside a class");
        text = plain;
        break;
    default:
        if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'))
            return foreign(err, p, at, "this escape");
        text = plain;
    }
    *i = at + 2;
    ql_status status = ql_tok_buf_add(out, text, strlen(text), err);
    if (status != QL_OK || p[at + 2] != '{' || strchr("pPx", c) == NULL) return status;
    size_t n = strcspn(p + at + 2, "}"); /* a name or number in braces, which are not an interval's */
    if (p[at + 2 + n] == '\0') return foreign(err, p, at, "an open brace");
    *i = at + 2 + n + 1;
    return ql_tok_buf_add(out, p + at + 2, n + 1, err);
}

/* Of the groups "(?..." only those that both engines read alike. */
static ql_status check_group(const char *p, size_t i, ql_err *err)
{
    if (p[i + 1] == '*') return foreign(err, p, i, "a verb");
    if (p[i + 1] != '?') return QL_OK;
    switch (p[i + 2]) {
    case ':':
    case '=':
    case '!':
    case '>':
        return QL_OK;
    case '<':
        return p[i + 3] == '=' || p[i + 3] == '!' ? QL_OK : foreign(err, p, i, "a named group");
    case 'i':
        if (p[i + 3] == ':' || p[i + 3] == ')') return QL_OK;
        return foreign(err, p, i, "this group");
    case '-':
        if (p[i + 3] == 'i' && (p[i + 4] == ':' || p[i + 4] == ')')) return QL_OK;
        return foreign(err, p, i, "this group");
    default:
        return foreign(err, p, i, "this group");
    }
}

static ql_status translate(const char *p, ql_tok_buf *out, ql_err *err)
{
    bool in_class = false;
    size_t opened = 0; /* first place in a class where ']' is no longer a literal */
    for (size_t i = 0; p[i] != '\0';) {
        ql_status status = QL_OK;
        if (p[i] == '\\') {
            status = translate_escape(p, &i, in_class, out, err);
            if (status != QL_OK) return status;
            continue;
        }
        if (in_class) {
            if (p[i] == '[') return foreign(err, p, i, "a class inside a class");
            if (p[i] == '&' && p[i + 1] == '&') return foreign(err, p, i, "an intersection of classes");
            if (p[i] == ']') {
                if (i == opened) return foreign(err, p, i, "an unescaped ] at the start of a class");
                in_class = false;
            }
        } else if (p[i] == '[') {
            in_class = true;
            opened = i + (p[i + 1] == '^' ? 2 : 1);
            size_t n = opened - i;
            status = ql_tok_buf_add(out, p + i, n, err);
            if (status != QL_OK) return status;
            i = opened;
            continue;
        } else if (p[i] == '(') {
            status = check_group(p, i, err);
        } else if (p[i] == '}' && p[i + 1] == '+') {
            status = foreign(err, p, i, "a possessive interval");
        }
        if (status == QL_OK) status = ql_tok_buf_add(out, p + i, 1, err);
        if (status != QL_OK) return status;
        i++;
    }
    return QL_OK;
}

ql_status ql_tok_regex_new(const char *pattern, ql_tok_regex **out, ql_err *err)
{
    *out = NULL;
    ql_status status;
    ql_tok_buf text = {.limit = MAX_PATTERN};
    pcre2_compile_context *context = NULL;
    ql_tok_regex *re = ql_calloc(1, sizeof *re);
    if (re == NULL) {
        status = ql_err_set(err, QL_ERR_MEMORY, "out of memory for a pattern");
        goto fail;
    }
    if (strlen(pattern) > MAX_PATTERN / 2) {
        status = ql_err_set(err, QL_ERR_FORMAT, "the pattern has more than %u bytes", MAX_PATTERN / 2);
        goto fail;
    }
    status = translate(pattern, &text, err);
    if (status != QL_OK) goto fail;

    context = pcre2_compile_context_create(NULL);
    if (context == NULL) {
        status = ql_err_set(err, QL_ERR_MEMORY, "out of memory for a pattern");
        goto fail;
    }
    pcre2_set_newline(context, PCRE2_NEWLINE_LF);
    pcre2_set_bsr(context, PCRE2_BSR_UNICODE);
    int code;
    size_t at;
    /* In Ruby syntax ^ and $ work at every line. */
    re->code = pcre2_compile((PCRE2_SPTR)(text.p != NULL ? text.p : ""), text.n,
                             PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C |
                                 PCRE2_NO_AUTO_CAPTURE,
                             &code, &at, context);
    if (re->code == NULL) {
        char why[160];
        pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
        status = ql_err_set(err, QL_ERR_FORMAT, "pattern \"%.80s\" is not valid: %s", pattern, why);
        goto fail;
    }
    pcre2_jit_compile(re->code, PCRE2_JIT_COMPLETE); /* where it fails, pcre2_match interprets */
    status = QL_OK;
    *out = re;
    re = NULL;
fail:
    pcre2_compile_context_free(context);
    ql_free(text.p);
    ql_tok_regex_free(re);
    return status;
}

void ql_tok_regex_free(ql_tok_regex *re)
{
    if (re == NULL) return;
    pcre2_code_free(re->code);
    ql_free(re);
}

ql_status ql_tok_matcher_new(ql_tok_matcher **out, ql_err *err)
{
    *out = NULL;
    ql_tok_matcher *m = ql_calloc(1, sizeof *m);
    if (m == NULL) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for matching");
    m->data = pcre2_match_data_create(1, NULL);
    m->context = pcre2_match_context_create(NULL);
    m->stack = pcre2_jit_stack_create(32 * 1024, JIT_STACK_MAX, NULL);
    if (m->data == NULL || m->context == NULL) {
        ql_tok_matcher_free(m);
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory for matching");
    }
    pcre2_set_heap_limit(m->context, HEAP_KIB);
    if (m->stack != NULL) pcre2_jit_stack_assign(m->context, NULL, m->stack);
    *out = m;
    return QL_OK;
}

void ql_tok_matcher_free(ql_tok_matcher *m)
{
    if (m == NULL) return;
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->context);
    pcre2_jit_stack_free(m->stack);
    ql_free(m);
}

ql_status ql_tok_regex_find(const ql_tok_regex *re, ql_tok_matcher *m, const char *text, size_t len,
                            size_t from, size_t *start, size_t *end, bool *found, ql_err *err)
{
    size_t steps = MATCH_STEPS + 4 * len;
    pcre2_set_match_limit(m->context, steps < UINT32_MAX ? (uint32_t)steps : UINT32_MAX);
    int rc = pcre2_match(re->code, (PCRE2_SPTR)text, len, from, PCRE2_NO_UTF_CHECK, m->data, m->context);
    *found = rc >= 0;
    if (rc >= 0) {
        const size_t *pair = pcre2_get_ovector_pointer(m->data);
        *start = pair[0];
        *end = pair[1];
        return QL_OK;
    }
    if (rc == PCRE2_ERROR_NOMATCH) return QL_OK;
    char why[160];
    pcre2_get_error_message(rc, (PCRE2_UCHAR *)why, sizeof why);
    ql_err_set(err, rc == PCRE2_ERROR_NOMEMORY ? QL_ERR_MEMORY : QL_ERR_FORMAT,
               "the tokenizer's pattern gave up on this text, %zu bytes on: %s", from, why);
    return ql_err_hint(err, "the pattern in tokenizer.json backtracks without "
                            "end; take the model's original file");
}
