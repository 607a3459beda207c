/* 4-bit codes: encoding, decoding, and moving between row-major order and tiles. All exact. */
#include "reduce.cuh"

#include "qk_nf4.h"

/* Of a block, which is a power of two: indices are shifted, not divided. */
static int log2_of(int power)
{
    int shift = 0;
    while (power > 1 << shift) shift++;
    return shift;
}

/* ---- encoding ---- */

enum {
    QUANTIZE_THREADS = 512, /* of eight weights: the largest block, 4096 */
    QUANTIZE_SPAN = QUANTIZE_THREADS * 8,
};

typedef struct {
    float thresholds[15];
    uint64_t order; /* 16 codes of 4 bits, the lowest first */
    unsigned zero_code;
} encoder;

/* The code of x: as many thresholds as it exceeds choose one of `order`. A NaN exceeds none. */
__device__ __forceinline__ unsigned encode(const encoder &e, float x)
{
    int above = 0;
#pragma unroll
    for (int t = 0; t < 15; t++) above += x > e.thresholds[t];
    return (unsigned)(e.order >> 4 * above) & 15u;
}

/* The largest over `lanes` threads in a row, a power of two that divides the block; all get it. */
__device__ __forceinline__ float group_largest(float a, int lanes)
{
    __shared__ float part[QUANTIZE_THREADS / 32];
    for (int step = 1; step < lanes && step < 32; step *= 2)
        a = qk_largest::apply(a, __shfl_xor_sync(QK_ALL_LANES, a, step));
    if (lanes <= 32) return a;
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = a;
    __syncthreads();
    const int first = threadIdx.x / lanes * lanes / 32;
    for (int i = 0; i < lanes / 32; i++) a = qk_largest::apply(a, part[first + i]);
    return a;
}

/* A thread encodes eight weights, which lie in one block; block / 8 threads share an absmax. */
template <qk_format F, bool WIDE>
static __global__ void __launch_bounds__(QUANTIZE_THREADS)
    quantize4(const void *src, int64_t n, int shift, encoder e, uint8_t *packed, float *absmax)
{
    qk_wait_earlier();
    const int64_t i = (int64_t)blockIdx.x * QUANTIZE_SPAN + threadIdx.x * 8;
    float v[8], a = 0;
    qk_load8<F, WIDE>(src, i, n, v);
#pragma unroll
    for (int j = 0; j < 8; j++) a = fabsf(v[j]) > a ? fabsf(v[j]) : a; /* a NaN is no maximum */
    a = group_largest(a, 1 << shift >> 3);
    if (i >= n) return;
    if (i >> shift << shift == i) absmax[i >> shift] = a;
    const float inverse = 1.0f / a;
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const unsigned code = a > 0 && i + j < n ? encode(e, qk_mul(v[j], inverse)) : e.zero_code;
        word |= code << (j / 2 * 8 + (j % 2 ? 0 : 4));
    }
    if (WIDE && i + 8 <= n) {
        *(uint32_t *)(packed + i / 2) = word;
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (i + 2 * j < n) packed[i / 2 + j] = (uint8_t)(word >> 8 * j);
}

template <qk_format F>
static int launch_quantize(qk_stream stream, const void *src, int64_t n, int shift, const encoder &e,
                           uint8_t *packed, float *absmax)
{
    bool wide = qk_is_wide(src) && qk_is_wide(packed);
    return qk_launch(wide ? quantize4<F, true> : quantize4<F, false>,
                     dim3((unsigned)qk_ceil_div(n, QUANTIZE_SPAN)), dim3(QUANTIZE_THREADS), 0, stream, src, n,
                     shift, e, packed, absmax);
}

