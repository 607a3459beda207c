/* Saving models: what comes back is what was saved, in the very bytes that transformers and bitsandbytes
 * write, and nothing half-written ever looks like a model. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "backend.h"
#include "config.h"
#include "file.h"
#include "mem.h"
#include "quant.h"
#include "sampler.h"
#include "save.h"
#include "device_help.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MODELS QLUA_SOURCE_DIR "/tests/golden/models/"

static char root[64]; /* a fresh folder for each test */

static void remove_tree(const char *path)
{
    DIR *d = opendir(path);
    char inner[1024];
    for (struct dirent *f; d && (f = readdir(d));) {
        if (strcmp(f->d_name, ".") == 0 || strcmp(f->d_name, "..") == 0) continue;
        snprintf(inner, sizeof inner, "%s/%s", path, f->d_name);
        remove_tree(inner);
    }
    if (d) closedir(d);
    remove(path);
}

static int make_root(void **state)
{
    (void)state;
    strcpy(root, "/tmp/test_saveXXXXXX");
    return mkdtemp(root) ? 0 : -1;
}

static int drop_root(void **state)
{
    (void)state;
    ql_mem_fail_after(-1, false);
    ql_file_fail_after(-1, 0);
    remove_tree(root);
    return 0;
}

static char *in_root(const char *name)
{
    static char paths[4][600];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", root, name);
    return path;
}

static bool has(const char *folder, const char *name)
{
    char path[700];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return ql_file_exists(path);
}

static int count_files(const char *folder)
{
    DIR *d = opendir(folder);
    if (!d) return -1;
    int n = 0;
    for (struct dirent *f; (f = readdir(d));)
        n += strcmp(f->d_name, ".") != 0 && strcmp(f->d_name, "..") != 0;
    closedir(d);
    return n;
}

/* --- a model as entries -----------------------------------------------------------------------------------
 */

#define MAX_ENTRIES 32

typedef struct {
    ql_save_entry entries[MAX_ENTRIES];
    ql_matrix matrices[MAX_ENTRIES];
    char names[MAX_ENTRIES][100];
    size_t count;
} model;

static void model_free(model *m)
{
    for (size_t i = 0; i < m->count; i++) ql_matrix_free(&m->matrices[i]);
    m->count = 0;
}

static ql_matrix *add(model *m, const char *name, ql_dtype dtype)
{
    size_t i = m->count++;
    assert_true(i < MAX_ENTRIES);
    snprintf(m->names[i], sizeof m->names[i], "%s", name);
    m->entries[i] = (ql_save_entry){.name = m->names[i], .matrix = &m->matrices[i], .dtype = dtype};
    memset(&m->matrices[i], 0, sizeof m->matrices[i]);
    return &m->matrices[i];
}

static void load_dense(const ql_checkpoint *ck, const ql_st_tensor *t, ql_tensor *out)
{
    size_t bytes = ql_st_tensor_bytes(t);
    void *data = malloc(bytes);
    assert_int_equal(ql_checkpoint_read(ck, t, 0, bytes, data, NULL), QL_OK);
    assert_int_equal(ql_tensor_new(dev, NULL, QL_MEM_WEIGHTS, t->dtype, t->ndim, t->shape, out, NULL), QL_OK);
    assert_int_equal(ql_tensor_upload(out, data, bytes, NULL), QL_OK);
    free(data);
}

/* Every tensor of a checkpoint; vectors become `tensor` entries. */
static void model_load(const char *folder, model *m)
{
    ql_checkpoint *ck;
    m->count = 0;
    assert_int_equal(ql_checkpoint_open(folder, &ck, NULL), QL_OK);
    for (size_t i = 0; i < ql_checkpoint_count(ck); i++) {
        const ql_st_tensor *t = ql_checkpoint_at(ck, i);
        if (ql_checkpoint_is_companion(ck, t->name)) continue;
        ql_matrix *w = add(m, t->name, t->dtype);
        if (ql_checkpoint_is_quantized(ck, t->name)) {
            assert_int_equal(ql_quant_load(ck, t->name, dev, NULL, w, NULL), QL_OK);
            continue;
        }
        load_dense(ck, t, &w->data);
        w->n = t->shape[0];
        w->k = t->ndim == 2 ? t->shape[1] : 1;
        if (t->ndim == 2) continue;
        m->entries[m->count - 1].matrix = NULL;
        m->entries[m->count - 1].tensor = &w->data;
    }
    ql_checkpoint_close(ck);
}

