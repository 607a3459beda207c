/* Ceilings of this core, so that a benchmark can say what share of them it reached. */
#include "ops.h"

float QK_NAME(probe_read)(const void *p, size_t bytes)
{
    const float *f = p;
    size_t n = bytes / sizeof(float);
    v16 s[8];
    QK_UNROLL for (int j = 0; j < 8; j++) s[j] = v16_zero();
    for (size_t i = 0; i + 128 <= n; i += 128) {
        QK_UNROLL for (int j = 0; j < 8; j++)
        {
            __builtin_prefetch(f + i + 16 * j + 1024, 0, 3);
            s[j] = v16_add(s[j], v16_load(f + i + 16 * j));
        }
    }
    QK_UNROLL for (int j = 1; j < 8; j++) s[0] = v16_add(s[0], s[j]);
    return v16_hsum(s[0]);
}

double QK_NAME(probe_fma)(int64_t rounds, float *sink)
{
    enum { CHAINS = sizeof(v16) == 64 && V16_TILE_COLS == 6 ? 16 : 6 };
    v16 s[CHAINS], a = v16_set1(*sink), b = v16_set1(0.5f);
    float start[16]; /* all different, or the compiler finds that lanes can share their work */
    for (int l = 0; l < 16; l++) start[l] = *sink + (float)l;
    QK_UNROLL for (int j = 0; j < CHAINS; j++) s[j] = v16_add(v16_load(start), v16_set1((float)(16 * j)));
    for (int64_t i = 0; i < rounds; i++) {
        QK_UNROLL for (int j = 0; j < CHAINS; j++) s[j] = v16_fma(s[j], b, a);
    }
    QK_UNROLL for (int j = 1; j < CHAINS; j++) s[0] = v16_add(s[0], s[j]);
    *sink = v16_hsum(s[0]);
    return 2.0 * 16 * CHAINS * (double)rounds;
}
