#include "cases.h"

#include <stdio.h>
#include <string.h>

#define COUNT(a) (sizeof(a) / sizeof *(a))

/* A product of every size class of the device: one token, a few, the most of one call of the fused kernels
 * (64), and what goes to a library. */
#define PRODUCTS(f, rows_, cols, ...)                                                                        \
    {OPS_MATMUL, f, 1, rows_, cols, __VA_ARGS__}, {OPS_MATMUL, f, 2, rows_, cols, __VA_ARGS__},              \
        {OPS_MATMUL, f, 8, rows_, cols, __VA_ARGS__}, {OPS_MATMUL, f, 9, rows_, cols, __VA_ARGS__},          \
        {OPS_MATMUL, f, 33, rows_, cols, __VA_ARGS__},                                                       \
    {                                                                                                        \
        OPS_MATMUL, f, 65, rows_, cols, __VA_ARGS__                                                          \
    }

/* The layers of Llama-3-8B, one sixteenth of each side: q and o, k and v, gate and up, down, head. */
#define SCALED(f, t)                                                                                         \
    {OPS_MATMUL, f, t, 256, 256, .what = "q"}, {OPS_MATMUL, f, t, 64, 256, .what = "k"},                     \
        {OPS_MATMUL, f, t, 896, 256, .what = "gate"},                                                        \
    {                                                                                                        \
        OPS_MATMUL, f, t, 256, 896, .what = "down"                                                           \
    }

/* Full size, at the batches of the benchmark. */
#define FULL_LAYER(f, n_, k_, name)                                                                          \
    {OPS_MATMUL, f, 1, n_, k_, .what = name, .full = true},                                                  \
        {OPS_MATMUL, f, 2, n_, k_, .what = name, .full = true},                                              \
        {OPS_MATMUL, f, 4, n_, k_, .what = name, .full = true},                                              \
        {OPS_MATMUL, f, 8, n_, k_, .what = name, .full = true},                                              \
        {OPS_MATMUL, f, 16, n_, k_, .what = name, .full = true},                                             \
        {OPS_MATMUL, f, 32, n_, k_, .what = name, .full = true},                                             \
        {OPS_MATMUL, f, 64, n_, k_, .what = name, .full = true},                                             \
        {OPS_MATMUL, f, 128, n_, k_, .what = name, .full = true},                                            \
    {                                                                                                        \
        OPS_MATMUL, f, 512, n_, k_, .what = name, .full = true                                               \
    }
#define FULL(f)                                                                                              \
    FULL_LAYER(f, 4096, 4096, "q"), FULL_LAYER(f, 1024, 4096, "k"), FULL_LAYER(f, 14336, 4096, "gate"),      \
        FULL_LAYER(f, 4096, 14336, "down")

#define ATTENTION(f, t, d, h, g, seq, ctx, ...)                                                              \
    {                                                                                                        \
        OPS_ATTENTION, f, t, 0, d, h, g, seq, ctx, __VA_ARGS__                                               \
    }

#define LOGITS(t, n_)                                                                                        \
    {OPS_TOPK, OPS_F32, t, n_, 1}, {OPS_TOPK, OPS_F32, t, n_, 9}, {OPS_LOGSUMEXP, OPS_F32, t, n_, 0},        \
        {OPS_ROW_STATS, OPS_F32, t, n_, 0}, {OPS_SOFTMAX, OPS_F32, t, n_, 0}, {OPS_KL, OPS_F32, t, n_, 0},   \
    {                                                                                                        \
        OPS_GATHER_COLS, OPS_F32, t, n_, 0                                                                   \
    }

#define WEIGHT(f, n_, k_)                                                                                    \
    {OPS_QUANTIZE4, f, 0, n_, k_}, {OPS_DEQUANTIZE4, f, 0, n_, k_},                                          \
        {OPS_DEQUANTIZE4, f, 0, n_, k_, .rows = true},                                                       \
    {                                                                                                        \
        OPS_PACK4, f, 0, n_, k_                                                                              \
    }

#define ELEMENTS(op, t, n_)                                                                                  \
    {op, OPS_F16, t, n_, 0}, {op, OPS_BF16, t, n_, 0},                                                       \
    {                                                                                                        \
        op, OPS_F32, t, n_, 0                                                                                \
    }

