/* Kernels: the one header that the floors above include.
 *
 * Raw pointers and sizes; nothing here knows of tensors, models or Lua. Every kernel is a pure function of
 * its arguments that runs on the calling thread over a range of its output; who calls it splits the work. No
 * kernel allocates: those that need room take `scratch`, 64-byte aligned, of the size stated.
 *
 * The sums of every kernel have one fixed order, written in terms of 16 float32 lanes, which does not depend
 * on the range, on the batch or on the instruction set. All tables therefore give the same bits.
 */
#ifndef QK_H
#define QK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { QK_F32 = 0, QK_F16, QK_BF16, QK_4BIT } qk_format;

enum {
    QK_OK = 0,
    QK_ERR_NAME,    /* no instruction set of that name */
    QK_ERR_MISSING, /* this processor does not have it */
};

/* A weight [n, k], row-major. 4-bit: element 2j is the high nibble of byte j, blocks of `block` weights run
 * over the flattened matrix, value = round_to(code[nibble] * absmax[block]). Borrows everything. */
typedef struct {
    qk_format format;
    int64_t n, k;
    const void *data;    /* [n, k] in `format`, or [ceil(n*k/2)] bytes */
    const float *absmax; /* 4-bit: [ceil(n*k/block)] */
    float code[16];      /* 4-bit */
    int block;           /* 4-bit: power of two, >= 32 */
    qk_format round_to;  /* 4-bit: QK_F32, QK_F16 or QK_BF16 */
} qk_matrix;

/* Causal grouped-query attention over a cache [kv_heads, slots, d]: token t reads slots start[t] ..
 * start[t] + pos[t]; query head h uses cache head h / (heads / kv_heads). */
typedef struct {
    const float *q;             /* [tokens, heads * d] */
    const float *k, *v;         /* [kv_heads, slots, d] */
    const int32_t *start, *pos; /* [tokens] */
    float *y;                   /* [OUT] [tokens, heads * d] */
    int heads, kv_heads, d;     /* d <= QK_MAX_HEAD_DIM */
    int64_t slots;
    /* For attention_run, else NULL: [tokens, heads, runs, QK_ATTENTION_RECORD(d)], 64-byte aligned. */
    float *partial;
    int64_t runs; /* of the longest sequence */
} qk_attention;

#define QK_MAX_HEAD_DIM 4096
#define QK_ATTENTION_SCRATCH (128 * 1024) /* bytes */
#define QK_ATTENTION_RUN 256              /* positions */
/* Floats of one run's partial result: the sum of values, padded to 16, its maximum, its sum of weights. */
#define QK_ATTENTION_RECORD(d) (((d) + 15) / 16 * 16 + 16)

typedef enum { QK_ADD, QK_SUB, QK_MUL, QK_DIV } qk_binary;

