/* tokenizer.json and its neighbours as cJSON trees, on top of core's strict JSON, and typed members whose
 * errors name the section they are in. Here the number of values is bounded too: cJSON takes some 100 bytes
 * for each.
 */
#ifndef QL_TOKENIZER_JSON_H
#define QL_TOKENIZER_JSON_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"

/* Read and parse `path`, which must hold one JSON object. *out [OUT] is freed
 * with cJSON_Delete; NULL on failure. */
ql_status ql_tok_json_read(const char *path, cJSON **out, ql_err *err);

/* Member of an object, NULL where it is absent or null. */
const cJSON *ql_tok_json_get(const cJSON *object, const char *name);

/* Members of a known type; `fallback` where absent or null. `where` names the
 * object in errors. */
ql_status ql_tok_json_bool(const cJSON *object, const char *where, const char *name, bool fallback, bool *out,
                           ql_err *err);
ql_status ql_tok_json_string(const cJSON *object, const char *where, const char *name, const char *fallback,
                             const char **out, ql_err *err);
/* An integer in [0, max]; required. */
ql_status ql_tok_json_int(const cJSON *object, const char *where, const char *name, int32_t max, int32_t *out,
                          ql_err *err);
/* The value of a number item if it is an integer in [0, max]. */
bool ql_tok_json_index(const cJSON *item, int32_t max, int32_t *out);

#endif
