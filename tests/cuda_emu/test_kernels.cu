#include "test_kernels.h"

#include "ptx.cuh"

template <class... P, class... A>
static cudaError_t start(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                         A... args)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

__global__ void warps(uint32_t *out)
{
    const uint32_t all = 0xffffffffu;
    const int lane = threadIdx.x;
    out[lane] = __shfl_sync(all, lane * 3, lane + 5);
    out[32 + lane] = __shfl_sync(all, lane * 3, 9, 8);
    out[64 + lane] = __shfl_up_sync(all, lane, 3, 16);
    out[96 + lane] = __shfl_down_sync(all, lane, 3, 16);
    out[128 + lane] = __shfl_xor_sync(all, lane, 6);
    out[160 + lane] = __ballot_sync(all, lane % 3 == 0);
    if (lane >= 8) /* a part of the warp on its own */
        out[192 + lane] = __any_sync(0xffffff00u, lane == 4) + 2 * __all_sync(0xffffff00u, lane > 7);
    else
        out[192 + lane] = __reduce_max_sync(0xffu, (unsigned)lane) + 100;
    out[224 + lane] = __match_any_sync(all, lane % 5);
    out[256 + lane] = __reduce_add_sync(all, lane - 20);
    const double wide = __shfl_xor_sync(all, lane + 0.25, 1);
    out[288 + lane] = (uint32_t)(4 * wide);
}

cudaError_t test_warps_launch(uint32_t *out)
{
    return start(warps, 1, 32, 0, NULL, out);
}

__global__ void votes(int *out)
{
    const int i = threadIdx.y * blockDim.x + threadIdx.x, high = i >= 64;
    out[i] = __syncthreads_or(high);
    out[96 + i] = __syncthreads_and(high);
    out[192 + i] = __syncthreads_count(high);
}

cudaError_t test_votes_launch(int *out)
{
    return start(votes, 1, dim3(48, 2), 0, NULL, out);
}

