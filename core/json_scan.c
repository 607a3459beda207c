#include "json_scan.h"

#include <locale.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    WANT_VALUE,
    WANT_KEY,          /* after ',' in an object */
    WANT_KEY_OR_END,   /* after '{' */
    WANT_VALUE_OR_END, /* after '[' */
    WANT_COMMA_OR_END, /* after a value */
};

void ql_json_scan_init(ql_json_scan *scan, const char *text, size_t size, int max_depth)
{
    memset(scan, 0, sizeof *scan);
    scan->text = text;
    scan->size = size;
    scan->max_depth = max_depth < QL_JSON_DEPTH ? max_depth : QL_JSON_DEPTH;
    scan->state = WANT_VALUE;
}

static ql_status broken(const ql_json_scan *scan, size_t pos, const char *what, ql_err *err)
{
    size_t line = 1, start = 0;
    for (size_t i = 0; i < pos; i++) {
        if (scan->text[i] != '\n') continue;
        line++;
        start = i + 1;
    }
    return ql_err_set(err, QL_ERR_FORMAT, "line %zu, column %zu: %s", line, pos - start + 1, what);
}

/* An error at a byte that fits nothing. */
static ql_status unexpected(const ql_json_scan *scan, const char *wanted, ql_err *err)
{
    if (scan->pos >= scan->size) {
        ql_status status = broken(scan, scan->size, "the text ends early, expected ", err);
        if (err) strncat(err->message, wanted, 100);
        return status;
    }
    unsigned char c = (unsigned char)scan->text[scan->pos];
    ql_status status = broken(scan, scan->pos, "", err);
    if (!err) return status;
    char at[128];
    memcpy(at, err->message, sizeof at - 1);
    at[sizeof at - 1] = '\0';
    if (c == 0xef && scan->pos == 0) return ql_err_set(err, status, "%sbyte-order mark before the text", at);
    if (c < 0x20 || c >= 0x7f)
        return ql_err_set(err, status, "%sexpected %s, found byte 0x%02x", at, wanted, c);
    return ql_err_set(err, status, "%sexpected %s, found '%c'", at, wanted, c);
}

size_t ql_utf8_length(const char *p, const char *end)
{
    const unsigned char *s = (const unsigned char *)p;
    size_t room = (size_t)(end - p);
    if (room == 0) return 0;
    if (s[0] < 0x80) return 1;
    if (s[0] >= 0xc2 && s[0] <= 0xdf) return room >= 2 && (s[1] & 0xc0) == 0x80 ? 2 : 0;
    if ((s[0] & 0xf0) == 0xe0) {
        if (room < 3 || (s[1] & 0xc0) != 0x80 || (s[2] & 0xc0) != 0x80) return 0;
        if (s[0] == 0xe0 && s[1] < 0xa0) return 0;  /* longer than it need be */
        if (s[0] == 0xed && s[1] >= 0xa0) return 0; /* a surrogate */
        return 3;
    }
    if (s[0] < 0xf0 || s[0] > 0xf4 || room < 4) return 0;
    if ((s[1] & 0xc0) != 0x80 || (s[2] & 0xc0) != 0x80 || (s[3] & 0xc0) != 0x80) return 0;
    if (s[0] == 0xf0 && s[1] < 0x90) return 0;
    if (s[0] == 0xf4 && s[1] >= 0x90) return 0; /* past U+10FFFF */
    return 4;
}

const char *ql_json_shown(const char *text, size_t size, char out[QL_JSON_SHOWN])
{
    size_t n = 0;
    while (n < size) {
        size_t step = ql_utf8_length(text + n, text + size);
        if (n + (step ? step : 1) > QL_JSON_SHOWN - 4) break;
        unsigned char c = (unsigned char)text[n];
        if (step <= 1) {
            out[n++] = step && c >= 0x20 && c != 0x7f ? (char)c : '?';
            continue;
        }
        memcpy(out + n, text + n, step);
        n += step;
    }
    memcpy(out + n, n < size ? "..." : "", n < size ? 4 : 1);
    return out;
}

