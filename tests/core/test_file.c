#include "file_help.h"

#include "file.h"
#include "mem.h"
#include "safetensors.h"
#include "sha256.h"

#include <errno.h>

static void check_join(void **state)
{
    static const struct {
        const char *folder, *name, *path;
    } cases[] = {
        {"a", "b", "a/b"}, {"a/", "b", "a/b"}, {"a//", "b", "a/b"}, {"/", "b", "/b"}, {"/a", "", "/a/"}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *path = ql_file_join(cases[i].folder, cases[i].name);
        assert_string_equal(path, cases[i].path);
        ql_free(path);
    }
}

static void check_write_and_read(void **state)
{
    char *data;
    size_t size;
    ql_err err = {0};
    (void)state;
    const char *path = temp_path("plain");
    assert_int_equal(ql_file_write(path, "hello", 5, &err), QL_OK);
    assert_int_equal(ql_file_write(path, "world!", 6, &err), QL_OK);
    assert_int_equal(ql_file_read(path, 6, &data, &size, &err), QL_OK);
    assert_int_equal(size, 6);
    assert_string_equal(data, "world!");
    ql_free(data);
    assert_true(ql_file_exists(path));
    assert_false(ql_file_is_folder(path));
    assert_true(ql_file_is_folder(temp_root));
    assert_int_equal(ql_file_write(temp_path("no/folder"), "x", 1, &err), QL_ERR_NOT_FOUND);
    assert_contains(err.message, "no/folder");
    assert_int_equal(ql_file_read(path, 5, &data, &size, &err), QL_ERR_FORMAT);
    assert_null(data);
    ql_file_writer closed = {0};
    ql_file_abort(&closed);
    assert_int_equal(ql_file_pwrite(&closed, 0, "x", 1, &err), QL_ERR_ARG);
    assert_int_equal(ql_file_commit(&closed, &err), QL_ERR_ARG);
}

/* Whatever fails, the final name holds the old content or the new one, whole, and no temporary file stays. */
static void check_failing_writes(void **state)
{
    static const int errors[] = {EIO, ENOSPC, EACCES};
    (void)state;
    assert_int_equal(mkdir(temp_path("w"), 0700), 0);
    const char *path = temp_path("w/file");
    for (size_t e = 0; e < sizeof errors / sizeof *errors; e++) {
        for (long n = 0;; n++) {
            char *data;
            size_t size;
            ql_err err = {0};
            assert_int_equal(ql_file_write(path, "old", 3, &err), QL_OK);
            ql_file_fail_after(n, errors[e]);
            ql_status status = ql_file_write(path, "new content", 11, &err);
            long made = ql_file_count();
            ql_file_fail_after(-1, 0);
            assert_int_equal(count_entries("w"), 1);
            assert_int_equal(ql_file_read(path, 100, &data, &size, NULL), QL_OK);
            bool is_new = strcmp(data, "new content") == 0;
            assert_true(is_new || strcmp(data, "old") == 0);
            ql_free(data);
            if (status == QL_OK) {
                assert_true(is_new && n == made);
                break;
            }
            assert_int_equal(status, QL_ERR_IO);
            assert_contains(err.message, path);
            if (errors[e] == ENOSPC) assert_contains(err.hint, "disk space");
        }
    }
    for (long n = 0; n < 3; n++) {
        ql_err err = {0};
        ql_mem_fail_after(n, true);
        ql_status status = ql_file_write(path, "x", 1, &err);
        ql_mem_fail_after(-1, false);
        assert_int_equal(status, n < 2 ? QL_ERR_MEMORY : QL_OK);
    }
}

static void check_failing_reads(void **state)
{
    (void)state;
    const char *path = temp_path("r");
    assert_int_equal(ql_file_write(path, "content", 7, NULL), QL_OK);
    for (long n = 0;; n++) {
        char *data;
        size_t size;
        ql_err err = {0};
        ql_file_fail_after(n, EIO);
        ql_status status = ql_file_read(path, 100, &data, &size, &err);
        ql_file_fail_after(-1, 0);
        ql_free(data);
        if (status == QL_OK) break;
        assert_int_equal(status, QL_ERR_IO);
        assert_contains(err.message, path);
        assert_null(data);
    }
    /* A call that a signal interrupts is made again. */
    for (long n = 0; n < 4; n++) {
        char *data;
        size_t size;
        ql_file_fail_after(n, EINTR);
        ql_status status = ql_file_read(path, 100, &data, &size, NULL);
        ql_file_fail_after(-1, 0);
        if (status == QL_OK) assert_string_equal(data, "content");
        ql_free(data);
    }
}

