/* What the two products on tensor cores share: what they are launched with, and what they do with their sums.
 *
 * A block owns ROWS tiles of 16 outputs for all tokens of the call (NB tiles of 8), its 8 warps share out the
 * inputs (qk_warp_slab). Neither NB nor ROWS has a say in the order of a sum.
 */
#ifndef QK_PRODUCT_CUH
#define QK_PRODUCT_CUH

#include "decode4.cuh"
#include "launch.cuh"

#define QK_PRODUCT_THREADS (32 * QK_PRODUCT_WARPS)

struct qk_product_weight {
    const unsigned char *data;
    const float *bias; /* or NULL */
    float *y;
    int n;
    unsigned first; /* its first block */
    qk_scales scales;
    float code[16];
};

struct qk_product_call {
    qk_product_weight w[3]; /* SwiGLU: gate, up */
    const uint4 *x;
    int k, count, tokens;
    bool add;
    void *dst; /* SwiGLU: where its fragments go; else NULL */
    qk_format to;
    int slab;
    int padded; /* SwiGLU: inputs of the next product, whole slabs */
};

int qk_product_launch16(qk_stream stream, const qk_product_call &call, bool bf16, int nb, int rows,
                        unsigned blocks);
int qk_product_launch4(qk_stream stream, const qk_product_call &call, bool bf16, int nb, int rows,
                       unsigned blocks);

/* Which weight, and from which row on, tile r of this block is. SwiGLU takes the same rows of two weights. */
template <int ROWS>
__device__ __forceinline__ int qk_product_tile(const qk_product_call &call, int r, int *row /* [OUT] */)
{
    if (ROWS == 2 && call.dst) {
        *row = (int)blockIdx.x * 16;
        return r;
    }
    const int which =
        (call.count > 1 && blockIdx.x >= call.w[1].first) + (call.count > 2 && blockIdx.x >= call.w[2].first);
    *row = ((int)(blockIdx.x - call.w[which].first) * ROWS + r) * 16;
    return which;
}

template <bool BF16>
__device__ __forceinline__ void qk_product_step(float d[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    const uint32_t b[2] = {b0, b1};
    if (BF16)
        qk_mma_bf16(d, a, b);
    else
        qk_mma_f16(d, a, b);
}

/* Slab `at` of the inputs, chunk by chunk of the 8 tokens from 8 nb on. What has no token takes
 * another's numbers, since its sums go nowhere: lanes with one tile of tokens the first token's (so that a
 * call for one token reads an eighth of the fragments), tiles past the last the first tile's. Ordinary loads:
 * with overlapping launches x may have been written after this kernel started. */
template <int NB> struct qk_product_inputs {
    const uint4 *x;
    int tile[NB]; /* from there on: an int each, for a pointer takes two registers */

    __device__ __forceinline__ qk_product_inputs(const qk_product_call &call, int at, int slabs, int slab)
        : x(call.x)
    {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int nb = 0; nb < NB; nb++) {
            const int from = 8 * nb < call.tokens ? nb : 0, mine = lane >> 2 < call.tokens ? lane : lane & 3;
            tile[nb] = (from * slabs + at) * slab + (NB > 1 ? lane : mine);
        }
    }
    __device__ __forceinline__ uint4 load(int nb, int chunk) const
    {
        return x[tile[nb] + chunk * 32];
    }
};

__device__ __forceinline__ void qk_product_put16(const qk_product_call &call, int token, int row, float v)
{
    const int n = call.w[0].n;
    const int64_t at = call.slab == QK_SLAB_16BIT ? qk_fragment_index(token, row, n, QK_SLAB_16BIT)
                                                  : qk_fragment_index(token, row, n, QK_SLAB_4BIT);
    const uint32_t bits = call.to == QK_BF16 ? qk_bf16x2(v, 0) : qk_f16x2(v, 0);
    static_cast<uint16_t *>(call.dst)[at] = (uint16_t)bits;
}

