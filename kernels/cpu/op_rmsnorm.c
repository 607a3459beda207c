/* Root mean square normalisation (Zhang & Sennrich 2019). */
#include "ops.h"

#include <math.h>

void QK_NAME(rmsnorm)(const float *x, const float *w, float eps, int64_t h, float *y, int64_t t0, int64_t t1)
{
    for (int64_t t = t0; t < t1; t++) {
        const float *row = x + t * h;
        float *out = y + t * h;
        /* Four chains hide the latency of the sum; they fold in a fixed order. */
        v16 s[4] = {v16_zero(), v16_zero(), v16_zero(), v16_zero()};
        int64_t i = 0;
        for (; i + 64 <= h; i += 64) {
            QK_UNROLL for (int j = 0; j < 4; j++)
            {
                v16 v = v16_load(row + i + 16 * j);
                s[j] = v16_fma(v, v, s[j]);
            }
        }
        for (; i + 16 <= h; i += 16) s[0] = v16_fma(v16_load(row + i), v16_load(row + i), s[0]);
        if (i < h) {
            v16 v = v16_load_n(row + i, (int)(h - i));
            s[0] = v16_fma(v, v, s[0]);
        }
        float sum = v16_hsum(v16_add(v16_add(s[0], s[1]), v16_add(s[2], s[3])));
        v16 scale = v16_set1(1.0f / sqrtf(sum / (float)h + eps));
        for (i = 0; i + 16 <= h; i += 16) {
            v16_store(out + i, v16_mul(v16_mul(v16_load(row + i), scale), v16_load(w + i)));
        }
        if (i < h) {
            int n = (int)(h - i);
            v16_store_n(out + i, v16_mul(v16_mul(v16_load_n(row + i, n), scale), v16_load_n(w + i, n)), n);
        }
    }
}
