--- The comparison of two runs (see qlua.compare) as tables for people, and as CSV.

local _ENV <const> = require "qlua.strict"

local csv = require "qlua.csv"
local json = require "qlua.json"
local tables = require "qlua.table"

local text = {}

local WIDEST <const> = 48 -- characters of a fact in the table

local function cell(value)
  if value == nil or value == json.null then return "-" end
  local whole = type(value) == "string" and value or json.encode(value)
  if whole:find "^%x+$" and #whole == 64 then return whole:sub(1, 12) end -- a digest
  return (utf8.len(whole) or 0) > WIDEST and whole:sub(1, utf8.offset(whole, WIDEST) - 1) .. "..." or whole
end

local function facts_table(result)
  local t = tables.new { "what differs", { "A", align = "left" }, { "B", align = "left" } }
  for _, fact in ipairs(result.facts) do t:add(fact.name, cell(fact.a), cell(fact.b)) end
  return t
end

--- Four digits that count, whole numbers whole.
local function shown(value)
  if math.abs(value) >= 1e4 or value == math.floor(value) then return ("%.0f"):format(value) end
  return ("%.4g"):format(value)
end

local function change_text(figure)
  local ratio = figure.change == "ratio"
  local small = figure.value ~= 0 and math.abs(figure.value) < 0.001
  local format = ratio and "%.3f" or small and "%+.2e" or "%+.4f"
  if not figure.low then return (ratio and "x " or "") .. format:format(figure.value) end
  return (ratio and "x " or "") .. tables.interval(figure.value, figure.low, figure.high, format)
end

local function figures_table(section)
  local t = tables.new { "task", "of", "figure", { "A", align = "right" }, { "B", align = "right" },
    { "B - A, or x B / A [95 %]", align = "right" } }
  local task, of
  for _, figure in ipairs(section.figures) do
    local new = figure.task ~= task
    t:add(new and (figure.task or "") or "", (new or figure.of ~= of) and figure.of or "", figure.name,
      shown(figure.a), shown(figure.b), change_text(figure))
    task, of = figure.task, figure.of
  end
  return t
end

local function named_run(letter, run)
  return ("%s  %s: %s of %s UTC, %s\n"):format(letter, run.name, run.script,
    os.date("!%Y-%m-%d %H:%M", math.floor(run.started)), table.concat(run.labels or {}, " v "))
end

--- How the intervals of a section were made, and what its paired answers say.
local function notes_of(section)
  local lines, seen = {}, {}
  for _, figure in ipairs(section.figures) do
    local c = figure.comparison
    if c then
      lines[#lines + 1] = ("%s, %s, B against A: %s; flips %d to wrong, %d to right of %d.\n"):format(
        figure.task, figure.of, c.sentence, c.flips.right_wrong, c.flips.wrong_right, c.flips.n)
    end
    local method = figure.method
    if method and not seen[method] then seen[#seen + 1], seen[method] = method, true end
  end
  if #seen > 0 then lines[#lines + 1] = ("intervals: %s\n"):format(table.concat(seen, "; ")) end
  return table.concat(lines)
end

--- The comparison for people.
---@param result qlua.compared
---@param options? { markdown: boolean?, colour: boolean? }
---@return string
function text.text(result, options)
  options = options or {}
  local parts = { named_run("A", result.a), named_run("B", result.b), "\n" }
  local function say(part) parts[#parts + 1] = part end
  local function put(t) say(options.markdown and t:markdown() or t:text { bold = options.colour }) end
  if #result.facts > 0 then put(facts_table(result)) else say "the two runs were made alike\n" end
  for i, warning in ipairs(result.warnings) do
    local line = ("%swarning: %s\n"):format(i == 1 and "\n" or "", warning)
    say(options.colour and "\27[33m" .. line .. "\27[0m" or line)
  end
  for _, section in ipairs(result.sections) do
    say "\n"
    put(figures_table(section))
    say("\n" .. notes_of(section))
  end
  return table.concat(parts)
end

--- The figures as CSV, the facts before them in the same columns.
---@param result qlua.compared
---@return string
function text.csv(result)
  local rows = {}
  for _, fact in ipairs(result.facts) do
    local a, b = fact.a, fact.b
    rows[#rows + 1] = { "fact", nil, nil, fact.name, type(a) == "table" and json.encode(a) or a,
      type(b) == "table" and json.encode(b) or b }
  end
  for _, section in ipairs(result.sections) do
    for _, f in ipairs(section.figures) do
      local c = f.comparison or {}
      rows[#rows + 1] = { section.kind, f.task, f.of, f.name, f.a, f.b, f.change, f.value, f.low, f.high,
        f.method, c.mcnemar_p, c.adjusted_p, c.established }
    end
  end
  return csv.text({ "section", "task", "of", "name", "a", "b", "change", "value", "low", "high", "method",
    "mcnemar_p", "adjusted_p", "established" }, rows)
end

return text