int qk_cuda_quantize4(qk_stream stream, qk_format from, const void *src, int64_t n, int block,
                      const float *thresholds, const uint8_t *order, int zero_code, uint8_t *packed,
                      float *absmax)
{
    if (block < 32 || block > QUANTIZE_SPAN || (block & (block - 1))) return cudaErrorInvalidValue;
    encoder e = {};
    memcpy(e.thresholds, thresholds, sizeof e.thresholds);
    for (int i = 0; i < 16; i++) e.order |= (uint64_t)order[i] << 4 * i;
    e.zero_code = (unsigned)zero_code;
    switch (from) {
    case QK_F32:
        return launch_quantize<QK_F32>(stream, src, n, log2_of(block), e, packed, absmax);
    case QK_F16:
        return launch_quantize<QK_F16>(stream, src, n, log2_of(block), e, packed, absmax);
    case QK_BF16:
        return launch_quantize<QK_BF16>(stream, src, n, log2_of(block), e, packed, absmax);
    default:
        return cudaErrorInvalidValue;
    }
}

/* ---- decoding ---- */

enum { DECODE_THREADS = 256, DECODE_WORDS = 4 /* of eight codes, loaded together by a thread */ };

/* What decoding needs of a weight, as a kernel's argument. */
typedef struct {
    const uint8_t *data, *absmax8;
    const float *absmax, *nested;
    float code[16];
    int shift, nested_shift; /* of a block and a nested block */
    int64_t n, k;
} decoder;

__device__ __forceinline__ float scale_of(const decoder &d, int64_t i)
{
    const int64_t block = i >> d.shift;
    if (!d.nested) return d.absmax[block];
    return qk_nested_absmax(d.nested[d.absmax8[block]], d.nested[257 + (block >> d.nested_shift)],
                            d.nested[256]);
}

template <qk_format ROUND> __device__ __forceinline__ float decoded(float code, float scale)
{
    const float v = qk_mul(code, scale);
    if constexpr (ROUND == QK_F32)
        return v;
    else
        return qk_widen<ROUND>(qk_round_pair(ROUND, v, 0.0f) & 0xffffu);
}

/* Rows of `length` weights, `parts` blocks a row; without tiles the whole matrix is one row. Neighbouring
 * threads write neighbouring 16 (F32: 32) bytes. The 16 values lie in 16 banks of shared memory, so that
 * lanes never wait for each other. WIDE: everything is aligned and rows are whole words of eight codes. */
template <qk_format ROUND, qk_format TO, bool TILES, bool WIDE>
static __global__ void __launch_bounds__(DECODE_THREADS)
    dequantize4(decoder d, int64_t length, unsigned parts, void *dst)
{
    __shared__ float code[16];
    qk_wait_earlier();
    if (threadIdx.x == 0) { /* by constant indices: an argument indexed at run time goes to local memory */
#pragma unroll
        for (int i = 0; i < 16; i++) code[i] = d.code[i];
    }
    __syncthreads();
    const int64_t row = blockIdx.x / parts, start = row * length;
    const int64_t first = (int64_t)(blockIdx.x % parts) * (blockDim.x * DECODE_WORDS * 8) + threadIdx.x * 8;
    uint32_t word[DECODE_WORDS];
#pragma unroll
    for (int j = 0; j < DECODE_WORDS; j++) {
        const int64_t i = first + j * (int64_t)(blockDim.x * 8);
        word[j] = 0;
        if (i >= length) continue;
        const int64_t at = TILES ? qk_tile_offset(row, i / 32, length) + i % 32 / 2 : (start + i) / 2;
        if (WIDE) {
            word[j] = *(const uint32_t *)(d.data + at);
        } else {
#pragma unroll
            for (int b = 0; b < 4; b++)
                if (i + 2 * b < length) word[j] |= (uint32_t)d.data[at + b] << 8 * b;
        }
    }
#pragma unroll
    for (int j = 0; j < DECODE_WORDS; j++) {
        const int64_t i = first + j * (int64_t)(blockDim.x * 8);
        if (i >= length) continue;
        const float scale = scale_of(d, start + i);
        float v[8];
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const unsigned nibble = word[j] >> (b / 2 * 8 + (b % 2 ? 0 : 4)) & 15u;
            v[b] = decoded < ROUND == TO ? QK_F32 : ROUND > (code[nibble], scale); /* else the store rounds */
        }
        qk_store8<TO, WIDE>(dst, start + i, start + length, v);
    }
}

