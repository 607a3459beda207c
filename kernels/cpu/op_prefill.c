/* y = x W^T for many activation rows: one of the 16 lanes after the other.
 *
 * The chains of one lane are an ordinary product of k / 16 steps. A register tile holds GROUP outputs along
 * its vectors x up to C activation rows, each broadcast: 8 loads of 88 bytes for 12 vectors of multiply-adds
 * with AVX2, where vectors along k would take 7 of 224 bytes. GROUP weight rows are decoded and transposed to
 * a panel, activations are packed once for all outputs, both lane by lane. PIECE steps of a lane's panel stay
 * in the first-level cache while all tiles pass over them; longer lanes rest their sums in memory between
 * pieces, which leaves the chain as it was.
 *
 * Lanes come in the order 0, 8, 4, 12, 2, 10 ...: folding by 8, 4, 2, 1 is then the carrying of a binary
 * counter, and of the 16 sums of an output at most LEVELS are alive.
 */
#include "ops.h"

enum {
    V = V16_PREFILL_VECTORS,
    C = V16_PREFILL_COLS,
    GROUP = V * VT_LANES,
    PIECE = V16_PREFILL_STEPS,
    BATCH = 256, /* most activation rows that pass over a panel together */
    CHUNK = 256, /* inputs of a row decoded at once */
    PAD = 16,    /* floats between arrays whose sizes are powers of two: caches would give them one set */
    ROW = CHUNK + PAD,
    LEVELS = 5, /* sums of 1, 2, 4 and 8 lanes; of the lane in progress, in the end of all */
};

static int64_t steps_of(int64_t k)
{
    return (k + 15) / 16;
}

/* Floats from one lane's activations to the next one's. */
static int64_t packed_lane(int64_t steps, int64_t m)
{
    return m * steps + PAD;
}

/* Floats from one lane of a panel to the next. */
static int64_t panel_lane(int64_t steps)
{
    return steps * GROUP + PAD;
}

/* Floats from one level of sums to the next. */
static int64_t level_size(int64_t m)
{
    return qk_least(m, BATCH) * GROUP + PAD;
}

/* The lane that comes at `turn`: its bits reversed. */
static int lane_at(int turn)
{
    return (turn & 1) << 3 | (turn & 2) << 1 | (turn & 4) >> 1 | (turn & 8) >> 3;
}

/* ---- activations: [16][pieces][tiles][steps][cols] ---- */

QK_INLINE void pack_tile(const float *x, int64_t k, int64_t m, int64_t c0, int cols, float *packed)
{
    const int64_t steps = steps_of(k), apart = packed_lane(steps, m);
    for (int64_t s0 = 0; s0 < steps; s0 += PIECE) {
        const int64_t s1 = qk_least(steps, s0 + PIECE);
        float *to = packed + m * s0 + c0 * (s1 - s0);
        for (int64_t s = s0; s < s1 && 16 * s + 16 <= k; s++, to += cols)
            v16_transpose(x + 16 * s, k, cols, to, apart);
        if (s1 < steps || k % 16 == 0) continue;
        float last[C * 16];
        for (int c = 0; c < cols; c++)
            v16_store(last + 16 * c, v16_load_n(x + c * k + k / 16 * 16, (int)(k % 16)));
        v16_transpose(last, 16, cols, to, apart);
    }
}

size_t QK_NAME(prefill_packed)(int64_t k, int64_t m)
{
    return (size_t)(16 * packed_lane(steps_of(k), m)) * sizeof(float);
}

/* Whole tiles: those that start in [t0, t1). */
void QK_NAME(prefill_pack)(const float *x, int64_t k, int64_t m, int64_t t0, int64_t t1, float *packed)
{
    for (int64_t part = t0 * qk_tiles(m, C) / m; part < qk_tiles(m, C) && qk_tile_start(m, C, part) < t1;
         part++) {
        const int64_t c0 = qk_tile_start(m, C, part);
        if (c0 < t0) continue;
        switch (C - (qk_tile_start(m, C, part + 1) - c0)) {
        case 0:
            pack_tile(x + c0 * k, k, m, c0, C, packed);
            break;
        case 1:
            pack_tile(x + c0 * k, k, m, c0, C - 1, packed);
            break;
        default:
            pack_tile(x + c0 * k, k, m, c0, C - 2, packed);
        }
    }
}

/* ---- weights: [16][steps][GROUP] ---- */

