#include "cpu_probe.h"

#include "clock.h"
#include "mem.h"
#include "pool.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum {
    HUGE_PAGE = 2 << 20,
    READ_PIECES = 32,    /* a thread */
    FMA_ROUNDS = 200000, /* of 16 vectors or so: about a millisecond */
    FMA_PIECES = 16,     /* a thread */
};

typedef struct {
    const qk_cpu *qk;
    const char *buffer;
    size_t piece_bytes;
    float sinks[1024 * 32]; /* one a piece: nothing measured may be left out by the compiler */
    double flops[1024 * 16];
} probe;

static void read_piece(void *ud, int64_t piece, int worker)
{
    (void)worker;
    probe *p = ud;
    p->sinks[piece] = p->qk->probe_read(p->buffer + (size_t)piece * p->piece_bytes, p->piece_bytes);
}

static void fma_piece(void *ud, int64_t piece, int worker)
{
    (void)worker;
    probe *p = ud;
    p->flops[piece] = p->qk->probe_fma(FMA_ROUNDS, &p->sinks[piece]);
}

static void measure(ql_pool *pool, probe *p, int rounds, ql_cpu_ceiling *out)
{
    const int64_t reads = (int64_t)out->threads * READ_PIECES, fmas = (int64_t)out->threads * FMA_PIECES;
    for (int i = 0; i < rounds; i++) {
        double t = ql_clock_seconds();
        ql_pool_run(pool, read_piece, p, reads);
        double rate = (double)p->piece_bytes * (double)reads / (ql_clock_seconds() - t);
        if (rate > out->read_bytes_per_second) out->read_bytes_per_second = rate;

        t = ql_clock_seconds();
        ql_pool_run(pool, fma_piece, p, fmas);
        t = ql_clock_seconds() - t;
        double flops = 0;
        for (int64_t j = 0; j < fmas; j++) flops += p->flops[j];
        if (flops / t > out->flops_per_second) out->flops_per_second = flops / t;
    }
}

ql_status ql_cpu_select(const qk_cpu **out, ql_err *err)
{
    const char *wanted = getenv("QLUA_CPU");
    int why;
    if (wanted && !*wanted) wanted = NULL;
    *out = qk_cpu_select(wanted, &why);
    if (*out) return QL_OK;
    if (why == QK_ERR_MISSING)
        ql_err_set(err, QL_ERR_UNSUPPORTED, "QLUA_CPU=%s: this processor does not have it", wanted);
    else
        ql_err_set(err, QL_ERR_ARG, "QLUA_CPU=%s: no such instruction set", wanted);
    return ql_err_hint(err, "unset QLUA_CPU, or use one of avx512, avx2, scalar that the processor has");
}

ql_status ql_cpu_probe(int threads, size_t bytes, int rounds, ql_cpu_ceiling *out, ql_err *err)
{
    *out = (ql_cpu_ceiling){0};
    ql_pool *pool = NULL;
    probe *p = NULL;
    char *buffer = NULL;
    ql_status status = ql_pool_decide_threads(threads, &threads, err);
    if (status == QL_OK) status = ql_pool_new(threads, &pool, err);
    if (status != QL_OK) return status;
    p = ql_calloc(1, sizeof *p);
    buffer = ql_aligned(HUGE_PAGE, bytes);
    if (!p || !buffer) {
        status =
            ql_err_set(err, QL_ERR_MEMORY, "out of memory: %zu bytes to measure the read bandwidth", bytes);
        goto end;
    }
    madvise(buffer, bytes, MADV_HUGEPAGE);
    memset(buffer, 0, bytes);
    status = ql_cpu_select(&p->qk, err);
    if (status != QL_OK) goto end;
    p->buffer = buffer;
    p->piece_bytes = bytes / (size_t)(threads * READ_PIECES) / 64 * 64;
    out->threads = threads;
    snprintf(out->isa, sizeof out->isa, "%s", p->qk->isa);
    measure(pool, p, rounds, out);
end:
    ql_free(buffer);
    ql_free(p);
    ql_pool_free(pool);
    return status;
}
