/* The registry of backends and the life of an open device. */
#include "backend.h"

#include "mem.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const ql_backend *const registry[] = {&ql_backend_cpu};

static const ql_backend *find(const char *name, size_t len)
{
    for (size_t i = 0; i < sizeof registry / sizeof *registry; i++) {
        if (strlen(registry[i]->name) == len && memcmp(registry[i]->name, name, len) == 0) return registry[i];
    }
    return NULL;
}

/* "cuda:1" -> backend "cuda", index 1; "auto" takes the CPU, the one backend that is always there. */
static ql_status parse(const char *name, const ql_backend **backend, int *index, ql_err *err)
{
    *index = 0;
    if (strcmp(name, "auto") == 0) name = "cpu";
    const char *colon = strchr(name, ':');
    size_t len = colon ? (size_t)(colon - name) : strlen(name);
    *backend = find(name, len);
    if (!*backend && len == 4 && memcmp(name, "cuda", 4) == 0) {
        ql_err_set(err, QL_ERR_UNSUPPORTED, "device '%s': this build of qlua has no CUDA backend", name);
        return ql_err_hint(err, "use --device cpu");
    }
    if (!*backend) {
        ql_err_set(err, QL_ERR_ARG, "unknown device '%s'", name);
        return ql_err_hint(err, "devices are auto, cpu, cuda and cuda:<index>");
    }
    if (!colon) return QL_OK;
    char *end;
    long value = strtol(colon + 1, &end, 10);
    if (!isdigit((unsigned char)colon[1]) || *end || value > 1023)
        return ql_err_set(err, QL_ERR_ARG, "device '%s': '%s' is not a device index", name, colon + 1);
    *index = (int)value;
    return QL_OK;
}

ql_status ql_device_open(const char *name, const ql_device_options *options, ql_device **out, ql_err *err)
{
    static const ql_device_options plain;
    *out = NULL;
    const ql_backend *backend;
    int index;
    ql_status status = parse(name, &backend, &index, err);
    if (status != QL_OK) return status;
    int count = backend->count(err);
    if (index >= count)
        return ql_err_set(err, QL_ERR_DEVICE, "device '%s': there are %d %s devices", name, count,
                          backend->name);
    ql_device *dev = ql_calloc(1, sizeof *dev);
    if (!dev) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    status = backend->open(index, options ? options : &plain, &dev->ctx, err);
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