/* Weight rows [n, n + rows) to a panel, 16 at a time: whole lines of it. The last row fills up. */
static void fill_panel(const qk_matrix *w, bool finite, int64_t n, int rows, float *panel)
{
    const int64_t apart = panel_lane(steps_of(w->k));
    float part[16 * ROW] __attribute__((aligned(64)));
    for (int r = 0; r < rows; r += 16) {
        for (int64_t k0 = 0; k0 < w->k; k0 += CHUNK) {
            const int64_t k1 = qk_least(w->k, k0 + CHUNK);
            for (int i = 0; i < 16; i++)
                QK_NAME(decode_row)(w, finite, n + qk_least(r + i, rows - 1), k0, k1, part + i * ROW);
            float *to = panel + k0 / 16 * GROUP + r;
            for (int64_t i = 0; i < k1 - k0; i += 16, to += GROUP) {
                v16_transpose(part + i, ROW, 8, to, apart);
                v16_transpose(part + 8 * ROW + i, ROW, 8, to + 8, apart);
            }
        }
    }
}

/* ---- the tile ---- */

/* What a run of the tile reads and writes: sums [LEVELS], `level` apart, of [cols][GROUP]. */
typedef struct {
    const float *x, *panel; /* [steps][cols], [steps][GROUP] */
    int64_t steps;
    bool first, last; /* pieces of the lane; the last one carries the sums `merges` levels up */
    int merges;
    float *sums;
    int64_t level;
    /* Fetched every other step: of the next group's weights `advance` bytes, of the next piece's activations
     * as many as are used. */
    const char *weights, *activations;
    int64_t advance;
} work;

QK_INLINE void step(const float *panel, const float *x, int vectors, int cols, vt (*sum)[V])
{
    vt w[V];
    QK_UNROLL for (int v = 0; v < vectors; v++) w[v] = vt_load(panel + v * VT_LANES);
    QK_UNROLL for (int c = 0; c < cols; c++)
    {
        vt a = vt_set1(x[c]);
        QK_UNROLL for (int v = 0; v < vectors; v++) sum[c][v] = vt_fma(w[v], a, sum[c][v]);
    }
}

QK_INLINE void tile(const work *t, int vectors, int cols)
{
    float *rest = t->sums + (LEVELS - 1) * t->level;
    vt sum[C][V];
    QK_UNROLL for (int c = 0; c < cols; c++)
    {
        QK_UNROLL for (int v = 0; v < vectors; v++)
        {
            sum[c][v] = t->first ? vt_zero() : vt_load(rest + c * GROUP + v * VT_LANES);
        }
    }
    const float *x = t->x, *panel = t->panel, *end = panel + t->steps / 2 * 2 * GROUP;
    const char *weights = t->weights, *activations = t->activations;
    for (; panel < end; panel += 2 * GROUP, x += 2 * cols) {
        __builtin_prefetch(weights, 0, 2);
        __builtin_prefetch(activations, 0, 2);
        step(panel, x, vectors, cols, sum);
        step(panel + GROUP, x + cols, vectors, cols, sum);
        weights += t->advance;
        activations += 2 * sizeof(float) * (size_t)cols;
    }
    if (t->steps % 2) step(panel, x, vectors, cols, sum);
    float *to = t->last ? t->sums : rest;
    for (int i = 0; t->last && i < t->merges; i++, to += t->level) {
        QK_UNROLL for (int c = 0; c < cols; c++)
        {
            QK_UNROLL for (int v = 0; v < vectors; v++)
            {
                sum[c][v] = vt_add(vt_load(to + c * GROUP + v * VT_LANES), sum[c][v]);
            }
        }
    }
    QK_UNROLL for (int c = 0; c < cols; c++)
    {
        QK_UNROLL for (int v = 0; v < vectors; v++) vt_store(to + c * GROUP + v * VT_LANES, sum[c][v]);
    }
}

typedef void tile_fn(const work *t);

#define TILE(vectors, less)                                                                                  \
    static __attribute__((noinline)) void tile_##vectors##_##less(const work *t)                             \
    {                                                                                                        \
        tile(t, vectors, C - less);                                                                          \
    }
#define TILES(vectors) TILE(vectors, 0) TILE(vectors, 1) TILE(vectors, 2)
#define TILE_NAMES(vectors)                                                                                  \
    {                                                                                                        \
        tile_##vectors##_0, tile_##vectors##_1, tile_##vectors##_2                                           \
    }

TILES(1)
#if V16_PREFILL_VECTORS == 3
TILES(2)
TILES(3)
static tile_fn *const tiles[V][3] = {TILE_NAMES(1), TILE_NAMES(2), TILE_NAMES(3)};
#elif V16_PREFILL_VECTORS == 2
TILES(2)
static tile_fn *const tiles[V][3] = {TILE_NAMES(1), TILE_NAMES(2)};
#else
static tile_fn *const tiles[V][3] = {TILE_NAMES(1)};
#endif

