/* The module qlua.tokenizer: text <-> token ids for Lua.
 *
 *   local tok <close> = assert(tokenizer.load(path))   -- folder or tokenizer.json; nil, err when it cannot
 * be tok:encode(text, {bos = true, special = false})    -- {ids}; nil, err when text is not UTF-8 bos: let
 * the post-processor add its tokens (BOS; EOS where the file asks for it) special: read special tokens
 * written in the text, such as "<|eot_id|>", as such tok:decode(ids, {skip_special = false})            --
 * text tok:stream({skip_special = false})                 -- stream; stream:push(id) and stream:flush() give
 * text tok:id(token), tok:token(id)                       -- nil where there is none tok:is_special(id) --
 * whether it is an added token marked special tok:special()                                      -- {bos =
 * id, eos = id, unk = id, pad = id}, those there are tok:vocab_size()                                   --
 * one past the largest id tok:close()
 *
 * Token ids keep their values, from 0; positions in tables count from 1.
 */
#ifndef QLUA_LUA_TOKENIZER_H
#define QLUA_LUA_TOKENIZER_H

#include <lua.h>

int luaopen_qlua_tokenizer(lua_State *L);

#endif
