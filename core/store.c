#include "store_impl.h"

#include "clock.h"
#include "file.h"
#include "interrupt.h"
#include "mem.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#define APPLICATION 0x716c7561 /* "qlua" in the file's header */
#define VERSION 1

static const char schema[] =
    "CREATE TABLE runs (id INTEGER PRIMARY KEY, name TEXT NOT NULL, started REAL NOT NULL, finished REAL,"
    " status TEXT NOT NULL CHECK (status IN ('running', 'finished', 'interrupted', 'failed')),"
    " pid INTEGER NOT NULL, process TEXT NOT NULL, command TEXT NOT NULL, script_sha256 TEXT, document TEXT)"
    " STRICT;"
    "CREATE TABLE sets (key TEXT PRIMARY KEY, name TEXT NOT NULL, inputs TEXT NOT NULL, created REAL NOT "
    "NULL)"
    " STRICT;"
    "CREATE TABLE rows (key TEXT NOT NULL REFERENCES sets, id TEXT NOT NULL, value TEXT NOT NULL,"
    " run INTEGER NOT NULL REFERENCES runs, created REAL NOT NULL, PRIMARY KEY (key, id))"
    " STRICT, WITHOUT ROWID;"
    "CREATE TABLE run_rows (run INTEGER NOT NULL REFERENCES runs, key TEXT NOT NULL, seq INTEGER NOT NULL,"
    " id TEXT NOT NULL, PRIMARY KEY (run, key, seq), FOREIGN KEY (key, id) REFERENCES rows)"
    " STRICT, WITHOUT ROWID;"
    "CREATE TABLE files (path TEXT NOT NULL, dev INTEGER NOT NULL, inode INTEGER NOT NULL,"
    " size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, sha256 TEXT NOT NULL,"
    " PRIMARY KEY (dev, inode)) STRICT, WITHOUT ROWID;"
    "CREATE VIEW samples AS SELECT run_rows.run AS run, sets.name AS name, key, seq, id, value, rows.created "
    "AS created"
    " FROM run_rows JOIN rows USING (key, id) JOIN sets USING (key);";

static const char *const sql[QL_STORE_STATEMENTS] = {
    [QL_STORE_RUN_ADD] = "INSERT INTO runs (name, started, status, pid, process, command, script_sha256)"
                         " VALUES (?, ?, 'running', ?, ?, ?, ?)",
    [QL_STORE_RUN_END] = "UPDATE runs SET finished = ?, status = ?, document = ? WHERE id = ?",
    [QL_STORE_RUNS] = "SELECT id, name, started, finished, status, pid, process FROM runs ORDER BY id DESC",
    [QL_STORE_RUN] =
        "SELECT id, name, started, finished, status, pid, process, command, script_sha256, document"
        " FROM runs WHERE id = ?",
    [QL_STORE_SET_ADD] = "INSERT INTO sets (key, name, inputs, created) VALUES (?, ?, ?, ?)"
                         " ON CONFLICT DO NOTHING",
    [QL_STORE_SETS] = "SELECT key, name, inputs, created FROM sets WHERE name = ?"
                      " ORDER BY created DESC, rowid DESC",
    [QL_STORE_ROW_PUT] = "INSERT INTO rows (key, id, value, run, created) VALUES (?, ?, ?, ?, ?)"
                         " ON CONFLICT DO UPDATE SET value = excluded.value, run = excluded.run,"
                         " created = excluded.created",
    [QL_STORE_ROWS] = "SELECT id, value FROM rows WHERE key = ?",
    [QL_STORE_USE_CLEAR] = "DELETE FROM run_rows WHERE run = ? AND key = ?",
    [QL_STORE_USE_ADD] = "INSERT INTO run_rows (run, key, seq, id) VALUES (?, ?, ?, ?)",
    [QL_STORE_USED] = "SELECT id, value FROM run_rows JOIN rows USING (key, id)"
                      " WHERE run_rows.run = ? AND key = ? ORDER BY seq",
    [QL_STORE_FILE_FIND] = "SELECT sha256 FROM files WHERE dev = ? AND inode = ? AND size = ?"
                           " AND mtime_ns = ? AND ctime_ns = ?",
    [QL_STORE_FILE_PUT] = "INSERT INTO files (path, dev, inode, size, mtime_ns, ctime_ns, sha256)"
                          " VALUES (?, ?, ?, ?, ?, ?, ?)"
                          " ON CONFLICT DO UPDATE SET path = excluded.path, size = excluded.size,"
                          " mtime_ns = excluded.mtime_ns, ctime_ns = excluded.ctime_ns,"
                          " sha256 = excluded.sha256",
};

double ql_store_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* --- errors ----------------------------------------------------------------------------------------------
 */

