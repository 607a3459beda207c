/* Products of 4-bit weights in tiles with a few tokens. A slab is 256 inputs: lane 4g + t of a warp decodes
 * run t (64 inputs, one scale, one table) of rows g and g + 8 of a tile. */
#include "product.cuh"

namespace
{

/* What a lane has loaded of a slab. */
template <int ROWS> struct slab4 {
    uint4 codes[ROWS][4];        /* 2 * (row g or g + 8) + piece */
    qk_raw_scale scale[ROWS][2]; /* row g, row g + 8 */
};

template <int ROWS> struct tiles4 {
    const unsigned char *codes[ROWS]; /* the tile's first byte */
    uint32_t run[ROWS];               /* the lane's row g, first run */
    int runs, slabs;                  /* of a row */
};

/* Where a row ends within the slab, the lanes that have no run of their own take the last one: their inputs
 * are zero. */
__device__ __forceinline__ int run_within(int wide)
{
    return min((int)(threadIdx.x & 3), wide - 1);
}

template <int ROWS>
__device__ __forceinline__ void fetch_piece(const tiles4<ROWS> &tiles, int slab, int piece, slab4<ROWS> &s)
{
    const int g = (threadIdx.x & 31) >> 2, wide = min(4, tiles.runs - 4 * slab);
    const unsigned at = (unsigned)slab * 2048 + (unsigned)((piece * 8 + g) * wide + run_within(wide)) * 16;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++)
            s.codes[r][2 * h + piece] = qk_load_once(tiles.codes[r] + (at + (unsigned)(h * wide) * 256));
    }
}

template <int ROWS>
__device__ __forceinline__ void fetch_scale(const tiles4<ROWS> &tiles, const qk_scales &scales, int slab,
                                            int r, slab4<ROWS> &s)
{
    const uint32_t run = tiles.run[r] + (uint32_t)(4 * slab + run_within(tiles.runs - 4 * slab));
    s.scale[r][0] = qk_fetch_scale(scales, run);
    s.scale[r][1] = qk_fetch_scale(scales, run + 8 * (uint32_t)tiles.runs);
}

__device__ __forceinline__ uint32_t word(const uint4 &v, int i)
{
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

/* One tile of 16 rows takes the next slab whole before it works on this one; two tiles, short of registers,
 * take its first pieces when this one's are done with, and then its second ones. */
template <bool BF16, int NB, int ROWS>
__global__ void __launch_bounds__(QK_PRODUCT_THREADS, NB < 4 ? 2 : 1) product4(const qk_product_call call)
{
    __shared__ __align__(16) float code[ROWS][16], map[ROWS][257];
    __shared__ qk_scales scales[ROWS];
    const int warp = threadIdx.x >> 5;
    tiles4<ROWS> tiles;
    tiles.runs = call.k / 64;
    tiles.slabs = (tiles.runs + 3) / 4;
    slab4<ROWS> now, next;
    int slab = qk_warp_slab(warp, 0, QK_TURN_4BIT);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int row;
        const qk_product_weight &w = call.w[qk_product_tile<ROWS>(call, r, &row)];
        if (row >= w.n) row = 0; /* past the last row: the sums go nowhere */
        tiles.codes[r] = w.data + (int64_t)row * (call.k / 2);
        tiles.run[r] = (uint32_t)(row + ((threadIdx.x & 31) >> 2)) * (uint32_t)tiles.runs;
        if (slab < tiles.slabs) fetch_scale<ROWS>(tiles, w.scales, slab, r, now);
        if (threadIdx.x < 16) code[r][threadIdx.x] = w.code[threadIdx.x];
        if (threadIdx.x == 0) scales[r] = w.scales;
        qk_copy_map(w.scales, map[r]);
    }
#pragma unroll
    for (int piece = 0; piece < 2; piece++)
        if (slab < tiles.slabs) fetch_piece<ROWS>(tiles, slab, piece, now);
    qk_next_may_start();
    __syncthreads();
    qk_wait_earlier();

    float acc[ROWS][NB][4] = {};
    for (int i = 1; slab < tiles.slabs; i++) {
        const int after = qk_warp_slab(warp, i, QK_TURN_4BIT);
        const bool more = after < tiles.slabs;
        qk_product_inputs<NB> x(call, slab, tiles.slabs, QK_SLAB_4BIT);
        qk_planes planes[ROWS][2];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int h = 0; h < 2; h++)
                planes[r][h] = qk_decode_table<BF16>(code[r], qk_scale(now.scale[r][h], map[r]));
            if (more) fetch_scale<ROWS>(tiles, scales[r], after, r, now);
        }
#pragma unroll
        for (int piece = 0; piece < 2; piece++) {
            if (more && ROWS == 1) fetch_piece<ROWS>(tiles, after, piece, next);
#pragma unroll(NB == 8 || NB == 2 ? 1 : 4) /* unrolled, inputs are fetched into registers that lack */
            for (int c = 0; c < 4; c++) {
                if (piece > 0 && c == 0) __syncwarp(); /* keeps the second piece's inputs out of the first */
                uint32_t first[ROWS][4], second[ROWS][4]; /* steps of 16 inputs */
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    uint32_t upper[4], lower[4];
                    qk_decode8(&planes[r][0], word(now.codes[r][piece], c), upper);
                    qk_decode8(&planes[r][1], word(now.codes[r][2 + piece], c), lower);
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        first[r][2 * j] = upper[j];
                        first[r][2 * j + 1] = lower[j];
                        second[r][2 * j] = upper[2 + j];
                        second[r][2 * j + 1] = lower[2 + j];
                    }
                }
#pragma unroll
                for (int nb = 0; nb < NB; nb++) {
                    const uint4 b = x.load(nb, 4 * piece + c);
#pragma unroll
                    for (int r = 0; r < ROWS; r++) {
                        qk_product_step<BF16>(acc[r][nb], first[r], b.x, b.y);
                        qk_product_step<BF16>(acc[r][nb], second[r], b.z, b.w);
                    }
                }
            }
            if (more && ROWS > 1) fetch_piece<ROWS>(tiles, after, piece, now);
        }
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (ROWS == 1) now.codes[0][j] = next.codes[0][j];
        slab = after;
    }
    qk_product_finish<NB, ROWS>(call, acc);
}

template <bool BF16>
int launch(qk_stream stream, const qk_product_call &call, int nb, int rows, unsigned blocks)
{
    void (*kernel)(qk_product_call) = nb == 8     ? product4<BF16, 8, 2>
                                      : nb == 4   ? product4<BF16, 4, 2>
                                      : nb == 2   ? product4<BF16, 2, 2>
                                      : rows == 2 ? product4<BF16, 1, 2>
                                                  : product4<BF16, 1, 1>;
    return qk_launch(kernel, blocks, QK_PRODUCT_THREADS, 0, stream, call);
}

} /* namespace */

int qk_product_launch4(qk_stream stream, const qk_product_call &call, bool bf16, int nb, int rows,
                       unsigned blocks)
{
    return bf16 ? launch<true>(stream, call, nb, rows, blocks)
                : launch<false>(stream, call, nb, rows, blocks);
}
