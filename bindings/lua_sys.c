/* qlua.sys: the few things of the operating system that Lua's own library lacks. */
#include "clock.h"
#include "lua_core.h"
#include "lua_common.h"
#include "process.h"
#include "sha256.h"

#include <errno.h>
#include <fcntl.h>
#include <lauxlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* sys.time() -> monotonic seconds */
static int sys_time(lua_State *L)
{
    lua_pushnumber(L, ql_clock_seconds());
    return 1;
}

/* sys.now() -> seconds since 1970, with their fraction */
static int sys_now(lua_State *L)
{
    lua_pushnumber(L, ql_clock_unix());
    return 1;
}

/* sys.isatty(fd) -> boolean */
static int sys_isatty(lua_State *L)
{
    lua_pushboolean(L, isatty((int)luaL_checkinteger(L, 1)));
    return 1;
}

/* sys.columns(fd) -> width of the terminal, or nil */
static int sys_columns(lua_State *L)
{
    struct winsize size;
    if (ioctl((int)luaL_checkinteger(L, 1), TIOCGWINSZ, &size) != 0 || size.ws_col == 0) return 0;
    lua_pushinteger(L, size.ws_col);
    return 1;
}

static int io_error(lua_State *L, const char *what, const char *path)
{
    ql_err err;
    ql_err_set(&err, QL_ERR_IO, "%s: %s: %s", path, what, strerror(errno));
    return qlua_push_err(L, &err);
}

/* sys.rename(from, to) -> true, or nil and an error; replaces `to` in one step */
static int sys_rename(lua_State *L)
{
    const char *from = luaL_checkstring(L, 1), *to = luaL_checkstring(L, 2);
    if (rename(from, to) != 0) return io_error(L, "cannot rename to it", to);
    lua_pushboolean(L, 1);
    return 1;
}

/* sys.fsync(path) -> true, or nil and an error; the bytes of a file or the names of a folder are on the disk
 */
static int sys_fsync(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return io_error(L, "cannot open", path);
    int failed = fsync(fd);
    int saved = errno;
    close(fd);
    errno = saved;
    if (failed) return io_error(L, "cannot write to the disk", path);
    lua_pushboolean(L, 1);
    return 1;
}

/* sys.pid() -> this process's number */
static int sys_pid(lua_State *L)
{
    lua_pushinteger(L, getpid());
    return 1;
}

/* sys.memory() -> resident bytes, peak of resident bytes */
static int sys_memory(lua_State *L)
{
    ql_process_memory m = ql_process_memory_read();
    lua_pushinteger(L, (lua_Integer)m.resident);
    lua_pushinteger(L, (lua_Integer)m.peak);
    return 2;
}

/* sys.sha256(text) -> 64 hexadecimal digits */
static int sys_sha256(lua_State *L)
{
    size_t size;
    const char *text = luaL_checklstring(L, 1, &size);
    char hex[QL_SHA256_HEX];
    ql_err err;
    if (ql_sha256_of(text, size, hex, &err) != QL_OK) return luaL_error(L, "%s", err.message);
    lua_pushstring(L, hex);
    return 1;
}

int luaopen_qlua_sys(lua_State *L)
{
    static const luaL_Reg functions[] = {
        {"time", sys_time},     {"now", sys_now},     {"isatty", sys_isatty}, {"columns", sys_columns},
        {"rename", sys_rename}, {"fsync", sys_fsync}, {"pid", sys_pid},       {"memory", sys_memory},
        {"sha256", sys_sha256}, {NULL, NULL}};
    luaL_newlib(L, functions);
    return 1;
}
