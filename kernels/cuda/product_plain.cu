/* Products of any weight with any number of tokens, in float32: models in float32, and shapes that fit
 * neither tile nor fragment.
 *
 * A warp owns ROWS outputs for TOKENS tokens. Lane l takes inputs 128 s + 4 l .. + 3 for s = 0, 1, ... by
 * fused multiply-adds in that order; then lanes fold by 16, 8, 4, 2, 1. Nothing else goes into the order of a
 * sum. */
#include "decode4.cuh"
#include "launch.cuh"

namespace
{

enum { WARPS = 8, ROWS = 4, STEP = 128 };

__device__ __forceinline__ float round_to(qk_format f, float v)
{
    return f == QK_BF16 ? qk_round_bf16(v) : f == QK_F16 ? qk_round_f16(v) : v;
}

/* Inputs i .. i + count - 1 of a row, within one block and one piece of 32; the others zero. code [16] in
 * shared memory; block_shift: log2 of the block. */
__device__ __forceinline__ void decode(const qk_cuda_weight &w, const float *code, int block_shift,
                                       int64_t row, int64_t i, int count, float v[4] /* [OUT] */)
{
    const int64_t at = row * w.w.k + i, block = at >> block_shift;
    const uint8_t *bytes = static_cast<const uint8_t *>(w.w.data);
    const bool tiles = w.layout == QK_LAYOUT_TILES;
    if (tiles) bytes += qk_tile_offset(row, i / 32, w.w.k);
    const float absmax = w.nested ? qk_nested_absmax(w.nested[w.absmax8[block]],
                                                     w.nested[257 + block / w.nested_block], w.nested[256])
                                  : w.w.absmax[block];
#pragma unroll
    for (int j = 0; j < 4; j++)
        v[j] = j < count
                   ? round_to(w.w.round_to, qk_mul(code[qk_nibble(bytes, (tiles ? i % 32 : at) + j)], absmax))
                   : 0;
}

/* Inputs i .. i + 3 of a row; `whole`: k % 4 == 0, so that all four are there, in one aligned piece and
 * block. */
template <qk_format FORMAT>
__device__ __forceinline__ void load4(const qk_cuda_weight &w, const float *code, bool whole, int64_t row,
                                      int64_t i, float v[4] /* [OUT] */)
{
    const int64_t at = row * w.w.k + i;
    if (FORMAT == QK_4BIT) {
        const int shift = 31 - __clz(w.w.block);
        if (whole) {
            decode(w, code, shift, row, i, 4, v);
            return;
        }
        float one[4]; /* a row may start anywhere in a block */
#pragma unroll
        for (int j = 0; j < 4; j++) {
            v[j] = 0;
            if (i + j >= w.w.k) continue;
            decode(w, code, shift, row, i + j, 1, one);
            v[j] = one[0];
        }
    } else if (FORMAT == QK_F32) {
        const float *p = static_cast<const float *>(w.w.data) + at;
        const float4 all = whole ? __ldg(reinterpret_cast<const float4 *>(p)) : make_float4(0, 0, 0, 0);
        v[0] = all.x, v[1] = all.y, v[2] = all.z, v[3] = all.w;
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (!whole && i + j < w.w.k) v[j] = p[j];
    } else {
        const uint16_t *p = static_cast<const uint16_t *>(w.w.data) + at;
        const uint2 all = whole ? __ldg(reinterpret_cast<const uint2 *>(p)) : make_uint2(0, 0);
        uint32_t h[4] = {all.x & 0xffffu, all.x >> 16, all.y & 0xffffu, all.y >> 16};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (!whole && i + j < w.w.k) h[j] = p[j];
            v[j] = FORMAT == QK_BF16 ? qk_bf16_to_f32((uint16_t)h[j]) : qk_f16_to_f32((uint16_t)h[j]);
        }
    }
}

template <qk_format FORMAT, int TOKENS>
__global__ void __launch_bounds__(32 * WARPS)
    product_plain(const qk_cuda_weight w, const float *x, int64_t tokens, bool add)
{
    __shared__ float code[16];
    const int lane = threadIdx.x & 31;
    const int64_t n = w.w.n, k = w.w.k;
    const int64_t row = ((int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5)) * ROWS;
    const bool whole = k % 4 == 0;
    if (threadIdx.x < 16) code[threadIdx.x] = w.w.code[threadIdx.x];
    __syncthreads();
    qk_next_may_start();
    qk_wait_earlier();
    for (int64_t token = (int64_t)blockIdx.y * TOKENS; token < tokens; token += (int64_t)gridDim.y * TOKENS) {
        float acc[ROWS][TOKENS] = {};
        for (int64_t i = 4 * lane; i < k; i += STEP) {
            float v[ROWS][4], b[TOKENS][4];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                v[r][0] = v[r][1] = v[r][2] = v[r][3] = 0;
                if (row + r < n) load4<FORMAT>(w, code, whole, row + r, i, v[r]);
            }
#pragma unroll
            for (int j = 0; j < TOKENS; j++) {
                const float *p = x + (token + j) * k + i;
                const bool here = token + j < tokens;
                const float4 all =
                    here && whole ? *reinterpret_cast<const float4 *>(p) : make_float4(0, 0, 0, 0);
                b[j][0] = all.x, b[j][1] = all.y, b[j][2] = all.z, b[j][3] = all.w;
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (here && !whole && i + e < k) b[j][e] = p[e];
            }
#pragma unroll
            for (int e = 0; e < 4; e++)
#pragma unroll
                for (int r = 0; r < ROWS; r++)
#pragma unroll
                    for (int j = 0; j < TOKENS; j++) acc[r][j] = fmaf(v[r][e], b[j][e], acc[r][j]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < TOKENS; j++) {
#pragma unroll
                for (int half = 16; half; half /= 2)
                    acc[r][j] += __shfl_xor_sync(0xffffffffu, acc[r][j], half);
                if (lane != r * TOKENS + j || row + r >= n || token + j >= tokens) continue;
                float *y = w.y + (token + j) * n + row + r;
                const float v = w.bias ? acc[r][j] + w.bias[row + r] : acc[r][j];
                *y = add ? v + *y : v;
            }
    }
}

template <qk_format FORMAT>
int launch(qk_stream stream, const qk_cuda_weight &w, const float *x, int64_t tokens, bool add)
{
    const unsigned blocks = (unsigned)((w.w.n + WARPS * ROWS - 1) / (WARPS * ROWS));
    if (tokens == 1)
        return qk_launch(product_plain<FORMAT, 1>, blocks, 32 * WARPS, 0, stream, w, x, tokens, add);
    const int64_t passes = (tokens + 7) / 8;
    const dim3 grid(blocks, (unsigned)(passes < 65535 ? passes : 65535));
    return qk_launch(product_plain<FORMAT, 8>, grid, 32 * WARPS, 0, stream, w, x, tokens, add);
}

} /* namespace */

int qk_cuda_product_plain(qk_stream stream, const qk_cuda_weight *w, const float *x, int64_t tokens, bool add)
{
    switch (w->w.format) {
    case QK_F32:
        return launch<QK_F32>(stream, *w, x, tokens, add);
    case QK_F16:
        return launch<QK_F16>(stream, *w, x, tokens, add);
    case QK_BF16:
        return launch<QK_BF16>(stream, *w, x, tokens, add);
    case QK_4BIT:
        return launch<QK_4BIT>(stream, *w, x, tokens, add);
    }
    return cudaErrorInvalidValue;
}
