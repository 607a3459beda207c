#include "file_help.h"

#include "checkpoint.h"
#include "file.h"
#include "interrupt.h"
#include "mem.h"

#include <errno.h>
#include <fcntl.h>

/* A file with one U8 [2] tensor per name; the names end with NULL. */
static void write_shard(const char *file, const char *const *names)
{
    static const int64_t shape[] = {2};
    ql_st_writer *w;
    size_t count = 0;
    assert_int_equal(ql_st_writer_open(temp_path(file), &w, NULL), QL_OK);
    for (; names[count]; count++)
        assert_int_equal(ql_st_writer_add(w, names[count], QL_U8, 1, shape, NULL, NULL), QL_OK);
    assert_int_equal(ql_st_writer_begin(w, NULL), QL_OK);
    for (size_t i = 0; i < count; i++) assert_int_equal(ql_st_writer_write(w, i, names[i], 2, NULL), QL_OK);
    assert_int_equal(ql_st_writer_finish(w, NULL), QL_OK);
    ql_st_writer_close(w);
}

static void expect_refused(const char *path, ql_status code, const char *part)
{
    ql_checkpoint *ck;
    ql_err err = {0};
    ql_status status = ql_checkpoint_open(path, &ck, &err);
    if (status != code) fail_msg("%d: %s, expected \"%s\"", status, err.message, part);
    assert_null(ck);
    assert_contains(err.message, part);
    assert_int_equal(ql_checkpoint_open(path, &ck, NULL), code);
}

#define INDEX "s/model.safetensors.index.json"

static void make_shards(void)
{
    static const char *const one[] = {"aa", "bb", NULL}, *const two[] = {"cc", NULL}, *const none[] = {NULL};
    mkdir(temp_path("s"), 0700);
    write_shard("s/model-1.safetensors", one);
    write_shard("s/model-2.safetensors", two);
    write_shard("s/model-3.safetensors", none);
    write_text(INDEX, "{\"metadata\":{\"total_size\":6},\"weight_map\":{\"cc\":\"model-2.safetensors\","
                      "\"aa\":\"model-1.safetensors\",\"bb\":\"model-1.safetensors\"}}");
}

static void check_shards(void **state)
{
    ql_checkpoint *ck;
    ql_err err = {0};
    const ql_st_tensor *tensor;
    char data[2], hex[QL_SHA256_HEX], again[QL_SHA256_HEX], list[512], part[QL_SHA256_HEX];
    (void)state;
    make_shards();
    if (ql_checkpoint_open(temp_path("s"), &ck, &err)) fail_msg("%s", err.message);
    assert_string_equal(ql_checkpoint_path(ck), temp_path("s"));
    assert_int_equal(ql_checkpoint_files(ck), 2);
    assert_int_equal(ql_checkpoint_count(ck), 3);
    assert_int_equal(ql_checkpoint_bytes(ck), 6);
    assert_string_equal(ql_checkpoint_at(ck, 0)->name, "aa");
    assert_string_equal(ql_checkpoint_at(ck, 2)->name, "cc");
    assert_null(ql_checkpoint_at(ck, 3));
    assert_int_equal(ql_checkpoint_need(ck, "cc", &tensor, &err), QL_OK);
    assert_ptr_equal(tensor, ql_checkpoint_find(ck, "cc"));
    assert_string_equal(ql_checkpoint_file(ck, tensor), temp_path("s/model-2.safetensors"));
    assert_int_equal(ql_checkpoint_read(ck, tensor, 0, 2, data, &err), QL_OK);
    assert_memory_equal(data, "cc", 2);
    assert_int_equal(ql_checkpoint_need(ck, "dd", &tensor, &err), QL_ERR_NOT_FOUND);
    assert_contains(err.message, "\"dd\"");
    assert_null(tensor);

    assert_int_equal(ql_checkpoint_sha256(ck, hex, &err), QL_OK);
    assert_int_equal(ql_checkpoint_sha256(ck, again, &err), QL_OK);
    assert_string_equal(hex, again);
    list[0] = '\0';
    for (int i = 1; i <= 2; i++) {
        char name[64], *bytes;
        size_t size;
        snprintf(name, sizeof name, "s/model-%d.safetensors", i);
        assert_int_equal(ql_file_read(temp_path(name), 10000, &bytes, &size, NULL), QL_OK);
        assert_int_equal(ql_sha256_of(bytes, size, part, NULL), QL_OK);
        ql_free(bytes);
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s  %s\n", part, name + 2);
    }
    assert_int_equal(ql_sha256_of(list, strlen(list), part, NULL), QL_OK);
    assert_string_equal(hex, part);
    ql_checkpoint_close(ck);
    ql_checkpoint_close(NULL);
}

