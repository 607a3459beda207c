--- Devices: what they say of themselves, of memory, and their clock.

local qlua = require "qlua"
local support = require "tests.specs.support"

local raises = support.raises
describe("a device", function()
  it("cpu is the processor", function()
    for _, name in ipairs { "cpu", "cpu:0" } do
      local device <close> = assert(qlua.device(name))
      local info = device:info()
      assert.equal("cpu", info.name)
      assert.is_true(#info.hardware > 0)
      assert.is_true(info.isa == "avx512" or info.isa == "avx2" or info.isa == "scalar", info.isa)
      assert.is_true(info.threads >= 1)
      assert.equal("invariant", info.numerics)
      assert.is_nil(info.driver)
      assert.is_true(info.memory_total >= info.memory_free and info.memory_free > 0)
      assert.equal("device cpu", tostring(device))
    end
    local one <close> = assert(qlua.device("cpu", { threads = 1 }))
    assert.equal(1, one:info().threads)
    local many, err = qlua.device("cpu", { threads = 4096 })
    if many then
      many:close()
    else
      support.failed(many, err, "threads 4096")
    end
  end)

  it("auto is the first CUDA device that can be used, or else the processor", function()
    local devices = qlua.devices()
    for _, name in ipairs { "auto", false } do
      local device <close> = assert(qlua.device(name or nil))
      assert.equal((devices[2] or devices[1]).name, device:info().name)
    end
  end)

  it("takes numerics, which the processor need not be told", function()
    for _, numerics in ipairs { "fast", "invariant" } do
      local device <close> = assert(qlua.device("cpu", { numerics = numerics }))
      assert.equal("invariant", device:info().numerics)
    end
    raises(function() qlua.device("cpu", { numerics = "exact" }) end, "'numerics'", "'exact'", "invariant")
    raises(function() qlua.device("cpu", { numerics = 1 }) end, "'numerics'")
  end)

  it("is listed", function()
    local found
    local devices, missing = qlua.devices()
    for _, info in ipairs(devices) do found = found or info.name == "cpu" end
    assert.is_true(found)
    if #devices == 1 then support.failed(nil, missing, "CUDA") end
    assert.matches("^%d+%.%d+%.%d+$", qlua.version)
  end)

  it("tells memory of machine and process", function()
    local device <close> = assert(qlua.device "cpu")
    local memory = device:memory()
    assert.is_true(memory.total >= memory.free)
    assert.is_true(memory.process > 1 << 20 and memory.process_peak >= memory.process)
    assert.is_boolean(device:reset_peak())
    assert.is_true(device:sync())
  end)

  it("names the kernels that ran since it was asked", function()
    local device <close> = assert(qlua.device "cpu")
    local isa = device:info().isa
    assert.same({}, device:kernels())
    local full <close> = assert(device:load(support.MODELS .. "llama3_bf16"))
    local twin <close> = assert(full:quantize { scheme = "nf4", skip = {} })
    device:kernels()
    local logits <close> = assert(full:forward { 1, 2, 3 })
    assert.same({ "matmul_bf16_" .. isa, "attention_" .. isa }, device:kernels())
    assert.same({}, device:kernels())
    local others <close> = assert(twin:forward { 1, 2, 3 })
    assert.same({ "matmul_4bit_" .. isa, "attention_" .. isa }, device:kernels())
    assert.same(logits:shape(), others:shape())
    assert.same({ "attention_" .. isa, "matmul_4bit_" .. isa, "matmul_bf16_" .. isa }, device:all_kernels())
  end)

  it("measures what it can do at most", function()
    local device <close> = assert(qlua.device("cpu", { threads = 1 }))
    local ceiling = assert(device:ceiling(32 << 20))
    assert.is_true(ceiling.read_bytes_per_second > 1e8)
    assert.is_true(ceiling.flops_per_second > 1e8)
    assert.is_nil(ceiling.matrix_flops_per_second)
    raises(function() device:ceiling(1000) end, "16 MiB")
  end)

  it("times a function", function()
    local device <close> = assert(qlua.device "cpu")
    local calls = 0
    local t = device:time(function() calls = calls + 1 end, { warmup = 2, runs = 5, min_seconds = 0 })
    assert.equal(7, calls)
    assert.equal(5, t.n)
    assert.equal(5, #t.samples)
    assert.is_true(t.min <= t.p10 and t.p10 <= t.median and t.median <= t.p90 and t.p90 <= t.max)
    assert.is_true(t.mean >= t.min and t.mean <= t.max and t.sd >= 0)
    calls = 0
    t = device:time(function()
      calls = calls + 1
      local begin = os.clock()
      while os.clock() - begin < 0.002 do end
    end, { warmup = 0, runs = 1, min_seconds = 0.02 })
    assert.is_true(calls > 1 and calls <= 11, tostring(calls))
    assert.is_true(t.median >= 0.0015)
    raises(function() device:time(function() error "stop" end) end, "stop")
  end)
end)
