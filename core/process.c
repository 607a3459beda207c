#include "process.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

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

/* The figure after `key` in a file of lines like "MemTotal:  16 kB" or "anon 4096"; 0 when it is not there.
 */
static size_t figure(const char *path, const char *key)
{
    char line[128];
    unsigned long long value = 0;
    size_t len = strlen(key);
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    while (fgets(line, sizeof line, f)) {
        if (strncmp(line, key, len) == 0 && (line[len] == ':' || line[len] == ' ') &&
            sscanf(line + len + 1, "%llu", &value) == 1)
            break;
    }
    fclose(f);
    return (size_t)value;
}

/* The number a file consists of; false without the file, or when it says "max". */
static bool read_number(const char *folder, const char *name, size_t *out)
{
    char path[256];
    unsigned long long value;
    if ((size_t)snprintf(path, sizeof path, "%s/%s", folder, name) >= sizeof path) return false;
    FILE *f = fopen(path, "re");
    if (!f) return false;
    bool found = fscanf(f, "%llu", &value) == 1;
    fclose(f);
    if (found) *out = (size_t)value;
    return found;
}

size_t ql_process_group_room(const char *folder)
{
    char stat[256];
    size_t limit, used;
    if (!read_number(folder, "memory.max", &limit) || !read_number(folder, "memory.current", &used))
        return SIZE_MAX;
    if ((size_t)snprintf(stat, sizeof stat, "%s/memory.stat", folder) < sizeof stat) {
        size_t files = figure(stat, "active_file") + figure(stat, "inactive_file");
        used = used > files ? used - files : 0;
    }
    return limit > used ? limit - used : 0;
}

/* What RLIMIT_AS leaves of the address space, SIZE_MAX without a limit. */
static size_t address_room(void)
{
    struct rlimit limit;
    size_t pages = 0;
    if (getrlimit(RLIMIT_AS, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return SIZE_MAX;
    FILE *f = fopen("/proc/self/statm", "re");
    if (!f) return SIZE_MAX;
    bool found = fscanf(f, "%zu", &pages) == 1;
    fclose(f);
    size_t used = pages * (size_t)sysconf(_SC_PAGESIZE);
    if (!found) return SIZE_MAX;
    return limit.rlim_cur > used ? (size_t)limit.rlim_cur - used : 0;
}

size_t ql_process_memory_total(void)
{
    return figure("/proc/meminfo", "MemTotal") * 1024;
}

size_t ql_process_memory_available(void)
{
    size_t machine = figure("/proc/meminfo", "MemAvailable") * 1024;
    size_t group = ql_process_group_room("/sys/fs/cgroup"), address = address_room();
    if (group < machine) machine = group;
    return address < machine ? address : machine;
}

bool ql_process_identity(long pid, char out[QL_PROCESS_IDENTITY])
{
    char path[64], line[1024], boot[40] = "";
    unsigned long long started = 0;
    char state = 'X';
    out[0] = '\0';
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (f) {
        if (fscanf(f, "%39s", boot) != 1) boot[0] = '\0';
        fclose(f);
    }
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    f = fopen(path, "re");
    if (!f) return false;
    size_t n = fread(line, 1, sizeof line - 1, f);
    fclose(f);
    line[n] = '\0';
    /* pid (name) state, 18 numbers, start; the name may itself hold spaces and brackets */
    const char *end = strrchr(line, ')');
    static const char fields[] =
        ") %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu";
    if (!end || sscanf(end, fields, &state, &started) != 2 || state == 'Z' || state == 'X') return false;
    snprintf(out, QL_PROCESS_IDENTITY, "%s %llu", boot, started);
    return true;
}

void ql_process_cpu_name(char *out, size_t size)
{
    char line[256];
    snprintf(out, size, "CPU");
    FILE *f = fopen("/proc/cpuinfo", "re");
    if (!f) return;
    while (fgets(line, sizeof line, f)) {
        const char *colon = strchr(line, ':');
        if (!colon || strncmp(line, "model name", 10) != 0) continue;
        size_t skip = strspn(colon + 1, " \t");
        snprintf(out, size, "%.*s", (int)strcspn(colon + 1 + skip, "\n"), colon + 1 + skip);
        break;
    }
    fclose(f);
}
