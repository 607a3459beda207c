/* The instructions that have no portable spelling, one inline function each. Kernels use these and CUDA's own
 * intrinsics, nothing else: tests/cuda_emu has the same functions in plain C++, so that every kernel also
 * runs, thread by thread, on a processor. All are called by whole warps with the same arguments' shapes.
 */
#ifndef QK_PTX_CUH
#define QK_PTX_CUH

#include "qk_half.h"

#include <cuda_runtime.h>
#include <stdint.h>

/* The block's dynamic shared memory; its size is given at launch. */
#define QK_SHARED(type, name)                                                                                \
    extern __shared__ __align__(128) unsigned char qk_shared[];                                              \
    type *name = reinterpret_cast<type *>(qk_shared)

/* 16 bytes that are read once: past L1, so that what is read often stays there. 16-byte aligned. */
__device__ __forceinline__ uint4 qk_load_once(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

/* Two floats rounded to nearest even, `low` in bits 0..15. */
__device__ __forceinline__ uint32_t qk_bf16x2(float low, float high)
{
#if __CUDA_ARCH__ >= 800
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return qk_f32_to_bf16(low) | (uint32_t)qk_f32_to_bf16(high) << 16;
#endif
}

__device__ __forceinline__ uint32_t qk_f16x2(float low, float high)
{
    uint16_t l, h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(l) : "f"(low));
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(high));
    return l | (uint32_t)h << 16;
}

/* d += a b with a [16, 16], b [16, 8], d [16, 8] in float32, as mma.sync.m16n8k16 spreads them over a warp
 * (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type"): lane 4g + t holds
 *   a[0] row g, a[1] row g + 8: columns 2t, 2t + 1; a[2], a[3] the same rows: columns 2t + 8, 2t + 9
 *   b[0] rows 2t, 2t + 1, b[1] rows 2t + 8, 2t + 9, all of column g
 *   d[0], d[1] row g, d[2], d[3] row g + 8: columns 2t, 2t + 1. */
__device__ __forceinline__ void qk_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    /* Turing has no bfloat16 product: the same sum by exchanging operands, slowly. */
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 8; i++) { /* inputs 2i and 2i + 1 */
        const int from = i & 3, high = i >> 2;
        const uint32_t upper = __shfl_sync(0xffffffffu, a[2 * high], 4 * g + from);
        const uint32_t lower = __shfl_sync(0xffffffffu, a[2 * high + 1], 4 * g + from);
        const uint32_t left = __shfl_sync(0xffffffffu, b[high], 8 * t + from);
        const uint32_t right = __shfl_sync(0xffffffffu, b[high], 8 * t + 4 + from);
#pragma unroll
        for (int h = 16; h >= 0; h -= 16) { /* the even input lies in the low half */
            const float u = __uint_as_float(upper << h & 0xffff0000u),
                        l = __uint_as_float(lower << h & 0xffff0000u);
            const float x = __uint_as_float(left << h & 0xffff0000u),
                        y = __uint_as_float(right << h & 0xffff0000u);
            d[0] = fmaf(u, x, d[0]);
            d[1] = fmaf(u, y, d[1]);
            d[2] = fmaf(l, x, d[2]);
            d[3] = fmaf(l, y, d[3]);
        }
    }
#endif
}

__device__ __forceinline__ void qk_mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2])
{
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; half++)
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

/* Four 8x8 matrices of 16-bit numbers from shared memory: lane l gives the address of row l % 8 of matrix
 * l / 8 (16 bytes); r[i] gets matrix i's row l / 4, columns 2 (l % 4) and the next. */
__device__ __forceinline__ void qk_ldmatrix_x4(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

/* The same, each matrix transposed. */
__device__ __forceinline__ void qk_ldmatrix_x4_t(uint32_t r[4], const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(row))
                 : "memory");
}

/* Copy 16 bytes from global to shared memory without waiting; zeros when !valid. Groups complete in order. */
__device__ __forceinline__ void qk_copy_async(void *shared, const void *global, bool valid)
{
#if __CUDA_ARCH__ >= 800
    int bytes = valid ? 16 : 0;
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
        "l"(global), "r"(bytes)
        : "memory");
#else
    *(uint4 *)shared = valid ? *(const uint4 *)global : make_uint4(0, 0, 0, 0);
#endif
}

__device__ __forceinline__ void qk_copy_commit(void)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

/* Wait until at most N groups of this thread are under way; a barrier makes them visible to the others. */
template <int N> __device__ __forceinline__ void qk_copy_wait(void)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/* Programmatic dependent launch. qk_next_may_start lets the next kernel of the stream begin while this one
 * runs; qk_wait_earlier waits until all earlier kernels have finished and their writes are visible. Every
 * kernel waits before it touches what an earlier one wrote or may still read; only weights may be loaded
 * before. Therefore a kernel that writes what may be a weight (convert, random, quantize4, dequantize4,
 * tile4) never lets the next one start: no kernel behind it can then begin before it has ended. No effect
 * before sm_90. */
__device__ __forceinline__ void qk_next_may_start(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void qk_wait_earlier(void)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif
