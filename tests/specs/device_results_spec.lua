--- What a device gives of its own logits, beside what the CPU gives of a copy of them: metrics and choices
--- must not depend on where they are computed.

local core = require "qlua.core"
local qlua = require "qlua"
local support = require "tests.specs.support"

local IDS <const> = { 1, 21, 61, 77, 32, 19, 69, 22, 3, 71, 48, 58 }
local TARGETS <const> = { 21, 61, 77, 32, 19, 69, 22, 3, 71, 48, 58, 2 }
local CLOSE <const> = 1e-11 -- float64 sums of the same float32 numbers

local full, twin, logits, other, host, host_other

setup(function()
  full = assert(support.device():load(support.MODELS .. "llama3_bf16"))
  twin = assert(full:quantize { scheme = "nf4", double = true })
  logits, other = assert(full:forward(IDS)), assert(twin:forward(IDS))
  host, host_other = support.on_cpu(logits), support.on_cpu(other)
end)
teardown(function()
  for _, object in ipairs { logits, other, host, host_other, twin, full } do object:close() end
end)

local function same_numbers(expected, values, what)
  assert.equal(#expected, #values)
  for i, want in ipairs(expected) do
    if type(want) == "table" then
      same_numbers(want, values[i], what)
    elseif type(want) ~= "number" then
      assert.equal(want, values[i])
    elseif math.abs(want - values[i]) > CLOSE * math.max(1, math.abs(want)) then
      error(("%s: %d is %.17g, not %.17g"):format(what, i, values[i], want), 2)
    end
  end
end

describe("logits on the device", function()
  it("are the same numbers when they are brought to the CPU", function()
    assert.same(host:shape(), logits:shape())
    assert.is_true(support.bytes(host) == support.bytes(logits))
    assert.is_true(support.difference(logits, other) > 0)
  end)

  it("have the same largest entries, in the same order", function()
    assert.same(host:argmax(), logits:argmax())
    for _, k in ipairs { 1, 7, 40 } do
      local values, ids = logits:topk(k)
      local host_values, host_ids = host:topk(k)
      assert.same(host_ids:totable(), ids:totable())
      assert.is_true(support.bytes(host_values) == support.bytes(values))
    end
  end)

  it("give the same metrics", function()
    local m = core.metrics
    same_numbers(m.kl(host, host_other), m.kl(logits, other), "kl")
    same_numbers(m.entropy(host), m.entropy(logits), "entropy")
    same_numbers(m.loglik(host, TARGETS), m.loglik(logits, TARGETS), "loglik")
    same_numbers(m.delta_p(host, host_other, TARGETS), m.delta_p(logits, other, TARGETS), "delta_p")
    same_numbers(m.jaccard(host, host_other, { 1, 5, 20 }), m.jaccard(logits, other, { 1, 5, 20 }), "jaccard")
    assert.same(m.agreement(host, host_other), m.agreement(logits, other))
  end)
end)

describe("rows that go on from kept rows", function()
  it("are whole rows", function()
    local device <close> = assert(qlua.device(os.getenv "QLUA_TEST_DEVICE" or "cpu",
      { numerics = "invariant" }))
    local model <close> = assert(qlua.load_synthetic("tiny", { device = device, seed = 7 }))
    local heads, tails, rows = { support.ids(9, 256, 1), support.ids(5, 256, 2) }, {}, {}
    local none <close>, kept = assert(model:forward(heads, { rows = { 0, 0 }, keep = true }))
    assert.equal(0, none:size(1))
    local parents <const> = { 2, 1, 2 }
    for i, parent in ipairs(parents) do
      tails[i] = support.ids(2 * i, 256, 20 + i)
      rows[i] = table.move(tails[i], 1, #tails[i], #heads[parent] + 1, table.move(heads[parent], 1,
        #heads[parent], 1, {}))
    end
    local whole <close> = assert(model:forward(rows, { rows = "last" }))
    local rest <close> = assert(model:forward(tails, { after = kept, parents = parents, rows = "last" }))
    kept:close()
    assert.is_true(support.bytes(whole) == support.bytes(rest))
  end)
end)

describe("two runs on the device", function()
  it("have the same bits", function()
    for _, model in ipairs { full, twin } do
      local a <close> = assert(model:forward(IDS))
      local b <close> = assert(model:forward(IDS))
      assert.is_true(support.bytes(a) == support.bytes(b))
    end
  end)

  it("write the same text", function()
    for _, model in ipairs { full, twin } do
      local options = { max_new_tokens = 6, ignore_eos = true, temperature = 0.8, seed = 7 }
      assert.same((model:generate(IDS, options)), (model:generate(IDS, options)))
    end
  end)
end)

describe("random weights", function()
  it("are the same on every device", function()
    local cpu <close> = assert(qlua.device "cpu")
    local options = { dtype = "float32", seed = 11 }
    options.device = cpu
    local a <close> = assert(qlua.load_synthetic("tiny", options))
    options.device = support.device()
    local b <close> = assert(qlua.load_synthetic("tiny", options))
    local x <close> = assert(a:forward { 1, 2, 3, 200 })
    local y <close> = assert(b:forward { 1, 2, 3, 200 })
    local worst, _, scale = support.difference(x, y)
    assert.is_true(scale > 0 and worst <= 1e-5 * scale, ("%g of %g"):format(worst, scale))
  end)
end)
