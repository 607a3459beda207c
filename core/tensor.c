#include "tensor.h"

#include "backend.h"
#include "mem.h"

#include <stdatomic.h>
#include <string.h>

struct ql_storage {
    atomic_int refs;
    ql_device *device; /* one reference */
    ql_arena *arena;   /* one reference, or NULL */
    ql_mem_kind kind;
    void *data;
    size_t bytes;
};

static atomic_size_t live_bytes;

size_t ql_tensor_live_bytes(void)
{
    return atomic_load(&live_bytes);
}

static void storage_release(ql_storage *s)
{
    if (!s || atomic_fetch_sub(&s->refs, 1) != 1) return;
    atomic_fetch_sub(&live_bytes, s->bytes);
    s->device->backend->free(s->device->ctx, s->data, s->bytes);
    ql_arena_refund(s->arena, s->kind, s->bytes);
    ql_arena_release(s->arena);
    ql_device_release(s->device);
    ql_free(s);
}

static ql_status storage_new(ql_device *dev, ql_arena *arena, ql_mem_kind kind, size_t bytes,
                             ql_storage **out, ql_err *err)
{
    *out = NULL;
    ql_storage *s = ql_calloc(1, sizeof *s);
    if (!s) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    ql_status status = dev->backend->alloc(dev->ctx, bytes, &s->data, err);
    if (status != QL_OK) {
        ql_free(s);
        return status;
    }
    atomic_init(&s->refs, 1);
    s->device = ql_device_retain(dev);
    s->arena = ql_arena_retain(arena);
    s->kind = kind;
    s->bytes = bytes;
    ql_arena_charge(arena, kind, bytes);
    atomic_fetch_add(&live_bytes, bytes);
    *out = s;
    return QL_OK;
}

ql_status ql_tensor_new(ql_device *dev, ql_arena *arena, ql_mem_kind kind, ql_dtype dtype, int ndim,
                        const int64_t *shape, ql_tensor *out, ql_err *err)
{
    memset(out, 0, sizeof *out);
    if (ndim < 1 || ndim > QL_MAX_DIMS)
        return ql_err_set(err, QL_ERR_ARG, "a tensor has 1 to %d dimensions, not %d", QL_MAX_DIMS, ndim);
    size_t bytes = ql_dtype_size(dtype);
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0 || !ql_mul(bytes, (size_t)shape[i], &bytes))
            return ql_err_set(err, QL_ERR_ARG, "tensor size overflows at dimension %d (%lld)", i + 1,
                              (long long)shape[i]);
    }
    ql_status status = storage_new(dev, arena, kind, bytes, &out->storage, err);
    if (status != QL_OK) return status;
    out->data = out->storage->data;
    out->dtype = dtype;
    out->ndim = ndim;
    memcpy(out->shape, shape, (size_t)ndim * sizeof *shape);
    return QL_OK;
}

ql_status ql_tensor_new_1d(ql_device *dev, ql_arena *arena, ql_mem_kind kind, ql_dtype dtype, int64_t n,
                           ql_tensor *out, ql_err *err)
{
    return ql_tensor_new(dev, arena, kind, dtype, 1, &n, out, err);
}

ql_status ql_tensor_new_2d(ql_device *dev, ql_arena *arena, ql_mem_kind kind, ql_dtype dtype, int64_t rows,
                           int64_t cols, ql_tensor *out, ql_err *err)
{
    return ql_tensor_new(dev, arena, kind, dtype, 2, (int64_t[]){rows, cols}, out, err);
}

void ql_tensor_free(ql_tensor *t)
{
    if (!t) return;
    storage_release(t->storage);
    memset(t, 0, sizeof *t);
}

ql_tensor ql_tensor_ref(const ql_tensor *t)
{
    if (t->storage) atomic_fetch_add(&t->storage->refs, 1);
    return *t;
}

ql_status ql_tensor_rows(const ql_tensor *t, int64_t first, int64_t count, ql_tensor *out, ql_err *err)
{
    memset(out, 0, sizeof *out);
    if (first < 0 || count < 0 || first > t->shape[0] || count > t->shape[0] - first)
        return ql_err_set(err, QL_ERR_ARG, "rows %lld to %lld are outside a tensor of %lld rows",
                          (long long)first + 1, (long long)(first + count), (long long)t->shape[0]);
    size_t row = ql_dtype_size(t->dtype);
    for (int i = 1; i < t->ndim; i++) row *= (size_t)t->shape[i];
    *out = ql_tensor_ref(t);
    out->data = (char *)t->data + (size_t)first * row;
    out->shape[0] = count;
    return QL_OK;
}

int64_t ql_tensor_count(const ql_tensor *t)
{
    if (!t->storage) return 0;
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

size_t ql_tensor_bytes(const ql_tensor *t)
{
    return (size_t)ql_tensor_count(t) * ql_dtype_size(t->dtype);
}

ql_device *ql_tensor_device(const ql_tensor *t)
{
    return t->storage ? t->storage->device : NULL;
}

bool ql_tensor_is_shared(const ql_tensor *t)
{
    return t->storage && atomic_load(&t->storage->refs) > 1;
}

static ql_status whole(const ql_tensor *t, size_t bytes, ql_err *err)
{
    if (bytes == ql_tensor_bytes(t)) return QL_OK;
    return ql_err_set(err, QL_ERR_ARG, "copy of %zu bytes to or from a tensor of %zu", bytes,
                      ql_tensor_bytes(t));
}

ql_status ql_tensor_upload(ql_tensor *t, const void *src, size_t bytes, ql_err *err)
{
    ql_status status = whole(t, bytes, err);
    if (status != QL_OK || bytes == 0) return status;
    ql_device *dev = t->storage->device;
    return dev->backend->upload(dev->ctx, t->data, src, bytes, err);
}

ql_status ql_tensor_download(const ql_tensor *t, void *dst, size_t bytes, ql_err *err)
{
    ql_status status = whole(t, bytes, err);
    if (status != QL_OK || bytes == 0) return status;
    ql_device *dev = t->storage->device;
    return dev->backend->download(dev->ctx, dst, t->data, bytes, err);
}
