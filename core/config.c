#include "config.h"
#include "file.h"
#include "json.h"
#include "mem.h"
#include "qk.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define CONFIG_LIMIT ((size_t)4 << 20) /* bytes of a config.json; real ones have a few kilobytes */

/* Bounds far above any model there is, low enough that no product of two or three of them overflows. */
#define WIDTH_MAX (INT64_C(1) << 22)
#define LAYERS_MAX (INT64_C(1) << 12)
#define HEADS_MAX (INT64_C(1) << 14)
#define VOCAB_MAX (INT64_C(1) << 24)
#define POSITIONS_MAX (INT64_C(1) << 30)
#define HUGE_NUMBER 1e15

static ql_status only(ql_json_at at, const char *key, const char *value, const char *supported, ql_err *err)
{
    return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: %s%s \"%.60s\" is not supported, only %s", at.file,
                      at.prefix, key, value, supported);
}

/* Model type and architecture: what decides whether the tensors mean what we think. */
static ql_status read_family(ql_json_at at, ql_config *c, ql_err *err)
{
    const char *none = NULL, *type, *name = "LlamaForCausalLM";
    QL_TRY(ql_json_string(at, "model_type", &none, &type, err));
    const cJSON *list = ql_json_get(at.object, "architectures"), *first = cJSON_GetArrayItem(list, 0);
    if (list && (!cJSON_IsArray(list) || (first && !cJSON_IsString(first))))
        return ql_err_set(err, QL_ERR_FORMAT, "%s: architectures is not an array of strings", at.file);
    if (!type && !first)
        return ql_err_set(err, QL_ERR_FORMAT, "%s: model_type is missing, and architectures too", at.file);
    if (type && strcmp(type, "llama")) return only(at, "model_type", type, "\"llama\"", err);
    if (first && strcmp(first->valuestring, name))
        return only(at, "architectures", first->valuestring, "\"LlamaForCausalLM\"", err);
    snprintf(c->architecture, sizeof c->architecture, "%s", name);
    const char *silu = "silu", *act;
    QL_TRY(ql_json_string(at, "hidden_act", &silu, &act, err));
    return strcmp(act, silu) ? only(at, "hidden_act", act, "\"silu\"", err) : QL_OK;
}

ql_status ql_config_check(const ql_config *c, ql_err *err)
{
    const struct {
        const char *name;
        int64_t value, max;
    } sizes[] = {{"hidden_size", c->hidden, WIDTH_MAX},
                 {"intermediate_size", c->intermediate, WIDTH_MAX},
                 {"num_hidden_layers", c->layers, LAYERS_MAX},
                 {"num_attention_heads", c->heads, HEADS_MAX},
                 {"num_key_value_heads", c->kv_heads, HEADS_MAX},
                 {"head_dim", c->head_dim, WIDTH_MAX},
                 {"vocab_size", c->vocab, VOCAB_MAX},
                 {"max_position_embeddings", c->max_positions, POSITIONS_MAX}};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (sizes[i].value < 1 || sizes[i].value > sizes[i].max)
            return ql_err_set(err, QL_ERR_FORMAT, "%s = %lld is outside 1..%lld", sizes[i].name,
                              (long long)sizes[i].value, (long long)sizes[i].max);
    }
    if (c->heads % c->kv_heads)
        return ql_err_set(err, QL_ERR_FORMAT,
                          "num_attention_heads %lld is not a multiple of num_key_value_heads %lld",
                          (long long)c->heads, (long long)c->kv_heads);
    if (c->head_dim % 2)
        return ql_err_set(err, QL_ERR_FORMAT, "head_dim %lld is odd, and rotary embedding turns pairs",
                          (long long)c->head_dim);
    if (c->head_dim * c->heads > WIDTH_MAX)
        return ql_err_set(err, QL_ERR_FORMAT, "num_attention_heads %lld x head_dim %lld is absurd",
                          (long long)c->heads, (long long)c->head_dim);
    if (c->head_dim > QK_MAX_HEAD_DIM)
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "head_dim %lld is above %d, the most that attention takes",
                          (long long)c->head_dim, QK_MAX_HEAD_DIM);
    return QL_OK;
}

