--- Result files of a run, made from its document and the rows in its store, never from live objects.
---
---   <folder>/<model>__full/results_<time>.json, samples_<task>_<time>.jsonl   see qlua.lm_eval
---   <folder>/<model>__nf4/...                      the same for the quantized twin
---   <folder>/comparison_<time>.json                the document, where it compares accuracies; else
---   <folder>/<script>_results_<time>.json          the document
---   <folder>/<script>_samples_<time>.jsonl         every question's metrics
---   <folder>/<script>_<table>_<time>.csv           every table
---   <folder>/<script>_llama-bench_<time>.<format>  batch sweeps, see qlua.llama_bench
---
--- <time> is when the run began, in UTC and to the microsecond, as lm-eval writes it: exporting a run again
--- gives the same names, two runs never share one. Each file appears whole or not at all.

local _ENV <const> = require "qlua.strict"

local evaluate = require "qlua.evaluate"
local failure = require "qlua.failure"
local files = require "qlua.files"
local json = require "qlua.json"
local llama_bench = require "qlua.llama_bench"
local lm_eval = require "qlua.lm_eval"
local sheets = require "qlua.sheets"
local stats = require "qlua.stats"
local sys = require "qlua.sys"

local export = {}

export.writable = files.writable

---@class qlua.run_document
---@field format 1
---@field run integer?          its number in the store
---@field name string           of the script
---@field started number        seconds since 1970
---@field finished number?
---@field status string?
---@field command string[]?
---@field options table
---@field labels string[]       {"full", "nf4"}
---@field facts table
---@field fairness table?
---@field rows table?
---@field sections qlua.section[]

local DOCUMENT_KEYS <const> = { "format", "run", "name", "status", "started", "finished", "command",
  "options", "script_sha256", "labels", "facts", "fairness", "rows", "sections", "kind", "task" }

--- A file name's worth of a model's name: its last folder, other signs as underscores.
local function file_name(text) return (text:gsub("/+$", ""):match "([^/]*)$":gsub("[^%w%.%-_+]", "_")) end

