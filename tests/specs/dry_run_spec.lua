--- What --dry-run foretells is what a run then holds; and nothing is loaded for it.

local core = require "qlua.core"
local evaluate = require "qlua.evaluate"
local forecast = require "qlua.forecast"
local json = require "qlua.json"
local lfs = require "lfs"
local passes = require "qlua.passes"
local policy = require "qlua.policy"
local questions = require "qlua.questions"
local support = require "tests.specs.support"
local sys = require "qlua.sys"

local DEMO <const> = "examples/models/demo"
local QLUA <const> = os.getenv "QLUA" or arg[-1]
local KINDS <const> = { "weights", "kv", "activations", "total" }

--- Within 5 % of what the model's arena met.
local function expect_met(expected, model, what)
  local memory = model:memory()
  local met = { weights = memory.resident, kv = memory.peak.kv, activations = memory.peak.activations }
  met.total = memory.peak.total + memory.resident - memory.weights
  for _, kind in ipairs(KINDS) do
    local off = math.abs(expected[kind] / met[kind] - 1)
    if off > 0.05 then
      error(("%s, %s: foretold %d, met %d"):format(what, kind, expected[kind], met[kind]), 2)
    end
  end
end

local function demo_questions(options)
  local data, tasks = require "qlua.data", require "qlua.tasks"
  local items = data.take(assert(data.read "examples/data/lantern_isles_test.csv"), 21)
  local full = options.tokenizer
  local task = options.boxed and tasks.boxed { subject = items.subject }
    or tasks.mmlu { subject = items.subject, fewshot = items, num_fewshot = options.num_fewshot }
  return questions.prepare(full, task, items, { max_context = options.max_context }), task
end

describe("an outline", function()
  it("says of itself what the model says", function()
    local device = support.device()
    for _, name in ipairs { "llama3_bf16", "llama2_f32", "linear_f16", "odd_nf4", "nf4_double", "fp4",
      "biases_bf16" } do
      local folder = support.MODELS .. name
      local model <close> = assert(device:load(folder))
      local outline <close> = assert(device:outline(folder))
      assert.same(model:info(), outline:info())
      assert.equal(model:memory().weights, outline:memory().weights)
      for i, m in ipairs(model:matrices()) do
        local drawn = outline:matrices()[i]
        m.shared, drawn.shared = nil, nil
        assert.same(m, drawn)
      end
      assert.same(model:expected_memory(70, 50, 9, 120), outline:expected_memory(70, 50, 9, 120))
    end
  end)

  it("is also one of a twin, and of a model in another type", function()
    local device = support.device()
    for _, quant in ipairs { { double = true }, { scheme = "fp4", block = 128 }, { skip = { "mlp" } },
      { skip = {}, double = true } } do
      local full <close> = assert(device:load(DEMO, { dtype = "float32" }))
      local twin <close> = assert(full:quantize(quant))
      local outline <close> = assert(device:outline(DEMO, { dtype = "float32", quant = quant }))
      local own = 0
      for _, m in ipairs(twin:matrices()) do own = own + (m.scheme and m.bytes or 0) end
      assert.same(twin:info(), outline:info())
      assert.equal(twin:memory().weights, own)
      assert.equal(own, forecast.own(outline))
    end
  end)

  it("cannot be run, quantized or saved", function()
    local outline <close> = assert(support.device():outline(DEMO))
    for _, attempt in ipairs { { "forward", { 1, 2 } }, { "generate", { 1, 2 } }, { "quantize", {} },
      { "save", os.tmpname() .. "_no" } } do
      local ok, err = outline[attempt[1]](outline, attempt[2])
      assert.is_nil(ok)
      assert.truthy(tostring(err):find("has no weights", 1, true), tostring(err))
    end
    assert.is_nil(support.device():outline "/nowhere")
    assert.has_error(function() support.device():outline(DEMO, { quants = {} }) end)
    assert.has_error(function() support.device():outline { hidden = 64 } end)
  end)
end)

