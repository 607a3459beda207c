/* qlua.device: an open device, its memory and its clock. */
#include "lua_box.h"
#include "plugin.h"
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

static const char *const numerics_names[] = {
    [QL_NUMERICS_FAST] = "fast", [QL_NUMERICS_INVARIANT] = "invariant", NULL};

/* The option "numerics"; fast kernels when it is absent. */
static ql_numerics option_numerics(lua_State *L, int arg)
{
    const char *word = qlua_option_string(L, arg, "numerics", numerics_names[QL_NUMERICS_FAST]);
    for (int i = 0; numerics_names[i]; i++) {
        if (strcmp(word, numerics_names[i]) == 0) return (ql_numerics)i;
    }
    luaL_error(L, "option 'numerics' is '%s', not fast or invariant", word);
    return QL_NUMERICS_FAST;
}

/* core.device(name, {threads=, numerics=}) -> device, or nil and an error */
static int device_open(lua_State *L)
{
    static const char *const known[] = {"threads", "numerics", NULL};
    const char *name = luaL_optstring(L, 1, "auto");
    qlua_options_check(L, 2, known);
    lua_Integer threads = qlua_option_integer(L, 2, "threads", 0, 0, 4096);
    ql_device_options options = {.threads = (int)threads, .numerics = option_numerics(L, 2)};
    device_box *box = qlua_box_push(L, QLUA_DEVICE, sizeof *box);
    ql_err err;
    if (ql_device_open(name, &options, &box->dev, &err) == QL_OK) return 1;
    return qlua_push_err(L, &err);
}

