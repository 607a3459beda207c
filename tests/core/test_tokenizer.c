/* Tokenizers against the values of Hugging Face's `tokenizers` and of llama.cpp's vectors, and against
 * themselves: what is encoded decodes to the same text, a stream says what decode says, long words merge as
 * short ones do. */
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

#define GOLDEN QLUA_SOURCE_DIR "/tests/golden/"
#define DATA QLUA_SOURCE_DIR "/../shared/data/"

static ql_err err;

static ql_tokenizer *load(const char *path)
{
    ql_tokenizer *t;
    if (ql_tokenizer_load(path, &t, &err) != QL_OK) fail_msg("%s", err.message);
    return t;
}

static int32_t *encode(ql_tokenizer *t, const char *text, size_t len, unsigned flags, size_t *n)
{
    int32_t *ids;
    if (ql_tokenizer_encode(t, text, len, flags, &ids, n, &err) != QL_OK) fail_msg("%s", err.message);
    return ids;
}

static char *decode(const ql_tokenizer *t, const int32_t *ids, size_t n, bool skip, size_t *len)
{
    char *text;
    if (ql_tokenizer_decode(t, ids, n, skip, &text, len, &err) != QL_OK) fail_msg("%s", err.message);
    return text;
}

/* All that a stream gives for ids; freed with free. */
static char *stream(const ql_tokenizer *t, const int32_t *ids, size_t n, bool skip, size_t *len)
{
    ql_token_stream *s;
    char *all = NULL;
    *len = 0;
    assert_int_equal(ql_token_stream_new(t, skip, &s, &err), QL_OK);
    for (size_t i = 0; i <= n; i++) {
        const char *text;
        size_t got;
        ql_status status = i < n ? ql_token_stream_push(s, ids[i], &text, &got, &err)
                                 : ql_token_stream_flush(s, &text, &got, &err);
        assert_int_equal(status, QL_OK);
        all = realloc(all, *len + got + 1);
        memcpy(all + *len, text, got);
        *len += got;
    }
    all[*len] = '\0';
    ql_token_stream_free(s);
    return all;
}

/* The document, with every NUL in its strings as U+E000: cJSON's strings end at a NUL. */
static cJSON *golden(void)
{
    cJSON *root;
    char *text, *at;
    size_t size;
    if (!ql_file_exists(GOLDEN "tokenizers.json")) skip();
    assert_int_equal(ql_file_read(GOLDEN "tokenizers.json", 64 << 20, &text, &size, &err), QL_OK);
    for (at = text; (at = strstr(at, "\\u0000")) != NULL;) memcpy(at, "\\uE000", 6);
    if (ql_json_parse(text, size, "tokenizers.json", &root, &err) != QL_OK) fail_msg("%s", err.message);
    ql_free(text);
    return root;
}

/* A member with U+E000 turned back into NUL; freed with free. */
static char *string(const cJSON *object, const char *key, size_t *len)
{
    const char *s = ql_json_get(object, key)->valuestring;
    char *out = malloc(strlen(s) + 1);
    for (*len = 0; *s != '\0'; (*len)++) {
        bool nul = strncmp(s, "\xEE\x80\x80", 3) == 0;
        out[*len] = nul ? '\0' : *s;
        s += nul ? 3 : 1;
    }
    out[*len] = '\0';
    return out;
}

static int32_t *numbers(const cJSON *array, size_t *n)
{
    const cJSON *item;
    int32_t *out = malloc((size_t)cJSON_GetArraySize(array) * sizeof *out + 1);
    *n = 0;
    cJSON_ArrayForEach(item, array) out[(*n)++] = item->valueint;
    return out;
}

