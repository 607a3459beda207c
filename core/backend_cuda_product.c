/* Products: which kernel a weight takes for how many tokens, and what its inputs look like there.
 *
 * Up to QK_PRODUCT_TOKENS tokens, and for any number in pieces of that when the numerics are invariant or
 * cuBLASLt is missing: the project's own kernels, whose sums depend on k alone. Above: cuBLASLt, which reads
 * 16-bit weights as they are and 4-bit ones decoded, slice by slice, on the side stream while the slice
 * before is multiplied. Weights that tensor cores do not take (float32, odd sizes) go by plain float32
 * kernels.
 */
#include "backend_cuda.h"

#include <string.h>

typedef enum { BY_PLAIN, BY_16BIT, BY_4BIT, BY_BLAS, BY_DECODED } method;

qk_cuda_weight ql_cuda_weight(const ql_matrix *m, float *y)
{
    qk_cuda_weight w = {.y = y, .layout = m->layout};
    w.w = (qk_matrix){.n = m->n, .k = m->k, .data = m->data.data};
    w.w.format = m->quant ? QK_4BIT : ql_cuda_format(m->data.dtype);
    w.bias = m->bias.storage ? m->bias.data : NULL;
    if (!m->quant) return w;
    memcpy(w.w.code, m->quant->code, sizeof w.w.code);
    w.w.block = m->quant->block;
    w.w.round_to = ql_cuda_format(m->quant->value_dtype);
    if (m->nested.storage) {
        w.absmax8 = m->absmax.data;
        w.nested = m->nested.data;
        w.nested_block = m->quant->nested_block;
    } else {
        w.w.absmax = m->absmax.data;
    }
    return w;
}

/* ---- the choice ---- */

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Rows of a 4-bit weight that are decoded together. A slice begins at a whole tile and a whole block; the
 * scales of double quantization are found by the number of the block, so such a weight is one slice. */
static int64_t slice_rows(const ql_cuda *c, const qk_cuda_weight *w)
{
    int64_t n = w->w.n, k = w->w.k;
    if (w->nested || k < 1) return n;
    int64_t unit = w->w.block >> __builtin_ctzll((unsigned long long)k); /* both have powers of two */
    if (unit < 16) unit = 16;
    int64_t rows = c->slice / 2 / k / unit * unit;
    return least(n, rows > unit ? rows : unit);
}

static bool decodes(const ql_cuda *c, const qk_cuda_weight *w)
{
    return w->w.format == QK_4BIT && w->w.round_to != QK_F32 && w->w.k % 8 == 0 &&
           slice_rows(c, w) * w->w.k * 2 <= 4 * (int64_t)QL_CUDA_SLICE;
}

static method choose(ql_cuda *c, const qk_cuda_weight *w, int64_t tokens)
{
    static const method own[] = {
        [QK_PRODUCT_PLAIN] = BY_PLAIN, [QK_PRODUCT_16BIT] = BY_16BIT, [QK_PRODUCT_4BIT] = BY_4BIT};
    method mine = own[qk_cuda_product_kind(w)];
    if (tokens <= QK_PRODUCT_TOKENS || c->numerics == QL_NUMERICS_INVARIANT) return mine;
    qk_format f = w->w.format == QK_4BIT ? w->w.round_to : w->w.format;
    bool dense = w->w.format != QK_4BIT && w->w.k % (f == QK_F32 ? 4 : 8) == 0;
    if ((!dense && !decodes(c, w)) || w->w.n % 4 != 0) return mine; /* cuBLASLt wants 16-byte rows */
    if (f == QK_BF16 && c->sm < 80) return mine; /* no bfloat16 tensor cores before Ampere */
    if (!ql_cuda_blas_found(c)) return mine;
    return dense ? BY_BLAS : BY_DECODED;
}

