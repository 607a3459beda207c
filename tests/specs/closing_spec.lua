--- Who may close what, when, and what still works afterwards.

local qlua = require "qlua"
local support = require "tests.specs.support"

local raises = support.raises
local MODEL <const> = support.MODELS .. "llama3_bf16"

describe("closing", function()
  it("a device leaves its models at work", function()
    local device = assert(qlua.device "cpu")
    local model <close> = assert(device:load(MODEL))
    local before <close> = assert(model:forward { 1, 2, 3 })
    device:close()
    device:close()
    assert.matches("closed", tostring(device))
    for _, method in ipairs { "info", "memory", "sync", "reset_peak", "load" } do
      raises(function() device[method](device, MODEL) end, "closed")
    end
    raises(function() qlua.load_synthetic("tiny", { device = device }) end, "closed")
    local after <close> = assert(model:forward { 1, 2, 3 })
    assert.equal(support.hash(before), support.hash(after))
    local twin <close> = assert(model:quantize {})
    assert.equal("nf4", twin:info().quant.label)
  end)

  it("a model leaves its tensors; every method then says so", function()
    local model = assert(support.device():load(MODEL))
    local logits <close> = assert(model:forward { 1, 2 })
    model:close()
    model:close()
    assert.equal("model (closed)", tostring(model))
    assert.same({ 2, 96 }, logits:shape())
    local methods <const> = { "forward", "generate", "info", "memory", "reset_peak", "save", "sha256",
      "matrices", "encode", "decode", "tokenizer", "device_name" }
    for _, method in ipairs(methods) do
      raises(function() model[method](model, { 1 }, {}, 1) end, "closed")
    end
    raises(function() model:quantize {} end, "closed")
    raises(function() model:expected_memory(1, 1, 1) end, "closed")
  end)

  it("a model is refused while one of its own callbacks runs", function()
    local model = assert(support.device():load(MODEL))
    local function close() model:close() end
    raises(function() model:forward({ 1 }, { trace = close }) end, "callback")
    raises(function() model:generate({ 1 }, { on_token = close }) end, "callback")
    raises(function() model:quantize { policy = close } end, "callback")
    assert.is_truthy(model:forward { 1 })
    model:close()
    raises(function() model:forward { 1 } end, "closed")
  end)

  it("a second pass is refused in the middle of the first, allowed between two", function()
    local model <close> = assert(support.device():load(MODEL))
    raises(function()
      model:forward({ 1 }, { trace = function() model:forward { 1, 2, 3 } end })
    end, "middle of a forward pass")
    raises(function()
      model:forward({ 1 }, { trace = function() model:generate { 1 } end })
    end, "middle of a forward pass")
    local plain = assert(model:generate({ 1, 5 }, { max_new_tokens = 6, ignore_eos = true }))
    local passes = 0
    local with = assert(model:generate({ 1, 5 }, {
      max_new_tokens = 6,
      ignore_eos = true,
      on_token = function()
        local logits <close> = assert(model:forward { 3, 2, 1, 7, 8 })
        passes = passes + logits:size(1)
      end,
    }))
    assert.same(plain, with)
    assert.equal(30, passes)
  end)

  it("in any order, by the collector too", function()
    for i = 1, 6 do
      local device = assert(qlua.device("cpu", { threads = 1 }))
      local model = assert(device:load(MODEL))
      local twin = assert(model:quantize {})
      local logits = assert(twin:forward { 1, 2 })
      local row = logits:select(1, 1)
      if i > 2 then device = nil end -- luacheck: ignore
      if i > 3 then model = nil end -- luacheck: ignore
      if i > 4 then twin, logits = nil, nil end -- luacheck: ignore
      collectgarbage()
      collectgarbage()
      assert.equal(96, row:size(1))
    end
  end)
end)
