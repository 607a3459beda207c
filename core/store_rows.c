/* What is written into a results store and read from it: runs, sets and rows. */
#include "store_impl.h"

#include "clock.h"
#include "process.h"
#include "text.h"

#include <string.h>
#include <unistd.h>

static ql_status check_key(const ql_store *store, const char *key, ql_err *err)
{
    if (strlen(key) == QL_SHA256_HEX - 1 && strspn(key, "0123456789abcdef") == QL_SHA256_HEX - 1)
        return QL_OK;
    return ql_err_set(err, QL_ERR_ARG, "%s: '%s' is no key: 64 lower-case hex digits are", store->path, key);
}

/* --- runs ------------------------------------------------------------------------------------------------
 */

ql_status ql_store_begin_run(ql_store *store, const ql_store_run *run, int64_t *id, ql_err *err)
{
    char process[QL_PROCESS_IDENTITY];
    *id = 0;
    ql_process_identity(getpid(), process);
    QL_TRY(ql_store_begin(store, err));
    ql_status status = ql_store_bind(store, QL_STORE_RUN_ADD, err, "sdisss", run->name, run->started,
                                     (int64_t)getpid(), process, run->command, run->script_sha256);
    if (status == QL_OK) status = ql_store_do(store, QL_STORE_RUN_ADD, err);
    int64_t added = sqlite3_last_insert_rowid(store->db);
    status = ql_store_end(store, status, err);
    if (status == QL_OK) *id = added;
    return status;
}

static ql_status no_run(ql_store *store, int64_t id, ql_err *err)
{
    ql_text list = {0};
    ql_store_run run;
    int shown = 0;
    QL_TRY(ql_store_find_runs(store, err));
    for (;;) {
        ql_status status = ql_store_next_run(store, &run, err);
        if (status != QL_OK) {
            ql_text_free(&list);
            return status;
        }
        if (!run.id || shown == 20) break;
        ql_text_printf(&list, "%s%lld", shown++ ? ", " : "", (long long)run.id);
    }
    ql_err_set(err, QL_ERR_NOT_FOUND, "%s: has no run %lld", store->path, (long long)id);
    if (!shown)
        ql_err_hint(err, "there are no runs in it");
    else
        ql_err_hint(err, "it has %s%s", list.failed ? "others" : list.data, run.id ? ", ..." : "");
    ql_text_free(&list);
    ql_store_stop(store);
    return QL_ERR_NOT_FOUND;
}

ql_status ql_store_end_run(ql_store *store, int64_t run, double finished, const char *status_name,
                           const char *document, ql_err *err)
{
    static const char *const known[] = {"finished", "interrupted", "failed"};
    size_t i = 0;
    while (i < 3 && strcmp(status_name, known[i]) != 0) i++;
    if (i == 3)
        return ql_err_set(err, QL_ERR_ARG, "a run ends as 'finished', 'interrupted' or 'failed', not as '%s'",
                          status_name);
    QL_TRY(ql_store_begin(store, err));
    ql_status status =
        ql_store_bind(store, QL_STORE_RUN_END, err, "dssi", finished, status_name, document, run);
    if (status == QL_OK) status = ql_store_do(store, QL_STORE_RUN_END, err);
    bool found = sqlite3_changes(store->db) == 1;
    status = ql_store_end(store, status, err);
    return status == QL_OK && !found ? no_run(store, run, err) : status;
}

static ql_status no_memory(ql_store *store, ql_err *err)
{
    ql_store_stop(store);
    return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to read it", store->path);
}

ql_status ql_store_next_run(ql_store *store, ql_store_run *run, ql_err *err)
{
    bool more, ok = true;
    char process[QL_PROCESS_IDENTITY];
    *run = (ql_store_run){0};
    QL_TRY(ql_store_next(store, &more, err));
    if (!more) return QL_OK;
    sqlite3_stmt *query = store->query;
    run->id = sqlite3_column_int64(query, 0);
    run->name = ql_store_column(store, 1, &ok);
    run->started = sqlite3_column_double(query, 2);
    run->finished = sqlite3_column_double(query, 3);
    run->status = ql_store_column(store, 4, &ok);
    run->pid = sqlite3_column_int64(query, 5);
    const char *recorded = ql_store_column(store, 6, &ok);
    if (sqlite3_column_count(query) > 7) {
        run->command = ql_store_column(store, 7, &ok);
        run->script_sha256 = ql_store_column(store, 8, &ok);
        run->document = ql_store_column(store, 9, &ok);
    }
    if (!ok) {
        *run = (ql_store_run){0};
        return no_memory(store, err);
    }
    run->alive = ql_process_identity((long)run->pid, process) && strcmp(process, recorded) == 0;
    if (!run->alive && strcmp(run->status, "running") == 0) run->status = "killed";
    return QL_OK;
}

ql_status ql_store_find_runs(ql_store *store, ql_err *err)
{
    QL_TRY(ql_store_bind(store, QL_STORE_RUNS, err, ""));
    ql_store_start(store, QL_STORE_RUNS);
    return QL_OK;
}

ql_status ql_store_find_set_runs(ql_store *store, const char *key, ql_err *err)
{
    QL_TRY(check_key(store, key, err));
    QL_TRY(ql_store_bind(store, QL_STORE_SET_RUNS, err, "s", key));
    ql_store_start(store, QL_STORE_SET_RUNS);
    return QL_OK;
}