static void assert_same_tensors(const char *folder_a, const char *folder_b)
{
    ql_checkpoint *a, *b;
    assert_int_equal(ql_checkpoint_open(folder_a, &a, NULL), QL_OK);
    assert_int_equal(ql_checkpoint_open(folder_b, &b, NULL), QL_OK);
    assert_int_equal(ql_checkpoint_count(a), ql_checkpoint_count(b));
    for (size_t i = 0; i < ql_checkpoint_count(a); i++) {
        const ql_st_tensor *ta = ql_checkpoint_at(a, i), *tb = ql_checkpoint_find(b, ta->name);
        assert_non_null(tb);
        assert_int_equal(ta->dtype, tb->dtype);
        assert_int_equal(ta->ndim, tb->ndim);
        assert_memory_equal(ta->shape, tb->shape, (size_t)ta->ndim * sizeof *ta->shape);
        size_t bytes = ql_st_tensor_bytes(ta);
        uint8_t *x = malloc(bytes), *y = malloc(bytes);
        assert_int_equal(ql_checkpoint_read(a, ta, 0, bytes, x, NULL), QL_OK);
        assert_int_equal(ql_checkpoint_read(b, tb, 0, bytes, y, NULL), QL_OK);
        assert_memory_equal(x, y, bytes);
        free(x);
        free(y);
    }
    ql_checkpoint_close(a);
    ql_checkpoint_close(b);
}

static ql_status save(const char *folder, const model *m, const char *source, bool force, uint64_t shard,
                      ql_err *err)
{
    ql_save_options options = {.source = source, .force = force, .shard_bytes = shard};
    return ql_save_model(folder, m->entries, m->count, &options, err);
}

/* --- what is written ---------------------------------------------------------------------------------------
 */

/* Checkpoints that transformers wrote, read and written again: the same tensors, bytes and names, the JSON of
 * the quant state included. */
static void reproduces_what_transformers_writes(void **state)
{
    (void)state;
    static const char *const models[] = {"nf4", "nf4_double", "nf4_f16",    "nf4_f32",
                                         "fp4", "fp4_double", "llama3_bf16"};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        char source[512];
        snprintf(source, sizeof source, MODELS "%s", models[i]);
        model m;
        model_load(source, &m);
        ql_err err = {0};
        ql_status status = save(in_root(models[i]), &m, source, false, 0, &err);
        if (status != QL_OK) print_message("%s\n", err.message);
        assert_int_equal(status, QL_OK);
        assert_same_tensors(source, in_root(models[i]));
        ql_config a, b;
        assert_int_equal(ql_config_load(source, &a, NULL), QL_OK);
        assert_int_equal(ql_config_load(in_root(models[i]), &b, NULL), QL_OK);
        assert_int_equal(a.quant.present, b.quant.present);
        assert_string_equal(a.quant.type, b.quant.type);
        assert_int_equal(a.quant.double_quant, b.quant.double_quant);
        assert_int_equal(a.hidden, b.hidden);
        assert_false(b.quant.has_skip);
        if (b.quant.present) assert_int_equal(b.quant.storage, QL_U8);
        ql_config_free(&a);
        ql_config_free(&b);
        assert_int_equal(count_files(in_root(models[i])), 2);
        model_free(&m);
    }
}

/* The model of a golden folder, its linears quantized here. */
static void quantized_model(model *m, const char *source, const ql_quant_spec *spec)
{
    model_load(source, m);
    for (size_t i = 0; i < m->count; i++) {
        ql_matrix *w = &m->matrices[i], q;
        if (!m->entries[i].matrix || !strstr(m->names[i], "_proj")) continue;
        assert_int_equal(ql_quant_matrix(w, spec, NULL, &q, NULL), QL_OK);
        ql_matrix_free(w);
        *w = q;
    }
}

