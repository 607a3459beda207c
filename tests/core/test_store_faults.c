/* The store when the disk or the memory fails: whatever was acknowledged is there, nothing else is there
 * half. */
#include "store_help.h"
#include "store_vfs.h"

#include <malloc.h>

enum { OPEN, RUN, SET, PUT, REPLACE, USE, DIGEST, END, STEPS };

typedef struct {
    ql_status status[STEPS];
    ql_err err[STEPS];
    int64_t run;
} outcome;

static const ql_store_row first_rows[] = {{"1", "one"}, {"2", "two"}};
static const ql_store_row second_rows[] = {{"2", "zwei"}, {"3", "drei"}};
static const char *const used[] = {"3", "1"};

/* One of everything that writes. After a failure it goes on: only what depends on the failed step may fail.
 */
static outcome play(const char *path)
{
    outcome out = {.run = 0};
    ql_store *store;
    char hex[QL_SHA256_HEX];
    for (int i = 0; i < STEPS; i++) out.status[i] = QL_ERR_ARG;
    out.status[OPEN] = ql_store_open(path, false, 0, &store, &out.err[OPEN]);
    if (out.status[OPEN]) {
        assert_null(store);
        return out;
    }
    out.status[RUN] = ql_store_begin_run(store, &a_run, &out.run, &out.err[RUN]);
    out.status[SET] = ql_store_set_add(store, KEY_A, "mmlu", "{}", &out.err[SET]);
    out.status[PUT] = ql_store_put(store, out.run, KEY_A, first_rows, 2, &out.err[PUT]);
    out.status[REPLACE] = ql_store_put(store, out.run, KEY_A, second_rows, 2, &out.err[REPLACE]);
    out.status[USE] = ql_store_use(store, out.run, KEY_A, used, 2, &out.err[USE]);
    out.status[DIGEST] =
        ql_store_sha256(store, QLUA_SOURCE_DIR "/tests/core/test_store_faults.c", hex, &out.err[DIGEST]);
    out.status[END] = ql_store_end_run(store, out.run, 2, "finished", "{}", &out.err[END]);
    ql_store_close(store);
    return out;
}

static void clear(const char *path)
{
    static const char *const ends[] = {"", "-wal", "-shm", "-journal"};
    char name[512];
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        snprintf(name, sizeof name, "%s%s", path, ends[i]);
        unlink(name);
    }
}

static bool is(const char *value, const char *expected)
{
    return value && strcmp(value, expected) == 0;
}

/* `exact`: what was not acknowledged is not there either. Otherwise it is there whole or not at all. */
static void verify(const char *path, const outcome *out, bool exact)
{
    static const char *const finished[] = {"finished"};
    if (access(path, F_OK) != 0) { /* nothing was made */
        for (int i = 0; i < STEPS; i++) assert_int_not_equal(out->status[i], QL_OK);
        return;
    }
    assert_sound(path);
    ql_store *store = open_store(path);
    ql_store_run run;
    ql_store_set set;
    ql_store_row row;
    ql_err err = {0};
    bool has_run = out->run && ql_store_find_run(store, out->run, &run, &err) == QL_OK;
    assert_int_equal(has_run, out->status[RUN] == QL_OK);
    bool ended = has_run && is(run.status, finished[0]);
    if (ended) assert_string_equal(run.document, "{}");
    assert_true(ended || out->status[END] != QL_OK);
    assert_int_equal(ql_store_find_sets(store, "mmlu", &err), QL_OK);
    assert_int_equal(ql_store_next_set(store, &set, &err), QL_OK);
    bool has_set = set.key != NULL;
    assert_true(has_set || out->status[SET] != QL_OK);

    bool one = is(value_of(store, KEY_A, "1"), "one");
    bool two = is(value_of(store, KEY_A, "2"), "two");
    bool zwei = is(value_of(store, KEY_A, "2"), "zwei");
    bool drei = is(value_of(store, KEY_A, "3"), "drei");
    assert_int_equal(zwei, drei);
    assert_int_equal(one, two || (zwei && one));
    assert_true(one || out->status[PUT] != QL_OK);
    assert_true(zwei || out->status[REPLACE] != QL_OK);

    assert_int_equal(ql_store_find_run_rows(store, out->run, KEY_A, &err), QL_OK);
    assert_int_equal(ql_store_next_row(store, &row, &err), QL_OK);
    bool uses = row.id != NULL;
    if (uses) {
        assert_string_equal(row.id, "3");
        assert_int_equal(ql_store_next_row(store, &row, &err), QL_OK);
        assert_string_equal(row.id, "1");
        assert_int_equal(ql_store_next_row(store, &row, &err), QL_OK);
        assert_null(row.id);
    }
    assert_true(uses || out->status[USE] != QL_OK);
    ql_store_close(store);
    if (!exact) return;
    assert_int_equal(ended, out->status[END] == QL_OK);
    assert_int_equal(has_set, out->status[SET] == QL_OK);
    assert_int_equal(one, out->status[PUT] == QL_OK);
    assert_int_equal(zwei, out->status[REPLACE] == QL_OK);
    assert_int_equal(uses, out->status[USE] == QL_OK);
}

