/* The prompt: reads statements, runs them, prints what expressions give. */
#ifndef QLUA_REPL_H
#define QLUA_REPL_H

#include <lua.h>

/* Run until the end of input. Errors, Ctrl-C included, are reported and lead back to the prompt. */
void qlua_repl_run(lua_State *L);

#endif