/* Four hex digits at p, or -1. */
static int hex4(const char *p, const char *end)
{
    int value = 0;
    if (end - p < 4) return -1;
    for (int i = 0; i < 4; i++) {
        char c = p[i];
        int digit = c >= '0' && c <= '9'   ? c - '0'
                    : c >= 'a' && c <= 'f' ? c - 'a' + 10
                    : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                           : -1;
        if (digit < 0) return -1;
        value = value * 16 + digit;
    }
    return value;
}

static bool is_high(int unit)
{
    return unit >= 0xd800 && unit < 0xdc00;
}

static bool is_low(int unit)
{
    return unit >= 0xdc00 && unit < 0xe000;
}

/* Check the escape at the backslash scan->pos and step over it. */
static ql_status escape(ql_json_scan *scan, ql_json_token *token, ql_err *err)
{
    const char *end = scan->text + scan->size, *p = scan->text + scan->pos + 1;
    token->escaped = true;
    if (p == end) {
        scan->pos = scan->size;
        return unexpected(scan, "an escape", err);
    }
    if (*p != 'u') {
        if (!*p || !strchr("\"\\/bfnrt", *p))
            return broken(scan, scan->pos, "unknown escape in a string", err);
        scan->pos += 2;
        return QL_OK;
    }
    int unit = hex4(p + 1, end);
    if (unit < 0) return broken(scan, scan->pos, "\\u is not followed by four hex digits", err);
    if (unit == 0) token->has_nul = true;
    if (is_low(unit)) return broken(scan, scan->pos, "half of a surrogate pair alone", err);
    if (is_high(unit)) {
        if (end - p < 7 || p[5] != '\\' || p[6] != 'u' || !is_low(hex4(p + 7, end)))
            return broken(scan, scan->pos, "half of a surrogate pair alone", err);
        scan->pos += 6;
    }
    scan->pos += 6;
    return QL_OK;
}

/* The string whose opening quote is at scan->pos. */
static ql_status string(ql_json_scan *scan, ql_json_token *token, ql_err *err)
{
    const char *end = scan->text + scan->size;
    scan->pos++;
    token->text = scan->text + scan->pos;
    for (;;) {
        const char *p = scan->text + scan->pos;
        while ((unsigned char)*p >= 0x20 && (unsigned char)*p < 0x80 && *p != '"' && *p != '\\') p++;
        scan->pos = (size_t)(p - scan->text);
        if (p >= end) return unexpected(scan, "the end of a string", err);
        if (*p == '"') break;
        if (*p == '\\') {
            ql_status status = escape(scan, token, err);
            if (status) return status;
            continue;
        }
        if ((unsigned char)*p < 0x20)
            return broken(scan, scan->pos, "control character in a string, where an escape is due", err);
        size_t n = ql_utf8_length(p, end);
        if (!n) return broken(scan, scan->pos, "invalid UTF-8 in a string", err);
        scan->pos += n;
    }
    token->size = (size_t)(scan->text + scan->pos - token->text);
    scan->pos++;
    return QL_OK;
}

static locale_t c_locale;

static void make_locale(void)
{
    c_locale = newlocale(LC_ALL_MASK, "C", (locale_t)0);
}

/* strtod whatever locale a script has set. */
static double to_double(const char *text)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, make_locale);
    return c_locale ? strtod_l(text, NULL, c_locale) : strtod(text, NULL);
}

