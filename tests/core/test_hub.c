#include "file_help.h"

#include "hub.h"
#include "mem.h"

#define COMMIT "0123456789abcdef0123456789abcdef01234567"

static const char *const variables[] = {"HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"};

static void clear_variables(void)
{
    for (size_t i = 0; i < 4; i++) unsetenv(variables[i]);
}

static void expect_cache(const char *path)
{
    char *cache;
    assert_int_equal(ql_hub_cache(&cache, NULL), QL_OK);
    assert_string_equal(cache, path);
    ql_free(cache);
}

static void check_cache(void **state)
{
    (void)state;
    clear_variables();
    setenv("HOME", "/home/ada", 1);
    expect_cache("/home/ada/.cache/huggingface/hub");
    setenv("XDG_CACHE_HOME", "/xdg", 1);
    expect_cache("/xdg/huggingface/hub");
    setenv("HF_HOME", "~/hf/", 1);
    expect_cache("/home/ada/hf/hub");
    setenv("HUGGINGFACE_HUB_CACHE", "/old", 1);
    expect_cache("/old");
    setenv("HF_HUB_CACHE", "", 1); /* empty is as good as unset */
    expect_cache("/old");
    setenv("HF_HUB_CACHE", "/new", 1);
    expect_cache("/new");
    clear_variables();
}

static void make_folder(const char *name)
{
    assert_int_equal(mkdir(temp_path(name), 0700), 0);
}

static void make_cache(void)
{
    static bool made;
    if (!made) {
        make_folder("hub");
        make_folder("hub/models--org--name");
        make_folder("hub/models--org--name/refs");
        make_folder("hub/models--org--name/refs/refs");
        make_folder("hub/models--org--name/refs/refs/pr");
        make_folder("hub/models--org--name/snapshots");
        make_folder("hub/models--org--name/snapshots/" COMMIT);
        make_folder("hub/models--org--name/snapshots/feed");
        write_text("hub/models--org--name/refs/main", COMMIT "\n");
        write_text("hub/models--org--name/refs/v1", "feed");
        write_text("hub/models--org--name/refs/gone", "beef");
        write_text("hub/models--org--name/refs/evil", "../../../evil");
        write_text("hub/models--org--name/refs/refs/pr/1", "feed");
        make_folder("hub/models--gpt");
        make_folder("hub/models--gpt/snapshots");
        make_folder("hub/models--gpt/snapshots/feed");
    }
    made = true;
    setenv("HF_HUB_CACHE", temp_path("hub"), 1);
}

static void expect_found(const char *model, const char *tail)
{
    char *path;
    ql_err err = {0};
    if (ql_hub_resolve(model, &path, &err)) fail_msg("%s", err.message);
    assert_string_equal(path, temp_path(tail));
    ql_free(path);
}

static void expect_refused(const char *model, ql_status code, const char *part)
{
    char *path;
    ql_err err = {0};
    assert_int_equal(ql_hub_resolve(model, &path, &err), code);
    assert_null(path);
    assert_contains(err.message, part);
    assert_int_equal(ql_hub_resolve(model, &path, NULL), code);
}

static void check_resolve(void **state)
{
    (void)state;
    make_cache();
    expect_found("org/name", "hub/models--org--name/snapshots/" COMMIT);
    expect_found("org/name@main", "hub/models--org--name/snapshots/" COMMIT);
    expect_found("org/name@v1", "hub/models--org--name/snapshots/feed");
    expect_found("org/name@feed", "hub/models--org--name/snapshots/feed");
    expect_found("org/name@" COMMIT, "hub/models--org--name/snapshots/" COMMIT);
    expect_found("org/name@refs/pr/1", "hub/models--org--name/snapshots/feed");
    expect_found("gpt", "hub/models--gpt/snapshots/feed"); /* no refs, one snapshot */
    expect_found(temp_path("hub"), "hub");                 /* what is on disk wins */
    expect_found(temp_path("hub/models--org--name/refs/main"), "hub/models--org--name/refs/main");
}

static void check_refusals(void **state)
{
    (void)state;
    make_cache();
    expect_refused("org/other", QL_ERR_NOT_FOUND, "not in the Hugging Face cache");
    expect_refused("org/name@absent", QL_ERR_NOT_FOUND, "not in the Hugging Face cache");
    expect_refused("org/name@gone", QL_ERR_NOT_FOUND, "not in the Hugging Face cache");
    expect_refused("org/name@evil", QL_ERR_FORMAT, "refs/evil: does not hold a commit");
    expect_refused("org/name@../main", QL_ERR_NOT_FOUND, "no such file or folder");
    expect_refused("org/name@", QL_ERR_NOT_FOUND, "no such file or folder");
    expect_refused("", QL_ERR_NOT_FOUND, "no such file or folder");
    expect_refused("/absent/folder", QL_ERR_NOT_FOUND, "no such file or folder");
    expect_refused("./absent", QL_ERR_NOT_FOUND, "no such file or folder");
    expect_refused("../name", QL_ERR_NOT_FOUND, "no such file or folder");
    expect_refused("org/../name", QL_ERR_NOT_FOUND, "no such file or folder");
    expect_refused("a/b/c", QL_ERR_NOT_FOUND, "no such file or folder");
    expect_refused("org/na me", QL_ERR_NOT_FOUND, "no such file or folder");
    ql_err err = {0};
    char *path;
    ql_hub_resolve("org/other@v2", &path, &err);
    assert_contains(err.hint, "huggingface-cli download org/other");
    assert_null(strstr(err.hint, "@v2"));
}

static void check_memory(void **state)
{
    (void)state;
    make_cache();
    for (int persistent = 0; persistent < 2; persistent++) {
        for (long n = 0;; n++) {
            char *path;
            ql_err err = {0};
            ql_mem_fail_after(n, persistent);
            ql_status status = ql_hub_resolve("org/name", &path, &err);
            ql_mem_fail_after(-1, false);
            ql_free(path);
            if (status == QL_OK) break;
            assert_int_equal(status, QL_ERR_MEMORY);
            assert_null(path);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(check_cache),
        cmocka_unit_test(check_resolve),
        cmocka_unit_test(check_refusals),
        cmocka_unit_test(check_memory),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
