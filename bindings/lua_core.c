/* qlua.core: the C side of the library. scripts/qlua/init.lua builds the documented module on it. */
#include "hub.h"
#include "lua_box.h"
#include "lua_core.h"
#include "mem.h"

/* core.resolve(model) -> the folder or file a --model argument means, or nil and an error */
static int core_resolve(lua_State *L)
{
    const char *model = luaL_checkstring(L, 1);
    char *path;
    ql_err err;
    if (ql_hub_resolve(model, &path, &err) != QL_OK) return qlua_push_err(L, &err);
    lua_pushstring(L, path);
    ql_free(path);
    return 1;
}

/* core.hub_cache() -> the Hugging Face cache folder, or nil and an error */
static int core_hub_cache(lua_State *L)
{
    char *path;
    ql_err err;
    if (ql_hub_cache(&path, &err) != QL_OK) return qlua_push_err(L, &err);
    lua_pushstring(L, path);
    ql_free(path);
    return 1;
}

static int core_methods(lua_State *L)
{
    static const char *const names[] = {"tensor", "device", "model", "checkpoint", NULL};
    static const char *const types[] = {QLUA_TENSOR, QLUA_DEVICE, QLUA_MODEL, QLUA_CHECKPOINT};
    luaL_getmetatable(L, types[luaL_checkoption(L, 1, NULL, names)]);
    lua_getfield(L, -1, "__index");
    return 1;
}

int luaopen_qlua_core(lua_State *L)
{
    static const luaL_Reg functions[] = {
        {"resolve", core_resolve}, {"hub_cache", core_hub_cache}, {"methods", core_methods}, {NULL, NULL}};
    luaL_newlib(L, functions);
    lua_pushliteral(L, QLUA_VERSION);
    lua_setfield(L, -2, "version");
    qlua_tensor_open(L);
    qlua_device_open(L);
    qlua_model_open(L);
    qlua_checkpoint_open(L);
    qlua_metrics_open(L);
    qlua_resample_open(L);
    return 1;
}
