/* What the CUDA products stand on, proven without a GPU: where activations and codes lie, which warp sums
 * what, how 4-bit codes become weights, and that the instruction's fragments then give the product. */
#include "kernel_help.h"
#include "qk_decode4.h"
#include "qk_pack.h"

#include <stdio.h>

/* ---- the maps ---- */

/* Every input of every token has a place of its own, and what is left over is padding. */
static void test_fragments_hold_each_number_once(void **state)
{
    (void)state;
    static const int slabs[] = {QK_SLAB_16BIT, QK_SLAB_4BIT};
    static const int64_t tokens[] = {1, 2, 7, 8, 9, 15, 16, 17, 33, 64},
                         ks[] = {1, 8, 24, 32, 40, 64, 192, 255, 256, 257, 320, 576, 1024, 2112};
    for (size_t s = 0; s < 2; s++)
        for (size_t a = 0; a < sizeof tokens / sizeof *tokens; a++)
            for (size_t b = 0; b < sizeof ks / sizeof *ks; b++) {
                const int64_t count = qk_fragment_count(tokens[a], ks[b], slabs[s]);
                assert_int_equal(count % (8 * slabs[s]), 0);
                assert_true(count >= tokens[a] * ks[b]);
                assert_true(count < (tokens[a] + 8) * (ks[b] + slabs[s]));
                uint8_t *seen = calloc(1, (size_t)count);
                /* padding tokens and inputs have places too: the map is a bijection of whole slabs */
                const int64_t rows = (tokens[a] + 7) / 8 * 8, wide = count / rows;
                for (int64_t row = 0; row < rows; row++)
                    for (int64_t i = 0; i < wide; i++) {
                        const int64_t at = qk_fragment_index(row, i, ks[b], slabs[s]);
                        assert_in_range(at, 0, count - 1);
                        assert_int_equal(seen[at], 0);
                        seen[at] = 1;
                    }
                free(seen);
            }
}

/* Every 16-byte piece of the codes has a place of its own, and a whole tile's four loads of a warp are 512
 * consecutive bytes each. */
static void test_tiles_hold_each_piece_once(void **state)
{
    (void)state;
    static const int64_t ns[] = {16, 32, 48, 576}, ks[] = {64, 128, 192, 256, 320, 576, 1024, 2112};
    for (size_t a = 0; a < sizeof ns / sizeof *ns; a++)
        for (size_t b = 0; b < sizeof ks / sizeof *ks; b++) {
            const int64_t n = ns[a], k = ks[b], pieces = n * k / 32;
            uint8_t *seen = calloc(1, (size_t)pieces);
            assert_true(qk_tiles_fit(n, k, 64));
            for (int64_t row = 0; row < n; row++)
                for (int64_t piece = 0; piece < k / 32; piece++) {
                    const int64_t at = qk_tile_offset(row, piece, k);
                    assert_int_equal(at % 16, 0);
                    assert_in_range(at / 16, 0, pieces - 1);
                    assert_int_equal(seen[at / 16], 0);
                    seen[at / 16] = 1;
                    const int64_t slab = piece / 8, t = piece % 8 / 2, g = row % 8;
                    if (8 * slab + 8 > k / 32) continue;
                    assert_int_equal(at, row / 16 * 16 * (k / 2) + slab * 2048 +
                                             (row % 16 / 8 * 2 + piece % 2) * 512 + (4 * g + t) * 16);
                }
            free(seen);
        }
    assert_false(qk_tiles_fit(24, 64, 64) || qk_tiles_fit(16, 96, 64) || qk_tiles_fit(16, 64, 32));
}

