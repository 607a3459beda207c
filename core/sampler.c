#include "sampler.h"

#include "mem.h"

#include <math.h>
#include <stdlib.h>

typedef struct {
    float logit;
    int32_t id;
} candidate;

struct ql_sampler {
    int64_t capacity;
    candidate *candidates; /* [capacity] */
    double *weights;       /* [capacity] */
};

ql_status ql_sampling_check(const ql_sampling *s, ql_err *err)
{
    if (!(s->temperature >= 0) || isinf(s->temperature))
        return ql_err_set(err, QL_ERR_ARG, "temperature %g is not a finite number of at least 0",
                          s->temperature);
    if (s->top_k < 0) return ql_err_set(err, QL_ERR_ARG, "top_k %lld is below 0", (long long)s->top_k);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return ql_err_set(err, QL_ERR_ARG, "top_p %g is outside (0, 1]", s->top_p);
    return QL_OK;
}

ql_status ql_sampler_new(int64_t vocab, ql_sampler **out, ql_err *err)
{
    *out = NULL;
    if (vocab < 1 || vocab > INT32_MAX)
        return ql_err_set(err, QL_ERR_ARG, "a vocabulary of %lld tokens cannot be sampled", (long long)vocab);
    ql_sampler *s = ql_calloc(1, sizeof *s);
    if (!s) goto fail;
    s->capacity = vocab;
    s->candidates = ql_calloc((size_t)vocab, sizeof *s->candidates);
    s->weights = ql_calloc((size_t)vocab, sizeof *s->weights);
    if (!s->candidates || !s->weights) goto fail;
    *out = s;
    return QL_OK;
fail:
    ql_sampler_free(s);
    return ql_err_set(err, QL_ERR_MEMORY, "out of memory for sampling from %lld tokens", (long long)vocab);
}

void ql_sampler_free(ql_sampler *s)
{
    if (!s) return;
    ql_free(s->candidates);
    ql_free(s->weights);
    ql_free(s);
}

static bool is_greedy(const ql_sampling *sampling)
{
    return sampling->temperature == 0 || sampling->top_k == 1;
}

/* Finaliser of SplitMix64 (Steele, Lea & Flood 2014): every output bit depends on every input bit. */
static uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

double ql_sampler_uniform(uint64_t seed, uint64_t stream, uint64_t step)
{
    const uint64_t golden = UINT64_C(0x9e3779b97f4a7c15);
    uint64_t h = mix(seed + golden);
    h = mix(h ^ (stream + 2 * golden));
    h = mix(h ^ (step + 3 * golden));
    return (double)(h >> 11) * 0x1p-53;
}

/* More likely first, ties by id: a total order, so that qsort's result is the same everywhere. */
static int by_likelihood(const void *pa, const void *pb)
{
    const candidate *a = pa, *b = pb;
    if (a->logit != b->logit) return a->logit > b->logit ? -1 : 1;
    return (a->id > b->id) - (a->id < b->id);
}

