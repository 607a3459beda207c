/* The CPU backend: rows of logits, and tensors from one stored format to another. */
#include "backend_cpu.h"

#include "qk_random.h"

#include <math.h>

/* ---- rows of logits ---- */

typedef struct {
    const void *data;
    uint16_t mask; /* exponent of a 16-bit float; 0: the numbers are F32 */
    int64_t *at;   /* atomic: lowest index found yet, or the count */
} find_args;

/* NaN and the infinities have every bit of the exponent set. */
static bool is_bad(const find_args *a, int64_t i)
{
    if (a->mask == 0) return (((const uint32_t *)a->data)[i] & 0x7f800000u) == 0x7f800000u;
    return (((const uint16_t *)a->data)[i] & a->mask) == a->mask;
}

static bool any_bad(const find_args *a, int64_t i0, int64_t i1)
{
    const uint32_t *f = a->data;
    const uint16_t *h = a->data, mask = a->mask;
    uint32_t bad = 0;
    if (mask == 0) {
        for (int64_t i = i0; i < i1; i++) bad |= (f[i] & 0x7f800000u) == 0x7f800000u;
    } else {
        for (int64_t i = i0; i < i1; i++) bad |= (h[i] & mask) == mask;
    }
    return bad != 0;
}

static void find_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const find_args *a = args;
    const int64_t piece = 4096;
    for (int64_t i = i0; i < i1; i += piece) {
        int64_t end = i1 - i < piece ? i1 : i + piece;
        if (!any_bad(a, i, end)) continue;
        while (!is_bad(a, i)) i++;
        int64_t seen = __atomic_load_n(a->at, __ATOMIC_RELAXED);
        while (i < seen &&
               !__atomic_compare_exchange_n(a->at, &seen, i, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
        return;
    }
}

typedef struct {
    const float *a, *b;
    int64_t v;
    int k;
    double temperature;
    float *values;
    int32_t *ids;
    double *out;
} rows_args;

static void topk_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const rows_args *a = args;
    for (int64_t i = i0; i < i1; i++)
        qk_topk(a->a + i * a->v, a->v, a->k, a->values + i * a->k, a->ids + i * a->k);
}

ql_status ql_cpu_topk(void *ctx, const ql_tensor *x, int k, ql_tensor *values, ql_tensor *ids, ql_err *err)
{
    (void)err;
    rows_args a = {.a = x->data, .v = x->shape[1], .k = k, .values = values->data, .ids = ids->data};
    ql_cpu_for_range(ctx, x->shape[0], 1, 8.0 * (double)a.v, topk_range, &a);
    return QL_OK;
}

static void logsumexp_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const rows_args *a = args;
    for (int64_t i = i0; i < i1; i++) a->out[i] = qk_logsumexp(a->a + i * a->v, a->v, a->temperature);
}

ql_status ql_cpu_logsumexp(void *ctx, const ql_tensor *x, double temperature, ql_tensor *out, ql_err *err)
{
    (void)err;
    rows_args a = {.a = x->data, .v = x->shape[1], .temperature = temperature, .out = out->data};
    ql_cpu_for_range(ctx, x->shape[0], 1, 64.0 * (double)a.v, logsumexp_range, &a);
    return QL_OK;
}

typedef struct {
    const float *x;
    int64_t v;
    const int32_t *targets; /* or NULL */
    double *stats;
    int32_t *found;
} stats_args;

static void stats_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const stats_args *a = args;
    for (int64_t i = i0; i < i1; i++) {
        const float *row = a->x + i * a->v;
        double *stats = a->stats + 3 * i, lse = qk_logsumexp(row, a->v, 1.0), entropy = 0;
        float largest;
        int32_t *found = a->found + 2 * i;
        int64_t bad = a->v;
        find_args find = {row, 0, &bad};
        for (int64_t j = 0; j < a->v; j++) {
            double lnp = (double)row[j] - lse;
            entropy -= exp(lnp) * lnp;
        }
        qk_topk(row, a->v, 1, &largest, &found[0]);
        find_range(&find, 0, a->v, NULL);
        found[1] = bad < a->v ? (int32_t)bad : -1;
        stats[0] = lse;
        stats[1] = entropy;
        stats[2] = a->targets ? (double)row[a->targets[i]] : 0;
    }
}

ql_status ql_cpu_row_stats(void *ctx, const ql_tensor *x, const ql_tensor *targets, ql_tensor *stats,
                           ql_tensor *found, ql_err *err)
{
    if (targets) QL_TRY(ql_cpu_check_indices("target", targets, x->shape[1], err));
    stats_args a = {x->data, x->shape[1], targets ? targets->data : NULL, stats->data, found->data};
    ql_cpu_for_range(ctx, x->shape[0], 1, 128.0 * (double)a.v, stats_range, &a);
    return QL_OK;
}

static void softmax_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const rows_args *a = args;
    for (int64_t i = i0; i < i1; i++) qk_softmax(a->a + i * a->v, a->v, a->temperature, a->values + i * a->v);
}

ql_status ql_cpu_softmax(void *ctx, const ql_tensor *x, double temperature, ql_tensor *y, ql_err *err)
{
    (void)err;
    rows_args a = {.a = x->data, .v = x->shape[1], .temperature = temperature, .values = y->data};
    ql_cpu_for_range(ctx, x->shape[0], 1, 128.0 * (double)a.v, softmax_range, &a);
    return QL_OK;
}