static ql_status failed_system(const ql_store *store, const char *verb, int error, ql_err *err)
{
    if (error == ENOSPC || error == EDQUOT || error == EFBIG) {
        ql_err_set(err, QL_ERR_IO, "%s: the disk is full", store->path);
        return ql_err_hint(err, "free disk space and run again: what was finished before is kept");
    }
    ql_err_set(err, QL_ERR_IO, "%s: cannot %s%s%s", store->path, verb, error ? ": " : "",
               error ? strerror(error) : "");
    return ql_err_hint(err, "check the disk and the permissions of the file and its folder");
}

static ql_status damaged(ql_store *store, const char *why, ql_err *err)
{
    ql_err_set(err, QL_ERR_FORMAT, "%s: is damaged: %s", store->path, why);
    return ql_err_hint(
        err, "it was left as it is: keep a copy of it and its -wal file, try `sqlite3 FILE .recover`, "
             "or give another --output_path");
}

static ql_status failed_code(ql_store *store, int code, const char *why, int error, ql_err *err)
{
    switch (code & 0xff) {
    case SQLITE_NOMEM:
        return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to read or write it", store->path);
    case SQLITE_INTERRUPT:
        return ql_err_set(err, QL_ERR_INTERRUPTED, "%s: interrupted", store->path);
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
    case SQLITE_PROTOCOL:
        if (ql_interrupted()) return ql_err_set(err, QL_ERR_INTERRUPTED, "%s: interrupted", store->path);
        ql_err_set(err, QL_ERR_IO, "%s: another process holds it, after %g seconds still", store->path,
                   store->wait);
        return ql_err_hint(err, "wait until that process is done, or give another --output_path");
    case SQLITE_FULL:
        return failed_system(store, "write", ENOSPC, err);
    case SQLITE_READONLY:
    case SQLITE_PERM:
        ql_err_set(err, QL_ERR_IO, "%s: the file or its folder is read-only", store->path);
        return ql_err_hint(err, "change its permissions, or give another --output_path");
    case SQLITE_CANTOPEN:
        return failed_system(store, "open it or the files beside it", error, err);
    case SQLITE_NOTADB:
        ql_err_set(err, QL_ERR_FORMAT, "%s: is not a results store, nor any SQLite database", store->path);
        return ql_err_hint(err, "it was left as it is: move it away, or give another --output_path");
    case SQLITE_CORRUPT:
    case SQLITE_ERROR:
    case SQLITE_SCHEMA:
        return damaged(store, why, err);
    case SQLITE_IOERR:
        if (code == SQLITE_IOERR_NOMEM) return failed_code(store, SQLITE_NOMEM, why, error, err);
        if (code == SQLITE_IOERR_CORRUPTFS) return damaged(store, why, err);
        return failed_system(store, "read or write", error, err);
    default:
        return ql_err_set(err, QL_ERR_IO, "%s: %s", store->path, why);
    }
}

ql_status ql_store_failed(ql_store *store, ql_err *err)
{
    return failed_code(store, sqlite3_extended_errcode(store->db), sqlite3_errmsg(store->db),
                       sqlite3_system_errno(store->db), err);
}

/* --- statements ------------------------------------------------------------------------------------------
 */

/* SQLite asks while another process holds the file: true to try again. After Ctrl-C a writer has half a
 * second left for the rows that are finished. */
static int busy(void *context, int count)
{
    ql_store *store = context;
    double now = ql_clock_seconds();
    if (count == 0) store->since = now;
    double limit = ql_interrupted() && store->wait > 0.5 ? 0.5 : store->wait;
    if (now - store->since >= limit) return 0;
    nanosleep(&(struct timespec){.tv_nsec = count < 20 ? 1000000 : 10000000}, NULL);
    return 1;
}

ql_status ql_store_exec(ql_store *store, const char *text, ql_err *err)
{
    return sqlite3_exec(store->db, text, NULL, NULL, NULL) == SQLITE_OK ? QL_OK : ql_store_failed(store, err);
}

void ql_store_stop(ql_store *store)
{
    if (store->query) sqlite3_reset(store->query);
    store->query = NULL;
}

ql_status ql_store_bind(ql_store *store, ql_store_statement which, ql_err *err, const char *types, ...)
{
    sqlite3_stmt **stmt = &store->statements[which];
    int code = SQLITE_OK;
    va_list ap;
    ql_store_stop(store);
    if (!*stmt &&
        sqlite3_prepare_v3(store->db, sql[which], -1, SQLITE_PREPARE_PERSISTENT, stmt, NULL) != SQLITE_OK)
        return ql_store_failed(store, err);
    va_start(ap, types);
    for (int i = 1; types[i - 1] && code == SQLITE_OK; i++) {
        if (types[i - 1] == 'i') code = sqlite3_bind_int64(*stmt, i, va_arg(ap, int64_t));
        if (types[i - 1] == 'd') code = sqlite3_bind_double(*stmt, i, va_arg(ap, double));
        if (types[i - 1] == 's')
            code = sqlite3_bind_text(*stmt, i, va_arg(ap, const char *), -1, SQLITE_STATIC);
    }
    va_end(ap);
    return code == SQLITE_OK ? QL_OK : ql_store_failed(store, err);
}

