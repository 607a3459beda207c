#include "file_help.h"

#include "mem.h"
#include "safetensors.h"

#include <glob.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* Three tensors and metadata; chosen so that changing or removing any byte outside a name breaks the file: no
 * extent is 0, and no dtype becomes another by losing a letter. */
static const char valid_header[] =
    "{\"__metadata__\":{\"format\":\"pt\"},"
    "\"first.weight\":{\"dtype\":\"F32\",\"shape\":[4,3],\"data_offsets\":[0,48]},"
    "\"second\":{\"dtype\":\"U8\",\"shape\":[15],\"data_offsets\":[48,63]},"
    "\"third\":{\"dtype\":\"I64\",\"shape\":[2,1,2],\"data_offsets\":[63,95]}}";
enum { VALID_DATA = 95 };

static struct {
    int tried, refused;
} corpus;

/* Write header and `data` bytes of content under the length that `declared` says. */
static const char *write_st(const char *header, size_t header_size, uint64_t declared, size_t data)
{
    static unsigned char bytes[1 << 16];
    assert_true(8 + header_size + data <= sizeof bytes);
    for (int i = 0; i < 8; i++) bytes[i] = (unsigned char)(declared >> 8 * i);
    memcpy(bytes + 8, header, header_size);
    for (size_t i = 0; i < data; i++) bytes[8 + header_size + i] = (unsigned char)(i * 7 + 1);
    return write_temp("case.safetensors", bytes, 8 + header_size + data);
}

static void expect_refused(const char *path, const char *part)
{
    ql_st *st;
    ql_err err = {0};
    corpus.tried++;
    ql_status status = ql_st_open(path, &st, &err);
    if (status == QL_OK) fail_msg("accepted, expected \"%s\"", part);
    assert_null(st);
    assert_true(status == QL_ERR_FORMAT);
    assert_contains(err.message, path);
    assert_contains(err.message, part);
    assert_int_equal(ql_st_open(path, &st, NULL), status);
    corpus.refused++;
}

static void refuse_header(const char *header, size_t data, const char *part)
{
    expect_refused(write_st(header, strlen(header), strlen(header), data), part);
}

static void accept_header(const char *header, size_t data, size_t count)
{
    ql_st *st;
    ql_err err = {0};
    if (ql_st_open(write_st(header, strlen(header), strlen(header), data), &st, &err))
        fail_msg("%s", err.message);
    assert_int_equal(ql_st_count(st), count);
    ql_st_close(st);
}

