--- load, loadfile, dofile and require: as Lua's, but for source only.

local function with_file(text, body)
  local name = os.tmpname()
  local file = assert(io.open(name, "wb"))
  file:write(text)
  file:close()
  local results = table.pack(pcall(body, name))
  os.remove(name)
  assert(results[1], results[2])
  return table.unpack(results, 2, results.n)
end

local BYTECODE <const> = string.dump(function() return 1 end)

describe("load", function()
  it("takes text and functions that give pieces", function()
    assert.equal(3, load("return 1 + 2")())
    local pieces = { "return ", "1", "0", nil }
    local i = 0
    assert.equal(10, load(function() i = i + 1 return pieces[i] end)())
    -- pcall: load calls the message handler that is set, here busted's
    assert.same({ true, nil, "stop" }, { pcall(load, function() error("stop", 0) end) })
    assert.matches("reader function must return a string", select(3, pcall(load, function() return {} end)))
    assert.equal("a b", load("return ...", "=n", "t")("a b"))
  end)

  it("keeps an absent environment apart from nil", function()
    assert.equal(_G.print, load("return print")())
    assert.has_error(load("return print", "=n", "t", nil))
    assert.equal(4, load("return x", "=n", nil, { x = 4 })())
  end)

  it("honours modes", function()
    assert.is_function(load("return 1", "=n", "bt"))
    local f, message = load("return 1", "=n", "b")
    assert.is_nil(f)
    assert.matches("attempt to load a text chunk", message)
    assert.has_error(function() load("return 1", "=n", {}) end)
  end)

  it("refuses bytecode in every mode, and says what to do", function()
    for _, mode in ipairs { "none", "b", "bt", "t" } do
      local f, message = load(BYTECODE, "=n", mode ~= "none" and mode or nil)
      assert.is_nil(f)
      assert.matches("attempt to load a binary chunk", message)
      assert.matches("source only", message)
    end
    local given = false
    local f, message = load(function()
      if given then return nil end
      given = true
      return BYTECODE
    end, "=n", "bt")
    assert.is_nil(f)
    assert.matches("source only", message)
  end)
end)

describe("loadfile and dofile", function()
  it("run files, with a first line for the shell", function()
    with_file("#!/usr/bin/env qlua\nreturn 5, ...", function(name)
      assert.same({ 5, 6 }, { loadfile(name)(6) })
      assert.same({ 5 }, { dofile(name) })
      assert.equal(7, loadfile(name, "t", { x = 7 }) and 7)
    end)
    with_file("\xEF\xBB\xBFreturn 'after a byte order mark'", function(name)
      assert.equal("after a byte order mark", dofile(name))
    end)
    with_file("return x", function(name) assert.equal(7, loadfile(name, "t", { x = 7 })()) end)
  end)

  it("report errors with file and line", function()
    with_file("\n\nx x", function(name)
      assert.equal(name .. ":3: syntax error near 'x'", select(2, loadfile(name)))
      assert.equal(name .. ":3: syntax error near 'x'", select(2, pcall(dofile, name)))
    end)
    with_file("\nerror('here')", function(name)
      assert.equal(name .. ":2: here", select(2, pcall(dofile, name)))
    end)
    assert.matches("cannot open /no/such/file", select(2, loadfile("/no/such/file")))
    assert.matches("cannot open /no/such/file", select(2, pcall(dofile, "/no/such/file")))
  end)

  it("refuse bytecode", function()
    with_file(BYTECODE, function(name)
      for _, mode in ipairs { "b", "bt", "t" } do
        assert.matches("source only", select(2, loadfile(name, mode)))
      end
      assert.matches("source only", select(2, loadfile(name)))
      assert.matches("source only", select(2, pcall(dofile, name)))
    end)
  end)
end)

describe("require", function()
  local path
  before_each(function() path = package.path end)
  after_each(function()
    package.path = path
    package.loaded.qlua_spec_module = nil
  end)

  local function as_module(text, body)
    with_file(text, function(name)
      package.path = name .. ";/nowhere/?.lua"
      return body(name)
    end)
  end

  it("runs a module once with its name and file", function()
    as_module("return { n = select('#', ...), args = { ... } }", function(name)
      local module, where = require("qlua_spec_module")
      assert.same({ n = 2, args = { "qlua_spec_module", name } }, module)
      assert.equal(name, where)
      assert.equal(module, (require("qlua_spec_module")))
    end)
    package.loaded.qlua_spec_module = nil
    as_module("return nil", function() assert.is_true((require("qlua_spec_module"))) end)
  end)

  it("lists where it looked", function()
    package.path = "/nowhere/?.lua"
    local ok, message = pcall(require, "qlua.spec.absent")
    assert.is_false(ok)
    assert.matches("^module 'qlua.spec.absent' not found:\n\tno field package.preload%['qlua.spec.absent'%]\n"
      .. "\tno file '/nowhere/qlua/spec/absent.lua'\n", message)
    package.path = nil
    assert.has_error(function() require("qlua_spec_module") end, "'package.path' must be a string")
  end)

  it("says which file has an error, and refuses bytecode", function()
    as_module("x x", function(name)
      local _, message = pcall(require, "qlua_spec_module")
      assert.matches("^error loading module 'qlua_spec_module' from file '" .. name .. "':\n\t", message)
      assert.matches(":1: syntax error near 'x'$", message)
    end)
    as_module(BYTECODE, function()
      assert.matches("source only", select(2, pcall(require, "qlua_spec_module")))
    end)
  end)

  it("finds Debian's modules, those in C too", function()
    assert.is_table(require("lfs"))
    assert.is_truthy(require("lpeg").P)
    assert.is_truthy(require("argparse"))
  end)
end)