/* ---- a group of outputs ---- */

typedef struct {
    const float *packed;
    int64_t m, steps;
    int vectors;
    const float *panel;
    float *sums;      /* [LEVELS][rows of the batch][GROUP] */
    const char *next; /* weights to fetch */
    int64_t advance;
    const float *y; /* outputs of the first activation row */
    int64_t stride; /* to the next one's */
} group;

/* Tiles [part0, part1) over steps [s0, s1) of the lane at `turn`. */
static void run_piece(group *g, int turn, int64_t s0, int64_t s1, int64_t part0, int64_t part1)
{
    const int64_t steps = s1 - s0, apart = packed_lane(g->steps, g->m);
    const bool last = s1 == g->steps, finished = last && turn == 15;
    tile_fn *const *run = tiles[g->vectors - 1];
    const float *x = g->packed + lane_at(turn) * apart + g->m * s0;
    const int64_t s2 = last ? 0 : s1, steps2 = qk_least(g->steps - s2, PIECE);
    const float *x2 = g->packed + lane_at(last ? turn + 1 : turn) * apart + g->m * s2;
    work t = {.panel = g->panel + lane_at(turn) * panel_lane(g->steps) + s0 * GROUP,
              .steps = steps,
              .first = s0 == 0,
              .last = last,
              .merges = __builtin_ctz(~(unsigned)turn),
              .level = level_size(g->m),
              .advance = g->advance};
    const int64_t start = qk_tile_start(g->m, C, part0);
    for (int64_t part = part0, c0 = start, c1; part < part1; part++, c0 = c1) {
        c1 = qk_tile_start(g->m, C, part + 1);
        t.x = x + c0 * steps;
        t.sums = g->sums + (c0 - start) * GROUP;
        t.weights = g->next;
        t.activations = (const char *)(x2 + c0 * steps2);
        for (int64_t c = c0; finished && c < c1; c++) __builtin_prefetch(g->y + c * g->stride, 1, 3);
        /* a call each: one with changing targets is often mispredicted */
        if (c1 - c0 == C)
            run[0](&t);
        else if (c1 - c0 == C - 1)
            run[1](&t);
        else
            run[2](&t);
        g->next += steps / 2 * g->advance;
    }
}

size_t QK_NAME(prefill_scratch)(int64_t k, int64_t m)
{
    return (size_t)(LEVELS * level_size(m) + 16 * panel_lane(steps_of(k))) * sizeof(float);
}

void QK_NAME(prefill)(const qk_matrix *w, const float *bias, const float *packed, int64_t m, bool add,
                      float *y, int64_t n0, int64_t n1, float *scratch)
{
    const bool finite = w->format == QK_4BIT && QK_NAME(is_finite)(w, n0, n1);
    const int64_t steps = steps_of(w->k), parts = qk_tiles(m, C);
    const int64_t most = BATCH / C, batches = (parts + most - 1) / most;
    float *sums = scratch + (LEVELS - 1) * level_size(m), *panel = sums + level_size(m);
    group g = {.packed = packed, .m = m, .steps = steps, .panel = panel, .sums = scratch, .stride = w->n};
    g.advance = qk_row_bytes(w, GROUP * w->k) / (16 * parts * (steps / 2 + 1)) + 1;
    for (int64_t n = n0; n < n1; n += GROUP) {
        const int rows = (int)qk_least(GROUP, n1 - n);
        g.vectors = (rows + VT_LANES - 1) / VT_LANES;
        fill_panel(w, finite, n, rows, panel);
        g.y = y + n;
        g.next = (const char *)w->data + qk_row_bytes(w, (n + GROUP) * w->k);
        for (int64_t b = 0; b < batches; b++) {
            const int64_t part0 = parts * b / batches, part1 = parts * (b + 1) / batches;
            for (int turn = 0; turn < 16; turn++) {
                for (int64_t s0 = 0; s0 < steps; s0 += PIECE)
                    run_piece(&g, turn, s0, qk_least(steps, s0 + PIECE), part0, part1);
            }
            const float *sum = sums;
            for (int64_t t = qk_tile_start(m, C, part0); t < qk_tile_start(m, C, part1); t++, sum += GROUP) {
                for (int r = 0; r < rows; r += 16) {
                    qk_give(v16_load(sum + r), bias ? bias + n + r : NULL, add, y + t * w->n + n + r,
                            rows - r < 16 ? rows - r : 16);
                }
            }
        }
    }
}
