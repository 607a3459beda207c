/* CUDA C++ for a processor: the keywords, the built-in variables and the functions that kernels use. Every
 * thread of a block is a fiber; the fibers of a block share one OS thread, and launches exclude each other.
 * See block.cpp for the order in which they run and for the errors that are found.
 */
#ifndef CUDA_RUNTIME_H
#define CUDA_RUNTIME_H

#include <functional>
#include <type_traits>
#include <tuple>
#include <utility>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_runtime_api.h"
#include "vector_functions.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __shared__ static thread_local
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(condition) ((void)0)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
static const int warpSize = 32;

/* ---- the block, for the functions below ---- */

#define EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

/* What a lane brings to a warp operation, and takes from it. */
struct emu_hand {
    uint64_t value;
    int argument, width;
    uint64_t result; /* [OUT] */
};
/* Runs once, when all lanes of `mask` are there: hand [32]. */
typedef void (*emu_combine)(uint32_t mask, emu_hand *hand);
enum emu_barrier_kind { EMU_BARRIER, EMU_BARRIER_OR, EMU_BARRIER_AND, EMU_BARRIER_COUNT };

uint64_t emu_warp(const char *name, emu_combine combine, uint32_t mask, uint64_t value, int argument,
                  int width, const char *file, int line);
int emu_barrier(emu_barrier_kind kind, int predicate, const char *file, int line);
uint32_t emu_active(void);
void *emu_shared(void);
/* Says where the calling thread is, and aborts. */
[[noreturn]] void emu_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
void emu_copy_async(void *shared, const void *global, bool valid);
void emu_copy_commit(void);
void emu_copy_wait(int groups);
cudaError_t emu_launch(const cudaLaunchConfig_t *config, const void *kernel, std::function<void()> thread);
bool emu_is_device(const void *p, size_t bytes);

void emu_shfl_index(uint32_t mask, emu_hand *hand);
void emu_shfl_up(uint32_t mask, emu_hand *hand);
void emu_shfl_down(uint32_t mask, emu_hand *hand);
void emu_shfl_xor(uint32_t mask, emu_hand *hand);
void emu_ballot(uint32_t mask, emu_hand *hand);
void emu_nothing(uint32_t mask, emu_hand *hand);
void emu_match_any(uint32_t mask, emu_hand *hand);
void emu_reduce_add(uint32_t mask, emu_hand *hand);
void emu_reduce_and(uint32_t mask, emu_hand *hand);
void emu_reduce_or(uint32_t mask, emu_hand *hand);
void emu_reduce_xor(uint32_t mask, emu_hand *hand);
void emu_reduce_min_u(uint32_t mask, emu_hand *hand);
void emu_reduce_max_u(uint32_t mask, emu_hand *hand);
void emu_reduce_min_s(uint32_t mask, emu_hand *hand);
void emu_reduce_max_s(uint32_t mask, emu_hand *hand);

template <class To, class From> static inline To emu_cast(From from)
{
    static_assert(sizeof(To) == sizeof(From), "reinterpreting needs equal sizes");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class T> static inline T emu_checked(const T *p)
{
    if ((uintptr_t)p % alignof(T))
        emu_fail("a load of %zu bytes at %p is misaligned", sizeof(T), (const void *)p);
    return *p;
}

/* ---- launches ---- */

template <class... P, class... A>
static inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...),
                                             A &&...args)
{
    std::tuple<typename std::remove_cv<P>::type...> values(std::forward<A>(args)...);
    return emu_launch(config, (const void *)kernel, [kernel, values]() {
        auto mine = values; /* a thread may write to its parameters */
        std::apply(kernel, mine);
    });
}

template <class T>
static inline cudaError_t cudaFuncSetAttribute(T *kernel, cudaFuncAttribute attribute, int value)
{
    return cudaFuncSetAttribute((const void *)kernel, attribute, value);
}

template <class T> static inline cudaError_t cudaMalloc(T **p, size_t bytes)
{
    return cudaMalloc((void **)p, bytes);
}

template <class T> static inline cudaError_t cudaMallocHost(T **p, size_t bytes)
{
    return cudaMallocHost((void **)p, bytes);
}

template <class T>
static inline cudaError_t cudaMemcpyToSymbolAsync(T &symbol, const void *src, size_t bytes, size_t offset,
                                                  cudaMemcpyKind, cudaStream_t stream = 0)
{
    if (offset + bytes > sizeof symbol) return cudaErrorInvalidValue;
    return cudaMemcpyAsync((char *)&symbol + offset, src, bytes, cudaMemcpyHostToHost, stream);
}

/* ---- barriers and warps ---- */

static inline void __syncthreads(EMU_HERE)
{
    emu_barrier(EMU_BARRIER, 0, file, line);
}
static inline int __syncthreads_or(int predicate, EMU_HERE)
{
    return emu_barrier(EMU_BARRIER_OR, predicate, file, line);
}
static inline int __syncthreads_and(int predicate, EMU_HERE)
{
    return emu_barrier(EMU_BARRIER_AND, predicate, file, line);
}
static inline int __syncthreads_count(int predicate, EMU_HERE)
{
    return emu_barrier(EMU_BARRIER_COUNT, predicate, file, line);
}
static inline void __syncwarp(uint32_t mask = 0xffffffffu, EMU_HERE)
{
    emu_warp("__syncwarp", emu_nothing, mask, 0, 0, 0, file, line);
}
static inline void __threadfence(void)
{
}
static inline void __threadfence_block(void)
{
}
static inline void __threadfence_system(void)
{
}