static void check_reading(void **state)
{
    ql_st *st;
    ql_err err = {0};
    unsigned char data[64];
    (void)state;
    const char *path = write_st(valid_header, sizeof valid_header - 1, sizeof valid_header - 1, VALID_DATA);
    assert_int_equal(ql_st_open(path, &st, &err), QL_OK);
    assert_string_equal(ql_st_path(st), path);
    assert_int_equal(ql_st_count(st), 3);
    assert_int_equal(ql_st_file_bytes(st), 8 + sizeof valid_header - 1 + VALID_DATA);
    const ql_st_tensor *tensor = ql_st_find(st, "third");
    assert_ptr_equal(tensor, ql_st_at(st, 2));
    assert_null(ql_st_at(st, 3));
    assert_int_equal(tensor->dtype, QL_I64);
    assert_int_equal(tensor->ndim, 3);
    assert_int_equal(tensor->shape[2], 2);
    assert_int_equal(ql_st_tensor_bytes(tensor), 32);
    assert_int_equal(ql_st_tensor_elements(tensor), 4);
    assert_int_equal(ql_st_read(st, tensor, 1, 31, data, &err), QL_OK);
    for (int i = 0; i < 31; i++) assert_int_equal(data[i], (unsigned char)((63 + 1 + i) * 7 + 1));
    assert_int_equal(ql_st_read(st, tensor, 32, 0, data, &err), QL_OK);
    assert_int_equal(ql_st_read(st, tensor, 1, 32, data, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_read(st, tensor, 33, 0, data, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_read(st, tensor, UINT64_MAX, 2, data, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_read_file(st, 8, 15, data, &err), QL_OK);
    assert_memory_equal(data, "{\"__metadata__\"", 15);
    assert_null(ql_st_find(st, "fourth"));
    assert_null(ql_st_find(st, ""));
    assert_null(ql_st_find(st, "__metadata__"));

    /* Shortened while it is open: an error, not a signal. */
    assert_int_equal(truncate(path, 8 + sizeof valid_header - 1 + 70), 0);
    assert_int_equal(ql_st_read(st, tensor, 0, 32, data, &err), QL_ERR_IO);
    assert_contains(err.message, path);
    ql_st_close(st);
    ql_st_close(NULL);
}

#define T(name, dtype, shape, from, to)                                                                      \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #from "," #to "]}"

static void check_accepted(void **state)
{
    char header[4096] = "{", entry[128];
    size_t end = 0;
    (void)state;
    accept_header("{}", 0, 0);
    accept_header("{}      ", 0, 0);
    accept_header("{ \"__metadata__\" : { } } \n", 0, 0);
    accept_header("{" T("scalar", "F32", "[]", 0, 4) "}", 4, 1);
    accept_header("{" T("empty", "F32", "[0]", 0, 0) "}", 0, 1);
    accept_header("{" T("empty", "F32", "[0,5,7]", 0, 0) "," T("x", "U8", "[2]", 0, 2) "}", 2, 2);
    accept_header("{" T("x", "U8", "[2]", 0, 2) "," T("empty", "F64", "[3,0]", 2, 2) "}", 2, 2);
    accept_header(
        "{" T("b", "U8", "[2]", 2, 4) "," T("e", "U8", "[0]", 2, 2) "," T("a", "U8", "[2]", 0, 2) "}", 4, 3);
    accept_header("{" T("deep", "U8", "[1,1,1,1,1,1,1,3]", 0, 3) "}", 3, 1);
    accept_header("{" T("\\u00e9\\n\\ud83d\\ude00", "U8", "[1]", 0, 1) "}", 1, 1);
    accept_header("{" T("\xc3\xa9 space \\\"quoted\\\"", "U8", "[1]", 0, 1) "}", 1, 1);
    accept_header("{\"a\":{\"data_offsets\":[ 0 , 2 ],\"sh\\u0061pe\":[2],\"dtype\":\"\\u00558\"}}", 2, 1);
    accept_header(
        "{\"__metadata__\":{\"a\":\"\",\"b\":\"\\u0000\",\"\":\"x\"}," T("x", "BOOL", "[1]", 0, 1) "}", 1, 1);
    for (int i = 0; i < QL_DTYPE_COUNT; i++) {
        size_t bytes = 3 * ql_dtype_size((ql_dtype)i);
        snprintf(entry, sizeof entry, "%s\"t%d\":{\"dtype\":\"%s\",\"shape\":[3],\"data_offsets\":[%zu,%zu]}",
                 i ? "," : "", i, ql_dtype_name((ql_dtype)i), end, end + bytes);
        strcat(header, entry);
        end += bytes;
    }
    accept_header(strcat(header, "}"), end, QL_DTYPE_COUNT);
}

/* Every kind of refusal that reliability.md lists. */
static void check_listed(void **state)
{
    static const struct {
        const char *header;
        size_t data;
        const char *part;
    } cases[] = {
        {"\xef\xbb\xbf{}", 0, "byte-order mark"},
        {" {}", 0, "expected '{'"},
        {"[]", 0, "expected '{'"},
        {"null", 0, "expected '{'"},
        {"\"x\"", 0, "expected '{'"},
        {"{", 0, "ends early"},
        {"{}}", 0, "after the document"},
        {"{} x", 0, "after the document"},
        {"{\"\":1}", 0, "name is empty"},
        {"{" T("", "U8", "[1]", 0, 1) "}", 1, "name is empty"},
        {"{" T("a\\u0000b", "U8", "[1]", 0, 1) "}", 1, "NUL"},
        {"{" T("a\xff", "U8", "[1]", 0, 1) "}", 1, "invalid UTF-8"},
        {"{" T("a\xed\xa0\x80", "U8", "[1]", 0, 1) "}", 1, "invalid UTF-8"},
        {"{" T("a\\ud800", "U8", "[1]", 0, 1) "}", 1, "surrogate"},
        {"{" T("a\n", "U8", "[1]", 0, 1) "}", 1, "control character"},
        {"{" T("a", "U8", "[1]", 0, 1) "," T("a", "U8", "[1]", 1, 2) "}", 2, "\"a\": is given twice"},
        {"{" T("a", "U8", "[1]", 0, 1) "," T("\\u0061", "U8", "[1]", 1, 2) "}", 2, "\"a\": is given twice"},
        {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
         "\"dtype\" is given twice"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"shape\":[1],\"data_offsets\":[0,1]}}", 1,
         "\"shape\" is given twice"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"data_\\u006fffsets\":[0,1]}}", 1,
         "given twice"},
        {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__ is given twice"},
        {"{\"__metadata__\":{\"a\":\"1\",\"a\":\"1\"}}", 0, "__metadata__.a is given twice"},
        {"{\"__metadata__\":{\"a\":\"1\",\"\\u0061\":\"1\"}}", 0, "given twice"},
        {"{\"__metadata__\":{\"a\\u0000\":\"1\"}}", 0, "NUL"},
        {"{\"__metadata__\":[]}", 0, "__metadata__ is not an object"},
        {"{\"__metadata__\":null}", 0, "__metadata__ is not an object"},
        {"{\"__metadata__\":{\"n\":1}}", 0, "__metadata__.n is not a string"},
        {"{\"__metadata__\":{\"n\":null}}", 0, "__metadata__.n is not a string"},
        {"{\"__metadata__\":{\"n\":{}}}", 0, "__metadata__.n is not a string"},
        {"{\"a\":{\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "\"a\": dtype is missing"},
        {"{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,1]}}", 1, "\"a\": shape is missing"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1]}}", 1, "\"a\": data_offsets is missing"},
        {"{\"a\":{}}", 1, "\"a\": dtype is missing"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":1}}", 1, "unknown field \"x\""},
        {"{\"a\":[]}", 1, "other than an object"},
        {"{\"a\":null}", 1, "other than an object"},
        {"{\"a\":{\"dtype\":8,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "dtype is not a string"},
        {"{\"a\":{\"dtype\":null,\"shape\":[1],\"data_offsets\":[0,1]}}", 1, "dtype is not a string"},
        {"{" T("a", "F4", "[1]", 0, 1) "}", 1, "unknown dtype F4"},
        {"{" T("a", "u8", "[1]", 0, 1) "}", 1, "unknown dtype u8"},
        {"{" T("a", "uint8", "[1]", 0, 1) "}", 1, "unknown dtype uint8"},
        {"{" T("a", "", "[1]", 0, 1) "}", 1, "unknown dtype"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":1,\"data_offsets\":[0,1]}}", 1, "shape is not an array"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":null,\"data_offsets\":[0,1]}}", 1, "shape is not an array"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":{}}}", 1, "data_offsets is not an array"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[]}}", 1, "not two numbers"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0]}}", 1, "not two numbers"},
        {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1,2]}}", 1, "more than 2"},
        {"{" T("a", "U8", "[1,1,1,1,1,1,1,1,1]", 0, 1) "}", 1, "more than 8"},
        {"{" T("a", "U8", "[NaN]", 0, 1) "}", 1, "expected a value"},
        {"{" T("a", "U8", "[Infinity]", 0, 1) "}", 1, "expected a value"},
        {"{" T("a", "U8", "[1e0]", 0, 1) "}", 1, "shape holds 1e0"},
        {"{" T("a", "U8", "[1e3]", 0, 1000) "}", 1000, "shape holds 1e3"},
        {"{" T("a", "U8", "[4.0]", 0, 4) "}", 4, "shape holds 4.0"},
        {"{" T("a", "U8", "[-1]", 0, 1) "}", 1, "shape holds -1"},
        {"{" T("a", "U8", "[-0]", 0, 0) "}", 0, "shape holds -0"},
        {"{" T("a", "U8", "[007]", 0, 7) "}", 7, "leading zero"},
        {"{" T("a", "U8", "[9223372036854775808]", 0, 1) "}", 1, "shape holds 9223372036854775808"},
        {"{" T("a", "U8", "[18446744073709551617]", 0, 1) "}", 1, "shape holds 18446744073709551617"},
        {"{" T("a", "U8", "[\"1\"]", 0, 1) "}", 1, "no number"},
        {"{" T("a", "U8", "[null]", 0, 1) "}", 1, "no number"},
        {"{" T("a", "U8", "[true]", 0, 1) "}", 1, "no number"},
        {"{" T("a", "U8", "[[1]]", 0, 1) "}", 1, "nested too deeply"},
        {"{" T("a", "U8", "[1]", 0.0, 1) "}", 1, "data_offsets holds 0.0"},
        {"{" T("a", "U8", "[1]", 0, 1e0) "}", 1, "data_offsets holds 1e0"},
        {"{" T("a", "U8", "[1]", -1, 0) "}", 1, "data_offsets holds -1"},
        {"{" T("a", "U8", "[1]", 0, 9223372036854775808) "}", 1, "data_offsets holds"},
        {"{" T("a", "U8", "[4294967296,4294967296]", 0, 1) "}", 1, "overflows"},
        {"{" T("a", "U8", "[4294967296,4294967296,0]", 0, 0) "}", 0, "overflows"},
        {"{" T("a", "U8", "[0,4294967296,4294967296]", 0, 0) "}", 0, "overflows"},
        {"{" T("a", "U8", "[4294967296,0,4294967296]", 0, 0) "}", 0, "overflows"},
        {"{" T("a", "F64", "[2305843009213693952]", 0, 0) "}", 0, "overflows"},
        {"{" T("a", "F32", "[4611686018427387905]", 0, 4) "}", 4, "overflows"},
        {"{" T("a", "F16", "[9223372036854775807]", 0, 4) "}", 4, "overflows"},
        {"{" T("a", "U8", "[1]", 1, 0) "}", 1, "begin at 1 after they end at 0"},
        {"{" T("a", "U8", "[2]", 0, 2) "}", 1, "the file has 1 bytes of data"},
        {"{" T("a", "U8", "[9223372036854775807]", 0, 9223372036854775807) "}", 1,
         "the file has 1 bytes of data"},
        {"{" T("a", "U8", "[1]", 1, 2) "}", 2, "hole"},
        {"{" T("a", "U8", "[1]", 0, 1) "," T("b", "U8", "[1]", 2, 3) "}", 3,
         "\"b\": its data begins at 2 and leaves a hole"},
        {"{" T("b", "U8", "[1]", 2, 3) "," T("a", "U8", "[1]", 0, 1) "}", 3,
         "\"b\": its data begins at 2 and leaves a hole"},
        {"{" T("a", "U8", "[2]", 0, 2) "," T("b", "U8", "[2]", 1, 3) "}", 3,
         "\"b\": its data begins at 1 and overlaps"},
        {"{" T("a", "U8", "[2]", 0, 2) "," T("b", "U8", "[2]", 0, 2) "}", 2, "overlaps"},
        {"{" T("a", "U8", "[2]", 0, 2) "," T("b", "U8", "[0]", 1, 1) "}", 2, "overlaps"},
        {"{" T("a", "U8", "[0]", 1, 1) "," T("b", "U8", "[2]", 0, 2) "}", 2, "overlaps"},
        {"{" T("a", "U8", "[1]", 0, 2) "}", 2, "span 2 bytes, but shape and dtype make 1"},
        {"{" T("a", "F32", "[1]", 0, 1) "}", 1, "span 1 bytes, but shape and dtype make 4"},
        {"{" T("a", "F32", "[]", 0, 8) "}", 8, "span 8 bytes"},
        {"{" T("a", "U8", "[0]", 0, 1) "}", 1, "span 1 bytes"},
        {"{" T("a", "U8", "[1]", 0, 1) "}", 2, "has 2 bytes of data, but its tensors end at 1"},
        {"{}", 1, "has 1 bytes of data, but its tensors end at 0"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refuse_header(cases[i].header, cases[i].data, cases[i].part);
    expect_refused(write_st("{}\0\0", 4, 4, 0), "after the document");
    expect_refused(write_st("{\0}", 3, 3, 0), "key in quotes");
    expect_refused(write_st("{}", 2, 0, 0), "header length is 0");
    expect_refused(write_st("{}", 2, 100000001, 0), "over the limit");
    expect_refused(write_st("{}", 2, UINT64_MAX, 0), "over the limit");
    expect_refused(write_st("{}", 2, UINT64_MAX - 7, 0), "over the limit");
    expect_refused(write_st("{}", 2, 3, 0), "past the end of the file");
    expect_refused(write_text("case.safetensors", ""), "at least 8");
    expect_refused(write_text("case.safetensors", "1234567"), "at least 8");
    expect_refused(write_text("case.safetensors", "GGUF\3\0\0\0 and so on"), "GGUF");
    expect_refused(write_text("case.safetensors", "PK\3\4 and so on"), "pickle");
    expect_refused(write_text("case.safetensors", "<!DOCTYPE html><html>"), "HTML");

    char header[2200];
    memset(header, 'n', sizeof header);
    snprintf(header + 1200, 200, "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}");
    memcpy(header, "{\"", 2);
    refuse_header(header, 1, "over 1024 bytes");
}