ql_status ql_store_find_run(ql_store *store, int64_t id, ql_store_run *run, ql_err *err)
{
    *run = (ql_store_run){0};
    QL_TRY(ql_store_bind(store, QL_STORE_RUN, err, "i", id));
    ql_store_start(store, QL_STORE_RUN);
    QL_TRY(ql_store_next_run(store, run, err));
    return run->id ? QL_OK : no_run(store, id, err);
}

/* --- sets and rows ---------------------------------------------------------------------------------------
 */

ql_status ql_store_set_add(ql_store *store, const char *key, const char *name, const char *inputs,
                           ql_err *err)
{
    QL_TRY(check_key(store, key, err));
    QL_TRY(ql_store_begin(store, err));
    ql_status status =
        ql_store_bind(store, QL_STORE_SET_ADD, err, "sssd", key, name, inputs, ql_clock_unix());
    if (status == QL_OK) status = ql_store_do(store, QL_STORE_SET_ADD, err);
    return ql_store_end(store, status, err);
}

/* A row that names what is not there is the caller's mistake. */
static ql_status do_row(ql_store *store, ql_store_statement which, int64_t run, const char *key,
                        const char *id, ql_err *err)
{
    ql_status status = ql_store_do(store, which, err);
    if (status == QL_OK || sqlite3_extended_errcode(store->db) != SQLITE_CONSTRAINT_FOREIGNKEY) return status;
    return ql_err_set(err, QL_ERR_ARG, "%s: no run %lld, no set %.8s... or no row '%s' there: add them first",
                      store->path, (long long)run, key, id);
}

ql_status ql_store_put(ql_store *store, int64_t run, const char *key, const ql_store_row *rows, size_t n,
                       ql_err *err)
{
    double now = ql_clock_unix();
    QL_TRY(check_key(store, key, err));
    QL_TRY(ql_store_begin(store, err));
    ql_status status = QL_OK;
    for (size_t i = 0; i < n && status == QL_OK; i++) {
        status =
            ql_store_bind(store, QL_STORE_ROW_PUT, err, "sssid", key, rows[i].id, rows[i].value, run, now);
        if (status == QL_OK) status = do_row(store, QL_STORE_ROW_PUT, run, key, rows[i].id, err);
    }
    return ql_store_end(store, status, err);
}

ql_status ql_store_use(ql_store *store, int64_t run, const char *key, const char *const *ids, size_t n,
                       ql_err *err)
{
    QL_TRY(check_key(store, key, err));
    QL_TRY(ql_store_begin(store, err));
    ql_status status = ql_store_bind(store, QL_STORE_USE_CLEAR, err, "is", run, key);
    if (status == QL_OK) status = ql_store_do(store, QL_STORE_USE_CLEAR, err);
    for (size_t i = 0; i < n && status == QL_OK; i++) {
        status = ql_store_bind(store, QL_STORE_USE_ADD, err, "isis", run, key, (int64_t)i + 1, ids[i]);
        if (status == QL_OK) status = do_row(store, QL_STORE_USE_ADD, run, key, ids[i], err);
    }
    return ql_store_end(store, status, err);
}

ql_status ql_store_find_sets(ql_store *store, const char *name, ql_err *err)
{
    QL_TRY(ql_store_bind(store, QL_STORE_SETS, err, "s", name));
    ql_store_start(store, QL_STORE_SETS);
    return QL_OK;
}

ql_status ql_store_next_set(ql_store *store, ql_store_set *set, ql_err *err)
{
    bool more, ok = true;
    *set = (ql_store_set){0};
    QL_TRY(ql_store_next(store, &more, err));
    if (!more) return QL_OK;
    ql_store_set found = {.key = ql_store_column(store, 0, &ok),
                          .name = ql_store_column(store, 1, &ok),
                          .inputs = ql_store_column(store, 2, &ok),
                          .created = sqlite3_column_double(store->query, 3)};
    if (!ok) return no_memory(store, err);
    *set = found;
    return QL_OK;
}

ql_status ql_store_find_rows(ql_store *store, const char *key, ql_err *err)
{
    QL_TRY(check_key(store, key, err));
    QL_TRY(ql_store_bind(store, QL_STORE_ROWS, err, "s", key));
    ql_store_start(store, QL_STORE_ROWS);
    return QL_OK;
}

ql_status ql_store_find_run_rows(ql_store *store, int64_t run, const char *key, ql_err *err)
{
    QL_TRY(check_key(store, key, err));
    QL_TRY(ql_store_bind(store, QL_STORE_USED, err, "is", run, key));
    ql_store_start(store, QL_STORE_USED);
    return QL_OK;
}

ql_status ql_store_next_row(ql_store *store, ql_store_row *row, ql_err *err)
{
    bool more, ok = true;
    *row = (ql_store_row){0};
    QL_TRY(ql_store_next(store, &more, err));
    if (!more) return QL_OK;
    ql_store_row found = {.id = ql_store_column(store, 0, &ok), .value = ql_store_column(store, 1, &ok)};
    if (!ok) return no_memory(store, err);
    *row = found;
    return QL_OK;
}
