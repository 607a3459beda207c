/* cuBLASLt on a processor: one plain product, strict about what the real library refuses or reads wrongly,
 * such as a pointer less aligned than the algorithm was asked for.
 */
#include "stream.h"

#include "qk_half.h"

#include <cublasLt.h>

#include <stdbool.h>
#include <stdlib.h>

struct cublasLtContext {
    int unused;
};

/* How the opaque structs are used. */
typedef struct {
    cublasComputeType_t compute;
    cudaDataType_t scale;
    int32_t op[2]; /* of A and B */
} operation;
typedef struct {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t ld;
} layout;
typedef struct {
    uint64_t workspace;
    uint32_t alignment[4]; /* of A, B, C, D */
} preference;
_Static_assert(sizeof(operation) <= sizeof(cublasLtMatmulDescOpaque_t), "operation");
_Static_assert(sizeof(layout) <= sizeof(cublasLtMatrixLayoutOpaque_t), "layout");
_Static_assert(sizeof(preference) <= sizeof(cublasLtMatmulAlgo_t), "preference");

size_t cublasLtGetVersion(void)
{
    return 130000;
}

const char *cublasLtGetStatusName(cublasStatus_t status)
{
    switch (status) {
    case CUBLAS_STATUS_SUCCESS:
        return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_INVALID_VALUE:
        return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_NOT_SUPPORTED:
        return "CUBLAS_STATUS_NOT_SUPPORTED";
    case CUBLAS_STATUS_EXECUTION_FAILED:
        return "CUBLAS_STATUS_EXECUTION_FAILED";
    default:
        return "CUBLAS_STATUS_INTERNAL_ERROR";
    }
}

const char *cublasLtGetStatusString(cublasStatus_t status)
{
    return cublasLtGetStatusName(status);
}

