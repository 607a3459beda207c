/* The qlua binary: the Lua 5.4 interpreter, with this project's modules in reach of `require`.
 *
 * Options, LUA_INIT, arg, exit codes and messages are those of the stand-alone lua (manual, section 7).
 * Added: the library and the script's folder on package.path (paths.h), subcommands, Ctrl-C in every
 * coroutine (interrupt.h), no bytecode (loader.h).
 */
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lua.h>
#include <lualib.h>

#include "chunk.h"
#include "interrupt.h"
#include "loader.h"
#include "options.h"
#include "paths.h"
#include "qlua_modules.h"
#include "repl.h"
#include "../core/interrupt.h"

#define PROGRAM "qlua"
#define INIT_VERSIONED "LUA_INIT_" LUA_VERSION_MAJOR "_" LUA_VERSION_MINOR

enum { EXIT_INTERRUPTED = 130 };

typedef struct {
    int argc;
    char **argv;
    qlua_options options;
    int exit_code;
} run_state;

static void print_version(void)
{
    printf("%s; qlua %s\n", LUA_COPYRIGHT, QLUA_VERSION);
    fflush(stdout);
}

/* Run the loaded chunk on top, or report that it did not load. */
static int finish_chunk(lua_State *L, int load_status)
{
    int status = load_status == LUA_OK ? qlua_chunk_call(L, 0, 0) : load_status;
    return qlua_chunk_report(L, status);
}

static int run_text(lua_State *L, const char *text, const char *name)
{
    return finish_chunk(L, qlua_loader_text(L, text, strlen(text), name));
}

static int run_file(lua_State *L, const char *path)
{
    return finish_chunk(L, qlua_loader_file(L, path));
}

static int run_init(lua_State *L)
{
    const char *name = "=" INIT_VERSIONED;
    const char *init = getenv(INIT_VERSIONED);
    if (!init) {
        name = "=LUA_INIT";
        init = getenv("LUA_INIT");
    }
    if (!init) return LUA_OK;
    return init[0] == '@' ? run_file(L, init + 1) : run_text(L, init, name);
}

/* -l mod, -l global=mod. Without a name of its own the global is the module's name up to a "-": "-l
 * socket-v2" gives the global socket, as Lua's loader drops such a version mark too. */
static int run_require(lua_State *L, const char *argument)
{
    const char *equals = strchr(argument, '=');
    const char *module = equals ? equals + 1 : argument;
    const char *dash = equals ? NULL : strchr(argument, '-');
    if (equals)
        lua_pushlstring(L, argument, (size_t)(equals - argument));
    else if (dash)
        lua_pushlstring(L, argument, (size_t)(dash - argument));
    else
        lua_pushstring(L, argument);

    lua_getglobal(L, "require");
    lua_pushstring(L, module);
    int status = qlua_chunk_call(L, 1, 1);
    if (status != LUA_OK) {
        lua_remove(L, -2);
        return qlua_chunk_report(L, status);
    }
    lua_pushglobaltable(L);
    lua_insert(L, -3); /* globals, name, module */
    lua_settable(L, -3);
    lua_pop(L, 1);
    return LUA_OK;
}

static int run_options(lua_State *L, const run_state *run)
{
    int index = 1;
    const char *argument = NULL;
    for (int option; (option = qlua_options_next(&run->options, run->argv, &index, &argument)) != 0;) {
        int status = LUA_OK;
        if (option == 'e')
            status = run_text(L, argument, "=(command line)");
        else if (option == 'l')
            status = run_require(L, argument);
        else
            lua_warning(L, "@on", 0);
        if (status != LUA_OK) return status;
    }
    return LUA_OK;
}

/* The global arg: the script at 0, its arguments from 1, the interpreter and its options below 0. */
static void make_arg(lua_State *L, const run_state *run)
{
    int script = run->options.script;
    lua_createtable(L, run->argc - script, script + 1);
    for (int i = 0; i < run->argc; i++) {
        lua_pushstring(L, run->argv[i]);
        lua_rawseti(L, -2, i - script);
    }
    lua_setglobal(L, "arg");
}

