/* Launching a kernel: every launch goes through qk_launch, and its error is returned. */
#ifndef QK_LAUNCH_CUH
#define QK_LAUNCH_CUH

#include "ptx.cuh"
#include "qk_cuda.h"

/* Set by qk_cuda_set_programmatic: launches may overlap (sm_90 and later; see qk_wait_earlier). */
extern bool qk_programmatic;

template <class T> struct qk_same {
    typedef T type;
};

static inline cudaError_t qk_allow_shared(const void *kernel, size_t bytes)
{
    if (bytes <= 48 * 1024) return cudaSuccess;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes);
}

/* Queue `kernel` with `shared` bytes of dynamic shared memory. An empty grid is no work, and no error. */
template <class... P>
static int qk_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, qk_stream stream,
                     typename qk_same<P>::type... args)
{
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
    cudaError_t error = qk_allow_shared((const void *)kernel, shared);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = qk_programmatic ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

#endif
