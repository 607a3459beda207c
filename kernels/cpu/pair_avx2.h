/* Two 4-bit rows side by side on AVX2, one in each 128-bit half: nothing crosses halves, which takes two
 * operations and more on Zen, and a look-up serves both. For op_direct.c and op_few4.c.
 *
 * vpshufb looks 32 codes up at once, a byte of the value each, and unpacking brings the bytes together. That
 * leaves 16 weights out of order: activations are put in the same order once, sums back at the end. Shuffles
 * and shifts have two of Zen's four pipes and share one of them with multiply-adds: they are what to save.
 */
#ifndef QK_PAIR_AVX2_H
#define QK_PAIR_AVX2_H

#include "ops.h"

/* Where the table of a run of weights with one scale comes from. */
typedef enum {
    PAIR_SCALED,  /* float32: one table of codes, whose values are scaled after the look-up */
    PAIR_ROUNDED, /* code[i] * scale rounded. The tables of some runs are made before those runs: at the same
                     time, with the sums, they take more registers than there are */
    PAIR_POWERS,  /* bfloat16, all scales bfloat16 too: 128 tables there are, times a power of 2 */
} pair_kind;

/* 16 values by 4-bit code for each row: byte p of every value, from pair_first_byte on. */
typedef struct {
    __m256i byte[4];
} pair_table;

/* Tables of PAIR_POWERS for scales in [0.5, 2), by the scale's third byte: the lower bytes of 16 bfloat16
 * values, then the upper ones. The upper byte has the sign and the exponent but for its last bit, so that a
 * scale 4^n times as large adds n to it: the scale's own fourth byte is added, and that of 0.5 taken off
 * beforehand. `upper` is the shuffle that gives the fourth byte to all codes, and 0 to those of zeros. */
typedef struct {
    uint8_t value[256][32];
    uint8_t upper[32];
} pair_powers;

enum {
    PAIR_STEP = 24,    /* floats from one vector of a panel to the next of its row: three pairs share it */
    PAIR_RUNS = 32,    /* whose PAIR_ROUNDED tables are made at a time */
    POWERS_PAY = 4096, /* runs from which on making PAIR_POWERS tables pays */
    HALF_UPPER = 0x3f, /* fourth byte of 0.5 to 2 */
    POWERS_LEAST = 67 << 23, /* 2^-60, and 2^60: within them no value of a table leaves the normal numbers */
    POWERS_MOST = 187 << 23,
};

/* Whether PAIR_POWERS gives the weights of rows [n0, n1), in blocks of 64. A block of zeros is enough for it
 * not to.
 */
static bool pair_has_powers(const qk_matrix *w, int64_t n0, int64_t n1)
{
    const int64_t b0 = n0 * w->k / w->block, b1 = (n1 * w->k + w->block - 1) / w->block;
    const uint32_t most = POWERS_MOST - POWERS_LEAST;
    if (w->block != 64 || w->k % 64 != 0 || b1 - b0 < POWERS_PAY) return false;
    uint32_t bits, outside = 0;
    for (int i = 0; i < 16; i++) {
        float magnitude = w->code[i] < 0 ? -w->code[i] : w->code[i];
        memcpy(&bits, &magnitude, sizeof bits);
        outside |= w->code[i] != 0 && bits - POWERS_LEAST > most;
    }
    for (int64_t b = b0; b < b1; b++) {
        memcpy(&bits, w->absmax + b, sizeof bits);
        outside |= bits << 16 | (bits - POWERS_LEAST > most);
    }
    return outside == 0;
}

static void pair_make_powers(const float *code, pair_powers *out /* [OUT] */)
{
    const __m256i apart = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6,
                                           8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const v16 codes = v16_load(code);
    uint8_t taken[32] = {0};
    for (int i = 0; i < 16; i++) {
        taken[16 + i] = code[i] == 0 ? 0 : HALF_UPPER;
        out->upper[i] = out->upper[16 + i] = code[i] == 0 ? 0x80 : 3;
    }
    const __m256i take = _mm256_loadu_si256((const __m256i *)(const void *)taken);
    for (int third = 0; third < 256; third++) {
        const __m256i bits = _mm256_set1_epi32(HALF_UPPER << 24 | third << 16);
        const __m256 scale = _mm256_castsi256_ps(bits);
        __m256i lo = _mm256_castps_si256(v16_carry_bf16_8(_mm256_mul_ps(codes.lo, scale)));
        __m256i hi = _mm256_castps_si256(v16_carry_bf16_8(_mm256_mul_ps(codes.hi, scale)));
        __m256i bytes = _mm256_packus_epi32(_mm256_srli_epi32(lo, 16), _mm256_srli_epi32(hi, 16));
        bytes = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(bytes, apart), order);
        _mm256_storeu_si256((__m256i *)(void *)out->value[third], _mm256_sub_epi8(bytes, take));
    }
}

