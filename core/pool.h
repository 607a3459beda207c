/* A fixed set of worker threads that run the pieces of one operation.
 *
 * A pool of n threads owns n - 1 workers: the caller of ql_pool_run is the n-th. Workers wait by spinning for
 * a few tens of microseconds, which covers the gap between two operations of a layer, and then sleep. They
 * block all signals, so that Ctrl-C reaches the main thread.
 *
 * A thread first takes the pieces of its own share, the same in every run of as many pieces: rows of a weight
 * stay near the core that read them last, and threads do not meet on one counter. Then it takes what others
 * have left, so that a thread the system has put aside delays the operation by one piece only. Whoever needs
 * the same bits every time must make the pieces' results independent of the thread that runs them.
 *
 * Workers are pinned to one CPU each where the pool has as many threads as the process has CPUs and no quota
 * forbids to use them all at once: then no CPU could be left idle by it. The caller is never pinned, nor is
 * anybody else's thread: what it starts later would inherit that. OMP_PROC_BIND=false leaves workers alone.
 */
#ifndef QL_POOL_H
#define QL_POOL_H

#include "err.h"

#include <stdint.h>

typedef struct ql_pool ql_pool;

/* One piece. `worker` is 0 .. threads - 1: no two pieces run at the same time with the same number. Must not
 * call ql_pool_run on the same pool. */
typedef void (*ql_pool_fn)(void *ud, int64_t piece, int worker);

ql_status ql_pool_new(int threads, ql_pool **out /* [OUT] */, ql_err *err);
void ql_pool_free(ql_pool *pool); /* NULL is ignored; not while it runs */
int ql_pool_threads(const ql_pool *pool);

/* Pieces [first, end) of `pieces` are the share of thread `number` of `threads`: sizes differ by one. */
void ql_pool_share(int64_t pieces, int threads, int number, int64_t *first /* [OUT] */,
                   int64_t *end /* [OUT] */);

/* Run pieces 0 .. pieces - 1 and return when all are done. One caller at a time. */
void ql_pool_run(ql_pool *pool, ql_pool_fn fn, void *ud, int64_t pieces);

/* How many threads to use when `requested` were asked for (0: decide). The default is what the affinity mask
 * allows, at most OMP_NUM_THREADS and the CPU quota of the control group; a request above the affinity mask
 * or the quota is refused, because its threads would take turns on the same cores. */
ql_status ql_pool_decide_threads(int requested, int *out /* [OUT] */, ql_err *err);

/* CPUs that the quotas of the groups in `list` (a /proc/self/cgroup) and of all groups above them allow,
 * rounded up; 0: no quota. `root` is where the hierarchies are mounted, /sys/fs/cgroup. Both versions. */
int ql_pool_quota(const char *list, const char *root);

#endif
