#include "file_help.h"

#include "file.h"
#include "json.h"
#include "json_scan.h"
#include "mem.h"

#include <float.h>
#include <locale.h>
#include <math.h>

static void check_refusals(void **state)
{
    static const struct {
        const char *text, *part;
    } cases[] = {
        {"", "ends early"},
        {"  ", "ends early"},
        {"{", "ends early"},
        {"[1,", "ends early"},
        {"\"abc", "ends early"},
        {"{\"a\"", "':' after a key"},
        {"{\"a\":1,}", "a key in quotes"},
        {"{a:1}", "a key in quotes"},
        {"[1,]", "line 1, column 4"},
        {"[1 2]", "',' or ']'"},
        {"{\"a\":1 \"b\":2}", "',' or '}'"},
        {"[1}", "',' or ']'"},
        {"\n\n [1] x", "line 3, column 6"},
        {"\xef\xbb\xbf{}", "byte-order mark"},
        {"{} {}", "after the document"},
        {"01", "leading zero"},
        {"-01", "leading zero"},
        {"-", "a digit"},
        {"+1", "a value"},
        {".5", "a value"},
        {"1.", "point"},
        {"1.e3", "point"},
        {"1e", "exponent"},
        {"1e+", "exponent"},
        {"1e999", "too large"},
        {"0x10", "after the document"},
        {"NaN", "a value"},
        {"Infinity", "a value"},
        {"-Infinity", "a digit"},
        {"tru", "a value"},
        {"nulL", "a value"},
        {"'a'", "a value"},
        {"\"\t\"", "control character"},
        {"\"\\x41\"", "unknown escape"},
        {"\"\\u12g4\"", "four hex digits"},
        {"\"\\u12", "four hex digits"},
        {"\"\\ud800\"", "surrogate"},
        {"\"\\ud800\\u0041\"", "surrogate"},
        {"\"\\udc00\"", "surrogate"},
        {"\"\xff\"", "invalid UTF-8"},
        {"\"\xc0\x80\"", "invalid UTF-8"},
        {"\"\xc3\"", "invalid UTF-8"},
        {"\"\xe0\x80\x80\"", "invalid UTF-8"},
        {"\"\xed\xa0\x80\"", "invalid UTF-8"},
        {"\"\xf0\x80\x80\x80\"", "invalid UTF-8"},
        {"\"\xf4\x90\x80\x80\"", "invalid UTF-8"},
        {"{\"a\":1,\"a\":2}", "\"a\" is given twice"},
        {"[{\"b\":{\"x\":1,\"\\u0078\":2}}]", "given twice"},
        {"[\"\\u0000\"]", "\\u0000"},
        {"// x\n1", "a value"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ql_err err = {0};
        cJSON *root;
        assert_int_not_equal(ql_json_parse(cases[i].text, strlen(cases[i].text), "f.json", &root, &err),
                             QL_OK);
        assert_null(root);
        assert_contains(err.message, "f.json: ");
        assert_contains(err.message, cases[i].part);
        assert_int_not_equal(ql_json_check(cases[i].text, strlen(cases[i].text), "f.json", NULL), QL_OK);
    }
    assert_int_not_equal(ql_json_check("1\0 ", 3, "f.json", NULL), QL_OK);
}

static void check_depth(void **state)
{
    char text[2 * 300 + 1];
    ql_err err = {0};
    (void)state;
    memset(text, '[', 300);
    memset(text + 300, ']', 300);
    text[600] = '\0';
    assert_int_equal(ql_json_check(text, 600, "f", &err), QL_ERR_FORMAT);
    assert_contains(err.message, "nested too deeply");
    assert_int_equal(ql_json_check(text + 300 - QL_JSON_DEPTH, 2 * QL_JSON_DEPTH, "f", &err), QL_OK);
}

static void check_tokens(void **state)
{
    static const char text[] =
        " {\"a\\n\":[-0, 12, 1.5e2, 9223372036854775807, 9223372036854775808,true,false,null],"
        "\"b\":{},\"c\":[]} ";
    static const ql_json_kind kinds[] = {
        QL_JSON_OBJECT, QL_JSON_KEY,       QL_JSON_ARRAY,     QL_JSON_INT,        QL_JSON_INT,
        QL_JSON_FLOAT,  QL_JSON_INT,       QL_JSON_FLOAT,     QL_JSON_TRUE,       QL_JSON_FALSE,
        QL_JSON_NULL,   QL_JSON_ARRAY_END, QL_JSON_KEY,       QL_JSON_OBJECT,     QL_JSON_OBJECT_END,
        QL_JSON_KEY,    QL_JSON_ARRAY,     QL_JSON_ARRAY_END, QL_JSON_OBJECT_END, QL_JSON_END};
    ql_json_scan scan;
    ql_json_token token;
    char decoded[16];
    (void)state;
    ql_json_scan_init(&scan, text, sizeof text - 1, 8);
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        assert_int_equal(ql_json_scan_next(&scan, &token, NULL), QL_OK);
        assert_int_equal(token.kind, kinds[i]);
        if (i == 1) {
            assert_true(token.escaped);
            assert_int_equal(ql_json_unescape(&token, decoded), 2);
            assert_memory_equal(decoded, "a\n", 2);
        }
        if (i == 4) assert_int_equal(token.integer, 12);
        if (i == 5) assert_true(token.number == 150);
        if (i == 6) assert_true(token.integer == INT64_MAX);
        if (i == 7) assert_true(token.number == 9223372036854775808.0);
    }
    ql_json_scan_init(&scan, text, sizeof text - 1, 8);
    assert_int_equal(ql_json_scan_skip(&scan, NULL), QL_OK);
    assert_int_equal(ql_json_scan_next(&scan, &token, NULL), QL_OK);
    assert_int_equal(token.kind, QL_JSON_END);
}

