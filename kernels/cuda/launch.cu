#include "launch.cuh"

bool qk_programmatic;

static __global__ void version_of_this(void)
{
    qk_wait_earlier();
}

/* A build for older devices runs on sm_90 too, from its PTX: then no kernel has the wait in it. */
void qk_cuda_set_programmatic(bool on)
{
    cudaFuncAttributes found = {};
    if (on && cudaFuncGetAttributes(&found, (const void *)version_of_this) != cudaSuccess) cudaGetLastError();
    qk_programmatic = found.ptxVersion >= 90;
}
