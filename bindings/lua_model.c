/* qlua.model: a Llama model, its forward pass, generation and quantized twin.
 *
 * Methods whose name starts with an underscore are the primitives that scripts/qlua/model.lua builds the
 * documented ones on.
 */
#include "lua_model.h"
#include "outline.h"

#include <string.h>

qlua_model_box *qlua_model_box_check(lua_State *L, int arg)
{
    qlua_model_box *box = luaL_checkudata(L, arg, QLUA_MODEL);
    if (!box->model) luaL_argerror(L, arg, "the model is closed");
    return box;
}

qlua_model_box *qlua_model_box_free(lua_State *L, int arg)
{
    qlua_model_box *box = qlua_model_box_check(L, arg);
    if (box->passing) luaL_error(L, "the model is in the middle of a forward pass");
    return box;
}

ql_llama *qlua_model_check(lua_State *L, int arg)
{
    return qlua_model_box_check(L, arg)->model;
}

static int model_close(lua_State *L)
{
    qlua_model_box *box = luaL_checkudata(L, 1, QLUA_MODEL);
    if (box->calls > 0) return luaL_error(L, "a model cannot be closed from its own callback");
    ql_llama_free(box->model);
    box->model = NULL;
    return 0;
}

bool qlua_callback_run(qlua_callback *cb, int nargs, int nresults)
{
    if (lua_pcall(cb->L, nargs, nresults, 0) == LUA_OK) return true;
    cb->raised = true;
    return false;
}

/* --- loading ---------------------------------------------------------------------------------------------
 */

static bool apply_policy(void *ud, const char *name, int64_t n, int64_t k, ql_quant_spec *spec, ql_err *err);

/* The policy at `arg`, a function or nothing, and what it is called with. */
static ql_quant_policy policy_arg(lua_State *L, int arg, qlua_callback *cb)
{
    *cb = (qlua_callback){L, arg, false};
    if (lua_isnoneornil(L, arg)) return NULL;
    luaL_checktype(L, arg, LUA_TFUNCTION);
    luaL_checkstack(L, 16, NULL);
    return apply_policy;
}

static bool dtype_option(lua_State *L, int arg, ql_dtype *out)
{
    const char *name = qlua_option_string(L, arg, "dtype", "auto");
    *out = QL_DTYPE_COUNT;
    if (strcmp(name, "auto") == 0) return true;
    return ql_dtype_parse(name, out) && ql_dtype_is_weight(*out);
}

/* core.load(device, folder, {dtype=, max_context=}, policy or nil) -> model, or nil and an error */
static int model_load(lua_State *L)
{
    static const char *const known[] = {"dtype", "max_context", NULL};
    ql_device *dev = qlua_device_check(L, 1);
    const char *folder = luaL_checkstring(L, 2);
    lua_settop(L, 4);
    qlua_options_check(L, 3, known);
    ql_load_options options;
    if (!dtype_option(L, 3, &options.dtype))
        return luaL_error(L, "option 'dtype' is not auto, float32, float16 or bfloat16");
    options.max_context = qlua_option_integer(L, 3, "max_context", 0, 1, INT32_MAX);
    qlua_callback cb;
    ql_quant_policy policy = policy_arg(L, 4, &cb);
    qlua_pressure(L, 0);
    qlua_model_box *box = qlua_box_push(L, QLUA_MODEL, sizeof *box);
    ql_err err;
    int tries = 0;
    ql_status status;
    do {
        status = ql_llama_load(dev, folder, &options, policy, &cb, &box->model, &err);
    } while (qlua_retry(L, status, &tries));
    if (cb.raised) return lua_error(L);
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

/* The fields of ql_config in the table at `arg`, which owns nothing. */
static ql_config check_shape(lua_State *L, int arg)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    ql_config c = {
        .hidden = field_size(L, arg, "hidden", 0),
        .intermediate = field_size(L, arg, "intermediate", 0),
        .layers = field_size(L, arg, "layers", 0),
        .heads = field_size(L, arg, "heads", 0),
        .kv_heads = field_size(L, arg, "kv_heads", 0),
        .head_dim = field_size(L, arg, "head_dim", 0),
        .vocab = field_size(L, arg, "vocab", 0),
        .max_positions = field_size(L, arg, "max_context", 2048),
        .rms_eps = field_number(L, arg, "rms_eps", 1e-5),
        .rope = {.type = QL_ROPE_NONE, .theta = field_number(L, arg, "rope_theta", 10000), .factor = 1},
        .tie_embeddings = qlua_option_boolean(L, arg, "tied", false),
        .bos = -1};
    strcpy(c.architecture, "LlamaForCausalLM");
    ql_err err;
    if (ql_config_check(&c, &err) != QL_OK)
        luaL_argerror(L, arg, lua_pushfstring(L, "not the shape of a Llama model: %s", err.message));
    return c;
}

