#include "paths.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lualib.h>

static bool is_folder(const char *path)
{
    struct stat s;
    return stat(path, &s) == 0 && S_ISDIR(s.st_mode);
}

void qlua_paths_find(qlua_paths *paths)
{
    static const char *const places[] = {"share", "../share"};
    char executable[PATH_MAX];
    paths->share[0] = '\0';

    ssize_t n = readlink("/proc/self/exe", executable, sizeof executable - 1);
    if (n <= 0) return;
    executable[n] = '\0';
    char *slash = strrchr(executable, '/');
    if (!slash) return;
    slash[1] = '\0';

    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        char probe[PATH_MAX + 32];
        int length = snprintf(probe, sizeof probe, "%s%s/qlua", executable, places[i]);
        if (length < 0 || length >= PATH_MAX || !is_folder(probe)) continue;
        probe[length - (int)strlen("/qlua")] = '\0';
        memcpy(paths->share, probe, strlen(probe) + 1);
        return;
    }
}

/* ';' and '?' have a meaning in package.path and no escape: such a folder cannot be put there. */
static void add_folder(luaL_Buffer *b, const char *folder, size_t length)
{
    if (memchr(folder, ';', length) || memchr(folder, '?', length)) return;
    static const char *const patterns[] = {"?.lua;", "?/init.lua;"};
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++) {
        luaL_addlstring(b, folder, length);
        luaL_addchar(b, '/');
        luaL_addstring(b, patterns[i]);
    }
}

void qlua_paths_extend(const qlua_paths *paths, lua_State *L, const char *script)
{
    lua_getglobal(L, LUA_LOADLIBNAME);
    luaL_Buffer b;
    luaL_buffinit(L, &b);
    if (paths->share[0]) add_folder(&b, paths->share, strlen(paths->share));
    if (script) {
        const char *slash = strrchr(script, '/');
        if (slash)
            add_folder(&b, script, (size_t)(slash - script));
        else
            add_folder(&b, ".", 1);
    }
    luaL_pushresult(&b);
    lua_getfield(L, -2, "path");
    lua_concat(L, 2);
    lua_setfield(L, -2, "path");
    lua_pop(L, 1);
}

const char *qlua_paths_command(const qlua_paths *paths, lua_State *L, const char *name)
{
    static const char *const commands[] = {"compare", "doctor", "report"};
    bool known = false;
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) known |= strcmp(name, commands[i]) == 0;
    if (!known || !paths->share[0] || access(name, F_OK) == 0) return NULL;

    const char *path = lua_pushfstring(L, "%s/qlua/commands/%s.lua", paths->share, name);
    if (access(path, R_OK) == 0) return path;
    lua_pop(L, 1);
    return NULL;
}
