--- Accuracies in the files of lm-evaluation-harness 0.4 (loggers/evaluation_tracker.py): results_<time>.json
--- with one entry a task, samples_<task>_<time>.jsonl with one line a question.
---
--- Made from a run's document and the rows of its store. "qlua" in results holds what the harness has no
--- fields for: the run's facts, each task's interval and speeds. Each sample also says its numerics and the
--- kernels that ran.

local _ENV <const> = require "qlua.strict"

local json = require "qlua.json"
local sys = require "qlua.sys"

local lm_eval = {}

local KEYS <const> = { "results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better",
  "n-samples", "config", "git_hash", "date", "name", "alias", "sample_len", "doc_id", "doc", "target",
  "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash",
  "question", "choices", "answer" }

local LETTERS <const> = { "A", "B", "C", "D" }

--- The entry of one task in "results": the harness prints whatever stands here as a metric.
local function task_result(outcome, model)
  return { name = outcome.task, alias = outcome.task, sample_len = model.n, ["acc,none"] = model.accuracy,
    -- the harness too has no number for a single question
    ["acc_stderr,none"] = model.n > 0 and (model.stderr or "N/A") or nil }
end

--- results_<time>.json of one model of a section.
---@param doc qlua.run_document
---@param section qlua.section_mmlu
---@param m 1|2  full or quantized
---@return string
function lm_eval.results(doc, section, m)
  local facts, options = doc.facts, doc.options
  local info = m == 1 and facts.full or facts.quantized
  local file = { results = {}, group_subtasks = {}, configs = {}, versions = {}, ["n-shot"] = {},
    higher_is_better = {}, ["n-samples"] = {}, git_hash = json.null, date = doc.started + 0.0,
    config = { model = "qlua", model_args = { pretrained = options.model, dtype = info.dtype,
      quant = info.quant.label }, model_num_parameters = info.params, model_dtype = info.dtype,
      batch_size = options.batch_size, device = info.device, limit = options.limit or json.null,
      random_seed = facts.seed, numerics = facts.numerics },
    qlua = { facts = facts, tasks = {} } }
  for _, outcome in ipairs(section.outcomes) do
    local name, model = outcome.task, outcome.models[m]
    file.results[name], file.qlua.tasks[name] = task_result(outcome, model), model
    file.configs[name] = { task = name, dataset_path = outcome.data.path, num_fewshot = outcome.num_fewshot,
      description = outcome.description or "", output_type = outcome.output_type,
      apply_chat_template = outcome.chat_template, protocol = section.protocol,
      generation_kwargs = outcome.generation, metadata = { version = 1.0 } }
    file.versions[name] = 1.0
    file["n-shot"][name] = outcome.num_fewshot
    file.higher_is_better[name] = { acc = true }
    file["n-samples"][name] = { original = outcome.data.all, effective = model.n }
  end
  return json.encode(file, { indent = 2, keys = KEYS }) .. "\n"
end

--- The question as lm-eval hashes it: Python's json.dumps(doc, indent=2, ensure_ascii=False).
local function question_of(row)
  local doc = { question = row.doc.question, choices = row.doc.choices, answer = row.doc.answer - 1 }
  return doc, json.encode(doc, { indent = 2, keys = { "question", "choices", "answer" } })
end

--- One line of samples_<task>_<time>.jsonl.
---@param doc qlua.run_document
---@param outcome qlua.section_outcome
---@param row table  of the store: { index, doc, prompt, models }
---@param m 1|2
---@return string
function lm_eval.sample(doc, outcome, row, m)
  local scored = row.models[m]
  local question, text = question_of(row)
  local target = tostring(question.answer)
  local entry = { doc_id = row.index - 1, doc = question, target = target, filter = "none",
    metrics = json.array { "acc" }, acc = scored.correct and 1.0 or 0.0, arguments = {}, resps = json.array(),
    filtered_resps = json.array(), doc_hash = sys.sha256(text), prompt_hash = sys.sha256(row.prompt),
    target_hash = sys.sha256(target), numerics = doc.facts.numerics, kernels = scored.kernels }
  if outcome.output_type == "multiple_choice" then
    for c, score in ipairs(scored.scores) do
      entry.arguments["gen_args_" .. c - 1] = { arg_0 = row.prompt, arg_1 = outcome.continuations[c] }
      local pair = { json.encode(score + 0.0), scored.greedy[c] and "True" or "False" }
      entry.resps[c] = json.array { json.array { table.unpack(pair) } }
      entry.filtered_resps[c] = json.array(pair)
    end
  else
    entry.arguments.gen_args_0 = { arg_0 = row.prompt, arg_1 = outcome.generation }
    entry.resps[1] = json.array { scored.text }
    entry.filtered_resps[1] = LETTERS[scored.answer] or "[invalid]"
    entry.words, entry.stop = scored.words, scored.stop
  end
  return json.encode(entry, { keys = KEYS }) .. "\n"
end

return lm_eval
