/* From tokenizer.json, tokenizer_config.json and special_tokens_map.json to a
 * tokenizer. */
#include <stdio.h>

#include "file.h"
#include "tokenizer_steps.h"

static ql_status out_of_memory(ql_err *err)
{
    return ql_err_set(err, QL_ERR_MEMORY, "out of memory for the tokenizer");
}

static ql_status read_model_flags(const cJSON *model, ql_tokenizer *t, ql_err *err)
{
    const char *type;
    ql_status status = ql_tok_json_string(model, "model", "type", "BPE", &type, err);
    if (status == QL_OK)
        status = ql_tok_json_bool(model, "model", "byte_fallback", false, &t->byte_fallback, err);
    if (status == QL_OK) status = ql_tok_json_bool(model, "model", "fuse_unk", false, &t->fuse_unk, err);
    if (status == QL_OK)
        status = ql_tok_json_bool(model, "model", "ignore_merges", false, &t->ignore_merges, err);
    if (status != QL_OK) return status;
    if (strcmp(type, "BPE") != 0) {
        ql_err_set(err, QL_ERR_UNSUPPORTED, "model.type: \"%.40s\" is not supported", type);
        return ql_err_hint(err, "qlua runs BPE tokenizers, which all models of the Llama family have");
    }
    const cJSON *dropout = ql_tok_json_get(model, "dropout");
    if (dropout != NULL && !(cJSON_IsNumber(dropout) && dropout->valuedouble == 0))
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "model.dropout: random merges are not supported");
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    for (size_t i = 0; i < 2; i++) {
        const cJSON *affix = ql_tok_json_get(model, affixes[i]);
        if (affix != NULL && !(cJSON_IsString(affix) && affix->valuestring[0] == '\0'))
            return ql_err_set(err, QL_ERR_UNSUPPORTED, "model.%s is not supported", affixes[i]);
    }
    return QL_OK;
}

/* How much room a list of tokens needs. */
typedef struct {
    size_t count, bytes;
    int32_t max_id;
} extent;

static ql_status measure_vocab(const cJSON *vocab, extent *e, ql_err *err)
{
    for (const cJSON *item = vocab->child; item != NULL; item = item->next) {
        int32_t id;
        if (!ql_tok_json_index(item, QL_TOK_MAX_ID - 1, &id))
            return ql_err_set(err, QL_ERR_FORMAT,
                              "model.vocab: id of \"%.60s\" is not an integer from 0 to %d", item->string,
                              (int)QL_TOK_MAX_ID - 1);
        if (id > e->max_id) e->max_id = id;
        e->count++;
        e->bytes += strlen(item->string);
    }
    return QL_OK;
}

static ql_status measure_added(const cJSON *added, extent *e, ql_err *err)
{
    size_t index = 0;
    for (const cJSON *item = added != NULL ? added->child : NULL; item != NULL; item = item->next, index++) {
        char where[48];
        const char *content;
        int32_t id;
        snprintf(where, sizeof where, "added_tokens[%zu]", index);
        ql_status status = ql_tok_json_string(item, where, "content", NULL, &content, err);
        if (status == QL_OK) status = ql_tok_json_int(item, where, "id", QL_TOK_MAX_ID - 1, &id, err);
        if (status != QL_OK) return status;
        if (content[0] == '\0') return ql_err_set(err, QL_ERR_FORMAT, "%s.content: empty", where);
        if (id > e->max_id) e->max_id = id;
        e->count++;
        e->bytes += strlen(content);
    }
    return QL_OK;
}

