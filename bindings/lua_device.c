/* qlua.device: an open device, its memory and its clock. */
#include "lua_box.h"
#include "process.h"

#include <string.h>

typedef struct {
    ql_device *dev; /* one reference */
} device_box;

ql_device *qlua_device_check(lua_State *L, int arg)
{
    device_box *box = luaL_checkudata(L, arg, QLUA_DEVICE);
    if (!box->dev) luaL_argerror(L, arg, "the device is closed");
    return box->dev;
}

static int device_close(lua_State *L)
{
    device_box *box = luaL_checkudata(L, 1, QLUA_DEVICE);
    ql_device_release(box->dev);
    box->dev = NULL;
    return 0;
}

/* core.device(name, {threads=}) -> device, or nil and an error */
static int device_open(lua_State *L)
{
    static const char *const known[] = {"threads", NULL};
    const char *name = luaL_optstring(L, 1, "auto");
    qlua_options_check(L, 2, known);
    lua_Integer threads = qlua_option_integer(L, 2, "threads", 0, 0, 4096);
    device_box *box = qlua_box_push(L, QLUA_DEVICE, sizeof *box);
    ql_err err;
    if (ql_device_open(name, &(ql_device_options){.threads = (int)threads}, &box->dev, &err) == QL_OK)
        return 1;
    return qlua_push_err(L, &err);
}

static const char host_key = 0;

ql_device *qlua_device_host(lua_State *L)
{
    if (lua_rawgetp(L, LUA_REGISTRYINDEX, &host_key) == LUA_TUSERDATA) {
        device_box *box = lua_touserdata(L, -1);
        lua_pop(L, 1);
        if (box->dev) return box->dev;
    } else {
        lua_pop(L, 1);
    }
    device_box *box = qlua_box_push(L, QLUA_DEVICE, sizeof *box);
    ql_err err;
    if (ql_device_open("cpu", &(ql_device_options){.threads = 1}, &box->dev, &err) != QL_OK)
        luaL_error(L, "%s", err.message);
    lua_rawsetp(L, LUA_REGISTRYINDEX, &host_key);
    return box->dev;
}

static int device_info(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    ql_device_info info;
    ql_err err;
    if (dev->backend->info(dev->ctx, &info, &err) != QL_OK) return qlua_fail(L, &err);
    lua_createtable(L, 0, 6);
    lua_pushstring(L, dev->label);
    lua_setfield(L, -2, "name");
    lua_pushstring(L, info.name);
    lua_setfield(L, -2, "hardware");
    lua_pushstring(L, info.isa);
    lua_setfield(L, -2, "isa");
    lua_pushinteger(L, info.threads);
    lua_setfield(L, -2, "threads");
    lua_pushinteger(L, (lua_Integer)info.memory_total);
    lua_setfield(L, -2, "memory_total");
    lua_pushinteger(L, (lua_Integer)info.memory_free);
    lua_setfield(L, -2, "memory_free");
    return 1;
}

/* device:memory() -> {total, free, process, process_peak} in bytes; process is resident memory */
static int device_memory(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    ql_device_info info;
    ql_err err;
    if (dev->backend->info(dev->ctx, &info, &err) != QL_OK) return qlua_fail(L, &err);
    ql_process_memory process = ql_process_memory_read();
    lua_createtable(L, 0, 4);
    lua_pushinteger(L, (lua_Integer)info.memory_total);
    lua_setfield(L, -2, "total");
    lua_pushinteger(L, (lua_Integer)info.memory_free);
    lua_setfield(L, -2, "free");
    lua_pushinteger(L, (lua_Integer)process.resident);
    lua_setfield(L, -2, "process");
    lua_pushinteger(L, (lua_Integer)process.peak);
    lua_setfield(L, -2, "process_peak");
    return 1;
}

/* device:reset_peak() -> true when the kernel lets the process reset its resident peak */
static int device_reset_peak(lua_State *L)
{
    qlua_device_check(L, 1);
    lua_pushboolean(L, ql_process_reset_peak());
    return 1;
}

static int device_sync(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    ql_err err;
    return dev->backend->sync(dev->ctx, &err) == QL_OK ? 0 : qlua_fail(L, &err);
}

static int device_tostring(lua_State *L)
{
    device_box *box = luaL_checkudata(L, 1, QLUA_DEVICE);
    lua_pushfstring(L, "device %s", box->dev ? box->dev->label : "(closed)");
    return 1;
}

void qlua_device_open(lua_State *L)
{
    static const luaL_Reg methods[] = {{"info", device_info},
                                       {"memory", device_memory},
                                       {"reset_peak", device_reset_peak},
                                       {"sync", device_sync},
                                       {NULL, NULL}};
    static const luaL_Reg meta[] = {{"__tostring", device_tostring}, {NULL, NULL}};
    qlua_box_type(L, QLUA_DEVICE, methods, meta, device_close);
    lua_pushcfunction(L, device_open);
    lua_setfield(L, -2, "device");
}