static ql_quant_spec spec_of(const char *scheme, int block, bool double_quant)
{
    ql_quant_spec spec;
    assert_int_equal(ql_quant_spec_init(scheme, &spec, NULL), QL_OK);
    spec.block = block;
    spec.double_quant = double_quant;
    return spec;
}

static void assert_same_quant(const ql_matrix *a, const ql_matrix *b)
{
    assert_int_equal(a->n, b->n);
    assert_int_equal(a->k, b->k);
    assert_int_equal(a->dtype, b->dtype);
    assert_string_equal(a->quant->scheme, b->quant->scheme);
    assert_int_equal(a->quant->block, b->quant->block);
    assert_int_equal(a->quant->nested, b->quant->nested);
    assert_memory_equal(a->quant->code, b->quant->code, sizeof a->quant->code);
    assert_memory_equal(a->data.data, b->data.data, ql_tensor_bytes(&a->data));
    assert_memory_equal(a->absmax.data, b->absmax.data, ql_tensor_bytes(&a->absmax));
    if (!a->quant->nested) return;
    assert_memory_equal(&a->quant->nested_offset, &b->quant->nested_offset, 4);
    assert_memory_equal(a->quant->absmax8, b->quant->absmax8, a->quant->blocks);
    assert_memory_equal(a->quant->nested_absmax, b->quant->nested_absmax, a->quant->nested_blocks * 4);
}

static void what_is_saved_comes_back(void **state)
{
    (void)state;
    const char *source = MODELS "odd_bf16";
    for (int i = 0; i < 8; i++) {
        ql_quant_spec spec = spec_of(i & 1 ? "nf4" : "fp4", i & 4 ? 32 : 128, i & 2);
        model m, back;
        char name[16];
        snprintf(name, sizeof name, "m%d", i);
        quantized_model(&m, source, &spec);
        assert_int_equal(save(in_root(name), &m, source, false, 0, NULL), QL_OK);
        model_load(in_root(name), &back);
        assert_int_equal(back.count, m.count);
        int quantized = 0;
        for (size_t j = 0; j < m.count; j++) {
            size_t k = 0;
            while (k < back.count && strcmp(back.names[k], m.names[j]) != 0) k++;
            assert_true(k < back.count);
            const ql_matrix *a = &m.matrices[j], *b = &back.matrices[k];
            assert_int_equal(!a->quant, !b->quant);
            if (a->quant)
                assert_same_quant(a, b);
            else
                assert_memory_equal(a->data.data, b->data.data, ql_tensor_bytes(&a->data));
            quantized += a->quant != NULL;
        }
        assert_true(quantized >= 7);
        ql_config c;
        assert_int_equal(ql_config_load(in_root(name), &c, NULL), QL_OK);
        assert_true(c.quant.present);
        assert_memory_equal(c.quant.type, spec.scheme, 4);
        assert_int_equal(c.quant.double_quant, spec.double_quant);
        ql_config_free(&c);
        model_free(&m);
        model_free(&back);
    }
}

/* Norms are float32 in memory and go back to the dtype they were stored in. */
static void dense_entries_are_converted(void **state)
{
    (void)state;
    const char *source = MODELS "llama3_bf16";
    model m;
    model_load(source, &m);
    float x[4] = {1, -0.3f, 1e-3f, 65504};
    ql_matrix *norm = add(&m, "extra.weight", QL_BF16);
    m.entries[m.count - 1].matrix = NULL;
    m.entries[m.count - 1].tensor = &norm->data;
    assert_int_equal(ql_tensor_new_1d(dev, NULL, QL_MEM_WEIGHTS, QL_F32, 4, &norm->data, NULL), QL_OK);
    assert_int_equal(ql_tensor_upload(&norm->data, x, sizeof x, NULL), QL_OK);
    assert_int_equal(save(in_root("m"), &m, source, false, 0, NULL), QL_OK);
    ql_checkpoint *ck;
    assert_int_equal(ql_checkpoint_open(in_root("m"), &ck, NULL), QL_OK);
    const ql_st_tensor *t = ql_checkpoint_find(ck, "extra.weight");
    assert_int_equal(t->dtype, QL_BF16);
    uint16_t h[4];
    const uint16_t want[4] = {0x3f80, 0xbe9a, 0x3a83, 0x4780};
    assert_int_equal(ql_checkpoint_read(ck, t, 0, sizeof h, h, NULL), QL_OK);
    assert_memory_equal(h, want, sizeof h);
    ql_checkpoint_close(ck);
    model_free(&m);
}

