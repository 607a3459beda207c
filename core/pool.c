#include "pool.h"

#include "mem.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

enum {
    MAX_THREADS = 1024,
    LINE = 64, /* bytes that processors pass to each other at once */
    PATH_ROOM = 4096,
    SPIN_NS = 30 * 1000, /* a worker of a busy layer is called again within this */
};

/* One thread's share of the run in progress: the run's number (high half) and the pieces not taken yet (low
 * half), the last of which is `end` - 1. Whoever takes a piece by a compare-and-swap may read the pool's
 * other fields only then, because the run cannot end before that piece is done. */
typedef struct {
    _Alignas(LINE) _Atomic uint64_t ticket;
    _Atomic int64_t end;
} share;

struct ql_pool {
    int threads;
    pthread_t *workers; /* [threads - 1] */
    int started;

    ql_pool_fn fn;
    void *ud;
    int64_t pieces;
    share *shares; /* [threads] */

    _Alignas(LINE) _Atomic uint32_t run; /* number of the run in progress or, if none is, of the last one */
    atomic_bool stop;
    atomic_int sleepers; /* workers asleep, or about to be */
    _Alignas(LINE) _Atomic int64_t done;
    atomic_bool caller_asleep;
    pthread_mutex_t mutex; /* of the two conditions */
    pthread_cond_t work, finished;
};

typedef struct {
    ql_pool *pool;
    int number;
} seat;

static int64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Run what is left of one share; returns how many pieces that was. */
static int64_t take_share(ql_pool *pool, share *from, int worker)
{
    int64_t taken = 0;
    uint64_t ticket = atomic_load_explicit(&from->ticket, memory_order_acquire);
    while ((uint32_t)ticket) {
        /* read before the swap, which fails if a new run has begun: then `end` may be of either */
        int64_t end = atomic_load_explicit(&from->end, memory_order_relaxed);
        if (!atomic_compare_exchange_weak(&from->ticket, &ticket, ticket - 1)) continue;
        pool->fn(pool->ud, end - (int64_t)(uint32_t)ticket, worker);
        taken++;
        ticket = atomic_load_explicit(&from->ticket, memory_order_acquire);
    }
    return taken;
}

static void add_done(ql_pool *pool, int64_t taken)
{
    int64_t pieces = pool->pieces; /* the run goes on until these are counted */
    if (atomic_fetch_add(&pool->done, taken) + taken == pieces && atomic_load(&pool->caller_asleep)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_signal(&pool->finished);
        pthread_mutex_unlock(&pool->mutex);
    }
}

/* Run pieces until none is left, first one's own. Called by workers and by the caller. A share may turn into
 * the next run's only once this thread's pieces of the last are counted. */
static void take_pieces(ql_pool *pool, int worker)
{
    for (int i = 0; i < pool->threads; i++) {
        int from = worker + i < pool->threads ? worker + i : worker + i - pool->threads;
        int64_t taken = take_share(pool, &pool->shares[from], worker);
        if (taken) add_done(pool, taken);
    }
}

static bool has_work(const ql_pool *pool, uint32_t seen)
{
    return atomic_load(&pool->run) != seen || atomic_load(&pool->stop);
}

/* Until there is a run after `seen`. */
static void wait_for_work(ql_pool *pool, uint32_t seen)
{
    int64_t until = clock_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (has_work(pool, seen)) return;
            relax();
        }
    } while (clock_ns() < until);
    pthread_mutex_lock(&pool->mutex);
    /* Announced before the last look: a caller that publishes work after it sees a sleeper and wakes it. */
    atomic_fetch_add(&pool->sleepers, 1);
    while (!has_work(pool, seen)) pthread_cond_wait(&pool->work, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *worker_main(void *arg)
{
    seat mine = *(seat *)arg;
    ql_free(arg);
    while (!atomic_load(&mine.pool->stop)) {
        uint32_t run = atomic_load(&mine.pool->run);
        take_pieces(mine.pool, mine.number);
        wait_for_work(mine.pool, run);
    }
    return NULL;
}

static void wait_until_done(ql_pool *pool, int64_t pieces)
{
    int64_t until = clock_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (atomic_load(&pool->done) == pieces) return;
            relax();
        }
    } while (clock_ns() < until);
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->caller_asleep, true);
    while (atomic_load(&pool->done) != pieces) pthread_cond_wait(&pool->finished, &pool->mutex);
    atomic_store(&pool->caller_asleep, false);
    pthread_mutex_unlock(&pool->mutex);
}

void ql_pool_share(int64_t pieces, int threads, int number, int64_t *first, int64_t *end)
{
    int64_t each = pieces / threads, more = pieces % threads;
    *first = number * each + (number < more ? number : more);
    *end = *first + each + (number < more);
}

