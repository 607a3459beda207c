/* Stacks to switch between on one OS thread. A fiber is never destroyed: it returns to its resumer and is
 * resumed for new work, also from another OS thread.
 */
#ifndef FIBER_H
#define FIBER_H

struct fiber;

/* A fiber that calls entry(argument) when first resumed; entry must never return. */
fiber *fiber_new(void (*entry)(void *), void *argument);
/* Run `f` until it pauses. Not from inside a fiber. */
void fiber_resume(fiber *f);
/* Back to the resumer of `f`, the fiber that runs. */
void fiber_pause(fiber *f);

#endif
