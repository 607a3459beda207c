--- Result files: lm-evaluation-harness' schema for accuracies, plain JSON for the rest.
---
---   <output_path>/<model>__full/results_<time>.json, samples_<task>_<time>.jsonl
---   <output_path>/<model>__nf4/...                    the same for the quantized twin
---   <output_path>/comparison_<time>.json              the two against each other
---
--- Field names are those of lm_eval 0.4 (loggers/evaluation_tracker.py); each row also says its numerics and
--- the kernels that ran. Every file is written under a temporary name, synced and renamed: it appears whole
--- or not at all.

local _ENV <const> = require "qlua.strict"

local evaluate = require "qlua.evaluate"
local failure = require "qlua.failure"
local json = require "qlua.json"
local lfs = require "lfs"
local stats = require "qlua.stats"
local sys = require "qlua.sys"

local export = {}

--- Makes a folder and those above it.
local function make_folder(path)
  local at = path:sub(1, 1) == "/" and "/" or ""
  for part in path:gmatch "[^/]+" do
    at = at .. part
    if lfs.attributes(at, "mode") == nil then
      local ok, why = lfs.mkdir(at)
      if not ok then return nil, failure("io", ("%s: cannot make the folder (%s)"):format(at, why)) end
    elseif lfs.attributes(at, "mode") ~= "directory" then
      return nil, failure("io", ("%s: not a folder"):format(at), "choose another --output_path")
    end
    at = at .. "/"
  end
  return true
end

--- Whether results can be written into a folder: said before the work, not after it. Makes the folder.
---@param folder string
---@return boolean?, qlua.failure?
function export.writable(folder)
  local existed = lfs.attributes(folder, "mode") ~= nil
  local made, err = make_folder(folder)
  if not made then return nil, err end
  local probe = ("%s/.qlua.%d"):format(folder, sys.pid())
  local file, why = io.open(probe, "wb")
  if not file then return nil, failure("io", ("%s: cannot write here (%s)"):format(folder, why)) end
  file:close()
  os.remove(probe)
  if not existed then lfs.rmdir(folder) end -- made again when there is something to write
  return true
end

--- Writes `text` as `path`, whole or not at all.
---@param path string
---@param text string
---@return boolean?, qlua.failure?
function export.write(path, text)
  local folder, name = path:match "^(.*)/([^/]*)$"
  folder, name = folder or ".", name or path
  local made, err = make_folder(folder)
  if not made then return nil, err end
  local temporary = ("%s/.%s.%d"):format(folder, name, sys.pid())
  local file, why = io.open(temporary, "wb")
  if not file then return nil, failure("io", ("%s: cannot write (%s)"):format(path, why)) end
  local ok
  ok, why = file:write(text)
  local closed, close_why = file:close()
  if not (ok and closed) then
    os.remove(temporary)
    return nil, failure("io", ("%s: cannot write (%s)"):format(path, why or close_why), "is the disk full?")
  end
  local synced
  synced, err = sys.fsync(temporary)
  if synced then synced, err = sys.rename(temporary, path) end
  if not synced then
    os.remove(temporary)
    return nil, err
  end
  return sys.fsync(folder)
end

local KEYS <const> = { "results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better",
  "n-samples",
  "config", "git_hash", "date", "name", "alias", "sample_len", "doc_id", "doc", "target", "arguments",
    "resps",
  "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash", "question", "choices",
    "answer" }

local function pretty(value) return json.encode(value, { indent = 2, keys = KEYS }) .. "\n" end

local function line(value) return json.encode(value, { keys = KEYS }) .. "\n" end

--- A file name's worth of a model's name: its last folder, other signs as underscores.
local function file_name(text) return (text:gsub("/+$", ""):match "([^/]*)$":gsub("[^%w%.%-_+]", "_")) end

local function stamp(run) return os.date("!%Y-%m-%dT%H-%M-%S", run.date) end

--- The document as lm-eval hashes it: Python's json.dumps(doc, indent=2, ensure_ascii=False).
local function document(item)
  local doc = { question = item.question, choices = json.array { table.unpack(item.choices) },
    answer = item.answer - 1 }
  return doc, json.encode(doc, { indent = 2, keys = { "question", "choices", "answer" } })
end

