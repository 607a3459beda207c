#include "save.h"

#include "config.h"
#include "file.h"
#include "mem.h"
#include "ops.h"
#include "quant_state.h"
#include "safetensors.h"
#include "text.h"

#include <cjson/cJSON.h>
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define INDEX_NAME "model.safetensors.index.json"
#define COPY_MAX ((size_t)1 << 28) /* bytes of a tokenizer file; Llama 3's has 9 million */

/* What a folder needs beside weights and config; those that the source has are copied. */
static const char *const copied[] = {"tokenizer.json",
                                     "tokenizer_config.json",
                                     "special_tokens_map.json",
                                     "added_tokens.json",
                                     "tokenizer.model",
                                     "vocab.json",
                                     "merges.txt",
                                     "chat_template.jinja",
                                     "chat_template.json",
                                     "generation_config.json"};

#define COPIED (sizeof copied / sizeof *copied)

typedef struct {
    const char *folder, *source;
    const ql_save_entry *entries;
    size_t count;
    size_t *shard; /* [count]: shard of each entry, from 0 */
    size_t shards;
    uint64_t bytes;         /* of all tensors */
    bool made;              /* the folder was not there before */
    bool naming;            /* files are getting their final names */
    cJSON *map;             /* weight_map of the index, when there is one; borrowed */
    ql_st_writer **writers; /* [shards] */
    ql_file_writer copies[COPIED];
} job;

static ql_status no_memory(ql_err *err)
{
    return ql_err_set(err, QL_ERR_MEMORY, "out of memory for saving a model");
}

/* --- checks ----------------------------------------------------------------------------------------------
 */

static ql_status check_quantized(const ql_save_entry *e, ql_err *err)
{
    const ql_quant *q = e->matrix->quant;
    if (!ql_text_ends_with(e->name, ".weight"))
        return ql_err_set(err, QL_ERR_ARG, "'%s' is in 4 bits but its name does not end in .weight", e->name);
    if (strcmp(q->scheme, "nf4") == 0 || strcmp(q->scheme, "fp4") == 0) return QL_OK;
    ql_err_set(err, QL_ERR_UNSUPPORTED, "'%s' is quantized with a free code book, which cannot be saved",
               e->name);
    return ql_err_hint(err,
                       "bitsandbytes decodes by the names nf4 and fp4 and ignores the table in the file; "
                       "save an nf4 or fp4 model, or quantize again after loading");
}

static ql_status check_entries(const ql_save_entry *entries, size_t count, ql_err *err)
{
    for (size_t i = 0; i < count; i++) {
        const ql_save_entry *e = &entries[i];
        if (!e->name || !e->matrix == !e->tensor)
            return ql_err_set(err, QL_ERR_ARG, "entry %zu needs a name and one of matrix and tensor", i + 1);
        if (e->matrix && e->matrix->quant) {
            ql_status status = check_quantized(e, err);
            if (status != QL_OK) return status;
            continue;
        }
        const ql_tensor *t = e->matrix ? &e->matrix->data : e->tensor;
        if (!t->storage || !ql_dtype_is_weight(t->dtype) || !ql_dtype_is_weight(e->dtype))
            return ql_err_set(err, QL_ERR_ARG, "'%s' is not saved from and as float32, float16 or bfloat16",
                              e->name);
    }
    return QL_OK;
}

static bool is_model_file(const char *name)
{
    return strcmp(name, "config.json") == 0 || strcmp(name, INDEX_NAME) == 0 ||
           (ql_text_ends_with(name, ".safetensors") && strncmp(name, "model", 5) == 0);
}

/* mkdir -p, and whether the last part is new. */
static ql_status make_folder(const char *folder, bool *made, ql_err *err)
{
    ql_status status = QL_OK;
    *made = false;
    char *path = ql_strdup(folder);
    if (!path) return no_memory(err);
    for (char *p = path + 1;; p++) {
        if (*p && *p != '/') continue;
        char c = *p;
        *p = '\0';
        *made = mkdir(path, 0777) == 0;
        if (!*made && errno != EEXIST && !ql_file_is_folder(path)) {
            status = ql_err_set(err, QL_ERR_IO, "%s: the folder cannot be made: %s", path, strerror(errno));
            break;
        }
        *p = c;
        if (!c) break;
        while (p[1] == '/') p++;
        if (!p[1]) break; /* "folder/" */
    }
    ql_free(path);
    if (status == QL_OK && !ql_file_is_folder(folder))
        status = ql_err_set(err, QL_ERR_IO, "%s is not a folder", folder);
    return status;
}

