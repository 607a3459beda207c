/* The registry of backends and the life of an open device. */
#include "backend.h"

#include "mem.h"
#include "plugin.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static ql_status unknown(const char *name, ql_err *err)
{
    ql_err_set(err, QL_ERR_ARG, "unknown device '%s'", name);
    return ql_err_hint(err, "devices are auto, cpu, cuda and cuda:<index>");
}

const ql_backend *ql_backend_find(const char *name, ql_err *err)
{
    if (strcmp(name, "cpu") == 0) return &ql_backend_cpu;
    if (strcmp(name, "cuda") == 0) return ql_plugin_cuda(err);
    unknown(name, err);
    return NULL;
}

/* "cuda:1" -> "cuda", 1; the index is 0 where there is none. */
static ql_status parse(const char *name, char backend[static 8], int *index, ql_err *err)
{
    const char *colon = strchr(name, ':');
    size_t len = colon ? (size_t)(colon - name) : strlen(name);
    *index = 0;
    if (!(len == 3 && memcmp(name, "cpu", 3) == 0) && !(len == 4 && memcmp(name, "cuda", 4) == 0))
        return unknown(name, err);
    memcpy(backend, name, len);
    backend[len] = '\0';
    if (!colon) return QL_OK;
    char *end;
    long value = strtol(colon + 1, &end, 10);
    if (!isdigit((unsigned char)colon[1]) || *end || value > 1023) {
        ql_err_set(err, QL_ERR_ARG, "device '%s': '%s' is not a device index", name, colon + 1);
        return ql_err_hint(err, "indices count from 0, as in %s:0", backend);
    }
    *index = (int)value;
    return QL_OK;
}

/* `why` as the reason for which device `name` cannot be had. */
static ql_status refuse(const char *name, const ql_err *why, ql_err *err)
{
    ql_err_set(err, why->code, "device '%s': %s", name, why->message);
    if (strstr(why->hint, "--device cpu")) return ql_err_hint(err, "%s", why->hint);
    return ql_err_hint(err, "%s%suse --device cpu", why->hint, why->hint[0] ? "; or " : "");
}

static ql_status out_of_range(const char *name, const ql_backend *backend, int count, ql_err *err)
{
    const char *kind = backend == &ql_backend_cpu ? "CPU" : "CUDA", *b = backend->name;
    if (count == 1)
        return ql_err_set(err, QL_ERR_DEVICE, "device '%s': there is 1 %s device, %s:0", name, kind, b);
    return ql_err_set(err, QL_ERR_DEVICE, "device '%s': there are %d %s devices, %s:0 %s %s:%d", name, count,
                      kind, b, count == 2 ? "and" : "to", b, count - 1);
}

static ql_status open_at(const ql_backend *backend, int index, const ql_device_options *options,
                         ql_device **out, ql_err *err)
{
    static const ql_device_options plain;
    ql_device *dev = ql_calloc(1, sizeof *dev);
    if (!dev) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    ql_status status = backend->open(index, options ? options : &plain, &dev->ctx, err);
    if (status != QL_OK) {
        ql_free(dev);
        return status;
    }
    dev->backend = backend;
    dev->index = index;
    dev->refs = 1;
    snprintf(dev->label, sizeof dev->label, backend == &ql_backend_cpu ? "%s" : "%s:%d", backend->name,
             index);
    *out = dev;
    return QL_OK;
}

/* The first CUDA device that qlua can use. Where there is none, or only such as qlua has no kernels for, that
 * is no failure; a device that should work and does not is one. */
static ql_status open_auto(const ql_device_options *options, ql_device **out, ql_err *err)
{
    ql_err why;
    const ql_backend *cuda = ql_backend_find("cuda", &why);
    int count = cuda ? cuda->count(&why) : 0;
    for (int i = 0; i < count; i++) {
        ql_status status = open_at(cuda, i, options, out, &why);
        if (status == QL_ERR_UNSUPPORTED) continue;
        if (status != QL_OK && err) *err = why;
        return status;
    }
    return open_at(&ql_backend_cpu, 0, options, out, err);
}

ql_status ql_device_open(const char *name, const ql_device_options *options, ql_device **out, ql_err *err)
{
    *out = NULL;
    if (strcmp(name, "auto") == 0) return open_auto(options, out, err);
    char word[8];
    int index;
    QL_TRY(parse(name, word, &index, err));
    ql_err why = {.code = QL_ERR_DEVICE, .message = "no such device"};
    const ql_backend *backend = ql_backend_find(word, &why);
    int count = backend ? backend->count(&why) : 0;
    if (count <= 0) return refuse(name, &why, err);
    if (index >= count) return out_of_range(name, backend, count, err);
    return open_at(backend, index, options, out, err);
}

ql_device *ql_device_retain(ql_device *dev)
{
    if (dev) __atomic_fetch_add(&dev->refs, 1, __ATOMIC_RELAXED);
    return dev;
}

void ql_device_release(ql_device *dev)
{
    if (!dev || __atomic_fetch_sub(&dev->refs, 1, __ATOMIC_ACQ_REL) != 1) return;
    dev->backend->close(dev->ctx);
    ql_free(dev);
}
