/* qlua.tensor: views of device memory, and the arithmetic a metric in Lua needs. */
#include "lua_box.h"
#include "mem.h"
#include "ops.h"
#include "widen.h"

#include <math.h>
#include <string.h>

/* Rows and columns when the last dimension is the one that an operation runs over. */
static int64_t columns(const ql_tensor *t)
{
    return t->shape[t->ndim - 1];
}

static int64_t rows(const ql_tensor *t)
{
    return t->ndim == 1 ? 1 : t->shape[0];
}

/* The tensor at `arg` as [n, V], F32; a 1-D tensor is one row. Shares no reference: valid while the box is
 * open. */
static ql_tensor matrix_arg(lua_State *L, int arg)
{
    ql_tensor t = *qlua_tensor_check(L, arg);
    if (t.ndim > 2) luaL_argerror(L, arg, "the tensor has more than two dimensions");
    if (t.dtype != QL_F32) luaL_argerror(L, arg, "the tensor is not float32");
    if (columns(&t) == 0) luaL_argerror(L, arg, "the tensor is empty");
    if (t.ndim == 1) {
        t.shape[1] = t.shape[0];
        t.shape[0] = 1;
        t.ndim = 2;
    }
    return t;
}

/* Push an uninitialised tensor like `like` (its device), 1-D or 2-D. */
static ql_tensor *push_new(lua_State *L, const ql_tensor *like, ql_dtype dtype, int ndim,
                           const int64_t *shape)
{
    int64_t count = 1;
    for (int i = 0; i < ndim; i++) count *= shape[i];
    qlua_pressure(L, (size_t)count * ql_dtype_size(dtype));
    ql_tensor *out = qlua_tensor_push(L);
    ql_err err;
    ql_status status;
    int tries = 0;
    do {
        status =
            ql_tensor_new(ql_tensor_device(like), NULL, QL_MEM_ACTIVATIONS, dtype, ndim, shape, out, &err);
    } while (qlua_retry(L, status, &tries));
    if (status != QL_OK) luaL_error(L, "%s", err.message);
    return out;
}

static int check(lua_State *L, ql_status status, const ql_err *err, int results)
{
    return status == QL_OK ? results : qlua_fail(L, err);
}

/* Push a buffer with the whole tensor's bytes. */
static void *push_bytes(lua_State *L, const ql_tensor *t)
{
    size_t bytes = ql_tensor_bytes(t);
    void *buffer = lua_newuserdatauv(L, bytes ? bytes : 1, 0);
    ql_err err;
    if (ql_tensor_download(t, buffer, bytes, &err) != QL_OK) luaL_error(L, "%s", err.message);
    return buffer;
}

static double element(ql_dtype dtype, const void *src)
{
    double value = 0;
    ql_widen_f64(dtype, src, 1, &value);
    return value;
}

static void push_element(lua_State *L, ql_dtype dtype, const void *src)
{
    double value = element(dtype, src);
    if (dtype == QL_F32 || dtype == QL_F16 || dtype == QL_BF16 || dtype == QL_F64)
        lua_pushnumber(L, value);
    else
        lua_pushinteger(L, (lua_Integer)value);
}

static int tensor_size(lua_State *L)
{
    const ql_tensor *t = qlua_tensor_check(L, 1);
    lua_Integer dim = luaL_checkinteger(L, 2);
    luaL_argcheck(L, dim >= 1 && dim <= t->ndim, 2, "no such dimension");
    lua_pushinteger(L, t->shape[dim - 1]);
    return 1;
}