/* One instruction set's kernels. */
typedef struct {
    const char *isa;          /* "avx512", "avx2", "scalar" */
    int matmul_rows_multiple; /* ranges of outputs should start at a multiple of this, for speed only */

    /* Bytes of x in the order in which matmul reads it, 64-byte aligned; 0: it reads x as it is. */
    size_t (*matmul_packed)(const qk_matrix *w, int64_t m);
    /* Rows [t0, t1) of x [m, k] to `packed`, which all outputs share; some go with the range of a neighbour.
     */
    void (*matmul_pack)(const qk_matrix *w, const float *x, int64_t m, int64_t t0, int64_t t1,
                        float *packed /* [OUT] */);
    /* Bytes of scratch that one thread's matmul needs for rows of k inputs and m activation rows. */
    size_t (*matmul_scratch)(const qk_matrix *w, int64_t m);
    /* y[i, j] = sum_k x[i, k] w[j, k] + bias[j] for outputs j in [n0, n1), or y += that when `add`.
     * x [m, k], packed where matmul_packed is not 0, y [m, w->n], bias [n] or NULL. The sum: 16 lanes, lane l
     * takes inputs l, l+16, ... in order by fused multiply-add, the last step zero-padded; then lanes fold by
     * 8, 4, 2, 1. */
    void (*matmul)(const qk_matrix *w, const float *bias, const float *x, int64_t m, bool add, float *y,
                   int64_t n0, int64_t n1, void *scratch);
    /* All tokens [t0, t1) for the query heads of one cache head. Keys are taken in blocks of 64 and runs of
     * QK_ATTENTION_RUN counted from the sequence's first position, the runs' results are joined in order: a
     * token's bits do not depend on the other tokens of the call. */
    void (*attention)(const qk_attention *a, int64_t t0, int64_t t1, int kv_head, void *scratch);
    /* The same bits in pieces that may run at the same time, for few tokens with many keys: every run from 0
     * to a->runs - 1 leaves its records in a->partial (none for tokens that end before it), then they are
     * joined. */
    void (*attention_run)(const qk_attention *a, int64_t t0, int64_t t1, int kv_head, int64_t run,
                          void *scratch);
    void (*attention_join)(const qk_attention *a, int64_t t0, int64_t t1, int kv_head);
    /* y = x / sqrt(mean(x^2) + eps) * w for rows [t0, t1) of x [*, h]; y may be x. */
    void (*rmsnorm)(const float *x, const float *w, float eps, int64_t h, float *y, int64_t t0, int64_t t1);
    /* Rotate (i, i + d/2) of each head in place, rows [t0, t1) of x [*, heads * d]; cos, sin [positions,
     * d/2].
     */
    void (*rope)(float *x, const int32_t *pos, const float *cos, const float *sin, int heads, int d,
                 int64_t t0, int64_t t1);
    /* y = gate / (1 + exp(-gate)) * up for elements [i0, i1); y may be gate. */
    void (*swiglu)(const float *gate, const float *up, float *y, int64_t i0, int64_t i1);
    /* y = exp(x), at most 2 units in the last place off; y may be x. */
    void (*exp)(const float *x, float *y, int64_t i0, int64_t i1);
    /* y = a op b elementwise; b NULL: a op scalar, or scalar op a when `reversed`. */
    void (*binary)(qk_binary op, const float *a, const float *b, float scalar, bool reversed, float *y,
                   int64_t i0, int64_t i1);
    /* dst = src between F32, F16 and BF16 for elements [i0, i1), to nearest even. */
    void (*convert)(qk_format from, const void *src, qk_format to, void *dst, int64_t i0, int64_t i1);

    /* 4-bit codes of blocks [b0, b1) of n weights: a = max |w|, x = w * (1.0f / a), code = order[number of
     * thresholds t with x > t]. A block of zeros gets zero_code, and so does the nibble that pads an odd n. A
     * NaN exceeds no threshold and is no maximum. thresholds [15] ascending, order [16]. */
    void (*quantize4)(qk_format from, const void *src, int64_t n, int block, const float *thresholds,
                      const uint8_t *order, int zero_code, uint8_t *packed, float *absmax, int64_t b0,
                      int64_t b1);
    /* Elements [i0, i1) of the flattened matrix decoded to `to`; dst is where element 0 goes. */
    void (*dequantize4)(const qk_matrix *w, qk_format to, void *dst, int64_t i0, int64_t i1);

    /* What this core can do, for benchmarks. read: loads all of [p, p + bytes), returns something that
     * depends on it. fma: 16-lane fused multiply-adds on registers; returns how many floating-point
     * operations it did.
     */
    float (*probe_read)(const void *p, size_t bytes);
    double (*probe_fma)(int64_t rounds, float *sink);
} qk_cpu;

/* The table named, or the best one this processor has when `isa` is NULL. NULL on failure, with *status
 * (may be NULL) QK_ERR_NAME or QK_ERR_MISSING. The table is static. */
const qk_cpu *qk_cpu_select(const char *isa, int *status /* [OUT] */);
/* Names that qk_cpu_select may know, best first: "avx512", "avx2", "scalar"; NULL past the end. */
const char *qk_cpu_name(int i);

/* Operations on rows of logits, the same code on every processor: exact comparisons and float64 sums. */

/* The k largest of x[n], largest first, ties to the lower index; NaN counts as less than every number. */
void qk_topk(const float *x, int64_t n, int64_t k, float *values /* [OUT] [k] */,
             int32_t *ids /* [OUT] [k] */);
/* ln sum exp(x / temperature). */
double qk_logsumexp(const float *x, int64_t n, double temperature);
/* y = softmax(x / temperature); y may be x. */
void qk_softmax(const float *x, int64_t n, double temperature, float *y);
/* sum p (ln p - ln q) with p = softmax(a), q = softmax(b); a term with p = 0 counts 0. */
double qk_kl(const float *a, const float *b, int64_t n);

#ifdef __cplusplus
}
#endif
#endif
