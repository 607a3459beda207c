#!/usr/bin/env qlua
--- Should I quantize this model? The whole study, and one page with the answer.
---
--- Every part is an example beside this file, and runs here as it would by itself: latency and memory by
--- batch size, next tokens, candidates of sampling, four-choice questions asked in two ways; with --text
--- perplexity, and where --parts names it the sensitivity of each layer. Both models are loaded once. A part
--- that fails is reported and the rest goes on; what was interrupted goes on when this is run again.

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local study = require "qlua.study"

local NAME <const> = "report_all.lua"
--- Which options each part takes beside those of the models, and what --quick makes of it.
local PARTS <const> = {
  { "batch_sweep", takes = { "tasks", "limit" },
    quick = { "--limit=20", "--batch_sizes=1,2,4", "--runs=6" } },
  { "jaccard", takes = { "tasks", "limit", "batch_size" }, quick = { "--limit=20" } },
  { "nucleus", takes = { "tasks", "limit", "batch_size" }, quick = { "--limit=20" } },
  { "mmlu", takes = { "tasks", "limit", "batch_size", "num_fewshot", "apply_chat_template", "log_samples" },
    quick = { "--limit=20", "--max_gen_toks=32" } },
  { "perplexity", takes = { "text" }, quick = { "--limit=4" } },
  { "sensitivity", takes = { "tasks", "limit", "batch_size" }, quick = { "--limit=20" } },
}
local names = {}
for i, part in ipairs(PARTS) do names[i] = part[1] end

local spec = {
  name = NAME, summary = "The whole study of a model and its quantized twin, and one report of it.",
  options = experiment.options {
    { "parts", kind = "strings", metavar = "PART,...", choices = names,
      help = "default: all but sensitivity, and perplexity only with --text" },
    { "tasks", default = { experiment.bundled_task } }, "limit", "batch_size", "num_fewshot",
    "apply_chat_template", "log_samples",
    { "text", metavar = "FILE", help = "the text of perplexity, UTF-8" },
    { "quick", kind = "flag", help = "20 questions, few passes, short answers: to see whether all works" },
  },
}
local opts, defaults = cli.parse(spec), assert(cli.try(spec, {}))

local chosen = {}
for _, name in ipairs(opts.parts or { "batch_sweep", "jaccard", "nucleus", "mmlu", opts.text
  and "perplexity" or nil }) do
  chosen[name] = true
end
if chosen.perplexity and not opts.text then cli.fail(NAME, "--parts perplexity needs --text FILE") end
if opts.text then
  if not chosen.perplexity then cli.fail(NAME, "--text is for perplexity, which --parts leaves out") end
  local file <close>, why = io.open(opts.text, "rb")
  if not file then cli.fail(NAME, "cannot read the text " .. why) end
end

local shared = {}
for i, option in ipairs(experiment.model_options) do shared[i] = type(option) == "string" and option
  or option[1] end

local function words_of(part)
  local words = opts.quick and table.move(part.quick, 1, #part.quick, 1, {}) or {}
  local given = setmetatable({ tasks = part[1] ~= "mmlu" and { opts.tasks[1] } or nil }, { __index = opts })
  for _, list in ipairs { part.takes, shared } do
    local more = study.arguments(given, defaults, list)
    table.move(more, 1, #more, #words + 1, words)
  end
  return words
end

local all <close> = study.begin()
experiment.open(NAME, opts, { several = true }):close() -- what no part could run with ends the study here
for _, part in ipairs(PARTS) do
  if chosen[part[1]] then
    all:run(part[1], ("%s/%s.lua"):format(arg[0]:match "^(.*)/" or ".", part[1]), words_of(part))
  end
end
io.stdout:write("\n", all:outcomes())
local answer = opts.output_path and study.verdict(opts.output_path)
if answer then io.stdout:write("\n", answer, "\nwrote ", opts.output_path, "/report.html\n") end
os.exit(all:code(), true)