describe("a forecast", function()
  it("is met by the bundled model, full and quantized", function()
    local device = support.device()
    local quant <const> = { double = true }
    for _, case in ipairs { { num_fewshot = 0 }, { num_fewshot = 3 }, { boxed = true } } do
      local full <close> = assert(device:load(DEMO))
      local twin <close> = assert(full:quantize(quant))
      local drawn <close> = assert(device:outline(DEMO))
      local drawn_twin <close> = assert(device:outline(DEMO, { quant = quant }))
      case.tokenizer, case.max_context = assert(full:tokenizer()), full:info().max_context
      local prepared, task = demo_questions(case)
      local how = { device = device, tokenizer = case.tokenizer, task = task, batch_size = 4,
        max_new_tokens = 12, max_context = case.max_context, generation = { max_new_tokens = 12 } }
      local list
      if case.boxed then
        list = passes.generate(prepared, how)
        assert(evaluate.generate({ full, twin }, prepared, how))
      else
        list = passes.loglikelihood(prepared, how)
        assert(evaluate.loglikelihood({ full, twin }, prepared, how))
      end
      expect_met(forecast.of(drawn, list), full, "full")
      expect_met(forecast.of(drawn_twin, list), twin, "nf4")
    end
  end)

  it("is met by choices of several tokens", function()
    local device = support.device()
    local model <close> = assert(device:load(DEMO))
    local prepared = demo_questions { num_fewshot = 2, tokenizer = assert(model:tokenizer()),
      max_context = 512 }
    for _, p in ipairs(prepared) do
      for c, choice in ipairs(p.choices) do
        for i = 1, c * 4 do
          choice.continuation[#choice.continuation + 1] = 5 + i
          choice.row[#choice.row + 1] = choice.continuation[#choice.continuation - 1]
        end
      end
    end
    for _, share in ipairs { true, false } do
      model:reset_peak()
      local how = { device = device, batch_size = 3, share = share }
      assert(evaluate.loglikelihood({ model }, prepared, how))
      expect_met(forecast.of(model, passes.loglikelihood(prepared, how)), model, tostring(share))
    end
  end)

  it("is met by a synthetic shape", function()
    local device = support.device()
    local shape <const> = { hidden = 576, intermediate = 1536, layers = 3, heads = 9, kv_heads = 3,
      head_dim = 64, vocab = 5000, max_context = 2048, tied = false }
    for _, quant in ipairs { false, { double = true } } do
      local choose = quant and policy.make(quant) or nil
      local model <close> = assert(core.load_random(device, shape, "bfloat16", 1, choose))
      local outline <close> = assert(core.outline(device, shape, { dtype = "bfloat16" }, choose))
      local rows = {}
      for i = 1, 9 do rows[i] = { ids = support.ids(40 * i, 5000, i), item = i } end
      assert(evaluate.last_positions(model, model, rows, { batch_size = 4, each = function() end }))
      local list = passes.last_positions(rows, 4)
      -- both "models" are one: two batches of logits are there at once
      for _, pass in ipairs(list) do pass.outputs = 2 * pass.outputs end
      expect_met(forecast.of(outline, list), model, quant and "nf4" or "full")
    end
  end)
end)

describe("--dry-run", function()
  local folder

  setup(function()
    folder = os.tmpname()
    os.remove(folder)
    assert(lfs.mkdir(folder))
  end)
  teardown(function() os.execute(("rm -rf '%s'"):format(folder)) end)

  local function run(limit, ...)
    local words = { limit and ("ulimit -v %d &&"):format(limit) or "", "'" .. QLUA .. "'" }
    for _, word in ipairs { ... } do words[#words + 1] = "'" .. word .. "'" end
    local pipe = assert(io.popen(("bash -c %q 2>&1; echo \"code $?\""):format(table.concat(words, " "))))
    local out = pipe:read "a"
    pipe:close()
    return out, tonumber(out:match "code (%d+)%s*$")
  end

  it("is known to every example, which then writes nothing", function()
    for name in lfs.dir "examples" do
      if name:find "%.lua$" then
        local more = name == "perplexity.lua" and { "--text", "README.md" } or { "--limit", "9" }
        local out, code = run(nil, "examples/" .. name, "--dry-run", "--output_path", folder .. "/results",
          table.unpack(more))
        assert.equal(0, code, out)
        assert.truthy(out:find("needed    at most [%d.]+ MiB at once"), out)
        assert.truthy(out:find("full +4%.1 "), out)
        assert.is_nil(lfs.attributes(folder .. "/results"))
      end
    end
  end)

  --- A folder that holds an 8B model but for its numbers: a file of holes.
  local function hollow()
    local shape <const> = { hidden = 4096, intermediate = 14336, layers = 32, vocab = 128256 }
    local path = folder .. "/hollow"
    assert(lfs.mkdir(path))
    os.execute(("cp %s/tokenizer* '%s'"):format(DEMO, path))
    local at, header = 0, {}
    local function add(name, ...)
      local bytes = 2
      for _, n in ipairs { ... } do bytes = bytes * n end
      header[name] = { dtype = "BF16", shape = json.array { ... },
        data_offsets = json.array { at, at + bytes } }
      at = at + bytes
    end
    local h, f = shape.hidden, shape.intermediate
    add("model.embed_tokens.weight", shape.vocab, h)
    add("lm_head.weight", shape.vocab, h)
    add("model.norm.weight", h)
    for i = 0, shape.layers - 1 do
      local p = ("model.layers.%d."):format(i)
      add(p .. "input_layernorm.weight", h)
      add(p .. "post_attention_layernorm.weight", h)
      add(p .. "self_attn.q_proj.weight", h, h)
      add(p .. "self_attn.k_proj.weight", 1024, h)
      add(p .. "self_attn.v_proj.weight", 1024, h)
      add(p .. "self_attn.o_proj.weight", h, h)
      add(p .. "mlp.gate_proj.weight", f, h)
      add(p .. "mlp.up_proj.weight", f, h)
      add(p .. "mlp.down_proj.weight", h, f)
    end
    local text = json.encode(header)
    local file <close> = assert(io.open(path .. "/model.safetensors", "wb"))
    file:write(("<I8"):pack(#text), text)
    if not file:seek("set", 8 + #text + at - 1) or not file:write "\0" then return nil end
    local config <close> = assert(io.open(path .. "/config.json", "wb"))
    config:write(json.encode { architectures = json.array { "LlamaForCausalLM" }, model_type = "llama",
      hidden_size = h, intermediate_size = f, num_hidden_layers = 32, num_attention_heads = 32,
      num_key_value_heads = 8, vocab_size = shape.vocab, max_position_embeddings = 8192, rms_norm_eps = 1e-5,
      rope_theta = 500000.0, torch_dtype = "bfloat16", hidden_act = "silu", tie_word_embeddings = false })
    return path
  end

  it("reads no weights, and says when a model does not fit", function()
    if os.getenv "UBSAN_OPTIONS" then return pending "skipped: sanitizers reserve address space" end
    local path = hollow()
    if not path then return pending "skipped: no files of 16 GB here" end
    local begin = sys.time()
    -- 2 GB of addresses are less than the 15 GiB of weights
    local out, code = run(2000000, "examples/mmlu.lua", "--model", path, "--dry-run", "--threads", "1")
    assert.equal(1, code, out)
    assert.truthy(out:find("IT DOES NOT FIT", 1, true), out)
    -- 8,030,261,248 parameters in two bytes each, but the norms in four
    local bytes = 2 * 8030261248 + 2 * 65 * 4096
    assert.truthy(out:find(("\nfull +%.1f "):format(bytes / 0x1p20)), out)
    assert.is_true(sys.time() - begin < 20)
  end)
end)
