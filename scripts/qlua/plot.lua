--- Charts of a run's sections as bars of characters, for a terminal.
---
---   io.write(plot.section(section, { columns = 80, unicode = true, color = true }))
---
--- The full model's bars are solid and the quantized one's shaded, in blue and vermilion where colour is
--- allowed; `#` and `=` where the terminal has no Unicode. Nothing is wider than `columns`.

local _ENV <const> = require "qlua.strict"

local sys = require "qlua.sys"
local tables = require "qlua.table"
local text = require "qlua.text"

local plot = {}

---@class qlua.plot_style
---@field columns integer
---@field unicode boolean
---@field color boolean

local EIGHTHS <const> = { "▏", "▎", "▍", "▌", "▋", "▊", "▉" }
local LEAST <const> = 6   -- columns of a bar
local TASKS <const> = 12  -- whose accuracy is drawn
local COLORS <const> = { "\27[38;2;0;114;178m", "\27[38;2;213;94;0m" }

--- Whether the locale writes UTF-8, as the C library finds it: LC_ALL before LC_CTYPE before LANG.
local function is_unicode()
  for _, name in ipairs { "LC_ALL", "LC_CTYPE", "LANG" } do
    local value = os.getenv(name)
    if value and value ~= "" then return value:lower():find("utf%-?8") ~= nil end
  end
  return false
end

--- How a stream takes charts; nil where it is no terminal, which gets none.
---@param fd integer  1 or 2
---@return qlua.plot_style?
function plot.style(fd)
  if not sys.isatty(fd) then return nil end
  return { columns = math.max(40, math.min(100, sys.columns(fd) or 80)), unicode = is_unicode(),
    color = tables.bold_allowed(true) }
end

--- A bar of `share` of `width` columns; never empty for what is not 0.
local function bar(share, width, model, style)
  local eighths = math.floor(8 * width * math.max(0, math.min(1, share)) + 0.5)
  if share > 0 then eighths = math.max(1, eighths) end
  local drawn
  if not style.unicode then
    drawn = (model == 1 and "#" or "="):rep(share > 0 and math.max(1, eighths // 8) or 0)
  elseif model == 1 then
    drawn = ("█"):rep(eighths // 8) .. (EIGHTHS[eighths % 8] or "")
  else
    drawn = ("▒"):rep(share > 0 and math.max(1, (eighths + 4) // 8) or 0)
  end
  local padding = (" "):rep(width - text.width(drawn))
  return (style.color and drawn ~= "" and COLORS[model] .. drawn .. "\27[0m" or drawn) .. padding
end

local function clean(name) return (name:gsub("[\0-\31\127]", " ")) end

--- At most `width` columns of a text.
local function fitted(name, width)
  name = clean(name)
  if text.width(name) <= width then return name .. (" "):rep(width - text.width(name)) end
  local kept = ""
  for char in name:gmatch(utf8.len(name) and utf8.charpattern or ".") do
    if text.width(kept .. char) > width - 1 then break end
    kept = kept .. char
  end
  return kept .. "~" .. (" "):rep(width - 1 - text.width(kept))
end

local function trimmed(line) return (line:gsub(" +$", "")) end

--- Lines of { label, model, value, shown } under a heading, on one scale from 0 to `largest`. A row without a
--- value has no bar, one that is a label only takes the whole line, an empty one is blank.
---@param heading string
---@param rows table[]
---@param largest number
---@param style qlua.plot_style
---@return string
function plot.bars(heading, rows, largest, style)
  local label_width, shown_width = 0, 0
  for _, row in ipairs(rows) do
    if row[4] then
      label_width = math.max(label_width, text.width(clean(row[1])))
      shown_width = math.max(shown_width, text.width(row[4]))
    end
  end
  shown_width = math.min(shown_width, style.columns // 2)
  label_width = math.min(label_width, style.columns - shown_width - LEAST - 4)
  local width = style.columns - label_width - shown_width - 4
  local lines = { trimmed(fitted(heading, style.columns)) }
  for _, row in ipairs(rows) do
    if not row[1] then
      lines[#lines + 1] = ""
    elseif not row[4] then
      lines[#lines + 1] = trimmed(fitted(row[1], style.columns))
    else
      local drawn = row[3] and bar(largest > 0 and row[3] / largest or 0, width, row[2], style)
        or (" "):rep(width)
      lines[#lines + 1] = trimmed(("%s  %s  %s"):format(fitted(row[1], label_width), drawn,
        fitted(row[4], shown_width)))
    end
  end
  return table.concat(lines, "\n") .. "\n"
end

--- Points of a sweep as rows; `value` gives a figure and its text.
local function sweep_rows(section, value)
  local rows, largest, batch = {}, 0, nil
  for _, p in ipairs(section.points) do
    if batch and p.batch ~= batch then rows[#rows + 1] = {} end
    local figure, shown = value(p)
    local label = ("%s %s"):format(p.batch ~= batch and ("%4d"):format(p.batch) or "    ", p.label)
    rows[#rows + 1] = { label, p.model, figure, p.oom and "OOM" or shown }
    largest, batch = math.max(largest, figure or 0), p.batch
  end
  return rows, largest
end

local function sweep(section, style)
  local rows, largest = sweep_rows(section, function(p)
    local s = p.seconds
    if s then return s.median, ("%.4g ms"):format(1e3 * s.median) end
  end)
  local latency = plot.bars("latency by batch size, median of a pass", rows, largest, style)
  rows, largest = sweep_rows(section, function(p)
    if p.peak then return p.peak.resident, tables.bytes(p.peak.resident) end
  end)
  return latency .. "\n" .. plot.bars("peak memory by batch size", rows, largest, style)
end

local function metrics(section, style)
  local rows, control = {}, tables.by_name(section.control)
  for _, row in ipairs(section.pair) do
    if row.name:find "^jaccard@" and row.value then
      if #rows > 0 then rows[#rows + 1] = {} end
      local shown = row.low and tables.interval(row.value, row.low, row.high) or ("%.3f"):format(row.value)
      rows[#rows + 1] = { row.name, 2, row.value, shown }
      local same = control[row.name]
      if same and same.value then rows[#rows + 1] = { "  full v full", 1, same.value,
        ("%.3f"):format(same.value) } end
    end
  end
  if #rows == 0 then return "" end
  return plot.bars("Jaccard of the k most likely tokens, 0 to 1", rows, 1, style)
end

local function mmlu(section, style)
  local rows = {}
  for i = 1, math.min(#section.outcomes, TASKS) do
    local o = section.outcomes[i]
    if o.comparison then
      if #rows > 0 then rows[#rows + 1] = {} end
      rows[#rows + 1] = { o.task }
      for m, model in ipairs(o.models) do
        rows[#rows + 1] = { "  " .. model.label, m, model.accuracy, ("%.1f %% [%.1f, %.1f]"):format(
          100 * model.accuracy, 100 * model.wilson[1], 100 * model.wilson[2]) }
      end
    end
  end
  if #rows == 0 then return "" end
  if #section.outcomes > TASKS then
    rows[#rows + 1] = {}
    rows[#rows + 1] = { ("and %d tasks more"):format(#section.outcomes - TASKS) }
  end
  return plot.bars("right answers, % (guessing: 25 %)", rows, 1, style)
end

local DRAW <const> = { sweep = sweep, metrics = metrics, mmlu = mmlu }

--- The charts of a section; "" for a kind that has none.
---@param section qlua.section
---@param style qlua.plot_style
---@return string
function plot.section(section, style)
  local draw = DRAW[section.kind]
  return draw and draw(section, style) or ""
end

return plot