static void check_single(void **state)
{
    static const char *const names[] = {"aa", NULL};
    ql_checkpoint *ck;
    char hex[QL_SHA256_HEX], expected[QL_SHA256_HEX], *bytes;
    size_t size;
    (void)state;
    mkdir(temp_path("one"), 0700);
    write_shard("one/model.safetensors", names);
    assert_int_equal(ql_file_read(temp_path("one/model.safetensors"), 10000, &bytes, &size, NULL), QL_OK);
    assert_int_equal(ql_sha256_of(bytes, size, expected, NULL), QL_OK);
    ql_free(bytes);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(ql_checkpoint_open(temp_path(i ? "one/model.safetensors" : "one"), &ck, NULL),
                         QL_OK);
        assert_int_equal(ql_checkpoint_count(ck), 1);
        ql_interrupt_set();
        assert_int_equal(ql_checkpoint_sha256(ck, hex, NULL), QL_ERR_INTERRUPTED);
        ql_interrupt_clear();
        assert_int_equal(ql_checkpoint_sha256(ck, hex, NULL), QL_OK);
        assert_string_equal(hex, expected);
        ql_checkpoint_close(ck);
    }
}

static void refuse_index(const char *text, const char *part)
{
    write_text(INDEX, text);
    expect_refused(temp_path("s"), QL_ERR_FORMAT, part);
    expect_refused(temp_path("s"), QL_ERR_FORMAT, "model.safetensors.index.json");
}

static void check_index_refusals(void **state)
{
    static const char *const names[] = {"../model-1.safetensors",
                                        "/etc/x.safetensors",
                                        "a/b.safetensors",
                                        "",
                                        "model-1.bin",
                                        ".safetensors",
                                        "..",
                                        ".x.safetensors",
                                        "a\\\\b.safetensors",
                                        "a\\n.safetensors"};
    char text[256];
    (void)state;
    make_shards();
    refuse_index("{", "ends early");
    refuse_index("[]", "weight_map is missing");
    refuse_index("{}", "weight_map is missing");
    refuse_index("{\"weight_map\":[]}", "weight_map is missing or not an object");
    refuse_index("{\"weight_map\":{}}", "names 0 shards");
    refuse_index("{\"weight_map\":{\"aa\":1}}", "weight_map.aa");
    refuse_index("{\"weight_map\":{\"aa\":\"model-1.safetensors\",\"aa\":\"model-1.safetensors\"}}",
                 "given twice");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        snprintf(text, sizeof text, "{\"weight_map\":{\"aa\":\"%s\"}}", names[i]);
        refuse_index(text, "not the bare name");
    }
    refuse_index("{\"weight_map\":{\"aa\":\"model-1.safetensors\",\"bb\":\"model-2.safetensors\",\"cc\":"
                 "\"model-2.safetensors\"}}",
                 "puts tensor \"bb\" into model-2.safetensors, which lacks it");
    refuse_index("{\"weight_map\":{\"aa\":\"model-1.safetensors\"}}",
                 "\"bb\" lies in model-1.safetensors, but");
    refuse_index("{\"weight_map\":{\"aa\":\"model-3.safetensors\"}}", "which lacks it");
    write_text(INDEX, "{\"weight_map\":{\"aa\":\"model-9.safetensors\"}}");
    expect_refused(temp_path("s"), QL_ERR_NOT_FOUND, "shard model-9.safetensors");

    static const char *const twice[] = {"cc", "aa", NULL};
    write_shard("s/model-2.safetensors", twice);
    refuse_index("{\"weight_map\":{\"cc\":\"model-2.safetensors\",\"aa\":\"model-1.safetensors\",\"bb\":"
                 "\"model-1.safetensors\"}}",
                 "\"aa\" lies in two shards");
    make_shards();
    assert_int_equal(truncate(temp_path("s/model-2.safetensors"), 40), 0);
    expect_refused(temp_path("s"), QL_ERR_FORMAT, "model-2.safetensors");

    FILE *file = fopen(temp_path(INDEX), "w");
    fprintf(file, "{\"weight_map\":{");
    for (int i = 0; i < 2000; i++) fprintf(file, "%s\"%d\":\"m%d.safetensors\"", i ? "," : "", i, i);
    fprintf(file, "}}");
    fclose(file);
    expect_refused(temp_path("s"), QL_ERR_FORMAT, "names 2000 shards");
}