template <qk_format ROUND, qk_format TO>
static int launch_dequantize(qk_stream stream, const decoder &d, bool tiles, void *dst)
{
    int64_t length = tiles ? d.k : d.n * d.k, rows = tiles ? d.n : 1;
    unsigned threads = qk_row_threads(qk_ceil_div(length, DECODE_WORDS * 8), DECODE_THREADS);
    int64_t parts = qk_ceil_div(length, threads * DECODE_WORDS * 8);
    bool wide = qk_is_wide(d.data) && qk_is_wide(dst);
    auto kernel = tiles ? (wide ? dequantize4<ROUND, TO, true, true> : dequantize4<ROUND, TO, true, false>)
                        : (wide ? dequantize4<ROUND, TO, false, true> : dequantize4<ROUND, TO, false, false>);
    return qk_launch(kernel, dim3((unsigned)(rows * parts)), dim3(threads), 0, stream, d, length,
                     (unsigned)parts, dst);
}

template <qk_format ROUND>
static int launch_dequantize_to(qk_stream stream, const decoder &d, bool tiles, qk_format to, void *dst)
{
    switch (to) {
    case QK_F32:
        return launch_dequantize<ROUND, QK_F32>(stream, d, tiles, dst);
    case QK_F16:
        return launch_dequantize<ROUND, QK_F16>(stream, d, tiles, dst);
    case QK_BF16:
        return launch_dequantize<ROUND, QK_BF16>(stream, d, tiles, dst);
    default:
        return cudaErrorInvalidValue;
    }
}

int qk_cuda_dequantize4(qk_stream stream, const qk_cuda_weight *weight, qk_format to, void *dst)
{
    const qk_matrix *w = &weight->w;
    bool tiles = weight->layout == QK_LAYOUT_TILES;
    if (w->format != QK_4BIT || (tiles && !qk_tiles_fit(w->n, w->k, w->block))) return cudaErrorInvalidValue;
    decoder d = {};
    d.data = (const uint8_t *)w->data;
    d.absmax8 = weight->absmax8;
    d.absmax = w->absmax;
    d.nested = weight->nested;
    memcpy(d.code, w->code, sizeof d.code);
    d.shift = log2_of(w->block);
    d.nested_shift = log2_of(weight->nested_block);
    d.n = w->n;
    d.k = w->k;
    switch (w->round_to) {
    case QK_F32:
        return launch_dequantize_to<QK_F32>(stream, d, tiles, to, dst);
    case QK_F16:
        return launch_dequantize_to<QK_F16>(stream, d, tiles, to, dst);
    case QK_BF16:
        return launch_dequantize_to<QK_BF16>(stream, d, tiles, to, dst);
    default:
        return cudaErrorInvalidValue;
    }
}

/* ---- tiles ---- */

/* A block a row: its 16-byte pieces to their places, or back. */
template <bool UNDO> static __global__ void tile4(const uint8_t *src, int64_t k, uint8_t *dst)
{
    qk_wait_earlier();
    const int64_t row = blockIdx.x, pieces = k / 32;
    for (int64_t piece = threadIdx.x; piece < pieces; piece += blockDim.x) {
        const int64_t plain = (row * pieces + piece) * 16, tiled = qk_tile_offset(row, piece, k);
        *(uint4 *)(dst + (UNDO ? plain : tiled)) = *(const uint4 *)(src + (UNDO ? tiled : plain));
    }
}

int qk_cuda_tile4(qk_stream stream, const uint8_t *src, int64_t n, int64_t k, bool undo, uint8_t *dst)
{
    if (!qk_tiles_fit(n, k, 64) || !qk_is_wide(src) || !qk_is_wide(dst)) return cudaErrorInvalidValue;
    return qk_launch(undo ? tile4<true> : tile4<false>, dim3((unsigned)n), dim3(qk_row_threads(k / 32, 256)),
                     0, stream, src, k, dst);
}