/* Each slab is summed by one warp, once, each warp's in ascending order. */
static void test_warps_share_out_the_slabs(void **state)
{
    (void)state;
    static const int turns[] = {QK_TURN_16BIT, QK_TURN_4BIT};
    for (size_t a = 0; a < 2; a++)
        for (int slabs = 1; slabs <= 600; slabs++) {
            uint8_t seen[600] = {0};
            int least = slabs, most = 0;
            for (int warp = 0; warp < QK_PRODUCT_WARPS; warp++) {
                int count = 0, last = -1;
                for (int slab; (slab = qk_warp_slab(warp, count, turns[a])) < slabs; count++, last = slab) {
                    assert_true(slab > last);
                    assert_int_equal(seen[slab]++, 0);
                }
                least = count < least ? count : least;
                most = count > most ? count : most;
            }
            for (int slab = 0; slab < slabs; slab++) assert_int_equal(seen[slab], 1);
            assert_true(most - least <= turns[a]);
        }
}

/* ---- decoding ---- */

static void random_code_book(float code[16])
{
    for (int i = 0; i < 16; i++) code[i] = random_unit();
}

static uint16_t rounded(qk_format to, float code, float absmax)
{
    const float v = qk_mul(code, absmax);
    return to == QK_BF16 ? qk_f32_to_bf16(v) : qk_f32_to_f16(v);
}

static qk_planes planes_of(const float code[16], float absmax, qk_format to)
{
    uint32_t pair[8];
    for (int i = 0; i < 8; i++)
        pair[i] = rounded(to, code[2 * i], absmax) | (uint32_t)rounded(to, code[2 * i + 1], absmax) << 16;
    return qk_planes_of(pair);
}

/* All 256 bytes at each of the 4 places, the other 3 being different: what qk_nibble and one rounded product
 * give, bit for bit. */
static void check_bytes(const float code[16], float absmax, qk_format to)
{
    const qk_planes planes = planes_of(code, absmax, to);
    for (uint32_t byte = 0; byte < 256; byte++)
        for (int place = 0; place < 4; place++) {
            uint8_t packed[4];
            for (int i = 0; i < 4; i++)
                packed[i] = (uint8_t)(i == place ? byte : byte * 37 + (uint32_t)i * 91 + 5);
            const uint32_t bytes =
                packed[0] | (uint32_t)packed[1] << 8 | (uint32_t)packed[2] << 16 | (uint32_t)packed[3] << 24;
            uint32_t out[4];
            qk_decode8(&planes, bytes, out);
            for (int i = 0; i < 8; i++)
                assert_int_equal(out[i / 2] >> 16 * (i % 2) & 0xffff,
                                 rounded(to, code[qk_nibble(packed, i)], absmax));
        }
}

static void test_every_byte_decodes_exactly(void **state)
{
    (void)state;
    static const float scales[] = {0,     -0.0f,   1e-45f,    1e-41f, 0x1p-126f, 1e-38f,  1e-8f,
                                   6e-5f, 0.0123f, 0.999999f, 1,      -1,        -0.37f,  3.14159f,
                                   1e4f,  65503,   65520,     1e10f,  3.4e38f,   -3.4e38f};
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++)
        for (qk_format to = QK_F16; to <= QK_BF16; to++) {
            float code[16];
            check_bytes(qk_nf4_code, scales[i], to);
            check_bytes(qk_fp4_code, scales[i], to);
            for (int book = 0; book < 4; book++) {
                random_code_book(code);
                check_bytes(code, scales[i], to);
            }
        }
    for (int i = 0; i < 100; i++) check_bytes(qk_nf4_code, random_unit(), QK_BF16);
}

/* The permute is PTX's: the digits 0..7 of a selector name the bytes of b:a. */
static void test_byte_perm(void **state)
{
    (void)state;
    for (uint32_t s = 0; s < 0x10000; s++) {
        if (s & 0x8888) continue;
        const uint8_t byte[8] = {0x10, 0x91, 0x22, 0xb3, 0x44, 0xd5, 0x66, 0xf7};
        const uint32_t r = qk_byte_perm(0xb3229110, 0xf766d544, s | 0xabcd0000u);
        for (int i = 0; i < 4; i++) assert_int_equal(r >> 8 * i & 0xff, byte[s >> 4 * i & 15]);
    }
}

