/* The post-processor: which ids stand before and behind a text. */
#include "tokenizer_steps.h"

static ql_status bad_template(ql_err *err, const char *what)
{
    return ql_err_set(err, QL_ERR_FORMAT, "post_processor TemplateProcessing: %s", what);
}

/* Append the ids that special_tokens gives for a name. */
static ql_status add_special(const cJSON *item, const char *name, const ql_tok_vocab *vocab, ql_tok_ids *out,
                             ql_err *err)
{
    const cJSON *entry = ql_tok_json_get(ql_tok_json_get(item, "special_tokens"), name);
    const cJSON *ids = ql_tok_json_get(entry, "ids");
    if (!cJSON_IsArray(ids))
        return ql_err_set(err, QL_ERR_FORMAT, "post_processor TemplateProcessing: no ids for \"%.60s\"",
                          name);
    for (const cJSON *id = ids->child; id != NULL; id = id->next) {
        int32_t value;
        if (!ql_tok_json_index(id, QL_TOK_MAX_ID, &value) || value >= vocab->size ||
            !(vocab->entry[value].flags & QL_TOK_USED))
            return ql_err_set(err, QL_ERR_FORMAT,
                              "post_processor TemplateProcessing: id of \"%.60s\" is no token", name);
        ql_status status = ql_tok_ids_add(out, value, err);
        if (status != QL_OK) return status;
    }
    return QL_OK;
}

static ql_status read_template(const cJSON *item, const ql_tok_vocab *vocab, ql_tok_ids *prefix,
                               ql_tok_ids *suffix, ql_err *err)
{
    const cJSON *single = ql_tok_json_get(item, "single");
    if (!cJSON_IsArray(single)) return bad_template(err, "\"single\" is not an array");
    ql_tok_ids *to = prefix;
    for (const cJSON *piece = single->child; piece != NULL; piece = piece->next) {
        const cJSON *special = ql_tok_json_get(piece, "SpecialToken");
        const cJSON *id =
            ql_tok_json_get(special != NULL ? special : ql_tok_json_get(piece, "Sequence"), "id");
        if (!cJSON_IsString(id)) return bad_template(err, "a piece is neither SpecialToken nor Sequence");
        if (special == NULL) {
            if (to == suffix || strcmp(id->valuestring, "A") != 0)
                return bad_template(err, "\"single\" must have the text (\"A\") exactly once");
            to = suffix;
            continue;
        }
        ql_status status = add_special(item, id->valuestring, vocab, to, err);
        if (status != QL_OK) return status;
    }
    return to == suffix ? QL_OK : bad_template(err, "\"single\" must have the text (\"A\") exactly once");
}

static ql_status read_post(const cJSON *item, const ql_tok_vocab *vocab, int depth, ql_tok_ids *prefix,
                           ql_tok_ids *suffix, bool *found, ql_err *err)
{
    const char *type;
    ql_status status = ql_tok_json_string(item, "post_processor", "type", NULL, &type, err);
    if (status != QL_OK) return status;
    if (strcmp(type, "ByteLevel") == 0) return QL_OK; /* it moves offsets, which are not kept here */
    if (strcmp(type, "TemplateProcessing") == 0) {
        if (*found)
            return ql_err_set(err, QL_ERR_UNSUPPORTED, "post_processor: two templates are not supported");
        *found = true;
        return read_template(item, vocab, prefix, suffix, err);
    }
    if (strcmp(type, "Sequence") != 0)
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "post_processor %.60s is not supported", type);
    const cJSON *children = ql_tok_json_get(item, "processors");
    if (!cJSON_IsArray(children) || depth == QL_TOK_MAX_NEST)
        return ql_err_set(err, QL_ERR_FORMAT, "post_processor.processors: not an array, or nested too deep");
    for (const cJSON *child = children->child; child != NULL && status == QL_OK; child = child->next)
        status = read_post(child, vocab, depth + 1, prefix, suffix, found, err);
    return status;
}

ql_status ql_tok_postprocessor_read(const cJSON *item, const ql_tok_vocab *vocab, ql_tok_ids *prefix,
                                    ql_tok_ids *suffix, bool *found, ql_err *err)
{
    *found = false;
    return item != NULL ? read_post(item, vocab, 0, prefix, suffix, found, err) : QL_OK;
}
