/* y = x W^T: one chain of 16-lane fused multiply-adds per output, in order of k, whatever the batch.
 *
 * One or two activation rows (up to four of 4-bit weights with AVX-512): op_direct.c. More than QK_FEW:
 * op_prefill.c. Between them, but for 4-bit weights on AVX2 (op_few4.c), k is cut in pieces, and a register
 * tile of R weight rows x C activation rows passes over a piece, some of the 16 lanes at a time where vectors
 * are shorter. Activations are packed beforehand, once for all outputs, in the order in which the tile reads
 * them; between pieces the accumulators rest in memory, which leaves the chain as it was. It is one pass over
 * the weights, dense ones widened in registers, 4-bit ones decoded in the first-level cache.
 */
#include "ops.h"

enum {
    R = V16_TILE_ROWS,
    C = V16_TILE_COLS,
    PIECE = V16_TILE_PIECE, /* inputs a piece: of R + C rows they fit the first-level cache */
};

/* What a run of the tile reads and writes. acc + c * QK_STRIP_SUMS + r * 16 holds the lanes of one output. */
typedef struct {
    const char *row[R]; /* first input of each weight row */
    const float *x;     /* [16 / VT_LANES][steps][cols][VT_LANES] */
    int64_t steps;      /* vectors of 16 inputs */
    bool first;         /* the sums start at zero */
    float *acc;
    const char *next; /* fetched from memory: each step of each pass takes `advance` bytes of it */
    int64_t advance;
} work;

/* Lanes do not meet, so an instruction set of shorter vectors takes them in several passes, which its
 * registers fit. */
QK_INLINE void tile(const work *t, qk_format format, int cols)
{
    const int size = format == QK_F32 ? 4 : 2, lines = (R * VT_LANES * size + 63) / 64;
    const int64_t step = 16 * size;
    const char *next = t->next;
    for (int lane = 0; lane < 16; lane += VT_LANES) {
        vt sum[C][R];
        const char *row[R];
        QK_UNROLL for (int r = 0; r < R; r++) row[r] = t->row[r] + lane * size;
        QK_UNROLL for (int c = 0; c < cols; c++)
        {
            QK_UNROLL for (int r = 0; r < R; r++)
            {
                sum[c][r] = t->first ? vt_zero() : vt_load(t->acc + c * QK_STRIP_SUMS + r * 16 + lane);
            }
        }
        const float *x = t->x + lane * t->steps * cols;
        const int64_t bytes = t->steps * step, advance = t->advance;
        for (int64_t i = 0; i < bytes; i += step, x += cols * VT_LANES, next += advance) {
            vt v[R];
            QK_UNROLL for (int l = 0; l < lines; l++) __builtin_prefetch(next + 64 * l, 0, 2);
            QK_UNROLL for (int r = 0; r < R; r++) v[r] = vt_load_as(format, row[r] + i);
            QK_UNROLL for (int c = 0; c < cols; c++)
            {
                vt a = vt_load(x + c * VT_LANES);
                QK_UNROLL for (int r = 0; r < R; r++) sum[c][r] = vt_fma(v[r], a, sum[c][r]);
            }
        }
        QK_UNROLL for (int c = 0; c < cols; c++)
        {
            QK_UNROLL for (int r = 0; r < R; r++)
            {
                vt_store(t->acc + c * QK_STRIP_SUMS + r * 16 + lane, sum[c][r]);
            }
        }
    }
}

typedef void tile_fn(const work *t);

#define TILE(name, format, cols)                                                                             \
    static __attribute__((noinline)) void name##_##cols(const work *t)                                       \
    {                                                                                                        \
        tile(t, format, cols);                                                                               \
    }
