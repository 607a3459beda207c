/* Every operation on the CPU, on the device that QLUA_TEST_DEVICE names ("cuda"), and, products and
 * attention, in float64: the cases of tests/ops. Where there is no such device one test is skipped and says
 * why, and the CPU alone is held against float64. QLUA_TEST_SIZE=full adds the cases of a real model's size;
 * QLUA_TEST_CASES=<text> keeps only cases with the text in their name. */
#include "../ops/cases.h"

#include "kernel_help.h"
#include "ops.h"
#include "quant.h"

#include <stdio.h>

static ql_device *cpu, *device;
static ql_err error, why_no_device;

#define OK(expr)                                                                                             \
    do {                                                                                                     \
        if ((expr) != QL_OK) fail_msg("%s: %s", #expr, error.message);                                       \
    } while (0)

/* Rows of outputs that the float64 reference of a large product takes: evenly spread. */
enum { REFERENCE_ROWS = 256 };

static float widen(ql_dtype dtype, const void *p, int64_t i)
{
    if (dtype == QL_F16) return qk_f16_to_f32(((const uint16_t *)p)[i]);
    if (dtype == QL_BF16) return qk_bf16_to_f32(((const uint16_t *)p)[i]);
    return ((const float *)p)[i];
}

/* A tensor on the host; floats of 16 bits too. Free it. */
static void *fetch(const ql_tensor *t)
{
    void *p = new_bytes(ql_tensor_bytes(t));
    OK(ql_tensor_download(t, p, ql_tensor_bytes(t), &error));
    return p;
}

static float *fetch_floats(const ql_tensor *t)
{
    void *p = fetch(t);
    if (t->dtype == QL_F32) return p;
    int64_t n = ql_tensor_count(t);
    float *wide = new_bytes((size_t)n * sizeof *wide);
    for (int64_t i = 0; i < n; i++) wide[i] = widen(t->dtype, p, i);
    free(p);
    return wide;
}

/* ---- comparisons ---- */

static void check_nmse(const char *against, const float *got, const double *want, int64_t n, double bound)
{
    double wrong = 0, all = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(got[i])) fail_msg("element %lld is %g, not %g", (long long)i, got[i], want[i]);
        wrong += (got[i] - want[i]) * (got[i] - want[i]);
        all += want[i] * want[i];
    }
    assert_true(all > 0);
    if (!(wrong <= bound * all)) fail_msg("NMSE %.3g v %s, at most %.3g", wrong / all, against, bound);
}

static void check_relative(const double *got, const double *want, int64_t n, double bound, int64_t row,
                           const int32_t *found)
{
    for (int64_t i = 0; i < n; i++) {
        if (found && found[i / row * 2 + 1] >= 0) continue; /* sums of a row with infinities mean nothing */
        double scale = fabs(want[i]) > 1 ? fabs(want[i]) : 1;
        if (!(fabs(got[i] - want[i]) <= bound * scale))
            fail_msg("element %lld: %.17g and %.17g", (long long)i, got[i], want[i]);
    }
}

/* The same bits; floats of the device's own format against float32 rounded to it; any NaN is a NaN. */
static void check_exact(const ql_tensor *got, const ql_tensor *want)
{
    int64_t n = ql_tensor_count(want), differ = -1, count = 0;
    assert_int_equal(ql_tensor_count(got), n);
    char *a = fetch(got), *b = fetch(want);
    size_t size = ql_dtype_size(got->dtype);
    if (ql_dtype_is_weight(got->dtype)) {
        for (int64_t i = 0; i < n; i++) {
            float x = widen(got->dtype, a, i), y = widen(want->dtype, b, i);
            if (got->dtype == QL_BF16) y = qk_round_bf16(y);
            if (got->dtype == QL_F16) y = qk_round_f16(y);
            if (qk_bits(x) == qk_bits(y) || (isnan(x) && isnan(y))) continue;
            if (count++ == 0) differ = i;
        }
        if (count)
            fail_msg("%lld of %lld differ, the first at %lld: %.9g, not %.9g", (long long)count, (long long)n,
                     (long long)differ, widen(got->dtype, a, differ), widen(want->dtype, b, differ));
    } else {
        assert_int_equal(got->dtype, want->dtype);
        for (int64_t i = 0; i < n; i++) {
            if (memcmp(a + (size_t)i * size, b + (size_t)i * size, size) != 0 && count++ == 0) differ = i;
        }
        if (count)
            fail_msg("%lld of %lld differ, the first at %lld", (long long)count, (long long)n,
                     (long long)differ);
    }
    free(a);
    free(b);
}

