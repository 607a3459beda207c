--- Two runs against each other: what differs in how they were made, then every figure that both have.
---
--- Answers to the same questions are paired by the question's text, where both runs' rows are at hand; then
--- flips, exact McNemar tests and Holm's correction over all of them are as within a run. Elsewhere an
--- interval takes the two runs for independent, which for the same questions is wider than it had to be.

local _ENV <const> = require "qlua.strict"

local document = require "qlua.document"
local facts = require "qlua.compare.facts"
local failure = require "qlua.failure"
local json = require "qlua.json"
local plural = require("qlua.text").plural
local stats = require "qlua.stats"
local tables = require "qlua.table"

local compare = {}

---@class qlua.compared_fact   something that is not the same in both runs
---@field name string
---@field a any                JSON value; nil: unknown
---@field b any
---@field spoils string?       what cannot be compared fairly because of it: "speeds", "accuracies", ...

---@class qlua.compared_figure
---@field task string?
---@field of string            what it is a figure of: a model's label, or two labels
---@field name string          "accuracy", "median seconds"
---@field a number
---@field b number
---@field change "difference"|"ratio"  b - a or b / a
---@field value number         of that
---@field low number?          95 % interval of value
---@field high number?
---@field method string?       how the interval was made
---@field comparison qlua.section_comparison?  of answers that were paired

---@class qlua.compared_section
---@field kind string
---@field figures qlua.compared_figure[]

---@class qlua.compared
---@field a { name: string, script: string, started: number, labels: string[] }
---@field b { name: string, script: string, started: number, labels: string[] }
---@field facts qlua.compared_fact[]
---@field warnings string[]
---@field sections qlua.compared_section[]

