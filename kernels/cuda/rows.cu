/* A layer's steps on rows of F32: embedding, RMSNorm, SwiGLU, gathering, the four binary operations, bias. */
#include "reduce.cuh"

enum { THREADS = 128 }; /* of an elementwise block; each takes eight neighbours */

static dim3 grid_of(int64_t count)
{
    return dim3((unsigned)qk_ceil_div(count, THREADS * 8));
}

/* Index of the first of this thread's eight elements. */
__device__ __forceinline__ int64_t first_of_eight(void)
{
    return ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * 8;
}

/* ---- rows by index: embedding and gathering ---- */

template <qk_format F, bool WIDE>
static __global__ void take_rows(const void *table, const int32_t *ids, int64_t h, float *y)
{
    qk_wait_earlier();
    qk_next_may_start();
    const char *from =
        (const char *)table + ids[blockIdx.x] * h * (int64_t)sizeof(typename qk_stored<F>::type);
    float *to = y + (int64_t)blockIdx.x * h;
    for (int64_t i = threadIdx.x * 8; i < h; i += blockDim.x * 8) {
        float v[8];
        qk_load8<F, WIDE>(from, i, h, v);
        qk_store8<QK_F32, WIDE>(to, i, h, v);
    }
}

template <qk_format F>
static int launch_take_rows(qk_stream stream, const void *table, const int32_t *ids, int64_t t, int64_t h,
                            float *y)
{
    bool wide = h % 8 == 0 && qk_is_wide(table) && qk_is_wide(y);
    return qk_launch(wide ? take_rows<F, true> : take_rows<F, false>, dim3((unsigned)t),
                     dim3(qk_row_threads(qk_ceil_div(h, 8), 512)), 0, stream, table, ids, h, y);
}

int qk_cuda_embed(qk_stream stream, qk_format f, const void *table, const int32_t *ids, int64_t t, int64_t h,
                  float *y)
{
    switch (f) {
    case QK_F32:
        return launch_take_rows<QK_F32>(stream, table, ids, t, h, y);
    case QK_F16:
        return launch_take_rows<QK_F16>(stream, table, ids, t, h, y);
    case QK_BF16:
        return launch_take_rows<QK_BF16>(stream, table, ids, t, h, y);
    default:
        return cudaErrorInvalidValue;
    }
}

int qk_cuda_gather_rows(qk_stream stream, const float *x, const int32_t *rows, int64_t n, int64_t h, float *y)
{
    return launch_take_rows<QK_F32>(stream, x, rows, n, h, y);
}

static __global__ void take_cols(const float *x, const int32_t *cols, int64_t n, int64_t v, float *y)
{
    qk_wait_earlier();
    qk_next_may_start();
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = x[i * v + cols[i]];
}

int qk_cuda_gather_cols(qk_stream stream, const float *x, const int32_t *cols, int64_t n, int64_t v, float *y)
{
    return qk_launch(take_cols, dim3((unsigned)qk_ceil_div(n, THREADS)), dim3(THREADS), 0, stream, x, cols, n,
                     v, y);
}

/* ---- RMSNorm: a block a row; y may be x ---- */

template <bool WIDE>
static __global__ void __launch_bounds__(1024)
    rmsnorm(const float *x, const float *w, float eps, int64_t h, float *y)
{
    qk_wait_earlier();
    qk_next_may_start();
    const float *row = x + (int64_t)blockIdx.x * h;
    float *out = y + (int64_t)blockIdx.x * h;
    const float scale = qk_norm_scale<WIDE>(row, h, eps);
    for (int64_t i = threadIdx.x * 8; i < h; i += blockDim.x * 8) {
        float v[8], weight[8];
        qk_load8<QK_F32, WIDE>(row, i, h, v);
        qk_load8<QK_F32, WIDE>(w, i, h, weight);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = v[j] * scale * weight[j];
        qk_store8<QK_F32, WIDE>(out, i, h, v);
    }
}

