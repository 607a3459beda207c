/* Device memory, copies, errors and synchronisation of the CUDA backend. */
#include "backend_cuda.h"

#include <stdio.h>
#include <string.h>

/* ---- errors ---- */

/* After these the device's context is lost for the process (CUDA runtime API, cudaError). */
static bool is_fault(int error)
{
    static const int faults[] = {
        cudaErrorIllegalAddress,
        cudaErrorLaunchTimeout,
        cudaErrorAssert,
        cudaErrorHardwareStackError,
        cudaErrorIllegalInstruction,
        cudaErrorMisalignedAddress,
        cudaErrorInvalidAddressSpace,
        cudaErrorInvalidPc,
        cudaErrorLaunchFailure,
        cudaErrorECCUncorrectable,
        cudaErrorUnknown,
    };
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        if (error == faults[i]) return true;
    }
    return false;
}

static ql_status give_up(ql_cuda *c, int error, const char *what, ql_err *err)
{
    ql_cuda_lane *lane = c->lane;
    const char *why = cudaGetErrorString((cudaError_t)error);
    if (!lane->first)
        snprintf(lane->fault, sizeof lane->fault, "%s: %s", what, why);
    else if (lane->first == lane->last)
        snprintf(lane->fault, sizeof lane->fault, "%s: %s", lane->first, why);
    else
        snprintf(lane->fault, sizeof lane->fault, "one of the operations from %s to %s: %s", lane->first,
                 lane->last, why);
    lane->given_up = true;
    c->idle_count = 0; /* the blocks went with the device's context */
    ql_err_set(err, QL_ERR_DEVICE, "%s: a fault in %s", c->label, lane->fault);
    if (c->sync_each) return ql_err_hint(err, "the device is not used any more: start the program again");
    return ql_err_hint(err, "the device is not used any more: start the program again, with QLUA_CUDA_SYNC=1 "
                            "to learn in which operation it is");
}

ql_status ql_cuda_enter(ql_cuda *c, ql_err *err)
{
    if (c->lane->given_up) {
        ql_err_set(err, QL_ERR_DEVICE, "device %s was given up after a fault in %s", c->label,
                   c->lane->fault);
        return ql_err_hint(err, "start the program again%s",
                           c->sync_each ? "" : ", with QLUA_CUDA_SYNC=1 to learn in which operation it is");
    }
    return ql_cuda_check(c, cudaSetDevice(c->index), "cudaSetDevice", err);
}

ql_status ql_cuda_check(ql_cuda *c, int error, const char *what, ql_err *err)
{
    if (error == cudaSuccess) return QL_OK;
    cudaGetLastError(); /* so that the next call does not see it again */
    if (is_fault(error)) return give_up(c, error, what, err);
    return ql_err_set(err, QL_ERR_DEVICE, "%s: %s: %s", c->label, what,
                      cudaGetErrorString((cudaError_t)error));
}

ql_status ql_cuda_ran(ql_cuda *c, int error, const char *name, ql_err *err)
{
    if (error != cudaSuccess) return ql_cuda_check(c, error, name, err);
    if (!c->lane->first) c->lane->first = name;
    c->lane->last = name;
    return c->sync_each && !c->capturing ? ql_cuda_wait(c, err) : QL_OK;
}

static ql_status settle(ql_cuda *c, int error, ql_err *err)
{
    if (error != cudaSuccess) {
        cudaGetLastError();
        return give_up(c, error, "synchronisation", err);
    }
    c->lane->first = c->lane->last = NULL;
    return QL_OK;
}

