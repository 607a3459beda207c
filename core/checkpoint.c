#include "checkpoint.h"
#include "backend.h"
#include "file.h"
#include "interrupt.h"
#include "json.h"
#include "json_scan.h"
#include "mem.h"
#include "text.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INDEX_NAME "model.safetensors.index.json"
#define INDEX_LIMIT ((size_t)64 << 20) /* bytes of an index; the largest known have under 10 MB */
#define SHARD_LIMIT 1024               /* each stays open */
#define STATE_LIMIT 4096               /* bytes of a quant_state; bitsandbytes writes under 200 */
#define STATE_SUFFIX ".quant_state.bitsandbytes__"
#define HASH_CHUNK ((size_t)1 << 20)
#define PIECE ((size_t)8 << 20) /* bytes of a tensor that are read at a time */

struct ql_checkpoint {
    char *path;
    ql_st **shards; /* by name */
    size_t shard_count;
    size_t *first;              /* [shard_count + 1] tensors in the shards before */
    char sha256[QL_SHA256_HEX]; /* "" until computed */
};

static ql_status no_memory(const char *path, ql_err *err)
{
    return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to open it", path);
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

static ql_status allocate(ql_checkpoint *ck, size_t shards, ql_err *err)
{
    ck->shards = ql_calloc(shards, sizeof *ck->shards);
    ck->first = ql_calloc(shards + 1, sizeof *ck->first);
    return ck->shards && ck->first ? QL_OK : no_memory(ck->path, err);
}

static ql_status add_shard(ql_checkpoint *ck, const char *path, ql_err *err)
{
    ql_status status = ql_st_open(path, &ck->shards[ck->shard_count], err);
    if (status) return status;
    size_t count = ql_st_count(ck->shards[ck->shard_count++]);
    ck->first[ck->shard_count] = ck->first[ck->shard_count - 1] + count;
    return QL_OK;
}

/* A name that cannot lead out of the folder. */
static bool shard_name_ok(const char *name)
{
    static const char suffix[] = ".safetensors";
    size_t n = strlen(name), m = sizeof suffix - 1;
    if (n <= m || n > 255 || name[0] == '.' || strcmp(name + n - m, suffix)) return false;
    for (const char *p = name; *p; p++)
        if (*p == '/' || *p == '\\' || (unsigned char)*p < 0x20) return false;
    return true;
}

static int compare_names(const void *a, const void *b)
{
    const char *const *x = a, *const *y = b;
    return strcmp(*x, *y);
}

/* The distinct shard names of weight_map, sorted; borrowed from it. The caller frees *names. */
static ql_status shard_names(const cJSON *map, const char *index, const char ***names, size_t *count,
                             ql_err *err)
{
    char text[QL_JSON_SHOWN];
    size_t entries = 0, unique = 0;
    const cJSON *item;
    cJSON_ArrayForEach(item, map) entries++;
    const char **list = ql_malloc(entries * sizeof *list);
    if (!list) return no_memory(index, err);
    ql_status status = QL_OK;
    entries = 0;
    cJSON_ArrayForEach(item, map)
    {
        const char *name = cJSON_IsString(item) ? item->valuestring : "";
        if (!shard_name_ok(name)) {
            status = ql_err_set(err, QL_ERR_FORMAT,
                                "%s: weight_map.%s is \"%.100s\", not the bare name of a "
                                ".safetensors file",
                                index, ql_json_shown(item->string, strlen(item->string), text), name);
            goto fail;
        }
        list[entries++] = name;
    }
    qsort(list, entries, sizeof *list, compare_names);
    for (size_t i = 0; i < entries; i++)
        if (unique == 0 || strcmp(list[unique - 1], list[i])) list[unique++] = list[i];
    if (unique == 0 || unique > SHARD_LIMIT) {
        status = ql_err_set(err, QL_ERR_FORMAT, "%s: weight_map names %zu shards, expected 1 to %d", index,
                            unique, SHARD_LIMIT);
        goto fail;
    }
    *names = list;
    *count = unique;
    return QL_OK;

fail:
    ql_free(list);
    return status;
}

/* Index of a tensor among those of all shards. */
static size_t position(const ql_checkpoint *ck, size_t shard, const ql_st_tensor *tensor)
{
    return ck->first[shard] + (size_t)(tensor - ql_st_at(ck->shards[shard], 0));
}

static size_t shard_of(const ql_checkpoint *ck, const ql_st_tensor *tensor)
{
    for (size_t i = 0; i < ck->shard_count; i++) {
        const ql_st_tensor *first = ql_st_at(ck->shards[i], 0);
        if (first && tensor >= first && tensor < first + ql_st_count(ck->shards[i])) return i;
    }
    return 0;
}

/* A tensor that lies in a shard without the index saying so. */
static ql_status unclaimed(const ql_checkpoint *ck, const char *index, const uint8_t *claimed, ql_err *err)
{
    char text[QL_JSON_SHOWN];
    for (size_t i = 0; i < ck->first[ck->shard_count]; i++) {
        if (claimed[i]) continue;
        const ql_st_tensor *tensor = ql_checkpoint_at(ck, i);
        size_t mine = shard_of(ck, tensor);
        ql_json_shown(tensor->name, strlen(tensor->name), text);
        const char *file = base_name(ql_st_path(ck->shards[mine]));
        for (size_t j = 0; j < ck->shard_count; j++)
            if (j != mine && ql_st_find(ck->shards[j], tensor->name))
                return ql_err_set(err, QL_ERR_FORMAT, "%s: tensor \"%s\" lies in two shards, %s and %s",
                                  index, text, file, base_name(ql_st_path(ck->shards[j])));
        return ql_err_set(err, QL_ERR_FORMAT, "%s: tensor \"%s\" lies in %s, but weight_map does not name it",
                          index, text, file);
    }
    return QL_OK;
}

/* Index and shards must say the same. */
static ql_status check_map(const ql_checkpoint *ck, const cJSON *map, const char *const *names,
                           const char *index, ql_err *err)
{
    char text[QL_JSON_SHOWN];
    ql_status status = QL_OK;
    size_t total = ck->first[ck->shard_count];
    uint8_t *claimed = ql_calloc(total, 1);
    if (!claimed) return no_memory(index, err);
    const cJSON *item;
    cJSON_ArrayForEach(item, map)
    {
        const char *name = item->valuestring;
        const char *const *found = bsearch(&name, names, ck->shard_count, sizeof *names, compare_names);
        size_t shard = (size_t)(found - names);
        const ql_st_tensor *tensor = ql_st_find(ck->shards[shard], item->string);
        if (!tensor) {
            status =
                ql_err_set(err, QL_ERR_FORMAT, "%s: weight_map puts tensor \"%s\" into %s, which lacks it",
                           index, ql_json_shown(item->string, strlen(item->string), text), name);
            goto fail;
        }
        claimed[position(ck, shard, tensor)] = 1;
    }
    status = unclaimed(ck, index, claimed, err);
fail:
    ql_free(claimed);
    return status;
}

static ql_status open_shards(ql_checkpoint *ck, const cJSON *map, const char *index, ql_err *err)
{
    const char **names = NULL;
    size_t count = 0;
    ql_status status = shard_names(map, index, &names, &count, err);
    if (!status) status = allocate(ck, count, err);
    for (size_t i = 0; i < count && !status; i++) {
        char *path = ql_file_join(ck->path, names[i]);
        status = path ? add_shard(ck, path, err) : no_memory(ck->path, err);
        if (status == QL_ERR_NOT_FOUND) {
            ql_err_set(err, status, "%s: shard %s, named by %s, is not there", ck->path, names[i],
                       INDEX_NAME);
            if (err) ql_err_hint(err, "the download is incomplete: fetch %s again", names[i]);
        }
        ql_free(path);
    }
    if (!status) status = check_map(ck, map, names, index, err);
    ql_free(names);
    return status;
}

static ql_status open_index(ql_checkpoint *ck, const char *index, ql_err *err)
{
    cJSON *root = NULL;
    ql_status status = ql_json_load(index, INDEX_LIMIT, &root, err);
    if (status) return status;
    const cJSON *map = ql_json_get(root, "weight_map");
    if (cJSON_IsObject(map))
        status = open_shards(ck, map, index, err);
    else
        status = ql_err_set(err, QL_ERR_FORMAT, "%s: weight_map is missing or not an object", index);
    cJSON_Delete(root);
    return status;
}

/* Say what lies in a folder that has no weights qlua reads. */
static ql_status explain_folder(const char *folder, ql_err *err)
{
    char found[128] = "";
    const char *hint =
        "a model folder holds config.json, tokenizer.json and model.safetensors; download it whole";
    DIR *dir = opendir(folder);
    for (const struct dirent *item; dir && !found[0] && (item = readdir(dir));) {
        const char *name = item->d_name;
        if (strcmp(name, "adapter_model.safetensors") == 0)
            hint = "this is a LoRA adapter: merge it into its base model and save that";
        else if (ql_text_ends_with(name, ".safetensors"))
            hint = "name the file itself, or call it model.safetensors";
        else if (ql_text_ends_with(name, ".bin") && strncmp(name, "pytorch_model", 13) == 0)
            hint = "save the model again with save_pretrained(..., safe_serialization=True)";
        else if (ql_text_ends_with(name, ".gguf"))
            hint = "qlua reads safetensors: use the Hugging Face folder that the GGUF was made from";
        else if (ql_text_ends_with(name, ".pth"))
            hint = "these are Meta's original files: use the Hugging Face folder of the same model";
        else
            continue;
        snprintf(found, sizeof found, ", only %.100s", name);
    }
    if (dir) closedir(dir);
    ql_err_set(err, QL_ERR_NOT_FOUND, "%s: no model.safetensors or %s here%s", folder, INDEX_NAME, found);
    if (err) ql_err_hint(err, "%s", hint);
    return QL_ERR_NOT_FOUND;
}

static ql_status open_folder(ql_checkpoint *ck, ql_err *err)
{
    char *single = ql_file_join(ck->path, "model.safetensors"), *index = ql_file_join(ck->path, INDEX_NAME);
    ql_status status;
    if (!single || !index) {
        status = no_memory(ck->path, err);
    } else if (ql_file_exists(single)) {
        status = allocate(ck, 1, err);
        if (!status) status = add_shard(ck, single, err);
    } else if (ql_file_exists(index)) {
        status = open_index(ck, index, err);
    } else {
        status = explain_folder(ck->path, err);
    }
    ql_free(single);
    ql_free(index);
    return status;
}

ql_status ql_checkpoint_open(const char *path, ql_checkpoint **out, ql_err *err)
{
    ql_status status;
    *out = NULL;
    ql_checkpoint *ck = ql_calloc(1, sizeof *ck);
    if (!ck) return no_memory(path, err);
    ck->path = ql_strdup(path);
    if (!ck->path) {
        status = no_memory(path, err);
    } else if (ql_file_is_folder(path)) {
        status = open_folder(ck, err);
    } else if (!ql_file_exists(path)) {
        status = ql_err_set(err, QL_ERR_NOT_FOUND, "%s: no such file or folder", path);
        if (err) ql_err_hint(err, "name a model folder or a .safetensors file");
    } else {
        status = allocate(ck, 1, err);
        if (!status) status = add_shard(ck, path, err);
    }
    if (status) {
        ql_checkpoint_close(ck);
        return status;
    }
    *out = ck;
    return QL_OK;
}

void ql_checkpoint_close(ql_checkpoint *ck)
{
    if (!ck) return;
    for (size_t i = 0; i < ck->shard_count; i++) ql_st_close(ck->shards[i]);
    ql_free(ck->shards);
    ql_free(ck->first);
    ql_free(ck->path);
    ql_free(ck);
}

const char *ql_checkpoint_path(const ql_checkpoint *ck)
{
    return ck->path;
}

size_t ql_checkpoint_files(const ql_checkpoint *ck)
{
    return ck->shard_count;
}

uint64_t ql_checkpoint_bytes(const ql_checkpoint *ck)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < ck->shard_count; i++)
        for (size_t j = 0; j < ql_st_count(ck->shards[i]); j++)
            bytes += ql_st_tensor_bytes(ql_st_at(ck->shards[i], j));
    return bytes;
}

