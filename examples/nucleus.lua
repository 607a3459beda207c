#!/usr/bin/env qlua
--- Do a model and its quantized twin draw from the same candidates?
---
--- Sampling takes the next token from the nucleus: the smallest set of the most likely tokens whose mass
--- reaches top_p at a temperature. For every top_p and temperature: how much the nuclei of both models
--- overlap, how many tokens they hold, what each weighs in the other model's distribution, and how often the
--- full model's own first choice is not among the twin's candidates. Both models see each question once. The
--- control is the full model against itself in another batch size: what is noise.

local cli = require "qlua.cli"
local core = require "qlua.core"
local evaluate = require "qlua.evaluate"
local experiment = require "qlua.experiment"
local json = require "qlua.json"
local passes = require "qlua.passes"
local results = require "qlua.results"

local opts = cli.parse {
  name = "nucleus.lua",
  summary = "How the candidate sets of a model and its quantized twin differ, by top-p and temperature.",
  options = experiment.options {
    { "tasks", default = { experiment.bundled_task } }, "limit", "batch_size",
    { "top_p", kind = "numbers", default = { 0.5, 0.8, 0.9, 0.95, 0.99 }, above = 0, max = 1,
      help = "masses of the nucleus" },
    { "temperature", kind = "numbers", default = { 0.1, 0.7, 1.0 }, above = 0, max = 100,
      help = "temperatures of the sampling" },
    { "position", default = "question", choices = { "question", "answer" },
      help = "after the bare question, or where MMLU's prompt wants the letter" },
  },
}
local run <close> = experiment.open("nucleus.lua", opts)

local rows, too_long = run:question_rows(opts.position)
if run:foresee(passes.last_positions(rows, opts.batch_size)) then run:foretell() end

--- Every nucleus of one position as numbers: overlap, both sizes, both masses, 1 where the first choice of
--- the first model is in the second's nucleus; temperature by temperature.
local function nuclei(reference, test)
  local list = json.array()
  for t, by_top_p in ipairs(core.metrics.nuclei(reference, test, opts.top_p, opts.temperature)[1]) do
    for p, pair in ipairs(by_top_p) do
      list[(t - 1) * #opts.top_p + p] = json.array { pair.overlap, pair.sizes[1], pair.sizes[2],
        pair.masses[1], pair.masses[2], pair.has_top and 1 or 0 }
    end
  end
  return list
end

local function measure(reference, test, item, again)
  return { index = item.index, question = item.question, pair = nuclei(reference, test),
    control = nuclei(reference, again) }
end

local found = {}
local values = run:must(evaluate.last_positions(run.full, run.test, rows, { batch_size = opts.batch_size,
  control = true, each = measure,
  map = run:mapper("nucleus " .. run.items.subject, {}, found) }))

results.nucleus(run, {
  task = ("%s, after the %s"):format(run.items.subject, opts.position),
  questions = #run.items, too_long = too_long, values = values, set = found.set,
  top_p = opts.top_p, temperature = opts.temperature,
})
run:finish()
