/* The CPU backend: tensors to pointers, ranges to threads. The arithmetic is in kernels/cpu.
 *
 * A context serves one thread at a time. Indices that come in tensors (token ids, positions, rows, columns)
 * are checked here, because only here they can be read.
 */
#include "backend_cpu.h"

#include "cpu_probe.h"
#include "mem.h"
#include "process.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum {
    HUGE_PAGE = 2 << 20,
    PACK_ROWS = 4, /* activation rows that one thread packs: they share lines of memory */
};

enum { RAN_ATTENTION = QK_4BIT + 1, RAN_COUNT };

/* ---- memory ---- */

static ql_status cpu_alloc(void *ctx, size_t bytes, void **out, ql_err *err)
{
    (void)ctx;
    bool big = bytes >= 4 * HUGE_PAGE;
    *out = NULL;
    /* The kernel hands out more than it has and ends the process later: a block that cannot fit is refused.
     */
    if (!big || bytes < 16 * HUGE_PAGE || bytes <= ql_process_memory_available())
        *out = ql_aligned(big ? HUGE_PAGE : 64, bytes);
    if (!*out) {
        ql_err_set(err, QL_ERR_MEMORY, "out of memory: %zu bytes (%.1f MiB) asked for, %.1f MiB available",
                   bytes, (double)bytes / 0x1p20, (double)ql_process_memory_available() / 0x1p20);
        return ql_err_hint(err, "close models that are no longer needed, or use a smaller batch or context");
    }
    if (big) madvise(*out, bytes, MADV_HUGEPAGE); /* a tenth more read bandwidth; no matter if refused */
    return QL_OK;
}

static void cpu_free(void *ctx, void *p, size_t bytes)
{
    (void)ctx;
    (void)bytes;
    ql_free(p);
}

static ql_status cpu_copy(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err)
{
    (void)ctx;
    (void)err;
    if (bytes) memcpy(dst, src, bytes);
    return QL_OK;
}

static ql_status cpu_sync(void *ctx, ql_err *err)
{
    (void)ctx;
    (void)err;
    return QL_OK;
}

/* A buffer that all threads share: its content is lost when it grows. */
static ql_status need_room(char **p, size_t *have, size_t bytes, ql_err *err)
{
    if (bytes <= *have) return QL_OK;
    ql_free(*p);
    *p = NULL;
    *have = 0;
    void *room;
    QL_TRY(cpu_alloc(NULL, bytes, &room, err));
    *p = room;
    *have = bytes;
    return QL_OK;
}

static ql_status need_scratch(cpu_context *c, size_t bytes, ql_err *err)
{
    if (bytes <= c->scratch_bytes) return QL_OK;
    size_t each = (bytes + 63) / 64 * 64, all;
    char *p = ql_mul(each, (size_t)c->threads, &all) ? ql_aligned(64, all) : NULL;
    if (!p)
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory: %zu bytes of scratch for each thread", each);
    ql_free(c->scratch);
    c->scratch = p;
    c->scratch_bytes = each;
    return QL_OK;
}

/* ---- opening ---- */

static int cpu_count(ql_err *err)
{
    (void)err;
    return 1;
}

static void cpu_close(void *ctx)
{
    cpu_context *c = ctx;
    if (!c) return;
    ql_pool_free(c->pool);
    ql_free(c->scratch);
    ql_free(c->packed);
    ql_free(c->partial);
    ql_free(c);
}

static ql_status cpu_open(int index, const ql_device_options *options, void **out, ql_err *err)
{
    (void)index;
    *out = NULL;
    cpu_context *c = ql_calloc(1, sizeof *c);
    if (!c) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    ql_status status = ql_cpu_select(&c->qk, err);
    if (status == QL_OK) status = ql_pool_decide_threads(options->threads, &c->threads, err);
    if (status == QL_OK) status = ql_pool_new(c->threads, &c->pool, err);
    if (status != QL_OK) {
        cpu_close(c);
        return status;
    }
    *out = c;
    return QL_OK;
}