/* core.cuda() -> {count, loaded, plugin (its file; nil: none), missing (an error table, where count is 0)} */
static int device_cuda(lua_State *L)
{
    ql_err why = {.code = QL_ERR_DEVICE, .message = "no CUDA device"};
    const ql_backend *backend = ql_backend_find("cuda", &why);
    int count = backend ? backend->count(&why) : 0;
    const char *path = ql_plugin_cuda_path();
    lua_createtable(L, 0, 4);
    lua_pushinteger(L, count);
    lua_setfield(L, -2, "count");
    lua_pushboolean(L, backend != NULL);
    lua_setfield(L, -2, "loaded");
    if (path[0]) {
        lua_pushstring(L, path);
        lua_setfield(L, -2, "plugin");
    }
    if (count > 0) return 1;
    qlua_push_err_table(L, &why);
    lua_setfield(L, -2, "missing");
    return 1;
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

static void set_text(lua_State *L, const char *key, const char *value)
{
    if (!*value) return;
    lua_pushstring(L, value);
    lua_setfield(L, -2, key);
}

static void set_size(lua_State *L, const char *key, size_t value)
{
    lua_pushinteger(L, (lua_Integer)value);
    lua_setfield(L, -2, key);
}

/* A counter that is below zero where it is not known. */
static void set_counter(lua_State *L, const char *key, double value)
{
    if (value < 0) return;
    lua_pushnumber(L, value);
    lua_setfield(L, -2, key);
}

/* device:info() -> {name, hardware, isa, numerics, memory_total, memory_free}; on the CPU also threads, on
 * CUDA driver and, where they are known, clock_mhz, neighbours, energy_joules and throttled_seconds */
static int device_info(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    ql_device_info info;
    ql_err err;
    if (dev->backend->info(dev->ctx, &info, &err) != QL_OK) return qlua_fail(L, &err);
    lua_createtable(L, 0, 9);
    set_text(L, "name", dev->label);
    set_text(L, "hardware", info.name);
    set_text(L, "isa", info.isa);
    set_text(L, "driver", info.driver);
    set_text(L, "numerics", numerics_names[info.numerics]);
    set_size(L, "memory_total", info.memory_total);
    set_size(L, "memory_free", info.memory_free);
    if (info.threads > 0) set_size(L, "threads", (size_t)info.threads);
    if (info.clock_mhz > 0) set_size(L, "clock_mhz", (size_t)info.clock_mhz);
    if (info.neighbours >= 0) set_size(L, "neighbours", (size_t)info.neighbours);
    set_counter(L, "energy_joules", info.energy_joules);
    set_counter(L, "throttled_seconds", info.throttled_seconds);
    return 1;
}

/* device:memory() -> {total, free, process, process_peak} in bytes. On the CPU process is resident memory; on
 * another device what this process holds of it, nil where that is not known, and no peak is kept. */
static int device_memory(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    ql_device_info info;
    ql_err err;
    if (dev->backend->info(dev->ctx, &info, &err) != QL_OK) return qlua_fail(L, &err);
    lua_createtable(L, 0, 4);
    set_size(L, "total", info.memory_total);
    set_size(L, "free", info.memory_free);
    if (dev->backend != &ql_backend_cpu) {
        if (info.memory_process) set_size(L, "process", info.memory_process);
        return 1;
    }
    ql_process_memory process = ql_process_memory_read();
    set_size(L, "process", process.resident);
    set_size(L, "process_peak", process.peak);
    return 1;
}

/* device:kernels() -> names of the product and attention kernels that ran since the last call */
static int device_kernels(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    char names[4096] = "";
    if (dev->backend->kernels) dev->backend->kernels(dev->ctx, names, sizeof names);
    lua_newtable(L);
    const char *at = names;
    for (lua_Integer i = 1; *at; i++) {
        size_t length = strcspn(at, ",");
        lua_pushlstring(L, at, length);
        lua_rawseti(L, -2, i);
        at += length;
        at += strspn(at, ", ");
    }
    return 1;
}

/* device:ceiling(bytes) -> {read_bytes_per_second, flops_per_second, matrix_flops_per_second}, measured now;
 * what the device does not have is nil */
static int device_ceiling(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    lua_Integer bytes = luaL_optinteger(L, 2, 0);
    if (bytes != 0 && bytes < 16 << 20) luaL_argerror(L, 2, "less than 16 MiB measure caches");
    ql_ceiling ceiling = {0};
    ql_err err;
    if (!dev->backend->ceiling) {
        ql_err_set(&err, QL_ERR_UNSUPPORTED, "the %s backend cannot measure its ceiling", dev->backend->name);
        return qlua_fail(L, &err);
    }
    if (dev->backend->ceiling(dev->ctx, (size_t)bytes, &ceiling, &err) != QL_OK) return qlua_fail(L, &err);
    const struct {
        const char *name;
        double value;
    } fields[] = {{"read_bytes_per_second", ceiling.read_bytes_per_second},
                  {"flops_per_second", ceiling.flops_per_second},
                  {"matrix_flops_per_second", ceiling.matrix_flops_per_second}};
    lua_createtable(L, 0, 3);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        if (fields[i].value <= 0) continue;
        lua_pushnumber(L, fields[i].value);
        lua_setfield(L, -2, fields[i].name);
    }
    return 1;
}

/* device:reset_peak() -> true when there is a process_peak and the kernel lets the process reset it */
static int device_reset_peak(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    lua_pushboolean(L, dev->backend == &ql_backend_cpu && ql_process_reset_peak());
    return 1;
}

/* device:sync() -> true once everything queued has finished, or nil and an error */
static int device_sync(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    ql_err err;
    if (dev->backend->sync(dev->ctx, &err) != QL_OK) return qlua_fail(L, &err);
    lua_pushboolean(L, true);
    return 1;
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
                                       {"kernels", device_kernels},
                                       {"ceiling", device_ceiling},
                                       {"reset_peak", device_reset_peak},
                                       {"sync", device_sync},
                                       {NULL, NULL}};
    static const luaL_Reg meta[] = {{"__tostring", device_tostring}, {NULL, NULL}};
    qlua_box_type(L, QLUA_DEVICE, methods, meta, device_close);
    lua_pushcfunction(L, device_open);
    lua_setfield(L, -2, "device");
    lua_pushcfunction(L, device_cuda);
    lua_setfield(L, -2, "cuda");
}
