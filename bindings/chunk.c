#include "chunk.h"

#include <stdio.h>

#include <lauxlib.h>

static const char *program;

void qlua_chunk_set_program(const char *name)
{
    program = name;
}

void qlua_chunk_message(const char *message)
{
    fflush(stdout);
    if (program) fprintf(stderr, "%s: ", program);
    fprintf(stderr, "%s\n", message);
    fflush(stderr);
}

static int add_traceback(lua_State *L)
{
    const char *message = lua_tostring(L, 1);
    if (!message) {
        /* An object that can speak for itself is its own whole message: no traceback. */
        if (luaL_callmeta(L, 1, "__tostring") && lua_type(L, -1) == LUA_TSTRING) return 1;
        message = lua_pushfstring(L, "(error object is a %s value)", luaL_typename(L, 1));
    }
    luaL_traceback(L, L, message, 1);
    return 1;
}

int qlua_chunk_call(lua_State *L, int arguments, int results)
{
    int handler = lua_gettop(L) - arguments;
    lua_pushcfunction(L, add_traceback);
    lua_insert(L, handler);
    int status = lua_pcall(L, arguments, results, handler);
    lua_remove(L, handler);
    return status;
}

int qlua_chunk_report(lua_State *L, int status)
{
    if (status == LUA_OK) return status;
    const char *message = lua_tostring(L, -1);
    qlua_chunk_message(message ? message : "(error message not a string)");
    lua_pop(L, 1);
    return status;
}
