#include "tokenizer_steps.h"

#include <stdio.h>

#include "tokenizer_utf8.h"

/* GPT-2's pattern, which ByteLevel uses unless use_regex is false. */
#define GPT2_PATTERN                                                                                         \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| "                                                          \
    "?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"

/* \w of Rust's regex crate, which runs Whitespace; the engine of Split takes it a little differently. */
#define WORD "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}"

typedef ql_status read_fn(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err);

void ql_tok_steps_free(ql_tok_steps *steps)
{
    for (size_t i = 0; i < steps->n; i++) {
        ql_tok_regex_free(steps->v[i].regex);
        ql_free(steps->v[i].find);
        ql_free(steps->v[i].with);
    }
    steps->n = 0;
}

static ql_status keep(const char *s, char **out, size_t *len, ql_err *err)
{
    *out = ql_strdup(s);
    if (*out == NULL) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for the tokenizer");
    *len = strlen(s);
    return QL_OK;
}

static ql_status read_string(const cJSON *item, const char *where, const char *name, char **out, size_t *len,
                             ql_err *err)
{
    const char *s;
    ql_status status = ql_tok_json_string(item, where, name, NULL, &s, err);
    return status == QL_OK ? keep(s, out, len, err) : status;
}

/* A string of one character. */
static ql_status read_char(const cJSON *item, const char *where, const char *name, ql_tok_step *step,
                           ql_err *err)
{
    ql_status status = read_string(item, where, name, &step->with, &step->with_len, err);
    if (status != QL_OK) return status;
    if (step->with_len == 0 || ql_utf8_width((unsigned char)step->with[0]) != step->with_len)
        return ql_err_set(err, QL_ERR_FORMAT, "%s.%s: not one character", where, name);
    return QL_OK;
}

static ql_status compile(const char *pattern, const char *where, ql_tok_step *step, ql_err *err)
{
    ql_status status = ql_tok_regex_new(pattern, &step->regex, err);
    if (status != QL_OK) ql_err_prefix(err, "%s: ", where);
    return status;
}

static ql_status read_pattern(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    const cJSON *pattern = ql_tok_json_get(item, "pattern");
    const cJSON *regex = ql_tok_json_get(pattern, "Regex"), *string = ql_tok_json_get(pattern, "String");
    if (cJSON_IsString(regex) && string == NULL) return compile(regex->valuestring, where, step, err);
    if (!cJSON_IsString(string) || regex != NULL)
        return ql_err_set(err, QL_ERR_FORMAT, "%s.pattern: neither {\"String\": ...} nor {\"Regex\": ...}",
                          where);
    if (string->valuestring[0] == '\0')
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s.pattern: an empty string is not supported", where);
    return keep(string->valuestring, &step->find, &step->find_len, err);
}

static ql_status read_behavior(const cJSON *item, const char *where, const char *fallback, ql_tok_step *step,
                               ql_err *err)
{
    static const char *const names[] = {[QL_TOK_REMOVED] = "Removed",
                                        [QL_TOK_ISOLATED] = "Isolated",
                                        [QL_TOK_MERGED_WITH_PREVIOUS] = "MergedWithPrevious",
                                        [QL_TOK_MERGED_WITH_NEXT] = "MergedWithNext",
                                        [QL_TOK_CONTIGUOUS] = "Contiguous"};
    const char *s;
    ql_status status = ql_tok_json_string(item, where, "behavior", fallback, &s, err);
    if (status != QL_OK) return status;
    step->split = true;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(s, names[i]) != 0) continue;
        step->behavior = (ql_tok_behavior)i;
        return QL_OK;
    }
    return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s.behavior: \"%.40s\" is not supported", where, s);
}

static ql_status read_nothing(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    (void)item, (void)where, (void)step, (void)err;
    return QL_OK;
}

static ql_status read_trim(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    ql_status status = ql_tok_json_bool(item, where, "strip_left", true, &step->left, err);
    return status == QL_OK ? ql_tok_json_bool(item, where, "strip_right", true, &step->right, err) : status;
}

static ql_status read_prepend(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    return read_string(item, where, "prepend", &step->with, &step->with_len, err);
}

