/* Products with a few tokens: which kernel a weight takes, and the one for 16-bit weights, which are read as
 * they lie: in a slab of 32 inputs lane 4g + t holds 8 consecutive inputs of rows g and g + 8 of a tile. */
#include "product.cuh"

namespace
{

/* UNIT slabs are loaded together, while the UNIT before is summed: 2 * UNIT * ROWS loads of 16 bytes a lane.
 */
template <int UNIT, int ROWS> struct unit16 {
    uint4 w[UNIT][ROWS][2]; /* row g, row g + 8 */
};

template <int ROWS> struct tiles16 {
    const uint16_t *row[ROWS][2]; /* the lane's */
};

/* Past the end of a row its last 8 inputs are read once more: what they meet is zero. */
template <int UNIT, int ROWS>
__device__ __forceinline__ void fetch(const tiles16<ROWS> &tiles, int k, int slab, unit16<UNIT, ROWS> &unit)
{
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int u = 0; u < UNIT; u++) {
        const int at = min((slab + u) * QK_SLAB_16BIT + 8 * t, k - 8);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) unit.w[u][r][h] = qk_load_once(tiles.row[r][h] + at);
    }
}

template <bool BF16, int NB, int ROWS>
__global__ void __launch_bounds__(QK_PRODUCT_THREADS, NB < 8 ? 2 : 1) product16(const qk_product_call call)
{
    constexpr int UNIT = ROWS == 1 ? 4 : NB < 4 ? 2 : 1;
    const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2;
    const int slabs = (call.k + QK_SLAB_16BIT - 1) / QK_SLAB_16BIT;
    tiles16<ROWS> tiles;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        int row;
        const qk_product_weight &w = call.w[qk_product_tile<ROWS>(call, r, &row)];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int mine = min(row + g + 8 * h, w.n - 1); /* past the last row: the sums go nowhere */
            tiles.row[r][h] = reinterpret_cast<const uint16_t *>(w.data) + (int64_t)mine * call.k;
        }
    }
    unit16<UNIT, ROWS> now, next;
    int slab = qk_warp_slab(warp, 0, QK_TURN_16BIT);
    if (slab < slabs) fetch<UNIT, ROWS>(tiles, call.k, slab, now);
    qk_next_may_start();
    qk_wait_earlier();

    float acc[ROWS][NB][4] = {};
    for (int i = UNIT; slab < slabs; i += UNIT) {
        const int after = qk_warp_slab(warp, i, QK_TURN_16BIT);
        if (after < slabs) fetch<UNIT, ROWS>(tiles, call.k, after, next);
#pragma unroll
        for (int u = 0; u < UNIT; u++) {
            const qk_product_inputs<NB> x(call, slab + u, slabs, QK_SLAB_16BIT);
            const bool there = slab + u < slabs;
            uint32_t first[ROWS][4], second[ROWS][4]; /* steps of 16 inputs */
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const uint4 upper = now.w[u][r][0], lower = now.w[u][r][1];
                first[r][0] = upper.x, first[r][1] = lower.x, first[r][2] = upper.y, first[r][3] = lower.y;
                second[r][0] = upper.z, second[r][1] = lower.z, second[r][2] = upper.w,
                second[r][3] = lower.w;
            }
#pragma unroll
            for (int nb = 0; nb < NB; nb++) {
                const uint4 b = there ? x.load(nb, 0) : make_uint4(0, 0, 0, 0);
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    qk_product_step<BF16>(acc[r][nb], first[r], b.x, b.y);
                    qk_product_step<BF16>(acc[r][nb], second[r], b.z, b.w);
                }
            }
        }
        now = next;
        slab = after;
    }
    qk_product_finish<NB, ROWS>(call, acc);
}

template <bool BF16>
int launch(qk_stream stream, const qk_product_call &call, int nb, int rows, unsigned blocks)
{
    void (*kernel)(qk_product_call) = nb == 8     ? product16<BF16, 8, 2>
                                      : nb == 4   ? product16<BF16, 4, 2>
                                      : nb == 2   ? product16<BF16, 2, 2>
                                      : rows == 2 ? product16<BF16, 1, 2>
                                                  : product16<BF16, 1, 1>;
    return qk_launch(kernel, blocks, QK_PRODUCT_THREADS, 0, stream, call);
}

/* Tiles of 16 outputs a block takes. Two read the inputs once for both, which counts as soon as a slab of
 * them (512 bytes a token and slab of 256) weighs as much as the 2 KB of 4-bit codes it meets; but one gives
 * twice as many blocks, which counts while there are fewer than two for each of some 130 multiprocessors. */
int rows_a_block(int64_t tokens, int64_t n)
{
    return tokens > 8 || (tokens > 2 && n >= 8192) ? 2 : 1;
}

int shift_of(int64_t power)
{
    int shift = 0;
    while (power >> shift > 1) shift++;
    return shift;
}