static void compare(const ops_run *got, const ops_run *want)
{
    double bound;
    ops_measure measure = ops_case_measure(want->c, &bound);
    int32_t *found = want->c->kind == OPS_ROW_STATS ? fetch(&want->out[1]) : NULL;
    for (int i = 0; i < want->outputs; i++) {
        const ql_tensor *a = &got->out[i], *b = &want->out[i];
        int64_t n = ql_tensor_count(b);
        if (measure == OPS_EXACT || b->dtype == QL_I32) {
            check_exact(a, b);
        } else if (measure == OPS_NMSE) {
            float *x = fetch_floats(a), *y = fetch_floats(b);
            double *wide = new_bytes((size_t)n * sizeof *wide);
            for (int64_t j = 0; j < n; j++) wide[j] = y[j];
            check_nmse("the CPU", x, wide, n, bound);
            free(x);
            free(y);
            free(wide);
        } else {
            double *x = fetch(a), *y = fetch(b);
            check_relative(x, y, n, bound, n / b->shape[0], found);
            free(x);
            free(y);
        }
    }
    free(found);
}

/* ---- float64 ---- */

/* The weight as numbers, decoded by the CPU: [n, k]. */
static float *weights_of(const ops_run *run)
{
    const ql_matrix *w = &run->w[0];
    if (!w->quant) return fetch_floats(&w->data);
    float *p = new_bytes((size_t)(w->n * w->k) * sizeof *p);
    OK(ql_quant_decode(w, p, &error));
    return p;
}

typedef struct {
    int64_t step, rows; /* every step-th output */
    double *y;          /* [tokens, rows] */
} product_reference;

static product_reference make_product(const ops_run *run, const float *before)
{
    const ops_case *c = run->c;
    product_reference r = {.step = c->n > REFERENCE_ROWS && c->full ? c->n / REFERENCE_ROWS : 1};
    r.rows = c->n / r.step;
    r.y = new_bytes((size_t)(c->tokens * r.rows) * sizeof *r.y);
    float *w = weights_of(run), *x = fetch_floats(&run->in[0]);
    float *bias = c->bias ? fetch_floats(&run->w[0].bias) : NULL;
    for (int64_t t = 0; t < c->tokens; t++) {
        for (int64_t j = 0; j < r.rows; j++) {
            int64_t row = j * r.step;
            double sum = (bias ? bias[row] : 0) + (c->add ? before[t * c->n + row] : 0);
            for (int64_t i = 0; i < c->k; i++) sum += (double)w[row * c->k + i] * x[t * c->k + i];
            r.y[t * r.rows + j] = sum;
        }
    }
    free(w);
    free(x);
    free(bias);
    return r;
}

static void check_product(const ops_run *run, const product_reference *r, double bound)
{
    const ops_case *c = run->c;
    float *y = fetch_floats(&run->out[0]), *some = new_bytes((size_t)(c->tokens * r->rows) * sizeof *some);
    for (int64_t t = 0; t < c->tokens; t++)
        for (int64_t j = 0; j < r->rows; j++) some[t * r->rows + j] = y[t * c->n + j * r->step];
    check_nmse("float64", some, r->y, c->tokens * r->rows, bound);
    free(y);
    free(some);
}

/* Attention over the keys and values that the device's cache holds. */
static double *make_attention(const ops_run *run)
{
    const ops_case *c = run->c;
    int64_t tokens = ql_tensor_count(&run->pos), d = c->k, slots = run->k[0].shape[1];
    float *q = fetch_floats(&run->in[0]), *k = fetch_floats(&run->k[0]), *v = fetch_floats(&run->v[0]);
    int32_t *start = fetch(&run->start), *pos = fetch(&run->pos);
    double *y = new_bytes((size_t)(tokens * c->heads * d) * sizeof *y);
    double *p = new_bytes((size_t)slots * sizeof *p);
    for (int64_t t = 0; t < tokens; t++) {
        for (int h = 0; h < c->heads; h++) {
            const float *query = q + (t * c->heads + h) * d;
            int64_t first = h / (c->heads / c->kv_heads) * slots + start[t];
            double largest = -INFINITY, sum = 0, *out = y + (t * c->heads + h) * d;
            for (int64_t i = 0; i <= pos[t]; i++) {
                p[i] = 0;
                for (int64_t e = 0; e < d; e++) p[i] += (double)query[e] * k[(first + i) * d + e];
                p[i] /= sqrt((double)d);
                if (p[i] > largest) largest = p[i];
            }
            memset(out, 0, (size_t)d * sizeof *out);
            for (int64_t i = 0; i <= pos[t]; i++) {
                double e = exp(p[i] - largest);
                sum += e;
                for (int64_t j = 0; j < d; j++) out[j] += e * v[(first + i) * d + j];
            }
            for (int64_t j = 0; j < d; j++) out[j] /= sum;
        }
    }
    free(q);
    free(k);
    free(v);
    free(start);
    free(pos);
    free(p);
    return y;
}

