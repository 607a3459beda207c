/* The Lua modules in C that belong to the library's core. */
#ifndef QLUA_LUA_CORE_H
#define QLUA_LUA_CORE_H

#include <lua.h>

int luaopen_qlua_core(lua_State *L);
int luaopen_qlua_sys(lua_State *L);

#endif
