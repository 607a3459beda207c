/* What the backend asks of NVIDIA's management library. QLUA_EMU_NVML has the number of processes on the
 * device and whether the caller is the last of them: "3 mine". */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    unsigned pid;
    unsigned long long bytes;
    unsigned gpu_instance, compute_instance;
} process;

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7 };

int nvmlInit_v2(void);
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device);
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process *list);
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules);
int nvmlDeviceGetClockInfo(void *device, int type, unsigned *mhz);
int nvmlDeviceGetViolationStatus(void *device, int policy, unsigned long long time[2]);

static int the_device;

int nvmlInit_v2(void)
{
    return SUCCESS;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device)
{
    *device = &the_device;
    return strlen(bus) == 12 ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, process *list)
{
    const char *text = getenv("QLUA_EMU_NVML");
    unsigned there = text ? (unsigned)atoi(text) : 0, room = *count;
    if (device != &the_device) return INVALID_ARGUMENT;
    *count = there;
    if (there > room) return INSUFFICIENT_SIZE;
    for (unsigned i = 0; i < there; i++) list[i] = (process){.pid = 1 + i, .bytes = 77};
    if (there && strstr(text, "mine")) list[there - 1] = (process){.pid = (unsigned)getpid(), .bytes = 4096};
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules)
{
    *millijoules = 5500;
    return device == &the_device ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlDeviceGetClockInfo(void *device, int type, unsigned *mhz)
{
    *mhz = 1410;
    return device == &the_device && type == 1 ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlDeviceGetViolationStatus(void *device, int policy, unsigned long long time[2])
{
    time[0] = 1;
    time[1] = 2500000000;
    return device == &the_device && policy == 1 ? SUCCESS : INVALID_ARGUMENT;
}
