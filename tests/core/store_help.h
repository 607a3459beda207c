/* A store with a few rows in it, and what must hold of them. */
#ifndef STORE_HELP_H
#define STORE_HELP_H

#include "file_help.h"

#include "mem.h"
#include "store.h"

#include <sqlite3.h>

#define KEY_A "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
#define KEY_B "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"

static const ql_store_run a_run = {.name = "mmlu.lua", .started = 1, .command = "[]"};

__attribute__((unused)) static ql_store *open_store(const char *path)
{
    ql_store *store;
    ql_err err = {0};
    if (ql_store_open(path, false, 10, &store, &err)) fail_msg("%s", err.message);
    return store;
}

/* Value of a row, in a buffer that the next call overwrites; NULL when it is not there. */
__attribute__((unused)) static const char *value_of(ql_store *store, const char *key, const char *id)
{
    static char value[4096];
    const char *found = NULL;
    ql_store_row row;
    ql_err err = {0};
    assert_int_equal(ql_store_find_rows(store, key, &err), QL_OK);
    for (;;) {
        if (ql_store_next_row(store, &row, &err)) fail_msg("%s", err.message);
        if (!row.id) return found;
        if (strcmp(row.id, id) == 0) {
            snprintf(value, sizeof value, "%s", row.value);
            found = value;
        }
    }
}

__attribute__((unused)) static void assert_sound(const char *path)
{
    sqlite3 *db;
    sqlite3_stmt *stmt;
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    assert_int_equal(sqlite3_prepare_v2(db, "PRAGMA integrity_check", -1, &stmt, NULL), SQLITE_OK);
    assert_int_equal(sqlite3_step(stmt), SQLITE_ROW);
    assert_string_equal((const char *)sqlite3_column_text(stmt, 0), "ok");
    sqlite3_finalize(stmt);
    assert_int_equal(sqlite3_close(db), SQLITE_OK);
}

#endif