static void check_pointer_file(void **state)
{
    static const char pointer[] =
        "version https://git-lfs.github.com/spec/v1\n"
        "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
        "size 12345\n";
    ql_st *st;
    ql_err err = {0};
    (void)state;
    const char *path = write_text("case.safetensors", pointer);
    expect_refused(path, "Git-LFS pointer");
    ql_st_open(path, &st, &err);
    assert_contains(err.hint, "git lfs pull");
    assert_contains(err.hint, "huggingface-cli download");
}

static void check_absent(void **state)
{
    ql_st *st;
    ql_err err = {0};
    (void)state;
    assert_int_equal(ql_st_open(temp_path("absent"), &st, &err), QL_ERR_NOT_FOUND);
    assert_contains(err.message, temp_path("absent"));
    assert_int_equal(ql_st_open(temp_root, &st, &err), QL_ERR_IO);
    assert_int_equal(mkfifo(temp_path("pipe"), 0600), 0);
    assert_int_equal(ql_st_open(temp_path("pipe"), &st, &err), QL_ERR_IO);
    assert_contains(err.message, "not a regular file");
}

/* True when byte `at` of the header lies inside a tensor's name or a metadata string: there, change is
 * allowed. */
static bool in_name(size_t at)
{
    static const char *const names[] = {"format", "pt", "first.weight", "second", "third"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *found = strstr(valid_header, names[i]);
        size_t from = (size_t)(found - valid_header);
        if (at >= from && at < from + strlen(names[i])) return true;
    }
    return false;
}

