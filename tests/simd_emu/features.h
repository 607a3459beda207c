/* A processor with AVX-512, whatever this one has: included before dispatch.c and the emulated kernels.
 * SIMD_EMU_WITHOUT in the environment names a feature that it lacks, such as avx512vbmi. */
#ifndef SIMD_EMU_FEATURES_H
#define SIMD_EMU_FEATURES_H

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static inline bool simd_emu_has(const char *feature)
{
    const char *without = getenv("SIMD_EMU_WITHOUT");
    return !without || strcmp(without, feature) != 0;
}

#define __builtin_cpu_supports(feature)                                                                      \
    (strncmp(feature, "avx512", 6) == 0 ? simd_emu_has(feature) : __builtin_cpu_supports(feature))

#endif
