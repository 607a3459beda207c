/* qlua.model: a Llama model, its forward pass, generation and quantized twin.
 *
 * Methods whose name starts with an underscore are the primitives that scripts/qlua/model.lua builds the
 * documented ones on.
 */
#include "generate.h"
#include "hub.h"
#include "lua_box.h"
#include "mem.h"

#include <string.h>

typedef struct {
    ql_llama *model;
    int calls;    /* running calls that may call back into Lua: the model is not closed under them */
    bool passing; /* one of them is inside a forward pass: no second pass in its working memory */
} model_box;

static model_box *check_box(lua_State *L, int arg)
{
    model_box *box = luaL_checkudata(L, arg, QLUA_MODEL);
    if (!box->model) luaL_argerror(L, arg, "the model is closed");
    return box;
}

/* The open model at `arg`, for a forward pass. */
static model_box *check_free(lua_State *L, int arg)
{
    model_box *box = check_box(L, arg);
    if (box->passing) luaL_error(L, "the model is in the middle of a forward pass");
    return box;
}

ql_llama *qlua_model_check(lua_State *L, int arg)
{
    return check_box(L, arg)->model;
}

static int model_close(lua_State *L)
{
    model_box *box = luaL_checkudata(L, 1, QLUA_MODEL);
    if (box->calls > 0) return luaL_error(L, "a model cannot be closed from its own callback");
    ql_llama_free(box->model);
    box->model = NULL;
    return 0;
}

/* --- callbacks into Lua: they run protected, so that an error does not jump over core's frames
 * ----------------- */

typedef struct {
    lua_State *L;
    int fn;      /* stack index of the Lua function */
    bool raised; /* the error is on top of the stack */
} callback;

/* Call the function whose arguments have been pushed after it; on an error it stays on the stack. */
static bool protected_call(callback *cb, int nargs, int nresults)
{
    if (lua_pcall(cb->L, nargs, nresults, 0) == LUA_OK) return true;
    cb->raised = true;
    return false;
}

/* --- loading ---------------------------------------------------------------------------------------------
 */

static bool dtype_option(lua_State *L, int arg, ql_dtype *out)
{
    const char *name = qlua_option_string(L, arg, "dtype", "auto");
    *out = QL_DTYPE_COUNT;
    if (strcmp(name, "auto") == 0) return true;
    return ql_dtype_parse(name, out) && ql_dtype_is_weight(*out);
}

/* core.load(device, folder, {dtype=, max_context=}) -> model, or nil and an error */
static int model_load(lua_State *L)
{
    static const char *const known[] = {"dtype", "max_context", NULL};
    ql_device *dev = qlua_device_check(L, 1);
    const char *folder = luaL_checkstring(L, 2);
    qlua_options_check(L, 3, known);
    ql_load_options options;
    if (!dtype_option(L, 3, &options.dtype))
        return luaL_error(L, "option 'dtype' is not auto, float32, float16 or bfloat16");
    options.max_context = qlua_option_integer(L, 3, "max_context", 0, 1, INT32_MAX);
    qlua_pressure(L, 0);
    model_box *box = qlua_box_push(L, QLUA_MODEL, sizeof *box);
    ql_err err;
    int tries = 0;
    ql_status status;
    do {
        status = ql_llama_load(dev, folder, &options, &box->model, &err);
    } while (qlua_retry(L, status, &tries));
    return status == QL_OK ? 1 : qlua_fail(L, &err);
}

static double field_number(lua_State *L, int arg, const char *key, double preset)
{
    return qlua_option_number(L, arg, key, preset);
}

static int64_t field_size(lua_State *L, int arg, const char *key, int64_t preset)
{
    return qlua_option_integer(L, arg, key, preset, 0, INT32_MAX);
}

static bool apply_policy(void *ud, const char *name, int64_t n, int64_t k, ql_quant_spec *spec, ql_err *err);

