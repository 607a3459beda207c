/* Index maps of the CUDA products, for host and device: where activations and 4-bit codes lie so that a lane
 * of mma.sync.m16n8k16 reads its operands by 16-byte loads. Both are pure permutations (with zero padding for
 * activations); tests/core/test_pack.c proves it exhaustively.
 *
 * The weight is the m16 operand (16 outputs), the batch the n8 operand (8 tokens). The instruction sums over
 * k in any order as long as both operands agree, so a lane may own a run of consecutive inputs: lane
 * l = 4 * g + t holds, in every slab of S inputs, inputs t * S/4 .. (t + 1) * S/4 - 1 of rows g and g + 8 of
 * the weight and of token g. S is 32 for 16-bit weights (a lane's share is one 16-byte load of a plain
 * row-major row) and 256 for 4-bit ones (a lane's share is one block of 64: one scale, one table).
 */
#ifndef QK_PACK_H
#define QK_PACK_H

#include "qk_half.h"

#define QK_SLAB_16BIT 32
#define QK_SLAB_4BIT 256

/* ---- activations as fragments: 16-bit numbers, [tile of 8 tokens][slab][chunk][lane][8] ---- */

/* Numbers that `tokens` rows of k inputs take as fragments, padding included. */
QK_HD int64_t qk_fragment_count(int64_t tokens, int64_t k, int slab)
{
    return (tokens + 7) / 8 * ((k + slab - 1) / slab) * 8 * slab;
}

/* Place of input i of token `row`. A chunk of 8 numbers e0..e7 feeds two steps of 16 inputs: the first takes
 * e0, e1 as its low and e2, e3 as its high pair, the second e4, e5 and e6, e7. */
QK_HD int64_t qk_fragment_index(int64_t row, int64_t i, int64_t k, int slab)
{
    int64_t slabs = (k + slab - 1) / slab, at = i % slab;
    int64_t t = at / (slab / 4), within = at % (slab / 4);
    int64_t lane = row % 8 * 4 + t;
    return ((row / 8 * slabs + i / slab) * (slab / 32) + within / 8) * 256 + lane * 8 + within % 8;
}

/* ---- 4-bit codes in tiles: layout QK_LAYOUT_TILES ---- */

#define QK_LAYOUT_ROWS 0  /* bitsandbytes' order: row-major, element 2j in the high nibble of byte j */
#define QK_LAYOUT_TILES 1 /* the same bytes, 16-byte pieces moved */

/* Whether a weight [n, k] in blocks of `block` can be tiled. */
QK_HD int qk_tiles_fit(int64_t n, int64_t k, int block)
{
    return n % 16 == 0 && k % 64 == 0 && block % 64 == 0;
}

/* Byte offset, in the tiled order, of the 16-byte piece that holds inputs 32 * piece .. 32 * piece + 31 of a
 * row. A tile is 16 rows by 4 runs of 64 inputs (fewer at the end of a row): first the first pieces of the
 * runs of rows 0..7, then their second pieces, then those of rows 8..15; within each, row by row, run by run.
 * So the four loads of a warp are 512 consecutive bytes each. */
QK_HD int64_t qk_tile_offset(int64_t row, int64_t piece, int64_t k)
{
    int64_t runs = k / 64, run = piece / 2, step = run / 4;
    int64_t wide = runs - 4 * step < 4 ? runs - 4 * step : 4;
    int64_t tile = row / 16 * 16 * runs + 16 * 4 * step; /* runs before this tile */
    int64_t within = ((row % 16 / 8 * 2 + piece % 2) * 8 + row % 8) * wide + run % 4;
    return tile * 32 + within * 16;
}

/* ---- which warp sums which slabs ---- */

/* A block's warps share out the slabs of a row in turn, QK_TURN_* slabs a turn (each row's part of a turn is
 * 256 or 128 consecutive bytes), and their sums are added in the order of the warps. Slab number i of a warp,
 * i = 0, 1, ... while it is below the number of slabs: nothing but the place in the row goes in, so that no
 * sum depends on the other rows or tokens of a call. */
#define QK_PRODUCT_WARPS 8
#define QK_TURN_16BIT 4
#define QK_TURN_4BIT 1
QK_HD int qk_warp_slab(int warp, int i, int turn)
{
    return (i / turn * QK_PRODUCT_WARPS + warp) * turn + i % turn;
}

#endif
