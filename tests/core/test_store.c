/* The store's contract on a sound disk: queries, errors of other people's files, locks, digests. Failing
 * disks are in test_store_faults.c, killed processes in test_store_kill.c. */
#include "store_help.h"

#include "file.h"
#include "interrupt.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

static void pause_for(double seconds)
{
    nanosleep(
        &(struct timespec){.tv_sec = (time_t)seconds, .tv_nsec = (long)((seconds - (time_t)seconds) * 1e9)},
        NULL);
}

/* A run and `n` rows of about `bytes` bytes. */
static int64_t fill(ql_store *store, int n, int bytes)
{
    int64_t run;
    ql_err err = {0};
    char id[32], value[2048];
    if (ql_store_begin_run(store, &a_run, &run, &err)) fail_msg("%s", err.message);
    assert_int_equal(ql_store_set_add(store, KEY_A, "mmlu", "{}", &err), QL_OK);
    for (int i = 0; i < n; i++) {
        ql_store_row row = {id, value};
        snprintf(id, sizeof id, "%d", i);
        snprintf(value, sizeof value, "%0*d", bytes, i);
        if (ql_store_put(store, run, KEY_A, &row, 1, &err)) fail_msg("%s", err.message);
    }
    return run;
}

static void refused(const char *path, bool readonly, ql_status status, const char *part)
{
    ql_store *store;
    ql_err err = {0};
    assert_int_equal(ql_store_open(path, readonly, 0.1, &store, &err), status);
    assert_null(store);
    assert_contains(err.message, part);
    if (*path) assert_contains(err.message, path);
}

static void sql(const char *path, const char *text)
{
    sqlite3 *db;
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, text, NULL, NULL, NULL), SQLITE_OK);
    assert_int_equal(sqlite3_close(db), SQLITE_OK);
}

static void check_queries(void **state)
{
    (void)state;
    ql_store *store = open_store(":memory:");
    ql_store_run run;
    ql_store_set set;
    ql_store_row row;
    ql_err err = {0};
    assert_string_equal(ql_store_path(store), ":memory:");
    assert_int_equal(ql_store_find_run(store, 1, &run, &err), QL_ERR_NOT_FOUND);
    assert_contains(err.hint, "no runs");
    assert_int_equal(ql_store_next_row(store, &row, &err), QL_ERR_ARG);
    for (int i = 0; i < 24; i++) fill(store, 2, 3);
    assert_int_equal(ql_store_find_run(store, 25, &run, &err), QL_ERR_NOT_FOUND);
    assert_contains(err.hint, "it has 24, 23, 22");
    assert_contains(err.hint, " 5, ...");
    assert_int_equal(ql_store_end_run(store, 25, 1, "failed", NULL, &err), QL_ERR_NOT_FOUND);
    assert_int_equal(ql_store_end_run(store, 24, 1, "done", NULL, &err), QL_ERR_ARG);

    /* A query may be left in the middle: what follows is not disturbed. */
    assert_int_equal(ql_store_find_rows(store, KEY_A, &err), QL_OK);
    assert_int_equal(ql_store_next_row(store, &row, &err), QL_OK);
    assert_string_equal(row.value, "000");
    assert_int_equal(ql_store_put(store, 1, KEY_A, &(ql_store_row){"0", "new"}, 1, &err), QL_OK);
    assert_int_equal(ql_store_next_row(store, &row, &err), QL_ERR_ARG);
    assert_string_equal(value_of(store, KEY_A, "0"), "new");
    assert_int_equal(ql_store_find_sets(store, "mmlu", &err), QL_OK);
    assert_int_equal(ql_store_next_set(store, &set, &err), QL_OK);
    assert_string_equal(set.key, KEY_A);
    assert_string_equal(set.inputs, "{}");
    ql_store_close(store);
    ql_store_close(NULL);
}