static void run_some(ql_pool *pool, ql_pool_fn fn, void *ud, int64_t pieces)
{
    uint32_t run = atomic_load(&pool->run) + 1;
    pool->fn = fn;
    pool->ud = ud;
    pool->pieces = pieces;
    atomic_store(&pool->done, 0);
    for (int i = 0; i < pool->threads; i++) {
        share *s = &pool->shares[i];
        int64_t first, end;
        ql_pool_share(pieces, pool->threads, i, &first, &end);
        atomic_store_explicit(&s->end, end, memory_order_relaxed);
        atomic_store_explicit(&s->ticket, (uint64_t)run << 32 | (uint64_t)(end - first),
                              memory_order_release);
    }
    atomic_store(&pool->run, run);
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->work);
        pthread_mutex_unlock(&pool->mutex);
    }
    take_pieces(pool, 0);
    wait_until_done(pool, pieces);
}

void ql_pool_run(ql_pool *pool, ql_pool_fn fn, void *ud, int64_t pieces)
{
    if (pieces <= 0) return;
    if (pool->threads == 1 || pieces == 1 || pieces > INT32_MAX) {
        for (int64_t i = 0; i < pieces; i++) fn(ud, i, 0);
    } else {
        run_some(pool, fn, ud, pieces);
    }
}

int ql_pool_threads(const ql_pool *pool)
{
    return pool->threads;
}

static ql_status start_worker(ql_pool *pool, int number, ql_err *err)
{
    seat *place = ql_malloc(sizeof *place);
    if (!place) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for a thread");
    *place = (seat){pool, number};
    int e = pthread_create(&pool->workers[number - 1], NULL, worker_main, place);
    if (e == 0) {
        pool->started++;
        return QL_OK;
    }
    ql_free(place);
    ql_err_set(err, QL_ERR_MEMORY, "cannot start thread %d of %d: %s", number + 1, pool->threads,
               strerror(e));
    return ql_err_hint(err, "ask for fewer threads, or raise the limit on processes (ulimit -u)");
}

/* CPUs in the affinity mask, and the mask (freed by CPU_FREE, of cpus bits); 1 and NULL when it cannot be
 * read. */
static int affinity(cpu_set_t **out, size_t *cpus)
{
    for (*cpus = 1024; *cpus <= (size_t)1 << 16; *cpus *= 2) {
        *out = CPU_ALLOC(*cpus);
        if (!*out) return 1;
        if (sched_getaffinity(0, CPU_ALLOC_SIZE(*cpus), *out) == 0) {
            int count = CPU_COUNT_S(CPU_ALLOC_SIZE(*cpus), *out);
            return count > 0 ? count : 1;
        }
        CPU_FREE(*out);
    }
    *out = NULL;
    return 1;
}

static int affinity_count(void)
{
    cpu_set_t *set;
    size_t cpus;
    int count = affinity(&set, &cpus);
    if (set) CPU_FREE(set);
    return count < MAX_THREADS ? count : MAX_THREADS;
}

static int quota_count(void)
{
    return ql_pool_quota("/proc/self/cgroup", "/sys/fs/cgroup");
}

/* One worker to each CPU but the one this thread is on. A refusal only costs what pinning would have won. */
static void pin_workers(ql_pool *pool)
{
    const char *bind = getenv("OMP_PROC_BIND");
    int quota = quota_count();
    if (pool->threads == 1 || (bind && strcasecmp(bind, "false") == 0)) return;
    if (quota > 0 && quota < pool->threads) return;
    cpu_set_t *all;
    size_t cpus;
    if (affinity(&all, &cpus) == pool->threads && all) {
        size_t bytes = CPU_ALLOC_SIZE(cpus);
        cpu_set_t *one = CPU_ALLOC(cpus);
        int here = sched_getcpu(), worker = 0;
        for (size_t cpu = 0; one && cpu < cpus && worker < pool->threads - 1; cpu++) {
            if (!CPU_ISSET_S(cpu, bytes, all) || (int)cpu == here) continue;
            CPU_ZERO_S(bytes, one);
            CPU_SET_S(cpu, bytes, one);
            pthread_setaffinity_np(pool->workers[worker++], bytes, one);
        }
        if (one) CPU_FREE(one);
    }
    if (all) CPU_FREE(all);
}

ql_status ql_pool_new(int threads, ql_pool **out, ql_err *err)
{
    *out = NULL;
    if (threads < 1 || threads > MAX_THREADS)
        return ql_err_set(err, QL_ERR_ARG, "threads %d is outside 1..%d", threads, MAX_THREADS);
    ql_pool *pool = ql_aligned(LINE, sizeof *pool);
    if (!pool) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for threads");
    memset(pool, 0, sizeof *pool);
    pool->threads = threads;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);

    ql_status status = QL_OK;
    pool->workers = ql_calloc((size_t)threads, sizeof *pool->workers);
    pool->shares = ql_aligned(LINE, (size_t)threads * sizeof *pool->shares);
    if (pool->shares) memset(pool->shares, 0, (size_t)threads * sizeof *pool->shares);
    if (!pool->workers || !pool->shares) status = ql_err_set(err, QL_ERR_MEMORY, "out of memory for threads");
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* workers inherit it */
    for (int i = 1; i < threads && status == QL_OK; i++) status = start_worker(pool, i, err);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status != QL_OK) {
        ql_pool_free(pool);
        return status;
    }
    pin_workers(pool);
    *out = pool;
    return QL_OK;
}

