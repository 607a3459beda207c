local repl = require "qlua.repl"

describe("repl.format", function()
  it("shows strings as source", function()
    assert.equal([["a\"b\n\x01é"]], repl.format('a"b\n\1é'))
    assert.equal([["\xFF"]], repl.format("\xFF"))
  end)

  it("shows tables, lists first, keys in order", function()
    assert.equal("{}", repl.format({}))
    assert.equal([[{ 1, "two", [10] = true, a = 2, b = { 3 }, ["end"] = 1 }]],
      repl.format({ 1, "two", b = { 3 }, a = 2, ["end"] = 1, [10] = true }))
  end)

  it("breaks long ones into lines", function()
    local t = { a = ("x"):rep(60), b = ("y"):rep(60) }
    assert.equal('{\n  a = "' .. t.a .. '",\n  b = "' .. t.b .. '"\n}', repl.format(t))
  end)

  it("has bounds: cycles, depth, entries", function()
    local t = {}
    t.self = t
    assert.equal("{ self = <above> }", repl.format(t))
    local deep = {}
    for _ = 1, 10 do deep = { deep } end
    assert.equal("{ { { { {...} } } } }", repl.format(deep))
    local many = {}
    for i = 1, 1000 do many[i] = i end
    assert.matches("40,%s+%.%.%. 960 more", repl.format(many))
  end)

  it("leaves objects that speak for themselves to tostring, and does not touch __index", function()
    assert.equal("me", repl.format(setmetatable({}, { __tostring = function() return "me" end })))
    local trap = setmetatable({ 1 }, { __index = error, __len = error, __pairs = error })
    assert.equal("{ 1 }", repl.format(trap))
  end)
end)
