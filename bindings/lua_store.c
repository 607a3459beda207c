/* qlua.store: the results store (core/store.h). */
#include "lua_box.h"
#include "qlua_modules.h"
#include "store.h"

#include <math.h>
#include <string.h>

#define STORE_META "qlua.store"

typedef struct {
    ql_store *store; /* NULL when closed */
} store_box;

static ql_store *check(lua_State *L)
{
    store_box *box = luaL_checkudata(L, 1, STORE_META);
    if (!box->store) luaL_argerror(L, 1, "the store is closed");
    return box->store;
}

/* The string at `index`, which has no NUL inside; `what` names it when it is not. */
static const char *text_at(lua_State *L, int index, const char *what)
{
    size_t size;
    if (lua_type(L, index) != LUA_TSTRING)
        luaL_error(L, "%s is a %s, not a string", what, luaL_typename(L, index));
    const char *text = lua_tolstring(L, index, &size);
    if (strlen(text) != size) luaL_error(L, "%s has a NUL character in it", what);
    return text;
}

static double number_at(lua_State *L, int index, const char *what)
{
    int isnum;
    double value = lua_tonumberx(L, index, &isnum);
    if (!isnum || !isfinite(value)) luaL_error(L, "%s is not a finite number", what);
    return value;
}

/* Field `key` of the table at `arg`; the table keeps the string alive. NULL when it is nil and may be. */
static const char *field(lua_State *L, int arg, const char *key, bool optional)
{
    const char *text = NULL;
    if (lua_getfield(L, arg, key) != LUA_TNIL || !optional) text = text_at(L, -1, key);
    lua_pop(L, 1);
    return text;
}

static double number_field(lua_State *L, int arg, const char *key)
{
    lua_getfield(L, arg, key);
    double value = number_at(L, -1, key);
    lua_pop(L, 1);
    return value;
}

static int answer(lua_State *L, ql_status status, const ql_err *err)
{
    if (status != QL_OK) return qlua_fail(L, err);
    lua_pushboolean(L, 1);
    return 1;
}

static int store_close(lua_State *L)
{
    store_box *box = luaL_checkudata(L, 1, STORE_META);
    ql_store_close(box->store);
    box->store = NULL;
    return 0;
}

/* store.open(path, {readonly=, wait=}) -> store, or nil and an error */
static int store_open(lua_State *L)
{
    static const char *const known[] = {"readonly", "wait", NULL};
    const char *path = text_at(L, 1, "path");
    qlua_options_check(L, 2, known);
    bool readonly = qlua_option_boolean(L, 2, "readonly", false);
    double wait = qlua_option_number(L, 2, "wait", 10);
    if (wait < 0) return luaL_error(L, "option 'wait' is negative");
    store_box *box = qlua_box_push(L, STORE_META, sizeof *box);
    ql_err err;
    return ql_store_open(path, readonly, wait, &box->store, &err) == QL_OK ? 1 : qlua_fail(L, &err);
}

static int store_path(lua_State *L)
{
    lua_pushstring(L, ql_store_path(check(L)));
    return 1;
}

/* --- runs ------------------------------------------------------------------------------------------------
 */

static int store_begin_run(lua_State *L)
{
    static const char *const known[] = {"name", "started", "command", "script_sha256", NULL};
    ql_store *store = check(L);
    luaL_checktype(L, 2, LUA_TTABLE);
    qlua_options_check(L, 2, known);
    ql_store_run run = {.name = field(L, 2, "name", false),
                        .started = number_field(L, 2, "started"),
                        .command = field(L, 2, "command", false),
                        .script_sha256 = field(L, 2, "script_sha256", true)};
    int64_t id;
    ql_err err;
    if (ql_store_begin_run(store, &run, &id, &err) != QL_OK) return qlua_fail(L, &err);
    lua_pushinteger(L, id);
    return 1;
}

static int store_end_run(lua_State *L)
{
    static const char *const known[] = {"finished", "status", "document", NULL};
    ql_store *store = check(L);
    int64_t run = luaL_checkinteger(L, 2);
    luaL_checktype(L, 3, LUA_TTABLE);
    qlua_options_check(L, 3, known);
    double finished = number_field(L, 3, "finished");
    const char *name = field(L, 3, "status", false), *document = field(L, 3, "document", true);
    ql_err err;
    return answer(L, ql_store_end_run(store, run, finished, name, document, &err), &err);
}

