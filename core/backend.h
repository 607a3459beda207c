/* The backend table: what a device can do, at the grain of a layer's steps.
 *
 * A backend is one const ql_backend. All tensor arguments live on the backend's device, are contiguous, and
 * have been checked by ops.c: the functions below trust shapes and dtypes. Activations are F32 on the CPU. A
 * NULL entry is an operation the backend lacks: ops.c turns it into a clear error, never into a fall-back.
 * Operations may be queued; `sync` waits for them. Letters: T tokens in a packed batch, H hidden size, D
 * head_dim, V vocabulary.
 */
#ifndef QL_BACKEND_H
#define QL_BACKEND_H

#include "err.h"
#include "matrix.h"
#include "tensor.h"

#define QL_BACKEND_ABI 1

typedef struct {
    char name[96];                    /* "AMD EPYC ...", from the device */
    char isa[32];                     /* CPU: instruction set in use; CUDA: compute capability */
    int threads;                      /* CPU only */
    size_t memory_total, memory_free; /* bytes */
} ql_device_info;

/* KV cache of one layer, both [kv_heads, slots, D] F32: every sequence owns a run of slots. */
typedef struct {
    const ql_tensor *k, *v;
} ql_kv_view;

typedef enum { QL_BIN_ADD, QL_BIN_SUB, QL_BIN_MUL, QL_BIN_DIV } ql_binary_op;