const ops_case ops_cases[] = {
    ELEMENTS(OPS_RANDOM, 3, 1021),
    {OPS_RANDOM, OPS_BF16, 1, 40, INT64_C(5000000007)},
    ELEMENTS(OPS_NARROW, 3, 1021),
    ELEMENTS(OPS_WIDEN, 3, 1021),
    {OPS_FIND_BAD, OPS_F32, 3, 1021, -1},
    {OPS_FIND_BAD, OPS_F32, 3, 1021, 0},
    {OPS_FIND_BAD, OPS_F16, 3, 1021, 3062},
    {OPS_FIND_BAD, OPS_BF16, 3, 1021, 1500},
    {OPS_ADD, OPS_F32, 7, 129, 0},
    {OPS_SUB, OPS_F32, 7, 129, 0},
    {OPS_MUL, OPS_F32, 7, 129, 0},
    {OPS_DIV, OPS_F32, 7, 129, 0},
    {OPS_SCALE, OPS_F32, 7, 129, 0},
    {OPS_INVERT, OPS_F32, 7, 129, 0},

    WEIGHT(OPS_NF4, 64, 256),
    WEIGHT(OPS_NF4, 48, 320),
    WEIGHT(OPS_NF4, 17, 72),
    WEIGHT(OPS_NF4_DOUBLE, 272, 256),
    WEIGHT(OPS_NF4_F16, 32, 128),
    WEIGHT(OPS_CODEBOOK, 32, 192),
    WEIGHT(OPS_CODEBOOK, 15, 41),

    {OPS_EMBED, OPS_F32, 9, 300, 264},
    {OPS_EMBED, OPS_F16, 9, 300, 264},
    {OPS_EMBED, OPS_BF16, 9, 300, 264},
    {OPS_EMBED, OPS_BF16, 1, 33, 41},
    {OPS_RMSNORM, OPS_F32, 5, 0, 256},
    {OPS_RMSNORM, OPS_F32, 3, 0, 577},
    {OPS_SWIGLU, OPS_F32, 5, 0, 896},
    {OPS_SWIGLU, OPS_F32, 1, 0, 41},
    {OPS_GATHER_ROWS, OPS_F32, 11, 30, 264},
    {OPS_GATHER_ROWS, OPS_F32, 3, 30, 41},
    {OPS_ROPE, OPS_F32, 9, 0, 64, 6, 2},
    {OPS_ROPE, OPS_F32, 1, 0, 128, 8, 2},
    {OPS_KV_WRITE, OPS_F32, 40, 0, 64, 6, 2, 2, 9},
    {OPS_KV_WRITE, OPS_F16, 40, 0, 64, 6, 2, 2, 9},
    {OPS_KV_WRITE, OPS_BF16, 40, 0, 64, 6, 2, 2, 9},

    PRODUCTS(OPS_F32, 64, 96),
    {OPS_MATMUL, OPS_F32, 3, 35, 33, .add = true, .bias = true},
    PRODUCTS(OPS_F16, 64, 96),
    PRODUCTS(OPS_BF16, 64, 96),
    {OPS_MATMUL, OPS_BF16, 5, 33, 72, .add = true, .bias = true},
    {OPS_MATMUL, OPS_F16, 3, 515, 320, .bias = true},
    {OPS_MATMUL, OPS_BF16, 3, 31, 41},
    SCALED(OPS_BF16, 1),
    SCALED(OPS_BF16, 4),
    PRODUCTS(OPS_NF4, 48, 320),
    PRODUCTS(OPS_NF4_DOUBLE, 64, 256, .add = true),
    PRODUCTS(OPS_CODEBOOK, 32, 192, .bias = true),
    PRODUCTS(OPS_NF4_F16, 32, 128),
    {OPS_MATMUL, OPS_NF4, 3, 17, 72, .add = true, .bias = true},
    {OPS_MATMUL, OPS_NF4, 3, 48, 320, .rows = true},
    {OPS_MATMUL, OPS_NF4, 130, 48, 320, .rows = true},
    SCALED(OPS_NF4_DOUBLE, 1),
    SCALED(OPS_NF4_DOUBLE, 4),
    SCALED(OPS_NF4_DOUBLE, 20),

    ATTENTION(OPS_F32, 1, 64, 6, 2, 3, 200),
    ATTENTION(OPS_F32, 20, 64, 6, 2, 3, 0),
    ATTENTION(OPS_F32, 5, 40, 3, 3, 2, 130),
    ATTENTION(OPS_BF16, 1, 64, 6, 2, 3, 200),
    ATTENTION(OPS_BF16, 1, 128, 8, 2, 2, 300),
    ATTENTION(OPS_BF16, 70, 64, 6, 2, 2, 0),
    ATTENTION(OPS_BF16, 40, 128, 4, 1, 2, 60),
    ATTENTION(OPS_F16, 33, 64, 4, 4, 3, 10),
    ATTENTION(OPS_F16, 1, 16, 4, 2, 5, 40),

    LOGITS(4, 1000),
    LOGITS(2, 4099),
    {OPS_TOPK, OPS_F32, 2, 50, 50},

    /* of a real model's size */
    {OPS_RANDOM, OPS_BF16, 4096, 4096, 0, .full = true},
    {OPS_QUANTIZE4, OPS_NF4, 0, 14336, 4096, .full = true, .what = "gate"},
    {OPS_DEQUANTIZE4, OPS_NF4_DOUBLE, 0, 14336, 4096, .full = true, .what = "gate"},
    {OPS_PACK4, OPS_NF4, 0, 14336, 4096, .full = true, .what = "gate"},
    {OPS_EMBED, OPS_BF16, 512, 128256, 4096, .full = true},
    {OPS_RMSNORM, OPS_F32, 1, 0, 4096, .full = true},
    {OPS_RMSNORM, OPS_F32, 512, 0, 4096, .full = true},
    {OPS_SWIGLU, OPS_F32, 512, 0, 14336, .full = true},
    {OPS_ROPE, OPS_F32, 512, 0, 128, 32, 8, .full = true},
    FULL(OPS_BF16),
    FULL(OPS_F16),
    FULL(OPS_NF4_DOUBLE),
    {OPS_MATMUL, OPS_BF16, 1, 128256, 4096, .what = "head", .full = true},
    {OPS_MATMUL, OPS_BF16, 32, 128256, 4096, .what = "head", .full = true},
    {OPS_MATMUL, OPS_F32, 32, 4096, 4096, .what = "q", .full = true},
    ATTENTION(OPS_BF16, 1, 128, 32, 8, 1, 512, .full = true),
    ATTENTION(OPS_BF16, 1, 128, 32, 8, 8, 512, .full = true),
    ATTENTION(OPS_BF16, 1, 128, 32, 8, 32, 512, .full = true),
    ATTENTION(OPS_BF16, 512, 128, 32, 8, 1, 0, .full = true),
    ATTENTION(OPS_BF16, 512, 128, 32, 8, 4, 0, .full = true),
    ATTENTION(OPS_F16, 128, 64, 32, 8, 4, 0, .full = true),
    {OPS_TOPK, OPS_F32, 32, 128256, 50, .full = true},
    {OPS_LOGSUMEXP, OPS_F32, 32, 128256, 0, .full = true},
    {OPS_ROW_STATS, OPS_F32, 32, 128256, 0, .full = true},
    {OPS_SOFTMAX, OPS_F32, 32, 128256, 0, .full = true},
    {OPS_KL, OPS_F32, 32, 128256, 0, .full = true},
};
const size_t ops_case_count = COUNT(ops_cases);