/* A scale that is not nested goes through the nested formula with entry 1 and offset -0 (decode4.cuh). */
static void test_plain_scale_survives_the_nested_formula(void **state)
{
    (void)state;
    for (uint32_t bits = 0; bits < 0xff000000u; bits += 0x3fff) {
        const float absmax = qk_from_bits(bits);
        if (absmax == absmax) assert_int_equal(qk_bits(qk_nested_absmax(1.0f, absmax, -0.0f)), bits);
    }
    assert_int_equal(qk_bits(qk_nested_absmax(1.0f, -0.0f, -0.0f)), 0x80000000u);
    assert_int_equal(qk_bits(qk_nested_absmax(1.0f, 0.0f, -0.0f)), 0);
}

/* ---- the instruction ---- */

typedef struct {
    uint32_t a[4], b[2];
    double d[4];
} lane_registers;

/* mma.m16n8k16 with 16-bit operands, from the PTX ISA: the element that register pair i, half h of lane l is.
 */
static void mma(lane_registers lane[32], qk_format format)
{
    double a[16][16], b[16][8], d[16][8];
    for (int l = 0; l < 32; l++) {
        const int group = l >> 2, in_group = l % 4;
        for (int i = 0; i < 8; i++) { /* a0..a7 */
            const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
            const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
            const uint16_t h = (uint16_t)(lane[l].a[i / 2] >> 16 * (i % 2));
            a[row][column] = format == QK_BF16 ? qk_bf16_to_f32(h) : qk_f16_to_f32(h);
        }
        for (int i = 0; i < 4; i++) { /* b0..b3 */
            const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
            const uint16_t h = (uint16_t)(lane[l].b[i / 2] >> 16 * (i % 2));
            b[row][group] = format == QK_BF16 ? qk_bf16_to_f32(h) : qk_f16_to_f32(h);
        }
    }
    for (int row = 0; row < 16; row++)
        for (int column = 0; column < 8; column++) {
            d[row][column] = 0;
            for (int i = 0; i < 16; i++) d[row][column] += a[row][i] * b[i][column];
        }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) /* c0..c3 */
            lane[l].d[i] += d[i < 2 ? l >> 2 : (l >> 2) + 8][l % 4 * 2 + (i & 1)];
}

static uint32_t word_at(const void *p, int64_t i)
{
    uint32_t w;
    memcpy(&w, (const char *)p + 4 * i, 4);
    return w;
}

/* Fragments of small whole numbers, so that all sums are exact, and the same numbers as rows. */
static uint16_t *new_fragments(int64_t tokens, int64_t k, int slab, double *rows)
{
    uint16_t *x = calloc(2, (size_t)qk_fragment_count(tokens, k, slab));
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < k; i++) {
            rows[t * k + i] = (double)(random_u32() % 17) - 8;
            x[qk_fragment_index(t, i, k, slab)] = qk_f32_to_bf16((float)rows[t * k + i]);
        }
    return x;
}

/* One tile of 16 rows by 8 tokens, as a kernel walks it: chunk c of a slab gives each lane 8 weights of rows
 * g and g + 8 and 8 inputs of token g. load: the 4 pairs of 8 weights of one row. */
typedef void (*load_weights)(const void *data, int64_t k, int64_t row, int64_t slab, int t, int chunk,
                             uint32_t out[4]);

