#include "lua_tokenizer.h"

#include <limits.h>

#include "lua_box.h"
#include "mem.h"
#include "tokenizer.h"

#define TOKENIZER "qlua.tokenizer"
#define STREAM "qlua.tokenizer.stream"
#define MEMORY "qlua.tokenizer.memory"

typedef struct {
    ql_tokenizer *t; /* NULL: closed */
} tokenizer_box;

typedef struct {
    ql_token_stream *s;          /* NULL: closed */
    const tokenizer_box *parent; /* kept alive by the user value */
} stream_box;

/* Memory that core hands over, owned by the collector while Lua may raise. */
typedef struct {
    void *p;
} memory_box;

static int memory_close(lua_State *L)
{
    memory_box *box = luaL_checkudata(L, 1, MEMORY);
    ql_free(box->p);
    box->p = NULL;
    return 0;
}

static ql_tokenizer *check(lua_State *L, int arg)
{
    tokenizer_box *box = luaL_checkudata(L, arg, TOKENIZER);
    if (box->t == NULL) luaL_argerror(L, arg, "the tokenizer is closed");
    return box->t;
}

static int32_t check_id(lua_State *L, int arg)
{
    lua_Integer id = luaL_checkinteger(L, arg);
    luaL_argcheck(L, id >= 0 && id <= INT32_MAX, arg, "not a token id");
    return (int32_t)id;
}

/* tokenizer.load(path) -> tokenizer, or nil and an error */
static int tokenizer_load(lua_State *L)
{
    const char *path = luaL_checkstring(L, 1);
    tokenizer_box *box = qlua_box_push(L, TOKENIZER, sizeof *box);
    ql_err err;
    return ql_tokenizer_load(path, &box->t, &err) == QL_OK ? 1 : qlua_push_err(L, &err);
}

static int tokenizer_close(lua_State *L)
{
    tokenizer_box *box = luaL_checkudata(L, 1, TOKENIZER);
    ql_tokenizer_free(box->t);
    box->t = NULL;
    return 0;
}

/* tok:encode(text, {bos=, special=}) -> ids, or nil and an error */
static int tokenizer_encode(lua_State *L)
{
    static const char *const known[] = {"bos", "special", NULL};
    size_t len, n;
    ql_tokenizer *t = check(L, 1);
    const char *text = luaL_checklstring(L, 2, &len);
    qlua_options_check(L, 3, known);
    unsigned flags = qlua_option_boolean(L, 3, "bos", true) ? QL_TOKENIZER_BOS : 0;
    if (qlua_option_boolean(L, 3, "special", false)) flags |= QL_TOKENIZER_SPECIAL;
    memory_box *box = qlua_box_push(L, MEMORY, sizeof *box);
    int32_t *ids;
    ql_err err;
    if (ql_tokenizer_encode(t, text, len, flags, &ids, &n, &err) != QL_OK) return qlua_push_err(L, &err);
    box->p = ids;
    lua_createtable(L, n < INT_MAX ? (int)n : 0, 0);
    for (size_t i = 0; i < n; i++) {
        lua_pushinteger(L, ids[i]);
        lua_rawseti(L, -2, (lua_Integer)i + 1);
    }
    ql_free(ids);
    box->p = NULL;
    return 1;
}

/* The ids of the table at `arg`, in memory of the collector pushed on the stack. */
static int32_t *read_ids(lua_State *L, int arg, size_t *n)
{
    luaL_checktype(L, arg, LUA_TTABLE);
    *n = lua_rawlen(L, arg);
    int32_t *ids = lua_newuserdatauv(L, *n * sizeof *ids, 0);
    for (size_t i = 0; i < *n; i++) {
        int is_integer;
        lua_rawgeti(L, arg, (lua_Integer)i + 1);
        lua_Integer id = lua_tointegerx(L, -1, &is_integer);
        if (!is_integer || id < 0 || id > INT32_MAX)
            luaL_argerror(L, arg, lua_pushfstring(L, "item %I is not a token id", (LUAI_UACINT)i + 1));
        ids[i] = (int32_t)id;
        lua_pop(L, 1);
    }
    return ids;
}

/* tok:decode(ids, {skip_special=}) -> text, or nil and an error */
static int tokenizer_decode(lua_State *L)
{
    static const char *const known[] = {"skip_special", NULL};
    size_t n, len;
    const ql_tokenizer *t = check(L, 1);
    qlua_options_check(L, 3, known);
    bool skip = qlua_option_boolean(L, 3, "skip_special", false);
    const int32_t *ids = read_ids(L, 2, &n);
    memory_box *box = qlua_box_push(L, MEMORY, sizeof *box);
    char *text;
    ql_err err;
    if (ql_tokenizer_decode(t, ids, n, skip, &text, &len, &err) != QL_OK) return qlua_push_err(L, &err);
    box->p = text;
    lua_pushlstring(L, text, len);
    ql_free(text);
    box->p = NULL;
    return 1;
}

/* tok:id(token) -> id or nil */
static int tokenizer_id(lua_State *L)
{
    size_t len;
    const ql_tokenizer *t = check(L, 1);
    const char *token = luaL_checklstring(L, 2, &len);
    int32_t id = ql_tokenizer_id(t, token, len);
    if (id < 0) return lua_pushnil(L), 1;
    lua_pushinteger(L, id);
    return 1;
}

