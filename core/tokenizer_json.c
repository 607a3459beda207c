#include "tokenizer_json.h"

#include <string.h>

#include "file.h"
#include "json.h"
#include "tokenizer_impl.h"

/* What the parser need not even see. */
static ql_status check_text(const char *text, size_t len, ql_err *err)
{
    static const char pointer[] = "version https://git-lfs";
    if (len >= sizeof pointer - 1 && memcmp(text, pointer, sizeof pointer - 1) == 0) {
        ql_err_set(err, QL_ERR_FORMAT, "a Git LFS pointer, not the file itself");
        return ql_err_hint(err, "run `git lfs pull` in the model's folder");
    }
    size_t values = 1;
    bool quoted = false;
    for (size_t i = 0; i < len; i++) {
        char c = text[i];
        if (c == '"')
            quoted = !quoted;
        else if (c == '\\')
            i++;
        else if (!quoted)
            values += c == ',' || c == '[' || c == '{';
    }
    if (values > QL_TOK_MAX_VALUES)
        return ql_err_set(err, QL_ERR_FORMAT, "more than %zu JSON values", QL_TOK_MAX_VALUES);
    return QL_OK;
}

ql_status ql_tok_json_read(const char *path, cJSON **out, ql_err *err)
{
    *out = NULL;
    char *text = NULL;
    cJSON *root = NULL;
    size_t len;
    ql_status status = ql_file_read(path, QL_TOK_MAX_FILE, &text, &len, err);
    if (status != QL_OK) return status;
    status = check_text(text, len, err);
    if (status != QL_OK) {
        ql_err_prefix(err, "%s: ", path);
        goto fail;
    }
    status = ql_json_parse(text, len, path, &root, err);
    if (status != QL_OK) goto fail;
    if (!cJSON_IsObject(root)) {
        status = ql_err_set(err, QL_ERR_FORMAT, "%s: not a JSON object", path);
        goto fail;
    }
    *out = root;
    root = NULL;
fail:
    cJSON_Delete(root);
    ql_free(text);
    return status;
}

const cJSON *ql_tok_json_get(const cJSON *object, const char *name)
{
    if (!cJSON_IsObject(object)) return NULL;
    for (const cJSON *item = object->child; item != NULL; item = item->next)
        if (strcmp(item->string, name) == 0) return cJSON_IsNull(item) ? NULL : item;
    return NULL;
}

ql_status ql_tok_json_bool(const cJSON *object, const char *where, const char *name, bool fallback, bool *out,
                           ql_err *err)
{
    const cJSON *item = ql_tok_json_get(object, name);
    if (item != NULL && !cJSON_IsBool(item))
        return ql_err_set(err, QL_ERR_FORMAT, "%s.%s: not true or false", where, name);
    *out = item != NULL ? cJSON_IsTrue(item) : fallback;
    return QL_OK;
}

ql_status ql_tok_json_string(const cJSON *object, const char *where, const char *name, const char *fallback,
                             const char **out, ql_err *err)
{
    const cJSON *item = ql_tok_json_get(object, name);
    if (item != NULL ? !cJSON_IsString(item) : fallback == NULL)
        return ql_err_set(err, QL_ERR_FORMAT, "%s.%s: %s", where, name,
                          item != NULL ? "not a string" : "missing");
    *out = item != NULL ? item->valuestring : fallback;
    return QL_OK;
}

bool ql_tok_json_index(const cJSON *item, int32_t max, int32_t *out)
{
    if (!cJSON_IsNumber(item) || !(item->valuedouble >= 0 && item->valuedouble <= max)) return false;
    *out = (int32_t)item->valuedouble;
    return *out == item->valuedouble;
}

ql_status ql_tok_json_int(const cJSON *object, const char *where, const char *name, int32_t max, int32_t *out,
                          ql_err *err)
{
    const cJSON *item = ql_tok_json_get(object, name);
    if (item == NULL) return ql_err_set(err, QL_ERR_FORMAT, "%s.%s: missing", where, name);
    if (!ql_tok_json_index(item, max, out))
        return ql_err_set(err, QL_ERR_FORMAT, "%s.%s: not an integer from 0 to %d", where, name, (int)max);
    return QL_OK;
}