static ql_status read_vocab(const cJSON *model, const cJSON *added, ql_tokenizer *t, ql_err *err)
{
    extent e = {.max_id = -1};
    const cJSON *vocab = ql_tok_json_get(model, "vocab"), *merges = ql_tok_json_get(model, "merges");
    if (!cJSON_IsObject(vocab)) return ql_err_set(err, QL_ERR_FORMAT, "model.vocab: not an object");
    if (!cJSON_IsArray(merges)) return ql_err_set(err, QL_ERR_FORMAT, "model.merges: not an array");
    if (added != NULL && !cJSON_IsArray(added))
        return ql_err_set(err, QL_ERR_FORMAT, "added_tokens: not an array");
    ql_status status = measure_vocab(vocab, &e, err);
    if (status == QL_OK) status = measure_added(added, &e, err);
    if (status != QL_OK) return status;
    if (e.max_id < 0) return ql_err_set(err, QL_ERR_FORMAT, "model.vocab: empty");
    status =
        ql_tok_vocab_init(&t->vocab, e.max_id + 1, e.count, e.bytes, (size_t)cJSON_GetArraySize(merges), err);
    if (status != QL_OK) return status;
    for (const cJSON *item = vocab->child; item != NULL; item = item->next) {
        status = ql_tok_vocab_put(&t->vocab, (int32_t)item->valuedouble, item->string, strlen(item->string),
                                  QL_TOK_MODEL, err);
        if (status != QL_OK) {
            ql_err_prefix(err, "model.vocab: ");
            return status;
        }
    }
    return QL_OK;
}

/* The two halves of a merge, "a b" or ["a", "b"]. */
static bool merge_halves(const cJSON *item, const char **left, size_t *left_len, const char **right)
{
    if (cJSON_IsString(item)) {
        const char *space = strchr(item->valuestring, ' ');
        if (space == NULL || strchr(space + 1, ' ') != NULL) return false;
        *left = item->valuestring;
        *left_len = (size_t)(space - item->valuestring);
        *right = space + 1;
        return true;
    }
    const cJSON *a = cJSON_IsArray(item) ? item->child : NULL;
    const cJSON *b = a != NULL ? a->next : NULL;
    if (b == NULL || b->next != NULL || !cJSON_IsString(a) || !cJSON_IsString(b)) return false;
    *left = a->valuestring;
    *left_len = strlen(a->valuestring);
    *right = b->valuestring;
    return true;
}

static ql_status read_merge(const cJSON *item, uint32_t rank, ql_tok_buf *joined, ql_tok_vocab *v,
                            ql_err *err)
{
    const char *left, *right;
    size_t left_len;
    if (!merge_halves(item, &left, &left_len, &right))
        return ql_err_set(err, QL_ERR_FORMAT, "neither \"a b\" nor [\"a\", \"b\"]");
    size_t right_len = strlen(right);
    joined->n = 0;
    ql_status status = ql_tok_buf_add(joined, left, left_len, err);
    if (status == QL_OK) status = ql_tok_buf_add(joined, right, right_len, err);
    if (status != QL_OK) return status;
    int32_t a = ql_tok_vocab_find_model(v, left, left_len), b = ql_tok_vocab_find_model(v, right, right_len);
    int32_t id = ql_tok_vocab_find_model(v, joined->p, joined->n);
    if (a < 0 || b < 0 || id < 0) {
        const char *missing = a < 0 ? left : b < 0 ? right : joined->p;
        size_t len = a < 0 ? left_len : b < 0 ? right_len : joined->n;
        return ql_err_set(err, QL_ERR_FORMAT, "token \"%.*s\" is not in the vocabulary",
                          (int)(len < 60 ? len : 60), missing);
    }
    ql_tok_vocab_put_merge(v, a, b, rank, id);
    return QL_OK;
}

static ql_status read_merges(const cJSON *merges, ql_tok_vocab *v, ql_err *err)
{
    ql_tok_buf joined = {0};
    uint32_t rank = 0;
    ql_status status = ql_tok_buf_add(&joined, " ", 1, err); /* so that joined.p is never NULL */
    for (const cJSON *item = merges->child; item != NULL && status == QL_OK; item = item->next, rank++) {
        if (cJSON_IsString(item) && strncmp(item->valuestring, "#version", 8) == 0) continue;
        status = read_merge(item, rank, &joined, v, err);
        if (status != QL_OK) ql_err_prefix(err, "model.merges[%u]: ", rank);
    }
    ql_free(joined.p);
    return status;
}

