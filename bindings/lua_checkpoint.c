/* qlua.open_checkpoint: the tensors of a checkpoint, listed and read. */
#include "checkpoint.h"
#include "lua_box.h"
#include "mem.h"
#include "ops.h"
#include "quant.h"
#include "widen.h"

#include <string.h>

typedef struct {
    ql_checkpoint *ck;
} checkpoint_box;

static ql_checkpoint *check(lua_State *L, int arg)
{
    checkpoint_box *box = luaL_checkudata(L, arg, QLUA_CHECKPOINT);
    if (!box->ck) luaL_argerror(L, arg, "the checkpoint is closed");
    return box->ck;
}

static int checkpoint_close(lua_State *L)
{
    checkpoint_box *box = luaL_checkudata(L, 1, QLUA_CHECKPOINT);
    ql_checkpoint_close(box->ck);
    box->ck = NULL;
    return 0;
}

/* core.open_checkpoint(path) -> checkpoint, or nil and an error */
static int checkpoint_open(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    checkpoint_box *box = qlua_box_push(L, QLUA_CHECKPOINT, sizeof *box);
    ql_err err;
    return ql_checkpoint_open(path, &box->ck, &err) == QL_OK ? 1 : qlua_push_err(L, &err);
}

/* ck:names() -> tensor names as stored, shard by shard */
static int checkpoint_names(lua_State *L)
{
    const ql_checkpoint *ck = check(L, 1);
    size_t n = ql_checkpoint_count(ck);
    lua_createtable(L, (int)n, 0);
    for (size_t i = 0; i < n; i++) {
        lua_pushstring(L, ql_checkpoint_at(ck, i)->name);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    return 1;
}

static void push_shape(lua_State *L, const int64_t *shape, int ndim)
{
    lua_createtable(L, ndim, 0);
    for (int i = 0; i < ndim; i++) {
        lua_pushinteger(L, shape[i]);
        lua_rawseti(L, -2, i + 1);
    }
}

/* ck:info(name) -> {dtype=, shape=, bytes=, file=, quantized=, decoded_shape=}, or nil and an error */
static int checkpoint_info(lua_State *L)
{
    const ql_checkpoint *ck = check(L, 1);
    const char *name = luaL_checkstring(L, 2);
    const ql_st_tensor *t;
    ql_err err;
    if (ql_checkpoint_need(ck, name, &t, &err) != QL_OK) return qlua_push_err(L, &err);
    lua_createtable(L, 0, 6);
    lua_pushstring(L, ql_dtype_label(t->dtype));
    lua_setfield(L, -2, "dtype");
    push_shape(L, t->shape, t->ndim);
    lua_setfield(L, -2, "shape");
    lua_pushinteger(L, (lua_Integer)(t->end - t->begin));
    lua_setfield(L, -2, "bytes");
    lua_pushstring(L, ql_checkpoint_file(ck, t));
    lua_setfield(L, -2, "file");
    ql_quant_tensor q;
    if (!ql_checkpoint_is_quantized(ck, name)) return 1;
    if (ql_checkpoint_quant(ck, name, &q, &err) != QL_OK) return qlua_push_err(L, &err);
    lua_pushstring(L, q.state.type);
    lua_setfield(L, -2, "quantized");
    push_shape(L, q.state.shape, 2);
    lua_setfield(L, -2, "decoded_shape");
    return 1;
}

/* A 4-bit weight, decoded to float32 [n, k] on the CPU. */
static int push_decoded(lua_State *L, const ql_checkpoint *ck, const char *name)
{
    ql_device *dev = qlua_device_host(L);
    qlua_pressure(L, 0);
    ql_tensor *out = qlua_tensor_push(L);
    ql_err err;
    ql_status status;
    int tries = 0;
    do {
        ql_matrix m = {0};
        ql_tensor_free(out);
        status = ql_quant_load(ck, name, dev, NULL, &m, &err);
        if (status == QL_OK)
            status = ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, m.n, m.k, out, &err);
        if (status == QL_OK) status = ql_op_dequantize4(&m, out, &err);
        ql_matrix_free(&m);
    } while (qlua_retry(L, status, &tries));
    return status == QL_OK ? 1 : qlua_fail(L, &err);
}

