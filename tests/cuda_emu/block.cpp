/* One block at a time: its threads are fibers that run until a barrier, a warp operation or their end.
 *
 * A warp runs as far as it can before the next one starts, and a lane as far as it can before the next lane,
 * so that warps and lanes are as far apart as the program lets them be: a missing __syncthreads or __syncwarp
 * reads what nobody has written yet (0xff bytes, which are a NaN) or what somebody has overwritten.
 * QLUA_EMU_ORDER turns the order round or shuffles it. A block that cannot go on is reported thread by
 * thread, and the process aborted.
 */
#include "block.h"
#include "device.h"
#include "fiber.h"

#include <link.h>
#include <stdarg.h>
#include <stdio.h>

#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace
{
enum thread_state { RUNS, MEETS, AT_BARRIER, RETURNED };

struct copy {
    void *to;
    const void *from; /* NULL: zeros */
    int group;        /* counted over the life of the thread */
};

struct thread {
    fiber *stack;
    thread_state state;
    int index; /* in the block */
    uint3 place;
    /* what it waits for */
    const char *name, *file;
    int line, result;
    uint32_t mask;
    emu_combine combine;
    /* its asynchronous copies that have not happened, oldest first */
    std::vector<copy> copies;
    int group;
};

/* Grows to the largest block. */
struct thread_pool : std::vector<thread *> {
    ~thread_pool()
    {
        for (thread *t : *this) {
            fiber_free(t->stack);
            delete t;
        }
    }
} threads;
std::vector<emu_hand> hands; /* [warps * 32] */
/* Lanes of each warp: that there are, that have returned, that wait in a warp operation. */
struct warp_lanes {
    uint32_t exist, returned, meet;
};
std::vector<warp_lanes> warp_states;
thread *now;
const std::function<void()> *body;
int count, waiting, votes, voters; /* threads of the block; at the barrier; predicates that held there */

/* QLUA_EMU_ORDER */
enum { FORWARD, REVERSE, SHUFFLED } order;
uint64_t order_state;

unsigned char *shared_memory;
size_t shared_bytes;
#if defined(__SANITIZE_ADDRESS__)
const size_t shared_guard = 0; /* it has its own, and says who wrote */
#else
const size_t shared_guard = 128;
#endif

/* Where static shared memory lies: the thread-local storage of the object that this code and the kernels are
 * linked into, which holds nothing else but emu_thread. */
struct static_memory {
    char *first;
    size_t bytes;
} static_shared;

int find_static(dl_phdr_info *info, size_t, void *)
{
    const char *mine = (const char *)&emu_thread, *first = (const char *)info->dlpi_tls_data;
    for (int i = 0; first && i < info->dlpi_phnum; i++) {
        size_t bytes = info->dlpi_phdr[i].p_memsz;
        if (info->dlpi_phdr[i].p_type != PT_TLS || mine < first || mine >= first + bytes) continue;
        static_shared = {(char *)info->dlpi_tls_data, bytes};
        return 1;
    }
    return 0;
}

void spoil_static(void)
{
    emu_thread_state kept = emu_thread;
    memset(static_shared.first, 0xff, static_shared.bytes);
    emu_thread = kept;
}

/* SplitMix64 (Steele, Lea & Flood 2014). */
uint64_t draw(void)
{
    uint64_t z = order_state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

void arrange(std::vector<uint32_t> &list, size_t n)
{
    list.resize(n);
    for (size_t i = 0; i < n; i++) list[i] = (uint32_t)(order == REVERSE ? n - 1 - i : i);
    if (order != SHUFFLED) return;
    for (size_t i = n; i > 1; i--) std::swap(list[i - 1], list[draw() % i]);
}

void read_order(void)
{
    const char *text = getenv("QLUA_EMU_ORDER");
    if (!text || !*text || !strcmp(text, "forward")) {
        order = FORWARD;
    } else if (!strcmp(text, "reverse")) {
        order = REVERSE;
    } else {
        char *end;
        order = SHUFFLED;
        order_state = strtoull(text, &end, 10);
        if (*end) {
            fprintf(stderr, "emulated CUDA: QLUA_EMU_ORDER=%s: not forward, reverse or a number\n", text);
            abort();
        }
    }
}

void print_thread(const thread *t)
{
    fprintf(stderr, "  thread (%u, %u, %u), lane %d of warp %d: ", t->place.x, t->place.y, t->place.z,
            t->index % 32, t->index / 32);
    if (t->state == RETURNED)
        fprintf(stderr, "has returned\n");
    else if (t->state == RUNS)
        fprintf(stderr, "runs\n");
    else if (t->state == AT_BARRIER)
        fprintf(stderr, "waits at %s, %s:%d\n", t->name, t->file, t->line);
    else
        fprintf(stderr, "waits at %s with mask %08x, %s:%d\n", t->name, t->mask, t->file, t->line);
}

bool alike(const thread *a, const thread *b)
{
    if (a->state != b->state || a->index / 32 != b->index / 32) return false;
    if (a->state == RUNS || a->state == RETURNED) return true;
    return a->line == b->line && !strcmp(a->file, b->file) && (a->state == AT_BARRIER || a->mask == b->mask);
}

/* Neighbours in one warp that wait at one place are printed once. */
void print_threads(void)
{
    for (int i = 0; i < count; i++) {
        int last = i;
        while (last + 1 < count && alike(threads[i], threads[last + 1])) last++;
        if (last > i)
            fprintf(stderr, "  %d threads up to lane %d alike:\n", last - i + 1, threads[last]->index % 32);
        print_thread(threads[i]);
        i = last;
    }
}

void run(thread *t)
{
    now = t;
    threadIdx = t->place;
    fiber_resume(t->stack);
    now = nullptr;
}

void enter(void *argument)
{
    thread *self = (thread *)argument;
    for (;;) {
        (*body)();
        self->state = RETURNED;
        warp_states[(size_t)self->index / 32].returned |= 1u << (self->index & 31);
        self->copies.clear();
        fiber_pause(self->stack);
    }
}

void stuck(void)
{
    fprintf(stderr, "emulated CUDA: block (%u, %u, %u) of %d threads cannot go on\n", blockIdx.x, blockIdx.y,
            blockIdx.z, count);
    print_threads();
    abort();
}

/* Everything that is not at the block's barrier or at its end runs until it is. */
bool run_warp(int warp, std::vector<uint32_t> &lanes)
{
    bool any = false, again = true;
    int first = warp * 32, n = count - first < 32 ? count - first : 32;
    arrange(lanes, (size_t)n);
    while (again) {
        again = false;
        for (uint32_t lane : lanes) {
            thread *t = threads[first + (int)lane];
            if (t->state != RUNS) continue;
            run(t);
            any = again = true;
        }
    }
    return any;
}

void reset_thread(int i)
{
    while ((int)threads.size() <= i) {
        thread *t = new thread();
        t->stack = fiber_new(enter, t);
        threads.push_back(t);
    }
    thread *t = threads[i];
    t->state = RUNS;
    t->index = i;
    t->group = 0;
    t->place.x = (unsigned)i % blockDim.x;
    t->place.y = (unsigned)i / blockDim.x % blockDim.y;
    t->place.z = (unsigned)i / blockDim.x / blockDim.y;
}

void run_block(std::vector<uint32_t> &warps, std::vector<uint32_t> &lanes)
{
    memset(shared_memory, 0xff, shared_bytes + shared_guard);
    spoil_static();
    warp_states.assign((size_t)(count + 31) / 32, {});
    for (int i = 0; i < count; i++) {
        reset_thread(i);
        warp_states[(size_t)i / 32].exist |= 1u << (i & 31);
    }
    waiting = votes = voters = 0;
    arrange(warps, (size_t)(count + 31) / 32);
    for (bool any = true; any;) {
        any = false;
        for (uint32_t warp : warps) any |= run_warp((int)warp, lanes);
    }
    for (int i = 0; i < count; i++)
        if (threads[i]->state != RETURNED) stuck();
    for (size_t i = 0; i < shared_guard; i++)
        if (shared_memory[shared_bytes + i] != 0xff) {
            fprintf(stderr, "emulated CUDA: block (%u, %u, %u) wrote past its %zu bytes of shared memory\n",
                    blockIdx.x, blockIdx.y, blockIdx.z, shared_bytes);
            abort();
        }
}
} // namespace

void emu_run_grid(dim3 grid, dim3 block, size_t shared, const std::function<void()> &kernel)
{
    std::vector<uint32_t> blocks, warps, lanes;
    read_order();
    if (!dl_iterate_phdr(find_static, nullptr)) emu_fail("where is the thread-local storage?");
    gridDim = grid;
    blockDim = block;
    body = &kernel;
    count = (int)(block.x * block.y * block.z);
    hands.resize((size_t)(count + 31) / 32 * 32);
    shared_bytes = shared;
    void *memory;
    if (posix_memalign(&memory, 1024, shared + shared_guard)) abort();
    shared_memory = (unsigned char *)memory;
    arrange(blocks, (size_t)grid.x * grid.y * grid.z);
    for (uint32_t b : blocks) {
        blockIdx.x = b % grid.x;
        blockIdx.y = b / grid.x % grid.y;
        blockIdx.z = b / grid.x / grid.y;
        run_block(warps, lanes);
    }
    free(memory);
}

void emu_fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "emulated CUDA: ");
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    if (now) {
        fprintf(stderr, "  in block (%u, %u, %u)\n", blockIdx.x, blockIdx.y, blockIdx.z);
        print_thread(now);
    }
    abort();
}

