/* The Lua modules written in C, by the name that `require` takes. main.c puts them into package.preload; a
 * new binding adds its prototype and its line here. */
#ifndef QLUA_MODULES_H
#define QLUA_MODULES_H

#include <lauxlib.h>
#include <lua.h>

#include "interrupt.h"

int luaopen_qlua_core(lua_State *L);
int luaopen_qlua_json(lua_State *L);
int luaopen_qlua_probe(lua_State *L);
int luaopen_qlua_store(lua_State *L);
int luaopen_qlua_sys(lua_State *L);
int luaopen_qlua_tokenizer(lua_State *L);

static const luaL_Reg qlua_modules[] = {
    {"qlua.core", luaopen_qlua_core},           {"qlua.interrupt", luaopen_qlua_interrupt},
    {"qlua.json", luaopen_qlua_json},           {"qlua.probe", luaopen_qlua_probe},
    {"qlua.store", luaopen_qlua_store},         {"qlua.sys", luaopen_qlua_sys},
    {"qlua.tokenizer", luaopen_qlua_tokenizer}, {NULL, NULL},
};

#endif
