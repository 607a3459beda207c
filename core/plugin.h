/* Backends in shared libraries: finds the file, loads it, checks that it is of this binary's version.
 *
 * A library that was loaded stays loaded until the process ends: the drivers behind it do not all survive
 * being unloaded.
 */
#ifndef QL_PLUGIN_H
#define QL_PLUGIN_H

#include "backend.h"

/* The backend that the library `path` exports as ql_backend_plugin, if it is called `name` and its interface
 * is QL_BACKEND_ABI. `path` holds a slash. NULL: `err` says why not. */
const ql_backend *ql_plugin_load(const char *path, const char *name, ql_err *err);

/* The CUDA backend; see ql_backend_find. The first call decides, for all threads and for good. */
const ql_backend *ql_plugin_cuda(ql_err *err);

/* The file that ql_plugin_cuda found, whether or not it could be loaded; "" when there is none. */
const char *ql_plugin_cuda_path(void);

#endif