static ql_status read_added_token(const cJSON *item, const char *where, ql_tokenizer *t, ql_err *err)
{
    ql_tok_added a = {0};
    bool normalized;
    const char *content = ql_tok_json_get(item, "content")->valuestring;
    a.id = (int32_t)ql_tok_json_get(item, "id")->valuedouble;
    ql_status status = ql_tok_json_bool(item, where, "special", false, &a.special, err);
    if (status == QL_OK) status = ql_tok_json_bool(item, where, "single_word", false, &a.single_word, err);
    if (status == QL_OK) status = ql_tok_json_bool(item, where, "lstrip", false, &a.lstrip, err);
    if (status == QL_OK) status = ql_tok_json_bool(item, where, "rstrip", false, &a.rstrip, err);
    if (status == QL_OK) status = ql_tok_json_bool(item, where, "normalized", !a.special, &normalized, err);
    if (status == QL_OK)
        status = ql_tok_vocab_put(&t->vocab, a.id, content, strlen(content),
                                  QL_TOK_ADDED | (a.special ? QL_TOK_SPECIAL : 0), err);
    if (status != QL_OK) return status;
    a.text = t->vocab.pool + t->vocab.entry[a.id].at;
    a.len = t->vocab.entry[a.id].len;
    if (!normalized || t->normalizers.n == 0) {
        /* Without normalisers both kinds are looked for in the same text, but those
         * not to be normalised first. */
        ql_tok_added_set *set = normalized ? &t->normalized : &t->raw;
        set->v[set->n++] = a;
        return QL_OK;
    }
    const char *made;
    status = ql_tok_normalize(&t->normalizers, t->scratch.matcher, t->scratch.norm, a.text, a.len, &made,
                              &a.len, err);
    if (status != QL_OK) return status;
    if (a.len == 0) return ql_err_set(err, QL_ERR_UNSUPPORTED, "the normaliser leaves nothing of it");
    char *own = ql_strndup(made, a.len);
    if (own == NULL) return out_of_memory(err);
    t->added_text[t->added_text_n++] = own;
    a.text = own;
    t->normalized.v[t->normalized.n++] = a;
    return QL_OK;
}

static ql_status read_added(const cJSON *added, ql_tokenizer *t, ql_err *err)
{
    size_t n = added != NULL ? (size_t)cJSON_GetArraySize(added) : 0, index = 0;
    t->raw.v = ql_calloc(n, sizeof *t->raw.v);
    t->normalized.v = ql_calloc(n, sizeof *t->normalized.v);
    t->added_text = ql_calloc(n, sizeof *t->added_text);
    if (t->raw.v == NULL || t->normalized.v == NULL || t->added_text == NULL) return out_of_memory(err);
    for (const cJSON *item = n > 0 ? added->child : NULL; item != NULL; item = item->next, index++) {
        char where[48];
        snprintf(where, sizeof where, "added_tokens[%zu]", index);
        t->scratch.norm[0].limit = t->scratch.norm[1].limit = ql_tok_expansion(0);
        ql_status status = read_added_token(item, where, t, err);
        if (status != QL_OK) {
            ql_err_prefix(err, "%s: ", where);
            return status;
        }
    }
    ql_status status = ql_tok_added_index(&t->raw, err);
    return status == QL_OK ? ql_tok_added_index(&t->normalized, err) : status;
}

/* Metaspace's "first" means the piece whose first character stood first in the original text. Where earlier
 * steps cut or drop characters, that needs offsets, which are not kept. */
static ql_status check_first(const ql_tokenizer *t, ql_err *err)
{
    bool moved = false;
    for (size_t i = 0; i < t->normalizers.n; i++) {
        const ql_tok_step *step = &t->normalizers.v[i];
        moved = moved || step->kind == QL_TOK_TRIM || step->kind == QL_TOK_PREPEND ||
                (step->kind == QL_TOK_REPLACE && (step->regex != NULL || step->with_len == 0));
    }
    for (size_t i = 0; i < t->pretokenizers.n; i++) {
        const ql_tok_step *step = &t->pretokenizers.v[i];
        if (step->kind == QL_TOK_METASPACE && step->scheme == QL_TOK_FIRST && (moved || i > 0))
            return ql_err_set(
                err, QL_ERR_UNSUPPORTED,
                "pre_tokenizer Metaspace: prepend_scheme \"first\" behind steps that cut or strip "
                "is not supported");
    }
    return QL_OK;
}