void ql_json_number_text(double value, char out[QL_JSON_NUMBER])
{
    to_double("0"); /* makes c_locale */
    locale_t before = c_locale ? uselocale(c_locale) : (locale_t)0;
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(out, QL_JSON_NUMBER - 2, "%.*g", digits, value);
        if (strtod(out, NULL) == value) break;
    }
    if (before) uselocale(before);
    if (!strpbrk(out, ".e")) strcat(out, ".0");
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static ql_status number(ql_json_scan *scan, ql_json_token *token, ql_err *err)
{
    const char *start = scan->text + scan->pos, *p = start;
    bool negative = *p == '-', whole = true, fits = true;
    if (negative) p++;
    if (!is_digit(*p)) {
        scan->pos = (size_t)(p - scan->text);
        return unexpected(scan, "a digit", err);
    }
    if (*p == '0' && is_digit(p[1])) return broken(scan, scan->pos, "number with a leading zero", err);
    int64_t value = 0;
    for (; is_digit(*p); p++) {
        int digit = negative ? '0' - *p : *p - '0';
        fits = fits && !__builtin_mul_overflow(value, 10, &value) &&
               !__builtin_add_overflow(value, digit, &value);
    }
    if (*p == '.') {
        whole = false;
        if (!is_digit(*++p)) return broken(scan, scan->pos, "number without digits after its point", err);
        while (is_digit(*p)) p++;
    }
    if (*p == 'e' || *p == 'E') {
        whole = false;
        p++;
        if (*p == '+' || *p == '-') p++;
        if (!is_digit(*p)) return broken(scan, scan->pos, "number without digits in its exponent", err);
        while (is_digit(*p)) p++;
    }
    token->text = start;
    token->size = (size_t)(p - start);
    if (whole && fits) {
        token->kind = QL_JSON_INT;
        token->integer = value;
        token->number = (double)value;
    } else {
        token->kind = QL_JSON_FLOAT;
        token->number = to_double(start);
        if (!isfinite(token->number)) return broken(scan, scan->pos, "number too large for a double", err);
    }
    scan->pos += token->size;
    return QL_OK;
}

static ql_status word(ql_json_scan *scan, ql_json_token *token, const char *text, ql_json_kind kind,
                      ql_err *err)
{
    size_t n = strlen(text);
    if (scan->size - scan->pos < n || memcmp(scan->text + scan->pos, text, n))
        return unexpected(scan, "a value", err);
    token->kind = kind;
    scan->pos += n;
    return QL_OK;
}

static bool in_object(const ql_json_scan *scan)
{
    int d = scan->depth - 1;
    return d >= 0 && (scan->is_object[d >> 3] >> (d & 7) & 1);
}

static ql_status enter(ql_json_scan *scan, ql_json_token *token, bool object, ql_err *err)
{
    if (scan->depth >= scan->max_depth) return broken(scan, scan->pos, "nested too deeply", err);
    int d = scan->depth++;
    scan->is_object[d >> 3] = (uint8_t)((scan->is_object[d >> 3] & ~(1 << (d & 7))) | object << (d & 7));
    token->kind = object ? QL_JSON_OBJECT : QL_JSON_ARRAY;
    scan->state = object ? WANT_KEY_OR_END : WANT_VALUE_OR_END;
    scan->pos++;
    return QL_OK;
}

static ql_status leave(ql_json_scan *scan, ql_json_token *token)
{
    token->kind = in_object(scan) ? QL_JSON_OBJECT_END : QL_JSON_ARRAY_END;
    scan->depth--;
    scan->state = WANT_COMMA_OR_END;
    scan->pos++;
    return QL_OK;
}

static void blank(ql_json_scan *scan)
{
    const char *p = scan->text + scan->pos;
    while (*p == ' ' || *p == '\n' || *p == '\t' || *p == '\r') p++;
    scan->pos = (size_t)(p - scan->text);
}

static ql_status value(ql_json_scan *scan, ql_json_token *token, ql_err *err)
{
    ql_status status;
    switch (scan->text[scan->pos]) {
    case '{':
        return enter(scan, token, true, err);
    case '[':
        return enter(scan, token, false, err);
    case '"':
        token->kind = QL_JSON_STRING;
        status = string(scan, token, err);
        break;
    case 't':
        status = word(scan, token, "true", QL_JSON_TRUE, err);
        break;
    case 'f':
        status = word(scan, token, "false", QL_JSON_FALSE, err);
        break;
    case 'n':
        status = word(scan, token, "null", QL_JSON_NULL, err);
        break;
    case '-':
    case '0' ... '9':
        status = number(scan, token, err);
        break;
    default:
        return unexpected(scan, "a value", err);
    }
    scan->state = WANT_COMMA_OR_END;
    return status;
}

