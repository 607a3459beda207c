/* A Llama model on a device: weights, tables and working memory, and its forward pass.
 *
 * A ql_llama owns its weights by reference (a quantized twin shares tensors with the full model and may
 * outlive it), its working memory and its arena. One thread at a time per model.
 */
#ifndef QL_LLAMA_H
#define QL_LLAMA_H

#include "kvcache.h"
#include "rope.h"
#include "weights.h"

typedef struct {
    ql_device *device; /* one reference */
    ql_arena *arena;   /* one reference */
    ql_config config;  /* owned copy */
    ql_weights weights;
    ql_rope rope;
    char *folder;        /* the checkpoint's folder, or NULL for a synthetic model */
    int64_t max_context; /* longest sequence a forward pass takes */
    struct ql_llama_work {
        int64_t tokens;                         /* rows the tensors below have */
        ql_tensor x, h, q, k, v, att, gate, up; /* F32 [tokens, width]; empty where the backend has `pass` */
        ql_tensor workspace;                    /* U8, the backend's, of the last pass's size; else empty */
        size_t own; /* bytes charged for what the backend's steps took of its own memory in the last pass */
    } work;
} ql_llama;

/* The rows of one forward pass: row i appends lengths[i] tokens to sequence seq[i] of the cache and wants the
 * logits of its last outputs[i] tokens. Rows lie one after the other in `ids`, without padding. */
typedef struct {
    int rows;
    const int32_t *ids;     /* [sum of lengths] */
    const int32_t *lengths; /* [rows], each >= 1 */
    const int32_t *outputs; /* [rows], 0..lengths[i] */
    const int32_t *seq;     /* [rows] distinct sequences of the cache; NULL: row i is sequence i */
} ql_batch;

/* Called with every intermediate tensor, F32 [T, width], of a pass: "embed", "norm", and per layer
 * "layers.<i>.input_norm", ".q" and ".k" (after RoPE), ".attn" (after o_proj), ".post_norm", ".mlp", ".out".
 */
typedef struct {
    ql_status (*fn)(void *ud, const char *name, const ql_tensor *value, ql_err *err);
    void *ud;
} ql_trace;

typedef struct {
    ql_dtype dtype;      /* QL_DTYPE_COUNT: as stored ("auto") */
    int64_t max_context; /* 0: what the config allows */
} ql_load_options;

/* `folder`: a Hugging Face model folder. Matrices that `policy` (may be NULL) picks are quantized while they
 * are read: the model in full is never in memory. Free with ql_llama_free. */
ql_status ql_llama_load(ql_device *dev, const char *folder, const ql_load_options *options,
                        ql_quant_policy policy, void *ud, ql_llama **out /* [OUT] */, ql_err *err);
/* Random weights in the shape of `config`, stored as `dtype` or as `policy` (may be NULL) says. */
ql_status ql_llama_random(ql_device *dev, const ql_config *config, ql_dtype dtype, uint64_t seed,
                          ql_quant_policy policy, void *ud, ql_llama **out /* [OUT] */, ql_err *err);
/* The twin of `full` under `policy`; shares what the policy leaves alone. */
ql_status ql_llama_quantize(const ql_llama *full, ql_quant_policy policy, void *ud,
                            ql_llama **out /* [OUT] */, ql_err *err);
/* Write a bitsandbytes-compatible folder; see ql_save_model. source NULL: the folder it came from. */
ql_status ql_llama_save(const ql_llama *m, const char *folder, const ql_save_options *options, ql_err *err);
void ql_llama_free(ql_llama *m);

/* What every way to make a model begins with. A model without weights; `config` is moved in, and emptied,
 * also after a failure. Then, for one that comes from a folder, its name and its context (0: what the config
 * allows). */
ql_status ql_llama_new(ql_device *dev, ql_config *config, ql_llama **out /* [OUT] */, ql_err *err);
ql_status ql_llama_place(ql_llama *m, const char *folder, int64_t max_context, ql_err *err);

/* Let the high-water marks start again from what the model holds without a pass: working memory and rotary
 * tables go first, so that a smaller pass is not charged with a larger one before it. Not inside a pass. */
void ql_llama_reset_peak(ql_llama *m);

/* float32 for a model whose embedding is, else what the backend likes best. */
ql_dtype ql_llama_kv_dtype(const ql_llama *m);
/* A cache for `sequences` rows of the given capacities (tokens), none above the model's context. */
ql_status ql_llama_cache(ql_llama *m, int sequences, const int32_t *capacity, ql_kvcache *out /* [OUT] */,
                         ql_err *err);

/* Logits F32 [sum of outputs, vocab], rows in order; the caller frees them. `logits` is empty, or the tensor
 * of an earlier pass, which is filled again when its shape fits. `trace` may be NULL. The cache's lengths
 * grow by the tokens of the batch; after a failure they are as before and `logits` is empty. Row i's bits do
 * not depend on other rows. */
ql_status ql_llama_forward(ql_llama *m, ql_kvcache *cache, const ql_batch *batch, const ql_trace *trace,
                           ql_tensor *logits /* [IN OUT] */, ql_err *err);

/* The analytic expectation, in bytes. */
typedef struct {
    size_t activations; /* working memory, rotary tables and logits of a forward pass */
    size_t slot;        /* the cache's, for one token */
} ql_llama_size;

/* Of one forward pass over `tokens` tokens, the longest row having `longest`, `outputs` logit rows wanted. */
ql_status ql_llama_expect(const ql_llama *m, int64_t tokens, int64_t longest, int64_t outputs,
                          ql_llama_size *out /* [OUT] */, ql_err *err);

#endif
