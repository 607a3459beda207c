#include "json.h"
#include "file.h"
#include "hash.h"
#include "json_scan.h"
#include "mem.h"

#include <math.h>
#include <pthread.h>
#include <string.h>

/* The keys met so far, of every object, to find one given twice. */
typedef struct {
    const char *text; /* NULL: free slot */
    uint32_t size;
    uint32_t object; /* number of the object that holds it */
} seen_key;

typedef struct {
    seen_key *slots;
    size_t capacity, count; /* capacity is a power of two */
    uint64_t hash_key;
    char *decoded; /* room for the keys that are written with escapes */
    size_t decoded_used;
} seen_keys;

static size_t slot_of(const seen_keys *seen, const seen_key *key)
{
    uint64_t h = ql_hash(seen->hash_key ^ ((uint64_t)key->object << 20), key->text, key->size);
    size_t mask = seen->capacity - 1, i = (size_t)h & mask;
    for (; seen->slots[i].text; i = (i + 1) & mask) {
        const seen_key *other = &seen->slots[i];
        if (other->object == key->object && other->size == key->size &&
            memcmp(other->text, key->text, key->size) == 0)
            break;
    }
    return i;
}

static bool grow(seen_keys *seen)
{
    seen_keys wider = *seen;
    wider.capacity = seen->capacity ? seen->capacity * 2 : 64;
    wider.slots = ql_calloc(wider.capacity, sizeof *wider.slots);
    if (!wider.slots) return false;
    for (size_t i = 0; i < seen->capacity; i++)
        if (seen->slots[i].text) wider.slots[slot_of(&wider, &seen->slots[i])] = seen->slots[i];
    ql_free(seen->slots);
    *seen = wider;
    return true;
}

/* Note a key; *twice when its object has it already. */
static ql_status note(seen_keys *seen, const ql_json_scan *scan, const ql_json_token *token, uint32_t object,
                      bool *twice, ql_err *err)
{
    seen_key key = {.text = token->text, .size = (uint32_t)token->size, .object = object};
    *twice = false;
    if (token->escaped) {
        if (!seen->decoded) seen->decoded = ql_malloc(scan->size);
        if (!seen->decoded) return ql_err_set(err, QL_ERR_MEMORY, "no memory to check the keys");
        key.text = seen->decoded + seen->decoded_used;
        key.size = (uint32_t)ql_json_unescape(token, seen->decoded + seen->decoded_used);
        seen->decoded_used += key.size;
    }
    if (seen->count * 4 >= seen->capacity * 3 && !grow(seen))
        return ql_err_set(err, QL_ERR_MEMORY, "no memory to check the keys");
    size_t slot = slot_of(seen, &key);
    *twice = seen->slots[slot].text != NULL;
    seen->slots[slot] = key;
    seen->count += !*twice;
    return QL_OK;
}

static ql_status check(const char *text, size_t size, seen_keys *seen, ql_err *err)
{
    ql_json_scan scan;
    ql_json_token token;
    uint32_t object[QL_JSON_DEPTH + 1] = {0}, objects = 0;
    char name[QL_JSON_SHOWN];
    if (size >= UINT32_MAX) return ql_err_set(err, QL_ERR_FORMAT, "over 4 GiB of JSON");
    ql_json_scan_init(&scan, text, size, QL_JSON_DEPTH);
    do {
        ql_status status = ql_json_scan_next(&scan, &token, err);
        if (status) return status;
        if (token.has_nul)
            return ql_err_set(err, QL_ERR_UNSUPPORTED, "byte %zu: \\u0000 in a string",
                              (size_t)(token.text - text));
        if (token.kind == QL_JSON_OBJECT) object[scan.depth] = ++objects;
        if (token.kind != QL_JSON_KEY) continue;
        bool twice;
        status = note(seen, &scan, &token, object[scan.depth], &twice, err);
        if (status) return status;
        if (twice)
            return ql_err_set(err, QL_ERR_FORMAT, "byte %zu: key \"%s\" is given twice",
                              (size_t)(token.text - text), ql_json_shown(token.text, token.size, name));
    } while (token.kind != QL_JSON_END);
    return QL_OK;
}

ql_status ql_json_check(const char *text, size_t size, const char *file, ql_err *err)
{
    seen_keys seen = {.hash_key = ql_hash_key()};
    ql_status status = check(text, size, &seen, err);
    ql_free(seen.slots);
    ql_free(seen.decoded);
    if (status) {
        if (status == QL_ERR_FORMAT) ql_err_prefix(err, "not valid JSON: ");
        ql_err_prefix(err, "%s: ", file);
        if (status == QL_ERR_FORMAT && err)
            ql_err_hint(err, "the file is damaged: download or save it again");
    }
    return status;
}

