/* A grid, run block after block on the calling thread. */
#ifndef BLOCK_H
#define BLOCK_H

#include <cuda_runtime.h>

/* Calls `thread` once for each thread of the grid. One grid at a time in this process: the caller sees to it.
 */
void emu_run_grid(dim3 grid, dim3 block, size_t shared, const std::function<void()> &thread);

#endif
