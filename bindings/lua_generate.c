/* model:_generate: prefill and decode a batch of prompts. */
#include "generate.h"
#include "lua_model.h"

typedef struct {
    ql_generated result;
} generated_box;

static int generated_close(lua_State *L)
{
    generated_box *box = luaL_checkudata(L, 1, "qlua.generated");
    ql_generated_free(&box->result);
    return 0;
}

static bool run_on_token(void *ud, int row, int32_t id)
{
    qlua_callback *cb = ud;
    if (cb->raised) return true;
    lua_pushvalue(cb->L, cb->fn);
    lua_pushinteger(cb->L, row + 1);
    lua_pushinteger(cb->L, id);
    if (!qlua_callback_run(cb, 2, 1)) return true;
    bool stop = lua_toboolean(cb->L, -1);
    lua_pop(cb->L, 1);
    return stop;
}

/* Push {ids = {...}, stop = "..."} of one row. */
static void push_row(lua_State *L, const ql_generated *g, int row)
{
    lua_createtable(L, 0, 2);
    lua_createtable(L, (int)g->counts[row], 0);
    for (int64_t i = 0; i < g->counts[row]; i++) {
        lua_pushinteger(L, g->ids[row][i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "ids");
    lua_pushstring(L, ql_stop_name(g->stops[row]));
    lua_setfield(L, -2, "stop");
}

/* model:_generate({{id, ...}, ...}, {max_new_tokens=, temperature=, top_k=, top_p=, seed=, stop_ids=,
 * streams=, on_token=}) -> {{ids=, stop=}, ...}, {prefill_seconds=, ...} */
int qlua_model_generate(lua_State *L)
{
    static const char *const known[] = {"max_new_tokens", "temperature", "top_k",    "top_p", "seed",
                                        "stop_ids",       "streams",     "on_token", NULL};
    qlua_model_box *self = qlua_model_box_free(L, 1);
    lua_settop(L, 3);
    luaL_checktype(L, 3, LUA_TTABLE);
    qlua_options_check(L, 3, known);
    qlua_callback cb = {L, 4, false};
    lua_getfield(L, 3, "on_token"); /* 4 */
    qlua_rows r = qlua_rows_check(L, 2);
    const int32_t **prompts = lua_newuserdatauv(L, (size_t)(r.rows ? r.rows : 1) * sizeof *prompts, 0);
    size_t at = 0;
    for (int i = 0; i < r.rows; i++) {
        prompts[i] = r.ids + at;
        at += (size_t)r.lengths[i];
    }
    ql_generate_options options = {
        .max_new_tokens = qlua_option_integer(L, 3, "max_new_tokens", 256, 1, INT32_MAX),
        .sampling = {.temperature = qlua_option_number(L, 3, "temperature", 0),
                     .top_k = qlua_option_integer(L, 3, "top_k", 0, 0, INT32_MAX),
                     .top_p = qlua_option_number(L, 3, "top_p", 1),
                     .seed = (uint64_t)qlua_option_integer(L, 3, "seed", 1, LUA_MININTEGER, LUA_MAXINTEGER)},
        .on_token = lua_isnil(L, 4) ? NULL : run_on_token,
        .ud = &cb};
    if (lua_getfield(L, 3, "stop_ids") != LUA_TNIL)
        options.stop_ids = qlua_check_ids(L, lua_gettop(L), &options.stop_count);
    uint64_t *streams = NULL;
    if (lua_getfield(L, 3, "streams") != LUA_TNIL) {
        if (lua_type(L, -1) != LUA_TTABLE || (int)lua_rawlen(L, -1) != r.rows)
            return luaL_error(L, "option 'streams' has not one number for each of %d rows", r.rows);
        int table = lua_gettop(L);
        streams = lua_newuserdatauv(L, (size_t)(r.rows ? r.rows : 1) * sizeof *streams, 0);
        for (int i = 0; i < r.rows; i++) {
            lua_rawgeti(L, table, i + 1);
            int isint;
            streams[i] = (uint64_t)lua_tointegerx(L, -1, &isint);
            if (!isint) return luaL_error(L, "entry %d of option 'streams' is not an integer", i + 1);
            lua_pop(L, 1);
        }
    }
    luaL_checkstack(L, 16, NULL);
    generated_box *box = qlua_box_push(L, "qlua.generated", sizeof *box);
    ql_generated *g = &box->result;
    ql_err err;
    ql_status status;
    int tries = 0;
    do {
        self->calls++;
        status = ql_generate(self->model, r.rows, prompts, r.lengths, streams, &options, g, &err);
        self->calls--;
        if (cb.raised) return lua_error(L);
    } while (!options.on_token && qlua_retry(L, status, &tries));
    if (status != QL_OK) return qlua_fail(L, &err);
    lua_createtable(L, g->rows, 0);
    for (int i = 0; i < g->rows; i++) {
        push_row(L, g, i);
        lua_rawseti(L, -2, i + 1);
    }
    lua_createtable(L, 0, 5);
    lua_pushnumber(L, g->prefill_seconds);
    lua_setfield(L, -2, "prefill_seconds");
    lua_pushnumber(L, g->decode_seconds);
    lua_setfield(L, -2, "decode_seconds");
    lua_pushinteger(L, g->prompt_tokens);
    lua_setfield(L, -2, "prompt_tokens");
    lua_pushinteger(L, g->decode_tokens);
    lua_setfield(L, -2, "decode_tokens");
    lua_pushinteger(L, g->decode_steps);
    lua_setfield(L, -2, "decode_steps");
    ql_generated_free(g);
    return 2;
}

void qlua_generate_open(lua_State *L)
{
    static const luaL_Reg methods[] = {{NULL, NULL}};
    qlua_box_type(L, "qlua.generated", methods, NULL, generated_close);
}
