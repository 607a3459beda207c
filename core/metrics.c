#include "metrics.h"

#include "mem.h"
#include "ops.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Logits as the host sees them: borrowed where the device is the CPU, else a copy. */
typedef struct {
    const ql_tensor *tensor;
    const float *data; /* [rows, cols] */
    float *copy;
    int64_t rows, cols;
} host_view;

static void view_close(host_view *v)
{
    ql_free(v->copy);
    memset(v, 0, sizeof *v);
}

static ql_status check_finite(const host_view *v, const char *what, ql_err *err)
{
    for (int64_t r = 0; r < v->rows; r++) {
        const float *row = v->data + r * v->cols;
        uint32_t bad = 0;
        for (int64_t j = 0; j < v->cols; j++) bad |= !(fabsf(row[j]) <= 3.40282347e38f);
        if (!bad) continue;
        int64_t at = 0;
        while (isfinite(row[at])) at++;
        ql_err_set(err, QL_ERR_FORMAT, "row %lld of the %slogits holds %s at token %lld", (long long)r + 1,
                   what, isnan(row[at]) ? "NaN" : "an infinity", (long long)at);
        return ql_err_hint(err, "the model's weights are damaged, or its activations overflow: "
                                "check the checkpoint's checksum");
    }
    return QL_OK;
}

/* `what` is "" or a word and a blank that tells two operands apart. */
static ql_status view_open(const ql_tensor *t, const char *what, host_view *v, ql_err *err)
{
    memset(v, 0, sizeof *v);
    if (!t || !t->storage || t->dtype != QL_F32 || t->ndim != 2 || t->shape[1] < 1)
        return ql_err_set(err, QL_ERR_ARG, "%slogits must be a float32 tensor [rows, vocabulary]", what);
    v->tensor = t;
    v->rows = t->shape[0];
    v->cols = t->shape[1];
    ql_device *dev = ql_tensor_device(t);
    ql_status status = QL_OK;
    if (dev->backend == &ql_backend_cpu) {
        status = dev->backend->sync(dev->ctx, err);
        v->data = t->data;
    } else {
        v->copy = ql_malloc(ql_tensor_bytes(t));
        if (!v->copy) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a copy of the logits");
        status = ql_tensor_download(t, v->copy, ql_tensor_bytes(t), err);
        v->data = v->copy;
    }
    if (status == QL_OK) status = check_finite(v, what, err);
    if (status != QL_OK) view_close(v);
    return status;
}

static ql_status view_open_pair(const ql_tensor *a, const ql_tensor *b, host_view *va, host_view *vb,
                                ql_err *err)
{
    memset(vb, 0, sizeof *vb);
    ql_status status = view_open(a, "reference ", va, err);
    if (status == QL_OK) status = view_open(b, "tested ", vb, err);
    if (status != QL_OK) goto fail;
    if (va->rows != vb->rows || va->cols != vb->cols) {
        status = ql_err_set(
            err, QL_ERR_ARG, "reference logits are [%lld, %lld] but tested logits are [%lld, %lld]",
            (long long)va->rows, (long long)va->cols, (long long)vb->rows, (long long)vb->cols);
        goto fail;
    }
    return QL_OK;
fail:
    view_close(va);
    view_close(vb);
    return status;
}

/* The k most likely tokens of every row: ids [rows, k], and their logits where `values` is wanted. The caller
 * frees both by ql_free. */
static ql_status top_tokens(const host_view *v, int k, int32_t **ids, float **values, ql_err *err)
{
    ql_device *dev = ql_tensor_device(v->tensor);
    ql_tensor tv = {0}, ti = {0};
    size_t bytes = 0;
    *ids = NULL;
    if (values) *values = NULL;
    ql_status status = ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, v->rows, k, &tv, err);
    if (status == QL_OK)
        status = ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_I32, v->rows, k, &ti, err);
    if (status == QL_OK) status = ql_op_topk(v->tensor, k, &tv, &ti, err);
    if (status != QL_OK) goto fail;
    bytes = ql_tensor_bytes(&ti);
    *ids = ql_malloc(bytes);
    if (values) *values = ql_malloc(bytes);
    if (!*ids || (values && !*values)) {
        status = ql_err_set(err, QL_ERR_MEMORY, "out of memory for the top %d tokens of %lld rows", k,
                            (long long)v->rows);
        goto fail;
    }
    status = ql_tensor_download(&ti, *ids, bytes, err);
    if (status == QL_OK && values) status = ql_tensor_download(&tv, *values, bytes, err);
