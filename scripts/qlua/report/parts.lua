--- What the sections of the page are made of: figures with a picture and its data table, numbers that keep
--- their full precision beside what is shown.

local _ENV <const> = require "qlua.strict"

local markup = require "qlua.report.markup"
local tables = require "qlua.table"

local h <const> = markup.tags

local parts = {}

--- A number as it is shown, its exact value in data-value. nil shows as a dash.
---@param value number?
---@param text? string  default: the number
---@return table  cell of parts.grid
function parts.cell(value, text)
  if value == nil then return { text = "–" } end
  return { value = value, text = text or markup.number(value) }
end

--- A figure with its interval: "0.570 [0.459, 0.674]".
function parts.bounded(value, low, high, format)
  if value == nil then return parts.cell(nil) end
  if not low then return parts.cell(value, format:format(value)) end
  return { value = value, low = low, high = high, text = tables.interval(value, low, high, format) }
end

--- A number inside running text, with its key for whoever reads the page by program.
function parts.figure(key, value, text)
  return h.span { class = "num", ["data-key"] = key, ["data-value"] = value, text }
end

local function cell(given)
  if type(given) ~= "table" then return h.td { given or "–" } end
  if given.value == nil then return h.td { class = given.class or "n", given.text } end
  return h.td { class = "n", ["data-value"] = given.value, ["data-low"] = given.low,
    ["data-high"] = given.high, given.text }
end

local function says_nothing(given)
  return given == nil or given == "–" or type(given) == "table" and given.value == nil and given.text == "–"
end

local function without_empty(columns, rows)
  local kept, names, shorter = {}, {}, {}
  for j, name in ipairs(columns) do
    local says = #rows == 0
    for _, row in ipairs(rows) do says = says or not says_nothing(row[j]) end
    if says then kept[#kept + 1], names[#names + 1] = j, name end
  end
  for i, row in ipairs(rows) do
    shorter[i] = { key = row.key }
    for to, j in ipairs(kept) do shorter[i][to] = row[j] end
  end
  return names, shorter
end

--- A table that scrolls by itself where the window is narrow.
---@param label string     what it is, for a screen reader
---@param columns string[]
---@param rows table[]     { key = text, cells... }: strings, or what parts.cell makes; the first is the
---   heading
---  Columns that say nothing in any row are left out.
function parts.grid(label, columns, rows)
  columns, rows = without_empty(columns, rows)
  local head, body = {}, {}
  for i, name in ipairs(columns) do head[i] = h.th { scope = "col", class = i > 1 and "n" or nil, name } end
  for i, row in ipairs(rows) do
    local cells = { h.th { scope = "row", row[1] } }
    for j = 2, #columns do cells[j] = cell(row[j]) end
    body[i] = h.tr { ["data-key"] = row.key, cells }
  end
  return h.div { class = "scroll", tabindex = "0", role = "region", ["aria-label"] = label,
    h.table { h.thead { h.tr { head } }, h.tbody { body } } }
end

--- A figure: heading, one sentence that says how to read it, the picture, notes, and the numbers behind it:
--- folded under the picture, or with `beside` in sight.
---@param f { id: string, title: string, lead: string, picture: any, notes: any[]?, table: any, wide:
---   boolean?,
---  beside: boolean? }
function parts.chart(f)
  local notes = {}
  for i, note in ipairs(f.notes or {}) do notes[i] = h.p { class = "note", note } end
  local caption = h.figcaption { h.h3 { f.title }, h.p { f.lead } }
  if f.beside then
    return h.figure { class = "chart wide", id = f.id, caption, h.div { class = "side", f.picture,
      h.div { f.table, notes } } }
  end
  return h.figure { class = f.wide and "chart wide" or "chart", id = f.id, caption, f.picture, notes,
    f.table and h.details { class = "data", h.summary { "Numbers", h.span { class = "vh", " of "
      .. f.title } },
      f.table } }
end

parts.plural = require("qlua.text").plural

--- Seconds in the unit that suits `largest` of an axis or a table.
---@param largest number
---@return number scale, string unit
function parts.seconds_unit(largest)
  if largest >= 1 then return 1, "s" end
  if largest >= 1e-3 then return 1e3, "ms" end
  return 1e6, "µs"
end

--- Bytes likewise.
function parts.bytes_unit(largest)
  local units, scale, i = { "B", "KiB", "MiB", "GiB", "TiB" }, 1, 1
  while largest >= 1024 * scale and i < #units do scale, i = scale * 1024, i + 1 end
  return 1 / scale, units[i]
end

--- A number with about three digits, as an axis or a table shows it.
function parts.short(x)
  local size = math.abs(x)
  if size == 0 then return "0" end
  if size < 1e-4 or size >= 1e6 then return ("%.2e"):format(x) end
  if size >= 100 then return ("%.0f"):format(x) end
  if size >= 10 then return ("%.1f"):format(x) end
  return (("%.4f"):format(x):gsub("(%.%d%d)0+$", "%1"))
end

--- Three digits, for the labels of bars.
function parts.brief(x)
  if x >= 100 then return ("%.0f"):format(x) end
  return (x >= 10 and "%.1f" or "%.2f"):format(x)
end

--- A tick's number: no zeros that say nothing.
function parts.tick(x)
  if math.abs(x) < 1e-12 then return "0" end
  return (("%.6g"):format(x))
end

return parts
