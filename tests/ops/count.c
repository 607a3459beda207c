/* One call of one kernel on a fixed case, for an instruction counter: figures that a later change can be
 * compared with on any machine.
 *
 *   count KERNEL     runs it once, within measured_call(); without one lists the kernels
 *
 *   QLUA_CPU=avx2 valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect=measured_call \
 *     build/count matmul_bf16
 *
 * Inputs are the same numbers on every run. valgrind has no AVX-512. scripts/bench_instructions runs them
 * all. */
#include "cpu_probe.h"
#include "qk_nf4.h"
#include "qk_random.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    ROWS = 48, /* outputs: a strip */
    INPUTS = 2048,
    PROMPT = 128,
    CONTEXT = 4096,
    HEADS = 4, /* query heads of one cache head */
    HEAD_DIM = 64,
};

typedef struct {
    const qk_cpu *qk;
    qk_matrix w;
    qk_attention attention;
    int64_t tokens;
    const float *x;
    float *y;
    float *order; /* x as products read it */
    void *scratch;
    uint8_t *packed;
    float *absmax;
} call;

typedef void kernel_fn(const call *c);

static void *room(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    if (!p) abort();
    memset(p, 0, bytes);
    return p;
}

static float *numbers(uint64_t seed, int64_t n)
{
    float *v = room((size_t)n * sizeof *v);
    for (int64_t i = 0; i < n; i++) v[i] = qk_random_normal(seed, (uint64_t)i);
    return v;
}

static void run_matmul(const call *c)
{
    const bool pack = c->qk->matmul_packed(&c->w, c->tokens) > 0;
    if (pack) c->qk->matmul_pack(&c->w, c->x, c->tokens, 0, c->tokens, c->order);
    c->qk->matmul(&c->w, NULL, pack ? c->order : c->x, c->tokens, false, c->y, 0, c->w.n, c->scratch);
}

static void run_attention(const call *c)
{
    c->qk->attention(&c->attention, 0, c->tokens, 0, c->scratch);
}

static void run_rmsnorm(const call *c)
{
    c->qk->rmsnorm(c->x, c->x + INPUTS, 1e-5f, INPUTS, c->y, 0, 1);
}

static void run_swiglu(const call *c)
{
    c->qk->swiglu(c->x, c->x + INPUTS, c->y, 0, INPUTS);
}

static void run_quantize(const call *c)
{
    float t[15];
    memcpy(t, qk_nf4_threshold_bits, sizeof t);
    c->qk->quantize4(QK_F32, c->x, (int64_t)ROWS * INPUTS, 64, t, qk_nf4_order, 7, c->packed, c->absmax, 0,
                     (int64_t)ROWS * INPUTS / 64);
}

/* Quantizes the weights of `c` for a 4-bit product. */
static void make_4bit(call *c)
{
    run_quantize(c);
    c->w = (qk_matrix){.format = QK_4BIT,
                       .n = ROWS,
                       .k = INPUTS,
                       .data = c->packed,
                       .absmax = c->absmax,
                       .block = 64,
                       .round_to = QK_BF16};
    memcpy(c->w.code, qk_nf4_code, sizeof c->w.code);
}

static const struct {
    const char *name;
    kernel_fn *run;
    qk_format format;
    int64_t tokens;
} kernels[] = {
    {"matmul_f32", run_matmul, QK_F32, 1},
    {"matmul_f16", run_matmul, QK_F16, 1},
    {"matmul_bf16", run_matmul, QK_BF16, 1},
    {"matmul_nf4", run_matmul, QK_4BIT, 1},
    {"matmul_bf16_8", run_matmul, QK_BF16, 8},
    {"matmul_nf4_8", run_matmul, QK_4BIT, 8},
    {"matmul_bf16_128", run_matmul, QK_BF16, PROMPT},
    {"matmul_nf4_128", run_matmul, QK_4BIT, PROMPT},
    {"attention_decode", run_attention, QK_F32, 1},
    {"attention_prompt", run_attention, QK_F32, 16},
    {"rmsnorm", run_rmsnorm, QK_F32, 1},
    {"swiglu", run_swiglu, QK_F32, 1},
    {"quantize_nf4", run_quantize, QK_F32, 1},
};

/* What --toggle-collect names. */
__attribute__((noinline, noclone)) void measured_call(kernel_fn *run, const call *c);
void measured_call(kernel_fn *run, const call *c)
{
    run(c);
    __asm__ volatile("" ::: "memory"); /* no tail call: the counter stops where this returns */
}

static void make_attention(call *c)
{
    int32_t *start = room((size_t)c->tokens * sizeof *start), *pos = room((size_t)c->tokens * sizeof *pos);
    for (int64_t t = 0; t < c->tokens; t++) pos[t] = (int32_t)(CONTEXT - c->tokens + t);
    c->attention = (qk_attention){.q = c->x,
                                  .k = numbers(3, CONTEXT * HEAD_DIM),
                                  .v = numbers(4, CONTEXT * HEAD_DIM),
                                  .start = start,
                                  .pos = pos,
                                  .y = c->y,
                                  .heads = HEADS,
                                  .kv_heads = 1,
                                  .d = HEAD_DIM,
                                  .slots = CONTEXT};
}

static void make_dense(call *c, qk_format format)
{
    void *data = room((size_t)(ROWS * INPUTS) * sizeof(float));
    if (format == QK_F32)
        memcpy(data, c->x, (size_t)(ROWS * INPUTS) * sizeof(float));
    else
        c->qk->convert(QK_F32, c->x, format, data, 0, ROWS * INPUTS);
    c->w = (qk_matrix){.format = format, .n = ROWS, .k = INPUTS, .data = data};
}

int main(int argc, char **argv)
{
    const int count = (int)(sizeof kernels / sizeof *kernels);
    int i = 0;
    if (argc < 2) {
        for (; i < count; i++) puts(kernels[i].name);
        return 0;
    }
    while (i < count && strcmp(argv[1], kernels[i].name) != 0) i++;
    if (i == count) {
        fprintf(stderr, "count: no kernel %s\n", argv[1]);
        return 2;
    }
    call c = {.tokens = kernels[i].tokens};
    ql_err err;
    if (ql_cpu_select(&c.qk, &err) != QL_OK) {
        fprintf(stderr, "count: %s\n", err.message);
        return 1;
    }
    c.x = numbers(1, (int64_t)PROMPT * INPUTS);
    c.y = room((size_t)(PROMPT * INPUTS) * sizeof(float));
    c.packed = room((size_t)(ROWS * INPUTS / 2));
    c.absmax = room((size_t)(ROWS * INPUTS / 64) * sizeof(float));
    if (kernels[i].format == QK_4BIT)
        make_4bit(&c);
    else
        make_dense(&c, kernels[i].format);
    make_attention(&c);
    c.order = room(c.qk->matmul_packed(&c.w, c.tokens) + 64);
    size_t bytes = c.qk->matmul_scratch(&c.w, c.tokens);
    c.scratch = room(bytes > QK_ATTENTION_SCRATCH ? bytes : QK_ATTENTION_SCRATCH);
    measured_call(kernels[i].run, &c);
    printf("%s %s\n", kernels[i].name, c.qk->isa);
    return 0;
}