fail:
    ql_tensor_free(&tv);
    ql_tensor_free(&ti);
    if (status != QL_OK) {
        ql_free(*ids);
        *ids = NULL;
        if (values) {
            ql_free(*values);
            *values = NULL;
        }
    }
    return status;
}

/* out[row] = ln sum exp(x / temperature). */
static ql_status logsumexp(const host_view *v, double temperature, double *out, ql_err *err)
{
    ql_tensor t = {0};
    ql_status status =
        ql_tensor_new_1d(ql_tensor_device(v->tensor), NULL, QL_MEM_ACTIVATIONS, QL_F64, v->rows, &t, err);
    if (status == QL_OK) status = ql_op_logsumexp(v->tensor, temperature, &t, err);
    if (status == QL_OK) status = ql_tensor_download(&t, out, ql_tensor_bytes(&t), err);
    ql_tensor_free(&t);
    return status;
}

static ql_status logsumexp_new(const host_view *v, double temperature, double **out, ql_err *err)
{
    *out = ql_calloc((size_t)v->rows, sizeof **out);
    if (!*out) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %lld rows", (long long)v->rows);
    ql_status status = logsumexp(v, temperature, *out, err);
    if (status != QL_OK) {
        ql_free(*out);
        *out = NULL;
    }
    return status;
}

static ql_status check_targets(const host_view *v, const int32_t *targets, ql_err *err)
{
    for (int64_t r = 0; r < v->rows; r++) {
        if (targets[r] >= 0 && targets[r] < v->cols) continue;
        return ql_err_set(err, QL_ERR_ARG, "target of row %lld is %ld, outside the vocabulary of %lld tokens",
                          (long long)r + 1, (long)targets[r], (long long)v->cols);
    }
    return QL_OK;
}

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

/* overlap[j] = number of tokens that are among the first j + 1 of both lists. A token at places i and j
 * counts from the greater of the two on. `pairs` has room for 2k. */
static void prefix_overlaps(const int32_t *a, const int32_t *b, int k, uint64_t *pairs, int *overlap)
{
    uint64_t *pa = pairs, *pb = pairs + k;
    for (int i = 0; i < k; i++) {
        pa[i] = (uint64_t)a[i] << 32 | (uint32_t)i;
        pb[i] = (uint64_t)b[i] << 32 | (uint32_t)i;
        overlap[i] = 0;
    }
    qsort(pa, (size_t)k, sizeof *pa, by_value);
    qsort(pb, (size_t)k, sizeof *pb, by_value);
    for (int i = 0, j = 0; i < k && j < k;) {
        uint32_t x = (uint32_t)(pa[i] >> 32), y = (uint32_t)(pb[j] >> 32);
        if (x == y) {
            uint32_t pi = (uint32_t)pa[i], pj = (uint32_t)pb[j];
            overlap[pi > pj ? pi : pj]++;
        }
        i += x <= y;
        j += y <= x;
    }
    for (int i = 1; i < k; i++) overlap[i] += overlap[i - 1];
}

ql_status ql_metrics_jaccard(const ql_tensor *a, const ql_tensor *b, const int *ks, int nk, double *out,
                             ql_err *err)
{
    host_view va, vb;
    int32_t *ia = NULL, *ib = NULL;
    uint64_t *pairs = NULL;
    int *overlap = NULL;
    ql_status status = view_open_pair(a, b, &va, &vb, err);
    if (status != QL_OK) return status;
    int most = 0;
    for (int j = 0; j < nk; j++) {
        if (ks[j] < 1 || ks[j] > va.cols) {
            status = ql_err_set(err, QL_ERR_ARG, "k = %d is outside 1..%lld", ks[j], (long long)va.cols);
            goto fail;
        }
        if (ks[j] > most) most = ks[j];
    }
    if (nk < 1 || va.rows == 0) goto fail;
    pairs = ql_calloc(2 * (size_t)most, sizeof *pairs);
    overlap = ql_calloc((size_t)most, sizeof *overlap);
    if (!pairs || !overlap) {
        status = ql_err_set(err, QL_ERR_MEMORY, "out of memory for the top %d tokens", most);
        goto fail;
    }
    status = top_tokens(&va, most, &ia, NULL, err);
    if (status == QL_OK) status = top_tokens(&vb, most, &ib, NULL, err);
    if (status != QL_OK) goto fail;
    for (int64_t r = 0; r < va.rows; r++) {
        prefix_overlaps(ia + r * most, ib + r * most, most, pairs, overlap);
        for (int j = 0; j < nk; j++) {
            int both = overlap[ks[j] - 1];
            out[r * nk + j] = (double)both / (2.0 * ks[j] - both);
        }
    }
fail:
    ql_free(overlap);
    ql_free(pairs);
    ql_free(ia);
    ql_free(ib);
    view_close(&va);
    view_close(&vb);
    return status;
}

