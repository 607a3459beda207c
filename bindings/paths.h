/* Where the binary's own Lua files are, and what is put on package.path for them. */
#ifndef QLUA_PATHS_H
#define QLUA_PATHS_H

#include <limits.h>
#include <lua.h>

typedef struct {
    char share[PATH_MAX]; /* folder that holds qlua/; "" when there is none */
} qlua_paths;

/* Look for share/qlua beside the executable, then for ../share/qlua. */
void qlua_paths_find(qlua_paths *paths);

/* Put the library, then the script's own folder (script NULL: none), in front of package.path. */
void qlua_paths_extend(const qlua_paths *paths, lua_State *L, const char *script);

/* `name` names a subcommand, no file of that name is in the way and its file exists: that file's path is
 * pushed and returned. Otherwise NULL, and nothing is pushed. */
const char *qlua_paths_command(const qlua_paths *paths, lua_State *L, const char *name);

#endif