/* ck:tensor(name) -> float32 tensor (float64 for wide integers and float64), or nil and an error */
static int checkpoint_tensor(lua_State *L)
{
    const ql_checkpoint *ck = check(L, 1);
    const char *name = luaL_checkstring(L, 2);
    if (ql_checkpoint_is_quantized(ck, name)) return push_decoded(L, ck, name);
    const ql_st_tensor *t;
    ql_err err;
    ql_status status = ql_checkpoint_need(ck, name, &t, &err);
    if (status != QL_OK) return qlua_push_err(L, &err);
    if (t->ndim > QL_MAX_DIMS)
        return luaL_error(L, "tensor '%s' has %d dimensions; qlua holds up to %d", name, t->ndim,
                          QL_MAX_DIMS);
    int64_t shape[QL_MAX_DIMS] = {1};
    int ndim = t->ndim ? t->ndim : 1;
    size_t bytes = (size_t)(t->end - t->begin), count = 1;
    for (int i = 0; i < t->ndim; i++) {
        shape[i] = t->shape[i];
        count *= (size_t)t->shape[i];
    }
    bool narrow = ql_widen_fits_f32(t->dtype);
    ql_device *dev = qlua_device_host(L);
    qlua_pressure(L, bytes);
    ql_tensor *out = qlua_tensor_push(L);
    int tries = 0;
    do {
        ql_tensor_free(out);
        void *raw = ql_malloc(bytes ? bytes : 1);
        status =
            raw ? ql_checkpoint_read(ck, t, 0, bytes, raw, &err)
                : ql_err_set(&err, QL_ERR_MEMORY, "out of memory for tensor '%s' of %zu bytes", name, bytes);
        if (status == QL_OK)
            status = ql_tensor_new(dev, NULL, QL_MEM_ACTIVATIONS, narrow ? QL_F32 : QL_F64, ndim, shape, out,
                                   &err);
        if (status == QL_OK && !(narrow ? ql_widen_f32(t->dtype, raw, count, out->data)
                                        : ql_widen_f64(t->dtype, raw, count, out->data)))
            status = ql_err_set(&err, QL_ERR_UNSUPPORTED, "tensor '%s' is %s, which qlua does not decode",
                                name, ql_dtype_name(t->dtype));
        ql_free(raw);
    } while (qlua_retry(L, status, &tries));
    return status == QL_OK ? 1 : qlua_push_err(L, &err);
}

/* ck:sha256() -> identity of the content, or nil and an error */
static int checkpoint_sha256(lua_State *L)
{
    char hex[QL_SHA256_HEX];
    ql_err err;
    if (ql_checkpoint_sha256(check(L, 1), hex, &err) != QL_OK) return qlua_fail(L, &err);
    lua_pushstring(L, hex);
    return 1;
}

static int checkpoint_tostring(lua_State *L)
{
    checkpoint_box *box = luaL_checkudata(L, 1, QLUA_CHECKPOINT);
    lua_pushfstring(L, "checkpoint %s", box->ck ? ql_checkpoint_path(box->ck) : "(closed)");
    return 1;
}

void qlua_checkpoint_open(lua_State *L)
{
    static const luaL_Reg methods[] = {{"names", checkpoint_names},
                                       {"info", checkpoint_info},
                                       {"tensor", checkpoint_tensor},
                                       {"sha256", checkpoint_sha256},
                                       {NULL, NULL}};
    static const luaL_Reg meta[] = {{"__tostring", checkpoint_tostring}, {NULL, NULL}};
    qlua_box_type(L, QLUA_CHECKPOINT, methods, meta, checkpoint_close);
    lua_pushcfunction(L, checkpoint_open);
    lua_setfield(L, -2, "open_checkpoint");
}
