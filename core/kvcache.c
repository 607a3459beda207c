#include "kvcache.h"

#include "mem.h"

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