static ql_status read_tokenizer(const cJSON *root, ql_tokenizer *t, bool *templated, ql_err *err)
{
    const cJSON *model = ql_tok_json_get(root, "model"), *added = ql_tok_json_get(root, "added_tokens");
    const char *version, *unk;
    ql_status status = ql_tok_json_string(root, "tokenizer.json", "version", "1.0", &version, err);
    if (status != QL_OK) return status;
    if (strcmp(version, "1.0") != 0)
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "version \"%.20s\" is not supported", version);
    if (!cJSON_IsObject(model)) return ql_err_set(err, QL_ERR_FORMAT, "model: missing");
    status = read_model_flags(model, t, err);
    if (status == QL_OK) status = read_vocab(model, added, t, err);
    if (status == QL_OK) status = read_merges(ql_tok_json_get(model, "merges"), &t->vocab, err);
    if (status == QL_OK) status = ql_tok_json_string(model, "model", "unk_token", "", &unk, err);
    if (status != QL_OK) return status;
    t->unk = ql_tok_vocab_find_model(&t->vocab, unk, strlen(unk));
    if (t->unk < 0 && unk[0] != '\0')
        return ql_err_set(err, QL_ERR_FORMAT, "model.unk_token: \"%.60s\" is not in the vocabulary", unk);
    ql_tok_bpe_prepare(t);

    status = ql_tok_steps_read(QL_TOK_NORMALIZER, ql_tok_json_get(root, "normalizer"), &t->normalizers, err);
    if (status == QL_OK)
        status = ql_tok_steps_read(QL_TOK_PRETOKENIZER, ql_tok_json_get(root, "pre_tokenizer"),
                                   &t->pretokenizers, err);
    if (status == QL_OK) status = check_first(t, err);
    if (status == QL_OK)
        status = ql_tok_steps_read(QL_TOK_DECODER, ql_tok_json_get(root, "decoder"), &t->decoders, err);
    t->has_decoder = ql_tok_json_get(root, "decoder") != NULL;
    if (status == QL_OK) status = read_added(added, t, err);
    if (status == QL_OK)
        status = ql_tok_postprocessor_read(ql_tok_json_get(root, "post_processor"), &t->vocab, &t->prefix,
                                           &t->suffix, templated, err);
    return status;
}

/* Id of the token with a role, written as a string or as {"content": ...}. */
static int32_t role(const cJSON *config, const char *name, const ql_tok_vocab *v)
{
    const cJSON *item = ql_tok_json_get(config, name);
    if (cJSON_IsObject(item)) item = ql_tok_json_get(item, "content");
    return cJSON_IsString(item) ? ql_tok_vocab_find(v, item->valuestring, strlen(item->valuestring)) : -1;
}

static void take_roles(const cJSON *config, const ql_tok_vocab *v, ql_tokenizer_roles *roles)
{
    if (roles->bos < 0) roles->bos = role(config, "bos_token", v);
    if (roles->eos < 0) roles->eos = role(config, "eos_token", v);
    if (roles->unk < 0) roles->unk = role(config, "unk_token", v);
    if (roles->pad < 0) roles->pad = role(config, "pad_token", v);
}

/* Where no template says what surrounds a text, tokenizer_config.json does;
 * transformers' Llama classes add BOS unless told not to. */