static void check_misuse(void **state)
{
    static const char *const no_keys[] = {"", "abc", KEY_A "a", "A" KEY_A, "/" KEY_A};
    (void)state;
    ql_store *store = open_store(":memory:");
    ql_err err = {0};
    const char *id = "7";
    int64_t run = fill(store, 1, 3);
    for (size_t i = 0; i < sizeof no_keys / sizeof *no_keys; i++) {
        assert_int_equal(ql_store_set_add(store, no_keys[i], "n", "{}", &err), QL_ERR_ARG);
        assert_int_equal(ql_store_put(store, run, no_keys[i], NULL, 0, &err), QL_ERR_ARG);
        assert_int_equal(ql_store_use(store, run, no_keys[i], NULL, 0, &err), QL_ERR_ARG);
        assert_int_equal(ql_store_find_rows(store, no_keys[i], &err), QL_ERR_ARG);
        assert_int_equal(ql_store_find_run_rows(store, run, no_keys[i], &err), QL_ERR_ARG);
        assert_contains(err.message, "is no key");
    }
    ql_store_row rows[] = {{"1", "1"}, {"2", "2"}};
    assert_int_equal(ql_store_put(store, run, KEY_B, rows, 2, &err), QL_ERR_ARG);
    assert_int_equal(ql_store_put(store, run + 1, KEY_A, rows, 2, &err), QL_ERR_ARG);
    assert_int_equal(ql_store_use(store, run, KEY_A, &id, 1, &err), QL_ERR_ARG);
    assert_contains(err.message, "no row '7'");
    assert_null(value_of(store, KEY_A, "1"));
    ql_store_close(store);
    refused("", false, QL_ERR_ARG, "empty");
}

static void check_readonly(void **state)
{
    (void)state;
    const char *path = temp_path("readonly.sqlite");
    ql_store *store = open_store(path), *reader;
    ql_err err = {0};
    char hex[QL_SHA256_HEX];
    int64_t run = fill(store, 2, 3), id;
    /* beside one that writes, and after it */
    for (int i = 0; i < 2; i++) {
        assert_int_equal(ql_store_open(path, true, 1, &reader, &err), QL_OK);
        assert_string_equal(value_of(reader, KEY_A, "1"), "001");
        assert_int_equal(ql_store_begin_run(reader, &a_run, &id, &err), QL_ERR_ARG);
        assert_int_equal(ql_store_put(reader, run, KEY_A, NULL, 0, &err), QL_ERR_ARG);
        assert_contains(err.message, "read only");
        assert_int_equal(ql_store_sha256(reader, QLUA_SOURCE_DIR "/LICENSE", hex, &err), QL_OK);
        ql_store_close(reader);
        ql_store_close(store);
        store = NULL;
    }
    refused(temp_path("none.sqlite"), true, QL_ERR_NOT_FOUND, "no such file");
    refused(write_text("blank.sqlite", ""), true, QL_ERR_FORMAT, "no results in it");
}

static void check_paths(void **state)
{
    static const char *const odd[] = {"file:x?mode=memory", ":x:", "a b%20?#.sqlite", "\xc3\xa9"};
    char here[512];
    (void)state;
    assert_non_null(getcwd(here, sizeof here));
    assert_int_equal(chdir(temp_root), 0);
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        ql_store *store = open_store(odd[i]);
        fill(store, 1, 3);
        ql_store_close(store);
        assert_int_equal(access(odd[i], F_OK), 0);
    }
    assert_int_equal(chdir(here), 0);
    assert_int_equal(mkdir(temp_path("folder"), 0700), 0);
    refused(temp_path("folder"), false, QL_ERR_IO, "is a folder");
    refused("/dev/null", false, QL_ERR_IO, "is a device or pipe");
    refused(temp_path("no/x.sqlite"), false, QL_ERR_NOT_FOUND, "folder does not exist");
    refused(temp_path("blank.sqlite/x"), false, QL_ERR_NOT_FOUND, "folder does not exist");
    char path[800];
    snprintf(path, sizeof path, "%s/%0300d", temp_root, 0); /* longer than a name may be */
    refused(path, false, QL_ERR_IO, "cannot open");
    snprintf(path, sizeof path, "%s/%0200d/%0200d", temp_root, 0, 0);
    refused(path, false, QL_ERR_NOT_FOUND, "folder does not exist");
}

/* --- other people's files --------------------------------------------------------------------------------
 */

static char *slurp(const char *path, size_t *size)
{
    char *data;
    ql_err err = {0};
    if (ql_file_read(path, (size_t)1 << 24, &data, size, &err)) fail_msg("%s", err.message);
    return data;
}

/* The file is refused and stays as it is, with nothing beside it. */
static void left_alone(const char *folder, const char *name, ql_status status, const char *part)
{
    size_t size, after;
    char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    const char *full = temp_path(path);
    char *before = slurp(full, &size);
    refused(full, false, status, part);
    refused(full, true, status, part);
    char *now = slurp(full, &after);
    assert_int_equal(after, size);
    assert_memory_equal(now, before, size);
    assert_int_equal(count_entries(folder), 1);
    ql_free(before);
    ql_free(now);
    unlink(full);
}

