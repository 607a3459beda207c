--- The figures of a section as plain tables, one row a figure's owner: what CSV files hold.

local _ENV <const> = require "qlua.strict"

local csv = require "qlua.csv"

local sheets = {}

---@class qlua.sheet
---@field name string
---@field headings string[]
---@field rows any[][]  nil: no such figure

--- A sheet of records: `columns` are keys, or { heading, function(record) }.
local function sheet(name, columns, records)
  local headings, rows = {}, {}
  for c, column in ipairs(columns) do headings[c] = type(column) == "table" and column[1] or column end
  for i, record in ipairs(records) do
    rows[i] = {}
    for c, column in ipairs(columns) do
      if type(column) == "table" then rows[i][c] = column[2](record) else rows[i][c] = record[column] end
    end
  end
  return { name = name, headings = headings, rows = rows }
end

--- The column `heading` = record[key][field].
local function inside(heading, key, field)
  return { heading, function(record) return record[key] and record[key][field] end }
end

local FIGURES <const> = { "name", "arm", "value", "low", "high", "n", "stderr", "rms", "min", "median", "p90",
  "p95", "p99", "p999", "max", "higher_is_better" }

--- Rows of a metrics list under what they compare, and the task where there are several.
local function add_figures(records, rows, arm, task)
  for _, row in ipairs(rows or {}) do
    local record = { arm = arm, task = task }
    for key, value in pairs(row) do record[key] = value end
    records[#records + 1] = record
  end
end

local function arms(labels)
  local first, second = labels[1], labels[2]
  return ("%s v %s"):format(first, second), ("%s v %s"):format(first, first)
end

local by_kind = {}

function by_kind.mmlu(section, labels)
  local accuracy, comparisons, figures = {}, {}, {}
  local pair, same = arms(labels)
  for _, o in ipairs(section.outcomes) do
    for _, model in ipairs(o.models) do accuracy[#accuracy + 1] = { outcome = o, model = model } end
    for _, c in ipairs { { pair, o.comparison }, { same, o.control } } do
      if c[2] then comparisons[#comparisons + 1] = { task = o.task, arm = c[1], c = c[2], f = c[2].flips } end
    end
    add_figures(figures, o.metrics, pair, o.task)
    add_figures(figures, o.control_metrics, same, o.task)
  end
  local columns = { inside("task", "outcome", "task"), inside("model", "model", "label") }
  for _, key in ipairs { "n", "correct", "accuracy" } do columns[#columns + 1] = inside(key, "model", key) end
  for i, heading in ipairs { "wilson_low", "wilson_high" } do
    columns[#columns + 1] = { heading, function(r) return r.model.wilson and r.model.wilson[i] end }
  end
  for _, key in ipairs { "stderr", "unparsed", "seconds", "prompt_tokens", "shared_tokens",
    "prefill_tokens_per_second", "words", "words_per_minute", "decode_tokens_per_second" } do
    columns[#columns + 1] = inside(key, "model", key)
  end
  columns[#columns + 1] = inside("too_long", "outcome", "too_long")
  local of_pairs = { "task", "arm" }
  for _, key in ipairs { "n", "both_right", "right_wrong", "wrong_right", "same_wrong", "other_wrong",
    "flips", "all_flips" } do
    of_pairs[#of_pairs + 1] = inside(key, "f", key)
  end
  of_pairs[#of_pairs + 1] = inside("difference", "c", "difference")
  for i, heading in ipairs { "difference_low", "difference_high" } do
    of_pairs[#of_pairs + 1] = { heading, function(r) return r.c.difference_95[i] end }
  end
  for _, key in ipairs { "mcnemar_p", "adjusted_p", "established", "questions_needed", "recovery" } do
    of_pairs[#of_pairs + 1] = inside(key, "c", key)
  end
  return { sheet("accuracy", columns, accuracy), sheet("comparison", of_pairs, comparisons),
    sheet("metrics", { "task", table.unpack(FIGURES) }, figures) }
end

function by_kind.metrics(section, labels)
  local figures, pair, same = {}, arms(labels)
  add_figures(figures, section.pair, pair)
  add_figures(figures, section.control, same)
  local list = { sheet("metrics", FIGURES, figures) }
  if section.tests then
    list[2] = sheet("tests", { "name", "difference", "low", "high", "p", "adjusted_p", "established" },
      section.tests)
  end
  return list
end

function by_kind.sweep(section)
  local columns = { "batch", "label", "tokens" }
  for _, key in ipairs { "median", "mean", "sd", "p10", "p90", "min", "max", "n" } do
    columns[#columns + 1] = inside(key == "n" and "passes" or "seconds_" .. key, "seconds", key)
  end
  for _, key in ipairs { "weights", "kv", "activations", "total", "shared", "resident" } do
    columns[#columns + 1] = inside("peak_" .. key, "peak", key)
  end
  columns[#columns + 1], columns[#columns + 2] = "reserved", "process"
  columns[#columns + 1] = inside("expected_total", "expected", "total")
  columns[#columns + 1] = "oom"
  return { sheet("points", columns, section.points) }
end

function by_kind.perplexity(section)
  local s, records = section.summary, {}
  for _, name in ipairs { "reference", "test", "ratio", "log_ratio", "kl", "delta_p", "delta_p_rms",
    "same_top" } do
    records[#records + 1] = { name = name, value = s[name].value, stderr = s[name].stderr }
  end
  if s.correlation then records[#records + 1] = { name = "correlation", value = s.correlation } end
  for _, name in ipairs { "kl", "delta_p" } do
    for _, p in ipairs(s[name .. "_percentiles"]) do
      records[#records + 1] = { name = name, share = p.share, value = p.value }
    end
  end
  return { sheet("perplexity", { "name", "share", "value", "stderr" }, records) }
end

function by_kind.variants(section)
  local columns = { "label", "bytes", "bits" }
  if section.kind == "sensitivity" then table.move({ "saved", "kl_per_mib" }, 1, 2, 4, columns) end
  for _, key in ipairs { "kl", "agreement" } do
    for _, figure in ipairs { "value", "low", "high", "n" } do
      columns[#columns + 1] = inside(key .. "_" .. figure, key, figure)
    end
  end
  for _, key in ipairs { "n", "correct", "accuracy" } do
    columns[#columns + 1] = inside(key == "n" and "questions" or key, "accuracy", key)
  end
  local rows = table.move(section.rows, 1, #section.rows, 1, {})
  rows[#rows + 1] = section.all
  return { sheet(section.kind, columns, rows) }
end

by_kind.sensitivity = by_kind.variants

function by_kind.nucleus(section)
  local columns = { "temperature", "top_p" }
  for _, figure in ipairs { "value", "low", "high", "n", "median" } do
    columns[#columns + 1] = inside("overlap_" .. figure, "overlap", figure)
  end
  columns[#columns + 1] = inside("full_v_full", "control", "value")
  columns[#columns + 1], columns[#columns + 2] = "adjusted_p", "established"
  for m, name in ipairs { "full", "quantized" } do
    for _, figure in ipairs { "mean", "median", "p90", "max" } do
      columns[#columns + 1] = { ("tokens_%s_%s"):format(name, figure), function(r)
        return r.sizes[m][figure] end }
    end
  end
  for m, name in ipairs { "mass_of_quantized_in_full", "mass_of_full_in_quantized" } do
    for _, figure in ipairs { "value", "low", "high" } do
      columns[#columns + 1] = { ("%s_%s"):format(name, figure), function(r) return r.masses[m][figure] end }
    end
  end
  columns[#columns + 1] = inside("top_outside", "outside", "count")
  return { sheet("nucleus", columns, section.rows) }
end

--- The tables of a section; none of a kind that has no figures of its own.
---@param section qlua.section
---@param labels string[]
---@return qlua.sheet[]
function sheets.of(section, labels)
  local make = by_kind[section.kind]
  return make and make(section, labels) or {}
end

--- A sheet as CSV.
---@param one qlua.sheet
---@return string
function sheets.csv(one) return csv.text(one.headings, one.rows) end

return sheets
