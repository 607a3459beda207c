/* Kernels that try the emulation itself: right ones, and wrong ones that it must refuse. */
#ifndef TEST_KERNELS_H
#define TEST_KERNELS_H

#include <cuda_runtime_api.h>

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* out [10][32], one row for each warp operation: see test_warps. */
cudaError_t test_warps_launch(uint32_t *out);
/* out [3 * 96]: of each thread, the three votes of 96 threads whose index is >= 64. */
cudaError_t test_votes_launch(int *out);
/* d += a b: a [16, 16], b [16, 8] of 16-bit numbers, row-major, d [16, 8]. */
cudaError_t test_mma_launch(bool bf16, const uint16_t *a, const uint16_t *b, float *d);
/* m [4][8][8] -> out [4][8][8], by ldmatrix from shared memory. */
cudaError_t test_ldmatrix_launch(bool transposed, const uint16_t *m, uint16_t *out);
/* in [3][32][4] -> out [9][32]: first word of the three targets before a wait, after one for all groups but
 * the last, and after one for all; the second and third are one group, and the third is not valid. */
cudaError_t test_copies_launch(const uint32_t *in, uint32_t *out);
/* Sums over 64 threads by way of shared memory, with or without the barriers that it needs; in, out [64]. */
cudaError_t test_exchange_launch(bool barrier, const float *in, float *out);
/* out [2]: what static and dynamic shared memory hold at first, in the second of two blocks. */
cudaError_t test_fresh_shared_launch(uint32_t *out);
/* p[0] = 2 p[0] + add, on a stream. */
cudaError_t test_step_launch(cudaStream_t stream, int *p, int add);
/* order [blocks]: order[i] = block that came i-th; counter starts at 0. */
cudaError_t test_block_order_launch(int blocks, int *counter, int *order);

typedef enum {
    WRONG_BARRIER_SKIPPED, /* half the block returns before it */
    WRONG_BARRIER_OTHER,   /* two barriers at once */
    WRONG_WARP_RETURNED,   /* a shuffle names lanes that are gone */
    WRONG_WARP_ELSEWHERE,  /* lanes wait for each other at different operations */
    WRONG_WARP_SELF,       /* a mask without the lane itself */
    WRONG_WARP_SOURCE,     /* a shuffle reads a lane outside the mask */
    WRONG_SHARED_END,      /* writes behind dynamic shared memory */
    WRONG_ALIGNMENT,       /* a 16-byte load at a multiple of 4 */
    WRONG_COPY_SOURCE,     /* an asynchronous copy from outside device memory */
    WRONG_COPY_TARGET,     /* an asynchronous copy to device memory */
    WRONG_COUNT
} wrong_kernel;
cudaError_t test_wrong_launch(wrong_kernel which, uint32_t *memory);

#ifdef __cplusplus
}
#endif
#endif
