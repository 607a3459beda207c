/* Inside the CUDA backend: what core/backend_cuda*.c share. Nothing else includes this.
 *
 * One process has one pair of streams per GPU, the lane, however many handles are open on it: a tensor made
 * through one handle may be read through another, and only a common stream orders the two. All work is queued
 * on lane->stream; lane->side decodes 4-bit weights ahead of the products that read them. A context, and all
 * contexts of one GPU together, serve one thread at a time.
 *
 * A fault on the device ends its use in this process: the lane keeps the text, every later call is refused
 * with it, and CUDA is not called again for that GPU.
 */
#ifndef QL_BACKEND_CUDA_H
#define QL_BACKEND_CUDA_H

#include "backend.h"
#include "qk_cuda.h"

#include <cuda_runtime_api.h>

enum {
    QL_CUDA_STAGE = 8 << 20,  /* bytes of one pinned staging buffer: half a millisecond of PCIe */
    QL_CUDA_SLICE = 64 << 20, /* bytes of decoded 4-bit weight that one product reads */
    QL_CUDA_PARTIALS =
        96 << 20,        /* bytes of attention partials in one launch; 64 tokens at 8192 positions fit */
    QL_CUDA_CELLS = 256, /* bytes for results of one number */
    QL_CUDA_GRAPHS = 8,
    QL_CUDA_IDLE = 64, /* freed blocks kept for the next tensor of their size ... */
};
#define QL_CUDA_IDLE_BLOCK                                                                                   \
    ((size_t)1 << 20)                         /* ... none above this, so that what a model releases is free  \
                                               */
#define QL_CUDA_IDLE_TOTAL ((size_t)16 << 20) /* ... nor more than this together */

/* What ran, for the `kernels` entry. */
typedef enum {
    QL_CUDA_RAN_PLAIN,
    QL_CUDA_RAN_16BIT,
    QL_CUDA_RAN_4BIT,
    QL_CUDA_RAN_BLAS_BF16,
    QL_CUDA_RAN_BLAS_F16,
    QL_CUDA_RAN_BLAS_F32,
    QL_CUDA_RAN_DECODED,
    QL_CUDA_RAN_NO_BLAS,
    QL_CUDA_RAN_ATTENTION_DECODE,
    QL_CUDA_RAN_ATTENTION_PREFILL,
    QL_CUDA_RAN_GRAPH,
    QL_CUDA_RAN_COUNT,
} ql_cuda_kernel;

typedef struct {
    int users; /* open contexts */
    cudaStream_t stream, side;
    bool given_up;
    char fault[256];          /* what it was given up for */
    const char *first, *last; /* operations queued since the last good synchronisation, or NULL */
} ql_cuda_lane;

typedef struct {
    char *host;          /* pinned, QL_CUDA_STAGE bytes */
    cudaEvent_t emptied; /* after the copy out of it or into it */
} ql_cuda_stage;

typedef struct {
    void *p;
    size_t bytes;
} ql_cuda_block;

typedef struct ql_cuda_blas ql_cuda_blas;
typedef struct ql_cuda_graphs ql_cuda_graphs;

typedef struct {
    int index;
    int sm; /* 90 for compute capability 9.0 */
    char label[16];
    ql_numerics numerics;
    bool sync_each; /* QLUA_CUDA_SYNC: a fault then carries the name of its operation */
    bool capturing;
    ql_cuda_lane *lane;
    ql_cuda_stage stage[2];
    int turn;                                 /* staging buffer to take next */
    cudaEvent_t begun, filled[2], emptied[2]; /* between the two streams; see ql_cuda_product_group */
    int slice_turn;
    int64_t slice; /* bytes: QL_CUDA_SLICE, or QLUA_CUDA_SLICE */
    void *cells;   /* [QL_CUDA_CELLS] bytes */

    void *scratch; /* grow-only, for steps outside a pass */
    size_t scratch_bytes;
    struct { /* attention scratch that is zero where it must be */
        const void *p;
        int64_t tokens, longest;
        int heads, d;
    } zeroed;

    ql_cuda_block idle[QL_CUDA_IDLE];
    int idle_count;
    size_t idle_bytes;

    unsigned ran; /* bits of ql_cuda_kernel */
    bool blas_tried;
    ql_cuda_blas *blas;     /* NULL: not looked for yet, or not found */
    ql_cuda_graphs *graphs; /* NULL: switched off */
} ql_cuda;

