/* Devices, errors and memory of the emulated runtime. Memory is malloc's, one call per allocation, so that
 * AddressSanitizer sees what a kernel touches; new memory is all 0xff bytes, which are NaNs.
 */
#include "device.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <string>

#include <stdio.h>

namespace
{
struct allocation {
    size_t bytes;
    int device; /* -1: pinned memory of the host */
};

std::recursive_mutex lock;
typedef std::lock_guard<std::recursive_mutex> locked;
std::map<uintptr_t, allocation> allocations; /* by address */
const int most_devices = 16;
size_t used[most_devices];
cudaError_t fault; /* no call works after it */
long launches, runs;
std::string settings_text;
emu_settings settings = {1, 90, cudaSuccess, (size_t)4 << 30, 0, 0};

bool number(const char *word, const char *key, long long *value)
{
    size_t n = strlen(key);
    char *end;
    if (strncmp(word, key, n) || word[n] != '=') return false;
    *value = strtoll(word + n + 1, &end, 10);
    return end != word + n + 1 && !*end && *value >= 0;
}

void parse(const char *text)
{
    settings = {1, 90, cudaSuccess, (size_t)4 << 30, 0, 0};
    fault = cudaSuccess;
    launches = runs = 0;
    std::string rest = text;
    while (!rest.empty()) {
        size_t comma = rest.find(',');
        std::string word = rest.substr(0, comma);
        rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
        long long n;
        if (word == "error=driver")
            settings.missing = cudaErrorInsufficientDriver;
        else if (word == "error=nodevice")
            settings.missing = cudaErrorNoDevice;
        else if (number(word.c_str(), "devices", &n) && n <= most_devices)
            settings.devices = (int)n;
        else if (number(word.c_str(), "sm", &n))
            settings.sm = (int)n;
        else if (number(word.c_str(), "memory", &n))
            settings.memory = (size_t)n;
        else if (number(word.c_str(), "fault", &n))
            settings.fault = (long)n;
        else if (number(word.c_str(), "launchfault", &n))
            settings.launch_fault = (long)n;
        else {
            fprintf(stderr, "emulated CUDA: QLUA_EMU_CUDA=%s: what is \"%s\"?\n", text, word.c_str());
            abort();
        }
    }
    if (settings.devices == 0 && !settings.missing) settings.missing = cudaErrorNoDevice;
}

/* The allocation that holds all of [p, p + bytes), or NULL. */
const allocation *find(const void *p, size_t bytes)
{
    locked hold(lock);
    uintptr_t at = (uintptr_t)p;
    auto next = allocations.upper_bound(at);
    if (next == allocations.begin()) return nullptr;
    --next;
    uintptr_t offset = at - next->first;
    return offset <= next->second.bytes && bytes <= next->second.bytes - offset ? &next->second : nullptr;
}

cudaError_t take(void **p, size_t bytes, int device)
{
    void *memory = nullptr;
    if (posix_memalign(&memory, 256, bytes ? bytes : 1)) return cudaErrorMemoryAllocation;
    memset(memory, 0xff, bytes);
    locked hold(lock);
    allocations[(uintptr_t)memory] = {bytes, device};
    if (device >= 0) used[device] += bytes;
    *p = memory;
    return cudaSuccess;
}

cudaError_t give_back(void *p, bool pinned)
{
    locked hold(lock);
    auto found = allocations.find((uintptr_t)p);
    if (found == allocations.end() || (found->second.device < 0) != pinned) return cudaErrorInvalidValue;
    if (!pinned) used[found->second.device] -= found->second.bytes;
    allocations.erase(found);
    free(p);
    return cudaSuccess;
}

/* Shared memory that a block may opt in to: CUDA C++ Programming Guide, "Technical Specifications per Compute
 * Capability", less the kilobyte that the system keeps. */
size_t shared_limit(int sm)
{
    switch (sm) {
    case 70:
        return 96 * 1024;
    case 75:
        return 64 * 1024;
    case 80:
    case 87:
        return 163 * 1024;
    case 86:
    case 89:
        return 99 * 1024;
    default:
        return sm >= 120 ? 99 * 1024 : sm >= 90 ? 227 * 1024 : 48 * 1024;
    }
}
} // namespace

thread_local emu_thread_state emu_thread;

const emu_settings &emu_read_settings(void)
{
    locked hold(lock);
    const char *text = getenv("QLUA_EMU_CUDA");
    if (!text) text = "";
    if (settings_text != text) {
        settings_text = text;
        parse(text);
    }
    return settings;
}

cudaError_t emu_return(cudaError_t error)
{
    if (error) emu_thread.last_error = error;
    return error;
}

cudaError_t emu_ready(void)
{
    const emu_settings &s = emu_read_settings();
    if (s.missing) return s.missing;
    if (emu_thread.device >= s.devices) return cudaErrorInvalidDevice;
    return fault;
}

size_t emu_shared_limit(void)
{
    return shared_limit(emu_read_settings().sm);
}

