#include "kvcache.h"

#include "mem.h"
#include "ops.h"

#include <string.h>

ql_status ql_kvcache_new(ql_device *dev, ql_arena *arena, int layers, int64_t kv_heads, int64_t head_dim,
                         ql_dtype dtype, int sequences, const int32_t *capacity, ql_kvcache *out, ql_err *err)
{
    memset(out, 0, sizeof *out);
    ql_status status = QL_ERR_MEMORY;
    size_t n = (size_t)sequences;
    out->sequences = sequences;
    out->k = ql_calloc((size_t)layers, sizeof *out->k);
    out->v = ql_calloc((size_t)layers, sizeof *out->v);
    out->view = ql_calloc((size_t)layers, sizeof *out->view);
    out->start = ql_calloc(n, sizeof *out->start);
    out->capacity = ql_calloc(n, sizeof *out->capacity);
    out->length = ql_calloc(n, sizeof *out->length);
    if (!out->k || !out->v || !out->view || !out->start || !out->capacity || !out->length) {
        ql_err_set(err, QL_ERR_MEMORY, "out of memory for a cache of %d sequences", sequences);
        goto fail;
    }
    int64_t slots = 0;
    for (int i = 0; i < sequences; i++) {
        out->start[i] = (int32_t)slots;
        out->capacity[i] = capacity[i];
        slots += capacity[i];
        if (slots > INT32_MAX) {
            status = ql_err_set(err, QL_ERR_ARG, "%d sequences need more than %d cache slots", sequences,
                                INT32_MAX);
            goto fail;
        }
    }
    for (int i = 0; i < layers; i++) {
        const int64_t shape[] = {kv_heads, slots, head_dim};
        status = ql_tensor_new(dev, arena, QL_MEM_KV, dtype, 3, shape, &out->k[i], err);
        out->layers = i + 1;
        if (status == QL_OK) status = ql_tensor_new(dev, arena, QL_MEM_KV, dtype, 3, shape, &out->v[i], err);
        if (status != QL_OK) goto fail;
        out->view[i] = (ql_kv_view){&out->k[i], &out->v[i]};
    }
    return QL_OK;
fail:
    ql_kvcache_free(out);
    return status;
}

ql_status ql_kvcache_copy(const ql_kvcache *src, int from, ql_kvcache *dst, int to, ql_err *err)
{
    if (from < 0 || from >= src->sequences || to < 0 || to >= dst->sequences || src->layers != dst->layers)
        return ql_err_set(err, QL_ERR_ARG, "sequence %d of a cache of %d cannot go on in %d of %d", from + 1,
                          src->sequences, to + 1, dst->sequences);
    const int32_t n = src->length[from];
    if (dst->length[to] != 0 || n > dst->capacity[to])
        return ql_err_set(err, QL_ERR_ARG, "a sequence of %d tokens does not fit into an empty one of %d", n,
                          dst->capacity[to]);
    for (int i = 0; i < src->layers; i++) {
        QL_TRY(ql_op_kv_copy(src->view[i], src->start[from], dst->view[i], dst->start[to], n, err));
    }
    dst->length[to] = n;
    return QL_OK;
}

void ql_kvcache_free(ql_kvcache *c)
{
    for (int i = 0; i < c->layers; i++) {
        ql_tensor_free(&c->k[i]);
        ql_tensor_free(&c->v[i]);
    }
    ql_free(c->k);
    ql_free(c->v);
    ql_free(c->view);
    ql_free(c->start);
    ql_free(c->capacity);
    ql_free(c->length);
    memset(c, 0, sizeof *c);
}
