--- Text tables for people: aligned columns on a terminal, or Markdown.
---
---   local t = table.new { "model", { "acc", align = "right", format = "%.3f" }, { "memory", unit = "GiB" } }
---   t:add("full", 0.5696, 14.96)
---   io.write(t:text())

local _ENV <const> = require "qlua.strict"

local text = require "qlua.text"

local grid = {}
grid.__index = grid

---@class qlua.column
---@field [1] string            heading
---@field align? "left"|"right" default: right when every cell is a number, else left
---@field format? string        for numbers, as string.format takes it
---@field unit? string          put behind the heading in parentheses

---@class qlua.table
---@field columns qlua.column[]
---@field rows (string[]|false)[]  false is a rule between rows

---@param columns (string|qlua.column)[]
---@return qlua.table
local function new(columns)
  local self = setmetatable({ columns = {}, rows = {}, numeric = {} }, grid)
  for i, column in ipairs(columns) do
    self.columns[i] = type(column) == "string" and { column } or column
    self.numeric[i] = true
  end
  return self
end

local function cell_text(value, column)
  if value == nil then return "-" end
  if type(value) == "number" then
    if value ~= value then return "-" end
    if column.format then return column.format:format(value) end
    if math.type(value) == "float" then return ("%.4g"):format(value) end
  end
  -- A line break or a control character in a cell would break the grid, or the terminal.
  return (tostring(value):gsub("[\0-\31\127]", " "))
end

--- Adds a row; nil cells show as "-". Returns the table.
function grid:add(...)
  local row = {}
  for i, column in ipairs(self.columns) do
    local value = (select(i, ...))
    row[i] = cell_text(value, column)
    if value ~= nil and type(value) ~= "number" then self.numeric[i] = false end
  end
  if select("#", ...) > #self.columns then error("more cells than columns", 2) end
  self.rows[#self.rows + 1] = row
  return self
end

--- Adds a rule between the rows before and after it.
function grid:rule()
  self.rows[#self.rows + 1] = false
  return self
end

function grid:headings()
  local headings = {}
  for i, column in ipairs(self.columns) do
    headings[i] = column.unit and ("%s (%s)"):format(column[1], column.unit) or column[1]
  end
  return headings
end

function grid:aligned_right(i)
  local align = self.columns[i].align
  if align then return align == "right" end
  return self.numeric[i] and #self.rows > 0
end

local function measure(self, escape)
  local widths = {}
  for i, heading in ipairs(self:headings()) do widths[i] = text.width(escape(heading)) end
  for _, row in ipairs(self.rows) do
    for i, cell in ipairs(row or {}) do widths[i] = math.max(widths[i], text.width(escape(cell))) end
  end
  return widths
end

local function line(self, cells, widths, between, escape)
  local parts = {}
  for i, cell in ipairs(cells) do
    local shown = escape(cell)
    local padding = (" "):rep(widths[i] - text.width(shown))
    parts[i] = self:aligned_right(i) and padding .. shown or shown .. padding
  end
  return table.concat(parts, between)
end

local function same(cell) return cell end

local function escape_markdown(cell) return (cell:gsub("|", "\\|")) end

---@class qlua.table_style
---@field bold boolean? headings in bold, by terminal codes; see table.bold_allowed

--- The table as aligned lines, two blanks between columns, no blanks at line ends.
---@param style? qlua.table_style
---@return string
function grid:text(style)
  local widths, lines = measure(self, same), {}
  local rule = {}
  for i, width in ipairs(widths) do rule[i] = ("-"):rep(width) end
  local heading = text.rstrip(line(self, self:headings(), widths, "  ", same))
  lines[1] = style and style.bold and ("\27[1m%s\27[0m"):format(heading) or heading
  lines[2] = table.concat(rule, "  ")
  for _, row in ipairs(self.rows) do
    lines[#lines + 1] = row and text.rstrip(line(self, row, widths, "  ", same)) or lines[2]
  end
  return table.concat(lines, "\n") .. "\n"
end

--- The table in Markdown, aligned as well so that it reads as plain text.
---@return string
function grid:markdown()
  local widths, lines, rule = measure(self, escape_markdown), {}, {}
  for i in ipairs(self.columns) do
    widths[i] = math.max(3, widths[i])
    rule[i] = self:aligned_right(i) and ("-"):rep(widths[i] - 1) .. ":" or ("-"):rep(widths[i])
  end
  lines[1] = "| " .. line(self, self:headings(), widths, " | ", escape_markdown) .. " |"
  lines[2] = "| " .. table.concat(rule, " | ") .. " |"
  for _, row in ipairs(self.rows) do
    if row then lines[#lines + 1] = "| " .. line(self, row, widths, " | ", escape_markdown) .. " |" end
  end
  return table.concat(lines, "\n") .. "\n"
end

--- Whether headings may be bold on a stream: a terminal, and NO_COLOR (no-color.org) unset or empty.
---@param is_terminal boolean
---@return boolean
local function bold_allowed(is_terminal)
  local no_color = os.getenv "NO_COLOR"
  return is_terminal and (no_color == nil or no_color == "") and os.getenv "TERM" ~= "dumb"
end

--- A number of bytes with its unit, binary: 1536 -> "1.5 KiB".
---@param n number
---@return string
local function bytes(n)
  local units, i = { "B", "KiB", "MiB", "GiB", "TiB" }, 1
  while n >= 1024 and i < #units do n, i = n / 1024, i + 1 end
  return (i == 1 and "%d %s" or "%.1f %s"):format(i == 1 and math.floor(n) or n, units[i])
end

--- A share with its interval: "0.570 [0.459, 0.674]".
---@param value number
---@param low number
---@param high number
---@param format? string default "%.3f"
---@return string
local function interval(value, low, high, format)
  format = format or "%.3f"
  return (format .. " [" .. format .. ", " .. format .. "]"):format(value, low, high)
end

--- Rows by their field `name`.
---@param rows { name: string }[]?
---@return table<string, table>
local function by_name(rows)
  local map = {}
  for _, row in ipairs(rows or {}) do map[row.name] = row end
  return map
end

return { new = new, bold_allowed = bold_allowed, by_name = by_name, bytes = bytes, interval = interval }