size_t ql_checkpoint_count(const ql_checkpoint *ck)
{
    return ck->first[ck->shard_count];
}

const ql_st_tensor *ql_checkpoint_at(const ql_checkpoint *ck, size_t index)
{
    if (index >= ck->first[ck->shard_count]) return NULL;
    size_t low = 0, high = ck->shard_count; /* first[low] <= index < first[high] */
    while (high - low > 1) {
        size_t middle = low + (high - low) / 2;
        if (ck->first[middle] <= index)
            low = middle;
        else
            high = middle;
    }
    return ql_st_at(ck->shards[low], index - ck->first[low]);
}

const ql_st_tensor *ql_checkpoint_find(const ql_checkpoint *ck, const char *name)
{
    const ql_st_tensor *tensor = NULL;
    for (size_t i = 0; i < ck->shard_count && !tensor; i++) tensor = ql_st_find(ck->shards[i], name);
    return tensor;
}

ql_status ql_checkpoint_need(const ql_checkpoint *ck, const char *name, const ql_st_tensor **tensor,
                             ql_err *err)
{
    *tensor = ql_checkpoint_find(ck, name);
    if (*tensor) return QL_OK;
    return ql_err_set(err, QL_ERR_NOT_FOUND, "%s: there is no tensor \"%.200s\"", ck->path, name);
}

