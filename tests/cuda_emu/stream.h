/* What a cudaStream_t points to. The first member lets another library (the emulated cuBLASLt) queue work
 * without knowing which copy of the runtime the stream belongs to. cudaStream_t NULL has no such struct: run
 * at once.
 */
#ifndef EMU_STREAM_H
#define EMU_STREAM_H

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void (*emu_work)(void *data);

struct CUstream_st {
    /* Run work(data) in the stream's order, now or at each replay of the graph being captured; `data` (bytes)
     * is copied. */
    cudaError_t (*queue)(cudaStream_t stream, emu_work work, const void *data, size_t bytes);
    struct emu_stream *own;
};

#ifdef __cplusplus
}
#endif
#endif
