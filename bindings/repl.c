#include "repl.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include <lauxlib.h>

#include "chunk.h"
#include "interrupt.h"
#include "line.h"
#include "loader.h"

#define CHUNK_NAME "=stdin"

/* A prompt may be any value that tostring makes text of. It stays on the stack while it is shown. */
static qlua_line_status read_line(lua_State *L, const char *variable, const char *usual)
{
    const char *text;
    size_t length;
    int top = lua_gettop(L);
    if (lua_getglobal(L, variable) == LUA_TNIL) lua_pushstring(L, usual);
    const char *prompt = luaL_tolstring(L, -1, NULL);
    qlua_interrupt_at_prompt(true);
    qlua_line_status status = qlua_line_read(prompt, &text, &length);
    qlua_interrupt_at_prompt(false);
    lua_settop(L, top);
    if (status == QLUA_LINE_OK) lua_pushlstring(L, text, length);
    return status;
}

/* Load the text at stack index `at` as "return text". On success the function is pushed, else nothing. */
static bool load_expression(lua_State *L, int at)
{
    const char *statement = lua_pushfstring(L, "return %s", lua_tostring(L, at));
    bool loaded = qlua_loader_text(L, statement, strlen(statement), CHUNK_NAME) == LUA_OK;
    if (loaded)
        lua_remove(L, -2);
    else
        lua_pop(L, 2);
    return loaded;
}

/* The parser says so by naming the end of input as the place of the error. */
static bool is_incomplete(lua_State *L, int status)
{
    static const char mark[] = "<eof>";
    if (status != LUA_ERRSYNTAX) return false;
    size_t length;
    const char *message = lua_tolstring(L, -1, &length);
    size_t n = sizeof mark - 1;
    return length >= n && strcmp(message + length - n, mark) == 0;
}

/* Read a whole statement and load it; *status [OUT] is that of loading, with function or message on top of an
 * otherwise empty stack. */
static qlua_line_status read_statement(lua_State *L, int *status)
{
    lua_settop(L, 0);
    qlua_line_status got = read_line(L, "_PROMPT", "> ");
    if (got != QLUA_LINE_OK) return got;

    const char *first = lua_tostring(L, 1);
    bool asked = first[0] == '='; /* Lua 5.1's way to ask for a value */
    if (asked) {
        lua_pushfstring(L, "return %s", first + 1);
        lua_replace(L, 1);
    }
    *status = LUA_OK;
    if (asked || !load_expression(L, 1)) {
        for (;;) {
            size_t length;
            const char *text = lua_tolstring(L, 1, &length);
            *status = qlua_loader_text(L, text, length, CHUNK_NAME);
            if (!is_incomplete(L, *status)) break;
            lua_settop(L, 1);
            got = read_line(L, "_PROMPT2", ">> ");
            if (got == QLUA_LINE_INTERRUPTED) return got;
            if (got == QLUA_LINE_END) { /* the error of what is there */
                *status = qlua_loader_text(L, text, length, CHUNK_NAME);
                break;
            }
            lua_pushliteral(L, "\n");
            lua_insert(L, -2);
            lua_concat(L, 3);
        }
    }
    qlua_line_remember(lua_tostring(L, 1));
    lua_remove(L, 1);
    return QLUA_LINE_OK;
}

/* Push what shows results: a print that the program has put in place of Lua's, else the library's show, else
 * print. `plain` is Lua's print. */
static void push_printer(lua_State *L, lua_CFunction plain)
{
    lua_getglobal(L, "print");
    if (lua_tocfunction(L, -1) != plain) return;
    lua_getglobal(L, "require");
    lua_pushliteral(L, "qlua.repl");
    if (lua_pcall(L, 1, 1, 0) == LUA_OK && lua_istable(L, -1) &&
        lua_getfield(L, -1, "show") == LUA_TFUNCTION) {
        lua_replace(L, -3);
        lua_pop(L, 1);
    } else {
        lua_settop(L, lua_gettop(L) - 1);
    }
}

static void print_results(lua_State *L, lua_CFunction plain)
{
    int n = lua_gettop(L);
    if (n == 0) return;
    luaL_checkstack(L, 8, "too many results to print");
    int below = lua_gettop(L);
    push_printer(L, plain);
    lua_settop(L, below + 1);
    lua_insert(L, 1);
    if (lua_pcall(L, n, 0, 0) != LUA_OK) {
        const char *what = lua_tostring(L, -1);
        qlua_chunk_message(lua_pushfstring(L, "error calling 'print' (%s)", what ? what : "not a string"));
    }
}

void qlua_repl_run(lua_State *L)
{
    qlua_chunk_set_program(NULL); /* messages at the prompt need no name */
    lua_getglobal(L, "print");
    lua_CFunction plain = lua_tocfunction(L, -1);
    qlua_line_open();
    for (;;) {
        int status;
        qlua_line_status got = read_statement(L, &status);
        if (got == QLUA_LINE_END) break;
        if (got == QLUA_LINE_OK) {
            if (status == LUA_OK) status = qlua_chunk_call(L, 0, LUA_MULTRET);
            if (status == LUA_OK)
                print_results(L, plain);
            else
                qlua_chunk_report(L, status);
        }
        qlua_interrupt_clear();
    }
    lua_settop(L, 0);
    qlua_line_close();
    fputc('\n', stdout);
    fflush(stdout);
}