const char *ql_checkpoint_file(const ql_checkpoint *ck, const ql_st_tensor *tensor)
{
    return ql_st_path(ck->shards[shard_of(ck, tensor)]);
}

ql_status ql_checkpoint_read(const ql_checkpoint *ck, const ql_st_tensor *tensor, uint64_t offset,
                             size_t bytes, void *dst, ql_err *err)
{
    return ql_st_read(ck->shards[shard_of(ck, tensor)], tensor, offset, bytes, dst, err);
}

/* The CPU's memory is read into directly; others get copies on the way. */
ql_status ql_checkpoint_fill(const ql_checkpoint *ck, const ql_st_tensor *from, ql_tensor *to, ql_err *err)
{
    size_t total = ql_tensor_bytes(to);
    ql_device *dev = ql_tensor_device(to);
    bool direct = dev->backend == &ql_backend_cpu;
    char *copy = direct ? NULL : ql_malloc(total < PIECE ? total : PIECE);
    ql_status status = direct || copy ? QL_OK : no_memory(ck->path, err);
    for (size_t at = 0; at < total && !status; at += PIECE) {
        size_t n = total - at < PIECE ? total - at : PIECE;
        char *there = (char *)to->data + at;
        status = ql_interrupt_check(err);
        if (!status) status = ql_checkpoint_read(ck, from, at, n, direct ? there : copy, err);
        if (!status && !direct) status = dev->backend->upload(dev->ctx, there, copy, n, err);
    }
    ql_free(copy);
    return status;
}

