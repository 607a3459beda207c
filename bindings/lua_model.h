/* What the files of the model binding share: the box, and calls back into Lua. */
#ifndef QLUA_LUA_MODEL_H
#define QLUA_LUA_MODEL_H

#include "lua_box.h"

typedef struct {
    ql_llama *model;
    int calls;    /* running calls that may call back into Lua: the model is not closed under them */
    bool passing; /* one of them is inside a forward pass: no second pass in its working memory */
} qlua_model_box;

/* The open model at `arg`, and the same for a forward pass: not inside another one. */
qlua_model_box *qlua_model_box_check(lua_State *L, int arg);
qlua_model_box *qlua_model_box_free(lua_State *L, int arg);

/* A Lua function that core calls through C. It runs protected, so that its error does not jump over core's
 * frames. */
typedef struct {
    lua_State *L;
    int fn;      /* stack index of the Lua function */
    bool raised; /* the error is on top of the stack */
} qlua_callback;

/* Call the function whose arguments have been pushed after it; on an error it stays on the stack. */
bool qlua_callback_run(qlua_callback *cb, int nargs, int nresults);

/* The rows of a call, in buffers that the stack owns. */
typedef struct {
    int rows;
    int32_t *ids, *lengths, *outputs;
} qlua_rows;

/* {id, ...} or {{id, ...}, ...} at `arg`. */
qlua_rows qlua_rows_check(lua_State *L, int arg);

int qlua_model_forward(lua_State *L);  /* lua_forward.c */
int qlua_model_generate(lua_State *L); /* lua_generate.c */
void qlua_forward_open(lua_State *L);  /* registers the box that owns kept rows */
void qlua_generate_open(lua_State *L); /* registers the box that owns a result */

#endif
