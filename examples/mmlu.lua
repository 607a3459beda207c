#!/usr/bin/env qlua
--- Does the quantized model still answer as many questions, and how fast does it write?
---
--- MMLU's four-choice questions two ways: by log-likelihood of " A".." D" (task mmlu_<subject>, the same
--- prompt and scores as EleutherAI's harness), and by generation with the letter in double brackets
--- (mmlu_<subject>_boxed), which also gives words per minute. --protocol post repeats the blog post of 2024,
--- faults and all (mmlu_<subject>_post).

local cli = require "qlua.cli"
local data = require "qlua.data"
local evaluate = require "qlua.evaluate"
local experiment = require "qlua.experiment"
local metrics = require "qlua.metrics"
local results = require "qlua.results"
local tasks = require "qlua.tasks"

local opts = cli.parse {
  name = "mmlu.lua",
  summary = "Accuracy and words per minute of a model and its quantized twin on four-choice questions.",
  options = experiment.options {
    { "tasks", default = { experiment.bundled_task } }, "limit", "num_fewshot", "batch_size",
    { "mode", default = "both", choices = { "both", "loglikelihood", "boxed" },
      help = "how questions are asked" },
    { "protocol", default = "sound", choices = { "sound", "post" },
      help = "ours, or that of the post of 2024" },
    { "max_gen_toks", kind = "integer", default = 256, min = 1, help = "longest written answer in tokens" },
    { "temperature", kind = "number", min = 0, help = "of written answers (default: 0, greedy; post: 0.1)" },
    "apply_chat_template", "metric", { "output_path", default = "results" }, "log_samples",
  },
}
local post = opts.protocol == "post"
if post and opts.dtype == "auto" then opts.dtype = "float32" end
if post then opts.batch_size = 1 end
local run <close> = experiment.open("mmlu.lua", opts, { several = true })
local models = { run.full, run.test }

--- One task: tokenize, run both models, gather.
local function outcome(o, evaluator)
  o.prepared = evaluate.prepare(run.tokenizer, o.task, o.items, { max_context = run.context,
    template = o.template })
  if o.task.kind == "loglikelihood" then
    run:foresee(evaluate.loglikelihood_passes(o.prepared, opts))
  else
    run:foresee(evaluate.generation_passes(o.prepared, { batch_size = opts.batch_size,
      max_new_tokens = opts.max_gen_toks, max_context = run.context }))
  end
  if opts.dry_run then return o end
  o.evaluations = evaluate.evaluations(#models)
  local bar <close> = run:progress(#o.items, o.task.name)
  run:keeping(function()
    run:must(evaluator(o.prepared, { device = run.device, batch_size = opts.batch_size, progress = bar,
      evaluations = o.evaluations }))
  end)
  evaluate.trim(o.evaluations)
  return o
end

local function by_loglikelihood(items)
  local fewshot = opts.num_fewshot > 0 and run:fewshot(items) or nil
  local task = tasks.mmlu { subject = items.subject, fewshot = fewshot, num_fewshot = opts.num_fewshot }
  local template = opts.apply_chat_template and run:template(opts.apply_chat_template) or nil
  local list = { metrics.kl(), metrics.delta_p() }
  table.move(run.metrics, 1, #run.metrics, #list + 1, list)
  local o = outcome({ task = task, items = items, template = template }, function(prepared, how)
    how.each = function(reference, test, p)
      metrics.add(list, reference, test, setmetatable({ target = p.target, index = p.index },
        { __index = p.item }))
    end
    return evaluate.loglikelihood(models, prepared, how)
  end)
  o.metrics = not opts.dry_run and metrics.summary(list, opts.seed) or nil
  return o
end

local function by_generation(items)
  local task = post and tasks.post { subject = items.subject } or tasks.boxed { subject = items.subject }
  if task.keep then items = data.filter(items, task.keep) end
  local template = run:template(opts.apply_chat_template, "optional")
  local generation = { max_new_tokens = opts.max_gen_toks, seed = opts.seed,
    temperature = opts.temperature or task.generation.temperature }
  return outcome({ task = task, items = items, template = template, generation = generation },
    function(prepared, how)
      how.template, how.generation = template, generation
      return evaluate.generation(models, run.tokenizer, task, prepared, how)
    end)
end

local outcomes = {}
for _, items in ipairs(run.tasks) do
  if not post and opts.mode ~= "boxed" then outcomes[#outcomes + 1] = by_loglikelihood(items) end
  if run.stopped then break end
  if post or opts.mode ~= "loglikelihood" then outcomes[#outcomes + 1] = by_generation(items) end
  if run.stopped then break end
end
if not opts.dry_run then results.mmlu(run, outcomes) end
run:finish()
