--- Python's values as a Jinja template sees them, in Lua.
---
--- Text is a Lua string (UTF-8), numbers and booleans are Lua's; None, undefined names, lists and mappings
--- are made here. A mapping keeps the order of its keys. One built from a plain Lua table of several keys has
--- no order: it answers look-ups, but whatever depends on the order (loops, items, tojson, printing) is an
--- error that says so.

local _ENV <const> = require "qlua.strict"

local failure = require "qlua.failure"
local json = require "qlua.json"

local value = {}

local none_meta = { __name = "None", __tostring = function() return "None" end }
local undefined_meta = { __name = "Undefined" }
local list_meta = { __name = "list" }
local dict_meta = { __name = "dict" }
local range_limit <const> = 100000 -- as Jinja2's sandbox
local size_limit <const> = 64 * 1024 * 1024

value.none = setmetatable({}, none_meta)
value.range_limit, value.size_limit = range_limit, size_limit

--- Raises a failure; the evaluator adds the template's line.
---@param code string
---@param message string
function value.fail(code, message, ...)
  if select("#", ...) > 0 then message = message:format(...) end
  error(failure(code, message), 0)
end

local fail = value.fail

---@param message string what Jinja2 says when the value is used
function value.undefined(message) return setmetatable({ message = message }, undefined_meta) end

---@param items any[]
---@param is_tuple? boolean
function value.list(items, is_tuple) return setmetatable({ items = items, tuple = is_tuple }, list_meta) end

function value.dict() return setmetatable({ keys = {}, map = {} }, dict_meta) end

function value.is_undefined(v) return getmetatable(v) == undefined_meta end
function value.is_list(v) return getmetatable(v) == list_meta end
function value.is_dict(v) return getmetatable(v) == dict_meta end

--- Python's hash equality: True, 1 and 1.0 are one key. Lua already joins 1 and 1.0.
local function key_of(key)
  if type(key) == "boolean" then return key and 1 or 0 end
  if type(key) == "string" or type(key) == "number" or key == value.none then return key end
  return fail("unsupported", "a %s as a mapping's key is not supported", value.type_name(key))
end

