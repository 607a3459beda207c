/* The tensors of a checkpoint: one safetensors file, or the shards that model.safetensors.index.json names.
 *
 * Opening checks every header and that index and shards agree. Tensor bytes are read on demand. A checkpoint
 * owns its files; names and tensors are borrowed from it until it is closed. Reading is safe from several
 * threads.
 */
#ifndef QL_CHECKPOINT_H
#define QL_CHECKPOINT_H

#include "quant_state.h"
#include "safetensors.h"
#include "sha256.h"
#include "tensor.h"

typedef struct ql_checkpoint ql_checkpoint;

/* `path`: a folder, or one .safetensors file. The caller closes *ck. */
ql_status ql_checkpoint_open(const char *path, ql_checkpoint **ck /* [OUT] NULL on failure */, ql_err *err);
void ql_checkpoint_close(ql_checkpoint *ck); /* idempotent on NULL */

const char *ql_checkpoint_path(const ql_checkpoint *ck); /* as given */
size_t ql_checkpoint_files(const ql_checkpoint *ck);     /* shards */
uint64_t ql_checkpoint_bytes(const ql_checkpoint *ck);   /* of all tensors */

/* Tensors of all shards, shard by shard in the order of the shards' names. */
size_t ql_checkpoint_count(const ql_checkpoint *ck);
const ql_st_tensor *ql_checkpoint_at(const ql_checkpoint *ck, size_t index);
/* NULL when there is none. */
const ql_st_tensor *ql_checkpoint_find(const ql_checkpoint *ck, const char *name);
/* As find, but a missing tensor is an error that names it. */
ql_status ql_checkpoint_need(const ql_checkpoint *ck, const char *name,
                             const ql_st_tensor **tensor /* [OUT] */, ql_err *err);
/* The file that holds a tensor of this checkpoint. */
const char *ql_checkpoint_file(const ql_checkpoint *ck, const ql_st_tensor *tensor);

/* Copy `bytes` of a tensor of this checkpoint from byte `offset` within it. */
ql_status ql_checkpoint_read(const ql_checkpoint *ck, const ql_st_tensor *tensor, uint64_t offset,
                             size_t bytes, void *dst /* [OUT] */, ql_err *err);

/* Fill `to`, on any device, with the bytes of a tensor that has at least as many, in pieces between which the
 * user may stop the work. */
ql_status ql_checkpoint_fill(const ql_checkpoint *ck, const ql_st_tensor *from, ql_tensor *to, ql_err *err);

/* True when `name` ("...weight") is stored in 4 bits: its quant_state tensor is there. */
bool ql_checkpoint_is_quantized(const ql_checkpoint *ck, const char *name);
/* True when `name` is absmax, quant_map, nested_absmax, nested_quant_map or quant_state of a quantized
 * weight. */
bool ql_checkpoint_is_companion(const ql_checkpoint *ck, const char *name);

/* A 4-bit weight with its companions, all checked against each other. */
typedef struct {
    ql_quant_state state;
    const ql_st_tensor *weight;     /* bytes == ql_quant_state_bytes, any dtype */
    const ql_st_tensor *absmax;     /* F32, or U8 when nested; ql_quant_state_blocks elements */
    const ql_st_tensor *map;        /* F32 [16] */
    const ql_st_tensor *nested;     /* F32 [ql_quant_state_nested]; NULL when not nested */
    const ql_st_tensor *nested_map; /* F32 [256]; NULL when not nested */
} ql_quant_tensor;

ql_status ql_checkpoint_quant(const ql_checkpoint *ck, const char *name, ql_quant_tensor *quant /* [OUT] */,
                              ql_err *err);

/* Identity of the content, computed at the first call (it reads every byte) and kept. One file: the SHA-256
 * of the file, as sha256sum prints it. Shards: the SHA-256 of lines "<sha256>  <name>\n", one per shard by
 * name. Not safe from several threads at once. */
ql_status ql_checkpoint_sha256(ql_checkpoint *ck, char hex[QL_SHA256_HEX] /* [OUT] */, ql_err *err);

#endif