ql_status ql_metrics_agreement(const ql_tensor *a, const ql_tensor *b, uint8_t *out, ql_err *err)
{
    host_view va, vb;
    int32_t *ia = NULL, *ib = NULL;
    ql_status status = view_open_pair(a, b, &va, &vb, err);
    if (status != QL_OK) return status;
    status = top_tokens(&va, 1, &ia, NULL, err);
    if (status == QL_OK) status = top_tokens(&vb, 1, &ib, NULL, err);
    if (status != QL_OK) goto fail;
    for (int64_t r = 0; r < va.rows; r++) out[r] = ia[r] == ib[r];
fail:
    ql_free(ia);
    ql_free(ib);
    view_close(&va);
    view_close(&vb);
    return status;
}

ql_status ql_metrics_kl(const ql_tensor *a, const ql_tensor *b, double *out, ql_err *err)
{
    host_view va, vb;
    ql_tensor t = {0};
    ql_status status = view_open_pair(a, b, &va, &vb, err);
    if (status != QL_OK) return status;
    status = ql_tensor_new_1d(ql_tensor_device(a), NULL, QL_MEM_ACTIVATIONS, QL_F64, va.rows, &t, err);
    if (status == QL_OK) status = ql_op_kl(a, b, &t, err);
    if (status == QL_OK) status = ql_tensor_download(&t, out, ql_tensor_bytes(&t), err);
    ql_tensor_free(&t);
    view_close(&va);
    view_close(&vb);
    return status;
}

ql_status ql_metrics_delta_p(const ql_tensor *a, const ql_tensor *b, const int32_t *targets, double *out,
                             ql_err *err)
{
    host_view va, vb;
    double *la = NULL, *lb = NULL;
    ql_status status = view_open_pair(a, b, &va, &vb, err);
    if (status != QL_OK) return status;
    status = check_targets(&va, targets, err);
    if (status == QL_OK) status = logsumexp_new(&va, 1.0, &la, err);
    if (status == QL_OK) status = logsumexp_new(&vb, 1.0, &lb, err);
    if (status != QL_OK) goto fail;
    for (int64_t r = 0; r < va.rows; r++) {
        int64_t at = r * va.cols + targets[r];
        out[r] = exp((double)vb.data[at] - lb[r]) - exp((double)va.data[at] - la[r]);
    }
fail:
    ql_free(la);
    ql_free(lb);
    view_close(&va);
    view_close(&vb);
    return status;
}

/* Most likely tokens taken from the topk operation; flat rows, whose nucleus is larger, are sorted whole. */
#define NUCLEUS_TOP 1024

/* One model's nuclei, row by row. `sorted` [cols] is there once a row has needed it. */
typedef struct {
    const host_view *view;
    int top;
    int32_t *ids;  /* [rows, top] */
    float *values; /* [rows, top] */
    double *lse;   /* [rows] */
    uint64_t *sorted;
    uint32_t *nucleus; /* [cols]: ids of the row at hand, ascending */
    int64_t size;
} nuclei;

static void nuclei_close(nuclei *n)
{
    ql_free(n->ids);
    ql_free(n->values);
    ql_free(n->lse);
    ql_free(n->sorted);
    ql_free(n->nucleus);
    memset(n, 0, sizeof *n);
}

static ql_status nuclei_open(const host_view *v, double temperature, nuclei *n, ql_err *err)
{
    n->view = v;
    n->top = v->cols < NUCLEUS_TOP ? (int)v->cols : NUCLEUS_TOP;
    n->nucleus = ql_calloc((size_t)v->cols, sizeof *n->nucleus);
    if (!n->nucleus)
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %lld tokens", (long long)v->cols);
    ql_status status = logsumexp_new(v, temperature, &n->lse, err);
    return status == QL_OK ? top_tokens(v, n->top, &n->ids, &n->values, err) : status;
}

