--- Saved models: what is in the folder, that it loads with the same bits, and what is refused.

local lfs = require "lfs"
local qlua = require "qlua"
local support = require "tests.specs.support"

local IDS <const> = { 1, 21, 61, 77, 32, 19, 69, 22, 5, 3 }

teardown(support.cleanup)

local function load(folder)
  return assert(support.device():load(folder))
end

local function hash(model)
  local logits <close> = assert(model:forward(IDS))
  return support.hash(logits)
end

local function target()
  return support.folder() .. "/saved"
end

describe("save", function()
  it("a twin loads back with the same bits and says how it is quantized", function()
    local sources <const> = { "llama2_f32", "llama31_bf16", "biases_bf16", "sharded_bf16",
      "v5_llama31_f16" }
    for _, source in ipairs(sources) do
      local full <close> = load(support.MODELS .. source)
      for _, options in ipairs { { scheme = "nf4" }, { scheme = "nf4", double = true },
        { scheme = "fp4", block = 128 } } do
        local twin <close> = assert(full:quantize(options))
        local folder = target()
        assert.is_true(assert(twin:save(folder)))
        local again <close> = load(folder)
        assert.equal(hash(twin), hash(again), source)
        assert.same(twin:info().quant, again:info().quant)
        assert.equal(twin:info().bytes, again:info().bytes)
        local config = support.json(folder .. "/config.json")
        local quant = assert(config.quantization_config, source)
        assert.equal("bitsandbytes", quant.quant_method)
        assert.is_true(quant.load_in_4bit)
        assert.equal(options.scheme, quant.bnb_4bit_quant_type)
        assert.equal(options.double or false, quant.bnb_4bit_use_double_quant)
        -- the rest of config.json stays
        local original = support.json(support.MODELS .. source .. "/config.json")
        for key, value in pairs(original) do
          if key ~= "quantization_config" then assert.same(value, config[key], source .. " " .. key) end
        end
        -- saving what was loaded gives the same tensors
        local twice = target()
        assert(again:save(twice))
        assert.same(support.raw_tensors(folder .. "/model.safetensors"),
          support.raw_tensors(twice .. "/model.safetensors"))
        support.cleanup()
      end
    end
  end)

  it("a model in 16 or 32 bits is saved as it was", function()
    for _, source in ipairs { "linear_f16", "biases_bf16", "llama31_bf16" } do
      local model <close> = load(support.MODELS .. source)
      local folder = target()
      assert(model:save(folder))
      assert.same(support.raw_tensors(support.MODELS .. source .. "/model.safetensors"),
        support.raw_tensors(folder .. "/model.safetensors"), source)
      assert.is_nil(support.json(folder .. "/config.json").quantization_config)
      local again <close> = load(folder)
      assert.equal(hash(model), hash(again))
    end
  end)

  it("a bitsandbytes checkpoint keeps every stored tensor", function()
    for _, source in ipairs { "nf4_double", "nf4_f32", "fp4", "odd_nf4" } do
      local model <close> = load(support.MODELS .. source)
      local folder = target()
      assert(model:save(folder))
      local theirs = support.raw_tensors(support.MODELS .. source .. "/model.safetensors")
      local ours = support.raw_tensors(folder .. "/model.safetensors")
      for name, bytes in pairs(theirs) do
        assert.is_true(bytes == ours[name], source .. " " .. name)
        ours[name] = nil
      end
      assert.is_nil((next(ours)))
    end
    -- packed as BF16 words, it is written as bytes: the same codes
    local model <close> = load(support.MODELS .. "nf4_storage_bf16")
    local folder = target()
    assert(model:save(folder))
    local again <close> = load(folder)
    assert.equal(hash(model), hash(again))
  end)

  it("a mixed model names in config.json what stays", function()
    local full <close> = load(support.MODELS .. "llama3_bf16")
    local twin <close> = assert(full:quantize { skip = { "lm_head", "layers.1", "q_proj" } })
    local folder = target()
    assert(twin:save(folder))
    local skip, set = support.json(folder .. "/config.json").quantization_config.llm_int8_skip_modules, {}
    for _, name in ipairs(skip) do set[name] = true end
    for _, m in ipairs(twin:matrices()) do assert.equal(m.scheme == nil, set[m.name] == true, m.name) end
    local again <close> = load(folder)
    assert.equal(hash(twin), hash(again))
    assert.equal("nf4 6/14", again:info().quant.label)
  end)

  it("in shards, with an index", function()
    local full <close> = load(support.MODELS .. "llama3_bf16")
    local twin <close> = assert(full:quantize {})
    local folder = target()
    assert(twin:save(folder, { shard_bytes = 20000 }))
    local index = support.json(folder .. "/model.safetensors.index.json")
    local files = {}
    for _, file in pairs(index.weight_map) do files[file] = true end
    local n = 0
    for file in pairs(files) do
      n = n + 1
      assert.is_true(support.exists(folder .. "/" .. file))
    end
    assert.is_true(n > 1)
    local again <close> = load(folder)
    assert.equal(hash(twin), hash(again))
    -- replaced by one file: the shards go
    assert(twin:save(folder, { force = true }))
    assert.is_false(support.exists(folder .. "/model.safetensors.index.json"))
    for file in lfs.dir(folder) do assert.is_nil(file:find "%-of%-") end
    local once <close> = load(folder)
    assert.equal(hash(twin), hash(once))
  end)

  it("takes the tokenizer along", function()
    if not support.exists(support.STORIES) then return pending("no " .. support.STORIES) end
    local full <close> = load(support.STORIES)
    local twin <close> = assert(full:quantize {})
    local folder = target()
    assert(twin:save(folder))
    local again <close> = load(folder)
    assert.same(full:encode "Once upon a time", again:encode "Once upon a time")
  end)
end)

