/* y = x W^T for few activation rows (decode): weights are decoded in registers and used at once, several rows
 * a pass so that memory and not the latency of the chain is the limit. */
#include "ops.h"

enum {
    MOST_ROWS = V16_DIRECT_ROWS,
    AHEAD = 8192, /* bytes, at least, that are prefetched ahead */
};

/* The rows of a group are read side by side, in streams that end every few KiB. Prefetching the next group in
 * order of address, to the second-level cache, keeps memory reading one long stream: 18 to 27 GB/s on a Zen 4
 * core with bfloat16 rows of 4 KiB, where plain reading gives 33. */
QK_INLINE const char *prefetch_start(const qk_matrix *w, int64_t n, int rows, int64_t row_bytes)
{
    int64_t group = rows * row_bytes;
    return (const char *)w->data + n * row_bytes + (group > AHEAD ? group : AHEAD);
}

/* Decode: DR dense rows from row `n` against M activation rows. `last` is the last row there is: a group that
 * would pass it repeats it. acc [M][16][16], written at rows [at, at + DR). */
QK_INLINE void direct_dense(const qk_matrix *w, qk_format format, int M, int64_t n, int64_t last,
                            const float *x, float *acc, int at)
{
    const int DR = V16_DIRECT_ROWS;
    const int64_t k = w->k, size = format == QK_F32 ? 4 : 2;
    const char *row[MOST_ROWS];
    v16 sum[MOST_ROWS][V16_DIRECT_COLS];
    QK_UNROLL for (int r = 0; r < DR; r++)
    {
        int64_t index = n + r < last ? n + r : last;
        row[r] = (const char *)w->data + index * k * size;
        QK_UNROLL for (int m = 0; m < M; m++) sum[r][m] = v16_zero();
    }
    const char *next = prefetch_start(w, n, DR, k * size);
    int64_t i = 0;
    for (; i + 16 <= k; i += 16, next += DR * 16 * size) {
        QK_UNROLL for (int b = 0; b < DR * 16 * size; b += 64) __builtin_prefetch(next + b, 0, 2);
        v16 v[MOST_ROWS];
        QK_UNROLL for (int r = 0; r < DR; r++)
        {
            v[r] = v16_load_as(format, row[r], i);
        }
        QK_UNROLL for (int m = 0; m < M; m++)
        {
            v16 a = v16_load(x + m * k + i);
            QK_UNROLL for (int r = 0; r < DR; r++) sum[r][m] = v16_fma(v[r], a, sum[r][m]);
        }
    }
    if (i < k) {
        int tail = (int)(k - i);
        QK_UNROLL for (int r = 0; r < DR; r++)
        {
            v16 v = v16_load_as_n(format, row[r], i, tail);
            QK_UNROLL for (int m = 0; m < M; m++)
            {
                sum[r][m] = v16_fma(v, v16_load_n(x + m * k + i, tail), sum[r][m]);
            }
        }
    }
    QK_UNROLL for (int r = 0; r < DR; r++)
    {
        QK_UNROLL for (int m = 0; m < M; m++) v16_store(acc + (m * 16 + at + r) * 16, sum[r][m]);
    }
}

#ifndef V16_HAS_PAIR
QK_INLINE v16 lut4(const uint8_t *p, v16 lut, bool vbmi)
{
#ifdef V16_HAS_VBMI
    if (vbmi) return v16_lut4_vbmi(p, lut);
#endif
    (void)vbmi;
    return v16_lut4(p, lut);
}

/* The same for 4-bit rows, when k is a multiple of 16. */
QK_INLINE void direct_4bit(const qk_matrix *w, bool vbmi, bool finite, int M, int64_t n, int64_t last,
                           const float *x, float *acc, int at)
{
    const int DR = V16_DIRECT_ROWS;
    const int64_t k = w->k, run = qk_aligned_run(w);
    const int shift = __builtin_ctz((unsigned)w->block);
    const v16 code = v16_load(w->code);
    int64_t first[MOST_ROWS]; /* flattened index of the row */
    const uint8_t *row[MOST_ROWS];
    v16 sum[MOST_ROWS][V16_DIRECT_COLS];
    QK_UNROLL for (int r = 0; r < DR; r++)
    {
        first[r] = (n + r < last ? n + r : last) * k;
        row[r] = (const uint8_t *)w->data + first[r] / 2;
        QK_UNROLL for (int m = 0; m < M; m++) sum[r][m] = v16_zero();
    }
    const char *next = prefetch_start(w, n, DR, k / 2);
    for (int64_t i = 0; i < k; i += run) {
        v16 lut[MOST_ROWS];
        QK_UNROLL for (int r = 0; r < DR; r++)
        {
            lut[r] = qk_block_lut(w, code, (first[r] + i) >> shift, finite);
        }
        for (int64_t j = i; j < i + run; j += 16, next += DR * 8) {
            v16 v[MOST_ROWS];
            if (j % (128 / DR) == 0) __builtin_prefetch(next, 0, 2);
            QK_UNROLL for (int r = 0; r < DR; r++) v[r] = lut4(row[r] + j / 2, lut[r], vbmi);
            QK_UNROLL for (int m = 0; m < M; m++)
            {
                v16 a = v16_load(x + m * k + j);
                QK_UNROLL for (int r = 0; r < DR; r++) sum[r][m] = v16_fma(v[r], a, sum[r][m]);
            }
        }
    }
    QK_UNROLL for (int r = 0; r < DR; r++)
    {
        QK_UNROLL for (int m = 0; m < M; m++) v16_store(acc + (m * 16 + at + r) * 16, sum[r][m]);
    }
}

