#include "process.h"

#include <stdio.h>

ql_process_memory ql_process_memory_read(void)
{
    ql_process_memory memory = {0, 0};
    FILE *f = fopen("/proc/self/status", "re");
    if (!f) return memory;
    char line[256];
    size_t kib;
    while (fgets(line, sizeof line, f)) {
        if (sscanf(line, "VmRSS: %zu kB", &kib) == 1) memory.resident = kib * 1024;
        if (sscanf(line, "VmHWM: %zu kB", &kib) == 1) memory.peak = kib * 1024;
    }
    fclose(f);
    return memory;
}

bool ql_process_reset_peak(void)
{
    FILE *f = fopen("/proc/self/clear_refs", "we");
    if (!f) return false;
    bool written = fputs("5", f) >= 0;
    return fclose(f) == 0 && written;
}
