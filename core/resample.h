/* The inner loops of resampling statistics: the bootstrap and the sign-flip test. Intervals, p-values and
 * their meaning are qlua.stats'.
 *
 * Lists are the caller's, n finite numbers each. Draws come from xoshiro256** seeded by splitmix64 (Blackman
 * & Vigna 2018), so that a seed gives the same bits on every machine. QL_ERR_INTERRUPTED on Ctrl-C.
 */
#ifndef QL_RESAMPLE_H
#define QL_RESAMPLE_H

#include <stdint.h>

#include "err.h"

#define QL_RESAMPLE_LISTS 4
/* An index takes 32 random bits, (bits * n) >> 32: its bias is under n / 2^32. */
#define QL_RESAMPLE_MAX (1 << 24)

typedef enum { QL_RESAMPLE_MEAN, QL_RESAMPLE_MEDIAN } ql_resample_kind;

/* out[r] = what resample r says. Element i of every list belongs to the same question: whole questions are
 * redrawn. One list: its mean or median; two: the first's over the second's; four: the quotient of two such
 * ratios. A ratio whose divisor is 0 is NaN or infinite. A word of 64 bits gives two indices, the upper half
 * first; with odd n the last index is a word's upper half. */
ql_status ql_resample_bootstrap(ql_resample_kind kind, const double *const *lists /* [count] of [n] */,
                                int count /* 1, 2, 4 */, int64_t n, int64_t resamples, int64_t seed,
                                double *out /* [OUT] [resamples] */, ql_err *err);

/* How many assignments of signs to the values give a sum at least as far from 0 as the sum of the values
 * themselves (Fisher 1935; sums within rounding of it count): of all 2^n where n <= QL_RESAMPLE_EXACT, else
 * of `draws` random ones. */
#define QL_RESAMPLE_EXACT 20
ql_status ql_resample_sign_flips(const double *values /* [n] */, int64_t n, int64_t draws, int64_t seed,
                                 int64_t *extreme /* [OUT] */, int64_t *total /* [OUT] */, ql_err *err);

#endif
