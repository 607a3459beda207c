/* qlua.core.metrics: what two models' logits say about each other, one value a row. */
#include "lua_box.h"
#include "metrics.h"

/* Logits of n positions, [n, V], or of one, [V]. Shares no reference: valid while the box is open. */
static ql_tensor check_logits(lua_State *L, int arg)
{
    ql_tensor t = *qlua_tensor_check(L, arg);
    if (t.ndim > 2) luaL_argerror(L, arg, "logits are a matrix [n, vocabulary] or a vector [vocabulary]");
    if (t.ndim == 1) {
        t.shape[1] = t.shape[0];
        t.shape[0] = 1;
        t.ndim = 2;
    }
    return t;
}

typedef struct {
    ql_tensor a, b;
    int64_t rows;
} pair;

static pair check_pair(lua_State *L)
{
    pair p = {check_logits(L, 1), check_logits(L, 2), 0};
    p.rows = p.a.shape[0];
    if (p.b.shape[0] != p.rows || p.b.shape[1] != p.a.shape[1])
        luaL_error(L, "the logits differ in shape: [%I, %I] and [%I, %I]", (lua_Integer)p.rows,
                   (lua_Integer)p.a.shape[1], (lua_Integer)p.b.shape[0], (lua_Integer)p.b.shape[1]);
    return p;
}

static void *buffer(lua_State *L, int64_t count, size_t size)
{
    return lua_newuserdatauv(L, (size_t)(count ? count : 1) * size, 0);
}