static bool better(candidate a, candidate b)
{
    return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

/* Keep the worst of the best k at the root. */
static void sift_down(candidate *heap, int64_t k, int64_t i)
{
    candidate c = heap[i];
    for (;;) {
        int64_t child = 2 * i + 1;
        if (child >= k) break;
        if (child + 1 < k && better(heap[child], heap[child + 1])) child++;
        if (!better(c, heap[child])) break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = c;
}

/* The k best of the first n candidates move to the front, in no order. */
static void select_best(candidate *c, int64_t n, int64_t k)
{
    for (int64_t i = k / 2 - 1; i >= 0; i--) sift_down(c, k, i);
    for (int64_t i = k; i < n; i++) {
        if (!better(c[i], c[0])) continue;
        c[0] = c[i];
        sift_down(c, k, 0);
    }
}

static ql_status find_best(const float *logits, int64_t vocab, int64_t *best, ql_err *err)
{
    int64_t at = 0;
    for (int64_t i = 0; i < vocab; i++) {
        if (isnan(logits[i]) || logits[i] == INFINITY)
            return ql_err_set(err, QL_ERR_FORMAT, "the logit of token %lld is %s", (long long)i,
                              isnan(logits[i]) ? "NaN" : "an infinity");
        if (logits[i] > logits[at]) at = i;
    }
    if (isinf(logits[at]))
        return ql_err_set(err, QL_ERR_FORMAT, "no token can be drawn: every logit is -inf");
    *best = at;
    return QL_OK;
}

/* Unnormalised probability, 1 for the best: never overflows, whatever the temperature. */
static double weight(float logit, float best, double temperature)
{
    return exp(((double)logit - (double)best) / temperature);
}

/* Of candidates sorted best first, how many reach `top_p` of their own mass; fills weights [n]. */
static int64_t nucleus(ql_sampler *s, int64_t n, double total, double top_p, double *mass)
{
    double sum = 0;
    int64_t kept = 0;
    while (kept < n && (kept == 0 || sum < top_p * total)) sum += s->weights[kept++];
    *mass = sum;
    return kept;
}

/* The candidate, of n with their weights and their sum, that the counter's number falls on. */
static int32_t draw(const ql_sampler *s, int64_t n, double total, const ql_sampling *sampling,
                    uint64_t stream, uint64_t step)
{
    double target = ql_sampler_uniform(sampling->seed, stream, step) * total, sum = 0;
    int64_t last = 0; /* a draw at the very end of the sum belongs to the last token that has any mass */
    for (int64_t i = 0; i < n; i++) {
        if (s->weights[i] > 0) last = i;
        sum += s->weights[i];
        if (sum > target) break;
    }
    return s->candidates[last].id;
}

ql_status ql_sampler_pick(ql_sampler *s, const ql_sampling *sampling, const float *logits, int64_t vocab,
                          uint64_t stream, uint64_t step, int32_t *id, ql_err *err)
{
    *id = -1;
    ql_status status = ql_sampling_check(sampling, err);
    if (status != QL_OK) return status;
    if (vocab < 1 || vocab > s->capacity)
        return ql_err_set(err, QL_ERR_ARG, "a row of %lld logits does not fit a sampler made for %lld",
                          (long long)vocab, (long long)s->capacity);
    int64_t best = 0;
    status = find_best(logits, vocab, &best, err);
    if (status != QL_OK) return status;
    *id = (int32_t)best;
    double t = sampling->temperature;
    if (is_greedy(sampling)) return QL_OK;

    float top = logits[best];
    int64_t n = 0;
    double total = 0;
    for (int64_t i = 0; i < vocab; i++) {
        if (isinf(logits[i])) continue;
        s->candidates[n++] = (candidate){logits[i], (int32_t)i};
    }
    bool cut = sampling->top_k > 0 && sampling->top_k < n;
    if (cut) {
        select_best(s->candidates, n, sampling->top_k);
        n = sampling->top_k;
        qsort(s->candidates, (size_t)n, sizeof *s->candidates, by_likelihood);
    }
    for (int64_t i = 0; i < n; i++) total += s->weights[i] = weight(s->candidates[i].logit, top, t);

    if (sampling->top_p < 1) {
        if (!cut) {
            /* A token of the nucleus and all below it weigh more than (1 - top_p) of the total, so it alone
             * weighs at least that over n: the rest need not be sorted. Halved to be safe from rounding. */
            double least = (1 - sampling->top_p) * total / (double)n / 2;
            int64_t kept = 0;
            for (int64_t i = 0; i < n; i++) {
                if (s->weights[i] >= least) s->candidates[kept++] = s->candidates[i];
            }
            n = kept;
            qsort(s->candidates, (size_t)n, sizeof *s->candidates, by_likelihood);
            for (int64_t i = 0; i < n; i++) s->weights[i] = weight(s->candidates[i].logit, top, t);
        }
        n = nucleus(s, n, total, sampling->top_p, &total);
    }

    *id = draw(s, n, total, sampling, stream, step);
    return QL_OK;
}

/* Candidates asked for when top_p alone says how many matter. */
#define NUCLEUS_TOP 1024

/* top_k tokens and the next one: it tells whether there are more than top_k that can be drawn. */
static bool is_cut(const ql_sampling *sampling, int64_t vocab)
{
    return sampling->top_k > 0 && sampling->top_k < vocab;
}

int64_t ql_sampler_candidates(const ql_sampling *sampling, int64_t vocab)
{
    if (is_greedy(sampling)) return 1;
    if (is_cut(sampling, vocab)) return sampling->top_k + 1;
    if (sampling->top_p == 1) return 0;
    return vocab < NUCLEUS_TOP ? vocab : NUCLEUS_TOP;
}

double ql_sampler_temperature(const ql_sampling *sampling)
{
    return sampling->temperature > 0 ? sampling->temperature : 1;
}

/* As `nucleus`, where `total` is known but for rounding: 0 when the n end first, or when the sum comes within
 * `margin` of the bound, relative to it. */
static int64_t sure_nucleus(const ql_sampler *s, int64_t n, double total, double top_p, double margin,
                            double *mass)
{
    double bound = top_p * total, sum = 0;
    for (int64_t kept = 0; kept < n;) {
        sum += s->weights[kept++];
        if (fabs(sum - bound) <= margin * bound) return 0;
        if (sum < bound) continue;
        *mass = sum;
        return kept;
    }
    return 0;
}

ql_status ql_sampler_pick_top(ql_sampler *s, const ql_sampling *sampling, const float *values,
                              const int32_t *ids, int64_t k, int64_t vocab, double lse, uint64_t stream,
                              uint64_t step, int32_t *id, ql_err *err)
{
    *id = -1;
    QL_TRY(ql_sampling_check(sampling, err));
    if (vocab < 1 || vocab > s->capacity || k < 1 || k != ql_sampler_candidates(sampling, vocab))
        return ql_err_set(err, QL_ERR_ARG, "%lld of %lld logits do not fit a sampler made for %lld",
                          (long long)k, (long long)vocab, (long long)s->capacity);
    if (!isfinite(lse) || !isfinite(values[0])) return QL_OK;
    if (is_greedy(sampling)) {
        *id = ids[0];
        return QL_OK;
    }
    bool cut = is_cut(sampling, vocab);
    if (cut && isinf(values[k - 1])) return QL_OK; /* no more than top_k: picked in the order of ids */
    int64_t n = cut ? k - 1 : k;
    double t = sampling->temperature, total = 0;
    for (int64_t i = 0; i < n; i++) {
        s->candidates[i] = (candidate){values[i], ids[i]};
        total += s->weights[i] = weight(values[i], values[0], t);
    }
    if (sampling->top_p < 1 && cut) {
        n = nucleus(s, n, total, sampling->top_p, &total);
    } else if (sampling->top_p < 1) {
        /* Either total is a sum of up to 2^17 numbers, each addition off by 2^-53: 1.5e-11 at most, beside
         * the rounding of lse itself. */
        double rest = exp(lse - (double)values[0] / t);
        n = sure_nucleus(s, n, rest, sampling->top_p, 1e-10 * (1 + fabs(lse)), &total);
    }
    if (n > 0) *id = draw(s, n, total, sampling, stream, step);
    return QL_OK;
}