static void tile_product(load_weights load, const void *data, int64_t k, const uint16_t *x, int slab,
                         double y[16][8])
{
    lane_registers lane[32] = {0};
    const int64_t slabs = (k + slab - 1) / slab;
    for (int64_t s = 0; s < slabs; s++)
        for (int c = 0; c < slab / 32; c++)
            for (int step = 0; step < 2; step++) {
                for (int l = 0; l < 32; l++) {
                    uint32_t upper[4], lower[4];
                    load(data, k, l / 4, s, l % 4, c, upper);
                    load(data, k, l / 4 + 8, s, l % 4, c, lower);
                    const int64_t at = ((s * (slab / 32) + c) * 32 + l) * 4 + 2 * step;
                    for (int i = 0; i < 2; i++) {
                        lane[l].a[2 * i] = upper[2 * step + i];
                        lane[l].a[2 * i + 1] = lower[2 * step + i];
                        lane[l].b[i] = word_at(x, at + i);
                    }
                }
                mma(lane, QK_BF16);
            }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) y[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = lane[l].d[i];
}

static void load_16bit(const void *data, int64_t k, int64_t row, int64_t slab, int t, int chunk,
                       uint32_t out[4])
{
    assert_int_equal(chunk, 0);
    const int64_t i = slab * 32 + 8 * t;
    for (int j = 0; j < 4; j++) out[j] = i < k ? word_at(data, (row * k + i) / 2 + j) : 0;
}

/* Codes 0..15 that stand for themselves: absmax 1 and the code book 0, 1, .. 15. */
static void load_4bit(const void *data, int64_t k, int64_t row, int64_t slab, int t, int chunk,
                      uint32_t out[4])
{
    float code[16];
    for (int i = 0; i < 16; i++) code[i] = (float)i;
    const qk_planes planes = planes_of(code, 1, QK_BF16);
    const int64_t piece = slab * 8 + t * 2 + chunk / 4;
    const bool there = 32 * piece < k;
    qk_decode8(&planes, there ? word_at(data, qk_tile_offset(row, piece, k) / 4 + chunk % 4) : 0, out);
}

static void test_fragments_make_the_product(void **state)
{
    (void)state;
    static const int64_t ks[] = {8, 40, 64, 192, 256, 320, 576};
    for (size_t a = 0; a < sizeof ks / sizeof *ks; a++)
        for (int four = 0; four < 2; four++)
            for (int64_t tokens = 1; tokens <= 8; tokens += 7) {
                const int64_t k = ks[a];
                const int slab = four ? QK_SLAB_4BIT : QK_SLAB_16BIT;
                if (four && k % 64) continue;
                double *rows = calloc((size_t)(8 * k), sizeof *rows), y[16][8];
                uint16_t *x = new_fragments(tokens, k, slab, rows);
                double *w = calloc((size_t)(16 * k), sizeof *w);
                uint8_t *data = calloc(2, (size_t)(16 * k));
                for (int64_t i = 0; i < 16 * k; i++) {
                    const uint32_t v = random_u32() % 16;
                    w[i] = v;
                    const uint16_t h = qk_f32_to_bf16((float)v);
                    if (four) {
                        const int64_t at = qk_tile_offset(i / k, i % k / 32, k) + i % 32 / 2;
                        data[at] = (uint8_t)(data[at] | (i % 2 ? v : v << 4));
                    } else {
                        memcpy(data + 2 * i, &h, 2);
                    }
                }
                tile_product(four ? load_4bit : load_16bit, data, k, x, slab, y);
                for (int row = 0; row < 16; row++)
                    for (int token = 0; token < 8; token++) {
                        double expect = 0;
                        for (int64_t i = 0; i < k; i++) expect += w[row * k + i] * rows[token * k + i];
                        assert_true(y[row][token] == expect);
                    }
                free(rows);
                free(x);
                free(w);
                free(data);
            }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_fragments_hold_each_number_once),
        cmocka_unit_test(test_tiles_hold_each_piece_once),
        cmocka_unit_test(test_warps_share_out_the_slabs),
        cmocka_unit_test(test_byte_perm),
        cmocka_unit_test(test_every_byte_decodes_exactly),
        cmocka_unit_test(test_plain_scale_survives_the_nested_formula),
        cmocka_unit_test(test_fragments_make_the_product),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