static bool all_done(const outcome *out)
{
    for (int i = 0; i < STEPS; i++)
        if (out->status[i]) return false;
    return true;
}

/* Whether a step failed though all that it needs was done. */
static bool failed_alone(const outcome *out, int step)
{
    const ql_status *status = out->status;
    if (status[step] == QL_OK || (step != OPEN && status[OPEN])) return false;
    if (step == END) return status[RUN] == QL_OK;
    if (step == PUT || step == REPLACE) return !status[RUN] && !status[SET];
    return step != USE || (!status[PUT] && !status[REPLACE]);
}

/* Errors of the disk name the file; a full one says what to do. */
static void check_messages(const outcome *out, const char *path, fault_kind kind)
{
    for (int i = 0; i < STEPS; i++) {
        if (!failed_alone(out, i)) continue;
        assert_int_equal(out->status[i], QL_ERR_IO);
        assert_contains(out->err[i].message, path);
        if (kind == FAULT_FULL && strstr(out->err[i].message, "full"))
            assert_contains(out->err[i].hint, "free disk space");
    }
}

/* The n-th operation of the file system fails, for every n. Returns how many there are. */
static long fail_each(const char *path, fault_kind kind, bool exact)
{
    for (long n = 0;; n++) {
        clear(path);
        vfs_fail_after(n, kind);
        outcome out = play(path);
        long made = vfs_state.made;
        vfs_fail_after(-1, kind);
        assert_int_equal(vfs_state.open_files, 0);
        check_messages(&out, path, kind);
        verify(path, &out, exact);
        if (n >= made) {
            assert_true(all_done(&out));
            return n;
        }
    }
}

static void check_log(void **state)
{
    (void)state;
    const char *path = temp_path("log.sqlite");
    assert_in_range(fail_each(path, FAULT_IO, true), 100, 10000);
    fail_each(path, FAULT_FULL, true);
    fail_each(path, FAULT_SHORT, true);
}

/* Where there is no shared memory SQLite cannot keep a log, and a journal does. */
static void check_journal(void **state)
{
    (void)state;
    const char *path = temp_path("journal.sqlite");
    vfs_state.no_shared_memory = true;
    assert_in_range(fail_each(path, FAULT_IO, false), 100, 10000);
    fail_each(path, FAULT_FULL, false);
    fail_each(path, FAULT_SHORT, false);
    vfs_state.no_shared_memory = false;
}

/* From the n-th operation on nothing is written any more; then the files are those that had been synced. */
static void cut_each(const char *name)
{
    char live[300], left[300];
    snprintf(live, sizeof live, "%s/live-%s", temp_root, name);
    snprintf(left, sizeof left, "%s/left/live-%s", temp_root, name);
    vfs_state.durable_root = temp_path("left");
    for (long n = 0;; n++) {
        clear(live);
        clear(left);
        vfs_fail_after(n, FAULT_POWER);
        outcome out = play(live);
        long made = vfs_state.made;
        vfs_fail_after(-1, FAULT_POWER);
        vfs_state.durable_root = NULL;
        verify(left, &out, false);
        verify(live, &out, false); /* a killed process: all that was written is there */
        vfs_state.durable_root = temp_path("left");
        if (n >= made) break;
    }
    vfs_state.durable_root = NULL;
}

static void check_power(void **state)
{
    (void)state;
    assert_int_equal(mkdir(temp_path("left"), 0700), 0);
    cut_each("log");
    vfs_state.no_shared_memory = true;
    cut_each("journal");
    vfs_state.no_shared_memory = false;
}

/* --- memory: SQLite's goes through core's, so that each allocation of both fails once ---------------------
 */

static void *memory_take(int bytes)
{
    return ql_malloc((size_t)bytes);
}

static void *memory_change(void *block, int bytes)
{
    return ql_realloc(block, (size_t)bytes);
}

static int memory_size(void *block)
{
    return block ? (int)malloc_usable_size(block) : 0;
}

static int memory_round(int bytes)
{
    return (bytes + 7) & ~7;
}

static int memory_init(void *context)
{
    (void)context;
    return SQLITE_OK;
}

static void memory_end(void *context)
{
    (void)context;
}

