/* The store's inside, shared by core/store*.c and by nobody else. */
#ifndef QL_STORE_IMPL_H
#define QL_STORE_IMPL_H

#include "store.h"

#include <sqlite3.h>

typedef enum {
    QL_STORE_RUN_ADD,
    QL_STORE_RUN_END,
    QL_STORE_RUNS,
    QL_STORE_SET_RUNS,
    QL_STORE_RUN,
    QL_STORE_SET_ADD,
    QL_STORE_SETS,
    QL_STORE_ROW_PUT,
    QL_STORE_ROWS,
    QL_STORE_USE_CLEAR,
    QL_STORE_USE_ADD,
    QL_STORE_USED,
    QL_STORE_FILE_FIND,
    QL_STORE_FILE_PUT,
    QL_STORE_STATEMENTS
} ql_store_statement;

struct ql_store {
    char *path;                                    /* as given, owned */
    sqlite3 *db;                                   /* owned */
    sqlite3_stmt *statements[QL_STORE_STATEMENTS]; /* owned; NULL until used */
    sqlite3_stmt *query;                           /* the one under way, of `statements`; or NULL */
    bool readonly;
    double wait;  /* seconds */
    double since; /* when the waiting under way began */
};

/* What SQLite says went wrong last, as an error that names the file and what to do. */
ql_status ql_store_failed(ql_store *store, ql_err *err);

/* The same for what went wrong outside of SQLite; `verb` is what could not be done. */
ql_status ql_store_failed_system(const ql_store *store, const char *verb, int error, ql_err *err);
ql_status ql_store_read_only(const ql_store *store, ql_err *err);
ql_status ql_store_damaged(ql_store *store, const char *why, ql_err *err);

/* Whether nothing can be made in the file's folder. */
bool ql_store_is_fixed(const char *path);

/* SQLite's busy handler; `count` is 0 when the waiting begins. */
int ql_store_busy(void *store, int count);

/* Run SQL without results. */
ql_status ql_store_exec(ql_store *store, const char *sql, ql_err *err);

/* Ends the query under way, prepares the statement and binds its parameters; `types` has a letter for each:
 * i (int64_t), d (double), s (const char *, borrowed until the statement is reset; NULL is SQL's). */
ql_status ql_store_bind(ql_store *store, ql_store_statement which, ql_err *err, const char *types, ...);

/* Make the bound statement the query under way. */
void ql_store_start(ql_store *store, ql_store_statement which);
/* Its next row; *more is false after the last, and the query has ended then. */
ql_status ql_store_next(ql_store *store, bool *more /* [OUT] */, ql_err *err);
void ql_store_stop(ql_store *store);

/* Run a bound statement that has no results. */
ql_status ql_store_do(ql_store *store, ql_store_statement which, ql_err *err);

/* A transaction: all of it is there after ql_store_end has returned QL_OK, otherwise nothing. ql_store_end
 * takes the status of what was done in between, and returns it when that failed. */
ql_status ql_store_begin(ql_store *store, ql_err *err);
ql_status ql_store_end(ql_store *store, ql_status status, ql_err *err);

/* Text of a column of the query's row; NULL for SQL's NULL. Clears *ok when memory ran out. */
const char *ql_store_column(ql_store *store, int column, bool *ok);

#endif
