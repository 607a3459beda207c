/* The backend table: what a device can do, at the grain of a layer's steps.
 *
 * A backend is one const ql_backend. All tensor arguments live on the backend's device, are contiguous, and
 * have been checked by ops.c: the functions below trust shapes and dtypes. Activations are F32. A NULL entry
 * is an operation the backend lacks: ops.c turns it into a clear error, never into a fall-back to another
 * device. Operations may be queued; `sync`, `download` and every entry that returns a value wait for them.
 * Letters: T tokens in a packed batch, H hidden size, D head_dim, V vocabulary.
 *
 * CUDA comes as a plug-in, libqlua_cuda.so, which exports ql_backend_plugin; see ql_backend_find.
 */
#ifndef QL_BACKEND_H
#define QL_BACKEND_H

#include "err.h"
#include "layer.h"
#include "matrix.h"
#include "tensor.h"

#define QL_BACKEND_ABI 4

/* Which kernels products and attention may take. INVARIANT: tile and split are fixed, so that a row's bits do
 * not depend on its batch. FAST: they may depend on the number of tokens. The CPU is always invariant. */
typedef enum { QL_NUMERICS_FAST, QL_NUMERICS_INVARIANT } ql_numerics;

typedef struct {
    int threads; /* CPU only; 0: as many as the affinity mask and OMP_NUM_THREADS allow */
    ql_numerics numerics;
} ql_device_options;

typedef struct {
    char name[96];                    /* "AMD EPYC ...", "NVIDIA H100 80GB HBM3", from the device */
    char isa[32];                     /* CPU: instruction set in use; CUDA: "sm_90" */
    char driver[64];                  /* CUDA: "driver 13.0, runtime 13.0"; "" on the CPU */
    int threads;                      /* CPU only */
    size_t memory_total, memory_free; /* bytes */
    size_t memory_process;            /* device bytes this process holds (NVML); 0: not known */
    double energy_joules;             /* the device's counter, since the driver was loaded; < 0: not known */
    int clock_mhz;                    /* current clock of the multiprocessors; 0: not known */
    double throttled_seconds;         /* in which heat held its clock down, a counter too; < 0: not known */
    int neighbours;                   /* other processes that may compute on it; < 0: not known */
    ql_numerics numerics;
} ql_device_info;

/* What a device reached in a short run of its own; the denominators of benchmarks. */
typedef struct {
    double read_bytes_per_second;   /* reading memory */
    double flops_per_second;        /* CPU: float32 multiply-adds on registers */
    double matrix_flops_per_second; /* CUDA: a large bfloat16 product of random numbers; 0 on the CPU */
} ql_ceiling;

/* KV cache of one layer, both [kv_heads, slots, D] in the cache's dtype: every sequence owns a run of slots.
 */
typedef struct {
    const ql_tensor *k, *v;
} ql_kv_view;

typedef enum { QL_BIN_ADD, QL_BIN_SUB, QL_BIN_MUL, QL_BIN_DIV } ql_binary_op;

/* A network and one packed batch through it: what `pass` takes. Borrows everything; the arrays of int32_t are
 * on the host, all indices in them have been checked. */
typedef struct {
    int64_t hidden, intermediate, vocab, head_dim;
    int heads, kv_heads, layers;
    float eps;                  /* of every RMSNorm */
    const ql_layer *layer;      /* [layers] */
    const ql_matrix *embed;     /* dense [V, H] */
    const ql_matrix *lm_head;   /* [V, H] */
    const ql_tensor *norm;      /* F32 [H] */
    const ql_tensor *cos, *sin; /* F32 [positions, D/2] */
    const ql_kv_view *cache;    /* [layers] */

    int64_t tokens, outputs;
    const int32_t *ids;       /* [tokens] */
    const int32_t *start;     /* [tokens] first cache slot of the token's sequence */
    const int32_t *pos;       /* [tokens] position in its sequence; tokens of a sequence are adjacent */
    const int32_t *out_token; /* [outputs] tokens whose logits are wanted, ascending */
    ql_tensor *workspace;     /* U8, at least pass_bytes; its content is the backend's from pass to pass */
    ql_tensor *logits;        /* [OUT] F32 [outputs, V] */
} ql_pass;

