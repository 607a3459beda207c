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
#include <time.h>

enum {
    MAX_THREADS = 1024,
    SPIN_NS = 30 * 1000, /* a worker of a busy layer is called again within this */
};

struct ql_pool {
    int threads;
    pthread_t *workers; /* [threads - 1] */
    int started;

    /* The run in progress. `ticket` is its number (high half) and the pieces not handed out yet (low half): a
     * thread takes a piece by a compare-and-swap, and may read the other fields only once it has one, because
     * the run cannot end before that piece is done. */
    _Atomic uint64_t ticket;
    ql_pool_fn fn;
    void *ud;
    int64_t pieces;
    _Atomic int64_t done;

    atomic_bool stop;
    atomic_int sleepers; /* workers asleep, or about to be */
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

/* Run pieces until none is left. Called by workers and by the caller. */
static void take_pieces(ql_pool *pool, int worker)
{
    uint64_t ticket = atomic_load(&pool->ticket);
    while ((uint32_t)ticket) {
        if (!atomic_compare_exchange_weak(&pool->ticket, &ticket, ticket - 1)) continue;
        int64_t pieces = pool->pieces;
        pool->fn(pool->ud, pieces - (int64_t)(uint32_t)ticket, worker);
        if (atomic_fetch_add(&pool->done, 1) + 1 == pieces && atomic_load(&pool->caller_asleep)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->finished);
            pthread_mutex_unlock(&pool->mutex);
        }
        ticket = atomic_load(&pool->ticket);
    }
}

static bool has_work(const ql_pool *pool)
{
    return (uint32_t)atomic_load(&pool->ticket) != 0 || atomic_load(&pool->stop);
}

static void wait_for_work(ql_pool *pool)
{
    int64_t until = clock_ns() + SPIN_NS;
    do {
        for (int i = 0; i < 32; i++) {
            if (has_work(pool)) return;
            relax();
        }
    } while (clock_ns() < until);
    pthread_mutex_lock(&pool->mutex);
    /* Announced before the last look: a caller that publishes work after it sees a sleeper and wakes it. */
    atomic_fetch_add(&pool->sleepers, 1);
    while (!has_work(pool)) pthread_cond_wait(&pool->work, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void *worker_main(void *arg)
{
    seat mine = *(seat *)arg;
    ql_free(arg);
    while (!atomic_load(&mine.pool->stop)) {
        take_pieces(mine.pool, mine.number);
        wait_for_work(mine.pool);
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

static void run_some(ql_pool *pool, ql_pool_fn fn, void *ud, int64_t pieces)
{
    pool->fn = fn;
    pool->ud = ud;
    pool->pieces = pieces;
    atomic_store(&pool->done, 0);
    uint64_t run = (atomic_load(&pool->ticket) >> 32) + 1;
    atomic_store(&pool->ticket, run << 32 | (uint64_t)pieces);
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

ql_status ql_pool_new(int threads, ql_pool **out, ql_err *err)
{
    *out = NULL;
    if (threads < 1 || threads > MAX_THREADS)
        return ql_err_set(err, QL_ERR_ARG, "threads %d is outside 1..%d", threads, MAX_THREADS);
    ql_pool *pool = ql_calloc(1, sizeof *pool);
    if (!pool) return ql_err_set(err, QL_ERR_MEMORY, "out of memory for threads");
    pool->threads = threads;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->work, NULL);
    pthread_cond_init(&pool->finished, NULL);

    ql_status status = QL_OK;
    pool->workers = ql_calloc((size_t)threads, sizeof *pool->workers);
    if (!pool->workers) status = ql_err_set(err, QL_ERR_MEMORY, "out of memory for threads");
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* workers inherit it */
    for (int i = 1; i < threads && status == QL_OK; i++) status = start_worker(pool, i, err);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (status != QL_OK) {
        ql_pool_free(pool);
        return status;
    }
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
    ql_free(pool->workers);
    ql_free(pool);
}

/* CPUs in the affinity mask; 1 when it cannot be read. */
static int affinity_count(void)
{
    int count = 0;
    for (size_t cpus = 1024; cpus <= (size_t)1 << 16 && count == 0; cpus *= 2) {
        cpu_set_t *set = CPU_ALLOC(cpus);
        if (!set) break;
        if (sched_getaffinity(0, CPU_ALLOC_SIZE(cpus), set) == 0)
            count = CPU_COUNT_S(CPU_ALLOC_SIZE(cpus), set);
        CPU_FREE(set);
    }
    return count > 0 ? count : 1;
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
    long long cpus = (quota + period - 1) / period;
    return cpus < MAX_THREADS ? (int)cpus : MAX_THREADS;
}

static int quota_count(void)
{
    int v2 = read_quota("/sys/fs/cgroup/cpu.max", NULL);
    if (v2) return v2;
    return read_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us");
}

ql_status ql_pool_decide_threads(int requested, int *out, ql_err *err)
{
    *out = 0;
    int available = affinity_count();
    if (available > MAX_THREADS) available = MAX_THREADS;
    if (requested < 0) return ql_err_set(err, QL_ERR_ARG, "threads %d is below 1", requested);
    if (requested > available) {
        ql_err_set(err, QL_ERR_ARG, "threads %d: this process may run on %d CPU%s", requested, available,
                   available == 1 ? "" : "s");
        return ql_err_hint(err, "ask for 1..%d, or widen the affinity mask (taskset)", available);
    }
    if (requested > 0) {
        *out = requested;
        return QL_OK;
    }
    const char *omp = getenv("OMP_NUM_THREADS"); /* "4", or a list by nesting level, "4,2" */
    long limit = omp ? strtol(omp, NULL, 10) : 0;
    if (limit > 0 && limit < available) available = (int)limit;
    int quota = quota_count();
    if (quota > 0 && quota < available) available = quota;
    *out = available;
    return QL_OK;
}