void *emu_shared(void)
{
    return shared_memory;
}

/* The same place in the source, by name: a header's text lies in each file that includes it. */
static bool same_place(const thread *a, const thread *b)
{
    return a->line == b->line && (a->file == b->file || !strcmp(a->file, b->file));
}

static const char *const barrier_names[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and",
                                            "__syncthreads_count"};

int emu_barrier(emu_barrier_kind kind, int predicate, const char *file, int line)
{
    thread *self = now;
    self->name = barrier_names[kind];
    self->file = file;
    self->line = line;
    self->state = AT_BARRIER;
    waiting++;
    votes += predicate != 0;
    if (waiting < count) {
        fiber_pause(self->stack);
        return self->result;
    }
    int result = kind == EMU_BARRIER_OR ? votes != 0 : kind == EMU_BARRIER_AND ? votes == count : votes;
    for (int i = 0; i < count; i++) {
        thread *t = threads[i];
        if (t->name != self->name || !same_place(t, self)) {
            fprintf(stderr, "emulated CUDA: the threads of block (%u, %u, %u) are at different barriers\n",
                    blockIdx.x, blockIdx.y, blockIdx.z);
            print_threads();
            abort();
        }
        t->state = RUNS;
        t->result = result;
    }
    waiting = votes = 0;
    return result;
}