/* core.load_random(device, shape, dtype, seed, policy or nil) -> model; shape has the fields of ql_config */
static int model_random(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    luaL_checktype(L, 2, LUA_TTABLE);
    ql_dtype dtype;
    const char *type = luaL_checkstring(L, 3);
    luaL_argcheck(L, ql_dtype_parse(type, &dtype) && ql_dtype_is_weight(dtype), 3,
                  "dtype is not float32, float16 or bfloat16");
    lua_Integer seed = luaL_optinteger(L, 4, 1);
    ql_config c = {
        .hidden = field_size(L, 2, "hidden", 0),
        .intermediate = field_size(L, 2, "intermediate", 0),
        .layers = field_size(L, 2, "layers", 0),
        .heads = field_size(L, 2, "heads", 0),
        .kv_heads = field_size(L, 2, "kv_heads", 0),
        .head_dim = field_size(L, 2, "head_dim", 0),
        .vocab = field_size(L, 2, "vocab", 0),
        .max_positions = field_size(L, 2, "max_context", 2048),
        .rms_eps = field_number(L, 2, "rms_eps", 1e-5),
        .rope = {.type = QL_ROPE_NONE, .theta = field_number(L, 2, "rope_theta", 10000), .factor = 1},
        .tie_embeddings = qlua_option_boolean(L, 2, "tied", false),
        .bos = -1};
    strcpy(c.architecture, "LlamaForCausalLM");
    if (c.hidden < 1 || c.intermediate < 1 || c.layers < 1 || c.heads < 1 || c.kv_heads < 1 || c.vocab < 1 ||
        c.heads % c.kv_heads != 0 || c.head_dim < 2 || c.head_dim % 2 != 0)
        return luaL_argerror(L, 2, "not the shape of a Llama model");
    callback cb = {L, 5, false};
    bool policy = !lua_isnoneornil(L, 5);
    if (policy) luaL_checktype(L, 5, LUA_TFUNCTION);
    qlua_pressure(L, 0);
    luaL_checkstack(L, 16, NULL);
    model_box *box = qlua_box_push(L, QLUA_MODEL, sizeof *box);
    ql_err err;
    ql_status status =
        ql_llama_random(dev, &c, dtype, (uint64_t)seed, policy ? apply_policy : NULL, &cb, &box->model, &err);
    if (cb.raised) return lua_error(L);
    return status == QL_OK ? 1 : qlua_fail(L, &err);
}

/* --- quantization ----------------------------------------------------------------------------------------
 */

static bool codebook(lua_State *L, int spec, double code[16])
{
    if (lua_getfield(L, spec, "codebook") == LUA_TNIL) {
        lua_pop(L, 1);
        return false;
    }
    if (lua_type(L, -1) != LUA_TTABLE || lua_rawlen(L, -1) != 16)
        luaL_error(L, "option 'codebook' is not a table of 16 numbers");
    for (int i = 0; i < 16; i++) {
        int isnum;
        lua_rawgeti(L, -1, i + 1);
        code[i] = lua_tonumberx(L, -1, &isnum);
        if (!isnum) luaL_error(L, "entry %d of option 'codebook' is not a number", i + 1);
        lua_pop(L, 1);
    }
    lua_pop(L, 1);
    return true;
}

/* Runs protected: (function, name, n, k, ql_quant_spec*) -> whether to quantize. */
static int ask_policy(lua_State *L)
{
    static const char *const known[] = {"scheme", "codebook", "block", "double", "dtype", NULL};
    ql_quant_spec *spec = lua_touserdata(L, 5);
    lua_settop(L, 4);
    lua_call(L, 3, 1);
    if (!lua_toboolean(L, 1)) {
        lua_pushboolean(L, false);
        return 1;
    }
    luaL_argcheck(L, lua_istable(L, 1), 1, "a policy returns a table or nil");
    qlua_options_check(L, 1, known);
    ql_err err;
    double code[16];
    ql_status status = codebook(L, 1, code)
                           ? ql_quant_spec_codebook(code, spec, &err)
                           : ql_quant_spec_init(qlua_option_string(L, 1, "scheme", "nf4"), spec, &err);
    if (status != QL_OK) return qlua_fail(L, &err);
    spec->block = (int)qlua_option_integer(L, 1, "block", spec->block, 1, 1 << 20);
    spec->double_quant = qlua_option_boolean(L, 1, "double", spec->double_quant);
    if (!dtype_option(L, 1, &spec->value_dtype)) return luaL_error(L, "option 'dtype' is not a float type");
    if (ql_quant_spec_check(spec, &err) != QL_OK) return luaL_error(L, "%s", err.message);
    lua_pushboolean(L, true);
    return 1;
}

