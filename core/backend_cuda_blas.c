/* cuBLASLt for products of many tokens: found at run time, so that the plug-in loads where it is missing.
 *
 * In cuBLASLt's column-major terms y^T [n, T] = w^T' x^T: both operands lie along k, so A = w transposed, B =
 * x.
 */
#include "backend_cuda.h"

#include <cublasLt.h>

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SHAPES = 64 };

typedef struct {
    qk_format format; /* of w and x */
    int64_t tokens, n, k, stride;
    cublasLtMatmulDesc_t operation;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algorithm;
} shape;

struct ql_cuda_blas {
    void *library;
    size_t version, room;
    cublasLtHandle_t handle;
    shape shapes[SHAPES];
    int used, next; /* `next` gives way when all are used */

    size_t (*get_version)(void);
    cublasStatus_t (*create)(cublasLtHandle_t *);
    cublasStatus_t (*destroy)(cublasLtHandle_t);
    cublasStatus_t (*desc_create)(cublasLtMatmulDesc_t *, cublasComputeType_t, cudaDataType_t);
    cublasStatus_t (*desc_destroy)(cublasLtMatmulDesc_t);
    cublasStatus_t (*desc_set)(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void *, size_t);
    cublasStatus_t (*layout_create)(cublasLtMatrixLayout_t *, cudaDataType, uint64_t, uint64_t, int64_t);
    cublasStatus_t (*layout_destroy)(cublasLtMatrixLayout_t);
    cublasStatus_t (*preference_create)(cublasLtMatmulPreference_t *);
    cublasStatus_t (*preference_destroy)(cublasLtMatmulPreference_t);
    cublasStatus_t (*preference_set)(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
                                     const void *, size_t);
    cublasStatus_t (*heuristic)(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t[], int *);
    cublasStatus_t (*matmul)(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *, const void *,
                             cublasLtMatrixLayout_t, const void *, cublasLtMatrixLayout_t, const void *,
                             const void *, cublasLtMatrixLayout_t, void *, cublasLtMatrixLayout_t,
                             const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t);
};

/* ---- finding it ---- */

static void *open_library(void)
{
    static const char *const names[] = {
        "libcublasLt.so.13",
        "libcublasLt.so.12",
        "/usr/local/cuda/lib64/libcublasLt.so.13",
        "/usr/local/cuda-13/lib64/libcublasLt.so.13",
        "/usr/local/cuda/lib64/libcublasLt.so.12",
    };
    const char *named = getenv("QLUA_CUBLASLT");
    if (named && *named) return dlopen(named, RTLD_NOW | RTLD_LOCAL); /* that one or none */
    void *library = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names && !library; i++)
        library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    return library;
}

static bool load_symbols(ql_cuda_blas *b)
{
    const struct {
        void *to;
        const char *name;
    } symbols[] = {
        {&b->get_version, "cublasLtGetVersion"},
        {&b->create, "cublasLtCreate"},
        {&b->destroy, "cublasLtDestroy"},
        {&b->desc_create, "cublasLtMatmulDescCreate"},
        {&b->desc_destroy, "cublasLtMatmulDescDestroy"},
        {&b->desc_set, "cublasLtMatmulDescSetAttribute"},
        {&b->layout_create, "cublasLtMatrixLayoutCreate"},
        {&b->layout_destroy, "cublasLtMatrixLayoutDestroy"},
        {&b->preference_create, "cublasLtMatmulPreferenceCreate"},
        {&b->preference_destroy, "cublasLtMatmulPreferenceDestroy"},
        {&b->preference_set, "cublasLtMatmulPreferenceSetAttribute"},
        {&b->heuristic, "cublasLtMatmulAlgoGetHeuristic"},
        {&b->matmul, "cublasLtMatmul"},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *found = dlsym(b->library, symbols[i].name);
        if (!found) return false;
        memcpy(symbols[i].to, &found, sizeof found);
    }
    return true;
}

bool ql_cuda_blas_found(ql_cuda *c)
{
    if (c->blas_tried) return c->blas != NULL;
    c->blas_tried = true;
    ql_cuda_blas *b = calloc(1, sizeof *b);
    if (!b) return false;
    b->library = open_library();
    if (!b->library || !load_symbols(b)) {
        if (b->library) dlclose(b->library);
        free(b);
        return false;
    }
    b->version = b->get_version();
    /* What NVIDIA's guide to cuBLAS recommends as workspace: 32 MiB for Hopper, 4 MiB before. */
    b->room = c->sm >= 90 ? (size_t)32 << 20 : (size_t)4 << 20;
    c->blas = b;
    return true;
}

void ql_cuda_blas_version(ql_cuda *c, char *out, size_t size)
{
    if (!ql_cuda_blas_found(c)) {
        snprintf(out, size, "cuBLASLt not found");
        return;
    }
    size_t v = c->blas->version; /* 13.0.2 is 130002, as 12.4.5 was 120405 */
    snprintf(out, size, "cuBLASLt %zu.%zu.%zu", v / 10000, v / 100 % 100, v % 100);
}

size_t ql_cuda_blas_room(const ql_cuda *c)
{
    return c->blas ? c->blas->room : 0;
}

/* ---- one algorithm per shape ---- */

static ql_status failed(const ql_cuda *c, const char *what, cublasStatus_t status, ql_err *err)
{
    return ql_err_set(err, QL_ERR_DEVICE, "%s: %s: cuBLASLt status %d", c->label, what, (int)status);
}