#else
#include "pair_avx2.h"

QK_INLINE void direct_4bit(const qk_matrix *w, pair_room *room, int M, int64_t n, int64_t last,
                           const float *x, float *acc)
{
    pair_pass_any(w, w->block, M, n, last, 0, w->k, x, prefetch_start(w, n, 2, w->k / 2), room, acc);
}
#endif

QK_INLINE void direct_rows(const qk_matrix *w, qk_format format, bool vbmi, int M, const float *bias,
                           const float *x, bool add, float *y, int64_t n0, int64_t n1, void *scratch)
{
    float acc[V16_DIRECT_COLS * 256] __attribute__((aligned(64)));
#ifdef V16_HAS_PAIR
    pair_room *room = scratch;
    (void)vbmi;
    if (format == QK_4BIT) {
        float *ordered = (float *)(room + 1);
        pair_prepare(w, n0, n1, room);
        pair_order(w->round_to, x, M * w->k, ordered);
        x = ordered;
    }
#else
    const bool finite = format == QK_4BIT && QK_NAME(is_finite)(w, n0, n1);
    (void)scratch;
#endif
    for (int64_t n = n0; n < n1; n += 16) {
        int rows = n1 - n < 16 ? (int)(n1 - n) : 16;
        for (int at = 0; at < rows; at += V16_DIRECT_ROWS) {
            if (format != QK_4BIT)
                direct_dense(w, format, M, n + at, n1 - 1, x, acc, at);
            else
#ifdef V16_HAS_PAIR
                direct_4bit(w, room, M, n + at, n1 - 1, x, acc + at * 16);
#else
                direct_4bit(w, vbmi, finite, M, n + at, n1 - 1, x, acc, at);
#endif
        }
        for (int m = 0; m < M; m++) {
            qk_finish(acc + m * 256, bias ? bias + n : NULL, add, y + m * w->n + n, rows);
        }
    }
}

typedef void direct_fn(const qk_matrix *w, const float *bias, const float *x, bool add, float *y, int64_t n0,
                       int64_t n1, void *scratch);

#define DIRECT(name, format, vbmi, M)                                                                        \
    static                                                                                                   \
        __attribute__((noinline)) void name##_##M(const qk_matrix *w, const float *bias, const float *x,     \
                                                  bool add, float *y, int64_t n0, int64_t n1, void *scratch) \
    {                                                                                                        \
        direct_rows(w, format, vbmi, M, bias, x, add, y, n0, n1, scratch);                                   \
    }
#define DIRECT_2(name, format, vbmi)                                                                         \
    DIRECT(name, format, vbmi, 1)                                                                            \
    DIRECT(name, format, vbmi, 2)                                                                            \
    static direct_fn *const name[] = {name##_1, name##_2};
#if V16_DIRECT_COLS == 4
#define DIRECT_4BIT(name, vbmi)                                                                              \
    DIRECT(name, QK_4BIT, vbmi, 1)                                                                           \
    DIRECT(name, QK_4BIT, vbmi, 2)                                                                           \
    DIRECT(name, QK_4BIT, vbmi, 3)                                                                           \
    DIRECT(name, QK_4BIT, vbmi, 4)                                                                           \
    static direct_fn *const name[] = {name##_1, name##_2, name##_3, name##_4};
#else
#define DIRECT_4BIT(name, vbmi) DIRECT_2(name, QK_4BIT, vbmi)
#endif

DIRECT_2(direct_f32, QK_F32, false)
DIRECT_2(direct_f16, QK_F16, false)
DIRECT_2(direct_bf16, QK_BF16, false)
DIRECT_4BIT(direct_nf4, false)
#ifdef V16_HAS_VBMI
DIRECT_4BIT(direct_vbmi, true)
#endif

static direct_fn *direct_kernel(qk_format format, int64_t m)
{
    switch (format) {
    case QK_F16:
        return direct_f16[m - 1];
    case QK_BF16:
        return direct_bf16[m - 1];
    case QK_4BIT:
        break;
    default:
        return direct_f32[m - 1];
    }
#ifdef V16_HAS_VBMI
    if (__builtin_cpu_supports("avx512vbmi")) return direct_vbmi[m - 1];
#endif
    return direct_nf4[m - 1];
}

size_t QK_NAME(direct_scratch)(const qk_matrix *w, int64_t m)
{
#ifdef V16_HAS_PAIR
    if (w->format == QK_4BIT) return sizeof(pair_room) + (size_t)(m * w->k) * sizeof(float);
#endif
    (void)w, (void)m;
    return 0;
}

void QK_NAME(direct)(const qk_matrix *w, const float *bias, const float *x, int64_t m, bool add, float *y,
                     int64_t n0, int64_t n1, void *scratch)
{
    direct_kernel(w->format, m)(w, bias, x, add, y, n0, n1, scratch);
}