local function sample(run, o, scored)
  local p, task = scored.prepared, o.task
  local doc, text = document(p.item)
  local entry = { doc_id = p.index - 1, doc = doc, target = tostring(p.item.answer - 1), filter = "none",
    metrics = json.array { "acc" }, acc = scored.correct and 1.0 or 0.0, arguments = {}, resps = json.array(),
    filtered_resps = json.array(), doc_hash = sys.sha256(text), prompt_hash = sys.sha256(p.prompt),
    target_hash = sys.sha256(tostring(p.item.answer - 1)), numerics = run.hardware.numerics,
    kernels = json.array(scored.kernels) }
  if task.kind == "loglikelihood" then
    local continuations = o.template and task.chat_continuations or task.continuations
    for c, score in ipairs(scored.scores) do
      entry.arguments["gen_args_" .. c - 1] = { arg_0 = p.prompt, arg_1 = continuations[c] }
      local pair = { json.encode(score + 0.0), scored.greedy[c] and "True" or "False" }
      entry.resps[c] = json.array { json.array { table.unpack(pair) } }
      entry.filtered_resps[c] = json.array(pair)
    end
  else
    entry.arguments.gen_args_0 = { arg_0 = p.prompt, arg_1 = o.generation }
    entry.resps[1] = json.array { scored.text }
    entry.filtered_resps[1] = scored.answer and ("ABCD"):sub(scored.answer, scored.answer) or "[invalid]"
    entry.words, entry.stop = scored.words, scored.stop
  end
  return entry
end

--- The entry of one task in "results", in lm-eval's words, with ours beside them.
local function task_result(o, evaluation)
  local values, correct, unparsed = {}, 0, 0
  for i, r in ipairs(evaluation.results) do
    values[i] = r.correct and 1 or 0
    correct = correct + values[i]
    if not r.answer then unparsed = unparsed + 1 end
  end
  local n = #values
  local result = { name = o.task.name, alias = o.task.name, sample_len = n, too_long = o.too_long,
    unparsed = unparsed,
    seconds = evaluation.seconds, prompt_tokens = evaluation.prompt_tokens,
    shared_tokens = evaluation.shared_tokens,
    kernels = json.array(evaluate.kernels(evaluation)) }
  if n > 0 then
    result["acc,none"] = correct / n
    result["acc_stderr,none"] = n > 1 and stats.stderr(values) or "N/A"
    local low, high = stats.wilson(correct, n)
    result.acc_wilson_95 = json.array { low, high }
  end
  if evaluation.prefill_seconds > 0 then
    result.prefill_tokens_per_second = evaluation.prompt_tokens / evaluation.prefill_seconds
  end
  if o.task.kind == "generate" and evaluation.seconds > 0 then
    result.words, result.words_per_minute = evaluation.words, 60 * evaluation.words / evaluation.seconds
    if evaluation.decode_seconds > 0 then
      result.decode_tokens_per_second = evaluation.decode_tokens / evaluation.decode_seconds
    end
  end
  return result
end

