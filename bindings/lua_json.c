/* Module qlua.json: JSON text to Lua values and back.
 *
 *   json.decode(text, options) -> value, or nil and an error {code, message, hint}
 *     Strict RFC 8259: what json_scan.h refuses is refused, with line and column, and so is a key given
 * twice. Integers that fit become Lua integers, all other numbers floats; null becomes json.null, so that it
 * stays in tables and a document that is null is not taken for a failure. options.name       a file name to
 * put before messages options.max_depth  deepest nesting, 1 to 256 (default 200) options.order      remember
 * the order of every object's keys, for encode
 *
 *   json.encode(value, options) -> text; raises on what JSON cannot hold
 *     Integers are written as such, floats in the fewest digits that read back the same and always with a
 * point or an exponent (2.0), so that each comes back as what it was. NaN and infinities are refused. A table
 * is an array when json.array marked it (decoded arrays are) or when it has an element 1; then its keys must
 * be exactly 1..n. Any other table is an object and has only string keys; an empty unmarked table is {}. Keys
 * stand in the order that decode remembered, else first those of options.keys and then the rest sorted by
 *     bytes: the same value always gives the same text.
 *     options.indent     spaces per level (default: one line)
 *     options.keys       list of keys that come first, at every level
 *     options.invalid    "replace" (default): bytes that are not UTF-8 become U+FFFD; "error": they raise
 *
 *   json.array(t) -> t    mark a table (default a new one) as an array
 *   json.is_array(v)      true for a marked table
 *   json.null             stands for null
 */
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include <lauxlib.h>
#include <lua.h>

#include "json_scan.h"
#include "lua_common.h"
#include "qlua_modules.h"
#include "text.h"

#define DEPTH 200
#define ARRAY_META "qlua.json.array"
#define TEXT_META "qlua.json.text"
#define ORDER_FIELD "__jsonorder"

static void push_null(lua_State *L)
{
    lua_pushlightuserdata(L, NULL);
}

static void mark_array(lua_State *L)
{
    luaL_newmetatable(L, ARRAY_META);
    lua_setmetatable(L, -2);
}

static bool is_marked(lua_State *L, int index)
{
    if (!lua_getmetatable(L, index)) return false;
    luaL_getmetatable(L, ARRAY_META);
    bool same = lua_rawequal(L, -1, -2);
    lua_pop(L, 2);
    return same;
}

typedef struct {
    lua_State *L;
    ql_json_scan scan;
    bool order;
    ql_err err;
} decoder;

static ql_status decode_value(decoder *d, const ql_json_token *token);

static void push_string(lua_State *L, const ql_json_token *token)
{
    if (!token->escaped) {
        lua_pushlstring(L, token->text, token->size);
        return;
    }
    luaL_Buffer buffer;
    char *room = luaL_buffinitsize(L, &buffer, token->size);
    luaL_pushresultsize(&buffer, ql_json_unescape(token, room));
}

/* Refuse the key on top of the stack when the table below it has it. */
static ql_status check_twice(decoder *d, int table)
{
    lua_pushvalue(d->L, -1);
    bool twice = lua_rawget(d->L, table) != LUA_TNIL;
    lua_pop(d->L, 1);
    if (!twice) return QL_OK;
    size_t size;
    char text[QL_JSON_SHOWN];
    const char *key = lua_tolstring(d->L, -1, &size);
    return ql_err_set(&d->err, QL_ERR_FORMAT, "before byte %zu: key \"%s\" is given twice", d->scan.pos,
                      ql_json_shown(key, size, text));
}

static void set_order(lua_State *L, int table, int order)
{
    lua_createtable(L, 0, 1);
    lua_pushvalue(L, order);
    lua_setfield(L, -2, ORDER_FIELD);
    lua_setmetatable(L, table);
}

static ql_status decode_object(decoder *d)
{
    lua_State *L = d->L;
    ql_json_token token;
    lua_newtable(L);
    int table = lua_gettop(L), order = table + 1;
    if (d->order) lua_newtable(L);
    for (lua_Integer n = 1;; n++) {
        ql_status status = ql_json_scan_next(&d->scan, &token, &d->err);
        if (status) return status;
        if (token.kind == QL_JSON_OBJECT_END) break;
        push_string(L, &token);
        status = check_twice(d, table);
        if (status) return status;
        if (d->order) {
            lua_pushvalue(L, -1);
            lua_rawseti(L, order, n);
        }
        status = ql_json_scan_next(&d->scan, &token, &d->err);
        if (!status) status = decode_value(d, &token);
        if (status) return status;
        lua_rawset(L, table);
    }
    if (d->order) set_order(L, table, order);
    lua_settop(L, table);
    return QL_OK;
}

