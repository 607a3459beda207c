/* Picking the next token from one row of logits on the host, or from the best of a row that stays elsewhere.
 *
 * Order as in transformers' generate: temperature, then top-k, then top-p, then one draw. The draw comes from
 * a counter, not from a state: (seed, stream, step) alone decide it, so that a sequence draws the same
 * numbers in whatever batch it runs. Ties go to the lower id everywhere: top-k keeps exactly k tokens, where
 * transformers keeps all that tie with the k-th.
 */
#ifndef QL_SAMPLER_H
#define QL_SAMPLER_H

#include "err.h"

#include <stdbool.h>
#include <stdint.h>

typedef struct {
    double temperature; /* 0: greedy, the lowest id among the largest logits */
    int64_t top_k;      /* 0: off */
    double top_p;       /* (0, 1]; 1: off */
    uint64_t seed;
} ql_sampling;

/* Temperature finite and >= 0, top_k >= 0, 0 < top_p <= 1; the message names the field. */
ql_status ql_sampling_check(const ql_sampling *sampling, ql_err *err);

/* Work memory for rows of up to `vocab` logits; one per thread. The caller frees it. */
typedef struct ql_sampler ql_sampler;
ql_status ql_sampler_new(int64_t vocab, ql_sampler **out /* [OUT] */, ql_err *err);
void ql_sampler_free(ql_sampler *sampler); /* NULL is ignored */

/* `stream` names the sequence (its number in the run, not in the batch), `step` counts its drawn tokens. A
 * logit of -inf is a token that cannot be drawn; NaN, +inf and a row of nothing but -inf are errors. */
ql_status ql_sampler_pick(ql_sampler *sampler, const ql_sampling *sampling, const float *logits /* [vocab] */,
                          int64_t vocab, uint64_t stream, uint64_t step, int32_t *id /* [OUT] */,
                          ql_err *err);

/* The same choice from the largest logits of a row that lies on a device.
 *
 * ql_sampler_candidates: how many of them it takes, or 0 when only the whole row will do (no top_k and no
 * top_p). ql_sampler_temperature: the temperature of the logsumexp that goes with them. */
int64_t ql_sampler_candidates(const ql_sampling *sampling, int64_t vocab);
double ql_sampler_temperature(const ql_sampling *sampling);

/* `values` and `ids`: the k largest logits, largest first, ties to the lower id, k as ql_sampler_candidates
 * says; lse = ln sum exp(x / temperature) of the whole row, NaN or infinite when a logit is NaN or +infinity
 * or all are -infinity. *id is what ql_sampler_pick picks from the row; or -1, when that cannot be told from
 * these (a nucleus beyond the k, a mass within rounding of top_p) or the row has a bad logit: then the row
 * goes to ql_sampler_pick. */
ql_status ql_sampler_pick_top(ql_sampler *sampler, const ql_sampling *sampling, const float *values /* [k] */,
                              const int32_t *ids /* [k] */, int64_t k, int64_t vocab, double lse,
                              uint64_t stream, uint64_t step, int32_t *id /* [OUT] */, ql_err *err);

/* Uniform in [0, 1) with 53 bits, a pure function of its arguments. */
double ql_sampler_uniform(uint64_t seed, uint64_t stream, uint64_t step);

#endif