static ql_status cpu_info(void *ctx, ql_device_info *out, ql_err *err)
{
    (void)err;
    const cpu_context *c = ctx;
    *out = (ql_device_info){.threads = c->threads,
                            .energy_joules = -1,
                            .throttled_seconds = -1,
                            .neighbours = -1,
                            .numerics = QL_NUMERICS_INVARIANT};
    ql_process_cpu_name(out->name, sizeof out->name);
    snprintf(out->isa, sizeof out->isa, "%s", c->qk->isa);
    out->memory_total = ql_process_memory_total();
    out->memory_free = ql_process_memory_available();
    return QL_OK;
}

static ql_status cpu_ceiling(void *ctx, size_t bytes, ql_ceiling *out, ql_err *err)
{
    const cpu_context *c = ctx;
    ql_cpu_ceiling found;
    QL_TRY(ql_cpu_probe(c->threads, bytes ? bytes : (size_t)256 << 20, 3, &found, err));
    *out = (ql_ceiling){.read_bytes_per_second = found.read_bytes_per_second,
                        .flops_per_second = found.flops_per_second};
    return QL_OK;
}

static void cpu_kernels(void *ctx, char *out, size_t size)
{
    static const char *const names[RAN_COUNT] = {[QK_F32] = "matmul_f32",
                                                 [QK_F16] = "matmul_f16",
                                                 [QK_BF16] = "matmul_bf16",
                                                 [QK_4BIT] = "matmul_4bit",
                                                 [RAN_ATTENTION] = "attention"};
    cpu_context *c = ctx;
    size_t used = 0;
    if (size) out[0] = '\0';
    for (int i = 0; i < RAN_COUNT; i++) {
        if (!(c->ran & 1u << i) || used >= size) continue;
        used += (size_t)snprintf(out + used, size - used, "%s%s_%s", used ? ", " : "", names[i], c->qk->isa);
    }
    c->ran = 0;
}

/* ---- work on threads ---- */

typedef struct {
    const cpu_context *c;
    cpu_range_fn *fn;
    const void *args;
    cpu_split split;
} range;

static void run_piece(void *ud, int64_t piece, int worker)
{
    const range *r = ud;
    int64_t i0, i1;
    ql_cpu_piece(&r->split, piece, &i0, &i1);
    r->fn(r->args, i0, i1, r->c->scratch + (size_t)worker * r->c->scratch_bytes);
}

void ql_cpu_for_range(const cpu_context *c, int64_t total, int64_t multiple, double work, cpu_range_fn *fn,
                      const void *args)
{
    if (total <= 0) return;
    range r = {c, fn, args, ql_cpu_split(c->threads, total, multiple, work)};
    ql_pool_run(c->pool, run_piece, &r, r.split.pieces);
}

ql_status ql_cpu_check_indices(const char *what, const ql_tensor *t, int64_t limit, ql_err *err)
{
    const int32_t *v = t->data;
    for (int64_t i = 0; i < t->shape[0]; i++) {
        if (v[i] < 0 || v[i] >= limit)
            return ql_err_set(err, QL_ERR_ARG, "%s %d at %lld is outside 0..%lld", what, v[i], (long long)i,
                              (long long)limit - 1);
    }
    return QL_OK;
}

static ql_status check_slots(const ql_tensor *start, const ql_tensor *pos, int64_t slots, ql_err *err)
{
    const int32_t *s = start->data, *p = pos->data;
    for (int64_t i = 0; i < start->shape[0]; i++) {
        if (s[i] < 0 || p[i] < 0 || (int64_t)s[i] + p[i] >= slots)
            return ql_err_set(err, QL_ERR_ARG,
                              "token %lld: position %d from slot %d is outside a cache of %lld slots",
                              (long long)i, p[i], s[i], (long long)slots);
    }
    return QL_OK;
}

qk_matrix ql_cpu_matrix(const ql_matrix *w)
{
    qk_matrix m = {.n = w->n, .k = w->k, .data = w->data.data};
    m.format = w->quant ? QK_4BIT : ql_cpu_format(w->data.dtype);
    if (!w->quant) return m;
    m.absmax = w->absmax.data;
    memcpy(m.code, w->quant->code, sizeof m.code);
    m.block = w->quant->block;
    m.round_to = ql_cpu_format(w->quant->value_dtype);
    return m;
}

