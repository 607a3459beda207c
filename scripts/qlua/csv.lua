--- Tables for spreadsheets and scripts: RFC 4180, UTF-8, CRLF, headings first, numbers with all their digits.

local _ENV <const> = require "qlua.strict"

local json = require "qlua.json"

local csv = {}

local function cell(value)
  if value == nil or value == json.null then return "" end
  -- the fewest digits that read back the same
  if type(value) == "number" then return json.encode(value) end
  local text = tostring(value)
  if text:find '[",\r\n]' or text:find "^%s" or text:find "%s$" then
    return '"' .. text:gsub('"', '""') .. '"'
  end
  return text
end

local function record(cells, columns)
  local parts = {}
  for i = 1, columns do parts[i] = cell(cells[i]) end
  return table.concat(parts, ",") .. "\r\n"
end

--- A table as CSV. nil and json.null are empty cells.
---@param headings string[]
---@param rows any[][]
---@return string
function csv.text(headings, rows)
  local lines = { record(headings, #headings) }
  for i, row in ipairs(rows) do lines[i + 1] = record(row, #headings) end
  return table.concat(lines)
end

return csv
