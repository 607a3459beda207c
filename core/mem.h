/* Host allocation and checked size arithmetic.
 *
 * All of core allocates through these, so that a test can make the n-th allocation fail. Sizes that come from
 * a file go through ql_mul / ql_add: true on success, false on overflow (then *out is untouched).
 */
#ifndef QL_MEM_H
#define QL_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

void *ql_malloc(size_t bytes);              /* NULL when memory ran out; 0 bytes gives a unique pointer */
void *ql_calloc(size_t count, size_t size); /* zeroed; NULL on overflow too */
void *ql_realloc(void *p, size_t bytes);    /* on NULL `p` keeps its old block */
void *ql_aligned(size_t alignment, size_t bytes); /* power-of-two alignment; free with ql_free */
char *ql_strdup(const char *s);
char *ql_strndup(const char *s, size_t n);
void ql_free(void *p);

/* Tests only: let `n` allocations pass, then fail one (persistent = false) or all that follow. n < 0: never.
 */
void ql_mem_fail_after(long n, bool persistent);
/* Allocations asked for since the last ql_mem_fail_after. */
long ql_mem_count(void);

static inline bool ql_mul(size_t a, size_t b, size_t *out)
{
    size_t r;
    if (__builtin_mul_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}

static inline bool ql_add(size_t a, size_t b, size_t *out)
{
    size_t r;
    if (__builtin_add_overflow(a, b, &r)) return false;
    *out = r;
    return true;
}

#endif