QK_INLINE __m256 pair_scale(const float *scale0, const float *scale1)
{
    return _mm256_blend_ps(_mm256_broadcast_ss(scale0), _mm256_broadcast_ss(scale1), 0xf0);
}

QK_INLINE __m256i pair_halves(const uint8_t *p0, const uint8_t *p1)
{
    return _mm256_blend_epi32(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p0)),
                              _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)p1)),
                              0xf0);
}

QK_INLINE pair_table pair_from_powers(const pair_powers *powers, __m256i upper, const float *scale0,
                                      const float *scale1)
{
    const uint8_t *v0 = powers->value[((const uint8_t *)scale0)[2]];
    const uint8_t *v1 = powers->value[((const uint8_t *)scale1)[2]];
    const __m256i exponent = _mm256_shuffle_epi8(_mm256_castps_si256(pair_scale(scale0, scale1)), upper);
    pair_table t;
    t.byte[2] = pair_halves(v0, v1);
    t.byte[3] = _mm256_add_epi8(pair_halves(v0 + 16, v1 + 16), exponent);
    return t;
}

/* The first byte of a rounded value that may not be zero. */
QK_INLINE int pair_first_byte(qk_format round_to)
{
    return round_to == QK_BF16 ? 2 : round_to == QK_F16 ? 1 : 0;
}

/* The values code[i] * scale rounded; `finite`: they are numbers. */
QK_INLINE pair_table pair_values(qk_format round_to, bool finite, const float *code, __m256 scale)
{
    const __m256i apart = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15, 0, 4, 8, 12,
                                           1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i v[4];
    QK_UNROLL for (int q = 0; q < 4; q++)
    {
        __m256 f = _mm256_mul_ps(_mm256_broadcast_ps((const __m128 *)(const void *)(code + 4 * q)), scale);
        if (round_to == QK_F16) f = _mm256_cvtph_ps(v16_narrow_f16(f));
        if (round_to == QK_BF16) f = finite ? v16_carry_bf16_8(f) : v16_round_bf16_8(f);
        v[q] = _mm256_shuffle_epi8(_mm256_castps_si256(f), apart);
    }
    pair_table t;
    QK_UNROLL for (int p = 2 * (pair_first_byte(round_to) / 2); p < 4; p += 2)
    {
        __m256i first = p ? _mm256_unpackhi_epi32(v[0], v[1]) : _mm256_unpacklo_epi32(v[0], v[1]);
        __m256i second = p ? _mm256_unpackhi_epi32(v[2], v[3]) : _mm256_unpacklo_epi32(v[2], v[3]);
        t.byte[p] = _mm256_unpacklo_epi64(first, second);
        t.byte[p + 1] = _mm256_unpackhi_epi64(first, second);
    }
    return t;
}

/* x [k], four at a time as pair_step takes them. Of 16 it takes inputs 0 2 4 6, 8 10 12 14, 1 3 5 7 and 9 11
 * 13 15; or, of bfloat16 weights, 0 4 8 12, 2 6 10 14, 1 5 9 13 and 3 7 11 15. */
static void pair_order(qk_format round_to, const float *x, int64_t k, float *y)
{
    for (int64_t i = 0; i < k; i += 16) {
        for (int odd = 0; odd < 2; odd++) {
            const v16 v = v16_load(x + i);
            __m256 half = odd ? _mm256_shuffle_ps(v.lo, v.hi, 0xdd) : _mm256_shuffle_ps(v.lo, v.hi, 0x88);
            half = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(half), 0xd8));
            __m128 lo = _mm256_castps256_ps128(half), hi = _mm256_extractf128_ps(half, 1);
            const bool high = round_to == QK_BF16;
            _mm_storeu_ps(y + i + 8 * odd, high ? _mm_shuffle_ps(lo, hi, 0x88) : lo);
            _mm_storeu_ps(y + i + 8 * odd + 4, high ? _mm_shuffle_ps(lo, hi, 0xdd) : hi);
        }
    }
}

/* Sums of two rows, back in natural order: 16 of the first, 16 of the second. */
QK_INLINE void pair_store(qk_format round_to, float *y, const __m256 *sum)
{
    QK_UNROLL for (int h = 0; h < 2; h++) /* which 8 of the 16 */
    {
        __m256 even = sum[h], odd = sum[2 + h];
        if (round_to == QK_BF16) {
            even = h ? _mm256_unpackhi_ps(sum[0], sum[1]) : _mm256_unpacklo_ps(sum[0], sum[1]);
            odd = h ? _mm256_unpackhi_ps(sum[2], sum[3]) : _mm256_unpacklo_ps(sum[2], sum[3]);
        }
        __m256 lo = _mm256_unpacklo_ps(even, odd), hi = _mm256_unpackhi_ps(even, odd);
        _mm256_storeu_ps(y + 8 * h, _mm256_permute2f128_ps(lo, hi, 0x20));
        _mm256_storeu_ps(y + 16 + 8 * h, _mm256_permute2f128_ps(lo, hi, 0x31));
    }
}

