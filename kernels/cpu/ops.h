/* The functions of one instruction set, gathered into its qk_cpu by op_table.c. Internal to kernels/cpu. */
#ifndef QK_OPS_H
#define QK_OPS_H

#include "v16.h"

/* Activation rows worth no decoded panel of a whole strip. */
#define QK_FEW 40

size_t QK_NAME(matmul_packed)(const qk_matrix *w, int64_t m);
void QK_NAME(matmul_pack)(const qk_matrix *w, const float *x, int64_t m, int64_t t0, int64_t t1,
                          float *packed);
size_t QK_NAME(matmul_scratch)(const qk_matrix *w, int64_t m);
void QK_NAME(matmul)(const qk_matrix *w, const float *bias, const float *x, int64_t m, bool add, float *y,
                     int64_t n0, int64_t n1, void *scratch);
/* The same for few activation rows: m <= 2, or V16_DIRECT_COLS when w is 4-bit, and then
 * k is a multiple of V16_DIRECT_STEP. */
size_t QK_NAME(direct_scratch)(const qk_matrix *w, int64_t m);
void QK_NAME(direct)(const qk_matrix *w, const float *bias, const float *x, int64_t m, bool add, float *y,
                     int64_t n0, int64_t n1, void *scratch);
/* The same for many, more than QK_FEW (tiles are wide enough from 25 on). Scratch of k inputs, whatever the
 * format. */
size_t QK_NAME(prefill_packed)(int64_t k, int64_t m);
void QK_NAME(prefill_pack)(const float *x, int64_t k, int64_t m, int64_t t0, int64_t t1, float *packed);
size_t QK_NAME(prefill_scratch)(int64_t k, int64_t m);
void QK_NAME(prefill)(const qk_matrix *w, const float *bias, const float *packed, int64_t m, bool add,
                      float *y, int64_t n0, int64_t n1, float *scratch);
/* Inputs [k0, k1) of one weight row as float32, with zeros up to whole vectors; `finite` as for qk_block_lut.
 */
void QK_NAME(decode_row)(const qk_matrix *w, bool finite, int64_t n, int64_t k0, int64_t k1, float *dst);
#ifdef V16_HAS_PAIR
/* The same where few4_takes(w, m); x packed by few4_pack. */
bool QK_NAME(few4_takes)(const qk_matrix *w, int64_t m);
size_t QK_NAME(few4_scratch)(int64_t m);
void QK_NAME(few4_pack)(const qk_matrix *w, const float *x, int64_t m, int64_t t0, int64_t t1, float *packed);
void QK_NAME(few4)(const qk_matrix *w, const float *bias, const float *packed, int64_t m, bool add, float *y,
                   int64_t n0, int64_t n1, void *scratch);
#endif
void QK_NAME(attention)(const qk_attention *a, int64_t t0, int64_t t1, int kv_head, void *scratch);
void QK_NAME(attention_run)(const qk_attention *a, int64_t t0, int64_t t1, int kv_head, int64_t run,
                            void *scratch);
void QK_NAME(attention_join)(const qk_attention *a, int64_t t0, int64_t t1, int kv_head);
void QK_NAME(rmsnorm)(const float *x, const float *w, float eps, int64_t h, float *y, int64_t t0, int64_t t1);
void QK_NAME(rope)(float *x, const int32_t *pos, const float *cos, const float *sin, int heads, int d,
                   int64_t t0, int64_t t1);
void QK_NAME(swiglu)(const float *gate, const float *up, float *y, int64_t i0, int64_t i1);
void QK_NAME(exp)(const float *x, float *y, int64_t i0, int64_t i1);
void QK_NAME(binary)(qk_binary op, const float *a, const float *b, float scalar, bool reversed, float *y,
                     int64_t i0, int64_t i1);
void QK_NAME(convert)(qk_format from, const void *src, qk_format to, void *dst, int64_t i0, int64_t i1);
void QK_NAME(quantize4)(qk_format from, const void *src, int64_t n, int block, const float *thresholds,
                        const uint8_t *order, int zero_code, uint8_t *packed, float *absmax, int64_t b0,
                        int64_t b1);
void QK_NAME(dequantize4)(const qk_matrix *w, qk_format to, void *dst, int64_t i0, int64_t i1);
float QK_NAME(probe_read)(const void *p, size_t bytes);
double QK_NAME(probe_fma)(int64_t rounds, float *sink);

/* Elements [i0, i1) of a flattened 4-bit matrix, decoded to dst[0 ..]; `finite` as for qk_block_lut. */
void QK_NAME(decode4)(const qk_matrix *w, bool finite, int64_t i0, int64_t i1, float *dst);
/* Code book and the scales of rows [n0, n1) are finite: known before a loop, rounding takes two operations
 * less.
 */
bool QK_NAME(is_finite)(const qk_matrix *w, int64_t n0, int64_t n1);

/* Inputs over which every row stays within one block: the largest power of two dividing k, at most a block.
 */
QK_INLINE int64_t qk_aligned_run(const qk_matrix *w)
{
    int64_t power = w->k & -w->k;
    return power < w->block ? power : w->block;
}

/* The table's 16 values for a block, each as the decoded weight. `finite`: code and absmax are known to be
 * so, and the product is no NaN that the quick rounding would lose. */
QK_INLINE v16 qk_block_lut(const qk_matrix *w, v16 code, int64_t block_index, bool finite)
{
    v16 v = v16_mul(code, v16_set1(w->absmax[block_index]));
    return finite && w->round_to == QK_BF16 ? v16_round_bf16_number(v) : v16_round_to(w->round_to, v);
}

QK_INLINE int64_t qk_least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Tiles that m activation rows make, as even as can be, of at most `cols`. */
QK_INLINE int64_t qk_tiles(int64_t m, int64_t cols)
{
    return (m + cols - 1) / cols;
}

/* The row that a tile starts at. */
QK_INLINE int64_t qk_tile_start(int64_t m, int64_t cols, int64_t tile)
{
    return m * tile / qk_tiles(m, cols);
}

/* The tile that row t is in. */
QK_INLINE int64_t qk_tile_of(int64_t m, int64_t cols, int64_t t)
{
    return ((t + 1) * qk_tiles(m, cols) - 1) / m;
}

/* Bytes of so many inputs of a row. */
QK_INLINE int64_t qk_row_bytes(const qk_matrix *w, int64_t inputs)
{
    return w->format == QK_4BIT ? inputs / 2 : inputs * (w->format == QK_F32 ? 4 : 2);
}

/* Few activation rows take so many weight rows together, of which the next ones are fetched meanwhile: a
 * multiple of `step`, which divides QK_STRIP, and no more than the second-level cache holds. */
#define QK_STRIP 48
QK_INLINE int64_t qk_strip(const qk_matrix *w, int step)
{
    const int64_t fit = 256 * 1024 / qk_row_bytes(w, w->k + 1) / step * step;
    return fit < step ? step : qk_least(fit, QK_STRIP);
}
/* Floats from one activation row's sums over a strip, 16 lanes each, to the next one's. */
#define QK_STRIP_SUMS (QK_STRIP * 16 + 16)

/* `rows` <= 16 sums to outputs y[0 .. rows). */
QK_INLINE void qk_give(v16 s, const float *bias, bool add, float *y, int rows)
{
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

/* Folds `rows` <= 16 accumulators of 16 lanes into outputs y[0 .. rows). */
QK_INLINE void qk_finish(const float *acc, const float *bias, bool add, float *y, int rows)
{
    qk_give(v16_hsum16(acc), bias, add, y, rows);
}

#endif
