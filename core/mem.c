#include "mem.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static atomic_long fail_after = -1;
static atomic_long asked;
static atomic_bool fail_persistent;

void ql_mem_fail_after(long n, bool persistent)
{
    atomic_store(&asked, 0);
    atomic_store(&fail_persistent, persistent);
    atomic_store(&fail_after, n);
}

long ql_mem_count(void)
{
    return atomic_load(&asked);
}

static bool refused(void)
{
    long limit = atomic_load_explicit(&fail_after, memory_order_relaxed);
    long mine = atomic_fetch_add_explicit(&asked, 1, memory_order_relaxed);
    if (limit < 0) return false;
    return atomic_load_explicit(&fail_persistent, memory_order_relaxed) ? mine >= limit : mine == limit;
}

void *ql_malloc(size_t bytes)
{
    return refused() ? NULL : malloc(bytes ? bytes : 1);
}

void *ql_calloc(size_t count, size_t size)
{
    return refused() ? NULL : calloc(count ? count : 1, size ? size : 1);
}

void *ql_realloc(void *p, size_t bytes)
{
    return refused() ? NULL : realloc(p, bytes ? bytes : 1);
}

void *ql_aligned(size_t alignment, size_t bytes)
{
    size_t rounded;
    if (refused() || !ql_add(bytes ? bytes : 1, alignment - 1, &rounded)) return NULL;
    return aligned_alloc(alignment, rounded & ~(alignment - 1));
}

char *ql_strndup(const char *s, size_t n)
{
    char *copy = ql_malloc(n + 1);
    if (!copy) return NULL;
    memcpy(copy, s, n);
    copy[n] = '\0';
    return copy;
}

char *ql_strdup(const char *s)
{
    return ql_strndup(s, strlen(s));
}

void ql_free(void *p)
{
    free(p);
}
