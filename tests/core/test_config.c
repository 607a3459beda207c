#include "file_help.h"

#include "config.h"
#include "file.h"
#include "json.h"
#include "mem.h"

#include <glob.h>

static const char base_text[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\",\"hidden_size\":64,\"intermediate_"
    "size\":172,"
    "\"num_hidden_layers\":5,\"num_attention_heads\":8,\"num_key_value_heads\":4,\"vocab_size\":512,"
    "\"bos_token_id\":1,\"eos_token_id\":2,\"torch_dtype\":\"bfloat16\"}";

/* base_text with member `key` set to JSON `value`, or removed when that is NULL. The caller frees it by
 * ql_free. */
static char *edited(const char *key, const char *value)
{
    cJSON *root;
    assert_int_equal(ql_json_parse(base_text, sizeof base_text - 1, "base", &root, NULL), QL_OK);
    cJSON_DeleteItemFromObjectCaseSensitive(root, key);
    if (value) cJSON_AddItemToObject(root, key, cJSON_CreateRaw(value));
    char *text = cJSON_Print(root);
    cJSON_Delete(root);
    assert_non_null(text);
    return text;
}

static ql_status parse_edited(const char *key, const char *value, ql_config *config, ql_err *err)
{
    char *text = edited(key, value);
    ql_status status = ql_config_parse(text, strlen(text), "dir/config.json", config, err);
    ql_free(text);
    return status;
}

static void check_defaults(void **state)
{
    ql_config c;
    (void)state;
    assert_int_equal(parse_edited("none", NULL, &c, NULL), QL_OK);
    assert_string_equal(c.architecture, "LlamaForCausalLM");
    assert_int_equal(c.hidden, 64);
    assert_int_equal(c.intermediate, 172);
    assert_int_equal(c.layers, 5);
    assert_int_equal(c.heads, 8);
    assert_int_equal(c.kv_heads, 4);
    assert_int_equal(c.head_dim, 8);
    assert_int_equal(c.vocab, 512);
    assert_int_equal(c.max_positions, 2048);
    assert_true(c.rms_eps == 1e-6);
    assert_int_equal(c.rope.type, QL_ROPE_NONE);
    assert_true(c.rope.theta == 10000 && c.rope.factor == 1);
    assert_false(c.tie_embeddings || c.attention_bias || c.mlp_bias || c.quant.present);
    assert_true(c.has_dtype);
    assert_int_equal(c.dtype, QL_BF16);
    assert_int_equal(c.bos, 1);
    assert_int_equal(c.eos_count, 1);
    assert_int_equal(c.eos[0], 2);
    ql_config_free(&c);
    ql_config_free(&c);
}

static void check_variants(void **state)
{
    ql_config c;
    ql_err err = {0};
    (void)state;
    assert_int_equal(parse_edited("num_key_value_heads", NULL, &c, &err), QL_OK);
    assert_int_equal(c.kv_heads, 8);
    assert_int_equal(parse_edited("num_key_value_heads", "null", &c, &err), QL_OK);
    assert_int_equal(c.kv_heads, 8);
    assert_int_equal(parse_edited("head_dim", "10", &c, &err), QL_OK);
    assert_int_equal(c.head_dim, 10);
    assert_int_equal(parse_edited("bos_token_id", "null", &c, &err), QL_OK);
    assert_int_equal(c.bos, -1);
    assert_int_equal(parse_edited("eos_token_id", "[3,4,5]", &c, &err), QL_OK);
    assert_int_equal(c.eos_count, 3);
    assert_int_equal(c.eos[2], 5);
    assert_int_equal(parse_edited("eos_token_id", NULL, &c, &err), QL_OK);
    assert_int_equal(c.eos_count, 0);
    assert_int_equal(parse_edited("torch_dtype", NULL, &c, &err), QL_OK);
    assert_false(c.has_dtype);
    assert_int_equal(parse_edited("dtype", "\"float16\"", &c, &err), QL_OK);
    assert_int_equal(c.dtype, QL_F16);
    assert_int_equal(parse_edited("model_type", NULL, &c, &err), QL_OK);
    assert_int_equal(parse_edited("architectures", NULL, &c, &err), QL_OK);
    assert_int_equal(parse_edited("rope_scaling", "{\"type\":\"linear\",\"factor\":4.0}", &c, &err), QL_OK);
    assert_int_equal(c.rope.type, QL_ROPE_LINEAR);
    assert_true(c.rope.factor == 4 && c.rope.theta == 10000);
    assert_int_equal(parse_edited("rope_scaling", "{\"rope_type\":\"default\"}", &c, &err), QL_OK);
    assert_int_equal(c.rope.type, QL_ROPE_NONE);
    assert_int_equal(
        parse_edited("rope_parameters",
                     "{\"rope_type\":\"llama3\",\"rope_theta\":5e5,\"factor\":8,\"low_freq_factor\":1,"
                     "\"high_freq_factor\":4,\"original_max_position_embeddings\":8192}",
                     &c, &err),
        QL_OK);
    assert_int_equal(c.rope.type, QL_ROPE_LLAMA3);
    assert_true(c.rope.theta == 5e5 && c.rope.factor == 8 && c.rope.low_freq_factor == 1);
    assert_true(c.rope.high_freq_factor == 4 && c.rope.original_max_position == 8192);
}

static void check_quantization(void **state)
{
    ql_config c;
    ql_err err = {0};
    (void)state;
    assert_int_equal(
        parse_edited("quantization_config",
                     "{\"quant_method\":\"bitsandbytes\",\"load_in_4bit\":true,\"bnb_4bit_quant_type\":"
                     "\"nf4\",\"bnb_4bit_use_double_quant\":true,\"bnb_4bit_compute_dtype\":\"bfloat16\","
                     "\"bnb_4bit_quant_storage\":\"float16\",\"llm_int8_skip_modules\":[\"a\",\"b\"]}",
                     &c, &err),
        QL_OK);
    assert_true(c.quant.present && c.quant.double_quant && c.quant.has_skip);
    assert_string_equal(c.quant.type, "nf4");
    assert_int_equal(c.quant.compute_dtype, QL_BF16);
    assert_int_equal(c.quant.storage, QL_F16);
    assert_int_equal(c.quant.skip_count, 2);
    assert_string_equal(c.quant.skip[1], "b");
    ql_config_free(&c);
    assert_null(c.quant.skip);
    assert_int_equal(parse_edited("quantization_config", "{\"load_in_4bit\":true}", &c, &err), QL_OK);
    assert_string_equal(c.quant.type, "fp4");
    assert_int_equal(c.quant.compute_dtype, QL_F32);
    assert_int_equal(c.quant.storage, QL_U8);
    assert_false(c.quant.double_quant || c.quant.has_skip);
    ql_config_free(&c);
    assert_int_equal(parse_edited("quantization_config", "{\"quant_method\":\"bitsandbytes\"}", &c, &err),
                     QL_OK);
    assert_false(c.quant.present);
}

static void check_refusals(void **state)
{
    static const struct {
        const char *key, *value, *part;
        ql_status code;
    } cases[] = {
        {"model_type", "\"mistral\"", "model_type \"mistral\" is not supported", QL_ERR_UNSUPPORTED},
        {"model_type", "\"gpt2\"", "gpt2", QL_ERR_UNSUPPORTED},
        {"model_type", "1", "model_type is a number", QL_ERR_FORMAT},
        {"architectures", "[\"LlamaForSequenceClassification\"]", "LlamaForSequenceClassification",
         QL_ERR_UNSUPPORTED},
        {"architectures", "\"LlamaForCausalLM\"", "architectures is not an array", QL_ERR_FORMAT},
        {"architectures", "[1]", "architectures is not an array of strings", QL_ERR_FORMAT},
        {"hidden_act", "\"gelu\"", "hidden_act \"gelu\"", QL_ERR_UNSUPPORTED},
        {"hidden_size", NULL, "hidden_size is missing", QL_ERR_FORMAT},
        {"hidden_size", "0", "hidden_size = 0", QL_ERR_FORMAT},
        {"hidden_size", "-64", "hidden_size = -64", QL_ERR_FORMAT},
        {"hidden_size", "64.5", "hidden_size = 64.5", QL_ERR_FORMAT},
        {"hidden_size", "\"64\"", "hidden_size is a string", QL_ERR_FORMAT},
        {"hidden_size", "1e300", "hidden_size", QL_ERR_FORMAT},
        {"hidden_size", "1000000000000", "hidden_size", QL_ERR_FORMAT},
        {"hidden_size", "18446744073709551680", "hidden_size", QL_ERR_FORMAT},
        {"hidden_size", "60", "hidden_size 60 is not divisible by num_attention_heads 8", QL_ERR_FORMAT},
        {"hidden_size", "8", "head_dim 1 is odd", QL_ERR_FORMAT},
        {"head_dim", "0", "head_dim = 0", QL_ERR_FORMAT},
        {"head_dim", "7", "head_dim 7 is odd", QL_ERR_FORMAT},
        {"head_dim", "4194304", "absurd", QL_ERR_FORMAT},
        {"head_dim", "4098", "head_dim 4098 is above 4096", QL_ERR_UNSUPPORTED},
        {"intermediate_size", "0", "intermediate_size = 0", QL_ERR_FORMAT},
        {"num_hidden_layers", "0", "num_hidden_layers = 0", QL_ERR_FORMAT},
        {"num_hidden_layers", "1000000", "num_hidden_layers = 1000000", QL_ERR_FORMAT},
        {"num_attention_heads", "0", "num_attention_heads = 0", QL_ERR_FORMAT},
        {"num_key_value_heads", "0", "num_key_value_heads = 0", QL_ERR_FORMAT},
        {"num_key_value_heads", "3", "not a multiple of num_key_value_heads 3", QL_ERR_FORMAT},
        {"num_key_value_heads", "16", "not a multiple of num_key_value_heads 16", QL_ERR_FORMAT},
        {"vocab_size", "0", "vocab_size = 0", QL_ERR_FORMAT},
        {"vocab_size", "4000000000", "vocab_size = 4000000000", QL_ERR_FORMAT},
        {"max_position_embeddings", "0", "max_position_embeddings = 0", QL_ERR_FORMAT},
        {"rms_norm_eps", "0", "rms_norm_eps = 0", QL_ERR_FORMAT},
        {"rms_norm_eps", "-1e-5", "rms_norm_eps", QL_ERR_FORMAT},
        {"rms_norm_eps", "\"small\"", "rms_norm_eps is a string", QL_ERR_FORMAT},
        {"rms_norm_eps", "NaN", "expected a value", QL_ERR_FORMAT},
        {"rms_norm_eps", "1e999", "too large", QL_ERR_FORMAT},
        {"rope_theta", "0", "rope_theta = 0", QL_ERR_FORMAT},
        {"rope_theta", "-1", "rope_theta", QL_ERR_FORMAT},
        {"rope_theta", "Infinity", "expected a value", QL_ERR_FORMAT},
        {"rope_theta", "1e300", "rope_theta", QL_ERR_FORMAT},
        {"rope_scaling", "[]", "rope_scaling is not an object", QL_ERR_FORMAT},
        {"rope_parameters", "5", "rope_parameters is not an object", QL_ERR_FORMAT},
        {"rope_scaling", "{\"type\":\"dynamic\",\"factor\":2}", "rope_scaling.rope_type \"dynamic\"",
         QL_ERR_UNSUPPORTED},
        {"rope_scaling", "{\"rope_type\":\"yarn\",\"factor\":2}", "\"yarn\"", QL_ERR_UNSUPPORTED},
        {"rope_parameters", "{\"rope_type\":\"longrope\"}", "rope_parameters.rope_type \"longrope\"",
         QL_ERR_UNSUPPORTED},
        {"rope_parameters", "{\"partial_rotary_factor\":0.5}", "partial_rotary_factor", QL_ERR_UNSUPPORTED},
        {"rope_scaling", "{\"type\":\"linear\"}", "rope_scaling.factor is missing", QL_ERR_FORMAT},
        {"rope_scaling", "{\"type\":\"linear\",\"factor\":0}", "rope_scaling.factor = 0", QL_ERR_FORMAT},
        {"rope_scaling", "{\"rope_type\":\"llama3\",\"factor\":8}", "rope_scaling.low_freq_factor is missing",
         QL_ERR_FORMAT},
        {"rope_scaling",
         "{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":4,\"high_freq_factor\":4,"
         "\"original_max_position_embeddings\":8192}",
         "high_freq_factor 4 is not above low_freq_factor 4", QL_ERR_FORMAT},
        {"rope_scaling",
         "{\"rope_type\":\"llama3\",\"factor\":8,\"low_freq_factor\":1,\"high_freq_factor\":4}",
         "original_max_position_embeddings is missing", QL_ERR_FORMAT},
        {"tie_word_embeddings", "1", "tie_word_embeddings is a number", QL_ERR_FORMAT},
        {"attention_bias", "\"no\"", "attention_bias is a string", QL_ERR_FORMAT},
        {"mlp_bias", "[]", "mlp_bias is an array", QL_ERR_FORMAT},
        {"torch_dtype", "\"int3\"", "torch_dtype \"int3\"", QL_ERR_UNSUPPORTED},
        {"bos_token_id", "512", "bos_token_id = 512", QL_ERR_FORMAT},
        {"bos_token_id", "-1", "bos_token_id = -1", QL_ERR_FORMAT},
        {"eos_token_id", "512", "eos_token_id = 512", QL_ERR_FORMAT},
        {"eos_token_id", "[1,512]", "eos_token_id holds", QL_ERR_FORMAT},
        {"eos_token_id", "[1,\"2\"]", "eos_token_id holds", QL_ERR_FORMAT},
        {"eos_token_id", "[1.5]", "eos_token_id holds", QL_ERR_FORMAT},
        {"eos_token_id", "[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]", "over 16 ids", QL_ERR_UNSUPPORTED},
        {"quantization_config", "[]", "quantization_config is not an object", QL_ERR_FORMAT},
        {"quantization_config", "{}", "quantization_config.quant_method is missing", QL_ERR_FORMAT},
        {"quantization_config", "{\"quant_method\":\"gptq\",\"bits\":4}", "\"gptq\"", QL_ERR_UNSUPPORTED},
        {"quantization_config", "{\"load_in_8bit\":true}", "load_in_8bit", QL_ERR_UNSUPPORTED},
        {"quantization_config", "{\"load_in_4bit\":true,\"bnb_4bit_quant_type\":\"int4\"}", "\"int4\"",
         QL_ERR_UNSUPPORTED},
        {"quantization_config", "{\"load_in_4bit\":true,\"bnb_4bit_compute_dtype\":\"x\"}",
         "bnb_4bit_compute_dtype", QL_ERR_UNSUPPORTED},
        {"quantization_config", "{\"load_in_4bit\":true,\"llm_int8_skip_modules\":\"x\"}", "not an array",
         QL_ERR_FORMAT},
        {"quantization_config", "{\"load_in_4bit\":true,\"llm_int8_skip_modules\":[\"x\",1]}",
         "other than strings", QL_ERR_FORMAT},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ql_config c;
        ql_err err = {0};
        ql_status status = parse_edited(cases[i].key, cases[i].value, &c, &err);
        if (status != cases[i].code)
            fail_msg("%s = %s: %d %s", cases[i].key, cases[i].value, status, err.message);
        assert_contains(err.message, "dir/config.json: ");
        assert_contains(err.message, cases[i].part);
        assert_null(c.quant.skip);
        assert_int_equal(parse_edited(cases[i].key, cases[i].value, &c, NULL), status);
    }
    ql_config c;
    ql_err err = {0};
    assert_int_equal(ql_config_parse("[]", 2, "f", &c, &err), QL_ERR_FORMAT);
    assert_string_equal(err.message, "f: is not a JSON object");
    assert_int_equal(ql_config_parse("{}", 2, "f", &c, &err), QL_ERR_FORMAT);
    assert_contains(err.message, "model_type is missing");
}

static void check_folder(void **state)
{
    ql_config c;
    ql_err err = {0};
    (void)state;
    assert_int_equal(ql_config_load(temp_path("absent"), &c, &err), QL_ERR_NOT_FOUND);
    assert_contains(err.message, "no such folder");
    assert_int_equal(mkdir(temp_path("m"), 0700), 0);
    assert_int_equal(ql_config_load(temp_path("m"), &c, &err), QL_ERR_NOT_FOUND);
    assert_contains(err.message, "there is no config.json");
    write_text("m/adapter_config.json", "{}");
    assert_int_equal(ql_config_load(temp_path("m"), &c, &err), QL_ERR_NOT_FOUND);
    assert_contains(err.hint, "LoRA");
    write_text("m/config.json", base_text);
    assert_int_equal(ql_config_load(temp_path("m/config.json"), &c, &err), QL_ERR_NOT_FOUND);
    assert_contains(err.message, "is a file");
    assert_int_equal(ql_config_load(temp_path("m"), &c, &err), QL_OK);
    assert_int_equal(c.eos[0], 2);
    ql_config_free(&c);
    write_text("m/generation_config.json", "{\"temperature\":0.6}");
    assert_int_equal(ql_config_load(temp_path("m"), &c, &err), QL_OK);
    assert_int_equal(c.eos_count, 1);
    write_text("m/generation_config.json", "{\"eos_token_id\":[7,8]}");
    assert_int_equal(ql_config_load(temp_path("m"), &c, &err), QL_OK);
    assert_int_equal(c.eos_count, 2);
    assert_int_equal(c.eos[0], 7);
    write_text("m/generation_config.json", "{\"eos_token_id\":512}");
    assert_int_equal(ql_config_load(temp_path("m"), &c, &err), QL_ERR_FORMAT);
    assert_contains(err.message, "generation_config.json: eos_token_id = 512");
    write_text("m/generation_config.json", "[]");
    assert_int_equal(ql_config_load(temp_path("m"), &c, &err), QL_ERR_FORMAT);
}

static void check_memory(void **state)
{
    (void)state;
    assert_int_equal(mkdir(temp_path("k"), 0700), 0);
    char *text =
        edited("quantization_config", "{\"load_in_4bit\":true,\"llm_int8_skip_modules\":[\"a\",\"b\"]}");
    const char *folder = temp_path("k"), *path = write_text("k/config.json", text),
               *saved = temp_path("saved.json");
    ql_free(text);
    write_text("k/generation_config.json", "{\"eos_token_id\":[7,8]}");
    for (int persistent = 0; persistent < 2; persistent++) {
        for (long n = 0;; n++) {
            ql_config c;
            ql_err err = {0};
            ql_mem_fail_after(n, persistent);
            ql_status status = ql_config_load(folder, &c, &err);
            if (status == QL_OK) status = ql_config_save(path, saved, &c.quant, &err);
            ql_mem_fail_after(-1, false);
            ql_config_free(&c);
            if (status == QL_OK) break;
            assert_int_equal(status, QL_ERR_MEMORY);
            assert_true(err.message[0]);
        }
    }
}

/* Save `source` with `quant` and give the text; freed by the next call. */
static const char *saved(const char *source, const ql_quant_config *quant)
{
    static char text[8192];
    char *data;
    size_t size;
    ql_err err = {0};
    const char *path = write_text("source.json", source), *target = temp_path("target.json");
    if (ql_config_save(path, target, quant, &err)) fail_msg("%s", err.message);
    assert_int_equal(ql_file_read(target, sizeof text - 1, &data, &size, &err), QL_OK);
    memcpy(text, data, size + 1);
    ql_free(data);
    if (ql_json_check(text, size, "saved", &err)) fail_msg("%s in %s", err.message, text);
    return text;
}

static void check_save(void **state)
{
    char *skip[] = {"lm_head", "a \"b\""};
    ql_quant_config quant = {.present = true,
                             .type = "nf4",
                             .double_quant = true,
                             .compute_dtype = QL_BF16,
                             .storage = QL_U8,
                             .has_skip = true,
                             .skip = skip,
                             .skip_count = 2};
    ql_quant_config none = {0};
    ql_config c;
    ql_err err = {0};
    (void)state;
    const char *text = saved(base_text, &quant);
    assert_memory_equal(text, base_text, sizeof base_text - 2);
    assert_int_equal(ql_config_parse(text, strlen(text), "f", &c, &err), QL_OK);
    assert_true(c.quant.present && c.quant.double_quant);
    assert_string_equal(c.quant.type, "nf4");
    assert_int_equal(c.quant.skip_count, 2);
    assert_string_equal(c.quant.skip[1], "a \"b\"");
    ql_config_free(&c);

    assert_string_equal(saved("{\"a\": 1e-05,\n \"quantization_config\": {\"x\":[1]},\n \"z\": 2}\n", NULL),
                        "{\"a\": 1e-05,\n \"z\": 2}\n");
    assert_string_equal(saved("{\"a\": 1, \"quantization_config\": {}}", &none), "{\"a\": 1}");
    assert_string_equal(saved("{ \"quantization_config\": {} , \"z\": 2}", NULL), "{ \"z\": 2}");
    assert_string_equal(saved("{ \"quantization_config\": {} }", NULL), "{  }");
    assert_string_equal(saved("{\"a\": {\"quantization_config\": 1}}", NULL),
                        "{\"a\": {\"quantization_config\": 1}}");
    assert_contains(saved("{}", &quant), "\"quant_method\": \"bitsandbytes\"");
    quant.has_skip = false;
    text = saved("{\"a\":1,\"quantization_config\":{\"old\":1},\"z\":2.50}", &quant);
    assert_contains(text, "{\"a\":1,\"quantization_config\": {\n");
    assert_contains(text, "\"llm_int8_skip_modules\": null");
    assert_contains(text, "},\"z\":2.50}");
    assert_null(strstr(text, "\"old\""));

    assert_int_equal(ql_config_save(temp_path("absent"), temp_path("x"), NULL, &err), QL_ERR_NOT_FOUND);
    assert_int_equal(ql_config_save(write_text("bad", "[1]"), temp_path("x"), NULL, &err), QL_ERR_FORMAT);
    assert_int_equal(ql_config_save(write_text("bad", "{\"a\":1,\"a\":2}"), temp_path("x"), NULL, &err),
                     QL_ERR_FORMAT);
    assert_false(ql_file_exists(temp_path("x")));
}

static void check_real(void **state)
{
    static const char *const patterns[] = {"/../shared/data/configs/*", "/../shared/data/models/*",
                                           "/../shared/data/tokenizers/*llama*", "/tests/golden/models/*",
                                           "/examples/models/*"};
    size_t folders = 0;
    (void)state;
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        char pattern[1024];
        glob_t found;
        snprintf(pattern, sizeof pattern, "%s%s/config.json", QLUA_SOURCE_DIR, patterns[i]);
        if (glob(pattern, 0, NULL, &found)) continue;
        for (size_t j = 0; j < found.gl_pathc; j++, folders++) {
            ql_config c;
            ql_err err = {0};
            *strrchr(found.gl_pathv[j], '/') = '\0';
            if (ql_config_load(found.gl_pathv[j], &c, &err)) fail_msg("%s", err.message);
            if (strstr(found.gl_pathv[j], "Llama-3.2-1B")) {
                assert_int_equal(c.head_dim, 64);
                assert_int_equal(c.rope.type, QL_ROPE_LLAMA3);
                assert_true(c.rope.factor == 32 && c.rope.theta == 500000 && c.tie_embeddings);
            }
            ql_config_free(&c);
        }
        globfree(&found);
    }
    print_message("real configs accepted: %zu\n", folders);
    if (!folders) skip();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(check_defaults),     cmocka_unit_test(check_variants),
        cmocka_unit_test(check_quantization), cmocka_unit_test(check_refusals),
        cmocka_unit_test(check_folder),       cmocka_unit_test(check_memory),
        cmocka_unit_test(check_save),         cmocka_unit_test(check_real),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