static void kl_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const rows_args *a = args;
    for (int64_t i = i0; i < i1; i++) a->out[i] = qk_kl(a->a + i * a->v, a->b + i * a->v, a->v);
}

ql_status ql_cpu_kl(void *ctx, const ql_tensor *p, const ql_tensor *q, ql_tensor *out, ql_err *err)
{
    (void)err;
    rows_args a = {.a = p->data, .b = q->data, .v = p->shape[1], .out = out->data};
    ql_cpu_for_range(ctx, p->shape[0], 1, 192.0 * (double)a.v, kl_range, &a);
    return QL_OK;
}

ql_status ql_cpu_gather_cols(void *ctx, const ql_tensor *x, const ql_tensor *cols, ql_tensor *out,
                             ql_err *err)
{
    (void)ctx;
    ql_status status = ql_cpu_check_indices("column", cols, x->shape[1], err);
    if (status != QL_OK) return status;
    for (int64_t i = 0; i < x->shape[0]; i++) {
        ((float *)out->data)[i] =
            ((const float *)x->data)[i * x->shape[1] + ((const int32_t *)cols->data)[i]];
    }
    return QL_OK;
}

/* ---- stored formats ---- */

typedef struct {
    const qk_cpu *qk;
    qk_format from, to;
    const void *src;
    void *dst;
    int64_t n;
    int block, zero_code;
    const float *thresholds;
    const uint8_t *order;
    float *absmax;
    qk_matrix w;
} format_args;

static void convert_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const format_args *a = args;
    a->qk->convert(a->from, a->src, a->to, a->dst, i0, i1);
}

ql_status ql_cpu_convert(void *ctx, const ql_tensor *src, ql_tensor *dst, ql_err *err)
{
    (void)err;
    const cpu_context *c = ctx;
    format_args a = {.qk = c->qk,
                     .from = ql_cpu_format(src->dtype),
                     .to = ql_cpu_format(dst->dtype),
                     .src = src->data,
                     .dst = dst->data};
    ql_cpu_for_range(c, ql_tensor_count(src), 64, 2, convert_range, &a);
    return QL_OK;
}

ql_status ql_cpu_find_bad(void *ctx, const ql_tensor *x, int64_t *at, ql_err *err)
{
    (void)err;
    int64_t count = ql_tensor_count(x), first = count;
    find_args a = {x->data, x->dtype == QL_F32 ? 0 : x->dtype == QL_F16 ? 0x7c00 : 0x7f80, &first};
    ql_cpu_for_range(ctx, count, 64, 1, find_range, &a);
    *at = first < count ? first : -1;
    return QL_OK;
}

typedef struct {
    const qk_cpu *qk;
    uint64_t seed, first;
    qk_format to;
    char *y;
} random_args;

static void random_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const random_args *a = args;
    float numbers[1024];
    for (int64_t i = i0; i < i1; i += 1024) {
        int64_t n = i1 - i < 1024 ? i1 - i : 1024;
        for (int64_t j = 0; j < n; j++) numbers[j] = qk_random_normal(a->seed, a->first + (uint64_t)(i + j));
        a->qk->convert(QK_F32, numbers, a->to, a->y + i * (a->to == QK_F32 ? 4 : 2), 0, n);
    }
}

ql_status ql_cpu_random(void *ctx, uint64_t seed, uint64_t first, ql_tensor *y, ql_err *err)
{
    (void)err;
    const cpu_context *c = ctx;
    random_args a = {c->qk, seed, first, ql_cpu_format(y->dtype), y->data};
    ql_cpu_for_range(c, ql_tensor_count(y), 1024, 8, random_range, &a);
    return QL_OK;
}

static void quantize4_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const format_args *a = args;
    a->qk->quantize4(a->from, a->src, a->n, a->block, a->thresholds, a->order, a->zero_code, a->dst,
                     a->absmax, i0, i1);
}

ql_status ql_cpu_quantize4(void *ctx, const ql_tensor *src, int block, const float *thresholds,
                           const uint8_t *order, int zero_code, ql_tensor *packed, ql_tensor *absmax,
                           ql_err *err)
{
    (void)err;
    const cpu_context *c = ctx;
    format_args a = {.qk = c->qk,
                     .from = ql_cpu_format(src->dtype),
                     .src = src->data,
                     .dst = packed->data,
                     .n = ql_tensor_count(src),
                     .block = block,
                     .zero_code = zero_code,
                     .thresholds = thresholds,
                     .order = order,
                     .absmax = absmax->data};
    ql_cpu_for_range(c, (a.n + block - 1) / block, 1, 16.0 * block, quantize4_range, &a);
    return QL_OK;
}

static void dequantize4_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const format_args *a = args;
    a->qk->dequantize4(&a->w, a->to, a->dst, i0, i1);
}

ql_status ql_cpu_dequantize4(void *ctx, const ql_matrix *w, ql_tensor *dst, ql_err *err)
{
    (void)err;
    const cpu_context *c = ctx;
    format_args a = {.qk = c->qk, .to = ql_cpu_format(dst->dtype), .dst = dst->data, .w = ql_cpu_matrix(w)};
    ql_cpu_for_range(c, ql_tensor_count(dst), w->quant->block, 4, dequantize4_range, &a);
    return QL_OK;
}