--- One model's results file.
local function model_results(run, outcomes, m)
  local model = m == 1 and run.full or run.test
  local info, opts = model:info(), run.opts
  local file = { results = {}, group_subtasks = {}, configs = {}, versions = {}, ["n-shot"] = {},
    higher_is_better = {}, ["n-samples"] = {}, git_hash = json.null, date = run.date + 0.0,
    config = { model = "qlua", model_args = { pretrained = opts.model, dtype = info.dtype,
      quant = info.quant.label },
      model_num_parameters = info.params, model_dtype = info.dtype, batch_size = opts.batch_size,
        device = info.device,
      limit = opts.limit or json.null, random_seed = opts.seed, numerics = run.hardware.numerics },
    qlua = run:facts() }
  for _, o in ipairs(outcomes) do
    local name = o.task.name
    file.results[name] = task_result(o, o.evaluations[m])
    file.configs[name] = { task = name, dataset_path = o.items.path, num_fewshot = o.task.num_fewshot,
      description = o.task.description or "", output_type = o.task.kind == "generate" and "generate_until"
        or "multiple_choice", apply_chat_template = o.template ~= nil, protocol = opts.protocol,
      generation_kwargs = o.generation, metadata = { version = 1.0 } }
    file.versions[name] = 1.0
    file["n-shot"][name] = o.task.num_fewshot
    file.higher_is_better[name] = { acc = true }
    file["n-samples"][name] = { original = o.items.all or #o.items, effective = #o.evaluations[m].results }
  end
  return file
end

local SUMMARY <const> = { "n", "low", "high", "mean", "stderr", "rms", "min", "median", "p90", "p95", "p99",
  "p999", "max" }

--- Rows of qlua.metrics.summary as a table by name; without the values of every item.
local function metric_fields(rows)
  local fields = {}
  for _, row in ipairs(rows or {}) do
    local field = { value = row.value or json.null, higher_is_better = row.higher_is_better }
    for _, key in ipairs(SUMMARY) do field[key] = row[key] end
    fields[row.name] = field
  end
  return fields
end

local function comparison_fields(o)
  local fields = { metrics = metric_fields(o.metrics), questions = #o.items, too_long = o.too_long }
  if o.comparison then
    fields.flips = o.flips
    fields.difference, fields.difference_95 = o.comparison.difference, json.array(o.interval)
    -- adjusted_p is Holm's over all comparisons of the run, and equal to mcnemar_p where there is only one
    fields.mcnemar_p, fields.adjusted_p = o.mcnemar, o.comparison.p
    fields.established, fields.questions_needed = o.comparison.established, o.comparison.needed
    fields.sentence = o.comparison.sentence
  end
  return fields
end

--- Write one file and remember its name; the end of the script when it fails.
local function put(run, paths, path, text)
  run:must(export.write(path, text))
  paths[#paths + 1] = path
end

--- Files of examples/mmlu.lua. Returns their names.
---@param run qlua.experiment
---@param outcomes table[]
---@return string[]
function export.mmlu(run, outcomes)
  local paths, time, comparison = {}, stamp(run), {}
  for m, label in ipairs(run.labels) do
    local folder = ("%s/%s__%s"):format(run.opts.output_path, file_name(run.opts.model), file_name(label))
    put(run, paths, ("%s/results_%s.json"):format(folder, time), pretty(model_results(run, outcomes, m)))
    for _, o in ipairs(run.opts.log_samples and outcomes or {}) do
      local lines = {}
      for i, scored in ipairs(o.evaluations[m].results) do lines[i] = line(sample(run, o, scored)) end
      put(run, paths, ("%s/samples_%s_%s.jsonl"):format(folder, o.task.name, time), table.concat(lines))
    end
  end
  for _, o in ipairs(outcomes) do comparison[o.task.name] = comparison_fields(o) end
  put(run, paths, ("%s/comparison_%s.json"):format(run.opts.output_path, time),
    pretty { reference = run.labels[1], test = run.labels[2], tasks = comparison, run = run:facts() })
  return paths
end

--- Files of the experiments that compare logits: the table, and with --log_samples every item's values.
---@param run qlua.experiment
---@param r table
---@return string[]
function export.metrics(run, r)
  local paths, time = {}, stamp(run)
  local base = ("%s/%s"):format(run.opts.output_path, file_name(run.name):gsub("%.lua$", ""))
  put(run, paths, ("%s_results_%s.json"):format(base, time), pretty { task = r.task, questions = r.questions,
    too_long = r.too_long, results = metric_fields(r.pair), full_v_full = metric_fields(r.control),
    reference = run.labels[1], test = run.labels[2], run = run:facts() })
  if run.opts.log_samples then
    local lines = {}
    for i, row in ipairs(r.rows) do
      local values = {}
      for _, metric in ipairs(r.pair) do
        if metric.values and #metric.values == #r.rows then values[metric.name] = metric.values[i] end
      end
      lines[i] = line { doc_id = row.item.index - 1, question = row.item.question, values = values }
    end
    put(run, paths, ("%s_samples_%s.jsonl"):format(base, time), table.concat(lines))
  end
  return paths
end

--- File of examples/batch_sweep.lua: every sample kept.
---@param run qlua.experiment
---@param points qlua.sweep_point[]
---@return string[]
function export.sweep(run, points)
  local paths, list = {}, json.array()
  for i, p in ipairs(points) do
    local row = { batch = p.batch, model = run.labels[p.model], tokens = p.tokens, oom = p.oom,
      device = run.hardware.name, numerics = run.hardware.numerics, kernels = json.array(p.kernels),
      peak_bytes = p.peak,
      reserved_bytes = p.reserved, process_peak_bytes = p.process, expected_bytes = p.expected }
    if p.time then
      row.seconds = { median = p.time.median, mean = p.time.mean, sd = p.time.sd, p10 = p.time.p10,
        p90 = p.time.p90,
        min = p.time.min, max = p.time.max, n = p.time.n, samples = json.array(p.time.samples) }
    end
    list[i] = row
  end
  put(run, paths, ("%s/batch_sweep_results_%s.json"):format(run.opts.output_path, stamp(run)),
    pretty { points = list, run = run:facts() })
  return paths
end

--- File of the experiments that compare several quantizations.
---@param run qlua.experiment
---@param rows qlua.variant[]
---@return string[]
function export.variants(run, rows)
  local paths, list = {}, json.array()
  for i, row in ipairs(rows) do
    list[i] = { label = row.label, bytes = row.bytes, bits_per_weight = row.bits,
      metrics = metric_fields { row.kl,
      row.agreement }, accuracy = row.accuracy, kernels = json.array(row.kernels) }
  end
  put(run, paths, ("%s/%s_results_%s.json"):format(run.opts.output_path, run.name:gsub("%.lua$", ""),
    stamp(run)),
    pretty { variants = list, questions = #run.items, too_long = rows.too_long, run = run:facts() })
  return paths
end

return export
