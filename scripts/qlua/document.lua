--- Sections of a run's document: what an experiment found, as plain tables that JSON can hold.
---
--- Tables on the terminal, exported files, `qlua compare` and the report are all drawn from these, so that a
--- figure is computed once. Lists are marked as JSON arrays; a figure that there is none of is absent, and no
--- number is NaN or infinite. Units: seconds, bytes, shares of 1, natural logarithms.
---
---   run:record(document.mmlu(run, outcomes))

local _ENV <const> = require "qlua.strict"

local evaluate = require "qlua.evaluate"
local json = require "qlua.json"
local metrics = require "qlua.metrics"
local perplexity = require "qlua.perplexity"
local stats = require "qlua.stats"

local document = {}

---@class qlua.section
---@field kind "mmlu"|"metrics"|"sweep"|"perplexity"|"variants"|"sensitivity"|"nucleus"

---@class qlua.section_data      the questions that a section is about
---@field path string            of the file
---@field sha256 string?         of its bytes
---@field all integer            questions in the file

--- A figure with its interval, and what qlua.stats.summary says of the values it is the mean of.
---@class qlua.section_metric
---@field name string
---@field value number?          nil where no question gave a number (n is 0)
---@field low number?            95 % interval of the mean, Wilson's of a share, else by bootstrap; only where
---  there is one value a question
---@field high number?
---@field n integer?
---@field mean number?
---@field stderr number?
---@field rms number?
---@field min number?
---@field median number?
---@field p90 number?
---@field p95 number?
---@field p99 number?
---@field p999 number?
---@field max number?
---@field higher_is_better boolean?
---@field values number[]?       one a scored question, in their order

local FIGURES <const> = { "name", "value", "low", "high", "n", "mean", "stderr", "rms", "min", "median",
  "p90", "p95", "p99", "p999", "max", "higher_is_better" }