static void refuse_changed(const char *header, size_t size)
{
    expect_refused(write_st(header, size, size, VALID_DATA), "");
}

static void check_mutated(void **state)
{
    enum { SIZE = sizeof valid_header - 1 };
    static const unsigned char strange[] = {0,   1,   '\n', ' ', '"', '\\', '{',  '}', '[',
                                            ']', ':', ',',  '9', 'x', 0x7f, 0x80, 0xff};
    char header[SIZE + 64];
    (void)state;
    /* Cut at every length, and grown. */
    for (size_t n = 0; n < SIZE + VALID_DATA; n++) {
        size_t head = n < SIZE ? n : SIZE;
        expect_refused(write_st(valid_header, head, SIZE, n - head), "");
    }
    for (size_t n = 1; n <= 64; n++)
        expect_refused(write_st(valid_header, SIZE, SIZE, VALID_DATA + n), "bytes of data");
    /* A header length that is not the header's. */
    for (size_t n = 0; n < SIZE + VALID_DATA + 16; n++)
        if (n != SIZE) expect_refused(write_st(valid_header, SIZE, n, VALID_DATA), "");
    for (int bit = 0; bit < 64; bit++)
        expect_refused(write_st(valid_header, SIZE, SIZE ^ (uint64_t)1 << bit, VALID_DATA), "");
    for (size_t at = 0; at < SIZE; at++) {
        if (in_name(at)) {
            static const char never[] = {'\0', '\1', '\xff', '\xc0'};
            for (size_t i = 0; i < sizeof never; i++) {
                memcpy(header, valid_header, SIZE);
                header[at] = never[i];
                refuse_changed(header, SIZE);
            }
            continue;
        }
        /* One byte changed. */
        for (size_t i = 0; i < sizeof strange; i++) {
            memcpy(header, valid_header, SIZE);
            if (header[at] == (char)strange[i]) continue;
            header[at] = (char)strange[i];
            refuse_changed(header, SIZE);
        }
        /* One byte taken away. */
        memcpy(header, valid_header, at);
        memcpy(header + at, valid_header + at + 1, SIZE - at - 1);
        refuse_changed(header, SIZE - 1);
        /* One byte said twice, where that is not white space. */
        memcpy(header, valid_header, at + 1);
        memcpy(header + at + 1, valid_header + at, SIZE - at);
        refuse_changed(header, SIZE + 1);
        /* Every other digit. */
        for (char digit = '0'; digit <= '9'; digit++) {
            if (valid_header[at] < '0' || valid_header[at] > '9' || digit == valid_header[at]) continue;
            memcpy(header, valid_header, SIZE);
            header[at] = digit;
            refuse_changed(header, SIZE);
        }
    }
    print_message("malformed files tried %d, refused with the file's name %d\n", corpus.tried,
                  corpus.refused);
    assert_true(corpus.tried >= 2000);
    assert_int_equal(corpus.tried, corpus.refused);
}