static ql_status read_sizes(ql_json_at at, ql_config *c, ql_err *err)
{
    const int64_t positions = 2048;
    QL_TRY(ql_json_int(at, "hidden_size", 1, WIDTH_MAX, NULL, &c->hidden, err));
    QL_TRY(ql_json_int(at, "intermediate_size", 1, WIDTH_MAX, NULL, &c->intermediate, err));
    QL_TRY(ql_json_int(at, "num_hidden_layers", 1, LAYERS_MAX, NULL, &c->layers, err));
    QL_TRY(ql_json_int(at, "num_attention_heads", 1, HEADS_MAX, NULL, &c->heads, err));
    QL_TRY(ql_json_int(at, "num_key_value_heads", 1, HEADS_MAX, &c->heads, &c->kv_heads, err));
    QL_TRY(ql_json_int(at, "vocab_size", 1, VOCAB_MAX, NULL, &c->vocab, err));
    QL_TRY(ql_json_int(at, "max_position_embeddings", 1, POSITIONS_MAX, &positions, &c->max_positions, err));
    if (!ql_json_get(at.object, "head_dim") && c->hidden % c->heads)
        return ql_err_set(err, QL_ERR_FORMAT,
                          "%s: hidden_size %lld is not divisible by num_attention_heads %lld", at.file,
                          (long long)c->hidden, (long long)c->heads);
    int64_t head_dim = c->hidden / c->heads;
    QL_TRY(ql_json_int(at, "head_dim", 1, WIDTH_MAX, &head_dim, &c->head_dim, err));
    ql_status status = ql_config_check(c, err);
    if (status && err) ql_err_prefix(err, "%s: ", at.file);
    return status;
}

static ql_status read_llama3(ql_json_at at, const cJSON *top, ql_rope_config *rope, ql_err *err)
{
    ql_json_at outer = {top, at.file, ""};
    int64_t original = 0;
    QL_TRY(ql_json_number(at, "low_freq_factor", 1e-6, HUGE_NUMBER, NULL, &rope->low_freq_factor, err));
    QL_TRY(ql_json_number(at, "high_freq_factor", 1e-6, HUGE_NUMBER, NULL, &rope->high_freq_factor, err));
    /* Some configs have it beside rope_scaling instead of in it. */
    if (ql_json_get(top, "original_max_position_embeddings"))
        QL_TRY(
            ql_json_int(outer, "original_max_position_embeddings", 1, POSITIONS_MAX, NULL, &original, err));
    QL_TRY(ql_json_int(at, "original_max_position_embeddings", 1, POSITIONS_MAX, original ? &original : NULL,
                       &rope->original_max_position, err));
    if (rope->high_freq_factor <= rope->low_freq_factor)
        return ql_err_set(err, QL_ERR_FORMAT, "%s: %shigh_freq_factor %g is not above low_freq_factor %g",
                          at.file, at.prefix, rope->high_freq_factor, rope->low_freq_factor);
    return QL_OK;
}

/* transformers 4 has rope_theta and rope_scaling, 5 has both in rope_parameters. */
static ql_status read_rope(ql_json_at at, ql_rope_config *rope, ql_err *err)
{
    const double theta = 10000, one = 1;
    const char *none = "default", *type;
    rope->factor = 1;
    QL_TRY(ql_json_number(at, "rope_theta", 1e-6, HUGE_NUMBER, &theta, &rope->theta, err));
    const cJSON *node = ql_json_get(at.object, "rope_scaling");
    ql_json_at in = {node, at.file, "rope_scaling."};
    if (!node) {
        in.object = node = ql_json_get(at.object, "rope_parameters");
        in.prefix = "rope_parameters.";
    }
    if (!node) return QL_OK;
    if (!cJSON_IsObject(node))
        return ql_err_set(err, QL_ERR_FORMAT, "%s: %.*s is not an object", at.file,
                          (int)strlen(in.prefix) - 1, in.prefix);
    QL_TRY(ql_json_number(in, "rope_theta", 1e-6, HUGE_NUMBER, &rope->theta, &rope->theta, err));
    QL_TRY(ql_json_string(in, ql_json_get(node, "rope_type") ? "rope_type" : "type", &none, &type, err));
    double partial;
    QL_TRY(ql_json_number(in, "partial_rotary_factor", 0, 1, &one, &partial, err));
    if (partial != 1)
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: %spartial_rotary_factor %g is not supported, only 1",
                          at.file, in.prefix, partial);
    if (strcmp(type, "default") == 0) return QL_OK;
    bool linear = strcmp(type, "linear") == 0;
    if (!linear && strcmp(type, "llama3"))
        return only(in, "rope_type", type, "\"default\", \"linear\" and \"llama3\"", err);
    rope->type = linear ? QL_ROPE_LINEAR : QL_ROPE_LLAMA3;
    QL_TRY(ql_json_number(in, "factor", 1e-6, HUGE_NUMBER, NULL, &rope->factor, err));
    return linear ? QL_OK : read_llama3(in, at.object, rope, err);
}

static ql_status read_dtype(ql_json_at at, const char *key, ql_dtype fallback, ql_dtype *dtype, ql_err *err)
{
    const char *label = ql_dtype_label(fallback), *name;
    QL_TRY(ql_json_string(at, key, &label, &name, err));
    if (ql_dtype_parse(name, dtype)) return QL_OK;
    return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: %s%s \"%.60s\" is not a dtype qlua knows", at.file,
                      at.prefix, key, name);
}

