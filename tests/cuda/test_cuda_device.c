/* A CUDA device as a thing: copies, ceilings, and what is said when it is missing, full or broken. Runs on
 * the emulated device, and on a real one without the tests that need a device to misbehave.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "backend.h"
#include "ops.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

static ql_device *open_device(const char *name)
{
    ql_device *dev = NULL;
    ql_err err;
    if (ql_device_open(name, NULL, &dev, &err) != QL_OK) fail_msg("%s: %s", name, err.message);
    return dev;
}

/* ---- a device that works ---- */

static void test_copies_larger_than_the_staging_buffers(void **state)
{
    (void)state;
    const size_t bytes = ((size_t)19 << 20) + 12345;
    uint8_t *from = malloc(bytes), *to = calloc(1, bytes);
    assert_true(from && to);
    for (size_t i = 0; i < bytes; i++) from[i] = (uint8_t)(i * 2654435761u >> 13);
    ql_device *dev = open_device("cuda");
    void *p;
    assert_int_equal(dev->backend->alloc(dev->ctx, bytes, &p, NULL), QL_OK);
    assert_int_equal((uintptr_t)p % 256, 0);
    assert_int_equal(dev->backend->upload(dev->ctx, p, from, bytes, NULL), QL_OK);
    assert_int_equal(dev->backend->download(dev->ctx, to, p, bytes, NULL), QL_OK);
    assert_memory_equal(from, to, bytes);
    dev->backend->free(dev->ctx, p, bytes);
    assert_int_equal(dev->backend->download(dev->ctx, to, p, 0, NULL), QL_OK);
    ql_device_release(dev);
    free(from);
    free(to);
}

static void test_columns_are_checked(void **state)
{
    (void)state;
    const float rows[2][3] = {{1, 2, 3}, {4, 5, 6}};
    const int32_t good[2] = {2, 0}, bad[2] = {0, 3};
    float out[2];
    ql_err err;
    ql_device *dev = open_device("cuda");
    ql_tensor x, cols, y;
    assert_int_equal(ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, 2, 3, &x, &err), QL_OK);
    assert_int_equal(ql_tensor_new_1d(dev, NULL, QL_MEM_ACTIVATIONS, QL_I32, 2, &cols, &err), QL_OK);
    assert_int_equal(ql_tensor_new_1d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, 2, &y, &err), QL_OK);
    assert_int_equal(ql_tensor_upload(&x, rows, sizeof rows, &err), QL_OK);
    assert_int_equal(ql_tensor_upload(&cols, good, sizeof good, &err), QL_OK);
    assert_int_equal(ql_op_gather_cols(&x, &cols, &y, &err), QL_OK);
    assert_int_equal(ql_tensor_download(&y, out, sizeof out, &err), QL_OK);
    assert_true(out[0] == 3 && out[1] == 4);
    assert_int_equal(ql_tensor_upload(&cols, bad, sizeof bad, &err), QL_OK);
    assert_int_equal(ql_op_gather_cols(&x, &cols, &y, &err), QL_ERR_ARG);
    assert_string_equal(err.message, "column 3 at 1 is outside 0..2");
    ql_tensor_free(&x);
    ql_tensor_free(&cols);
    ql_tensor_free(&y);
    ql_device_release(dev);
}

static void test_a_ceiling_is_measured(void **state)
{
    (void)state;
    ql_ceiling ceiling;
    ql_device *dev = open_device("cuda");
    assert_int_equal(dev->backend->ceiling(dev->ctx, 32 * 32 * 8, &ceiling, NULL), QL_OK);
    assert_true(ceiling.read_bytes_per_second > 0);
    assert_true(ceiling.matrix_flops_per_second > 0);
    assert_true(ceiling.flops_per_second == 0);
    assert_int_equal(dev->backend->ceiling(dev->ctx, 0, &ceiling, NULL), QL_ERR_ARG);
    ql_device_release(dev);
}

/* ---- a device that misbehaves ---- */

#ifdef QLUA_EMULATED_PLUGIN

