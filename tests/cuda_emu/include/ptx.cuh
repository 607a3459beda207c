/* The functions of kernels/cuda/ptx.cuh on a processor. Given to the compiler before each kernel file, so
 * that the real header finds its guard taken.
 */
#ifndef QK_PTX_CUH
#define QK_PTX_CUH

#include "qk_half.h"

#include <cuda_runtime.h>

#define QK_SHARED(type, name) type *name = reinterpret_cast<type *>(emu_shared())

void emu_mma_bf16(uint32_t mask, emu_hand *hand);
void emu_mma_f16(uint32_t mask, emu_hand *hand);
void emu_ldmatrix(uint32_t mask, emu_hand *hand);
void emu_ldmatrix_t(uint32_t mask, emu_hand *hand);

/* Where a lane's fragments are; the others wait meanwhile, so the pointers hold. */
struct emu_mma {
    float *d;
    const uint32_t *a, *b;
};
struct emu_rows {
    uint32_t *r;
    const void *row;
};

static inline uint4 qk_load_once(const void *p)
{
    return emu_checked((const uint4 *)p);
}

static inline uint32_t qk_bf16x2(float low, float high)
{
    return qk_f32_to_bf16(low) | (uint32_t)qk_f32_to_bf16(high) << 16;
}

static inline uint32_t qk_f16x2(float low, float high)
{
    return qk_f32_to_f16(low) | (uint32_t)qk_f32_to_f16(high) << 16;
}

static inline void qk_mma_bf16(float d[4], const uint32_t a[4], const uint32_t b[2], EMU_HERE)
{
    emu_mma mine = {d, a, b};
    emu_warp("qk_mma_bf16", emu_mma_bf16, 0xffffffffu, (uintptr_t)&mine, 0, 0, file, line);
}

static inline void qk_mma_f16(float d[4], const uint32_t a[4], const uint32_t b[2], EMU_HERE)
{
    emu_mma mine = {d, a, b};
    emu_warp("qk_mma_f16", emu_mma_f16, 0xffffffffu, (uintptr_t)&mine, 0, 0, file, line);
}

static inline void qk_ldmatrix_x4(uint32_t r[4], const void *row, EMU_HERE)
{
    emu_rows mine = {r, row};
    emu_warp("qk_ldmatrix_x4", emu_ldmatrix, 0xffffffffu, (uintptr_t)&mine, 0, 0, file, line);
}

static inline void qk_ldmatrix_x4_t(uint32_t r[4], const void *row, EMU_HERE)
{
    emu_rows mine = {r, row};
    emu_warp("qk_ldmatrix_x4_t", emu_ldmatrix_t, 0xffffffffu, (uintptr_t)&mine, 0, 0, file, line);
}

static inline void qk_copy_async(void *shared, const void *global, bool valid)
{
    emu_copy_async(shared, global, valid);
}

static inline void qk_copy_commit(void)
{
    emu_copy_commit();
}

template <int N> static inline void qk_copy_wait(void)
{
    emu_copy_wait(N);
}

static inline void qk_next_may_start(void)
{
}

static inline void qk_wait_earlier(void)
{
}

#endif
