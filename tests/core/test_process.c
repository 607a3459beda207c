/* What the process says of the memory around it, and of itself. */
#include "file_help.h"

#include "process.h"

#include <signal.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/wait.h>

static void room_is(size_t expected, const char *max, const char *current, const char *stat)
{
    write_temp("memory.max", max, strlen(max));
    write_temp("memory.current", current, strlen(current));
    write_temp("memory.stat", stat, strlen(stat));
    assert_int_equal(ql_process_group_room(temp_root), expected);
}

static void check_group(void **state)
{
    (void)state;
    assert_int_equal(ql_process_group_room(temp_root), SIZE_MAX); /* no such files */
    room_is(600, "1000\n", "400\n", "anon 400\n");
    /* pages of files can be taken back */
    room_is(900, "1000\n", "950\n", "anon 100\ninactive_file 600\nactive_file 250\nunevictable 7\n");
    room_is(1000, "1000\n", "950\n", "inactive_file 951\n");
    room_is(0, "1000\n", "1000\n", "anon 1000\n");
    room_is(0, "1000\n", "1200\n", "anon 1200\n");
    room_is(SIZE_MAX, "max\n", "400\n", "anon 400\n");
}

static void check_address_space(void **state)
{
    (void)state;
    struct rlimit before, low;
    size_t free_before = ql_process_memory_available();
    assert_in_range(free_before, 1, ql_process_memory_total());
    assert_int_equal(getrlimit(RLIMIT_AS, &before), 0);
    low = before;
    low.rlim_cur = 1 << 20; /* less than the process has mapped already */
    assert_int_equal(setrlimit(RLIMIT_AS, &low), 0);
    size_t available = ql_process_memory_available();
    assert_int_equal(setrlimit(RLIMIT_AS, &before), 0);
    assert_int_equal(available, 0);
}

/* A process has an identity as long as it runs; one that is dead and not yet waited for has none. */
static void check_identity(void **state)
{
    (void)state;
    char mine[QL_PROCESS_IDENTITY], again[QL_PROCESS_IDENTITY], other[QL_PROCESS_IDENTITY];
    assert_true(ql_process_identity(getpid(), mine));
    assert_true(ql_process_identity(getpid(), again));
    assert_string_equal(mine, again);
    assert_true(strchr(mine, ' ') > mine);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0)
        for (;;) pause();
    assert_true(ql_process_identity(child, other));
    assert_int_equal(kill(child, SIGKILL), 0);
    siginfo_t info;
    assert_int_equal(waitid(P_PID, (id_t)child, &info, WEXITED | WNOWAIT), 0);
    assert_false(ql_process_identity(child, other));
    assert_string_equal(other, "");
    assert_int_equal(waitpid(child, NULL, 0), child);
    assert_false(ql_process_identity(child, other));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test_setup_teardown(check_group, make_temp, remove_temp),
                                       cmocka_unit_test(check_address_space),
                                       cmocka_unit_test(check_identity)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