typedef struct ql_backend {
    const char *name; /* "cpu", "cuda" */
    int abi;          /* QL_BACKEND_ABI: a plug-in of another version is refused */

    int (*count)(void); /* devices present */
    ql_status (*open)(int index, int threads, void **ctx, ql_err *err);
    void (*close)(void *ctx);
    ql_status (*info)(void *ctx, ql_device_info *out, ql_err *err);

    ql_status (*alloc)(void *ctx, size_t bytes, void **out, ql_err *err); /* 64-byte aligned */
    void (*free)(void *ctx, void *p, size_t bytes);
    ql_status (*upload)(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err);
    ql_status (*download)(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err);
    ql_status (*sync)(void *ctx, ql_err *err);

    /* y[t] = table[ids[t]] widened to F32: table [V, H] dense, ids I32 [T], y [T, H]. */
    ql_status (*embed)(void *ctx, const ql_matrix *table, const ql_tensor *ids, ql_tensor *y, ql_err *err);
    /* y = x / sqrt(mean(x^2) + eps) * w: x, y [T, H], w F32 [H] (Zhang & Sennrich 2019). */
    ql_status (*rmsnorm)(void *ctx, const ql_tensor *x, const ql_tensor *w, float eps, ql_tensor *y,
                         ql_err *err);
    /* y = x W^T + bias, or y += that when `add`: x [T, k], y [T, n]. Bits do not depend on T nor on threads.
     */
    ql_status (*matmul)(void *ctx, const ql_tensor *x, const ql_matrix *w, bool add, ql_tensor *y,
                        ql_err *err);
    /* Rotate halves (d, d + D/2) in place: x [T, heads*D], pos I32 [T], cos/sin F32 [positions, D/2]. */
    ql_status (*rope)(void *ctx, ql_tensor *x, const ql_tensor *pos, const ql_tensor *cos,
                      const ql_tensor *sin, int heads, ql_err *err);
    /* Cache slot start[t] + pos[t] gets token t's key and value: k, v [T, kv_heads*D]. */
    ql_status (*kv_write)(void *ctx, const ql_tensor *k, const ql_tensor *v, const ql_tensor *start,
                          const ql_tensor *pos, ql_kv_view cache, ql_err *err);
    /* Causal grouped-query attention: token t reads slots start[t] .. start[t] + pos[t]; q, y [T, heads*D];
     * scores are scaled by 1/sqrt(D). Tokens of one sequence are adjacent. */
    ql_status (*attention)(void *ctx, const ql_tensor *q, ql_kv_view cache, const ql_tensor *start,
                           const ql_tensor *pos, int heads, ql_tensor *y, ql_err *err);
    /* y = silu(gate) * up, elementwise [T, F]; y may be gate. */
    ql_status (*swiglu)(void *ctx, const ql_tensor *gate, const ql_tensor *up, ql_tensor *y, ql_err *err);
    /* y[i] = x[rows[i]]: x [T, H], rows I32 [n], y [n, H]. */
    ql_status (*gather_rows)(void *ctx, const ql_tensor *x, const ql_tensor *rows, ql_tensor *y, ql_err *err);

    /* The k largest of each row, largest first, ties to the lower column: x F32 [n, V]; values F32, ids I32
     * [n, k]. */
    ql_status (*topk)(void *ctx, const ql_tensor *x, int k, ql_tensor *values, ql_tensor *ids, ql_err *err);
    /* out[i] = ln sum_j exp(x[i, j] / temperature), summed in float64: out F64 [n]. */
    ql_status (*logsumexp)(void *ctx, const ql_tensor *x, double temperature, ql_tensor *out, ql_err *err);
    /* y = softmax(x / temperature) by row: F32 [n, V]. */
    ql_status (*softmax)(void *ctx, const ql_tensor *x, double temperature, ql_tensor *y, ql_err *err);
    /* out[i] = x[i, cols[i]]: cols I32 [n], out F32 [n]. */
    ql_status (*gather_cols)(void *ctx, const ql_tensor *x, const ql_tensor *cols, ql_tensor *out,
                             ql_err *err);
    /* out[i] = sum_j p (ln p - ln q) in float64 from F32 logits a (p) and b (q), both [n, V]: out F64 [n]. */
    ql_status (*kl)(void *ctx, const ql_tensor *a, const ql_tensor *b, ql_tensor *out, ql_err *err);
    /* y = a op b elementwise on F32 of one shape; b NULL: y = a op scalar (or scalar op a when `reversed`).
     */
    ql_status (*binary)(void *ctx, ql_binary_op op, const ql_tensor *a, const ql_tensor *b, float scalar,
                        bool reversed, ql_tensor *y, ql_err *err);
    /* dst = src converted between F32, F16 and BF16, round to nearest even: same shape. */
    ql_status (*convert)(void *ctx, const ql_tensor *src, ql_tensor *dst, ql_err *err);

    /* 4-bit codes of a dense matrix: src any float dtype, n elements flattened. Code = order[number of
     * thresholds t with x > t], x = w * (1.0f / absmax of the block): thresholds ascending [15], order [16].
     * packed U8 [ceil(n/2)], absmax F32 [ceil(n/block)]; the code of an all-zero block is `zero_code`, and so
     * is the low nibble that pads an odd n. */
    ql_status (*quantize4)(void *ctx, const ql_tensor *src, int block, const float *thresholds,
                           const uint8_t *order, int zero_code, ql_tensor *packed, ql_tensor *absmax,
                           ql_err *err);
    /* The matrix decoded, each value rounded to quant->value_dtype, then widened or kept as dst's dtype. */
    ql_status (*dequantize4)(void *ctx, const ql_matrix *w, ql_tensor *dst, ql_err *err);
} ql_backend;

extern const ql_backend ql_backend_cpu;

/* An open device; reference-counted (every storage on it holds one reference). */
struct ql_device {
    const ql_backend *backend;
    void *ctx;
    int index;
    int refs;       /* atomic */
    char label[32]; /* "cpu", "cuda:0" */
};

/* `name`: "auto" (CUDA when there is a device, else the CPU), "cpu", "cuda", "cuda:<index>". `threads` 0: as
 * many as the affinity mask and OMP_NUM_THREADS allow; only the CPU uses it. */
ql_status ql_device_open(const char *name, int threads, ql_device **out /* [OUT] */, ql_err *err);
ql_device *ql_device_retain(ql_device *dev);
void ql_device_release(ql_device *dev);

#endif