static void check_attention(const ops_run *run, double bound)
{
    double *want = make_attention(run);
    float *got = fetch_floats(&run->out[0]);
    check_nmse("float64", got, want, ql_tensor_count(&run->out[0]), bound);
    free(want);
    free(got);
}

/* ---- one case ---- */

static void step(ops_run *run)
{
    OK(ops_run_step(run, 0, &error));
    OK(run->dev->backend->sync(run->dev->ctx, &error));
}

static void test_case(void **state)
{
    const ops_case *c = *state;
    ops_run host, other = {0};
    double bound;
    ops_case_measure(c, &bound);
    OK(ops_run_open(cpu, c, 1, &host, &error));
    float *before = c->add ? fetch_floats(&host.out[0]) : NULL;
    step(&host);
    if (device) {
        OK(ops_run_open(device, c, 1, &other, &error));
        step(&other);
    }
    if (c->kind == OPS_MATMUL) {
        product_reference r = make_product(&host, before);
        check_product(&host, &r, 1e-11);
        if (device) check_product(&other, &r, bound);
        free(r.y);
    } else if (c->kind == OPS_ATTENTION) {
        check_attention(&host, 1e-11);
        if (device) check_attention(&other, bound);
    }
    if (c->kind == OPS_PACK4) { /* the CPU has no order of its own: packed and unpacked is what it was */
        if (device && !other.skipped) {
            check_exact(&other.out[0], &host.w[0].data);
            check_exact(&other.w[0].data, &host.w[0].data);
        }
    } else if (device) {
        compare(&other, &host);
    }
    free(before);
    ops_run_close(&host);
    ops_run_close(&other);
}

/* Names which device it was, or is skipped with the reason that there is none. */
static void test_device(void **state)
{
    (void)state;
    if (!device) {
        print_message("no %s: %s\n", getenv("QLUA_TEST_DEVICE") ? getenv("QLUA_TEST_DEVICE") : "cuda",
                      why_no_device.message);
        skip();
    }
    ql_device_info info;
    OK(device->backend->info(device->ctx, &info, &error));
    assert_true(info.name[0]);
    print_message("%s: %s, %s\n", device->label, info.name, info.isa);
}

int main(void)
{
    const char *name = getenv("QLUA_TEST_DEVICE"), *size = getenv("QLUA_TEST_SIZE"),
               *only = getenv("QLUA_TEST_CASES");
    bool full = size && strcmp(size, "full") == 0;
    if (ql_device_open("cpu", NULL, &cpu, &error) != QL_OK) {
        print_error("%s\n", error.message);
        return 1;
    }
    if (ql_device_open(name ? name : "cuda", NULL, &device, &why_no_device) != QL_OK) device = NULL;

    struct CMUnitTest *tests = calloc(ops_case_count + 1, sizeof *tests);
    char(*names)[128] = calloc(ops_case_count, sizeof *names);
    size_t count = 0;
    tests[count++] = (struct CMUnitTest)cmocka_unit_test(test_device);
    for (size_t i = 0; i < ops_case_count; i++) {
        ops_case_name(&ops_cases[i], names[i], sizeof names[i]);
        if ((ops_cases[i].full && !full) || (only && !strstr(names[i], only))) continue;
        tests[count++] = (struct CMUnitTest){
            .name = names[i], .test_func = test_case, .initial_state = (void *)(uintptr_t)&ops_cases[i]};
    }
    int failed = _cmocka_run_group_tests("ops", tests, count, NULL, NULL);
    free(tests);
    free(names);
    ql_device_release(device);
    ql_device_release(cpu);
    return failed;
}