static ql_status read_replace(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    ql_status status = read_pattern(item, where, step, err);
    return status == QL_OK ? read_string(item, where, "content", &step->with, &step->with_len, err) : status;
}

static ql_status read_split(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    ql_status status = read_pattern(item, where, step, err);
    if (status == QL_OK) status = read_behavior(item, where, NULL, step, err);
    return status == QL_OK ? ql_tok_json_bool(item, where, "invert", false, &step->invert, err) : status;
}

static ql_status read_byte_level(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    step->behavior = QL_TOK_ISOLATED;
    ql_status status = ql_tok_json_bool(item, where, "add_prefix_space", true, &step->prefix_space, err);
    if (status == QL_OK) status = ql_tok_json_bool(item, where, "use_regex", true, &step->split, err);
    return status == QL_OK && step->split ? compile(GPT2_PATTERN, where, step, err) : status;
}

static ql_status read_metaspace(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    static const char *const names[] = {
        [QL_TOK_FIRST] = "first", [QL_TOK_ALWAYS] = "always", [QL_TOK_NEVER] = "never"};
    const char *scheme;
    bool prefix;
    ql_status status = read_char(item, where, "replacement", step, err);
    if (status == QL_OK) status = keep(step->with, &step->find, &step->find_len, err);
    if (status == QL_OK) status = ql_tok_json_bool(item, where, "split", true, &step->split, err);
    if (status == QL_OK) status = ql_tok_json_bool(item, where, "add_prefix_space", true, &prefix, err);
    if (status == QL_OK)
        status = ql_tok_json_string(item, where, "prepend_scheme", prefix ? "always" : "never", &scheme, err);
    if (status != QL_OK) return status;
    step->behavior = QL_TOK_MERGED_WITH_NEXT;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(scheme, names[i]) != 0) continue;
        step->scheme = (ql_tok_scheme)i;
        if (prefix || step->scheme == QL_TOK_NEVER) return QL_OK;
        return ql_err_set(err, QL_ERR_FORMAT, "%s: add_prefix_space is false but prepend_scheme is \"%s\"",
                          where, scheme);
    }
    return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s.prepend_scheme: \"%.40s\" is not supported", where,
                      scheme);
}

static ql_status read_digits(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    bool individual;
    ql_status status = ql_tok_json_bool(item, where, "individual_digits", false, &individual, err);
    if (status != QL_OK) return status;
    step->behavior = individual ? QL_TOK_ISOLATED : QL_TOK_CONTIGUOUS;
    step->split = true;
    return QL_OK;
}

static ql_status read_punctuation(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    return read_behavior(item, where, "Isolated", step, err);
}

static ql_status read_whitespace(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    (void)item;
    step->behavior = QL_TOK_REMOVED;
    step->split = true;
    step->invert = true; /* what the pattern does not match goes */
    return compile("[" WORD "]+|[^" WORD "\\s]+", where, step, err);
}

static ql_status read_whitespace_split(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    (void)item, (void)where, (void)err;
    step->behavior = QL_TOK_REMOVED;
    step->split = true;
    return QL_OK;
}

static ql_status read_strip(const cJSON *item, const char *where, ql_tok_step *step, ql_err *err)
{
    int32_t start, stop;
    ql_status status = read_char(item, where, "content", step, err);
    if (status == QL_OK) status = ql_tok_json_int(item, where, "start", INT32_MAX, &start, err);
    if (status == QL_OK) status = ql_tok_json_int(item, where, "stop", INT32_MAX, &stop, err);
    if (status != QL_OK) return status;
    step->start = (size_t)start;
    step->stop = (size_t)stop;
    return QL_OK;
}