static ql_cuda_form form_by(const qk_cuda_weight *w, method by)
{
    switch (by) {
    case BY_16BIT:
        return (ql_cuda_form){.format = qk_cuda_product_format(w), .slab = QK_SLAB_16BIT};
    case BY_4BIT:
        return (ql_cuda_form){.format = qk_cuda_product_format(w), .slab = QK_SLAB_4BIT};
    case BY_DECODED:
        return (ql_cuda_form){.format = w->w.round_to};
    case BY_BLAS:
        if (w->w.format != QK_F32) return (ql_cuda_form){.format = w->w.format};
        break;
    case BY_PLAIN:
        break;
    }
    return (ql_cuda_form){.plain = true, .format = QK_F32};
}

ql_cuda_form ql_cuda_form_of(ql_cuda *c, const qk_cuda_weight *w, int64_t tokens)
{
    return form_by(w, choose(c, w, tokens));
}

bool ql_cuda_form_equal(ql_cuda_form a, ql_cuda_form b)
{
    return a.plain == b.plain && a.format == b.format && a.slab == b.slab;
}

size_t ql_cuda_form_bytes(ql_cuda_form form, int64_t tokens, int64_t k)
{
    if (form.plain) return (size_t)(tokens * k) * sizeof(float);
    return (size_t)(form.slab ? qk_fragment_count(tokens, k, form.slab) : tokens * k) * 2;
}

static void at_least(size_t *need, size_t bytes)
{
    if (*need < bytes) *need = bytes;
}

void ql_cuda_product_need(ql_cuda *c, const qk_cuda_weight *w, int64_t tokens, ql_cuda_need *need)
{
    method by = choose(c, w, tokens);
    ql_cuda_form form = form_by(w, by);
    at_least(form.plain ? &need->plain : &need->packed, ql_cuda_form_bytes(form, tokens, w->w.k));
    if (by == BY_DECODED) at_least(&need->slice, (size_t)(slice_rows(c, w) * w->w.k) * 2);
    if (by == BY_DECODED || by == BY_BLAS) at_least(&need->blas, ql_cuda_blas_room(c));
}

/* ---- inputs ---- */

/* The group's inputs in `form`, made unless they are there: *x. */
static ql_status prepare(ql_cuda *c, const ql_cuda_room *room, const ql_cuda_input *input, ql_cuda_form form,
                         int64_t tokens, int64_t k, const void **x, ql_err *err)
{
    const qk_cuda_source *s = &input->source;
    qk_stream stream = c->lane->stream;
    if (!form.plain) {
        *x = room->packed;
        QL_CUDA_RUN("pack", qk_cuda_pack(stream, s, form.format, form.slab, tokens, k, room->packed));
        return QL_OK;
    }
    const float *from = s->x;
    float *to = room->plain;
    if (s->kind == QK_SOURCE_SWIGLU) {
        QL_CUDA_RUN("swiglu", qk_cuda_swiglu(stream, s->x, s->up, tokens * k, to));
        from = to;
    } else if (s->rows) {
        QL_CUDA_RUN("gather_rows", qk_cuda_gather_rows(stream, s->x, s->rows, tokens, k, to));
        from = to;
    }
    if (s->kind == QK_SOURCE_NORM) {
        QL_CUDA_RUN("rmsnorm", qk_cuda_rmsnorm(stream, from, s->w, s->eps, tokens, k, to));
        from = to;
    }
    *x = from;
    return QL_OK;
}

/* Where the inputs of tokens `first` and on begin; `first` is a multiple of QK_PRODUCT_TOKENS. */
static const void *inputs_from(const void *x, ql_cuda_form form, int64_t first, int64_t k)
{
    return (const char *)x + ql_cuda_form_bytes(form, first, k);
}

/* ---- the products ---- */

static ql_status own_product(ql_cuda *c, const qk_cuda_weight *w, int count, ql_cuda_form form, const void *x,
                             int64_t tokens, bool add, ql_err *err)
{
    for (int64_t first = 0; first < tokens; first += QK_PRODUCT_TOKENS) {
        qk_cuda_weight piece[3];
        for (int i = 0; i < count; i++) {
            piece[i] = w[i];
            piece[i].y += first * w[i].w.n;
        }
        QL_CUDA_RUN("matmul",
                    qk_cuda_product(c->lane->stream, piece, count, inputs_from(x, form, first, w->w.k),
                                    least(tokens - first, QK_PRODUCT_TOKENS), add));
    }
    return QL_OK;
}

