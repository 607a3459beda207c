/* Writing a model as a Hugging Face folder, with 4-bit weights in bitsandbytes' format.
 *
 * The folder gets config.json, model.safetensors (or shards and their index), and copies of the source's
 * tokenizer files and generation config. Every file appears complete or not at all, and config.json last, so
 * that an interrupted save leaves no folder that looks like a model. Only "nf4" and "fp4" can be saved:
 * bitsandbytes decodes by the name of the type and ignores the table in the file, so that a free code book
 * would come back as other numbers.
 */
#ifndef QL_SAVE_H
#define QL_SAVE_H

#include "matrix.h"

#define QL_SAVE_SHARD_BYTES UINT64_C(5000000000)

/* One tensor of the model: exactly one of matrix and tensor is set. A matrix is written without its bias,
 * which is an entry of its own. Borrows everything. */
typedef struct {
    const char *name; /* "model.layers.0.mlp.up_proj.weight" */
    const ql_matrix *matrix;
    const ql_tensor *tensor; /* F32, F16 or BF16 */
    ql_dtype dtype; /* of a dense entry in the file; the values are rounded to it. Unused for 4-bit */
} ql_save_entry;

typedef struct {
    const char *source;   /* folder with the model's config.json and tokenizer files */
    bool force;           /* replace a model that is already in the folder */
    uint64_t shard_bytes; /* tensor bytes a file may hold; 0: QL_SAVE_SHARD_BYTES */
} ql_save_options;

ql_status ql_save_model(const char *folder, const ql_save_entry *entries, size_t count,
                        const ql_save_options *options, ql_err *err);

#endif
