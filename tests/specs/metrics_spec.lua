--- Metrics against SciPy's values, through C and through the contract; metrics of the user's own.

local core = require "qlua.core"
local metrics = require "qlua.metrics"
local qlua = require "qlua"
local support = require "tests.specs.support"

local raises, failed = support.raises, support.failed
local CLOSE <const> = 1e-12   -- relative, or absolute below 1
local MARGIN <const> = 1e-9   -- where a nucleus ends closer than this, rounding decides

local golden, a, b, targets

setup(function()
  golden = support.json "tests/golden/metrics.json"
  local ck <close> = assert(qlua.open_checkpoint "tests/golden/metrics.safetensors")
  a, b, targets = ck:tensor "a", ck:tensor "b", support.integers(ck:tensor "targets")
end)
teardown(support.cleanup)

local function close_to(expected, value, what)
  if math.abs(expected - value) > CLOSE * math.max(1, math.abs(expected)) then
    error(("%s: %.17g is not %.17g"):format(what, value, expected), 2)
  end
end

describe("golden values", function()
  it("Jaccard, agreement, top k", function()
    local jaccard, agreement = core.metrics.jaccard(a, b, golden.ks), core.metrics.agreement(a, b)
    local _, top_a = a:topk(20)
    local _, top_b = b:topk(20)
    top_a, top_b = top_a:totable(), top_b:totable()
    for i, row in ipairs(golden.rows) do
      for j in ipairs(golden.ks) do close_to(row.jaccard[j], jaccard[j][i], "jaccard") end
      assert.equal(row.agreement == 1, agreement[i])
      assert.same(row.top20_a, top_a[i])
      assert.same(row.top20_b, top_b[i])
    end
  end)

  it("KL, entropy, log-likelihood, change of p, log of the sum", function()
    local kl, entropy = core.metrics.kl(a, b), core.metrics.entropy(a)
    local loglik, greedy = core.metrics.loglik(a, targets)
    local delta = core.metrics.delta_p(a, b, targets)
    local lse, cool = a:logsumexp(), a:logsumexp { temperature = 0.7 }
    for i, row in ipairs(golden.rows) do
      assert.equal(row.target, targets[i])
      close_to(row.kl, kl[i], "kl")
      close_to(row.entropy, entropy[i], "entropy")
      close_to(row.loglik, loglik[i], "loglik")
      assert.equal(row.greedy == 1, greedy[i])
      close_to(row.delta_p, delta[i], "delta_p")
      close_to(row.logsumexp, lse:get(i), "logsumexp")
      close_to(row["logsumexp_0.7"], cool:get(i), "logsumexp 0.7")
    end
  end)

  it("nuclei", function()
    local compared = 0
    for j, nucleus in ipairs(golden.nuclei) do
      local values = core.metrics.nucleus(a, b, nucleus.top_p, nucleus.temperature)
      for i, row in ipairs(golden.rows) do
        if row.nucleus_margin[j] > MARGIN then
          close_to(row.nucleus[j], values[i], "nucleus")
          compared = compared + 1
        end
      end
    end
    assert.is_true(compared > 60)
  end)

  it("sizes of nuclei, and what each weighs in the other's distribution", function()
    local compared = 0
    for j, nucleus in ipairs(golden.nuclei) do
      local pairs_of = core.metrics.nuclei(a, b, { nucleus.top_p }, { nucleus.temperature })
      local overlaps = core.metrics.nucleus(a, b, nucleus.top_p, nucleus.temperature)
      local heat = { temperature = nucleus.temperature }
      local probabilities = { a:softmax(heat):totable(), b:softmax(heat):totable() }
      for i, row in ipairs(golden.rows) do
        local pair = pairs_of[i][1][1]
        assert.equal(overlaps[i], pair.overlap)
        if row.nucleus_margin[j] > MARGIN and nucleus.top_p < 1 then
          assert.same(row.nucleus_sizes[j], pair.sizes)
          for m, own in ipairs(probabilities) do
            local other, order, mass = probabilities[3 - m][i], {}, 0
            for id = 1, #other do order[id] = id end
            table.sort(order, function(x, y) return other[x] > other[y] or other[x] == other[y] and x < y end)
            for place = 1, pair.sizes[3 - m] do mass = mass + own[i][order[place]] end
            -- probabilities in float32, and ties of them where logits have none
            assert.is_true(math.abs(mass - pair.masses[m]) < 1e-5, mass .. " " .. pair.masses[m])
          end
          compared = compared + 1
        end
      end
    end
    assert.is_true(compared > 60)
    raises(function() core.metrics.nuclei(a, b, {}, { 1 }) end, "1 to 1000 numbers")
    raises(function() core.metrics.nuclei(a, b, { 0.9, 1.5 }, { 1 }) end, "top_p 1.5")
    raises(function() core.metrics.nuclei(a, b, { 0.9 }, { "hot" }) end, "list of numbers")
  end)

  it("one position at a time, by the contract", function()
    local list = { metrics.agreement(), metrics.kl(), metrics.delta_p() }
    for _, k in ipairs(golden.ks) do list[#list + 1] = metrics.jaccard(k) end
    for _, n in ipairs(golden.nuclei) do list[#list + 1] = metrics.nucleus(n.top_p, n.temperature) end
    for i, row in ipairs(golden.rows) do
      local x <close> = a:select(1, i)
      local y <close> = b:select(1, i)
      metrics.add(list, x, y, { target = i % 2 == 0 and row.target or nil })
    end
    for i, row in ipairs(golden.rows) do
      assert.equal(row.agreement, list[1].values[i])
      close_to(row.kl, list[2].values[i], "kl")
      if i % 2 == 0 then close_to(row.delta_p, list[3].values[i // 2], "delta_p") end
      for j in ipairs(golden.ks) do close_to(row.jaccard[j], list[3 + j].values[i], "jaccard") end
    end
    assert.equal(#golden.rows // 2, #list[3].values)
    local sum = 0
    for _, row in ipairs(golden.rows) do sum = sum + row.kl end
    close_to(sum / #golden.rows, list[2]:value(), "mean")
    local rows = metrics.summary(list)
    assert.equal(#list, #rows)
    for i, row in ipairs(rows) do
      assert.equal(list[i].name, row.name)
      assert.equal(#list[i].values, row.n)
      assert.is_true(row.low <= row.value and row.value <= row.high, row.name)
    end
    assert.same({ rows[2] }, metrics.summary { list[2] })
    assert.equal("jaccard@20", rows[8].name)
    assert.is_true(rows[8].higher_is_better)
    assert.is_false(rows[2].higher_is_better)
  end)
end)

describe("metrics in C", function()
  it("of the same logits are perfect", function()
    for _, value in ipairs(core.metrics.kl(a, a)) do assert.equal(0, value) end
    for _, value in ipairs(core.metrics.delta_p(a, a, targets)) do assert.equal(0, value) end
    for _, value in ipairs(core.metrics.jaccard(a, a, { 5 })[1]) do assert.equal(1, value) end
    for _, value in ipairs(core.metrics.nucleus(a, a, 0.9)) do assert.equal(1, value) end
    for _, same in ipairs(core.metrics.agreement(a, a)) do assert.is_true(same) end
  end)

  it("give ties to the lower token", function()
    local x, y = qlua.tensor { 1, 1, 1, 0 }, qlua.tensor { 0, 1, 1, 1 }
    assert.equal(0, core.metrics.jaccard(x, y, { 1 })[1][1])
    assert.equal(1 / 3, core.metrics.jaccard(x, y, { 2 })[1][1])
    assert.equal(0.5, core.metrics.jaccard(x, y, { 3 })[1][1])
    assert.is_false(core.metrics.agreement(x, y)[1])
  end)

  it("refuse what does not fit", function()
    local narrow = a:narrow(2, 1, 100)
    raises(function() core.metrics.kl(a, narrow) end, "257", "100")
    raises(function() core.metrics.kl(a, a:select(1, 1)) end, "[20, 257]", "[1, 257]")
    raises(function() core.metrics.kl(a, {}) end, "tensor")
    raises(function() core.metrics.jaccard(a, b, {}) end, "no k")
    raises(function() core.metrics.jaccard(a, b, { 0 }) end, "k")
    raises(function() core.metrics.jaccard(a, b, { 258 }) end, "258")
    raises(function() core.metrics.loglik(a, { 1, 2 }) end, "2 target ids", "20 rows")
    raises(function() core.metrics.loglik(a:select(1, 1), { 257 }) end, "257")
    raises(function() core.metrics.delta_p(a, b, { 1 }) end, "1 target ids")
    raises(function() core.metrics.nucleus(a, b, 0) end, "top_p")
    raises(function() core.metrics.nucleus(a, b, 1.1) end, "top_p")
    raises(function() core.metrics.nucleus(a, b, 0.9, 0) end, "temperature")
    local _, ids = a:topk(3)
    raises(function() core.metrics.entropy(ids) end, "float32")
    raises(function() metrics.jaccard(300):add(a:select(1, 1), b:select(1, 1), {}) end, "k = 300", "257")
    local bad = qlua.tensor { 1, 0 / 0, 2 }
    local ok, value, err = pcall(core.metrics.kl, bad, bad)
    assert.is_true(not ok or value == nil and err ~= nil, "NaN was taken")
  end)
end)

describe("a metric of one's own", function()
  local function load(text)
    local path = support.write(support.folder() .. "/mine.lua", text)
    local list, err = metrics.load(path)
    return list, err, path
  end

  it("may be a table, a maker, or a list of them", function()
    local one <const> = [[{ name = "x", add = function(self) self.n = (self.n or 0) + 1 end,
      value = function(self) return self.n end }]]
    for _, text in ipairs { "return " .. one, "return function() return " .. one .. " end",
      "return { " .. one .. " }", "return { function() return " .. one .. " end }" } do
      local list = assert(load(text))
      assert.equal(1, #list)
      metrics.add(list, a:select(1, 1), b:select(1, 1), {})
      metrics.add(list, a:select(1, 2), b:select(1, 2), {})
      local rows = metrics.summary(list)
      assert.equal("x", rows[1].name)
      assert.equal(2, rows[1].value)
    end
    assert.equal(2, #assert(load("return { " .. one .. ", " .. one .. " }")))
  end)

  it("gets both logits and the item", function()
    local list = assert(load [[
      return { name = "gap", values = {}, higher_is_better = true,
        add = function(self, reference, test, item)
          self.values[#self.values + 1] = (reference - test):gather(item.target)
        end,
        value = function(self) return #self.values end }
    ]])
    for i = 1, 3 do metrics.add(list, a:select(1, i), b:select(1, i), { target = targets[i] }) end
    local rows = metrics.summary(list)
    assert.equal(3, rows[1].n)
    assert.is_true(rows[1].higher_is_better)
    local exact = a:get(2, targets[2] + 1) - b:get(2, targets[2] + 1)
    assert.equal(string.unpack("f", string.pack("f", exact)), list[1].values[2])
  end)

  it("may have several values by name", function()
    local list = assert(load [[return { name = "m", add = function() end,
      value = function() return { b = 2, a = 1 } end }]])
    local rows = metrics.summary(list)
    assert.same({ "m.a", "m.b" }, { rows[1].name, rows[2].name })
    assert.same({ 1, 2 }, { rows[1].value, rows[2].value })
  end)

  it("that lacks a field is refused by file and field", function()
    local cases <const> = {
      { [[return { add = print, value = print }]], "'name'", "nil", "string" },
      { [[return { name = "x", value = print }]], "'add'", "nil", "function" },
      { [[return { name = "x", add = print }]], "'value'", "examples/metrics" },
      { [[return { name = 5, add = print, value = print }]], "'name'", "number" },
      { [[return { name = "x", add = print, value = print, values = 3 }]], "'values'" },
      { [[return 5]], "number" },
      { [[return]], "no metric" },
      { [[return {}]], "'name'" },
      { [[return { name = "x" ]], "mine.lua:1" },
      { [[error "at load"]], "at load" },
      { [[return function() error "when made" end]], "when made" },
      { [[return function() end]], "nil" },
    }
    for _, case in ipairs(cases) do
      local list, err, path = load(case[1])
      failed(list, err, path, table.unpack(case, 2))
    end
    local list, err = metrics.load "/no/such/metric.lua"
    assert.equal("not_found", failed(list, err, "/no/such/metric.lua").code)
    list, err = metrics.load_all { "examples/metrics/rank.lua", "/no/such/metric.lua" }
    failed(list, err, "/no/such/metric.lua")
    list, err = load(string.dump(function() return {} end))
    failed(list, err, "mine.lua")
  end)

  it("that fails at work is named", function()
    local list = assert(load [[return { name = "broken", add = function() error "oh" end,
      value = function() error "no value" end }]])
    raises(function() metrics.add(list, a, b, {}) end, "metric broken", "oh")
    raises(function() metrics.summary(list) end, "metric broken", "no value")
    for _, value in ipairs { "nil", "'text'", "{ 1 }", "{ x = 'y' }" } do
      list = assert(load(("return { name = 'odd', add = print, value = function() return %s end }")
        :format(value)))
      raises(function() metrics.summary(list) end, "metric odd", "number")
    end
  end)

  it("has the summary of its values, and a row without any", function()
    local one, none = metrics.per_item("one", true, print), metrics.per_item("none", false, print)
    for i = 1, 11 do one.values[i] = i end
    local rows = metrics.summary { one, none }
    assert.equal(6, rows[1].value)
    assert.same({ 11, 6, 10, 10.5, 11 }, { rows[1].n, rows[1].median, rows[1].p90, rows[1].p95, rows[1].max })
    assert.is_true(math.abs(rows[1].rms - math.sqrt(46)) < 1e-12 and rows[1].stderr < 1.0001)
    assert.is_true(rows[1].low < 6 and rows[1].high > 6 and rows[1].p999 < 11)
    assert.same({ "none", 0, false }, { rows[2].name, rows[2].n, rows[2].higher_is_better })
    assert.is_nil(rows[2].value)
  end)

  it("of yes and no has Wilson's interval, which knows more than a bootstrap where all agree", function()
    local sure = metrics.per_item("sure", true, print, true)
    for i = 1, 10 do sure.values[i] = 1 end
    local row = metrics.summary { sure }[1]
    assert.is_true(math.abs(row.low - 0.7224672001371107) < 1e-12) -- 1 / (1 + z^2 / 10)
    assert.equal(1, row.high)
    sure.values[4] = 0.5
    raises(function() metrics.summary { sure } end, "metric sure", "value 4", "1 and 0")
    assert.is_true(metrics.jaccard(1).share and metrics.agreement().share and not metrics.jaccard(2).share)
  end)

  it("is named when it gives NaN", function()
    local odd = metrics.per_item("odd", true, print)
    odd.values = { 1, 0 / 0 }
    raises(function() metrics.summary { odd } end, "metric odd", "value 2", "nan")
    raises(function() metrics.summary { { name = "odd", value = function() return 0 / 0 end } } end,
      "metric odd", "nan")
  end)

  it("the example works", function()
    local list = assert(metrics.load "examples/metrics/rank.lua")
    for i = 1, 5 do metrics.add(list, a:select(1, i), b:select(1, i), { target = targets[i] }) end
    assert.is_true(#metrics.summary(list) >= 1)
  end)
end)
