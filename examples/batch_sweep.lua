#!/usr/bin/env qlua
--- What do latency and memory of one forward pass look like over batch sizes?
---
--- One seeded plan of batches of bare questions, the same rows for both models, in alternating order (A B, B
--- A, ...), each model's memory in an account of its own. A batch that does not fit is shown as OOM and the
--- sweep goes on.

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local llama_bench = require "qlua.llama_bench"
local results = require "qlua.results"
local sweep = require "qlua.sweep"

local opts = cli.parse {
  name = "batch_sweep.lua",
  summary = "Latency and memory of one forward pass over batch sizes, for a model and its quantized twin.",
  options = experiment.options {
    { "tasks", default = { experiment.bundled_task } }, "limit",
    { "batch_sizes", kind = "integers", default = { 1, 2, 4, 8, 16, 32 }, min = 1, max = 4096,
      help = "rows of one forward pass" },
    { "runs", kind = "integer", default = 20, min = 1, help = "timed passes of each batch size and model" },
    { "warmup", kind = "integer", default = 2, min = 1, help = "passes before them that do not count" },
    { "max_length", kind = "integer", default = 512, min = 1,
      help = "questions with more tokens are left out" },
    { "logits", default = "all", choices = { "all", "last" }, help = "positions whose logits are computed" },
    { "output_format", choices = llama_bench.formats, help = "files as llama-bench prints its results" },
  },
}
local run <close> = experiment.open("batch_sweep.lua", opts)

local rows, too_long = run:question_rows("question", opts.max_length)
local points = sweep.run(run, rows, { sizes = opts.batch_sizes, runs = opts.runs, warmup = opts.warmup,
  logits = opts.logits, seed = opts.seed })
results.sweep(run, points, { questions = #run.items, too_long = too_long })
run:finish()
