#!/usr/bin/env qlua
--- A metric of your own in a few lines: no compiler, and it stands in the table and in the files like the
--- built-in ones.
---
--- Here: how much probability the quantized model gives to the token that the full model likes best, as a
--- ratio. The same works from a file with --metric (examples/metrics/rank.lua is one).

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local metrics = require "qlua.metrics"
local results = require "qlua.results"

local opts = cli.parse {
  name = "custom_metric.lua",
  summary = "A metric written in Lua, beside the built-in ones.",
  options = experiment.options {
    { "tasks", default = { experiment.bundled_task } }, "limit", "batch_size", "metric",
  },
}
local run <close> = experiment.open("custom_metric.lua", opts)

--- reference and test are the logits [vocab] of the full and the quantized model at one position.
local kept = metrics.per_item("kept_confidence", true, function(reference, test)
  local best = reference:argmax()
  local p <close> = reference:softmax()
  local q <close> = test:softmax()
  return q:gather(best) / p:gather(best)
end)

local list = table.move(run.metrics, 1, #run.metrics, 3, { kept, metrics.kl() })
local rows, too_long = run:question_rows "question"
local set = run:last_positions(rows, list)
results.metrics(run, { task = run.items.subject .. ", after the question", questions = #run.items,
  too_long = too_long, rows = rows, set = set, pair = metrics.summary(list, opts.seed), control = {} })
run:finish()