static uint32_t random_u32(void)
{
    static uint64_t s = 88172645463325252u;
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return (uint32_t)(s >> 16);
}

/* Anything may come out of random damage but a crash; what is accepted must be consistent. */
static void check_random(void **state)
{
    enum { SIZE = sizeof valid_header - 1 };
    char header[SIZE + 1], data[VALID_DATA + 1];
    int accepted = 0;
    (void)state;
    for (int i = 0; i < 3000; i++) {
        ql_st *st;
        ql_err err = {0};
        memcpy(header, valid_header, SIZE);
        for (uint32_t n = random_u32() % 6 + 1; n > 0; n--)
            header[random_u32() % SIZE] =
                random_u32() & 1 ? (char)random_u32() : valid_header[random_u32() % SIZE];
        const char *path = write_st(header, SIZE, SIZE, VALID_DATA);
        if (ql_st_open(path, &st, &err)) {
            assert_contains(err.message, path);
            continue;
        }
        accepted++;
        for (size_t t = 0; t < ql_st_count(st); t++) {
            const ql_st_tensor *tensor = ql_st_at(st, t);
            assert_ptr_equal(ql_st_find(st, tensor->name), tensor);
            assert_int_equal(ql_st_read(st, tensor, 0, (size_t)ql_st_tensor_bytes(tensor), data, &err),
                             QL_OK);
        }
        ql_st_close(st);
    }
    assert_in_range(accepted, 1, 1500);
}

