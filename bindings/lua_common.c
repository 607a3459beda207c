#include "lua_common.h"

#include <lauxlib.h>

static int err_tostring(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TTABLE);
    lua_getfield(L, 1, "message");
    if (!lua_isstring(L, -1)) lua_pushliteral(L, "unknown error");
    lua_getfield(L, 1, "hint");
    const char *hint = lua_tostring(L, -1);
    if (hint != NULL && *hint != '\0')
        lua_pushfstring(L, "%s (%s)", lua_tostring(L, -2), hint);
    else
        lua_pop(L, 1);
    return 1;
}

void qlua_push_err_meta(lua_State *L)
{
    if (!luaL_newmetatable(L, QLUA_ERROR_META)) return;
    lua_pushcfunction(L, err_tostring);
    lua_setfield(L, -2, "__tostring");
}

void qlua_push_err_table(lua_State *L, const ql_err *err)
{
    lua_createtable(L, 0, 3);
    lua_pushstring(L, ql_err_name(err->code));
    lua_setfield(L, -2, "code");
    lua_pushstring(L, err->message);
    lua_setfield(L, -2, "message");
    if (err->hint[0] != '\0') {
        lua_pushstring(L, err->hint);
        lua_setfield(L, -2, "hint");
    }
    qlua_push_err_meta(L);
    lua_setmetatable(L, -2);
}

int qlua_push_err(lua_State *L, const ql_err *err)
{
    lua_pushnil(L);
    qlua_push_err_table(L, err);
    return 2;
}
