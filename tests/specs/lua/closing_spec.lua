--- To-be-closed variables, finalizers, weak tables, warnings.

describe("a to-be-closed variable", function()
  local function closer(log, name)
    return setmetatable({}, { __close = function(_, err) log[#log + 1] = name .. ":" .. tostring(err) end })
  end

  it("is closed at the end of its block, in reverse, on every way out", function()
    local log = {}
    do
      local _ <close> = closer(log, "a")
      local _ <close> = closer(log, "b")
    end
    for i = 1, 2 do
      local _ <close> = closer(log, "c" .. i)
      if i == 1 then goto next end
      break
      ::next::
    end
    local function f()
      local _ <close> = closer(log, "d")
      return #log
    end
    assert.equal(4, f())
    pcall(function()
      local _ <close> = closer(log, "e")
      error("oops", 0)
    end)
    assert.same({ "b:nil", "a:nil", "c1:nil", "c2:nil", "d:nil", "e:oops" }, log)
  end)

  it("may be nil or false, nothing else without __close", function()
    do local _ <close> = nil end
    do local _ <close> = false end
    local ok, message = pcall(function() local x <close> = {} return x end)
    assert.is_false(ok)
    assert.matches("variable 'x' got a non%-closable value", message)
  end)

  it("replaces the error by its own", function()
    local _, message = pcall(function()
      local _ <close> = setmetatable({}, { __close = function(_, e) error(e .. "2", 0) end })
      error("1", 0)
    end)
    assert.equal("12", message)
  end)
end)

describe("the collector", function()
  it("calls finalizers, in reverse order of marking", function()
    local log = {}
    for i = 1, 3 do setmetatable({}, { __gc = function() log[#log + 1] = i end }) end
    collectgarbage()
    assert.same({ 3, 2, 1 }, log)
  end)

  it("clears weak tables and keeps ephemerons' rule", function()
    local values = setmetatable({ {} }, { __mode = "v" })
    local keys = setmetatable({}, { __mode = "k" })
    do
      local key = {}
      keys[key] = { key }
    end
    keys["text"] = 1
    collectgarbage()
    assert.is_nil(values[1])
    assert.same({ text = 1 }, keys)
  end)

  it("reports what is used and can be stopped", function()
    assert.is_number(collectgarbage("count"))
    collectgarbage("stop")
    assert.is_false(collectgarbage("isrunning"))
    collectgarbage("restart")
    assert.is_true(collectgarbage("isrunning"))
    local before = collectgarbage("generational")
    assert.equal("generational", collectgarbage("incremental"))
    collectgarbage(before)
  end)

  it("frees big garbage", function()
    collectgarbage()
    local before = collectgarbage("count")
    for _ = 1, 50 do local _ = ("x"):rep(2 ^ 20) end
    collectgarbage()
    assert.is_true(collectgarbage("count") < before + 1024)
  end)
end)