static ql_status check_folder(const job *j, bool force, ql_err *err)
{
    struct stat a, b;
    if (stat(j->folder, &a) == 0 && stat(j->source, &b) == 0 && a.st_dev == b.st_dev && a.st_ino == b.st_ino)
        return ql_err_set(err, QL_ERR_ARG, "%s: a model is not saved over the one it was made from",
                          j->folder);
    DIR *d = opendir(j->folder);
    if (!d) return errno == ENOENT ? QL_OK : ql_err_set(err, QL_ERR_IO, "%s: %s", j->folder, strerror(errno));
    ql_status status = QL_OK;
    for (struct dirent *f; !force && status == QL_OK && (f = readdir(d));) {
        if (!is_model_file(f->d_name)) continue;
        ql_err_set(err, QL_ERR_IO, "%s already holds a model (%s)", j->folder, f->d_name);
        status = QL_ERR_IO;
        ql_err_hint(err, "give another folder, or ask for it to be replaced with force");
    }
    closedir(d);
    return status;
}

/* --- one tensor ------------------------------------------------------------------------------------------
 */

/* A part of an entry as it will be in the file; `data` is borrowed or, when `tensor` is set, that tensor's,
 * or, when `packed` is set, the codes of that matrix in their natural order. */
typedef struct {
    char name[QL_ST_NAME_MAX];
    ql_dtype dtype;
    int ndim;
    int64_t shape[QL_ST_DIMS];
    const ql_tensor *tensor;
    const ql_matrix *packed;
    ql_tensor view; /* what `tensor` may point to; shares no reference */
    const void *data;
    size_t bytes;
} part;

#define PARTS 6 /* codes, absmax, quant_map, nested_absmax, nested_quant_map, quant_state */

typedef struct {
    int count;
    part parts[PARTS];
    char state[512]; /* JSON */
} part_list;

static part *add_part(part_list *list, const ql_save_entry *e, const char *suffix, ql_dtype dtype,
                      const void *data, size_t bytes)
{
    part *p = &list->parts[list->count++];
    int n = snprintf(p->name, sizeof p->name, "%s%s", e->name, suffix);
    if (n < 0 || (size_t)n >= sizeof p->name) p->name[0] = '\0'; /* the writer refuses an empty name */
    p->dtype = dtype;
    p->ndim = 1;
    p->shape[0] = (int64_t)(bytes / ql_dtype_size(dtype));
    p->tensor = NULL;
    p->packed = NULL;
    p->data = data;
    p->bytes = bytes;
    return p;
}

/* Double-quantized scales: on the device, or on the host. */
static void list_nested(const ql_save_entry *e, part_list *list)
{
    const ql_matrix *m = e->matrix;
    const ql_quant *q = m->quant;
    part *absmax = add_part(list, e, ".absmax", QL_U8, q->absmax8, q->blocks);
    part *nested =
        add_part(list, e, ".nested_absmax", QL_F32, q->nested_absmax, q->nested_blocks * sizeof(float));
    if (m->nested.storage) {
        absmax->tensor = &m->absmax;
        nested->view = m->nested;
        nested->view.data = (char *)m->nested.data + 257 * sizeof(float);
        nested->view.shape[0] = (int64_t)q->nested_blocks;
        nested->tensor = &nested->view;
    }
    add_part(list, e, ".nested_quant_map", QL_F32, q->nested_map, sizeof q->nested_map);
}

static ql_status list_quantized(const ql_save_entry *e, part_list *list, ql_err *err)
{
    const ql_matrix *m = e->matrix;
    const ql_quant *q = m->quant;
    ql_quant_state state = {.block = q->block,
                            .dtype = q->value_dtype,
                            .shape = {m->n, m->k},
                            .nested = q->nested,
                            .nested_block = q->nested ? q->nested_block : 0,
                            .nested_offset = q->nested ? q->nested_offset : 0};
    memcpy(state.type, q->scheme, 4);
    size_t size;
    ql_status status = ql_quant_state_format(&state, list->state, sizeof list->state, &size, err);
    if (status != QL_OK) return status;

    part *codes = add_part(list, e, "", QL_U8, NULL, ql_tensor_bytes(&m->data));
    codes->tensor = &m->data;
    codes->packed = m->layout != 0 ? m : NULL;
    codes->ndim = 2;
    codes->shape[1] = 1;
    if (q->nested)
        list_nested(e, list);
    else
        add_part(list, e, ".absmax", QL_F32, NULL, ql_tensor_bytes(&m->absmax))->tensor = &m->absmax;
    add_part(list, e, ".quant_map", QL_F32, q->code, sizeof q->code);
    add_part(list, e,
             q->scheme[0] == 'n' ? ".quant_state.bitsandbytes__nf4" : ".quant_state.bitsandbytes__fp4", QL_U8,
             list->state, size);
    return QL_OK;
}

