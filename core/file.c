#include "file.h"
#include "mem.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Linux moves at most this much in one call. */
#define CHUNK ((size_t)1 << 30)

static atomic_long fail_after = -1;
static atomic_long made;
static atomic_int fail_error;

void ql_file_fail_after(long n, int error)
{
    atomic_store(&made, 0);
    atomic_store(&fail_error, error);
    atomic_store(&fail_after, n);
}

long ql_file_count(void)
{
    return atomic_load(&made);
}

/* True when the test asked for this system call to fail; errno is set. */
static bool refused(void)
{
    long mine = atomic_fetch_add_explicit(&made, 1, memory_order_relaxed);
    if (mine != atomic_load_explicit(&fail_after, memory_order_relaxed)) return false;
    errno = atomic_load(&fail_error);
    return true;
}

static ql_status failed(const char *path, const char *verb, int error, ql_err *err)
{
    ql_status code = error == ENOENT || error == ENOTDIR ? QL_ERR_NOT_FOUND : QL_ERR_IO;
    ql_err_set(err, code, "%s: cannot %s: %s", path, verb, strerror(error));
    if (error == ENOSPC || error == EDQUOT) ql_err_hint(err, "free disk space, or write to another folder");
    if (error == EACCES || error == EPERM) ql_err_hint(err, "check who owns the file and its permissions");
    return code;
}

ql_status ql_file_open(const char *path, int *fd, uint64_t *size, ql_err *err)
{
    struct stat info;
    *fd = -1;
    *size = 0;
    /* O_NONBLOCK: opening a pipe that nobody writes must not wait. It does nothing to regular files. */
    int file = refused() ? -1 : open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) return failed(path, "open", errno, err);
    if (refused() || fstat(file, &info)) {
        int error = errno;
        close(file);
        return failed(path, "stat", error, err);
    }
    if (!S_ISREG(info.st_mode)) {
        close(file);
        return ql_err_set(err, QL_ERR_IO, "%s: is %s, not a regular file", path,
                          S_ISDIR(info.st_mode) ? "a folder" : "a device or pipe");
    }
    *fd = file;
    *size = (uint64_t)info.st_size;
    return QL_OK;
}

ql_status ql_file_pread(int fd, const char *path, uint64_t offset, void *dst, size_t bytes, ql_err *err)
{
    size_t done = 0;
    while (done < bytes) {
        size_t want = bytes - done < CHUNK ? bytes - done : CHUNK;
        ssize_t got = refused() ? -1 : pread(fd, (char *)dst + done, want, (off_t)(offset + done));
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return failed(path, "read", errno, err);
        if (got == 0) {
            ql_err_set(err, QL_ERR_IO, "%s: ends at byte %llu, but %llu bytes were wanted at byte %llu", path,
                       (unsigned long long)(offset + done), (unsigned long long)bytes,
                       (unsigned long long)offset);
            return ql_err_hint(err, "the file was shortened while it was open: copy or download it again");
        }
        done += (size_t)got;
    }
    return QL_OK;
}

ql_status ql_file_read(const char *path, size_t limit, char **data, size_t *size, ql_err *err)
{
    int fd = -1;
    uint64_t bytes = 0;
    char *text = NULL;
    *data = NULL;
    *size = 0;
    ql_status status = ql_file_open(path, &fd, &bytes, err);
    if (status) return status;
    if (bytes > limit) {
        status = ql_err_set(err, QL_ERR_FORMAT, "%s: has %llu bytes, over the limit of %zu", path,
                            (unsigned long long)bytes, limit);
        goto fail;
    }
    text = ql_malloc((size_t)bytes + 1);
    if (!text) {
        status = ql_err_set(err, QL_ERR_MEMORY, "%s: no memory for its %llu bytes", path,
                            (unsigned long long)bytes);
        goto fail;
    }
    status = ql_file_pread(fd, path, 0, text, (size_t)bytes, err);
    if (status) goto fail;
    close(fd);
    text[bytes] = '\0';
    *data = text;
    *size = (size_t)bytes;
    return QL_OK;

fail:
    ql_free(text);
    close(fd);
    return status;
}

bool ql_file_exists(const char *path)
{
    return access(path, F_OK) == 0;
}

bool ql_file_is_folder(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 && S_ISDIR(info.st_mode);
}

