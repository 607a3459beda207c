/* The emulated CUDA runtime: memory, streams and graphs, errors on demand, and the emulated cuBLASLt. */
#include "cuda_help.h"
#include "test_kernels.h"

#include <cublasLt.h>
#include <dlfcn.h>

#define IS(call, expected) assert_int_equal(call, expected)

static int healthy(void **state)
{
    (void)state;
    unsetenv("QLUA_EMU_CUDA");
    cudaSetDevice(0);
    cudaGetLastError();
    cuda_free_all();
    return 0;
}

/* ---- memory ---- */

static void test_memory(void **state)
{
    (void)state;
    size_t before, after, total;
    CUDA_OK(cudaMemGetInfo(&before, &total));
    assert_int_equal(total, (size_t)4 << 30);
    float *p = cuda_new(400), host[100];
    cuda_get(host, p, sizeof host);
    for (int i = 0; i < 100; i++) assert_true(isnan(host[i]));
    CUDA_OK(cudaMemGetInfo(&after, &total));
    assert_int_equal(before - after, 400 + CUDA_GUARD);
    cuda_free(p);
    CUDA_OK(cudaMemGetInfo(&after, &total));
    assert_int_equal(before, after);

    setenv("QLUA_EMU_CUDA", "memory=1000", 1);
    void *a, *b;
    CUDA_OK(cudaMalloc(&a, 600));
    IS(cudaMalloc(&b, 401), cudaErrorMemoryAllocation);
    IS(cudaGetLastError(), cudaErrorMemoryAllocation);
    IS(cudaGetLastError(), cudaSuccess);
    CUDA_OK(cudaMalloc(&b, 400));
    CUDA_OK(cudaFree(a));
    IS(cudaFree(a), cudaErrorInvalidValue);
    CUDA_OK(cudaFree(b));
    CUDA_OK(cudaFree(NULL));
}

