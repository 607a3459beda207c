#include "interrupt.h"

#include <stdatomic.h>

static atomic_bool flag;

bool ql_interrupted(void)
{
    return atomic_load_explicit(&flag, memory_order_relaxed);
}

ql_status ql_interrupt_check(ql_err *err)
{
    return ql_interrupted() ? ql_err_set(err, QL_ERR_INTERRUPTED, "interrupted") : QL_OK;
}

void ql_interrupt_set(void)
{
    atomic_store_explicit(&flag, true, memory_order_relaxed);
}

void ql_interrupt_clear(void)
{
    atomic_store_explicit(&flag, false, memory_order_relaxed);
}