static void check_folders(void **state)
{
    static const struct {
        const char *file, *hint;
    } cases[] = {
        {"pytorch_model.bin", "safe_serialization"},
        {"model-q4.gguf", "GGUF"},
        {"consolidated.00.pth", "Meta"},
        {"adapter_model.safetensors", "LoRA"},
        {"weights.safetensors", "name the file itself"},
    };
    (void)state;
    expect_refused(temp_path("absent"), QL_ERR_NOT_FOUND, "no such file or folder");
    mkdir(temp_path("e"), 0700);
    expect_refused(temp_path("e"), QL_ERR_NOT_FOUND, "no model.safetensors");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char name[64];
        ql_checkpoint *ck;
        ql_err err = {0};
        snprintf(name, sizeof name, "e/%s", cases[i].file);
        write_text(name, "x");
        expect_refused(temp_path("e"), QL_ERR_NOT_FOUND, cases[i].file);
        ql_checkpoint_open(temp_path("e"), &ck, &err);
        assert_contains(err.hint, cases[i].hint);
        unlink(temp_path(name));
    }
}

/* The pieces of one 4-bit weight [8, 9] in blocks of 32, and how a case changes them. */
typedef struct {
    const char *json;            /* NULL: a valid one */
    int64_t weight, absmax, map; /* elements */
    ql_dtype absmax_dtype;
    int64_t nested, nested_map; /* -1: no such tensor */
    const char *part;           /* of the refusal; NULL: accepted */
} quant_case;

#define PLAIN "{\"quant_type\": \"nf4\", \"blocksize\": 32, \"dtype\": \"bfloat16\", \"shape\": [8, 9]"
#define NESTED PLAIN ", \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": 0.25}"

static void add(ql_st_writer *w, const char *name, ql_dtype dtype, int64_t count)
{
    if (count >= 0) assert_int_equal(ql_st_writer_add(w, name, dtype, 1, &count, NULL, NULL), QL_OK);
}

static void write_quant(const quant_case *c, const char *type)
{
    static const char zeros[4096];
    const char *json = c->json ? c->json : c->nested >= 0 ? NESTED : PLAIN "}";
    char state[64];
    ql_st_writer *w;
    snprintf(state, sizeof state, "q.weight.quant_state.bitsandbytes__%s", type);
    assert_int_equal(ql_st_writer_open(temp_path("q.safetensors"), &w, NULL), QL_OK);
    add(w, state, QL_U8, (int64_t)strlen(json));
    add(w, "norm.weight", QL_F32, 1);
    add(w, "q.weight", QL_U8, c->weight);
    add(w, "q.weight.absmax", c->absmax_dtype, c->absmax);
    add(w, "q.weight.quant_map", QL_F32, c->map);
    add(w, "q.weight.nested_absmax", QL_F32, c->nested);
    add(w, "q.weight.nested_quant_map", QL_F32, c->nested_map);
    assert_int_equal(ql_st_writer_begin(w, NULL), QL_OK);
    assert_int_equal(ql_st_writer_write(w, 0, json, strlen(json), NULL), QL_OK);
    const int64_t sizes[] = {4,          c->weight,     c->absmax * (int64_t)ql_dtype_size(c->absmax_dtype),
                             c->map * 4, c->nested * 4, c->nested_map * 4};
    size_t index = 1;
    for (size_t i = 0; i < 6; i++)
        if (sizes[i] >= 0)
            assert_int_equal(ql_st_writer_write(w, index++, zeros, (size_t)sizes[i], NULL), QL_OK);
    assert_int_equal(ql_st_writer_finish(w, NULL), QL_OK);
    ql_st_writer_close(w);
}

