#include "plugin.h"

#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CUDA_FILE "libqlua_cuda.so"

static struct {
    const ql_backend *backend;
    char path[PATH_MAX];
    ql_err err;
} cuda;

const ql_backend *ql_plugin_load(const char *path, const char *name, ql_err *err)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        const char *why = dlerror(); /* "FILE: reason": the plug-in itself, or a library that it lacks */
        size_t length = strlen(path);
        if (!why) why = "no reason";
        if (strncmp(why, path, length) == 0 && strncmp(why + length, ": ", 2) == 0) why += length + 2;
        ql_err_set(err, QL_ERR_UNSUPPORTED, "the plug-in %s does not load: %s", path, why);
        ql_err_hint(err, "use a " CUDA_FILE " that was built with qlua, and for this system");
        return NULL;
    }
    const ql_backend *(*plugin)(void);
    void *symbol = dlsym(library, "ql_backend_plugin");
    /* ISO C has no conversion from a pointer to data; POSIX promises that the bits are those of a function.
     */
    memcpy(&plugin, &symbol, sizeof plugin);
    const ql_backend *backend = symbol ? plugin() : NULL;
    if (!backend) {
        ql_err_set(err, QL_ERR_UNSUPPORTED, "%s is no plug-in of qlua: it does not export ql_backend_plugin",
                   path);
        ql_err_hint(err, "name a " CUDA_FILE " that was built with qlua");
    } else if (backend->abi != QL_BACKEND_ABI) {
        ql_err_set(err, QL_ERR_UNSUPPORTED,
                   "the plug-in %s is of another version: its interface is %d, this qlua wants %d", path,
                   backend->abi, QL_BACKEND_ABI);
        ql_err_hint(err, "build qlua and its plug-in together");
        backend = NULL;
    } else if (strcmp(backend->name, name) != 0) {
        ql_err_set(err, QL_ERR_UNSUPPORTED, "the plug-in %s is for %s devices, not for %s", path,
                   backend->name, name);
        backend = NULL;
    }
    if (!backend) dlclose(library);
    return backend;
}

/* Beside the binary, and where an installation has it. */
static bool find_beside(char *path, size_t size)
{
    static const char *const places[] = {"", "../lib/", "../lib/qlua/"};
    char folder[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", folder, sizeof folder - 1);
    if (n <= 0) return false;
    folder[n] = '\0';
    char *slash = strrchr(folder, '/');
    if (!slash) return false;
    slash[1] = '\0';
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        int length = snprintf(path, size, "%s%s" CUDA_FILE, folder, places[i]);
        if (length > 0 && (size_t)length < size && access(path, F_OK) == 0) return true;
    }
    path[0] = '\0';
    return false;
}

static void find_cuda(void)
{
    const char *named = getenv("QLUA_CUDA_PLUGIN");
    if (named && *named) {
        if (!realpath(named, cuda.path)) {
            ql_err_set(&cuda.err, QL_ERR_NOT_FOUND, "QLUA_CUDA_PLUGIN=%s: %s", named, strerror(errno));
            ql_err_hint(&cuda.err, "unset QLUA_CUDA_PLUGIN, or let it name " CUDA_FILE);
            cuda.path[0] = '\0'; /* realpath leaves how far it got */
            return;
        }
    } else if (!find_beside(cuda.path, sizeof cuda.path)) {
        ql_err_set(&cuda.err, QL_ERR_UNSUPPORTED,
                   "this build of qlua has no CUDA backend: there is no " CUDA_FILE
                   " beside the binary, in ../lib or in ../lib/qlua");
        ql_err_hint(&cuda.err, "build qlua on a machine that has the CUDA toolkit, so that nvcc is found");
        return;
    }
    cuda.backend = ql_plugin_load(cuda.path, "cuda", &cuda.err);
}

static void cuda_once(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, find_cuda);
}

const ql_backend *ql_plugin_cuda(ql_err *err)
{
    cuda_once();
    if (!cuda.backend && err) *err = cuda.err;
    return cuda.backend;
}

const char *ql_plugin_cuda_path(void)
{
    cuda_once();
    return cuda.path;
}
