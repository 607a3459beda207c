/* Tokenizer files from strangers: what is refused and with what words; that mutated files and hostile
 * patterns neither crash nor hang; that every failed allocation is reported and nothing leaks. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "file.h"
#include "json.h"
#include "mem.h"
#include "tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define GOLDEN QLUA_SOURCE_DIR "/tests/golden/tokenizers/"

/* A small tokenizer with one of everything; cases exchange a part of it. */
static const char base[] =
    "{\"version\": \"1.0\", \"truncation\": null, \"padding\": null,"
    " \"added_tokens\": [{\"id\": 7, \"content\": \"<s>\", \"special\": true, \"normalized\": false}],"
    " \"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"NFC\"}]},"
    " \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"\\\\w+\"},"
    "  \"behavior\": \"Isolated\", \"invert\": false},"
    " \"post_processor\": {\"type\": \"TemplateProcessing\","
    "  \"single\": [{\"SpecialToken\": {\"id\": \"<s>\", \"type_id\": 0}},"
    "   {\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}],"
    "  \"pair\": [], \"special_tokens\": {\"<s>\": {\"id\": \"<s>\", \"ids\": [7], \"tokens\": [\"<s>\"]}}},"
    " \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Fuse\"}]},"
    " \"model\": {\"type\": \"BPE\", \"dropout\": null, \"unk_token\": \"<unk>\", \"fuse_unk\": true,"
    "  \"vocab\": {\"<unk>\": 0, \"a\": 1, \"b\": 2, \"ab\": 3, \"abab\": 4, \" \": 5, \"\\u00e9\": 6},"
    "  \"merges\": [\"a b\", [\"ab\", \"ab\"]]}}";

static char folder[64], file[96], config[96];
static ql_err err;

static int make_folder(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/qlua-tokenizer-XXXXXX");
    if (mkdtemp(folder) == NULL) return -1;
    snprintf(file, sizeof file, "%s/tokenizer.json", folder);
    snprintf(config, sizeof config, "%s/tokenizer_config.json", folder);
    return 0;
}

static int drop_folder(void **state)
{
    (void)state;
    unlink(file);
    unlink(config);
    return rmdir(folder);
}

static void put(const char *path, const char *text, size_t len)
{
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, len, f), len);
    assert_int_equal(fclose(f), 0);
}

/* The base with the first `from` exchanged for `to`, written to the file. */
static void write_changed(const char *from, const char *to)
{
    char text[4096];
    const char *at = strstr(base, from);
    if (at == NULL) fail_msg("no %s in the base", from);
    int n = snprintf(text, sizeof text, "%.*s%s%s", (int)(at - base), base, to, at + strlen(from));
    put(file, text, (size_t)n);
}

static ql_status load_folder(ql_tokenizer **t)
{
    memset(&err, 0, sizeof err);
    return ql_tokenizer_load(folder, t, &err);
}

typedef struct {
    const char *from, *to;
    ql_status status;
    const char *says;
} change;

