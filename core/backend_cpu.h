/* What the files of the CPU backend share; nobody else includes this. */
#ifndef QL_BACKEND_CPU_H
#define QL_BACKEND_CPU_H

#include "backend.h"
#include "pool.h"
#include "qk.h"

typedef struct {
    const qk_cpu *qk;
    ql_pool *pool;
    int threads;
    char *scratch; /* [threads][scratch_bytes], 64-byte aligned */
    size_t scratch_bytes;
    char *packed, *partial; /* products' activations, attention's runs: 64-byte aligned */
    size_t packed_bytes, partial_bytes;
    unsigned ran; /* bits 1 << RAN_x, or 1 << a qk_format for its products, since cpu_kernels was asked */
} cpu_context;

/* An operation's outputs in pieces of whole units, which differ by one unit at most. */
typedef struct {
    int64_t total, unit; /* outputs */
    int64_t pieces;
} cpu_split;

/* `total` outputs on `threads` threads, in units of `unit`; `work` is what one output costs, in multiply-adds
 * or so. One piece for what is not worth waking anybody; else a few for each thread, so that the shares of
 * ql_pool_share are even and what a slow thread leaves can be taken over. */
cpu_split ql_cpu_split(int threads, int64_t total, int64_t unit, double work);
/* Outputs [*i0, *i1) of a piece. */
void ql_cpu_piece(const cpu_split *s, int64_t piece, int64_t *i0 /* [OUT] */, int64_t *i1 /* [OUT] */);
/* The unit for n outputs of a product: `multiple`, which kernels like best, unless the threads' shares would
 * be uneven. */
int64_t ql_cpu_product_unit(int threads, int64_t n, int64_t multiple);

/* Attention in pieces of `step` tokens of one cache head and, when `runs` > 1, one run of positions. */
typedef struct {
    int64_t tokens, step, runs;
    int kv_heads;
    int64_t pieces, columns; /* pieces = columns * threads, some of them empty */
    int threads;
} cpu_attention_split;

/* `longest`: positions of the longest sequence; `work`: multiply-adds of all of it; record_bytes: of one
 * token's partial results of one run. Little work is for one thread, whatever `threads` says. */
cpu_attention_split ql_cpu_split_attention(int threads, int64_t tokens, int kv_heads, int64_t longest,
                                           double work, int64_t record_bytes);
/* Tokens [*t0, *t1), head and run of a piece; false: it is empty. Each thread's share begins with its
 * dearest, those of the last tokens. */
bool ql_cpu_attention_piece(const cpu_attention_split *s, int64_t piece, int64_t *t0 /* [OUT] */,
                            int64_t *t1 /* [OUT] */, int *kv_head /* [OUT] */, int64_t *run /* [OUT] */);

typedef void cpu_range_fn(const void *args, int64_t i0, int64_t i1, void *scratch);

/* fn over [0, total) in ranges that start at multiples of `multiple`: see ql_cpu_split. */
void ql_cpu_for_range(const cpu_context *c, int64_t total, int64_t multiple, double work, cpu_range_fn *fn,
                      const void *args);

/* Every index of a tensor must lie in [0, limit). */
ql_status ql_cpu_check_indices(const char *what, const ql_tensor *t, int64_t limit, ql_err *err);

static inline qk_format ql_cpu_format(ql_dtype dtype)
{
    return dtype == QL_F32 ? QK_F32 : dtype == QL_F16 ? QK_F16 : QK_BF16;
}

/* As the kernels take it; borrows everything. */
qk_matrix ql_cpu_matrix(const ql_matrix *w);

/* Entries of the table, in backend_cpu_rows.c; see backend.h. */
ql_status ql_cpu_topk(void *ctx, const ql_tensor *x, int k, ql_tensor *values, ql_tensor *ids, ql_err *err);
ql_status ql_cpu_logsumexp(void *ctx, const ql_tensor *x, double temperature, ql_tensor *out, ql_err *err);
ql_status ql_cpu_row_stats(void *ctx, const ql_tensor *x, const ql_tensor *targets, ql_tensor *stats,
                           ql_tensor *found, ql_err *err);
ql_status ql_cpu_softmax(void *ctx, const ql_tensor *x, double temperature, ql_tensor *y, ql_err *err);
ql_status ql_cpu_kl(void *ctx, const ql_tensor *p, const ql_tensor *q, ql_tensor *out, ql_err *err);
ql_status ql_cpu_gather_cols(void *ctx, const ql_tensor *x, const ql_tensor *cols, ql_tensor *out,
                             ql_err *err);
ql_status ql_cpu_convert(void *ctx, const ql_tensor *src, ql_tensor *dst, ql_err *err);
ql_status ql_cpu_find_bad(void *ctx, const ql_tensor *x, int64_t *at, ql_err *err);
ql_status ql_cpu_random(void *ctx, uint64_t seed, uint64_t first, ql_tensor *y, ql_err *err);
ql_status ql_cpu_quantize4(void *ctx, const ql_tensor *src, int block, const float *thresholds,
                           const uint8_t *order, int zero_code, ql_tensor *packed, ql_tensor *absmax,
                           ql_err *err);
ql_status ql_cpu_dequantize4(void *ctx, const ql_matrix *w, ql_tensor *dst, ql_err *err);

#endif