static void test_copies_checked(void **state)
{
    (void)state;
    char host[64] = {1}, other[64], *device = cuda_new(64), *pinned;
    IS(cudaMemcpy(device, host, 64, cudaMemcpyDeviceToDevice), cudaErrorInvalidValue);
    IS(cudaMemcpy(host, other, 64, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    IS(cudaMemcpy(host, device, 64, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    IS(cudaMemcpy(device + 64 + CUDA_GUARD - 8, host, 9, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
    IS(cudaMemset(host, 0, 64), cudaErrorInvalidValue);
    IS(cudaMemcpy(device, host, 64, (enum cudaMemcpyKind)9), cudaErrorInvalidMemcpyDirection);
    cudaGetLastError();
    CUDA_OK(cudaMallocHost((void **)&pinned, 64));
    CUDA_OK(cudaMemcpy(device, host, 64, cudaMemcpyDefault));
    CUDA_OK(cudaMemcpy(pinned, device, 64, cudaMemcpyDeviceToHost));
    assert_memory_equal(pinned, host, 64);
    IS(cudaFree(pinned), cudaErrorInvalidValue);
    CUDA_OK(cudaFreeHost(pinned));
    char square[4][4], grid[4][16];
    memset(grid, 3, sizeof grid);
    memset(square, 0, sizeof square);
    CUDA_OK(cudaMemcpy(device, grid, 64, cudaMemcpyHostToDevice));
    CUDA_OK(cudaMemcpy2D(device + 1, 16, square, 4, 2, 4, cudaMemcpyHostToDevice));
    cuda_get(grid, device, 64);
    for (int i = 0; i < 64; i++) assert_int_equal(grid[i / 16][i % 16], i % 16 == 1 || i % 16 == 2 ? 0 : 3);
}

/* ---- capture ---- */

static int number_at(const int *p)
{
    int n;
    cuda_get(&n, p, sizeof n);
    return n;
}

/* 2 p + `add`, then p's copy to q: captured. */
static cudaGraph_t capture_step(cudaStream_t s, int *p, int *q, int add)
{
    cudaGraph_t graph;
    CUDA_OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    CUDA_OK(test_step_launch(s, p, add));
    CUDA_OK(cudaMemcpyAsync(q, p, sizeof *p, cudaMemcpyDeviceToDevice, s));
    CUDA_OK(cudaStreamEndCapture(s, &graph));
    return graph;
}

static void test_graph(void **state)
{
    (void)state;
    const int one = 1;
    int *p = cuda_put(&one, sizeof one), *q = cuda_put(&one, sizeof one);
    cudaStream_t s;
    CUDA_OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    cudaGraph_t graph = capture_step(s, p, q, 3), other;
    assert_int_equal(number_at(p), 1);
    cudaGraphExec_t exec;
    CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_OK(cudaGraphDestroy(graph));
    CUDA_OK(cudaGraphLaunch(exec, s));
    assert_int_equal(number_at(q), 5);
    CUDA_OK(cudaGraphLaunch(exec, s));
    assert_int_equal(number_at(q), 13);

    cudaGraphExecUpdateResultInfo info;
    other = capture_step(s, p, q, 4);
    CUDA_OK(cudaGraphExecUpdate(exec, other, &info));
    IS(info.result, cudaGraphExecUpdateSuccess);
    CUDA_OK(cudaGraphDestroy(other));
    CUDA_OK(cudaGraphLaunch(exec, s));
    assert_int_equal(number_at(q), 30);

    CUDA_OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    CUDA_OK(test_step_launch(s, p, 1));
    CUDA_OK(cudaStreamEndCapture(s, &other));
    IS(cudaGraphExecUpdate(exec, other, &info), cudaErrorGraphExecUpdateFailure);
    IS(info.result, cudaGraphExecUpdateErrorTopologyChanged);
    CUDA_OK(cudaGraphDestroy(other));
    CUDA_OK(cudaGraphLaunch(exec, s)); /* is as it was */
    assert_int_equal(number_at(q), 64);
    CUDA_OK(cudaGraphExecDestroy(exec));
    CUDA_OK(cudaStreamDestroy(s));
}

/* What may not be done while a stream is captured, and ends the capture. */
static void test_capture_forbids(void **state)
{
    (void)state;
    cudaGraph_t graph;
    int *p = cuda_new(4), host = 0;
    void *q;
    for (int what = 0; what < 6; what++) {
        cudaStream_t s;
        CUDA_OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
        CUDA_OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
        cudaError_t error = what == 0   ? cudaStreamSynchronize(s)
                            : what == 1 ? cudaDeviceSynchronize()
                            : what == 2 ? cudaMalloc(&q, 4)
                            : what == 3 ? cudaMemcpy(p, &host, 4, cudaMemcpyHostToDevice)
                            : what == 4 ? cudaFree(p)
                                        : cudaStreamQuery(s);
        IS(error, cudaErrorStreamCaptureUnsupported);
        enum cudaStreamCaptureStatus status;
        CUDA_OK(cudaStreamIsCapturing(s, &status));
        IS(status, cudaStreamCaptureStatusInvalidated);
        IS(test_step_launch(s, p, 1), cudaErrorStreamCaptureInvalidated);
        IS(cudaStreamEndCapture(s, &graph), cudaErrorStreamCaptureInvalidated);
        assert_null(graph);
        CUDA_OK(cudaStreamIsCapturing(s, &status));
        IS(status, cudaStreamCaptureStatusNone);
        CUDA_OK(cudaStreamDestroy(s));
    }
    cudaStream_t blocking;
    CUDA_OK(cudaStreamCreate(&blocking));
    IS(cudaStreamBeginCapture(NULL, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
    IS(cudaStreamEndCapture(blocking, &graph), cudaErrorIllegalState);
    CUDA_OK(cudaStreamBeginCapture(blocking, cudaStreamCaptureModeRelaxed));
    IS(test_step_launch(NULL, p, 1), cudaErrorStreamCaptureImplicit);
    CUDA_OK(cudaStreamDestroy(blocking));
}

/* A second stream joins a capture by events, and must come back. */
static void test_fork(void **state)
{
    (void)state;
    const int start = 1;
    int *p = cuda_put(&start, sizeof start), *q = cuda_put(&start, sizeof start);
    cudaStream_t s, t;
    cudaEvent_t fork_event, join_event;
    cudaGraph_t graph;
    CUDA_OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    CUDA_OK(cudaStreamCreateWithFlags(&t, cudaStreamNonBlocking));
    CUDA_OK(cudaEventCreateWithFlags(&fork_event, cudaEventDisableTiming));
    CUDA_OK(cudaEventCreateWithFlags(&join_event, cudaEventDisableTiming));
    for (int join = 0; join < 2; join++) {
        CUDA_OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
        CUDA_OK(cudaEventRecord(fork_event, s));
        CUDA_OK(cudaStreamWaitEvent(t, fork_event, 0));
        CUDA_OK(test_step_launch(t, q, 1));
        CUDA_OK(test_step_launch(s, p, 2));
        CUDA_OK(cudaEventRecord(join_event, t));
        IS(cudaEventSynchronize(join_event), cudaErrorCapturedEvent);
        if (join) CUDA_OK(cudaStreamWaitEvent(s, join_event, 0));
        IS(cudaStreamEndCapture(t, &graph), cudaErrorStreamCaptureUnmatched);
        IS(cudaStreamEndCapture(s, &graph), join ? cudaSuccess : cudaErrorStreamCaptureUnjoined);
    }
    size_t nodes;
    CUDA_OK(cudaGraphGetNodes(graph, NULL, &nodes));
    assert_int_equal(nodes, 2);
    cudaGraphExec_t exec;
    CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_OK(cudaGraphLaunch(exec, s));
    assert_int_equal(number_at(p), 4);
    assert_int_equal(number_at(q), 3);
    CUDA_OK(cudaGraphExecDestroy(exec));
    CUDA_OK(cudaGraphDestroy(graph));
    CUDA_OK(cudaEventDestroy(fork_event));
    CUDA_OK(cudaEventDestroy(join_event));
    CUDA_OK(cudaStreamDestroy(s));
    CUDA_OK(cudaStreamDestroy(t));
}

static void test_events(void **state)
{
    (void)state;
    cudaEvent_t a, b, silent;
    float ms = -1;
    CUDA_OK(cudaEventCreate(&a));
    CUDA_OK(cudaEventCreate(&b));
    CUDA_OK(cudaEventCreateWithFlags(&silent, cudaEventDisableTiming));
    CUDA_OK(cudaEventRecord(a, NULL));
    IS(cudaEventElapsedTime(&ms, a, b), cudaErrorInvalidResourceHandle);
    CUDA_OK(cudaEventRecord(b, NULL));
    CUDA_OK(cudaEventRecord(silent, NULL));
    CUDA_OK(cudaEventElapsedTime(&ms, a, b));
    assert_true(ms >= 0 && ms < 60000);
    IS(cudaEventElapsedTime(&ms, a, silent), cudaErrorInvalidResourceHandle);
    CUDA_OK(cudaEventDestroy(a));
    CUDA_OK(cudaEventDestroy(b));
    CUDA_OK(cudaEventDestroy(silent));
}

/* ---- errors on demand ---- */

static void test_devices(void **state)
{
    (void)state;
    int count = -1, driver;
    CUDA_OK(cudaGetDeviceCount(&count));
    assert_int_equal(count, 1);
    IS(cudaSetDevice(1), cudaErrorInvalidDevice);
    setenv("QLUA_EMU_CUDA", "devices=2,sm=75", 1);
    CUDA_OK(cudaGetDeviceCount(&count));
    assert_int_equal(count, 2);
    CUDA_OK(cudaSetDevice(1));
    struct cudaDeviceProp prop;
    CUDA_OK(cudaGetDeviceProperties(&prop, 1));
    assert_int_equal(prop.major * 10 + prop.minor, 75);
    assert_int_equal(prop.sharedMemPerBlockOptin, 65536);
    IS(cudaGetDeviceProperties(&prop, 2), cudaErrorInvalidDevice);
    setenv("QLUA_EMU_CUDA", "devices=0", 1);
    IS(cudaGetDeviceCount(&count), cudaErrorNoDevice);
    assert_int_equal(count, 0);
    setenv("QLUA_EMU_CUDA", "error=driver", 1);
    IS(cudaGetDeviceCount(&count), cudaErrorInsufficientDriver);
    CUDA_OK(cudaDriverGetVersion(&driver));
    assert_true(driver < CUDART_VERSION);
    setenv("QLUA_EMU_CUDA", "error=nodevice", 1);
    IS(cudaSetDevice(0), cudaErrorNoDevice);
}

static void test_faults(void **state)
{
    (void)state;
    const int one = 1;
    int *p = cuda_put(&one, sizeof one), host;
    setenv("QLUA_EMU_CUDA", "launchfault=2", 1);
    CUDA_OK(test_step_launch(NULL, p, 0));
    IS(test_step_launch(NULL, p, 0), cudaErrorInvalidConfiguration);
    CUDA_OK(test_step_launch(NULL, p, 0));
    assert_int_equal(number_at(p), 4);

    setenv("QLUA_EMU_CUDA", "fault=2", 1);
    CUDA_OK(test_step_launch(NULL, p, 0));
    CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(test_step_launch(NULL, p, 0)); /* this one faults */
    IS(cudaStreamSynchronize(NULL), cudaErrorIllegalAddress);
    IS(test_step_launch(NULL, p, 0), cudaErrorIllegalAddress);
    IS(cudaMemcpy(&host, p, 4, cudaMemcpyDeviceToHost), cudaErrorIllegalAddress);
    IS(cudaGetLastError(), cudaErrorIllegalAddress);
    IS(cudaGetLastError(), cudaErrorIllegalAddress);
    unsetenv("QLUA_EMU_CUDA");
    cudaGetLastError();
    assert_int_equal(number_at(p), 8);
}

static void test_names(void **state)
{
    (void)state;
    assert_string_equal(cudaGetErrorName(cudaErrorMemoryAllocation), "cudaErrorMemoryAllocation");
    assert_string_equal(cudaGetErrorString(cudaErrorMemoryAllocation), "out of memory");
    assert_string_equal(cudaGetErrorString(cudaSuccess), "no error");
}

/* ---- cuBLASLt ---- */

typedef struct {
    cudaDataType_t in, out;
    uint64_t tokens, n, k;
    float beta;
} product_case;

#define SYMBOL(name) __typeof__(&name) p_##name = (__typeof__(&name))dlsym(library, #name)

static void fill(void *p, cudaDataType_t type, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        float x = random_unit();
        if (type == CUDA_R_32F)
            ((float *)p)[i] = x;
        else
            ((uint16_t *)p)[i] = type == CUDA_R_16F ? qk_f32_to_f16(x) : qk_f32_to_bf16(x);
    }
}

static double read_number(const void *p, cudaDataType_t type, size_t i)
{
    if (type == CUDA_R_32F) return ((const float *)p)[i];
    uint16_t half = ((const uint16_t *)p)[i];
    return type == CUDA_R_16F ? qk_f16_to_f32(half) : qk_bf16_to_f32(half);
}

/* y [tokens, n] = x [tokens, k] w [n, k]^T + beta y, first captured, then replayed. */
static void try_product(void *library, const product_case *p)
{
    SYMBOL(cublasLtCreate);
    SYMBOL(cublasLtDestroy);
    SYMBOL(cublasLtMatmulDescCreate);
    SYMBOL(cublasLtMatmulDescSetAttribute);
    SYMBOL(cublasLtMatmulDescDestroy);
    SYMBOL(cublasLtMatrixLayoutCreate);
    SYMBOL(cublasLtMatrixLayoutDestroy);
    SYMBOL(cublasLtMatmul);
    size_t in = p->in == CUDA_R_32F ? 4 : 2, out = p->out == CUDA_R_32F ? 4 : 2;
    void *w = new_bytes(p->n * p->k * in), *x = new_bytes(p->tokens * p->k * in);
    void *y = new_bytes(p->tokens * p->n * out), *got = new_bytes(p->tokens * p->n * out);
    fill(w, p->in, p->n * p->k);
    fill(x, p->in, p->tokens * p->k);
    fill(y, p->out, p->tokens * p->n);
    void *dw = cuda_put(w, p->n * p->k * in), *dx = cuda_put(x, p->tokens * p->k * in);
    void *dy = cuda_put(y, p->tokens * p->n * out);
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatrixLayout_t lw, lx, ly;
    const int32_t transposed = CUBLAS_OP_T;
    const float alpha = 0.5f;
    IS(p_cublasLtCreate(&handle), CUBLAS_STATUS_SUCCESS);
    IS(p_cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), CUBLAS_STATUS_SUCCESS);
    IS(p_cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, 4),
       CUBLAS_STATUS_SUCCESS);
    IS(p_cublasLtMatrixLayoutCreate(&lw, p->in, p->k, p->n, (int64_t)p->k), CUBLAS_STATUS_SUCCESS);
    IS(p_cublasLtMatrixLayoutCreate(&lx, p->in, p->k, p->tokens, (int64_t)p->k), CUBLAS_STATUS_SUCCESS);
    IS(p_cublasLtMatrixLayoutCreate(&ly, p->out, p->n, p->tokens, (int64_t)p->n), CUBLAS_STATUS_SUCCESS);
    cudaStream_t s;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CUDA_OK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    CUDA_OK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    IS(p_cublasLtMatmul(handle, desc, &alpha, dw, lw, dx, lx, &p->beta, dy, ly, dy, ly, NULL, NULL, 0, s),
       CUBLAS_STATUS_SUCCESS);
    IS(p_cublasLtMatmul(handle, desc, &alpha, dw, lx, dx, lw, &p->beta, dy, ly, dy, ly, NULL, NULL, 0, s),
       p->tokens == p->n ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE);
    CUDA_OK(cudaStreamEndCapture(s, &graph));
    cuda_get(got, dy, p->tokens * p->n * out);
    assert_memory_equal(got, y, p->tokens * p->n * out);
    CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
    CUDA_OK(cudaGraphLaunch(exec, s));
    cuda_get(got, dy, p->tokens * p->n * out);
    for (size_t t = 0; t < p->tokens; t++)
        for (size_t j = 0; j < p->n; j++) {
            double sum = 0, size = 0;
            for (size_t i = 0; i < p->k; i++) {
                double term = read_number(x, p->in, t * p->k + i) * read_number(w, p->in, j * p->k + i);
                sum += term;
                size += fabs(term);
            }
            double old = p->beta == 0 ? 0 : p->beta * read_number(y, p->out, t * p->n + j);
            double expect = alpha * sum + old, near = p->out == CUDA_R_32F   ? 0
                                                      : p->out == CUDA_R_16F ? 0x1p-11
                                                                             : 0x1p-8;
            double bound = (double)(p->k + 3) * 0x1p-24 * (size + fabs(old)) + near * fabs(expect) + 1e-30;
            assert_true(fabs(read_number(got, p->out, t * p->n + j) - expect) <= bound);
        }
    CUDA_OK(cudaGraphExecDestroy(exec));
    CUDA_OK(cudaGraphDestroy(graph));
    CUDA_OK(cudaStreamDestroy(s));
    p_cublasLtMatrixLayoutDestroy(lw);
    p_cublasLtMatrixLayoutDestroy(lx);
    p_cublasLtMatrixLayoutDestroy(ly);
    p_cublasLtMatmulDescDestroy(desc);
    p_cublasLtDestroy(handle);
    free(w);
    free(x);
    free(y);
    free(got);
    cuda_free_all();
}

static void test_cublaslt(void **state)
{
    (void)state;
    void *library = dlopen(QLUA_TEST_CUBLASLT, RTLD_NOW | RTLD_LOCAL);
    if (!library) fail_msg("%s", dlerror());
    const product_case cases[] = {
        {CUDA_R_32F, CUDA_R_32F, 3, 7, 37, 0},  {CUDA_R_16F, CUDA_R_32F, 5, 4, 64, 1},
        {CUDA_R_16BF, CUDA_R_32F, 1, 9, 40, 1}, {CUDA_R_16BF, CUDA_R_16BF, 6, 2, 24, 0},
        {CUDA_R_16F, CUDA_R_16F, 2, 16, 8, -2},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) try_product(library, &cases[i]);
    dlclose(library);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_memory, healthy),
        cmocka_unit_test_teardown(test_copies_checked, healthy),
        cmocka_unit_test_teardown(test_graph, healthy),
        cmocka_unit_test_teardown(test_capture_forbids, healthy),
        cmocka_unit_test_teardown(test_fork, healthy),
        cmocka_unit_test_teardown(test_events, healthy),
        cmocka_unit_test_teardown(test_devices, healthy),
        cmocka_unit_test_teardown(test_faults, healthy),
        cmocka_unit_test_teardown(test_names, healthy),
        cmocka_unit_test_teardown(test_cublaslt, healthy),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
