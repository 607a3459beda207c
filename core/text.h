/* Text that grows, for what core writes: headers and JSON. Zero-initialise; free by ql_text_free.
 *
 * Appending never fails at once: when memory runs out the text keeps `failed` and ignores what follows, so
 * that the writer checks once, at the end.
 */
#ifndef QL_TEXT_H
#define QL_TEXT_H

#include "err.h"

#include <stdbool.h>
#include <stddef.h>

typedef struct {
    char *data; /* owned; a NUL follows the text once anything was appended */
    size_t size, capacity;
    bool failed;
} ql_text;

void ql_text_put(ql_text *text, const char *data, size_t size);
void ql_text_puts(ql_text *text, const char *string);
void ql_text_printf(ql_text *text, const char *fmt, ...) QL_PRINTF(2, 3); /* at most 255 bytes */
/* The string as JSON, in quotes. Bytes that are not UTF-8 become U+FFFD. */
void ql_text_json(ql_text *text, const char *data, size_t size);
void ql_text_free(ql_text *text);

/* Whether the string ends with `suffix`. */
bool ql_text_ends_with(const char *string, const char *suffix);

#endif
