--- Devices: what they say of themselves, of memory, and their clock.

local qlua = require "qlua"
local support = require "tests.specs.support"

local raises = support.raises
describe("a device", function()
  it("auto and cpu are the processor", function()
    for _, name in ipairs { "auto", "cpu", "cpu:0" } do
      local device <close> = assert(qlua.device(name))
      local info = device:info()
      assert.equal("cpu", info.name)
      assert.is_true(#info.hardware > 0)
      assert.is_true(info.isa == "avx512" or info.isa == "avx2" or info.isa == "scalar", info.isa)
      assert.is_true(info.threads >= 1)
      assert.is_true(info.memory_total >= info.memory_free and info.memory_free > 0)
      assert.equal("device cpu", tostring(device))
    end
    local default <close> = assert(qlua.device())
    assert.equal("cpu", default:info().name)
    local one <close> = assert(qlua.device("cpu", { threads = 1 }))
    assert.equal(1, one:info().threads)
    local many, err = qlua.device("cpu", { threads = 4096 })
    if many then
      many:close()
    else
      support.failed(many, err, "threads 4096", tostring(default:info().threads))
    end
  end)

  it("is listed", function()
    local found
    for _, info in ipairs(qlua.devices()) do found = found or info.name == "cpu" end
    assert.is_true(found)
    assert.matches("^%d+%.%d+%.%d+$", qlua.version)
  end)

  it("tells memory of machine and process", function()
    local device <close> = assert(qlua.device "cpu")
    local memory = device:memory()
    assert.is_true(memory.total >= memory.free)
    assert.is_true(memory.process > 1 << 20 and memory.process_peak >= memory.process)
    assert.is_boolean(device:reset_peak())
    device:sync()
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
