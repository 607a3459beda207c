/* The registry: which device a name means, and what is said when a plug-in or a device is not there. The
 * plug-ins are made for these tests (tests/plugin). */
#include "backend.h"
#include "plugin.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static ql_err error;

static const char *fake(const char *name)
{
    static char path[4096];
    snprintf(path, sizeof path, "%s/fake_%s.so", QLUA_FAKE_FOLDER, name);
    return path;
}

/* The last error is `code`, and message and hint together hold every text of the list (NULL at its end). */
static void said(ql_status code, const char *const *texts)
{
    char all[sizeof error.message + sizeof error.hint];
    snprintf(all, sizeof all, "%s|%s", error.message, error.hint);
    if (error.code != code) fail_msg("%s, not %s: %s", ql_err_name(error.code), ql_err_name(code), all);
    for (; *texts; texts++) {
        if (!strstr(all, *texts)) fail_msg("'%s' is not in: %s", *texts, all);
    }
}

#define SAID(code, ...) said(code, (const char *const[]){__VA_ARGS__, NULL})

static void test_plugin_refused(void **state)
{
    (void)state;
    assert_null(ql_plugin_load("/no/such/libqlua_cuda.so", "cuda", &error));
    SAID(QL_ERR_UNSUPPORTED, "does not load", "/no/such/libqlua_cuda.so", "No such file");
    assert_null(ql_plugin_load(QLUA_SOURCE_DIR "/README.md", "cuda", &error));
    SAID(QL_ERR_UNSUPPORTED, "does not load", "README.md", "invalid ELF header");
    assert_null(ql_plugin_load(fake("empty"), "cuda", &error));
    SAID(QL_ERR_UNSUPPORTED, "fake_empty.so", "is no plug-in of qlua", "ql_backend_plugin");
    assert_null(ql_plugin_load(fake("unfinished"), "cuda", &error));
    SAID(QL_ERR_UNSUPPORTED, "does not load", "fake_function_of_another_library");
    assert_null(ql_plugin_load(fake("old"), "cuda", &error));
    SAID(QL_ERR_UNSUPPORTED, "fake_old.so", "another version", "interface is 1, this qlua wants ",
         "together");
    assert_null(ql_plugin_load(fake("other"), "cuda", &error));
    SAID(QL_ERR_UNSUPPORTED, "fake_other.so", "is for metal devices, not for cuda");
    assert_null(ql_plugin_load(fake("old"), "cuda", NULL));
}

static void refuses(const char *name)
{
    ql_device *dev = (ql_device *)&error;
    memset(&error, 0, sizeof error);
    assert_int_not_equal(ql_device_open(name, NULL, &dev, &error), QL_OK);
    assert_null(dev);
}

static void opens(const char *name, const char *label)
{
    ql_device *dev;
    if (ql_device_open(name, NULL, &dev, &error) != QL_OK) fail_msg("%s: %s", name, error.message);
    assert_string_equal(dev->label, label);
    ql_device_release(dev);
}

static void test_names(void **state)
{
    (void)state;
    static const char *const wrong[] = {"", "gpu", "cpu0", "CUDA", "cud", "cudas", ":", ":0", "auto:0"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        refuses(wrong[i]);
        SAID(QL_ERR_ARG, "unknown device", wrong[i], "auto, cpu, cuda and cuda:<index>");
    }
    static const char *const indices[] = {
        "cpu:", "cuda:x", "cuda:-1", "cuda:1x", "cuda:1024", "cuda: 1", "cuda:99999999999999999999"};
    for (size_t i = 0; i < sizeof indices / sizeof *indices; i++) {
        refuses(indices[i]);
        SAID(QL_ERR_ARG, indices[i], "is not a device index");
    }
    refuses("cpu:1");
    SAID(QL_ERR_DEVICE, "device 'cpu:1': there is 1 CPU device, cpu:0");
    opens("cpu", "cpu");
    opens("cpu:0", "cpu");
    assert_null(ql_backend_find("gpu", &error));
    SAID(QL_ERR_ARG, "unknown device 'gpu'");
    assert_ptr_equal(ql_backend_find("cpu", &error), &ql_backend_cpu);
}

/* What the fake is asked for lies in the environment and is read at each call. */
static void set(const char *what)
{
    setenv("QLUA_FAKE_CUDA", what, 1);
}

static void *find_again(void *ud)
{
    (void)ud;
    return (void *)ql_backend_find("cuda", NULL);
}

static void test_cuda_found_once(void **state)
{
    (void)state;
    const ql_backend *cuda = ql_backend_find("cuda", &error);
    if (!cuda) fail_msg("%s", error.message);
    assert_string_equal(cuda->name, "cuda");
    assert_non_null(strstr(ql_plugin_cuda_path(), "/fake_cuda.so"));
    setenv("QLUA_CUDA_PLUGIN", "/no/such/file", 1);
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) assert_int_equal(pthread_create(&threads[i], NULL, find_again, NULL), 0);
    for (int i = 0; i < 4; i++) {
        void *found;
        assert_int_equal(pthread_join(threads[i], &found), 0);
        assert_ptr_equal(found, cuda);
    }
}

static void test_cuda_devices(void **state)
{
    (void)state;
    set("devices=1");
    opens("cuda", "cuda:0");
    opens("auto", "cuda:0");
    refuses("cuda:3");
    SAID(QL_ERR_DEVICE, "device 'cuda:3': there is 1 CUDA device, cuda:0");
    set("devices=2");
    opens("cuda:1", "cuda:1");
    opens("auto", "cuda:0");
    refuses("cuda:2");
    SAID(QL_ERR_DEVICE, "device 'cuda:2': there are 2 CUDA devices, cuda:0 and cuda:1");
    set("devices=8");
    refuses("cuda:1023");
    SAID(QL_ERR_DEVICE, "device 'cuda:1023': there are 8 CUDA devices, cuda:0 to cuda:7");
}

static void test_cuda_none(void **state)
{
    (void)state;
    set("devices=0");
    refuses("cuda");
    SAID(QL_ERR_DEVICE, "device 'cuda': no NVIDIA driver", "install the driver; or use --device cpu");
    opens("auto", "cpu");
    set("devices=2 refuse=1");
    refuses("cuda:1");
    SAID(QL_ERR_UNSUPPORTED, "cuda:1 is an sm_70");
    opens("auto", "cpu");
}

/* A device that should work and does not is told of: "auto" does not hide it behind the CPU. */
static void test_cuda_fault(void **state)
{
    (void)state;
    set("devices=1 refuse=2");
    refuses("auto");
    SAID(QL_ERR_DEVICE, "cuda:0: uncorrectable memory error");
    set("devices=1");
    ql_device *dev;
    assert_int_equal(ql_device_open("auto", &(ql_device_options){.threads = 1}, &dev, &error), QL_OK);
    ql_device_info info;
    assert_int_equal(dev->backend->info(dev->ctx, &info, &error), QL_OK);
    assert_string_equal(info.isa, "sm_90");
    set("devices=1 memory=4096");
    void *p;
    assert_int_equal(dev->backend->alloc(dev->ctx, 8192, &p, &error), QL_ERR_MEMORY);
    SAID(QL_ERR_MEMORY, "8192 bytes needed, 4096 free");
    ql_device_release(dev);
}

int main(void)
{
    setenv("QLUA_CUDA_PLUGIN", fake("cuda"), 1);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plugin_refused),  cmocka_unit_test(test_names),
        cmocka_unit_test(test_cuda_found_once), cmocka_unit_test(test_cuda_devices),
        cmocka_unit_test(test_cuda_none),       cmocka_unit_test(test_cuda_fault),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
