local tokenizer = require "qlua.tokenizer"

local golden <const> = "tests/golden/tokenizers/"
local llama3 <const> = golden .. "llama3_like"
local llama2 <const> = golden .. "llama2_like"

describe("tokenizer", function()
  it("gives back the text it encoded", function()
    for _, folder in ipairs { llama3, llama2 } do
      local tok <close> = assert(tokenizer.load(folder))
      local texts <const> =
        { "", "Hello, world!", "  two  spaces\n", "caf\u{e9} \u{65e5}\u{672c} \u{1f600}", "a\0b" }
      for _, text in ipairs(texts) do
        local ids = assert(tok:encode(text, { bos = false }))
        assert.equal(text, tok:decode(ids))
      end
    end
  end)

  it("adds the post-processor's tokens unless told not to", function()
    local tok <close> = assert(tokenizer.load(llama3))
    local with, without = tok:encode "Hello", tok:encode("Hello", { bos = false })
    assert.equal(tok:special().bos, with[1])
    assert.same(without, table.move(with, 2, #with, 1, {}))
    assert.equal("Hello", tok:decode(with, { skip_special = true }))
    assert.equal("<|begin_of_text|>Hello", tok:decode(with))
  end)

  it("reads special tokens in the text only when asked", function()
    local tok <close> = assert(tokenizer.load(llama3))
    local eot = tok:id "<|eot_id|>"
    assert.same({ eot }, tok:encode("<|eot_id|>", { bos = false, special = true }))
    local plain = tok:encode("<|eot_id|>", { bos = false })
    assert.is_true(#plain > 1)
    assert.equal("<|eot_id|>", tok:decode(plain))
  end)

  it("streams whole characters", function()
    for _, folder in ipairs { llama3, llama2 } do
      local tok <close> = assert(tokenizer.load(folder))
      local text = "na\u{ef}ve \u{1f600}\u{65e5} end"
      local stream <close> = assert(tok:stream())
      local parts = {}
      for _, id in ipairs(tok:encode(text, { bos = false })) do
        local part = stream:push(id)
        assert.is_truthy(utf8.len(part))
        parts[#parts + 1] = part
      end
      parts[#parts + 1] = stream:flush()
      assert.equal(text, table.concat(parts))
    end
  end)

  it("knows its tokens", function()
    local tok <close> = assert(tokenizer.load(llama2))
    local special = tok:special()
    assert.equal("<s>", tok:token(special.bos))
    assert.equal(special.eos, tok:id "</s>")
    assert.is_nil(special.pad)
    assert.is_nil(tok:id "no such token")
    assert.is_nil(tok:token(tok:vocab_size()))
    assert.is_true(tok:is_special(special.eos))
    assert.is_false(tok:is_special(tok:vocab_size()))
    assert.matches("tokenizer %(%d+ ids%)", tostring(tok))
    assert.equal("", tok:decode { tok:vocab_size() + 7 })
  end)

  it("returns what the world did wrong", function()
    local tok, err = tokenizer.load "/no/such/folder"
    assert.is_nil(tok)
    assert.equal("not_found", err.code)
    assert.matches("/no/such/folder", tostring(err))
    local empty = os.tmpname()
    tok, err = tokenizer.load(empty)
    os.remove(empty)
    assert.is_nil(tok)
    assert.equal("format", err.code)
    local ok <close> = assert(tokenizer.load(llama3))
    local ids
    ids, err = ok:encode "abc\xff"
    assert.is_nil(ids)
    assert.equal("format", err.code)
    assert.matches("offset 3", err.message)
    assert.is_string(err.hint)
  end)

  it("raises on misuse", function()
    local tok <close> = assert(tokenizer.load(llama3))
    local stream <close> = assert(tok:stream())
    assert.has_error(function() tokenizer.load(nil) end)
    assert.has_error(function() tok:encode(nil) end)
    assert.error_matches(function() tok:encode("a", { boss = true }) end, "boss")
    assert.error_matches(function() tok:decode { 1, -1 } end, "item 2")
    assert.error_matches(function() tok:decode { "x" } end, "item 1")
    assert.error_matches(function() tok:decode { 1.5 } end, "item 1")
    assert.has_error(function() stream:push(-1) end)
    assert.has_error(function() stream:push(1 << 31) end)
    assert.has_error(function() tok:token(-1) end)
  end)

  it("closes once and stays closed", function()
    local tok = assert(tokenizer.load(llama3))
    local stream = assert(tok:stream())
    tok:close()
    tok:close()
    assert.error_matches(function() tok:encode "a" end, "closed")
    assert.error_matches(function() stream:push(1) end, "closed")
    assert.matches("closed", tostring(tok))
    stream:close()
    stream:close()
    assert.error_matches(function() stream:flush() end, "closed")
  end)

  it("keeps its tokenizer alive through a stream", function()
    local stream = assert(assert(tokenizer.load(llama3)):stream())
    collectgarbage()
    collectgarbage()
    assert.equal("!", stream:push(0))
    stream = nil -- luacheck: ignore
    collectgarbage()
  end)
end)