static ql_status list_parts(const ql_save_entry *e, part_list *list, ql_err *err)
{
    list->count = 0;
    if (e->matrix && e->matrix->quant) return list_quantized(e, list, err);
    const ql_tensor *t = e->matrix ? &e->matrix->data : e->tensor;
    part *p = add_part(list, e, "", e->dtype, NULL, (size_t)ql_tensor_count(t) * ql_dtype_size(e->dtype));
    p->tensor = t;
    p->ndim = t->ndim;
    for (int i = 0; i < t->ndim; i++) p->shape[i] = t->shape[i];
    return QL_OK;
}

/* Write a part whose bytes are on the device, converted where the file wants another dtype or order. */
static ql_status write_tensor(ql_st_writer *w, size_t index, const part *p, ql_err *err)
{
    ql_tensor converted = {0};
    const ql_tensor *t = p->tensor;
    void *copy = NULL;
    ql_status status = QL_OK;
    ql_device *dev = ql_tensor_device(t);
    if (p->packed || t->dtype != p->dtype) {
        status = ql_tensor_new(dev, NULL, QL_MEM_ACTIVATIONS, p->dtype, t->ndim, t->shape, &converted, err);
        if (status == QL_OK)
            status =
                p->packed ? ql_op_unpack4(p->packed, &converted, err) : ql_op_convert(t, &converted, err);
        if (status != QL_OK) goto fail;
        t = &converted;
    }
    const void *data = t->data;
    if (dev->backend != &ql_backend_cpu) {
        data = copy = ql_malloc(p->bytes);
        if (!copy) {
            status = no_memory(err);
            goto fail;
        }
        status = ql_tensor_download(t, copy, p->bytes, err);
    } else {
        status = dev->backend->sync(dev->ctx, err);
    }
    if (status == QL_OK) status = ql_st_writer_write(w, index, data, p->bytes, err);
fail:
    ql_free(copy);
    ql_tensor_free(&converted);
    return status;
}

/* --- files -----------------------------------------------------------------------------------------------
 */

static void shard_name(const job *j, size_t i, char name[64])
{
    if (j->shards == 1)
        snprintf(name, 64, "model.safetensors");
    else
        snprintf(name, 64, "model-%05zu-of-%05zu.safetensors", i + 1, j->shards);
}

/* Entries go to shards in their order; a weight and its companions stay together. */
static ql_status plan_shards(job *j, uint64_t limit, ql_err *err)
{
    part_list *list = ql_malloc(sizeof *list);
    j->shard = ql_calloc(j->count, sizeof *j->shard);
    ql_status status = list && j->shard ? QL_OK : no_memory(err);
    uint64_t used = 0;
    j->shards = 1;
    for (size_t i = 0; i < j->count && status == QL_OK; i++) {
        uint64_t bytes = 0;
        status = list_parts(&j->entries[i], list, err);
        if (status != QL_OK) break;
        for (int p = 0; p < list->count; p++) bytes += list->parts[p].bytes;
        if (used > 0 && bytes > limit - (used < limit ? used : limit)) {
            j->shards++;
            used = 0;
        }
        used += bytes;
        j->bytes += bytes;
        j->shard[i] = j->shards - 1;
    }
    ql_free(list);
    return status;
}

/* A shard complete but for its name: the folder shows nothing of it until ql_st_writer_finish. */
static ql_status write_shard(job *j, size_t shard, ql_err *err)
{
    char name[64];
    shard_name(j, shard, name);
    char *path = ql_file_join(j->folder, name);
    part_list *list = ql_malloc(sizeof *list);
    ql_status status = path && list ? ql_st_writer_open(path, &j->writers[shard], err) : no_memory(err);
    ql_st_writer *w = j->writers[shard];
    for (size_t i = 0; i < j->count && status == QL_OK; i++) {
        if (j->shard[i] != shard) continue;
        status = list_parts(&j->entries[i], list, err);
        for (int n = 0; n < list->count && status == QL_OK; n++) {
            const part *p = &list->parts[n];
            status = ql_st_writer_add(w, p->name, p->dtype, p->ndim, p->shape, NULL, err);
            if (status == QL_OK && j->map && !cJSON_AddStringToObject(j->map, p->name, name))
                status = no_memory(err);
        }
    }
    if (status == QL_OK) status = ql_st_writer_begin(w, err);
    size_t index = 0;
    for (size_t i = 0; i < j->count && status == QL_OK; i++) {
        if (j->shard[i] != shard) continue;
        status = list_parts(&j->entries[i], list, err);
        for (int n = 0; n < list->count && status == QL_OK; n++, index++) {
            const part *p = &list->parts[n];
            status = p->tensor ? write_tensor(w, index, p, err)
                               : ql_st_writer_write(w, index, p->data, p->bytes, err);
        }
    }
    ql_free(list);
    ql_free(path);
    return status;
}

