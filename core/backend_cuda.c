/* The CUDA backend: its table, and the life of an open device. See backend_cuda.h for the parts. */
#include "backend_cuda.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LEAST_SM = 75, MOST_DEVICES = 64 };

static pthread_mutex_t lanes_lock = PTHREAD_MUTEX_INITIALIZER;
static ql_cuda_lane lanes[MOST_DEVICES];

static bool switched_off(const char *variable)
{
    const char *value = getenv(variable);
    return value && strcmp(value, "0") == 0;
}

/* ---- finding devices ---- */

static void version_text(int version, char out[16])
{
    snprintf(out, 16, "%d.%d", version / 1000, version % 1000 / 10);
}

static int no_devices(int error, ql_err *err)
{
    int driver = 0, runtime = 0;
    char has[16], needs[16];
    cudaGetLastError();
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    version_text(driver, has);
    version_text(runtime, needs);
    if (error == cudaErrorInsufficientDriver && driver == 0) {
        ql_err_set(err, QL_ERR_DEVICE, "no CUDA device: there is no NVIDIA driver (libcuda.so.1)");
        ql_err_hint(err, "install NVIDIA's driver, CUDA %s or later, or use --device cpu", needs);
    } else if (error == cudaErrorInsufficientDriver) {
        ql_err_set(err, QL_ERR_DEVICE, "no CUDA device: the driver is for CUDA %s, this build needs CUDA %s",
                   has, needs);
        ql_err_hint(err, "update NVIDIA's driver, or use --device cpu");
    } else if (error == cudaErrorNoDevice || error == cudaSuccess) {
        const char *visible = getenv("CUDA_VISIBLE_DEVICES");
        ql_err_set(err, QL_ERR_DEVICE, "no CUDA device: the driver (CUDA %s) sees none", has);
        if (visible) ql_err_hint(err, "CUDA_VISIBLE_DEVICES is '%s'", visible);
    } else {
        ql_err_set(err, QL_ERR_DEVICE, "no CUDA device: %s", cudaGetErrorString((cudaError_t)error));
        ql_err_hint(err, "driver for CUDA %s, runtime %s; see whether nvidia-smi works", has, needs);
    }
    return 0;
}

static int cuda_count(ql_err *err)
{
    int count = 0;
    int error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess || count == 0) return no_devices(error, err);
    return count < MOST_DEVICES ? count : MOST_DEVICES;
}

static int attribute(enum cudaDeviceAttr which, int index)
{
    int value = 0;
    if (cudaDeviceGetAttribute(&value, which, index) != cudaSuccess) cudaGetLastError();
    return value;
}

static int compute_capability(int index)
{
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, index) +
           attribute(cudaDevAttrComputeCapabilityMinor, index);
}

/* Launches may overlap where every device takes it (sm_90); one switch for the process. */
static void choose_programmatic(void)
{
    int count = 0;
    bool all = cudaGetDeviceCount(&count) == cudaSuccess && count > 0 && !switched_off("QLUA_CUDA_PDL");
    for (int i = 0; i < count && all; i++) all = compute_capability(i) >= 90;
    qk_cuda_set_programmatic(all);
}

static ql_status check_capability(const ql_cuda *c, ql_err *err)
{
    if (c->sm >= LEAST_SM) return QL_OK;
    struct cudaDeviceProp properties;
    const char *name = "?";
    if (cudaGetDeviceProperties(&properties, c->index) == cudaSuccess) name = properties.name;
    ql_err_set(err, QL_ERR_UNSUPPORTED, "%s (%s) has compute capability %d.%d, %d.%d is needed", c->label,
               name, c->sm / 10, c->sm % 10, LEAST_SM / 10, LEAST_SM % 10);
    return ql_err_hint(err, "use --device cpu");
}

/* ---- opening ---- */

static ql_status lane_open(ql_cuda *c, ql_err *err)
{
    ql_cuda_lane *lane = &lanes[c->index];
    pthread_mutex_lock(&lanes_lock);
    c->lane = lane;
    ql_status status = ql_cuda_enter(c, err);
    if (status == QL_OK && lane->users == 0) {
        choose_programmatic();
        status = ql_cuda_check(c, cudaStreamCreateWithFlags(&lane->stream, cudaStreamNonBlocking),
                               "cudaStreamCreate", err);
        if (status == QL_OK) {
            status = ql_cuda_check(c, cudaStreamCreateWithFlags(&lane->side, cudaStreamNonBlocking),
                                   "cudaStreamCreate", err);
            if (status != QL_OK) cudaStreamDestroy(lane->stream);
        }
    }
    if (status == QL_OK) lane->users++;
    if (status != QL_OK) c->lane = NULL;
    pthread_mutex_unlock(&lanes_lock);
    return status;
}