ql_status ql_store_do(ql_store *store, ql_store_statement which, ql_err *err)
{
    sqlite3_stmt *stmt = store->statements[which];
    ql_status status = sqlite3_step(stmt) == SQLITE_DONE ? QL_OK : ql_store_failed(store, err);
    sqlite3_reset(stmt);
    return status;
}

void ql_store_start(ql_store *store, ql_store_statement which)
{
    store->query = store->statements[which];
}

ql_status ql_store_next(ql_store *store, bool *more, ql_err *err)
{
    *more = false;
    if (!store->query) return ql_err_set(err, QL_ERR_ARG, "%s: the query has ended", store->path);
    int code = sqlite3_step(store->query);
    *more = code == SQLITE_ROW;
    if (*more) return QL_OK;
    ql_status status = code == SQLITE_DONE ? QL_OK : ql_store_failed(store, err);
    ql_store_stop(store);
    return status;
}

const char *ql_store_column(ql_store *store, int column, bool *ok)
{
    if (sqlite3_column_type(store->query, column) == SQLITE_NULL) return NULL;
    const char *text = (const char *)sqlite3_column_text(store->query, column);
    if (!text) *ok = false;
    return text;
}

ql_status ql_store_begin(ql_store *store, ql_err *err)
{
    ql_store_stop(store);
    if (store->readonly) return ql_err_set(err, QL_ERR_ARG, "%s: was opened to be read only", store->path);
    return ql_store_exec(store, "BEGIN IMMEDIATE", err);
}

ql_status ql_store_end(ql_store *store, ql_status status, ql_err *err)
{
    if (status == QL_OK) status = ql_store_exec(store, "COMMIT", err);
    /* After some errors SQLite has rolled back by itself. */
    if (status != QL_OK && !sqlite3_get_autocommit(store->db))
        sqlite3_exec(store->db, "ROLLBACK", NULL, NULL, NULL);
    return status;
}

/* --- opening ---------------------------------------------------------------------------------------------
 */

static ql_status pragma(ql_store *store, const char *text, int64_t *value, ql_err *err)
{
    sqlite3_stmt *stmt = NULL;
    int code = sqlite3_prepare_v2(store->db, text, -1, &stmt, NULL);
    if (code == SQLITE_OK) code = sqlite3_step(stmt);
    if (code == SQLITE_ROW) *value = sqlite3_column_int64(stmt, 0);
    ql_status status = code == SQLITE_ROW ? QL_OK : ql_store_failed(store, err);
    sqlite3_finalize(stmt);
    return status;
}

/* Whose the file is. *empty: nobody's yet. */
static ql_status identify(ql_store *store, bool *empty, ql_err *err)
{
    int64_t application = 0, version = 0, objects = 0;
    *empty = false;
    QL_TRY(pragma(store, "PRAGMA application_id", &application, err));
    QL_TRY(pragma(store, "PRAGMA user_version", &version, err));
    QL_TRY(pragma(store, "SELECT count(*) FROM sqlite_schema", &objects, err));
    *empty = application == 0 && version == 0 && objects == 0;
    if (*empty) return QL_OK;
    if (application != APPLICATION) {
        ql_err_set(err, QL_ERR_FORMAT, "%s: is another program's database, not qlua's", store->path);
        return ql_err_hint(err, "it was left as it is: give another --output_path");
    }
    if (version > VERSION) {
        ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: was written by a newer qlua: schema %lld, this one knows %d",
                   store->path, (long long)version, VERSION);
        return ql_err_hint(err, "use that qlua, or give another --output_path");
    }
    return version == VERSION ? QL_OK : damaged(store, "its schema has no number", err);
}

static ql_status create(ql_store *store, ql_err *err)
{
    bool empty = false;
    char text[128];
    QL_TRY(ql_store_begin(store, err));
    ql_status status = identify(store, &empty, err); /* again: another process may have been faster */
    snprintf(text, sizeof text, "PRAGMA application_id = %d; PRAGMA user_version = %d", APPLICATION, VERSION);
    if (status == QL_OK && empty) {
        status = ql_store_exec(store, schema, err);
        if (status == QL_OK) status = ql_store_exec(store, text, err);
    }
    return ql_store_end(store, status, err);
}