/* core.load_random(device, shape, dtype, seed, policy or nil) -> model; shape has the fields of ql_config */
static int model_random(lua_State *L)
{
    ql_device *dev = qlua_device_check(L, 1);
    ql_dtype dtype;
    const char *type = luaL_checkstring(L, 3);
    luaL_argcheck(L, ql_dtype_parse(type, &dtype) && ql_dtype_is_weight(dtype), 3,
                  "dtype is not float32, float16 or bfloat16");
    lua_Integer seed = luaL_optinteger(L, 4, 1);
    ql_config c = check_shape(L, 2);
    qlua_callback cb;
    ql_quant_policy policy = policy_arg(L, 5, &cb);
    qlua_pressure(L, 0);
    qlua_model_box *box = qlua_box_push(L, QLUA_MODEL, sizeof *box);
    ql_err err;
    ql_status status = ql_llama_random(dev, &c, dtype, (uint64_t)seed, policy, &cb, &box->model, &err);
    if (cb.raised) return lua_error(L);
    return status == QL_OK ? 1 : qlua_fail(L, &err);
}

/* core.outline(device, folder or shape, {dtype=, max_context=}, policy or nil) -> a model without weights, or
 * nil and an error */
static int model_outline(lua_State *L)
{
    static const char *const known[] = {"dtype", "max_context", NULL};
    ql_device *dev = qlua_device_check(L, 1);
    lua_settop(L, 4);
    qlua_options_check(L, 3, known);
    ql_load_options options;
    if (!dtype_option(L, 3, &options.dtype))
        return luaL_error(L, "option 'dtype' is not auto, float32, float16 or bfloat16");
    options.max_context = qlua_option_integer(L, 3, "max_context", 0, 1, INT32_MAX);
    bool shape = lua_istable(L, 2);
    ql_config c = shape ? check_shape(L, 2) : (ql_config){0};
    const char *folder = shape ? NULL : luaL_checkstring(L, 2);
    luaL_argcheck(L, !shape || options.dtype != QL_DTYPE_COUNT, 3, "a shape has no dtype of its own");
    qlua_callback cb;
    ql_quant_policy policy = policy_arg(L, 4, &cb);
    qlua_model_box *box = qlua_box_push(L, QLUA_MODEL, sizeof *box);
    ql_err err;
    ql_status status = shape ? ql_outline_random(dev, &c, options.dtype, policy, &cb, &box->model, &err)
                             : ql_outline_load(dev, folder, &options, policy, &cb, &box->model, &err);
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

/* Runs protected: (function, const char *name, n, k, ql_quant_spec*) -> whether to quantize. */
static int ask_policy(lua_State *L)
{
    static const char *const known[] = {"scheme", "codebook", "block", "double", "dtype", NULL};
    ql_quant_spec *spec = lua_touserdata(L, 5);
    lua_settop(L, 4);
    lua_pushstring(L, lua_touserdata(L, 2)); /* may raise: not before the call is protected */
    lua_replace(L, 2);
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
    qlua_callback *cb = ud;
    lua_State *L = cb->L;
    lua_pushcfunction(L, ask_policy);
    lua_pushvalue(L, cb->fn);
    lua_pushlightuserdata(L, (void *)(uintptr_t)name);
    lua_pushinteger(L, n);
    lua_pushinteger(L, k);
    lua_pushlightuserdata(L, spec);
    if (!qlua_callback_run(cb, 5, 1)) {
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
    qlua_model_box *full = qlua_model_box_check(L, 1);
    luaL_checktype(L, 2, LUA_TFUNCTION);
    qlua_callback cb;
    ql_quant_policy policy = policy_arg(L, 2, &cb);
    qlua_pressure(L, 0);
    qlua_model_box *box = qlua_box_push(L, QLUA_MODEL, sizeof *box);
    ql_err err;
    full->calls++;
    ql_status status = ql_llama_quantize(full->model, policy, &cb, &box->model, &err);
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

/* --- what a model says of itself -------------------------------------------------------------------------
 */

static void set_integer(lua_State *L, const char *key, int64_t value)
{
    lua_pushinteger(L, value);
    lua_setfield(L, -2, key);
}

static void set_codebook(lua_State *L, const float code[16])
{
    lua_createtable(L, 16, 0);
    for (int i = 0; i < 16; i++) {
        lua_pushnumber(L, code[i]);
        lua_rawseti(L, -2, i + 1);
    }
    lua_setfield(L, -2, "codebook");
}

/* model:_matrices() -> {{name=, rows=, columns=, scheme= or nil, block=, double=, codebook= or nil, dtype=,
 * bytes=, shared=}, ...} */
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
            set_integer(L, "bytes", (int64_t)ql_matrix_resident(x));
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
                if (strcmp(x->quant->scheme, "codebook") == 0) set_codebook(L, x->quant->code);
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
    lua_pushstring(L, ql_dtype_label(ql_llama_kv_dtype(m)));
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
    ql_llama_reset_peak(qlua_model_box_free(L, 1)->model);
    return 0;
}

/* model:_expect(tokens, longest, outputs): activations of a forward pass and a KV slot, in bytes
 * (ql_llama_expect) */
static int model_expect(lua_State *L)
{
    const ql_llama *m = qlua_model_check(L, 1);
    lua_Integer tokens = luaL_checkinteger(L, 2), longest = luaL_checkinteger(L, 3),
                outputs = luaL_checkinteger(L, 4);
    for (int i = 2; i <= 4; i++)
        luaL_argcheck(L, lua_tointeger(L, i) >= 0 && lua_tointeger(L, i) <= INT32_MAX, i, "out of range");
    ql_llama_size size;
    ql_err err;
    if (ql_llama_expect(m, tokens, longest, outputs, &size, &err) != QL_OK)
        return luaL_error(L, "%s", err.message);
    lua_pushinteger(L, (lua_Integer)size.activations);
    lua_pushinteger(L, (lua_Integer)size.slot);
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
    qlua_model_box *box = luaL_checkudata(L, 1, QLUA_MODEL);
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
    static const luaL_Reg methods[] = {{"forward", qlua_model_forward},
                                       {"info", model_info},
                                       {"memory", model_memory},
                                       {"reset_peak", model_reset_peak},
                                       {"save", model_save},
                                       {"sha256", model_sha256},
                                       {"device_name", model_device},
                                       {"_generate", qlua_model_generate},
                                       {"_quantize", model_quantize},
                                       {"_matrices", model_matrices},
                                       {"_expect", model_expect},
                                       {NULL, NULL}};
    static const luaL_Reg meta[] = {{"__tostring", model_tostring}, {NULL, NULL}};
    qlua_box_type(L, QLUA_MODEL, methods, meta, model_close);
    qlua_forward_open(L);
    qlua_generate_open(L);
    lua_pushcfunction(L, model_load);
    lua_setfield(L, -2, "load");
    lua_pushcfunction(L, model_outline);
    lua_setfield(L, -2, "outline");
    lua_pushcfunction(L, model_random);
    lua_setfield(L, -2, "load_random");
}
