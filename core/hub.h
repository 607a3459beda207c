/* Where a --model argument lies on disk: a folder, a file, or a repository in the Hugging Face cache.
 *
 * The cache is read as huggingface_hub lays it out: <cache>/models--org--name/{blobs,refs,snapshots}; the
 * cache is HF_HUB_CACHE, else HF_HOME/hub, else XDG_CACHE_HOME/huggingface/hub, else
 * ~/.cache/huggingface/hub. Nothing is downloaded here and the cache is never written.
 */
#ifndef QL_HUB_H
#define QL_HUB_H

#include "err.h"

/* `model`: an existing folder or file, or "org/name" or "org/name@revision" (branch, tag or commit; default
 * main). What exists on disk wins. The caller frees *path by ql_free. */
ql_status ql_hub_resolve(const char *model, char **path /* [OUT] NULL on failure */, ql_err *err);

/* The cache folder in force, whether or not it exists. The caller frees *path by ql_free. */
ql_status ql_hub_cache(char **path /* [OUT] */, ql_err *err);

#endif
