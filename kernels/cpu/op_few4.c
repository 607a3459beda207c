/* y = x W^T for 3 to QK_FEW activation rows and 4-bit weights, where an instruction set takes rows in pairs:
 * some inputs of PAIRS pairs are decoded to a panel in the first-level cache, as pairs and in the order in
 * which the look-up gives them, and a register tile of PAIRS x COLS activation rows passes over it. */
#include "ops.h"

#ifdef V16_HAS_PAIR
#include "pair_avx2.h"

enum {
    PAIRS = PAIR_STEP / 8,
    COLS = 4,    /* with 3 pairs: 12 accumulators, 3 weights and an activation */
    PIECE = 512, /* inputs decoded at a time: 12 KiB */
};

typedef struct {
    pair_room pair;
    float panel[4 * PIECE / 16 * PAIR_STEP] __attribute__((aligned(64)));
} room;

bool QK_NAME(few4_takes)(const qk_matrix *w, int64_t m)
{
    return w->format == QK_4BIT && m > V16_DIRECT_COLS && m <= QK_FEW && w->k % 32 == 0;
}

size_t QK_NAME(few4_scratch)(int64_t m)
{
    return sizeof(room) + (size_t)(m * QK_STRIP_SUMS) * sizeof(float);
}

/* Piece after piece of k, in each of them tile after tile: [4][steps][cols] of four inputs in pair_order. */
void QK_NAME(few4_pack)(const qk_matrix *w, const float *x, int64_t m, int64_t t0, int64_t t1, float *packed)
{
    for (int64_t t = t0; t < t1; t++) {
        const int64_t part = qk_tile_of(m, COLS, t), c0 = qk_tile_start(m, COLS, part);
        const int64_t cols = qk_tile_start(m, COLS, part + 1) - c0;
        for (int64_t k0 = 0; k0 < w->k; k0 += PIECE) {
            const int64_t steps = qk_least(w->k - k0, PIECE) / 16;
            float *to = packed + m * k0 + c0 * steps * 16 + (t - c0) * 4, four[16];
            for (int64_t i = 0; i < steps; i++, to += cols * 4) {
                pair_order(w->round_to, x + t * w->k + k0 + i * 16, 16, four);
                for (int q = 0; q < 4; q++) memcpy(to + q * steps * cols * 4, four + 4 * q, 4 * sizeof *to);
            }
        }
    }
}

/* x [4][steps][cols][4]; the sums of a pair, four vectors, at acc + c * QK_STRIP_SUMS + 32 * pair. */
QK_INLINE void tile(const float *panel, const float *x, int64_t steps, int cols, bool first, float *acc)
{
    for (int q = 0; q < 4; q++, acc += 8) {
        __m256 sum[COLS][PAIRS];
        QK_UNROLL for (int c = 0; c < cols; c++)
        {
            QK_UNROLL for (int p = 0; p < PAIRS; p++)
            {
                sum[c][p] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(acc + c * QK_STRIP_SUMS + 32 * p);
            }
        }
        for (int64_t i = 0; i < steps; i++, panel += PAIR_STEP, x += cols * 4) {
            __m256 v[PAIRS];
            QK_UNROLL for (int p = 0; p < PAIRS; p++) v[p] = _mm256_loadu_ps(panel + 8 * p);
            QK_UNROLL for (int c = 0; c < cols; c++)
            {
                __m256 a = _mm256_broadcast_ps((const __m128 *)(const void *)(x + 4 * c));
                QK_UNROLL for (int p = 0; p < PAIRS; p++) sum[c][p] = _mm256_fmadd_ps(v[p], a, sum[c][p]);
            }
        }
        QK_UNROLL for (int c = 0; c < cols; c++)
        {
            QK_UNROLL for (int p = 0; p < PAIRS; p++)
            {
                _mm256_storeu_ps(acc + c * QK_STRIP_SUMS + 32 * p, sum[c][p]);
            }
        }
    }
}

static __attribute__((noinline)) void tiles(const float *panel, const float *x, int64_t steps, int64_t m,
                                            bool first, float *acc)
{
    const int64_t parts = qk_tiles(m, COLS);
    for (int64_t part = 0, c0 = 0, c1; part < parts; part++, c0 = c1) {
        const float *at = x + c0 * steps * 16;
        float *sums = acc + c0 * QK_STRIP_SUMS;
        c1 = qk_tile_start(m, COLS, part + 1);
        if (c1 - c0 == 4)
            tile(panel, at, steps, 4, first, sums);
        else if (c1 - c0 == 3)
            tile(panel, at, steps, 3, first, sums);
        else
            tile(panel, at, steps, 2, first, sums);
    }
}

/* Inputs [i0, i1) of 2 * PAIRS rows from n on; past `last`, that row again. */
static __attribute__((noinline)) void decode(const qk_matrix *w, int64_t n, int64_t last, int64_t i0,
                                             int64_t i1, room *r)
{
    for (int p = 0; p < PAIRS; p++)
        pair_pass_any(w, PIECE, 0, n + 2 * p, last, i0, i1, NULL, NULL, &r->pair, r->panel + 8 * p);
}

static void finish(const qk_matrix *w, const float *bias, int64_t m, bool add, float *y, int64_t n, int rows,
                   const float *acc)
{
    for (int64_t t = 0; t < m; t++, acc += QK_STRIP_SUMS) {
        for (int r = 0; r < rows; r += 16) {
            float lanes[16][16] __attribute__((aligned(64)));
            for (int p = 0; p < 8; p++) {
                __m256 sum[4];
                QK_UNROLL for (int q = 0; q < 4; q++) sum[q] =
                    _mm256_loadu_ps(acc + (r + 2 * p) * 16 + 8 * q);
                pair_store(w->round_to, lanes[2 * p], sum);
            }
            qk_finish(lanes[0], bias ? bias + n + r : NULL, add, y + t * w->n + n + r,
                      rows - r < 16 ? rows - r : 16);
        }
    }
}

void QK_NAME(few4)(const qk_matrix *w, const float *bias, const float *packed, int64_t m, bool add, float *y,
                   int64_t n0, int64_t n1, void *scratch)
{
    room *r = scratch;
    float *acc = (float *)(r + 1);
    const int64_t k = w->k, strip = qk_strip(w, 2 * PAIRS);
    pair_prepare(w, n0, n1, &r->pair);
    for (int64_t n = n0; n < n1; n += strip) {
        const int64_t rows = qk_least(strip, n1 - n);
        const char *next = (const char *)w->data + qk_row_bytes(w, (n + strip) * k);
        for (int64_t i0 = 0; i0 < k; i0 += PIECE) {
            const int64_t i1 = qk_least(k, i0 + PIECE);
            for (int64_t at = 0; at < rows; at += 2 * PAIRS) {
                for (int64_t b = 0; b < PAIRS * (i1 - i0); b += 64, next += 64)
                    __builtin_prefetch(next, 0, 2);
                decode(w, n + at, n1 - 1, i0, i1, r);
                tiles(r->panel, packed + m * i0, (i1 - i0) / 16, m, i0 == 0, acc + at * 16);
            }
        }
        finish(w, bias, m, add, y, n, (int)rows, acc);
    }
}

#endif
