/* JSON documents of a checkpoint: config, index and tokenizer files.
 *
 * A thin layer over cJSON that is strict where cJSON is lax: before cJSON sees the text it has passed the
 * scanner (json_scan.h), has no duplicate key at any level, nothing after its end and no \u0000 in a string.
 * cJSON looks names up linearly: iterate big objects (cJSON_ArrayForEach), never look up in them.
 */
#ifndef QL_JSON_H
#define QL_JSON_H

#include "err.h"

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Parse text[0 .. size); text[size] must be NUL. `file` names it in messages. Free *root by cJSON_Delete. */
ql_status ql_json_parse(const char *text, size_t size, const char *file, cJSON **root /* [OUT] */,
                        ql_err *err);

/* Read and parse a file of at most `limit` bytes. */
ql_status ql_json_load(const char *path, size_t limit, cJSON **root /* [OUT] */, ql_err *err);

/* Refuse text that is not one strict JSON document without duplicate keys, without building it. */
ql_status ql_json_check(const char *text, size_t size, const char *file, ql_err *err);

/* An object to read fields from, and how to name it in messages. Borrows everything. */
typedef struct {
    const cJSON *object;
    const char *file;   /* "dir/config.json" */
    const char *prefix; /* "" at the top, else "rope_scaling." */
} ql_json_at;

/* The member `key`, or NULL when there is none or it is null: Hugging Face files write null for "not set". */
const cJSON *ql_json_get(const cJSON *object, const char *key);

/* Typed members. An absent or null member takes *fallback, or is an error naming file and field when
 * `fallback` is NULL; a member of another type or outside [min, max] is always an error. Integers beyond 2^53
 * are refused: cJSON keeps numbers as doubles. */
ql_status ql_json_int(ql_json_at at, const char *key, int64_t min, int64_t max, const int64_t *fallback,
                      int64_t *out /* [OUT] */, ql_err *err);
ql_status ql_json_number(ql_json_at at, const char *key, double min, double max, const double *fallback,
                         double *out /* [OUT] */, ql_err *err);
ql_status ql_json_bool(ql_json_at at, const char *key, const bool *fallback, bool *out /* [OUT] */,
                       ql_err *err);
/* *out is borrowed from the document. `fallback` points at a string, which may itself be NULL. */
ql_status ql_json_string(ql_json_at at, const char *key, const char *const *fallback,
                         const char **out /* [OUT] */, ql_err *err);

#endif
