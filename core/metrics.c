#include "metrics.h"

#include "mem.h"
#include "ops.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Logits [rows, cols] that are known to be finite. Borrowed, they stay on their device. */
typedef struct {
    const ql_tensor *tensor;
    int64_t rows, cols;
} view;

/* One row to the host: out [cols]. */
static ql_status fetch_row(const view *v, int64_t r, float *out, ql_err *err)
{
    ql_tensor row;
    QL_TRY(ql_tensor_rows(v->tensor, r, 1, &row, err));
    ql_status status = ql_tensor_download(&row, out, (size_t)v->cols * sizeof *out, err);
    ql_tensor_free(&row);
    return status;
}

static ql_status check_finite(const view *v, const char *what, ql_err *err)
{
    int64_t at;
    QL_TRY(ql_op_find_bad(v->tensor, &at, err));
    if (at < 0) return QL_OK;
    float *row = ql_malloc((size_t)v->cols * sizeof *row);
    if (!row) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a row of logits");
    ql_status status = fetch_row(v, at / v->cols, row, err);
    bool nan = status == QL_OK && isnan(row[at % v->cols]);
    ql_free(row);
    if (status != QL_OK) return status;
    ql_err_set(err, QL_ERR_FORMAT, "row %lld of the %slogits holds %s at token %lld",
               (long long)(at / v->cols) + 1, what, nan ? "NaN" : "an infinity", (long long)(at % v->cols));
    return ql_err_hint(err, "the model's weights are damaged, or its activations overflow: "
                            "check the checkpoint's checksum");
}

/* `what` is "" or a word and a blank that tells two operands apart. */
static ql_status view_open(const ql_tensor *t, const char *what, view *v, ql_err *err)
{
    *v = (view){0};
    if (!t || !t->storage || t->dtype != QL_F32 || t->ndim != 2 || t->shape[1] < 1)
        return ql_err_set(err, QL_ERR_ARG, "%slogits must be a float32 tensor [rows, vocabulary]", what);
    *v = (view){t, t->shape[0], t->shape[1]};
    return check_finite(v, what, err);
}

static ql_status view_open_pair(const ql_tensor *a, const ql_tensor *b, view *va, view *vb, ql_err *err)
{
    *vb = (view){0};
    QL_TRY(view_open(a, "reference ", va, err));
    QL_TRY(view_open(b, "tested ", vb, err));
    if (va->rows == vb->rows && va->cols == vb->cols) return QL_OK;
    return ql_err_set(err, QL_ERR_ARG, "reference logits are [%lld, %lld] but tested logits are [%lld, %lld]",
                      (long long)va->rows, (long long)va->cols, (long long)vb->rows, (long long)vb->cols);
}

/* The k most likely tokens of every row: ids [rows, k], and their logits where `values` is wanted. The caller
 * frees both by ql_free. */
static ql_status top_tokens(const view *v, int k, int32_t **ids, float **values, ql_err *err)
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
static ql_status logsumexp(const view *v, double temperature, double *out, ql_err *err)
{
    ql_tensor t = {0};
    ql_status status =
        ql_tensor_new_1d(ql_tensor_device(v->tensor), NULL, QL_MEM_ACTIVATIONS, QL_F64, v->rows, &t, err);
    if (status == QL_OK) status = ql_op_logsumexp(v->tensor, temperature, &t, err);
    if (status == QL_OK) status = ql_tensor_download(&t, out, ql_tensor_bytes(&t), err);
    ql_tensor_free(&t);
    return status;
}

static ql_status check_targets(const view *v, const int32_t *targets, ql_err *err)
{
    for (int64_t r = 0; r < v->rows; r++) {
        if (targets[r] >= 0 && targets[r] < v->cols) continue;
        return ql_err_set(err, QL_ERR_ARG, "target of row %lld is %ld, outside the vocabulary of %lld tokens",
                          (long long)r + 1, (long)targets[r], (long long)v->cols);
    }
    return QL_OK;
}

/* stats [rows, 3] = ln sum exp(x), entropy, x[target]; targets I32 [rows] on the device, or NULL. */
static ql_status row_stats(const view *v, const ql_tensor *targets, double *stats, ql_err *err)
{
    ql_device *dev = ql_tensor_device(v->tensor);
    ql_tensor all = {0}, found = {0};
    ql_status status = ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F64, v->rows, 3, &all, err);
    if (status == QL_OK)
        status = ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_I32, v->rows, 2, &found, err);
    if (status == QL_OK) status = ql_op_row_stats(v->tensor, targets, &all, &found, err);
    if (status == QL_OK) status = ql_tensor_download(&all, stats, ql_tensor_bytes(&all), err);
    ql_tensor_free(&all);
    ql_tensor_free(&found);
    return status;
}

