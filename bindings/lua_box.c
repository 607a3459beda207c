#include "lua_box.h"
#include "interrupt.h"

#include <math.h>
#include <string.h>

void qlua_box_type(lua_State *L, const char *name, const luaL_Reg *methods, const luaL_Reg *meta,
                   lua_CFunction close)
{
    luaL_newmetatable(L, name);
    if (meta) luaL_setfuncs(L, meta, 0);
    lua_newtable(L);
    luaL_setfuncs(L, methods, 0);
    lua_pushcfunction(L, close);
    lua_setfield(L, -2, "close");
    lua_setfield(L, -2, "__index");
    lua_pushcfunction(L, close);
    lua_setfield(L, -2, "__gc");
    lua_pushcfunction(L, close);
    lua_setfield(L, -2, "__close");
    lua_pop(L, 1);
}

void *qlua_box_push(lua_State *L, const char *name, size_t bytes)
{
    void *box = lua_newuserdatauv(L, bytes, 1);
    memset(box, 0, bytes);
    luaL_setmetatable(L, name);
    return box;
}

/* --- what the collector does not see ---------------------------------------------------------------------
 */

#define SOFT_LIMIT ((size_t)512 << 20)

static size_t in_use; /* live bytes that a collection left behind, or fewer */

void qlua_pressure(lua_State *L, size_t bytes)
{
    size_t live = ql_tensor_live_bytes();
    if (live < in_use) in_use = live;
    if (live - in_use + bytes <= SOFT_LIMIT) return;
    lua_gc(L, LUA_GCCOLLECT);
    in_use = ql_tensor_live_bytes();
}

bool qlua_retry(lua_State *L, ql_status status, int *tries)
{
    if (status != QL_ERR_MEMORY || (*tries)++ > 0) return false;
    lua_gc(L, LUA_GCCOLLECT);
    return true;
}

ql_tensor *qlua_tensor_push(lua_State *L)
{
    return qlua_box_push(L, QLUA_TENSOR, sizeof(ql_tensor));
}

int qlua_tensor_close(lua_State *L)
{
    ql_tensor_free(luaL_checkudata(L, 1, QLUA_TENSOR));
    return 0;
}

ql_tensor *qlua_tensor_test(lua_State *L, int arg)
{
    ql_tensor *t = luaL_testudata(L, arg, QLUA_TENSOR);
    if (t && !t->storage) luaL_argerror(L, arg, "the tensor is closed");
    return t;
}

ql_tensor *qlua_tensor_check(lua_State *L, int arg)
{
    luaL_checkudata(L, arg, QLUA_TENSOR);
    return qlua_tensor_test(L, arg);
}

/* --- errors ----------------------------------------------------------------------------------------------
 */

int qlua_fail(lua_State *L, const ql_err *err)
{
    if (err->code == QL_ERR_INTERRUPTED) return qlua_interrupt_raise(L);
    if (err->code != QL_ERR_ARG) return qlua_push_err(L, err);
    if (err->hint[0]) return luaL_error(L, "%s (%s)", err->message, err->hint);
    return luaL_error(L, "%s", err->message);
}

/* --- arguments -------------------------------------------------------------------------------------------
 */

int32_t *qlua_check_ids(lua_State *L, int arg, int32_t *n)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    lua_Unsigned count = lua_rawlen(L, arg);
    if (count > INT32_MAX) luaL_argerror(L, arg, "too many token ids");
    int32_t *ids = lua_newuserdatauv(L, (count ? count : 1) * sizeof *ids, 0);
    for (lua_Unsigned i = 0; i < count; i++) {
        int isint;
        lua_rawgeti(L, arg, (lua_Integer)i + 1);
        lua_Integer id = lua_tointegerx(L, -1, &isint);
        if (!isint || id < 0 || id > INT32_MAX) {
            const char *text = luaL_tolstring(L, -1, NULL);
            luaL_error(L, "bad argument #%d (token id %d is %s, not an id)", arg, (int)i + 1, text);
        }
        ids[i] = (int32_t)id;
        lua_pop(L, 1);
    }
    *n = (int32_t)count;
    return ids;
}

void qlua_options_check(lua_State *L, int arg, const char *const *known)
{
    if (lua_isnoneornil(L, arg)) return;
    luaL_checktype(L, arg, LUA_TTABLE);
    lua_pushnil(L);
    while (lua_next(L, arg)) {
        lua_pop(L, 1);
        const char *key = lua_type(L, -1) == LUA_TSTRING ? lua_tostring(L, -1) : NULL;
        const char *const *k = known;
        while (key && *k && strcmp(*k, key) != 0) k++;
        if (key && *k) continue;
        luaL_Buffer b;
        luaL_buffinit(L, &b);
        for (k = known; *k; k++) {
            if (k != known) luaL_addstring(&b, ", ");
            luaL_addstring(&b, *k);
        }
        luaL_pushresult(&b);
        luaL_error(L, "unknown option '%s' (options are: %s)", key ? key : "?", lua_tostring(L, -1));
    }
}

/* Push option `key`, or nothing; true when it is there. */
static bool option(lua_State *L, int arg, const char *key)
{
    if (lua_isnoneornil(L, arg)) return false;
    if (lua_getfield(L, arg, key) != LUA_TNIL) return true;
    lua_pop(L, 1);
    return false;
}

lua_Integer qlua_option_integer(lua_State *L, int arg, const char *key, lua_Integer preset, lua_Integer min,
                                lua_Integer max)
{
    if (!option(L, arg, key)) return preset;
    int isint;
    lua_Integer value = lua_tointegerx(L, -1, &isint);
    if (!isint || value < min || value > max)
        luaL_error(L, "option '%s' is %s, not an integer from %I to %I", key, luaL_tolstring(L, -1, NULL),
                   min, max);
    lua_pop(L, 1);
    return value;
}

double qlua_option_number(lua_State *L, int arg, const char *key, double preset)
{
    if (!option(L, arg, key)) return preset;
    int isnum;
    double value = lua_tonumberx(L, -1, &isnum);
    if (!isnum || !isfinite(value))
        luaL_error(L, "option '%s' is %s, not a finite number", key, luaL_tolstring(L, -1, NULL));
    lua_pop(L, 1);
    return value;
}

bool qlua_option_boolean(lua_State *L, int arg, const char *key, bool preset)
{
    if (!option(L, arg, key)) return preset;
    if (!lua_isboolean(L, -1)) luaL_error(L, "option '%s' is not a boolean", key);
    bool value = lua_toboolean(L, -1);
    lua_pop(L, 1);
    return value;
}

const char *qlua_option_string(lua_State *L, int arg, const char *key, const char *preset)
{
    if (!option(L, arg, key)) return preset;
    if (lua_type(L, -1) != LUA_TSTRING) luaL_error(L, "option '%s' is not a string", key);
    const char *value = lua_tostring(L, -1);
    lua_pop(L, 1); /* the options table keeps the string alive */
    return value;
}