typedef struct ql_backend {
    const char *name; /* "cpu", "cuda" */
    int abi;          /* QL_BACKEND_ABI: a plug-in of another version is refused */

    ql_dtype kv_dtype;   /* F32: KV caches are in float32; else in their model's own type */
    int64_t pass_tokens; /* tokens that best go through the layers together */
    bool nested_scales;  /* double-quantized scales stay in 8 bits on the device: see ql_matrix */

    /* Devices present, 0 with `err` saying why there are none (driver, library, no device). */
    int (*count)(ql_err *err);
    ql_status (*open)(int index, const ql_device_options *options, void **ctx, ql_err *err);
    void (*close)(void *ctx);
    ql_status (*info)(void *ctx, ql_device_info *out, ql_err *err);
    ql_status (*ceiling)(void *ctx, size_t bytes, ql_ceiling *out, ql_err *err);
    /* Names of the product and attention kernels that ran since the last call, "a, b"; then forgets them. */
    void (*kernels)(void *ctx, char *out /* [OUT] */, size_t size);

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
    /* y = x W^T + bias, or y += that when `add`: x [T, k], y [T, n]. CPU and INVARIANT: bits do not depend on
     * T nor on threads. */
    ql_status (*matmul)(void *ctx, const ql_tensor *x, const ql_matrix *w, bool add, ql_tensor *y,
                        ql_err *err);
    /* Rotate halves (d, d + D/2) in place: x [T, heads*D], pos I32 [T], cos/sin F32 [positions, D/2]. */
    ql_status (*rope)(void *ctx, ql_tensor *x, const ql_tensor *pos, const ql_tensor *cos,
                      const ql_tensor *sin, int heads, ql_err *err);
    /* Cache slot start[t] + pos[t] gets token t's key and value, rounded to the cache's dtype: k, v [T,
     * kv_heads*D] F32. */
    ql_status (*kv_write)(void *ctx, const ql_tensor *k, const ql_tensor *v, const ql_tensor *start,
                          const ql_tensor *pos, ql_kv_view cache, ql_err *err);
    /* Slots to .. to + n of `dst` get what slots from .. from + n of `src` hold, in every head: two caches of
     * one model, or one cache and runs that do not meet. */
    ql_status (*kv_copy)(void *ctx, ql_kv_view src, int64_t from, ql_kv_view dst, int64_t to, int64_t n,
                         ql_err *err);
    /* Causal grouped-query attention: token t reads slots start[t] .. start[t] + pos[t]; q, y [T, heads*D];
     * scores are scaled by 1/sqrt(D). Tokens of one sequence are adjacent. */
    ql_status (*attention)(void *ctx, const ql_tensor *q, ql_kv_view cache, const ql_tensor *start,
                           const ql_tensor *pos, int heads, ql_tensor *y, ql_err *err);
    /* y = silu(gate) * up, elementwise [T, F]; y may be gate. */
    ql_status (*swiglu)(void *ctx, const ql_tensor *gate, const ql_tensor *up, ql_tensor *y, ql_err *err);
    /* y[i] = x[rows[i]]: x [T, H], rows I32 [n], y [n, H]. */
    ql_status (*gather_rows)(void *ctx, const ql_tensor *x, const ql_tensor *rows, ql_tensor *y, ql_err *err);

    /* Optional: a whole pass in one call, fused as the device likes it; results are those of the steps above
     * within the rounding of the weights' dtype. Without it the steps run one by one.
     * pass_bytes: workspace for `p` (whose workspace and logits are not looked at). A backend without `pass`
     * may have it too, to say what the steps of `p` take of the context's own memory. */
    size_t (*pass_bytes)(void *ctx, const ql_pass *p);
    ql_status (*pass)(void *ctx, const ql_pass *p, ql_err *err);

    /* The k largest of each row, largest first, ties to the lower column: x F32 [n, V]; values F32, ids I32
     * [n, k]. NaN counts as less than every number. */
    ql_status (*topk)(void *ctx, const ql_tensor *x, int k, ql_tensor *values, ql_tensor *ids, ql_err *err);
    /* out[i] = ln sum_j exp(x[i, j] / temperature), summed in float64: out F64 [n]. */
    ql_status (*logsumexp)(void *ctx, const ql_tensor *x, double temperature, ql_tensor *out, ql_err *err);
    /* One pass over each row of logits x F32 [n, V]: stats F64 [n, 3] = ln sum exp(x), entropy in nats,
     * x[i, targets[i]] (0 without targets: I32 [n] or NULL); found I32 [n, 2] = column of the first largest
     * number, column of the first NaN or infinity or -1. */
    ql_status (*row_stats)(void *ctx, const ql_tensor *x, const ql_tensor *targets, ql_tensor *stats,
                           ql_tensor *found, ql_err *err);
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
    /* *at = index of the first element of a float tensor that is NaN or infinite, or -1. */
    ql_status (*find_bad)(void *ctx, const ql_tensor *x, int64_t *at /* [OUT] */, ql_err *err);
    /* y[i] = near-normal number `first` + i of the stream `seed`, sd 0.02 (qk_random.h), in y's float dtype.
     */
    ql_status (*random)(void *ctx, uint64_t seed, uint64_t first, ql_tensor *y, ql_err *err);

    /* 4-bit codes of a dense matrix: src any float dtype, n elements flattened. Code = order[number of
     * thresholds t with x > t], x = w * (1.0f / absmax of the block): thresholds ascending [15], order [16].
     * packed U8 [ceil(n/2)], absmax F32 [ceil(n/block)]; the code of an all-zero block is `zero_code`, and so
     * is the low nibble that pads an odd n. */
    ql_status (*quantize4)(void *ctx, const ql_tensor *src, int block, const float *thresholds,
                           const uint8_t *order, int zero_code, ql_tensor *packed, ql_tensor *absmax,
                           ql_err *err);
    /* The matrix decoded, each value rounded to quant->value_dtype, then widened or kept as dst's dtype. */
    ql_status (*dequantize4)(void *ctx, const ql_matrix *w, ql_tensor *dst, ql_err *err);
    /* Optional, both or none. pack4: `dst` U8, of w->data's size, gets the codes of `w` (in bitsandbytes'
     * order) in the order this device's products read best; *layout says which, 0 when w is best left as it
     * is (then dst is not written). unpack4 undoes it. Neither changes a code. */
    ql_status (*pack4)(void *ctx, const ql_matrix *w, ql_tensor *dst, int *layout, ql_err *err);
    ql_status (*unpack4)(void *ctx, const ql_matrix *w, ql_tensor *dst, ql_err *err);
} ql_backend;

extern const ql_backend ql_backend_cpu;

/* The one symbol of a plug-in. */
const ql_backend *ql_backend_plugin(void);

/* An open device; reference-counted (every storage on it holds one reference). */
struct ql_device {
    const ql_backend *backend;
    void *ctx;
    int index;
    int refs;       /* atomic */
    char label[32]; /* "cpu", "cuda:0" */
};

/* The backend called `name` ("cpu", "cuda"). CUDA is looked for once a process: the file QLUA_CUDA_PLUGIN
 * names, else libqlua_cuda.so beside the binary, in ../lib or in ../lib/qlua. NULL: `err` says what is
 * missing (no such file, a library it needs, another version). */
const ql_backend *ql_backend_find(const char *name, ql_err *err);

/* `name`: "auto" (CUDA when there is a device, else the CPU), "cpu", "cuda", "cuda:<index>". `options` may be
 * NULL. */
ql_status ql_device_open(const char *name, const ql_device_options *options, ql_device **out /* [OUT] */,
                         ql_err *err);
ql_device *ql_device_retain(ql_device *dev);
void ql_device_release(ql_device *dev);

#endif