static void check_others(void **state)
{
    (void)state;
    assert_int_equal(mkdir(temp_path("others"), 0700), 0);
    write_text("others/text", "id,question\n1,What is the capital of Lorn, and who founded it?\n");
    left_alone("others", "text", QL_ERR_FORMAT, "nor any SQLite database");
    const char *path = temp_path("others/theirs");
    sql(path, "CREATE TABLE t(x); INSERT INTO t VALUES (1)");
    left_alone("others", "theirs", QL_ERR_FORMAT, "another program's");
    sql(path, "PRAGMA application_id = 77; PRAGMA user_version = 1; CREATE TABLE runs(id)");
    left_alone("others", "theirs", QL_ERR_FORMAT, "another program's");
    sql(path, "PRAGMA application_id = 77");
    left_alone("others", "theirs", QL_ERR_FORMAT, "another program's");

    ql_store_close(open_store(path));
    sql(path, "PRAGMA journal_mode = DELETE; PRAGMA user_version = 2");
    left_alone("others", "theirs", QL_ERR_UNSUPPORTED, "newer qlua: schema 2, this one knows 1");
    ql_store_close(open_store(path));
    sql(path, "PRAGMA journal_mode = DELETE; PRAGMA user_version = 0");
    left_alone("others", "theirs", QL_ERR_FORMAT, "schema has no number");

    /* Nothing in it yet: a store may be made of it. */
    write_text("others/blank", "");
    ql_store_close(open_store(temp_path("others/blank")));
    assert_sound(temp_path("others/blank"));
}

/* Reads and writes all there is; the first failure. */
static ql_status visit(ql_store *store, ql_err *err)
{
    ql_store_run run;
    ql_store_set set;
    ql_store_row row;
    QL_TRY(ql_store_put(store, 1, KEY_A, &(ql_store_row){"0", "new"}, 1, err));
    QL_TRY(ql_store_find_runs(store, err));
    do {
        QL_TRY(ql_store_next_run(store, &run, err));
    } while (run.id);
    QL_TRY(ql_store_find_sets(store, "mmlu", err));
    do {
        QL_TRY(ql_store_next_set(store, &set, err));
    } while (set.key);
    QL_TRY(ql_store_find_rows(store, KEY_A, err));
    do {
        QL_TRY(ql_store_next_row(store, &row, err));
    } while (row.id);
    return QL_OK;
}

/* What a spoiled store says; true when it says anything, and then the file has not been changed. */
static bool complains(const char *path, const char *data, size_t size)
{
    char log[300];
    ql_store *store;
    ql_err err = {0};
    snprintf(log, sizeof log, "%s-wal", path);
    unlink(log);
    assert_ptr_equal(write_temp(strrchr(path, '/') + 1, data, size), path);
    ql_status status = ql_store_open(path, false, 0, &store, &err);
    if (status == QL_OK) status = visit(store, &err);
    ql_store_close(store);
    if (status == QL_OK) return false;
    assert_contains(err.message, path);
    size_t after;
    char *now = slurp(path, &after);
    assert_int_equal(after, size);
    assert_memory_equal(now, data, size);
    ql_free(now);
    return true;
}

static void check_damage(void **state)
{
    enum { PAGE = 4096 };
    (void)state;
    const char *path = temp_path("damaged.sqlite");
    ql_store *store = open_store(path);
    fill(store, 120, 700);
    ql_store_close(store);
    size_t size;
    char *data = slurp(path, &size), *spoiled = malloc(size);
    assert_true(size > 20 * PAGE);
    assert_false(complains(path, data, size));

    memcpy(spoiled, data, size);
    for (int i = 0; i < 16; i++) { /* the name of the format */
        spoiled[i] ^= 1;
        assert_true(complains(path, spoiled, size));
        spoiled[i] ^= 1;
    }
    unsigned seed = 7;
    int found = 0;
    for (int i = 0; i < 500; i++) { /* the header and what follows it, then anywhere */
        seed = seed * 1664525u + 1013904223u;
        size_t at = i < 200 ? (size_t)i : (seed >> 4) % size;
        char old = spoiled[at];
        spoiled[at] = (char)(old ^ (1 << (seed >> 28 & 7)));
        found += complains(path, spoiled, size);
        spoiled[at] = old;
    }
    assert_in_range(found, 20, 500);
    for (size_t page = 0; page < size; page += PAGE) {
        memset(spoiled + page, page / PAGE % 2 ? 0 : 0xff, PAGE);
        found += complains(path, spoiled, size);
        memcpy(spoiled + page, data + page, PAGE);
    }
    for (size_t cut = 100; cut < size; cut += 5 * PAGE / 2) assert_true(complains(path, data, cut));
    free(spoiled);
    ql_free(data);
}