static void set_text(lua_State *L, const char *key, const char *text)
{
    if (!text) return;
    lua_pushstring(L, text);
    lua_setfield(L, -2, key);
}

static void set_number(lua_State *L, const char *key, double value)
{
    lua_pushnumber(L, value);
    lua_setfield(L, -2, key);
}

static void push_run(lua_State *L, const ql_store_run *run)
{
    lua_createtable(L, 0, 10);
    lua_pushinteger(L, run->id);
    lua_setfield(L, -2, "id");
    lua_pushinteger(L, run->pid);
    lua_setfield(L, -2, "pid");
    lua_pushboolean(L, run->alive);
    lua_setfield(L, -2, "alive");
    set_text(L, "name", run->name);
    set_text(L, "status", run->status);
    set_number(L, "started", run->started);
    if (run->finished != 0) set_number(L, "finished", run->finished);
    set_text(L, "command", run->command);
    set_text(L, "script_sha256", run->script_sha256);
    set_text(L, "document", run->document);
}

/* store:runs(key or nil) */
static int store_runs(lua_State *L)
{
    ql_store *store = check(L);
    const char *key = lua_isnoneornil(L, 2) ? NULL : text_at(L, 2, "key");
    ql_store_run run;
    ql_err err;
    ql_status status = key ? ql_store_find_set_runs(store, key, &err) : ql_store_find_runs(store, &err);
    if (status != QL_OK) return qlua_fail(L, &err);
    lua_newtable(L);
    for (lua_Integer i = 1;; i++) {
        if (ql_store_next_run(store, &run, &err) != QL_OK) return qlua_fail(L, &err);
        if (!run.id) return 1;
        push_run(L, &run);
        lua_rawseti(L, -2, i);
    }
}

static int store_run(lua_State *L)
{
    ql_store *store = check(L);
    ql_store_run run;
    ql_err err;
    if (ql_store_find_run(store, luaL_checkinteger(L, 2), &run, &err) != QL_OK) return qlua_fail(L, &err);
    push_run(L, &run);
    return 1;
}

/* --- sets and rows ---------------------------------------------------------------------------------------
 */

static int store_set(lua_State *L)
{
    ql_store *store = check(L);
    const char *key = text_at(L, 2, "key"), *name = text_at(L, 3, "name"), *inputs = text_at(L, 4, "inputs");
    ql_err err;
    return answer(L, ql_store_set_add(store, key, name, inputs, &err), &err);
}

static int store_sets(lua_State *L)
{
    ql_store *store = check(L);
    const char *name = text_at(L, 2, "name");
    ql_store_set set;
    ql_err err;
    lua_newtable(L);
    if (ql_store_find_sets(store, name, &err) != QL_OK) return qlua_fail(L, &err);
    for (lua_Integer i = 1;; i++) {
        if (ql_store_next_set(store, &set, &err) != QL_OK) return qlua_fail(L, &err);
        if (!set.key) return 1;
        lua_createtable(L, 0, 3);
        set_text(L, "key", set.key);
        set_text(L, "inputs", set.inputs);
        set_number(L, "created", set.created);
        lua_rawseti(L, -2, i);
    }
}

static int store_rows(lua_State *L)
{
    ql_store *store = check(L);
    const char *key = text_at(L, 2, "key");
    ql_store_row row;
    ql_err err;
    lua_newtable(L);
    if (ql_store_find_rows(store, key, &err) != QL_OK) return qlua_fail(L, &err);
    for (lua_Integer count = 0;; count++) {
        if (ql_store_next_row(store, &row, &err) != QL_OK) return qlua_fail(L, &err);
        if (!row.id) {
            lua_pushinteger(L, count);
            return 2;
        }
        set_text(L, row.id, row.value);
    }
}