/* One id or a list of ids, each a token of the vocabulary; absent leaves *count alone. */
static ql_status read_ids(ql_json_at at, const char *key, int64_t vocab, int64_t *ids, int *count,
                          ql_err *err)
{
    const cJSON *node = ql_json_get(at.object, key), *item;
    int64_t id;
    int n = 0;
    if (!node) return QL_OK;
    if (!cJSON_IsArray(node)) {
        QL_TRY(ql_json_int(at, key, 0, vocab - 1, NULL, &id, err));
        ids[0] = id;
        *count = 1;
        return QL_OK;
    }
    cJSON_ArrayForEach(item, node)
    {
        double value = cJSON_IsNumber(item) ? item->valuedouble : -1;
        if (!(value >= 0 && value < (double)vocab) || value != floor(value))
            return ql_err_set(err, QL_ERR_FORMAT, "%s: %s%s holds something other than ids from 0 to %lld",
                              at.file, at.prefix, key, (long long)vocab - 1);
        if (n == QL_CONFIG_EOS_MAX)
            return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: %s%s has over %d ids", at.file, at.prefix, key,
                              QL_CONFIG_EOS_MAX);
        ids[n++] = (int64_t)value;
    }
    *count = n;
    return QL_OK;
}

static ql_status read_skip(ql_json_at at, ql_quant_config *q, ql_err *err)
{
    const cJSON *list = ql_json_get(at.object, "llm_int8_skip_modules"), *item;
    if (!list) return QL_OK;
    if (!cJSON_IsArray(list))
        return ql_err_set(err, QL_ERR_FORMAT, "%s: %sllm_int8_skip_modules is not an array", at.file,
                          at.prefix);
    q->has_skip = true;
    q->skip = ql_calloc((size_t)cJSON_GetArraySize(list), sizeof *q->skip);
    if (!q->skip) return ql_err_set(err, QL_ERR_MEMORY, "%s: out of memory", at.file);
    cJSON_ArrayForEach(item, list)
    {
        if (!cJSON_IsString(item))
            return ql_err_set(err, QL_ERR_FORMAT,
                              "%s: %sllm_int8_skip_modules holds something other than strings", at.file,
                              at.prefix);
        q->skip[q->skip_count] = ql_strdup(item->valuestring);
        if (!q->skip[q->skip_count]) return ql_err_set(err, QL_ERR_MEMORY, "%s: out of memory", at.file);
        q->skip_count++;
    }
    return QL_OK;
}

static ql_status read_quant(ql_json_at top, ql_quant_config *q, ql_err *err)
{
    const cJSON *node = ql_json_get(top.object, "quantization_config");
    ql_json_at at = {node, top.file, "quantization_config."};
    const bool no = false;
    const char *bnb = "bitsandbytes", *fp4 = "fp4", *method, *type;
    bool four, eight;
    if (!node) return QL_OK;
    if (!cJSON_IsObject(node))
        return ql_err_set(err, QL_ERR_FORMAT, "%s: quantization_config is not an object", top.file);
    QL_TRY(ql_json_bool(at, "load_in_4bit", &no, &four, err));
    QL_TRY(ql_json_bool(at, "load_in_8bit", &no, &eight, err));
    /* Before the method had a name, only bitsandbytes wrote this object, with both flags. */
    QL_TRY(ql_json_string(at, "quant_method", four || eight ? &bnb : NULL, &method, err));
    if (strcmp(method, bnb))
        return only(at, "quant_method", method, "\"bitsandbytes\" with load_in_4bit", err);
    if (eight)
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: %sload_in_8bit is not supported, only load_in_4bit",
                          at.file, at.prefix);
    if (!four) return QL_OK;
    QL_TRY(ql_json_string(at, "bnb_4bit_quant_type", &fp4, &type, err));
    if (strcmp(type, "nf4") && strcmp(type, "fp4"))
        return only(at, "bnb_4bit_quant_type", type, "\"nf4\" and \"fp4\"", err);
    snprintf(q->type, sizeof q->type, "%s", type);
    QL_TRY(ql_json_bool(at, "bnb_4bit_use_double_quant", &no, &q->double_quant, err));
    QL_TRY(read_dtype(at, "bnb_4bit_compute_dtype", QL_F32, &q->compute_dtype, err));
    QL_TRY(read_dtype(at, "bnb_4bit_quant_storage", QL_U8, &q->storage, err));
    q->present = true;
    return read_skip(at, q, err);
}