qk_product_weight describe(const qk_cuda_weight &w)
{
    qk_product_weight p = {};
    p.data = static_cast<const unsigned char *>(w.w.data);
    p.bias = w.bias;
    p.y = w.y;
    p.n = (int)w.w.n;
    if (w.w.format != QK_4BIT) return p;
    const int runs = shift_of(w.w.block / 64);
    p.scales = {w.w.absmax, NULL, NULL, runs, runs};
    if (w.nested) p.scales = {w.nested + 257, w.absmax8, w.nested, runs + shift_of(w.nested_block), runs};
    memcpy(p.code, w.w.code, sizeof p.code);
    return p;
}

/* Fills in what no weight says, and launches: `rows` tiles a block, `blocks` of them. */
int run(qk_stream stream, const qk_cuda_weight &w, qk_product_call &call, const void *x, int64_t tokens,
        int rows, unsigned blocks)
{
    const int nb = tokens <= 8 ? 1 : tokens <= 16 ? 2 : tokens <= 32 ? 4 : 8;
    const bool bf16 = qk_cuda_product_format(&w) == QK_BF16;
    call.x = static_cast<const uint4 *>(x);
    call.k = (int)w.w.k;
    call.tokens = (int)tokens;
    return qk_cuda_product_kind(&w) == QK_PRODUCT_4BIT
               ? qk_product_launch4(stream, call, bf16, nb, rows, blocks)
               : qk_product_launch16(stream, call, bf16, nb, rows, blocks);
}

bool alike(const qk_cuda_weight &a, const qk_cuda_weight &b)
{
    return qk_cuda_product_kind(&a) == qk_cuda_product_kind(&b) &&
           qk_cuda_product_format(&a) == qk_cuda_product_format(&b) && a.w.k == b.w.k;
}

} /* namespace */

int qk_product_launch16(qk_stream stream, const qk_product_call &call, bool bf16, int nb, int rows,
                        unsigned blocks)
{
    return bf16 ? launch<true>(stream, call, nb, rows, blocks)
                : launch<false>(stream, call, nb, rows, blocks);
}

qk_product_kind qk_cuda_product_kind(const qk_cuda_weight *w)
{
    const qk_matrix *m = &w->w;
    /* kernels count rows, inputs and runs of 64 in 32 bits */
    if (m->n > INT32_MAX - 64 || m->k > INT32_MAX - 1024 || m->n * (m->k / 64) > UINT32_MAX)
        return QK_PRODUCT_PLAIN;
    if (m->format == QK_F16 || m->format == QK_BF16)
        return m->k % 8 == 0 ? QK_PRODUCT_16BIT : QK_PRODUCT_PLAIN;
    if (m->format != QK_4BIT || w->layout != QK_LAYOUT_TILES || m->round_to == QK_F32)
        return QK_PRODUCT_PLAIN;
    if (!qk_tiles_fit(m->n, m->k, m->block) || m->block & (m->block - 1)) return QK_PRODUCT_PLAIN;
    if (w->nested && w->nested_block & (w->nested_block - 1)) return QK_PRODUCT_PLAIN;
    return QK_PRODUCT_4BIT;
}

qk_format qk_cuda_product_format(const qk_cuda_weight *w)
{
    return w->w.format == QK_4BIT ? w->w.round_to : w->w.format;
}

int qk_cuda_product(qk_stream stream, const qk_cuda_weight *w, int count, const void *x, int64_t tokens,
                    bool add)
{
    if (count < 1 || count > 3 || tokens < 0 || tokens > QK_PRODUCT_TOKENS) return cudaErrorInvalidValue;
    if (qk_cuda_product_kind(w) == QK_PRODUCT_PLAIN) return cudaErrorInvalidValue;
    if (tokens == 0) return 0;
    int64_t n = 0;
    for (int i = 0; i < count; i++) n += w[i].w.n;
    const int rows = rows_a_block(tokens, n);
    qk_product_call call = {};
    unsigned blocks = 0;
    for (int i = 0; i < count; i++) {
        if (!alike(w[i], w[0])) return cudaErrorInvalidValue;
        call.w[i] = describe(w[i]);
        call.w[i].first = blocks;
        blocks += (unsigned)((w[i].w.n + 16 * rows - 1) / (16 * rows));
    }
    call.count = count;
    call.add = add;
    return run(stream, w[0], call, x, tokens, rows, blocks);
}

int qk_cuda_product_swiglu(qk_stream stream, const qk_cuda_weight *gate, const qk_cuda_weight *up,
                           const void *x, int64_t tokens, qk_format to, int slab, void *dst)
{
    if (tokens < 0 || tokens > QK_PRODUCT_TOKENS || !alike(*gate, *up) || gate->w.n != up->w.n)
        return cudaErrorInvalidValue;
    if (qk_cuda_product_kind(gate) == QK_PRODUCT_PLAIN || !dst || (to != QK_F16 && to != QK_BF16) ||
        (slab != QK_SLAB_16BIT && slab != QK_SLAB_4BIT))
        return cudaErrorInvalidValue;
    if (tokens == 0) return 0;
    qk_product_call call = {};
    call.w[0] = describe(*gate);
    call.w[1] = describe(*up);
    call.count = 2;
    call.dst = dst;
    call.to = to;
    call.slab = slab;
    call.padded = (int)((gate->w.n + slab - 1) / slab * slab);
    return run(stream, *gate, call, x, tokens, 2, (unsigned)((gate->w.n + 15) / 16));
}