static void mixed_precision_lists_what_stays(void **state)
{
    (void)state;
    const char *source = MODELS "llama3_bf16";
    ql_quant_spec spec = spec_of("nf4", 64, true);
    model m;
    for (int head = 0; head < 2; head++) {
        model_load(source, &m);
        for (size_t i = 0; i < m.count; i++) {
            ql_matrix q;
            bool pick = strstr(m.names[i], "up_proj") || (head && strstr(m.names[i], "lm_head"));
            if (!pick) continue;
            assert_int_equal(ql_quant_matrix(&m.matrices[i], &spec, NULL, &q, NULL), QL_OK);
            ql_matrix_free(&m.matrices[i]);
            m.matrices[i] = q;
        }
        assert_int_equal(save(in_root(head ? "a" : "b"), &m, source, false, 0, NULL), QL_OK);
        ql_config c;
        assert_int_equal(ql_config_load(in_root(head ? "a" : "b"), &c, NULL), QL_OK);
        assert_true(c.quant.has_skip);
        bool lm_head = false, gate = false, up = false;
        for (size_t i = 0; i < c.quant.skip_count; i++) {
            lm_head |= strcmp(c.quant.skip[i], "lm_head") == 0;
            gate |= strcmp(c.quant.skip[i], "model.layers.1.mlp.gate_proj") == 0;
            up |= strstr(c.quant.skip[i], "up_proj") != NULL;
            assert_null(strstr(c.quant.skip[i], ".weight"));
        }
        assert_int_equal(lm_head, !head);
        assert_true(gate && !up);
        ql_config_free(&c);
        model_free(&m);
    }
}

static void shards(void **state)
{
    (void)state;
    const char *source = MODELS "nf4_double";
    model m;
    model_load(source, &m);
    char *folder = in_root("m");
    assert_int_equal(save(folder, &m, source, false, 16000, NULL), QL_OK);
    assert_true(has(folder, "model.safetensors.index.json"));
    assert_false(has(folder, "model.safetensors"));
    assert_same_tensors(source, folder);
    ql_checkpoint *ck;
    assert_int_equal(ql_checkpoint_open(folder, &ck, NULL), QL_OK);
    assert_true(ql_checkpoint_files(ck) > 2);
    /* A weight and its companions share a file. */
    for (size_t i = 0; i < ql_checkpoint_count(ck); i++) {
        const ql_st_tensor *t = ql_checkpoint_at(ck, i), *map;
        char name[200];
        if (!ql_checkpoint_is_quantized(ck, t->name)) continue;
        snprintf(name, sizeof name, "%s.quant_map", t->name);
        assert_non_null(map = ql_checkpoint_find(ck, name));
        assert_string_equal(ql_checkpoint_file(ck, t), ql_checkpoint_file(ck, map));
    }
    ql_checkpoint_close(ck);

    /* Replacing it by one file leaves no shard behind; and by shards again, no single file. */
    assert_int_equal(save(folder, &m, source, true, 0, NULL), QL_OK);
    assert_int_equal(count_files(folder), 2);
    assert_same_tensors(source, folder);
    assert_int_equal(save(folder, &m, source, true, 1, NULL), QL_OK); /* one entry a shard */
    assert_int_equal(count_files(folder), (int)m.count + 2);
    assert_same_tensors(source, folder);
    model_free(&m);
}

