/* Ctrl-C for Lua code.
 *
 * The SIGINT handler sets core's flag (core/interrupt.h) and puts a hook on every coroutine that is now
 * running or waiting for the one it resumed. That chain of coroutines is known because qlua_interrupt_open
 * puts its own resume, wrap and close into the coroutine table; to a program they behave as Lua's. No hook is
 * set before the signal, so undisturbed code runs at full speed.
 *
 * The hook raises "interrupted!" once, leaves a quarter of a second in which `__close` methods and error
 * handlers may put their rows away, and from then on raises at every instruction, so that a loop around pcall
 * ends too. A second Ctrl-C before the flag is cleared ends the process with 130.
 *
 * State is per process: one lua_State is interruptible, and the thread that called qlua_interrupt_open runs
 * it.
 */
#ifndef QLUA_INTERRUPT_H
#define QLUA_INTERRUPT_H

#include <stdbool.h>
#include <lua.h>

/* Take over coroutine.resume/wrap/close of L (a main thread with the standard libraries open) and install the
 * SIGINT handler. Call once. */
void qlua_interrupt_open(lua_State *L);

/* Before L is closed: the handler sets no more hooks on it, Ctrl-C only sets the flag, a second one ends the
 * process. */
void qlua_interrupt_close(void);

/* Forget a Ctrl-C that has been dealt with; hooks still in place remove themselves. */
void qlua_interrupt_clear(void);

/* While true, Ctrl-C only sets the flag: an editor is reading a line and will look at it. */
void qlua_interrupt_at_prompt(bool prompt);

/* Raise "interrupted!" with the caller's position: what a binding does on QL_ERR_INTERRUPTED. Never returns;
 * int so that `return qlua_interrupt_raise(L)` reads well. */
int qlua_interrupt_raise(lua_State *L);

/* The module qlua.interrupt: pending() tells whether Ctrl-C was pressed, clear() takes it as dealt with. */
int luaopen_qlua_interrupt(lua_State *L);

#endif
