#!/usr/bin/env qlua
--- Which parts of a model may be quantized?
---
--- First each layer (or kind of matrix) alone in 4 bits, ranked by how far it moves the answers (KL
--- divergence from the full model), as sensitivity.lua has it. Then layers are quantized one after the other,
--- the harmless ones first: how much memory buys how much drift.

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local results = require "qlua.results"
local variants = require "qlua.variants"

local opts = cli.parse {
  name = "mixed_precision.lua",
  summary = "Which layers or kinds of matrices may be quantized: a policy swept from Lua.",
  options = experiment.options {
    { "tasks", default = { experiment.bundled_task } }, { "limit", default = 100 }, "batch_size",
    { "by", default = "layer", choices = { "layer", "kind" }, help = "what is quantized together" },
  },
}
local run <close> = experiment.open("mixed_precision.lua", opts, { twin = false })

local measured = variants.alone(run, opts.by)

local steps, chosen = { { label = "full" } }, {}
for i, row in ipairs(measured) do
  chosen[row.group] = true
  local now = {}
  for group in pairs(chosen) do now[group] = true end
  steps[i + 1] = { label = "+ " .. row.group, spec = variants.only(run, opts.by, now) }
end
local cumulative = run.stopped and {} or variants.run(run, steps)
table.move(cumulative, 1, #cumulative, #measured + 1, measured)
results.variants(run, measured,
  ("Above: one %s in %s at a time, least harm first. Below: added up in that order."):format(
  opts.by, opts.quant))
run:finish()
