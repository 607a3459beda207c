/* One safetensors file, read strictly or written.
 *
 * Layout: u64 little-endian header length, JSON header, tensor bytes. The reader refuses everything that the
 * format forbids, names the file and the tensor, needs at most four times the header in memory and never maps
 * the file: tensor bytes are read by pread and may lie at any alignment.
 */
#ifndef QL_SAFETENSORS_H
#define QL_SAFETENSORS_H

#include "dtype.h"
#include "err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QL_ST_DIMS 8               /* most dimensions of a tensor */
#define QL_ST_NAME_MAX 1024        /* most bytes of a tensor's name */
#define QL_ST_HEADER_MAX 100000000 /* most bytes of a header, as in the reference implementation */

typedef struct {
    const char *name; /* valid UTF-8, borrowed from the file */
    ql_dtype dtype;
    int ndim;                  /* 0 for a scalar */
    int64_t shape[QL_ST_DIMS]; /* elements, outermost first */
    uint64_t begin, end;       /* bytes within the data part; end - begin == elements x size */
} ql_st_tensor;

typedef struct ql_st ql_st;

/* Open and check the whole header. The caller closes *st. */
ql_status ql_st_open(const char *path, ql_st **st /* [OUT] NULL on failure */, ql_err *err);
/* Idempotent on NULL. */
void ql_st_close(ql_st *st);

const char *ql_st_path(const ql_st *st);
uint64_t ql_st_file_bytes(const ql_st *st);
size_t ql_st_count(const ql_st *st);
/* In the header's order; index < ql_st_count. Valid until the file is closed. */
const ql_st_tensor *ql_st_at(const ql_st *st, size_t index);
/* NULL when there is no tensor by that name; constant time. */
const ql_st_tensor *ql_st_find(const ql_st *st, const char *name);

uint64_t ql_st_tensor_bytes(const ql_st_tensor *tensor);
int64_t ql_st_tensor_elements(const ql_st_tensor *tensor);

/* Copy `bytes` of the tensor from byte `offset` within it. Safe from several threads at once. */
ql_status ql_st_read(const ql_st *st, const ql_st_tensor *tensor, uint64_t offset, size_t bytes,
                     void *dst /* [OUT] bytes */, ql_err *err);

/* Copy `bytes` of the file itself from `offset`, header included; for hashing. */
ql_status ql_st_read_file(const ql_st *st, uint64_t offset, size_t bytes, void *dst /* [OUT] */, ql_err *err);

/* Writing: add every tensor, begin, write each tensor's bytes in pieces and in any order of tensors, finish.
 * The file lists tensors by falling element size, then by name, as the reference writer does, so that each is
 * aligned to its element; its metadata is {"format":"pt"}. The final name appears at finish. */
typedef struct ql_st_writer ql_st_writer;

ql_status ql_st_writer_open(const char *path, ql_st_writer **writer /* [OUT] */, ql_err *err);
/* *index numbers tensors from 0 in the order of adding. */
ql_status ql_st_writer_add(ql_st_writer *writer, const char *name, ql_dtype dtype, int ndim,
                           const int64_t *shape /* ndim */, size_t *index /* [OUT], may be NULL */,
                           ql_err *err);
/* Write the header; nothing can be added after. */
ql_status ql_st_writer_begin(ql_st_writer *writer, ql_err *err);
/* Append to tensor `index`. */
ql_status ql_st_writer_write(ql_st_writer *writer, size_t index, const void *data, size_t bytes, ql_err *err);
/* Check that every tensor is complete, sync and rename. The writer is still to be closed. */
ql_status ql_st_writer_finish(ql_st_writer *writer, ql_err *err);
/* Remove an unfinished file and free; idempotent on NULL. */
void ql_st_writer_close(ql_st_writer *writer);

#endif
