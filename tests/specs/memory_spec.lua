--- Memory: what a model's arena says, what is expected of it, and that dead things go away.

local core = require "qlua.core"
local qlua = require "qlua"
local support = require "tests.specs.support"
local sys = require "qlua.sys"

local MODEL <const> = support.MODELS .. "llama3_bf16"
local MIB <const> = 1 << 20
local KINDS <const> = { "weights", "kv", "activations", "total" }

-- AddressSanitizer keeps freed memory for a while: resident bytes say nothing there
local SANITIZED <const> = io.open("/proc/self/maps"):read("a"):find("libasan", 1, true) ~= nil

local function tiny(options)
  options = options or {}
  options.device = support.device()
  return assert(qlua.load_synthetic("tiny", options))
end

describe("a model's memory", function()
  it("is counted by kind, and is what was expected", function()
    local cases <const> = { { 1, 1, 1 }, { 1, 40, 40 }, { 3, 17, 3 }, { 2, 300, 2 }, { 4, 200, 800 },
      { 1, 512, 512 }, { 7, 150, 1050 } }
    for _, case in ipairs(cases) do
      local model <close> = tiny { dtype = "float32" }
      local rows, tokens, outputs = table.unpack(case)
      local batch = {}
      for i = 1, rows do batch[i] = support.ids(tokens, 256, i) end
      local loaded = model:memory()
      assert.equal(loaded.weights, model:info().bytes)
      assert.equal(loaded.weights, loaded.total)
      assert.equal(0, loaded.kv + loaded.activations)
      local logits = assert(model:forward(batch, { rows = outputs == rows and "last" or "all" }))
      assert.equal(outputs, logits:size(1))
      local memory, expected = model:memory(), model:expected_memory(rows * tokens, tokens,
        outputs)
      for _, kind in ipairs(KINDS) do
        local share = memory.peak[kind] / expected[kind]
        assert.is_true(share <= 1 and share > 0.99, ("%s of %d x %d: %d, expected %d"):format(kind, rows,
          tokens, memory.peak[kind], expected[kind]))
      end
      assert.equal(0, memory.kv) -- the cache went with the pass
      logits:close()
      assert.equal(memory.activations - 4 * 256 * outputs, model:memory().activations)
    end
  end)

  it("has a high-water mark that can be set back", function()
    local model <close> = tiny()
    local big <close> = assert(model:forward(support.ids(400, 256, 1)))
    local peak = model:memory().peak
    local small <close> = assert(model:forward { 1, 2 })
    assert.same(peak.kv, model:memory().peak.kv)
    model:reset_peak()
    local now = model:memory()
    for _, kind in ipairs(KINDS) do assert.equal(now[kind], now.peak[kind]) end
    small:close()
    local again <close> = assert(model:forward { 1, 2 })
    local later = model:memory().peak
    assert.is_true(later.kv > 0 and later.kv < peak.kv / 100)
    assert.is_true(later.total < peak.total)
    assert.equal(400, big:size(1))
    assert.equal(2, again:size(1))
  end)

  it("is not charged with a larger pass before the high-water mark was set back", function()
    local model <close> = tiny { dtype = "float32" }
    for _, tokens in ipairs { 500, 300, 40, 1 } do
      model:reset_peak()
      assert.equal(0, model:memory().activations)
      local logits <close> = assert(model:forward(support.ids(tokens, 256, tokens), { rows = "last" }))
      assert.equal(1, logits:size(1))
      local peak, expected = model:memory().peak, model:expected_memory(tokens, tokens, 1)
      for _, kind in ipairs(KINDS) do
        local share = peak[kind] / expected[kind]
        assert.is_true(share <= 1 and share > 0.99, ("%s of %d: %d, expected %d"):format(kind, tokens,
          peak[kind], expected[kind]))
      end
    end
    assert.has_error(function()
      model:forward({ 1, 2 }, { trace = function() model:reset_peak() end })
    end)
  end)

  it("of a row beyond the context is refused before it is taken", function()
    local model <close> = assert(qlua.load_synthetic("tiny", { device = support.device() }))
    local context = model:info().max_context
    local ok, message = pcall(model.forward, model, support.ids(context + 1, 256, 1))
    assert.is_false(ok)
    assert.truthy(tostring(message):find("the model's context is " .. context, 1, true))
    assert.equal(0, model:memory().peak.kv)
  end)

  it("of generation has room for prompt and answer", function()
    local model <close> = tiny()
    local slot = 2 * 2 * 2 * 16 * 4 -- keys and values, layers, heads, width, bytes
    assert(model:generate({ { 1, 2, 3 }, { 4 } }, { max_new_tokens = 20, ignore_eos = true }))
    assert.equal((22 + 20) * slot, model:memory().peak.kv)
    assert.equal(0, model:memory().kv)
  end)

  it("is never more than the weights and one tensor while they are read, converted or quantized", function()
    local device = support.device()
    local function largest(model)
      local most = 0
      for _, m in ipairs(model:matrices()) do most = math.max(most, m.bytes) end
      return most -- the embedding has the size of lm_head
    end
    for _, dtype in ipairs { "auto", "float32" } do
      local model <close> = assert(device:load(support.MODELS .. "llama3_bf16", { dtype = dtype }))
      local memory = model:memory()
      assert.is_true(memory.peak.total <= memory.weights + largest(model),
        ("%s: %d at most, then %d"):format(dtype, memory.peak.total, memory.weights))
      model:reset_peak()
      for _, double in ipairs { false, true } do
        local twin <close> = assert(model:quantize { double = double, skip = {} })
        local own = twin:memory()
        assert.is_true(own.peak.total <= own.weights + largest(twin),
          ("twin: %d at most, then %d"):format(own.peak.total, own.weights))
        assert.equal(memory.weights, model:memory().peak.total) -- nothing of the full one a second time
      end
    end
    for _, name in ipairs { "odd_nf4", "nf4_double" } do
      local model <close> = assert(device:load(support.MODELS .. name))
      local memory = model:memory()
      assert.is_true(memory.peak.total <= memory.weights + largest(model), name)
    end
  end)

  it("of a twin counts what is its own; what both hold stays with its maker", function()
    local full = tiny()
    local before = full:memory().weights
    local twin <close> = assert(full:quantize { double = true })
    assert.equal(before, full:memory().weights)
    assert.is_true(twin:memory().weights < before / 3)
    assert.is_true(twin:memory().resident < full:memory().resident)
    local shared = twin:memory().resident - twin:memory().weights
    assert.is_true(shared > 0)
    local _ <close> = assert(full:forward { 1, 2, 3 })
    assert.equal(0, twin:memory().activations)
    full:close()
    assert.is_true(twin:memory().resident - twin:memory().weights == shared)
  end)
end)

