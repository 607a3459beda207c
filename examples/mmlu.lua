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
local passes = require "qlua.passes"
local questions = require "qlua.questions"
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
    { "control", default = "true", choices = { "true", "false" },
      help = "by log-likelihood the full model twice, in batches of two sizes: what is noise" },
    "apply_chat_template", "metric", "log_samples",
  },
}
local post = opts.protocol == "post"
if post and opts.dtype == "auto" then opts.dtype = "float32" end
if post then opts.batch_size = 1 end
local run <close> = experiment.open("mmlu.lua", opts, { several = true })

--- Asks both models the questions of one task.
local function ask(o)
  o.prepared = questions.prepare(run.tokenizer, o.task, o.items, { max_context = run.context,
    template = o.template })
  local how = { device = run.device, tokenizer = run.tokenizer, task = o.task, template = o.template,
    batch_size = opts.batch_size, max_new_tokens = opts.max_gen_toks, max_context = run.context,
    generation = o.generation, control = o.control ~= nil, each = o.each }
  if run:foresee(passes[o.task.kind](o.prepared, how)) then return o end
  how.map = run:mapper(o.task.name, { data = { o.items }, again = metrics.unkept(o.pair or {}),
    inputs = { control = how.control, generation = o.generation,
      chat_template = o.template and (opts.apply_chat_template or true) } }, o)
  o.evaluations, o.rows = evaluate[o.task.kind]({ run.full, run.test }, o.prepared, how)
  run:must(o.evaluations, o.rows)
  return o
end

local function measures()
  return run:must(metrics.distinct { metrics.kl(), metrics.delta_p(),
    table.unpack(run:must(metrics.load_all(opts.metric))) })
end

local function by_loglikelihood(items)
  local fewshot = opts.num_fewshot > 0 and run:fewshot(items) or nil
  local pair, control = measures(), opts.control == "true" and measures() or nil
  local o = ask { items = items, pair = pair, control = control,
    task = tasks.mmlu { subject = items.subject, fewshot = fewshot, num_fewshot = opts.num_fewshot },
    template = opts.apply_chat_template and run:template(opts.apply_chat_template) or nil,
    each = function(reference, test, p, again)
      local item = setmetatable({ target = p.target, index = p.index }, { __index = p.item })
      return { values = metrics.add(pair, reference, test, item),
        noise = again and metrics.add(control, reference, again, item) }
    end }
  if opts.dry_run then return o end
  o.metrics = metrics.summary(metrics.restore(pair, o.rows, "values"), opts.seed)
  o.control_metrics = control and metrics.summary(metrics.restore(control, o.rows, "noise"), opts.seed)
  return o
end

local function by_generation(items)
  local task = post and tasks.post { subject = items.subject } or tasks.boxed { subject = items.subject }
  if task.keep then items = data.filter(items, task.keep) end
  return ask { task = task, items = items, template = run:template(opts.apply_chat_template, "optional"),
    generation = { max_new_tokens = opts.max_gen_toks, seed = opts.seed,
      temperature = opts.temperature or task.generation.temperature } }
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