void ql_pool_free(ql_pool *pool)
{
    if (!pool) return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stop, true);
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->started; i++) pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->finished);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->mutex);
    ql_free(pool->shares);
    ql_free(pool->workers);
    ql_free(pool);
}

/* CPUs that a quota file pair allows, rounded up; 0 when there is no quota. Version 2 of control groups has
 * "quota period" or "max period" in one file, version 1 has two files. */
static int read_quota(const char *quota_path, const char *period_path)
{
    long long quota = 0, period = 0;
    FILE *f = fopen(quota_path, "re");
    if (!f) return 0;
    int n = fscanf(f, "%lld %lld", &quota, &period);
    fclose(f);
    if (period_path && n >= 1) {
        f = fopen(period_path, "re");
        if (!f) return 0;
        n = fscanf(f, "%lld", &period) == 1 ? 2 : 0;
        fclose(f);
    }
    if (n != 2 || quota <= 0 || period <= 0) return 0;
    long long cpus = quota / period + (quota % period != 0);
    return cpus < MAX_THREADS ? (int)cpus : MAX_THREADS;
}

/* The quota of one group. Version 1 is mounted as cpu, or together with cpuacct under either order of names,
 * one of them usually a link. */
static int group_quota(const char *root, const char *group, bool v2)
{
    static const char *const mounts[] = {"cpu", "cpu,cpuacct", "cpuacct,cpu"};
    char quota[PATH_ROOM], period[PATH_ROOM];
    if (v2) {
        int n = snprintf(quota, sizeof quota, "%s%s/cpu.max", root, group);
        return n < PATH_ROOM ? read_quota(quota, NULL) : 0;
    }
    for (size_t i = 0; i < sizeof mounts / sizeof *mounts; i++) {
        snprintf(quota, sizeof quota, "%s/%s%s/cpu.cfs_quota_us", root, mounts[i], group);
        int n = snprintf(period, sizeof period, "%s/%s%s/cpu.cfs_period_us", root, mounts[i], group);
        int found = n < PATH_ROOM ? read_quota(quota, period) : 0;
        if (found) return found;
    }
    return 0;
}

/* Does a version-1 line's list of controllers name "cpu"? */
static bool has_cpu(const char *names, const char *end)
{
    while (names < end) {
        size_t n = strcspn(names, ",:");
        if (n == 3 && memcmp(names, "cpu", 3) == 0) return true;
        names += n + 1;
    }
    return false;
}

int ql_pool_quota(const char *list, const char *root)
{
    int least = 0;
    char line[PATH_ROOM];
    FILE *f = fopen(list, "re");
    if (!f) return 0;
    while (fgets(line, sizeof line, f)) { /* "number:controllers:/group", version 2 without controllers */
        line[strcspn(line, "\n")] = '\0';
        char *names = strchr(line, ':'), *group = names ? strchr(names + 1, ':') : NULL;
        if (!group || group[1] != '/') continue;
        bool v2 = group == names + 1;
        if (!v2 && !has_cpu(names + 1, group)) continue;
        group++;
        for (;;) { /* the group and all above it; inside a container its own may lie at the root */
            char *slash = strrchr(group, '/');
            if (slash && !slash[1]) *slash = '\0';
            int quota = group_quota(root, group, v2);
            if (quota && (!least || quota < least)) least = quota;
            slash = strrchr(group, '/');
            if (!slash) break;
            *slash = '\0';
        }
    }
    fclose(f);
    return least;
}

/* Refuses more threads than `limit` CPUs, which `why` names. */
static ql_status refuse(int requested, int limit, const char *why, const char *remedy, ql_err *err)
{
    ql_err_set(err, QL_ERR_ARG, "threads %d: %s %d CPU%s", requested, why, limit, limit == 1 ? "" : "s");
    return ql_err_hint(err, "ask for 1..%d, or %s", limit, remedy);
}

ql_status ql_pool_decide_threads(int requested, int *out, ql_err *err)
{
    *out = 0;
    int available = affinity_count(), quota = quota_count();
    if (requested < 0) return ql_err_set(err, QL_ERR_ARG, "threads %d is below 1", requested);
    if (requested > available)
        return refuse(requested, available, "this process may run on", "widen the affinity mask (taskset)",
                      err);
    if (quota > 0 && requested > quota)
        return refuse(requested, quota, "the quota of this process's control group is",
                      "raise the quota (cpu.max, docker run --cpus)", err);
    if (requested > 0) {
        *out = requested;
        return QL_OK;
    }
    const char *omp = getenv("OMP_NUM_THREADS"); /* "4", or a list by nesting level, "4,2" */
    long limit = omp ? strtol(omp, NULL, 10) : 0;
    if (limit > 0 && limit < available) available = (int)limit;
    if (quota > 0 && quota < available) available = quota;
    *out = available;
    return QL_OK;
}
