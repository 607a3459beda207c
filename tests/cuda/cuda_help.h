/* What the CUDA kernel tests share: device memory with guards behind it, and launches that are checked. Works
 * with the real toolkit and with the emulated one. Host types and numbers come from kernel_help.h
 * (tests/core).
 */
#ifndef CUDA_HELP_H
#define CUDA_HELP_H

#include "kernel_help.h"
#include "qk_cuda.h"

#include <cuda_runtime_api.h>

#define CUDA_GUARD 256 /* bytes behind each allocation, checked when it is freed */

/* A call of the CUDA runtime must succeed. */
#define CUDA_OK(call)                                                                                        \
    do {                                                                                                     \
        cudaError_t cuda_error_ = (call);                                                                    \
        if (cuda_error_ != cudaSuccess) fail_msg("%s: %s", #call, cudaGetErrorString(cuda_error_));          \
    } while (0)

/* A launcher of qk_cuda.h must return 0 and its work must end well. */
#define CUDA_RUN(call)                                                                                       \
    do {                                                                                                     \
        int cuda_run_ = (call);                                                                              \
        if (cuda_run_ != 0) fail_msg("%s: %s", #call, cudaGetErrorString((cudaError_t)cuda_run_));           \
        CUDA_OK(cudaDeviceSynchronize());                                                                    \
    } while (0)

typedef struct cuda_block {
    void *p;
    size_t bytes;
    struct cuda_block *next;
} cuda_block;

static cuda_block *cuda_blocks;

/* Device memory full of 0xff bytes (floats: NaN), 256-byte aligned. */
static inline void *cuda_new(size_t bytes)
{
    cuda_block *b = malloc(sizeof *b);
    assert_non_null(b);
    b->bytes = bytes;
    b->next = cuda_blocks;
    cuda_blocks = b;
    CUDA_OK(cudaMalloc(&b->p, bytes + CUDA_GUARD));
    CUDA_OK(cudaMemset(b->p, 0xff, bytes));
    CUDA_OK(cudaMemset((char *)b->p + bytes, 0xa5, CUDA_GUARD));
    return b->p;
}

static inline void *cuda_put(const void *host, size_t bytes)
{
    void *p = cuda_new(bytes);
    if (bytes) CUDA_OK(cudaMemcpy(p, host, bytes, cudaMemcpyHostToDevice));
    return p;
}

static inline void cuda_get(void *host, const void *device, size_t bytes)
{
    CUDA_OK(cudaDeviceSynchronize());
    if (bytes) CUDA_OK(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
}

/* Host copy of device memory: free() it. */
static inline void *cuda_copy(const void *device, size_t bytes)
{
    void *p = new_bytes(bytes);
    cuda_get(p, device, bytes);
    return p;
}

/* NULL is fine. Fails where something was written behind the allocation. */
static inline void cuda_free(const void *p)
{
    if (!p) return;
    cuda_block **at = &cuda_blocks;
    while (*at && (*at)->p != p) at = &(*at)->next;
    cuda_block *b = *at;
    if (!b) fail_msg("%p is not from cuda_new", p);
    uint8_t guard[CUDA_GUARD];
    cuda_get(guard, (char *)b->p + b->bytes, sizeof guard);
    for (size_t i = 0; i < sizeof guard; i++)
        if (guard[i] != 0xa5) fail_msg("byte %zu behind an allocation of %zu bytes was written", i, b->bytes);
    CUDA_OK(cudaFree(b->p));
    *at = b->next;
    free(b);
}

/* Frees all that is left, for teardowns and long tests. */
static inline void cuda_free_all(void)
{
    while (cuda_blocks) cuda_free(cuda_blocks->p);
}

#endif
