#include "matrix.h"

#include "mem.h"

#include <string.h>

ql_quant *ql_quant_retain(ql_quant *q)
{
    if (q) __atomic_fetch_add(&q->refs, 1, __ATOMIC_RELAXED);
    return q;
}

void ql_quant_release(ql_quant *q)
{
    if (!q || __atomic_fetch_sub(&q->refs, 1, __ATOMIC_ACQ_REL) != 1) return;
    if (q->arena) ql_arena_refund(q->arena, QL_MEM_WEIGHTS, ql_quant_host_bytes(q));
    ql_arena_release(q->arena);
    ql_free(q->absmax8);
    ql_free(q->nested_absmax);
    ql_free(q);
}

size_t ql_quant_host_bytes(const ql_quant *q)
{
    if (!q || !q->absmax8) return 0;
    return q->blocks * sizeof *q->absmax8 + q->nested_blocks * sizeof *q->nested_absmax;
}

void ql_quant_charge(ql_quant *q, ql_arena *arena)
{
    q->arena = ql_arena_retain(arena);
    ql_arena_charge(arena, QL_MEM_WEIGHTS, ql_quant_host_bytes(q));
}

void ql_matrix_free(ql_matrix *m)
{
    if (!m) return;
    ql_tensor_free(&m->data);
    ql_tensor_free(&m->absmax);
    ql_tensor_free(&m->nested);
    ql_tensor_free(&m->bias);
    ql_quant_release(m->quant);
    memset(m, 0, sizeof *m);
}

ql_matrix ql_matrix_ref(const ql_matrix *m)
{
    ql_matrix copy = *m;
    copy.data = ql_tensor_ref(&m->data);
    copy.absmax = ql_tensor_ref(&m->absmax);
    copy.nested = ql_tensor_ref(&m->nested);
    copy.bias = ql_tensor_ref(&m->bias);
    copy.quant = ql_quant_retain(m->quant);
    return copy;
}

size_t ql_matrix_bytes(const ql_matrix *m)
{
    return ql_tensor_bytes(&m->data) + ql_tensor_bytes(&m->absmax) + ql_tensor_bytes(&m->nested) +
           ql_tensor_bytes(&m->bias);
}

size_t ql_matrix_resident(const ql_matrix *m)
{
    return ql_matrix_bytes(m) + ql_quant_host_bytes(m->quant);
}