static const change changes[] = {
    {"\"1.0\"", "\"2.0\"", QL_ERR_UNSUPPORTED, "version \"2.0\""},
    {"\"BPE\"", "\"WordPiece\"", QL_ERR_UNSUPPORTED, "\"WordPiece\""},
    {"\"BPE\"", "\"Unigram\"", QL_ERR_UNSUPPORTED, "\"Unigram\""},
    {"\"BPE\"", "\"WordLevel\"", QL_ERR_UNSUPPORTED, "\"WordLevel\""},
    {"\"BPE\"", "5", QL_ERR_FORMAT, "model.type"},
    {"\"dropout\": null", "\"dropout\": 0.1", QL_ERR_UNSUPPORTED, "dropout"},
    {"\"dropout\": null", "\"continuing_subword_prefix\": \"##\"", QL_ERR_UNSUPPORTED,
     "continuing_subword_prefix"},
    {"\"dropout\": null", "\"end_of_word_suffix\": \"</w>\"", QL_ERR_UNSUPPORTED, "end_of_word_suffix"},
    {"\"fuse_unk\": true", "\"fuse_unk\": 1", QL_ERR_FORMAT, "model.fuse_unk"},
    {"\"<unk>\", \"fuse", "\"nope\", \"fuse", QL_ERR_FORMAT, "unk_token: \"nope\""},
    {"\"a\": 1", "\"a\": -1", QL_ERR_FORMAT, "id of \"a\""},
    {"\"a\": 1", "\"a\": 1.5", QL_ERR_FORMAT, "id of \"a\""},
    {"\"a\": 1", "\"a\": 4194304", QL_ERR_FORMAT, "id of \"a\""},
    {"\"a\": 1", "\"a\": 1e300", QL_ERR_FORMAT, "id of \"a\""},
    {"\"a\": 1", "\"a\": \"1\"", QL_ERR_FORMAT, "id of \"a\""},
    {"\"a\": 1", "\"a\": 2", QL_ERR_FORMAT, "id 2 is used twice"},
    {"\"b\": 2", "\"a\": 2", QL_ERR_FORMAT, "twice"},
    {"\"vocab\": {", "\"vocab\": [], \"w\": {", QL_ERR_FORMAT, "model.vocab"},
    {"\"merges\": [", "\"merges\": {}, \"m\": [", QL_ERR_FORMAT, "model.merges"},
    {"\"a b\"", "\"a c\"", QL_ERR_FORMAT, "model.merges[0]: token \"c\""},
    {"\"a b\"", "\"c a\"", QL_ERR_FORMAT, "model.merges[0]: token \"c\""},
    {"\"a b\"", "\"b a\"", QL_ERR_FORMAT, "model.merges[0]: token \"ba\""},
    {"\"a b\"", "\"ab\"", QL_ERR_FORMAT, "model.merges[0]"},
    {"\"a b\"", "\"a b b\"", QL_ERR_FORMAT, "model.merges[0]"},
    {"\"a b\"", "[\"a\"]", QL_ERR_FORMAT, "model.merges[0]"},
    {"[\"ab\", \"ab\"]", "[\"ab\", \"ab\", \"a\"]", QL_ERR_FORMAT, "model.merges[1]"},
    {"\"id\": 7", "\"id\": 3", QL_ERR_FORMAT, "added_tokens[0]: id 3 is used twice"},
    {"\"content\": \"<s>\"", "\"content\": \"a\"", QL_ERR_FORMAT, "two ids, 1 and 7"},
    {"\"content\": \"<s>\"", "\"content\": \"\"", QL_ERR_FORMAT, "added_tokens[0].content"},
    {"\"id\": 7, ", "", QL_ERR_FORMAT, "added_tokens[0].id"},
    {"\"special\": true", "\"special\": \"yes\"", QL_ERR_FORMAT, "added_tokens[0].special"},
    {"\"added_tokens\": [", "\"added_tokens\": {}, \"t\": [", QL_ERR_FORMAT, "added_tokens"},
    {"{\"type\": \"NFC\"}", "{\"type\": \"Nmt\"}", QL_ERR_UNSUPPORTED, "normalizer Nmt"},
    {"{\"type\": \"NFC\"}", "{\"type\": \"Precompiled\"}", QL_ERR_UNSUPPORTED, "normalizer Precompiled"},
    {"{\"type\": \"NFC\"}", "5", QL_ERR_FORMAT, "normalizer.type"},
    {"[{\"type\": \"NFC\"}]", "5", QL_ERR_FORMAT, "normalizer.normalizers"},
    {"{\"type\": \"NFC\"}", "{\"type\": \"Prepend\"}", QL_ERR_FORMAT, "normalizer Prepend.prepend"},
    {"{\"type\": \"Split\"", "{\"type\": \"BertPreTokenizer\"", QL_ERR_UNSUPPORTED, "BertPreTokenizer"},
    {"{\"type\": \"Split\"", "{\"type\": \"Metaspace\", \"replacement\": \"ab\"", QL_ERR_FORMAT,
     "one character"},
    {"{\"type\": \"Split\"",
     "{\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Digits\"}, {\"type\": \"Metaspace\","
     " \"replacement\": \"_\", \"prepend_scheme\": \"first\"}]",
     QL_ERR_UNSUPPORTED, "prepend_scheme \"first\""},
    {"\"Isolated\"", "\"Merged\"", QL_ERR_UNSUPPORTED, "\"Merged\""},
    {"{\"Regex\": \"\\\\w+\"}", "{}", QL_ERR_FORMAT, "pattern"},
    {"{\"Regex\": \"\\\\w+\"}", "{\"String\": \"\"}", QL_ERR_UNSUPPORTED, "pattern"},
    {"\\\\w+", "(", QL_ERR_FORMAT, "not valid"},
    {"\\\\w+", "(?R)", QL_ERR_UNSUPPORTED, "this group"},
    {"\\\\w+", "(*LIMIT_MATCH=9)a", QL_ERR_UNSUPPORTED, "a verb"},
    {"\\\\w+", "\\\\h", QL_ERR_UNSUPPORTED, "this escape"},
    {"\\\\w+", "[a[b]]", QL_ERR_UNSUPPORTED, "a class inside a class"},
    {"\\\\w+", "[a&&b]", QL_ERR_UNSUPPORTED, "an intersection"},
    {"\\\\w+", "a{1,2}+", QL_ERR_UNSUPPORTED, "possessive"},
    {"\\\\w+", "(((a{99}){99}){99}){99}", QL_ERR_FORMAT, "not valid"},
    {"\\\\w+", "\\\\", QL_ERR_UNSUPPORTED, "backslash at the end"},
    {"\"TemplateProcessing\"", "\"BertProcessing\"", QL_ERR_UNSUPPORTED, "BertProcessing"},
    {"\"ids\": [7]", "\"ids\": [8]", QL_ERR_FORMAT, "\"<s>\""},
    {"\"ids\": [7]", "\"ids\": 7", QL_ERR_FORMAT, "\"<s>\""},
    {"{\"Sequence\": {\"id\": \"A\", \"type_id\": 0}}", "5", QL_ERR_FORMAT, "TemplateProcessing"},
    {"\"A\"", "\"B\"", QL_ERR_FORMAT, "exactly once"},
    {"{\"type\": \"Fuse\"}", "{\"type\": \"CTC\"}", QL_ERR_UNSUPPORTED, "decoder CTC"},
    {"{\"type\": \"Fuse\"}", "{\"type\": \"Strip\", \"content\": \" \", \"start\": -1, \"stop\": 0}",
     QL_ERR_FORMAT, "decoder Strip.start"},
    {"\"model\": {", "\"model\": null, \"m\": {", QL_ERR_FORMAT, "model"},
    {"\"version\"", "\"model\": {}, \"version\"", QL_ERR_FORMAT, "twice"},
};