--- 2024-01-31T12-34-56.123456, in UTC.
---@param time number  seconds since 1970
---@return string
function export.stamp(time)
  local microseconds = math.floor(time * 1e6 + 0.5) -- exact: below 2^53 until the year 2255
  return ("%s.%06d"):format(os.date("!%Y-%m-%dT%H-%M-%S", math.tointeger(microseconds // 1000000)),
    math.tointeger(microseconds % 1000000))
end

--- The files of an export, written one after the other.
local plan = {}
plan.__index = plan

--- `path` holds %s where the time goes. Where two sections want one name, the later gets a number.
function plan:add(path, text)
  local at, n = path:format(self.time), 1
  while self.taken[at] do
    n = n + 1
    at = path:format(("%s-%d"):format(self.time, n))
  end
  self.taken[at] = true
  local written, err = files.write(at, text)
  if not written then error(err, 0) end
  self.paths[#self.paths + 1] = at
end

--- The rows that a section's result consists of, in their order.
function plan:rows(set)
  if not (set and self.store) then
    error(failure("not_found", ("%s: no samples of this run are in a store"):format(self.doc.name)), 0)
  end
  local found, err = self.store:run_rows(self.doc.run, set)
  if not found then error(err, 0) end
  local rows = {}
  for i, row in ipairs(found) do
    rows[i], err = json.decode(row[2], { name = ("%s, row %s"):format(self.doc.name, row[1]) })
    if not rows[i] then error(err, 0) end
  end
  return rows
end

local by_kind = {}

function by_kind.mmlu(self, section)
  local doc = self.doc
  local read = {}
  for i, outcome in ipairs(self.opts.log_samples and section.outcomes or {}) do
    read[i] = self:rows(outcome.set)
  end
  for m, label in ipairs(doc.labels) do
    local folder = ("%s/%s__%s"):format(self.folder, file_name(doc.options.model), file_name(label))
    self:add(folder .. "/results_%s.json", lm_eval.results(doc, section, m))
    for i, rows in ipairs(read) do
      local outcome, lines = section.outcomes[i], {}
      for r, row in ipairs(rows) do lines[r] = lm_eval.sample(doc, outcome, row, m) end
      self:add(("%s/samples_%s_%%s.jsonl"):format(folder, file_name(outcome.task)), table.concat(lines))
    end
  end
end

function by_kind.metrics(self, section)
  if not self.opts.log_samples then return end
  local lines = {}
  for i, row in ipairs(self:rows(section.set)) do
    lines[i] = json.encode({ doc_id = row.index - 1, question = row.question, values = row.values,
      control = row.control }, { keys = { "doc_id", "question" } }) .. "\n"
  end
  self:add(self.base .. "_samples_%s.jsonl", table.concat(lines))
end

function by_kind.sweep(self, section)
  for _, format in ipairs(self.opts.output_format or {}) do
    self:add(("%s_llama-bench_%%s.%s"):format(self.base, format), llama_bench.text(self.doc, section, format))
  end
end

local function wants(opts, format)
  for _, one in ipairs(opts.output_format or {}) do if one == format then return true end end
  return false
end

local function write_all(self)
  local of_accuracies = false
  for _, section in ipairs(self.doc.sections) do
    if by_kind[section.kind] then by_kind[section.kind](self, section) end
    for _, sheet in ipairs(wants(self.opts, "csv") and sheets.of(section, self.doc.labels) or {}) do
      self:add(("%s_%s_%%s.csv"):format(self.base, sheet.name), sheets.csv(sheet))
    end
    of_accuracies = of_accuracies or section.kind == "mmlu"
  end
  self:add(of_accuracies and self.folder .. "/comparison_%s.json" or self.base .. "_results_%s.json",
    json.encode(self.doc, { indent = 2, keys = DOCUMENT_KEYS }) .. "\n")
end

---@class qlua.export_options
---@field log_samples boolean?     a line of every question as well; needs the store
---@field output_format string[]?  "csv": every table; a batch sweep in qlua.llama_bench's formats

--- Writes the files of a run. Returns their names; where one cannot be written, the error says what is kept.
---@param doc qlua.run_document
---@param store qlua.store?
---@param folder string
---@param opts? qlua.export_options
---@return string[]?, qlua.failure?
function export.write(doc, store, folder, opts)
  local self = setmetatable({ doc = doc, store = store, folder = folder, opts = opts or {}, paths = {},
    taken = {}, time = export.stamp(doc.started),
    base = ("%s/%s"):format(folder, file_name(doc.name):gsub("%.lua$", "")):gsub("%%", "%%%%") }, plan)
  self.folder = folder:gsub("%%", "%%%%")
  local ok, err = xpcall(write_all, function(e)
    return type(e) == "table" and e.message and e or debug.traceback(e, 2)
  end, self)
  if ok then return self.paths end
  if type(err) ~= "table" then error(err, 0) end
  local kept = {}
  if #self.paths > 0 then kept[1] = ("kept: %s"):format(table.concat(self.paths, ", ")) end
  if store then kept[#kept + 1] = ("the results are in %s"):format(store:path()) end
  local hint = err.hint and { err.hint, table.unpack(kept) } or kept
  return nil, failure(err.code, err.message, #hint > 0 and table.concat(hint, "; ") or nil)
end

local KEYS <const> = { "results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better",
  "n-samples",
  "config", "git_hash", "date", "name", "alias", "sample_len", "doc_id", "doc", "target", "arguments",
    "resps",
  "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash", "target_hash", "question", "choices",
    "answer" }

local function pretty(value) return json.encode(value, { indent = 2, keys = KEYS }) .. "\n" end

local function line(value) return json.encode(value, { keys = KEYS }) .. "\n" end

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
  run:must(files.write(path, text))
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
