/* A strict pull scanner for JSON text (RFC 8259) in memory.
 *
 * One token per call, with the grammar enforced: what comes out is a well-formed document or an error with
 * its position. Refused beyond the grammar: a byte-order mark, invalid UTF-8, lone surrogates, numbers a
 * double cannot hold, nesting past a limit. Duplicate keys are the reader's business (json.h and
 * safetensors.h refuse them). Allocates nothing and never recurses. Borrows the text, which must have a NUL
 * at text[size].
 */
#ifndef QL_JSON_SCAN_H
#define QL_JSON_SCAN_H

#include "err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QL_JSON_DEPTH 256 /* deepest nesting that can be asked for */

typedef enum {
    QL_JSON_OBJECT, /* { */
    QL_JSON_OBJECT_END,
    QL_JSON_ARRAY, /* [ */
    QL_JSON_ARRAY_END,
    QL_JSON_KEY, /* a string before ':' */
    QL_JSON_STRING,
    QL_JSON_INT,   /* no fraction or exponent, and fits int64 */
    QL_JSON_FLOAT, /* any other number */
    QL_JSON_TRUE,
    QL_JSON_FALSE,
    QL_JSON_NULL,
    QL_JSON_END, /* after the one top-level value: only white space was left */
} ql_json_kind;

typedef struct {
    ql_json_kind kind;
    const char *text; /* string: between the quotes, as written; number: its digits. Not NUL-terminated */
    size_t size;      /* bytes of text */
    bool escaped;     /* string: holds backslashes, so ql_json_unescape changes it */
    bool has_nul;     /* string: holds \u0000 */
    int64_t integer;  /* QL_JSON_INT */
    double number;    /* QL_JSON_INT and QL_JSON_FLOAT; finite */
} ql_json_token;

typedef struct {
    const char *text;
    size_t size, pos;
    int depth, max_depth;
    int state;
    uint8_t is_object[QL_JSON_DEPTH / 8];
} ql_json_scan;

/* Begin at text[0 .. size). */
void ql_json_scan_init(ql_json_scan *scan /* [OUT] */, const char *text, size_t size, int max_depth);

/* The next token. QL_ERR_FORMAT with "line L, column C: what" when the text breaks the grammar. */
ql_status ql_json_scan_next(ql_json_scan *scan, ql_json_token *token /* [OUT] */, ql_err *err);

/* Skip the value that begins at the next token: a scalar, or a whole object or array. */
ql_status ql_json_scan_skip(ql_json_scan *scan, ql_err *err);

/* Decode a string token that the scanner gave; `dst` holds at least token->size bytes and may be token->text
 * itself. Returns the bytes written; no NUL is added. */
size_t ql_json_unescape(const ql_json_token *token, char *dst /* [OUT] */);

/* The shortest decimal that reads back as `value`, in any locale: 0.1, 1e-05, 2.0. A float always shows a
 * point or an exponent. `value` is finite. */
#define QL_JSON_NUMBER 40
void ql_json_number_text(double value, char out[QL_JSON_NUMBER] /* [OUT] */);

/* How a name from a file may stand in a message: cut to fit, and without control characters, which could move
 * a terminal's cursor. Returns `out`. */
#define QL_JSON_SHOWN 100
const char *ql_json_shown(const char *text, size_t size, char out[QL_JSON_SHOWN] /* [OUT] */);

/* Bytes of the well-formed UTF-8 character at p (1..4), or 0 if there is none before `end`. */
size_t ql_utf8_length(const char *p, const char *end);

#endif