static void test_refusals(void **state)
{
    (void)state;
    ql_tokenizer *t;
    put(file, base, sizeof base - 1);
    if (load_folder(&t) != QL_OK) fail_msg("%s", err.message);
    ql_tokenizer_free(t);
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        write_changed(changes[i].from, changes[i].to);
        ql_status status = load_folder(&t);
        if (status != changes[i].status || strstr(err.message, changes[i].says) == NULL ||
            strstr(err.message, "tokenizer.json") == NULL)
            fail_msg("%s -> %s: status %d, %s", changes[i].from, changes[i].to, status, err.message);
        assert_null(t);
    }
}

static void test_files(void **state)
{
    (void)state;
    static const char lfs[] = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n";
    ql_tokenizer *t;
    char path[128];
    unlink(file);
    assert_int_equal(load_folder(&t), QL_ERR_NOT_FOUND);
    assert_non_null(strstr(err.message, "no tokenizer.json"));
    snprintf(path, sizeof path, "%s/tokenizer.model", folder);
    put(path, "x", 1);
    assert_int_equal(load_folder(&t), QL_ERR_NOT_FOUND);
    assert_non_null(strstr(err.hint, "tokenizer.model"));
    unlink(path);
    assert_int_equal(ql_tokenizer_load("/no/such/place", &t, &err), QL_ERR_NOT_FOUND);
    put(file, lfs, sizeof lfs - 1);
    assert_int_equal(load_folder(&t), QL_ERR_FORMAT);
    assert_non_null(strstr(err.hint, "git lfs pull"));
    put(file, "", 0);
    assert_int_equal(load_folder(&t), QL_ERR_FORMAT);
    put(file, "[]", 2);
    assert_int_equal(load_folder(&t), QL_ERR_FORMAT);
    put(file, base, sizeof base - 1);
    put(config, "{\"bos_token\": 5", 15);
    assert_int_equal(load_folder(&t), QL_ERR_FORMAT);
    assert_non_null(strstr(err.message, "tokenizer_config.json"));
    unlink(config);
    for (size_t n = 0; n < sizeof base - 1; n += 7) { /* cut short anywhere */
        put(file, base, n);
        assert_int_equal(load_folder(&t), QL_ERR_FORMAT);
    }
}