/* --- logs and locks --------------------------------------------------------------------------------------
 */

/* A process that writes rows and ends without closing. */
static void abandon(const char *path)
{
    pid_t child = fork();
    int how;
    assert_true(child >= 0);
    if (child == 0) {
        fill(open_store(path), 3, 3);
        kill(getpid(), SIGKILL);
    }
    assert_int_equal(waitpid(child, &how, 0), child);
    assert_true(WIFSIGNALED(how));
}

static void check_log(void **state)
{
    (void)state;
    ql_store *store;
    ql_err err = {0};
    size_t size, log_size, after;
    const char *path = temp_path("left.sqlite"), *log = temp_path("left.sqlite-wal");
    abandon(path);
    char *data = slurp(path, &size), *logged = slurp(log, &log_size);
    assert_true(log_size > 0);
    write_text("left.sqlite", "");
    refused(path, false, QL_ERR_FORMAT, "is empty, but its log");
    refused(path, true, QL_ERR_FORMAT, "is empty, but its log");
    char *still = slurp(log, &after);
    assert_int_equal(after, log_size);
    assert_memory_equal(still, logged, log_size);

    write_temp("left.sqlite", data, size);
    assert_int_equal(ql_store_open(path, true, 0, &store, &err), QL_OK);
    assert_string_equal(value_of(store, KEY_A, "2"), "002");
    ql_store_close(store);
    assert_int_not_equal(access(log, F_OK), 0);
    ql_free(data);
    ql_free(logged);
    ql_free(still);
}

static void check_locked(void **state)
{
    (void)state;
    sqlite3 *db;
    ql_store *store;
    ql_err err = {0};
    const char *path = temp_path("locked.sqlite");
    int64_t run;
    assert_int_equal(sqlite3_open(path, &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, "BEGIN EXCLUSIVE", NULL, NULL, NULL), SQLITE_OK);
    refused(path, false, QL_ERR_IO, "another process holds it");
    refused(path, true, QL_ERR_IO, "another process holds it");
    assert_int_equal(sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL), SQLITE_OK);
    ql_store_close(open_store(path));
    /* A reader alone keeps a store from turning to its log. */
    static const char read[] = "PRAGMA journal_mode = DELETE; BEGIN; SELECT count(*) FROM runs";
    assert_int_equal(sqlite3_exec(db, read, NULL, NULL, NULL), SQLITE_OK);
    refused(path, false, QL_ERR_IO, "another process holds it");
    assert_int_equal(sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL), SQLITE_OK);
    ql_store_close(open_store(path));

    assert_int_equal(sqlite3_exec(db, "BEGIN IMMEDIATE", NULL, NULL, NULL), SQLITE_OK);
    assert_int_equal(ql_store_open(path, false, 0.2, &store, &err), QL_OK);
    assert_int_equal(ql_store_begin_run(store, &a_run, &run, &err), QL_ERR_IO);
    assert_contains(err.message, "another process holds it, after 0.2 seconds");
    assert_contains(err.hint, "wait until");
    assert_int_equal(ql_store_find_runs(store, &err), QL_OK);
    ql_store_close(store);
    /* Ctrl-C ends a long wait. */
    assert_int_equal(ql_store_open(path, false, 600, &store, &err), QL_OK);
    ql_interrupt_set();
    assert_int_equal(ql_store_begin_run(store, &a_run, &run, &err), QL_ERR_INTERRUPTED);
    ql_interrupt_clear();
    assert_int_equal(sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL), SQLITE_OK);
    assert_int_equal(ql_store_begin_run(store, &a_run, &run, &err), QL_OK);
    ql_store_close(store);
    sqlite3_close(db);
}

/* A lock that is given back in time is waited for. */
static void check_wait(void **state)
{
    (void)state;
    const char *path = temp_path("wait.sqlite");
    ql_store *store = open_store(path);
    int ends[2], how;
    char byte;
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        sqlite3 *db;
        if (sqlite3_open(path, &db) || sqlite3_exec(db, "BEGIN IMMEDIATE", NULL, NULL, NULL)) _exit(1);
        if (write(ends[1], "x", 1) != 1) _exit(2);
        pause_for(0.3);
        _exit(sqlite3_exec(db, "COMMIT", NULL, NULL, NULL) ? 3 : 0);
    }
    assert_int_equal(read(ends[0], &byte, 1), 1);
    fill(store, 1, 3);
    assert_int_equal(waitpid(child, &how, 0), child);
    assert_int_equal(WEXITSTATUS(how), 0);
    close(ends[0]);
    close(ends[1]);
    ql_store_close(store);
}