/* ---- a layer's steps ---- */

typedef struct {
    const qk_cpu *qk;
    qk_format format;
    const char *table;
    const int32_t *ids;
    float *y;
    int64_t h;
} embed_args;

static void embed_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const embed_args *a = args;
    int64_t row_bytes = a->h * (a->format == QK_F32 ? 4 : 2);
    for (int64_t t = i0; t < i1; t++) {
        a->qk->convert(a->format, a->table + a->ids[t] * row_bytes, QK_F32, a->y + t * a->h, 0, a->h);
    }
}

static ql_status cpu_embed(void *ctx, const ql_matrix *table, const ql_tensor *ids, ql_tensor *y, ql_err *err)
{
    const cpu_context *c = ctx;
    ql_status status = ql_cpu_check_indices("token id", ids, table->n, err);
    if (status != QL_OK) return status;
    embed_args a = {c->qk, ql_cpu_format(table->data.dtype), table->data.data, ids->data, y->data, table->k};
    ql_cpu_for_range(c, ids->shape[0], 1, (double)table->k, embed_range, &a);
    return QL_OK;
}

typedef struct {
    const qk_cpu *qk;
    const float *x, *w;
    float eps;
    int64_t h;
    float *y;
} rmsnorm_args;

static void rmsnorm_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const rmsnorm_args *a = args;
    a->qk->rmsnorm(a->x, a->w, a->eps, a->h, a->y, i0, i1);
}

static ql_status cpu_rmsnorm(void *ctx, const ql_tensor *x, const ql_tensor *w, float eps, ql_tensor *y,
                             ql_err *err)
{
    (void)err;
    const cpu_context *c = ctx;
    rmsnorm_args a = {c->qk, x->data, w->data, eps, x->shape[1], y->data};
    ql_cpu_for_range(c, x->shape[0], 1, (double)a.h, rmsnorm_range, &a);
    return QL_OK;
}

typedef struct {
    const qk_cpu *qk;
    qk_matrix w;
    const float *bias, *x;
    int64_t m;
    bool add;
    float *y;
    float *packed; /* or NULL: x is read as it is */
} matmul_args;

/* Activation rows [t0, t1). */
static void pack_range(const void *args, int64_t t0, int64_t t1, void *scratch)
{
    (void)scratch;
    const matmul_args *a = args;
    a->qk->matmul_pack(&a->w, a->x, a->m, t0, t1, a->packed);
}

static void matmul_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    const matmul_args *a = args;
    a->qk->matmul(&a->w, a->bias, a->packed ? a->packed : a->x, a->m, a->add, a->y, i0, i1, scratch);
}

static ql_status cpu_matmul(void *ctx, const ql_tensor *x, const ql_matrix *w, bool add, ql_tensor *y,
                            ql_err *err)
{
    cpu_context *c = ctx;
    matmul_args a = {
        c->qk, ql_cpu_matrix(w), w->bias.storage ? w->bias.data : NULL, x->data, x->shape[0], add, y->data,
        NULL};
    const size_t packed = c->qk->matmul_packed(&a.w, a.m);
    QL_TRY(need_scratch(c, c->qk->matmul_scratch(&a.w, a.m), err));
    QL_TRY(need_room(&c->packed, &c->packed_bytes, packed, err));
    c->ran |= 1u << a.w.format;
    if (packed) {
        a.packed = (float *)(void *)c->packed;
        ql_cpu_for_range(c, a.m, PACK_ROWS, (double)w->k, pack_range, &a);
    }
    ql_cpu_for_range(c, w->n, ql_cpu_product_unit(c->threads, w->n, c->qk->matmul_rows_multiple),
                     (double)w->k * (double)a.m, matmul_range, &a);
    return QL_OK;
}

typedef struct {
    const qk_cpu *qk;
    float *x;
    const int32_t *pos;
    const float *cos, *sin;
    int heads, d;
} rope_args;

