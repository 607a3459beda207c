/* Digests of files, remembered in the store. */
#include "store_impl.h"

#include "clock.h"
#include "file.h"
#include "interrupt.h"
#include "mem.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PIECE ((size_t)1 << 20) /* bytes between two looks at the interrupt: a millisecond's work */

/* A file that was changed this short a time ago may be changed again without a new time: the coarsest of file
 * systems counts in two seconds. Its digest is not kept. */
#define SETTLED_NS ((int64_t)2500000000)

typedef struct {
    int64_t dev, inode, size, mtime_ns, ctime_ns;
} stamp;

static int64_t nanoseconds(struct timespec t)
{
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static ql_status take_stamp(int fd, const char *path, stamp *out, ql_err *err)
{
    struct stat info;
    if (fstat(fd, &info)) return ql_err_set(err, QL_ERR_IO, "%s: cannot stat: %s", path, strerror(errno));
    *out = (stamp){(int64_t)info.st_dev, (int64_t)info.st_ino, (int64_t)info.st_size,
                   nanoseconds(info.st_mtim), nanoseconds(info.st_ctim)};
    return QL_OK;
}

static ql_status digest(int fd, const char *path, uint64_t size, char hex[QL_SHA256_HEX], ql_err *err)
{
    ql_sha256 sha = {0};
    char *piece = ql_malloc(PIECE);
    if (!piece) return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to read it", path);
    ql_status status = ql_sha256_open(&sha, err);
    for (uint64_t at = 0; at < size && status == QL_OK; at += PIECE) {
        size_t n = size - at < PIECE ? (size_t)(size - at) : PIECE;
        if (ql_interrupted()) status = ql_err_set(err, QL_ERR_INTERRUPTED, "%s: interrupted", path);
        if (status == QL_OK) status = ql_file_pread(fd, path, at, piece, n, err);
        if (status == QL_OK) status = ql_sha256_update(&sha, piece, n, err);
    }
    if (status == QL_OK) status = ql_sha256_finish(&sha, hex, err);
    ql_sha256_close(&sha);
    ql_free(piece);
    return status;
}

static ql_status recall(ql_store *store, const stamp *s, char hex[QL_SHA256_HEX], ql_err *err)
{
    bool more, ok = true;
    QL_TRY(ql_store_bind(store, QL_STORE_FILE_FIND, err, "iiiii", s->dev, s->inode, s->size, s->mtime_ns,
                         s->ctime_ns));
    ql_store_start(store, QL_STORE_FILE_FIND);
    QL_TRY(ql_store_next(store, &more, err));
    const char *found = more ? ql_store_column(store, 0, &ok) : NULL;
    if (found && strlen(found) == QL_SHA256_HEX - 1) memcpy(hex, found, QL_SHA256_HEX);
    ql_store_stop(store);
    return ok ? QL_OK : ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to read it", store->path);
}

static ql_status remember(ql_store *store, const char *path, const stamp *s, const char *hex, ql_err *err)
{
    QL_TRY(ql_store_begin(store, err));
    ql_status status = ql_store_bind(store, QL_STORE_FILE_PUT, err, "siiiiis", path, s->dev, s->inode,
                                     s->size, s->mtime_ns, s->ctime_ns, hex);
    if (status == QL_OK) status = ql_store_do(store, QL_STORE_FILE_PUT, err);
    return ql_store_end(store, status, err);
}

static ql_status look_up(ql_store *store, int fd, const char *path, uint64_t size, char hex[QL_SHA256_HEX],
                         ql_err *err)
{
    stamp before = {0}, after = {0};
    QL_TRY(take_stamp(fd, path, &before, err));
    QL_TRY(recall(store, &before, hex, err));
    if (hex[0]) return QL_OK;
    int64_t now = (int64_t)(ql_clock_unix() * 1e9);
    int64_t changed = before.mtime_ns > before.ctime_ns ? before.mtime_ns : before.ctime_ns;
    QL_TRY(digest(fd, path, size, hex, err));
    ql_status status = take_stamp(fd, path, &after, err);
    if (status == QL_OK && memcmp(&before, &after, sizeof before) != 0) {
        status = ql_err_set(err, QL_ERR_IO, "%s: was changed while it was read", path);
        ql_err_hint(err, "wait until it is complete, and run again");
    }
    if (status == QL_OK && !store->readonly && now - changed > SETTLED_NS)
        status = remember(store, path, &before, hex, err);
    if (status != QL_OK) hex[0] = '\0';
    return status;
}

ql_status ql_store_sha256(ql_store *store, const char *path, char hex[QL_SHA256_HEX], ql_err *err)
{
    int fd;
    uint64_t size;
    hex[0] = '\0';
    QL_TRY(ql_file_open(path, &fd, &size, err));
    ql_status status = look_up(store, fd, path, size, hex, err);
    close(fd);
    return status;
}