static bool same_meeting(const thread *a, const thread *b)
{
    return a->mask == b->mask && a->combine == b->combine && same_place(a, b);
}

uint64_t emu_warp(const char *name, emu_combine combine, uint32_t mask, uint64_t value, int argument,
                  int width, const char *file, int line)
{
    thread *self = now;
    int lane = self->index & 31, first = self->index - lane;
    emu_hand *hand = &hands[(size_t)first];
    self->name = name;
    self->file = file;
    self->line = line;
    self->mask = mask;
    self->combine = combine;
    self->state = MEETS;
    hand[lane].value = value;
    hand[lane].argument = argument;
    hand[lane].width = width;
    if (!(mask >> lane & 1)) emu_fail("%s: the mask %08x lacks the lane itself", name, mask);
    warp_lanes &lanes = warp_states[(size_t)first / 32];
    if (mask & ~lanes.exist)
        emu_fail("%s: the mask %08x names lanes that the block does not have", name, mask);
    if (mask & lanes.returned)
        emu_fail("%s: of the mask %08x, %08x has returned", name, mask, lanes.returned);
    lanes.meet |= 1u << lane;
    bool all = !(mask & ~lanes.meet);
    for (int i = 0; i < 32 && all; i++)
        if (mask >> i & 1) all = same_meeting(threads[first + i], self);
    if (!all) {
        fiber_pause(self->stack);
        return hand[lane].result;
    }
    combine(mask, hand);
    lanes.meet &= ~mask;
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) threads[first + i]->state = RUNS;
    return hand[lane].result;
}

uint32_t emu_active(void)
{
    const warp_lanes &lanes = warp_states[(size_t)now->index / 32];
    return lanes.exist & ~lanes.returned;
}

/* ---- asynchronous copies: they happen when waited for, and the target is spoilt until then ---- */

void emu_copy_async(void *shared, const void *global, bool valid)
{
    if ((uintptr_t)shared % 16) emu_fail("qk_copy_async: shared address %p is not 16-byte aligned", shared);
    if (emu_is_device(shared, 1)) emu_fail("qk_copy_async: %p is not shared memory", shared);
    if (valid && (uintptr_t)global % 16)
        emu_fail("qk_copy_async: global address %p is not 16-byte aligned", global);
    if (valid && !emu_is_device(global, 16))
        emu_fail("qk_copy_async: 16 bytes at %p are not in one device allocation", global);
    memset(shared, 0xff, 16);
    now->copies.push_back({shared, valid ? global : nullptr, now->group});
}

void emu_copy_commit(void)
{
    now->group++;
}

void emu_copy_wait(int groups)
{
    thread *self = now;
    size_t done = 0;
    for (; done < self->copies.size() && self->copies[done].group < self->group - groups; done++) {
        const copy &c = self->copies[done];
        if (c.from)
            memcpy(c.to, c.from, 16);
        else
            memset(c.to, 0, 16);
    }
    self->copies.erase(self->copies.begin(), self->copies.begin() + (long)done);
}
