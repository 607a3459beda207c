/* What a device reaches in a short run of its own: reading memory, and a large product of random numbers. */
#include "backend_cuda.h"

enum { ROUNDS = 8, LARGEST_SIDE = 8192, SEED = 20 };

typedef struct {
    char *memory;
    size_t bytes;
    int64_t side; /* of the square matrices; 0: no product */
    qk_format format;
    void *room;
} probe;

typedef ql_status work(ql_cuda *c, const probe *b, ql_err *err);

static ql_status read_all(ql_cuda *c, const probe *b, ql_err *err)
{
    QL_CUDA_RUN("probe_read", qk_cuda_probe_read(c->lane->stream, b->memory, b->bytes, c->cells));
    return QL_OK;
}

/* The matrices lie one after the other: x and w in 16 bits, y in float32. */
static ql_status multiply(ql_cuda *c, const probe *b, ql_err *err)
{
    size_t matrix = (size_t)(b->side * b->side) * 2;
    return ql_cuda_blas_product(c, b->format, b->memory, b->memory + matrix, b->side, b->side, b->side, false,
                                (float *)(b->memory + 2 * matrix), b->side, b->room, err);
}

/* Seconds of the fastest of some rounds, by the device's clock; the first, which loads kernels, not counted.
 */
static ql_status time_best(ql_cuda *c, const probe *b, work *run, cudaEvent_t from, cudaEvent_t to,
                           double *best, ql_err *err)
{
    *best = 0;
    for (int i = 0; i <= ROUNDS; i++) {
        float milliseconds = 0;
        QL_CUDA(cudaEventRecord(from, c->lane->stream), "cudaEventRecord");
        QL_TRY(run(c, b, err));
        QL_CUDA(cudaEventRecord(to, c->lane->stream), "cudaEventRecord");
        QL_TRY(ql_cuda_wait(c, err));
        QL_CUDA(cudaEventElapsedTime(&milliseconds, from, to), "cudaEventElapsedTime");
        double seconds = 1e-3 * (double)milliseconds;
        if (i > 0 && seconds > 0 && (*best == 0 || seconds < *best)) *best = seconds;
    }
    return QL_OK;
}

static ql_status measure(ql_cuda *c, const probe *b, ql_ceiling *out, ql_err *err)
{
    cudaEvent_t from = NULL, to = NULL;
    double seconds = 0;
    ql_status status = ql_cuda_check(c, cudaEventCreate(&from), "cudaEventCreate", err);
    if (status == QL_OK) status = ql_cuda_check(c, cudaEventCreate(&to), "cudaEventCreate", err);
    if (status == QL_OK) status = time_best(c, b, read_all, from, to, &seconds, err);
    if (status == QL_OK && seconds > 0) out->read_bytes_per_second = (double)b->bytes / seconds;
    if (status == QL_OK && b->side > 0) {
        double side = (double)b->side;
        status = time_best(c, b, multiply, from, to, &seconds, err);
        if (status == QL_OK && seconds > 0) out->matrix_flops_per_second = 2 * side * side * side / seconds;
    }
    if (!c->lane->given_up && from) cudaEventDestroy(from);
    if (!c->lane->given_up && to) cudaEventDestroy(to);
    return status;
}

/* Random numbers, because products of zeros run faster: they switch fewer transistors. */
ql_status ql_cuda_ceiling(void *ctx, size_t bytes, ql_ceiling *out, ql_err *err)
{
    ql_cuda *c = ctx;
    QL_TRY(ql_cuda_enter(c, err));
    *out = (ql_ceiling){0};
    probe b = {.bytes = bytes / 256 * 256, .format = c->sm < 80 ? QK_F16 : QK_BF16};
    if (b.bytes == 0) return ql_err_set(err, QL_ERR_ARG, "%s: a ceiling over %zu bytes", c->label, bytes);
    if (ql_cuda_blas_found(c)) {
        b.side = LARGEST_SIDE;
        while (b.side > 0 && (size_t)(b.side * b.side) * 8 > b.bytes) b.side -= 16;
    }
    void *memory = NULL;
    size_t room = ql_cuda_blas_room(c);
    QL_TRY(ql_cuda_alloc(c, b.bytes + room, &memory, err));
    b.memory = memory;
    b.room = b.memory + b.bytes;
    ql_status status = ql_cuda_ran(
        c, qk_cuda_random(c->lane->stream, SEED, 0, b.format, (int64_t)(b.bytes / 2), memory), "random", err);
    if (status == QL_OK) status = measure(c, &b, out, err);
    ql_cuda_free(c, memory, b.bytes + room);
    return status;
}
