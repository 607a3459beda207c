/* The state behind the emulated runtime: devices, their blocks of memory, the error each thread saw last. */
#ifndef EMU_DEVICE_H
#define EMU_DEVICE_H

#include <cuda_runtime_api.h>

/* What QLUA_EMU_CUDA says now. */
struct emu_settings {
    int devices, sm;
    cudaError_t missing; /* cudaErrorInsufficientDriver, cudaErrorNoDevice or cudaSuccess */
    size_t memory;
    long fault, launch_fault; /* 0: none */
};
const emu_settings &emu_read_settings(void);

/* What the runtime keeps of each thread of the host, in one place because block.cpp must spare it. */
struct emu_thread_state {
    int device;
    cudaError_t last_error;
};
extern thread_local emu_thread_state emu_thread;

/* Remember an error for cudaGetLastError and pass it on. */
cudaError_t emu_return(cudaError_t error);
/* cudaSuccess, or why nothing can be done on the current device: none there, or a kernel has faulted. */
cudaError_t emu_ready(void);
/* Opt-in limit of dynamic shared memory of the current device. */
size_t emu_shared_limit(void);

/* Count one launch call; the error it must return. */
cudaError_t emu_count_launch(void);
/* Count one kernel about to run; whether it may. */
bool emu_count_run(void);

/* The error of copying or setting these bytes. */
cudaError_t emu_check_copy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind);
cudaError_t emu_check_device(const void *p, size_t bytes);

/* Capture's rule for calls that would wait or allocate: the error to return, and captures that it ends. */
cudaError_t emu_forbid_in_capture(void);

#endif
