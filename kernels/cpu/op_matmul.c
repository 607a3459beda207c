/* y = x W^T: one chain of 16-lane fused multiply-adds per output, in order of k, whatever the batch.
 *
 * One or two activation rows (up to four of 4-bit weights with AVX-512): op_direct.c. More: k is cut in
 * pieces, and a register tile of R weight rows x C activation rows passes over a piece. Activations are
 * copied to a block in the order in which the tile reads them, so that they stay in the first-level cache
 * whatever the strides; between pieces the accumulators rest in memory, which leaves the chain as it was. Few
 * activation rows: one pass over the weights, dense ones widened in registers, 4-bit ones decoded to a panel
 * that stays in the first-level cache. Many: a strip's piece is decoded to a panel in the second-level cache,
 * and block after block passes over it.
 */
#include "ops.h"

enum {
    R = V16_TILE_ROWS,
    C = V16_TILE_COLS,
    SUB = 4 * R,                  /* weight rows whose panel fits the first-level cache beside a block */
    STRIP = 48,                   /* most weight rows taken together: a multiple of 16 and of SUB */
    STRIP_BYTES = 256 * 1024,     /* of weights in a strip of few activation rows: the next one is fetched */
    PIECE = V16_TILE_PIECE,       /* inputs a piece: of R + C rows they fit the first-level cache */
    FEW = 32,                     /* activation rows that are copied once a call */
    BATCH = 128,                  /* most activation rows that share a decoded strip */
    ACC_STRIDE = STRIP * 16 + 16, /* floats from one activation row's accumulators to the next's */
};