static int push_script_arguments(lua_State *L)
{
    if (lua_getglobal(L, "arg") != LUA_TTABLE) return luaL_error(L, "'arg' is not a table");
    lua_Integer n = luaL_len(L, -1);
    luaL_checkstack(L, (int)n + 4, "too many arguments to script");
    int table = lua_gettop(L);
    for (int i = 1; i <= (int)n; i++) lua_rawgeti(L, table, i);
    lua_remove(L, table);
    return (int)n;
}

static int run_script(lua_State *L, const qlua_paths *paths, const run_state *run)
{
    int index = run->options.script;
    const char *name = run->argv[index];
    bool dashes = strcmp(run->argv[index - 1], "--") == 0;
    const char *path = name;
    int kept = 0;
    if (strcmp(name, "-") == 0 && !dashes) {
        path = NULL; /* standard input */
    } else {
        const char *command = qlua_paths_command(paths, L, name);
        if (command) {
            path = command;
            kept = 1;
        }
    }
    int status = qlua_loader_file(L, path);
    if (kept) lua_remove(L, -2);
    if (status == LUA_OK) {
        int n = push_script_arguments(L);
        status = qlua_chunk_call(L, n, 0);
    }
    return qlua_chunk_report(L, status);
}

static void open_libraries(lua_State *L)
{
    luaL_openlibs(L);
    qlua_loader_open(L);
    qlua_interrupt_open(L);
    luaL_getsubtable(L, LUA_REGISTRYINDEX, LUA_PRELOAD_TABLE);
    luaL_setfuncs(L, qlua_modules, 0);
    lua_pop(L, 1);
}

/* Everything that may raise an error. Leaves EXIT_FAILURE in run->exit_code unless it gets to the end. */
static int run_all(lua_State *L)
{
    run_state *run = lua_touserdata(L, 1);
    const qlua_options *options = &run->options;
    qlua_paths paths;

    if (options->version) print_version();
    if (options->no_environment) {
        lua_pushboolean(L, 1);
        lua_setfield(L, LUA_REGISTRYINDEX, "LUA_NOENV");
    }
    open_libraries(L);
    make_arg(L, run);
    qlua_paths_find(&paths);
    bool from_stdin = options->script && strcmp(run->argv[options->script], "-") == 0;
    qlua_paths_extend(&paths, L, options->script && !from_stdin ? run->argv[options->script] : NULL);

    if (!options->no_environment && run_init(L) != LUA_OK) return 0;
    if (run_options(L, run) != LUA_OK) return 0;
    if (options->script && run_script(L, &paths, run) != LUA_OK) return 0;

    if (options->interactive) {
        qlua_repl_run(L);
    } else if (!options->script && !options->statements && !options->version) {
        if (isatty(STDIN_FILENO)) {
            print_version();
            qlua_repl_run(L);
        } else if (run_file(L, NULL) != LUA_OK) {
            return 0;
        }
    }
    run->exit_code = EXIT_SUCCESS;
    return 0;
}

int main(int argc, char **argv)
{
    const char *program = argc > 0 && argv[0][0] ? argv[0] : PROGRAM;
    qlua_chunk_set_program(program);
    signal(SIGXFSZ, SIG_IGN); /* a file at the limit of its size is an error like a full disk, not the end */

    run_state run = {.argc = argc, .argv = argv, .exit_code = EXIT_FAILURE};
    run.options = qlua_options_parse(argc, argv);
    if (run.options.bad) {
        qlua_options_usage(&run.options, argv, program);
        return EXIT_FAILURE;
    }

    lua_State *L = luaL_newstate();
    if (!L) {
        qlua_chunk_message("cannot create the Lua state: not enough memory");
        return EXIT_FAILURE;
    }
    lua_pushcfunction(L, run_all);
    lua_pushlightuserdata(L, &run);
    qlua_chunk_report(L, lua_pcall(L, 1, 0, 0));
    if (ql_interrupted()) run.exit_code = EXIT_INTERRUPTED;
    qlua_interrupt_close();
    lua_close(L);
    /* A result that did not reach its reader is a failure: a full disk, a closed pipe. */
    if ((fflush(stdout) != 0 || ferror(stdout)) && run.exit_code == EXIT_SUCCESS) {
        qlua_chunk_message("cannot write to standard output");
        return EXIT_FAILURE;
    }
    return run.exit_code;
}
