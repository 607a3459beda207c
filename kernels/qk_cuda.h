/* CUDA kernels, as core/backend_cuda.c calls them. Pointers are device pointers unless said otherwise.
 *
 * Every function queues its work on `stream` and returns 0, or the cudaError_t of the launch; what goes wrong
 * on the device shows at the next synchronisation. None allocates or synchronises, so all may be captured
 * into a graph. Sums have one fixed order that depends on no other row or token of the call; no atomics in
 * sums. Letters: T tokens, H hidden size, D head_dim, V vocabulary.
 */
#ifndef QK_CUDA_H
#define QK_CUDA_H

#include "qk.h"
#include "qk_pack.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st *qk_stream; /* cudaStream_t */

/* Whether launches may overlap with the end of the one before (programmatic dependent launch): only where
 * every device in use is sm_90 or later, and the kernels were compiled for that. Off at first. */
void qk_cuda_set_programmatic(bool on);

/* ---- a layer's steps, F32 activations (rows.cu) ---- */

/* y[t] = table[ids[t]]: table [V, H] in `f`, y [T, H]. */
int qk_cuda_embed(qk_stream stream, qk_format f, const void *table, const int32_t *ids, int64_t t, int64_t h,
                  float *y);
/* y may be x. */
int qk_cuda_rmsnorm(qk_stream stream, const float *x, const float *w, float eps, int64_t t, int64_t h,
                    float *y);
/* y may be gate. */
int qk_cuda_swiglu(qk_stream stream, const float *gate, const float *up, int64_t count, float *y);
/* y[i] = x[rows[i]]: x [*, h], y [n, h]. */
int qk_cuda_gather_rows(qk_stream stream, const float *x, const int32_t *rows, int64_t n, int64_t h,
                        float *y);
/* y[i] = x[i, cols[i]]: x [n, v]. */
int qk_cuda_gather_cols(qk_stream stream, const float *x, const int32_t *cols, int64_t n, int64_t v,
                        float *y);
/* b NULL: a op scalar, or scalar op a when `reversed`. y may be a. */
int qk_cuda_binary(qk_stream stream, qk_binary op, const float *a, const float *b, float scalar,
                   bool reversed, int64_t count, float *y);
int qk_cuda_convert(qk_stream stream, qk_format from, const void *src, qk_format to, void *dst,
                    int64_t count);
/* y[t, j] += bias[j]: y [T, n]. */
int qk_cuda_add_bias(qk_stream stream, const float *bias, int64_t t, int64_t n, float *y);
/* y[i] = qk_random_normal(seed, first + i) rounded to `f`. */
int qk_cuda_random(qk_stream stream, uint64_t seed, uint64_t first, qk_format f, int64_t count, void *y);
/* *at (device) = index of the first element that is NaN or infinite, or -1. */
int qk_cuda_find_bad(qk_stream stream, qk_format f, const void *x, int64_t count, int64_t *at);
/* Reads all of [p, p + bytes), 16-byte loads; *sink gets something that depends on it. For bandwidth. */
int qk_cuda_probe_read(qk_stream stream, const void *p, size_t bytes, uint32_t *sink);

/* What a 16-bit product reads, made from F32. SWIGLU: silu(x) * up. NORM: RMSNorm with weight `w` and eps.
 * rows: token t is row rows[t] of x (and up); NULL: row t. */
typedef enum { QK_SOURCE_PLAIN, QK_SOURCE_NORM, QK_SOURCE_SWIGLU } qk_source_kind;
typedef struct {
    qk_source_kind kind;
    const float *x, *up, *w;
    float eps;
    const int32_t *rows;
} qk_cuda_source;
/* dst in `to` (F16 or BF16): slab 0: row-major [T, k]; else fragments of that slab (qk_pack.h), all padding
 * zero. The norm is computed in float32 and rounded once. */
int qk_cuda_pack(qk_stream stream, const qk_cuda_source *source, qk_format to, int slab, int64_t t, int64_t k,
                 void *dst);

/* ---- rows of logits (logits.cu); x F32 [n, v] ---- */

/* As qk_topk. k <= v; `scratch` of qk_cuda_topk_bytes. */
size_t qk_cuda_topk_bytes(int64_t n, int64_t v, int64_t k);
int qk_cuda_topk(qk_stream stream, const float *x, int64_t n, int64_t v, int64_t k, float *values,
                 int32_t *ids, void *scratch);
/* float64 sums, relative error 1e-12 or less against qk_logsumexp; `scratch` of qk_cuda_logsumexp_bytes,
 * 16-byte aligned. */
size_t qk_cuda_logsumexp_bytes(int64_t n, int64_t v);
int qk_cuda_logsumexp(qk_stream stream, const float *x, int64_t n, int64_t v, double temperature, double *out,
                      void *scratch);
/* stats [n, 3], found [n, 2] as in backend.h's row_stats; targets [n] or NULL. */
int qk_cuda_row_stats(qk_stream stream, const float *x, const int32_t *targets, int64_t n, int64_t v,
                      double *stats, int32_t *found);
int qk_cuda_softmax(qk_stream stream, const float *x, int64_t n, int64_t v, double temperature, float *y);
int qk_cuda_kl(qk_stream stream, const float *a, const float *b, int64_t n, int64_t v, double *out);

/* ---- 4-bit formats (quant.cu) ---- */