static void misbehave(const char *how)
{
    if (how)
        setenv("QLUA_EMU_CUDA", how, 1);
    else
        unsetenv("QLUA_EMU_CUDA");
}

static void refused(const char *name, const char *how, ql_status code, const char *message)
{
    ql_device *dev = NULL;
    ql_err err = {0};
    misbehave(how);
    ql_status status = ql_device_open(name, NULL, &dev, &err);
    misbehave(NULL);
    assert_null(dev);
    assert_int_equal(status, code);
    if (!strstr(err.message, message)) fail_msg("'%s' lacks '%s'", err.message, message);
}

static void test_a_missing_device_is_explained(void **state)
{
    (void)state;
    refused("cuda", "error=driver", QL_ERR_DEVICE, "no CUDA device");
    refused("cuda", "devices=0", QL_ERR_DEVICE, "sees none");
    refused("cuda:3", "devices=2", QL_ERR_DEVICE, "2");
    refused("cuda", "sm=70", QL_ERR_UNSUPPORTED, "compute capability 7.0, 7.5 is needed");
}

static ql_device_info told(const char *processes)
{
    ql_device_info info;
    ql_device *dev = open_device("cuda");
    setenv("QLUA_EMU_NVML", processes, 1);
    assert_int_equal(dev->backend->info(dev->ctx, &info, NULL), QL_OK);
    unsetenv("QLUA_EMU_NVML");
    ql_device_release(dev);
    return info;
}

static void test_the_driver_tells_who_uses_a_device(void **state)
{
    (void)state;
    ql_device_info info = told("0"); /* as in most containers */
    assert_int_equal(info.neighbours, -1);
    assert_int_equal(info.memory_process, 0);
    assert_int_equal(info.clock_mhz, 1410);
    assert_true(info.energy_joules == 5.5);
    assert_true(info.throttled_seconds == 2.5);
    info = told("3 mine");
    assert_int_equal(info.neighbours, 2);
    assert_int_equal(info.memory_process, 4096);
    info = told("2"); /* numbers of another namespace */
    assert_int_equal(info.neighbours, 1);
    assert_int_equal(info.memory_process, 0);
    assert_int_equal(told("1 mine").neighbours, 0);
}

static void test_out_of_memory_is_survived(void **state)
{
    (void)state;
    ql_err err = {0};
    void *p = NULL, *q = NULL;
    misbehave("memory=100000000");
    ql_device *dev = open_device("cuda");
    const ql_backend *be = dev->backend;
    assert_int_equal(be->alloc(dev->ctx, 200000000, &p, &err), QL_ERR_MEMORY);
    assert_null(p);
    assert_non_null(strstr(err.message, "200000000 bytes"));
    assert_non_null(strstr(err.message, "free"));
    assert_true(err.hint[0] != '\0');
    assert_int_equal(be->alloc(dev->ctx, SIZE_MAX - 5, &p, &err), QL_ERR_MEMORY);
    /* What was freed and kept gives way. */
    assert_int_equal(be->alloc(dev->ctx, 1 << 20, &p, &err), QL_OK);
    be->free(dev->ctx, p, 1 << 20);
    size_t most = 100000000 - (1 << 19);
    assert_int_equal(be->alloc(dev->ctx, most, &q, &err), QL_OK);
    be->free(dev->ctx, q, most);
    assert_int_equal(be->sync(dev->ctx, &err), QL_OK);
    ql_device_release(dev);
    misbehave(NULL);
}

/* Two rmsnorms on a new tensor: the fault, if any, is in the first or second. */
static ql_status two_norms(ql_device *dev, ql_tensor *x, ql_tensor *w, ql_err *err)
{
    QL_TRY(ql_op_rmsnorm(x, w, 1e-5f, x, err));
    QL_TRY(ql_op_swiglu(x, x, x, err));
    return dev->backend->sync(dev->ctx, err);
}

