/* The pool under threads that are many, late or uneven; pinning; the quotas of control groups. What one run
 * promises besides is in test_backend_cpu.c. Written to be run under ThreadSanitizer, too. */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static ql_err error;

#define OK(expr)                                                                                             \
    do {                                                                                                     \
        if ((expr) != QL_OK) fail_msg("%s: %s", #expr, error.message);                                       \
    } while (0)

enum { MOST_PIECES = 4096 };

/* Plain memory that pieces write and the caller reads: only the pool orders the two. */
typedef struct {
    int hits[MOST_PIECES];
    int worker[MOST_PIECES];
    int slow; /* the thread that sleeps in its pieces; -1: none */
    useconds_t pause;
} work;

static void do_piece(void *ud, int64_t piece, int worker)
{
    work *w = ud;
    if (worker == w->slow) usleep(w->pause);
    w->hits[piece]++;
    w->worker[piece] = worker;
}

static void test_runs_in_a_row(void **state)
{
    (void)state;
    static work w;
    static const int threads[] = {2, 3, 8, 17};
    for (int i = 0; i < 4; i++) {
        ql_pool *pool;
        int expect[MOST_PIECES] = {0};
        OK(ql_pool_new(threads[i], &pool, &error));
        w = (work){.slow = -1};
        for (int round = 0; round < 1000; round++) {
            int64_t pieces = round * 7 % 97;
            ql_pool_run(pool, do_piece, &w, pieces);
            for (int64_t p = 0; p < pieces; p++) expect[p]++;
            if (round % 100 == 0) usleep(500); /* long enough for workers to fall asleep */
        }
        assert_memory_equal(w.hits, expect, sizeof expect);
        ql_pool_free(pool);
    }
}

/* What a slow thread leaves of its share is done by the others: of a share of 100 pieces of 3 ms it does few.
 */
static void test_shares_of_slow_threads_are_taken_over(void **state)
{
    (void)state;
    static work w;
    for (int slow = 0; slow < 3; slow++) {
        ql_pool *pool;
        int own = 0;
        OK(ql_pool_new(3, &pool, &error));
        w = (work){.slow = slow, .pause = 3000};
        ql_pool_run(pool, do_piece, &w, 300);
        for (int p = 0; p < 300; p++) {
            assert_int_equal(w.hits[p], 1);
            own += w.worker[p] == slow;
        }
        assert_in_range(own, 0, 50);
        ql_pool_free(pool);
    }
}

/* The thread that alone runs keeps to no share: pieces in order, all by the caller. */
static void test_one_thread(void **state)
{
    (void)state;
    static work w;
    ql_pool *pool;
    OK(ql_pool_new(1, &pool, &error));
    w = (work){.slow = -1};
    ql_pool_run(pool, do_piece, &w, MOST_PIECES);
    for (int p = 0; p < MOST_PIECES; p++) assert_true(w.hits[p] == 1 && w.worker[p] == 0);
    ql_pool_free(pool);
}

/* Pools used in turn, by the thread that made them and by another one. */
static void *use_pool(void *arg)
{
    static work w;
    w = (work){.slow = -1};
    for (int i = 0; i < 200; i++) ql_pool_run(arg, do_piece, &w, 64);
    for (int p = 0; p < 64; p++)
        if (w.hits[p] != 200) return arg;
    return NULL;
}

static void test_two_pools(void **state)
{
    (void)state;
    ql_pool *a, *b;
    pthread_t thread;
    void *bad;
    OK(ql_pool_new(2, &a, &error));
    OK(ql_pool_new(4, &b, &error));
    for (int i = 0; i < 5; i++) {
        assert_null(use_pool(a));
        assert_int_equal(pthread_create(&thread, NULL, use_pool, b), 0);
        pthread_join(thread, &bad);
        assert_null(bad);
    }
    ql_pool_free(a);
    ql_pool_free(b);
}

/* ---- pinning ---- */

typedef struct {
    atomic_int arrived;
    int threads;
    int cpus[64]; /* how many CPUs each thread may run on */
    int first[64];
} places;

/* Every thread waits for the others, so that each takes one piece. */
static void note_place(void *ud, int64_t piece, int worker)
{
    places *p = ud;
    cpu_set_t set;
    sched_getaffinity(0, sizeof set, &set);
    p->cpus[worker] = CPU_COUNT(&set);
    for (int cpu = 0; cpu < CPU_SETSIZE && p->first[worker] < 0; cpu++)
        if (CPU_ISSET(cpu, &set)) p->first[worker] = cpu;
    (void)piece;
    atomic_fetch_add(&p->arrived, 1);
    while (atomic_load(&p->arrived) < p->threads) sched_yield();
}

static places look(int threads)
{
    ql_pool *pool;
    places p = {.threads = threads};
    memset(p.first, 0xff, sizeof p.first);
    OK(ql_pool_new(threads, &pool, &error));
    ql_pool_run(pool, note_place, &p, threads);
    ql_pool_free(pool);
    return p;
}

static void test_pinning(void **state)
{
    (void)state;
    cpu_set_t before, after;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    const int all = CPU_COUNT(&before);
    if (all < 2 || all > 64) skip();
    int quota = ql_pool_quota("/proc/self/cgroup", "/sys/fs/cgroup");
    if (quota > 0 && quota < all) skip();
    unsetenv("OMP_PROC_BIND");
    places p = look(all); /* a CPU each, no two the same; the caller is left alone */
    assert_int_equal(p.cpus[0], all);
    for (int i = 1; i < all; i++) {
        assert_int_equal(p.cpus[i], 1);
        for (int j = 1; j < i; j++) assert_int_not_equal(p.first[i], p.first[j]);
    }
    sched_getaffinity(0, sizeof after, &after);
    assert_true(CPU_EQUAL(&before, &after));

    p = look(all + 1); /* they take turns: the system places them */
    for (int i = 0; i <= all; i++) assert_int_equal(p.cpus[i], all);
    setenv("OMP_PROC_BIND", "FALSE", 1);
    p = look(all);
    for (int i = 0; i < all; i++) assert_int_equal(p.cpus[i], all);
    unsetenv("OMP_PROC_BIND");

    cpu_set_t one; /* the mask is what counts, not the machine */
    int n;
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    assert_int_equal(sched_setaffinity(0, sizeof one, &one), 0);
    OK(ql_pool_decide_threads(0, &n, &error));
    assert_int_equal(n, 1);
    assert_int_equal(ql_pool_decide_threads(2, &n, &error), QL_ERR_ARG);
    assert_non_null(strstr(error.message, "threads 2: this process may run on 1 CPU"));
    assert_int_equal(sched_setaffinity(0, sizeof before, &before), 0);
}

/* ---- quotas ---- */

static char root[64];

static void write_file(const char *path, const char *text)
{
    char full[512];
    snprintf(full, sizeof full, "%s/%s", root, path);
    for (char *slash = strchr(full + strlen(root) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(full, 0700);
        *slash = '/';
    }
    FILE *f = fopen(full, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static int quota_of(const char *list)
{
    char path[128];
    write_file("list", list);
    snprintf(path, sizeof path, "%s/list", root);
    return ql_pool_quota(path, root);
}

static int remove_entry(const char *path)
{
    char command[256];
    snprintf(command, sizeof command, "rm -r '%s'", path);
    return system(command);
}

static void test_quota(void **state)
{
    (void)state;
    strcpy(root, "/tmp/qlua-test-pool-XXXXXX");
    assert_non_null(mkdtemp(root));
    assert_int_equal(ql_pool_quota("/no/such/file", root), 0);

    /* version 2: the group and those above it, the least counts, rounded up */
    write_file("a/b/c/cpu.max", "max 100000\n");
    assert_int_equal(quota_of("0::/a/b/c\n"), 0);
    write_file("a/b/c/cpu.max", "250000 100000\n");
    assert_int_equal(quota_of("0::/a/b/c\n"), 3);
    write_file("a/cpu.max", "150000 100000\n");
    assert_int_equal(quota_of("0::/a/b/c\n"), 2);
    assert_int_equal(quota_of("0::/a\n"), 2);
    assert_int_equal(quota_of("0::/\n"), 0);
    write_file("cpu.max", "50000 100000\n"); /* a container whose own group is mounted as the root */
    assert_int_equal(quota_of("0::/a/b/c\n"), 1);
    assert_int_equal(quota_of("0::/\n"), 1);
    assert_int_equal(quota_of("0::/../elsewhere\n"), 1);
    write_file("cpu.max", "nonsense\n");
    assert_int_equal(quota_of("0::/\n"), 0);

    /* version 1: other controllers' groups do not count */
    write_file("cpu,cpuacct/d/e/cpu.cfs_quota_us", "400000\n");
    write_file("cpu,cpuacct/d/e/cpu.cfs_period_us", "100000\n");
    assert_int_equal(quota_of("3:cpuset:/\n2:cpu,cpuacct:/d/e\n1:memory:/\n"), 4);
    assert_int_equal(quota_of("3:cpuset:/\n2:cpuacct,cpu:/d/e\n"), 4);
    assert_int_equal(quota_of("2:cpuset,memory:/d/e\n"), 0);
    assert_int_equal(quota_of("2:cpuacct:/d/e\n"), 0);
    write_file("cpu/d/cpu.cfs_quota_us", "-1\n");
    write_file("cpu/d/cpu.cfs_period_us", "100000\n");
    assert_int_equal(quota_of("2:cpu:/d\n"), 0);
    write_file("cpu/cpu.cfs_quota_us", "100001\n");
    write_file("cpu/cpu.cfs_period_us", "100000\n");
    assert_int_equal(quota_of("2:cpu:/docker/0123\n"), 2);
    assert_int_equal(quota_of("no colon\n2:cpu\n\n2:cpu:relative\n"), 0);
    assert_int_equal(remove_entry(root), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_runs_in_a_row), cmocka_unit_test(test_shares_of_slow_threads_are_taken_over),
        cmocka_unit_test(test_one_thread),    cmocka_unit_test(test_two_pools),
        cmocka_unit_test(test_pinning),       cmocka_unit_test(test_quota),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