static void expect_ids(ql_tokenizer *t, const char *name, const cJSON *row, const char *key, unsigned flags)
{
    size_t len, want, got;
    char *text = string(row, "text", &len);
    int32_t *expected = numbers(ql_json_get(row, key), &want);
    int32_t *ids = encode(t, text, len, flags, &got);
    if (got != want || (got > 0 && memcmp(ids, expected, got * sizeof *ids) != 0)) {
        for (size_t i = 0; i < got; i++) fprintf(stderr, " %d", (int)ids[i]);
        fail_msg("%s: %s of \"%s\" differ", name, key, text);
    }
    ql_free(ids);
    free(expected);
    free(text);
}

static void expect_text(const ql_tokenizer *t, const char *name, const cJSON *row, const char *ids_key,
                        const char *key, bool skip)
{
    size_t n, len, want_len;
    char *want = string(row, key, &want_len);
    int32_t *ids = numbers(ql_json_get(row, ids_key), &n);
    char *text = decode(t, ids, n, skip, &len);
    if (len != want_len || memcmp(text, want, len) != 0)
        fail_msg("%s: %s is \"%s\", not \"%s\"", name, key, text, want);
    ql_free(text);
    text = stream(t, ids, n, skip, &len);
    /* A run of byte tokens that is not UTF-8 as a whole is where a stream may give more than decode. */
    bool lenient = strstr(want, "\xEF\xBF\xBD") != NULL && ql_tokenizer_id(t, "<0x00>", 6) >= 0;
    if (!lenient && (len != want_len || memcmp(text, want, len) != 0))
        fail_msg("%s: streamed %s is \"%s\", not \"%s\"", name, key, text, want);
    free(text);
    free(ids);
    free(want);
}

static void check_golden(const char *where, const char *root)
{
    cJSON *doc = golden();
    const cJSON *entry, *row;
    size_t seen = 0;
    cJSON_ArrayForEach(entry, ql_json_get(doc, "tokenizers"))
    {
        const char *name = ql_json_get(entry, "name")->valuestring;
        if (strcmp(ql_json_get(entry, "where")->valuestring, where) != 0) continue;
        char path[512];
        snprintf(path, sizeof path, "%s%s", root, ql_json_get(entry, "path")->valuestring);
        ql_tokenizer *t = load(path);
        assert_int_equal(ql_tokenizer_vocab_size(t), ql_json_get(entry, "size")->valueint);
        cJSON_ArrayForEach(row, ql_json_get(entry, "encode"))
        {
            expect_ids(t, name, row, "ids", 0);
            expect_ids(t, name, row, "full", QL_TOKENIZER_BOS | QL_TOKENIZER_SPECIAL);
            expect_text(t, name, row, "full", "decoded", false);
            expect_text(t, name, row, "full", "skipped", true);
            seen++;
        }
        cJSON_ArrayForEach(row, ql_json_get(entry, "decode"))
        {
            expect_text(t, name, row, "ids", "decoded", false);
            expect_text(t, name, row, "ids", "skipped", true);
        }
        ql_tokenizer_free(t);
    }
    cJSON_Delete(doc);
    assert_true(seen > 100);
}

static void test_golden(void **state)
{
    (void)state;
    check_golden("golden", GOLDEN);
}

static void test_golden_real(void **state)
{
    (void)state;
    if (!ql_file_exists(DATA "tokenizers/llama3/tokenizer.json")) skip();
    check_golden("data", DATA);
}

