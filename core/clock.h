/* Seconds: on a clock that runs evenly, and since 1970 on one that may be set. */
#ifndef QL_CLOCK_H
#define QL_CLOCK_H

#include <time.h>

static inline double ql_clock_read(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static inline double ql_clock_seconds(void)
{
    return ql_clock_read(CLOCK_MONOTONIC);
}

static inline double ql_clock_unix(void)
{
    return ql_clock_read(CLOCK_REALTIME);
}

#endif