/* Slices alternate between two buffers: `filled` says that one can be read, `emptied` that it may be written
 * again. The host runs ahead, so a slice is decoded while the one before is multiplied. */
static ql_status decoded_product(ql_cuda *c, const ql_cuda_room *room, const qk_cuda_weight *w, const void *x,
                                 int64_t tokens, bool add, ql_err *err)
{
    cudaStream_t stream = c->lane->stream, side = c->lane->side;
    const int64_t n = w->w.n, k = w->w.k, step = slice_rows(c, w);
    for (int64_t first = 0; first < n; first += step) {
        qk_cuda_weight slice = *w;
        slice.w.n = least(n - first, step);
        slice.w.data = (const char *)w->w.data + first * k / 2;
        if (w->w.absmax) slice.w.absmax = w->w.absmax + first * k / w->w.block;
        int turn = c->slice_turn;
        c->slice_turn ^= 1;
        QL_CUDA(cudaStreamWaitEvent(side, c->emptied[turn], 0), "cudaStreamWaitEvent");
        QL_CUDA_RUN("dequantize4", qk_cuda_dequantize4(side, &slice, w->w.round_to, room->slice[turn]));
        QL_CUDA(cudaEventRecord(c->filled[turn], side), "cudaEventRecord");
        QL_CUDA(cudaStreamWaitEvent(stream, c->filled[turn], 0), "cudaStreamWaitEvent");
        QL_TRY(ql_cuda_blas_product(c, w->w.round_to, x, room->slice[turn], tokens, slice.w.n, k, add,
                                    w->y + first, n, room->blas, err));
        QL_CUDA(cudaEventRecord(c->emptied[turn], stream), "cudaEventRecord");
    }
    ql_cuda_note(c, QL_CUDA_RAN_DECODED);
    return QL_OK;
}

ql_status ql_cuda_product_begin(ql_cuda *c, ql_err *err)
{
    QL_CUDA(cudaEventRecord(c->begun, c->lane->stream), "cudaEventRecord");
    QL_CUDA(cudaStreamWaitEvent(c->lane->side, c->begun, 0), "cudaStreamWaitEvent");
    return QL_OK;
}

static ql_status product_by(ql_cuda *c, const ql_cuda_room *room, method by, const qk_cuda_weight *w,
                            int count, const void *x, int64_t tokens, bool add, ql_err *err)
{
    qk_stream stream = c->lane->stream;
    if (tokens > QK_PRODUCT_TOKENS && c->numerics == QL_NUMERICS_FAST && !c->blas)
        ql_cuda_note(c, QL_CUDA_RAN_NO_BLAS);
    if (by == BY_16BIT || by == BY_4BIT) {
        ql_cuda_note(c, by == BY_16BIT ? QL_CUDA_RAN_16BIT : QL_CUDA_RAN_4BIT);
        return own_product(c, w, count, form_by(w, by), x, tokens, add, err);
    }
    for (int i = 0; i < count; i++) {
        if (by == BY_PLAIN) {
            ql_cuda_note(c, QL_CUDA_RAN_PLAIN);
            QL_CUDA_RUN("matmul", qk_cuda_product_plain(stream, &w[i], x, tokens, add));
            continue;
        }
        if (by == BY_BLAS)
            QL_TRY(ql_cuda_blas_product(c, w[i].w.format, x, w[i].w.data, tokens, w[i].w.n, w[i].w.k, add,
                                        w[i].y, w[i].w.n, room->blas, err));
        else
            QL_TRY(decoded_product(c, room, &w[i], x, tokens, add, err));
        if (w[i].bias) QL_CUDA_RUN("add_bias", qk_cuda_add_bias(stream, w[i].bias, tokens, w[i].w.n, w[i].y));
    }
    return QL_OK;
}

