#!/usr/bin/env qlua
--- How well do a model and its quantized twin predict a text, and how far are their predictions apart?
---
---   build/qlua examples/perplexity.lua --model FOLDER --text wiki.test.raw
---
--- Perplexity of both with standard errors, the logarithm of their ratio with the error that pairing leaves,
--- KL divergence, change of the probability of the true next token, top-1 agreement. Cut and scored as
--- llama.cpp's tool does it (see qlua.perplexity): a window at a time, both models in alternating order.

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local failure = require "qlua.failure"
local perplexity = require "qlua.perplexity"
local results = require "qlua.results"
local sys = require "qlua.sys"

local opts = cli.parse {
  name = "perplexity.lua",
  summary = "Perplexity of a text under a model and its quantized twin, and how far the two lie apart.",
  options = experiment.options {
    { "text", required = true, metavar = "FILE", help = "the text, UTF-8" },
    { "context", kind = "integer", min = 4, metavar = "N",
      help = "tokens of a window; default is 512, or the model's context where that is less" },
    { "limit", kind = "integer", min = 1, metavar = "N", help = "only the first N windows" },
  },
}

local function read(path)
  local file <close>, why = io.open(path, "rb")
  if not file then return nil, failure("not_found", ("cannot read the text %s"):format(why)) end
  local text
  text, why = file:read "a"
  if not text then return nil, failure("io", ("cannot read the text %s (%s)"):format(path, why)) end
  return text
end

local text, unreadable = read(opts.text)
if not text then cli.fail("perplexity.lua", unreadable) end
local run <close> = experiment.open("perplexity.lua", opts)
local context = opts.context or math.min(512, run.context)
if context > run.context then
  run:must(nil, ("--context %d is longer than the model's context of %d"):format(context, run.context))
end

local ids = run:must(run.tokenizer:encode(text, { bos = false }))
local with_bos = run:must(run.tokenizer:encode("a", { bos = true }))
local bos = with_bos[1] ~= run:must(run.tokenizer:encode("a", { bos = false }))[1] and with_bos[1] or nil
local windows = run:must(perplexity.windows(ids, { context = context, bos = bos, limit = opts.limit }))

local predictions = #windows * #windows[1].targets
if predictions < 2 then
  run:must(nil, ("%d prediction is too few for standard errors: raise --context (%d) or --limit (%d)"):format(
    predictions, context, #windows))
end

local fed = #windows[1].ids
if run:foresee { { tokens = fed, longest = fed, outputs = #windows[1].targets, slots = fed } } then
  run:finish()
end

local found = {}
local values = run:must(perplexity.run(run.full, run.test, windows, run:mapper("windows",
  { inputs = { context = context } }, found)))
if #values.reference < 2 then run:finish() end

results.perplexity(run, windows, perplexity.summary(values), { sha256 = sys.sha256(text), set = found.set })
run:finish()
