-- Every function that C exports is annotated in scripts/qlua/meta.lua or where Lua defines it.

local core = require "qlua.core"

local function read(path)
  local file <close> = assert(io.open(path))
  return file:read "a"
end

describe("annotations", function()
  local text = read "scripts/qlua/meta.lua"
  local lua_side = read "scripts/qlua/device.lua" .. read "scripts/qlua/model.lua"

  local function annotated(owner, separator, name)
    local pattern = ("function %s%s%s("):format(owner, separator, name)
    return text:find(pattern, 1, true) or lua_side:find(pattern, 1, true)
  end

  for _, type_name in ipairs { "tensor", "device", "model", "checkpoint" } do
    it("cover the methods of a " .. type_name, function()
      require "qlua"
      for name in pairs(core.methods(type_name)) do
        local known = annotated(type_name, ":", name) or annotated(type_name, ".", name)
        assert.truthy(known, type_name .. ":" .. name .. " is not annotated")
      end
    end)
  end

  local modules = { core = core, metrics = core.metrics, resample = core.resample,
    sys = require "qlua.sys", json = require "qlua.json",
    tokenizers = require "qlua.tokenizer", interrupt = require "qlua.interrupt",
    probe = require "qlua.probe", store_module = require "qlua.store" }
  for owner, module in pairs(modules) do
    it("cover the module " .. owner, function()
      for name, value in pairs(module) do
        if type(value) == "function" then
          assert.truthy(annotated(owner, ".", name), owner .. "." .. name .. " is not annotated")
        end
      end
    end)
  end

  it("cover the results store", function()
    local store <close> = assert(require("qlua.store").open ":memory:")
    for name in pairs(getmetatable(store).__index) do assert.truthy(annotated("store", ":", name), name) end
  end)

  it("cover tokenizers and their streams", function()
    local tok <close> = assert(require("qlua.tokenizer").load "tests/golden/tokenizers/llama3_like")
    local stream = tok:stream()
    for name in pairs(getmetatable(tok).__index) do assert.truthy(annotated("tokenizer", ":", name), name) end
    for name in pairs(getmetatable(stream).__index) do assert.truthy(annotated("stream", ":", name), name) end
  end)
end)
