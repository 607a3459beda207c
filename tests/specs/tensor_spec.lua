--- Tensors: every method on vectors and matrices, and what they refuse.

local core = require "qlua.core"
local qlua = require "qlua"
local support = require "tests.specs.support"

local raises = support.raises

local function close_to(expected, value)
  assert.is_true(math.abs(expected - value) <= 1e-12 * math.max(1, math.abs(expected)),
    ("%.17g is not %.17g"):format(value, expected))
end

local function vector() return qlua.tensor { 3, -1, 4, 1, -5 } end
local function matrix() return qlua.tensor { { 1, 2, 3 }, { 6, 5, 4 } } end

--- [2, 2, 2]
local function cube() return qlua.tensor { { { 1, 2 }, { 3, 4 } }, { { 5, 6 }, { 7, 8 } } } end

describe("a tensor", function()
  it("knows its shape, dtype and text", function()
    local v, m, c = vector(), matrix(), cube()
    assert.same({ 5 }, v:shape())
    assert.same({ 2, 3 }, m:shape())
    assert.same({ 2, 2, 2 }, c:shape())
    assert.equal(5, v:size(1))
    assert.equal(2, m:size(1))
    assert.equal(3, m:size(2))
    assert.equal("float32", m:dtype())
    assert.equal("tensor float32 [2, 3] on cpu", tostring(m))
    assert.equal("tensor float32 [5] on cpu", tostring(v))
    raises(function() v:size(2) end, "no such dimension")
    raises(function() m:size(0) end, "no such dimension")
  end)

  it("is made of nested tables of numbers", function()
    assert.same({ { 1, 2, 3 }, { 6, 5, 4 } }, matrix():totable())
    assert.same({ { { 1, 2 }, { 3, 4 } }, { { 5, 6 }, { 7, 8 } } }, cube():totable())
    assert.same({ 0 }, qlua.tensor {}:shape())
    assert.same({}, qlua.tensor {}:totable())
    assert.same({ 2, 0 }, qlua.tensor({ {}, {} }):shape())
    assert.equal(math.huge, qlua.tensor({ 1 / 0 }):get(1))
    local nan = qlua.tensor({ 0 / 0 }):get(1)
    assert.is_true(nan ~= nan)
    raises(function() qlua.tensor { { 1, 2 }, { 3 } } end, "equal length")
    raises(function() qlua.tensor { { 1, 2 }, 3 } end, "equal length")
    raises(function() qlua.tensor { 1, { 2 } } end, "table")
    raises(function() qlua.tensor { 1, "x" } end, "string")
    raises(function() qlua.tensor { { { { { 1 } } } } } end, "4 dimensions")
    raises(function() qlua.tensor(1) end, "table expected")
    raises(function() qlua.tensor() end, "table expected")
    local endless = {}
    endless[1] = endless
    raises(function() qlua.tensor(endless) end, "4 dimensions")
  end)

  it("gives single numbers", function()
    local v, m, c = vector(), matrix(), cube()
    assert.equal(3, v:get(1))
    assert.equal(-5, v:get(5))
    assert.equal(6, m:get(2, 1))
    assert.equal(3, m:get(1, 3))
    assert.equal(7, c:get(2, 2, 1))
    raises(function() v:get(0) end, "index 0", "1..5")
    raises(function() v:get(6) end, "index 6", "1..5")
    raises(function() v:get(-1) end, "index -1")
    raises(function() m:get(1) end, "2 indices")
    raises(function() m:get(1, 2, 3) end, "2 indices")
    raises(function() m:get(3, 1) end, "1..2")
    raises(function() m:get(1, 4) end, "1..3")
    raises(function() m:get(1.5, 1) end, "integer")
    raises(function() m:get("a", 1) end, "number expected")
  end)

  it("selects and narrows", function()
    local m, c = matrix(), cube()
    assert.same({ 6, 5, 4 }, m:select(1, 2):totable())
    assert.same({ 2, 5 }, m:select(2, 2):totable())
    assert.same({ { 5, 6 }, { 7, 8 } }, c:select(1, 2):totable())
    assert.same({ { 6, 5, 4 } }, m:narrow(1, 2, 1):totable())
    assert.same({ { 2, 3 }, { 5, 4 } }, m:narrow(2, 2, 2):totable())
    assert.same({ -1, 4, 1 }, vector():narrow(1, 2, 3):totable())
    assert.same({ { { 5, 6 }, { 7, 8 } } }, c:narrow(1, 2, 1):totable())
    assert.same({ 5, 4 }, m:narrow(1, 2, 1):narrow(2, 2, 2):select(1, 1):totable())
    raises(function() vector():select(1, 1) end, "get")
    raises(function() m:select(3, 1) end, "no such dimension")
    raises(function() m:select(0, 1) end, "no such dimension")
    raises(function() m:select(1, 3) end, "index 3")
    raises(function() m:select(2, 4) end, "index 4")
    raises(function() c:select(2, 1) end, "dimension")
    raises(function() m:narrow(1, 2, 2) end, "longer")
    raises(function() m:narrow(1, 1, 0) end, "longer")
    raises(function() m:narrow(2, 3, math.maxinteger) end, "longer")
    raises(function() m:narrow(1, 0, 1) end, "index 0")
  end)

  it("sorts out the largest, ties to the lower index", function()
    local v, m = vector(), matrix()
    local values, ids = v:topk(3)
    assert.same({ 4, 3, 1 }, values:totable())
    assert.same({ 2, 0, 3 }, ids:totable())
    assert.equal("int32", ids:dtype())
    values, ids = m:topk(2)
    assert.same({ { 3, 2 }, { 6, 5 } }, values:totable())
    assert.same({ { 2, 1 }, { 0, 1 } }, ids:totable())
    assert.equal(1, ids:get(2, 2))
    assert.equal("integer", math.type(ids:get(2, 2)))
    assert.equal(2, v:argmax())
    assert.same({ 2, 0 }, m:argmax())
    local ties = qlua.tensor { 1, 7, 7, 0, 7 }
    assert.equal(1, ties:argmax())
    values, ids = ties:topk(4)
    assert.same({ 1, 2, 4, 0 }, ids:totable())
    assert.same({ 7, 7, 7, 1 }, values:totable())
    raises(function() v:topk(0) end, "k = 0", "1..5")
    raises(function() v:topk(6) end, "k = 6", "1..5")
    raises(function() m:topk(4) end, "1..3")
    raises(function() m:topk(1.5) end, "integer")
  end)

  it("sums and finds the maximum of each row", function()
    assert.equal(2, vector():sum())
    assert.equal(4, vector():max())
    assert.same({ 6, 15 }, matrix():sum():totable())
    assert.same({ 3, 6 }, matrix():max():totable())
    assert.equal("float64", matrix():sum():dtype())
    for at = 1, 3 do -- a NaN is the maximum wherever it stands
      local row = { 1, 2, 3 }
      row[at] = 0 / 0
      local maximum = qlua.tensor(row):max()
      assert.is_true(maximum ~= maximum)
    end
    assert.equal(0, qlua.tensor {}:sum())
    -- in float64: the small numbers are not lost
    close_to(16777216 + 100, qlua.tensor({ 16777216, 60, 20, 20 }):sum())
    local _, ids = matrix():topk(2)
    assert.same({ 3, 1 }, ids:sum():totable())
    raises(function() cube():sum() end, "two dimensions")
    raises(function() qlua.tensor {}:max() end, "empty")
  end)

  it("has a softmax and its logarithm's sum", function()
    local function reference(values, t)
      local sum, p = 0, {}
      for _, x in ipairs(values) do sum = sum + math.exp(x / t) end
      for i, x in ipairs(values) do p[i] = math.exp(x / t) / sum end
      return p, math.log(sum)
    end
    for _, t in ipairs { 1, 0.5, 3 } do
      local p, lse = reference({ 3, -1, 4, 1, -5 }, t)
      close_to(lse, vector():logsumexp { temperature = t })
      for i, x in ipairs(vector():softmax({ temperature = t }):totable()) do
        assert.is_true(math.abs(x - p[i]) < 1e-7)
      end
      local rows, l = matrix():softmax { temperature = t }, matrix():logsumexp { temperature = t }
      for i, values in ipairs(matrix():totable()) do
        p, lse = reference(values, t)
        close_to(lse, l:get(i))
        for j = 1, 3 do assert.is_true(math.abs(rows:get(i, j) - p[j]) < 1e-7) end
      end
    end
    assert.equal("float64", matrix():logsumexp():dtype())
    close_to(1000 + math.log(2), qlua.tensor({ 1000, 1000 }):logsumexp())
    assert.same({ 0.5, 0.5 }, qlua.tensor({ -1000, -1000 }):softmax():totable())
    raises(function() vector():softmax { temperature = 0 } end, "'temperature'")
    raises(function() vector():softmax { temperature = -1 } end, "'temperature'")
    raises(function() vector():logsumexp { temp = 1 } end, "'temp'", "temperature")
    raises(function() vector():softmax { temperature = "hot" } end, "'temperature'")
    raises(function() qlua.tensor {}:softmax() end, "empty")
  end)

  it("gathers by token id, from 0", function()
    local v, m = vector(), matrix()
    assert.equal(3, v:gather(0))
    assert.equal(-5, v:gather(4))
    assert.same({ -5, 3, 3 }, v:gather({ 4, 0, 0 }):totable())
    assert.same({ 3, 6 }, m:gather({ 2, 0 }):totable())
    raises(function() v:gather(5) end, "id 5", "0..4")
    raises(function() v:gather { 0, 5 } end, "id 5")
    raises(function() v:gather(-1) end, "-1")
    raises(function() m:gather { 0 } end, "one id for each row")
    raises(function() m:gather { 0, 3 } end, "id 3", "0..2")
    raises(function() m:gather(1) end, "table expected")
    raises(function() v:gather() end, "table expected")
  end)

  it("counts", function()
    local a, b = matrix(), qlua.tensor { { 2, 2, 2 }, { 4, 4, 4 } }
    assert.same({ { 3, 4, 5 }, { 10, 9, 8 } }, (a + b):totable())
    assert.same({ { -1, 0, 1 }, { 2, 1, 0 } }, (a - b):totable())
    assert.same({ { 2, 4, 6 }, { 24, 20, 16 } }, (a * b):totable())
    assert.same({ { 0.5, 1, 1.5 }, { 1.5, 1.25, 1 } }, (a / b):totable())
    assert.same({ 4, 0, 5, 2, -4 }, (vector() + 1):totable())
    assert.same({ 4, 0, 5, 2, -4 }, (1 + vector()):totable())
    assert.same({ 2, -2, 3, 0, -6 }, (vector() - 1):totable())
    assert.same({ -2, 2, -3, 0, 6 }, (1 - vector()):totable())
    assert.same({ 6, -2, 8, 2, -10 }, (2 * vector()):totable())
    assert.same({ 1.5, -0.5, 2, 0.5, -2.5 }, (vector() / 2):totable())
    assert.same({ 0.5, 2 }, (2 / qlua.tensor { 4, 1 }):totable())
    assert.same({ -3, 1, -4, -1, 5 }, (-vector()):totable())
    assert.same({ { 2, 4 }, { 6, 8 } }, (cube() + cube()):select(1, 1):totable())
    raises(function() return a + vector() end, "shape")
    raises(function() return a + qlua.tensor { { 1, 2 }, { 3, 4 } } end, "shape")
    raises(function() return a + "x" end, "number expected")
    raises(function() return {} - a end, "number expected")
    raises(function() return a * nil end, "number expected")
  end)

  it("of another dtype is refused where only float32 makes sense", function()
    local _, ids = matrix():topk(2)
    raises(function() return ids + 1 end, "F32")
    raises(function() ids:softmax() end, "float32")
    raises(function() ids:topk(1) end, "float32")
    raises(function() matrix():sum():logsumexp() end, "float32")
    raises(function() return matrix():sum() + matrix():sum() end, "F32")
  end)

  it("goes to the cpu only", function()
    local m = matrix()
    local same <close> = m:to "cpu"
    assert.same(m:totable(), same:totable())
    m:close()
    assert.equal(6, same:get(2, 1))
    raises(function() same:to "cuda" end, "cpu")
  end)

  it("closes once and stays closed, its views live on", function()
    local m = matrix()
    local row, columns = m:select(1, 2), m:narrow(2, 1, 2)
    m:close()
    m:close()
    assert.equal("tensor (closed)", tostring(m))
    assert.same({ 6, 5, 4 }, row:totable())
    assert.same({ { 1, 2 }, { 6, 5 } }, columns:totable())
    for name, method in pairs(core.methods "tensor") do
      if name ~= "close" then raises(function() method(m, 1, 1, 1) end, "closed") end
    end
    raises(function() return m + 1 end, "closed")
    raises(function() return 1 + m end, "closed")
    raises(function() return row + m end, "closed")
    raises(function() return -m end, "closed")
    do
      local scoped <close> = row
      assert.equal(6, scoped:get(1))
    end
    raises(function() row:get(1) end, "closed")
  end)

  it("is not anything else", function()
    local get, m = core.methods("tensor").get, matrix()
    raises(function() get(1, 1) end, "tensor")
    raises(function() get({}, 1) end, "tensor")
    raises(function() get(io.stdout, 1) end, "tensor")
    raises(function() get() end, "tensor")
    raises(function() m.nothing() end, "nothing")
  end)
end)