/* Zeros for the inputs of the next product between the last block's rows and the end of their slab. */
__device__ __forceinline__ void qk_product_pad(const qk_product_call &call)
{
    if (blockIdx.x != gridDim.x - 1) return;
    for (int row = (int)gridDim.x * 16 + threadIdx.x; row < call.padded; row += QK_PRODUCT_THREADS)
        for (int token = 0; token < (call.tokens + 7) / 8 * 8; token++) qk_product_put16(call, token, row, 0);
}

/* Sums of the warps, a few tiles of 16 x 8 at a time. Token after token, 20 words each: lanes 4g + t then
 * write to banks g + 8t, all different. */
#define QK_PART_TOKEN 20
#define QK_PART_TILE (8 * QK_PART_TOKEN)

/* In the order of the warps; p: the first warp's part of a tile, `stride` words from one warp to the next. */
__device__ __forceinline__ float qk_product_sum(const float *p, int stride, int token, int row)
{
    p += token * QK_PART_TOKEN + row;
    float sum = p[0];
#pragma unroll
    for (int warp = 1; warp < QK_PRODUCT_WARPS; warp++) sum += p[warp * stride];
    return sum;
}

__device__ __forceinline__ void qk_product_store(const qk_product_call &call, const qk_product_weight &w,
                                                 int token, int row, float sum)
{
    if (row >= w.n || token >= call.tokens) return;
    float *y = w.y + (int64_t)token * w.n + row;
    if (w.bias) sum += w.bias[row];
    *y = call.add ? sum + *y : sum;
}

/* Padding tokens of the last tile of 8 get zeros, those of tiles that are not there nothing. */
__device__ __forceinline__ void qk_product_store_swiglu(const qk_product_call &call, int token, int row,
                                                        float gate, float up)
{
    if (token >= (call.tokens + 7) / 8 * 8) return;
    const bool real = row < call.w[0].n && token < call.tokens;
    if (real && call.w[0].bias) gate += call.w[0].bias[row];
    if (real && call.w[1].bias) up += call.w[1].bias[row];
    qk_product_put16(call, token, row, real ? gate / (1.0f + expf(-gate)) * up : 0);
}

/* Adds up the warps' sums and stores them. acc[r][nb]: as qk_mma leaves it. */
template <int NB, int ROWS>
__device__ __forceinline__ void qk_product_finish(const qk_product_call &call, const float acc[ROWS][NB][4])
{
    constexpr int ROUND = NB * ROWS < 4 ? NB * ROWS : 4, STRIDE = ROUND * QK_PART_TILE;
    __shared__ float part[QK_PRODUCT_WARPS * STRIDE];
    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int round = 0; round < NB * ROWS; round += ROUND) {
        if (round) __syncthreads();
#pragma unroll
        for (int i = 0; i < ROUND; i++) {
            const float *d = acc[(round + i) % ROWS][(round + i) / ROWS];
            float *p = part + warp * STRIDE + i * QK_PART_TILE + 2 * t * QK_PART_TOKEN + g;
            p[0] = d[0];
            p[QK_PART_TOKEN] = d[1];
            p[8] = d[2];
            p[QK_PART_TOKEN + 8] = d[3];
        }
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < ROUND * 128; i += QK_PRODUCT_THREADS) {
            const int tile = i / 128, r = (round + tile) % ROWS, token = i % 128 / 16, within = i % 16;
            const float *p = part + tile * QK_PART_TILE;
            int row;
            const qk_product_weight &w = call.w[qk_product_tile<ROWS>(call, r, &row)];
            const int at = (round + tile) / ROWS * 8 + token;
            const float sum = qk_product_sum(p, STRIDE, token, within);
            if (ROWS == 1 || !call.dst)
                qk_product_store(call, w, at, row + within, sum);
            else if (r == 0) /* the tile after a gate's is its up */
                qk_product_store_swiglu(call, at, row + within, sum,
                                        qk_product_sum(p + QK_PART_TILE, STRIDE, token, within));
        }
    }
    if (ROWS == 2 && call.dst) qk_product_pad(call);
}

#endif
