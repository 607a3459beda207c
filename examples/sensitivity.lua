#!/usr/bin/env qlua
--- Which parts of a model does quantization hurt, and what does sparing them cost?
---
--- One layer at a time (or one kind of matrix, or one matrix) goes to 4 bits while the rest stays as it is:
--- how far that moves the answers (KL divergence from the full model, at MMLU's letter), how many bytes it
--- saves, and the divergence that each saved MiB costs. The most harmful stands first: what to spare in
--- mixed precision. The last line has all of them quantized.

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local results = require "qlua.results"
local variants = require "qlua.variants"

local opts = cli.parse {
  name = "sensitivity.lua",
  summary = "Which layers, kinds of matrices or single matrices quantization hurts most.",
  options = experiment.options {
    { "tasks", default = { experiment.bundled_task } }, { "limit", default = 100 }, "batch_size",
    { "by", default = "layer", choices = { "layer", "kind", "matrix" }, help = "what is quantized together" },
  },
}
local run <close> = experiment.open("sensitivity.lua", opts, { twin = false })

local measured = variants.alone(run, opts.by)
local all = run.stopped and {} or variants.run(run, { { label = "all of them", spec = run:scheme() } })
results.sensitivity(run, measured, all[1])
run:finish()