static void other_files_are_copied(void **state)
{
    (void)state;
    char *source = in_root("source"), *target = in_root("deep/er/target");
    assert_int_equal(mkdir(source, 0777), 0);
    char *config = NULL;
    size_t size;
    assert_int_equal(ql_file_read(MODELS "llama3_bf16/config.json", 1 << 20, &config, &size, NULL), QL_OK);
    static const char *const names[] = {"tokenizer.json",          "tokenizer_config.json",
                                        "special_tokens_map.json", "generation_config.json",
                                        "chat_template.jinja",     "notes.txt"};
    for (int i = 0; i < 6; i++) {
        char path[700];
        snprintf(path, sizeof path, "%s/%s", source, names[i]);
        assert_int_equal(ql_file_write(path, names[i], strlen(names[i]), NULL), QL_OK);
    }
    char path[700];
    snprintf(path, sizeof path, "%s/config.json", source);
    assert_int_equal(ql_file_write(path, config, size, NULL), QL_OK);
    ql_free(config);
    model m;
    model_load(MODELS "llama3_bf16", &m);
    assert_int_equal(save(target, &m, source, false, 0, NULL), QL_OK);
    for (int i = 0; i < 6; i++) {
        assert_int_equal(has(target, names[i]), i < 5);
        if (i == 5) continue;
        char *text;
        snprintf(path, sizeof path, "%s/%s", target, names[i]);
        assert_int_equal(ql_file_read(path, 1 << 20, &text, &size, NULL), QL_OK);
        assert_string_equal(text, names[i]);
        ql_free(text);
    }
    model_free(&m);
}

/* --- what is refused ---------------------------------------------------------------------------------------
 */

static void refusals(void **state)
{
    (void)state;
    const char *source = MODELS "llama3_bf16";
    ql_err err = {0};
    model m;
    model_load(source, &m);
    char *folder = in_root("m");
    assert_int_equal(save("", &m, source, false, 0, &err), QL_ERR_ARG);
    assert_int_equal(save(source, &m, source, true, 0, &err), QL_ERR_ARG); /* over itself */
    assert_int_equal(save(folder, &m, root, false, 0, &err), QL_ERR_NOT_FOUND);
    assert_non_null(strstr(err.message, "config.json"));
    assert_false(ql_file_exists(folder));
    assert_int_equal(ql_file_write(folder, "x", 1, NULL), QL_OK); /* a file by that name */
    assert_int_equal(save(folder, &m, source, false, 0, &err), QL_ERR_IO);
    remove(folder);

    assert_int_equal(save(folder, &m, source, false, 0, &err), QL_OK);
    assert_int_equal(save(folder, &m, source, false, 0, &err), QL_ERR_IO);
    assert_non_null(strstr(err.message, "already"));
    assert_non_null(strstr(err.hint, "force"));
    assert_int_equal(save(folder, &m, source, true, 0, &err), QL_OK);
    char *other = in_root("other");
    assert_int_equal(mkdir(other, 0777), 0); /* a folder without a model needs no force */
    assert_int_equal(save(other, &m, source, false, 0, &err), QL_OK);

    ql_save_entry bad = m.entries[0];
    ql_save_options options = {.source = source};
    bad.tensor = &m.matrices[0].data;
    assert_int_equal(ql_save_model(in_root("x"), &bad, 1, &options, &err), QL_ERR_ARG);
    bad.tensor = NULL;
    bad.dtype = QL_I32;
    assert_int_equal(ql_save_model(in_root("x"), &bad, 1, &options, &err), QL_ERR_ARG);
    bad.dtype = QL_BF16;
    bad.name = NULL;
    assert_int_equal(ql_save_model(in_root("x"), &bad, 1, &options, &err), QL_ERR_ARG);
    ql_save_entry twice[] = {m.entries[0], m.entries[0]};
    assert_int_not_equal(ql_save_model(in_root("x"), twice, 2, &options, &err), QL_OK);
    assert_false(ql_file_exists(in_root("x")));
    model_free(&m);
}