function value.set(dict, key, v)
  local hash = key_of(key)
  if dict.map[hash] == nil then dict.keys[#dict.keys + 1] = key end
  dict.map[hash] = v
end

function value.get(dict, key) return dict.map[key_of(key)] end

--- The keys in order; an error where there is none.
function value.keys(dict)
  if dict.unordered then
    fail("argument", "the order of a mapping's keys (%s, ...) matters here, and a Lua table has none; "
      .. "build it with jinja.dict{{key, value}, ...} or json.decode(text, {order=true})",
      tostring(dict.keys[1]))
  end
  return dict.keys
end

local function is_sequence(t)
  local n = 0
  for key in pairs(t) do
    if math.type(key) ~= "integer" then return false end
    n = n + 1
  end
  return n == #t
end

--- The keys of a Lua table in the order to keep: the one that json.decode{order=true} remembered, with at
--- most one key added since. Without it they are sorted, and it counts as no order.
local function keys_of(v)
  local order, listed, keys, rest = (getmetatable(v) or {}).__jsonorder or {}, {}, {}, {}
  for _, key in ipairs(order) do
    if v[key] ~= nil then keys[#keys + 1], listed[key] = key, true end
  end
  for key in pairs(v) do
    if type(key) ~= "string" then fail("argument", "a table given to the template mixes list and mapping") end
    if not listed[key] then rest[#rest + 1] = key end
  end
  table.sort(rest)
  return table.move(rest, 1, #rest, #keys + 1, keys), #rest > 1
end

--- What a Lua value is to a template. nil becomes None. An empty table is a mapping unless json.array marked
--- it, as in json.encode.
function value.from_lua(v, depth)
  depth = depth or 0
  if depth > 64 then fail("argument", "a value is nested more than 64 deep") end
  local kind = type(v)
  if v == nil then return value.none end
  if kind == "string" then
    if not utf8.len(v) then fail("argument", "a text given to the template is not valid UTF-8") end
    return v
  end
  if kind == "number" or kind == "boolean" or kind == "function" then return v end
  local meta = kind == "table" and getmetatable(v)
  if meta == none_meta or meta == undefined_meta or meta == list_meta or meta == dict_meta then return v end
  if v == json.null then return value.none end
  if kind ~= "table" then return fail("argument", "a %s cannot be given to a template", kind) end
  if is_sequence(v) and (v[1] ~= nil or json.is_array(v)) then
    local items = {}
    for i, item in ipairs(v) do items[i] = value.from_lua(item, depth + 1) end
    return value.list(items)
  end
  local dict = value.dict()
  local keys, unordered = keys_of(v)
  for _, key in ipairs(keys) do value.set(dict, key, value.from_lua(v[key], depth + 1)) end
  dict.unordered = unordered or nil
  return dict
end

--- Python's name of a value's type.
function value.type_name(v)
  local kind = math.type(v)
  if kind then return kind == "integer" and "int" or "float" end
  kind = type(v)
  if kind == "string" then return "str" end
  if kind == "boolean" then return "bool" end
  if kind == "function" then return "function" end
  if v == value.none then return "NoneType" end
  if v.tuple then return "tuple" end
  if v.lazy then return "generator" end
  if v.namespace then return "Namespace" end
  return getmetatable(v).__name
end

--- What Jinja2 calls a value in messages about its attributes.
function value.described(v)
  if v == value.none then return "None" end
  return value.type_name(v) .. " object"
end

--- Uses an undefined value: always an error, with Jinja2's words.
function value.use(v)
  if getmetatable(v) == undefined_meta then fail("argument", "%s", v.message) end
  return v
end

function value.truthy(v)
  if v == false or v == 0 or v == "" or v == value.none then return false end
  local meta = type(v) == "table" and getmetatable(v)
  if meta == undefined_meta then return false end
  if meta == list_meta then return v.lazy == true or #v.items > 0 end
  if meta == dict_meta then return v.namespace == true or #v.keys > 0 end
  return true
end

local function number_of(v)
  if type(v) == "boolean" then return v and 1 or 0 end
  return type(v) == "number" and v or nil
end

value.number_of = number_of

function value.equal(a, b)
  local x, y = number_of(a), number_of(b)
  if x and y then return x == y end
  local meta = type(a) == "table" and getmetatable(a)
  if not meta or type(b) ~= "table" or meta ~= getmetatable(b) then return a == b end
  if meta == undefined_meta then return true end
  if meta == list_meta then
    if #a.items ~= #b.items or a.tuple ~= b.tuple then return false end
    for i, item in ipairs(a.items) do
      if not value.equal(item, b.items[i]) then return false end
    end
    return true
  elseif meta == dict_meta and not a.namespace then
    if #a.keys ~= #b.keys then return false end
    for key, item in pairs(a.map) do
      local other = b.map[key]
      if other == nil or not value.equal(item, other) then return false end
    end
    return true
  end
  return a == b
end

--- a < b for numbers and texts; Python orders text by code point, which is the order of UTF-8's bytes.
function value.less(a, b)
  value.use(a)
  value.use(b)
  local x, y = number_of(a), number_of(b)
  if x and y then return x < y end
  if type(a) == "string" and type(b) == "string" then
    for i = 1, math.min(#a, #b) do
      local p, q = a:byte(i), b:byte(i)
      if p ~= q then return p < q end
    end
    return #a < #b
  end
  if value.is_list(a) and value.is_list(b) then fail("unsupported", "ordering of lists is not supported") end
  return fail("argument", "'<' not supported between instances of '%s' and '%s'", value.type_name(a),
    value.type_name(b))
end

--- The items that a loop goes over.
function value.iterate(v)
  if type(v) == "string" then
    local chars = {}
    for _, code in utf8.codes(v) do chars[#chars + 1] = utf8.char(code) end
    return chars
  end
  if value.is_undefined(v) then return {} end
  if value.is_list(v) then return v.items end
  if value.is_dict(v) and not v.namespace then return value.keys(v) end
  return fail("argument", "'%s' object is not iterable", value.type_name(v))
end

function value.length(v)
  if type(v) == "string" then return utf8.len(v) end
  if value.is_undefined(v) then return 0 end
  if value.is_list(v) and not v.lazy then return #v.items end
  if value.is_dict(v) and not v.namespace then return #v.keys end
  return fail("argument", "object of type '%s' has no len()", value.type_name(v))
end

--- `needle in haystack`
function value.contains(haystack, needle)
  if type(haystack) == "string" then
    if type(needle) ~= "string" then
      value.use(needle)
      fail("argument", "'in <string>' requires string as left operand, not %s", value.type_name(needle))
    end
    return haystack:find(needle, 1, true) ~= nil
  end
  if value.is_dict(haystack) and not haystack.namespace then return value.get(haystack, needle) ~= nil end
  for _, item in ipairs(value.iterate(haystack)) do
    if value.equal(item, needle) then return true end
  end
  return false
end

--- Python's repr of a float: the shortest digits that read back as the same number.
local function float_text(x)
  if x ~= x then return "nan" end
  if x == math.huge then return "inf" end
  if x == -math.huge then return "-inf" end
  local digits
  for precision = 1, 17 do
    digits = ("%." .. precision - 1 .. "e"):format(x)
    if tonumber(digits) == x then break end
  end
  local sign, mantissa, exponent = digits:match("^(%-?)([%d.]+)e([-+]%d+)$")
  mantissa, exponent = mantissa:gsub("%.", ""), tonumber(exponent)
  if exponent < -4 or exponent >= 16 then
    local fraction = #mantissa > 1 and "." .. mantissa:sub(2) or ""
    return ("%s%s%se%s%02d"):format(sign, mantissa:sub(1, 1), fraction, exponent < 0 and "-" or "+",
      math.abs(exponent))
  end
  if exponent < 0 then return sign .. "0." .. ("0"):rep(-exponent - 1) .. mantissa end
  if #mantissa <= exponent + 1 then return sign .. mantissa .. ("0"):rep(exponent + 1 - #mantissa) .. ".0" end
  return sign .. mantissa:sub(1, exponent + 1) .. "." .. mantissa:sub(exponent + 2)
end

local function scalar_text(v)
  if type(v) == "boolean" then return v and "True" or "False" end
  if math.type(v) == "integer" then return tostring(v) end
  if math.type(v) == "float" then return float_text(v) end
  if v == value.none then return "None" end
end

--- Python's repr, as lists and mappings show their members.
function value.repr(v)
  local scalar = scalar_text(v)
  if scalar then return scalar end
  if type(v) == "string" then
    if v:find("[\128-\255]") then
      fail("unsupported", "printing a list or mapping that holds text beyond ASCII is not supported")
    end
    local quote = v:find("'", 1, true) and not v:find('"', 1, true) and '"' or "'"
    local names = { ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t", ["\\"] = "\\\\", [quote] = "\\" .. quote }
    return quote .. v:gsub("[%c\\'\"]", function(char)
      return names[char] or (char:find("%c") and ("\\x%02x"):format(char:byte())) or char
    end) .. quote
  end
  if value.is_list(v) and not v.lazy then
    local parts = {}
    for i, item in ipairs(v.items) do parts[i] = value.repr(item) end
    local inner = table.concat(parts, ", ")
    if v.tuple then return "(" .. inner .. (#parts == 1 and ",)" or ")") end
    return "[" .. inner .. "]"
  end
  if value.is_dict(v) and not v.namespace then
    local parts = {}
    for i, key in ipairs(value.keys(v)) do
      parts[i] = value.repr(key) .. ": " .. value.repr(value.get(v, key))
    end
    return "{" .. table.concat(parts, ", ") .. "}"
  end
  if value.is_undefined(v) then return "Undefined" end
  return fail("unsupported", "printing a %s is not supported", value.type_name(v))
end

--- Python's str, which is what {{ }} prints.
function value.text(v)
  if type(v) == "string" then return v end
  if value.is_undefined(v) then return "" end
  return scalar_text(v) or value.repr(v)
end

local JSON_NAMES <const> = {
  ['"'] = '\\"', ["\\"] = "\\\\", ["\n"] = "\\n", ["\r"] = "\\r", ["\t"] = "\\t", ["\b"] = "\\b",
  ["\f"] = "\\f",
}

local function json_string(s)
  return '"' .. s:gsub('[\0-\31"\\]', function(char)
    return JSON_NAMES[char] or ("\\u%04x"):format(char:byte())
  end) .. '"'
end

local function json_key(key)
  if type(key) == "string" then return json_string(key) end
  return json_string(value.json(key))
end

--- JSON as Python's json.dumps(v, ensure_ascii=False, indent=indent) writes it.
---@param v any
---@param indent? integer|string
---@param level? integer
---@return string
function value.json(v, indent, level)
  level = level or 0
  if type(v) == "string" then return json_string(v) end
  if type(v) == "boolean" then return tostring(v) end
  if v == value.none then return "null" end
  if v == math.huge then return "Infinity" end
  if v == -math.huge then return "-Infinity" end
  if v ~= v then return "NaN" end
  if type(v) == "number" then return value.text(v) end
  local parts, opening, closing = {}, "[", "]"
  if value.is_list(v) and not v.lazy then
    for i, item in ipairs(v.items) do parts[i] = value.json(item, indent, level + 1) end
  elseif value.is_dict(v) and not v.namespace then
    opening, closing = "{", "}"
    for i, key in ipairs(value.keys(v)) do
      parts[i] = json_key(key) .. ": " .. value.json(value.get(v, key), indent, level + 1)
    end
  else
    fail("argument", "Object of type %s is not JSON serializable", value.type_name(v))
  end
  if #parts == 0 then return opening .. closing end
  if indent == nil then return opening .. table.concat(parts, ", ") .. closing end
  local unit = type(indent) == "number" and (" "):rep(indent) or indent
  local inner = "\n" .. unit:rep(level + 1)
  return opening .. inner .. table.concat(parts, "," .. inner) .. "\n" .. unit:rep(level) .. closing
end

return value
