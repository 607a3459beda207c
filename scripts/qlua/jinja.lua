--- A strict subset of Jinja2, as chat templates use it, with the settings of Hugging Face (trim_blocks,
--- lstrip_blocks, sandboxed, JSON without escapes for HTML). A template either renders to Jinja2's bytes, or
--- is refused with an error that names what is not supported: there are no approximations.
---
---   local template = assert(jinja.compile(source))
---   local text, err = template:render { messages = messages, add_generation_prompt = true }
---
--- Lua tables are given as they are; a mapping of several keys has an order only as jinja.dict{{key, value},
--- ...}. None is jinja.none (or JSON's null); nil fields are not there. Not supported, by name: include,
--- import, extends, block, call, filter and with blocks, recursive loops, Markup, % on text, text case beyond
--- ASCII, \N escapes.

local _ENV <const> = require "qlua.strict"

local builtin = require "qlua.jinja_filters"
local failure = require "qlua.failure"
local parse = require "qlua.jinja_parser"
local value = require "qlua.jinja_value"

local fail, none = value.fail, value.none
local jinja = { none = none }

-- A stranger's template must end, and in bounded memory.
local MAX_STEPS <const> = 2000000
local MAX_CALLS <const> = 50
local MAX_SOURCE <const> = 1 << 20

local evaluate, execute = {}, {}
local Run = {}
Run.__index = Run

--- Adds the template's line to a failure that has none yet, and passes everything on.
local function at_line(line, err)
  if type(err) == "table" and err.message and not err.located then
    err.located = true
    err.message = ("template line %d: %s"):format(line, err.message)
  end
  return err
end

function Run:charge(steps)
  self.steps = self.steps + steps
  if self.steps > MAX_STEPS then fail("unsupported", "the template does not come to an end") end
end

--- Charges what it costs to go over a value, so that few steps over long lists are not free.
function Run:charge_for(v)
  if type(v) == "string" then
    self:charge(#v >> 5)
  elseif value.is_list(v) then
    self:charge(#v.items)
  end
  return v
end

function Run:value(node)
  self:charge(1)
  self.line = node.line
  return evaluate[node.op](self, node)
end

function Run:body(nodes, scope)
  local outer = self.scope
  self.scope = scope or outer
  for _, node in ipairs(nodes) do
    self:charge(1)
    self.line = node.line
    local signal = execute[node.op](self, node)
    if signal then
      self.scope = outer
      return signal
    end
  end
  self.scope = outer
end

function Run:write(piece)
  self.size = self.size + #piece
  builtin.bounded(self.size)
  self.out[#self.out + 1] = piece
end

--- Runs `body` with its output collected; returns the text.
function Run:captured(nodes, scope)
  local out = self.out
  self.out = {}
  self:body(nodes, scope)
  local result = table.concat(self.out)
  self.out = out
  return result
end

--- A scope reads what surrounds it and writes only itself; a name set in a loop or macro ends with it.
local function inner_scope(scope) return setmetatable({}, { __index = scope }) end

-- Expressions ----------------------------------------------------------------------------------------------

function evaluate.constant(_, node) return node[1] end
function evaluate.none() return none end
function evaluate.captured(run) return run.capture end

function evaluate.name(run, node)
  local v = run.scope[node[1]]
  if v == nil then return value.undefined(("'%s' is undefined"):format(node[1])) end
  return v
end

evaluate["or"] = function(run, node)
  local left = run:value(node[1])
  if value.truthy(left) then return left end
  return run:value(node[2])
end

evaluate["and"] = function(run, node)
  local left = run:value(node[1])
  if not value.truthy(left) then return left end
  return run:value(node[2])
end

evaluate["not"] = function(run, node) return not value.truthy(run:value(node[1])) end

function evaluate.if_else(run, node)
  if value.truthy(run:value(node.condition)) then return run:value(node.value) end
  if node.otherwise then return run:value(node.otherwise) end
  return value.undefined("the inline if-expression evaluated to false and no else section was defined.")
end

local function items_of(run, node)
  local items = {}
  for i, item in ipairs(node) do items[i] = run:value(item) end
  return items
end

function evaluate.list(run, node) return value.list(items_of(run, node)) end
function evaluate.tuple(run, node) return value.list(items_of(run, node), true) end

function evaluate.dict(run, node)
  local dict = value.dict()
  for _, entry in ipairs(node) do value.set(dict, run:value(entry[1]), run:value(entry[2])) end
  return dict
end

local compare = {
  ["=="] = value.equal,
  ["!="] = function(a, b) return not value.equal(a, b) end,
  ["<"] = value.less,
  [">"] = function(a, b) return value.less(b, a) end,
  ["<="] = function(a, b) return value.less(a, b) or value.equal(a, b) end,
  [">="] = function(a, b) return value.less(b, a) or value.equal(a, b) end,
  ["in"] = function(a, b) return value.contains(b, a) end,
  ["not in"] = function(a, b) return not value.contains(b, a) end,
}

function evaluate.compare(run, node)
  local left = run:value(node[1])
  for _, step in ipairs(node[2]) do
    local right = run:value(step[2])
    if not compare[step[1]](left, right) then return false end
    left = right
  end
  return true
end

--- An integer result, unless it left 64 bits, where Python would go on.
local function whole(exact, approximate)
  if math.abs(approximate) >= 2.0 ^ 62 then
    fail("unsupported", "integers beyond 62 bits are not supported")
  end
  return exact
end

local arithmetic = {
  ["+"] = function(x, y) return x + y end,
  ["-"] = function(x, y) return x - y end,
  ["*"] = function(x, y) return x * y end,
  ["/"] = function(x, y) return x / y end,
  ["//"] = function(x, y) return x // y end,
  ["%"] = function(x, y) return x % y end,
  ["**"] = function(x, y) return x ^ y end,
}

local function power(x, y)
  if math.type(x) == "float" or math.type(y) == "float" or y < 0 then
    if x < 0 and math.type(y) == "float" then
      fail("unsupported", "powers of negative numbers are not supported")
    end
    if x == 0 and y < 0 then fail("argument", "0.0 cannot be raised to a negative power") end
    return (x + 0.0) ^ y
  end
  local result = 1
  for _ = 1, y do
    if result == 0 or result == 1 and x == 1 then break end
    result = whole(result * x, (result + 0.0) * x)
  end
  return result
end

local function calculate(op, x, y)
  if op == "**" then return power(x, y) end
  if y == 0 and (op == "/" or op == "//" or op == "%") then fail("argument", "division by zero") end
  local result = arithmetic[op](x, y)
  if math.type(result) ~= "integer" or op == "%" then return result end
  return whole(result, arithmetic[op](x + 0.0, y + 0.0))
end

local function repeated(v, times)
  if times < 0 then times = 0 end
  if type(v) == "string" then
    builtin.bounded(#v * times)
    return v:rep(times)
  end
  local items = {}
  if #v.items * times > value.range_limit then fail("unsupported", "a list of over 100000 items") end
  for _ = 1, times do table.move(v.items, 1, #v.items, #items + 1, items) end
  return value.list(items, v.tuple)
end

local function added(a, b)
  if type(a) == "string" and type(b) == "string" then
    builtin.bounded(#a + #b)
    return a .. b
  end
  if value.is_list(a) and value.is_list(b) and a.tuple == b.tuple and not (a.lazy or b.lazy) then
    local items = table.move(a.items, 1, #a.items, 1, {})
    return value.list(table.move(b.items, 1, #b.items, #items + 1, items), a.tuple)
  end
end

function evaluate.binary(run, node)
  local op, a, b = node[1], run:value(node[2]), run:value(node[3])
  run.line = node.line
  if op == "~" then
    a, b = value.text(a), value.text(b)
    builtin.bounded(#a + #b)
    return run:charge_for(a .. b)
  end
  value.use(a)
  value.use(b)
  local x, y = value.number_of(a), value.number_of(b)
  if x and y then return calculate(op, x, y) end
  if op == "+" then
    local sum = added(a, b)
    if sum then return run:charge_for(sum) end
    if type(a) == "string" then
      fail("argument", 'can only concatenate str (not "%s") to str', value.type_name(b))
    end
  elseif op == "*" then
    if math.type(y) == "integer" and (type(a) == "string" or value.is_list(a)) then return repeated(a, y) end
    if math.type(x) == "integer" and (type(b) == "string" or value.is_list(b)) then return repeated(b, x) end
  elseif op == "%" and type(a) == "string" then
    fail("unsupported", "formatting of text with %% is not supported")
  end
  return fail("argument", "unsupported operand type(s) for %s: '%s' and '%s'", op, value.type_name(a),
    value.type_name(b))
end

function evaluate.sign(run, node)
  local v = value.use(run:value(node[2]))
  local number = value.number_of(v)
  if not number then fail("argument", "bad operand type for unary %s: '%s'", node[1], value.type_name(v)) end
  return node[1] == "-" and -number or number
end

-- Attributes, items, slices
-- -----------------------------------------------------------------------------------

-- Python has them, the subset does not: to find one "undefined" would be an approximation.
local OTHER_METHODS <const> = {
  str = "format format_map encode casefold swapcase zfill center ljust rjust partition rpartition rsplit "
    .. "rfind index rindex expandtabs translate maketrans isupper islower istitle isdecimal isnumeric "
    .. "isascii isidentifier isprintable",
  list = "append extend insert pop remove sort reverse copy clear",
  tuple = "",
  dict = "update pop popitem setdefault clear copy fromkeys",
}

local function method_of(v, name)
  local kind = value.type_name(v)
  local list = builtin.methods[kind == "tuple" and "list" or kind]
  local method = list and list[name]
  if method then return function(_, args, named) return method(v, args, named) end end
  if (" " .. (OTHER_METHODS[kind] or "") .. " "):find(" " .. name .. " ", 1, true) then
    fail("unsupported", "method '%s' of %s is not supported", name, kind)
  end
end

local function missing(v, name)
  return value.undefined(("'%s' has no attribute '%s'"):format(value.described(v), name))
end

--- v.name: Python's attribute before the mapping's item, as Jinja2 looks.
local function attribute(v, name)
  value.use(v)
  if value.is_dict(v) then
    local found = not v.namespace and method_of(v, name) or value.get(v, name)
    if found == nil then return missing(v, name) end
    return found
  end
  return method_of(v, name) or missing(v, name)
end

function evaluate.attribute(run, node) return attribute(run:value(node[1]), node[2]) end

local function element(list, index)
  return list[index < 0 and #list + index + 1 or index + 1]
end

function evaluate.item(run, node)
  local v, key = run:value(node[1]), run:value(node[2])
  run.line = node.line
  value.use(v)
  local found
  if value.is_dict(v) then
    found = value.get(v, key)
    if found == nil and type(key) == "string" then found = method_of(v, key) end
  elseif math.type(key) == "integer" and (type(v) == "string" or (value.is_list(v) and not v.lazy)) then
    found = element(value.iterate(v), key)
  elseif type(key) == "string" then
    found = method_of(v, key)
  end
  if found ~= nil then return found end
  if type(key) == "string" then return missing(v, key) end
  return value.undefined(("%s has no element %s"):format(value.described(v), value.repr(key)))
end

local function bound(run, node, n, default, low, high)
  local given = node and run:value(node) or none
  if given == none then return default end
  if math.type(given) ~= "integer" then fail("argument", "slice indices must be integers or None") end
  if given < 0 then given = given + n end
  return math.max(low, math.min(high, given))
end

function evaluate.slice(run, node)
  local v = run:charge_for(value.use(run:value(node[1])))
  if type(v) ~= "string" and not (value.is_list(v) and not v.lazy) then
    fail("argument", "'%s' object cannot be sliced", value.type_name(v))
  end
  local list = value.iterate(v)
  local step = node.step and run:value(node.step) or 1
  if step == none then step = 1 end
  if math.type(step) ~= "integer" then fail("argument", "slice indices must be integers or None") end
  if step == 0 then fail("argument", "slice step cannot be zero") end
  local n, items = #list, {}
  local low, high = step > 0 and 0 or -1, step > 0 and n or n - 1
  local start = bound(run, node.start, n, step > 0 and 0 or n - 1, low, high)
  local stop = bound(run, node.stop, n, step > 0 and n or -1, low, high)
  for i = start, stop + (step > 0 and -1 or 1), step do items[#items + 1] = list[i + 1] end
  return type(v) == "string" and table.concat(items) or value.list(items, v.tuple)
end

-- Calls
-- ------------------------------------------------------------------------------------------------------

local function arguments_of(run, arguments)
  local args, named = items_of(run, arguments), {}
  for _, entry in ipairs(arguments.named) do named[entry[1]] = run:value(entry[2]) end
  return args, named
end

function evaluate.call(run, node)
  local target = run:value(node[1])
  local args, named = arguments_of(run, node.arguments)
  run.line = node.line
  value.use(target)
  if type(target) ~= "function" then
    fail("argument", "'%s' object is not callable", value.type_name(target))
  end
  run.calls = run.calls + 1
  if run.calls > MAX_CALLS then fail("unsupported", "macros call each other too deeply") end
  local result = target(run, args, named)
  run.calls = run.calls - 1
  return run:charge_for(result)
end

function evaluate.filter(run, node)
  local v = run:value(node[1])
  local args, named = arguments_of(run, node.arguments)
  run.line = node.line
  return run:charge_for(builtin.filters[node.name](run:charge_for(v), args, named))
end

function evaluate.test(run, node)
  local v = run:value(node[1])
  local args, named = arguments_of(run, node.arguments)
  run.line = node.line
  if next(named) then fail("unsupported", "named arguments of tests are not supported") end
  return builtin.tests[node.name](v, args)
end

-- Statements
-- ---------------------------------------------------------------------------------------------------

function execute.data(run, node) run:write(node[1]) end
function execute.print(run, node) run:write(value.text(run:value(node[1]))) end
function execute.scope(run, node) return run:body(node.body, inner_scope(run.scope)) end
execute["break"] = function() return "break" end
execute["continue"] = function() return "continue" end

execute["if"] = function(run, node)
  for _, branch in ipairs(node) do
    if not branch.condition or value.truthy(run:value(branch.condition)) then return run:body(branch.body) end
  end
end

--- Binds a loop's or an assignment's names to a value, unpacking it when there are several.
local function bind(scope, names, v)
  if #names == 1 then
    scope[names[1]] = v
    return
  end
  local list = value.iterate(value.use(v))
  if #list ~= #names then
    fail("argument", #list > #names and "too many values to unpack (expected %d)"
      or "not enough values to unpack (expected %d, got %d)", #names, #list)
  end
  for i, name in ipairs(names) do scope[name] = list[i] end
end

local function loop_object(list)
  local loop = value.dict()
  loop.namespace = true
  value.set(loop, "length", #list)
  value.set(loop, "depth", 1)
  value.set(loop, "depth0", 0)
  value.set(loop, "cycle", function(_, args)
    if #args == 0 then fail("argument", "no items for cycling given") end
    return args[value.get(loop, "index0") % #args + 1]
  end)
  local last_seen
  value.set(loop, "changed", function(_, args)
    local changed = not (last_seen and value.equal(value.list(args), value.list(last_seen)))
    last_seen = args
    return changed
  end)
  return loop
end

local function move_loop(loop, list, i)
  value.set(loop, "index", i)
  value.set(loop, "index0", i - 1)
  value.set(loop, "revindex", #list - i + 1)
  value.set(loop, "revindex0", #list - i)
  value.set(loop, "first", i == 1)
  value.set(loop, "last", i == #list)
  local before, after = list[i - 1], list[i + 1]
  if before == nil then before = value.undefined "there is no previous item" end
  if after == nil then after = value.undefined "there is no next item" end
  value.set(loop, "previtem", before)
  value.set(loop, "nextitem", after)
end

execute["for"] = function(run, node)
  local list = value.iterate(run:charge_for(run:value(node.list)))
  run.line = node.line
  if node.condition then
    local kept, outer = {}, run.scope
    for _, item in ipairs(list) do
      run.scope = inner_scope(outer)
      bind(run.scope, node.names, item)
      if value.truthy(run:value(node.condition)) then kept[#kept + 1] = item end
    end
    run.scope, list = outer, kept
  end
  if #list == 0 then return node.otherwise and run:body(node.otherwise, inner_scope(run.scope)) end
  run:charge(9 * #list) -- the loop's own variables
  local loop = loop_object(list)
  for i, item in ipairs(list) do
    local scope = inner_scope(run.scope)
    move_loop(loop, list, i)
    scope.loop = loop
    bind(scope, node.names, item)
    if run:body(node.body, scope) == "break" then break end
  end
end

function execute.set(run, node)
  local v = run:value(node.value)
  if node.names then return bind(run.scope, node.names, v) end
  local target = run.scope[node.namespace]
  if not (value.is_dict(target) and target.namespace == "settable") then
    fail("argument", "cannot assign attribute on non-namespace object")
  end
  value.set(target, node.field, v)
end

function execute.set_block(run, node)
  local outer = run.capture
  run.capture = run:captured(node.body, inner_scope(run.scope))
  local v = run:value(node.value)
  run.capture = outer
  if node.names then return bind(run.scope, node.names, v) end
  value.set(run.scope[node.namespace], node.field, v)
end

function execute.macro(run, node)
  local home = run.scope
  home[node.name] = function(caller, args, named)
    local scope = inner_scope(home)
    if #args > #node.parameters then
      fail("argument", "macro '%s' takes not more than %d argument(s)", node.name, #node.parameters)
    end
    local outer = caller.scope
    caller.scope = scope
    local used = 0
    for i, parameter in ipairs(node.parameters) do
      local given = args[i]
      if given == nil and named[parameter.name] ~= nil then
        given, used = named[parameter.name], used + 1
      end
      if given == nil and parameter.default then given = caller:value(parameter.default) end
      if given == nil then
        given = value.undefined(("parameter '%s' was not provided"):format(parameter.name))
      end
      scope[parameter.name] = given
    end
    for name in pairs(named) do
      used = used - 1
      if used < 0 then fail("argument", "macro '%s' takes no keyword argument '%s'", node.name, name) end
    end
    caller.scope = outer
    return caller:captured(node.body, scope)
  end
end

-- Globals
-- --------------------------------------------------------------------------------------------------------

local globals = {}

function globals.raise_exception(_, args)
  local err = failure("argument", value.text(args[1] or none))
  err.located = true
  error(err, 0)
end

function globals.range(_, args)
  local start, stop, step = builtin.arguments("range", args, {}, "start", "stop", "step")
  if stop == nil then start, stop = 0, start end
  step = step or 1
  for _, v in ipairs { start or none, stop or none, step } do
    if math.type(v) ~= "integer" then fail("argument", "range needs integers") end
  end
  if step == 0 then fail("argument", "range() arg 3 must not be zero") end
  local items = {}
  if (stop - start) // step > value.range_limit then fail("argument", "Range too big.") end
  for i = start, stop - (step > 0 and 1 or -1), step do items[#items + 1] = i end
  return value.list(items)
end

function globals.namespace(_, args, named)
  local space = value.dict()
  if #args > 1 then fail("argument", "namespace takes one mapping") end
  for _, key in ipairs(args[1] and value.keys(args[1]) or {}) do
    value.set(space, key, value.get(args[1], key))
  end
  for key, v in pairs(named) do value.set(space, key, v) end
  space.namespace = "settable"
  return space
end

function globals.dict(_, args, named)
  local dict, n = value.dict(), 0
  if #args > 0 then fail("unsupported", "dict() with positional arguments is not supported") end
  for key, v in pairs(named) do
    value.set(dict, key, v)
    n = n + 1
  end
  dict.unordered = n > 1 or nil
  return dict
end

--- A mapping with an order: jinja.dict{{"name", "f"}, {"parameters", jinja.dict{...}}}.
---@param entries any[][]
function jinja.dict(entries)
  local dict = value.dict()
  for _, entry in ipairs(entries) do value.set(dict, entry[1], value.from_lua(entry[2])) end
  return dict
end

--- A list, for where an empty Lua table would be ambiguous.
function jinja.list(items)
  local converted = {}
  for i, item in ipairs(items) do converted[i] = value.from_lua(item) end
  return value.list(converted)
end

---@class qlua.jinja_template
local Template = {}
Template.__index = Template

--- The template's text for a context: any Lua values; a function is called as f(arg, ...) with Lua values.
---@param context table<string, any>
---@return string?, qlua.failure?
function Template:render(context)
  local run = setmetatable({ out = {}, size = 0, steps = 0, calls = 0, line = 1 }, Run)
  local done, err = pcall(function()
    local scope = setmetatable({}, { __index = globals })
    for name, v in pairs(context) do
      if type(v) == "function" then
        scope[name] = function(_, args) return value.from_lua(v(table.unpack(args))) end
      else
        scope[name] = value.from_lua(v)
      end
    end
    run:body(self.tree, scope)
  end)
  if done then return table.concat(run.out) end
  if type(err) ~= "table" then err = failure("unsupported", tostring(err)) end
  return nil, at_line(run.line, err)
end

--- Compiles a template; every construct that is not supported is found here, unless it depends on the values.
---@param source string
---@return qlua.jinja_template?, qlua.failure?
function jinja.compile(source)
  if not utf8.len(source) then return nil, failure("format", "the template is not valid UTF-8") end
  if #source > MAX_SOURCE then return nil, failure("unsupported", "the template is longer than 1 MiB") end
  local done, result = pcall(parse, source, builtin.filters, builtin.tests)
  if done then return setmetatable({ tree = result, source = source }, Template) end
  if type(result) ~= "table" then result = failure("unsupported", tostring(result)) end
  return nil, result
end

return jinja
