/* Reading and writing files so that nothing is lost or half-read.
 *
 * Reads go through pread: a file truncated under us is an error, not a signal. Files that others will read
 * are written under a temporary name in the same folder, synced and renamed, so that the final name only ever
 * holds a complete file. Every message names the path.
 */
#ifndef QL_FILE_H
#define QL_FILE_H

#include "err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Open a regular file for reading; folders, pipes and devices are refused. The caller closes *fd. */
ql_status ql_file_open(const char *path, int *fd /* [OUT] -1 on failure */, uint64_t *size /* [OUT] bytes */,
                       ql_err *err);

/* Read exactly `bytes` at `offset`; fewer is QL_ERR_IO. `path` only names the file in the message. */
ql_status ql_file_pread(int fd, const char *path, uint64_t offset, void *dst /* [OUT] bytes */, size_t bytes,
                        ql_err *err);

/* The whole of a file of at most `limit` bytes, with a NUL after its end. The caller frees *data by ql_free.
 */
ql_status ql_file_read(const char *path, size_t limit, char **data /* [OUT] */, size_t *size /* [OUT] */,
                       ql_err *err);

bool ql_file_exists(const char *path); /* anything by that name that can be reached */
bool ql_file_is_folder(const char *path);

/* "folder/name"; NULL when memory ran out. The caller frees it by ql_free. */
char *ql_file_join(const char *folder, const char *name);

/* A file being written. Zero-initialise it; all functions accept a closed one. */
typedef struct {
    int fd;     /* meaningful while path is set */
    char *path; /* final name, owned; NULL when closed */
    char *temp; /* name until commit, owned */
} ql_file_writer;

/* Start writing `path`; nothing appears under that name before ql_file_commit. */
ql_status ql_file_create(const char *path, ql_file_writer *writer /* [OUT] */, ql_err *err);
ql_status ql_file_pwrite(ql_file_writer *writer, uint64_t offset, const void *data, size_t bytes,
                         ql_err *err);
/* fsync, rename over the final name, fsync the folder, close. On failure the temporary file is removed. */
ql_status ql_file_commit(ql_file_writer *writer, ql_err *err);
/* Close and remove the temporary file; idempotent. */
void ql_file_abort(ql_file_writer *writer);

/* create + pwrite + commit. */
ql_status ql_file_write(const char *path, const void *data, size_t bytes, ql_err *err);

/* Tests only: let `n` system calls of this file pass, then fail one with errno `error`. n < 0: never. */
void ql_file_fail_after(long n, int error);
/* System calls made since the last ql_file_fail_after. */
long ql_file_count(void);

#endif