/* 5 million values, some 500 MB as a cJSON tree, are refused before there is one. */
static void test_too_many_values(void **state)
{
    (void)state;
    size_t n = (size_t)10 << 20;
    char *text = malloc(n);
    ql_tokenizer *t;
    memset(text, ',', n);
    for (size_t i = 1; i < n; i += 2) text[i] = '0';
    text[0] = '[';
    text[n - 1] = ']';
    put(file, text, n);
    free(text);
    assert_int_equal(load_folder(&t), QL_ERR_FORMAT);
    assert_non_null(strstr(err.message, "JSON values"));
}

/* Encode and decode a few texts; failures are fine, crashes are not. */
static void exercise(ql_tokenizer *t)
{
    static const char text[] =
        "ab abab\xC3\xA9  <s>x\nThe <|eot_id|> 12345 \xE6\x97\xA5\xF0\x9F\x98\x80 don't\t\r\n end";
    for (unsigned flags = 0; flags < 4; flags++) {
        int32_t *ids;
        size_t n, len;
        char *out;
        if (ql_tokenizer_encode(t, text, sizeof text - 1, flags, &ids, &n, &err) != QL_OK) continue;
        if (ql_tokenizer_decode(t, ids, n, flags & 1, &out, &len, &err) == QL_OK) {
            assert_int_equal(strlen(out) <= len, 1);
            ql_free(out);
        }
        ql_free(ids);
    }
}

static size_t loaded, refused;

static void try_file(void)
{
    ql_tokenizer *t;
    if (load_folder(&t) == QL_OK) {
        loaded++;
        exercise(t);
        ql_tokenizer_free(t);
        return;
    }
    refused++;
    assert_null(t);
    assert_true(err.code != QL_OK && strstr(err.message, "tokenizer.json") != NULL);
}

/* Bytes changed, cut out and doubled. */
static void mutate_bytes(const char *text, size_t size, unsigned *seed)
{
    char *copy = malloc(size + 64);
    size_t n = size;
    memcpy(copy, text, size);
    for (int k = 1 + rand_r(seed) % 3; k > 0; k--) {
        size_t at = (size_t)rand_r(seed) % n, span = 1 + (size_t)rand_r(seed) % 16;
        if (at + span > n) span = n - at;
        switch (rand_r(seed) % 4) {
        case 0:
            copy[at] = (char)rand_r(seed);
            break;
        case 1:
            copy[at] = "0129-\"{}[],:\\u.e"[rand_r(seed) % 16];
            break;
        case 2:
            memmove(copy + at, copy + at + span, n - at - span);
            n -= span;
            break;
        default:
            memmove(copy + at + span, copy + at, n - at);
            n = n + span < size + 64 ? n + span : size + 48;
        }
        if (n < 2) break;
        if (n > size + 48) n = size + 48;
    }
    put(file, copy, n);
    free(copy);
}