static void a_free_code_book_cannot_be_saved(void **state)
{
    (void)state;
    const char *source = MODELS "llama3_bf16";
    ql_err err = {0};
    ql_quant_spec spec;
    double code[16];
    for (int i = 0; i < 16; i++) code[i] = i - 7.5;
    assert_int_equal(ql_quant_spec_codebook(code, &spec, &err), QL_OK);
    model m;
    quantized_model(&m, source, &spec);
    assert_int_equal(save(in_root("m"), &m, source, false, 0, &err), QL_ERR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "code book"));
    assert_non_null(strstr(err.message, "_proj"));
    assert_non_null(strstr(err.hint, "nf4"));
    assert_false(ql_file_exists(in_root("m")));
    model_free(&m);
}

/* --- what goes wrong ---------------------------------------------------------------------------------------
 */

/* Each system call failed once: an error, and no folder. */
static void disk_fails_into_a_new_folder(void **state)
{
    (void)state;
    const char *source = MODELS "nf4_double";
    model m;
    model_load(source, &m);
    char *folder = in_root("m");
    ql_status status = QL_ERR_IO;
    long n = 0;
    for (; status != QL_OK && n < 5000; n++) {
        ql_err err = {0};
        ql_file_fail_after(n, ENOSPC);
        status = save(folder, &m, source, false, 30000, &err);
        ql_file_fail_after(-1, 0);
        if (status != QL_OK && ql_file_exists(folder)) assert_false(has(folder, "config.json"));
        if (status != QL_OK) remove_tree(folder);
    }
    assert_in_range(n, 20, 4999);
    assert_same_tensors(source, folder);
    model_free(&m);
}

/* Over another model: until the new files get their names, the old model is untouched. Then there is no
 * config.json that would join old and new. */
static void disk_fails_over_a_model(void **state)
{
    (void)state;
    const char *source = MODELS "nf4_double", *old = MODELS "llama3_bf16";
    model m, before;
    model_load(source, &m);
    model_load(old, &before);
    char *folder = in_root("m");
    ql_status status = QL_ERR_IO;
    long n = 0;
    int kept = 0;
    for (; status != QL_OK && n < 5000; n++) {
        assert_int_equal(save(folder, &before, old, true, 0, NULL), QL_OK);
        ql_err err = {0};
        ql_file_fail_after(n, EIO);
        status = save(folder, &m, source, true, 0, &err);
        ql_file_fail_after(-1, 0);
        if (status == QL_OK || !has(folder, "config.json")) continue;
        assert_same_tensors(old, folder);
        kept++;
    }
    assert_true(kept > 10 && n < 5000);
    assert_same_tensors(source, folder);
    model_free(&m);
    model_free(&before);
}

static void memory_runs_out(void **state)
{
    (void)state;
    const char *source = MODELS "nf4_double";
    model m;
    model_load(source, &m);
    char *folder = in_root("m");
    ql_status status = QL_ERR_MEMORY;
    long n = 0;
    for (; status != QL_OK && n < 5000; n++) {
        ql_err err = {0};
        ql_mem_fail_after(n, false);
        status = save(folder, &m, source, false, 30000, &err);
        ql_mem_fail_after(-1, false);
        if (status == QL_OK) break;
        assert_int_equal(status, QL_ERR_MEMORY);
        assert_false(ql_file_exists(folder));
    }
    assert_in_range(n, 10, 4999);
    assert_same_tensors(source, folder);
    model_free(&m);
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, make_root, drop_root)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(reproduces_what_transformers_writes),
        TEST(what_is_saved_comes_back),
        TEST(dense_entries_are_converted),
        TEST(mixed_precision_lists_what_stays),
        TEST(shards),
        TEST(other_files_are_copied),
        TEST(refusals),
        TEST(a_free_code_book_cannot_be_saved),
        TEST(disk_fails_into_a_new_folder),
        TEST(disk_fails_over_a_model),
        TEST(memory_runs_out),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