static cublasStatus_t created(void *p)
{
    return p ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle)
{
    *handle = calloc(1, sizeof **handle);
    return created(*handle);
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    free(handle);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute,
                                        cudaDataType_t scale)
{
    *desc = calloc(1, sizeof **desc);
    if (*desc) *(operation *)*desc = (operation){compute, scale, {CUBLAS_OP_N, CUBLAS_OP_N}};
    return created(*desc);
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc)
{
    free(desc);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t attribute, const void *value,
                                              size_t bytes)
{
    operation *o = (operation *)desc;
    if (!value || bytes != sizeof(int32_t)) return CUBLAS_STATUS_INVALID_VALUE;
    switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
        memcpy(&o->op[0], value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    case CUBLASLT_MATMUL_DESC_TRANSB:
        memcpy(&o->op[1], value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
        memcpy(&o->scale, value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    default:
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld)
{
    *out = calloc(1, sizeof **out);
    if (*out) *(layout *)*out = (layout){type, rows, cols, ld};
    return created(*out);
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t p)
{
    free(p);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out)
{
    *out = calloc(1, sizeof **out);
    if (*out) *(preference *)*out = (preference){0, {256, 256, 256, 256}}; /* the library's defaults */
    return created(*out);
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p)
{
    free(p);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t opaque,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void *value, size_t bytes)
{
    preference *p = (preference *)opaque;
    if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) {
        if (bytes != sizeof p->workspace) return CUBLAS_STATUS_INVALID_VALUE;
        memcpy(&p->workspace, value, bytes);
        return CUBLAS_STATUS_SUCCESS;
    }
    if (attribute < CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES ||
        attribute > CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES)
        return CUBLAS_STATUS_NOT_SUPPORTED;
    if (bytes != sizeof(uint32_t)) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(&p->alignment[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}

/* Rows and columns of op(x). */
static uint64_t rows_of(const layout *x, int32_t op)
{
    return op == CUBLAS_OP_N ? x->rows : x->cols;
}

static uint64_t cols_of(const layout *x, int32_t op)
{
    return op == CUBLAS_OP_N ? x->cols : x->rows;
}

static bool narrow(cudaDataType_t type)
{
    return type == CUDA_R_16F || type == CUDA_R_16BF;
}

static cublasStatus_t check(const operation *o, const layout *a, const layout *b, const layout *c,
                            const layout *d)
{
    const layout *all[] = {a, b, c, d};
    for (int i = 0; i < 4; i++)
        if (all[i]->rows == 0 || all[i]->cols == 0 || all[i]->ld < (int64_t)all[i]->rows)
            return CUBLAS_STATUS_INVALID_VALUE;
    if (rows_of(a, o->op[0]) != d->rows || cols_of(b, o->op[1]) != d->cols ||
        cols_of(a, o->op[0]) != rows_of(b, o->op[1]) || c->rows != d->rows || c->cols != d->cols)
        return CUBLAS_STATUS_INVALID_VALUE;
    bool compute = o->compute == CUBLAS_COMPUTE_32F || o->compute == CUBLAS_COMPUTE_32F_PEDANTIC;
    bool types = a->type == b->type && c->type == d->type &&
                 (a->type == CUDA_R_32F ? d->type == CUDA_R_32F
                                        : narrow(a->type) && (d->type == CUDA_R_32F || d->type == a->type));
    return compute && types && o->scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t wish, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[], int *found)
{
    *found = 0;
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    if (wanted < 1) return CUBLAS_STATUS_INVALID_VALUE;
    cublasStatus_t status = check((operation *)desc, (layout *)a, (layout *)b, (layout *)c, (layout *)d);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    memset(results, 0, sizeof *results);
    memcpy(results[0].algo.data, wish, sizeof(preference));
    results[0].state = CUBLAS_STATUS_SUCCESS;
    results[0].wavesCount = 1;
    *found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- the product ---- */

typedef struct {
    operation o;
    layout a_layout, b_layout, c_layout, d_layout;
    const void *a, *b, *c;
    void *d;
    float alpha, beta;
} product;

static float element(const layout *l, const void *p, uint64_t row, uint64_t col)
{
    size_t at = (size_t)col * (size_t)l->ld + row;
    if (l->type == CUDA_R_32F) return ((const float *)p)[at];
    uint16_t half = ((const uint16_t *)p)[at];
    return l->type == CUDA_R_16F ? qk_f16_to_f32(half) : qk_bf16_to_f32(half);
}

/* op(x) with the inner dimension contiguous: A by rows, B by columns. */
static float *gather(const layout *l, const void *p, bool swapped, uint64_t outer, uint64_t inner)
{
    float *x = malloc((size_t)(outer * inner) * sizeof *x);
    if (!x) abort();
    for (uint64_t o = 0; o < outer; o++)
        for (uint64_t i = 0; i < inner; i++)
            x[o * inner + i] = swapped ? element(l, p, i, o) : element(l, p, o, i);
    return x;
}

/* Eight partial sums, as some order that is not the kernels'. */
static float dot(const float *a, const float *b, uint64_t n)
{
    float lane[8] = {0};
    uint64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int l = 0; l < 8; l++) lane[l] += a[i + l] * b[i + l];
    float sum = 0;
    for (int l = 0; l < 8; l++) sum += lane[l];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static void multiply(void *data)
{
    const product *p = data;
    const layout *d = &p->d_layout;
    uint64_t m = d->rows, n = d->cols, k = cols_of(&p->a_layout, p->o.op[0]);
    float *a = gather(&p->a_layout, p->a, p->o.op[0] != CUBLAS_OP_N, m, k);
    float *b = gather(&p->b_layout, p->b, p->o.op[1] == CUBLAS_OP_N, n, k);
    for (uint64_t col = 0; col < n; col++)
        for (uint64_t row = 0; row < m; row++) {
            float y = p->alpha * dot(a + row * k, b + col * k, k);
            if (p->beta != 0) y += p->beta * element(&p->c_layout, p->c, row, col);
            size_t at = (size_t)col * (size_t)d->ld + row;
            if (d->type == CUDA_R_32F)
                ((float *)p->d)[at] = y;
            else
                ((uint16_t *)p->d)[at] = d->type == CUDA_R_16F ? qk_f32_to_f16(y) : qk_f32_to_bf16(y);
        }
    free(a);
    free(b);
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void *alpha,
                              const void *a, cublasLtMatrixLayout_t a_layout, const void *b,
                              cublasLtMatrixLayout_t b_layout, const void *beta, const void *c,
                              cublasLtMatrixLayout_t c_layout, void *d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t *algo, void *workspace, size_t workspace_bytes,
                              cudaStream_t stream)
{
    if (!handle) return CUBLAS_STATUS_NOT_INITIALIZED;
    product p = {*(operation *)desc,
                 *(layout *)a_layout,
                 *(layout *)b_layout,
                 *(layout *)c_layout,
                 *(layout *)d_layout,
                 a,
                 b,
                 c,
                 d,
                 0,
                 0};
    memcpy(&p.alpha, alpha, sizeof p.alpha);
    memcpy(&p.beta, beta, sizeof p.beta);
    cublasStatus_t status = check(&p.o, &p.a_layout, &p.b_layout, &p.c_layout, &p.d_layout);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    if (!a || !b || !d || (p.beta != 0 && !c) || (!workspace && workspace_bytes))
        return CUBLAS_STATUS_INVALID_VALUE;
    if ((uintptr_t)workspace % 16) return CUBLAS_STATUS_INVALID_VALUE;
    preference asked = {0, {16, 16, 16, 16}};
    if (algo) memcpy(&asked, algo->data, sizeof asked);
    if ((uintptr_t)a % asked.alignment[0] || (uintptr_t)b % asked.alignment[1] ||
        (p.beta != 0 && (uintptr_t)c % asked.alignment[2]) || (uintptr_t)d % asked.alignment[3])
        return CUBLAS_STATUS_INVALID_VALUE;
    if ((uintptr_t)stream < 16) { /* a stream without a struct */
        multiply(&p);
        return CUBLAS_STATUS_SUCCESS;
    }
    return stream->queue(stream, multiply, &p, sizeof p) == cudaSuccess ? CUBLAS_STATUS_SUCCESS
                                                                        : CUBLAS_STATUS_EXECUTION_FAILED;
}
