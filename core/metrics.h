/* What two models' logits say about each other, row by row.
 *
 * Logits are F32 [n, V] on one device; "a" is the reference (full) model, "b" the tested (quantized) one.
 * Outputs are host arrays of the caller, one value a row, in float64; means and intervals over rows are
 * Lua's. The work goes through ops.h wherever an operation exists. Every function refuses a NaN or an
 * infinity in the logits by naming the row (counted from 1) and the token. Natural logarithms throughout.
 */
#ifndef QL_METRICS_H
#define QL_METRICS_H

#include "tensor.h"

/* out[row * nk + j] = |A and B| / |A or B| of the ks[j] most likely tokens; ties go to the lower id. */
ql_status ql_metrics_jaccard(const ql_tensor *a /* [n, V] */, const ql_tensor *b /* [n, V] */,
                             const int *ks /* [nk], each 1..V */, int nk, double *out /* [OUT] [n, nk] */,
                             ql_err *err);

/* out[row] = 1 when both have the same most likely token (the lowest id on ties), else 0. */
ql_status ql_metrics_agreement(const ql_tensor *a, const ql_tensor *b, uint8_t *out /* [OUT] [n] */,
                               ql_err *err);

/* out[row] = sum p (ln p - ln q), in nats, p from a and q from b, over the whole vocabulary (Kullback &
 * Leibler 1951). */
ql_status ql_metrics_kl(const ql_tensor *a, const ql_tensor *b, double *out /* [OUT] [n] */, ql_err *err);

/* out[row] = q(target) - p(target). */
ql_status ql_metrics_delta_p(const ql_tensor *a, const ql_tensor *b, const int32_t *targets /* [n], ids */,
                             double *out /* [OUT] [n] */, ql_err *err);

/* Jaccard of the nuclei: the smallest set of the most likely tokens whose mass reaches top_p at
 * `temperature`, ties to the lower id (Holtzman et al. 2020). top_p in (0, 1]; 1 is the whole vocabulary. */
ql_status ql_metrics_nucleus(const ql_tensor *a, const ql_tensor *b, double top_p, double temperature,
                             double *out /* [OUT] [n] */, ql_err *err);

/* Two nuclei of one row: of the reference [0] and of the tested model [1]. */
typedef struct {
    double overlap;  /* Jaccard of the two sets */
    int64_t size[2]; /* tokens */
    double mass[2]; /* [0]: of the tested model's nucleus in the reference's distribution; [1]: the reverse */
    bool has_top;   /* whether the reference's most likely token is in the tested model's nucleus */
} ql_nucleus_pair;

/* The same, and more of both nuclei, for every top_p at every temperature:
 * out[(row * nt + t) * np + j] at temperatures[t] and top_ps[j]. */
ql_status ql_metrics_nuclei(const ql_tensor *a, const ql_tensor *b, const double *top_ps /* [np] */, int np,
                            const double *temperatures /* [nt] */, int nt,
                            ql_nucleus_pair *out /* [OUT] [n, nt, np] */, ql_err *err);

/* out[row] = ln p(target); greedy[row], where wanted, = 1 when target is the most likely token. */
ql_status ql_metrics_loglik(const ql_tensor *a, const int32_t *targets /* [n], ids */,
                            double *out /* [OUT] [n] */, uint8_t *greedy /* [OUT] [n] or NULL */,
                            ql_err *err);

/* out[row] = -sum p ln p, in nats. */
ql_status ql_metrics_entropy(const ql_tensor *a, double *out /* [OUT] [n] */, ql_err *err);

#endif