static void check_unescape(void **state)
{
    static const char text[] =
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u0041\\u00e9\\u20AC\\ud83d\\ude00\xf0\x9f\x98\x80\"";
    ql_json_scan scan;
    ql_json_token token;
    char decoded[sizeof text];
    (void)state;
    ql_json_scan_init(&scan, text, sizeof text - 1, 1);
    assert_int_equal(ql_json_scan_next(&scan, &token, NULL), QL_OK);
    size_t n = ql_json_unescape(&token, decoded);
    decoded[n] = '\0';
    assert_string_equal(decoded, "\"\\/\b\f\n\r\tA\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80\xf0\x9f\x98\x80");
}

static void check_numbers(void **state)
{
    static const struct {
        double value;
        const char *text;
    } cases[] = {{0.1, "0.1"},
                 {2, "2.0"},
                 {-0.0, "-0.0"},
                 {1e-5, "1e-05"},
                 {1e300, "1e+300"},
                 {0.04722730442881584, "0.04722730442881584"},
                 {DBL_MAX, "1.7976931348623157e+308"},
                 {5e-324, "4.94065645841247e-324"}};
    char text[QL_JSON_NUMBER];
    (void)state;
    /* A comma as the decimal point, where such a locale is installed, must change nothing. */
    const char *german = setlocale(LC_NUMERIC, "de_DE.UTF-8");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ql_json_number_text(cases[i].value, text);
        assert_string_equal(text, cases[i].text);
        ql_json_scan scan;
        ql_json_token token;
        ql_json_scan_init(&scan, text, strlen(text), 1);
        assert_int_equal(ql_json_scan_next(&scan, &token, NULL), QL_OK);
        assert_true(token.number == cases[i].value);
    }
    if (german) setlocale(LC_NUMERIC, "C");
}

static void check_shown(void **state)
{
    char out[QL_JSON_SHOWN], longer[300];
    (void)state;
    assert_string_equal(ql_json_shown("a\x1b[2J\xff\xc3\xa9", 8, out), "a?[2J?\xc3\xa9");
    memset(longer, 'x', sizeof longer);
    assert_true(strlen(ql_json_shown(longer, sizeof longer, out)) < QL_JSON_SHOWN);
    assert_contains(out, "xxx...");
}

