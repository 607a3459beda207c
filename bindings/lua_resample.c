/* qlua.core.resample: the inner loops of qlua.stats' bootstrap and sign-flip test. */
#include "lua_box.h"
#include "resample.h"

#include <math.h>

/* The table of finite numbers at `index`, in a buffer that is pushed; *n of them. */
static double *check_numbers(lua_State *L, int index, int64_t *n)
{
    luaL_checktype(L, index, LUA_TTABLE);
    *n = luaL_len(L, index);
    if (*n > QL_RESAMPLE_MAX) luaL_error(L, "a list has more than %d values", QL_RESAMPLE_MAX);
    double *values = lua_newuserdatauv(L, (size_t)(*n > 0 ? *n : 1) * sizeof *values, 0);
    for (int64_t i = 0; i < *n; i++) {
        int is_number;
        lua_geti(L, index, i + 1);
        values[i] = lua_tonumberx(L, -1, &is_number);
        if (!is_number || !isfinite(values[i]))
            luaL_error(L, "value %I is %s, not a finite number", (lua_Integer)(i + 1),
                       luaL_tolstring(L, -1, NULL));
        lua_pop(L, 1);
    }
    return values;
}

/* bootstrap("mean"|"median", {list, ...}, resamples, seed) -> one number a resample, in the order of drawing
 */
static int resample_bootstrap(lua_State *L)
{
    static const char *const kinds[] = {"mean", "median", NULL};
    ql_resample_kind kind = luaL_checkoption(L, 1, NULL, kinds) ? QL_RESAMPLE_MEDIAN : QL_RESAMPLE_MEAN;
    luaL_checktype(L, 2, LUA_TTABLE);
    lua_Integer count = luaL_len(L, 2), resamples = luaL_checkinteger(L, 3);
    lua_Integer seed = luaL_checkinteger(L, 4);
    luaL_argcheck(L, count >= 1 && count <= QL_RESAMPLE_LISTS, 2, "1, 2 or 4 lists");
    luaL_argcheck(L, resamples >= 1 && resamples <= QL_RESAMPLE_MAX, 3, "too few or too many resamples");
    const double *lists[QL_RESAMPLE_LISTS];
    int64_t n = 0;
    for (int l = 0; l < count; l++) {
        int64_t length;
        lua_geti(L, 2, l + 1);
        lists[l] = check_numbers(L, lua_gettop(L), &length);
        if (l > 0 && length != n) luaL_error(L, "lists of %I and %I values are not paired", n, length);
        n = length;
    }
    double *out = lua_newuserdatauv(L, (size_t)resamples * sizeof *out, 0);
    ql_err err;
    if (ql_resample_bootstrap(kind, lists, (int)count, n, resamples, seed, out, &err) != QL_OK)
        return qlua_fail(L, &err);
    lua_createtable(L, (int)resamples, 0);
    for (lua_Integer r = 0; r < resamples; r++) {
        lua_pushnumber(L, out[r]);
        lua_rawseti(L, -2, r + 1);
    }
    return 1;
}

/* sign_flips(values, draws, seed) -> assignments of signs whose sum is as far from 0, of how many, whether
 * those are all there are */
static int resample_sign_flips(lua_State *L)
{
    int64_t n, extreme, total;
    const double *values = check_numbers(L, 1, &n);
    lua_Integer draws = luaL_checkinteger(L, 2), seed = luaL_checkinteger(L, 3);
    luaL_argcheck(L, draws >= 1, 2, "at least one draw");
    ql_err err;
    if (ql_resample_sign_flips(values, n, draws, seed, &extreme, &total, &err) != QL_OK)
        return qlua_fail(L, &err);
    lua_pushinteger(L, extreme);
    lua_pushinteger(L, total);
    lua_pushboolean(L, n <= QL_RESAMPLE_EXACT);
    return 3;
}

void qlua_resample_open(lua_State *L)
{
    static const luaL_Reg functions[] = {
        {"bootstrap", resample_bootstrap}, {"sign_flips", resample_sign_flips}, {NULL, NULL}};
    luaL_newlib(L, functions);
    lua_setfield(L, -2, "resample");
}