/* The quant_state tensor of weight name[0 .. size), for one type. */
static const ql_st_tensor *find_state(const ql_checkpoint *ck, const char *name, size_t size,
                                      const char *type)
{
    char key[QL_ST_NAME_MAX + 64];
    if (size > QL_ST_NAME_MAX) return NULL;
    snprintf(key, sizeof key, "%.*s%s%s", (int)size, name, STATE_SUFFIX, type);
    return ql_checkpoint_find(ck, key);
}

static bool quantized(const ql_checkpoint *ck, const char *name, size_t size)
{
    return find_state(ck, name, size, "nf4") || find_state(ck, name, size, "fp4");
}

bool ql_checkpoint_is_quantized(const ql_checkpoint *ck, const char *name)
{
    return quantized(ck, name, strlen(name));
}

bool ql_checkpoint_is_companion(const ql_checkpoint *ck, const char *name)
{
    static const char *const suffixes[] = {".absmax",           ".quant_map",       ".nested_absmax",
                                           ".nested_quant_map", STATE_SUFFIX "nf4", STATE_SUFFIX "fp4"};
    for (size_t i = 0; i < sizeof suffixes / sizeof *suffixes; i++)
        if (ql_text_ends_with(name, suffixes[i]) && quantized(ck, name, strlen(name) - strlen(suffixes[i])))
            return true;
    return false;
}