/* What a run of the tile reads and writes. acc + c * ACC_STRIDE + r * 16 holds the lanes of one output. */
typedef struct {
    const char *row[R]; /* first input of each weight row */
    const float *x;     /* [steps][cols][16] */
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
    const char *next = t->next;
    for (int lane = 0; lane < 16; lane += VT_LANES) {
        vt sum[C][R];
        const char *row[R];
        QK_UNROLL for (int r = 0; r < R; r++) row[r] = t->row[r] + lane * size;
        QK_UNROLL for (int c = 0; c < cols; c++)
        {
            QK_UNROLL for (int r = 0; r < R; r++)
            {
                sum[c][r] = t->first ? vt_zero() : vt_load(t->acc + c * ACC_STRIDE + r * 16 + lane);
            }
        }
        const float *x = t->x + lane;
        const int64_t bytes = t->steps * 16 * size, advance = t->advance;
        for (int64_t i = 0; i < bytes; i += 16 * size, x += cols * 16, next += advance) {
            vt v[R];
            QK_UNROLL for (int l = 0; l < lines; l++) __builtin_prefetch(next + 64 * l, 0, 2);
            QK_UNROLL for (int r = 0; r < R; r++) v[r] = vt_load_as(format, row[r] + i);
            QK_UNROLL for (int c = 0; c < cols; c++)
            {
                vt a = vt_load(x + c * 16);
                QK_UNROLL for (int r = 0; r < R; r++) sum[c][r] = vt_fma(v[r], a, sum[c][r]);
            }
        }
        QK_UNROLL for (int c = 0; c < cols; c++)
        {
            QK_UNROLL for (int r = 0; r < R; r++)
            {
                vt_store(t->acc + c * ACC_STRIDE + r * 16 + lane, sum[c][r]);
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

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t row_bytes(const qk_matrix *w, int64_t inputs)
{
    return w->format == QK_4BIT ? inputs / 2 : inputs * (w->format == QK_F32 ? 4 : 2);
}

/* Inputs [k0, k1) of one weight row as float32; lanes past k1 are 0. */
static void decode_row(const qk_matrix *w, bool finite, int64_t n, int64_t k0, int64_t k1, float *dst)
{
    const char *row = (const char *)w->data + (w->format == QK_4BIT ? 0 : row_bytes(w, n * w->k + k0));
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

/* Inputs [k0, k1) of `cols` activation rows, in the order the tile reads them. */
static void copy_block(const float *x, int64_t k, int cols, int64_t k0, int64_t k1, float *dst)
{
    for (int c = 0; c < cols; c++) {
        const float *from = x + c * k;
        float *to = dst + c * 16;
        int64_t i = k0;
        for (; i + 16 <= k1; i += 16, to += cols * 16) v16_store(to, v16_load(from + i));
        if (i < k1) v16_store(to, v16_load_n(from + i, (int)(k1 - i)));
    }
}

/* m activation rows in tiles as even as can be: narrow ones are slow. Tile `part` starts at this row. */
static int64_t part_start(int64_t m, int64_t part)
{
    int64_t parts = (m + C - 1) / C;
    return m * part / parts;
}

/* m activation rows at x to consecutive tiles' blocks. */
static void copy_blocks(const float *x, int64_t k, int64_t m, int64_t k0, int64_t k1, float *dst)
{
    for (int64_t p = 0, c0 = 0; c0 < m; p++) {
        int64_t c1 = part_start(m, p + 1);
        copy_block(x + c0 * k, k, (int)(c1 - c0), k0, k1, dst + c0 * ((k1 - k0 + 15) / 16 * 16));
        c0 = c1;
    }
}

/* Where a tile finds `rows` weight rows for inputs [k0, k1): decoded in `panel`, or in the matrix itself. */
typedef struct {
    const char *row[STRIP + R];
    tile_fn *const *tiles;
    int64_t steps;
    bool finite; /* in: see QK_NAME(is_finite) */
} source;

static void find_rows(const qk_matrix *w, bool in_place, int64_t n, int rows, int64_t k0, int64_t k1,
                      float *panel, source *out /* [INOUT] */)
{
    const int64_t stride = (k1 - k0 + 15) / 16 * 16;
    in_place = in_place && w->format != QK_4BIT && (k1 - k0) % 16 == 0;
    out->tiles = tiles_of(in_place ? w->format : QK_F32);
    out->steps = stride / 16;
    for (int r = 0; r < rows; r++) {
        out->row[r] = in_place ? (const char *)w->data + row_bytes(w, (n + r) * w->k + k0)
                               : (const char *)(panel + r * stride);
        if (!in_place) decode_row(w, out->finite, n + r, k0, k1, panel + r * stride);
    }
    for (int r = rows; r % R; r++) out->row[r] = out->row[rows - 1]; /* the last group repeats the last row */
}

/* m activation rows in `block` over the rows of `s`. `next`: what to fetch meanwhile, `bytes` of it. */
static void run_tiles(const source *s, int rows, const float *block, int64_t m, bool first, float *acc,
                      const char *next, int64_t bytes)
{
    const int64_t parts = (m + C - 1) / C, groups = (rows + R - 1) / R, each = bytes / (parts * groups);
    work t = {.steps = s->steps, .first = first, .advance = each / (s->steps * (16 / VT_LANES))};
    for (int64_t p = 0, c0 = 0; p < parts; p++) {
        int64_t c1 = part_start(m, p + 1);
        t.x = block + c0 * s->steps * 16;
        for (int r = 0; r < rows; r += R, next += each) {
            QK_UNROLL for (int i = 0; i < R; i++) t.row[i] = s->row[r + i];
            t.acc = acc + c0 * ACC_STRIDE + r * 16;
            t.next = next;
            s->tiles[c1 - c0 - 1](&t);
        }
        c0 = c1;
    }
}

static void finish_strip(const qk_matrix *w, const float *bias, int64_t m, bool add, float *y, int64_t n,
                         int rows, const float *acc)
{
    for (int64_t c = 0; c < m; c++) {
        for (int r = 0; r < rows; r += 16) {
            qk_finish(acc + c * ACC_STRIDE + r * 16, bias ? bias + n + r : NULL, add, y + c * w->n + n + r,
                      rows - r < 16 ? rows - r : 16);
        }
    }
}

/* The parts of `scratch`, in floats. */
typedef struct {
    size_t acc, panel, block;
} room;

static room rooms(const qk_matrix *w, int64_t m)
{
    bool few = m <= FEW;
    return (room){(size_t)(least(m, BATCH) * ACC_STRIDE), (size_t)((few ? SUB : STRIP) * PIECE),
                  (size_t)(few ? m * ((w->k + 15) / 16 * 16) : C * PIECE)};
}

static void matmul_few(const qk_matrix *w, const float *bias, const float *x, int64_t m, bool add, float *y,
                       int64_t n0, int64_t n1, float *scratch)
{
    const room at = rooms(w, m);
    float *acc = scratch, *panel = acc + at.acc, *block = panel + at.panel;
    const bool finite = w->format == QK_4BIT && QK_NAME(is_finite)(w, n0, n1);
    const int64_t k = w->k;
    int64_t strip = STRIP_BYTES / row_bytes(w, k + 1) / SUB * SUB;
    strip = strip < SUB ? SUB : least(strip, STRIP);
    for (int64_t k0 = 0; k0 < k; k0 += PIECE) copy_blocks(x, k, m, k0, least(k, k0 + PIECE), block + k0 * m);
    for (int64_t n = n0; n < n1; n += strip) {
        const int64_t rows = least(strip, n1 - n);
        const char *next = (const char *)w->data + row_bytes(w, (n + strip) * k);
        for (int64_t k0 = 0; k0 < k; k0 += PIECE) {
            const int64_t k1 = least(k, k0 + PIECE);
            for (int64_t r = 0; r < rows; r += SUB) {
                source s = {.finite = finite};
                int sub = (int)least(SUB, rows - r);
                int64_t bytes = row_bytes(w, sub * (k1 - k0));
                find_rows(w, true, n + r, sub, k0, k1, panel, &s);
                run_tiles(&s, sub, block + k0 * m, m, k0 == 0, acc + r * 16, next, bytes);
                next += bytes;
            }
        }
        finish_strip(w, bias, m, add, y, n, (int)rows, acc);
    }
}

static void matmul_many(const qk_matrix *w, const float *bias, const float *x, int64_t m, bool add, float *y,
                        int64_t n0, int64_t n1, float *scratch)
{
    const room at = rooms(w, m);
    float *acc = scratch, *panel = acc + at.acc, *block = panel + at.panel;
    const bool finite = w->format == QK_4BIT && QK_NAME(is_finite)(w, n0, n1);
    const int64_t k = w->k;
    for (int64_t n = n0; n < n1; n += STRIP) {
        const int rows = (int)least(STRIP, n1 - n);
        for (int64_t k0 = 0; k0 < k; k0 += PIECE) {
            const int64_t k1 = least(k, k0 + PIECE);
            source s = {.finite = finite};
            find_rows(w, false, n, rows, k0, k1, panel, &s);
            for (int64_t b = 0; b < m; b += C) {
                int64_t cols = least(C, m - b);
                copy_blocks(x + b * k, k, cols, k0, k1, block);
                run_tiles(&s, rows, block, cols, k0 == 0, acc + b * ACC_STRIDE, (const char *)block, 0);
            }
        }
        finish_strip(w, bias, m, add, y, n, rows, acc);
    }
}

static bool is_direct(const qk_matrix *w, int64_t m)
{
    /* The tile widens dense rows in registers too; 4-bit ones, costly to decode, it takes through a panel. */
    if (w->format != QK_4BIT) return m <= 2;
    return m <= V16_DIRECT_COLS && w->k % 16 == 0;
}

size_t QK_NAME(matmul_scratch)(const qk_matrix *w, int64_t m)
{
    if (is_direct(w, m)) return 0;
    room at = rooms(w, m);
    return (at.acc + at.panel + at.block) * sizeof(float);
}

void QK_NAME(matmul)(const qk_matrix *w, const float *bias, const float *x, int64_t m, bool add, float *y,
                     int64_t n0, int64_t n1, void *scratch)
{
    if (m <= 0 || n0 >= n1) return;
    if (is_direct(w, m)) {
        QK_NAME(direct)(w, bias, x, m, add, y, n0, n1);
        return;
    }
    if (m <= FEW) {
        matmul_few(w, bias, x, m, add, y, n0, n1, scratch);
        return;
    }
    const int64_t batches = (m + BATCH - 1) / BATCH;
    for (int64_t b = 0, t = 0; b < batches; b++) {
        int64_t end = m * (b + 1) / batches;
        matmul_many(w, bias, x + t * w->k, end - t, add, y + t * w->n, n0, n1, scratch);
        t = end;
    }
}
