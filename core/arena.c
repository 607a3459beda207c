#include "arena.h"

#include "mem.h"

#include <stdatomic.h>

struct ql_arena {
    atomic_int refs;
    atomic_size_t current[QL_MEM_KINDS], peak[QL_MEM_KINDS];
    atomic_size_t current_total, peak_total;
};

ql_arena *ql_arena_new(void)
{
    ql_arena *a = ql_calloc(1, sizeof *a);
    if (a) atomic_init(&a->refs, 1);
    return a;
}

ql_arena *ql_arena_retain(ql_arena *a)
{
    if (a) atomic_fetch_add(&a->refs, 1);
    return a;
}

void ql_arena_release(ql_arena *a)
{
    if (a && atomic_fetch_sub(&a->refs, 1) == 1) ql_free(a);
}

static void raise_to(atomic_size_t *peak, size_t value)
{
    size_t seen = atomic_load(peak);
    while (seen < value && !atomic_compare_exchange_weak(peak, &seen, value)) {}
}

void ql_arena_charge(ql_arena *a, ql_mem_kind kind, size_t bytes)
{
    if (!a) return;
    raise_to(&a->peak[kind], atomic_fetch_add(&a->current[kind], bytes) + bytes);
    raise_to(&a->peak_total, atomic_fetch_add(&a->current_total, bytes) + bytes);
}

void ql_arena_refund(ql_arena *a, ql_mem_kind kind, size_t bytes)
{
    if (!a) return;
    atomic_fetch_sub(&a->current[kind], bytes);
    atomic_fetch_sub(&a->current_total, bytes);
}

void ql_arena_reset_peak(ql_arena *a)
{
    for (int i = 0; i < QL_MEM_KINDS; i++) atomic_store(&a->peak[i], atomic_load(&a->current[i]));
    atomic_store(&a->peak_total, atomic_load(&a->current_total));
}

ql_mem_stats ql_arena_stats(const ql_arena *a)
{
    ql_mem_stats s;
    for (int i = 0; i < QL_MEM_KINDS; i++) {
        s.current[i] = atomic_load(&a->current[i]);
        s.peak[i] = atomic_load(&a->peak[i]);
    }
    s.current_total = atomic_load(&a->current_total);
    s.peak_total = atomic_load(&a->peak_total);
    return s;
}

const char *ql_mem_kind_name(ql_mem_kind kind)
{
    static const char *const names[] = {"weights", "kv", "activations"};
    return names[kind];
}