static const char *const KINDS[] = {
    "embed",       "rmsnorm",     "matmul", "rope",      "kv_write",    "attention", "swiglu",
    "gather_rows", "gather_cols", "topk",   "logsumexp", "row_stats",   "softmax",   "kl",
    "add",         "sub",         "mul",    "div",       "scale",       "invert",    "narrow",
    "widen",       "find_bad",    "random", "quantize4", "dequantize4", "pack4"};
static const char *const FORMATS[] = {"f32", "f16", "bf16", "nf4", "nf4+dq", "codebook", "nf4/f16"};

void ops_case_name(const ops_case *c, char *out, size_t size)
{
    int at = snprintf(out, size, "%s %s", KINDS[c->kind], FORMATS[c->format]);
    if (c->kind == OPS_ATTENTION || c->kind == OPS_KV_WRITE)
        at += snprintf(out + at, size - (size_t)at, " %d/%d heads of %d, %dx%d after %d", c->heads,
                       c->kv_heads, (int)c->k, c->sequences, (int)c->tokens, (int)c->context);
    else
        at += snprintf(out + at, size - (size_t)at, " n=%lld k=%lld tokens=%lld", (long long)c->n,
                       (long long)c->k, (long long)c->tokens);
    snprintf(out + at, size - (size_t)at, "%s%s%s%s%s", c->what ? " " : "", c->what ? c->what : "",
             c->add ? " add" : "", c->bias ? " bias" : "", c->rows ? " rows" : "");
}