cudaError_t emu_count_launch(void)
{
    const emu_settings &s = emu_read_settings();
    locked hold(lock);
    return ++launches == s.launch_fault ? cudaErrorInvalidConfiguration : cudaSuccess;
}

bool emu_count_run(void)
{
    const emu_settings &s = emu_read_settings();
    locked hold(lock);
    if (fault) return false;
    if (++runs == s.fault) fault = cudaErrorIllegalAddress;
    return !fault;
}

bool emu_is_device(const void *p, size_t bytes)
{
    return find(p, bytes) != nullptr;
}

cudaError_t emu_check_device(const void *p, size_t bytes)
{
    const allocation *a = find(p, bytes);
    return bytes == 0 || (a && a->device >= 0) ? cudaSuccess : cudaErrorInvalidValue;
}

/* One end of a copy: in device memory as a whole, or not at all. */
static bool end_fits(const void *p, size_t bytes, bool device)
{
    const allocation *whole = find(p, bytes), *first = find(p, 1);
    if (device) return whole && whole->device >= 0;
    return !first || first->device < 0;
}

cudaError_t emu_check_copy(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind)
{
    if (bytes == 0) return cudaSuccess;
    if (!dst || !src) return cudaErrorInvalidValue;
    if ((int)kind < 0 || kind > cudaMemcpyDefault) return cudaErrorInvalidMemcpyDirection;
    if (kind == cudaMemcpyDefault) {
        bool to_host = end_fits(dst, bytes, false), from_host = end_fits(src, bytes, false);
        return (to_host || end_fits(dst, bytes, true)) && (from_host || end_fits(src, bytes, true))
                   ? cudaSuccess
                   : cudaErrorInvalidValue;
    }
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    return end_fits(dst, bytes, to_device) && end_fits(src, bytes, from_device) ? cudaSuccess
                                                                                : cudaErrorInvalidValue;
}

/* ---- errors ---- */

#define ERRORS(X)                                                                                            \
    X(cudaSuccess, "no error")                                                                               \
    X(cudaErrorInvalidValue, "invalid argument")                                                             \
    X(cudaErrorMemoryAllocation, "out of memory")                                                            \
    X(cudaErrorInitializationError, "initialization error")                                                  \
    X(cudaErrorInvalidConfiguration, "invalid configuration argument")                                       \
    X(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy")                                  \
    X(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version")           \
    X(cudaErrorInvalidDeviceFunction, "invalid device function")                                             \
    X(cudaErrorNoDevice, "no CUDA-capable device is detected")                                               \
    X(cudaErrorInvalidDevice, "invalid device ordinal")                                                      \
    X(cudaErrorInvalidResourceHandle, "invalid resource handle")                                             \
    X(cudaErrorNotReady, "device not ready")                                                                 \
    X(cudaErrorIllegalAddress, "an illegal memory access was encountered")                                   \
    X(cudaErrorLaunchFailure, "unspecified launch failure")                                                  \
    X(cudaErrorNotSupported, "operation not supported")                                                      \
    X(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing")                 \
    X(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture")          \
    X(cudaErrorStreamCaptureUnmatched, "capture was not initiated in this stream")                           \
    X(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work")                                  \
    X(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream")            \
    X(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing "        \
                                      "blocking stream")                                                     \
    X(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream")     \
    X(cudaErrorGraphExecUpdateFailure, "the graph update was not performed because it included changes "     \
                                       "which violated constraints specific to instantiated graph update")

const char *cudaGetErrorString(cudaError_t error)
{
    switch (error) {
#define X(name, text)                                                                                        \
    case name:                                                                                               \
        return text;
        ERRORS(X)
#undef X
    default:
        return "unrecognized error code";
    }
}

const char *cudaGetErrorName(cudaError_t error)
{
    switch (error) {
#define X(name, text)                                                                                        \
    case name:                                                                                               \
        return #name;
        ERRORS(X)
#undef X
    default:
        return "cudaErrorUnknown";
    }
}

cudaError_t cudaGetLastError(void)
{
    cudaError_t error = emu_thread.last_error;
    emu_thread.last_error = fault;
    return error;
}

cudaError_t cudaPeekAtLastError(void)
{
    return emu_thread.last_error;
}

/* ---- devices ---- */

cudaError_t cudaGetDeviceCount(int *out)
{
    const emu_settings &s = emu_read_settings();
    *out = s.missing ? 0 : s.devices;
    return emu_return(s.missing);
}

cudaError_t cudaGetDevice(int *out)
{
    *out = emu_thread.device;
    return emu_return(emu_read_settings().missing);
}

cudaError_t cudaSetDevice(int device)
{
    const emu_settings &s = emu_read_settings();
    if (s.missing) return emu_return(s.missing);
    if (device < 0 || device >= s.devices) return emu_return(cudaErrorInvalidDevice);
    emu_thread.device = device;
    return emu_return(fault);
}

