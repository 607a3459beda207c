/* Probabilities from rows of logits, in float64: softmax, logsumexp, Kullback-Leibler divergence.
 *
 * The maximum is taken out first. The sum runs in four fixed chains, so that it does not wait for itself.
 */
#include "../qk.h"

#include <math.h>

static float largest(const float *x, int64_t n)
{
    float max = -INFINITY;
    for (int64_t i = 0; i < n; i++) {
        if (x[i] != x[i]) return x[i];
        if (x[i] > max) max = x[i];
    }
    return max;
}

/* sum exp((x - max) / temperature) */
static double sum_exp(const float *x, int64_t n, double max, double temperature)
{
    double s[4] = {0};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; j++) s[j] += exp(((double)x[i + j] - max) / temperature);
    for (; i < n; i++) s[0] += exp(((double)x[i] - max) / temperature);
    return (s[0] + s[1]) + (s[2] + s[3]);
}

double qk_logsumexp(const float *x, int64_t n, double temperature)
{
    double max = largest(x, n);
    if (!isfinite(max)) return max; /* all minus infinity, one infinity, or a NaN */
    return max / temperature + log(sum_exp(x, n, max, temperature));
}

void qk_softmax(const float *x, int64_t n, double temperature, float *y)
{
    double max = largest(x, n), sum = sum_exp(x, n, max, temperature);
    for (int64_t i = 0; i < n; i++) y[i] = (float)(exp(((double)x[i] - max) / temperature) / sum);
}

double qk_kl(const float *a, const float *b, int64_t n)
{
    double lse_a = qk_logsumexp(a, n, 1.0), lse_b = qk_logsumexp(b, n, 1.0);
    double s[4] = {0};
    for (int64_t i = 0; i < n; i++) {
        double ln_p = (double)a[i] - lse_a, ln_q = (double)b[i] - lse_b, p = exp(ln_p);
        if (p != 0) s[i % 4] += p * (ln_p - ln_q);
    }
    return (s[0] + s[1]) + (s[2] + s[3]);
}
