--- Golden models: what transformers and bitsandbytes compute, at the tolerances of the design.

local qlua = require "qlua"
local support = require "tests.specs.support"

local LOGITS <const> = 1e-4 -- largest difference of float32 logits
local LAYER <const> = 1e-5  -- largest difference of a layer's output, in units of its root mean square
local RATIO <const> = 1.1   -- our 16-bit error in units of transformers' own
-- activations of another device: rms difference of logits of one model in two types, in units of their rms
local ROUNDED <const> = 2e-2
-- QLUA_TEST_MODELS=name,name: only these, where all would take too long
local ONLY <const> = os.getenv "QLUA_TEST_MODELS"

-- outputs of one layer in the order in which they arise
local PARTS <const> = { "input_norm", "q", "k", "attn", "post_norm", "mlp", "out" }

local function load(name)
  return assert(support.device():load(support.MODELS .. name))
end

local function goldens(name)
  return assert(qlua.open_checkpoint(support.MODELS .. name .. "/golden.safetensors"))
end

local function facts_of(name)
  return support.json(support.MODELS .. name .. "/golden.json")
end

--- Greedy tokens: those of transformers in float32. Where activations are rounded, a close call may go the
--- other way: then the exact logits of both tokens differ by no more than the two errors allowed.
local function check_greedy(name, facts, ids, greedy, allowed)
  local wanted = facts.greedy
  assert.equal(#wanted, #greedy)
  for i, token in ipairs(greedy) do
    if token ~= wanted[i] then
      if allowed == 0 then error(("%s: token %d is %d, not %d"):format(name, i, token, wanted[i])) end
      local cpu <close> = assert(qlua.device "cpu")
      local model <close> = assert(cpu:load(support.MODELS .. name))
      local prefix = table.move(ids, 1, #ids, 1, {})
      table.move(wanted, 1, i - 1, #prefix + 1, prefix)
      local logits <close> = assert(model:forward(prefix, { rows = "last" }))
      local row = support.flat(logits)
      local gap = row[wanted[i] + 1] - row[token + 1]
      if gap > 2 * allowed then
        error(("%s: token %d is %d, not %d, which is ahead by %g"):format(name, i, token, wanted[i], gap))
      end
      return -- from here on it is another text
    end
  end
end

local function stages(layers)
  local list = { "embed" }
  for i = 0, layers - 1 do
    for _, part in ipairs(PARTS) do list[#list + 1] = ("layers.%d.%s"):format(i, part) end
  end
  list[#list + 1] = "norm"
  return list
end

local function chosen()
  if not ONLY then return support.variants() end
  local list = {}
  for name in ONLY:gmatch "[^,]+" do list[#list + 1] = name end
  return list
end

describe("golden model", function()
  it("has all variants", function()
    assert.equal(19, #support.variants())
  end)

  for _, name in ipairs(chosen()) do
    it(name .. ": float32 logits, 16-bit error, greedy tokens", function()
      local golden <close> = goldens(name)
      local model <close> = load(name)
      local facts = facts_of(name)
      local ids = support.integers(golden:tensor "ids")
      assert.same(facts.ids, ids)
      local logits <close> = assert(model:forward(ids))
      local exact, own = support.is_exact(facts.weights), facts.bf16_error or facts.f16_error
      if exact then
        local worst = support.difference(logits, golden:tensor "logits")
        assert.is_true(worst <= LOGITS, ("logits differ by %g"):format(worst))
      else
        assert(own, "no error of transformers to hold ours against")
      end
      if own then
        local largest, rms = support.difference(logits, golden:tensor "logits_f64")
        assert.is_true(rms <= RATIO * own.rms, ("rms error %g, transformers %g"):format(rms, own.rms))
        assert.is_true(largest <= RATIO * own.max, ("error %g, transformers %g"):format(largest, own.max))
      end
      local greedy, stats = model:generate(ids, { max_new_tokens = 16, ignore_eos = true })
      assert.same(facts.greedy, support.integers(golden:tensor "greedy"))
      check_greedy(name, facts, ids, greedy, exact and 0 or RATIO * own.max)
      assert.equal("length", stats.stop)
    end)

    it(name .. ": every layer", function()
      local golden <close> = goldens(name)
      local model <close> = load(name)
      local facts, seen = facts_of(name), {}
      local exact, own = support.is_exact(facts.weights), facts.bf16_error or facts.f16_error
      -- in 16 bits no layer may be further off than the logits of transformers are
      local rounded = own and RATIO * own.rms / facts.logits_rms
      local traced <close> = assert(model:forward(facts.ids, {
        trace = function(what, value)
          assert(not seen[what], what .. " twice")
          seen[what] = value
        end,
      }))
      for _, stage in ipairs(stages(facts.layers)) do
        local value = assert(seen[stage], stage .. " is missing")
        local worst, rms, scale = support.difference(value, golden:tensor(stage))
        local wrong, bound = worst, LAYER
        if not exact then wrong, bound = rms, rounded end
        if wrong > bound * scale then
          error(("%s: first divergence at %s: %g of rms %g"):format(name, stage, wrong, scale))
        end
        seen[stage] = nil
        value:close()
      end
      assert.is_nil((next(seen)))
      local worst, rms, scale = support.difference(traced, golden:tensor "logits")
      assert.is_true(exact and worst <= LOGITS or not exact and rms <= rounded * scale)
    end)

    it(name .. ": info says what config.json says", function()
      local model <close> = load(name)
      local facts = facts_of(name)
      local config, info = support.json(support.MODELS .. name .. "/config.json"), model:info()
      assert.equal("LlamaForCausalLM", info.architecture)
      assert.equal(config.hidden_size, info.hidden)
      assert.equal(config.intermediate_size, info.intermediate)
      assert.equal(config.num_hidden_layers, info.layers)
      assert.equal(config.num_attention_heads, info.heads)
      assert.equal(config.num_key_value_heads or config.num_attention_heads, info.kv_heads)
      assert.equal(config.head_dim or config.hidden_size // config.num_attention_heads, info.head_dim)
      assert.equal(config.vocab_size, info.vocab)
      assert.equal(config.tie_word_embeddings == true, info.tied)
      assert.equal(config.max_position_embeddings, info.max_context)
      assert.equal(({ f32 = "float32", f16 = "float16", bf16 = "bfloat16" })[facts.weights], info.dtype)
      local wide = info.kv_dtype == "float32"
      assert.equal(support.is_exact(facts.weights), wide)
      assert.is_true(wide or info.kv_dtype == "bfloat16" or info.kv_dtype == "float16")
      assert.equal(support.device():info().name, info.device)
      assert.equal(support.MODELS .. name, info.folder)
      assert.is_true(info.bytes > 0 and info.params > 0)
      local quant = facts.quantization
      assert.equal(quant and quant.bnb_4bit_quant_type or info.dtype, info.quant.label)
      if not quant then return end
      assert.equal(quant.bnb_4bit_use_double_quant, info.quant.double)
      assert.equal(64, info.quant.block)
      assert.equal(#facts.dequantized, info.quant.quantized)
      assert.equal(#facts.dequantized + 1, info.quant.matrices)
    end)
  end

  it("4-bit weights decode bit for bit as in bitsandbytes", function()
    local compared = 0
    for _, name in ipairs(support.variants()) do
      local golden <close> = goldens(name)
      local facts = facts_of(name)
      local ck <close> = assert(qlua.open_checkpoint(support.MODELS .. name))
      for _, weight in ipairs(facts.dequantized or {}) do
        local info = assert(ck:info(weight))
        assert.equal(facts.quantization.bnb_4bit_quant_type, info.quantized)
        local value = assert(ck:tensor(weight))
        assert.same(info.decoded_shape, value:shape())
        local expected = golden:tensor("dequant." .. weight)
        if expected then
          assert.same(expected:shape(), value:shape())
          assert.is_true(support.bytes(expected) == support.bytes(value), name .. " " .. weight)
          compared = compared + 1
        end
      end
    end
    assert.equal(15, compared) -- k_proj and down_proj of eight models; one keeps k_proj alone
  end)

  it("a sharded folder is its tensors, whatever their files", function()
    local ck <close> = assert(qlua.open_checkpoint(support.MODELS .. "sharded_bf16"))
    local files = {}
    for _, tensor in ipairs(ck:names()) do files[ck:info(tensor).file] = true end
    local n = 0
    for _ in pairs(files) do n = n + 1 end
    assert.equal(4, n)
  end)
end)

describe("loaded as another dtype", function()
  it("float32 holds the same values, 16 bits round them", function()
    local folder <const> = support.MODELS .. "llama3_bf16"
    local device, ids = support.device(), support.json(folder .. "/golden.json").ids
    local stored <close> = assert(device:load(folder))
    local wide <close> = assert(device:load(folder, { dtype = "float32" }))
    assert.equal("float32", wide:info().dtype)
    assert.is_true(wide:info().bytes > 1.9 * stored:info().bytes)
    local a, b = stored:forward(ids), wide:forward(ids)
    local apart, rms, scale = support.difference(a, b)
    if support.is_exact "bfloat16" then
      assert.is_true(apart < 1e-5)
    else
      assert.is_true(rms < ROUNDED * scale)
    end
    local f32 <const> = support.MODELS .. "llama2_f32"
    local exact <close> = assert(device:load(f32))
    local rounded <close> = assert(device:load(f32, { dtype = "bfloat16" }))
    assert.equal("bfloat16", rounded:info().dtype)
    local c, d = exact:forward(ids), rounded:forward(ids)
    local largest = support.difference(c, d)
    assert.is_true(largest > 1e-4 and largest < 1)
  end)
end)

describe("real checkpoints", function()
  it("stories260K tells its story for 200 tokens", function()
    if not support.exists(support.STORIES) then return pending("no " .. support.STORIES) end
    if ONLY then return pending "QLUA_TEST_MODELS leaves it out" end
    local model <close> = assert(support.device():load(support.STORIES))
    local golden = support.json(support.STORIES .. "/greedy200.json")
    local new = assert(model:generate(golden.prompt_ids, { max_new_tokens = 200, ignore_eos = true }))
    local all = table.move(new, 1, #new, #golden.prompt_ids + 1, table.move(golden.prompt_ids, 1,
      #golden.prompt_ids, 1, {}))
    local wanted = golden.greedy_ids
    for i = 1, math.min(#wanted, #all) do
      if wanted[i] ~= all[i] then error(("token %d is %d, not %d"):format(i, all[i], wanted[i])) end
    end
    assert.is_true(#all >= #wanted)
  end)

  it("tiny-random-llama loads and runs", function()
    local folder <const> = "../shared/data/models/tiny-random-llama"
    if not support.exists(folder) then return pending("no " .. folder) end
    if support.DEVICE ~= "cpu" then -- its heads are smaller than the kernels can read at once
      local model, err = support.device():load(folder)
      if model then err = select(2, model:forward { 1, 31999, 5 }) end
      return support.failed(nil, err, "head_dim 4")
    end
    local model <close> = assert(support.device():load(folder))
    assert.equal(32000, model:info().vocab)
    assert.equal("float32", model:info().dtype)
    local logits <close> = assert(model:forward({ 1, 31999, 5 }, { rows = "last" }))
    assert.same({ 1, 32000 }, logits:shape())
    assert.equal("not_found", select(2, model:encode "x").code)
  end)
end)
