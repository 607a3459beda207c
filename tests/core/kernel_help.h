/* What the kernel tests share: numbers, the instruction sets to try, and the product in plain C. */
#ifndef KERNEL_HELP_H
#define KERNEL_HELP_H

#include "qk.h"
#include "qk_half.h"
#include "qk_nf4.h"

#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* Runs the block once for every instruction set of this processor, as `cpu`. */
#define FOR_EACH_CPU(cpu)                                                                                    \
    for (int isa_index_ = 0; qk_cpu_name(isa_index_); isa_index_++)                                          \
        for (const qk_cpu *cpu = qk_cpu_select(qk_cpu_name(isa_index_), NULL); cpu; cpu = NULL)

static uint64_t random_state = 0x9e3779b97f4a7c15u;

/* xorshift64* (Vigna 2016): the same numbers on every run. */
static inline uint32_t random_u32(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (uint32_t)(random_state * 0x2545f4914f6cdd1du >> 32);
}

/* Uniform in [-1, 1). */
static inline float random_unit(void)
{
    return (float)(int32_t)random_u32() * 0x1p-31f;
}

static inline void *new_bytes(size_t bytes)
{
    void *p = aligned_alloc(64, (bytes + 127) / 64 * 64);
    assert_non_null(p);
    return p;
}

static inline float *new_floats(size_t n)
{
    float *p = new_bytes(n * sizeof *p);
    for (size_t i = 0; i < n; i++) p[i] = random_unit();
    return p;
}

static inline size_t format_size(qk_format f)
{
    return f == QK_F32 ? 4 : 2;
}

/* A random matrix; free .data and .absmax. */
static inline qk_matrix new_matrix(qk_format format, int64_t n, int64_t k, int block, qk_format round_to)
{
    qk_matrix w = {.format = format, .n = n, .k = k, .block = block, .round_to = round_to};
    size_t count = (size_t)(n * k);
    if (format == QK_4BIT) {
        uint8_t *packed = new_bytes(count / 2 + 1);
        for (size_t i = 0; i < (count + 1) / 2; i++) packed[i] = (uint8_t)random_u32();
        w.data = packed;
        w.absmax = new_floats((count + (size_t)block - 1) / (size_t)block);
        memcpy(w.code, qk_nf4_code, sizeof w.code);
        return w;
    }
    char *p = new_bytes(count * format_size(format));
    for (size_t i = 0; i < count; i++) {
        float f = random_unit();
        uint16_t h = format == QK_BF16 ? qk_f32_to_bf16(f) : qk_f32_to_f16(f);
        memcpy(p + i * format_size(format), format == QK_F32 ? (void *)&f : (void *)&h, format_size(format));
    }
    w.data = p;
    return w;
}

static inline void free_matrix(qk_matrix *w)
{
    free((void *)(uintptr_t)w->data);
    free((void *)(uintptr_t)w->absmax);
}

/* Element i of the flattened matrix as float32. */
static inline float weight(const qk_matrix *w, int64_t i)
{
    switch (w->format) {
    case QK_F32:
        return ((const float *)w->data)[i];
    case QK_F16:
        return qk_f16_to_f32(((const uint16_t *)w->data)[i]);
    case QK_BF16:
        return qk_bf16_to_f32(((const uint16_t *)w->data)[i]);
    default:
        break;
    }
    float v = w->code[qk_nibble(w->data, i)] * w->absmax[i / w->block];
    return w->round_to == QK_BF16 ? qk_round_bf16(v) : w->round_to == QK_F16 ? qk_round_f16(v) : v;
}

/* The order of sums that qk.h promises, in plain C. */
static inline float reference_dot(const qk_matrix *w, int64_t row, const float *x)
{
    float lane[16] = {0};
    int64_t padded = (w->k + 15) / 16 * 16;
    for (int64_t i = 0; i < padded; i++) {
        float a = i < w->k ? weight(w, row * w->k + i) : 0, b = i < w->k ? x[i] : 0;
        lane[i % 16] = fmaf(a, b, lane[i % 16]);
    }
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) lane[l] += lane[l + half];
    return lane[0];
}

static inline void assert_same_bits(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (qk_bits(a[i]) != qk_bits(b[i])) fail_msg("element %zu: %.9g and %.9g", i, a[i], b[i]);
    }
}

#endif