static void set_hooks(void)
{
    cJSON_Hooks hooks = {.malloc_fn = ql_malloc, .free_fn = ql_free};
    cJSON_InitHooks(&hooks);
}

ql_status ql_json_parse(const char *text, size_t size, const char *file, cJSON **root, ql_err *err)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, set_hooks);
    *root = NULL;
    ql_status status = ql_json_check(text, size, file, err);
    if (status) return status;
    *root = cJSON_ParseWithLength(text, size);
    /* Everything that cJSON refuses, the check refused before. */
    if (!*root) return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory for its JSON (%zu bytes)", file, size);
    return QL_OK;
}

ql_status ql_json_load(const char *path, size_t limit, cJSON **root, ql_err *err)
{
    char *text = NULL;
    size_t size = 0;
    *root = NULL;
    ql_status status = ql_file_read(path, limit, &text, &size, err);
    if (!status) status = ql_json_parse(text, size, path, root, err);
    ql_free(text);
    return status;
}

const cJSON *ql_json_get(const cJSON *object, const char *key)
{
    const cJSON *item = cJSON_GetObjectItemCaseSensitive(object, key);
    return item && !cJSON_IsNull(item) ? item : NULL;
}

static ql_status wrong(ql_json_at at, const char *key, const cJSON *item, const char *wanted, ql_err *err)
{
    if (!item) return ql_err_set(err, QL_ERR_FORMAT, "%s: %s%s is missing", at.file, at.prefix, key);
    const char *kind = cJSON_IsString(item)   ? "a string"
                       : cJSON_IsNumber(item) ? "a number"
                       : cJSON_IsBool(item)   ? "true or false"
                       : cJSON_IsArray(item)  ? "an array"
                                              : "an object";
    return ql_err_set(err, QL_ERR_FORMAT, "%s: %s%s is %s, expected %s", at.file, at.prefix, key, kind,
                      wanted);
}

ql_status ql_json_int(ql_json_at at, const char *key, int64_t min, int64_t max, const int64_t *fallback,
                      int64_t *out, ql_err *err)
{
    const cJSON *item = ql_json_get(at.object, key);
    *out = fallback ? *fallback : 0; /* one place may be both */
    if (!item && fallback) return QL_OK;
    if (!cJSON_IsNumber(item)) return wrong(at, key, item, "an integer", err);
    double value = item->valuedouble;
    if (!(fabs(value) <= 9007199254740992.0) || value != floor(value))
        return ql_err_set(err, QL_ERR_FORMAT, "%s: %s%s = %.17g is not an integer in range", at.file,
                          at.prefix, key, value);
    if ((int64_t)value < min || (int64_t)value > max)
        return ql_err_set(err, QL_ERR_FORMAT, "%s: %s%s = %lld, expected %lld to %lld", at.file, at.prefix,
                          key, (long long)value, (long long)min, (long long)max);
    *out = (int64_t)value;
    return QL_OK;
}

ql_status ql_json_number(ql_json_at at, const char *key, double min, double max, const double *fallback,
                         double *out, ql_err *err)
{
    const cJSON *item = ql_json_get(at.object, key);
    *out = fallback ? *fallback : 0; /* one place may be both */
    if (!item && fallback) return QL_OK;
    if (!cJSON_IsNumber(item)) return wrong(at, key, item, "a number", err);
    if (!(item->valuedouble >= min && item->valuedouble <= max))
        return ql_err_set(err, QL_ERR_FORMAT, "%s: %s%s = %.9g, expected %.9g to %.9g", at.file, at.prefix,
                          key, item->valuedouble, min, max);
    *out = item->valuedouble;
    return QL_OK;
}

ql_status ql_json_bool(ql_json_at at, const char *key, const bool *fallback, bool *out, ql_err *err)
{
    const cJSON *item = ql_json_get(at.object, key);
    *out = fallback && *fallback;
    if (!item && fallback) return QL_OK;
    if (!cJSON_IsBool(item)) return wrong(at, key, item, "true or false", err);
    *out = cJSON_IsTrue(item);
    return QL_OK;
}

ql_status ql_json_string(ql_json_at at, const char *key, const char *const *fallback, const char **out,
                         ql_err *err)
{
    const cJSON *item = ql_json_get(at.object, key);
    *out = fallback ? *fallback : NULL;
    if (!item && fallback) return QL_OK;
    if (!cJSON_IsString(item)) return wrong(at, key, item, "a string", err);
    *out = item->valuestring;
    return QL_OK;
}