static ql_status key(ql_json_scan *scan, ql_json_token *token, ql_err *err)
{
    if (scan->text[scan->pos] != '"') return unexpected(scan, "a key in quotes", err);
    token->kind = QL_JSON_KEY;
    ql_status status = string(scan, token, err);
    if (status) return status;
    blank(scan);
    if (scan->text[scan->pos] != ':') return unexpected(scan, "':' after a key", err);
    scan->pos++;
    scan->state = WANT_VALUE;
    return QL_OK;
}

ql_status ql_json_scan_next(ql_json_scan *scan, ql_json_token *token, ql_err *err)
{
    memset(token, 0, sizeof *token);
    blank(scan);
    if (scan->state == WANT_COMMA_OR_END) {
        if (scan->depth == 0) {
            if (scan->pos < scan->size) return unexpected(scan, "nothing after the document", err);
            token->kind = QL_JSON_END;
            return QL_OK;
        }
        char end = in_object(scan) ? '}' : ']';
        if (scan->text[scan->pos] == end) return leave(scan, token);
        if (scan->text[scan->pos] != ',')
            return unexpected(scan, end == '}' ? "',' or '}'" : "',' or ']'", err);
        scan->pos++;
        scan->state = end == '}' ? WANT_KEY : WANT_VALUE;
        blank(scan);
    }
    switch (scan->state) {
    case WANT_KEY_OR_END:
        if (scan->text[scan->pos] == '}') return leave(scan, token);
        return key(scan, token, err);
    case WANT_KEY:
        return key(scan, token, err);
    case WANT_VALUE_OR_END:
        if (scan->text[scan->pos] == ']') return leave(scan, token);
        return value(scan, token, err);
    default:
        return value(scan, token, err);
    }
}

ql_status ql_json_scan_skip(ql_json_scan *scan, ql_err *err)
{
    ql_json_token token;
    int depth = scan->depth;
    do {
        ql_status status = ql_json_scan_next(scan, &token, err);
        if (status) return status;
    } while (scan->depth > depth);
    return QL_OK;
}

static size_t put_utf8(char *dst, uint32_t c)
{
    if (c < 0x80) {
        dst[0] = (char)c;
        return 1;
    }
    if (c < 0x800) {
        dst[0] = (char)(0xc0 | c >> 6);
        dst[1] = (char)(0x80 | (c & 0x3f));
        return 2;
    }
    if (c < 0x10000) {
        dst[0] = (char)(0xe0 | c >> 12);
        dst[1] = (char)(0x80 | (c >> 6 & 0x3f));
        dst[2] = (char)(0x80 | (c & 0x3f));
        return 3;
    }
    dst[0] = (char)(0xf0 | c >> 18);
    dst[1] = (char)(0x80 | (c >> 12 & 0x3f));
    dst[2] = (char)(0x80 | (c >> 6 & 0x3f));
    dst[3] = (char)(0x80 | (c & 0x3f));
    return 4;
}

size_t ql_json_unescape(const ql_json_token *token, char *dst)
{
    /* Every escape is longer than what it stands for, so writing in place never overtakes reading. */
    const char *p = token->text, *end = p + token->size;
    size_t n = 0;
    while (p < end) {
        if (*p != '\\') {
            dst[n++] = *p++;
            continue;
        }
        char c = p[1];
        if (c != 'u') {
            static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
            const char *found = strchr(from, c);
            dst[n++] = found ? to[found - from] : c;
            p += 2;
            continue;
        }
        uint32_t point = (uint32_t)hex4(p + 2, end);
        p += 6;
        if (is_high((int)point)) {
            point = 0x10000 + ((point - 0xd800) << 10) + ((uint32_t)hex4(p + 2, end) - 0xdc00);
            p += 6;
        }
        n += put_utf8(dst + n, point);
    }
    return n;
}
