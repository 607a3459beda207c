#include "resample.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "interrupt.h"
#include "mem.h"

typedef struct {
    uint64_t s[4];
} generator;

static generator seeded(int64_t seed)
{
    generator g;
    uint64_t state = (uint64_t)seed;
    for (int i = 0; i < 4; i++) {
        uint64_t z = state += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        g.s[i] = z ^ z >> 31;
    }
    return g;
}

static inline uint64_t rotl(uint64_t x, int k)
{
    return x << k | x >> (64 - k);
}

static inline uint64_t next(generator *g)
{
    uint64_t *s = g->s, result = rotl(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotl(s[3], 45);
    return result;
}

static void draw(generator *g, uint32_t *indices /* [OUT] [n] */, int64_t n)
{
    int64_t i = 0;
    for (; i + 1 < n; i += 2) {
        uint64_t bits = next(g);
        indices[i] = (uint32_t)((bits >> 32) * (uint64_t)n >> 32);
        indices[i + 1] = (uint32_t)((bits & 0xFFFFFFFFu) * (uint64_t)n >> 32);
    }
    if (i < n) indices[i] = (uint32_t)((next(g) >> 32) * (uint64_t)n >> 32);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double mean_of(const double *list, const uint32_t *indices, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += list[indices[i]];
    return sum / (double)n;
}

static double median_of(const double *list, const uint32_t *indices, int64_t n, double *scratch /* [n] */)
{
    for (int64_t i = 0; i < n; i++) scratch[i] = list[indices[i]];
    qsort(scratch, (size_t)n, sizeof *scratch, ascending);
    double below = scratch[(n - 1) / 2];
    return below + 0.5 * (scratch[n / 2] - below);
}

ql_status ql_resample_bootstrap(ql_resample_kind kind, const double *const *lists, int count, int64_t n,
                                int64_t resamples, int64_t seed, double *out, ql_err *err)
{
    if (n < 1 || n > QL_RESAMPLE_MAX)
        return ql_err_set(err, QL_ERR_ARG, "a bootstrap takes 1 to %d values", QL_RESAMPLE_MAX);
    if (count != 1 && count != 2 && count != QL_RESAMPLE_LISTS)
        return ql_err_set(err, QL_ERR_ARG, "a bootstrap takes 1, 2 or 4 lists, got %d", count);
    generator g = seeded(seed);
    uint32_t *indices = ql_malloc((size_t)n * sizeof *indices);
    double *scratch = ql_malloc((size_t)n * sizeof *scratch);
    ql_status status = indices && scratch ? QL_OK : ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    for (int64_t r = 0; status == QL_OK && r < resamples; r++) {
        double of[QL_RESAMPLE_LISTS] = {0, 1, 1, 1};
        draw(&g, indices, n);
        for (int l = 0; l < count; l++) {
            of[l] = kind == QL_RESAMPLE_MEAN ? mean_of(lists[l], indices, n)
                                             : median_of(lists[l], indices, n, scratch);
        }
        out[r] = of[0] / of[1] / (of[2] / of[3]);
        if (ql_interrupted()) status = ql_err_set(err, QL_ERR_INTERRUPTED, "interrupted");
    }
    ql_free(indices);
    ql_free(scratch);
    return status;
}

/* Assignments of signs to values[0..n) that bring |sum| to `bar`. */
static int64_t reaching(const double *values, int64_t n, double sum, double bar)
{
    if (n == 0) return fabs(sum) >= bar;
    return reaching(values + 1, n - 1, sum + *values, bar) + reaching(values + 1, n - 1, sum - *values, bar);
}

/* The sum with random signs. Four partial sums, for one would wait for itself at every addition. */
static double flipped(generator *g, const double *values, int64_t n)
{
    double sums[4] = {0, 0, 0, 0};
    for (int64_t i = 0; i < n; i += 64) {
        uint64_t bits = next(g);
        int64_t end = n - i < 64 ? n : i + 64;
        for (int64_t j = i; j < end; j++, bits >>= 1) {
            uint64_t word;
            double value;
            memcpy(&word, values + j, sizeof word);
            word ^= bits << 63;
            memcpy(&value, &word, sizeof value);
            sums[j & 3] += value;
        }
    }
    return sums[0] + sums[1] + (sums[2] + sums[3]);
}

ql_status ql_resample_sign_flips(const double *values, int64_t n, int64_t draws, int64_t seed,
                                 int64_t *extreme, int64_t *total, ql_err *err)
{
    double sum = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += values[i];
        size += fabs(values[i]);
    }
    /* An error of n roundings: 2^24 values bring 1e-16 * sqrt(2^24) of their size about. */
    double bar = fabs(sum) - 1e-12 * size;
    *extreme = 0;
    if (n <= QL_RESAMPLE_EXACT) {
        *total = (int64_t)1 << n;
        *extreme = reaching(values, n, 0, bar);
        return QL_OK;
    }
    generator g = seeded(seed);
    for (*total = 0; *total < draws; ++*total) {
        *extreme += fabs(flipped(&g, values, n)) >= bar;
        if (ql_interrupted()) return ql_err_set(err, QL_ERR_INTERRUPTED, "interrupted");
    }
    return QL_OK;
}
