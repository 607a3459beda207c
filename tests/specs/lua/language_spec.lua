--- Lua's own language under qlua: closures, goto, varargs, metamethods, constants, error positions.

local function lines_of(text)
  return (text:gsub("^%s*\n", ""))
end

local function message_of(text, name)
  local chunk, syntax = load(text, name or "=chunk")
  if not chunk then return syntax end
  local ok, message = pcall(chunk)
  assert.is_false(ok)
  return message
end

describe("closures", function()
  it("share an upvalue, and a loop makes a new one each time", function()
    local n = 0
    local function up() n = n + 1 end
    local function get() return n end
    up() up()
    assert.equal(2, get())
    local each = {}
    for i = 1, 3 do each[i] = function() i = i + 10 return i end end
    assert.equal(11, each[1]())
    assert.equal(21, each[1]())
    assert.equal(12, each[2]())
  end)

  it("keep values alive after their block and after a repeat condition", function()
    local f
    repeat local x = 5 f = function() return x end until x == 5
    assert.equal(5, f())
  end)
end)

describe("goto", function()
  it("continues, breaks out of nested loops and jumps backward", function()
    local seen = {}
    for i = 1, 4 do
      if i % 2 == 0 then goto continue end
      for j = 1, 3 do
        if j == 3 then goto continue end
        seen[#seen + 1] = i * 10 + j
      end
      ::continue::
    end
    assert.same({ 11, 12, 31, 32 }, seen)
    local n = 0
    ::again::
    n = n + 1
    if n < 3 then goto again end
    assert.equal(3, n)
  end)

  it("is checked when compiled", function()
    assert.matches("no visible label 'x'", message_of("goto x"))
    assert.matches("jumps into the scope of local 'a'", message_of("goto x; local a; ::x:: print(a)"))
    assert.matches("label 'x' already defined", message_of("::x:: ::x::"))
  end)
end)

describe("varargs and assignment", function()
  it("adjust counts", function()
    local function f(...) return select("#", ...), ... end
    assert.equal(3, (f(nil, nil, nil)))
    local a, b, c = (function() return 1, 2 end)()
    assert.same({ 1, 2 }, { a, b, c })
    assert.same({ 1, 1, 2 }, { (function() return 1, 2 end)(), (function() return 1, 2 end)() })
    assert.equal(2, table.pack(f(1)).n)
    assert.same({ 3 }, { select(-1, 1, 2, 3) })
  end)

  it("evaluates the right side before it assigns", function()
    local i, t = 1, {}
    i, t[i] = i + 1, 20
    assert.equal(2, i)
    assert.equal(20, t[1])
  end)
end)

describe("loops", function()
  it("do not overflow and take no zero step", function()
    local n = 0
    for _ = math.maxinteger - 1, math.maxinteger do n = n + 1 end
    assert.equal(2, n)
    for _ = 3, 1 do n = n + 1 end
    assert.equal(2, n)
    assert.matches("'for' step is zero", message_of("for i = 1, 2, 0 do end"))
    local sum = 0
    for x = 1.0, 0.0, -0.25 do sum = sum + x end
    assert.equal(2.5, sum)
  end)

  it("close the fourth value of a generic for", function()
    local closed = false
    local guard = setmetatable({}, { __close = function() closed = true end })
    for i in function(_, k) if k < 3 then return k + 1 end end, nil, 0, guard do
      if i == 2 then break end
    end
    assert.is_true(closed)
  end)
end)

describe("constants", function()
  it("cannot be assigned", function()
    assert.matches("attempt to assign to const variable 'x'", message_of("local x <const> = 1; x = 2"))
    assert.matches("unknown attribute 'foo'", message_of("local x <foo> = 1"))
  end)
end)

describe("metamethods", function()
  it("cover arithmetic, comparison, length, call, concat and index", function()
    local log = {}
    local function event(name) return function() log[#log + 1] = name return name end end
    local names = { "add", "sub", "mul", "div", "mod", "pow", "unm", "idiv", "band", "bor", "bxor", "shl",
      "shr", "bnot", "concat", "len", "eq", "lt", "le", "call", "index", "newindex" }
    local meta = {}
    for _, name in ipairs(names) do meta["__" .. name] = event(name) end
    local a, b = setmetatable({}, meta), setmetatable({}, meta)
    local _ = { a + 1, 1 - a, a * a, a / 2, a % 2, a ^ 2, -a, a // 2, a & 1, 1 | a, a ~ 1, a << 1, a >> 1, ~a,
      a .. "x", #a, a == b, a < b, a <= b, a(), a.x }
    a.y = 1
    assert.same(names, log)
    assert.is_nil(rawget(a, "y"))
    assert.is_true(a ~= b == false)
    assert.is_false(rawequal(a, b))
  end)

  it("use __index chains, __pairs, __name and __metatable", function()
    local base = setmetatable({ deep = 1 }, { __index = { deeper = 2 } })
    local t = setmetatable({}, { __index = base, __metatable = "locked" })
    assert.equal(2, t.deeper)
    assert.equal("locked", getmetatable(t))
    assert.has_error(function() setmetatable(t, {}) end, "cannot change a protected metatable")
    local keys = {}
    local other = setmetatable({}, { __pairs = function() return next, { only = 1 } end })
    for k in pairs(other) do keys[#keys + 1] = k end
    assert.same({ "only" }, keys)
    assert.matches("^My: ", tostring(setmetatable({}, { __name = "My" })))
    assert.has_error(function() tostring(setmetatable({}, { __tostring = function() return {} end })) end,
      "'__tostring' must return a string")
  end)
end)

describe("error messages", function()
  it("name the variable and the line", function()
    assert.equal("chunk:2: attempt to index a nil value (local 'a')", message_of("local a\nreturn a.b"))
    assert.equal("chunk:1: attempt to call a nil value (global 'undefined')", message_of("undefined()"))
    assert.equal("chunk:1: attempt to index a nil value (field 'y')", message_of("local x = {} return x.y.z"))
    assert.equal("chunk:1: attempt to call a nil value (method 'nope')", message_of("local s = '' s:nope()"))
    assert.equal("chunk:1: attempt to perform arithmetic on a nil value (upvalue 'u')",
      message_of("local u; return (function() return u + 1 end)()"))
    assert.equal("chunk:1: attempt to compare number with nil", message_of("return 1 < nil"))
    assert.equal("chunk:1: attempt to concatenate a table value (local 't')",
      message_of("local t = {} return t .. 'x'"))
    assert.equal("chunk:1: bad argument #1 to 'rep' (string expected, got no value)",
      message_of("local _ = string.rep()"))
  end)

  it("have levels", function()
    local function check() error("bad", 2) end
    local ok, message = pcall(function() check() end)
    assert.is_false(ok)
    assert.matches("language_spec.lua:%d+: bad", message)
    assert.same({ false, "plain" }, { pcall(error, "plain", 0) })
    assert.same({ false }, { pcall(error) })
  end)

  it("point at syntax errors", function()
    assert.equal("chunk:2: unexpected symbol near 'end'", message_of("local x =\nend"))
    assert.equal("chunk:3: 'end' expected (to close 'if' at line 1) near <eof>",
      message_of("if x then\n y()\n"))
    assert.equal("chunk:1: unfinished string near <eof>", message_of('local x = "abc'))
    assert.equal("[string \"local x = = 1\"]:1: unexpected symbol near '='",
      select(2, load("local x = = 1")))
  end)

  it("tell a runaway recursion from a crash", function()
    local function forever() return 1 + forever() end
    local ok, message = pcall(forever)
    assert.is_false(ok)
    assert.matches("stack overflow", message)
    local nested = ("("):rep(1000) .. "1" .. (")"):rep(1000)
    local _, _, nesting = pcall(load, "return " .. nested)
    assert.matches("overflow", nesting)
  end)

  it("pass through xpcall handlers with a traceback", function()
    local ok, trace = xpcall(function() error("deep") end, debug.traceback)
    assert.is_false(ok)
    assert.matches("deep\nstack traceback:\n", trace)
    assert.same({ true, 1, 2 }, { xpcall(function(...) return ... end, print, 1, 2) })
  end)
end)

describe("environments", function()
  it("are the upvalue _ENV", function()
    local env = { y = 2 }
    assert.equal(2, load("x = y; return x", "=c", "t", env)())
    assert.equal(2, env.x)
    local function sandbox() local _ENV <const> = { z = 7 } return z end -- luacheck: ignore 113
    assert.equal(7, sandbox())
  end)
end)

describe("long text", function()
  it("reads long brackets and escapes", function()
    assert.equal("a]]b\n", lines_of([==[
a]]b
]==]))
    assert.equal("A\x42\u{43}\068\z
                  E", "ABCDE")
  end)
end)
