#include "loader.h"

#include <string.h>

#include <lauxlib.h>
#include <lualib.h>

static lua_CFunction lua_load_original, lua_loadfile_original;

/* With the message of a failed load on top: say what to do when it was bytecode. */
static void explain_bytecode(lua_State *L)
{
    static const char refusal[] = "attempt to load a binary chunk";
    const char *message = lua_tostring(L, -1);
    if (!message || strncmp(message, refusal, sizeof refusal - 1) != 0) return;
    lua_pushliteral(L, "; qlua runs Lua source only: load the .lua file this bytecode was made from");
    lua_concat(L, 2);
}

int qlua_loader_file(lua_State *L, const char *path)
{
    int status = luaL_loadfilex(L, path, "t");
    if (status != LUA_OK) explain_bytecode(L);
    return status;
}

int qlua_loader_text(lua_State *L, const char *text, size_t length, const char *chunk_name)
{
    int status = luaL_loadbufferx(L, text, length, chunk_name, "t");
    if (status != LUA_OK) explain_bytecode(L);
    return status;
}

/* Take the "b" out of the mode argument at `index`, then do what Lua's function does. An absent environment
 * must stay absent: it differs from nil. */
static int load_as_text(lua_State *L, int index, lua_CFunction function)
{
    const char *mode = luaL_optstring(L, index, "bt");
    if (lua_gettop(L) < index) lua_settop(L, index);
    lua_pushstring(L, strchr(mode, 't') ? "t" : "");
    lua_replace(L, index);
    int results = function(L);
    if (results == 2 && lua_isnil(L, -2)) explain_bytecode(L);
    return results;
}

static int load(lua_State *L)
{
    return load_as_text(L, 3, lua_load_original);
}

static int loadfile(lua_State *L)
{
    return load_as_text(L, 2, lua_loadfile_original);
}

static int all_results(lua_State *L, int status, lua_KContext before)
{
    (void)status;
    return lua_gettop(L) - (int)before;
}

static int dofile(lua_State *L)
{
    const char *path = luaL_optstring(L, 1, NULL);
    int before = lua_gettop(L);
    if (qlua_loader_file(L, path) != LUA_OK) return lua_error(L);
    lua_callk(L, 0, LUA_MULTRET, before, all_results);
    return all_results(L, LUA_OK, before);
}

/* package.searchers[2]; the package table is its upvalue, so that a replaced package.path is seen. */
static int search_lua(lua_State *L)
{
    const char *name = luaL_checkstring(L, 1);
    lua_settop(L, 1);
    lua_getfield(L, lua_upvalueindex(1), "searchpath");
    lua_pushvalue(L, 1);
    if (lua_getfield(L, lua_upvalueindex(1), "path") != LUA_TSTRING)
        return luaL_error(L, "'package.path' must be a string");
    lua_call(L, 2, 2);
    if (lua_isnil(L, 2)) return 1; /* on top: the list of files that do not exist */

    const char *path = lua_tostring(L, 2);
    if (qlua_loader_file(L, path) != LUA_OK)
        return luaL_error(L, "error loading module '%s' from file '%s':\n\t%s", name, path,
                          lua_tostring(L, -1));
    lua_pushvalue(L, 2);
    return 2;
}

static lua_CFunction replace(lua_State *L, const char *name, lua_CFunction ours)
{
    lua_getglobal(L, name);
    lua_CFunction theirs = lua_tocfunction(L, -1);
    lua_pop(L, 1);
    lua_register(L, name, ours);
    return theirs;
}

void qlua_loader_open(lua_State *L)
{
    lua_load_original = replace(L, "load", load);
    lua_loadfile_original = replace(L, "loadfile", loadfile);
    replace(L, "dofile", dofile);

    lua_getglobal(L, LUA_LOADLIBNAME);
    lua_getfield(L, -1, "searchers");
    lua_pushvalue(L, -2);
    lua_pushcclosure(L, search_lua, 1);
    lua_rawseti(L, -2, 2);
    lua_pop(L, 2);
}