/* ---- small helpers ---- */

static inline qk_format ql_cuda_format(ql_dtype dtype)
{
    return dtype == QL_F32 ? QK_F32 : dtype == QL_F16 ? QK_F16 : QK_BF16;
}

static inline size_t ql_cuda_element(qk_format f)
{
    return f == QK_F32 ? 4 : 2;
}

static inline int64_t ql_cuda_count(const ql_tensor *t)
{
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

static inline size_t ql_cuda_round(size_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static inline void ql_cuda_note(ql_cuda *c, ql_cuda_kernel kernel)
{
    c->ran |= 1u << kernel;
}

/* ---- errors and synchronisation (backend_cuda_memory.c) ---- */

/* Every entry begins with this: refuses a device given up, and makes it this thread's current one. */
ql_status ql_cuda_enter(ql_cuda *c, ql_err *err);
/* The status of a runtime call; `what` is its name in the message. A fault gives the device up. */
ql_status ql_cuda_check(ql_cuda *c, int error, const char *what, ql_err *err);
/* The status of a launch of operation `name` (a literal), remembered until the next synchronisation. */
ql_status ql_cuda_ran(ql_cuda *c, int error, const char *name, ql_err *err);
/* Waits for all that is queued. Any failure is a fault of the operations since the last good one. */
ql_status ql_cuda_wait(ql_cuda *c, ql_err *err);

#define QL_CUDA(call, what) QL_TRY(ql_cuda_check(c, (call), what, err))
#define QL_CUDA_RUN(name, call) QL_TRY(ql_cuda_ran(c, (call), name, err))

/* ---- memory (backend_cuda_memory.c) ---- */

ql_status ql_cuda_alloc(void *ctx, size_t bytes, void **out, ql_err *err);
void ql_cuda_free(void *ctx, void *p, size_t bytes);
ql_status ql_cuda_upload(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err);
ql_status ql_cuda_download(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err);
ql_status ql_cuda_sync(void *ctx, ql_err *err);
/* A pinned buffer that no copy reads any more, and queueing the copy of its first `bytes` to `dst`. */
ql_status ql_cuda_stage_take(ql_cuda *c, ql_cuda_stage **out, ql_err *err);
ql_status ql_cuda_stage_send(ql_cuda *c, ql_cuda_stage *s, void *dst, size_t bytes, ql_err *err);
/* The context's scratch, at least `bytes`; what an earlier caller was given is gone. */
ql_status ql_cuda_scratch(ql_cuda *c, size_t bytes, char **out, ql_err *err);
void ql_cuda_memory_close(ql_cuda *c);

/* ---- NVML, loaded when asked (backend_cuda_nvml.c) ---- */

/* Fills memory_process, neighbours, energy_joules, clock_mhz and throttled_seconds where the driver tells. */
void ql_cuda_nvml_info(const ql_cuda *c, ql_device_info *out);

/* ---- cuBLASLt, loaded when first needed (backend_cuda_blas.c) ---- */

/* Whether the library is there. */
bool ql_cuda_blas_found(ql_cuda *c);
/* "cuBLASLt 13.0.2", or "cuBLASLt not found". */
void ql_cuda_blas_version(ql_cuda *c, char *out, size_t size);
size_t ql_cuda_blas_room(const ql_cuda *c);
/* y[t, j] = x[t] . w[j] (+ y[t, j] when `add`): x [T, k] and w [n, k] in `f`, y F32 [T, *] with rows `stride`
 * apart; room: ql_cuda_blas_room bytes. One algorithm per shape, chosen at its first use. */
ql_status ql_cuda_blas_product(ql_cuda *c, qk_format f, const void *x, const void *w, int64_t tokens,
                               int64_t n, int64_t k, bool add, float *y, int64_t stride, void *room,
                               ql_err *err);
void ql_cuda_blas_close(ql_cuda *c);

/* ---- products (backend_cuda_product.c) ---- */

/* How a weight reads its inputs. */
typedef struct {
    bool plain; /* F32 [T, k]; else 16-bit numbers: */
    qk_format format;
    int slab; /* 0: rows, else fragments */
} ql_cuda_form;

/* Room that a group of products takes; the largest need of each kind over all groups. */
typedef struct {
    size_t packed, plain; /* bytes of inputs in 16 bits, in F32 */
    size_t slice;         /* bytes of one of two buffers of decoded weights */
    size_t blas;
} ql_cuda_need;

typedef struct {
    void *packed, *plain, *slice[2], *blas;
} ql_cuda_room;

/* Inputs of a group: made from `source`, or already there in `form` when `ready`. */
typedef struct {
    qk_cuda_source source; /* PLAIN, NORM or SWIGLU of F32 [T, k] */
    const void *ready;
    ql_cuda_form form;
} ql_cuda_input;

qk_cuda_weight ql_cuda_weight(const ql_matrix *m, float *y);
ql_cuda_form ql_cuda_form_of(ql_cuda *c, const qk_cuda_weight *w, int64_t tokens);
bool ql_cuda_form_equal(ql_cuda_form a, ql_cuda_form b);
/* Bytes of T inputs of width k in `form`. */
size_t ql_cuda_form_bytes(ql_cuda_form form, int64_t tokens, int64_t k);
void ql_cuda_product_need(ql_cuda *c, const qk_cuda_weight *w, int64_t tokens, ql_cuda_need *need);
/* w[i].y = input w[i]^T + bias (+ w[i].y when `add`) for weights of one k. The first use of `room` after
 * other work on the stream comes after ql_cuda_product_begin. */
ql_status ql_cuda_product_group(ql_cuda *c, const ql_cuda_room *room, const ql_cuda_input *input,
                                int64_t tokens, const qk_cuda_weight *w, int count, bool add, ql_err *err);
/* Makes the side stream wait for all that is queued so far. */
ql_status ql_cuda_product_begin(ql_cuda *c, ql_err *err);
/* Whether gate, up and down go by the fused kernel, whose result is down's input. */
bool ql_cuda_swiglu_fuses(ql_cuda *c, const qk_cuda_weight *gate, const qk_cuda_weight *up,
                          const qk_cuda_weight *down, int64_t tokens);
ql_status ql_cuda_product_swiglu(ql_cuda *c, const ql_cuda_room *room, const ql_cuda_input *input,
                                 int64_t tokens, const qk_cuda_weight *gate, const qk_cuda_weight *up,
                                 ql_cuda_form to, void *dst, ql_err *err);
ql_status ql_cuda_matmul(void *ctx, const ql_tensor *x, const ql_matrix *w, bool add, ql_tensor *y,
                         ql_err *err);

/* ---- attention (backend_cuda_attention.c) ---- */

/* A bound on pos + 1 that stays the same while a sequence grows: a power of two of pieces. */
int64_t ql_cuda_attention_bound(int64_t longest);
/* Bytes of scratch. */
size_t ql_cuda_attention_need(const ql_cuda *c, const qk_cuda_attention *a);
/* Launches that a run by flash-decoding takes. */
int64_t ql_cuda_attention_pieces(const qk_cuda_attention *a);
/* `a` without scratch; `scratch` has ql_cuda_attention_need bytes. */
ql_status ql_cuda_attention_run(ql_cuda *c, const qk_cuda_attention *a, void *scratch, ql_err *err);
/* Zeroes `scratch` where that run needs it, unless it is known to be zero. */
ql_status ql_cuda_attention_clear(ql_cuda *c, const qk_cuda_attention *a, void *scratch, ql_err *err);
ql_status ql_cuda_attention_step(void *ctx, const ql_tensor *q, ql_kv_view cache, const ql_tensor *start,
                                 const ql_tensor *pos, int heads, ql_tensor *y, ql_err *err);

/* ---- a whole pass (backend_cuda_pass.c, backend_cuda_graph.c) ---- */

size_t ql_cuda_pass_bytes(void *ctx, const ql_pass *p);
ql_status ql_cuda_pass(void *ctx, const ql_pass *p, ql_err *err);

/* Runs `body` for pass `p`, replayed from a graph when the same launches have been seen before. `longest`:
 * the bound that the launches depend on. */
typedef ql_status ql_cuda_body(ql_cuda *c, const ql_pass *p, const void *plan, ql_err *err);
ql_status ql_cuda_graph_run(ql_cuda *c, const ql_pass *p, int64_t longest, ql_cuda_body *body,
                            const void *plan, ql_err *err);
void ql_cuda_graph_open(ql_cuda *c);
void ql_cuda_graph_close(ql_cuda *c);

/* ---- the other entries (backend_cuda_ops.c, backend_cuda_probe.c) ---- */

ql_status ql_cuda_embed(void *ctx, const ql_matrix *table, const ql_tensor *ids, ql_tensor *y, ql_err *err);
ql_status ql_cuda_rmsnorm(void *ctx, const ql_tensor *x, const ql_tensor *w, float eps, ql_tensor *y,
                          ql_err *err);
ql_status ql_cuda_rope(void *ctx, ql_tensor *x, const ql_tensor *pos, const ql_tensor *cos,
                       const ql_tensor *sin, int heads, ql_err *err);
ql_status ql_cuda_kv_write(void *ctx, const ql_tensor *k, const ql_tensor *v, const ql_tensor *start,
                           const ql_tensor *pos, ql_kv_view cache, ql_err *err);
ql_status ql_cuda_kv_copy(void *ctx, ql_kv_view src, int64_t from, ql_kv_view dst, int64_t to, int64_t n,
                          ql_err *err);
ql_status ql_cuda_swiglu(void *ctx, const ql_tensor *gate, const ql_tensor *up, ql_tensor *y, ql_err *err);
ql_status ql_cuda_gather_rows(void *ctx, const ql_tensor *x, const ql_tensor *rows, ql_tensor *y,
                              ql_err *err);
ql_status ql_cuda_topk(void *ctx, const ql_tensor *x, int k, ql_tensor *values, ql_tensor *ids, ql_err *err);
ql_status ql_cuda_logsumexp(void *ctx, const ql_tensor *x, double temperature, ql_tensor *out, ql_err *err);
ql_status ql_cuda_row_stats(void *ctx, const ql_tensor *x, const ql_tensor *targets, ql_tensor *stats,
                            ql_tensor *found, ql_err *err);
ql_status ql_cuda_softmax(void *ctx, const ql_tensor *x, double temperature, ql_tensor *y, ql_err *err);
ql_status ql_cuda_gather_cols(void *ctx, const ql_tensor *x, const ql_tensor *cols, ql_tensor *out,
                              ql_err *err);
ql_status ql_cuda_kl(void *ctx, const ql_tensor *a, const ql_tensor *b, ql_tensor *out, ql_err *err);
ql_status ql_cuda_binary(void *ctx, ql_binary_op op, const ql_tensor *a, const ql_tensor *b, float scalar,
                         bool reversed, ql_tensor *y, ql_err *err);
ql_status ql_cuda_convert(void *ctx, const ql_tensor *src, ql_tensor *dst, ql_err *err);
ql_status ql_cuda_find_bad(void *ctx, const ql_tensor *x, int64_t *at, ql_err *err);
ql_status ql_cuda_random(void *ctx, uint64_t seed, uint64_t first, ql_tensor *y, ql_err *err);
ql_status ql_cuda_quantize4(void *ctx, const ql_tensor *src, int block, const float *thresholds,
                            const uint8_t *order, int zero_code, ql_tensor *packed, ql_tensor *absmax,
                            ql_err *err);
ql_status ql_cuda_dequantize4(void *ctx, const ql_matrix *w, ql_tensor *dst, ql_err *err);
ql_status ql_cuda_pack4(void *ctx, const ql_matrix *w, ql_tensor *dst, int *layout, ql_err *err);
ql_status ql_cuda_unpack4(void *ctx, const ql_matrix *w, ql_tensor *dst, ql_err *err);
ql_status ql_cuda_ceiling(void *ctx, size_t bytes, ql_ceiling *out, ql_err *err);
void ql_cuda_kernels(void *ctx, char *out, size_t size);

#endif