/* A weight [n, k] on the device. */
typedef struct {
    qk_matrix w;            /* w.absmax NULL when nested */
    const uint8_t *absmax8; /* nested: [blocks] */
    const float *nested;    /* nested: [257 + nested_blocks], see core/matrix.h; NULL: not nested */
    int nested_block;
    int layout;        /* QK_LAYOUT_ROWS or QK_LAYOUT_TILES */
    const float *bias; /* [n] or NULL */
    float *y;          /* [OUT] [T, n], where a product puts its result */
} qk_cuda_weight;

/* As qk_cpu.quantize4; thresholds [15] and order [16] are on the host. */
int qk_cuda_quantize4(qk_stream stream, qk_format from, const void *src, int64_t n, int block,
                      const float *thresholds, const uint8_t *order, int zero_code, uint8_t *packed,
                      float *absmax);
/* dst [n, k] in `to`: each value rounded to w.round_to, then converted; row-major whatever the layout. */
int qk_cuda_dequantize4(qk_stream stream, const qk_cuda_weight *w, qk_format to, void *dst);
/* Codes from rows to tiles, or back when `undo`: dst != src. */
int qk_cuda_tile4(qk_stream stream, const uint8_t *src, int64_t n, int64_t k, bool undo, uint8_t *dst);

/* ---- products for few tokens (product.cu, product4.cu, product_plain.cu) ---- */

typedef enum {
    QK_PRODUCT_PLAIN, /* any weight: F32 activations, float32 multiply-adds */
    QK_PRODUCT_16BIT, /* F16 or BF16 weights, k % 8 == 0: tensor cores, fragments of QK_SLAB_16BIT */
    QK_PRODUCT_4BIT,  /* 4-bit in tiles that decode to F16 or BF16: fragments of QK_SLAB_4BIT */
} qk_product_kind;
#define QK_PRODUCT_TOKENS 64 /* most tokens of one call, QK_PRODUCT_PLAIN excepted */

qk_product_kind qk_cuda_product_kind(const qk_cuda_weight *w);
/* The format that its fragments have: F16 or BF16. Not for QK_PRODUCT_PLAIN. */
qk_format qk_cuda_product_format(const qk_cuda_weight *w);
/* w[i].y = x w[i]^T + bias (+ w[i].y when `add`) for 1..3 weights of one kind, format and k, in one launch.
 * x: fragments of the kind's slab. The order of each sum depends on k alone. */
int qk_cuda_product(qk_stream stream, const qk_cuda_weight *w, int count, const void *x, int64_t tokens,
                    bool add);
/* dst = silu(x gate^T + bias) * (x up^T + bias), rounded to `to`, as fragments of `slab` over gate->w.n
 * inputs (padding zero); gate and up of one kind, format and shape. */
int qk_cuda_product_swiglu(qk_stream stream, const qk_cuda_weight *gate, const qk_cuda_weight *up,
                           const void *x, int64_t tokens, qk_format to, int slab, void *dst);
/* Any weight, any number of tokens; x F32 [T, k]. */
int qk_cuda_product_plain(qk_stream stream, const qk_cuda_weight *w, const float *x, int64_t tokens,
                          bool add);

/* ---- rotary positions and attention (rope.cu, attention_decode.cu, attention_prefill.cu) ---- */

int qk_cuda_rope(qk_stream stream, float *x, const int32_t *pos, const float *cos, const float *sin,
                 int heads, int d, int64_t t);
/* k, v [T, kv_heads * d] F32 to cache slots start + pos, rounded to `f`. */
int qk_cuda_kv_write(qk_stream stream, const float *k, const float *v, const int32_t *start,
                     const int32_t *pos, int kv_heads, int d, int64_t slots, int64_t t, qk_format f,
                     void *cache_k, void *cache_v);
/* The two steps above for a layer in one launch: q is rotated in place, k on its way to the cache. */
int qk_cuda_rope_kv(qk_stream stream, float *q, const float *k, const float *v, const int32_t *start,
                    const int32_t *pos, const float *cos, const float *sin, int heads, int kv_heads, int d,
                    int64_t slots, int64_t t, qk_format f, void *cache_k, void *cache_v);

typedef struct {
    const float *q;             /* [T, heads * d] */
    const void *k, *v;          /* [kv_heads, slots, d] in `kv` */
    qk_format kv;               /* F32, F16 or BF16 */
    const int32_t *start, *pos; /* [T] */
    int heads, kv_heads, d;     /* d a multiple of 8, <= 256 */
    int64_t slots, tokens;
    int64_t longest; /* bound on pos + 1, for the size of the grid only */
    float *y;        /* [OUT] F32 [T, heads * d], or NULL */
    void *y16;       /* [OUT] where y is NULL: in `y_format`, row-major (slab 0) or fragments, padding zero */
    qk_format y_format;
    int slab;
    void *scratch; /* qk_cuda_attention_bytes; zeroed once by the caller, left zeroed where it must be */
} qk_cuda_attention;

/* Positions of one piece of flash-decoding, counted from a sequence's first: pieces are merged in order. */
#define QK_ATTENTION_SPLIT 128
size_t qk_cuda_attention_bytes(int64_t tokens, int heads, int d, int64_t longest);
/* Token by token; right for any batch, made for one token a sequence. */
int qk_cuda_attention_decode(qk_stream stream, const qk_cuda_attention *a);
/* Tiles of queries against tiles of keys on tensor cores; for prompts. Needs 16-bit kv and
 * qk_cuda_attention_prefill_fits(d). Runs of tokens with the same start and ascending pos share tiles; the
 * kernel finds them itself. */
bool qk_cuda_attention_prefill_fits(int d);
int qk_cuda_attention_prefill(qk_stream stream, const qk_cuda_attention *a);

#ifdef __cplusplus
}
#endif
#endif