/* A companion tensor: of that dtype and that many elements. */
static ql_status companion(const ql_checkpoint *ck, const char *name, const char *suffix, ql_dtype dtype,
                           int64_t elements, const ql_st_tensor **tensor, ql_err *err)
{
    char key[QL_ST_NAME_MAX + 64];
    snprintf(key, sizeof key, "%.*s%s", QL_ST_NAME_MAX, name, suffix);
    ql_status status = ql_checkpoint_need(ck, key, tensor, err);
    if (status) {
        if (err) ql_err_hint(err, "\"%.200s\" is stored in 4 bits and cannot be decoded without it", name);
        return QL_ERR_FORMAT;
    }
    int64_t stored = ql_st_tensor_elements(*tensor);
    if ((*tensor)->dtype == dtype && stored == elements) return QL_OK;
    return ql_err_set(
        err, QL_ERR_FORMAT,
        "%s: tensor \"%.200s\" is %s with %lld elements, expected %s with %lld from its quant_state",
        ql_checkpoint_file(ck, *tensor), key, ql_dtype_name((*tensor)->dtype), (long long)stored,
        ql_dtype_name(dtype), (long long)elements);
}

static ql_status read_state(const ql_checkpoint *ck, const char *name, ql_quant_state *state, ql_err *err)
{
    char text[STATE_LIMIT + 1];
    size_t n = strlen(name);
    const ql_st_tensor *nf4 = find_state(ck, name, n, "nf4"), *fp4 = find_state(ck, name, n, "fp4");
    const ql_st_tensor *tensor = nf4 ? nf4 : fp4;
    if (!tensor)
        return ql_err_set(err, QL_ERR_NOT_FOUND, "%s: tensor \"%.200s\" is not stored in 4 bits", ck->path,
                          name);
    const char *file = ql_checkpoint_file(ck, tensor);
    if (nf4 && fp4)
        return ql_err_set(err, QL_ERR_FORMAT, "%s: tensor \"%.200s\" has both an nf4 and an fp4 quant_state",
                          file, name);
    uint64_t bytes = ql_st_tensor_bytes(tensor);
    if (tensor->dtype != QL_U8 || bytes > STATE_LIMIT)
        return ql_err_set(err, QL_ERR_FORMAT,
                          "%s: tensor \"%.200s\" is %s with %llu bytes, expected U8 with JSON", file,
                          tensor->name, ql_dtype_name(tensor->dtype), (unsigned long long)bytes);
    ql_status status = ql_checkpoint_read(ck, tensor, 0, (size_t)bytes, text, err);
    if (status) return status;
    text[bytes] = '\0';
    return ql_quant_state_parse(text, (size_t)bytes, file, tensor->name, nf4 ? "nf4" : "fp4", state, err);
}

