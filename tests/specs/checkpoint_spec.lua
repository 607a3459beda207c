--- Checkpoints as Lua sees them: names, shapes, values, identity.

local qlua = require "qlua"
local support = require "tests.specs.support"

local raises = support.raises

describe("a checkpoint's tensors", function()
  it("come as float32 or float64, with names, info and identity", function()
    local ck <close> = assert(qlua.open_checkpoint(support.MODELS .. "nf4"))
    assert.matches("checkpoint .*nf4", tostring(ck))
    local names = ck:names()
    assert.is_true(#names > 20)
    for _, name in ipairs(names) do
      local info = assert(ck:info(name))
      assert.is_true(info.bytes > 0 and #info.shape > 0 and info.dtype ~= nil)
      local value <close> = assert(ck:tensor(name))
      assert.same(info.decoded_shape or info.shape, value:shape())
    end
    assert.matches("^%x+$", ck:sha256())
    local model <close> = assert(support.device():load(support.MODELS .. "nf4"))
    assert.equal(ck:sha256(), model:sha256())
    local other <close> = assert(qlua.open_checkpoint(support.MODELS .. "fp4"))
    assert.not_equal(ck:sha256(), other:sha256())
    local golden <close> = assert(qlua.open_checkpoint(support.MODELS .. "nf4/golden.safetensors"))
    assert.equal("float64", golden:tensor("ids"):dtype())
    assert.equal("float32", golden:tensor("logits"):dtype())
  end)

  it("outlive it; closed, it says so", function()
    local ck = assert(qlua.open_checkpoint(support.MODELS .. "llama3_bf16"))
    local value = ck:tensor "model.norm.weight"
    ck:close()
    ck:close()
    assert.equal(64, value:size(1))
    for _, method in ipairs { "names", "info", "tensor", "sha256" } do
      raises(function() ck[method](ck, "model.norm.weight") end, "closed")
    end
    assert.matches("closed", tostring(ck))
  end)
end)