static void check_fields(void **state)
{
    static const char text[] =
        "{\"i\":5,\"big\":1e17,\"half\":0.5,\"s\":\"x\",\"b\":true,\"n\":null,\"a\":[]}";
    cJSON *root;
    ql_err err = {0};
    int64_t i, seven = 7;
    double d, pi = 3;
    bool b, no = false;
    const char *s, *def = "def";
    (void)state;
    assert_int_equal(ql_json_parse(text, sizeof text - 1, "f.json", &root, &err), QL_OK);
    ql_json_at at = {root, "f.json", "in."};
    assert_int_equal(ql_json_int(at, "i", 0, 9, NULL, &i, &err), QL_OK);
    assert_int_equal(i, 5);
    assert_int_equal(ql_json_int(at, "n", 0, 9, &seven, &i, &err), QL_OK);
    assert_int_equal(i, 7);
    assert_int_equal(ql_json_int(at, "none", 0, 9, &i, &i, &err), QL_OK);
    assert_int_equal(i, 7);
    assert_int_equal(ql_json_number(at, "half", 0, 1, &pi, &d, &err), QL_OK);
    assert_true(d == 0.5);
    assert_int_equal(ql_json_number(at, "n", 0, 1, &pi, &d, &err), QL_OK);
    assert_true(d == 3);
    assert_int_equal(ql_json_bool(at, "b", &no, &b, &err), QL_OK);
    assert_true(b);
    assert_int_equal(ql_json_bool(at, "none", &no, &b, &err), QL_OK);
    assert_false(b);
    assert_int_equal(ql_json_string(at, "s", &def, &s, &err), QL_OK);
    assert_string_equal(s, "x");
    assert_int_equal(ql_json_string(at, "none", &def, &s, &err), QL_OK);
    assert_string_equal(s, "def");

    assert_int_equal(ql_json_int(at, "none", 0, 9, NULL, &i, &err), QL_ERR_FORMAT);
    assert_string_equal(err.message, "f.json: in.none is missing");
    assert_int_equal(ql_json_int(at, "i", 6, 9, NULL, &i, &err), QL_ERR_FORMAT);
    assert_string_equal(err.message, "f.json: in.i = 5, expected 6 to 9");
    assert_int_equal(ql_json_int(at, "half", 0, 9, &seven, &i, &err), QL_ERR_FORMAT);
    assert_int_equal(ql_json_int(at, "big", 0, INT64_MAX, &seven, &i, &err), QL_ERR_FORMAT);
    assert_int_equal(ql_json_int(at, "s", 0, 9, &seven, &i, &err), QL_ERR_FORMAT);
    assert_string_equal(err.message, "f.json: in.s is a string, expected an integer");
    assert_int_equal(ql_json_number(at, "b", 0, 1, NULL, &d, &err), QL_ERR_FORMAT);
    assert_int_equal(ql_json_number(at, "half", 0.6, 1, NULL, &d, &err), QL_ERR_FORMAT);
    assert_int_equal(ql_json_bool(at, "i", &no, &b, &err), QL_ERR_FORMAT);
    assert_int_equal(ql_json_string(at, "a", &def, &s, &err), QL_ERR_FORMAT);
    cJSON_Delete(root);
}

static void check_memory(void **state)
{
    /* Enough keys that the table of keys grows, and one with an escape. */
    char text[4096] = "{\"\\u0061\":[1,\"x\",{\"y\":null}]", key[32];
    (void)state;
    for (int i = 0; i < 100; i++) {
        snprintf(key, sizeof key, ",\"key%d\":%d", i, i);
        strcat(text, key);
    }
    strcat(text, "}");
    for (int persistent = 0; persistent < 2; persistent++) {
        for (long n = 0;; n++) {
            cJSON *root;
            ql_err err = {0};
            ql_mem_fail_after(n, persistent);
            ql_status status = ql_json_parse(text, strlen(text), "f", &root, &err);
            ql_mem_fail_after(-1, false);
            cJSON_Delete(root);
            if (status == QL_OK) break;
            assert_int_equal(status, QL_ERR_MEMORY);
            assert_null(root);
            assert_true(n < 10000);
        }
    }
}

static void check_files(void **state)
{
    cJSON *root;
    ql_err err = {0};
    (void)state;
    const char *path = write_text("a.json", "{\"a\":1}");
    assert_int_equal(ql_json_load(path, 100, &root, &err), QL_OK);
    cJSON_Delete(root);
    assert_int_equal(ql_json_load(path, 3, &root, &err), QL_ERR_FORMAT);
    assert_contains(err.message, "over the limit");
    assert_int_equal(ql_json_load(temp_path("absent"), 3, &root, &err), QL_ERR_NOT_FOUND);
    assert_int_equal(ql_json_load(temp_root, 3, &root, &err), QL_ERR_IO);
    assert_contains(err.message, "a folder");
}

static void check_real(void **state)
{
    static const char *const files[] = {"tokenizers/llama3/tokenizer.json",
                                        "tokenizers/llama3/tokenizer_config.json",
                                        "tokenizers/tinyllama/tokenizer.json",
                                        "tokenizers/tinyllama/tokenizer_config.json",
                                        "configs/Meta-Llama-3-8B-Instruct/model.safetensors.index.json",
                                        "chat/renders.json"};
    (void)state;
    if (!ql_file_is_folder(QLUA_SOURCE_DIR "/../shared/data")) skip();
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char path[1024];
        cJSON *root;
        ql_err err = {0};
        snprintf(path, sizeof path, "%s/../shared/data/%s", QLUA_SOURCE_DIR, files[i]);
        if (ql_json_load(path, 64 << 20, &root, &err)) fail_msg("%s", err.message);
        cJSON_Delete(root);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(check_refusals), cmocka_unit_test(check_depth),   cmocka_unit_test(check_tokens),
        cmocka_unit_test(check_unescape), cmocka_unit_test(check_numbers), cmocka_unit_test(check_shown),
        cmocka_unit_test(check_fields),   cmocka_unit_test(check_memory),  cmocka_unit_test(check_files),
        cmocka_unit_test(check_real),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