static void check_quantized(void **state)
{
    static const quant_case cases[] = {
        {NULL, 36, 3, 16, QL_F32, -1, -1, NULL},
        {NULL, 36, 3, 16, QL_U8, 1, 256, NULL},
        /* as a third-party writer has it: nesting given, but as none */
        {"{\"shape\": [8, 9], \"blocksize\": 32, \"quant_type\": \"nf4\", \"dtype\": \"bfloat16\", "
         "\"nested_blocksize\": 0, \"nested_offset\": 0.0}",
         36, 3, 16, QL_F32, -1, -1, NULL},
        {NULL, 35, 3, 16, QL_F32, -1, -1, "\"q.weight\" has 35 bytes"},
        {NULL, 37, 3, 16, QL_F32, -1, -1, "\"q.weight\" has 37 bytes"},
        {NULL, -1, 3, 16, QL_F32, -1, -1, "no tensor \"q.weight\""},
        {NULL, 36, 2, 16, QL_F32, -1, -1, "\"q.weight.absmax\" is F32 with 2 elements, expected F32 with 3"},
        {NULL, 36, 4, 16, QL_F32, -1, -1, "\"q.weight.absmax\""},
        {NULL, 36, 3, 16, QL_F16, -1, -1, "\"q.weight.absmax\" is F16"},
        {NULL, 36, 3, 16, QL_U8, -1, -1, "\"q.weight.absmax\" is U8"},
        {NULL, 36, -1, 16, QL_F32, -1, -1, "no tensor \"q.weight.absmax\""},
        {NULL, 36, 3, 15, QL_F32, -1, -1, "\"q.weight.quant_map\""},
        {NULL, 36, 3, -1, QL_F32, -1, -1, "no tensor \"q.weight.quant_map\""},
        {NULL, 36, 3, 16, QL_F32, 1, 256, "\"q.weight.absmax\" is F32 with 3 elements, expected U8"},
        {NULL, 36, 3, 16, QL_U8, 2, 256, "\"q.weight.nested_absmax\""},
        {NULL, 36, 3, 16, QL_U8, 1, 255, "\"q.weight.nested_quant_map\""},
        {NULL, 36, 3, 16, QL_U8, 1, -1, "no tensor \"q.weight.nested_quant_map\""},
        {"", 36, 3, 16, QL_F32, -1, -1, "ends early"},
        {"[]", 36, 3, 16, QL_F32, -1, -1, "not a JSON object"},
        {"{}", 36, 3, 16, QL_F32, -1, -1, "quant_type is missing"},
        {PLAIN ",\"shape\":[8,9]}", 36, 3, 16, QL_F32, -1, -1, "given twice"},
        {PLAIN "}\xff", 36, 3, 16, QL_F32, -1, -1, "after the document"},
        {"{\"quant_type\":\"fp4\"}", 36, 3, 16, QL_F32, -1, -1, "the tensor's name says nf4"},
        {"{\"quant_type\":\"nf4\"}", 36, 3, 16, QL_F32, -1, -1, "blocksize is missing"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":0}", 36, 3, 16, QL_F32, -1, -1, "blocksize 0"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":16}", 36, 3, 16, QL_F32, -1, -1, "blocksize 16"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":48}", 36, 3, 16, QL_F32, -1, -1, "blocksize 48"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":8192}", 36, 3, 16, QL_F32, -1, -1, "blocksize 8192"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":-64}", 36, 3, 16, QL_F32, -1, -1, "blocksize = -64"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":64.5}", 36, 3, 16, QL_F32, -1, -1, "blocksize"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":64}", 36, 3, 16, QL_F32, -1, -1, "dtype is missing"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"int8\"}", 36, 3, 16, QL_F32, -1, -1,
         "\"int8\""},
        {"{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"float16\"}", 36, 3, 16, QL_F32, -1, -1,
         "shape is not two"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"float16\",\"shape\":[72]}", 36, 3, 16, QL_F32,
         -1, -1, "shape is not two"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"float16\",\"shape\":[8,0]}", 36, 3, 16, QL_F32,
         -1, -1, "shape holds"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"float16\",\"shape\":[8,-9]}", 36, 3, 16,
         QL_F32, -1, -1, "shape holds"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"float16\",\"shape\":[8,\"9\"]}", 36, 3, 16,
         QL_F32, -1, -1, "shape holds"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"float16\",\"shape\":[2147483647,2147483647]}",
         36, 3, 16, QL_F32, -1, -1, "\"q.weight\" has 36 bytes"},
        {"{\"quant_type\":\"nf4\",\"blocksize\":64,\"dtype\":\"float16\",\"shape\":[1e18,1e18]}", 36, 3, 16,
         QL_F32, -1, -1, "shape holds"},
        {PLAIN ",\"nested_blocksize\":100}", 36, 3, 16, QL_U8, 1, 256, "nested_blocksize 100"},
        {PLAIN ",\"nested_blocksize\":256}", 36, 3, 16, QL_U8, 1, 256, "nested_offset is missing"},
        {PLAIN ",\"nested_blocksize\":256,\"nested_offset\":1e300}", 36, 3, 16, QL_U8, 1, 256,
         "nested_offset"},
        {PLAIN ",\"nested_blocksize\":256,\"nested_offset\":NaN}", 36, 3, 16, QL_U8, 1, 256,
         "expected a value"},
        {PLAIN ",\"nested_blocksize\":256,\"nested_offset\":0,\"nested_dtype\":\"float16\"}", 36, 3, 16,
         QL_U8, 1, 256, "nested_dtype"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ql_checkpoint *ck;
        ql_quant_tensor q;
        ql_err err = {0};
        write_quant(&cases[i], "nf4");
        if (ql_checkpoint_open(temp_path("q.safetensors"), &ck, &err)) fail_msg("%s", err.message);
        assert_true(ql_checkpoint_is_quantized(ck, "q.weight"));
        assert_false(ql_checkpoint_is_quantized(ck, "norm.weight"));
        assert_true(ql_checkpoint_is_companion(ck, "q.weight.absmax"));
        assert_true(ql_checkpoint_is_companion(ck, "q.weight.quant_state.bitsandbytes__nf4"));
        assert_false(ql_checkpoint_is_companion(ck, "q.weight"));
        assert_false(ql_checkpoint_is_companion(ck, "norm.weight.absmax"));
        ql_status status = ql_checkpoint_quant(ck, "q.weight", &q, &err);
        if (cases[i].part) {
            assert_int_not_equal(status, QL_OK);
            assert_contains(err.message, temp_path("q.safetensors"));
            assert_contains(err.message, cases[i].part);
            assert_null(q.weight);
        } else {
            if (status) fail_msg("%s", err.message);
            assert_string_equal(q.state.type, "nf4");
            assert_int_equal(q.state.block, 32);
            assert_int_equal(q.state.dtype, QL_BF16);
            assert_int_equal(q.state.shape[1], 9);
            assert_int_equal(q.state.nested, cases[i].nested >= 0);
            assert_int_equal(ql_quant_state_elements(&q.state), 72);
            assert_int_equal(ql_quant_state_blocks(&q.state), 3);
            assert_int_equal(ql_quant_state_nested(&q.state), q.state.nested);
            assert_int_equal(q.nested != NULL, q.state.nested);
        }
        assert_int_equal(ql_checkpoint_quant(ck, "norm.weight", &q, &err), QL_ERR_NOT_FOUND);
        ql_checkpoint_close(ck);
    }
    ql_checkpoint *ck;
    ql_quant_tensor q;
    write_quant(&cases[0], "fp4");
    assert_int_equal(ql_checkpoint_open(temp_path("q.safetensors"), &ck, NULL), QL_OK);
    assert_true(ql_checkpoint_is_quantized(ck, "q.weight"));
    assert_int_equal(ql_checkpoint_quant(ck, "q.weight", &q, NULL), QL_ERR_FORMAT);
    ql_checkpoint_close(ck);
}

static void check_state_text(void **state)
{
    static const char *const texts[] = {
        "{\"quant_type\": \"nf4\", \"blocksize\": 64, \"dtype\": \"bfloat16\", \"shape\": [4096, 4096], "
        "\"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": 0.04722730442881584}",
        "{\"quant_type\": \"fp4\", \"blocksize\": 4096, \"dtype\": \"float32\", \"shape\": [1, 3]}",
        "{\"quant_type\": \"nf4\", \"blocksize\": 32, \"dtype\": \"float16\", \"shape\": [7, 5], "
        "\"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": 0.0}"};
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        ql_quant_state s;
        ql_err err = {0};
        char text[300];
        size_t size, n = strlen(texts[i]);
        if (ql_quant_state_parse(texts[i], n, "f", "t", i == 1 ? "fp4" : "nf4", &s, &err))
            fail_msg("%s", err.message);
        assert_int_equal(ql_quant_state_format(&s, text, sizeof text, &size, &err), QL_OK);
        assert_string_equal(text, texts[i]);
        assert_int_equal(size, n);
        assert_int_equal(ql_quant_state_format(&s, text, n, &size, &err), QL_ERR_ARG);
    }
}