static ql_status decode_array(decoder *d)
{
    ql_json_token token;
    lua_newtable(d->L);
    int table = lua_gettop(d->L);
    for (lua_Integer n = 1;; n++) {
        ql_status status = ql_json_scan_next(&d->scan, &token, &d->err);
        if (status) return status;
        if (token.kind == QL_JSON_ARRAY_END) break;
        status = decode_value(d, &token);
        if (status) return status;
        lua_rawseti(d->L, table, n);
    }
    mark_array(d->L);
    return QL_OK;
}

/* Push the value that `token` begins. */
static ql_status decode_value(decoder *d, const ql_json_token *token)
{
    luaL_checkstack(d->L, 8, "JSON is nested too deeply");
    switch (token->kind) {
    case QL_JSON_OBJECT:
        return decode_object(d);
    case QL_JSON_ARRAY:
        return decode_array(d);
    case QL_JSON_STRING:
        push_string(d->L, token);
        break;
    case QL_JSON_INT:
        lua_pushinteger(d->L, (lua_Integer)token->integer);
        break;
    case QL_JSON_FLOAT:
        lua_pushnumber(d->L, (lua_Number)token->number);
        break;
    case QL_JSON_TRUE:
        lua_pushboolean(d->L, true);
        break;
    case QL_JSON_FALSE:
        lua_pushboolean(d->L, false);
        break;
    default:
        push_null(d->L);
    }
    return QL_OK;
}

static lua_Integer option_integer(lua_State *L, int options, const char *name, lua_Integer fallback,
                                  lua_Integer min, lua_Integer max)
{
    if (lua_isnoneornil(L, options)) return fallback;
    luaL_checktype(L, options, LUA_TTABLE);
    int type = lua_getfield(L, options, name), whole;
    lua_Integer value = type == LUA_TNIL ? fallback : lua_tointegerx(L, -1, &whole);
    if (type != LUA_TNIL && (!whole || value < min || value > max))
        luaL_error(L, "option %s: expected an integer from %d to %d", name, (int)min, (int)max);
    lua_pop(L, 1);
    return value;
}

static int json_decode(lua_State *L)
{
    size_t size;
    const char *text = luaL_checklstring(L, 1, &size), *name = NULL;
    decoder d = {.L = L};
    int depth = (int)option_integer(L, 2, "max_depth", DEPTH, 1, QL_JSON_DEPTH);
    lua_settop(L, 2);
    if (lua_istable(L, 2)) {
        lua_getfield(L, 2, "order");
        d.order = lua_toboolean(L, -1);
        lua_getfield(L, 2, "name");
        name = lua_tostring(L, -1); /* stays on the stack */
    }
    ql_json_token token;
    ql_json_scan_init(&d.scan, text, size, depth);
    ql_status status = ql_json_scan_next(&d.scan, &token, &d.err);
    if (!status) status = decode_value(&d, &token);
    if (!status) status = ql_json_scan_next(&d.scan, &token, &d.err);
    if (!status) return 1;
    ql_err_prefix(&d.err, "%s%snot valid JSON: ", name ? name : "", name ? ": " : "");
    return qlua_push_err(L, &d.err);
}

typedef struct {
    lua_State *L;
    ql_text *text; /* owned by a userdata, so that an error frees it */
    int indent;    /* -1: one line */
    int depth;
    int first_keys; /* stack index of options.keys, or 0 */
    bool strict;
} encoder;

typedef struct {
    const char *text;
    size_t size;
    lua_Integer rank; /* place in the order asked for; LUA_MAXINTEGER: none */
} object_key;

static int text_gc(lua_State *L)
{
    ql_text_free(lua_touserdata(L, 1));
    return 0;
}

static void encode_value(encoder *e, int index);

static void new_line(encoder *e)
{
    if (e->indent < 0) return;
    ql_text_put(e->text, "\n", 1);
    for (int i = 0; i < e->indent * e->depth; i++) ql_text_put(e->text, " ", 1);
}

static void encode_string(encoder *e, const char *text, size_t size)
{
    if (e->strict) {
        const char *p = text, *end = text + size;
        for (size_t step; p < end; p += step)
            if (!(step = ql_utf8_length(p, end)))
                luaL_error(e->L, "cannot encode a string that is not UTF-8 (byte %d)", (int)(p - text + 1));
    }
    ql_text_json(e->text, text, size);
}

