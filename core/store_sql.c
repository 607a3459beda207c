/* The store's statements, transactions and errors. */
#include "store_impl.h"

#include "clock.h"
#include "interrupt.h"

#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <string.h>
#include <unistd.h>

static const char *const sql[QL_STORE_STATEMENTS] = {
    [QL_STORE_RUN_ADD] = "INSERT INTO runs (name, started, status, pid, process, command, script_sha256)"
                         " VALUES (?, ?, 'running', ?, ?, ?, ?)",
    [QL_STORE_RUN_END] = "UPDATE runs SET finished = ?, status = ?, document = ? WHERE id = ?",
    [QL_STORE_RUNS] = "SELECT id, name, started, finished, status, pid, process FROM runs ORDER BY id DESC",
    [QL_STORE_SET_RUNS] = "SELECT id, name, started, finished, status, pid, process FROM runs"
                          " WHERE EXISTS (SELECT 1 FROM run_rows WHERE run = runs.id AND key = ?)"
                          " ORDER BY id DESC",
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

/* --- errors ----------------------------------------------------------------------------------------------
 */

bool ql_store_is_fixed(const char *path)
{
    char folder[PATH_MAX] = ".";
    const char *slash = strrchr(path, '/');
    size_t n = slash == path ? 1 : slash ? (size_t)(slash - path) : 0;
    if (n >= sizeof folder) return false;
    if (n) memcpy(folder, path, n);
    if (n) folder[n] = '\0';
    return access(folder, W_OK) != 0;
}

ql_status ql_store_read_only(const ql_store *store, ql_err *err)
{
    ql_err_set(err, QL_ERR_IO, "%s: the file or its folder is read-only", store->path);
    if (store->readonly)
        ql_err_hint(err, "copy it and the -wal file beside it to another folder");
    else
        ql_err_hint(err, "change its permissions, or give another --output_path");
    return QL_ERR_IO;
}

ql_status ql_store_failed_system(const ql_store *store, const char *verb, int error, ql_err *err)
{
    if (error == EROFS || error == EACCES || error == EPERM) return ql_store_read_only(store, err);
    if (error == ENOSPC || error == EDQUOT) {
        ql_err_set(err, QL_ERR_IO, "%s: the disk is full", store->path);
        ql_err_hint(err, "free disk space and run again: what was finished before is kept");
        return QL_ERR_IO;
    }
    ql_err_set(err, QL_ERR_IO, "%s: cannot %s%s%s", store->path, verb, error ? ": " : "",
               error ? strerror(error) : "");
    ql_err_hint(err, "check the disk, or give another --output_path");
    return QL_ERR_IO;
}

/* What is in the log stays there: written into a damaged file it could spoil more. */
ql_status ql_store_damaged(ql_store *store, const char *why, ql_err *err)
{
    sqlite3_db_config(store->db, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, NULL);
    ql_err_set(err, QL_ERR_FORMAT, "%s: is damaged: %s", store->path, why);
    ql_err_hint(err, "keep a copy of it and of the -wal file beside it, try `sqlite3 FILE .recover`, or give "
                     "another --output_path");
    return QL_ERR_FORMAT;
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
        ql_err_hint(err, "wait until that process is done, or give another --output_path");
        return QL_ERR_IO;
    case SQLITE_FULL:
        return ql_store_failed_system(store, "write", ENOSPC, err);
    case SQLITE_READONLY:
    case SQLITE_PERM:
        return ql_store_read_only(store, err);
    case SQLITE_CANTOPEN:
        if (ql_store_is_fixed(store->path)) return ql_store_read_only(store, err);
        return ql_store_failed_system(store, "open it or the files beside it", error, err);
    case SQLITE_NOTADB:
        ql_err_set(err, QL_ERR_FORMAT, "%s: is not a results store, nor any SQLite database", store->path);
        ql_err_hint(err, "it was left as it is: move it away, or give another --output_path");
        return QL_ERR_FORMAT;
    case SQLITE_CORRUPT:
    case SQLITE_ERROR:
    case SQLITE_SCHEMA:
        return ql_store_damaged(store, why, err);
    case SQLITE_IOERR:
        if (code == SQLITE_IOERR_NOMEM) return failed_code(store, SQLITE_NOMEM, why, error, err);
        if (code == SQLITE_IOERR_CORRUPTFS) return ql_store_damaged(store, why, err);
        return ql_store_failed_system(store, "read or write", error, err);
    default:
        return ql_err_set(err, QL_ERR_IO, "%s: %s", store->path, why);
    }
}

ql_status ql_store_failed(ql_store *store, ql_err *err)
{
    int error = errno, kept = sqlite3_system_errno(store->db); /* SQLite does not keep all */
    return failed_code(store, sqlite3_extended_errcode(store->db), sqlite3_errmsg(store->db),
                       kept ? kept : error, err);
}

/* --- statements ------------------------------------------------------------------------------------------
 */

/* SQLite asks while another process holds the file: true to try again. After Ctrl-C a writer has half a
 * second left for the rows that are finished. */
int ql_store_busy(void *context, int count)
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
    errno = 0;
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
    errno = 0;
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
    errno = 0;
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