static ql_status row_stats_new(const view *v, const ql_tensor *targets, double **stats, ql_err *err)
{
    *stats = ql_calloc((size_t)v->rows, 3 * sizeof **stats);
    if (!*stats) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %lld rows", (long long)v->rows);
    return row_stats(v, targets, *stats, err);
}

/* picked[row] = x[target], on the host. */
static ql_status gather(const view *v, const ql_tensor *targets, float *picked, ql_err *err)
{
    ql_tensor t = {0};
    QL_TRY(ql_tensor_new_1d(ql_tensor_device(v->tensor), NULL, QL_MEM_ACTIVATIONS, QL_F32, v->rows, &t, err));
    ql_status status = ql_op_gather_cols(v->tensor, targets, &t, err);
    if (status == QL_OK) status = ql_tensor_download(&t, picked, ql_tensor_bytes(&t), err);
    ql_tensor_free(&t);
    return status;
}

/* out[row] = ln p(target). A device that reads logits from memory has the whole row's figures in one reading;
 * on the CPU the entropy among them would cost as much as all else. */
static ql_status ln_targets(const view *v, const int32_t *targets, double *out, ql_err *err)
{
    ql_device *dev = ql_tensor_device(v->tensor);
    ql_tensor t = {0};
    double *stats = NULL;
    float *picked = NULL;
    ql_status status = ql_tensor_new_1d(dev, NULL, QL_MEM_ACTIVATIONS, QL_I32, v->rows, &t, err);
    if (status == QL_OK) status = ql_tensor_upload(&t, targets, ql_tensor_bytes(&t), err);
    if (status != QL_OK) goto fail;
    if (dev->backend != &ql_backend_cpu) {
        status = row_stats_new(v, &t, &stats, err);
        for (int64_t r = 0; r < v->rows && status == QL_OK; r++) out[r] = stats[3 * r + 2] - stats[3 * r];
    } else {
        picked = ql_calloc((size_t)v->rows, sizeof *picked);
        status = picked ? logsumexp(v, 1.0, out, err)
                        : ql_err_set(err, QL_ERR_MEMORY, "out of memory for %lld rows", (long long)v->rows);
        if (status == QL_OK) status = gather(v, &t, picked, err);
        for (int64_t r = 0; r < v->rows && status == QL_OK; r++) out[r] = (double)picked[r] - out[r];
    }
fail:
    ql_free(picked);
    ql_free(stats);
    ql_tensor_free(&t);
    return status;
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
    view va, vb;
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
    return status;
}

ql_status ql_metrics_agreement(const ql_tensor *a, const ql_tensor *b, uint8_t *out, ql_err *err)
{
    view va, vb;
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
    return status;
}

ql_status ql_metrics_kl(const ql_tensor *a, const ql_tensor *b, double *out, ql_err *err)
{
    view va, vb;
    ql_tensor t = {0};
    ql_status status = view_open_pair(a, b, &va, &vb, err);
    if (status != QL_OK) return status;
    status = ql_tensor_new_1d(ql_tensor_device(a), NULL, QL_MEM_ACTIVATIONS, QL_F64, va.rows, &t, err);
    if (status == QL_OK) status = ql_op_kl(a, b, &t, err);
    if (status == QL_OK) status = ql_tensor_download(&t, out, ql_tensor_bytes(&t), err);
    ql_tensor_free(&t);
    return status;
}

ql_status ql_metrics_delta_p(const ql_tensor *a, const ql_tensor *b, const int32_t *targets, double *out,
                             ql_err *err)
{
    view va, vb;
    QL_TRY(view_open_pair(a, b, &va, &vb, err));
    QL_TRY(check_targets(&va, targets, err));
    double *reference = ql_calloc((size_t)va.rows, sizeof *reference);
    if (!reference) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %lld rows", (long long)va.rows);
    ql_status status = ln_targets(&va, targets, reference, err);
    if (status == QL_OK) status = ln_targets(&vb, targets, out, err);
    for (int64_t r = 0; r < va.rows && status == QL_OK; r++) out[r] = exp(out[r]) - exp(reference[r]);
    ql_free(reference);
    return status;
}