static void new_rows(ql_device *dev, ql_tensor *x, ql_tensor *w)
{
    const float zeros[64] = {0};
    ql_err err;
    assert_int_equal(ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, 2, 32, x, &err), QL_OK);
    assert_int_equal(ql_tensor_new_1d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, 32, w, &err), QL_OK);
    assert_int_equal(ql_tensor_upload(x, zeros, 2 * 32 * sizeof(float), &err), QL_OK);
    assert_int_equal(ql_tensor_upload(w, zeros, 32 * sizeof(float), &err), QL_OK);
    assert_int_equal(dev->backend->sync(dev->ctx, &err), QL_OK);
}

static void test_a_launch_that_is_refused_names_its_operation(void **state)
{
    (void)state;
    ql_tensor x, w;
    ql_err err = {0};
    ql_device *dev = open_device("cuda");
    new_rows(dev, &x, &w);
    misbehave("launchfault=1");
    assert_int_equal(two_norms(dev, &x, &w, &err), QL_ERR_DEVICE);
    assert_non_null(strstr(err.message, "cuda:0: rmsnorm: "));
    misbehave(NULL);
    assert_int_equal(two_norms(dev, &x, &w, &err), QL_OK); /* the device goes on */
    ql_tensor_free(&x);
    ql_tensor_free(&w);
    ql_device_release(dev);
}

/* A fault ends a GPU's use in this process, so each of these tests spends one. */
static void check_fault(const char *device, const char *how, const char *where)
{
    ql_tensor x, w;
    ql_err err = {0};
    misbehave("devices=4");
    ql_device *dev = open_device(device), *again = NULL;
    new_rows(dev, &x, &w);
    misbehave(how);
    assert_int_equal(two_norms(dev, &x, &w, &err), QL_ERR_DEVICE);
    if (!strstr(err.message, where)) fail_msg("'%s' lacks '%s'", err.message, where);
    assert_null(strstr(err.message, "given up"));
    assert_true(err.hint[0] != '\0');
    assert_int_equal(two_norms(dev, &x, &w, &err), QL_ERR_DEVICE);
    assert_non_null(strstr(err.message, "was given up after a fault in "));
    assert_non_null(strstr(err.message, where));
    misbehave("devices=4"); /* even now that CUDA would work again */
    assert_int_equal(dev->backend->sync(dev->ctx, &err), QL_ERR_DEVICE);
    ql_tensor_free(&x);
    ql_tensor_free(&w);
    ql_device_release(dev);
    assert_int_equal(ql_device_open(device, NULL, &again, &err), QL_ERR_DEVICE);
    assert_non_null(strstr(err.message, "given up"));
    misbehave(NULL);
}

static void test_a_fault_is_reported_once_and_the_device_refused(void **state)
{
    (void)state;
    check_fault("cuda:1", "devices=4,fault=2", "one of the operations from rmsnorm to swiglu");
}

static void test_a_fault_has_its_operation_when_each_is_waited_for(void **state)
{
    (void)state;
    setenv("QLUA_CUDA_SYNC", "1", 1);
    check_fault("cuda:2", "devices=4,fault=2", "a fault in swiglu: ");
    unsetenv("QLUA_CUDA_SYNC");
}

#endif

int main(void)
{
#ifdef QLUA_EMULATED_PLUGIN
    setenv("QLUA_CUDA_PLUGIN", QLUA_EMULATED_PLUGIN, 0);
    setenv("QLUA_CUBLASLT", QLUA_EMULATED_CUBLASLT, 1);
    if (!dlopen(QLUA_EMULATED_NVML, RTLD_NOW)) return 1;
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_copies_larger_than_the_staging_buffers),
        cmocka_unit_test(test_columns_are_checked),
        cmocka_unit_test(test_a_ceiling_is_measured),
#ifdef QLUA_EMULATED_PLUGIN
        cmocka_unit_test(test_a_missing_device_is_explained),
        cmocka_unit_test(test_the_driver_tells_who_uses_a_device),
        cmocka_unit_test(test_out_of_memory_is_survived),
        cmocka_unit_test(test_a_launch_that_is_refused_names_its_operation),
        cmocka_unit_test(test_a_fault_is_reported_once_and_the_device_refused),
        cmocka_unit_test(test_a_fault_has_its_operation_when_each_is_waited_for),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