/* --- digests ---------------------------------------------------------------------------------------------
 */

/* The digest of a file whose content is `text`; true when the file was read for it. */
static bool reads(ql_store *store, const char *path, const char *text)
{
    char hex[QL_SHA256_HEX], expected[QL_SHA256_HEX];
    ql_err err = {0};
    ql_file_fail_after(-1, 0);
    if (ql_store_sha256(store, path, hex, &err)) fail_msg("%s", err.message);
    assert_int_equal(ql_sha256_of(text, strlen(text), expected, NULL), QL_OK);
    assert_string_equal(hex, expected);
    return ql_file_count() > 2; /* open and stat */
}

static void check_remembered(void **state)
{
    (void)state;
    ql_store *store = open_store(temp_path("files.sqlite"));
    struct stat info;
    const char *kept = write_text("kept", "kept"), *touched = write_text("touched", "touched");
    const char *replaced = write_text("replaced", "old"), *cut = write_text("cut", "long");
    const char *edited = write_text("edited", "before"), *blank = write_text("blank", "");
    assert_true(reads(store, kept, "kept"));
    assert_true(reads(store, kept, "kept")); /* too young: it could still change without a new time */
    pause_for(2.6);
    const char *paths[] = {kept, touched, replaced, cut, edited, blank};
    const char *texts[] = {"kept", "touched", "old", "long", "before", ""};
    for (size_t i = 0; i < 5; i++) assert_true(reads(store, paths[i], texts[i]));
    for (size_t i = 0; i < 6; i++) assert_false(reads(store, paths[i], texts[i]));

    assert_int_equal(utimensat(AT_FDCWD, touched, NULL, 0), 0);
    assert_true(reads(store, touched, "touched"));
    assert_int_equal(rename(write_text("other", "new"), replaced), 0);
    assert_true(reads(store, replaced, "new"));
    assert_int_equal(truncate(cut, 2), 0);
    assert_true(reads(store, cut, "lo"));
    assert_int_equal(stat(edited, &info), 0); /* the same size and, put back, the same time */
    write_text("edited", "behind");
    struct timespec times[] = {info.st_atim, info.st_mtim};
    assert_int_equal(utimensat(AT_FDCWD, edited, times, 0), 0);
    assert_true(reads(store, edited, "behind"));
    assert_false(reads(store, kept, "kept"));
    ql_store_close(store);
    store = open_store(temp_path("files.sqlite"));
    assert_false(reads(store, kept, "kept"));
    ql_store_close(store);
}

static void check_digest_errors(void **state)
{
    (void)state;
    ql_store *store = open_store(":memory:");
    char hex[QL_SHA256_HEX];
    ql_err err = {0};
    const char *path = write_text("some", "some");
    assert_int_equal(ql_store_sha256(store, temp_path("absent"), hex, &err), QL_ERR_NOT_FOUND);
    assert_contains(err.message, "absent");
    assert_string_equal(hex, "");
    assert_int_equal(ql_store_sha256(store, temp_root, hex, &err), QL_ERR_IO);
    ql_interrupt_set();
    assert_int_equal(ql_store_sha256(store, path, hex, &err), QL_ERR_INTERRUPTED);
    ql_interrupt_clear();
    ql_file_fail_after(2, EIO);
    assert_int_equal(ql_store_sha256(store, path, hex, &err), QL_ERR_IO);
    ql_file_fail_after(-1, 0);
    assert_string_equal(hex, "");

    /* Another process is still writing it. */
    path = write_text("big", "");
    assert_int_equal(truncate(path, 64 << 20), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0)
        while (utimensat(AT_FDCWD, path, NULL, 0) == 0) pause_for(0.0001);
    assert_int_equal(ql_store_sha256(store, path, hex, &err), QL_ERR_IO);
    assert_contains(err.message, "was changed while it was read");
    assert_string_equal(hex, "");
    kill(child, SIGKILL);
    waitpid(child, NULL, 0);
    ql_store_close(store);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(check_queries),       cmocka_unit_test(check_misuse),
        cmocka_unit_test(check_readonly),      cmocka_unit_test(check_paths),
        cmocka_unit_test(check_others),        cmocka_unit_test(check_damage),
        cmocka_unit_test(check_log),           cmocka_unit_test(check_locked),
        cmocka_unit_test(check_wait),          cmocka_unit_test(check_remembered),
        cmocka_unit_test(check_digest_errors),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
