/* y = x W^T: one chain of 16-lane fused multiply-adds per output, in order of k, whatever the batch.
 *
 * Two ways to the same bits. Few activation rows (decode): weights are decoded in registers and used at once,
 * several rows a pass so that memory and not the latency of the chain is the limit. Many (prefill): a strip
 * of weight rows is decoded once to float32 in `scratch`, small enough for the second-level cache, and a
 * register tile of weight rows x activation rows runs over it. k is cut in pieces whose two panels fit the
 * first-level cache; between pieces the accumulators rest in memory, which leaves the chain as it was.
 */
#include "ops.h"

enum {
    R = V16_TILE_ROWS,
    C = V16_TILE_COLS,
    MOST_ROWS = V16_DIRECT_ROWS(1),
    STRIP = 16 * R,           /* most weight rows decoded at a time: a multiple of 16 and of R */
    STRIP_BYTES = 384 * 1024, /* of decoded weights, unless one group of R rows is larger */
    PIECE = 512,              /* inputs a piece: R * 512 * 4 bytes of weights, C * 512 * 4 of activations */
    BATCH_BYTES = 4 << 20,    /* of activations taken together */
    LEAST_BATCH = 96,         /* rows */
    AHEAD = 8192,             /* bytes, at least, that decode prefetches ahead */
};

/* Folds `rows` <= 16 accumulators of 16 lanes into outputs y[0 .. rows). */
QK_INLINE void finish(const float *acc, const float *bias, bool add, float *y, int rows)
{
    v16 s = v16_hsum16(acc);
    if (rows == 16) {
        if (bias) s = v16_add(s, v16_load(bias));
        if (add) s = v16_add(v16_load(y), s);
        v16_store(y, s);
        return;
    }
    if (bias) s = v16_add(s, v16_load_n(bias, rows));
    if (add) s = v16_add(v16_load_n(y, rows), s);
    v16_store_n(y, s, rows);
}

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
    const int DR = V16_DIRECT_ROWS(M);
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

/* Inputs over which every row stays within one block: the largest power of two dividing k, at most a block.
 */
static int64_t aligned_run(const qk_matrix *w)
{
    int64_t power = w->k & -w->k;
    return power < w->block ? power : w->block;
}

QK_INLINE v16 lut4(const uint8_t *p, v16 lut, bool vbmi)
{
#ifdef V16_HAS_VBMI
    if (vbmi) return v16_lut4_vbmi(p, lut);
#endif
    (void)vbmi;
    return v16_lut4(p, lut);
}

/* Code book and the scales of rows [n0, n1) are finite: known before the loop, rounding takes two operations
 * less. */
static bool is_finite(const qk_matrix *w, int64_t n0, int64_t n1)
{
    const int64_t b0 = n0 * w->k / w->block, b1 = (n1 * w->k + w->block - 1) / w->block;
    const v16 zero = v16_zero();
    v16 sum = v16_mul(v16_load(w->code), zero); /* NaN from a NaN or an infinity */
    int64_t b = b0;
    for (; b + 16 <= b1; b += 16) sum = v16_fma(v16_load(w->absmax + b), zero, sum);
    if (b < b1) sum = v16_fma(v16_load_n(w->absmax + b, (int)(b1 - b)), zero, sum);
    return v16_hsum(sum) == 0;
}

/* The same for 4-bit rows, when k is a multiple of 16. */
QK_INLINE void direct_4bit(const qk_matrix *w, bool vbmi, bool finite, int M, int64_t n, int64_t last,
                           const float *x, float *acc, int at)
{
    const int DR = V16_DIRECT_ROWS(M);
    const int64_t k = w->k, run = aligned_run(w);
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

QK_INLINE void direct_rows(const qk_matrix *w, qk_format format, bool vbmi, int M, const float *bias,
                           const float *x, bool add, float *y, int64_t n0, int64_t n1)
{
    float acc[V16_DIRECT_COLS * 256] __attribute__((aligned(64)));
    const bool finite = format == QK_4BIT && is_finite(w, n0, n1);
    for (int64_t n = n0; n < n1; n += 16) {
        int rows = n1 - n < 16 ? (int)(n1 - n) : 16;
        for (int at = 0; at < rows; at += V16_DIRECT_ROWS(M)) {
            if (format == QK_4BIT)
                direct_4bit(w, vbmi, finite, M, n + at, n1 - 1, x, acc, at);
            else
                direct_dense(w, format, M, n + at, n1 - 1, x, acc, at);
        }
        for (int m = 0; m < M; m++) {
            finish(acc + m * 256, bias ? bias + n : NULL, add, y + m * w->n + n, rows);
        }
    }
}

typedef void direct_fn(const qk_matrix *w, const float *bias, const float *x, bool add, float *y, int64_t n0,
                       int64_t n1);

#define DIRECT(name, format, vbmi, M)                                                                        \
    static __attribute__((noinline)) void name##_##M(const qk_matrix *w, const float *bias, const float *x,  \
                                                     bool add, float *y, int64_t n0, int64_t n1)             \
    {                                                                                                        \
        direct_rows(w, format, vbmi, M, bias, x, add, y, n0, n1);                                            \
    }
