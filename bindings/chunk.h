/* Running a loaded chunk and telling the user how it ended, in the words of the stand-alone lua. */
#ifndef QLUA_CHUNK_H
#define QLUA_CHUNK_H

#include <lua.h>

/* Name put before messages on stderr; NULL for none, as at the prompt. Not copied. */
void qlua_chunk_set_program(const char *name);

/* One line to stderr: "program: message". */
void qlua_chunk_message(const char *message);

/* Call the function below its `arguments` with a traceback added to an error; returns Lua's status and leaves
 * `results` values (LUA_MULTRET for all) or the one error value. */
int qlua_chunk_call(lua_State *L, int arguments, int results);

/* On an error status print the error value on top and pop it; returns status. */
int qlua_chunk_report(lua_State *L, int status);

#endif