/* Most likely tokens taken from the topk operation; flat rows, whose nucleus is larger, are sorted whole. */
#define NUCLEUS_TOP 1024

/* One model's nuclei, row by row. `row` and `sorted` [cols] are there once a row has needed them. */
typedef struct {
    const view *view;
    int top;
    int32_t *ids;  /* [rows, top] */
    float *values; /* [rows, top] */
    double *lse;   /* [temperatures, rows] */
    uint64_t *sorted;
    float *row;
    int64_t row_at, sorted_at; /* which rows these hold; -1: none */
    uint32_t *nucleus;         /* [cols]: ids of the nucleus at hand, ascending */
    int64_t size;
} nuclei;

static void nuclei_close(nuclei *n)
{
    ql_free(n->ids);
    ql_free(n->values);
    ql_free(n->lse);
    ql_free(n->sorted);
    ql_free(n->row);
    ql_free(n->nucleus);
    memset(n, 0, sizeof *n);
}

static ql_status nuclei_open(const view *v, const double *temperatures, int nt, nuclei *n, ql_err *err)
{
    n->view = v;
    n->row_at = n->sorted_at = -1;
    n->top = v->cols < NUCLEUS_TOP ? (int)v->cols : NUCLEUS_TOP;
    n->nucleus = ql_calloc((size_t)v->cols, sizeof *n->nucleus);
    n->lse = ql_calloc((size_t)(nt * v->rows), sizeof *n->lse);
    if (!n->nucleus || !n->lse)
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %lld tokens of %lld rows",
                          (long long)v->cols, (long long)v->rows);
    for (int t = 0; t < nt; t++) QL_TRY(logsumexp(v, temperatures[t], n->lse + t * v->rows, err));
    return top_tokens(v, n->top, &n->ids, &n->values, err);
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

static ql_status nuclei_fetch(nuclei *n, int64_t r, ql_err *err)
{
    if (n->row_at == r) return QL_OK;
    if (!n->row) n->row = ql_malloc((size_t)n->view->cols * sizeof *n->row);
    if (!n->row) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a row of logits");
    QL_TRY(fetch_row(n->view, r, n->row, err));
    n->row_at = r;
    return QL_OK;
}

static ql_status nuclei_sort(nuclei *n, int64_t r, ql_err *err)
{
    int64_t cols = n->view->cols;
    if (n->sorted_at == r) return QL_OK;
    if (!n->sorted) n->sorted = ql_calloc((size_t)cols, sizeof *n->sorted);
    if (!n->sorted) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %lld tokens", (long long)cols);
    QL_TRY(nuclei_fetch(n, r, err));
    for (int64_t j = 0; j < cols; j++) n->sorted[j] = (uint64_t)descending(n->row[j]) << 32 | (uint32_t)j;
    qsort(n->sorted, (size_t)cols, sizeof *n->sorted, by_value);
    n->sorted_at = r;
    return QL_OK;
}

