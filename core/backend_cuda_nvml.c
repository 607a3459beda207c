/* What only NVIDIA's management library tells: this process' memory, energy, clocks. It comes with the
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

enum { NVML_SUCCESS = 0, NVML_INSUFFICIENT_SIZE = 7, NVML_CLOCK_SM = 1 };

static struct {
    void *library;
    int (*init)(void);
    int (*by_bus)(const char *bus, nvml_device *device);
    int (*processes)(nvml_device device, unsigned *count, nvml_process *processes);
    int (*energy)(nvml_device device, unsigned long long *millijoules);
    int (*clock)(nvml_device device, int type, unsigned *mhz);
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
    nvml.ready = nvml.init && nvml.by_bus && nvml.init() == NVML_SUCCESS;
}

/* Device bytes of this process; 0 where NVML does not list it (another process namespace, as in most
 * containers). */
static size_t process_bytes(nvml_device device)
{
    if (!nvml.processes) return 0;
    unsigned count = 0;
    int error = nvml.processes(device, &count, NULL);
    if (error != NVML_INSUFFICIENT_SIZE || count == 0) return 0;
    count += 16; /* others may start meanwhile */
    nvml_process *list = calloc(count, sizeof *list);
    if (!list) return 0;
    size_t bytes = 0;
    if (nvml.processes(device, &count, list) == NVML_SUCCESS) {
        for (unsigned i = 0; i < count; i++) {
            if (list[i].pid == (unsigned)getpid() && list[i].bytes != ~0ull) bytes = (size_t)list[i].bytes;
        }
    }
    free(list);
    return bytes;
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
    out->memory_process = process_bytes(device);
    unsigned long long millijoules;
    if (nvml.energy && nvml.energy(device, &millijoules) == NVML_SUCCESS)
        out->energy_joules = 1e-3 * (double)millijoules;
    unsigned mhz;
    if (nvml.clock && nvml.clock(device, NVML_CLOCK_SM, &mhz) == NVML_SUCCESS) out->clock_mhz = (int)mhz;
}
