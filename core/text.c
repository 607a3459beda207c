#include "text.h"
#include "json_scan.h"
#include "mem.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void ql_text_put(ql_text *text, const char *data, size_t size)
{
    if (text->failed) return;
    if (text->capacity - text->size <= size) {
        size_t capacity;
        char *wider = NULL;
        if (ql_add(text->size, size, &capacity) && ql_add(capacity, capacity / 2 + 64, &capacity))
            wider = ql_realloc(text->data, capacity);
        if (!wider) {
            text->failed = true;
            return;
        }
        text->data = wider;
        text->capacity = capacity;
    }
    memcpy(text->data + text->size, data, size);
    text->size += size;
    text->data[text->size] = '\0';
}

void ql_text_puts(ql_text *text, const char *string)
{
    ql_text_put(text, string, strlen(string));
}

void ql_text_printf(ql_text *text, const char *fmt, ...)
{
    char line[256];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    if (n < 0 || (size_t)n >= sizeof line)
        text->failed = true;
    else
        ql_text_put(text, line, (size_t)n);
}

void ql_text_json(ql_text *text, const char *data, size_t size)
{
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    const char *p = data, *end = data + size;
    ql_text_put(text, "\"", 1);
    while (p < end) {
        const char *run = p;
        size_t step = 0;
        while (p < end && (unsigned char)*p >= 0x20 && *p != '"' && *p != '\\' &&
               (step = ql_utf8_length(p, end)) > 0)
            p += step;
        ql_text_put(text, run, (size_t)(p - run));
        if (p == end) break;
        const char *found = *p ? strchr(from, *p) : NULL;
        if (found) {
            char pair[2] = {'\\', to[found - from]};
            ql_text_put(text, pair, 2);
        } else if ((unsigned char)*p < 0x20) {
            ql_text_printf(text, "\\u%04x", (unsigned)*p);
        } else {
            ql_text_puts(text, "\xef\xbf\xbd");
        }
        p++;
    }
    ql_text_put(text, "\"", 1);
}

void ql_text_free(ql_text *text)
{
    ql_free(text->data);
    *text = (ql_text){0};
}

bool ql_text_ends_with(const char *string, const char *suffix)
{
    size_t n = strlen(string), m = strlen(suffix);
    return n >= m && strcmp(string + n - m, suffix) == 0;
}
