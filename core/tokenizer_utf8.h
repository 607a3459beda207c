/* UTF-8 for the tokenizer: checking strangers' bytes, walking checked text, and
 * mending byte streams. */
#ifndef QL_TOKENIZER_UTF8_H
#define QL_TOKENIZER_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QL_UTF8_REPLACEMENT "\xEF\xBF\xBD" /* U+FFFD */

/* Bytes of the character that starts with `lead`, 0 for a byte that starts none
 * (continuations, C0, C1, F5..FF). */
static inline unsigned ql_utf8_width(unsigned char lead)
{
    if (lead < 0x80) return 1;
    if (lead < 0xC2) return 0;
    if (lead < 0xE0) return 2;
    if (lead < 0xF0) return 3;
    return lead < 0xF5 ? 4 : 0;
}

/* May `byte` follow the first `have` bytes of a character? The second byte
 * excludes overlong forms, surrogates and values past U+10FFFF (Unicode 15,
 * table 3-7). */
static inline bool ql_utf8_continues(unsigned char lead, unsigned have, unsigned char byte)
{
    if ((byte & 0xC0) != 0x80) return false;
    if (have > 1) return true;
    if (lead == 0xE0) return byte >= 0xA0;
    if (lead == 0xED) return byte < 0xA0;
    if (lead == 0xF0) return byte >= 0x90;
    if (lead == 0xF4) return byte < 0x90;
    return true;
}

/* Offset of the first byte that is not part of a well-formed character; n where
 * all is well. */
static inline size_t ql_utf8_check(const char *s, size_t n)
{
    const unsigned char *u = (const unsigned char *)s;
    size_t i = 0;
    while (i < n) {
        unsigned len = ql_utf8_width(u[i]);
        if (len == 0 || n - i < len) return i;
        for (unsigned k = 1; k < len; k++)
            if (!ql_utf8_continues(u[i], k, u[i + k])) return i;
        i += len;
    }
    return n;
}

/* The character at s, in checked text; *len [OUT] its bytes. */
static inline uint32_t ql_utf8_get(const char *s, unsigned *len)
{
    const unsigned char *u = (const unsigned char *)s;
    if (u[0] < 0x80) return *len = 1, u[0];
    if (u[0] < 0xE0) return *len = 2, (u[0] & 0x1Fu) << 6 | (u[1] & 0x3Fu);
    if (u[0] < 0xF0) return *len = 3, (u[0] & 0x0Fu) << 12 | (u[1] & 0x3Fu) << 6 | (u[2] & 0x3Fu);
    return *len = 4, (u[0] & 0x07u) << 18 | (u[1] & 0x3Fu) << 12 | (u[2] & 0x3Fu) << 6 | (u[3] & 0x3Fu);
}

/* Start of the character that ends before s[i], i > 0, in checked text. */
static inline size_t ql_utf8_before(const char *s, size_t i)
{
    do i--;
    while (i > 0 && ((unsigned char)s[i] & 0xC0) == 0x80);
    return i;
}

/* Write a character; returns its bytes, 1 to 4. */
static inline unsigned ql_utf8_put(uint32_t c, char out[4])
{
    if (c < 0x80) return out[0] = (char)c, 1;
    if (c < 0x800) {
        out[0] = (char)(0xC0 | c >> 6);
        out[1] = (char)(0x80 | (c & 0x3F));
        return 2;
    }
    if (c < 0x10000) {
        out[0] = (char)(0xE0 | c >> 12);
        out[1] = (char)(0x80 | (c >> 6 & 0x3F));
        out[2] = (char)(0x80 | (c & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | c >> 18);
    out[1] = (char)(0x80 | (c >> 12 & 0x3F));
    out[2] = (char)(0x80 | (c >> 6 & 0x3F));
    out[3] = (char)(0x80 | (c & 0x3F));
    return 4;
}

/* White_Space of Unicode's PropList. */
static inline bool ql_utf8_is_space(uint32_t c)
{
    if (c < 0x80) return c == ' ' || (c >= 9 && c <= 13);
    return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 ||
           c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

/* Bytes in, whole characters out: the state of a stream that may be cut
 * anywhere. */
typedef struct {
    unsigned char byte[4];
    unsigned n;
} ql_utf8_partial;

#endif
