/* Activations for 16-bit products: F32 rows, their RMSNorm or their SwiGLU, rounded once and laid out
 * row-major or as fragments (qk_pack.h). */
#include "reduce.cuh"

enum { THREADS = 128 }; /* of a block that has no sum to make */

/* Chunk of eight inputs i.. of a row to its place: both layouts keep eight neighbours together. */
template <int SLAB, bool WIDE>
__device__ __forceinline__ void store_chunk(qk_format to, uint16_t *dst, int64_t row, int64_t i, int64_t k,
                                            const float v[8])
{
    const uint4 packed = qk_round_eight(to, v);
    if constexpr (SLAB != 0) {
        *(uint4 *)(dst + qk_fragment_index(row, i, k, SLAB)) = packed;
    } else if (WIDE) {
        *(uint4 *)(dst + row * k + i) = packed;
    } else {
        const uint32_t word[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (i + j < k) dst[row * k + i + j] = (uint16_t)(word[j / 2] >> j % 2 * 16);
    }
}

/* `parts` blocks a token, padding tokens included. NORM: one block a token, which first reads the whole row.
 */
template <qk_source_kind KIND, int SLAB, bool WIDE>
static __global__ void __launch_bounds__(1024)
    pack(qk_cuda_source source, qk_format to, unsigned parts, int64_t tokens, int64_t k, uint16_t *dst)
{
    qk_wait_earlier();
    qk_next_may_start();
    const unsigned part = blockIdx.x % parts;
    const int64_t token = blockIdx.x / parts;
    const bool padding = token >= tokens;
    const int64_t row = padding ? 0 : source.rows ? source.rows[token] : token;
    const float *x = source.x + row * k;
    float scale = 0;
    if constexpr (KIND == QK_SOURCE_NORM) {
        if (!padding) scale = qk_norm_scale<WIDE>(x, k, source.eps);
    }
    const int64_t end = SLAB ? (k + SLAB - 1) / (SLAB ? SLAB : 1) * SLAB : k;
    for (int64_t i = (int64_t)(part * blockDim.x + threadIdx.x) * 8; i < end; i += parts * blockDim.x * 8) {
        float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (!padding && i < k) {
            qk_load8<QK_F32, WIDE>(x, i, k, v);
            if constexpr (KIND != QK_SOURCE_PLAIN) {
                float other[8];
                qk_load8<QK_F32, WIDE>(KIND == QK_SOURCE_NORM ? source.w : source.up + row * k, i, k, other);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float made =
                        KIND == QK_SOURCE_NORM ? v[j] * scale * other[j] : qk_silu_times(v[j], other[j]);
                    v[j] = WIDE || i + j < k ? made : 0.0f; /* 0 times a scale that is NaN is not zero */
                }
            }
        }
        store_chunk<SLAB, WIDE>(to, dst, token, i, k, v);
    }
}

template <qk_source_kind KIND, int SLAB>
static int launch_pack(qk_stream stream, const qk_cuda_source *s, qk_format to, int64_t t, int64_t k,
                       uint16_t *dst)
{
    bool wide = k % 8 == 0 && qk_is_wide(s->x) && qk_is_wide(dst);
    if (KIND == QK_SOURCE_NORM) wide = wide && qk_is_wide(s->w);
    if (KIND == QK_SOURCE_SWIGLU) wide = wide && qk_is_wide(s->up);
    int64_t tokens = SLAB ? qk_ceil_div(t, 8) * 8 : t;
    int64_t chunks = SLAB ? qk_ceil_div(k, SLAB ? SLAB : 1) * (SLAB / 8) : qk_ceil_div(k, 8);
    unsigned threads = KIND == QK_SOURCE_NORM ? qk_norm_threads(k) : qk_row_threads(chunks, THREADS);
    unsigned parts = KIND == QK_SOURCE_NORM ? 1 : (unsigned)qk_ceil_div(chunks, threads);
    return qk_launch(wide ? pack<KIND, SLAB, true> : pack<KIND, SLAB, false>, dim3((unsigned)tokens * parts),
                     dim3(threads), 0, stream, *s, to, parts, t, k, dst);
}

template <int SLAB>
static int launch_pack_as(qk_stream stream, const qk_cuda_source *s, qk_format to, int64_t t, int64_t k,
                          uint16_t *dst)
{
    switch (s->kind) {
    case QK_SOURCE_PLAIN:
        return launch_pack<QK_SOURCE_PLAIN, SLAB>(stream, s, to, t, k, dst);
    case QK_SOURCE_NORM:
        return launch_pack<QK_SOURCE_NORM, SLAB>(stream, s, to, t, k, dst);
    case QK_SOURCE_SWIGLU:
        return launch_pack<QK_SOURCE_SWIGLU, SLAB>(stream, s, to, t, k, dst);
    }
    return cudaErrorInvalidValue;
}

int qk_cuda_pack(qk_stream stream, const qk_cuda_source *source, qk_format to, int slab, int64_t t, int64_t k,
                 void *dst)
{
    if ((to != QK_F16 && to != QK_BF16) || (slab && !qk_is_wide(dst))) return cudaErrorInvalidValue;
    switch (slab) {
    case 0:
        return launch_pack_as<0>(stream, source, to, t, k, (uint16_t *)dst);
    case QK_SLAB_16BIT:
        return launch_pack_as<QK_SLAB_16BIT>(stream, source, to, t, k, (uint16_t *)dst);
    case QK_SLAB_4BIT:
        return launch_pack_as<QK_SLAB_4BIT>(stream, source, to, t, k, (uint16_t *)dst);
    default:
        return cudaErrorInvalidValue;
    }
}