static void lane_close(ql_cuda_lane *lane)
{
    pthread_mutex_lock(&lanes_lock);
    if (--lane->users == 0 && !lane->given_up) {
        cudaStreamDestroy(lane->stream);
        cudaStreamDestroy(lane->side);
        lane->stream = lane->side = NULL;
        lane->first = lane->last = NULL;
    }
    pthread_mutex_unlock(&lanes_lock);
}

static ql_status make_events(ql_cuda *c, ql_err *err)
{
    cudaEvent_t *all[] = {&c->begun,      &c->filled[0],        &c->filled[1],       &c->emptied[0],
                          &c->emptied[1], &c->stage[0].emptied, &c->stage[1].emptied};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        QL_CUDA(cudaEventCreateWithFlags(all[i], cudaEventDisableTiming), "cudaEventCreate");
    return QL_OK;
}

static void cuda_close(void *ctx)
{
    ql_cuda *c = ctx;
    if (!c) return;
    if (c->lane) {
        bool alive = !c->lane->given_up && cudaSetDevice(c->index) == cudaSuccess;
        if (alive) ql_cuda_wait(c, NULL);
        ql_cuda_graph_close(c);
        ql_cuda_blas_close(c);
        ql_cuda_memory_close(c);
        cudaEvent_t all[] = {c->begun, c->filled[0], c->filled[1], c->emptied[0], c->emptied[1]};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
            if (all[i] && !c->lane->given_up) cudaEventDestroy(all[i]);
        }
        lane_close(c->lane);
    }
    free(c);
}

static ql_status prepare(ql_cuda *c, ql_err *err)
{
    QL_TRY(check_capability(c, err));
    QL_TRY(lane_open(c, err));
    QL_TRY(make_events(c, err));
    for (int i = 0; i < 2; i++)
        QL_CUDA(cudaMallocHost((void **)&c->stage[i].host, QL_CUDA_STAGE), "cudaMallocHost");
    QL_TRY(ql_cuda_alloc(c, QL_CUDA_CELLS, &c->cells, err));
    ql_cuda_graph_open(c);
    return QL_OK;
}

static ql_status cuda_open(int index, const ql_device_options *options, void **out, ql_err *err)
{
    *out = NULL;
    if (index < 0 || index >= MOST_DEVICES)
        return ql_err_set(err, QL_ERR_DEVICE, "device 'cuda:%d': there is no such device", index);
    ql_cuda *c = calloc(1, sizeof *c);
    if (!c) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    const char *each = getenv("QLUA_CUDA_SYNC");
    c->index = index;
    c->sm = compute_capability(index);
    c->numerics = options->numerics;
    const char *slice = getenv("QLUA_CUDA_SLICE");
    c->slice = slice ? strtoll(slice, NULL, 10) : 0;
    if (c->slice <= 0 || c->slice > QL_CUDA_SLICE) c->slice = QL_CUDA_SLICE;
    c->sync_each = each && *each && strcmp(each, "0") != 0;
    snprintf(c->label, sizeof c->label, "cuda:%d", index);
    ql_status status = prepare(c, err);
    if (status != QL_OK) {
        cuda_close(c);
        return status;
    }
    *out = c;
    return QL_OK;
}