static void check_memory(void **state)
{
    (void)state;
    const char *path = temp_path("memory.sqlite");
    for (int persistent = 0; persistent < 2; persistent++) {
        for (long n = 0;; n++) {
            clear(path);
            ql_mem_fail_after(n, persistent);
            outcome out = play(path);
            long asked = ql_mem_count();
            ql_mem_fail_after(-1, false);
            assert_int_equal(vfs_state.open_files, 0);
            for (int i = 0; i < STEPS; i++)
                if (failed_alone(&out, i)) assert_int_equal(out.status[i], QL_ERR_MEMORY);
            verify(path, &out, true);
            if (n < asked) continue;
            assert_true(all_done(&out));
            break;
        }
    }
}

/* --- reading: either everything is there, or there is an error -------------------------------------------
 */

enum { READ_ROWS = 120 };

static ql_status count_all(ql_store *store, int *count)
{
    ql_store_run run;
    ql_store_set set;
    ql_store_row row;
    char hex[QL_SHA256_HEX];
    *count = 0;
    QL_TRY(ql_store_find_runs(store, NULL));
    do {
        QL_TRY(ql_store_next_run(store, &run, NULL));
        *count += run.id && is(run.name, a_run.name) && is(run.status, "running");
    } while (run.id);
    QL_TRY(ql_store_find_run(store, 1, &run, NULL));
    *count += is(run.command, a_run.command);
    ql_status status = ql_store_find_run(store, 7, &run, NULL);
    if (status != QL_ERR_NOT_FOUND) return status;
    QL_TRY(ql_store_find_sets(store, "mmlu", NULL));
    do {
        QL_TRY(ql_store_next_set(store, &set, NULL));
        *count += set.key && is(set.key, KEY_A) && is(set.inputs, "{}");
    } while (set.key);
    QL_TRY(ql_store_find_rows(store, KEY_A, NULL));
    do {
        QL_TRY(ql_store_next_row(store, &row, NULL));
        *count += row.id && strlen(row.value) == 300;
    } while (row.id);
    QL_TRY(ql_store_find_run_rows(store, 1, KEY_A, NULL));
    do {
        QL_TRY(ql_store_next_row(store, &row, NULL));
        *count += row.id && strlen(row.value) == 300;
    } while (row.id);
    return ql_store_sha256(store, QLUA_SOURCE_DIR "/LICENSE", hex, NULL);
}

static void read_all(const char *path, ql_status expected)
{
    ql_store *store;
    int count = -1;
    ql_status status = ql_store_open(path, true, 0, &store, NULL);
    if (status == QL_OK) status = count_all(store, &count);
    ql_store_close(store);
    if (status == QL_OK)
        assert_int_equal(count, 1 + 1 + 1 + 2 * READ_ROWS);
    else
        assert_int_equal(status, expected);
}

static void check_reading(void **state)
{
    (void)state;
    const char *path = temp_path("reading.sqlite");
    ql_store *store = open_store(path);
    const char *ids[READ_ROWS];
    char texts[READ_ROWS][16], value[301];
    int64_t run;
    long made, n = 0;
    assert_int_equal(ql_store_begin_run(store, &a_run, &run, NULL), QL_OK);
    assert_int_equal(ql_store_set_add(store, KEY_A, "mmlu", "{}", NULL), QL_OK);
    for (int i = 0; i < READ_ROWS; i++) {
        snprintf(texts[i], sizeof texts[i], "%d", i);
        snprintf(value, sizeof value, "%0300d", i);
        ids[i] = texts[i];
        assert_int_equal(ql_store_put(store, run, KEY_A, &(ql_store_row){ids[i], value}, 1, NULL), QL_OK);
    }
    assert_int_equal(ql_store_use(store, run, KEY_A, ids, READ_ROWS, NULL), QL_OK);
    ql_store_close(store);
    do {
        vfs_fail_after(n, FAULT_IO);
        read_all(path, QL_ERR_IO);
        made = vfs_state.made;
        vfs_fail_after(-1, FAULT_IO);
        assert_int_equal(vfs_state.open_files, 0);
    } while (n++ < made);
    for (int persistent = 0; persistent < 2; persistent++) {
        n = 0;
        do {
            ql_mem_fail_after(n, persistent);
            read_all(path, QL_ERR_MEMORY);
            made = ql_mem_count();
            ql_mem_fail_after(-1, false);
            assert_int_equal(vfs_state.open_files, 0);
        } while (n++ < made);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(check_log), cmocka_unit_test(check_journal),
                                       cmocka_unit_test(check_power), cmocka_unit_test(check_memory),
                                       cmocka_unit_test(check_reading)};
    sqlite3_mem_methods memory = {memory_take,  ql_free,     memory_change, memory_size,
                                  memory_round, memory_init, memory_end,    NULL};
    if (sqlite3_config(SQLITE_CONFIG_MALLOC, &memory) != SQLITE_OK) return 1;
    vfs_register();
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