/* Two processes that turn to the log at the same time would wait for each other: SQLite gives up at once, and
 * asks to try again. */
static ql_status turn_to_log(ql_store *store, ql_err *err)
{
    ql_status status;
    int tries = 0;
    do {
        status = ql_store_exec(store, "PRAGMA journal_mode = WAL", err);
    } while (status != QL_OK && (sqlite3_errcode(store->db) & 0xff) == SQLITE_BUSY && busy(store, tries++));
    return status;
}

static ql_status prepare(ql_store *store, ql_err *err)
{
    bool empty = false;
    sqlite3_extended_result_codes(store->db, 1);
    sqlite3_busy_handler(store->db, busy, store);
    /* Until the file is known to be sound, closing it must not write the log into it. */
    sqlite3_db_config(store->db, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, NULL);
    sqlite3_db_config(store->db, SQLITE_DBCONFIG_DEFENSIVE, 1, NULL);
    QL_TRY(ql_store_exec(store,
                         "PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF;"
                         "PRAGMA cell_size_check = ON; PRAGMA mmap_size = 0",
                         err));
    QL_TRY(identify(store, &empty, err));
    if (store->readonly) {
        if (!empty) return QL_OK;
        return ql_err_set(err, QL_ERR_FORMAT, "%s: is empty, there are no results in it", store->path);
    }
    if (sqlite3_db_readonly(store->db, "main") == 1) return failed_code(store, SQLITE_READONLY, NULL, 0, err);
    QL_TRY(turn_to_log(store, err));
    if (empty) QL_TRY(create(store, err));
    sqlite3_db_config(store->db, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 0, NULL);
    return QL_OK;
}

/* What can be said of the path before SQLite sees it. */
static ql_status check_path(ql_store *store, ql_err *err)
{
    struct stat info;
    const char *path = store->path, *slash = strrchr(path, '/');
    if (!*path) return ql_err_set(err, QL_ERR_ARG, "the store's path is empty");
    if (stat(path, &info) == 0) {
        if (S_ISREG(info.st_mode)) return QL_OK;
        ql_err_set(err, QL_ERR_IO, "%s: is %s, not a file", path,
                   S_ISDIR(info.st_mode) ? "a folder" : "a device or pipe");
        return ql_err_hint(err, "give the name of a file");
    }
    if (errno != ENOENT) return failed_system(store, "open", errno, err);
    if (store->readonly) return ql_err_set(err, QL_ERR_NOT_FOUND, "%s: there is no such file", path);
    if (!slash || slash == path) return QL_OK;
    char *folder = ql_strndup(path, (size_t)(slash - path));
    if (!folder) return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to open it", path);
    ql_status status = QL_OK;
    if (!ql_file_is_folder(folder)) {
        status = ql_err_set(err, QL_ERR_NOT_FOUND, "%s: its folder does not exist", path);
        ql_err_hint(err, "make the folder first");
    }
    ql_free(folder);
    return status;
}

static ql_status open_database(ql_store *store, ql_err *err)
{
    bool in_memory = strcmp(store->path, ":memory:") == 0;
    if (!in_memory) QL_TRY(check_path(store, err));
    /* SQLite takes names that begin with "file:" and ":" as something else than a file's. */
    char *name = in_memory || store->path[0] == '/' ? ql_strdup(store->path) : ql_file_join(".", store->path);
    if (!name) return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to open it", store->path);
    int flags = store->readonly ? SQLITE_OPEN_READONLY : SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE;
    int code = sqlite3_open_v2(name, &store->db, flags | SQLITE_OPEN_NOMUTEX, NULL);
    ql_free(name);
    if (code == SQLITE_OK) return prepare(store, err);
    if (store->db) return ql_store_failed(store, err);
    return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to open it", store->path);
}

ql_status ql_store_open(const char *path, bool readonly, double wait, ql_store **out, ql_err *err)
{
    *out = NULL;
    ql_store *store = ql_calloc(1, sizeof *store);
    if (store) store->path = ql_strdup(path);
    if (!store || !store->path) {
        ql_store_close(store);
        return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to open it", path);
    }
    store->readonly = readonly;
    store->wait = wait;
    ql_status status = open_database(store, err);
    if (status == QL_OK)
        *out = store;
    else
        ql_store_close(store);
    return status;
}

void ql_store_close(ql_store *store)
{
    if (!store) return;
    for (int i = 0; i < QL_STORE_STATEMENTS; i++) sqlite3_finalize(store->statements[i]);
    sqlite3_close(store->db);
    ql_free(store->path);
    ql_free(store);
}

const char *ql_store_path(const ql_store *store)
{
    return store->path;
}