static void rope_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const rope_args *a = args;
    a->qk->rope(a->x, a->pos, a->cos, a->sin, a->heads, a->d, i0, i1);
}

static ql_status cpu_rope(void *ctx, ql_tensor *x, const ql_tensor *pos, const ql_tensor *cos,
                          const ql_tensor *sin, int heads, ql_err *err)
{
    const cpu_context *c = ctx;
    ql_status status = ql_cpu_check_indices("position", pos, cos->shape[0], err);
    if (status != QL_OK) return status;
    rope_args a = {c->qk, x->data, pos->data, cos->data, sin->data, heads, (int)(x->shape[1] / heads)};
    ql_cpu_for_range(c, x->shape[0], 1, 2.0 * (double)x->shape[1], rope_range, &a);
    return QL_OK;
}

static ql_status check_cache(ql_kv_view cache, ql_err *err)
{
    if (cache.k->dtype == QL_F32) return QL_OK;
    return ql_err_set(err, QL_ERR_UNSUPPORTED, "the cpu backend keeps keys and values in float32, not %s",
                      ql_dtype_label(cache.k->dtype));
}

static ql_status cpu_kv_write(void *ctx, const ql_tensor *k, const ql_tensor *v, const ql_tensor *start,
                              const ql_tensor *pos, ql_kv_view cache, ql_err *err)
{
    (void)ctx;
    const int64_t heads = cache.k->shape[0], slots = cache.k->shape[1], d = cache.k->shape[2];
    QL_TRY(check_cache(cache, err));
    QL_TRY(check_slots(start, pos, slots, err));
    for (int64_t t = 0; t < k->shape[0]; t++) {
        int64_t slot = (int64_t)((const int32_t *)start->data)[t] + ((const int32_t *)pos->data)[t];
        for (int64_t h = 0; h < heads; h++) {
            int64_t from = (t * heads + h) * d, to = (h * slots + slot) * d;
            memcpy((float *)cache.k->data + to, (const float *)k->data + from, (size_t)d * sizeof(float));
            memcpy((float *)cache.v->data + to, (const float *)v->data + from, (size_t)d * sizeof(float));
        }
    }
    return QL_OK;
}

static ql_status cpu_kv_copy(void *ctx, ql_kv_view src, int64_t from, ql_kv_view dst, int64_t to, int64_t n,
                             ql_err *err)
{
    (void)ctx;
    (void)err;
    const ql_tensor *const pairs[2][2] = {{src.k, dst.k}, {src.v, dst.v}};
    const size_t slot = (size_t)src.k->shape[2] * ql_dtype_size(src.k->dtype);
    for (int i = 0; i < 2; i++) {
        const char *in = pairs[i][0]->data;
        char *out = pairs[i][1]->data;
        for (int64_t h = 0; h < src.k->shape[0]; h++) {
            memcpy(out + (size_t)(h * dst.k->shape[1] + to) * slot,
                   in + (size_t)(h * src.k->shape[1] + from) * slot, (size_t)n * slot);
        }
    }
    return QL_OK;
}

typedef struct {
    const cpu_context *c;
    qk_attention a;
    cpu_attention_split split;
} attention_args;

static void attention_piece(void *ud, int64_t piece, int worker)
{
    const attention_args *args = ud;
    const cpu_context *c = args->c;
    char *scratch = c->scratch + (size_t)worker * c->scratch_bytes;
    int64_t t0, t1, run;
    int kv_head;
    if (!ql_cpu_attention_piece(&args->split, piece, &t0, &t1, &kv_head, &run)) return;
    if (args->split.runs > 1)
        c->qk->attention_run(&args->a, t0, t1, kv_head, run, scratch);
    else
        c->qk->attention(&args->a, t0, t1, kv_head, scratch);
}

/* Pairs of token and cache head [i0, i1). */
static void join_range(const void *ud, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const attention_args *args = ud;
    for (int64_t i = i0; i < i1; i++) {
        int64_t t = i / args->a.kv_heads;
        args->c->qk->attention_join(&args->a, t, t + 1, (int)(i % args->a.kv_heads));
    }
}