describe("save refuses", function()
  it("to write over a model unless forced", function()
    local full <close> = load(support.MODELS .. "llama3_bf16")
    local twin <close> = assert(full:quantize {})
    local folder = target()
    assert(twin:save(folder))
    local before = support.read(folder .. "/model.safetensors")
    local ok, err = full:save(folder)
    support.failed(ok, err, folder, "force")
    assert.is_true(before == support.read(folder .. "/model.safetensors"))
    assert.is_true(full:save(folder, { force = true }))
    local again <close> = load(folder)
    assert.equal(hash(full), hash(again))
    assert.is_nil(support.json(folder .. "/config.json").quantization_config)
  end)

  it("the folder that the model came from", function()
    local folder = support.copy "llama3_bf16"
    local model <close> = load(folder)
    support.raises(function() model:save(folder, { force = true }) end, folder)
    local twin <close> = assert(model:quantize {})
    support.raises(function() twin:save(folder, { force = true }) end, folder)
  end)

  it("a free code book, and leaves nothing behind", function()
    local full <close> = load(support.MODELS .. "llama3_bf16")
    local book = {}
    for i = 1, 16 do book[i] = i - 8 end
    local twin <close> = assert(full:quantize { codebook = book })
    local folder = target()
    local ok, err = twin:save(folder)
    support.failed(ok, err, "code book", "q_proj", "nf4 or fp4")
    assert.is_false(support.exists(folder))
  end)

  it("a model without a folder, a folder that is a file, a place that is not there", function()
    local synthetic <close> = assert(qlua.load_synthetic("tiny", { device = support.device() }))
    support.raises(function() synthetic:save(target()) end, "synthetic")
    local full <close> = load(support.MODELS .. "llama3_bf16")
    local file = support.write(support.folder() .. "/file", "x")
    local ok, err = full:save(file)
    support.failed(ok, err, file)
    ok, err = full:save(file .. "/below")
    support.failed(ok, err, file)
    support.raises(function() full:save() end, "string expected")
  end)
end)
