#!/usr/bin/env qlua
--- How far do a model and its quantized twin agree on the next token?
---
--- Every question goes through both models as it stands (with BOS, without choices or chat template). From
--- the logits after its last token: Jaccard of the sets of the k most likely tokens, top-1 agreement, KL
--- divergence and nucleus overlap. The control column is the full model against itself in another batch
--- size: what is noise.

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local metrics = require "qlua.metrics"
local results = require "qlua.results"

local opts = cli.parse {
  name = "jaccard.lua",
  summary = "How far the most likely next tokens of a model and its quantized twin agree.",
  options = experiment.options {
    { "tasks", default = { experiment.bundled_task } }, "limit", "batch_size",
    { "k", kind = "integers", default = { 1, 3, 5, 10, 20 }, min = 1, help = "sizes of the token sets" },
    { "position", default = "question", choices = { "question", "answer" },
      help = "after the bare question, or where MMLU's prompt wants the letter" },
    { "top_p", kind = "number", default = 0.9, above = 0, max = 1, help = "mass of the nucleus" },
    "metric", "log_samples",
  },
}
local run <close> = experiment.open("jaccard.lua", opts)
local vocab = run.full:info().vocab
for _, k in ipairs(opts.k) do
  if k > vocab then run:must(nil, ("--k %d is larger than the vocabulary of %d"):format(k, vocab)) end
end

local rows, too_long = run:question_rows(opts.position)

local function measures(user)
  local list = {}
  for _, k in ipairs(opts.k) do list[#list + 1] = metrics.jaccard(k) end
  table.move({ metrics.agreement(), metrics.kl(), metrics.nucleus(opts.top_p) }, 1, 3, #list + 1, list)
  return table.move(user, 1, #user, #list + 1, list)
end

local pair, control = measures(run.metrics), measures(run:must(metrics.load_all(opts.metric)))
local set = run:last_positions(rows, pair, control)

results.metrics(run, {
  task = ("%s, after the %s"):format(run.items.subject, opts.position),
  questions = #run.items, too_long = too_long, rows = rows, set = set,
  pair = metrics.summary(pair, opts.seed), control = metrics.summary(control, opts.seed),
})
run:finish()
