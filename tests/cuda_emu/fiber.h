/* Stacks to switch between on one OS thread. A fiber returns to its resumer and is resumed for new work,
 * also from another OS thread.
 */
#ifndef FIBER_H
#define FIBER_H

struct fiber;

/* A fiber that calls entry(argument) when first resumed; entry must never return. */
fiber *fiber_new(void (*entry)(void *), void *argument);
/* Run `f` until it pauses. Not from inside a fiber. */
void fiber_resume(fiber *f);
/* Of a fiber that has paused: what is on its stack is dropped. */
void fiber_free(fiber *f);
/* Back to the resumer of `f`, the fiber that runs. */
void fiber_pause(fiber *f);

#endif