/* llama.cpp's vectors: texts between separator lines, ids one line each, without BOS. */
static void check_vectors(const char *folder, const char *vectors)
{
    static const char separator[] = "\n__ggml_vocab_test__\n";
    char path[512], *texts, *lines;
    size_t size;
    if (!ql_file_exists(folder)) skip();
    ql_tokenizer *t = load(folder);
    snprintf(path, sizeof path, "%s.inp", vectors);
    assert_int_equal(ql_file_read(path, 1 << 20, &texts, &size, &err), QL_OK);
    snprintf(path, sizeof path, "%s.out", vectors);
    assert_int_equal(ql_file_read(path, 1 << 20, &lines, &size, &err), QL_OK);
    int seen = 0;
    for (char *text = texts, *line = lines; text != NULL; seen++) {
        char *end = strstr(text, separator);
        size_t n, len = end != NULL ? (size_t)(end - text) : strlen(text);
        int32_t *ids = encode(t, text, len, 0, &n);
        for (size_t i = 0; i < n; i++) {
            long want = strtol(line, &line, 10);
            if (want != ids[i]) fail_msg("text %d, id %zu: %d, not %ld", seen + 1, i + 1, (int)ids[i], want);
        }
        while (*line == ' ') line++;
        assert_true(*line == '\n' || *line == '\0');
        line += *line == '\n';
        ql_free(ids);
        text = end != NULL ? end + sizeof separator - 1 : NULL;
    }
    assert_int_equal(seen, 47);
    ql_free(texts);
    ql_free(lines);
    ql_tokenizer_free(t);
}

static void test_vectors_llama3(void **state)
{
    (void)state;
    check_vectors(DATA "tokenizers/llama3", DATA "tokenizers/vectors/ggml-vocab-llama-bpe.gguf");
}

static void test_vectors_tinyllama(void **state)
{
    (void)state;
    check_vectors(DATA "tokenizers/tinyllama", DATA "tokenizers/vectors/ggml-vocab-llama-spm.gguf");
}

/* Random text of characters of every width, with runs of spaces and marks; returns its length. */
static size_t random_text(unsigned *seed, char *out, size_t characters)
{
    static const char *const some[] = {
        " ",  "a",  "e",        "t",  "\n", "1",  "\xC3\xA9", "\xE6\x97\xA5",
        "\t", ".",  "\xCC\x81", "th", "'s", "  ", "<s>",      "\xF0\x9F\x98\x80",
        "B",  "\r", "\xC2\xA0", "-",  "er", "in", "</s>",     "\xE2\x96\x81"};
    size_t len = 0;
    while (characters-- > 0) {
        const char *s = some[(size_t)rand_r(seed) % (sizeof some / sizeof *some)];
        memcpy(out + len, s, strlen(s));
        len += strlen(s);
    }
    return len;
}

static void test_round_trip(void **state)
{
    (void)state;
    static const char *const names[] = {"llama3_like", "llama2_like"};
    unsigned seed = 7;
    for (size_t k = 0; k < 2; k++) {
        char path[256], text[2048];
        snprintf(path, sizeof path, GOLDEN "tokenizers/%s", names[k]);
        if (!ql_file_exists(path)) skip();
        ql_tokenizer *t = load(path);
        for (int round = 0; round < 400; round++) {
            size_t n, got, streamed, len = random_text(&seed, text, (size_t)rand_r(&seed) % 200);
            for (size_t i = 0; k == 1 && i + 3 <= len; i++) /* Llama 2 reads a mark as a space */
                if (memcmp(text + i, "\xE2\x96\x81", 3) == 0) memcpy(text + i, "abc", 3);
            int32_t *ids = encode(t, text, len, 0, &n);
            char *back = decode(t, ids, n, false, &got);
            assert_int_equal(got, len);
            assert_memory_equal(back, text, len);
            char *live = stream(t, ids, n, false, &streamed);
            assert_int_equal(streamed, len);
            assert_memory_equal(live, text, len);
            ql_free(back);
            ql_free(ids);
            free(live);
        }
        ql_tokenizer_free(t);
    }
}

/* Bytes of any value in decode and stream: both mend them alike. */
static void test_stream_of_any_bytes(void **state)
{
    (void)state;
    if (!ql_file_exists(GOLDEN "tokenizers/llama3_like")) skip();
    ql_tokenizer *t = load(GOLDEN "tokenizers/llama3_like");
    unsigned seed = 11;
    for (int round = 0; round < 2000; round++) {
        int32_t ids[40];
        size_t n = (size_t)rand_r(&seed) % 40, len, streamed;
        for (size_t i = 0; i < n; i++) ids[i] = rand_r(&seed) % 256; /* the byte alphabet comes first */
        char *text = decode(t, ids, n, false, &len);
        char *live = stream(t, ids, n, false, &streamed);
        assert_int_equal(len, streamed);
        assert_memory_equal(text, live, len);
        ql_free(text);
        free(live);
    }
    ql_tokenizer_free(t);
}