describe("dead tensors", function()
  local LIMIT <const> = 512 * MIB -- the soft limit of bindings/lua_box.c

  local function mebibytes(n)
    local row = {}
    for i = 1, 1024 do row[i] = i end
    local rows = {}
    for i = 1, 256 * n do rows[i] = row end
    return qlua.tensor(rows)
  end

  --- Bytes by which the process grew at most while `step` ran `times` times without the collector's own pace.
  local function growth(times, step)
    collectgarbage()
    collectgarbage()
    local before, most = sys.memory(), 0
    collectgarbage "stop"
    for i = 1, times do
      step(i)
      if i % 8 == 0 then most = math.max(most, sys.memory() - before) end
    end
    collectgarbage "restart"
    collectgarbage()
    return most
  end

  it("of arithmetic stay under the soft limit", function()
    local base <close> = mebibytes(4)
    local most = growth(200, function() return base + 1 end)
    if not SANITIZED then assert.is_true(most < LIMIT + 64 * MIB, ("%d MiB"):format(most // MIB)) end
  end)

  it("held by views alone count too", function()
    local base <close> = mebibytes(4)
    local most = growth(200, function()
      local sum <close> = base + 1
      return sum:select(1, 1)
    end)
    if not SANITIZED then assert.is_true(most < LIMIT + 64 * MIB, ("%d MiB"):format(most // MIB)) end
  end)

  it("and dead models are collected as well", function()
    local most = growth(36, function(i)
      return assert(core.load_random(support.device(), { hidden = 256, intermediate = 512, layers = 4,
        heads = 4, kv_heads = 4, head_dim = 64, vocab = 4096 }, "float32", i))
    end)
    if not SANITIZED then assert.is_true(most < LIMIT + 128 * MIB, ("%d MiB"):format(most // MIB)) end
  end)

  it("do not stop a loop that keeps what it makes", function()
    local base <close> = mebibytes(1)
    local kept = {}
    for i = 1, 32 do kept[i] = base * i end
    for i = 1, 32 do assert.equal(1024 * i, kept[i]:get(256, 1024)) end
  end)
end)

describe("hundreds of models loaded and closed", function()
  it("leave nothing behind", function()
    -- in a process of its own, whose heap nothing else has stirred
    local folder = support.exists(support.STORIES) and support.STORIES or MODEL
    local output, ok = support.run(([[
      local sys = require "qlua.sys"
      local device <close> = assert(require("qlua").device "cpu")
      local function cycle()
        local model <close> = assert(device:load %q)
        local twin <close> = assert(model:quantize {})
        local logits <close> = assert(twin:forward { 1, 2, 3 })
        model:encode "Once upon a time"
      end
      local function resident()
        for _ = 1, 3 do collectgarbage() end
        return (sys.memory())
      end
      -- the heap spreads and shrinks by megabytes; a leak raises what it comes down to
      local function floor()
        local least = math.huge
        for _ = 1, 5 do
          for _ = 1, 50 do cycle() end
          least = math.min(least, resident())
        end
        return least
      end
      for _ = 1, 100 do cycle() end
      local before = floor()
      print(floor() - before)
    ]]):format(folder))
    assert.is_true(ok, output)
    local grown = math.tointeger(tonumber(output:match "%S+"))
    assert(grown, output)
    if not SANITIZED then assert.is_true(grown < MIB, ("%d KiB more"):format(grown // 1024)) end
  end)
end)
