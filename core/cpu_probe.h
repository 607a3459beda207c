/* What this machine's processor can do at most, so that a benchmark can say what share of it was reached. */
#ifndef QL_CPU_PROBE_H
#define QL_CPU_PROBE_H

#include "err.h"
#include "qk.h"

#include <stddef.h>

typedef struct {
    char isa[32];
    int threads;
    double read_bytes_per_second; /* all threads reading memory, far more of it than the caches hold */
    double flops_per_second;      /* all threads, float32 multiply-adds on registers, each counted as two */
} ql_cpu_ceiling;

/* The kernels for this processor, or those that the environment's QLUA_CPU asks for. */
ql_status ql_cpu_select(const qk_cpu **out /* [OUT] */, ql_err *err);

/* Measure both on `threads` threads (0: as ql_pool_decide_threads), the best of `rounds` rounds of some tens
 * of milliseconds. `bytes` is the size of the buffer read, 256 MiB or more to mean anything. */
ql_status ql_cpu_probe(int threads, size_t bytes, int rounds, ql_cpu_ceiling *out /* [OUT] */, ql_err *err);

#endif
