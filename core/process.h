/* What the operating system says of this process and of the machine under it. Linux: /proc, /sys/fs/cgroup.
 */
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

/* Bytes of memory the machine has, 0 when unknown. */
size_t ql_process_memory_total(void);
/* Bytes that can still be allocated: the least of what the machine, the control group and RLIMIT_AS leave. */
size_t ql_process_memory_available(void);
/* Bytes that the control group (version 2) in `folder` still grants, SIZE_MAX where it sets no limit. Pages
 * of files count as free: the kernel takes them back before it refuses memory. */
size_t ql_process_group_room(const char *folder);
/* What tells a process from every other that has had its number: the boot it runs in and when it was started.
 * False, and "", when there is no live process `pid` that this one may see. */
#define QL_PROCESS_IDENTITY 64
bool ql_process_identity(long pid, char out[QL_PROCESS_IDENTITY] /* [OUT] */);
/* The processor's name in out[size], "CPU" when unknown. */
void ql_process_cpu_name(char *out /* [OUT] */, size_t size);

#endif
