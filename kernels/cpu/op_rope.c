/* Rotary position embedding on halves (Su et al. 2021; the layout of Hugging Face checkpoints): each product
 * and their sum are rounded on their own, as transformers does in float32. */
#include "ops.h"

void QK_NAME(rope)(float *x, const int32_t *pos, const float *cos, const float *sin, int heads, int d,
                   int64_t t0, int64_t t1)
{
    const int half = d / 2;
    for (int64_t t = t0; t < t1; t++) {
        const float *c = cos + (int64_t)pos[t] * half, *s = sin + (int64_t)pos[t] * half;
        for (int head = 0; head < heads; head++) {
            float *a = x + (t * heads + head) * d, *b = a + half;
            for (int i = 0; i < half; i += 16) {
                int n = half - i < 16 ? half - i : 16;
                v16 va = v16_load_n(a + i, n), vb = v16_load_n(b + i, n);
                v16 vc = v16_load_n(c + i, n), vs = v16_load_n(s + i, n);
                v16_store_n(a + i, v16_sub(v16_mul(va, vc), v16_mul(vb, vs)), n);
                v16_store_n(b + i, v16_add(v16_mul(vb, vc), v16_mul(va, vs)), n);
            }
        }
    }
}