int qk_cuda_rmsnorm(qk_stream stream, const float *x, const float *w, float eps, int64_t t, int64_t h,
                    float *y)
{
    bool wide = h % 8 == 0 && qk_is_wide(x) && qk_is_wide(w) && qk_is_wide(y);
    return qk_launch(wide ? rmsnorm<true> : rmsnorm<false>, dim3((unsigned)t), dim3(qk_norm_threads(h)), 0,
                     stream, x, w, eps, h, y);
}

/* ---- elementwise ---- */

template <bool WIDE>
static __global__ void swiglu(const float *gate, const float *up, int64_t count, float *y)
{
    qk_wait_earlier();
    qk_next_may_start();
    const int64_t i = first_of_eight();
    if (i >= count) return;
    float v[8], factor[8];
    qk_load8<QK_F32, WIDE>(gate, i, count, v);
    qk_load8<QK_F32, WIDE>(up, i, count, factor);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = qk_silu_times(v[j], factor[j]);
    qk_store8<QK_F32, WIDE>(y, i, count, v);
}

int qk_cuda_swiglu(qk_stream stream, const float *gate, const float *up, int64_t count, float *y)
{
    bool wide = qk_is_wide(gate) && qk_is_wide(up) && qk_is_wide(y);
    return qk_launch(wide ? swiglu<true> : swiglu<false>, grid_of(count), dim3(THREADS), 0, stream, gate, up,
                     count, y);
}

__device__ __forceinline__ float apply(qk_binary op, float a, float b)
{
    switch (op) {
    case QK_ADD:
        return a + b;
    case QK_SUB:
        return a - b;
    case QK_MUL:
        return a * b;
    default:
        return a / b;
    }
}

template <bool WIDE>
static __global__ void binary(qk_binary op, const float *a, const float *b, float scalar, bool reversed,
                              int64_t count, float *y)
{
    qk_wait_earlier();
    qk_next_may_start();
    const int64_t i = first_of_eight();
    if (i >= count) return;
    float left[8], right[8];
    qk_load8<QK_F32, WIDE>(a, i, count, left);
    if (b) {
        qk_load8<QK_F32, WIDE>(b, i, count, right);
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            right[j] = reversed ? left[j] : scalar;
            left[j] = reversed ? scalar : left[j];
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++) left[j] = apply(op, left[j], right[j]);
    qk_store8<QK_F32, WIDE>(y, i, count, left);
}

int qk_cuda_binary(qk_stream stream, qk_binary op, const float *a, const float *b, float scalar,
                   bool reversed, int64_t count, float *y)
{
    bool wide = qk_is_wide(a) && qk_is_wide(b) && qk_is_wide(y);
    return qk_launch(wide ? binary<true> : binary<false>, grid_of(count), dim3(THREADS), 0, stream, op, a, b,
                     scalar, reversed, count, y);
}

/* Blocks of columns by rows; the grid's y axis ends at 65535, so rows are taken in strides. */
template <bool WIDE> static __global__ void add_bias(const float *bias, int64_t t, int64_t n, float *y)
{
    qk_wait_earlier();
    qk_next_may_start();
    const int64_t i = first_of_eight();
    if (i >= n) return;
    float add[8], v[8];
    qk_load8<QK_F32, WIDE>(bias, i, n, add);
    for (int64_t row = blockIdx.y; row < t; row += gridDim.y) {
        qk_load8<QK_F32, WIDE>(y + row * n, i, n, v);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] += add[j];
        qk_store8<QK_F32, WIDE>(y + row * n, i, n, v);
    }
}

int qk_cuda_add_bias(qk_stream stream, const float *bias, int64_t t, int64_t n, float *y)
{
    bool wide = n % 8 == 0 && qk_is_wide(bias) && qk_is_wide(y);
    dim3 grid((unsigned)qk_ceil_div(n, THREADS * 8), (unsigned)(t < 65535 ? t : 65535));
    return qk_launch(wide ? add_bias<true> : add_bias<false>, grid, dim3(THREADS), 0, stream, bias, t, n, y);
}