local function array(list) return json.array(table.move(list, 1, #list, 1, {})) end

local function copied(source, keys)
  local copy = {}
  for _, key in ipairs(keys) do copy[key] = source[key] end
  return copy
end

local function metric_rows(rows, with_values)
  local list = json.array()
  for i, row in ipairs(rows or {}) do
    list[i] = copied(row, FIGURES)
    if with_values and row.values then list[i].values = array(row.values) end
  end
  return list
end

local function data_of(items)
  return { path = items.path, sha256 = items.sha256, all = items.all or #items }
end

---@class qlua.section_share
---@field n integer
---@field correct integer
---@field accuracy number?       nil where n is 0
---@field wilson number[]?       {low, high}, 95 %

--- A share of right answers with its interval.
---@param correct integer
---@param n integer
---@return qlua.section_share
local function share(correct, n)
  local made = { n = n, correct = correct }
  if n > 0 then
    made.accuracy = correct / n
    made.wilson = json.array { stats.wilson(correct, n) }
  end
  return made
end

---@class qlua.section_model: qlua.section_share  one model's answers to one task
---@field label string
---@field stderr number?         sample standard deviation / sqrt(n), as lm-eval gives it; nil where n is 1
---@field unparsed integer       answers without a letter, counted as wrong
---@field cut integer            of those, answers that met --max_gen_toks
---@field seconds number         of all batches
---@field prompt_tokens integer  that went through the model
---@field shared_tokens integer  of prompts that did not, for the model had their keys and values
---@field decode_tokens integer?                  generation, as the next three
---@field words integer?
---@field words_per_minute number?
---@field words_per_minute_95 number[]?           {low, high}, bootstrap of the batches
---@field decode_tokens_per_second number?
---@field prefill_tokens_per_second number?
---@field kernels string[]

local function rate(amount, seconds, unit)
  return amount and seconds and seconds > 0 and unit * amount / seconds or nil
end

--- Words and seconds by batch of answers of one or two runs to the same questions: { words, seconds, words,
--- seconds }. A batch's time is shared equally by its answers, so that equal seconds tell its members; who
--- redrew answers would take one batch's luck for as many independent ones. Where the runs had other batches,
--- the larger ones count. nil where times are not known.
---@param answers { words: integer?, seconds: number? }[][]
---@return number[][]?
function document.by_batch(answers)
  local fewest, batches
  for _, list in ipairs(answers) do
    local seen, count = {}, 0
    for _, r in ipairs(list) do
      if not (r.words and r.seconds) then return nil end
      if not seen[r.seconds] then seen[r.seconds], count = true, count + 1 end
    end
    if not fewest or count < fewest then fewest, batches = count, list end
  end
  if fewest == 0 then return nil end
  local sums, place, n = {}, {}, 0
  for k = 1, 2 * #answers do sums[k] = {} end
  for i, r in ipairs(batches) do
    if not place[r.seconds] then
      n = n + 1
      place[r.seconds] = n
      for _, sum in ipairs(sums) do sum[n] = 0 end
    end
    local at = place[r.seconds]
    for side, list in ipairs(answers) do
      local words, seconds = sums[2 * side - 1], sums[2 * side]
      words[at], seconds[at] = words[at] + list[i].words, seconds[at] + list[i].seconds
    end
  end
  return sums
end

--- Words per minute of the second model / those of the first, with their interval.
local function words_ratio(first, second, seed)
  local lists = document.by_batch { second.results, first.results }
  if not lists then return nil end
  local ratio, low, high = stats.bootstrap_ratio(lists, { seed = seed })
  return ratio and { value = ratio, low = low, high = high }
end

local function model_of(evaluation, label, generates, seed)
  local counts, values, cut = evaluate.accuracy(evaluation), {}, 0
  for i, r in ipairs(evaluation.results) do
    values[i] = r.correct and 1 or 0
    if not r.answer and r.stop == "length" then cut = cut + 1 end
  end
  local model = share(counts.correct, counts.n)
  model.label, model.unparsed, model.cut = label, counts.unparsed, cut
  model.stderr = counts.n > 1 and stats.stderr(values) or nil
  model.seconds, model.prompt_tokens = evaluation.seconds, evaluation.prompt_tokens
  model.shared_tokens, model.kernels = evaluation.shared_tokens, array(evaluate.kernels(evaluation))
  model.prefill_tokens_per_second = rate(evaluation.prompt_tokens, evaluation.prefill_seconds, 1)
  if generates then
    model.words, model.decode_tokens = evaluation.words, evaluation.decode_tokens
    model.words_per_minute = rate(evaluation.words, evaluation.seconds, 60)
    model.decode_tokens_per_second = rate(evaluation.decode_tokens, evaluation.decode_seconds, 1)
    local lists = document.by_batch { evaluation.results }
    if lists then
      local _, low, high = stats.bootstrap_ratio(lists, { seed = seed })
      model.words_per_minute_95 = low and json.array { 60 * low, 60 * high }
    end
  end
  return model
end

---@class qlua.section_comparison  two models' answers to the same questions
---@field flips qlua.flips
---@field difference number      accuracy of the second - accuracy of the first
---@field difference_95 number[] {low, high}, stats.tango
---@field mcnemar_p number       exact, two-sided
---@field adjusted_p number      Holm's over all tasks of the section; mcnemar_p where there is only one
---@field established boolean    adjusted_p below 0.05
---@field questions_needed integer?  for 80 % power if the shares seen are the true ones
---@field sentence string
---@field recovery number?       accuracy of the second / accuracy of the first
---@field words_per_minute_ratio { value: number, low: number?, high: number? }?  second / first; bootstrap of
---  the batches

--- Two evaluations of the same questions, without what Holm's correction decides; nil where nothing was
--- scored.
local function paired(first, second)
  local a, b, gold = {}, {}, {}
  for i, r in ipairs(first.results) do
    a[i], b[i], gold[i] = r.answer or false, second.results[i].answer or false, r.prepared.item.answer
  end
  return document.paired(a, b, gold)
end

--- The comparison of two lists of answers (false: none could be read); document.holm completes it.
---@param a (integer|false)[]
---@param b (integer|false)[]
---@param gold integer[]
---@return qlua.section_comparison?  nil for empty lists
function document.paired(a, b, gold)
  if #gold == 0 then return nil end
  local flips = stats.flips(a, b, gold)
  return {
    flips = flips,
    difference = (flips.wrong_right - flips.right_wrong) / flips.n,
    difference_95 = json.array { stats.tango(flips.right_wrong, flips.wrong_right, flips.n) },
    mcnemar_p = stats.mcnemar(flips.right_wrong, flips.wrong_right),
    recovery = stats.recovery(flips.right_a / flips.n, flips.right_b / flips.n),
  }
end

--- Completes comparisons that belong together: where there are several, Holm's adjusted p decides.
---@param list qlua.section_comparison[]
function document.holm(list)
  local p = {}
  for i, c in ipairs(list) do p[i] = c.mcnemar_p end
  local adjusted = #p > 1 and stats.holm(p) or {}
  for i, c in ipairs(list) do
    local said = stats.compare(c.flips, adjusted[i])
    c.adjusted_p, c.established, c.questions_needed = said.p, said.established, said.needed
    c.sentence = said.sentence
  end
end

---@class qlua.section_outcome   one task
---@field task string            lm-eval's name
---@field subject string
---@field output_type "multiple_choice"|"generate_until"
---@field num_fewshot integer
---@field description string?    what stands above every question
---@field continuations string[]? the texts that were scored (multiple_choice)
---@field generation table?      how answers were drawn (generate_until)
---@field chat_template boolean  whether the model's was used
---@field data qlua.section_data
---@field questions integer      asked
---@field too_long integer       not scored, for they do not fit the context
---@field context integer        tokens that both models can take
---@field set string?            key of the rows in the store
---@field models qlua.section_model[]  the full and the quantized model
---@field comparison qlua.section_comparison?  nil where nothing was scored
---@field control qlua.section_comparison?     the full model against itself: what is noise
---@field control_model qlua.section_model?    that second run of it
---@field metrics qlua.section_metric[]   on the logits at the answer; without values
---@field control_metrics qlua.section_metric[]?

---@class qlua.section_mmlu: qlua.section
---@field protocol "sound"|"post"
---@field outcomes qlua.section_outcome[]

local function outcome_of(run, o)
  local task, generates, too_long = o.task, o.task.kind == "generate", 0
  for _, p in ipairs(o.prepared) do if p.too_long then too_long = too_long + 1 end end
  local continuations = o.template and task.chat_continuations or task.continuations
  local made = {
    task = task.name, subject = task.subject, output_type = generates and "generate_until"
      or "multiple_choice",
    num_fewshot = task.num_fewshot, description = task.description,
    continuations = continuations and array(continuations), generation = o.generation,
    chat_template = o.template ~= nil, data = data_of(o.items), questions = #o.items, too_long = too_long,
    context = run.context, set = o.set, models = json.array(), metrics = metric_rows(o.metrics),
    control_metrics = o.control_metrics and metric_rows(o.control_metrics),
  }
  for m = 1, 2 do made.models[m] = model_of(o.evaluations[m], run.labels[m], generates, run.opts.seed) end
  made.comparison = paired(o.evaluations[1], o.evaluations[2])
  if generates and made.comparison then
    made.comparison.words_per_minute_ratio = words_ratio(o.evaluations[1], o.evaluations[2], run.opts.seed)
  end
  local again = o.evaluations[3]
  if again then
    made.control_model = model_of(again, run.labels[1], generates, run.opts.seed)
    made.control = paired(o.evaluations[1], again)
  end
  return made
end

--- Accuracy, speed and the paired comparison of every task.
---@param run qlua.experiment
---@param outcomes { task: qlua.task, items: qlua.items, prepared: qlua.prepared[], evaluations:
---  qlua.evaluation[], template: table?, generation: table?, metrics: table[]?, control_metrics: table[]?,
---  set: string? }[]  evaluations: full, quantized and, as control, full again
---@return qlua.section_mmlu
function document.mmlu(run, outcomes)
  local section = { kind = "mmlu", protocol = run.opts.protocol, outcomes = json.array() }
  local comparisons, controls = {}, {}
  for i, o in ipairs(outcomes) do
    local made = outcome_of(run, o)
    section.outcomes[i] = made
    comparisons[#comparisons + 1] = made.comparison
    controls[#controls + 1] = made.control
  end
  document.holm(comparisons)
  document.holm(controls)
  return section
end

---@class qlua.section_metrics: qlua.section
---@field task string            in words: "virology, after the question"
---@field data qlua.section_data
---@field questions integer
---@field scored integer
---@field too_long integer
---@field context integer
---@field set string?
---@field pair qlua.section_metric[]     full v quantized, with the value of every scored question
---@field control qlua.section_metric[]  full v full; empty where there was none
---@field tests qlua.control_test[]      the pair against the control, by question; Holm over all of them

--- What tells each metric of the pair from its noise floor.
local function against_noise(pair, control, seed)
  local floor, list = {}, {}
  for _, row in ipairs(control) do floor[row.name] = row.values end
  for _, row in ipairs(pair) do
    local values, same = row.values, floor[row.name]
    if values and same and #values == #same and #values > 0 then
      list[#list + 1] = { name = row.name, values = values, control = same }
    end
  end
  return json.array(stats.against_controls(list, { seed = seed }))
end

--- Metrics of qlua.metrics.summary, and the control beside them.
---@param run qlua.experiment
---@param r { task: string, questions: integer, too_long: integer, pair: table[], control: table[]?, rows:
---  table[], set: string? }
---@return qlua.section_metrics
function document.metrics(run, r)
  return { kind = "metrics", task = r.task, data = data_of(run.items), questions = r.questions,
    scored = #r.rows, too_long = r.too_long, context = run.context, set = r.set,
    pair = metric_rows(r.pair, true), control = metric_rows(r.control, true),
    tests = against_noise(r.pair, r.control or {}, run.opts.seed) }
end

---@class qlua.section_seconds
---@field median number
---@field mean number
---@field sd number
---@field p10 number
---@field p90 number
---@field min number
---@field max number
---@field n integer
---@field samples number[]       in the order of the passes

---@class qlua.section_point
---@field batch integer          rows of a pass
---@field model 1|2
---@field label string
---@field tokens number          mean of a pass
---@field pass_tokens integer[]? of every timed pass, in the order of seconds.samples
---@field seconds qlua.section_seconds?  nil: out of memory
---@field peak { weights: integer, kv: integer, activations: integer, total: integer, shared: integer,
---  resident: integer }?        high-water marks of the model's arena; shared: tensors of the full model that
---  the twin uses; resident: total + shared
---@field reserved integer?
---@field process integer?
---@field expected { weights: integer, kv: integer, activations: integer, total: integer }
---@field kernels string[]
---@field oom string?            why a pass did not fit

---@class qlua.section_sweep: qlua.section
---@field task string
---@field data qlua.section_data
---@field questions integer
---@field too_long integer
---@field max_length integer     tokens of the longest question taken
---@field runs integer           timed passes of each batch size and model
---@field warmup integer?
---@field logits "all"|"last"|nil
---@field points qlua.section_point[]  by batch size, then model
---@field drift table?           of the clock over the run, see qlua.fairness

local SECONDS <const> = { "median", "mean", "sd", "p10", "p90", "min", "max", "n" }

--- Latency and memory by batch size.
---@param run qlua.experiment
---@param points qlua.sweep_point[]
---@param r { questions: integer, too_long: integer, drift: table? }
---@return qlua.section_sweep
function document.sweep(run, points, r)
  local opts = run.opts
  local section = { kind = "sweep", task = run.items.subject, data = data_of(run.items),
    questions = r.questions, too_long = r.too_long, max_length = opts.max_length, runs = opts.runs,
    warmup = opts.warmup, logits = opts.logits, drift = r.drift, points = json.array() }
  for i, p in ipairs(points) do
    local point = copied(p, { "batch", "model", "tokens", "peak", "reserved", "process", "expected", "oom" })
    point.label, point.kernels = run.labels[p.model], array(p.kernels)
    point.pass_tokens = p.pass_tokens and array(p.pass_tokens)
    if p.time then
      point.seconds = copied(p.time, SECONDS)
      point.seconds.samples = array(p.time.samples)
    end
    section.points[i] = point
  end
  return section
end

---@class qlua.section_perplexity: qlua.section
---@field text string            the file
---@field sha256 string?         of its bytes
---@field protocol { context: integer, stride: integer, bos: integer?, scored_per_window: integer, windows:
---  integer, windows_in_text: integer, tokens_in_text: integer, description: string }
---@field summary qlua.perplexity_summary
---@field set string?

--- Perplexity of a text and how far the two models' predictions lie apart.
---@param run qlua.experiment
---@param windows qlua.perplexity_windows
---@param summary qlua.perplexity_summary
---@param r? { sha256: string?, set: string? }
---@return qlua.section_perplexity
function document.perplexity(run, windows, summary, r)
  local figures = {}
  for key, value in pairs(summary) do figures[key] = value end
  figures.kl_percentiles = array(summary.kl_percentiles)
  figures.delta_p_percentiles = array(summary.delta_p_percentiles)
  return { kind = "perplexity", text = run.opts.text, sha256 = r and r.sha256, set = r and r.set,
    summary = figures,
    protocol = { context = windows.context, stride = windows.context, bos = windows.bos,
      scored_per_window = windows.context - 1 - windows.context // 2, windows = #windows,
      windows_in_text = windows.all, tokens_in_text = windows.tokens,
      description = perplexity.protocol(windows) } }
end

---@class qlua.section_variant
---@field label string
---@field bytes integer          resident
---@field bits number            resident bits a weight of the linear layers (lm_head left out)
---@field kl qlua.section_metric         from the full model, at the answer's letter
---@field agreement qlua.section_metric
---@field accuracy qlua.section_share
---@field kernels string[]

---@class qlua.section_variants: qlua.section
---@field task string
---@field data qlua.section_data
---@field questions integer
---@field scored integer
---@field too_long integer
---@field context integer
---@field note string
---@field rows qlua.section_variant[]

--- Several quantizations against the full model.
---@param run qlua.experiment
---@param rows qlua.variant[]
---@param note string
---@return qlua.section_variants
function document.variants(run, rows, note)
  local section = { kind = "variants", task = run.items.subject, data = data_of(run.items),
    questions = #run.items, scored = rows.scored, too_long = rows.too_long, context = run.context,
    note = note, rows = json.array() }
  for i, row in ipairs(rows) do
    local measured = metric_rows { row.kl, row.agreement }
    section.rows[i] = { label = row.label, bytes = row.bytes, bits = row.bits, kl = measured[1],
      agreement = measured[2], kernels = array(row.kernels),
      accuracy = share(row.accuracy.correct, row.accuracy.n) }
  end
  return section
end

---@class qlua.section_sensitivity_row: qlua.section_variant
---@field saved integer          resident bytes that the full model has more
---@field kl_per_mib number?     kl.value for each MiB saved; nil where none is

---@class qlua.section_sensitivity: qlua.section
---@field task string
---@field data qlua.section_data
---@field questions integer
---@field scored integer
---@field too_long integer
---@field context integer
---@field by qlua.grouping
---@field note string
---@field rows qlua.section_sensitivity_row[]  a group of matrices each, the most harmful first
---@field all qlua.section_sensitivity_row?    every group quantized

--- What quantizing one group of matrices at a time does.
---@param run qlua.experiment
---@param rows qlua.variant[]  the least harmful first, as variants.alone has them
---@param all qlua.variant?
---@return qlua.section_sensitivity
function document.sensitivity(run, rows, all)
  local by, list = run.opts.by, { scored = rows.scored, too_long = rows.too_long }
  for i, row in ipairs(rows) do list[#rows + 1 - i] = row end
  list[#list + 1] = all
  local section = document.variants(run, list, ("One %s in %s at a time, the rest as it is."):format(
    by == "kind" and "kind of matrix" or by, run.opts.quant))
  section.kind, section.by = "sensitivity", by
  local full = run.full:info().bytes
  for i, row in ipairs(section.rows) do
    row.label, row.saved = list[i].group or row.label, full - row.bytes
    row.kl_per_mib = row.saved > 0 and row.kl.value / (row.saved / 2 ^ 20) or nil
  end
  if all then section.all = table.remove(section.rows) end
  return section
end

---@class qlua.section_nucleus_row   both models' nuclei at one temperature and top_p
---@field label string
---@field temperature number
---@field top_p number
---@field overlap qlua.section_metric    Jaccard of the two sets
---@field control qlua.section_metric    the same of the full model with itself, without interval
---@field sizes qlua.section_metric[]    tokens in each model's nucleus, without interval
---@field masses qlua.section_metric[]   of the quantized model's nucleus in the full model's distribution,
---  and the reverse
---@field outside { n: integer, count: integer, share: number, wilson: number[] }  questions where the full
---  model's most likely token is not in the quantized model's nucleus
---@field adjusted_p number              overlap against control, by question, after Holm over all rows
---@field established boolean

---@class qlua.section_nucleus: qlua.section
---@field task string
---@field data qlua.section_data
---@field questions integer
---@field scored integer
---@field too_long integer
---@field context integer
---@field set string?
---@field rows qlua.section_nucleus_row[]  by temperature, then top_p; none where no question was scored

--- One figure of a setting over all questions; with a seed also its interval.
local function nucleus_figure(name, values, seed)
  if not seed then
    local row = stats.summary(values)
    row.name, row.value = name, row.mean
    return metric_rows({ row })[1]
  end
  return metric_rows(metrics.summary({ { name = name, values = values } }, seed))[1]
end

--- The values of one setting: lists of overlap, sizes, masses, 1 where the first choice is inside.
local function nucleus_columns(values, arm, setting)
  local columns = { {}, {}, {}, {}, {}, {} }
  for i, value in ipairs(values) do
    for c, column in ipairs(columns) do column[i] = value[arm][setting][c] end
  end
  return columns
end

local function nucleus_row(values, setting, temperature, top_p, seed)
  local pair, control = nucleus_columns(values, "pair", setting), nucleus_columns(values, "control", setting)
  local n = #values
  local count = n - math.tointeger(stats.sum(pair[6]))
  return { label = ("temperature %g, top-p %g"):format(temperature, top_p), temperature = temperature,
    top_p = top_p, overlap = nucleus_figure("overlap", pair[1], seed),
    control = nucleus_figure("overlap", control[1]),
    sizes = json.array { nucleus_figure("size", pair[2]), nucleus_figure("size", pair[3]) },
    masses = json.array { nucleus_figure("mass", pair[4], seed), nucleus_figure("mass", pair[5], seed) },
    outside = { n = n, count = count, share = count / n, wilson = json.array { stats.wilson(count, n) } } },
    { values = pair[1], control = control[1] }
end

--- How the nuclei of both models differ, for every temperature and top_p.
---@param run qlua.experiment
---@param r { task: string, questions: integer, too_long: integer, top_p: number[], temperature: number[],
---  set: string?, values: { pair: number[][], control: number[][] }[] }  values: of every question, by
---  temperature and top_p: overlap, sizes, masses, 1 where the first choice is inside
---@return qlua.section_nucleus
function document.nucleus(run, r)
  local rows, overlaps = json.array(), {}
  for t, temperature in ipairs(#r.values > 0 and r.temperature or {}) do
    for p, top_p in ipairs(r.top_p) do
      local i = (t - 1) * #r.top_p + p
      rows[i], overlaps[i] = nucleus_row(r.values, i, temperature, top_p, run.opts.seed)
    end
  end
  for i, test in ipairs(stats.against_controls(overlaps, { seed = run.opts.seed })) do
    rows[i].adjusted_p, rows[i].established = test.adjusted_p, test.established
  end
  return { kind = "nucleus", task = r.task, data = data_of(run.items), questions = r.questions,
    scored = #r.values, too_long = r.too_long, context = run.context, set = r.set, rows = rows }
end

return document