static ql_status write_shards(job *j, cJSON **index, ql_err *err)
{
    ql_status status = QL_OK;
    j->writers = ql_calloc(j->shards, sizeof(ql_st_writer *));
    if (!j->writers) return no_memory(err);
    if (j->shards > 1) {
        *index = cJSON_CreateObject();
        cJSON *meta = cJSON_AddObjectToObject(*index, "metadata");
        j->map = cJSON_AddObjectToObject(*index, "weight_map");
        if (!j->map || !cJSON_AddNumberToObject(meta, "total_size", (double)j->bytes)) return no_memory(err);
    }
    for (size_t i = 0; i < j->shards && status == QL_OK; i++) status = write_shard(j, i, err);
    return status;
}

/* Give shards and index their names. */
static ql_status finish_shards(job *j, const cJSON *index, ql_err *err)
{
    ql_status status = QL_OK;
    for (size_t i = 0; i < j->shards && status == QL_OK; i++)
        status = ql_st_writer_finish(j->writers[i], err);
    if (status != QL_OK || !index) return status;
    char *text = cJSON_Print(index), *path = ql_file_join(j->folder, INDEX_NAME);
    status = text && path ? ql_file_write(path, text, strlen(text), err) : no_memory(err);
    cJSON_free(text);
    ql_free(path);
    return status;
}

static ql_status copy_file(const char *from, const char *to, ql_file_writer *writer, ql_err *err)
{
    char *data = NULL;
    size_t size = 0;
    ql_status status = ql_file_read(from, COPY_MAX, &data, &size, err);
    if (status == QL_OK) status = ql_file_create(to, writer, err);
    if (status == QL_OK) status = ql_file_pwrite(writer, 0, data, size, err);
    ql_free(data);
    return status;
}

/* As the shards: complete, but not yet under their names. */
static ql_status copy_files(job *j, ql_err *err)
{
    ql_status status = QL_OK;
    for (size_t i = 0; i < COPIED && status == QL_OK; i++) {
        char *from = ql_file_join(j->source, copied[i]), *to = ql_file_join(j->folder, copied[i]);
        if (!from || !to)
            status = no_memory(err);
        else if (ql_file_exists(from))
            status = copy_file(from, to, &j->copies[i], err);
        ql_free(from);
        ql_free(to);
    }
    return status;
}

static ql_status finish_copies(job *j, ql_err *err)
{
    ql_status status = QL_OK;
    for (size_t i = 0; i < COPIED && status == QL_OK; i++) {
        if (j->copies[i].path) status = ql_file_commit(&j->copies[i], err);
    }
    return status;
}

static void remove_in(const char *folder, const char *name)
{
    char *path = ql_file_join(folder, name);
    if (path) unlink(path);
    ql_free(path);
}

/* Shards and index of a model that this one replaces: a loader would take them for part of it. */
static void remove_stale(const job *j)
{
    DIR *d = opendir(j->folder);
    if (!d) return;
    for (struct dirent *f; (f = readdir(d));) {
        if (!is_model_file(f->d_name) || strcmp(f->d_name, "config.json") == 0) continue;
        bool ours = j->shards > 1 && strcmp(f->d_name, INDEX_NAME) == 0;
        for (size_t i = 0; i < j->shards && !ours; i++) {
            char name[64];
            shard_name(j, i, name);
            ours = strcmp(f->d_name, name) == 0;
        }
        if (!ours) unlinkat(dirfd(d), f->d_name, 0);
    }
    closedir(d);
}

/* After a failure: what has its name already is part of no model. A name may be there although giving it
 * failed, when the folder could not be synced. */
static void undo(const job *j)
{
    for (size_t i = 0; j->naming && i < j->shards; i++) {
        char name[64];
        shard_name(j, i, name);
        remove_in(j->folder, name);
    }
    if (j->naming) {
        remove_in(j->folder, INDEX_NAME);
        remove_in(j->folder, "config.json");
    }
    if (!j->made) return;
    for (size_t i = 0; i < COPIED; i++) remove_in(j->folder, copied[i]);
    rmdir(j->folder);
}

