/* The memory account of one model on one device.
 *
 * An arena does not hold memory itself: every ql_storage made for a model, and what double quantization keeps
 * on the host, is charged to the model's arena, by kind, so that two models in one process have high-water
 * marks of their own. Reference-counted, because a tensor may outlive the model that made it. Counters are
 * atomic: threads may allocate at the same time.
 */
#ifndef QL_ARENA_H
#define QL_ARENA_H

#include <stddef.h>

typedef enum { QL_MEM_WEIGHTS, QL_MEM_KV, QL_MEM_ACTIVATIONS, QL_MEM_KINDS } ql_mem_kind;

typedef struct ql_arena ql_arena;

typedef struct {
    size_t current[QL_MEM_KINDS]; /* bytes held now, by kind */
    size_t peak[QL_MEM_KINDS];    /* high-water mark of each kind since the last reset */
    size_t current_total;         /* bytes held now */
    size_t peak_total;            /* high-water mark of the sum (not the sum of the marks) */
} ql_mem_stats;

ql_arena *ql_arena_new(void);           /* one reference; NULL when memory ran out */
ql_arena *ql_arena_retain(ql_arena *a); /* returns `a`; NULL passes through */
void ql_arena_release(ql_arena *a);     /* NULL is ignored */

void ql_arena_charge(ql_arena *a, ql_mem_kind kind, size_t bytes);
void ql_arena_refund(ql_arena *a, ql_mem_kind kind, size_t bytes);
void ql_arena_reset_peak(ql_arena *a); /* peaks become the current values */
ql_mem_stats ql_arena_stats(const ql_arena *a);

const char *ql_mem_kind_name(ql_mem_kind kind); /* "weights", "kv", "activations" */

#endif
