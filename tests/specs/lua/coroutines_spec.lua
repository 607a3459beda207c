--- Coroutines. qlua has its own resume, wrap and close (so that Ctrl-C reaches every running coroutine); a
--- program must not be able to tell.

local function closer(log, name)
  return setmetatable({}, { __close = function(_, err) log[#log + 1] = { name, err } end })
end

describe("coroutine.resume", function()
  it("passes values both ways", function()
    local co = coroutine.create(function(a, b)
      local c = coroutine.yield(a + b)
      local d, e = coroutine.yield(c * 2)
      return d, e
    end)
    assert.same({ true, 3 }, { coroutine.resume(co, 1, 2) })
    assert.same({ true, 20 }, { coroutine.resume(co, 10) })
    assert.equal("suspended", coroutine.status(co))
    assert.same({ true, "x", "y" }, { coroutine.resume(co, "x", "y") })
    assert.equal("dead", coroutine.status(co))
    assert.same({ false, "cannot resume dead coroutine" }, { coroutine.resume(co) })
  end)

  it("returns errors as they were raised", function()
    local object = {}
    assert.same({ false, object }, { coroutine.resume(coroutine.create(function() error(object) end)) })
    local ok, message = coroutine.resume(coroutine.create(function() error("text") end))
    assert.is_false(ok)
    assert.matches("^[^:]*coroutines_spec.lua:%d+: text$", message)
    assert.same({ false, nil }, { coroutine.resume(coroutine.create(function() error() end)) })
  end)

  it("checks its argument", function()
    local _, message = pcall(function() coroutine.resume(1) end)
    assert.matches("bad argument #1 to 'resume' %(%a+ expected", message)
    assert.has_error(function() coroutine.create(1) end)
    assert.same({ false, "cannot resume non-suspended coroutine" }, { coroutine.resume(coroutine.running()) })
  end)

  it("refuses the coroutine that waits for it", function()
    local outer
    outer = coroutine.create(function()
      local inner = coroutine.create(function() return coroutine.status(outer), coroutine.resume(outer) end)
      return coroutine.resume(inner)
    end)
    assert.same({ true, true, "normal", false, "cannot resume non-suspended coroutine" },
      { coroutine.resume(outer) })
  end)

  it("carries many values", function()
    local many = {}
    for i = 1, 5000 do many[i] = i end
    local co = coroutine.create(function(...) return select("#", coroutine.yield(...)) end)
    assert.equal(5001, select("#", coroutine.resume(co, table.unpack(many))))
    assert.same({ true, 5000 }, { coroutine.resume(co, table.unpack(many)) })
  end)

  it("nests until Lua says so", function()
    local function nest(n)
      if n == 0 then return "bottom" end
      return select(2, assert(coroutine.resume(coroutine.create(nest), n - 1)))
    end
    assert.equal("bottom", nest(150))
    local ok, message = pcall(nest, 1000)
    assert.is_false(ok)
    assert.matches("C stack overflow", message)
    assert.equal("bottom", nest(100))
  end)
end)

describe("coroutine.wrap", function()
  it("generates", function()
    local got = {}
    local numbers = coroutine.wrap(function() for i = 1, 3 do coroutine.yield(i, i .. "") end end)
    for i, s in numbers do got[i] = s end
    assert.same({ "1", "2", "3" }, got)
  end)

  it("raises with the caller's position in front of a text", function()
    local f = coroutine.wrap(function() error("inside", 0) end)
    local ok, message = pcall(function() f() end)
    assert.is_false(ok)
    assert.matches("^[^:]*coroutines_spec.lua:%d+: inside$", message)
    local object = {}
    local g = coroutine.wrap(function() error(object) end)
    assert.equal(object, select(2, pcall(g)))
  end)

  it("says when it is dead", function()
    local f = coroutine.wrap(function() end)
    f()
    assert.matches("cannot resume dead coroutine", select(2, pcall(f)))
  end)

  it("closes variables of a coroutine that died, whose error they may replace", function()
    local log = {}
    local f = coroutine.wrap(function()
      local _ <close> = closer(log, "a")
      coroutine.yield()
      error("first", 0)
    end)
    f()
    assert.matches("first", select(2, pcall(f)))
    assert.same({ { "a", "first" } }, log)
    local g = coroutine.wrap(function()
      local _ <close> = setmetatable({}, { __close = function() error("second", 0) end })
      error("first", 0)
    end)
    assert.matches("second", select(2, pcall(g)))
  end)

  it("checks its argument", function()
    assert.has_error(function() coroutine.wrap(nil) end)
  end)
end)

describe("coroutine.close", function()
  it("closes a suspended one with its variables, in reverse", function()
    local log = {}
    local co = coroutine.create(function()
      local _ <close> = closer(log, "a")
      local _ <close> = closer(log, "b")
      coroutine.yield()
    end)
    coroutine.resume(co)
    assert.is_true(coroutine.close(co))
    assert.equal("dead", coroutine.status(co))
    assert.same({ { "b" }, { "a" } }, log)
    assert.is_true(coroutine.close(co))
    assert.is_true(coroutine.close(coroutine.create(print)))
  end)

  it("returns an error of closing, or the one that ended it", function()
    local co = coroutine.create(function()
      local _ <close> = setmetatable({}, { __close = function() error("while closing", 0) end })
      coroutine.yield()
    end)
    coroutine.resume(co)
    assert.same({ false, "while closing" }, { coroutine.close(co) })
    local failed = coroutine.create(function() error("first", 0) end)
    coroutine.resume(failed)
    assert.same({ false, "first" }, { coroutine.close(failed) })
  end)

  it("refuses running and normal ones", function()
    assert.matches("cannot close a running coroutine", select(2, pcall(coroutine.close, coroutine.running())))
    local outer
    outer = coroutine.create(function()
      return coroutine.wrap(function() return pcall(coroutine.close, outer) end)()
    end)
    local _, ok, message = coroutine.resume(outer)
    assert.is_false(ok)
    assert.matches("cannot close a normal coroutine", message)
    assert.has_error(function() coroutine.close(1) end)
  end)
end)

describe("yield", function()
  it("crosses pcall, metamethods, iterators and dofile", function()
    local co = coroutine.wrap(function()
      local ok, message = pcall(function()
        coroutine.yield("in pcall")
        error("caught", 0)
      end)
      coroutine.yield(message)
      local object = setmetatable({}, { __add = function() return coroutine.yield("in add") end })
      coroutine.yield(object + 1)
      for _ in function() return coroutine.yield("in iterator") end do end
      local closing <close> = setmetatable({}, { __close = function() coroutine.yield("in close") end })
      return ok and closing
    end)
    assert.equal("in pcall", co())
    assert.equal("caught", co())
    assert.equal("in add", co())
    assert.equal("sum", co("sum"))
    assert.equal("in iterator", (co()))
    assert.equal("in iterator", (co(1)))
    assert.equal("in close", co())
    assert.is_false(co())

    local name = os.tmpname()
    local file <close> = assert(io.open(name, "w"))
    file:write("return ..., coroutine.yield('in dofile')")
    file:close()
    local d = coroutine.wrap(function() return "got", dofile(name) end)
    assert.equal("in dofile", d())
    assert.same({ "got", nil, 5 }, { d(5) })
    os.remove(name)
  end)

  it("does not cross sort, gsub or the main thread", function()
    local co = coroutine.create(function()
      table.sort({ 2, 1 }, function() coroutine.yield() end)
    end)
    assert.matches("attempt to yield across a C%-call boundary", select(2, coroutine.resume(co)))
  end)
end)

describe("running and isyieldable", function()
  it("know where they are", function()
    local co
    co = coroutine.create(function()
      local me, main = coroutine.running()
      return me == co, main, coroutine.isyieldable(), coroutine.status(me)
    end)
    assert.is_true(coroutine.isyieldable(co))
    assert.same({ true, true, false, true, "running" }, { coroutine.resume(co) })
    assert.equal("thread", type(coroutine.running()))
  end)
end)

describe("tracebacks", function()
  it("show a coroutine's own stack and the name of resume", function()
    local co = coroutine.create(function() local x = coroutine.yield() return x end)
    coroutine.resume(co)
    assert.matches("in function 'coroutine.yield'", debug.traceback(co))
    local outer, inside
    outer = coroutine.create(function()
      coroutine.resume(coroutine.create(function() inside = debug.traceback(outer) end))
    end)
    coroutine.resume(outer)
    assert.matches("^stack traceback:\n\t%[C%]: in function 'coroutine.resume'\n", inside)
  end)
end)

describe("collection", function()
  it("frees dead and abandoned coroutines, not the ones in use", function()
    local weak = setmetatable({}, { __mode = "k" })
    for _ = 1, 100 do
      local co = coroutine.create(function() coroutine.yield() end)
      coroutine.resume(co)
      weak[co] = true
    end
    local kept = coroutine.wrap(function()
      while true do
        collectgarbage()
        coroutine.yield(coroutine.running())
      end
    end)
    weak[kept()] = "kept"
    kept()
    collectgarbage()
    collectgarbage()
    local n = 0
    for _ in pairs(weak) do n = n + 1 end
    assert.equal(1, n)
    assert.equal("thread", type(kept()))
  end)
end)