/* The side stream's work is always waited for by the main stream, except after an error between the two. */
ql_status ql_cuda_wait(ql_cuda *c, ql_err *err)
{
    int error = cudaStreamSynchronize(c->lane->stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(c->lane->side);
    return settle(c, error, err);
}

ql_status ql_cuda_sync(void *ctx, ql_err *err)
{
    ql_cuda *c = ctx;
    QL_TRY(ql_cuda_enter(c, err));
    return ql_cuda_wait(c, err);
}

/* ---- blocks ---- */

static void drop_idle(ql_cuda *c)
{
    for (int i = 0; i < c->idle_count; i++) cudaFree(c->idle[i].p);
    c->idle_count = 0;
    c->idle_bytes = 0;
}

static bool take_idle(ql_cuda *c, size_t bytes, void **out)
{
    for (int i = c->idle_count - 1; i >= 0; i--) {
        if (c->idle[i].bytes != bytes) continue;
        *out = c->idle[i].p;
        c->idle_bytes -= bytes;
        c->idle[i] = c->idle[--c->idle_count];
        return true;
    }
    return false;
}

static ql_status out_of_memory(ql_cuda *c, size_t bytes, ql_err *err)
{
    size_t available = 0, total = 0;
    cudaGetLastError(); /* the device goes on */
    cudaMemGetInfo(&available, &total);
    ql_err_set(err, QL_ERR_MEMORY,
               "%s is out of memory: %zu bytes (%.1f MiB) needed, %zu (%.1f MiB) of %.1f MiB "
               "free",
               c->label, bytes, (double)bytes / 0x1p20, available, (double)available / 0x1p20,
               (double)total / 0x1p20);
    return ql_err_hint(err, "close models that are no longer needed, or use a smaller batch or context");
}

/* Small blocks of the size of one just freed are reused: cudaFree waits for the device, and a decode loop
 * frees a few small tensors a token. One stream orders the old use before the new. */
ql_status ql_cuda_alloc(void *ctx, size_t bytes, void **out, ql_err *err)
{
    ql_cuda *c = ctx;
    *out = NULL;
    QL_TRY(ql_cuda_enter(c, err));
    size_t need = bytes > 0 ? ql_cuda_round(bytes) : 256;
    if (need < bytes) return out_of_memory(c, bytes, err);
    if (take_idle(c, need, out)) return QL_OK;
    int error = cudaMalloc(out, need);
    if (error == cudaErrorMemoryAllocation && c->idle_count > 0) {
        cudaGetLastError();
        drop_idle(c);
        error = cudaMalloc(out, need);
    }
    if (error == cudaSuccess) return QL_OK;
    *out = NULL;
    if (error == cudaErrorMemoryAllocation) return out_of_memory(c, bytes, err);
    return ql_cuda_check(c, error, "cudaMalloc", err);
}

void ql_cuda_free(void *ctx, void *p, size_t bytes)
{
    ql_cuda *c = ctx;
    if (!p || c->lane->given_up || cudaSetDevice(c->index) != cudaSuccess) return;
    size_t held = bytes > 0 ? ql_cuda_round(bytes) : 256;
    if ((uintptr_t)c->zeroed.p - (uintptr_t)p < held) c->zeroed.p = NULL;
    if (held <= QL_CUDA_IDLE_BLOCK && c->idle_count < QL_CUDA_IDLE &&
        c->idle_bytes + held <= QL_CUDA_IDLE_TOTAL) {
        c->idle[c->idle_count++] = (ql_cuda_block){p, held};
        c->idle_bytes += held;
        return;
    }
    cudaFree(p); /* an error here is one of earlier work: the next synchronisation tells it too */
}

ql_status ql_cuda_scratch(ql_cuda *c, size_t bytes, char **out, ql_err *err)
{
    if (bytes > c->scratch_bytes) {
        void *p = NULL;
        ql_cuda_free(c, c->scratch, c->scratch_bytes); /* first: both need not fit */
        c->scratch = NULL;
        c->scratch_bytes = 0;
        QL_TRY(ql_cuda_alloc(c, bytes, &p, err));
        c->scratch = p;
        c->scratch_bytes = bytes;
    }
    *out = c->scratch;
    return QL_OK;
}

void ql_cuda_memory_close(ql_cuda *c)
{
    ql_cuda_free(c, c->scratch, c->scratch_bytes);
    ql_cuda_free(c, c->cells, QL_CUDA_CELLS);
    if (!c->lane->given_up) drop_idle(c);
    for (int i = 0; i < 2; i++) {
        if (c->lane->given_up) break;
        if (c->stage[i].emptied) cudaEventDestroy(c->stage[i].emptied);
        if (c->stage[i].host) cudaFreeHost(c->stage[i].host);
    }
}

/* ---- copies: through two pinned buffers, so that one is filled while the other travels ---- */

ql_status ql_cuda_stage_take(ql_cuda *c, ql_cuda_stage **out, ql_err *err)
{
    ql_cuda_stage *s = &c->stage[c->turn];
    c->turn ^= 1;
    int error = cudaEventSynchronize(s->emptied);
    if (error != cudaSuccess) return settle(c, error, err);
    *out = s;
    return QL_OK;
}

ql_status ql_cuda_stage_send(ql_cuda *c, ql_cuda_stage *s, void *dst, size_t bytes, ql_err *err)
{
    QL_CUDA_RUN("upload", cudaMemcpyAsync(dst, s->host, bytes, cudaMemcpyHostToDevice, c->lane->stream));
    QL_CUDA(cudaEventRecord(s->emptied, c->lane->stream), "cudaEventRecord");
    return QL_OK;
}

/* Returns when `src` has been read; the device may still be copying. */
ql_status ql_cuda_upload(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err)
{
    ql_cuda *c = ctx;
    QL_TRY(ql_cuda_enter(c, err));
    for (size_t at = 0; at < bytes;) {
        size_t piece = bytes - at < QL_CUDA_STAGE ? bytes - at : QL_CUDA_STAGE;
        ql_cuda_stage *s;
        QL_TRY(ql_cuda_stage_take(c, &s, err));
        memcpy(s->host, (const char *)src + at, piece);
        QL_TRY(ql_cuda_stage_send(c, s, (char *)dst + at, piece, err));
        at += piece;
    }
    return QL_OK;
}

ql_status ql_cuda_download(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err)
{
    ql_cuda *c = ctx;
    QL_TRY(ql_cuda_enter(c, err));
    ql_cuda_stage *coming = NULL; /* holds the piece that ends at `at` */
    size_t at = 0, coming_bytes = 0;
    do {
        ql_cuda_stage *s = NULL;
        size_t piece = bytes - at < QL_CUDA_STAGE ? bytes - at : QL_CUDA_STAGE;
        if (piece > 0) {
            QL_TRY(ql_cuda_stage_take(c, &s, err));
            QL_CUDA_RUN("download", cudaMemcpyAsync(s->host, (const char *)src + at, piece,
                                                    cudaMemcpyDeviceToHost, c->lane->stream));
            QL_CUDA(cudaEventRecord(s->emptied, c->lane->stream), "cudaEventRecord");
        }
        if (coming) {
            int error = cudaEventSynchronize(coming->emptied);
            if (error != cudaSuccess) return settle(c, error, err);
            memcpy((char *)dst + at - coming_bytes, coming->host, coming_bytes);
        }
        coming = s;
        coming_bytes = piece;
        at += piece;
    } while (coming);
    return ql_cuda_wait(c, err);
}
