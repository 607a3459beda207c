/* The tensors of a Llama model on a device: where they are in a checkpoint, and in memory.
 *
 * ql_weights owns a reference to each tensor; a quantized twin shares those it does not change. Linear layers
 * are addressed by (layer, kind); ql_linear_name gives the checkpoint's name of each.
 */
#ifndef QL_WEIGHTS_H
#define QL_WEIGHTS_H

#include "checkpoint.h"
#include "config.h"
#include "layer.h"
#include "quant.h"
#include "save.h"

typedef struct {
    int64_t layers;
    ql_matrix embed;     /* dense [vocab, hidden] */
    ql_matrix lm_head;   /* [vocab, hidden]; shares embed's storage when tied */
    ql_tensor norm;      /* F32 [hidden] */
    ql_layer *layer;     /* [layers] */
    ql_dtype dtype;      /* dtype of the embedding in the checkpoint: what auto means for this model */
    ql_dtype norm_dtype; /* dtype of the norms in the checkpoint; saving restores it */
    ql_dtype bias_dtype;
} ql_weights;

/* What to do with one matrix when a model is quantized: fill `spec` and return true, or false to keep it.
 * `name` is the module ("model.layers.0.mlp.up_proj"). Setting err->code stops the work with that error. */
typedef bool (*ql_quant_policy)(void *ud, const char *name, int64_t n, int64_t k, ql_quant_spec *spec,
                                ql_err *err);

/* Ask `policy` (may be NULL) about a matrix [n, k]. `now`: how it is stored if in 4 bits already, which
 * quantizing again refuses; NULL when dense. */
ql_status ql_weights_ask(ql_quant_policy policy, void *ud, const char *name, int64_t n, int64_t k,
                         const ql_quant *now, ql_quant_spec *spec /* [OUT] where wanted */,
                         bool *wanted /* [OUT] */, ql_err *err);

/* Read every tensor that `config` calls for. dtype: QL_DTYPE_COUNT keeps each tensor as stored; F32, F16 or
 * BF16 converts dense matrices. A missing, superfluous or misshapen tensor is refused by name. Where `policy`
 * (may be NULL) says so, a matrix is quantized as soon as it is read: one at a time is there in both forms,
 * and the bits are those of ql_weights_quantize. */
ql_status ql_weights_load(ql_device *dev, ql_arena *arena, const ql_checkpoint *ck, const ql_config *config,
                          ql_dtype dtype, ql_quant_policy policy, void *ud, ql_weights *out /* [OUT] */,
                          ql_err *err);

/* Random weights of the shape in `config` (near normal, sd 0.02; norms 1), stored as `dtype` or quantized by
 * `policy` in the same way. Same seed, same bits. */
ql_status ql_weights_random(ql_device *dev, ql_arena *arena, const ql_config *config, ql_dtype dtype,
                            uint64_t seed, ql_quant_policy policy, void *ud, ql_weights *out /* [OUT] */,
                            ql_err *err);

/* A twin of `full`: matrices that the policy picks become 4-bit, everything else is shared. */
ql_status ql_weights_quantize(const ql_weights *full, ql_arena *arena, ql_quant_policy policy, void *ud,
                              ql_weights *out /* [OUT] */, ql_err *err);

/* Entries for ql_save_model in the checkpoint's order; names are owned by the returned block (ql_free it). */
ql_status ql_weights_entries(const ql_weights *w, const ql_config *config,
                             ql_save_entry **entries /* [OUT] */, size_t *count /* [OUT] */, ql_err *err);

/* What every way to make weights begins with: room for the layers, all of them empty. */
ql_status ql_weights_new(int64_t layers, ql_weights *out /* [OUT] */, ql_err *err);
void ql_weights_free(ql_weights *w);

/* "model.layers.<layer>.<block>.<kind>_proj" into text[64]; returns text. */
const char *ql_linear_name(int64_t layer, ql_linear kind, char text[64]);
bool ql_linear_has_bias(const ql_config *config, ql_linear kind);
/* Shape [n, k] of a linear layer under `config`. */
void ql_linear_shape(const ql_config *config, ql_linear kind, int64_t *n /* [OUT] */, int64_t *k /* [OUT] */);

size_t ql_weights_bytes(const ql_weights *w);   /* of all tensors, shared ones once each */
int64_t ql_weights_params(const ql_weights *w); /* parameters, tied head counted once */
bool ql_weights_is_quantized(const ql_weights *w);

#endif
