#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define STACK_BYTES (512 * 1024) /* red zones make frames several times larger */
#else
#define STACK_BYTES (128 * 1024)
#endif

#ifdef __x86_64__
/* Push what a call must keep, change stacks, pop the same: swapcontext would ask the kernel for the signal
 * mask each time. */
extern "C" void emu_switch(void **from, void *to);
asm(".text\n"
    ".globl emu_switch\n"
    ".hidden emu_switch\n"
    ".type emu_switch, @function\n"
    "emu_switch:\n"
    "    pushq %rbp\n"
    "    pushq %rbx\n"
    "    pushq %r12\n"
    "    pushq %r13\n"
    "    pushq %r14\n"
    "    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq %rsi, %rsp\n"
    "    popq %r15\n"
    "    popq %r14\n"
    "    popq %r13\n"
    "    popq %r12\n"
    "    popq %rbx\n"
    "    popq %rbp\n"
    "    ret\n"
    ".size emu_switch, .-emu_switch\n");
typedef void *context;
#else
#include <ucontext.h>
typedef ucontext_t context;
static void emu_switch(context *from, context &to)
{
    swapcontext(from, &to);
}
#endif

struct fiber {
    context own, resumer;
    void (*entry)(void *);
    void *argument;
    char *stack;
#if defined(__SANITIZE_ADDRESS__)
    void *own_fake, *resumer_fake;
    const void *resumer_stack;
    size_t resumer_bytes;
#endif
};

/* The fiber that has just been resumed for the first time: a fresh stack has no arguments. */
static fiber *starting;

static void start(void)
{
    fiber *f = starting;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &f->resumer_stack, &f->resumer_bytes);
#endif
    f->entry(f->argument);
    abort();
}

static size_t page_bytes(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

fiber *fiber_new(void (*entry)(void *), void *argument)
{
    fiber *f = (fiber *)calloc(1, sizeof *f);
    size_t page = page_bytes();
    void *memory = mmap(nullptr, STACK_BYTES + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (!f || memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) { /* overflow faults */
        fprintf(stderr, "emulated CUDA: no memory for a thread's stack\n");
        abort();
    }
    f->entry = entry;
    f->argument = argument;
    f->stack = (char *)memory + page;
#ifdef __x86_64__
    void **top = (void **)(f->stack + STACK_BYTES);
    *--top = nullptr; /* keeps the stack aligned as after a call, and ends a backtrace */
    *--top = (void *)start;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    f->own = top;
#else
    getcontext(&f->own);
    f->own.uc_stack.ss_sp = f->stack;
    f->own.uc_stack.ss_size = STACK_BYTES;
    makecontext(&f->own, start, 0);
#endif
    return f;
}

void fiber_free(fiber *f)
{
    size_t page = page_bytes();
    munmap(f->stack - page, STACK_BYTES + page);
    free(f);
}

void fiber_resume(fiber *f)
{
    starting = f;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&f->resumer_fake, f->stack, STACK_BYTES);
#endif
    emu_switch(&f->resumer, f->own);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f->resumer_fake, nullptr, nullptr);
#endif
}

void fiber_pause(fiber *f)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&f->own_fake, f->resumer_stack, f->resumer_bytes);
#endif
    emu_switch(&f->own, f->resumer);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f->own_fake, &f->resumer_stack, &f->resumer_bytes);
#endif
}