cudaError_t cudaSetDeviceFlags(unsigned)
{
    return emu_return(emu_ready());
}

cudaError_t cudaDeviceReset(void)
{
    return emu_return(emu_ready());
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *prop, int device)
{
    const emu_settings &s = emu_read_settings();
    if (s.missing) return emu_return(s.missing);
    if (device < 0 || device >= s.devices) return emu_return(cudaErrorInvalidDevice);
    *prop = {};
    snprintf(prop->name, sizeof prop->name, "Emulated CUDA device %d", device);
    prop->totalGlobalMem = s.memory;
    prop->sharedMemPerBlock = 48 * 1024;
    prop->warpSize = 32;
    prop->maxThreadsPerBlock = 1024;
    prop->major = s.sm / 10;
    prop->minor = s.sm % 10;
    prop->multiProcessorCount = 4;
    prop->memoryBusWidth = 64;
    prop->pciBusID = device;
    prop->l2CacheSize = 1 << 20;
    prop->maxThreadsPerMultiProcessor = s.sm == 75 ? 1024 : 2048;
    prop->sharedMemPerBlockOptin = shared_limit(s.sm);
    prop->sharedMemPerMultiprocessor = shared_limit(s.sm) + 1024;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
        *value = p.maxThreadsPerBlock;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = (int)p.sharedMemPerBlock;
        break;
    case cudaDevAttrWarpSize:
        *value = p.warpSize;
        break;
    case cudaDevAttrClockRate:
    case cudaDevAttrMemoryClockRate:
        *value = 1000000;
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = p.multiProcessorCount;
        break;
    case cudaDevAttrGlobalMemoryBusWidth:
        *value = p.memoryBusWidth;
        break;
    case cudaDevAttrL2CacheSize:
        *value = p.l2CacheSize;
        break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
        *value = p.maxThreadsPerMultiProcessor;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = p.major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = p.minor;
        break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = (int)p.sharedMemPerMultiprocessor;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (int)p.sharedMemPerBlockOptin;
        break;
    case cudaDevAttrMemoryPoolsSupported:
        *value = 1;
        break;
    default:
        return emu_return(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device)
{
    cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (!error) snprintf(id, (size_t)size, "0000:%02x:00.0", p.pciBusID);
    return error;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = 0;
    *greatest = -5;
    return emu_return(emu_ready());
}

cudaError_t cudaDriverGetVersion(int *version)
{
    *version = emu_read_settings().missing == cudaErrorInsufficientDriver ? 12020 : 13000;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    *version = CUDART_VERSION;
    return cudaSuccess;
}

/* ---- memory ---- */

cudaError_t cudaMemGetInfo(size_t *free, size_t *total)
{
    cudaError_t error = emu_ready();
    if (error) return emu_return(error);
    locked hold(lock);
    *total = settings.memory;
    *free = settings.memory > used[emu_thread.device] ? settings.memory - used[emu_thread.device] : 0;
    return cudaSuccess;
}

static cudaError_t device_malloc(void **p, size_t bytes)
{
    size_t free, total;
    cudaError_t error = cudaMemGetInfo(&free, &total);
    if (error) return error;
    *p = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (bytes > free) return emu_return(cudaErrorMemoryAllocation);
    return emu_return(take(p, bytes, emu_thread.device));
}

cudaError_t cudaMalloc(void **p, size_t bytes)
{
    cudaError_t error = emu_forbid_in_capture();
    return error ? emu_return(error) : device_malloc(p, bytes);
}

cudaError_t cudaFree(void *p)
{
    cudaError_t error = emu_forbid_in_capture();
    if (error) return emu_return(error);
    /* memory goes back even after a fault, as it does when a process ends */
    if (p) error = give_back(p, false);
    return emu_return(error ? error : fault);
}

cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t stream)
{
    cudaStreamCaptureStatus status;
    cudaError_t error = cudaStreamIsCapturing(stream, &status);
    if (error) return error;
    if (status != cudaStreamCaptureStatusNone) return emu_return(cudaErrorStreamCaptureUnsupported);
    return device_malloc(p, bytes);
}

cudaError_t cudaFreeAsync(void *p, cudaStream_t stream)
{
    cudaStreamCaptureStatus status;
    cudaError_t error = cudaStreamIsCapturing(stream, &status);
    if (error) return error;
    if (status != cudaStreamCaptureStatusNone) return emu_return(cudaErrorStreamCaptureUnsupported);
    return emu_return(p ? give_back(p, false) : cudaSuccess);
}

cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned)
{
    cudaError_t error = emu_ready();
    if (!error) error = emu_forbid_in_capture();
    return emu_return(error ? error : take(p, bytes, -1));
}

cudaError_t cudaMallocHost(void **p, size_t bytes)
{
    return cudaHostAlloc(p, bytes, cudaHostAllocDefault);
}

cudaError_t cudaFreeHost(void *p)
{
    return emu_return(p ? give_back(p, true) : cudaSuccess);
}