static void check_failures(void **state)
{
    (void)state;
    make_shards();
    quant_case plain = {NULL, 36, 3, 16, QL_U8, 1, 256, NULL};
    write_quant(&plain, "nf4");
    const char *paths[] = {temp_path("s"), temp_path("q.safetensors")};
    for (int mode = 0; mode < 6; mode++) {
        for (long n = 0;; n++) {
            ql_checkpoint *ck;
            ql_quant_tensor q;
            ql_err err = {0};
            char hex[QL_SHA256_HEX];
            if (mode / 2 < 2) ql_mem_fail_after(n, mode / 2);
            if (mode / 2 == 2) ql_file_fail_after(n, EIO);
            ql_status status = ql_checkpoint_open(paths[mode % 2], &ck, &err);
            if (!status && mode % 2) status = ql_checkpoint_quant(ck, "q.weight", &q, &err);
            if (!status) status = ql_checkpoint_sha256(ck, hex, &err);
            ql_mem_fail_after(-1, false);
            ql_file_fail_after(-1, 0);
            ql_checkpoint_close(ck);
            if (status == QL_OK) break;
            assert_int_equal(status, mode / 2 < 2 ? QL_ERR_MEMORY : QL_ERR_IO);
            assert_true(err.message[0]);
        }
    }
    /* Nothing stays open. */
    int before = open("/dev/null", O_RDONLY);
    close(before);
    ql_checkpoint *ck;
    assert_int_equal(ql_checkpoint_open(temp_path("s"), &ck, NULL), QL_OK);
    ql_checkpoint_close(ck);
    int after = open("/dev/null", O_RDONLY);
    close(after);
    assert_int_equal(before, after);
    assert_in_range(after, 0, 16);
}

static void check_real(void **state)
{
    ql_checkpoint *ck;
    ql_quant_tensor q;
    ql_err err = {0};
    (void)state;
    const char *path = QLUA_SOURCE_DIR "/../shared/data/nf4/bnb_nf4.safetensors";
    if (!ql_file_exists(path)) skip();
    if (ql_checkpoint_open(path, &ck, &err)) fail_msg("%s", err.message);
    if (ql_checkpoint_quant(ck, "model.layers.0.weight", &q, &err)) fail_msg("%s", err.message);
    assert_int_equal(q.state.shape[0], 8);
    assert_false(q.state.nested);
    ql_checkpoint_close(ck);
    expect_refused(QLUA_SOURCE_DIR "/../shared/data/configs/Meta-Llama-3-8B-Instruct", QL_ERR_NOT_FOUND,
                   "model-00001-of-00007.safetensors");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(check_shards),         cmocka_unit_test(check_single),
        cmocka_unit_test(check_index_refusals), cmocka_unit_test(check_folders),
        cmocka_unit_test(check_quantized),      cmocka_unit_test(check_state_text),
        cmocka_unit_test(check_failures),       cmocka_unit_test(check_real),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