__global__ void mma(bool bf16, const uint16_t *a, const uint16_t *b, float *d)
{
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t ra[4], rb[2];
    float rd[4];
    for (int i = 0; i < 4; i++) {
        const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
        ra[i] = a[row * 16 + column] | (uint32_t)a[row * 16 + column + 1] << 16;
        rd[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    }
    for (int i = 0; i < 2; i++) {
        const int row = 2 * t + 8 * i;
        rb[i] = b[row * 8 + g] | (uint32_t)b[(row + 1) * 8 + g] << 16;
    }
    if (bf16)
        qk_mma_bf16(rd, ra, rb);
    else
        qk_mma_f16(rd, ra, rb);
    for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = rd[i];
}

cudaError_t test_mma_launch(bool bf16, const uint16_t *a, const uint16_t *b, float *d)
{
    return start(mma, 1, 32, 0, NULL, bf16, a, b, d);
}

__global__ void ldmatrix(bool transposed, const uint16_t *m, uint16_t *out)
{
    QK_SHARED(uint16_t, shared);
    const int lane = threadIdx.x;
    for (int i = 0; i < 8; i++) shared[lane * 8 + i] = m[lane * 8 + i];
    __syncwarp();
    uint32_t r[4];
    if (transposed)
        qk_ldmatrix_x4_t(r, shared + lane * 8);
    else
        qk_ldmatrix_x4(r, shared + lane * 8);
    for (int i = 0; i < 4; i++) {
        uint16_t *to = out + i * 64 + lane / 4 * 8 + lane % 4 * 2;
        to[0] = (uint16_t)r[i];
        to[1] = (uint16_t)(r[i] >> 16);
    }
}

cudaError_t test_ldmatrix_launch(bool transposed, const uint16_t *m, uint16_t *out)
{
    return start(ldmatrix, 1, 32, 512, NULL, transposed, m, out);
}

__global__ void copies(const uint32_t *in, uint32_t *out)
{
    QK_SHARED(uint32_t, shared);
    const int lane = threadIdx.x;
    for (int i = 0; i < 3; i++) {
        shared[(i * 32 + lane) * 4] = 7;
        qk_copy_async(shared + (i * 32 + lane) * 4, in + (i * 32 + lane) * 4, i < 2);
        if (i != 1) qk_copy_commit(); /* the second and third are one group */
    }
    for (int wait = 0; wait < 2; wait++) {
        for (int i = 0; i < 3; i++) out[(wait * 3 + i) * 32 + lane] = shared[(i * 32 + lane) * 4];
        if (wait == 0) qk_copy_wait<1>();
    }
    qk_copy_wait<0>();
    for (int i = 0; i < 3; i++) out[(6 + i) * 32 + lane] = shared[(i * 32 + lane) * 4];
}

cudaError_t test_copies_launch(const uint32_t *in, uint32_t *out)
{
    return start(copies, 1, 32, 3 * 512, NULL, in, out);
}

__global__ void exchange(bool barrier, const float *in, float *out)
{
    __shared__ float numbers[64];
    const int i = threadIdx.x;
    numbers[i] = in[i];
    if (barrier) __syncthreads();
    out[i] = numbers[63 - i] + numbers[i];
}

cudaError_t test_exchange_launch(bool barrier, const float *in, float *out)
{
    return start(exchange, 1, 64, 0, NULL, barrier, in, out);
}

__global__ void fresh_shared(uint32_t *out)
{
    __shared__ uint32_t fixed[4];
    QK_SHARED(uint32_t, dynamic);
    out[0] = fixed[1];
    out[1] = dynamic[1];
    fixed[1] = dynamic[1] = 5;
}

cudaError_t test_fresh_shared_launch(uint32_t *out)
{
    return start(fresh_shared, 2, 1, 16, NULL, out);
}

__global__ void step(int *p, int add)
{
    p[0] = 2 * p[0] + add;
}

cudaError_t test_step_launch(cudaStream_t stream, int *p, int add)
{
    return start(step, 1, 1, 0, stream, p, add);
}

__global__ void block_order(int *counter, int *order)
{
    order[atomicAdd(counter, 1)] = (int)blockIdx.x;
}

cudaError_t test_block_order_launch(int blocks, int *counter, int *order)
{
    return start(block_order, (unsigned)blocks, 1, 0, NULL, counter, order);
}

__global__ void wrong(wrong_kernel which, uint32_t *memory)
{
    QK_SHARED(uint32_t, shared);
    const int i = threadIdx.x;
    switch (which) {
    case WRONG_BARRIER_SKIPPED:
        if (i >= 32) return;
        __syncthreads();
        break;
    case WRONG_BARRIER_OTHER:
        if (i >= 32)
            __syncthreads();
        else
            __syncthreads();
        break;
    case WRONG_WARP_RETURNED:
        if (i % 32 < 4) return;
        memory[i] = __shfl_sync(0xffffffffu, i, 0);
        break;
    case WRONG_WARP_ELSEWHERE:
        if (i % 2)
            __syncwarp();
        else
            memory[i] = __shfl_sync(0xffffffffu, i, 0);
        break;
    case WRONG_WARP_SELF:
        memory[i] = __ballot_sync(1u, 1);
        break;
    case WRONG_WARP_SOURCE:
        if (i % 32 < 16) memory[i] = __shfl_sync(0xffffu, i, 20);
        break;
    case WRONG_SHARED_END:
        if (i < 16) shared[64 + i] = 1;
        break;
    case WRONG_ALIGNMENT:
        memory[0] = qk_load_once(memory + 1).x;
        break;
    case WRONG_COPY_SOURCE:
        qk_copy_async(shared, shared + 4, true);
        break;
    default:
        qk_copy_async(memory, memory + 4, true);
        break;
    }
}

cudaError_t test_wrong_launch(wrong_kernel which, uint32_t *memory)
{
    return start(wrong, 1, 64, 256, NULL, which, memory);
}