static bool apply_policy(void *ud, const char *name, int64_t n, int64_t k, ql_quant_spec *spec, ql_err *err)
{
    callback *cb = ud;
    lua_State *L = cb->L;
    lua_pushcfunction(L, ask_policy);
    lua_pushvalue(L, cb->fn);
    lua_pushstring(L, name);
    lua_pushinteger(L, n);
    lua_pushinteger(L, k);
    lua_pushlightuserdata(L, spec);
    if (!protected_call(cb, 5, 1)) {
        ql_err_set(err, QL_ERR_ARG, "the policy raised an error");
        return false;
    }
    bool wanted = lua_toboolean(L, -1);
    lua_pop(L, 1);
    return wanted;
}

/* model:_quantize(policy) -> the twin; policy(name, rows, columns) returns a table of scheme options, or nil
 */
static int model_quantize(lua_State *L)
{
    model_box *full = check_box(L, 1);
    luaL_checktype(L, 2, LUA_TFUNCTION);
    callback cb = {L, 2, false};
    qlua_pressure(L, 0);
    model_box *box = qlua_box_push(L, QLUA_MODEL, sizeof *box);
    luaL_checkstack(L, 16, NULL);
    ql_err err;
    full->calls++;
    ql_status status = ql_llama_quantize(full->model, apply_policy, &cb, &box->model, &err);
    full->calls--;
    if (cb.raised) return lua_error(L);
    return status == QL_OK ? 1 : qlua_fail(L, &err);
}

/* model:save(folder, {force=}) -> true, or nil and an error */
static int model_save(lua_State *L)
{
    static const char *const known[] = {"force", "shard_bytes", NULL};
    const ql_llama *m = qlua_model_check(L, 1);
    const char *folder = luaL_checkstring(L, 2);
    qlua_options_check(L, 3, known);
    ql_save_options options = {.force = qlua_option_boolean(L, 3, "force", false),
                               .shard_bytes =
                                   (uint64_t)qlua_option_integer(L, 3, "shard_bytes", 0, 0, INT64_MAX)};
    ql_err err;
    if (ql_llama_save(m, folder, &options, &err) != QL_OK) return qlua_fail(L, &err);
    lua_pushboolean(L, true);
    return 1;
}

/* --- forward ---------------------------------------------------------------------------------------------
 */

/* The rows of a call, in buffers that the stack owns. */
typedef struct {
    int rows;
    int32_t *ids, *lengths, *outputs;
} rows_arg;

/* {id, ...} or {{id, ...}, ...} at `arg`. */
static rows_arg check_rows(lua_State *L, int arg)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    rows_arg r = {1, NULL, NULL, NULL};
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
static void check_outputs(lua_State *L, int arg, rows_arg *r)
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

/* Runs protected: (function, name, ql_tensor*). */
static int ask_trace(lua_State *L)
{
    const ql_tensor *value = lua_touserdata(L, 3);
    lua_pop(L, 1);
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
    callback *cb = ud;
    lua_pushcfunction(cb->L, ask_trace);
    lua_pushvalue(cb->L, cb->fn);
    lua_pushstring(cb->L, name);
    lua_pushlightuserdata(cb->L, (void *)(uintptr_t)value);
    return protected_call(cb, 3, 0) ? QL_OK : ql_err_set(err, QL_ERR_ARG, "the trace raised an error");
}

/* model:forward(rows, {rows=, trace=}) -> logits */
static int model_forward(lua_State *L)
{
    static const char *const known[] = {"rows", "trace", NULL};
    model_box *self = check_free(L, 1);
    ql_llama *m = self->model;
    lua_settop(L, 3);
    qlua_options_check(L, 3, known);
    callback cb = {L, 4, false};
    if (lua_isnil(L, 3))
        lua_pushnil(L);
    else
        lua_getfield(L, 3, "trace");
    bool traced = !lua_isnil(L, 4);
    if (traced && !lua_isfunction(L, 4)) return luaL_error(L, "option 'trace' is not a function");
    rows_arg r = check_rows(L, 2);
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
    } while (qlua_retry(L, status, &tries));
    if (status != QL_OK) return qlua_fail(L, &err);
    lua_settop(L, box);
    return 1;
}

