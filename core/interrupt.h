/* The user's wish to stop, shared by the signal handler, Lua's hook and the loops of core.
 *
 * One lock-free flag: setting it is async-signal-safe. Long operations poll it, a layer at a time, and return
 * QL_ERR_INTERRUPTED; whoever handles that clears it.
 */
#ifndef QL_INTERRUPT_H
#define QL_INTERRUPT_H

#include "err.h"

#include <stdbool.h>

bool ql_interrupted(void);
ql_status ql_interrupt_check(ql_err *err); /* QL_ERR_INTERRUPTED when the user wishes to stop */
void ql_interrupt_set(void);
void ql_interrupt_clear(void);

#endif
