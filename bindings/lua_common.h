/* What every binding shares: how a failure of the outside world reaches Lua.
 *
 * Such a failure is returned, not raised: nil and a table {code=, message=, hint=}. `code` is ql_err_name's
 * word, `hint` is nil when there is no advice. tostring(err) is "message (hint)", which is also what assert()
 * prints.
 */
#ifndef QLUA_LUA_COMMON_H
#define QLUA_LUA_COMMON_H

#include <lua.h>

#include "err.h"

#define QLUA_ERROR_META "qlua.error" /* registry name of the error tables' metatable */

/* Push the error table alone. Copies what it needs from `err`. */
void qlua_push_err_table(lua_State *L, const ql_err *err);

/* Push nil and the error table; returns 2, so that `return qlua_push_err(L, &err)` ends a Lua function. */
int qlua_push_err(lua_State *L, const ql_err *err);

/* Push the metatable of error tables, made at the first call, for libraries in Lua that build such tables. */
void qlua_push_err_meta(lua_State *L);

#endif
