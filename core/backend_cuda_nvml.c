/* What only NVIDIA's management library tells: whose memory it is, energy, clocks, heat. It comes with the
 * driver; where it is missing or does not know, the figures stay "not known". The few declarations are those
 * of nvml.h, versioned by the symbols' names.
 */
#include "backend_cuda.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct nvml_device *nvml_device;
typedef struct {
    unsigned pid;
    unsigned long long bytes; /* all ones: not available */
    unsigned gpu_instance, compute_instance;
} nvml_process;

typedef struct {
    unsigned long long reference; /* microseconds */
    unsigned long long violation; /* nanoseconds in which the policy held the clocks down */
} nvml_violation;

enum { NVML_SUCCESS = 0, NVML_INSUFFICIENT_SIZE = 7, NVML_CLOCK_SM = 1, NVML_POLICY_THERMAL = 1 };

static struct {
    void *library;
    int (*init)(void);
    int (*by_bus)(const char *bus, nvml_device *device);
    int (*processes)(nvml_device device, unsigned *count, nvml_process *processes);
    int (*energy)(nvml_device device, unsigned long long *millijoules);
    int (*clock)(nvml_device device, int type, unsigned *mhz);
    int (*violation)(nvml_device device, int policy, nvml_violation *time);
    bool ready;
} nvml;

static void load(void)
{
    nvml.library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!nvml.library) return;
    *(void **)&nvml.init = dlsym(nvml.library, "nvmlInit_v2");
    *(void **)&nvml.by_bus = dlsym(nvml.library, "nvmlDeviceGetHandleByPciBusId_v2");
    *(void **)&nvml.processes = dlsym(nvml.library, "nvmlDeviceGetComputeRunningProcesses_v3");
    *(void **)&nvml.energy = dlsym(nvml.library, "nvmlDeviceGetTotalEnergyConsumption");
    *(void **)&nvml.clock = dlsym(nvml.library, "nvmlDeviceGetClockInfo");
    *(void **)&nvml.violation = dlsym(nvml.library, "nvmlDeviceGetViolationStatus");
    nvml.ready = nvml.init && nvml.by_bus && nvml.init() == NVML_SUCCESS;
}

/* Device bytes of this process, and how many others there are. In most containers NVML lists no process, and
 * neither is known, or it gives the numbers of another namespace: then this process is one of those listed,
 * for it holds a context. */
static void count_processes(nvml_device device, ql_device_info *out)
{
    if (!nvml.processes) return;
    unsigned count = 0;
    int error = nvml.processes(device, &count, NULL);
    if (error != NVML_INSUFFICIENT_SIZE || count == 0) return;
    count += 16; /* others may start meanwhile */
    nvml_process *list = calloc(count, sizeof *list);
    if (!list) return;
    if (nvml.processes(device, &count, list) == NVML_SUCCESS && count > 0) {
        out->neighbours = (int)count - 1;
        for (unsigned i = 0; i < count; i++) {
            if (list[i].pid == (unsigned)getpid() && list[i].bytes != ~0ull)
                out->memory_process = (size_t)list[i].bytes;
        }
    }
    free(list);
}

void ql_cuda_nvml_info(const ql_cuda *c, ql_device_info *out)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load);
    /* By bus, because CUDA_VISIBLE_DEVICES renumbers the devices of CUDA and not those of NVML. */
    char bus[32];
    nvml_device device;
    if (!nvml.ready || cudaDeviceGetPCIBusId(bus, sizeof bus, c->index) != cudaSuccess) return;
    if (nvml.by_bus(bus, &device) != NVML_SUCCESS) return;
    count_processes(device, out);
    unsigned long long millijoules;
    if (nvml.energy && nvml.energy(device, &millijoules) == NVML_SUCCESS)
        out->energy_joules = 1e-3 * (double)millijoules;
    unsigned mhz;
    if (nvml.clock && nvml.clock(device, NVML_CLOCK_SM, &mhz) == NVML_SUCCESS) out->clock_mhz = (int)mhz;
    nvml_violation heat;
    if (nvml.violation && nvml.violation(device, NVML_POLICY_THERMAL, &heat) == NVML_SUCCESS)
        out->throttled_seconds = 1e-9 * (double)heat.violation;
}
