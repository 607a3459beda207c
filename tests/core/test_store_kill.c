/* Processes that are killed while they write, or write at the same time: what was acknowledged is there.
 *
 * QLUA_KILLS=1000 kills as many (default 200).
 */
#include "store_help.h"

#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <time.h>

static void pause_for(long microseconds)
{
    nanosleep(&(struct timespec){.tv_sec = microseconds / 1000000, .tv_nsec = microseconds % 1000000 * 1000},
              NULL);
}

/* Puts groups of rows until it is killed, and says through `out` after each how many rows are acknowledged.
 * The first row of a group has the number of the group's rows in its value, so that half a group can be told.
 */
static void write_rows(const char *path, int round, int out)
{
    ql_store *store;
    int64_t run;
    ql_err err;
    if (ql_store_open(path, false, 30, &store, &err)) _exit(1);
    if (ql_store_begin_run(store, &a_run, &run, &err)) _exit(2);
    if (ql_store_set_add(store, KEY_A, "kill", "{}", &err)) _exit(3);
    for (int done = 0;;) {
        ql_store_row rows[8];
        char ids[8][32], values[8][600];
        int n = 1 + (done * 7 + round) % 8;
        for (int i = 0; i < n; i++) {
            snprintf(ids[i], sizeof ids[i], "%d.%d", round, done + i);
            snprintf(values[i], sizeof values[i], "%d %0*d", n - i, 20 + (done * 37 + i * 101) % 500, done);
            rows[i] = (ql_store_row){ids[i], values[i]};
        }
        if (ql_store_put(store, run, KEY_A, rows, (size_t)n, &err)) _exit(4);
        done += n;
        if (write(out, &done, sizeof done) != (ssize_t)sizeof done) _exit(5);
    }
}

/* Rows of a round that are in the store, its first 0 .. n - 1; fails where one is missing or a group is half.
 */
static int count_rows(ql_store *store, int round)
{
    static unsigned char left[1 << 16]; /* rows of the group from this one on; 0: not there */
    int n = 0, rows = 0;
    ql_store_row row;
    ql_err err = {0};
    memset(left, 0, sizeof left);
    assert_int_equal(ql_store_find_rows(store, KEY_A, &err), QL_OK);
    for (;;) {
        int of, number;
        if (ql_store_next_row(store, &row, &err)) fail_msg("%s", err.message);
        if (!row.id) break;
        assert_int_equal(sscanf(row.id, "%d.%d", &of, &number), 2);
        if (of != round) continue;
        assert_in_range(number, 0, sizeof left - 1);
        left[number] = (unsigned char)atoi(row.value);
        rows++;
    }
    while (left[n]) n++;
    assert_int_equal(n, rows);
    if (n) assert_int_equal(left[n - 1], 1);
    return n;
}

static unsigned next_random(unsigned *seed)
{
    *seed = *seed * 1664525u + 1013904223u;
    return *seed >> 8;
}

/* Start a writer, kill it at a random moment, and look at what it leaves. */
static void kill_one(const char *path, int round, unsigned *seed, int *acknowledged_rounds)
{
    int ends[2], said = 0, done;
    ql_err err = {0};
    ql_store_run run;
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        close(ends[0]);
        write_rows(path, round, ends[1]);
    }
    close(ends[1]);
    /* Now and then before the first row, in the middle of opening; otherwise after a few. */
    if (next_random(seed) % 4) assert_int_equal(read(ends[0], &said, sizeof said), sizeof said);
    pause_for(next_random(seed) % 12000);
    assert_int_equal(kill(child, SIGKILL), 0);
    int how;
    assert_int_equal(waitpid(child, &how, 0), child);
    if (!WIFSIGNALED(how)) fail_msg("the writer ended by itself with %d", WEXITSTATUS(how));
    while (read(ends[0], &done, sizeof done) == (ssize_t)sizeof done) said = done;
    close(ends[0]);

    ql_store *store = open_store(path);
    int there = count_rows(store, round);
    if (there < said) fail_msg("round %d: %d rows were acknowledged, %d are there", round, said, there);
    *acknowledged_rounds += said > 0;
    if (ql_store_find_runs(store, &err) == QL_OK && ql_store_next_run(store, &run, &err) == QL_OK && run.id)
        assert_string_equal(run.status, "killed");
    ql_store_close(store);
    assert_sound(path);
}

static void check_kills(void **state)
{
    (void)state;
    const char *wanted = getenv("QLUA_KILLS");
    int rounds = wanted ? atoi(wanted) : 200, acknowledged = 0;
    unsigned seed = 1;
    char path[256];
    assert_true(rounds > 0);
    for (int round = 0; round < rounds; round++) {
        snprintf(path, sizeof path, "%s/kill-%d.sqlite", temp_root,
                 round / 8); /* some find a store, some none */
        kill_one(path, round, &seed, &acknowledged);
    }
    assert_true(acknowledged > rounds / 2);
}

/* Four processes begin with no store at all and write at once. */
static void check_together(void **state)
{
    enum { WRITERS = 4, ROWS = 60 };
    pid_t children[WRITERS];
    (void)state;
    const char *path = temp_path("together.sqlite");
    for (int w = 0; w < WRITERS; w++) {
        children[w] = fork();
        assert_true(children[w] >= 0);
        if (children[w]) continue;
        ql_store *store;
        int64_t run;
        ql_err err;
        char id[32];
        if (ql_store_open(path, false, 60, &store, &err)) _exit(1);
        if (ql_store_begin_run(store, &a_run, &run, &err)) _exit(2);
        if (ql_store_set_add(store, KEY_A, "all", "{}", &err)) _exit(3);
        for (int i = 0; i < ROWS; i++) {
            ql_store_row row = {id, "1"};
            snprintf(id, sizeof id, "%d.%d", w, i);
            if (ql_store_put(store, run, KEY_A, &row, 1, &err)) _exit(4);
        }
        ql_store_close(store);
        _exit(0);
    }
    for (int w = 0; w < WRITERS; w++) {
        int how;
        assert_int_equal(waitpid(children[w], &how, 0), children[w]);
        assert_true(WIFEXITED(how));
        assert_int_equal(WEXITSTATUS(how), 0);
    }
    ql_store *store = open_store(path);
    for (int w = 0; w < WRITERS; w++) assert_int_equal(count_rows(store, w), ROWS);
    ql_store_close(store);
    assert_sound(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(check_kills), cmocka_unit_test(check_together)};
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