static int push_doubles(lua_State *L, const double *values, int64_t n)
{
    lua_createtable(L, (int)n, 0);
    for (int64_t i = 0; i < n; i++) {
        lua_pushnumber(L, values[i]);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

static int push_flags(lua_State *L, const uint8_t *values, int64_t n)
{
    lua_createtable(L, (int)n, 0);
    for (int64_t i = 0; i < n; i++) {
        lua_pushboolean(L, values[i]);
        lua_rawseti(L, -2, i + 1);
    }
    return 1;
}

/* jaccard(a, b, {k, ...}) -> one table of values for each k */
static int metrics_jaccard(lua_State *L)
{
    pair p = check_pair(L);
    int32_t nk;
    const int32_t *ks = qlua_check_ids(L, 3, &nk);
    luaL_argcheck(L, nk > 0, 3, "no k given");
    double *out = buffer(L, p.rows * nk, sizeof *out);
    ql_err err;
    if (ql_metrics_jaccard(&p.a, &p.b, ks, nk, out, &err) != QL_OK) return qlua_fail(L, &err);
    lua_createtable(L, nk, 0);
    for (int32_t j = 0; j < nk; j++) {
        lua_createtable(L, (int)p.rows, 0);
        for (int64_t i = 0; i < p.rows; i++) {
            lua_pushnumber(L, out[i * nk + j]);
            lua_rawseti(L, -2, i + 1);
        }
        lua_rawseti(L, -2, j + 1);
    }
    return 1;
}

/* agreement(a, b) -> booleans: the same most likely token */
static int metrics_agreement(lua_State *L)
{
    pair p = check_pair(L);
    uint8_t *out = buffer(L, p.rows, sizeof *out);
    ql_err err;
    if (ql_metrics_agreement(&p.a, &p.b, out, &err) != QL_OK) return qlua_fail(L, &err);
    return push_flags(L, out, p.rows);
}

/* kl(a, b) -> KL(a || b) in nats */
static int metrics_kl(lua_State *L)
{
    pair p = check_pair(L);
    double *out = buffer(L, p.rows, sizeof *out);
    ql_err err;
    if (ql_metrics_kl(&p.a, &p.b, out, &err) != QL_OK) return qlua_fail(L, &err);
    return push_doubles(L, out, p.rows);
}

static const int32_t *check_targets(lua_State *L, int arg, const ql_tensor *logits)
{
    int32_t n;
    const int32_t *targets = qlua_check_ids(L, arg, &n);
    if (n != logits->shape[0])
        luaL_error(L, "bad argument #%d (%d target ids for %I rows)", arg, n, (lua_Integer)logits->shape[0]);
    return targets;
}

/* delta_p(a, b, targets) -> q(target) - p(target) */
static int metrics_delta_p(lua_State *L)
{
    pair p = check_pair(L);
    const int32_t *targets = check_targets(L, 3, &p.a);
    double *out = buffer(L, p.rows, sizeof *out);
    ql_err err;
    if (ql_metrics_delta_p(&p.a, &p.b, targets, out, &err) != QL_OK) return qlua_fail(L, &err);
    return push_doubles(L, out, p.rows);
}

/* nucleus(a, b, top_p, temperature) -> Jaccard of the nuclei */
static int metrics_nucleus(lua_State *L)
{
    pair p = check_pair(L);
    double top_p = luaL_checknumber(L, 3), temperature = luaL_optnumber(L, 4, 1);
    double *out = buffer(L, p.rows, sizeof *out);
    ql_err err;
    if (ql_metrics_nucleus(&p.a, &p.b, top_p, temperature, out, &err) != QL_OK) return qlua_fail(L, &err);
    return push_doubles(L, out, p.rows);
}

static double *check_numbers(lua_State *L, int arg, int *n)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    lua_Integer count = luaL_len(L, arg);
    luaL_argcheck(L, count > 0 && count <= 1000, arg, "1 to 1000 numbers expected");
    double *list = buffer(L, count, sizeof *list);
    for (lua_Integer i = 0; i < count; i++) {
        int is_number;
        lua_geti(L, arg, i + 1);
        list[i] = lua_tonumberx(L, -1, &is_number);
        luaL_argcheck(L, is_number, arg, "a list of numbers expected");
        lua_pop(L, 1);
    }
    *n = (int)count;
    return list;
}

static void push_nucleus_pair(lua_State *L, const ql_nucleus_pair *p)
{
    lua_createtable(L, 0, 4);
    lua_pushnumber(L, p->overlap);
    lua_setfield(L, -2, "overlap");
    lua_createtable(L, 2, 0);
    lua_createtable(L, 2, 0);
    for (int m = 0; m < 2; m++) {
        lua_pushinteger(L, p->size[m]);
        lua_rawseti(L, -3, m + 1);
        lua_pushnumber(L, p->mass[m]);
        lua_rawseti(L, -2, m + 1);
    }
    lua_setfield(L, -3, "masses");
    lua_setfield(L, -2, "sizes");
    lua_pushboolean(L, p->has_top);
    lua_setfield(L, -2, "has_top");
}

/* nuclei(a, b, {top_p, ...}, {temperature, ...}) -> [row][temperature][top_p] = {overlap, sizes, masses,
 * has_top} */
static int metrics_nuclei(lua_State *L)
{
    pair p = check_pair(L);
    int np, nt;
    const double *top_ps = check_numbers(L, 3, &np), *temperatures = check_numbers(L, 4, &nt);
    ql_nucleus_pair *out = buffer(L, p.rows * np * nt, sizeof *out);
    ql_err err;
    if (ql_metrics_nuclei(&p.a, &p.b, top_ps, np, temperatures, nt, out, &err) != QL_OK)
        return qlua_fail(L, &err);
    lua_createtable(L, (int)p.rows, 0);
    for (int64_t r = 0; r < p.rows; r++) {
        lua_createtable(L, nt, 0);
        for (int t = 0; t < nt; t++) {
            lua_createtable(L, np, 0);
            for (int j = 0; j < np; j++) {
                push_nucleus_pair(L, out + (r * nt + t) * np + j);
                lua_rawseti(L, -2, j + 1);
            }
            lua_rawseti(L, -2, t + 1);
        }
        lua_rawseti(L, -2, r + 1);
    }
    return 1;
}

/* loglik(logits, targets) -> ln p(target), whether the target is the most likely token */
static int metrics_loglik(lua_State *L)
{
    ql_tensor a = check_logits(L, 1);
    const int32_t *targets = check_targets(L, 2, &a);
    double *out = buffer(L, a.shape[0], sizeof *out);
    uint8_t *greedy = buffer(L, a.shape[0], sizeof *greedy);
    ql_err err;
    if (ql_metrics_loglik(&a, targets, out, greedy, &err) != QL_OK) return qlua_fail(L, &err);
    push_doubles(L, out, a.shape[0]);
    return 1 + push_flags(L, greedy, a.shape[0]);
}

/* entropy(logits) -> nats */
static int metrics_entropy(lua_State *L)
{
    ql_tensor a = check_logits(L, 1);
    double *out = buffer(L, a.shape[0], sizeof *out);
    ql_err err;
    if (ql_metrics_entropy(&a, out, &err) != QL_OK) return qlua_fail(L, &err);
    return push_doubles(L, out, a.shape[0]);
}

void qlua_metrics_open(lua_State *L)
{
    static const luaL_Reg functions[] = {
        {"jaccard", metrics_jaccard}, {"agreement", metrics_agreement}, {"kl", metrics_kl},
        {"delta_p", metrics_delta_p}, {"nucleus", metrics_nucleus},     {"nuclei", metrics_nuclei},
        {"loglik", metrics_loglik},   {"entropy", metrics_entropy},     {NULL, NULL}};
    luaL_newlib(L, functions);
    lua_setfield(L, -2, "metrics");
}