char *ql_file_join(const char *folder, const char *name)
{
    size_t n = strlen(folder), m = strlen(name);
    while (n > 1 && folder[n - 1] == '/') n--;
    bool root = n == 1 && folder[0] == '/';
    char *path = ql_malloc(n + m + 2);
    if (!path) return NULL;
    memcpy(path, folder, n);
    if (!root) path[n++] = '/';
    memcpy(path + n, name, m + 1);
    return path;
}

static void release(ql_file_writer *writer)
{
    ql_free(writer->path);
    ql_free(writer->temp);
    *writer = (ql_file_writer){.fd = -1};
}

ql_status ql_file_create(const char *path, ql_file_writer *writer, ql_err *err)
{
    static atomic_uint serial;
    *writer = (ql_file_writer){.fd = -1};
    size_t room = strlen(path) + 48;
    writer->path = ql_strdup(path);
    writer->temp = ql_malloc(room);
    if (!writer->path || !writer->temp) {
        release(writer);
        return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to write it", path);
    }
    for (int attempt = 0; attempt < 100; attempt++) {
        snprintf(writer->temp, room, "%s.tmp.%ld.%u", path, (long)getpid(), atomic_fetch_add(&serial, 1));
        writer->fd = refused() ? -1 : open(writer->temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (writer->fd >= 0) return QL_OK;
        if (errno != EEXIST) break;
    }
    int error = errno;
    release(writer);
    ql_status status = failed(path, "create", error, err);
    if (status == QL_ERR_NOT_FOUND) ql_err_hint(err, "make the folder first");
    return status;
}

ql_status ql_file_pwrite(ql_file_writer *writer, uint64_t offset, const void *data, size_t bytes, ql_err *err)
{
    if (!writer->path) return ql_err_set(err, QL_ERR_ARG, "the file is not open for writing");
    size_t done = 0;
    while (done < bytes) {
        size_t want = bytes - done < CHUNK ? bytes - done : CHUNK;
        ssize_t put =
            refused() ? -1 : pwrite(writer->fd, (const char *)data + done, want, (off_t)(offset + done));
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return failed(writer->path, "write", put < 0 ? errno : ENOSPC, err);
        done += (size_t)put;
    }
    return QL_OK;
}

/* Make a rename durable. Some file systems cannot sync a folder and say EINVAL: then there is nothing to do.
 */
static int sync_folder(const char *path)
{
    char folder[PATH_MAX];
    const char *slash = strrchr(path, '/');
    size_t n = slash ? (size_t)(slash - path) : 0;
    if (n >= sizeof folder) return 0;
    memcpy(folder, path, n);
    folder[n] = '\0';
    if (n == 0) memcpy(folder, slash ? "/" : ".", 2);
    int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return 0; /* a folder we may write but not list */
    int error = refused() || fsync(fd) ? errno : 0;
    close(fd);
    return error == EINVAL || error == ENOTSUP ? 0 : error;
}

ql_status ql_file_commit(ql_file_writer *writer, ql_err *err)
{
    if (!writer->path) return ql_err_set(err, QL_ERR_ARG, "the file is not open for writing");
    const char *verb = "sync";
    int error = refused() || fsync(writer->fd) ? errno : 0;
    if (!error) {
        verb = "close";
        int fd = writer->fd;
        writer->fd = -1;
        bool refuse = refused();
        int refusal = errno;
        error = close(fd) ? errno : refuse ? refusal : 0;
    }
    if (!error) {
        verb = "rename to its final name";
        error = refused() || rename(writer->temp, writer->path) ? errno : 0;
    }
    if (!error) {
        /* The content is in place; only its durability is in question, which is still an error. */
        verb = "sync the folder of";
        error = sync_folder(writer->path);
    }
    ql_status status = error ? failed(writer->path, verb, error, err) : QL_OK;
    if (error) ql_file_abort(writer);
    release(writer);
    return status;
}

void ql_file_abort(ql_file_writer *writer)
{
    if (!writer->path) return;
    if (writer->fd >= 0) close(writer->fd);
    unlink(writer->temp);
    release(writer);
}

ql_status ql_file_write(const char *path, const void *data, size_t bytes, ql_err *err)
{
    ql_file_writer writer;
    ql_status status = ql_file_create(path, &writer, err);
    if (!status) status = ql_file_pwrite(&writer, 0, data, bytes, err);
    if (!status) return ql_file_commit(&writer, err);
    ql_file_abort(&writer);
    return status;
}