ql_status ql_cuda_product_group(ql_cuda *c, const ql_cuda_room *room, const ql_cuda_input *input,
                                int64_t tokens, const qk_cuda_weight *w, int count, bool add, ql_err *err)
{
    const void *x = input->ready;
    ql_cuda_form have = input->form;
    for (int i = 0, same; i < count; i += same) {
        method by = choose(c, &w[i], tokens);
        ql_cuda_form form = form_by(&w[i], by);
        for (same = 1; i + same < count && choose(c, &w[i + same], tokens) == by; same++) {
            if (!ql_cuda_form_equal(form, form_by(&w[i + same], by))) break;
        }
        if (!x || !ql_cuda_form_equal(have, form))
            QL_TRY(prepare(c, room, input, form, tokens, w[i].w.k, &x, err));
        have = form;
        QL_TRY(product_by(c, room, by, w + i, same, x, tokens, add, err));
    }
    return QL_OK;
}

/* ---- gate and up in one ---- */

static bool is_own(method by)
{
    return by == BY_16BIT || by == BY_4BIT;
}

bool ql_cuda_swiglu_fuses(ql_cuda *c, const qk_cuda_weight *gate, const qk_cuda_weight *up,
                          const qk_cuda_weight *down, int64_t tokens)
{
    method by = choose(c, gate, tokens);
    return is_own(by) && choose(c, up, tokens) == by && is_own(choose(c, down, tokens)) &&
           ql_cuda_form_equal(form_by(gate, by), form_by(up, by));
}

ql_status ql_cuda_product_swiglu(ql_cuda *c, const ql_cuda_room *room, const ql_cuda_input *input,
                                 int64_t tokens, const qk_cuda_weight *gate, const qk_cuda_weight *up,
                                 ql_cuda_form to, void *dst, ql_err *err)
{
    method by = choose(c, gate, tokens);
    ql_cuda_form form = form_by(gate, by);
    const void *x;
    QL_TRY(prepare(c, room, input, form, tokens, gate->w.k, &x, err));
    ql_cuda_note(c, by == BY_16BIT ? QL_CUDA_RAN_16BIT : QL_CUDA_RAN_4BIT);
    for (int64_t first = 0; first < tokens; first += QK_PRODUCT_TOKENS) {
        QL_CUDA_RUN("matmul with swiglu",
                    qk_cuda_product_swiglu(c->lane->stream, gate, up, inputs_from(x, form, first, gate->w.k),
                                           least(tokens - first, QK_PRODUCT_TOKENS), to.format, to.slab,
                                           (char *)dst + ql_cuda_form_bytes(to, first, gate->w.n)));
    }
    return QL_OK;
}

/* ---- the step ---- */

ql_status ql_cuda_matmul(void *ctx, const ql_tensor *x, const ql_matrix *m, bool add, ql_tensor *y,
                         ql_err *err)
{
    ql_cuda *c = ctx;
    QL_TRY(ql_cuda_enter(c, err));
    const int64_t tokens = x->shape[0];
    if (tokens == 0 || m->n == 0) return QL_OK;
    qk_cuda_weight w = ql_cuda_weight(m, y->data);
    ql_cuda_need need = {0};
    ql_cuda_product_need(c, &w, tokens, &need);
    if (need.plain) need.plain = 0; /* x is there in float32 */
    size_t packed = ql_cuda_round(need.packed), slice = ql_cuda_round(need.slice);
    char *scratch;
    QL_TRY(ql_cuda_scratch(c, packed + 2 * slice + need.blas, &scratch, err));
    ql_cuda_room room = {
        .packed = scratch,
        .slice = {scratch + packed, scratch + packed + slice},
        .blas = scratch + packed + 2 * slice,
    };
    ql_cuda_input input = {.source = {.kind = QK_SOURCE_PLAIN, .x = x->data}};
    QL_TRY(ql_cuda_product_begin(c, err));
    return ql_cuda_product_group(c, &room, &input, tokens, &w, 1, add, err);
}