ql_status ql_checkpoint_quant(const ql_checkpoint *ck, const char *name, ql_quant_tensor *quant, ql_err *err)
{
    ql_quant_tensor q = {0};
    memset(quant, 0, sizeof *quant);
    ql_status status = read_state(ck, name, &q.state, err);
    if (!status) status = ql_checkpoint_need(ck, name, &q.weight, err);
    if (status) return status;
    int64_t bytes = ql_quant_state_bytes(&q.state);
    if (ql_st_tensor_bytes(q.weight) != (uint64_t)bytes)
        return ql_err_set(
            err, QL_ERR_FORMAT,
            "%s: tensor \"%.200s\" has %llu bytes, but its quant_state's shape [%lld, %lld] makes %lld",
            ql_checkpoint_file(ck, q.weight), name, (unsigned long long)ql_st_tensor_bytes(q.weight),
            (long long)q.state.shape[0], (long long)q.state.shape[1], (long long)bytes);
    int64_t blocks = ql_quant_state_blocks(&q.state);
    status = companion(ck, name, ".absmax", q.state.nested ? QL_U8 : QL_F32, blocks, &q.absmax, err);
    if (!status) status = companion(ck, name, ".quant_map", QL_F32, QL_QUANT_MAP, &q.map, err);
    if (!status && q.state.nested) {
        int64_t nested = ql_quant_state_nested(&q.state);
        status = companion(ck, name, ".nested_absmax", QL_F32, nested, &q.nested, err);
        if (!status)
            status =
                companion(ck, name, ".nested_quant_map", QL_F32, QL_QUANT_NESTED_MAP, &q.nested_map, err);
    }
    if (!status) *quant = q;
    return status;
}

static ql_status hash_file(const ql_st *st, char *chunk, char hex[QL_SHA256_HEX], ql_err *err)
{
    ql_sha256 sha;
    ql_status status = ql_sha256_open(&sha, err);
    uint64_t size = ql_st_file_bytes(st);
    for (uint64_t at = 0; at < size && !status;) {
        size_t n = size - at < HASH_CHUNK ? (size_t)(size - at) : HASH_CHUNK;
        status = ql_interrupt_check(err);
        if (!status) status = ql_st_read_file(st, at, n, chunk, err);
        if (!status) status = ql_sha256_update(&sha, chunk, n, err);
        at += n;
    }
    if (!status) status = ql_sha256_finish(&sha, hex, err);
    ql_sha256_close(&sha);
    return status;
}

ql_status ql_checkpoint_sha256(ql_checkpoint *ck, char hex[QL_SHA256_HEX], ql_err *err)
{
    ql_sha256 list = {0};
    hex[0] = '\0';
    if (ck->sha256[0]) {
        memcpy(hex, ck->sha256, QL_SHA256_HEX);
        return QL_OK;
    }
    char *chunk = ql_malloc(HASH_CHUNK), one[QL_SHA256_HEX] = "";
    ql_status status = chunk ? ql_sha256_open(&list, err) : no_memory(ck->path, err);
    for (size_t i = 0; i < ck->shard_count && !status; i++) {
        const char *name = base_name(ql_st_path(ck->shards[i]));
        status = hash_file(ck->shards[i], chunk, one, err);
        if (!status) status = ql_sha256_update(&list, one, QL_SHA256_HEX - 1, err);
        if (!status) status = ql_sha256_update(&list, "  ", 2, err);
        if (!status) status = ql_sha256_update(&list, name, strlen(name), err);
        if (!status) status = ql_sha256_update(&list, "\n", 1, err);
    }
    if (!status && ck->shard_count > 1) status = ql_sha256_finish(&list, one, err);
    if (!status) {
        memcpy(ck->sha256, one, QL_SHA256_HEX);
        memcpy(hex, one, QL_SHA256_HEX);
    }
    ql_sha256_close(&list);
    ql_free(chunk);
    return status;
}
