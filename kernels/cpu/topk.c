/* The k largest of a row, by a heap whose root is the worst element kept: one comparison for most columns. */
#include "../qk.h"
#include "../qk_half.h"

/* Integers in the order of the floats: NaN below all, -0 equal to 0. */
static int32_t order_key(float x)
{
    if (x != x) return INT32_MIN;
    int32_t bits = (int32_t)qk_bits(x + 0.0f);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

static bool is_worse(const float *values, const int32_t *ids, int64_t a, int64_t b)
{
    int32_t ka = order_key(values[a]), kb = order_key(values[b]);
    return ka != kb ? ka < kb : ids[a] > ids[b];
}

static void swap(float *values, int32_t *ids, int64_t a, int64_t b)
{
    float v = values[a];
    int32_t id = ids[a];
    values[a] = values[b];
    ids[a] = ids[b];
    values[b] = v;
    ids[b] = id;
}

/* Restore the heap of n elements below `i`. */
static void sift_down(float *values, int32_t *ids, int64_t i, int64_t n)
{
    for (;;) {
        int64_t child = 2 * i + 1;
        if (child >= n) return;
        if (child + 1 < n && is_worse(values, ids, child + 1, child)) child++;
        if (!is_worse(values, ids, child, i)) return;
        swap(values, ids, i, child);
        i = child;
    }
}

void qk_topk(const float *x, int64_t n, int64_t k, float *values, int32_t *ids)
{
    if (k > n) k = n;
    if (k <= 0) return;
    for (int64_t i = 0; i < k; i++) {
        values[i] = x[i];
        ids[i] = (int32_t)i;
    }
    for (int64_t i = k / 2 - 1; i >= 0; i--) sift_down(values, ids, i, k);
    int32_t worst = order_key(values[0]);
    for (int64_t i = k; i < n; i++) {
        int32_t key = order_key(x[i]);
        if (key <= worst) continue; /* a tie goes to the lower index, which is already kept */
        values[0] = x[i];
        ids[0] = (int32_t)i;
        sift_down(values, ids, 0, k);
        worst = order_key(values[0]);
    }
    for (int64_t left = k - 1; left > 0; left--) { /* heap sort: the worst goes last */
        swap(values, ids, 0, left);
        sift_down(values, ids, 0, left);
    }
}