static int store_run_rows(lua_State *L)
{
    ql_store *store = check(L);
    int64_t run = luaL_checkinteger(L, 2);
    const char *key = text_at(L, 3, "key");
    ql_store_row row;
    ql_err err;
    lua_newtable(L);
    if (ql_store_find_run_rows(store, run, key, &err) != QL_OK) return qlua_fail(L, &err);
    for (lua_Integer i = 1;; i++) {
        if (ql_store_next_row(store, &row, &err) != QL_OK) return qlua_fail(L, &err);
        if (!row.id) return 1;
        lua_createtable(L, 2, 0);
        lua_pushstring(L, row.id);
        lua_rawseti(L, -2, 1);
        lua_pushstring(L, row.value);
        lua_rawseti(L, -2, 2);
        lua_rawseti(L, -2, i);
    }
}

/* The strings stay alive: their tables are arguments, and nothing of Lua runs before core has them. */
static int store_put(lua_State *L)
{
    ql_store *store = check(L);
    int64_t run = luaL_checkinteger(L, 2);
    const char *key = text_at(L, 3, "key");
    luaL_checktype(L, 4, LUA_TTABLE);
    size_t n = lua_rawlen(L, 4);
    ql_store_row *rows = lua_newuserdatauv(L, (n ? n : 1) * sizeof *rows, 0);
    for (size_t i = 0; i < n; i++) {
        if (lua_rawgeti(L, 4, (lua_Integer)i + 1) != LUA_TTABLE)
            return luaL_error(L, "row %d is a %s, not { id, value }", (int)i + 1, luaL_typename(L, -1));
        lua_rawgeti(L, -1, 1);
        rows[i].id = text_at(L, -1, "a row's id");
        lua_rawgeti(L, -2, 2);
        rows[i].value = text_at(L, -1, "a row's value");
        lua_pop(L, 3);
    }
    ql_err err;
    return answer(L, ql_store_put(store, run, key, rows, n, &err), &err);
}

static int store_use(lua_State *L)
{
    ql_store *store = check(L);
    int64_t run = luaL_checkinteger(L, 2);
    const char *key = text_at(L, 3, "key");
    luaL_checktype(L, 4, LUA_TTABLE);
    size_t n = lua_rawlen(L, 4);
    const char **ids = lua_newuserdatauv(L, (n ? n : 1) * sizeof *ids, 0);
    for (size_t i = 0; i < n; i++) {
        lua_rawgeti(L, 4, (lua_Integer)i + 1);
        ids[i] = text_at(L, -1, "a row's id");
        lua_pop(L, 1);
    }
    ql_err err;
    return answer(L, ql_store_use(store, run, key, ids, n, &err), &err);
}

/* store:sha256(path) -> hex, or nil and an error; raises at Ctrl-C */
static int store_sha256(lua_State *L)
{
    ql_store *store = check(L);
    const char *path = text_at(L, 2, "path");
    char hex[QL_SHA256_HEX];
    ql_err err;
    if (ql_store_sha256(store, path, hex, &err) != QL_OK) return qlua_fail(L, &err);
    lua_pushstring(L, hex);
    return 1;
}

static int store_tostring(lua_State *L)
{
    const store_box *box = luaL_checkudata(L, 1, STORE_META);
    lua_pushfstring(L, "store %s", box->store ? ql_store_path(box->store) : "(closed)");
    return 1;
}

int luaopen_qlua_store(lua_State *L)
{
    static const luaL_Reg methods[] = {{"path", store_path},
                                       {"begin_run", store_begin_run},
                                       {"end_run", store_end_run},
                                       {"runs", store_runs},
                                       {"run", store_run},
                                       {"set", store_set},
                                       {"sets", store_sets},
                                       {"rows", store_rows},
                                       {"put", store_put},
                                       {"use", store_use},
                                       {"run_rows", store_run_rows},
                                       {"sha256", store_sha256},
                                       {NULL, NULL}};
    static const luaL_Reg meta[] = {{"__tostring", store_tostring}, {NULL, NULL}};
    static const luaL_Reg functions[] = {{"open", store_open}, {NULL, NULL}};
    qlua_box_type(L, STORE_META, methods, meta, store_close);
    luaL_newlib(L, functions);
    return 1;
}
