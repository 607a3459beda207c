/* What config.json says of a model of the Llama family.
 *
 * Accepts Llama 2, 3, 3.1, 3.2, TinyLlama, SmolLM2 and what is shaped like them, in the spelling of
 * transformers 4 (rope_theta, rope_scaling, torch_dtype) and 5 (rope_parameters, dtype); defaults are those
 * of transformers' LlamaConfig. Any other architecture, rope type, activation or quantization is refused by
 * name. Plain data but for the skip list: free it by ql_config_free.
 */
#ifndef QL_CONFIG_H
#define QL_CONFIG_H

#include "dtype.h"
#include "err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QL_CONFIG_EOS_MAX 16

typedef enum {
    QL_ROPE_NONE = 0, /* "default": no scaling */
    QL_ROPE_LINEAR,   /* positions divided by factor */
    QL_ROPE_LLAMA3,   /* frequencies divided by factor below a wave length, blended above (Llama 3.1) */
} ql_rope_type;

typedef struct {
    ql_rope_type type;
    double theta;
    double factor;                            /* linear and llama3; 1 otherwise */
    double low_freq_factor, high_freq_factor; /* llama3 */
    int64_t original_max_position;            /* llama3 */
} ql_rope_config;

/* quantization_config of a bitsandbytes 4-bit checkpoint. */
typedef struct {
    bool present;
    char type[8];           /* "nf4" or "fp4" */
    bool double_quant;      /* absmax is itself quantized to 8 bits */
    ql_dtype compute_dtype; /* what bitsandbytes would compute in */
    ql_dtype storage;       /* dtype that the packed codes are stored as */
    bool has_skip;          /* llm_int8_skip_modules was given: it replaces the default list */
    char **skip;            /* owned strings */
    size_t skip_count;
} ql_quant_config;

typedef struct {
    char architecture[64]; /* "LlamaForCausalLM" */
    int64_t hidden, intermediate, layers;
    int64_t heads, kv_heads, head_dim; /* head_dim is even; kv_heads divides heads */
    int64_t vocab, max_positions;
    double rms_eps;
    ql_rope_config rope;
    bool tie_embeddings;
    bool attention_bias; /* on q, k, v and o */
    bool mlp_bias;       /* on gate, up and down */
    bool has_dtype;
    ql_dtype dtype; /* of the weights, as declared */
    int64_t bos;    /* -1: none */
    int64_t eos[QL_CONFIG_EOS_MAX];
    int eos_count;
    ql_quant_config quant;
} ql_config;

/* Read `folder`/config.json and, where there is one, generation_config.json, whose end-of-sequence ids are
 * those that generation stops at and so replace the model's. */
ql_status ql_config_load(const char *folder, ql_config *config /* [OUT] */, ql_err *err);

/* Read config text[0 .. size) (text[size] is NUL); `file` names it in messages. */
ql_status ql_config_parse(const char *text, size_t size, const char *file, ql_config *config /* [OUT] */,
                          ql_err *err);

/* Whether a Llama model of these sizes can be: each within bounds below which no product of them overflows,
 * heads in groups, pairs to rotate, no head wider than the kernels take. Messages name the fields of
 * config.json. */
ql_status ql_config_check(const ql_config *config, ql_err *err);

/* Frees what the config owns and zeroes it; idempotent. */
void ql_config_free(ql_config *config);

/* The eos ids of a generation_config text replace those of `config`; no eos field leaves them. */
ql_status ql_config_generation(const char *text, size_t size, const char *file, ql_config *config,
                               ql_err *err);

/* Write the config of `source` to `target`, byte for byte but for quantization_config, which becomes `quant`
 * (or goes, when `quant` is NULL or not present). Atomic. */
ql_status ql_config_save(const char *source, const char *target, const ql_quant_config *quant, ql_err *err);

#endif
