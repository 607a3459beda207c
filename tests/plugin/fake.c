/* A plug-in for tests: the CPU's operations under the name of CUDA, with the faults that the environment's
 * QLUA_FAKE_CUDA asks for, "devices=2 memory=8000000 fault=3 refuse=1":
 *
 *   devices  how many there are (default 1)
 *   memory   bytes of each; an allocation above what is left fails (default 1 GiB)
 *   fault    number of products after which the kernel fails and the device is refused (default never)
 *   refuse   1: open fails, as for a device of a compute capability that is too low; 2: as for a faulty one
 *
 * Memory is counted over all devices. Compiled with one of the macros below it is a file that the registry
 * must refuse.
 */
#include "backend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef FAKE_ABI
#define FAKE_ABI QL_BACKEND_ABI
#endif
#ifndef FAKE_NAME
#define FAKE_NAME "cuda"
#endif

#if defined FAKE_EMPTY
int fake_nothing(void);
int fake_nothing(void)
{
    return 0;
}
#else

#ifdef FAKE_UNDEFINED
void fake_function_of_another_library(void);
#endif

static size_t in_use;
static long products;
static bool broken;
static ql_numerics numerics;

static long setting(const char *key, long preset)
{
    const char *text = getenv("QLUA_FAKE_CUDA"), *at = text ? strstr(text, key) : NULL;
    return at ? strtol(at + strlen(key), NULL, 10) : preset;
}

static size_t memory(void)
{
    return (size_t)setting("memory=", 1 << 30);
}

static ql_status refused(ql_err *err)
{
    ql_err_set(err, QL_ERR_DEVICE, "the device is refused after a fault in matmul");
    return ql_err_hint(err, "start again");
}

static int fake_count(ql_err *err)
{
    int devices = (int)setting("devices=", 1);
    if (devices == 0) {
        ql_err_set(err, QL_ERR_DEVICE, "no NVIDIA driver: libcuda.so.1 is not there");
        ql_err_hint(err, "install the driver");
    }
    return devices;
}

static ql_status fake_open(int index, const ql_device_options *options, void **out, ql_err *err)
{
    long refuse = setting("refuse=", 0);
    if (refuse == 1)
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "cuda:%d is an sm_70: qlua needs sm_75", index);
    if (refuse == 2)
        return ql_err_set(err, QL_ERR_DEVICE, "cuda:%d: uncorrectable memory error encountered", index);
    numerics = options->numerics;
    return ql_backend_cpu.open(0, options, out, err);
}

static ql_status fake_info(void *ctx, ql_device_info *out, ql_err *err)
{
    if (broken) return refused(err);
    QL_TRY(ql_backend_cpu.info(ctx, out, err));
    snprintf(out->name, sizeof out->name, "Imaginary GPU");
    snprintf(out->isa, sizeof out->isa, "sm_90");
    snprintf(out->driver, sizeof out->driver, "driver 13.0, runtime 13.0");
    out->threads = 0;
    out->numerics = numerics;
    out->memory_total = memory();
    out->memory_free = memory() - in_use;
    out->memory_process = in_use;
    out->clock_mhz = 1980;
    out->energy_joules = 12.5;
    out->throttled_seconds = 0.25;
    out->neighbours = 2;
    return QL_OK;
}

static ql_status fake_alloc(void *ctx, size_t bytes, void **out, ql_err *err)
{
    *out = NULL;
    if (broken) return refused(err);
    if (bytes > memory() - in_use)
        return ql_err_set(err, QL_ERR_MEMORY, "out of device memory: %zu bytes needed, %zu free", bytes,
                          memory() - in_use);
    QL_TRY(ql_backend_cpu.alloc(ctx, bytes, out, err));
    in_use += bytes;
    return QL_OK;
}

static void fake_free(void *ctx, void *p, size_t bytes)
{
    in_use -= bytes;
    ql_backend_cpu.free(ctx, p, bytes);
}

static ql_status fake_copy(void *ctx, void *dst, const void *src, size_t bytes, ql_err *err)
{
    return broken ? refused(err) : ql_backend_cpu.upload(ctx, dst, src, bytes, err);
}

static ql_status fake_sync(void *ctx, ql_err *err)
{
    (void)ctx;
    return broken ? refused(err) : QL_OK;
}

static ql_status fake_matmul(void *ctx, const ql_tensor *x, const ql_matrix *w, bool add, ql_tensor *y,
                             ql_err *err)
{
    if (broken) return refused(err);
    long fault = setting("fault=", 0);
    if (fault && ++products > fault) {
        broken = true;
        return ql_err_set(err, QL_ERR_DEVICE, "matmul: an illegal memory access was encountered");
    }
    return ql_backend_cpu.matmul(ctx, x, w, add, y, err);
}

__attribute__((visibility("default"))) const ql_backend *ql_backend_plugin(void)
{
    static ql_backend fake;
    fake = ql_backend_cpu;
    fake.name = FAKE_NAME;
    fake.abi = FAKE_ABI;
    fake.count = fake_count;
    fake.open = fake_open;
    fake.info = fake_info;
    fake.alloc = fake_alloc;
    fake.free = fake_free;
    fake.upload = fake.download = fake_copy;
    fake.sync = fake_sync;
    fake.matmul = fake_matmul;
#ifdef FAKE_UNDEFINED
    fake_function_of_another_library();
#endif
    return &fake;
}

#endif
