/* Source only: load, loadfile, dofile and require's searcher for Lua files take text chunks and refuse
 * bytecode, whose loader trusts its input. Everything else about them is as in Lua. */
#ifndef QLUA_LOADER_H
#define QLUA_LOADER_H

#include <lua.h>

/* Replace the four in L, whose standard libraries are open. */
void qlua_loader_open(lua_State *L);

/* luaL_loadfilex (path NULL: standard input) and luaL_loadbufferx, for text only. They push the function, or
 * a message, and return Lua's status. */
int qlua_loader_file(lua_State *L, const char *path);
int qlua_loader_text(lua_State *L, const char *text, size_t length, const char *chunk_name);

#endif