static void check_memory(void **state)
{
    static const char header[] =
        "{\"__metadata__\":{\"a\":\"b\"}," T("b", "U8", "[2]", 2, 4) "," T("a", "U8", "[2]", 0, 2) "}";
    (void)state;
    const char *path = write_st(header, sizeof header - 1, sizeof header - 1, 4);
    for (int persistent = 0; persistent < 2; persistent++) {
        long n = 0;
        for (;; n++) {
            ql_st *st;
            ql_err err = {0};
            ql_mem_fail_after(n, persistent);
            ql_status status = ql_st_open(path, &st, &err);
            ql_mem_fail_after(-1, false);
            if (status == QL_OK) {
                ql_st_close(st);
                break;
            }
            assert_int_equal(status, QL_ERR_MEMORY);
            assert_contains(err.message, path);
        }
        assert_true(n >= 6);
    }
}

/* A header of many smallest entries, in an order that needs sorting. */
static size_t write_dense(const char *path, int count, int metadata)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    uint64_t size = 0;
    fwrite(&size, 1, 8, file);
    size = (uint64_t)fprintf(file, "{\"__metadata__\":{");
    for (int i = 0; i < metadata; i++) size += (uint64_t)fprintf(file, "%s\"%x\":\"\"", i ? "," : "", i);
    size += (uint64_t)fprintf(file, "}");
    for (int i = count; i-- > 0;)
        size += (uint64_t)fprintf(file, ",\"%x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}",
                                  i, i, i + 1);
    size += (uint64_t)fprintf(file, "}");
    for (int i = 0; i < count; i++) fputc(i, file);
    fseek(file, 0, SEEK_SET);
    fwrite(&size, 1, 8, file);
    assert_int_equal(fclose(file), 0);
    return (size_t)size;
}

