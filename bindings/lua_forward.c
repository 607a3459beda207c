/* model:forward: logits of rows of token ids, and a trace of what led to them. */
#include "lua_model.h"

#include <string.h>

qlua_rows qlua_rows_check(lua_State *L, int arg)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    qlua_rows r = {1, NULL, NULL, NULL};
    bool single = lua_rawgeti(L, arg, 1) != LUA_TTABLE;
    lua_pop(L, 1);
    lua_Unsigned n = single ? 1 : lua_rawlen(L, arg);
    if (n > 1 << 20) luaL_argerror(L, arg, "too many rows");
    r.rows = (int)n;
    r.lengths = lua_newuserdatauv(L, n * sizeof *r.lengths, 0);
    r.outputs = lua_newuserdatauv(L, n * sizeof *r.outputs, 0);
    if (single) {
        r.ids = qlua_check_ids(L, arg, r.lengths);
        return r;
    }
    size_t total = 0;
    for (int i = 0; i < r.rows; i++) {
        if (lua_rawgeti(L, arg, i + 1) != LUA_TTABLE)
            luaL_argerror(
                L, arg,
                lua_pushfstring(L, "row %d is a %s, not a table of ids", i + 1, luaL_typename(L, -1)));
        total += (size_t)lua_rawlen(L, -1);
        lua_pop(L, 1);
    }
    r.ids = lua_newuserdatauv(L, (total ? total : 1) * sizeof *r.ids, 0);
    size_t at = 0;
    for (int i = 0; i < r.rows; i++) {
        lua_rawgeti(L, arg, i + 1);
        const int32_t *ids = qlua_check_ids(L, lua_gettop(L), &r.lengths[i]);
        memcpy(r.ids + at, ids, (size_t)r.lengths[i] * sizeof *ids);
        at += (size_t)r.lengths[i];
        lua_pop(L, 2);
    }
    return r;
}

/* opts.rows: "last", "all", or the number of trailing logits for each row. */
static void check_outputs(lua_State *L, int arg, qlua_rows *r)
{
    int type = lua_isnoneornil(L, arg) ? LUA_TNIL : lua_getfield(L, arg, "rows");
    const char *mode = type == LUA_TNIL ? "all" : type == LUA_TSTRING ? lua_tostring(L, -1) : NULL;
    bool last = mode && strcmp(mode, "last") == 0;
    if (mode && !last && strcmp(mode, "all") != 0)
        luaL_error(L, "option 'rows' is '%s', not \"last\", \"all\" or a table of counts", mode);
    if (!mode && (type != LUA_TTABLE || (int)lua_rawlen(L, -1) != r->rows))
        luaL_error(L, "option 'rows' has not one count for each of %d rows", r->rows);
    for (int i = 0; i < r->rows; i++) {
        r->outputs[i] = last ? 1 : r->lengths[i];
        if (mode) continue;
        int isint;
        lua_rawgeti(L, -1, i + 1);
        lua_Integer count = lua_tointegerx(L, -1, &isint);
        if (!isint || count < 0 || count > r->lengths[i])
            luaL_error(L, "entry %d of option 'rows' is %s, not a count from 0 to the row's %d tokens", i + 1,
                       luaL_tolstring(L, -1, NULL), r->lengths[i]);
        r->outputs[i] = (int32_t)count;
        lua_pop(L, 1);
    }
}

/* Runs protected: (function, const char *name, ql_tensor*). */
static int ask_trace(lua_State *L)
{
    const ql_tensor *value = lua_touserdata(L, 3);
    lua_pop(L, 1);
    lua_pushstring(L, lua_touserdata(L, 2)); /* may raise: not before the call is protected */
    lua_replace(L, 2);
    qlua_pressure(L, ql_tensor_bytes(value));
    ql_tensor *copy = qlua_tensor_push(L);
    ql_err err;
    ql_status status = ql_tensor_new(ql_tensor_device(value), NULL, QL_MEM_ACTIVATIONS, value->dtype,
                                     value->ndim, value->shape, copy, &err);
    size_t bytes = ql_tensor_bytes(value);
    void *buffer = lua_newuserdatauv(L, bytes, 0);
    if (status == QL_OK) status = ql_tensor_download(value, buffer, bytes, &err);
    if (status == QL_OK) status = ql_tensor_upload(copy, buffer, bytes, &err);
    if (status != QL_OK) return luaL_error(L, "%s", err.message);
    lua_pop(L, 1);
    lua_call(L, 2, 0);
    return 0;
}

static ql_status run_trace(void *ud, const char *name, const ql_tensor *value, ql_err *err)
{
    qlua_callback *cb = ud;
    lua_pushcfunction(cb->L, ask_trace);
    lua_pushvalue(cb->L, cb->fn);
    lua_pushlightuserdata(cb->L, (void *)(uintptr_t)name);
    lua_pushlightuserdata(cb->L, (void *)(uintptr_t)value);
    return qlua_callback_run(cb, 3, 0) ? QL_OK : ql_err_set(err, QL_ERR_ARG, "the trace raised an error");
}

/* model:forward(rows, {rows=, trace=}) -> logits */
int qlua_model_forward(lua_State *L)
{
    static const char *const known[] = {"rows", "trace", NULL};
    qlua_model_box *self = qlua_model_box_free(L, 1);
    ql_llama *m = self->model;
    lua_settop(L, 3);
    qlua_options_check(L, 3, known);
    qlua_callback cb = {L, 4, false};
    if (lua_isnil(L, 3))
        lua_pushnil(L);
    else
        lua_getfield(L, 3, "trace");
    bool traced = !lua_isnil(L, 4);
    if (traced && !lua_isfunction(L, 4)) return luaL_error(L, "option 'trace' is not a function");
    qlua_rows r = qlua_rows_check(L, 2);
    for (int i = 0; i < r.rows; i++) {
        if (r.lengths[i] < 1) return luaL_error(L, "row %d has no tokens", i + 1);
    }
    check_outputs(L, 3, &r);
    luaL_checkstack(L, 16, NULL);

    int64_t outputs = 0;
    for (int i = 0; i < r.rows; i++) outputs += r.outputs[i] > 0 ? r.outputs[i] : 0;
    qlua_pressure(L, (size_t)(outputs * m->config.vocab) * sizeof(float));
    ql_tensor *logits = qlua_tensor_push(L);
    int box = lua_gettop(L);
    ql_batch batch = {r.rows, r.ids, r.lengths, r.outputs, NULL};
    ql_trace trace = {run_trace, &cb};
    ql_err err;
    ql_status status;
    int tries = 0;
    do {
        ql_kvcache cache = {0};
        self->calls++;
        self->passing = true;
        status = ql_llama_cache(m, r.rows, r.lengths, &cache, &err);
        if (status == QL_OK)
            status = ql_llama_forward(m, &cache, &batch, traced ? &trace : NULL, logits, &err);
        ql_kvcache_free(&cache);
        self->passing = false;
        self->calls--;
        if (cb.raised) return lua_error(L);
    } while (!traced && qlua_retry(L, status, &tries)); /* a trace must not see a layer twice */
    if (status != QL_OK) return qlua_fail(L, &err);
    lua_settop(L, box);
    return 1;
}