static ql_status take_switches(const cJSON *config, ql_tokenizer *t, ql_err *err)
{
    const char *class;
    bool bos = false, eos = false;
    ql_status status =
        ql_tok_json_string(config, "tokenizer_config.json", "tokenizer_class", "", &class, err);
    bool llama = status == QL_OK && strncmp(class, "LlamaTokenizer", 14) == 0;
    if (status == QL_OK)
        status = ql_tok_json_bool(config, "tokenizer_config.json", "add_bos_token", llama, &bos, err);
    if (status == QL_OK)
        status = ql_tok_json_bool(config, "tokenizer_config.json", "add_eos_token", false, &eos, err);
    if (status == QL_OK && bos && t->roles.bos >= 0) status = ql_tok_ids_add(&t->prefix, t->roles.bos, err);
    if (status == QL_OK && eos && t->roles.eos >= 0) status = ql_tok_ids_add(&t->suffix, t->roles.eos, err);
    return status;
}

/* Read a file that may be absent: then *out is NULL. */
static ql_status read_optional(const char *folder, const char *name, cJSON **out, ql_err *err)
{
    *out = NULL;
    char *path = ql_file_join(folder, name);
    if (path == NULL) return out_of_memory(err);
    ql_status status = ql_file_exists(path) ? ql_tok_json_read(path, out, err) : QL_OK;
    ql_free(path);
    return status;
}

static ql_status read_neighbours(const char *folder, bool templated, ql_tokenizer *t, ql_err *err)
{
    cJSON *config = NULL, *map = NULL;
    t->roles = (ql_tokenizer_roles){-1, -1, -1, -1};
    ql_status status = read_optional(folder, "tokenizer_config.json", &config, err);
    if (status == QL_OK) status = read_optional(folder, "special_tokens_map.json", &map, err);
    if (status != QL_OK) goto fail;
    take_roles(config, &t->vocab, &t->roles);
    take_roles(map, &t->vocab, &t->roles);
    if (t->roles.unk < 0) t->roles.unk = t->unk;
    if (config != NULL && !templated) {
        status = take_switches(config, t, err);
        if (status != QL_OK) ql_err_prefix(err, "%s: ", folder);
    }
fail:
    cJSON_Delete(config);
    cJSON_Delete(map);
    return status;
}

static ql_status missing_file(const char *folder, ql_err *err)
{
    char *model = ql_file_join(folder, "tokenizer.model");
    bool sentencepiece = model != NULL && ql_file_exists(model);
    ql_free(model);
    ql_err_set(err, QL_ERR_NOT_FOUND, "%s: no tokenizer.json in this folder", folder);
    if (sentencepiece)
        return ql_err_hint(err, "tokenizer.model is not read; make a tokenizer.json with transformers: "
                                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)");
    return ql_err_hint(err, "download tokenizer.json and tokenizer_config.json of the model into it");
}

/* The folder of a path, which is a folder itself or a file in it; NULL when memory ran out. */
static char *folder_of(const char *path, bool is_folder)
{
    const char *slash = strrchr(path, '/');
    if (is_folder) return ql_strdup(path);
    if (slash == NULL) return ql_strdup(".");
    return ql_strndup(path, slash == path ? 1 : (size_t)(slash - path));
}

ql_status ql_tok_load(ql_tokenizer *t, const char *path, ql_err *err)
{
    cJSON *root = NULL;
    bool templated = false, is_folder = ql_file_is_folder(path);
    char *folder = folder_of(path, is_folder);
    char *file = is_folder ? ql_file_join(path, "tokenizer.json") : ql_strdup(path);
    ql_status status;
    if (file == NULL || folder == NULL) {
        status = out_of_memory(err);
        goto fail;
    }
    if (is_folder && !ql_file_exists(file)) {
        status = missing_file(folder, err);
        goto fail;
    }
    status = ql_tok_matcher_new(&t->scratch.matcher, err);
    if (status == QL_OK) status = ql_tok_json_read(file, &root, err);
    if (status != QL_OK) goto fail;
    status = read_tokenizer(root, t, &templated, err);
    if (status != QL_OK) {
        ql_err_prefix(err, "%s: ", file);
        goto fail;
    }
    status = read_neighbours(folder, templated, t, err);
fail:
    cJSON_Delete(root);
    ql_free(file);
    ql_free(folder);
    return status;
}
