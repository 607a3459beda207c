--- Jinja2's filters and tests, and Python's methods of text, lists and mappings, as far as chat templates use
--- them.
---
--- filters[name](v, args, named) -> value; args holds what follows the value, None-filled by `arguments`.
--- tests[name](v, args) -> boolean. methods[type][name](v, args, named) -> value.

local _ENV <const> = require "qlua.strict"

local text = require "qlua.text"
local value = require "qlua.jinja_value"

local fail, none = value.fail, value.none

local filters, tests = {}, {}
local methods = { str = {}, list = {}, dict = {} }

--- Values of the parameters `names`, given by place or by name; missing ones are nil.
local function arguments(what, args, named, ...)
  local names, values = { ... }, {}
  if #args > #names then fail("argument", "%s takes at most %d arguments, got %d", what, #names, #args) end
  for i, name in ipairs(names) do
    values[i] = args[i]
    if named and named[name] ~= nil then
      if values[i] ~= nil then fail("argument", "%s got argument '%s' twice", what, name) end
      values[i] = named[name]
    end
  end
  for name in pairs(named or {}) do
    local known = false
    for _, other in ipairs(names) do known = known or other == name end
    if not known then fail("unsupported", "argument '%s' of %s is not supported", name, what) end
  end
  return table.unpack(values, 1, #names)
end

local function checked_text(v, what)
  value.use(v)
  if type(v) ~= "string" then fail("argument", "%s needs a text, got %s", what, value.type_name(v)) end
  return v
end

local function checked_integer(v, what, default)
  if v == nil then return default end
  value.use(v)
  if type(v) == "boolean" then return v and 1 or 0 end
  if math.type(v) == "integer" then return v end
  return fail("argument", "%s needs an integer, got %s", what, value.type_name(v))
end

--- Case is only changed where Lua's tables and Unicode's agree.
local function ascii(s, what)
  if s:find("[\128-\255]") then fail("unsupported", "%s of text beyond ASCII is not supported", what) end
  return s
end

local function bounded(size)
  if size > value.size_limit then fail("unsupported", "a text of more than 64 MiB") end
end

-- Text
-- -------------------------------------------------------------------------------------------------------

--- strip, lstrip and rstrip; `chars` is a set of characters, by default white space.
local function strip(s, chars, left, right)
  if chars == nil or chars == none then
    if left then s = text.lstrip(s) end
    return right and text.rstrip(s) or s
  end
  local set = {}
  for _, char in ipairs(value.iterate(checked_text(chars, "strip"))) do set[char] = true end
  local list = value.iterate(s)
  local first, last = 1, #list
  while left and first <= last and set[list[first]] do first = first + 1 end
  while right and last >= first and set[list[last]] do last = last - 1 end
  return table.concat(list, "", first, last)
end

local function replace(s, old, new, count)
  checked_text(old, "replace")
  checked_text(new, "replace")
  local parts, at, left = {}, 1, count or -1
  if old == "" then fail("unsupported", "replace of an empty text is not supported") end
  while left ~= 0 do
    local first, last = s:find(old, at, true)
    if not first then break end
    parts[#parts + 1] = s:sub(at, first - 1)
    parts[#parts + 1] = new
    bounded(#parts * #new)
    at, left = last + 1, left - 1
  end
  parts[#parts + 1] = s:sub(at)
  return table.concat(parts)
end

local function split(s, separator, limit)
  limit = limit or -1
  if separator == nil or separator == none then
    if limit >= 0 then fail("unsupported", "split by white space with a limit is not supported") end
    return value.list(text.words(s))
  end
  if checked_text(separator, "split") == "" then fail("argument", "empty separator") end
  local parts, at = {}, 1
  while limit ~= 0 do
    local first, last = s:find(separator, at, true)
    if not first then break end
    parts[#parts + 1] = s:sub(at, first - 1)
    at, limit = last + 1, limit - 1
  end
  parts[#parts + 1] = s:sub(at)
  return value.list(parts)
end

local function starts(s, prefix, what, matches)
  if value.is_list(prefix) and prefix.tuple then
    for _, one in ipairs(prefix.items) do
      if matches(s, checked_text(one, what)) then return true end
    end
    return false
  end
  return matches(s, checked_text(prefix, what))
end

local function has_prefix(s, prefix) return s:sub(1, #prefix) == prefix end
local function has_suffix(s, suffix) return suffix == "" or s:sub(-#suffix) == suffix end

--- Position from 0 of a byte position, in characters.
local function position(s, byte) return byte and utf8.len(s, 1, byte - 1 > 0 and byte - 1 or 0) or -1 end

local str = methods.str
function str.strip(s, a, n) return strip(s, (arguments("strip", a, n, "chars")), true, true) end
function str.lstrip(s, a, n) return strip(s, (arguments("lstrip", a, n, "chars")), true, false) end
function str.rstrip(s, a, n) return strip(s, (arguments("rstrip", a, n, "chars")), false, true) end
function str.upper(s) return (ascii(s, "upper"):upper()) end
function str.lower(s) return (ascii(s, "lower"):lower()) end
function str.capitalize(s) return (ascii(s, "capitalize"):lower():gsub("^%l", string.upper)) end
function str.title(s)
  return (ascii(s, "title"):lower():gsub("%f[%a]%l", string.upper))
end
function str.startswith(s, a, n)
  return starts(s, (arguments("startswith", a, n, "prefix")), "startswith", has_prefix)
end
function str.endswith(s, a, n)
  return starts(s, (arguments("endswith", a, n, "suffix")), "endswith", has_suffix)
end
function str.replace(s, a, n)
  local old, new, count = arguments("replace", a, n, "old", "new", "count")
  return replace(s, old or none, new or none, checked_integer(count, "replace"))
end
function str.split(s, a, n)
  local separator, limit = arguments("split", a, n, "sep", "maxsplit")
  return split(s, separator, checked_integer(limit, "split"))
end
function str.join(s, a, n)
  local list, parts = value.iterate(value.use((arguments("join", a, n, "iterable")) or none)), {}
  for i, part in ipairs(list) do parts[i] = checked_text(part, "join") end
  return table.concat(parts, s)
end
function str.find(s, a, n)
  return position(s, (s:find(checked_text(arguments("find", a, n, "sub") or none, "find"), 1, true)))
end
function str.count(s, a, n)
  local needle = checked_text(arguments("count", a, n, "sub") or none, "count")
  if needle == "" then return utf8.len(s) + 1 end
  return #split(s, needle).items - 1
end
function str.splitlines(s, a, n)
  arguments("splitlines", a, n)
  if s:find("[\v\f\x1c-\x1e]") or s:find("\u{85}", 1, true) or s:find("\u{2028}", 1, true)
    or s:find("\u{2029}", 1, true) then
    fail("unsupported", "splitlines of text with other line breaks than \\n and \\r is not supported")
  end
  local lines = {}
  for line in (s:gsub("\r\n?", "\n") .. "\n"):gmatch("([^\n]*)\n") do lines[#lines + 1] = line end
  if lines[#lines] == "" then lines[#lines] = nil end
  return value.list(lines)
end
function str.removeprefix(s, a, n)
  local prefix = checked_text(arguments("removeprefix", a, n, "prefix") or none, "removeprefix")
  return has_prefix(s, prefix) and s:sub(#prefix + 1) or s
end
function str.removesuffix(s, a, n)
  local suffix = checked_text(arguments("removesuffix", a, n, "suffix") or none, "removesuffix")
  return has_suffix(s, suffix) and s:sub(1, #s - #suffix) or s
end
function str.isdigit(s) return ascii(s, "isdigit"):find("^%d+$") ~= nil end
function str.isalpha(s) return ascii(s, "isalpha"):find("^%a+$") ~= nil end
function str.isalnum(s) return ascii(s, "isalnum"):find("^%w+$") ~= nil end
function str.isspace(s) return s ~= "" and text.strip(s) == "" end

-- Lists and mappings
-- -------------------------------------------------------------------------------------------

function methods.list.index(list, a)
  for i, item in ipairs(list.items) do
    if value.equal(item, a[1]) then return i - 1 end
  end
  return fail("argument", "%s is not in list", value.repr(a[1]))
end
function methods.list.count(list, a)
  local n = 0
  for _, item in ipairs(list.items) do n = n + (value.equal(item, a[1]) and 1 or 0) end
  return n
end

--- A list that Jinja2 makes lazily: it can be looped over, but has no length and no text.
local function lazy(items)
  local list = value.list(items)
  list.lazy = true
  return list
end

local function pairs_of(dict)
  local list = {}
  for i, key in ipairs(value.keys(dict)) do list[i] = value.list({ key, value.get(dict, key) }, true) end
  return value.list(list)
end

function methods.dict.items(dict) return pairs_of(dict) end
function methods.dict.keys(dict) return value.list(table.move(value.keys(dict), 1, #dict.keys, 1, {})) end
function methods.dict.values(dict)
  local list = {}
  for i, key in ipairs(value.keys(dict)) do list[i] = value.get(dict, key) end
  return value.list(list)
end
function methods.dict.get(dict, a, n)
  local key, default = arguments("get", a, n, "key", "default")
  local found = value.get(dict, key)
  if found ~= nil then return found end
  return default == nil and none or default
end

-- Tests
-- ----------------------------------------------------------------------------------------------------------

function tests.defined(v) return not value.is_undefined(v) end
function tests.undefined(v) return value.is_undefined(v) end
tests.none = function(v) return v == none end
function tests.string(v) return type(v) == "string" end
function tests.boolean(v) return type(v) == "boolean" end
tests["true"] = function(v) return v == true end
tests["false"] = function(v) return v == false end
function tests.integer(v) return math.type(v) == "integer" end
function tests.float(v) return math.type(v) == "float" end
function tests.number(v) return value.number_of(v) ~= nil end
function tests.mapping(v) return value.is_dict(v) and not v.namespace end
function tests.iterable(v)
  return type(v) == "string" or value.is_list(v) or tests.mapping(v) or value.is_undefined(v)
end
tests.sequence = tests.iterable
function tests.callable(v) return type(v) == "function" end
function tests.odd(v) return checked_integer(v, "odd") % 2 == 1 end
function tests.even(v) return checked_integer(v, "even") % 2 == 0 end
function tests.divisibleby(v, args)
  local divisor = checked_integer(args[1] or none, "divisibleby")
  if divisor == 0 then fail("argument", "integer modulo by zero") end
  return checked_integer(v, "divisibleby") % divisor == 0
end
tests["in"] = function(v, args) return value.contains(args[1], v) end
function tests.sameas(v, args)
  if type(v) == "table" then return rawequal(v, args[1]) end
  return math.type(v) == math.type(args[1]) and v == args[1]
end
tests.eq = function(v, args) return value.equal(v, args[1]) end
tests.ne = function(v, args) return not value.equal(v, args[1]) end
tests.lt = function(v, args) return value.less(v, args[1]) end
tests.gt = function(v, args) return value.less(args[1], v) end
tests.le = function(v, args) return value.less(v, args[1]) or value.equal(v, args[1]) end
tests.ge = function(v, args) return value.less(args[1], v) or value.equal(v, args[1]) end
function tests.lower(v)
  return ascii(checked_text(v, "lower"), "lower"):find("%l") ~= nil and not v:find("%u")
end
function tests.upper(v)
  return ascii(checked_text(v, "upper"), "upper"):find("%u") ~= nil and not v:find("%l")
end
for alias, name in pairs {
  equalto = "eq", lessthan = "lt", greaterthan = "gt",
} do
  tests[alias] = tests[name]
end

-- Filters
-- ----------------------------------------------------------------------------------------------------------

--- One name or index of a value, as `map(attribute=)` and its like look it up; dots lead on.
local function attribute_of(v, path)
  if math.type(path) == "integer" then
    if not value.is_list(v) then fail("unsupported", "attribute %d of a %s", path, value.type_name(v)) end
    local item = v.items[path < 0 and #v.items + path + 1 or path + 1]
    if item == nil then return value.undefined("list object has no element " .. path) end
    return item
  end
  for name in checked_text(path, "attribute"):gmatch("[^.]+") do
    if name:find("^%d+$") then
      v = attribute_of(v, tonumber(name))
    else
      value.use(v)
      local found = value.is_dict(v) and value.get(v, name)
      if not value.is_dict(v) or found == nil then
        found = value.undefined(("'%s' has no attribute '%s'"):format(value.described(v), name))
      end
      v = found
    end
  end
  return v
end

local function soft_text(v) return type(v) == "string" and v or value.text(v) end

function filters.trim(v, a, n) return strip(soft_text(v), (arguments("trim", a, n, "chars")), true, true) end
function filters.upper(v) return str.upper(soft_text(v)) end
function filters.lower(v) return str.lower(soft_text(v)) end
function filters.capitalize(v) return str.capitalize(soft_text(v)) end
function filters.length(v) return value.length(v) end
filters.count = filters.length
function filters.string(v) return soft_text(v) end

function filters.replace(v, a, n)
  local old, new, count = arguments("replace", a, n, "old", "new", "count")
  if count == none then count = nil end
  return replace(soft_text(v), old or none, new or none, checked_integer(count, "replace"))
end

function filters.default(v, a, n)
  local default, also_false = arguments("default", a, n, "default_value", "boolean")
  if value.is_undefined(v) or (also_false ~= nil and value.truthy(also_false) and not value.truthy(v)) then
    return default == nil and "" or default
  end
  return v
end
filters.d = filters.default

function filters.first(v)
  local item = value.iterate(v)[1]
  return item == nil and value.undefined("No first item, sequence was empty.") or item
end

function filters.last(v)
  local list = value.iterate(v)
  local item = list[#list]
  return item == nil and value.undefined("No last item, sequence was empty.") or item
end

function filters.list(v)
  local list = value.iterate(v)
  return value.list(table.move(list, 1, #list, 1, {}))
end

function filters.reverse(v)
  local list, reversed = value.iterate(v), {}
  for i, item in ipairs(list) do reversed[#list - i + 1] = item end
  return type(v) == "string" and table.concat(reversed) or lazy(reversed)
end

function filters.join(v, a, n)
  local separator, attribute = arguments("join", a, n, "d", "attribute")
  local parts = {}
  for i, item in ipairs(value.iterate(v)) do
    if attribute ~= nil and attribute ~= none then item = attribute_of(item, attribute) end
    parts[i] = soft_text(item)
  end
  return table.concat(parts, separator == nil and "" or soft_text(separator))
end

function filters.items(v)
  if value.is_undefined(v) then return lazy {} end
  if not tests.mapping(v) then fail("argument", "Can only get item pairs from a mapping.") end
  return lazy(pairs_of(v).items)
end

function filters.tojson(v, a, n)
  local indent
  if #a > 0 then fail("unsupported", "tojson takes its arguments by name") end
  for name, given in pairs(n) do
    if name == "indent" then
      indent = given
    elseif not (name == "ensure_ascii" and given == false) then
      fail("unsupported", "argument '%s' of tojson is not supported", name)
    end
  end
  if indent == none then indent = nil end
  if type(indent) ~= "string" then indent = checked_integer(indent, "tojson") end
  if math.type(indent) == "integer" and (indent < 0 or indent > 64) then
    fail("unsupported", "tojson(indent=%d) is not supported", indent)
  end
  return value.json(v, indent)
end

function filters.int(v, a, n)
  local default = arguments("int", a, n, "default")
  local number = type(v) == "string" and v:match("^%s*([+-]?%d+)%s*$") or value.number_of(v)
  local result = tonumber(number)
  if result and math.type(result) == "float" then
    result = math.tointeger(result >= 0 and math.floor(result) or math.ceil(result))
  end
  if result then return result end
  if type(v) == "string" and v:find("[%d_]") then
    fail("unsupported", "int of '%s' is not supported", v:sub(1, 40))
  end
  return default == nil and 0 or default
end

function filters.float(v)
  local number = value.number_of(v) or (type(v) == "string" and v:match("^%s*([+-]?%d+%.?%d*)%s*$"))
  if not number then fail("unsupported", "float of a %s that is no plain decimal", value.type_name(v)) end
  return tonumber(number) + 0.0
end

function filters.abs(v)
  local number = value.number_of(value.use(v))
  if not number then fail("argument", "bad operand type for abs(): '%s'", value.type_name(v)) end
  return math.abs(number)
end

--- Items for which a test holds (or does not), on the item itself or on an attribute of it.
local function selected(v, a, n, wanted, by_attribute)
  if next(n) then fail("unsupported", "named arguments of select and reject are not supported") end
  local rest, attribute = table.move(a, 1, #a, 1, {}), nil
  if by_attribute then
    attribute = table.remove(rest, 1)
    if attribute == nil then fail("argument", "Missing parameter for attribute name") end
  end
  local name = table.remove(rest, 1)
  local test = name == nil and value.truthy or tests[name]
  if not test then fail("unsupported", "test '%s' is not supported", value.text(name)) end
  local list = {}
  for _, item in ipairs(value.iterate(v)) do
    local subject = attribute == nil and item or attribute_of(item, attribute)
    if test(subject, rest) == wanted then list[#list + 1] = item end
  end
  return lazy(list)
end

function filters.select(v, a, n) return selected(v, a, n, true, false) end
function filters.reject(v, a, n) return selected(v, a, n, false, false) end
function filters.selectattr(v, a, n) return selected(v, a, n, true, true) end
function filters.rejectattr(v, a, n) return selected(v, a, n, false, true) end

function filters.map(v, a, n)
  local list = {}
  if n.attribute ~= nil then
    for i, item in ipairs(value.iterate(v)) do
      local found = attribute_of(item, n.attribute)
      if value.is_undefined(found) and n.default ~= nil then found = n.default end
      list[i] = found
    end
    return lazy(list)
  end
  local rest = table.move(a, 1, #a, 1, {})
  local name = table.remove(rest, 1)
  local filter = name and filters[name]
  if not filter then fail("unsupported", "map of '%s' is not supported", value.text(name or none)) end
  for i, item in ipairs(value.iterate(v)) do list[i] = filter(item, rest, n) end
  return lazy(list)
end

function filters.unique(v, a, n)
  if #a > 0 or next(n) then fail("unsupported", "arguments of unique are not supported") end
  local list = {}
  for _, item in ipairs(value.iterate(v)) do
    if type(item) ~= "number" and type(item) ~= "boolean" and type(item) ~= "string" then
      fail("unsupported", "unique of a %s is not supported", value.type_name(item))
    end
    -- Text is compared without regard to case, as Jinja2 does by default.
    local key, seen = type(item) == "string" and str.lower(item) or item, false
    for _, other in ipairs(list) do
      seen = seen or value.equal(type(other) == "string" and str.lower(other) or other, key)
    end
    if not seen then list[#list + 1] = item end
  end
  return lazy(list)
end

function filters.indent(v, a, n)
  local width, first, blank = arguments("indent", a, n, "width", "first", "blank")
  local unit = type(width) == "string" and width or (" "):rep(checked_integer(width, "indent", 4))
  local lines = {}
  for line in (soft_text(v) .. "\n"):gmatch("([^\n]*)\n") do
    local indents = (#lines > 0 or (first ~= nil and value.truthy(first)))
      and (line ~= "" or (#lines > 0 and blank ~= nil and value.truthy(blank)))
    lines[#lines + 1] = indents and unit .. line or line
  end
  return table.concat(lines, "\n")
end

return { filters = filters, tests = tests, methods = methods, arguments = arguments, bounded = bounded }