/* How the attention of `a`'s heads and positions is cut, and the bytes that its runs leave. */
static cpu_attention_split split_attention(const cpu_context *c, const qk_attention *a, int64_t tokens,
                                           size_t *partial /* [OUT] */)
{
    const int64_t record = a->heads * QK_ATTENTION_RECORD(a->d) * (int64_t)sizeof(float);
    int64_t longest = 0;
    double work = 0;
    for (int64_t t = 0; t < tokens; t++) {
        work += 2.0 * a->heads * a->d * (a->pos[t] + 1);
        if (a->pos[t] >= longest) longest = (int64_t)a->pos[t] + 1;
    }
    cpu_attention_split s = ql_cpu_split_attention(c->threads, tokens, a->kv_heads, longest, work, record);
    *partial = s.runs > 1 ? (size_t)(tokens * s.runs * record) : 0;
    return s;
}

static ql_status run_attention(cpu_context *c, attention_args *args, int64_t tokens, ql_err *err)
{
    qk_attention *a = &args->a;
    size_t bytes;
    args->split = split_attention(c, a, tokens, &bytes);
    const int64_t pieces = args->split.pieces, runs = args->split.runs;
    if (runs > 1) {
        QL_TRY(need_room(&c->partial, &c->partial_bytes, bytes, err));
        a->partial = (float *)(void *)c->partial;
        a->runs = runs;
    }
    if (args->split.threads == 1)
        for (int64_t i = 0; i < pieces; i++) attention_piece(args, i, 0);
    else
        ql_pool_run(c->pool, attention_piece, args, pieces);
    const int64_t group = a->heads / a->kv_heads;
    double each = (double)(group * runs * a->d); /* multiply-adds of one join */
    if (runs > 1) ql_cpu_for_range(c, tokens * a->kv_heads, 1, each, join_range, args);
    return QL_OK;
}

static ql_status cpu_attention(void *ctx, const ql_tensor *q, ql_kv_view cache, const ql_tensor *start,
                               const ql_tensor *pos, int heads, ql_tensor *y, ql_err *err)
{
    cpu_context *c = ctx;
    attention_args args = {c,
                           {.q = q->data,
                            .k = cache.k->data,
                            .v = cache.v->data,
                            .start = start->data,
                            .pos = pos->data,
                            .y = y->data,
                            .heads = heads,
                            .kv_heads = (int)cache.k->shape[0],
                            .d = (int)cache.k->shape[2],
                            .slots = cache.k->shape[1]},
                           {0}};
    QL_TRY(check_cache(cache, err));
    QL_TRY(check_slots(start, pos, args.a.slots, err));
    if (cache.k->shape[2] > QK_MAX_HEAD_DIM)
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "head_dim %lld is above %d", (long long)cache.k->shape[2],
                          QK_MAX_HEAD_DIM);
    QL_TRY(need_scratch(c, QK_ATTENTION_SCRATCH, err));
    if (q->shape[0] == 0) return QL_OK;
    c->ran |= 1u << RAN_ATTENTION;
    return run_attention(c, &args, q->shape[0], err);
}

static void raise_packed(const cpu_context *c, const ql_matrix *w, int64_t m, size_t *most)
{
    qk_matrix shape = ql_cpu_matrix(w);
    size_t bytes = c->qk->matmul_packed(&shape, m);
    if (bytes > *most) *most = bytes;
}

/* What grows with the pass: the widest product's activations and the runs of attention. Not the threads'
 * scratch, each little more than 48 rows of the widest product at most. */
static size_t cpu_pass_bytes(void *ctx, const ql_pass *p)
{
    const cpu_context *c = ctx;
    const qk_attention a = {.pos = p->pos, .heads = p->heads, .kv_heads = p->kv_heads, .d = (int)p->head_dim};
    size_t packed = 0, partial;
    for (int i = 0; i < p->layers * QL_LINEARS; i++)
        raise_packed(c, &p->layer[i / QL_LINEARS].linear[i % QL_LINEARS], p->tokens, &packed);
    raise_packed(c, p->lm_head, p->outputs, &packed);
    split_attention(c, &a, p->tokens, &partial);
    return packed + partial;
}

