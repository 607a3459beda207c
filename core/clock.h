/* Monotonic time. */
#ifndef QL_CLOCK_H
#define QL_CLOCK_H

#include <time.h>

static inline double ql_clock_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#endif