/* tok:token(id) -> token as the file writes it, or nil */
static int tokenizer_token(lua_State *L)
{
    size_t len;
    const ql_tokenizer *t = check(L, 1);
    const char *token = ql_tokenizer_token(t, check_id(L, 2), &len);
    if (token == NULL) return lua_pushnil(L), 1;
    lua_pushlstring(L, token, len);
    return 1;
}

/* tok:is_special(id) -> boolean */
static int tokenizer_is_special(lua_State *L)
{
    const ql_tokenizer *t = check(L, 1);
    lua_pushboolean(L, ql_tokenizer_is_special(t, check_id(L, 2)));
    return 1;
}

/* tok:vocab_size() -> one past the largest id */
static int tokenizer_vocab_size(lua_State *L)
{
    lua_pushinteger(L, ql_tokenizer_vocab_size(check(L, 1)));
    return 1;
}

static void set_role(lua_State *L, const char *name, int32_t id)
{
    if (id < 0) return;
    lua_pushinteger(L, id);
    lua_setfield(L, -2, name);
}

/* tok:special() -> {bos=, eos=, unk=, pad=}, without those that there are not */
static int tokenizer_special(lua_State *L)
{
    ql_tokenizer_roles roles = ql_tokenizer_special(check(L, 1));
    lua_createtable(L, 0, 4);
    set_role(L, "bos", roles.bos);
    set_role(L, "eos", roles.eos);
    set_role(L, "unk", roles.unk);
    set_role(L, "pad", roles.pad);
    return 1;
}

static int tokenizer_tostring(lua_State *L)
{
    const tokenizer_box *box = luaL_checkudata(L, 1, TOKENIZER);
    if (box->t == NULL) return lua_pushliteral(L, "tokenizer (closed)"), 1;
    lua_pushfstring(L, "tokenizer (%d ids)", (int)ql_tokenizer_vocab_size(box->t));
    return 1;
}

/* tok:stream({skip_special=}) -> stream, or nil and an error */
static int tokenizer_stream(lua_State *L)
{
    static const char *const known[] = {"skip_special", NULL};
    const ql_tokenizer *t = check(L, 1);
    qlua_options_check(L, 2, known);
    bool skip = qlua_option_boolean(L, 2, "skip_special", false);
    stream_box *box = qlua_box_push(L, STREAM, sizeof *box);
    lua_pushvalue(L, 1);
    lua_setiuservalue(L, -2, 1);
    box->parent = lua_touserdata(L, 1);
    ql_err err;
    return ql_token_stream_new(t, skip, &box->s, &err) == QL_OK ? 1 : qlua_push_err(L, &err);
}

static ql_token_stream *check_stream(lua_State *L)
{
    stream_box *box = luaL_checkudata(L, 1, STREAM);
    if (box->s == NULL) luaL_argerror(L, 1, "the stream is closed");
    if (box->parent->t == NULL) luaL_argerror(L, 1, "the stream's tokenizer is closed");
    return box->s;
}

/* stream:push(id) -> the text that is complete with it, possibly "" */
static int stream_push(lua_State *L)
{
    const char *text;
    size_t len;
    ql_token_stream *s = check_stream(L);
    int32_t id = check_id(L, 2);
    ql_err err;
    if (ql_token_stream_push(s, id, &text, &len, &err) != QL_OK) return qlua_push_err(L, &err);
    lua_pushlstring(L, text, len);
    return 1;
}

/* stream:flush() -> the text held back; the stream starts afresh */
static int stream_flush(lua_State *L)
{
    const char *text;
    size_t len;
    ql_err err;
    if (ql_token_stream_flush(check_stream(L), &text, &len, &err) != QL_OK) return qlua_push_err(L, &err);
    lua_pushlstring(L, text, len);
    return 1;
}

static int stream_close(lua_State *L)
{
    stream_box *box = luaL_checkudata(L, 1, STREAM);
    ql_token_stream_free(box->s);
    box->s = NULL;
    return 0;
}

static int stream_tostring(lua_State *L)
{
    const stream_box *box = luaL_checkudata(L, 1, STREAM);
    lua_pushstring(L, box->s != NULL ? "token stream" : "token stream (closed)");
    return 1;
}

int luaopen_qlua_tokenizer(lua_State *L)
{
    static const luaL_Reg methods[] = {{"encode", tokenizer_encode},
                                       {"decode", tokenizer_decode},
                                       {"stream", tokenizer_stream},
                                       {"id", tokenizer_id},
                                       {"token", tokenizer_token},
                                       {"is_special", tokenizer_is_special},
                                       {"special", tokenizer_special},
                                       {"vocab_size", tokenizer_vocab_size},
                                       {NULL, NULL}};
    static const luaL_Reg stream_methods[] = {{"push", stream_push}, {"flush", stream_flush}, {NULL, NULL}};
    static const luaL_Reg meta[] = {{"__tostring", tokenizer_tostring}, {NULL, NULL}};
    static const luaL_Reg stream_meta[] = {{"__tostring", stream_tostring}, {NULL, NULL}};
    static const luaL_Reg none[] = {{NULL, NULL}};
    static const luaL_Reg functions[] = {{"load", tokenizer_load}, {NULL, NULL}};
    qlua_box_type(L, TOKENIZER, methods, meta, tokenizer_close);
    qlua_box_type(L, STREAM, stream_methods, stream_meta, stream_close);
    qlua_box_type(L, MEMORY, none, NULL, memory_close);
    luaL_newlib(L, functions);
    return 1;
}
