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

/* Rows that a pass has seen, kept for those that go on from them. Its uservalue is the model's box. */
typedef struct {
    ql_kvcache cache;
    int calls; /* passes that read it and may call back into Lua: it is not closed under them */
} kvcache_box;

static kvcache_box *kvcache_check(lua_State *L, int arg)
{
    kvcache_box *box = luaL_checkudata(L, arg, QLUA_KVCACHE);
    if (!box->cache.sequences) luaL_argerror(L, arg, "the kept rows are closed");
    return box;
}

static int kvcache_close(lua_State *L)
{
    kvcache_box *box = luaL_checkudata(L, 1, QLUA_KVCACHE);
    if (box->calls > 0) return luaL_error(L, "kept rows cannot be closed in a pass that goes on from them");
    ql_kvcache_free(&box->cache);
    return 0;
}

/* #kept -> rows */
static int kvcache_len(lua_State *L)
{
    lua_pushinteger(L, kvcache_check(L, 1)->cache.sequences);
    return 1;
}

/* kept:tokens() -> tokens of each row, with those of the rows it went on from */
static int kvcache_tokens(lua_State *L)
{
    const ql_kvcache *c = &kvcache_check(L, 1)->cache;
    lua_createtable(L, c->sequences, 0);
    for (int i = 0; i < c->sequences; i++) {
        lua_pushinteger(L, c->length[i]);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

void qlua_forward_open(lua_State *L)
{
    static const luaL_Reg methods[] = {{"tokens", kvcache_tokens}, {NULL, NULL}};
    static const luaL_Reg meta[] = {{"__len", kvcache_len}, {NULL, NULL}};
    qlua_box_type(L, QLUA_KVCACHE, methods, meta, kvcache_close);
}

/* The rows that a pass goes on from. */
typedef struct {
    kvcache_box *box; /* NULL: none */
    int *from;        /* [rows] the kept row under each row */
} origin;

/* opts.after and opts.parents; pushes what must stay on the stack. */
static origin check_origin(lua_State *L, int arg, int model, const qlua_rows *r)
{
    origin o = {NULL, NULL};
    if (lua_isnoneornil(L, arg)) return o;
    bool parents = lua_getfield(L, arg, "parents") != LUA_TNIL;
    if (lua_getfield(L, arg, "after") == LUA_TNIL) {
        if (parents) luaL_error(L, "option 'parents' goes with option 'after'");
        return o;
    }
    if (!luaL_testudata(L, -1, QLUA_KVCACHE))
        luaL_error(L, "option 'after' is a %s, not rows kept by a forward pass", luaL_typename(L, -1));
    int kept = lua_gettop(L), list = kept - 1;
    o.box = kvcache_check(L, kept);
    lua_getiuservalue(L, kept, 1);
    if (!lua_rawequal(L, -1, model)) luaL_error(L, "option 'after' holds rows of another model");
    lua_pop(L, 1);
    int count = o.box->cache.sequences;
    if (!parents && count != 1 && count != r->rows)
        luaL_error(L,
                   "option 'after' holds %d rows: 'parents' must say which of them each of %d rows follows",
                   count, r->rows);
    if (parents && (lua_type(L, list) != LUA_TTABLE || (int)lua_rawlen(L, list) != r->rows))
        luaL_error(L, "option 'parents' has not one number for each of %d rows", r->rows);
    o.from = lua_newuserdatauv(L, (size_t)(r->rows ? r->rows : 1) * sizeof *o.from, 0);
    for (int i = 0; i < r->rows; i++) {
        o.from[i] = count == 1 ? 0 : i;
        if (!parents) continue;
        int isint;
        lua_rawgeti(L, list, i + 1);
        lua_Integer n = lua_tointegerx(L, -1, &isint);
        if (!isint || n < 1 || n > count)
            luaL_error(L, "entry %d of option 'parents' is %s, not a row from 1 to %d", i + 1,
                       luaL_tolstring(L, -1, NULL), count);
        o.from[i] = (int)n - 1;
        lua_pop(L, 1);
    }
    return o;
}

/* A cache for the rows with what they go on from in it. */
static ql_status make_cache(ql_llama *m, const qlua_rows *r, const origin *o, const int32_t *capacity,
                            ql_kvcache *out, ql_err *err)
{
    QL_TRY(ql_llama_cache(m, r->rows, capacity, out, err));
    for (int i = 0; i < r->rows && o->box; i++) {
        QL_TRY(ql_kvcache_copy(&o->box->cache, o->from[i], out, i, err));
    }
    return QL_OK;
}

/* model:forward(rows, {rows=, trace=, after=, parents=, keep=}) -> logits, and with `keep` the rows */
int qlua_model_forward(lua_State *L)
{
    static const char *const known[] = {"rows", "trace", "after", "parents", "keep", NULL};
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
    origin o = check_origin(L, 3, 1, &r);
    int32_t *capacity = lua_newuserdatauv(L, (size_t)(r.rows ? r.rows : 1) * sizeof *capacity, 0);
    for (int i = 0; i < r.rows; i++) {
        int64_t tokens = (int64_t)r.lengths[i] + (o.box ? o.box->cache.length[o.from[i]] : 0);
        capacity[i] = tokens > INT32_MAX ? INT32_MAX : (int32_t)tokens; /* beyond any context: refused */
    }
    bool keep = qlua_option_boolean(L, 3, "keep", false);

    int64_t outputs = 0;
    for (int i = 0; i < r.rows; i++) outputs += r.outputs[i] > 0 ? r.outputs[i] : 0;
    qlua_pressure(L, (size_t)(outputs * m->config.vocab) * sizeof(float));
    ql_tensor *logits = qlua_tensor_push(L);
    kvcache_box *kept = qlua_box_push(L, QLUA_KVCACHE, sizeof *kept);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    int top = lua_gettop(L);
    ql_batch batch = {r.rows, r.ids, r.lengths, r.outputs, NULL};
    ql_trace trace = {run_trace, &cb};
    ql_err err;
    ql_status status;
    int tries = 0;
    do {
        self->calls++;
        self->passing = true;
        if (o.box) o.box->calls++;
        status = make_cache(m, &r, &o, capacity, &kept->cache, &err);
        if (status == QL_OK)
            status = ql_llama_forward(m, &kept->cache, &batch, traced ? &trace : NULL, logits, &err);
        if (!keep || status != QL_OK) ql_kvcache_free(&kept->cache);
        if (o.box) o.box->calls--;
        self->passing = false;
        self->calls--;
        if (cb.raised) return lua_error(L);
    } while (!traced && qlua_retry(L, status, &tries)); /* a trace must not see a layer twice */
    if (status != QL_OK) return qlua_fail(L, &err);
    lua_settop(L, top);
    if (keep) return 2;
    lua_pop(L, 1);
    return 1;
}
