/* Cases of attention on the device, and what their results must be. */
#ifndef ATTENTION_HELP_H
#define ATTENTION_HELP_H

#include "cuda_help.h"

/* Adjacent tokens of one sequence: positions from .. from + count - 1. */
typedef struct {
    int from, count;
} span;

/* A packed batch. Slots that no token sees hold NaN. */
typedef struct {
    int heads, kv_heads, d;
    qk_format kv;
    int64_t tokens, slots, longest;
    float *q, *k, *v;     /* host; k, v as the cache holds them, widened */
    int32_t *start, *pos; /* host */
    float *dev_q;
    void *dev_k, *dev_v;
    int32_t *dev_start, *dev_pos;
} attention_case;

static inline size_t case_size(const attention_case *c)
{
    return (size_t)(c->tokens * c->heads * c->d);
}

/* Rounds x to the cache's format in place; returns the device's copy. */
static inline void *put_cache(qk_format f, float *x, size_t n)
{
    const qk_cpu *cpu = qk_cpu_select(NULL, NULL);
    void *bits = new_bytes(n * format_size(f));
    cpu->convert(QK_F32, x, f, bits, 0, (int64_t)n);
    cpu->convert(f, bits, QK_F32, x, 0, (int64_t)n);
    void *device = cuda_put(bits, n * format_size(f));
    free(bits);
    return device;
}

/* Copies what the host holds to the device (again). */
static inline void put_case(attention_case *c)
{
    size_t cache = (size_t)(c->kv_heads * c->slots * c->d);
    c->dev_q = cuda_put(c->q, case_size(c) * sizeof(float));
    c->dev_k = put_cache(c->kv, c->k, cache);
    c->dev_v = put_cache(c->kv, c->v, cache);
    c->dev_start = cuda_put(c->start, (size_t)c->tokens * 4);
    c->dev_pos = cuda_put(c->pos, (size_t)c->tokens * 4);
}

/* A case on the host alone: put_case follows. */
static inline attention_case new_attention(int heads, int kv_heads, int d, qk_format kv, const span *spans,
                                           int count)
{
    attention_case c = {.heads = heads, .kv_heads = kv_heads, .d = d, .kv = kv, .slots = 3};
    for (int s = 0; s < count; s++) c.tokens += spans[s].count;
    c.start = new_bytes((size_t)c.tokens * 4);
    c.pos = new_bytes((size_t)c.tokens * 4);
    for (int64_t s = 0, t = 0; s < count; s++) {
        for (int i = 0; i < spans[s].count; i++, t++) {
            c.start[t] = (int32_t)c.slots;
            c.pos[t] = spans[s].from + i;
            if (c.pos[t] >= c.longest) c.longest = c.pos[t] + 1;
        }
        c.slots += spans[s].from + spans[s].count + 2;
    }
    c.q = new_floats(case_size(&c));
    for (size_t i = 0; i < case_size(&c); i++) c.q[i] *= 4;
    c.k = new_floats((size_t)(kv_heads * c.slots * d));
    c.v = new_floats((size_t)(kv_heads * c.slots * d));
    for (int64_t slot = 0; slot < c.slots; slot++) {
        bool used = false;
        for (int64_t t = 0; t < c.tokens; t++) used |= slot >= c.start[t] && slot <= c.start[t] + c.pos[t];
        for (int64_t h = 0; h < kv_heads && !used; h++)
            for (int i = 0; i < d; i++)
                c.k[(h * c.slots + slot) * d + i] = c.v[(h * c.slots + slot) * d + i] = NAN;
    }
    return c;
}

static inline void free_attention(attention_case *c)
{
    free(c->q);
    free(c->k);
    free(c->v);
    free(c->start);
    free(c->pos);
    cuda_free_all();
}

static inline qk_cuda_attention arguments(const attention_case *c)
{
    return (qk_cuda_attention){.q = c->dev_q,
                               .k = c->dev_k,
                               .v = c->dev_v,
                               .kv = c->kv,
                               .start = c->dev_start,
                               .pos = c->dev_pos,
                               .heads = c->heads,
                               .kv_heads = c->kv_heads,
                               .d = c->d,
                               .slots = c->slots,
                               .tokens = c->tokens,
                               .longest = c->longest};
}

/* Scratch as its owner must hand it over the first time. */
static inline void *new_scratch(int64_t tokens, int heads, int d, int64_t longest)
{
    size_t bytes = qk_cuda_attention_bytes(tokens, heads, d, longest);
    void *p = cuda_new(bytes);
    CUDA_OK(cudaMemset(p, 0, bytes));
    return p;
}