/* Larger floats give smaller keys; zeros of either sign are equal. */
static uint32_t descending(float x)
{
    uint32_t bits;
    x += 0.0f;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

static int by_id(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static ql_status nuclei_row(nuclei *n, int64_t r, double top_p, double temperature, ql_err *err)
{
    const host_view *v = n->view;
    const float *row = v->data + r * v->cols;
    double mass = 0;
    int64_t size = 0;
    for (; size < n->top && mass < top_p; size++) {
        n->nucleus[size] = (uint32_t)n->ids[r * n->top + size];
        mass += exp((double)n->values[r * n->top + size] / temperature - n->lse[r]);
    }
    if (mass < top_p && size < v->cols) {
        if (!n->sorted) n->sorted = ql_calloc((size_t)v->cols, sizeof *n->sorted);
        if (!n->sorted)
            return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %lld tokens", (long long)v->cols);
        for (int64_t j = 0; j < v->cols; j++) n->sorted[j] = (uint64_t)descending(row[j]) << 32 | (uint32_t)j;
        qsort(n->sorted, (size_t)v->cols, sizeof *n->sorted, by_value);
        for (; size < v->cols && mass < top_p; size++) {
            uint32_t id = (uint32_t)n->sorted[size];
            n->nucleus[size] = id;
            mass += exp((double)row[id] / temperature - n->lse[r]);
        }
    }
    n->size = size;
    qsort(n->nucleus, (size_t)size, sizeof *n->nucleus, by_id);
    return QL_OK;
}

static double set_jaccard(const nuclei *a, const nuclei *b)
{
    int64_t both = 0;
    for (int64_t i = 0, j = 0; i < a->size && j < b->size;) {
        uint32_t x = a->nucleus[i], y = b->nucleus[j];
        both += x == y;
        i += x <= y;
        j += y <= x;
    }
    return (double)both / (double)(a->size + b->size - both);
}

ql_status ql_metrics_nucleus(const ql_tensor *a, const ql_tensor *b, double top_p, double temperature,
                             double *out, ql_err *err)
{
    if (!(top_p > 0 && top_p <= 1)) return ql_err_set(err, QL_ERR_ARG, "top_p %g is outside (0, 1]", top_p);
    if (!(temperature > 0) || !isfinite(temperature))
        return ql_err_set(err, QL_ERR_ARG, "temperature %g is not a finite number above 0", temperature);
    host_view va, vb;
    nuclei na = {0}, nb = {0};
    ql_status status = view_open_pair(a, b, &va, &vb, err);
    if (status != QL_OK) return status;
    if (top_p == 1) {
        for (int64_t r = 0; r < va.rows; r++) out[r] = 1;
        goto fail;
    }
    status = nuclei_open(&va, temperature, &na, err);
    if (status == QL_OK) status = nuclei_open(&vb, temperature, &nb, err);
    for (int64_t r = 0; r < va.rows && status == QL_OK; r++) {
        status = nuclei_row(&na, r, top_p, temperature, err);
        if (status == QL_OK) status = nuclei_row(&nb, r, top_p, temperature, err);
        if (status == QL_OK) out[r] = set_jaccard(&na, &nb);
    }
fail:
    nuclei_close(&na);
    nuclei_close(&nb);
    view_close(&va);
    view_close(&vb);
    return status;
}

ql_status ql_metrics_loglik(const ql_tensor *a, const int32_t *targets, double *out, uint8_t *greedy,
                            ql_err *err)
{
    host_view v;
    double *lse = NULL;
    int32_t *best = NULL;
    ql_status status = view_open(a, "", &v, err);
    if (status != QL_OK) return status;
    status = check_targets(&v, targets, err);
    if (status == QL_OK) status = logsumexp_new(&v, 1.0, &lse, err);
    if (status == QL_OK && greedy) status = top_tokens(&v, 1, &best, NULL, err);
    if (status != QL_OK) goto fail;
    for (int64_t r = 0; r < v.rows; r++) {
        out[r] = (double)v.data[r * v.cols + targets[r]] - lse[r];
        if (greedy) greedy[r] = best[r] == targets[r];
    }
fail:
    ql_free(lse);
    ql_free(best);
    view_close(&v);
    return status;
}

ql_status ql_metrics_entropy(const ql_tensor *a, double *out, ql_err *err)
{
    host_view v;
    ql_status status = view_open(a, "", &v, err);
    if (status != QL_OK) return status;
    status = logsumexp(&v, 1.0, out, err);
    if (status != QL_OK) goto fail;
    for (int64_t r = 0; r < v.rows; r++) {
        const float *row = v.data + r * v.cols;
        double sum = 0;
        for (int64_t j = 0; j < v.cols; j++) {
            double lnp = (double)row[j] - out[r];
            sum -= exp(lnp) * lnp;
        }
        out[r] = sum;
    }
fail:
    view_close(&v);
    return status;
}