#if V16_DIRECT_COLS == 8
#define DIRECT_ALL(name, format, vbmi)                                                                       \
    DIRECT(name, format, vbmi, 1)                                                                            \
    DIRECT(name, format, vbmi, 2)                                                                            \
    DIRECT(name, format, vbmi, 3)                                                                            \
    DIRECT(name, format, vbmi, 4)                                                                            \
    DIRECT(name, format, vbmi, 5)                                                                            \
    DIRECT(name, format, vbmi, 6)                                                                            \
    DIRECT(name, format, vbmi, 7)                                                                            \
    DIRECT(name, format, vbmi, 8)                                                                            \
    static direct_fn *const name[] = {name##_1, name##_2, name##_3, name##_4,                                \
                                      name##_5, name##_6, name##_7, name##_8};
#else
#define DIRECT_ALL(name, format, vbmi)                                                                       \
    DIRECT(name, format, vbmi, 1)                                                                            \
    DIRECT(name, format, vbmi, 2)                                                                            \
    static direct_fn *const name[] = {name##_1, name##_2};
#endif

DIRECT_ALL(direct_f32, QK_F32, false)
DIRECT_ALL(direct_f16, QK_F16, false)
DIRECT_ALL(direct_bf16, QK_BF16, false)
DIRECT_ALL(direct_nf4, QK_4BIT, false)
#ifdef V16_HAS_VBMI
DIRECT_ALL(direct_vbmi, QK_4BIT, true)
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

/* Prefill: R weight rows x `cols` activation rows over inputs [k0, k1). acc + (c * STRIP + r) * 16 holds the
 * lanes of one output; `first` starts them at zero. */
QK_INLINE void tile(const float *const *w, const float *x, int64_t stride, int cols, int64_t k0, int64_t k1,
                    bool first, float *acc)
{
    v16 sum[C][R];
    QK_UNROLL for (int c = 0; c < cols; c++)
    {
        QK_UNROLL for (int r = 0; r < R; r++)
        {
            sum[c][r] = first ? v16_zero() : v16_load(acc + (c * STRIP + r) * 16);
        }
    }
    int64_t i = k0;
    for (; i + 16 <= k1; i += 16) {
        v16 v[R];
        QK_UNROLL for (int r = 0; r < R; r++) v[r] = v16_load(w[r] + i);
        QK_UNROLL for (int c = 0; c < cols; c++)
        {
            v16 a = v16_load(x + c * stride + i);
            QK_UNROLL for (int r = 0; r < R; r++) sum[c][r] = v16_fma(v[r], a, sum[c][r]);
        }
    }
    if (i < k1) {
        int tail = (int)(k1 - i);
        QK_UNROLL for (int c = 0; c < cols; c++)
        {
            v16 a = v16_load_n(x + c * stride + i, tail);
            QK_UNROLL for (int r = 0; r < R; r++) sum[c][r] =
                v16_fma(v16_load_n(w[r] + i, tail), a, sum[c][r]);
        }
    }
    QK_UNROLL for (int c = 0; c < cols; c++)
    {
        QK_UNROLL for (int r = 0; r < R; r++) v16_store(acc + (c * STRIP + r) * 16, sum[c][r]);
    }
}

#define TILE(cols)                                                                                           \
    static __attribute__((noinline)) void tile_##cols(const float *const *w, const float *x, int64_t stride, \
                                                      int64_t k0, int64_t k1, bool first, float *acc)        \
    {                                                                                                        \
        tile(w, x, stride, cols, k0, k1, first, acc);                                                        \
    }

TILE(1)
TILE(2)
#if V16_TILE_COLS == 6
TILE(3)
TILE(4)
TILE(5)
TILE(6)
#endif

typedef void tile_fn(const float *const *w, const float *x, int64_t stride, int64_t k0, int64_t k1,
                     bool first, float *acc);
static tile_fn *const tiles[C] = {
    tile_1, tile_2,
#if V16_TILE_COLS == 6
    tile_3, tile_4, tile_5, tile_6,
#endif
};

/* Floats from one decoded row to the next: whole vectors, and not a multiple of 4 KiB, which would put the
 * same input of all rows in one set of the first-level cache. */
static int64_t decoded_stride(int64_t k)
{
    return (k + 15) / 16 * 16 + 16;
}

static int64_t strip_rows(int64_t k)
{
    int64_t rows = STRIP_BYTES / (decoded_stride(k) * (int64_t)sizeof(float)) / R * R;
    return rows < R ? R : rows > STRIP ? STRIP : rows;
}

static void decode_row(const qk_matrix *w, int64_t n, float *dst)
{
    const int64_t k = w->k;
    if (w->format == QK_4BIT) {
        QK_NAME(decode4)(w, n * k, (n + 1) * k, dst);
        return;
    }
    const uint16_t *src = (const uint16_t *)w->data + n * k;
    int64_t i = 0;
    if (w->format == QK_BF16)
        for (; i + 16 <= k; i += 16) v16_store(dst + i, v16_load_bf16(src + i));
    else
        for (; i + 16 <= k; i += 16) v16_store(dst + i, v16_load_f16(src + i));
    if (i < k) v16_store_n(dst + i, v16_load_as_n(w->format, src, i, (int)(k - i)), (int)(k - i));
}

/* One strip of weight rows [n, n + rows) against all of x. */
static void strip_product(const qk_matrix *w, const float *const *row, int64_t n, int rows, const float *bias,
                          const float *x, int64_t m, bool add, float *y, float *acc)
{
    const int64_t k = w->k, parts = (m + C - 1) / C;
    const int groups = (rows + R - 1) / R;
    for (int64_t part = 0, c0 = 0; part < parts; part++) {
        int cols = (int)((m - c0) / (parts - part)); /* as even as can be: narrow tiles are slow */
        tile_fn *run = tiles[cols - 1];
        for (int64_t k0 = 0; k0 < k; k0 += PIECE) {
            int64_t k1 = k - k0 < PIECE ? k : k0 + PIECE;
            for (int g = 0; g < groups; g++) {
                run(row + g * R, x + c0 * k, k, k0, k1, k0 == 0, acc + g * R * 16);
            }
        }
        for (int c = 0; c < cols; c++) {
            for (int r = 0; r < rows; r += 16) {
                finish(acc + (c * STRIP + r) * 16, bias ? bias + n + r : NULL, add,
                       y + (c0 + c) * w->n + n + r, rows - r < 16 ? rows - r : 16);
            }
        }
        c0 += cols;
    }
}

static void matmul_tiled(const qk_matrix *w, const float *bias, const float *x, int64_t m, bool add, float *y,
                         int64_t n0, int64_t n1, float *scratch)
{
    const int64_t k = w->k, stride = decoded_stride(k), strip = strip_rows(k);
    float *acc = scratch, *decoded = scratch + C * STRIP * 16;
    const float *row[STRIP];
    for (int64_t n = n0; n < n1; n += strip) {
        int rows = n1 - n < strip ? (int)(n1 - n) : (int)strip;
        for (int r = 0; r < (rows + R - 1) / R * R; r++) {
            int real = r < rows ? r : rows - 1; /* the last group repeats the last row */
            row[r] = w->format == QK_F32 ? (const float *)w->data + (n + real) * k : decoded + real * stride;
            if (w->format != QK_F32 && r < rows) decode_row(w, n + r, decoded + r * stride);
        }
        strip_product(w, row, n, rows, bias, x, m, add, y, acc);
    }
}

/* Activation rows taken together: as many as stay in the last-level cache while strip after strip passes over
 * them, but enough to repay the decoding of a strip. */
static int64_t batch_rows(int64_t k)
{
    int64_t rows = BATCH_BYTES / (k * (int64_t)sizeof(float));
    return rows > LEAST_BATCH ? rows : LEAST_BATCH;
}

static bool is_direct(const qk_matrix *w, int64_t m)
{
    /* float32 rows need no decoding: the tile reads them where they lie */
    int64_t most = w->format == QK_F32 && V16_DIRECT_COLS > 4 ? 4 : V16_DIRECT_COLS;
    return m <= most && (w->format != QK_4BIT || w->k % 16 == 0);
}

size_t QK_NAME(matmul_scratch)(const qk_matrix *w, int64_t m)
{
    if (is_direct(w, m)) return 0;
    size_t floats = (size_t)(C * STRIP * 16);
    if (w->format != QK_F32) floats += (size_t)(strip_rows(w->k) * decoded_stride(w->k));
    return floats * sizeof(float);
}

void QK_NAME(matmul)(const qk_matrix *w, const float *bias, const float *x, int64_t m, bool add, float *y,
                     int64_t n0, int64_t n1, void *scratch)
{
    if (m <= 0 || n0 >= n1) return;
    if (is_direct(w, m))
        direct_kernel(w->format, m)(w, bias, x, add, y, n0, n1);
    else
        for (int64_t t = 0, step = batch_rows(w->k); t < m; t += step)
            matmul_tiled(w, bias, x + t * w->k, m - t < step ? m - t : step, add, y + t * w->n, n0, n1,
                         scratch);
}
