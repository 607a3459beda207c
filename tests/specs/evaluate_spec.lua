--- Two models on the same questions: who goes first, and what happens when a prompt cannot be made.

local evaluate = require "qlua.evaluate"
local experiment = require "qlua.experiment"
local qlua = require "qlua"
local support = require "tests.specs.support"

local function tiny()
  return assert(qlua.load_synthetic("tiny", { device = support.device() }))
end

describe("evaluate", function()
  it("lets the models take turns in going first", function()
    local model <close> = tiny()
    local first = {}
    local function named(name)
      return { forward = function(_, ...)
        first[#first + 1] = name
        return model:forward(...)
      end }
    end
    local rows, seen = {}, {}
    for i = 1, 5 do rows[i] = { ids = { i, i + 1 }, item = i } end
    assert(evaluate.last_positions(named "a", named "b", rows, { batch_size = 2,
      each = function(reference, test, item)
        seen[item] = true
        assert.equal(reference:argmax(), test:argmax())
      end }))
    assert.equal("abbaab", table.concat(first))
    assert.equal(5, #seen)
  end)

  it("never falls back to the plain prompt when the template fails", function()
    local template = { encode = function() return nil, "the template cannot be rendered" end }
    local task = { messages = function() return {} end, prompt = function() return "plain" end }
    local model <close> = tiny()
    local ok, why = pcall(evaluate.generate, { model }, { { item = {}, index = 1 } }, { tokenizer = {},
      task = task, device = support.device(), batch_size = 1, template = template, generation = {} })
    assert.is_false(ok)
    assert.truthy(tostring(why):find("cannot be rendered", 1, true), tostring(why))
  end)

  it("has no accuracy where nothing was scored", function()
    local a = evaluate.accuracy { results = {} }
    assert.equal(0, a.n)
    assert.is_nil(a.accuracy)
  end)
end)

describe("a run", function()
  local opts <const> = { model = support.MODELS .. "llama3_bf16", quantized = support.MODELS .. "nf4_f16",
    dtype = "auto", seed = 1 }

  it("says what the quantized matrices decode to", function()
    local run <close> = experiment.open("x.lua", opts, { tokenizer = false })
    assert.truthy(run:header():find("decoded to float16,", 1, true), run:header())
    assert.truthy(run:header():find("full      bfloat16", 1, true))
  end)

  it("has the context that both models can take", function()
    local run <close> = experiment.open("x.lua", opts, { tokenizer = false })
    assert.equal(math.min(run.full:info().max_context, run.test:info().max_context), run.context)
  end)

  it("hashes the checkpoint once", function()
    local run <close> = experiment.open("x.lua", opts, { tokenizer = false, twin = false })
    local hash = run:facts().model_sha256
    assert.equal(64, #hash)
    local _ <close> = run.full
    run.full = { info = function() return {} end, close = function() end } -- has no hash
    assert.equal(hash, run:facts().model_sha256)
  end)
end)
