local lfs = require "lfs"
local strict = require "qlua.strict"

describe("strict globals", function()
  local function compile(text) return assert(load(text, "=lib", "t", strict)) end

  it("read what exists, now", function()
    assert.equal(print, compile("return print")())
    _G.qlua_spec_global = 1
    assert.equal(1, compile("return qlua_spec_global")())
    _G.qlua_spec_global = nil
  end)

  it("refuse a name that is not defined, at the line that uses it", function()
    local _, message = pcall(compile("\nreturn prnit"))
    assert.equal("lib:2: undefined global 'prnit'", message)
  end)

  it("refuse to write any", function()
    local _, message = pcall(compile("x = 1"))
    assert.equal("lib:1: a library may not write the global 'x'; declare it local", message)
    assert.is_false((pcall(compile("print = nil"))))
    assert.is_function(print)
    assert.is_nil(rawget(_G, "x"))
  end)

  it("hold in every module of the library", function()
    for name in lfs.dir "scripts/qlua" do
      if name:find "%.lua$" and name ~= "strict.lua" and name ~= "meta.lua" then
        local file <close> = assert(io.open("scripts/qlua/" .. name))
        local code = file:read("a"):gsub("^#[^\n]*", ""):gsub("^[%s]*", "")
        while code:find "^%-%-" do code = code:gsub("^%-%-[^\n]*%s*", "") end
        assert.equal(1, (code:find('local _ENV <const> = require "qlua.strict"', 1, true)), name)
      end
    end
  end)

  it("cannot be taken off", function()
    assert.has_error(function() setmetatable(strict, {}) end)
  end)
end)
