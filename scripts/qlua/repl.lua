--- What the prompt shows for a value: tables opened, with bounds on depth, entries and width; tensors with
--- shape, type and their corner; everything else as tostring and string quoting give it.

local _ENV <const> = require "qlua.strict"

local repl = {}

local WIDTH <const> = 100 -- a table that fits in this many columns stays on one line
local DEPTH <const> = 4
local ENTRIES <const> = 40 -- of one table
local TENSOR_ROWS <const> = 6
local TENSOR_COLUMNS <const> = 8

local RESERVED <const> = {}
for word in ([[and break do else elseif end false for function goto if in local nil not or repeat return then
  true until while]]):gmatch("%a+") do
  RESERVED[word] = true
end

local ESCAPES <const> = { ["\n"] = "\\n", ["\t"] = "\\t", ["\r"] = "\\r", ['"'] = '\\"', ["\\"] = "\\\\" }

--- A string as Lua source on one line. Valid UTF-8 stays as it is, so that text remains readable.
local function quote(s)
  local escaped = s:gsub('[%c"\\\127]', function(c) return ESCAPES[c] or ("\\x%02X"):format(c:byte()) end)
  if not utf8.len(escaped) then
    escaped = escaped:gsub("[\128-\255]", function(c) return ("\\x%02X"):format(c:byte()) end)
  end
  return '"' .. escaped .. '"'
end

local function key_order(a, b)
  local ta, tb = type(a), type(b)
  if ta ~= tb then return ta < tb end -- numbers before strings
  if ta == "number" or ta == "string" then return a < b end
  return tostring(a) < tostring(b)
end

local function format_key(key)
  if type(key) == "string" and key:find("^[%a_][%w_]*$") and not RESERVED[key] then return key end
  return "[" .. (type(key) == "string" and quote(key) or tostring(key)) .. "]"
end

local function has_metamethod(value, name)
  local meta = debug.getmetatable(value)
  return type(meta) == "table" and rawget(meta, name) ~= nil
end

local format_value

--- The entries of a table as texts, list part first, and how many were left out.
local function format_entries(t, depth, seen)
  local texts = {}
  local length = rawlen(t)
  for i = 1, length do
    if i > ENTRIES then break end
    texts[i] = format_value(rawget(t, i), depth, seen)
  end
  local left_out = math.max(0, length - ENTRIES)
  local keys = {}
  for key in next, t do
    if not (math.type(key) == "integer" and key >= 1 and key <= length) then keys[#keys + 1] = key end
  end
  table.sort(keys, key_order)
  for _, key in ipairs(keys) do
    if #texts >= ENTRIES then
      left_out = left_out + 1
    else
      texts[#texts + 1] = format_key(key) .. " = " .. format_value(rawget(t, key), depth, seen)
    end
  end
  return texts, left_out
end

local function format_table(t, depth, seen)
  if seen[t] then return "<above>" end
  if next(t) == nil then return "{}" end
  if depth >= DEPTH then return "{...}" end
  seen[t] = true
  local texts, left_out = format_entries(t, depth + 1, seen)
  seen[t] = nil
  if left_out > 0 then texts[#texts + 1] = ("... %d more"):format(left_out) end

  local line = "{ " .. table.concat(texts, ", ") .. " }"
  local indent = ("  "):rep(depth)
  if #line + #indent <= WIDTH and not line:find("\n", 1, true) then return line end
  return "{\n" .. indent .. "  " .. table.concat(texts, ",\n" .. indent .. "  ") .. "\n" .. indent .. "}"
end

local function format_number(x)
  if math.type(x) == "integer" then return tostring(x) end
  return ("%.5g"):format(x)
end

--- Something with a tensor's methods: its shape and type, and of vectors and matrices the first numbers.
local function format_tensor(tensor)
  local shape = tensor:shape()
  local title = ("tensor [%s] %s"):format(table.concat(shape, ", "), tensor:dtype())
  if #shape == 0 or #shape > 2 then return title end
  local rows, columns = #shape == 2 and shape[1] or 1, shape[#shape]
  local lines = { title }
  for i = 1, math.min(rows, TENSOR_ROWS) do
    local cells = {}
    for j = 1, math.min(columns, TENSOR_COLUMNS) do
      local value = #shape == 2 and tensor:get(i, j) or tensor:get(j)
      cells[j] = ("%11s"):format(format_number(value))
    end
    if columns > TENSOR_COLUMNS then cells[#cells + 1] = " ..." end
    lines[#lines + 1] = table.concat(cells)
  end
  if rows > TENSOR_ROWS then lines[#lines + 1] = "        ..." end
  return table.concat(lines, "\n")
end

local function is_tensor(value)
  local ok, yes = pcall(function() return value.shape and value.dtype and value.get and true end)
  return ok and yes
end

function format_value(value, depth, seen)
  local kind = type(value)
  if kind == "string" then return quote(value) end
  if kind == "userdata" and depth == 0 and is_tensor(value) then
    local ok, text = pcall(format_tensor, value)
    return ok and text or tostring(value)
  end
  if kind == "table" and not has_metamethod(value, "__tostring") and not has_metamethod(value, "__name") then
    return format_table(value, depth, seen)
  end
  return tostring(value)
end

--- One value as the prompt shows it.
---@param value any
---@return string
function repl.format(value)
  return format_value(value, 0, {})
end

--- Print values as the prompt does: texts as they are, everything else formatted; tables and tensors on lines
--- of their own when they need several.
---@param ... any
function repl.show(...)
  local texts = table.pack(...)
  local separator = "\t"
  for i = 1, texts.n do
    local value = texts[i]
    texts[i] = type(value) == "string" and value or repl.format(value)
    if type(value) ~= "string" and texts[i]:find("\n", 1, true) then separator = "\n" end
  end
  io.stdout:write(table.concat(texts, separator, 1, texts.n), "\n")
end

return repl
