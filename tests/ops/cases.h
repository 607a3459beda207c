/* Operations of a backend on given shapes: one table that tests/core/test_ops.c checks, CPU v device, and
 * bench_ops times. A case makes its own inputs from random numbers that are the same bits on every device, so
 * two runs of a case on two devices compare.
 */
#ifndef OPS_CASES_H
#define OPS_CASES_H

#include "backend.h"

typedef enum {
    OPS_EMBED,       /* table [n, k], `tokens` ids */
    OPS_RMSNORM,     /* [tokens, k] */
    OPS_MATMUL,      /* [tokens, k] by [n, k] */
    OPS_ROPE,        /* [tokens, heads * k]; k is the head's size here and below */
    OPS_KV_WRITE,    /* [tokens, kv_heads * k] */
    OPS_ATTENTION,   /* see ops_case */
    OPS_SWIGLU,      /* [tokens, k] */
    OPS_GATHER_ROWS, /* `tokens` rows of [n, k] */
    OPS_GATHER_COLS, /* one of n in each of `tokens` rows; all below: logits [tokens, n] */
    OPS_TOPK,        /* the k largest */
    OPS_LOGSUMEXP,
    OPS_ROW_STATS,
    OPS_SOFTMAX,
    OPS_KL,
    OPS_ADD, /* x + y, [tokens, n]; then the other three, and by a scalar from both sides */
    OPS_SUB,
    OPS_MUL,
    OPS_DIV,
    OPS_SCALE,
    OPS_INVERT,
    OPS_NARROW,      /* F32 [tokens, n] to `format` */
    OPS_WIDEN,       /* `format` [tokens, n] to F32 */
    OPS_FIND_BAD,    /* `format` [tokens, n], bad at element k (< 0: none) */
    OPS_RANDOM,      /* `format` [tokens, n] from number k of the stream */
    OPS_QUANTIZE4,   /* weight [n, k] */
    OPS_DEQUANTIZE4, /* weight [n, k], as the device keeps it, to BF16 and F32 */
    OPS_PACK4,       /* weight [n, k], packed and unpacked again */
} ops_kind;

typedef enum { OPS_F32, OPS_F16, OPS_BF16, OPS_NF4, OPS_NF4_DOUBLE, OPS_CODEBOOK, OPS_NF4_F16 } ops_format;

/* How results of two devices, or of a device and float64, may differ. */
typedef enum {
    OPS_EXACT,    /* the same bits */
    OPS_NMSE,     /* sum of squared differences / sum of squares, at most `bound` */
    OPS_RELATIVE, /* each |a - b| at most `bound` * max(1, |b|) */
} ops_measure;

typedef struct {
    ops_kind kind;
    ops_format format; /* of the weight, the table or the KV cache */
    int64_t tokens, n, k;
    /* Attention: `sequences` of them, `tokens` new tokens in the first and fewer in the others, after
     * `context` earlier ones in the first and fewer in the others; nothing of one size but heads. */
    int heads, kv_heads, sequences;
    int64_t context;
    bool add, bias;   /* OPS_MATMUL: y += ..., with bias */
    bool rows;        /* 4-bit: keep the codes in bitsandbytes' order */
    bool full;        /* of a real model's size: for GPUs */
    const char *what; /* which layer has this shape; may be NULL */
} ops_case;

extern const ops_case ops_cases[];
extern const size_t ops_case_count;

void ops_case_name(const ops_case *c, char *out /* [OUT] */, size_t size);
/* The bound on what a device may differ by, from the rounding of its inputs; 0 with OPS_EXACT. */
ops_measure ops_case_measure(const ops_case *c, double *bound /* [OUT] */);
/* New tokens of an attention case, all sequences together, and the positions that they read. */
int64_t ops_case_tokens(const ops_case *c, int64_t *attended /* [OUT], may be NULL */);
/* Bytes that must be read and written, and floating-point operations of a product; for benchmarks. */
double ops_case_bytes(const ops_case *c);
double ops_case_flops(const ops_case *c);

/* ---- a case on a device (case_run.c) ---- */

#define OPS_OUTPUTS 3
typedef struct {
    const ops_case *c;
    ql_device *dev; /* borrowed */
    int copies;
    ql_matrix *w;         /* [copies], where the case has a weight */
    ql_tensor *k, *v;     /* [copies], where it has a KV cache: [kv_heads, slots, head's size] */
    ql_tensor start, pos; /* of attention and the cache, I32 [all tokens] */
    ql_tensor in[5];      /* activations, indices */
    ql_tensor out[OPS_OUTPUTS];
    int outputs;
    int64_t at;  /* of OPS_FIND_BAD */
    int skipped; /* the backend lacks an optional entry */
} ops_run;

/* Make the inputs; outputs are poisoned. With `copies` > 1 steps take turns with the weights and caches, so
 * that caches of the processor do not hold them. Free with ops_run_close, after a failure too. */
ql_status ops_run_open(ql_device *dev, const ops_case *c, int copies, ops_run *run /* [OUT] */, ql_err *err);
ql_status ops_run_step(ops_run *run, int copy, ql_err *err); /* queues it once */
void ops_run_close(ops_run *run);

#endif