#define BLAS(call, what)                                                                                     \
    do {                                                                                                     \
        cublasStatus_t blas_status = (call);                                                                 \
        if (blas_status != CUBLAS_STATUS_SUCCESS) return failed(c, what, blas_status, err);                  \
    } while (0)

static void shape_free(const ql_cuda_blas *b, shape *s)
{
    if (s->operation) b->desc_destroy(s->operation);
    if (s->w) b->layout_destroy(s->w);
    if (s->x) b->layout_destroy(s->x);
    if (s->y) b->layout_destroy(s->y);
    memset(s, 0, sizeof *s);
}

static ql_status choose(ql_cuda *c, shape *s, cublasLtMatmulPreference_t preference, ql_err *err)
{
    const ql_cuda_blas *b = c->blas;
    /* Rows of y, and of a float32 x, may begin at any multiple of 4 numbers. */
    uint32_t alignment = 16;
    BLAS(b->preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &b->room, sizeof b->room),
         "workspace");
    BLAS(b->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &alignment,
                           sizeof alignment),
         "alignment");
    BLAS(b->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &alignment,
                           sizeof alignment),
         "alignment");
    if (s->format == QK_F32)
        BLAS(b->preference_set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &alignment,
                               sizeof alignment),
             "alignment");
    cublasLtMatmulHeuristicResult_t result;
    memset(&result, 0, sizeof result);
    int found = 0;
    BLAS(b->heuristic(b->handle, s->operation, s->w, s->x, s->y, s->y, preference, 1, &result, &found),
         "choice of an algorithm");
    if (found < 1) return failed(c, "choice of an algorithm", CUBLAS_STATUS_NOT_SUPPORTED, err);
    s->algorithm = result.algo;
    return QL_OK;
}

static ql_status shape_make(ql_cuda *c, shape *s, ql_err *err)
{
    const ql_cuda_blas *b = c->blas;
    cudaDataType type = s->format == QK_BF16 ? CUDA_R_16BF : s->format == QK_F16 ? CUDA_R_16F : CUDA_R_32F;
    cublasOperation_t transposed = CUBLAS_OP_T;
    /* COMPUTE_32F: float32 throughout for float32 operands, no TF32. */
    BLAS(b->desc_create(&s->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F), "description");
    BLAS(b->desc_set(s->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed),
         "description");
    BLAS(b->layout_create(&s->w, type, (uint64_t)s->k, (uint64_t)s->n, s->k), "layout");
    BLAS(b->layout_create(&s->x, type, (uint64_t)s->k, (uint64_t)s->tokens, s->k), "layout");
    BLAS(b->layout_create(&s->y, CUDA_R_32F, (uint64_t)s->n, (uint64_t)s->tokens, s->stride), "layout");
    cublasLtMatmulPreference_t preference;
    BLAS(b->preference_create(&preference), "preference");
    ql_status status = choose(c, s, preference, err);
    b->preference_destroy(preference);
    return status;
}

static ql_status shape_find(ql_cuda *c, const shape *like, shape **out, ql_err *err)
{
    ql_cuda_blas *b = c->blas;
    for (int i = 0; i < b->used; i++) {
        shape *s = &b->shapes[i];
        if (s->format == like->format && s->tokens == like->tokens && s->n == like->n && s->k == like->k &&
            s->stride == like->stride) {
            *out = s;
            return QL_OK;
        }
    }
    if (!b->handle) BLAS(b->create(&b->handle), "cublasLtCreate");
    shape *s = &b->shapes[b->next];
    if (b->next < b->used)
        shape_free(b, s);
    else
        b->used++;
    *s = *like;
    ql_status status = shape_make(c, s, err);
    if (status != QL_OK) {
        shape_free(b, s); /* matches nothing: no product has 0 tokens */
        return status;
    }
    b->next = (b->next + 1) % SHAPES;
    *out = s;
    return QL_OK;
}

ql_status ql_cuda_blas_product(ql_cuda *c, qk_format f, const void *x, const void *w, int64_t tokens,
                               int64_t n, int64_t k, bool add, float *y, int64_t stride, void *room,
                               ql_err *err)
{
    ql_cuda_blas *b = c->blas;
    const float one = 1, old = add ? 1.0f : 0.0f;
    shape like = {.format = f, .tokens = tokens, .n = n, .k = k, .stride = stride}, *s = NULL;
    QL_TRY(shape_find(c, &like, &s, err));
    cublasStatus_t status = b->matmul(b->handle, s->operation, &one, w, s->w, x, s->x, &old, y, s->y, y, s->y,
                                      &s->algorithm, room, b->room, c->lane->stream);
    if (status != CUBLAS_STATUS_SUCCESS) {
        QL_CUDA(cudaGetLastError(), "cublasLtMatmul"); /* a fault of earlier work shows here */
        return failed(c, "cublasLtMatmul", status, err);
    }
    ql_cuda_note(c, f == QK_BF16  ? QL_CUDA_RAN_BLAS_BF16
                    : f == QK_F16 ? QL_CUDA_RAN_BLAS_F16
                                  : QL_CUDA_RAN_BLAS_F32);
    return ql_cuda_ran(c, cudaSuccess, "cublasLtMatmul", err);
}

/* The library stays loaded: cuBLASLt does not unload cleanly while its kernels are. */
void ql_cuda_blas_close(ql_cuda *c)
{
    ql_cuda_blas *b = c->blas;
    if (!b) return;
    for (int i = 0; i < b->used; i++) shape_free(b, &b->shapes[i]);
    if (b->handle && !c->lane->given_up) b->destroy(b->handle);
    free(b);
    c->blas = NULL;
}
