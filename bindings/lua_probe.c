/* qlua.probe: the ceilings of this machine, for benchmarks. */
#include "cpu_probe.h"
#include "lua_box.h"
#include "lua_common.h"
#include "qlua_modules.h"

#include <lauxlib.h>

/* probe.cpu({threads=, bytes=, rounds=}) -> {isa, threads, read_bytes_per_second, flops_per_second}, or nil
 * and an error */
static int probe_cpu(lua_State *L)
{
    static const char *const known[] = {"threads", "bytes", "rounds", NULL};
    lua_settop(L, 1);
    qlua_options_check(L, 1, known);
    int threads = (int)qlua_option_integer(L, 1, "threads", 0, 0, 1024);
    size_t bytes =
        (size_t)qlua_option_integer(L, 1, "bytes", 256 << 20, 16 << 20, (lua_Integer)(PTRDIFF_MAX / 2));
    int rounds = (int)qlua_option_integer(L, 1, "rounds", 3, 1, 1000);
    ql_cpu_ceiling ceiling;
    ql_err err;
    if (ql_cpu_probe(threads, bytes, rounds, &ceiling, &err) != QL_OK) return qlua_push_err(L, &err);
    lua_createtable(L, 0, 4);
    lua_pushstring(L, ceiling.isa);
    lua_setfield(L, -2, "isa");
    lua_pushinteger(L, ceiling.threads);
    lua_setfield(L, -2, "threads");
    lua_pushnumber(L, ceiling.read_bytes_per_second);
    lua_setfield(L, -2, "read_bytes_per_second");
    lua_pushnumber(L, ceiling.flops_per_second);
    lua_setfield(L, -2, "flops_per_second");
    return 1;
}

int luaopen_qlua_probe(lua_State *L)
{
    static const luaL_Reg functions[] = {{"cpu", probe_cpu}, {NULL, NULL}};
    luaL_newlib(L, functions);
    return 1;
}
