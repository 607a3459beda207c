/* What the operating system says of this process. Linux: /proc/self. */
#ifndef QL_PROCESS_H
#define QL_PROCESS_H

#include <stdbool.h>
#include <stddef.h>

typedef struct {
    size_t resident; /* bytes; 0 when unknown */
    size_t peak;     /* high-water mark of resident bytes since the last reset */
} ql_process_memory;

ql_process_memory ql_process_memory_read(void);
/* Let the peak start again from now; false where the kernel does not allow it. */
bool ql_process_reset_peak(void);

#endif