static void check_heap(const char *path, size_t header)
{
#ifndef __SANITIZE_ADDRESS__
    pid_t child = fork();
    if (child == 0) {
        struct rusage before, after;
        ql_st *st;
        getrusage(RUSAGE_SELF, &before);
        if (ql_st_open(path, &st, NULL)) _exit(2);
        getrusage(RUSAGE_SELF, &after);
        _exit((size_t)(after.ru_maxrss - before.ru_maxrss) * 1024 > 4 * header + (1 << 20));
    }
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
#else
    (void)path, (void)header;
#endif
}

static void check_bounds(void **state)
{
    ql_st *st;
    ql_err err = {0};
    char name[16];
    (void)state;
    const char *path = temp_path("dense.safetensors");
    size_t header = write_dense(path, 150000, 0);
    check_heap(path, header);
    if (ql_st_open(path, &st, &err)) fail_msg("%s", err.message);
    for (int i = 0; i < 150000; i += 7) {
        snprintf(name, sizeof name, "%x", i);
        const ql_st_tensor *tensor = ql_st_find(st, name);
        assert_non_null(tensor);
        assert_int_equal(tensor->begin, i);
    }
    ql_st_close(st);
    header = write_dense(path, 1, 500000);
    check_heap(path, header);
}

static void check_real(void **state)
{
    static const char *const patterns[] = {
        "/../shared/data/*/*.safetensors", "/../shared/data/models/*/*.safetensors",
        "/tests/golden/models/*/*.safetensors", "/examples/models/*/*.safetensors"};
    size_t files = 0;
    (void)state;
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        char pattern[1024];
        glob_t found;
        snprintf(pattern, sizeof pattern, "%s%s", QLUA_SOURCE_DIR, patterns[i]);
        if (glob(pattern, 0, NULL, &found)) continue;
        for (size_t j = 0; j < found.gl_pathc; j++, files++) {
            ql_st *st;
            ql_err err = {0};
            if (ql_st_open(found.gl_pathv[j], &st, &err)) fail_msg("%s", err.message);
            ql_st_close(st);
        }
        globfree(&found);
    }
    print_message("real files accepted: %zu\n", files);
    if (!files) skip();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(check_reading), cmocka_unit_test(check_accepted),
        cmocka_unit_test(check_listed),  cmocka_unit_test(check_pointer_file),
        cmocka_unit_test(check_absent),  cmocka_unit_test(check_mutated),
        cmocka_unit_test(check_random),  cmocka_unit_test(check_memory),
        cmocka_unit_test(check_bounds),  cmocka_unit_test(check_real),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