static ql_status read_config(ql_json_at at, ql_config *c, ql_err *err)
{
    const double eps = 1e-6;
    const bool no = false;
    int64_t none = -1;
    QL_TRY(read_family(at, c, err));
    QL_TRY(read_sizes(at, c, err));
    QL_TRY(read_rope(at, &c->rope, err));
    QL_TRY(ql_json_number(at, "rms_norm_eps", 1e-30, 1, &eps, &c->rms_eps, err));
    QL_TRY(ql_json_bool(at, "tie_word_embeddings", &no, &c->tie_embeddings, err));
    QL_TRY(ql_json_bool(at, "attention_bias", &no, &c->attention_bias, err));
    QL_TRY(ql_json_bool(at, "mlp_bias", &no, &c->mlp_bias, err));
    const char *key = ql_json_get(at.object, "dtype") ? "dtype" : "torch_dtype";
    c->has_dtype = ql_json_get(at.object, key) != NULL;
    QL_TRY(read_dtype(at, key, QL_F32, &c->dtype, err));
    QL_TRY(ql_json_int(at, "bos_token_id", 0, c->vocab - 1, &none, &c->bos, err));
    QL_TRY(read_ids(at, "eos_token_id", c->vocab, c->eos, &c->eos_count, err));
    return read_quant(at, &c->quant, err);
}

static ql_status parse_object(const char *text, size_t size, const char *file, cJSON **root, ql_err *err)
{
    QL_TRY(ql_json_parse(text, size, file, root, err));
    if (cJSON_IsObject(*root)) return QL_OK;
    cJSON_Delete(*root);
    *root = NULL;
    return ql_err_set(err, QL_ERR_FORMAT, "%s: is not a JSON object", file);
}

ql_status ql_config_parse(const char *text, size_t size, const char *file, ql_config *config, ql_err *err)
{
    cJSON *root;
    memset(config, 0, sizeof *config);
    QL_TRY(parse_object(text, size, file, &root, err));
    ql_status status = read_config((ql_json_at){root, file, ""}, config, err);
    cJSON_Delete(root);
    if (status) ql_config_free(config);
    return status;
}

void ql_config_free(ql_config *config)
{
    for (size_t i = 0; i < config->quant.skip_count; i++) ql_free(config->quant.skip[i]);
    ql_free(config->quant.skip);
    memset(config, 0, sizeof *config);
}

ql_status ql_config_generation(const char *text, size_t size, const char *file, ql_config *config,
                               ql_err *err)
{
    cJSON *root;
    QL_TRY(parse_object(text, size, file, &root, err));
    ql_json_at at = {root, file, ""};
    ql_status status = read_ids(at, "eos_token_id", config->vocab, config->eos, &config->eos_count, err);
    cJSON_Delete(root);
    return status;
}

/* Why a folder has no config.json, as far as its other files tell. */
static ql_status explain(const char *folder, const char *path, ql_err *err)
{
    static const struct {
        const char *file, *hint;
    } kinds[] = {
        {"adapter_config.json", "this is a LoRA adapter: merge it into its base model and save that"},
        {"params.json", "these are Meta's original files: use the Hugging Face folder of the same model"},
    };
    const char *hint = "a model folder holds config.json, tokenizer.json and model.safetensors";
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        char *other = ql_file_join(folder, kinds[i].file);
        if (other && ql_file_exists(other)) hint = kinds[i].hint;
        ql_free(other);
    }
    if (!ql_file_exists(folder)) {
        ql_err_set(err, QL_ERR_NOT_FOUND, "%s: no such folder", folder);
    } else if (!ql_file_is_folder(folder)) {
        ql_err_set(err, QL_ERR_NOT_FOUND, "%s: is a file, but a model is a folder", folder);
    } else {
        ql_err_set(err, QL_ERR_NOT_FOUND, "%s: there is no config.json", path);
    }
    if (err) ql_err_hint(err, "%s", hint);
    return QL_ERR_NOT_FOUND;
}

ql_status ql_config_load(const char *folder, ql_config *config, ql_err *err)
{
    char *text = NULL;
    size_t size = 0;
    memset(config, 0, sizeof *config);
    char *path = ql_file_join(folder, "config.json"),
         *generation = ql_file_join(folder, "generation_config.json");
    ql_status status =
        path && generation ? QL_OK : ql_err_set(err, QL_ERR_MEMORY, "%s: out of memory", folder);
    if (!status) status = ql_file_read(path, CONFIG_LIMIT, &text, &size, err);
    if (status == QL_ERR_NOT_FOUND) explain(folder, path, err);
    if (!status) status = ql_config_parse(text, size, path, config, err);
    if (!status && ql_file_exists(generation)) {
        ql_free(text);
        status = ql_file_read(generation, CONFIG_LIMIT, &text, &size, err);
        if (!status) status = ql_config_generation(text, size, generation, config, err);
    }
    ql_free(text);
    ql_free(path);
    ql_free(generation);
    if (status) ql_config_free(config);
    return status;
}