/* 32 weights of two rows, as eight vectors: of the first 16 and of the second the four of pair_order. They
 * meet M activation rows `stride` apart, sum[m][q]; or, when M is 0, are left at panel[q * stride] and
 * PAIR_STEP behind it. Each look-up gives the 16 even or odd weights, unpacking those of the first 16 and of
 * the second. */
QK_INLINE void pair_step(qk_format round_to, const uint8_t *p0, const uint8_t *p1, const pair_table *t,
                         __m256 scale, const float *x, int64_t stride, int M, __m256 (*sum)[4], float *panel)
{
    const __m256i nibble = _mm256_set1_epi8(15), upper = _mm256_set1_epi32(-0x10000);
    const __m256i z = pair_halves(p0, p1);
    QK_UNROLL for (int odd = 0; odd < 2; odd++)
    {
        __m256i code = _mm256_and_si256(odd ? z : _mm256_srli_epi16(z, 4), nibble), b[4];
        b[0] = _mm256_setzero_si256();
        QK_UNROLL for (int p = pair_first_byte(round_to); p < 4; p++)
        {
            b[p] = _mm256_shuffle_epi8(t->byte[p], code);
        }
        QK_UNROLL for (int s = 0; s < 2; s++)
        {
            __m256i high = s ? _mm256_unpackhi_epi8(b[2], b[3]) : _mm256_unpacklo_epi8(b[2], b[3]), v[2];
            if (round_to == QK_BF16) {
                v[0] = _mm256_slli_epi32(high, 16);
                v[1] = _mm256_and_si256(high, upper);
            } else {
                __m256i low = s ? _mm256_unpackhi_epi8(b[0], b[1]) : _mm256_unpacklo_epi8(b[0], b[1]);
                v[0] = _mm256_unpacklo_epi16(low, high);
                v[1] = _mm256_unpackhi_epi16(low, high);
            }
            QK_UNROLL for (int h = 0; h < 2; h++)
            {
                const int q = 2 * odd + h;
                __m256 f = _mm256_castsi256_ps(v[h]);
                if (round_to == QK_F32) f = _mm256_mul_ps(f, scale);
                if (M == 0) _mm256_storeu_ps(panel + q * stride + s * PAIR_STEP, f);
                QK_UNROLL for (int m = 0; m < M; m++)
                {
                    const float *at = x + m * stride + 16 * s + 4 * q;
                    __m256 a = _mm256_broadcast_ps((const __m128 *)(const void *)at);
                    sum[m][q] = _mm256_fmadd_ps(f, a, sum[m][q]);
                }
            }
        }
    }
}

/* What a thread knows of its rows and keeps for them. */
typedef struct {
    pair_powers powers;
    pair_table made[PAIR_RUNS] __attribute__((aligned(64)));
    bool finite, has_powers; /* for bfloat16 */
} pair_room;

/* Readies `room` for rows [n0, n1). */
static void pair_prepare(const qk_matrix *w, int64_t n0, int64_t n1, pair_room *room /* [OUT] */)
{
    const bool rounded = w->round_to == QK_BF16;
    room->has_powers = rounded && pair_has_powers(w, n0, n1);
    room->finite = room->has_powers || (rounded && QK_NAME(is_finite)(w, n0, n1));
    if (room->has_powers) pair_make_powers(w->code, &room->powers);
}

/* Two rows of 4-bit weights in runs of one scale. */
typedef struct {
    const uint8_t *row[2];
    const float *absmax;
    int64_t first[2]; /* flattened index of a row */
    int shift;        /* of an index, to that of its block */
} pair_rows;

/* The scale of row r for the run from input i on; `blocks`: runs are whole blocks of 64. */
QK_INLINE const float *pair_scale_at(const pair_rows *p, bool blocks, int r, int64_t i)
{
    return blocks ? p->absmax + p->first[r] / 64 + i / 64 : p->absmax + ((p->first[r] + i) >> p->shift);
}

/* PAIR_ROUNDED tables for inputs [i0, i1). */
QK_INLINE void pair_make(const pair_rows *p, qk_format round_to, bool finite, bool blocks, int64_t run,
                         const float *code, int64_t i0, int64_t i1, pair_table *made /* [OUT] */)
{
    for (int64_t i = i0; i < i1; i += run, made++) {
        __m256 scale = pair_scale(pair_scale_at(p, blocks, 0, i), pair_scale_at(p, blocks, 1, i));
        pair_table t = pair_values(round_to, finite, code, scale);
        QK_UNROLL for (int byte = pair_first_byte(round_to); byte < 4; byte++)
        {
            made->byte[byte] = t.byte[byte];
        }
    }
}