static void check_sha256(void **state)
{
    char hex[QL_SHA256_HEX];
    ql_sha256 sha;
    (void)state;
    assert_int_equal(ql_sha256_of("abc", 3, hex, NULL), QL_OK);
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_int_equal(ql_sha256_open(&sha, NULL), QL_OK);
    assert_int_equal(ql_sha256_update(&sha, "a", 1, NULL), QL_OK);
    assert_int_equal(ql_sha256_update(&sha, "bc", 2, NULL), QL_OK);
    assert_int_equal(ql_sha256_finish(&sha, hex, NULL), QL_OK);
    assert_string_equal(hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_int_equal(ql_sha256_update(&sha, "a", 1, NULL), QL_ERR_ARG);
    assert_int_equal(ql_sha256_finish(&sha, hex, NULL), QL_ERR_ARG);
    ql_sha256_close(&sha);
}

static const int64_t shape[] = {2, 3};
static const float floats[] = {1, 2, 3, 4, 5, 6};

static ql_status write_two(const char *path, ql_err *err)
{
    ql_st_writer *writer;
    size_t bytes, wide;
    ql_status status = ql_st_writer_open(path, &writer, err);
    if (!status) status = ql_st_writer_add(writer, "a \"quoted\"\n", QL_U8, 2, shape, &bytes, err);
    if (!status) status = ql_st_writer_add(writer, "wide", QL_F32, 2, shape, &wide, err);
    if (!status) status = ql_st_writer_begin(writer, err);
    /* Pieces, and the tensors in turn. */
    if (!status) status = ql_st_writer_write(writer, bytes, "abc", 3, err);
    if (!status) status = ql_st_writer_write(writer, wide, floats, 10, err);
    if (!status) status = ql_st_writer_write(writer, bytes, "def", 3, err);
    if (!status) status = ql_st_writer_write(writer, wide, (const char *)floats + 10, 14, err);
    if (!status) status = ql_st_writer_finish(writer, err);
    ql_st_writer_close(writer);
    return status;
}

static void check_writer(void **state)
{
    ql_err err = {0};
    ql_st *st;
    char text[6], head[8];
    float values[6];
    (void)state;
    const char *path = temp_path("two.safetensors");
    if (write_two(path, &err)) fail_msg("%s", err.message);
    if (ql_st_open(path, &st, &err)) fail_msg("%s", err.message);
    const ql_st_tensor *wide = ql_st_find(st, "wide"), *bytes = ql_st_find(st, "a \"quoted\"\n");
    assert_int_equal(wide->begin, 0); /* wide elements first */
    assert_int_equal(bytes->begin, 24);
    assert_int_equal(ql_st_read(st, wide, 0, sizeof values, values, &err), QL_OK);
    assert_memory_equal(values, floats, sizeof floats);
    assert_int_equal(ql_st_read(st, bytes, 0, 6, text, &err), QL_OK);
    assert_memory_equal(text, "abcdef", 6);
    assert_int_equal(ql_st_read_file(st, 0, 8, head, &err), QL_OK);
    assert_int_equal(head[0] % 8, 0);
    ql_st_close(st);
}

static void check_writer_misuse(void **state)
{
    static const int64_t negative[] = {-1}, huge[] = {INT64_MAX, 2};
    ql_err err = {0};
    ql_st_writer *w;
    (void)state;
    assert_int_equal(mkdir(temp_path("m"), 0700), 0);
    const char *path = temp_path("m/x.safetensors");
    assert_int_equal(ql_st_writer_open(path, &w, &err), QL_OK);
    assert_int_equal(ql_st_writer_write(w, 0, "x", 1, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_finish(w, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_add(w, "", QL_U8, 2, shape, NULL, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_add(w, "\xff", QL_U8, 2, shape, NULL, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_add(w, "__metadata__", QL_U8, 2, shape, NULL, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_add(w, "a", QL_DTYPE_COUNT, 2, shape, NULL, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_add(w, "a", QL_U8, 9, shape, NULL, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_add(w, "a", QL_U8, 1, negative, NULL, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_add(w, "a", QL_U8, 2, huge, NULL, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_add(w, "a", QL_U8, 2, shape, NULL, &err), QL_OK);
    assert_int_equal(ql_st_writer_begin(w, &err), QL_OK);
    assert_int_equal(ql_st_writer_begin(w, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_add(w, "b", QL_U8, 2, shape, NULL, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_write(w, 1, "x", 1, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_write(w, 0, "1234567", 7, &err), QL_ERR_ARG);
    assert_int_equal(ql_st_writer_write(w, 0, "12345", 5, &err), QL_OK);
    assert_int_equal(ql_st_writer_finish(w, &err), QL_ERR_ARG);
    assert_contains(err.message, "5 of 6 bytes");
    ql_st_writer_close(w);
    assert_int_equal(count_entries("m"), 0);

    assert_int_equal(ql_st_writer_open(path, &w, &err), QL_OK);
    assert_int_equal(ql_st_writer_add(w, "a", QL_U8, 2, shape, NULL, &err), QL_OK);
    assert_int_equal(ql_st_writer_add(w, "a", QL_F32, 2, shape, NULL, &err), QL_OK);
    assert_int_equal(ql_st_writer_begin(w, &err), QL_ERR_ARG);
    assert_contains(err.message, "added twice");
    ql_st_writer_close(w);
    ql_st_writer_close(NULL);
    assert_int_equal(count_entries("m"), 0);
}

static void check_failing_writer(void **state)
{
    (void)state;
    assert_int_equal(mkdir(temp_path("f"), 0700), 0);
    const char *path = temp_path("f/x.safetensors");
    for (long n = 0;; n++) {
        ql_err err = {0};
        ql_file_fail_after(n, ENOSPC);
        ql_status status = write_two(path, &err);
        ql_file_fail_after(-1, 0);
        if (status == QL_OK) break;
        assert_int_equal(status, QL_ERR_IO);
        assert_contains(err.message, path);
        /* The last call syncs the folder: by then the file is there, whole. */
        assert_in_range(count_entries("f"), 0, 1);
        unlink(path);
    }
    assert_int_equal(count_entries("f"), 1);
    for (int persistent = 0; persistent < 2; persistent++) {
        for (long n = 0;; n++) {
            ql_err err = {0};
            unlink(path);
            ql_mem_fail_after(n, persistent);
            ql_status status = write_two(path, &err);
            ql_mem_fail_after(-1, false);
            if (status == QL_OK) break;
            assert_int_equal(status, QL_ERR_MEMORY);
            assert_int_equal(count_entries("f"), 0);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(check_join),           cmocka_unit_test(check_write_and_read),
        cmocka_unit_test(check_failing_writes), cmocka_unit_test(check_failing_reads),
        cmocka_unit_test(check_sha256),         cmocka_unit_test(check_writer),
        cmocka_unit_test(check_writer_misuse),  cmocka_unit_test(check_failing_writer),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
