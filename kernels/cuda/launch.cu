#include "launch.cuh"

bool qk_programmatic;

void qk_cuda_set_programmatic(bool on)
{
    qk_programmatic = on;
}