/* --- config ----------------------------------------------------------------------------------------------
 */

/* The quantization_config that makes transformers build 4-bit layers where this model has them and nowhere
 * else. Its default is "all linears but lm_head"; a model that differs lists every matrix that stays, and
 * lm_head by name also when it is tied and so not among the entries. */
static ql_status quant_config(const job *j, ql_quant_config *c, ql_err *err)
{
    bool head_is_4bit = false, kept_linear = false;
    memset(c, 0, sizeof *c);
    for (size_t i = 0; i < j->count; i++) {
        const ql_save_entry *e = &j->entries[i];
        if (!e->matrix) continue;
        bool head = strcmp(e->name, "lm_head.weight") == 0;
        const ql_quant *q = e->matrix->quant;
        if (!q) {
            if (!head && !ql_text_ends_with(e->name, "embed_tokens.weight")) kept_linear = true;
            continue;
        }
        if (head) head_is_4bit = true;
        if (c->present) continue;
        c->present = true;
        memcpy(c->type, q->scheme, 4);
        c->double_quant = q->nested;
        c->compute_dtype = q->value_dtype;
        c->storage = QL_U8;
    }
    if (!c->present || (!head_is_4bit && !kept_linear)) return QL_OK;
    c->skip = ql_calloc(j->count + 1, sizeof *c->skip);
    if (!c->skip) return no_memory(err);
    c->has_skip = true;
    if (!head_is_4bit && !(c->skip[c->skip_count++] = ql_strdup("lm_head"))) return no_memory(err);
    for (size_t i = 0; i < j->count; i++) {
        const ql_save_entry *e = &j->entries[i];
        if (!e->matrix || e->matrix->quant || strcmp(e->name, "lm_head.weight") == 0) continue;
        size_t n = strlen(e->name) - (ql_text_ends_with(e->name, ".weight") ? strlen(".weight") : 0);
        if (!(c->skip[c->skip_count++] = ql_strndup(e->name, n))) return no_memory(err);
    }
    return QL_OK;
}

static void quant_config_free(ql_quant_config *c)
{
    for (size_t i = 0; i < c->skip_count; i++) ql_free(c->skip[i]);
    ql_free(c->skip);
}

ql_status ql_save_model(const char *folder, const ql_save_entry *entries, size_t count,
                        const ql_save_options *options, ql_err *err)
{
    job j = {.folder = folder, .source = options->source, .entries = entries, .count = count};
    ql_quant_config quant = {0};
    cJSON *index = NULL;
    char *from = ql_file_join(options->source, "config.json"), *to = ql_file_join(folder, "config.json");
    ql_status status = from && to ? check_entries(entries, count, err) : no_memory(err);
    if (status == QL_OK && !*folder)
        status = ql_err_set(err, QL_ERR_ARG, "the folder to save to has no name");
    if (status == QL_OK && !ql_file_exists(from))
        status = ql_err_set(err, QL_ERR_NOT_FOUND, "%s: the model's config is not there", from);
    if (status == QL_OK) status = check_folder(&j, options->force, err);
    if (status == QL_OK)
        status = plan_shards(&j, options->shard_bytes ? options->shard_bytes : QL_SAVE_SHARD_BYTES, err);
    if (status == QL_OK) status = quant_config(&j, &quant, err);
    if (status == QL_OK) status = make_folder(folder, &j.made, err);
    if (status != QL_OK) goto fail;

    status = write_shards(&j, &index, err);
    if (status == QL_OK) status = copy_files(&j, err);
    /* From here on the folder is no model until the new config is there. */
    j.naming = status == QL_OK;
    if (j.naming && !j.made) unlink(to);
    if (status == QL_OK) status = finish_copies(&j, err);
    if (status == QL_OK) status = finish_shards(&j, index, err);
    if (status == QL_OK && !j.made) remove_stale(&j);
    if (status == QL_OK) status = ql_config_save(from, to, &quant, err);
    for (size_t i = 0; j.writers && i < j.shards; i++) ql_st_writer_close(j.writers[i]);
    for (size_t i = 0; i < COPIED; i++) ql_file_abort(&j.copies[i]);
    if (status != QL_OK) undo(&j);
fail:
    cJSON_Delete(index);
    ql_free(j.writers);
    quant_config_free(&quant);
    ql_free(j.shard);
    ql_free(from);
    ql_free(to);
    return status;
}