/* --- generation ------------------------------------------------------------------------------------------
 */

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
    callback *cb = ud;
    if (cb->raised) return true;
    lua_pushvalue(cb->L, cb->fn);
    lua_pushinteger(cb->L, row + 1);
    lua_pushinteger(cb->L, id);
    if (!protected_call(cb, 2, 1)) return true;
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
static int model_generate(lua_State *L)
{
    static const char *const known[] = {"max_new_tokens", "temperature", "top_k",    "top_p", "seed",
                                        "stop_ids",       "streams",     "on_token", NULL};
    model_box *self = check_free(L, 1);
    lua_settop(L, 3);
    luaL_checktype(L, 3, LUA_TTABLE);
    qlua_options_check(L, 3, known);
    callback cb = {L, 4, false};
    lua_getfield(L, 3, "on_token"); /* 4 */
    rows_arg r = check_rows(L, 2);
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

/* --- what a model says of itself -------------------------------------------------------------------------
 */

static void set_integer(lua_State *L, const char *key, int64_t value)
{
    lua_pushinteger(L, value);
    lua_setfield(L, -2, key);
}

/* model:_matrices() -> {{name=, rows=, columns=, scheme= or nil, block=, double=, dtype=, bytes=, shared=},
 * ...} */
static int model_matrices(lua_State *L)
{
    const ql_llama *m = qlua_model_check(L, 1);
    const ql_weights *w = &m->weights;
    lua_newtable(L);
    lua_Integer count = 0;
    for (int64_t i = 0; i <= w->layers; i++) {
        for (int kind = 0; kind < (i < w->layers ? QL_LINEARS : 1); kind++) {
            const ql_matrix *x = i < w->layers ? &w->layer[i].linear[kind] : &w->lm_head;
            char name[64] = "lm_head";
            if (i < w->layers) ql_linear_name(i, kind, name);
            lua_createtable(L, 0, 8);
            lua_pushstring(L, name);
            lua_setfield(L, -2, "name");
            set_integer(L, "rows", x->n);
            set_integer(L, "columns", x->k);
            set_integer(L, "bytes", (int64_t)ql_matrix_bytes(x));
            lua_pushstring(L, ql_dtype_label(x->dtype));
            lua_setfield(L, -2, "dtype");
            lua_pushboolean(L, ql_tensor_is_shared(&x->data));
            lua_setfield(L, -2, "shared");
            if (x->quant) {
                lua_pushstring(L, x->quant->scheme);
                lua_setfield(L, -2, "scheme");
                set_integer(L, "block", x->quant->block);
                lua_pushboolean(L, x->quant->nested);
                lua_setfield(L, -2, "double");
            }
            lua_rawseti(L, -2, ++count);
        }
    }
    return 1;
}

static int model_info(lua_State *L)
{
    const ql_llama *m = qlua_model_check(L, 1);
    const ql_config *c = &m->config;
    lua_createtable(L, 0, 20);
    lua_pushstring(L, c->architecture);
    lua_setfield(L, -2, "architecture");
    lua_pushstring(L, m->device->label);
    lua_setfield(L, -2, "device");
    lua_pushstring(L, ql_dtype_label(m->weights.dtype));
    lua_setfield(L, -2, "dtype");
    lua_pushliteral(L, "float32");
    lua_setfield(L, -2, "kv_dtype");
    if (m->folder) {
        lua_pushstring(L, m->folder);
        lua_setfield(L, -2, "folder");
    }
    set_integer(L, "params", ql_weights_params(&m->weights));
    set_integer(L, "bytes", (int64_t)ql_weights_bytes(&m->weights));
    set_integer(L, "layers", c->layers);
    set_integer(L, "hidden", c->hidden);
    set_integer(L, "intermediate", c->intermediate);
    set_integer(L, "heads", c->heads);
    set_integer(L, "kv_heads", c->kv_heads);
    set_integer(L, "head_dim", c->head_dim);
    set_integer(L, "vocab", c->vocab);
    set_integer(L, "max_context", m->max_context);
    lua_pushboolean(L, c->tie_embeddings);
    lua_setfield(L, -2, "tied");
    if (c->bos >= 0) set_integer(L, "bos", c->bos);
    lua_createtable(L, c->eos_count, 0);
    for (int i = 0; i < c->eos_count; i++) {
        lua_pushinteger(L, c->eos[i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "eos");
    return 1;
}

/* model:memory() -> {weights=, kv=, activations=, total=, peak={...}, resident=} in bytes of the model's own
 * arena; resident also counts tensors shared with the model it was made from */
static int model_memory(lua_State *L)
{
    const ql_llama *m = qlua_model_check(L, 1);
    ql_mem_stats s = ql_arena_stats(m->arena);
    lua_createtable(L, 0, 6);
    lua_createtable(L, 0, 4);
    for (int kind = 0; kind < QL_MEM_KINDS; kind++) {
        lua_pushinteger(L, (lua_Integer)s.current[kind]);
        lua_setfield(L, -3, ql_mem_kind_name(kind));
        set_integer(L, ql_mem_kind_name(kind), (int64_t)s.peak[kind]);
    }
    set_integer(L, "total", (int64_t)s.peak_total);
    lua_setfield(L, -2, "peak");
    set_integer(L, "total", (int64_t)s.current_total);
    set_integer(L, "resident", (int64_t)ql_weights_bytes(&m->weights));
    return 1;
}

static int model_reset_peak(lua_State *L)
{
    ql_arena_reset_peak(qlua_model_check(L, 1)->arena);
    return 0;
}

/* model:_work_bytes(tokens, longest, outputs): activations of a forward pass (ql_llama_work_bytes), and a KV
 * slot, in bytes */
static int model_work_bytes(lua_State *L)
{
    const ql_llama *m = qlua_model_check(L, 1);
    const ql_config *c = &m->config;
    lua_Integer tokens = luaL_checkinteger(L, 2), longest = luaL_checkinteger(L, 3),
                outputs = luaL_checkinteger(L, 4);
    for (int i = 2; i <= 4; i++)
        luaL_argcheck(L, lua_tointeger(L, i) >= 0 && lua_tointeger(L, i) <= INT32_MAX, i, "out of range");
    lua_pushinteger(L, (lua_Integer)ql_llama_work_bytes(c, tokens, longest, outputs));
    lua_pushinteger(L, 2 * c->layers * c->kv_heads * c->head_dim * (lua_Integer)sizeof(float));
    return 2;
}

/* model:sha256() -> identity of the checkpoint's bytes, or nil and an error */
static int model_sha256(lua_State *L)
{
    const ql_llama *m = qlua_model_check(L, 1);
    if (!m->folder) return luaL_error(L, "a synthetic model has no checkpoint");
    ql_checkpoint *ck;
    ql_err err;
    char hex[QL_SHA256_HEX];
    ql_status status = ql_checkpoint_open(m->folder, &ck, &err);
    if (status == QL_OK) {
        status = ql_checkpoint_sha256(ck, hex, &err);
        ql_checkpoint_close(ck);
    }
    if (status != QL_OK) return qlua_fail(L, &err);
    lua_pushstring(L, hex);
    return 1;
}

static int model_device(lua_State *L)
{
    lua_pushstring(L, qlua_model_check(L, 1)->device->label);
    return 1;
}

static int model_tostring(lua_State *L)
{
    model_box *box = luaL_checkudata(L, 1, QLUA_MODEL);
    if (!box->model)
        lua_pushliteral(L, "model (closed)");
    else
        lua_pushfstring(L, "model %s (%s%s)", box->model->folder ? box->model->folder : "synthetic",
                        ql_dtype_label(box->model->weights.dtype),
                        ql_weights_is_quantized(&box->model->weights) ? ", quantized" : "");
    return 1;
}

void qlua_model_open(lua_State *L)
{
    static const luaL_Reg methods[] = {{"forward", model_forward},
                                       {"info", model_info},
                                       {"memory", model_memory},
                                       {"reset_peak", model_reset_peak},
                                       {"save", model_save},
                                       {"sha256", model_sha256},
                                       {"device_name", model_device},
                                       {"_generate", model_generate},
                                       {"_quantize", model_quantize},
                                       {"_matrices", model_matrices},
                                       {"_work_bytes", model_work_bytes},
                                       {NULL, NULL}};
    static const luaL_Reg meta[] = {{"__tostring", model_tostring}, {NULL, NULL}};
    static const luaL_Reg generated[] = {{NULL, NULL}};
    qlua_box_type(L, QLUA_MODEL, methods, meta, model_close);
    qlua_box_type(L, "qlua.generated", generated, NULL, generated_close);
    lua_pushcfunction(L, model_load);
    lua_setfield(L, -2, "load");
    lua_pushcfunction(L, model_random);
    lua_setfield(L, -2, "load_random");
}