#if V16_TILE_COLS == 6
#define TILES(name, format)                                                                                  \
    TILE(name, format, 1)                                                                                    \
    TILE(name, format, 2)                                                                                    \
    TILE(name, format, 3)                                                                                    \
    TILE(name, format, 4)                                                                                    \
    TILE(name, format, 5)                                                                                    \
    TILE(name, format, 6)                                                                                    \
    static tile_fn *const name[C] = {name##_1, name##_2, name##_3, name##_4, name##_5, name##_6};
#elif V16_TILE_COLS == 4
#define TILES(name, format)                                                                                  \
    TILE(name, format, 1)                                                                                    \
    TILE(name, format, 2)                                                                                    \
    TILE(name, format, 3)                                                                                    \
    TILE(name, format, 4)                                                                                    \
    static tile_fn *const name[C] = {name##_1, name##_2, name##_3, name##_4};
#else
#define TILES(name, format)                                                                                  \
    TILE(name, format, 1)                                                                                    \
    TILE(name, format, 2)                                                                                    \
    static tile_fn *const name[C] = {name##_1, name##_2};
#endif

TILES(tiles_f32, QK_F32)
TILES(tiles_f16, QK_F16)
TILES(tiles_bf16, QK_BF16)

static tile_fn *const *tiles_of(qk_format format)
{
    return format == QK_BF16 ? tiles_bf16 : format == QK_F16 ? tiles_f16 : tiles_f32;
}

/* k up to whole vectors. */
static int64_t padded(int64_t k)
{
    return (k + 15) / 16 * 16;
}

void QK_NAME(decode_row)(const qk_matrix *w, bool finite, int64_t n, int64_t k0, int64_t k1, float *dst)
{
    const char *row = (const char *)w->data + (w->format == QK_4BIT ? 0 : qk_row_bytes(w, n * w->k + k0));
    const int64_t count = k1 - k0;
    int64_t i = 0;
    switch (w->format) {
    case QK_4BIT:
        QK_NAME(decode4)(w, finite, n * w->k + k0, n * w->k + k1, dst);
        if (count % 16) memset(dst + count, 0, (size_t)(16 - count % 16) * sizeof *dst);
        return;
    case QK_BF16:
        for (; i + 16 <= count; i += 16) v16_store(dst + i, v16_load_as(QK_BF16, row, i));
        break;
    case QK_F16:
        for (; i + 16 <= count; i += 16) v16_store(dst + i, v16_load_as(QK_F16, row, i));
        break;
    default:
        for (; i + 16 <= count; i += 16) v16_store(dst + i, v16_load_as(QK_F32, row, i));
    }
    if (i < count) v16_store(dst + i, v16_load_as_n(w->format, row, i, (int)(count - i)));
}

/* A row's inputs to where the tile finds them among those of `width` rows: [16 / VT_LANES][steps][width]
 * [VT_LANES], zero-padded. */
static void spread_row(const float *row, int64_t inputs, int width, float *to)
{
    const int64_t whole = inputs / 16, steps = (inputs + 15) / 16;
    for (int lane = 0; lane < 16; lane += VT_LANES) {
        float *at = to + lane * steps * width;
        for (int64_t i = 0; i < whole; i++, at += width * VT_LANES)
            vt_store(at, vt_load(row + 16 * i + lane));
    }
    if (whole == steps) return;
    float last[16] = {0};
    v16_store(last, v16_load_n(row + 16 * whole, (int)(inputs % 16)));
    for (int lane = 0; lane < 16; lane += VT_LANES) {
        vt_store(to + (lane * steps + whole * VT_LANES) * width, vt_load(last + lane));
    }
}

/* Piece after piece of k, in each of them tile after tile. */
void QK_NAME(matmul_pack)(const qk_matrix *w, const float *x, int64_t m, int64_t t0, int64_t t1,
                          float *packed)
{
    const int64_t k = w->k;
    if (m > QK_FEW) {
        QK_NAME(prefill_pack)(x, k, m, t0, t1, packed);
        return;
    }
#ifdef V16_HAS_PAIR
    if (QK_NAME(few4_takes)(w, m)) {
        QK_NAME(few4_pack)(w, x, m, t0, t1, packed);
        return;
    }
#endif
    for (int64_t k0 = 0; k0 < k; k0 += PIECE) {
        const int64_t inputs = qk_least(k - k0, PIECE);
        for (int64_t t = t0; t < t1; t++) {
            const int64_t part = qk_tile_of(m, C, t), c0 = qk_tile_start(m, C, part);
            const int cols = (int)(qk_tile_start(m, C, part + 1) - c0);
            float *to = packed + m * k0 + c0 * padded(inputs) + (t - c0) * VT_LANES;
            spread_row(x + t * k + k0, inputs, cols, to);
        }
    }
}

/* Where a tile finds `rows` <= R weight rows for inputs [k0, k1): decoded in `panel`, or in the matrix
 * itself. */
typedef struct {
    const char *row[R];
    tile_fn *const *tiles;
    int64_t steps;
    bool finite; /* in: see QK_NAME(is_finite) */
} source;

static void find_rows(const qk_matrix *w, int64_t n, int rows, int64_t k0, int64_t k1, float *panel,
                      source *out /* [INOUT] */)
{
    const int64_t stride = padded(k1 - k0);
    const bool in_place = w->format != QK_4BIT && (k1 - k0) % 16 == 0;
    out->tiles = tiles_of(in_place ? w->format : QK_F32);
    out->steps = stride / 16;
    for (int r = 0; r < rows; r++) {
        out->row[r] = in_place ? (const char *)w->data + qk_row_bytes(w, (n + r) * w->k + k0)
                               : (const char *)(panel + r * stride);
        if (!in_place) QK_NAME(decode_row)(w, out->finite, n + r, k0, k1, panel + r * stride);
    }
    for (int r = rows; r < R; r++) out->row[r] = out->row[rows - 1]; /* the last group repeats the last row */
}

/* m activation rows in `block` over the rows of `s`. `next`: what to fetch meanwhile, `bytes` of it. */
static void run_tiles(const source *s, const float *block, int64_t m, bool first, float *acc,
                      const char *next, int64_t bytes)
{
    const int64_t parts = qk_tiles(m, C), each = bytes / parts;
    work t = {.steps = s->steps, .first = first, .next = next};
    t.advance = each / (s->steps * (16 / VT_LANES));
    QK_UNROLL for (int i = 0; i < R; i++) t.row[i] = s->row[i];
    for (int64_t p = 0, c0 = 0; p < parts; p++, t.next += each) {
        int64_t c1 = qk_tile_start(m, C, p + 1);
        t.x = block + c0 * s->steps * 16;
        t.acc = acc + c0 * QK_STRIP_SUMS;
        s->tiles[c1 - c0 - 1](&t);
        c0 = c1;
    }
}

static void finish_strip(const qk_matrix *w, const float *bias, int64_t m, bool add, float *y, int64_t n,
                         int rows, const float *acc)
{
    for (int64_t t = 0; t < m; t++, acc += QK_STRIP_SUMS) {
        for (int r = 0; r < rows; r += 16) {
            qk_finish(acc + r * 16, bias ? bias + n + r : NULL, add, y + t * w->n + n + r,
                      rows - r < 16 ? rows - r : 16);
        }
    }
}

static void matmul_few(const qk_matrix *w, const float *bias, const float *packed, int64_t m, bool add,
                       float *y, int64_t n0, int64_t n1, float *scratch)
{
    float *acc = scratch, *panel = acc + m * QK_STRIP_SUMS;
    const bool finite = w->format == QK_4BIT && QK_NAME(is_finite)(w, n0, n1);
    const int64_t k = w->k, strip = qk_strip(w, R);
    for (int64_t n = n0; n < n1; n += strip) {
        const int64_t rows = qk_least(strip, n1 - n);
        const char *next = (const char *)w->data + qk_row_bytes(w, (n + strip) * k);
        for (int64_t k0 = 0; k0 < k; k0 += PIECE) {
            const int64_t k1 = qk_least(k, k0 + PIECE);
            for (int64_t r = 0; r < rows; r += R) {
                source s = {.finite = finite};
                int sub = (int)qk_least(R, rows - r);
                int64_t bytes = qk_row_bytes(w, sub * (k1 - k0));
                find_rows(w, n + r, sub, k0, k1, panel, &s);
                run_tiles(&s, packed + k0 * m, m, k0 == 0, acc + r * 16, next, bytes);
                next += bytes;
            }
        }
        finish_strip(w, bias, m, add, y, n, (int)rows, acc);
    }
}

static bool is_direct(const qk_matrix *w, int64_t m)
{
    /* The tile widens dense rows in registers too; 4-bit ones, costly to decode, it takes through a panel. */
    if (w->format != QK_4BIT) return m <= 2;
    return m <= V16_DIRECT_COLS && w->k % V16_DIRECT_STEP == 0;
}

size_t QK_NAME(matmul_packed)(const qk_matrix *w, int64_t m)
{
    if (is_direct(w, m)) return 0;
    return m > QK_FEW ? QK_NAME(prefill_packed)(w->k, m) : (size_t)(m * padded(w->k)) * sizeof(float);
}

size_t QK_NAME(matmul_scratch)(const qk_matrix *w, int64_t m)
{
    if (is_direct(w, m)) return QK_NAME(direct_scratch)(w, m);
    if (m > QK_FEW) return QK_NAME(prefill_scratch)(w->k, m);
#ifdef V16_HAS_PAIR
    if (QK_NAME(few4_takes)(w, m)) return QK_NAME(few4_scratch)(m);
#endif
    return (size_t)(m * QK_STRIP_SUMS + R * PIECE) * sizeof(float);
}

void QK_NAME(matmul)(const qk_matrix *w, const float *bias, const float *x, int64_t m, bool add, float *y,
                     int64_t n0, int64_t n1, void *scratch)
{
    if (m <= 0 || n0 >= n1) return;
    if (is_direct(w, m))
        QK_NAME(direct)(w, bias, x, m, add, y, n0, n1, scratch);
    else if (m > QK_FEW)
        QK_NAME(prefill)(w, bias, x, m, add, y, n0, n1, scratch);
#ifdef V16_HAS_PAIR
    else if (QK_NAME(few4_takes)(w, m))
        QK_NAME(few4)(w, bias, x, m, add, y, n0, n1, scratch);
#endif
    else
        matmul_few(w, bias, x, m, add, y, n0, n1, scratch);
}