template <class T> static inline uint64_t emu_pack(T value)
{
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T> static inline T emu_unpack(uint64_t bits)
{
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T> static inline T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, EMU_HERE)
{
    return emu_unpack<T>(
        emu_warp("__shfl_sync", emu_shfl_index, mask, emu_pack(value), lane, width, file, line));
}
template <class T>
static inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMU_HERE)
{
    return emu_unpack<T>(
        emu_warp("__shfl_up_sync", emu_shfl_up, mask, emu_pack(value), (int)delta, width, file, line));
}
template <class T>
static inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMU_HERE)
{
    return emu_unpack<T>(
        emu_warp("__shfl_down_sync", emu_shfl_down, mask, emu_pack(value), (int)delta, width, file, line));
}
template <class T>
static inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, EMU_HERE)
{
    return emu_unpack<T>(
        emu_warp("__shfl_xor_sync", emu_shfl_xor, mask, emu_pack(value), lane_mask, width, file, line));
}

static inline uint32_t __ballot_sync(uint32_t mask, int predicate, EMU_HERE)
{
    return (uint32_t)emu_warp("__ballot_sync", emu_ballot, mask, predicate != 0, 0, 0, file, line);
}
static inline int __any_sync(uint32_t mask, int predicate, EMU_HERE)
{
    return emu_warp("__any_sync", emu_ballot, mask, predicate != 0, 0, 0, file, line) != 0;
}
static inline int __all_sync(uint32_t mask, int predicate, EMU_HERE)
{
    return emu_warp("__all_sync", emu_ballot, mask, predicate != 0, 0, 0, file, line) == mask;
}
static inline uint32_t __activemask(void)
{
    return emu_active();
}
template <class T> static inline uint32_t __match_any_sync(uint32_t mask, T value, EMU_HERE)
{
    return (uint32_t)emu_warp("__match_any_sync", emu_match_any, mask, emu_pack(value), 0, 0, file, line);
}

#define EMU_REDUCE(name, type, combine)                                                                      \
    static inline type name(uint32_t mask, type value, EMU_HERE)                                             \
    {                                                                                                        \
        return (type)emu_warp(#name, combine, mask, (uint32_t)value, 0, 0, file, line);                      \
    }
EMU_REDUCE(__reduce_add_sync, unsigned, emu_reduce_add)
EMU_REDUCE(__reduce_add_sync, int, emu_reduce_add)
EMU_REDUCE(__reduce_and_sync, unsigned, emu_reduce_and)
EMU_REDUCE(__reduce_or_sync, unsigned, emu_reduce_or)
EMU_REDUCE(__reduce_xor_sync, unsigned, emu_reduce_xor)
EMU_REDUCE(__reduce_min_sync, unsigned, emu_reduce_min_u)
EMU_REDUCE(__reduce_max_sync, unsigned, emu_reduce_max_u)
EMU_REDUCE(__reduce_min_sync, int, emu_reduce_min_s)
EMU_REDUCE(__reduce_max_sync, int, emu_reduce_max_s)
#undef EMU_REDUCE

/* ---- atomics: integers only, since a sum of floats must have one order ---- */

#define EMU_ATOMIC(name, type, expression)                                                                   \
    static inline type name(type *p, type value)                                                             \
    {                                                                                                        \
        type old = *p;                                                                                       \
        *p = (expression);                                                                                   \
        return old;                                                                                          \
    }
#define EMU_ATOMICS(type)                                                                                    \
    EMU_ATOMIC(atomicExch, type, value)                                                                      \
    EMU_ATOMIC(atomicMax, type, old > value ? old : value)                                                   \
    EMU_ATOMIC(atomicMin, type, old < value ? old : value)                                                   \
    EMU_ATOMIC(atomicAnd, type, old &value)                                                                  \
    EMU_ATOMIC(atomicOr, type, old | value)                                                                  \
    EMU_ATOMIC(atomicXor, type, old ^ value)                                                                 \
    static inline type atomicCAS(type *p, type compare, type value)                                          \
    {                                                                                                        \
        type old = *p;                                                                                       \
        if (old == compare) *p = value;                                                                      \
        return old;                                                                                          \
    }
EMU_ATOMICS(int)
EMU_ATOMICS(unsigned)
EMU_ATOMICS(unsigned long long)
EMU_ATOMIC(atomicAdd, int, (int)((unsigned)old + (unsigned)value))
EMU_ATOMIC(atomicAdd, unsigned, old + value)
EMU_ATOMIC(atomicAdd, unsigned long long, old + value)
EMU_ATOMIC(atomicSub, int, (int)((unsigned)old - (unsigned)value))
EMU_ATOMIC(atomicSub, unsigned, old - value)
EMU_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
EMU_ATOMIC(atomicDec, unsigned, old == 0 || old > value ? value : old - 1)
float atomicAdd(float *, float) = delete;
double atomicAdd(double *, double) = delete;
#undef EMU_ATOMICS
#undef EMU_ATOMIC

#include "device_math.h"

#endif
