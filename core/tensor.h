/* Dense, contiguous, row-major tensors on a device.
 *
 * A ql_tensor is a small value: a typed view of a reference-counted ql_storage. Copying the struct does not
 * take a reference; ql_tensor_ref does. ql_tensor_free drops one and empties the struct, so it is safe to
 * call twice. A storage keeps its device open and stays charged to its arena until the last view is freed.
 */
#ifndef QL_TENSOR_H
#define QL_TENSOR_H

#include "arena.h"
#include "dtype.h"
#include "err.h"

#include <stdbool.h>
#include <stdint.h>

#define QL_MAX_DIMS 4

typedef struct ql_device ql_device;
typedef struct ql_storage ql_storage;

typedef struct {
    ql_storage *storage; /* NULL: an empty tensor */
    void *data;          /* device address of element 0 of this view */
    ql_dtype dtype;
    int ndim; /* 1..QL_MAX_DIMS */
    int64_t shape[QL_MAX_DIMS];
} ql_tensor;

/* Allocate uninitialised memory on `dev`, charged to `arena` (may be NULL) as `kind`. Zero-sized is allowed.
 */
ql_status ql_tensor_new(ql_device *dev, ql_arena *arena, ql_mem_kind kind, ql_dtype dtype, int ndim,
                        const int64_t *shape, ql_tensor *out /* [OUT] */, ql_err *err);
ql_status ql_tensor_new_1d(ql_device *dev, ql_arena *arena, ql_mem_kind kind, ql_dtype dtype, int64_t n,
                           ql_tensor *out /* [OUT] */, ql_err *err);
ql_status ql_tensor_new_2d(ql_device *dev, ql_arena *arena, ql_mem_kind kind, ql_dtype dtype, int64_t rows,
                           int64_t cols, ql_tensor *out /* [OUT] */, ql_err *err);
void ql_tensor_free(ql_tensor *t);

ql_tensor ql_tensor_ref(const ql_tensor *t); /* another view of the same storage; free it too */
/* View of `count` entries of dimension 0 from `first` (both from 0); takes a reference. Bounds are checked.
 */
ql_status ql_tensor_rows(const ql_tensor *t, int64_t first, int64_t count, ql_tensor *out /* [OUT] */,
                         ql_err *err);

int64_t ql_tensor_count(const ql_tensor *t); /* number of elements; 0 for an empty tensor */
size_t ql_tensor_bytes(const ql_tensor *t);
ql_device *ql_tensor_device(const ql_tensor *t); /* borrowed */
bool ql_tensor_is_shared(const ql_tensor *t);    /* more than one view holds the storage */
size_t ql_tensor_live_bytes(void);               /* of all storages of the process, on any device */

/* Host <-> device; `bytes` must be the whole tensor's. */
ql_status ql_tensor_upload(ql_tensor *t, const void *src, size_t bytes, ql_err *err);
ql_status ql_tensor_download(const ql_tensor *t, void *dst /* [OUT] */, size_t bytes, ql_err *err);

#endif