/* A node of the tree, chosen so that the sections other than the vocabulary come up often. */
static cJSON *pick(cJSON *root, unsigned *seed)
{
    cJSON *node = root;
    for (;;) {
        int n = 0;
        for (cJSON *c = node->child; c != NULL; c = c->next) n++;
        if (n == 0 || (node != root && rand_r(seed) % 4 == 0)) return node;
        cJSON *child = node->child;
        for (int k = rand_r(seed) % n; k > 0; k--) child = child->next;
        node = child;
    }
}

/* A value exchanged for one of another type, an extreme one, or one from elsewhere in the file. */
static void mutate_tree(const char *text, unsigned *seed)
{
    static const char *const values[] = {
        "null",  "true",  "-1",     "0",     "4194303",     "1e18",     "\"\"",
        "\"a\"", "[]",    "{}",     "\" \"", "\"(a+)+$\"",  "[[],[]]",  "7",
        "0.5",   "false", "\".*\"", "1",     "\"\\u2581\"", "\"Fuse\"", "\"\\\\s\""};
    cJSON *root = cJSON_Parse(text);
    for (int k = 1 + rand_r(seed) % 2; k > 0; k--) {
        cJSON *node = pick(root, seed);
        if (node == root) continue;
        cJSON *other = rand_r(seed) % 3 == 0 ? cJSON_Duplicate(pick(root, seed), 1)
                                             : cJSON_Parse(values[(size_t)rand_r(seed) % 21]);
        char *key = node->string;
        cJSON *old = node, swap = *old;
        old->child = other->child;
        old->type = other->type;
        old->valuestring = other->valuestring;
        old->valuedouble = other->valuedouble;
        old->string = key;
        other->child = swap.child;
        other->valuestring = swap.valuestring;
        other->type = swap.type & ~cJSON_IsReference;
        cJSON_Delete(other);
    }
    char *made = cJSON_PrintUnformatted(root);
    put(file, made, strlen(made));
    cJSON_free(made);
    cJSON_Delete(root);
}

static void test_mutations(void **state)
{
    (void)state;
    static const char *const names[] = {"llama3_added", "llama2_added", "metaspace_like", "smollm_like"};
    unsigned seed = 20;
    for (size_t k = 0; k <= 4; k++) {
        char path[256], *text;
        size_t size;
        snprintf(path, sizeof path, GOLDEN "%s/tokenizer.json", k < 4 ? names[k] : "");
        if (k < 4 && !ql_file_exists(path)) continue;
        if (k < 4)
            assert_int_equal(ql_file_read(path, 1 << 20, &text, &size, &err), QL_OK);
        else
            text = ql_strdup(base), size = sizeof base - 1;
        for (int round = 0; round < 400; round++) {
            mutate_bytes(text, size, &seed);
            try_file();
            mutate_tree(text, &seed);
            try_file();
        }
        ql_free(text);
    }
    print_message("%zu mutated files loaded, %zu refused\n", loaded, refused);
    assert_true(loaded > 100 && refused > 1000);
}

