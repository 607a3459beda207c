#include "err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Names in a message may come from a stranger's file: what a terminal would obey instead of show (C0, DEL,
 * and C1 in UTF-8) becomes '?'. */
static void disarm(char *text)
{
    for (unsigned char *p = (unsigned char *)text; *p; p++) {
        if (*p < 0x20 || *p == 0x7f || (*p == 0xc2 && p[1] >= 0x80 && p[1] < 0xa0)) {
            if (*p == 0xc2) *p++ = '?';
            *p = '?';
        }
    }
}

ql_status ql_err_set(ql_err *err, ql_status code, const char *fmt, ...)
{
    if (!err) return code;
    /* A caller may pass err->message itself as an argument: format aside first. */
    char text[sizeof err->message];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    disarm(text);
    err->code = code;
    memcpy(err->message, text, sizeof text);
    err->hint[0] = '\0';
    return code;
}

ql_status ql_err_hint(ql_err *err, const char *fmt, ...)
{
    if (!err) return QL_ERR_ARG;
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(err->hint, sizeof err->hint, fmt, ap);
    va_end(ap);
    disarm(err->hint);
    return err->code;
}

ql_status ql_err_prefix(ql_err *err, const char *fmt, ...)
{
    if (!err) return QL_ERR_ARG;
    char text[sizeof err->message];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    if (n < 0) return err->code;
    size_t used = (size_t)n < sizeof text ? (size_t)n : sizeof text - 1;
    snprintf(text + used, sizeof text - used, "%s", err->message);
    disarm(text);
    memcpy(err->message, text, sizeof text);
    return err->code;
}

const char *ql_err_name(ql_status code)
{
    switch (code) {
    case QL_OK:
        return "ok";
    case QL_ERR_ARG:
        return "argument";
    case QL_ERR_NOT_FOUND:
        return "not_found";
    case QL_ERR_IO:
        return "io";
    case QL_ERR_FORMAT:
        return "format";
    case QL_ERR_UNSUPPORTED:
        return "unsupported";
    case QL_ERR_MEMORY:
        return "memory";
    case QL_ERR_DEVICE:
        return "device";
    case QL_ERR_INTERRUPTED:
        return "interrupted";
    }
    return "unknown";
}