/* A Metaspace decoder is configured as the pre-tokenizer is. */
static const struct {
    const char *type;
    read_fn *read;
    ql_tok_section section;
    ql_tok_kind kind;
} known[] = {
    {"NFC", read_nothing, QL_TOK_NORMALIZER, QL_TOK_NFC},
    {"NFD", read_nothing, QL_TOK_NORMALIZER, QL_TOK_NFD},
    {"NFKC", read_nothing, QL_TOK_NORMALIZER, QL_TOK_NFKC},
    {"NFKD", read_nothing, QL_TOK_NORMALIZER, QL_TOK_NFKD},
    {"Lowercase", read_nothing, QL_TOK_NORMALIZER, QL_TOK_LOWERCASE},
    {"Strip", read_trim, QL_TOK_NORMALIZER, QL_TOK_TRIM},
    {"Prepend", read_prepend, QL_TOK_NORMALIZER, QL_TOK_PREPEND},
    {"Replace", read_replace, QL_TOK_NORMALIZER, QL_TOK_REPLACE},
    {"Split", read_split, QL_TOK_PRETOKENIZER, QL_TOK_SPLIT},
    {"ByteLevel", read_byte_level, QL_TOK_PRETOKENIZER, QL_TOK_BYTE_LEVEL},
    {"Metaspace", read_metaspace, QL_TOK_PRETOKENIZER, QL_TOK_METASPACE},
    {"Digits", read_digits, QL_TOK_PRETOKENIZER, QL_TOK_DIGITS},
    {"Punctuation", read_punctuation, QL_TOK_PRETOKENIZER, QL_TOK_PUNCTUATION},
    {"Whitespace", read_whitespace, QL_TOK_PRETOKENIZER, QL_TOK_SPLIT},
    {"WhitespaceSplit", read_whitespace_split, QL_TOK_PRETOKENIZER, QL_TOK_WHITESPACE_SPLIT},
    {"ByteLevel", read_nothing, QL_TOK_DECODER, QL_TOK_BYTE_LEVEL},
    {"Metaspace", read_metaspace, QL_TOK_DECODER, QL_TOK_METASPACE},
    {"Replace", read_replace, QL_TOK_DECODER, QL_TOK_REPLACE},
    {"ByteFallback", read_nothing, QL_TOK_DECODER, QL_TOK_BYTE_FALLBACK},
    {"Fuse", read_nothing, QL_TOK_DECODER, QL_TOK_FUSE},
    {"Strip", read_strip, QL_TOK_DECODER, QL_TOK_STRIP},
};

static const struct {
    const char *name, *children;
} sections[] = {[QL_TOK_NORMALIZER] = {"normalizer", "normalizers"},
                [QL_TOK_PRETOKENIZER] = {"pre_tokenizer", "pretokenizers"},
                [QL_TOK_DECODER] = {"decoder", "decoders"}};

static ql_status read_step(ql_tok_section section, const cJSON *item, const char *type, ql_tok_steps *steps,
                           ql_err *err)
{
    char where[96];
    snprintf(where, sizeof where, "%s %.60s", sections[section].name, type);
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (known[i].section != section || strcmp(known[i].type, type) != 0) continue;
        if (steps->n == QL_TOK_MAX_STEPS)
            return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: more than %d steps", sections[section].name,
                              QL_TOK_MAX_STEPS);
        ql_tok_step *step = &steps->v[steps->n++];
        *step = (ql_tok_step){.kind = known[i].kind};
        return known[i].read(item, where, step, err);
    }
    return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s is not supported", where);
}

static ql_status read_steps(ql_tok_section section, const cJSON *item, int depth, ql_tok_steps *steps,
                            ql_err *err)
{
    const char *type;
    ql_status status = ql_tok_json_string(item, sections[section].name, "type", NULL, &type, err);
    if (status != QL_OK) return status;
    if (strcmp(type, "Sequence") != 0) return read_step(section, item, type, steps, err);
    const cJSON *children = ql_tok_json_get(item, sections[section].children);
    if (!cJSON_IsArray(children))
        return ql_err_set(err, QL_ERR_FORMAT, "%s.%s: not an array", sections[section].name,
                          sections[section].children);
    if (depth == QL_TOK_MAX_NEST)
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: sequences nested more than %d deep",
                          sections[section].name, QL_TOK_MAX_NEST);
    for (const cJSON *child = children->child; child != NULL && status == QL_OK; child = child->next)
        status = read_steps(section, child, depth + 1, steps, err);
    return status;
}

ql_status ql_tok_steps_read(ql_tok_section section, const cJSON *item, ql_tok_steps *steps, ql_err *err)
{
    return item != NULL ? read_steps(section, item, 0, steps, err) : QL_OK;
}
