#include "store_impl.h"

#include "file.h"
#include "mem.h"
#include "text.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

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
        ql_err_hint(err, "it was left as it is: give another --output_path");
        return QL_ERR_FORMAT;
    }
    if (version > VERSION) {
        ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: was written by a newer qlua: schema %lld, this one knows %d",
                   store->path, (long long)version, VERSION);
        ql_err_hint(err, "use that qlua, or give another --output_path");
        return QL_ERR_UNSUPPORTED;
    }
    return version == VERSION ? QL_OK : ql_store_damaged(store, "its schema has no number", err);
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
    } while (status != QL_OK && (sqlite3_errcode(store->db) & 0xff) == SQLITE_BUSY &&
             ql_store_busy(store, tries++));
    return status;
}

static ql_status prepare(ql_store *store, ql_err *err)
{
    bool empty = false;
    sqlite3_extended_result_codes(store->db, 1);
    sqlite3_busy_handler(store->db, ql_store_busy, store);
    /* Until the file is known to be sound, closing it must not write the log into it. */
    sqlite3_db_config(store->db, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1, NULL);
    sqlite3_db_config(store->db, SQLITE_DBCONFIG_DEFENSIVE, 1, NULL);
    /* EXTRA is FULL where there is a log; a rollback journal's end is synced too. */
    QL_TRY(ql_store_exec(store,
                         "PRAGMA synchronous = EXTRA; PRAGMA foreign_keys = ON; PRAGMA trusted_schema = OFF;"
                         "PRAGMA cell_size_check = ON; PRAGMA mmap_size = 0",
                         err));
    QL_TRY(ql_store_exec(store, "BEGIN", err)); /* another process may be making the schema just now */
    QL_TRY(ql_store_end(store, identify(store, &empty, err), err));
    if (store->readonly && empty)
        return ql_err_set(err, QL_ERR_FORMAT, "%s: is empty, there are no results in it", store->path);
    if (store->readonly) QL_TRY(ql_store_exec(store, "PRAGMA query_only = ON", err));
    if (!store->readonly) {
        if (sqlite3_db_readonly(store->db, "main") == 1) return ql_store_read_only(store, err);
        QL_TRY(turn_to_log(store, err));
        if (empty) QL_TRY(create(store, err));
    }
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
        ql_err_hint(err, "give the name of a file");
        return QL_ERR_IO;
    }
    if (errno != ENOENT && errno != ENOTDIR) return ql_store_failed_system(store, "open", errno, err);
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

static ql_status connect(ql_store *store, const char *name, int flags, ql_err *err)
{
    sqlite3_close(store->db);
    int code = sqlite3_open_v2(name, &store->db, flags | SQLITE_OPEN_NOMUTEX, NULL);
    if (code == SQLITE_OK) return QL_OK;
    if (store->db) return ql_store_failed(store, err);
    return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to open it", store->path);
}

/* Open the file again as one that nobody changes: SQLite then needs no files beside it. */
static ql_status connect_unchanging(ql_store *store, ql_err *err)
{
    ql_text name = {0};
    ql_text_puts(&name, "file:");
    for (const char *file = sqlite3_db_filename(store->db, "main"); *file; file++)
        ql_text_printf(&name, "%%%02x", (unsigned char)*file);
    ql_text_puts(&name, "?immutable=1");
    ql_status status = QL_OK;
    if (name.failed) status = ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to open it", store->path);
    if (status == QL_OK) status = connect(store, name.data, SQLITE_OPEN_READONLY | SQLITE_OPEN_URI, err);
    ql_text_free(&name);
    return status;
}

static int64_t file_size(const char *path)
{
    struct stat info;
    return stat(path, &info) == 0 ? (int64_t)info.st_size : -1;
}

/* SQLite has opened the file and not read it yet. It would delete the log of a file that has been emptied,
 * and it could not read a store in a folder where it cannot make the files beside it. */
static ql_status look_beside(ql_store *store, ql_err *err)
{
    const char *path = sqlite3_db_filename(store->db, "main"), *log = sqlite3_filename_wal(path);
    bool has_log = file_size(log) > 0; /* first: a new store's file is older than its log */
    if (has_log && file_size(path) == 0) {
        ql_err_set(err, QL_ERR_FORMAT, "%s: is empty, but its log %s is not", store->path, log);
        ql_err_hint(err, "something has emptied the file: bring it back, or move the log away");
        return QL_ERR_FORMAT;
    }
    bool whole = !has_log && file_size(sqlite3_filename_journal(path)) <= 0;
    return store->readonly && whole && ql_store_is_fixed(path) ? connect_unchanging(store, err) : QL_OK;
}

static ql_status open_database(ql_store *store, ql_err *err)
{
    bool in_memory = strcmp(store->path, ":memory:") == 0;
    if (!in_memory) QL_TRY(check_path(store, err));
    /* SQLite takes names that begin with "file:" and ":" as something else than a file's. */
    char *name = in_memory || store->path[0] == '/' ? ql_strdup(store->path) : ql_file_join(".", store->path);
    if (!name) return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to open it", store->path);
    /* To read, too: who may not write to the file cannot clear away the files of the log when closing. */
    ql_status status =
        connect(store, name, SQLITE_OPEN_READWRITE | (store->readonly ? 0 : SQLITE_OPEN_CREATE), err);
    ql_free(name);
    if (status == QL_OK && !in_memory) status = look_beside(store, err);
    return status == QL_OK ? prepare(store, err) : status;
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