static ql_status cuda_info(void *ctx, ql_device_info *out, ql_err *err)
{
    ql_cuda *c = ctx;
    QL_TRY(ql_cuda_enter(c, err));
    *out = (ql_device_info){
        .energy_joules = -1, .throttled_seconds = -1, .neighbours = -1, .numerics = c->numerics};
    struct cudaDeviceProp properties;
    QL_CUDA(cudaGetDeviceProperties(&properties, c->index), "cudaGetDeviceProperties");
    snprintf(out->name, sizeof out->name, "%.95s", properties.name);
    snprintf(out->isa, sizeof out->isa, "sm_%d", c->sm);
    int driver = 0, runtime = 0;
    char has[16], built[16], blas[24];
    QL_CUDA(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    QL_CUDA(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion");
    version_text(driver, has);
    version_text(runtime, built);
    ql_cuda_blas_version(c, blas, sizeof blas);
    snprintf(out->driver, sizeof out->driver, "driver %.6s, runtime %.6s, %s", has, built, blas);
    QL_CUDA(cudaMemGetInfo(&out->memory_free, &out->memory_total), "cudaMemGetInfo");
    ql_cuda_nvml_info(c, out);
    return QL_OK;
}

/* ---- what ran ---- */

static const char *kernel_name(ql_cuda_kernel kernel)
{
    switch (kernel) {
    case QL_CUDA_RAN_PLAIN:
        return "plain float32";
    case QL_CUDA_RAN_16BIT:
        return "16-bit mma m16n8k16";
    case QL_CUDA_RAN_4BIT:
        return "4-bit tiles mma m16n8k16";
    case QL_CUDA_RAN_BLAS_BF16:
        return "cuBLASLt bf16";
    case QL_CUDA_RAN_BLAS_F16:
        return "cuBLASLt f16";
    case QL_CUDA_RAN_BLAS_F32:
        return "cuBLASLt f32";
    case QL_CUDA_RAN_DECODED:
        return "4-bit decoded for cuBLASLt";
    case QL_CUDA_RAN_NO_BLAS:
        return "cuBLASLt not found";
    case QL_CUDA_RAN_ATTENTION_DECODE:
        return "flash-decoding in pieces of 128";
    case QL_CUDA_RAN_ATTENTION_PREFILL:
        return "flash attention mma";
    case QL_CUDA_RAN_GRAPH:
        return "CUDA graph";
    case QL_CUDA_RAN_COUNT:
        break;
    }
    return "?";
}
_Static_assert(QK_ATTENTION_SPLIT == 128, "the name above says so");

void ql_cuda_kernels(void *ctx, char *out, size_t size)
{
    ql_cuda *c = ctx;
    size_t at = 0;
    if (size > 0) out[0] = '\0';
    for (int i = 0; i < QL_CUDA_RAN_COUNT && at < size; i++) {
        if (!(c->ran >> i & 1)) continue;
        at += (size_t)snprintf(out + at, size - at, "%s%s", at ? ", " : "", kernel_name((ql_cuda_kernel)i));
    }
    c->ran = 0;
}

static const ql_backend backend = {
    .name = "cuda",
    .abi = QL_BACKEND_ABI,
    .kv_dtype = QL_BF16,
    .pass_tokens = 2048,
    .nested_scales = true,
    .count = cuda_count,
    .open = cuda_open,
    .close = cuda_close,
    .info = cuda_info,
    .ceiling = ql_cuda_ceiling,
    .kernels = ql_cuda_kernels,
    .alloc = ql_cuda_alloc,
    .free = ql_cuda_free,
    .upload = ql_cuda_upload,
    .download = ql_cuda_download,
    .sync = ql_cuda_sync,
    .embed = ql_cuda_embed,
    .rmsnorm = ql_cuda_rmsnorm,
    .matmul = ql_cuda_matmul,
    .rope = ql_cuda_rope,
    .kv_write = ql_cuda_kv_write,
    .kv_copy = ql_cuda_kv_copy,
    .attention = ql_cuda_attention_step,
    .swiglu = ql_cuda_swiglu,
    .gather_rows = ql_cuda_gather_rows,
    .pass_bytes = ql_cuda_pass_bytes,
    .pass = ql_cuda_pass,
    .topk = ql_cuda_topk,
    .logsumexp = ql_cuda_logsumexp,
    .row_stats = ql_cuda_row_stats,
    .softmax = ql_cuda_softmax,
    .gather_cols = ql_cuda_gather_cols,
    .kl = ql_cuda_kl,
    .binary = ql_cuda_binary,
    .convert = ql_cuda_convert,
    .find_bad = ql_cuda_find_bad,
    .random = ql_cuda_random,
    .quantize4 = ql_cuda_quantize4,
    .dequantize4 = ql_cuda_dequantize4,
    .pack4 = ql_cuda_pack4,
    .unpack4 = ql_cuda_unpack4,
};

__attribute__((visibility("default"))) const ql_backend *ql_backend_plugin(void)
{
    return &backend;
}