typedef struct {
    const qk_cpu *qk;
    const float *a, *b;
    float *y;
    qk_binary op;
    float scalar;
    bool reversed;
} elementwise_args;

static void swiglu_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const elementwise_args *a = args;
    a->qk->swiglu(a->a, a->b, a->y, i0, i1);
}

static ql_status cpu_swiglu(void *ctx, const ql_tensor *gate, const ql_tensor *up, ql_tensor *y, ql_err *err)
{
    (void)err;
    const cpu_context *c = ctx;
    elementwise_args a = {.qk = c->qk, .a = gate->data, .b = up->data, .y = y->data};
    ql_cpu_for_range(c, ql_tensor_count(y), 16, 16, swiglu_range, &a);
    return QL_OK;
}

static void binary_range(const void *args, int64_t i0, int64_t i1, void *scratch)
{
    (void)scratch;
    const elementwise_args *a = args;
    a->qk->binary(a->op, a->a, a->b, a->scalar, a->reversed, a->y, i0, i1);
}

static ql_status cpu_binary(void *ctx, ql_binary_op op, const ql_tensor *a, const ql_tensor *b, float scalar,
                            bool reversed, ql_tensor *y, ql_err *err)
{
    (void)err;
    static const qk_binary ops[] = {
        [QL_BIN_ADD] = QK_ADD, [QL_BIN_SUB] = QK_SUB, [QL_BIN_MUL] = QK_MUL, [QL_BIN_DIV] = QK_DIV};
    const cpu_context *c = ctx;
    elementwise_args args = {c->qk, a->data, b ? b->data : NULL, y->data, ops[op], scalar, reversed};
    ql_cpu_for_range(c, ql_tensor_count(y), 16, 4, binary_range, &args);
    return QL_OK;
}

static ql_status cpu_gather_rows(void *ctx, const ql_tensor *x, const ql_tensor *rows, ql_tensor *y,
                                 ql_err *err)
{
    (void)ctx;
    ql_status status = ql_cpu_check_indices("row", rows, x->shape[0], err);
    if (status != QL_OK) return status;
    const int64_t h = x->shape[1];
    for (int64_t i = 0; i < rows->shape[0]; i++) {
        memcpy((float *)y->data + i * h, (const float *)x->data + ((const int32_t *)rows->data)[i] * h,
               (size_t)h * sizeof(float));
    }
    return QL_OK;
}

const ql_backend ql_backend_cpu = {
    .name = "cpu",
    .abi = QL_BACKEND_ABI,
    .kv_dtype = QL_F32,
    .pass_tokens = 512,
    .count = cpu_count,
    .open = cpu_open,
    .close = cpu_close,
    .info = cpu_info,
    .ceiling = cpu_ceiling,
    .kernels = cpu_kernels,
    .alloc = cpu_alloc,
    .free = cpu_free,
    .upload = cpu_copy,
    .download = cpu_copy,
    .sync = cpu_sync,
    .pass_bytes = cpu_pass_bytes,
    .embed = cpu_embed,
    .rmsnorm = cpu_rmsnorm,
    .matmul = cpu_matmul,
    .rope = cpu_rope,
    .kv_write = cpu_kv_write,
    .kv_copy = cpu_kv_copy,
    .attention = cpu_attention,
    .swiglu = cpu_swiglu,
    .gather_rows = cpu_gather_rows,
    .topk = ql_cpu_topk,
    .logsumexp = ql_cpu_logsumexp,
    .row_stats = ql_cpu_row_stats,
    .softmax = ql_cpu_softmax,
    .gather_cols = ql_cpu_gather_cols,
    .kl = ql_cpu_kl,
    .binary = cpu_binary,
    .convert = ql_cpu_convert,
    .find_bad = ql_cpu_find_bad,
    .random = ql_cpu_random,
    .quantize4 = ql_cpu_quantize4,
    .dequantize4 = ql_cpu_dequantize4,
};