typedef int (*attention_kernel)(qk_stream stream, const qk_cuda_attention *a);

/* y [tokens, heads * d] on the host: free() it. */
static inline float *run_attention(attention_kernel kernel, const attention_case *c, void *scratch)
{
    qk_cuda_attention a = arguments(c);
    a.y = cuda_new(case_size(c) * sizeof(float));
    a.scratch = scratch;
    CUDA_RUN(kernel(NULL, &a));
    float *y = cuda_copy(a.y, case_size(c) * sizeof(float));
    cuda_free(a.y);
    return y;
}

/* float64 attention of the cache as it is: y, and the same sum of |values|; both [d]. Returns the sum of
 * weights, the largest being 1. */
static inline double exact_attention(const attention_case *c, const float *q, int64_t t, int h, double *y,
                                     double *size)
{
    const int d = c->d;
    const int64_t first = (h / (c->heads / c->kv_heads)) * c->slots + c->start[t];
    double *p = malloc(((size_t)c->pos[t] + 1) * sizeof *p), max = -INFINITY, sum = 0;
    for (int j = 0; j <= c->pos[t]; j++) {
        p[j] = 0;
        for (int i = 0; i < d; i++) p[j] += (double)q[i] * c->k[(first + j) * d + i];
        p[j] /= sqrt(d);
        if (p[j] > max) max = p[j];
    }
    for (int i = 0; i < d; i++) y[i] = size[i] = 0;
    for (int j = 0; j <= c->pos[t]; j++) {
        p[j] = exp(p[j] - max);
        sum += p[j];
        for (int i = 0; i < d; i++) {
            y[i] += p[j] * c->v[(first + j) * d + i];
            size[i] += p[j] * fabs((double)c->v[(first + j) * d + i]);
        }
    }
    for (int i = 0; i < d; i++) {
        y[i] /= sum;
        size[i] /= sum;
    }
    free(p);
    return sum;
}

/* The CPU kernel's result: free() it. */
static inline float *cpu_attention(const attention_case *c)
{
    float *y = new_floats(case_size(c));
    void *scratch = new_bytes(QK_ATTENTION_SCRATCH);
    qk_attention a = {.q = c->q,
                      .k = c->k,
                      .v = c->v,
                      .start = c->start,
                      .pos = c->pos,
                      .y = y,
                      .heads = c->heads,
                      .kv_heads = c->kv_heads,
                      .d = c->d,
                      .slots = c->slots};
    for (int h = 0; h < c->kv_heads; h++) {
        qk_cpu_select(NULL, NULL)->attention(&a, 0, c->tokens, h, scratch);
    }
    free(scratch);
    return y;
}

/* The 16-bit output in every layout: each number of y rounded once, at its place; zeros in the padding. */
static inline void check_16bit(attention_kernel kernel, const attention_case *c, const float *y,
                               void *scratch)
{
    const int slabs[] = {0, QK_SLAB_16BIT, QK_SLAB_4BIT};
    const int64_t width = (int64_t)c->heads * c->d;
    for (int i = 0; i < 6; i++) {
        const int slab = slabs[i / 2];
        qk_cuda_attention a = arguments(c);
        a.y_format = i % 2 ? QK_F16 : QK_BF16;
        a.slab = slab;
        a.scratch = scratch;
        int64_t count = slab ? qk_fragment_count(c->tokens, width, slab) : c->tokens * width;
        int64_t rows = slab ? (c->tokens + 7) / 8 * 8 : c->tokens;
        int64_t columns = slab ? (width + slab - 1) / slab * slab : width;
        assert_int_equal(rows * columns, count);
        a.y16 = cuda_new((size_t)count * 2);
        CUDA_RUN(kernel(NULL, &a));
        uint16_t *got = cuda_copy(a.y16, (size_t)count * 2);
        for (int64_t t = 0; t < rows; t++)
            for (int64_t j = 0; j < columns; j++) {
                float x = t < c->tokens && j < width ? y[t * width + j] : 0;
                uint16_t expect = a.y_format == QK_F16 ? qk_f32_to_f16(x) : qk_f32_to_bf16(x);
                int64_t at = slab ? qk_fragment_index(t, j, width, slab) : t * width + j;
                if (got[at] != expect)
                    fail_msg("slab %d, row %d, column %d: %04x, not %04x", slab, (int)t, (int)j, got[at],
                             expect);
            }
        free(got);
        cuda_free(a.y16);
    }
}

#endif