static void encode_array(encoder *e, int index)
{
    lua_State *L = e->L;
    lua_Integer n = (lua_Integer)lua_rawlen(L, index), count = 0;
    for (lua_pushnil(L); lua_next(L, index); lua_pop(L, 1), count++)
        if (!lua_isinteger(L, -2) || lua_tointeger(L, -2) < 1 || lua_tointeger(L, -2) > n)
            luaL_error(L, "cannot encode a table with element 1 that has other keys than 1 to n");
    if (count != n)
        luaL_error(L, "cannot encode an array with holes (%d of %d elements)", (int)count, (int)n);
    ql_text_put(e->text, "[", 1);
    e->depth++;
    for (lua_Integer i = 1; i <= n; i++) {
        if (i > 1) ql_text_put(e->text, ",", 1);
        new_line(e);
        lua_rawgeti(L, index, i);
        encode_value(e, lua_gettop(L));
        lua_pop(L, 1);
    }
    e->depth--;
    if (n) new_line(e);
    ql_text_put(e->text, "]", 1);
}

static int compare_keys(const void *a, const void *b)
{
    const object_key *x = a, *y = b;
    if (x->rank != y->rank) return x->rank < y->rank ? -1 : 1;
    int order = memcmp(x->text, y->text, x->size < y->size ? x->size : y->size);
    return order ? order : x->size < y->size ? -1 : x->size > y->size;
}

/* Push a table from key to rank out of the list on top, or leave nil there. Replaces the list. */
static void make_ranks(lua_State *L)
{
    if (!lua_istable(L, -1)) {
        lua_pop(L, 1);
        lua_pushnil(L);
        return;
    }
    lua_newtable(L);
    for (lua_Integer i = 1; lua_rawgeti(L, -2, i) != LUA_TNIL; i++) {
        lua_pushinteger(L, i);
        lua_rawset(L, -3);
    }
    lua_pop(L, 1);
    lua_remove(L, -2);
}

/* Push the ranks for one object: the order it was decoded in, else those of the call. */
static void push_ranks(encoder *e, int index)
{
    if (luaL_getmetafield(e->L, index, ORDER_FIELD) != LUA_TNIL) {
        make_ranks(e->L);
        return;
    }
    if (e->first_keys)
        lua_pushvalue(e->L, e->first_keys);
    else
        lua_pushnil(e->L);
}

static lua_Integer rank_of(lua_State *L, int ranks, int key)
{
    if (!lua_istable(L, ranks)) return LUA_MAXINTEGER;
    lua_pushvalue(L, key);
    lua_Integer rank = lua_rawget(L, ranks) == LUA_TNUMBER ? lua_tointeger(L, -1) : LUA_MAXINTEGER;
    lua_pop(L, 1);
    return rank;
}

/* The object's keys in order; pushes the block that holds them. Their text is anchored by the table itself.
 */
static object_key *sorted_keys(encoder *e, int index, size_t *count)
{
    lua_State *L = e->L;
    size_t n = 0;
    for (lua_pushnil(L); lua_next(L, index); lua_pop(L, 1), n++)
        if (lua_type(L, -2) != LUA_TSTRING)
            luaL_error(
                L, "cannot encode a table with a %s as key; an array's keys are 1 to n, an object's strings",
                luaL_typename(L, -2));
    object_key *keys = lua_newuserdatauv(L, n ? n * sizeof *keys : 1, 0);
    push_ranks(e, index);
    int ranks = lua_gettop(L);
    n = 0;
    for (lua_pushnil(L); lua_next(L, index); lua_pop(L, 1), n++) {
        keys[n].text = lua_tolstring(L, -2, &keys[n].size);
        keys[n].rank = rank_of(L, ranks, ranks + 1);
    }
    lua_pop(L, 1);
    qsort(keys, n, sizeof *keys, compare_keys);
    *count = n;
    return keys;
}

static void encode_object(encoder *e, int index)
{
    lua_State *L = e->L;
    size_t n;
    const object_key *keys = sorted_keys(e, index, &n);
    ql_text_put(e->text, "{", 1);
    e->depth++;
    for (size_t i = 0; i < n; i++) {
        if (i) ql_text_put(e->text, ",", 1);
        new_line(e);
        encode_string(e, keys[i].text, keys[i].size);
        ql_text_put(e->text, ": ", e->indent < 0 ? 1 : 2);
        lua_pushlstring(L, keys[i].text, keys[i].size);
        lua_rawget(L, index);
        encode_value(e, lua_gettop(L));
        lua_pop(L, 1);
    }
    e->depth--;
    if (n) new_line(e);
    ql_text_put(e->text, "}", 1);
    lua_pop(L, 1);
}

