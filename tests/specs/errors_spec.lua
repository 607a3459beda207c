--- Bad input and misuse: each gives one clear message that names what is wrong and what to do.

local core = require "qlua.core"
local qlua = require "qlua"
local support = require "tests.specs.support"

local failed, raises = support.failed, support.raises
local MODEL <const> = support.MODELS .. "llama3_bf16"

local function load(folder, options)
  return support.device():load(folder, options)
end

--- A spoiled copy of a golden model: `spoil(text)` gives the new text of `file`.
local function spoiled(file, spoil, name)
  local folder = support.copy(name or "llama3_bf16")
  local path = folder .. "/" .. file
  support.write(path, spoil(support.read(path)))
  return folder
end

teardown(support.cleanup)

describe("a device that is not there", function()
  it("is named, with what can be had instead", function()
    for _, name in ipairs { "cuda", "cuda:9" } do
      local device, err = qlua.device(name)
      if device then
        device:close()
      else
        failed(device, err, ("device '%s'"):format(name), #qlua.devices() > 1 and "cuda:0" or "--device cpu")
      end
    end
    local device, err = qlua.device "gpu"
    failed(device, err, "'gpu'", "auto, cpu, cuda")
    device, err = qlua.device "cpu:1"
    failed(device, err, "'cpu:1'")
    raises(function() qlua.device("cpu", { threads = -1 }) end, "'threads'", "-1")
    raises(function() qlua.device("cpu", { thread = 1 }) end, "'thread'", "threads")
  end)
end)

describe("a model folder that is none", function()
  it("missing, by path and by hub id", function()
    local model, err = load "/no/such/folder"
    assert.equal("not_found", failed(model, err, "/no/such/folder", "hub id").code)
    model, err = load "nobody/no-such-model"
    failed(model, err, "nobody/no-such-model", "huggingface-cli download")
  end)

  it("without config.json, or a file", function()
    local model, err = load "tests/golden/tokenizers/llama3_like"
    failed(model, err, "llama3_like/config.json", "model.safetensors")
    model, err = load(MODEL .. "/model.safetensors")
    failed(model, err, "is a file")
  end)

  it("without a tokenizer it loads; text is refused", function()
    local model <close> = assert(load(MODEL))
    local ids, err = model:encode "x"
    failed(ids, err, "tokenizer.json", MODEL)
    local text
    text, err = model:decode { 1 }
    failed(text, err, "tokenizer.json")
    local new
    new, err = model:generate({ 1 }, { stop = { "\n" } })
    failed(new, err, "tokenizer.json")
  end)

  --- A copy whose tensor `from` is called `to` in the header.
  local function renamed(from, to)
    return spoiled("model.safetensors", function(text)
      local size = string.unpack("<I8", text)
      local header = text:sub(9, 8 + size)
      local first, last = header:find('"' .. from .. '"', 1, true)
      header = header:sub(1, first) .. to .. header:sub(last)
      header = header .. (" "):rep(-#header % 8)
      return string.pack("<I8", #header) .. header .. text:sub(9 + size)
    end)
  end

  it("with a layer's number in another spelling", function()
    local norm <const> = "model.layers.%s.input_layernorm.weight"
    for _, number in ipairs { "01", "+1", " 1", "1 ", "-1", "99" } do
      local model, err = load(renamed(norm:format "1", norm:format(number)))
      failed(model, err, norm:format(number), "has no place")
    end
  end)

  it("with a name that a terminal would obey", function()
    local model, err = load(renamed("model.norm.weight", [[\u001b[31mred\u009b0m\u007f]]))
    failed(model, err, "'?[31mred??0m?'", "has no place")
  end)

  it("without weights, or with a shard missing", function()
    local folder = support.copy "llama3_bf16"
    os.remove(folder .. "/model.safetensors")
    local model, err = load(folder)
    failed(model, err, folder, "safetensors")
    folder = support.copy "sharded_f32"
    os.remove(folder .. "/model-00003-of-00004.safetensors")
    model, err = load(folder)
    failed(model, err, "model-00003-of-00004.safetensors")
  end)
end)

describe("weights that are spoiled", function()
  it("cut short at many places", function()
    local size = #support.read(MODEL .. "/model.safetensors")
    for _, keep in ipairs { 0, 1, 7, 8, 9, 100, size // 2, size - 1 } do
      local folder = spoiled("model.safetensors", function(text) return text:sub(1, keep) end)
      local model, err = load(folder)
      assert.equal("format", failed(model, err, "model.safetensors").code)
      support.cleanup()
    end
  end)

  it("longer than declared", function()
    local folder = spoiled("model.safetensors", function(text) return text .. "x" end)
    local model, err = load(folder)
    failed(model, err, "model.safetensors")
  end)

  it("a Git LFS pointer says so, and how to fix it", function()
    local folder = spoiled("model.safetensors", function()
      return "version https://git-lfs.github.com/spec/v1\noid sha256:" .. ("0"):rep(64) .. "\nsize 123456\n"
    end)
    local model, err = load(folder)
    failed(model, err, "model.safetensors", "LFS", "git lfs pull")
  end)

  it("of another shape than config.json's", function()
    local folder = spoiled("config.json", function(text)
      return (text:gsub('"intermediate_size": %d+', '"intermediate_size": 48'))
    end)
    local model, err = load(folder)
    failed(model, err, "_proj.weight", "[48, ", "config.json")
    folder = spoiled("config.json", function(text)
      return (text:gsub('"vocab_size": %d+', '"vocab_size": 95'))
    end)
    model, err = load(folder)
    failed(model, err, "embed_tokens.weight", "[95, ")
    folder = spoiled("config.json", function(text)
      return (text:gsub('"intermediate_size": %d+', '"intermediate_size": 32'))
    end, "nf4")
    model, err = load(folder)
    failed(model, err, "_proj.weight", "32")
  end)

  it("more or fewer layers than config.json's", function()
    local folder = spoiled("config.json", function(text)
      return (text:gsub('"num_hidden_layers": %d+', '"num_hidden_layers": 3'))
    end)
    local model, err = load(folder)
    failed(model, err, "model.layers.2.")
    folder = spoiled("config.json", function(text)
      return (text:gsub('"num_hidden_layers": %d+', '"num_hidden_layers": 1'))
    end)
    model, err = load(folder)
    failed(model, err, "model.layers.1.", "num_hidden_layers")
  end)
end)

describe("config.json", function()
  local function config(from, to)
    local folder = spoiled("config.json", function(text)
      local changed, n = text:gsub(from, to)
      assert(n > 0, "nothing changed")
      return changed
    end)
    return load(folder)
  end

  it("names the architecture or the field it cannot take", function()
    local cases <const> = {
      { '"LlamaForCausalLM"', '"GPT2LMHeadModel"', "GPT2LMHeadModel" },
      { '"num_attention_heads": %d+', '"num_attention_heads": 0', "num_attention_heads" },
      { '"num_key_value_heads": %d+', '"num_key_value_heads": 3', "num_key_value_heads" },
      { '"hidden_size": %d+', '"hidden_size": 65', "hidden_size" },
      { '"hidden_size": %d+', '"hidden_size": 9007199254740993', "hidden_size" },
      { '"rms_norm_eps": [%d.e-]+', '"rms_norm_eps": "small"', "rms_norm_eps" },
      { '"vocab_size": %d+', '"vocab_size": -5', "vocab_size" },
      { "^%s*{", "[", "config.json" },
    }
    for _, case in ipairs(cases) do
      local model, err = config(case[1], case[2])
      failed(model, err, "config.json", case[3])
    end
  end)
end)

describe("options", function()
  it("unknown keys are refused by name, with the known ones", function()
    local model <close> = assert(load(MODEL))
    raises(function() load(MODEL, { max_contex = 1 }) end, "'max_contex'", "max_context")
    raises(function() load(MODEL, { dtype = "int8" }) end, "'dtype'", "bfloat16")
    raises(function() load(MODEL, { max_context = 0 }) end, "'max_context'")
    raises(function() load(MODEL, { max_context = 1 << 30 }) end, "max_context", "256")
    raises(function() model:forward({ 1 }, { row = "last" }) end, "'row'", "rows")
    raises(function() model:generate({ 1 }, { tempeature = 1 }) end, "'tempeature'", "temperature")
    raises(function() model:save("x", { forced = true }) end, "'forced'", "force")
    raises(function() qlua.load_synthetic("tiny", { layer = 1 }) end, "'layer'", "layers")
    raises(function() support.device():time(print, { run = 1 }) end, "'run'", "runs")
    raises(function() qlua.load_synthetic "tine" end, "'tine'", "tiny")
    local function random(fields)
      local shape = { hidden = 64, intermediate = 64, layers = 1, heads = 2, kv_heads = 1, head_dim = 32,
        vocab = 64 }
      for key, value in pairs(fields) do shape[key] = value end
      return function() core.load_random(support.device(), shape, "float32") end
    end
    raises(random { hidden = 0 }, "hidden_size = 0")
    raises(random { vocab = 0x7fffffff }, "vocab_size = 2147483647", "1..")
    raises(random { heads = 3, kv_heads = 2 }, "not a multiple")
    raises(random { head_dim = 33 }, "head_dim 33 is odd")
    raises(random { head_dim = 8192 }, "head_dim 8192 is above")
  end)

  it("values of a wrong kind are refused by option", function()
    local model <close> = assert(load(MODEL))
    local function forward(options) return function() model:forward({ 1, 2 }, options) end end
    raises(forward { rows = "first" }, "'rows'", "first", "last")
    raises(forward { rows = { 1, 1 } }, "'rows'")
    raises(forward { rows = { 3 } }, "'rows'", "3", "2 tokens")
    raises(forward { rows = { -1 } }, "'rows'", "-1")
    raises(forward { rows = { (1 << 32) + 1 } }, "'rows'")
    raises(forward { rows = { "a" } }, "'rows'", "a")
    raises(forward { trace = 1 }, "'trace'")
    local function generate(options) return function() model:generate({ 1, 2 }, options) end end
    raises(generate { temperature = -1 }, "temperature")
    raises(generate { temperature = 0 / 0 }, "'temperature'")
    raises(generate { temperature = 1 / 0 }, "'temperature'")
    raises(generate { top_p = 0 }, "top_p")
    raises(generate { top_p = 1.5 }, "top_p")
    raises(generate { top_k = -1 }, "'top_k'")
    raises(generate { max_new_tokens = 0 }, "'max_new_tokens'")
    raises(generate { max_new_tokens = 2.5 }, "'max_new_tokens'")
    raises(generate { seed = "x" }, "'seed'")
    raises(generate { stop = { 1.5 } }, "'stop'")
    raises(generate { stop = { "" } }, "'stop'")
    raises(generate { stop = { 2, -1 } }, "'stop'", "-1")
    raises(generate { streams = { 1, 2 } }, "'streams'")
    raises(generate { streams = { "a" } }, "'streams'")
    raises(generate { on_token = 3 }, "'on_token'")
  end)
end)

describe("token ids", function()
  it("outside the vocabulary, not ids, no tokens, too many", function()
    local model <close> = assert(load(MODEL))
    local function forward(ids) return function() model:forward(ids) end end
    raises(forward { 1, 96 }, "token id 96", "vocabulary of 96")
    raises(forward { { 1 }, { 1, 2000000000 } }, "token id 2000000000")
    raises(forward { 1, -1 }, "token id 2 is -1")
    raises(forward { 1, 1.5 }, "token id 2 is 1.5")
    raises(forward { 1, "x" }, "token id 2 is x")
    raises(forward { 1, {} }, "token id 2")
    raises(forward {}, "row 1 has no tokens")
    raises(forward { { 1 }, {} }, "row 2 has no tokens")
    raises(forward { { 1 }, 2 }, "row 2 is a number")
    raises(forward(nil), "table expected")
    local long = {}
    for i = 1, 257 do long[i] = 1 end
    raises(forward(long), "row 1 has 257 tokens", "256", "max_context")
    raises(forward { { 1 }, long }, "row 2 has 257 tokens")
    raises(function() model:generate(long) end, "257 tokens", "256")
    raises(function() model:generate {} end, "row 1 has no tokens")
    raises(function() model:generate { { 1 }, {} } end, "row 2 has no tokens")
    raises(function() model:generate(5) end, "a number")
    raises(function() model:generate { 1, 96 } end, "token id 96")
    -- nothing is left behind: the model still works
    local logits <close> = assert(model:forward { 1 })
    assert.same({ 1, 96 }, logits:shape())
  end)
end)

describe("an open_checkpoint", function()
  it("names the file or the tensor", function()
    local ck, err = qlua.open_checkpoint "/no/such/folder"
    failed(ck, err, "/no/such/folder")
    ck, err = qlua.open_checkpoint(MODEL .. "/config.json")
    failed(ck, err, "config.json")
    local good <close> = assert(qlua.open_checkpoint(MODEL))
    local value
    value, err = good:tensor "model.nothing"
    failed(value, err, "model.nothing")
    value, err = good:info "model.nothing"
    failed(value, err, "model.nothing")
    raises(function() good:tensor() end, "string expected")
  end)
end)