/* A 16-bit product rounds its activations once: relative errors up to 2^-9 (BF16) or 2^-12 (F16), which are
 * 1.3e-6 and 2e-8 as mean squares at most. Attention rounds queries, keys, values and probabilities. float32
 * sums differ by their order, and tensor cores' shorter floats (2^-11) would show. */
ops_measure ops_case_measure(const ops_case *c, double *bound)
{
    *bound = 0;
    switch (c->kind) {
    case OPS_MATMUL:
        *bound = c->format == OPS_F32                               ? 1e-11
                 : c->format == OPS_F16 || c->format == OPS_NF4_F16 ? 2e-7
                                                                    : 1e-5;
        return OPS_NMSE;
    case OPS_ATTENTION:
        *bound = c->format == OPS_F32 ? 1e-11 : c->format == OPS_F16 ? 1e-6 : 5e-5;
        return OPS_NMSE;
    case OPS_RMSNORM:
    case OPS_SWIGLU:
    case OPS_ROPE:
    case OPS_SOFTMAX:
        *bound = 1e-12;
        return OPS_NMSE;
    case OPS_LOGSUMEXP:
    case OPS_ROW_STATS:
    case OPS_KL:
        *bound = 1e-11;
        return OPS_RELATIVE;
    default:
        return OPS_EXACT;
    }
}

int64_t ops_case_tokens(const ops_case *c, int64_t *attended)
{
    int64_t tokens = 0, read = 0;
    for (int s = 0; s < c->sequences; s++) {
        int64_t fresh = c->tokens - 3 * s > 1 ? c->tokens - 3 * s : 1;
        int64_t before = c->context - 7 * s > 0 ? c->context - 7 * s : 0;
        tokens += fresh;
        read += fresh * before + fresh * (fresh + 1) / 2;
    }
    if (attended) *attended = read;
    return tokens;
}

static double weight_bytes(const ops_case *c)
{
    double count = (double)c->n * (double)c->k;
    switch (c->format) {
    case OPS_F32:
        return 4 * count;
    case OPS_F16:
    case OPS_BF16:
        return 2 * count;
    case OPS_NF4_DOUBLE:
        return count / 2 + count / 64 + 4 * count / (64 * 256);
    default:
        return count / 2 + 4 * count / 64;
    }
}

double ops_case_bytes(const ops_case *c)
{
    double t = (double)c->tokens, n = (double)c->n, k = (double)c->k;
    int64_t fresh;
    switch (c->kind) {
    case OPS_MATMUL:
        return weight_bytes(c) + 4 * t * (k + n);
    case OPS_QUANTIZE4:
        return 2 * n * k + weight_bytes(c);
    case OPS_DEQUANTIZE4:
        return weight_bytes(c) + 6 * n * k;
    case OPS_PACK4:
        return 2 * n * k; /* twice read and written */
    case OPS_ATTENTION:
        fresh = ops_case_tokens(c, NULL);
        /* keys and values of a sequence once; queries and results in float32 */
        return (double)(c->sequences * c->context + fresh) * c->kv_heads * k * 2 *
                   (c->format == OPS_F32 ? 4 : 2) +
               8.0 * (double)fresh * c->heads * k;
    case OPS_EMBED:
        return t * k * ((c->format == OPS_F32 ? 4 : 2) + 4);
    case OPS_RMSNORM:
        return 8 * t * k;
    case OPS_SWIGLU:
        return 12 * t * k;
    case OPS_ROPE:
        return 8 * t * k * c->heads;
    case OPS_SOFTMAX:
    case OPS_KL:
        return 8 * t * n;
    case OPS_RANDOM:
        return 2 * t * n;
    default:
        return 4 * t * n;
    }
}

double ops_case_flops(const ops_case *c)
{
    int64_t attended;
    switch (c->kind) {
    case OPS_MATMUL:
        return 2.0 * (double)c->n * (double)c->k * (double)c->tokens;
    case OPS_ATTENTION:
        ops_case_tokens(c, &attended);
        return 4.0 * (double)attended * c->heads * (double)c->k;
    default:
        return 0;
    }
}