--- Adds a figure that both have.
local function add(figures, figure)
  local a, b = figure.a, figure.b
  if not (a and b) then return end
  figure.change = figure.change or "difference"
  if figure.value == nil then
    if figure.change == "ratio" and a == 0 then return end
    figure.value = figure.change == "ratio" and b / a or b - a
  end
  figures[#figures + 1] = figure
end

local INDEPENDENT <const> = "normal, the runs taken as independent"

--- b - a of two values with standard errors, taken for independent.
local function add_with_errors(figures, figure, error_a, error_b)
  if figure.a and figure.b and error_a and error_b then
    local half = stats.normal_quantile(0.975) * math.sqrt(error_a ^ 2 + error_b ^ 2)
    figure.low, figure.high = figure.b - figure.a - half, figure.b - figure.a + half
    figure.method = INDEPENDENT
  end
  add(figures, figure)
end

--- Shares of right answers that were not paired.
local function add_shares(figures, figure, a, b)
  if a.n == 0 or b.n == 0 then return end
  figure.a, figure.b = a.accuracy, b.accuracy
  figure.low, figure.high = stats.newcombe(a.correct, a.n, b.correct, b.n)
  figure.method = "Newcombe, the runs taken as independent"
  add(figures, figure)
end

--- Rows by what was asked; a question that stands in a file twice is told apart by a count.
local function by_question(rows, text_of)
  local map, seen = {}, {}
  for _, row in ipairs(rows) do
    local text = text_of(row)
    seen[text] = (seen[text] or 0) + 1
    map[("%d %s"):format(seen[text], text)] = row
  end
  return map
end

--- Rows of both runs that are about the same question, in the order of the first run.
local function pairs_of(rows_a, rows_b, text_of)
  local others, list, seen = by_question(rows_b, text_of), {}, {}
  for _, row in ipairs(rows_a) do
    local text = text_of(row)
    seen[text] = (seen[text] or 0) + 1
    local other = others[("%d %s"):format(seen[text], text)]
    if other then list[#list + 1] = { row, other } end
  end
  return list
end

local function question_and_choices(row)
  return json.encode { row.doc.question, row.doc.choices, row.doc.answer }
end

--- One model's answers of both runs to the questions that both asked; nil where there are none.
local function paired_answers(pairs_list, m)
  local a, b, gold = {}, {}, {}
  for i, pair in ipairs(pairs_list) do
    gold[i] = pair[1].doc.answer
    a[i], b[i] = pair[1].models[m].answer or false, pair[2].models[m].answer or false
  end
  return document.paired(a, b, gold)
end

local function label_of(x, y) return x == y and x or ("%s, %s"):format(x, y) end

--- Words per minute of one model in both runs, over the questions that both asked; nil where times are not
--- known by question.
local function paired_words(pairs_list, m, seed)
  local answers = { {}, {} } -- of the second run, then of the first
  for i, pair in ipairs(pairs_list) do
    answers[1][i], answers[2][i] = pair[2].models[m], pair[1].models[m]
  end
  local lists = document.by_batch(answers)
  if not lists then return nil end
  local ratio, low, high = stats.bootstrap_ratio(lists, { seed = seed })
  local function rate(words, seconds) return 60 * stats.sum(words) / stats.sum(seconds) end
  return ratio and { a = rate(lists[3], lists[4]), b = rate(lists[1], lists[2]), value = ratio, low = low,
    high = high, method = low and ("bootstrap of %d batches"):format(#lists[1]) }
end

local SPEEDS <const> = { { "words_per_minute", "words/min" },
  { "prefill_tokens_per_second", "prefill tok/s" }, { "decode_tokens_per_second", "decode tok/s" } }

local function accuracy(figures, x, y, answers, seed, m)
  local a, b = x.models[m], y.models[m]
  local figure = { task = x.task, of = label_of(a.label, b.label), name = "accuracy" }
  local comparison = answers and paired_answers(answers, m)
  if comparison then
    local n = comparison.flips.n
    figure.a, figure.b = comparison.flips.right_a / n, comparison.flips.right_b / n
    figure.value, figure.comparison = comparison.difference, comparison
    figure.low, figure.high = comparison.difference_95[1], comparison.difference_95[2]
    figure.method = ("Tango, of the %s that both have"):format(plural(n, "question"))
    add(figures, figure)
  else
    add_shares(figures, figure, a, b)
  end
  for _, speed in ipairs(SPEEDS) do
    local rate = answers and speed[1] == "words_per_minute" and a.words and paired_words(answers, m, seed)
      or { a = a[speed[1]], b = b[speed[1]] }
    rate.task, rate.of, rate.name, rate.change = x.task, figure.of, speed[2], "ratio"
    add(figures, rate)
  end
end

local function at(values, name) return values and values[name] end

--- A metric's values in both runs, for the questions that both asked.
local function paired_values(pairs_list, name)
  local a, b = {}, {}
  for _, pair in ipairs(pairs_list or {}) do
    local one, two = at(pair[1].values, name), at(pair[2].values, name)
    -- a metric may have several values a question, or none
    if type(one) == "number" and type(two) == "number" then a[#a + 1], b[#b + 1] = one, two end
  end
  return a, b
end

--- Means of metrics: over the questions that both asked where `matched` has their rows, else over all.
local function metrics_figures(figures, rows_a, rows_b, task, of, matched, seed)
  local others = tables.by_name(rows_b)
  for _, row in ipairs(rows_a) do
    local other = others[row.name]
    local a, b = paired_values(other and matched, row.name)
    if #a > 0 then
      local low, high = stats.bootstrap_difference(a, b, { seed = seed })
      add(figures, { task = task, of = of, name = row.name, a = stats.mean(a), b = stats.mean(b), low = low,
        high = high, method = low and ("paired bootstrap of the %s that both have"):format(
          plural(#a, "question")) })
    elseif other then
      add_with_errors(figures, { task = task, of = of, name = row.name, a = row.value, b = other.value },
        row.stderr, other.stderr)
    end
  end
end

local by_kind = {}

--- `rows(side, set)` gives a run's rows; side 1 or 2.
function by_kind.mmlu(x, y, context)
  local figures, others, comparisons = json.array(), {}, {}
  for _, o in ipairs(y.outcomes) do others[o.task] = o end
  for _, o in ipairs(x.outcomes) do
    local other = others[o.task]
    if other then
      local rows_a, rows_b = context.rows(1, o.set), context.rows(2, other.set)
      local answers = rows_a and rows_b and pairs_of(rows_a, rows_b, question_and_choices)
      for m = 1, 2 do accuracy(figures, o, other, answers, context.seed, m) end
      metrics_figures(figures, o.metrics, other.metrics, o.task, context.pair, answers, context.seed)
    end
  end
  for _, figure in ipairs(figures) do comparisons[#comparisons + 1] = figure.comparison end
  document.holm(comparisons)
  return figures
end

function by_kind.metrics(x, y, context)
  local figures, rows_a, rows_b = json.array(), context.rows(1, x.set), context.rows(2, y.set)
  local matched = rows_a and rows_b and pairs_of(rows_a, rows_b, function(row) return row.question end)
  metrics_figures(figures, x.pair, y.pair, x.task, context.pair, matched, context.seed)
  return figures
end

--- The ratio of two medians of seconds: passes are paired where both runs have as many, which are of the same
--- batches when data and seed are the same.
local function median_ratio(a, b, seed)
  if #a.samples ~= #b.samples or #a.samples < 2 then return nil end
  local _, low, high = stats.bootstrap_ratio({ b.samples, a.samples }, { of = "median", seed = seed })
  return low, high
end

function by_kind.sweep(x, y, context)
  local figures, others = json.array(), {}
  for _, p in ipairs(y.points) do others[("%d %d"):format(p.batch, p.model)] = p end
  for _, p in ipairs(x.points) do
    local other = others[("%d %d"):format(p.batch, p.model)]
    local of = other and label_of(p.label, other.label)
    if other and p.seconds and other.seconds then
      local low, high = median_ratio(p.seconds, other.seconds, context.seed)
      add(figures, { task = "batch " .. p.batch, of = of, name = "median seconds", a = p.seconds.median,
        b = other.seconds.median, change = "ratio", low = low, high = high,
        method = low and ("bootstrap of %d passes"):format(p.seconds.n) })
      add(figures, { task = "batch " .. p.batch, of = of, name = "peak bytes", a = p.peak.resident,
        b = other.peak.resident, change = "ratio" })
    end
  end
  return figures
end

--- The windows that both runs predicted, as one list of values a name and run; nil where rows are not at hand
--- or the text was not cut alike.
local function paired_windows(x, y, context)
  local p, q = x.protocol, y.protocol
  if not (x.sha256 and x.sha256 == y.sha256 and p.context == q.context and p.bos == q.bos) then return nil end
  local rows_a, rows_b = context.rows(1, x.set), context.rows(2, y.set)
  if not (rows_a and rows_b) then return nil end
  local a, b = {}, {}
  for w = 1, math.min(#rows_a, #rows_b) do
    for side, row in ipairs { rows_a[w], rows_b[w] } do
      local lists = side == 1 and a or b
      for name, values in pairs(row) do
        lists[name] = lists[name] or {}
        table.move(values, 1, #values, #lists[name] + 1, lists[name])
      end
    end
  end
  return #(a.reference or {}) > 1 and { a, b } or nil
end

--- Mean of b - a of the same predictions, and half its 95 % interval.
local function paired_mean(windows, name)
  local moved = {}
  for i, value in ipairs(windows[1][name]) do moved[i] = windows[2][name][i] - value end
  return stats.mean(moved), stats.normal_quantile(0.975) * stats.stderr(moved)
end

--- Perplexity of one model in both runs: of the windows that both predicted, else of all.
local function perplexity_ratio(a, b, windows, name)
  if windows then
    local log_ratio, half = paired_mean(windows, name)
    return { a = math.exp(stats.mean(windows[1][name])), b = math.exp(stats.mean(windows[2][name])),
      value = math.exp(log_ratio), low = math.exp(log_ratio - half), high = math.exp(log_ratio + half),
      method = ("normal, of the %d predictions that both made"):format(#windows[1][name]) }
  end
  -- d ln PPL = dPPL / PPL
  local half = stats.normal_quantile(0.975) * math.sqrt((a.stderr / a.value) ^ 2 + (b.stderr / b.value) ^ 2)
  local log_ratio = math.log(b.value / a.value)
  return { a = a.value, b = b.value, low = math.exp(log_ratio - half), high = math.exp(log_ratio + half),
    method = INDEPENDENT }
end

function by_kind.perplexity(x, y, context)
  local figures, a, b, windows = json.array(), x.summary, y.summary, paired_windows(x, y, context)
  for m, name in ipairs { "reference", "test" } do
    local figure = perplexity_ratio(a[name], b[name], windows, name)
    figure.of = label_of(context.labels[1][m], context.labels[2][m])
    figure.name, figure.change = "perplexity", "ratio"
    add(figures, figure)
  end
  for _, names in ipairs { { "kl", "kl" }, { "delta_p", "delta_p" }, { "same_top", "same" } } do
    local name, list = table.unpack(names)
    local figure = { of = context.pair, name = name, a = a[name].value, b = b[name].value }
    if windows then
      local value, half = paired_mean(windows, list)
      figure.a, figure.b = stats.mean(windows[1][list]), stats.mean(windows[2][list])
      figure.value, figure.low, figure.high = value, value - half, value + half
      figure.method = figures[1].method
      add(figures, figure)
    else
      add_with_errors(figures, figure, a[name].stderr, b[name].stderr)
    end
  end
  return figures
end

function by_kind.variants(x, y)
  local figures, others = json.array(), {}
  for _, row in ipairs(y.rows) do others[row.label] = row end
  for _, row in ipairs(x.rows) do
    local other = others[row.label]
    if other then
      add(figures, { of = row.label, name = "bytes", a = row.bytes, b = other.bytes, change = "ratio" })
      for _, key in ipairs { "kl", "agreement" } do
        metrics_figures(figures, { row[key] }, { other[key] }, nil, row.label)
      end
      add_shares(figures, { of = row.label, name = "accuracy" }, row.accuracy, other.accuracy)
    end
  end
  return figures
end

function by_kind.sensitivity(x, y, context)
  local figures = by_kind.variants(x, y, context)
  if not (x.all and y.all) then return figures end
  local whole = by_kind.variants({ rows = { x.all } }, { rows = { y.all } }, context)
  return table.move(whole, 1, #whole, #figures + 1, figures)
end

function by_kind.nucleus(x, y, context)
  local figures, place = json.array(), {}
  local rows_a, rows_b = context.rows(1, x.set), context.rows(2, y.set)
  local matched = rows_a and rows_b and pairs_of(rows_a, rows_b, function(row) return row.question end)
  for j, row in ipairs(y.rows) do place[row.label] = j end
  for i, row in ipairs(x.rows) do
    local j, values = place[row.label], nil
    if j and matched then
      values = {}
      for k, pair in ipairs(matched) do
        values[k] = { { values = { overlap = pair[1].pair[i][1] } },
          { values = { overlap = pair[2].pair[j][1] } } }
      end
    end
    if j then
      metrics_figures(figures, { row.overlap }, { y.rows[j].overlap }, row.label, context.pair, values,
        context.seed)
    end
  end
  return figures
end

--- The section of `b` that answers to one of `a`: of its kind and task, else the only one of its kind.
local function counterpart(section, list)
  local only, count
  for _, other in ipairs(list) do
    if other.kind == section.kind then
      if other.task == section.task and other.text == section.text then return other end
      only, count = other, (count or 0) + 1
    end
  end
  return count == 1 and only or nil
end

local function described(found)
  local doc = found.document
  return { name = found.name, script = doc.name, started = doc.started, labels = doc.labels }
end

--- Warns of sections that both runs took from the same rows of one store: there is nothing to compare then.
local function warn_of_shared_rows(result, a, b, x, y)
  if not (a.store and b.store and a.store:path() == b.store:path()) then return end
  local others = {}
  for _, part in ipairs(y.outcomes or { y }) do if part.set then others[part.set] = true end end
  for _, part in ipairs(x.outcomes or { x }) do
    if others[part.set or false] then
      table.insert(result.warnings, ("%s: the runs share rows of the store; with another "
        .. "--output_path they are computed anew"):format(part.task or x.kind))
    end
  end
end

--- Compares two runs.
---@param a qlua.found_run
---@param b qlua.found_run
---@return qlua.compared?, qlua.failure?
function compare.runs(a, b)
  local sides, first, second = { a, b }, a.document, b.document
  local result = { a = described(a), b = described(b), facts = facts.differing(first, second),
    sections = json.array() }
  result.warnings = facts.warnings(sides, result.facts)
  local unread
  local context = { labels = { first.labels, second.labels }, seed = math.tointeger(first.facts.seed) or 1,
    pair = label_of(table.concat(first.labels, " v "), table.concat(second.labels, " v ")),
    rows = function(side, set)
      local rows, err = sides[side]:rows(set)
      unread = unread or err
      return rows
    end }
  for _, section in ipairs(first.sections) do
    local other = by_kind[section.kind] and counterpart(section, second.sections)
    local figures = other and by_kind[section.kind](section, other, context)
    if figures and #figures > 0 then
      warn_of_shared_rows(result, a, b, section, other)
      result.sections[#result.sections + 1] = { kind = section.kind, figures = figures }
    end
  end
  if unread then return nil, unread end
  if #result.sections == 0 then
    return nil, failure("argument", ("%s (%s) and %s (%s) have no figure in common"):format(a.name,
      first.name, b.name, second.name), "two runs of one script on the same tasks have")
  end
  return result
end

return compare