static int tensor_shape(lua_State *L)
{
    const ql_tensor *t = qlua_tensor_check(L, 1);
    lua_createtable(L, t->ndim, 0);
    for (int i = 0; i < t->ndim; i++) {
        lua_pushinteger(L, t->shape[i]);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

static int tensor_dtype(lua_State *L)
{
    lua_pushstring(L, ql_dtype_label(qlua_tensor_check(L, 1)->dtype));
    return 1;
}

static int64_t check_index(lua_State *L, int arg, int64_t size)
{
    lua_Integer i = luaL_checkinteger(L, arg);
    if (i < 1 || i > size)
        luaL_argerror(L, arg, lua_pushfstring(L, "index %I is outside 1..%I", i, (lua_Integer)size));
    return i - 1;
}

static int tensor_get(lua_State *L)
{
    const ql_tensor *t = qlua_tensor_check(L, 1);
    if (lua_gettop(L) != t->ndim + 1) return luaL_error(L, "get takes %d indices here", t->ndim);
    int64_t at = 0;
    for (int i = 0; i < t->ndim; i++) at = at * t->shape[i] + check_index(L, i + 2, t->shape[i]);
    size_t size = ql_dtype_size(t->dtype);
    char raw[8];
    ql_err err;
    ql_device *dev = ql_tensor_device(t);
    ql_status status =
        dev->backend->download(dev->ctx, raw, (const char *)t->data + (size_t)at * size, size, &err);
    if (status != QL_OK) return qlua_fail(L, &err);
    push_element(L, t->dtype, raw);
    return 1;
}

/* A copy of columns first .. first + count of a 2-D tensor. */
static void push_columns(lua_State *L, const ql_tensor *t, int64_t first, int64_t count)
{
    size_t size = ql_dtype_size(t->dtype), width = (size_t)count * size;
    char *bytes = push_bytes(L, t);
    for (int64_t i = 0; i < t->shape[0]; i++)
        memmove(bytes + (size_t)i * width, bytes + (size_t)(i * t->shape[1] + first) * size, width);
    ql_tensor *out = push_new(L, t, t->dtype, 2, (int64_t[]){t->shape[0], count});
    ql_err err;
    if (ql_tensor_upload(out, bytes, (size_t)t->shape[0] * width, &err) != QL_OK)
        luaL_error(L, "%s", err.message);
}

static int narrow(lua_State *L, const ql_tensor *t, lua_Integer dim, int64_t first, int64_t count)
{
    if (dim == 2 && t->ndim == 2) {
        push_columns(L, t, first, count);
        return 1;
    }
    luaL_argcheck(L, dim == 1, 2, "only the first two dimensions of a matrix can be narrowed");
    ql_err err;
    ql_tensor *out = qlua_tensor_push(L);
    return check(L, ql_tensor_rows(t, first, count, out, &err), &err, 1);
}

static int tensor_narrow(lua_State *L)
{
    const ql_tensor *t = qlua_tensor_check(L, 1);
    lua_Integer dim = luaL_checkinteger(L, 2);
    luaL_argcheck(L, dim >= 1 && dim <= t->ndim, 2, "no such dimension");
    int64_t first = check_index(L, 3, t->shape[dim - 1]);
    lua_Integer count = luaL_checkinteger(L, 4);
    luaL_argcheck(L, count >= 1 && count <= t->shape[dim - 1] - first, 4,
                  "the range is longer than the tensor");
    return narrow(L, t, dim, first, count);
}

static int tensor_select(lua_State *L)
{
    const ql_tensor *t = qlua_tensor_check(L, 1);
    lua_Integer dim = luaL_checkinteger(L, 2);
    luaL_argcheck(L, dim >= 1 && dim <= t->ndim, 2, "no such dimension");
    luaL_argcheck(L, t->ndim > 1, 1, "a vector has no slices: use get");
    narrow(L, t, dim, check_index(L, 3, t->shape[dim - 1]), 1);
    ql_tensor *out = qlua_tensor_check(L, -1);
    for (int i = (int)dim; i < out->ndim; i++) out->shape[i - 1] = out->shape[i];
    out->ndim--;
    return 1;
}

static int tensor_topk(lua_State *L)
{
    ql_tensor x = matrix_arg(L, 1);
    int vector = qlua_tensor_check(L, 1)->ndim == 1;
    lua_Integer k = luaL_checkinteger(L, 2);
    if (k < 1 || k > columns(&x))
        luaL_argerror(L, 2, lua_pushfstring(L, "k = %I is outside 1..%I", k, (lua_Integer)columns(&x)));
    const int64_t shape[] = {x.shape[0], k};
    ql_tensor *values = push_new(L, &x, QL_F32, 2, shape);
    ql_tensor *ids = push_new(L, &x, QL_I32, 2, shape);
    ql_err err;
    ql_status status = ql_op_topk(&x, (int)k, values, ids, &err);
    if (vector) {
        values->shape[0] = ids->shape[0] = k;
        values->ndim = ids->ndim = 1;
    }
    return check(L, status, &err, 2);
}

static int tensor_argmax(lua_State *L)
{
    ql_tensor x = matrix_arg(L, 1);
    const int64_t shape[] = {x.shape[0], 1};
    ql_tensor *values = push_new(L, &x, QL_F32, 2, shape);
    ql_tensor *ids = push_new(L, &x, QL_I32, 2, shape);
    ql_err err;
    ql_status status = ql_op_topk(&x, 1, values, ids, &err);
    if (status != QL_OK) return qlua_fail(L, &err);
    const int32_t *host = push_bytes(L, ids);
    if (qlua_tensor_check(L, 1)->ndim == 1) {
        lua_pushinteger(L, host[0]);
        return 1;
    }
    lua_createtable(L, (int)x.shape[0], 0);
    for (int64_t i = 0; i < x.shape[0]; i++) {
        lua_pushinteger(L, host[i]);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

/* One number of a vector, or the tensor itself, for the reductions that give [n]. */
static int reduced(lua_State *L, const ql_tensor *out)
{
    if (qlua_tensor_check(L, 1)->ndim > 1) return 1;
    push_element(L, out->dtype, push_bytes(L, out));
    return 1;
}

static double temperature_option(lua_State *L, int arg)
{
    static const char *const known[] = {"temperature", NULL};
    qlua_options_check(L, arg, known);
    double t = qlua_option_number(L, arg, "temperature", 1);
    if (t <= 0) luaL_error(L, "option 'temperature' is %f, not above 0", t);
    return t;
}

static int tensor_logsumexp(lua_State *L)
{
    ql_tensor x = matrix_arg(L, 1);
    double temperature = temperature_option(L, 2);
    ql_tensor *out = push_new(L, &x, QL_F64, 1, &x.shape[0]);
    ql_err err;
    ql_status status = ql_op_logsumexp(&x, temperature, out, &err);
    return status == QL_OK ? reduced(L, out) : qlua_fail(L, &err);
}

static int tensor_softmax(lua_State *L)
{
    ql_tensor x = matrix_arg(L, 1);
    double temperature = temperature_option(L, 2);
    ql_tensor *out = push_new(L, &x, QL_F32, 2, x.shape);
    ql_err err;
    ql_status status = ql_op_softmax(&x, temperature, out, &err);
    if (qlua_tensor_check(L, 1)->ndim == 1) {
        out->shape[0] = out->shape[1];
        out->ndim = 1;
    }
    return check(L, status, &err, 1);
}

static void check_columns(lua_State *L, const int32_t *ids, int32_t n, int64_t width)
{
    for (int32_t i = 0; i < n; i++) {
        if (ids[i] >= width)
            luaL_error(L, "bad argument #2 (id %d is outside 0..%I)", ids[i], (lua_Integer)width - 1);
    }
}

/* [n, V] with n ids: one value a row. A vector with ids: one value an id; with a number: that value. */
static int tensor_gather(lua_State *L)
{
    ql_tensor x = matrix_arg(L, 1);
    ql_err err;
    if (qlua_tensor_check(L, 1)->ndim == 1) {
        int single = lua_isinteger(L, 2);
        if (single) {
            lua_createtable(L, 1, 0);
            lua_pushvalue(L, 2);
            lua_rawseti(L, -2, 1);
            lua_replace(L, 2);
        }
        int32_t n;
        const int32_t *ids = qlua_check_ids(L, 2, &n);
        check_columns(L, ids, n, x.shape[1]);
        const float *host = push_bytes(L, &x);
        float *picked = lua_newuserdatauv(L, (size_t)(n ? n : 1) * sizeof *picked, 0);
        for (int32_t i = 0; i < n; i++) picked[i] = host[ids[i]];
        if (single) {
            lua_pushnumber(L, (lua_Number)picked[0]);
            return 1;
        }
        const int64_t shape[] = {n};
        ql_tensor *out = push_new(L, &x, QL_F32, 1, shape);
        return check(L, ql_tensor_upload(out, picked, (size_t)n * sizeof *picked, &err), &err, 1);
    }
    int32_t n;
    const int32_t *ids = qlua_check_ids(L, 2, &n);
    if (n != x.shape[0]) luaL_argerror(L, 2, "gather takes one id for each row");
    check_columns(L, ids, n, x.shape[1]);
    ql_tensor *cols = push_new(L, &x, QL_I32, 1, &x.shape[0]);
    ql_tensor *out = push_new(L, &x, QL_F32, 1, &x.shape[0]);
    ql_status status = ql_tensor_upload(cols, ids, (size_t)n * sizeof *ids, &err);
    if (status == QL_OK) status = ql_op_gather_cols(&x, cols, out, &err);
    return check(L, status, &err, 1);
}

/* Fold each row (last dimension) on the host in order of the columns, in float64. */
static int fold(lua_State *L, bool maximum)
{
    const ql_tensor *t = qlua_tensor_check(L, 1);
    luaL_argcheck(L, t->ndim <= 2, 1, "the tensor has more than two dimensions");
    luaL_argcheck(L, columns(t) > 0 || !maximum, 1, "the tensor is empty");
    const char *bytes = push_bytes(L, t);
    size_t size = ql_dtype_size(t->dtype);
    int64_t n = rows(t), width = columns(t);
    double *result = lua_newuserdatauv(L, (size_t)(n ? n : 1) * sizeof *result, 0);
    for (int64_t i = 0; i < n; i++) {
        double value = maximum ? element(t->dtype, bytes + (size_t)(i * width) * size) : 0;
        for (int64_t j = 0; j < width; j++) {
            double x = element(t->dtype, bytes + (size_t)(i * width + j) * size);
            if (!maximum)
                value += x;
            else if (x > value || isnan(x)) /* a NaN stays: nothing is above it */
                value = x;
        }
        result[i] = value;
    }
    if (t->ndim == 1) {
        lua_pushnumber(L, result[0]);
        return 1;
    }
    ql_tensor *out = push_new(L, t, QL_F64, 1, &n);
    ql_err err;
    return check(L, ql_tensor_upload(out, result, (size_t)n * sizeof *result, &err), &err, 1);
}

static int tensor_sum(lua_State *L)
{
    return fold(L, false);
}

static int tensor_max(lua_State *L)
{
    return fold(L, true);
}

static const char *push_nested(lua_State *L, const ql_tensor *t, int dim, const char *at)
{
    size_t size = ql_dtype_size(t->dtype);
    luaL_checkstack(L, 3, NULL);
    lua_createtable(L, (int)t->shape[dim], 0);
    for (int64_t i = 0; i < t->shape[dim]; i++) {
        if (dim + 1 < t->ndim && dim + 1 < QL_MAX_DIMS) { /* the second tells gcc's -O3 what holds */
            at = push_nested(L, t, dim + 1, at);
        } else {
            push_element(L, t->dtype, at);
            at += size;
        }
        lua_rawseti(L, -2, i + 1);
    }
    return at;
}

static int tensor_totable(lua_State *L)
{
    const ql_tensor *t = qlua_tensor_check(L, 1);
    const char *bytes = push_bytes(L, t);
    push_nested(L, t, 0, bytes);
    return 1;
}

static int tensor_to(lua_State *L)
{
    const ql_tensor *t = qlua_tensor_check(L, 1);
    const char *where = luaL_checkstring(L, 2);
    luaL_argcheck(L, strcmp(where, "cpu") == 0, 2, "tensors can be brought to \"cpu\"");
    if (strcmp(ql_tensor_device(t)->backend->name, "cpu") == 0) {
        *qlua_tensor_push(L) = ql_tensor_ref(t);
        return 1;
    }
    ql_tensor *out = qlua_tensor_push(L);
    ql_err err;
    ql_status status =
        ql_tensor_new(qlua_device_host(L), NULL, QL_MEM_ACTIVATIONS, t->dtype, t->ndim, t->shape, out, &err);
    if (status == QL_OK) status = ql_tensor_download(t, out->data, ql_tensor_bytes(t), &err);
    return check(L, status, &err, 1);
}

static int arithmetic(lua_State *L, ql_binary_op op)
{
    const ql_tensor *a = qlua_tensor_test(L, 1), *b = qlua_tensor_test(L, 2);
    const ql_tensor *shape = a ? a : b;
    double scalar = a && b ? 0 : luaL_checknumber(L, a ? 2 : 1);
    ql_tensor *out = push_new(L, shape, QL_F32, shape->ndim, shape->shape);
    ql_err err;
    ql_status status = a && b ? ql_op_binary(op, a, b, out, &err)
                              : ql_op_binary_scalar(op, shape, (float)scalar, !a, out, &err);
    return check(L, status, &err, 1);
}

static int tensor_add(lua_State *L)
{
    return arithmetic(L, QL_BIN_ADD);
}

static int tensor_sub(lua_State *L)
{
    return arithmetic(L, QL_BIN_SUB);
}

static int tensor_mul(lua_State *L)
{
    return arithmetic(L, QL_BIN_MUL);
}

static int tensor_div(lua_State *L)
{
    return arithmetic(L, QL_BIN_DIV);
}

static int tensor_unm(lua_State *L)
{
    lua_settop(L, 1);
    lua_pushnumber(L, -1);
    return arithmetic(L, QL_BIN_MUL);
}

static int tensor_tostring(lua_State *L)
{
    luaL_checkudata(L, 1, QLUA_TENSOR);
    const ql_tensor *t = lua_touserdata(L, 1);
    if (!t->storage) {
        lua_pushliteral(L, "tensor (closed)");
        return 1;
    }
    luaL_Buffer b;
    luaL_buffinit(L, &b);
    luaL_addstring(&b, "tensor ");
    luaL_addstring(&b, ql_dtype_label(t->dtype));
    luaL_addstring(&b, " [");
    for (int i = 0; i < t->ndim; i++) {
        lua_pushfstring(L, i ? ", %I" : "%I", (lua_Integer)t->shape[i]);
        luaL_addvalue(&b);
    }
    luaL_addstring(&b, "] on ");
    luaL_addstring(&b, ql_tensor_device(t)->label);
    luaL_pushresult(&b);
    return 1;
}

/* Shape of a nested table, by its first entries. */
static int table_shape(lua_State *L, int index, int64_t shape[QL_MAX_DIMS])
{
    int ndim = 0;
    lua_pushvalue(L, index);
    while (lua_type(L, -1) == LUA_TTABLE) {
        if (ndim == QL_MAX_DIMS) luaL_error(L, "a tensor has at most %d dimensions", QL_MAX_DIMS);
        shape[ndim++] = (int64_t)lua_rawlen(L, -1);
        lua_rawgeti(L, -1, 1);
        lua_remove(L, -2);
    }
    lua_pop(L, 1);
    return ndim;
}

static float *fill(lua_State *L, int index, int ndim, const int64_t *shape, float *at)
{
    luaL_checkstack(L, 3, NULL);
    if (lua_type(L, index) != LUA_TTABLE || (int64_t)lua_rawlen(L, index) != shape[0])
        luaL_error(L, "a tensor needs rows of equal length");
    for (int64_t i = 1; i <= shape[0]; i++) {
        lua_rawgeti(L, index, i);
        if (ndim > 1) {
            at = fill(L, lua_gettop(L), ndim - 1, shape + 1, at);
        } else {
            int isnum;
            *at++ = (float)lua_tonumberx(L, -1, &isnum);
            if (!isnum) luaL_error(L, "a tensor holds numbers, not a %s", luaL_typename(L, -1));
        }
        lua_pop(L, 1);
    }
    return at;
}

/* core.tensor(nested table) -> float32 tensor on the CPU */
static int new_tensor(lua_State *L)
{
    luaL_checktype(L, 1, LUA_TTABLE);
    int64_t shape[QL_MAX_DIMS] = {0};
    int ndim = table_shape(L, 1, shape);
    size_t count = sizeof(float);
    for (int i = 0; i < ndim; i++) {
        if (!ql_mul(count, (size_t)shape[i], &count)) luaL_error(L, "the tensor is too large");
    }
    float *host = lua_newuserdatauv(L, count ? count : 1, 0);
    fill(L, 1, ndim, shape, host);
    ql_device *dev = qlua_device_host(L);
    qlua_pressure(L, count);
    ql_tensor *out = qlua_tensor_push(L);
    ql_err err;
    ql_status status;
    int tries = 0;
    do {
        status = ql_tensor_new(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, ndim, shape, out, &err);
    } while (qlua_retry(L, status, &tries));
    if (status == QL_OK) status = ql_tensor_upload(out, host, count, &err);
    return check(L, status, &err, 1);
}

void qlua_tensor_open(lua_State *L)
{
    static const luaL_Reg methods[] = {{"size", tensor_size},
                                       {"shape", tensor_shape},
                                       {"dtype", tensor_dtype},
                                       {"get", tensor_get},
                                       {"select", tensor_select},
                                       {"narrow", tensor_narrow},
                                       {"topk", tensor_topk},
                                       {"argmax", tensor_argmax},
                                       {"logsumexp", tensor_logsumexp},
                                       {"softmax", tensor_softmax},
                                       {"gather", tensor_gather},
                                       {"sum", tensor_sum},
                                       {"max", tensor_max},
                                       {"totable", tensor_totable},
                                       {"to", tensor_to},
                                       {NULL, NULL}};
    static const luaL_Reg meta[] = {
        {"__add", tensor_add}, {"__sub", tensor_sub},           {"__mul", tensor_mul}, {"__div", tensor_div},
        {"__unm", tensor_unm}, {"__tostring", tensor_tostring}, {NULL, NULL}};
    qlua_box_type(L, QLUA_TENSOR, methods, meta, qlua_tensor_close);
    lua_pushcfunction(L, new_tensor);
    lua_setfield(L, -2, "tensor");
}