/* Inputs [i0, i1) of rows n and n + 1 (past the last one, that one again), in runs of `run` of one
 * scale. M > 0: against M rows of x, which is in pair_order; acc [M][16][16] is written at its first two
 * rows. M = 0: decoded to acc, [4][(i1 - i0) / 16] of PAIR_STEP floats, the first eight of each. */
QK_INLINE void pair_pass(const qk_matrix *w, qk_format round_to, pair_kind kind, bool finite, bool blocks,
                         int64_t run, int M, int64_t n, int64_t last, int64_t i0, int64_t i1, const float *x,
                         const char *next, pair_room *room, float *acc)
{
    __m256i upper = _mm256_setzero_si256();
    if (kind == PAIR_POWERS) upper = _mm256_loadu_si256((const __m256i *)(const void *)room->powers.upper);
    const int64_t stride = M ? w->k : (i1 - i0) / 16 * PAIR_STEP;
    pair_rows p = {.absmax = w->absmax, .shift = __builtin_ctz((unsigned)w->block)};
    QK_UNROLL for (int r = 0; r < 2; r++)
    {
        p.first[r] = qk_least(n + r, last) * w->k;
        p.row[r] = (const uint8_t *)w->data + p.first[r] / 2;
    }
    pair_table t;
    if (kind == PAIR_SCALED) t = pair_values(QK_F32, finite, w->code, _mm256_set1_ps(1));
    __m256 sum[V16_DIRECT_COLS][4];
    QK_UNROLL for (int m = 0; m < M; m++)
    {
        QK_UNROLL for (int q = 0; q < 4; q++) sum[m][q] = _mm256_setzero_ps();
    }
    for (int64_t j0 = i0, j1; j0 < i1; j0 = j1) {
        const pair_table *made = room->made;
        j1 = kind == PAIR_ROUNDED ? qk_least(i1, j0 + PAIR_RUNS * run) : i1;
        if (kind == PAIR_ROUNDED) pair_make(&p, round_to, finite, blocks, run, w->code, j0, j1, room->made);
        for (int64_t i = j0; i < j1; i += run, made++) {
            const float *scale0 = pair_scale_at(&p, blocks, 0, i), *scale1 = pair_scale_at(&p, blocks, 1, i);
            __m256 scale = _mm256_setzero_ps();
            if (kind == PAIR_SCALED) scale = pair_scale(scale0, scale1);
            if (kind == PAIR_POWERS) t = pair_from_powers(&room->powers, upper, scale0, scale1);
            if (kind == PAIR_ROUNDED) t = *made;
            QK_UNROLL for (int64_t j = i; j < i + run; j += 32)
            {
                if (M) __builtin_prefetch(next + (j - i0), 0, 2);
                pair_step(round_to, p.row[0] + j / 2, p.row[1] + j / 2, &t, scale, M ? x + j : x, stride, M,
                          sum, acc + (j - i0) / 16 * PAIR_STEP);
            }
        }
    }
    QK_UNROLL for (int m = 0; m < M; m++) pair_store(round_to, acc + m * 256, sum[m]);
}

/* pair_pass by the matrix's rounding and blocks; a run starts at i0 and has at most `most_run` inputs. */
QK_INLINE void pair_pass_any(const qk_matrix *w, int64_t most_run, int M, int64_t n, int64_t last, int64_t i0,
                             int64_t i1, const float *x, const char *next, pair_room *room, float *acc)
{
    const int64_t run = qk_least(qk_aligned_run(w), most_run);
    const bool blocks = run == 64 && w->block == 64;
    if (w->round_to == QK_F16)
        pair_pass(w, QK_F16, PAIR_ROUNDED, false, false, run, M, n, last, i0, i1, x, next, room, acc);
    else if (w->round_to == QK_F32 && blocks)
        pair_pass(w, QK_F32, PAIR_SCALED, true, true, 64, M, n, last, i0, i1, x, next, room, acc);
    else if (w->round_to == QK_F32)
        pair_pass(w, QK_F32, PAIR_SCALED, true, false, run, M, n, last, i0, i1, x, next, room, acc);
    else if (blocks && room->has_powers)
        pair_pass(w, QK_BF16, PAIR_POWERS, true, true, 64, M, n, last, i0, i1, x, next, room, acc);
    else if (blocks && room->finite)
        pair_pass(w, QK_BF16, PAIR_ROUNDED, true, true, 64, M, n, last, i0, i1, x, next, room, acc);
    else if (room->finite)
        pair_pass(w, QK_BF16, PAIR_ROUNDED, true, false, run, M, n, last, i0, i1, x, next, room, acc);
    else
        pair_pass(w, QK_BF16, PAIR_ROUNDED, false, false, run, M, n, last, i0, i1, x, next, room, acc);
}

#endif
