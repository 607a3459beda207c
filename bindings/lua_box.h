/* Boxes: Lua userdata that own something of core, and the checks of arguments that all bindings share.
 *
 * Lua may raise an error at any call into it, so a binding first checks its arguments, then pushes the closed
 * box (userdata with nothing inside and its metatable), then lets core fill it. `:close()`, `__close` and
 * `__gc` are one idempotent function. Buffers that live across Lua calls are userdata too.
 */
#ifndef QLUA_LUA_BOX_H
#define QLUA_LUA_BOX_H

#include <lauxlib.h>
#include <lua.h>

#include "llama.h"
#include "lua_common.h"

#define QLUA_TENSOR "qlua.tensor"
#define QLUA_DEVICE "qlua.device"
#define QLUA_MODEL "qlua.model"
#define QLUA_CHECKPOINT "qlua.checkpoint"
#define QLUA_KVCACHE "qlua.kvcache"

/* Make metatable `name` with methods, metamethods and `close` under its three names; leaves nothing on the
 * stack. The method table is its __index, so that the library in Lua can add methods to it. */
void qlua_box_type(lua_State *L, const char *name, const luaL_Reg *methods, const luaL_Reg *meta,
                   lua_CFunction close);
/* Push a zeroed box of `bytes` with metatable `name`. */
void *qlua_box_push(lua_State *L, const char *name, size_t bytes);

/* Tensors. The box is on the stack, empty, until it is filled. */
ql_tensor *qlua_tensor_push(lua_State *L);
/* The open tensor at `arg`; raises for a closed one or another type. */
ql_tensor *qlua_tensor_check(lua_State *L, int arg);
ql_tensor *qlua_tensor_test(lua_State *L, int arg); /* NULL when it is no tensor */
int qlua_tensor_close(lua_State *L);                /* the close method */
void qlua_tensor_open(lua_State *L);                /* registers the type */

ql_device *qlua_device_check(lua_State *L, int arg);
void qlua_device_open(lua_State *L);
/* The CPU device that tensors made in Lua live on; opened at the first call, raises when that fails. */
ql_device *qlua_device_host(lua_State *L);

ql_llama *qlua_model_check(lua_State *L, int arg);
void qlua_model_open(lua_State *L);
void qlua_checkpoint_open(lua_State *L);
void qlua_metrics_open(lua_State *L);
void qlua_resample_open(lua_State *L);

/* The collector does not see the bytes of tensors and models: before `bytes` more are taken, collect when
 * more than the soft limit would have come on top of what is known to be in use. */
void qlua_pressure(lua_State *L, size_t bytes);
/* After QL_ERR_MEMORY: collect once; true the first time, so that the caller retries. */
bool qlua_retry(lua_State *L, ql_status status, int *tries);

/* Raise `err` when it is a misuse or an interrupt; otherwise push nil and the error table and return 2. */
int qlua_fail(lua_State *L, const ql_err *err);

/* Token ids of the table at `arg` as int32 in a buffer that the stack owns (pushed); *n ids. */
int32_t *qlua_check_ids(lua_State *L, int arg, int32_t *n);

/* Options: the table at `arg`, or nothing. Raises for a key that is not in `known` (NULL-terminated). */
void qlua_options_check(lua_State *L, int arg, const char *const *known);
lua_Integer qlua_option_integer(lua_State *L, int arg, const char *key, lua_Integer preset, lua_Integer min,
                                lua_Integer max);
double qlua_option_number(lua_State *L, int arg, const char *key, double preset);
bool qlua_option_boolean(lua_State *L, int arg, const char *key, bool preset);
/* Valid while the table is; `preset` when absent. */
const char *qlua_option_string(lua_State *L, int arg, const char *key, const char *preset);

#endif
