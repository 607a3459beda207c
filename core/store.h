/* The results store: one SQLite file that holds what runs have computed, so that any of them can be killed,
 * run again and compared later.
 *
 * A set is the rows that depend on the same inputs; its key is the SHA-256 of those. A row is one finished
 * element, a JSON text under the set's key and an id of its own. A run records which rows its result consists
 * of. Every function that writes is one transaction: when it returns QL_OK its rows survive a kill -9 and a
 * power cut (a write-ahead log, synced; a rollback journal where the file system has no shared memory), when
 * it fails nothing of it is there. Several processes may use one store; a writer waits for another.
 *
 * The caller owns the store and closes it. Texts that go in are borrowed for the call, end in NUL and are
 * UTF-8; `key` is 64 lower-case hex digits. Errors name the file and what to do. A file that is damaged,
 * another program's or newer is refused and left as it is.
 */
#ifndef QL_STORE_H
#define QL_STORE_H

#include "err.h"
#include "sha256.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ql_store ql_store;

/* Open `path`, made when it is not there (its folder must be) unless `readonly`; ":memory:" is a store of
 * this process that ends with it. To read takes no right to write, but in a folder where nothing can be made
 * beside the file there must be no log; where one can write, a log that a killed process has left is put into
 * the file. `wait`: seconds to wait for another process that is writing. */
ql_status ql_store_open(const char *path, bool readonly, double wait, ql_store **store /* [OUT] */,
                        ql_err *err);
void ql_store_close(ql_store *store);             /* NULL too */
const char *ql_store_path(const ql_store *store); /* as given; borrowed */

typedef struct {
    int64_t id;
    const char *name;
    double started, finished; /* Unix time; finished is 0 until the run ends */
    const char *status; /* "running", "finished", "interrupted", "failed"; "killed": its process is gone */
    int64_t pid;
    bool alive;                /* that process runs */
    const char *command;       /* JSON */
    const char *script_sha256; /* NULL: unknown */
    const char *document;      /* JSON; NULL until there is one */
} ql_store_run;

typedef struct {
    const char *key, *name, *inputs; /* inputs: JSON */
    double created;                  /* Unix time */
} ql_store_set;

typedef struct {
    const char *id, *value; /* value: JSON */
} ql_store_row;

/* Begin a run of this process: of `run` name, started, command and script_sha256 are read. */
ql_status ql_store_begin_run(ql_store *store, const ql_store_run *run, int64_t *id /* [OUT] */, ql_err *err);
/* status: "finished", "interrupted" or "failed"; document may be NULL. QL_ERR_NOT_FOUND without such a run.
 */
ql_status ql_store_end_run(ql_store *store, int64_t run, double finished, const char *status,
                           const char *document, ql_err *err);

/* Name a set; nothing changes when it is there. */
ql_status ql_store_set_add(ql_store *store, const char *key, const char *name, const char *inputs,
                           ql_err *err);

/* Rows of a set that set_add has named, computed by `run`; one whose id is there is replaced. */
ql_status ql_store_put(ql_store *store, int64_t run, const char *key, const ql_store_row *rows /* n */,
                       size_t n, ql_err *err);

/* Record that the result of `run` for the set consists of the rows `ids`, in this order, and of no others. */
ql_status ql_store_use(ql_store *store, int64_t run, const char *key, const char *const *ids /* n */,
                       size_t n, ql_err *err);

/* Queries. One of the ql_store_find_... starts a query, and the ql_store_next_... for it is called until the
 * first member is NULL (or the id 0). A store has one query: any other call ends it, so that it may be left
 * at any row. Texts of a row are borrowed from the store until the next call. */
ql_status ql_store_find_runs(ql_store *store, ql_err *err); /* newest first */
/* Those whose result has rows of the set, newest first. */
ql_status ql_store_find_set_runs(ql_store *store, const char *key, ql_err *err);
/* QL_ERR_NOT_FOUND, naming the runs that there are, without such a run. */
ql_status ql_store_find_run(ql_store *store, int64_t id, ql_store_run *run /* [OUT] */, ql_err *err);
ql_status ql_store_find_sets(ql_store *store, const char *name, ql_err *err); /* newest first */
ql_status ql_store_find_rows(ql_store *store, const char *key, ql_err *err);
/* Those recorded by ql_store_use, in that order. */
ql_status ql_store_find_run_rows(ql_store *store, int64_t run, const char *key, ql_err *err);
ql_status ql_store_next_run(ql_store *store, ql_store_run *run /* [OUT] */, ql_err *err);
ql_status ql_store_next_set(ql_store *store, ql_store_set *set /* [OUT] */, ql_err *err);
ql_status ql_store_next_row(ql_store *store, ql_store_row *row /* [OUT] */, ql_err *err);

/* Digest of a file's bytes, remembered in the store by device, inode, size and times of the last change, so
 * that only a file that may have changed is read again. QL_ERR_INTERRUPTED when the user wants to stop. */
ql_status ql_store_sha256(ql_store *store, const char *path, char hex[QL_SHA256_HEX] /* [OUT] */,
                          ql_err *err);

#endif