/* Without unk_token a character of no token is dropped, and what stood around it may join. */
static void test_dropped_characters(void **state)
{
    (void)state;
    static const char small[] =
        "{\"model\": {\"type\": \"BPE\", \"vocab\": {\"\u2581\": 0, \"\u2581\u2581\": 1},"
        " \"merges\": [\"\u2581 \u2581\"]}}";
    ql_tokenizer *t;
    int32_t *ids;
    size_t n;
    put(file, small, sizeof small - 1);
    if (load_folder(&t) != QL_OK) fail_msg("%s", err.message);
    assert_int_equal(ql_tokenizer_encode(t, "\u2581x\u2581", 7, 0, &ids, &n, &err), QL_OK);
    assert_int_equal(n, 1);
    assert_int_equal(ids[0], 1);
    ql_free(ids);
    ql_tokenizer_free(t);
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* Encode n times `unit` with the base's pattern exchanged; the status, and no hang. */
static ql_status encode_many(const char *from, const char *to, const char *unit, size_t n)
{
    ql_tokenizer *t;
    int32_t *ids;
    size_t count, len = strlen(unit);
    char *text = malloc(n * len + 1);
    for (size_t i = 0; i < n; i++) memcpy(text + i * len, unit, len);
    write_changed(from, to);
    if (load_folder(&t) != QL_OK) fail_msg("%s", err.message);
    double start = seconds();
    ql_status status = ql_tokenizer_encode(t, text, n * len, 0, &ids, &count, &err);
    assert_true(seconds() - start < 20); /* a hang would be hours */
    ql_free(ids);
    ql_tokenizer_free(t);
    free(text);
    return status;
}

static void test_hostile_work(void **state)
{
    (void)state;
    assert_int_equal(encode_many("\\\\w+", "(a|a)*[^a]", "a", 4000), QL_ERR_FORMAT);
    assert_non_null(strstr(err.message, "gave up"));
    assert_int_equal(encode_many("\\\\w+", "(?:a|b|ab)*?[^ab]", "ab", 100000), QL_ERR_FORMAT);
    /* A million spaces are no reason to give up: Llama 3's own alternatives backtrack over them. */
    assert_int_equal(encode_many("\\\\w+", "\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+", " ", 1000000),
                     QL_OK);
    assert_int_equal(encode_many("\\\\w+", "\\\\w+", "a", 1000000), QL_OK);
    assert_int_equal(encode_many("{\"type\": \"NFC\"}", "{\"type\": \"NFD\"}", "\xCC\x81\xCC\xA7", 100000),
                     QL_ERR_FORMAT);
    assert_non_null(strstr(err.message, "combining marks"));
    /* Each step makes a hundred bytes of one. */
    char grow[1024], step[256], with[101];
    memset(with, 'a', 100);
    with[100] = '\0';
    snprintf(step, sizeof step,
             "{\"type\": \"Replace\", \"pattern\": {\"String\": \"a\"}, \"content\": \"%s\"}", with);
    snprintf(grow, sizeof grow, "%s, %s, %s", step, step, step);
    assert_int_equal(encode_many("{\"type\": \"NFC\"}", grow, "a", 10000), QL_ERR_FORMAT);
    assert_non_null(strstr(err.message, "expand"));
}

/* Let every allocation fail once, then all from it on. */
static void test_memory_runs_out(void **state)
{
    (void)state;
    put(file, base, sizeof base - 1);
    for (int persistent = 0; persistent < 2; persistent++) {
        bool done = false;
        for (long n = 0; !done; n++) {
            ql_tokenizer *t;
            int32_t *ids = NULL;
            size_t count, len;
            char *text = NULL;
            ql_mem_fail_after(n, persistent);
            ql_status status = load_folder(&t);
            if (status == QL_OK)
                status = ql_tokenizer_encode(t, "abab \xC3\xA9<s>", 10, 3, &ids, &count, &err);
            if (status == QL_OK) status = ql_tokenizer_decode(t, ids, count, false, &text, &len, &err);
            done = ql_mem_count() <= n;
            ql_mem_fail_after(-1, false);
            if (status != QL_OK && status != QL_ERR_MEMORY) fail_msg("allocation %ld: %s", n, err.message);
            if (done) assert_int_equal(status, QL_OK);
            ql_free(ids);
            ql_free(text);
            ql_tokenizer_free(t);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_refusals),           cmocka_unit_test(test_files),
        cmocka_unit_test(test_too_many_values),    cmocka_unit_test(test_mutations),
        cmocka_unit_test(test_hostile_work),       cmocka_unit_test(test_memory_runs_out),
        cmocka_unit_test(test_dropped_characters),
    };
    return cmocka_run_group_tests_name("tokenizer, bad input", tests, make_folder, drop_folder);
}