static void test_stream_holds_back(void **state)
{
    (void)state;
    if (!ql_file_exists(GOLDEN "tokenizers/llama2_like")) skip();
    ql_tokenizer *t = load(GOLDEN "tokenizers/llama2_like");
    ql_token_stream *s;
    const char *text;
    size_t len;
    static const char *const bytes[] = {"<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0xF0>", "<0x9F>"};
    assert_int_equal(ql_token_stream_new(t, false, &s, &err), QL_OK);
    for (size_t i = 0; i < 6; i++) {
        int32_t id = ql_tokenizer_id(t, bytes[i], 6);
        assert_true(id >= 0);
        assert_int_equal(ql_token_stream_push(s, id, &text, &len, &err), QL_OK);
        assert_int_equal(len, i == 3 ? 4 : 0);
        if (i == 3) assert_memory_equal(text, "\xF0\x9F\x98\x80", 4);
    }
    assert_int_equal(ql_token_stream_flush(s, &text, &len, &err), QL_OK);
    assert_int_equal(len, 6); /* two bytes of no character */
    assert_int_equal(ql_token_stream_flush(s, &text, &len, &err), QL_OK);
    assert_int_equal(len, 0);
    assert_int_equal(ql_token_stream_push(s, -1, &text, &len, &err), QL_ERR_ARG);
    ql_token_stream_free(s);
    ql_tokenizer_free(t);
}

static void test_api(void **state)
{
    (void)state;
    if (!ql_file_exists(GOLDEN "tokenizers/llama3_like")) skip();
    ql_tokenizer *t = load(GOLDEN "tokenizers/llama3_like/tokenizer.json");
    ql_tokenizer_roles roles = ql_tokenizer_special(t);
    size_t len, n;
    int32_t *ids, bad = -3;
    char *text;
    assert_string_equal(ql_tokenizer_token(t, roles.bos, &len), "<|begin_of_text|>");
    assert_int_equal(len, 17);
    assert_int_equal(ql_tokenizer_id(t, "<|eot_id|>", 10), roles.eos);
    assert_int_equal(roles.pad, -1);
    assert_true(ql_tokenizer_is_special(t, roles.bos));
    assert_false(ql_tokenizer_is_special(t, 0));
    assert_int_equal(ql_tokenizer_id(t, "no such token", 13), -1);
    assert_null(ql_tokenizer_token(t, -1, NULL));
    assert_null(ql_tokenizer_token(t, ql_tokenizer_vocab_size(t), NULL));
    assert_int_equal(ql_tokenizer_encode(t, "ab\xC3(", 4, 0, &ids, &n, &err), QL_ERR_FORMAT);
    assert_null(ids);
    assert_non_null(strstr(err.message, "offset 2"));
    assert_int_equal(ql_tokenizer_decode(t, &bad, 1, false, &text, &len, &err), QL_ERR_ARG);
    assert_null(text);
    ids = encode(t, "a\0b", 3, 0, &n);
    text = decode(t, ids, n, false, &len);
    assert_int_equal(len, 3);
    assert_memory_equal(text, "a\0b", 3);
    ql_free(ids);
    ql_free(text);
    ql_tokenizer_free(t);
    ql_tokenizer_free(NULL);
    ql_token_stream_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),
        cmocka_unit_test(test_golden_real),
        cmocka_unit_test(test_vectors_llama3),
        cmocka_unit_test(test_vectors_tinyllama),
        cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_stream_of_any_bytes),
        cmocka_unit_test(test_stream_holds_back),
        cmocka_unit_test(test_api),
    };
    return cmocka_run_group_tests_name("tokenizer", tests, NULL, NULL);
}