/* The nucleus of row r; lse: the row's, at that temperature. */
static ql_status nuclei_row(nuclei *n, int64_t r, double top_p, double temperature, double lse, ql_err *err)
{
    const view *v = n->view;
    double mass = 0;
    int64_t size = 0;
    for (; size < n->top && mass < top_p; size++) {
        n->nucleus[size] = (uint32_t)n->ids[r * n->top + size];
        mass += exp((double)n->values[r * n->top + size] / temperature - lse);
    }
    if (mass < top_p && size < v->cols) {
        QL_TRY(nuclei_sort(n, r, err));
        for (; size < v->cols && mass < top_p; size++) {
            uint32_t id = (uint32_t)n->sorted[size];
            n->nucleus[size] = id;
            mass += exp((double)n->row[id] / temperature - lse);
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

/* What `other`'s nucleus weighs in the distribution of row r of n. */
static ql_status mass_of(nuclei *n, int64_t r, const nuclei *other, double temperature, double lse,
                         double *mass, ql_err *err)
{
    QL_TRY(nuclei_fetch(n, r, err));
    *mass = 0;
    for (int64_t i = 0; i < other->size; i++)
        *mass += exp((double)n->row[other->nucleus[i]] / temperature - lse);
    return QL_OK;
}

static ql_status nuclei_pair(nuclei *a, nuclei *b, int64_t r, int t, double top_p, double temperature,
                             bool masses, ql_nucleus_pair *out, ql_err *err)
{
    int64_t cols = a->view->cols, rows = a->view->rows;
    double lse_a = a->lse[t * rows + r], lse_b = b->lse[t * rows + r];
    *out = (ql_nucleus_pair){1, {cols, cols}, {1, 1}, true};
    if (top_p == 1) return QL_OK; /* the whole vocabulary, whatever rounding makes of the sum */
    QL_TRY(nuclei_row(a, r, top_p, temperature, lse_a, err));
    QL_TRY(nuclei_row(b, r, top_p, temperature, lse_b, err));
    out->overlap = set_jaccard(a, b);
    out->size[0] = a->size;
    out->size[1] = b->size;
    uint32_t top = (uint32_t)a->ids[r * a->top];
    out->has_top = bsearch(&top, b->nucleus, (size_t)b->size, sizeof top, by_id) != NULL;
    if (!masses) return QL_OK;
    QL_TRY(mass_of(a, r, b, temperature, lse_a, &out->mass[0], err));
    return mass_of(b, r, a, temperature, lse_b, &out->mass[1], err);
}

static ql_status compare_nuclei(const ql_tensor *a, const ql_tensor *b, const double *top_ps, int np,
                                const double *temperatures, int nt, bool masses, ql_nucleus_pair *out,
                                ql_err *err)
{
    for (int j = 0; j < np; j++) {
        if (!(top_ps[j] > 0 && top_ps[j] <= 1))
            return ql_err_set(err, QL_ERR_ARG, "top_p %g is outside (0, 1]", top_ps[j]);
    }
    for (int t = 0; t < nt; t++) {
        if (!(temperatures[t] > 0) || !isfinite(temperatures[t]))
            return ql_err_set(err, QL_ERR_ARG, "temperature %g is not a finite number above 0",
                              temperatures[t]);
    }
    view va, vb;
    nuclei na = {0}, nb = {0};
    QL_TRY(view_open_pair(a, b, &va, &vb, err));
    ql_status status = nuclei_open(&va, temperatures, nt, &na, err);
    if (status == QL_OK) status = nuclei_open(&vb, temperatures, nt, &nb, err);
    for (int64_t r = 0; r < va.rows; r++) {
        for (int64_t c = 0; c < (int64_t)nt * np && status == QL_OK; c++) {
            int t = (int)(c / np);
            status = nuclei_pair(&na, &nb, r, t, top_ps[c % np], temperatures[t], masses,
                                 out + r * nt * np + c, err);
        }
    }
    nuclei_close(&na);
    nuclei_close(&nb);
    return status;
}

ql_status ql_metrics_nuclei(const ql_tensor *a, const ql_tensor *b, const double *top_ps, int np,
                            const double *temperatures, int nt, ql_nucleus_pair *out, ql_err *err)
{
    return compare_nuclei(a, b, top_ps, np, temperatures, nt, true, out, err);
}

ql_status ql_metrics_nucleus(const ql_tensor *a, const ql_tensor *b, double top_p, double temperature,
                             double *out, ql_err *err)
{
    int64_t rows = a && a->ndim ? a->shape[0] : 0;
    ql_nucleus_pair *pairs = ql_calloc((size_t)(rows ? rows : 1), sizeof *pairs);
    if (!pairs) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for %lld rows", (long long)rows);
    ql_status status = compare_nuclei(a, b, &top_p, 1, &temperature, 1, false, pairs, err);
    for (int64_t r = 0; r < rows && status == QL_OK; r++) out[r] = pairs[r].overlap;
    ql_free(pairs);
    return status;
}

ql_status ql_metrics_loglik(const ql_tensor *a, const int32_t *targets, double *out, uint8_t *greedy,
                            ql_err *err)
{
    view v;
    int32_t *best = NULL;
    QL_TRY(view_open(a, "", &v, err));
    QL_TRY(check_targets(&v, targets, err));
    ql_status status = ln_targets(&v, targets, out, err);
    if (status == QL_OK && greedy) status = top_tokens(&v, 1, &best, NULL, err);
    for (int64_t r = 0; r < v.rows && greedy && status == QL_OK; r++) greedy[r] = best[r] == targets[r];
    ql_free(best);
    return status;
}

ql_status ql_metrics_entropy(const ql_tensor *a, double *out, ql_err *err)
{
    view v;
    double *stats = NULL;
    QL_TRY(view_open(a, "", &v, err));
    ql_status status = row_stats_new(&v, NULL, &stats, err);
    for (int64_t r = 0; r < v.rows && status == QL_OK; r++) out[r] = stats[3 * r + 1];
    ql_free(stats);
    return status;
}