static void encode_table(encoder *e, int index)
{
    lua_State *L = e->L;
    if (e->depth >= DEPTH)
        luaL_error(L, "cannot encode: nested over %d levels, or a table holds itself", DEPTH);
    luaL_checkstack(L, 10, "cannot encode: nested too deeply");
    bool array = is_marked(L, index);
    if (!array) {
        array = lua_rawgeti(L, index, 1) != LUA_TNIL;
        lua_pop(L, 1);
    }
    if (array)
        encode_array(e, index);
    else
        encode_object(e, index);
}

static void encode_number(encoder *e, int index)
{
    char text[QL_JSON_NUMBER];
    if (lua_isinteger(e->L, index)) {
        ql_text_printf(e->text, LUA_INTEGER_FMT, lua_tointeger(e->L, index));
        return;
    }
    double value = (double)lua_tonumber(e->L, index);
    if (!isfinite(value)) luaL_error(e->L, "cannot encode %f: JSON has no NaN and no infinity", value);
    ql_json_number_text(value, text);
    ql_text_puts(e->text, text);
}

static void encode_value(encoder *e, int index)
{
    lua_State *L = e->L;
    size_t size;
    switch (lua_type(L, index)) {
    case LUA_TNIL:
        ql_text_puts(e->text, "null");
        return;
    case LUA_TBOOLEAN:
        ql_text_puts(e->text, lua_toboolean(L, index) ? "true" : "false");
        return;
    case LUA_TNUMBER:
        encode_number(e, index);
        return;
    case LUA_TTABLE:
        encode_table(e, index);
        return;
    case LUA_TSTRING: {
        const char *text = lua_tolstring(L, index, &size);
        encode_string(e, text, size);
        return;
    }
    case LUA_TLIGHTUSERDATA:
        if (!lua_touserdata(L, index)) {
            ql_text_puts(e->text, "null");
            return;
        }
    }
    luaL_error(L, "cannot encode a %s as JSON", luaL_typename(L, index));
}

static int json_encode(lua_State *L)
{
    encoder e = {.L = L, .indent = -1};
    luaL_checkany(L, 1);
    e.indent = (int)option_integer(L, 2, "indent", -1, 0, 16);
    lua_settop(L, 2);
    if (lua_istable(L, 2)) {
        static const char *const modes[] = {"replace", "error", NULL};
        lua_getfield(L, 2, "invalid");
        e.strict = luaL_checkoption(L, -1, "replace", modes) == 1;
        if (lua_getfield(L, 2, "keys") != LUA_TNIL) luaL_checktype(L, -1, LUA_TTABLE);
        make_ranks(L);
        e.first_keys = lua_gettop(L);
    }
    e.text = lua_newuserdatauv(L, sizeof *e.text, 0);
    *e.text = (ql_text){0};
    if (luaL_newmetatable(L, TEXT_META)) {
        lua_pushcfunction(L, text_gc);
        lua_setfield(L, -2, "__gc");
    }
    lua_setmetatable(L, -2);
    encode_value(&e, 1);
    if (e.text->failed) return luaL_error(L, "not enough memory");
    lua_pushlstring(L, e.text->data, e.text->size);
    ql_text_free(e.text);
    return 1;
}

static int json_array(lua_State *L)
{
    if (lua_isnoneornil(L, 1)) {
        lua_settop(L, 0);
        lua_newtable(L);
    }
    luaL_checktype(L, 1, LUA_TTABLE);
    lua_settop(L, 1);
    mark_array(L);
    return 1;
}

static int json_is_array(lua_State *L)
{
    luaL_checkany(L, 1);
    lua_pushboolean(L, lua_istable(L, 1) && is_marked(L, 1));
    return 1;
}

int luaopen_qlua_json(lua_State *L)
{
    static const luaL_Reg functions[] = {
        {"decode", json_decode},
        {"encode", json_encode},
        {"array", json_array},
        {"is_array", json_is_array},
        {NULL, NULL},
    };
    luaL_newlib(L, functions);
    push_null(L);
    lua_setfield(L, -2, "null");
    return 1;
}
