--- Parses a Jinja template into a tree, in Jinja2's own grammar and precedence. What the subset leaves out is
--- an error that names the construct and its line.
---
--- Every node is a table {op, ..., line=}; a body is a list of nodes.

local _ENV <const> = require "qlua.strict"

local lexer = require "qlua.jinja_lexer"

local MAX_DEPTH <const> = 100

local Parser = {}
Parser.__index = Parser

local CONSTANTS <const> = { ["true"] = true, ["True"] = true, ["false"] = false, ["False"] = false }
local NOT_SUPPORTED <const> = {
  include = true, import = true, from = true, extends = true, block = true, call = true, filter = true,
  with = true, autoescape = true, ["do"] = true, trans = true, debug = true,
}
local MACRO_NAMES <const> = { caller = true, varargs = true, kwargs = true }
local COMPARISONS <const> = {
  ["=="] = true, ["!="] = true, ["<"] = true, ["<="] = true, [">"] = true, [">="] = true,
}

function Parser:peek(ahead) return self.tokens[self.at + (ahead or 0)] or self.tokens[#self.tokens] end

function Parser:next()
  local token = self:peek()
  self.at = self.at + 1
  return token
end

function Parser:fail(message, code) lexer.fail(code or "format", self:peek().line, message) end

function Parser:is(kind, value, ahead)
  local token = self:peek(ahead)
  return token.kind == kind and (value == nil or token.value == value)
end

function Parser:skip(kind, value)
  if not self:is(kind, value) then return false end
  self.at = self.at + 1
  return true
end

local function described(token)
  if token.kind == "eof" then return "the end of the template" end
  if token.kind == "close" then return "the end of the tag" end
  return ("'%s'"):format(tostring(token.value))
end

function Parser:expect(kind, value)
  if not self:is(kind, value) then
    local wanted = value and ("'%s'"):format(value) or "a " .. kind
    if kind == "close" then wanted = "the end of the tag" end
    self:fail(("expected %s, found %s"):format(wanted, described(self:peek())))
  end
  return self:next()
end

function Parser:node(op, ...)
  return { op = op, line = self:peek().line, ... }
end

--- Runs `parse` one level deeper: a hostile template must not exhaust the stack.
function Parser:deeper(parse, ...)
  self.depth = self.depth + 1
  if self.depth > MAX_DEPTH then self:fail("nested too deeply", "unsupported") end
  local result = parse(self, ...)
  self.depth = self.depth - 1
  return result
end

-- Expressions, from loose to tight ------------------------------------------------------------------------

function Parser:expression(no_condition)
  return self:deeper(no_condition and self.disjunction or self.conditional)
end

function Parser:conditional()
  local value = self:disjunction()
  while self:skip("name", "if") do
    local node = self:node "if_else"
    node.value, node.condition = value, self:disjunction()
    if self:skip("name", "else") then node.otherwise = self:deeper(self.conditional) end
    value = node
  end
  return value
end

function Parser:disjunction()
  local left = self:conjunction()
  while self:skip("name", "or") do left = { op = "or", line = left.line, left, self:conjunction() } end
  return left
end

function Parser:conjunction()
  local left = self:negation()
  while self:skip("name", "and") do left = { op = "and", line = left.line, left, self:negation() } end
  return left
end

function Parser:negation()
  if self:skip("name", "not") then return self:node("not", self:deeper(self.negation)) end
  return self:comparison()
end

function Parser:comparison()
  local first, rest = self:sum(), {}
  while true do
    local op
    if self:peek().kind == "op" and COMPARISONS[self:peek().value] then
      op = self:next().value
    elseif self:skip("name", "in") then
      op = "in"
    elseif self:is("name", "not") and self:is("name", "in", 1) then
      self.at = self.at + 2
      op = "not in"
    else
      break
    end
    rest[#rest + 1] = { op, self:sum() }
  end
  if #rest == 0 then return first end
  return { op = "compare", line = first.line, first, rest }
end

--- Left-associative chain of the operators in `ops` over `operand`.
local function chain(ops, operand)
  return function(self)
    local left = operand(self)
    while self:peek().kind == "op" and ops[self:peek().value] do
      local op = self:next().value
      left = { op = "binary", line = left.line, op, left, operand(self) }
    end
    return left
  end
end

local function unary(self) return self:unary(true) end
local power = chain({ ["**"] = true }, unary)
local product = chain({ ["*"] = true, ["/"] = true, ["//"] = true, ["%"] = true }, power)
local concatenation = chain({ ["~"] = true }, product)
Parser.sum = chain({ ["+"] = true, ["-"] = true }, concatenation)

function Parser:unary(with_filters)
  local node
  if self:is("op", "-") or self:is("op", "+") then
    local sign = self:next().value
    node = self:node("sign", sign, self:deeper(self.unary, false))
  else
    node = self:primary()
  end
  node = self:postfix(node)
  if with_filters then node = self:filters(node) end
  return node
end

function Parser:primary()
  local token = self:peek()
  if token.kind == "name" then
    self:next()
    if CONSTANTS[token.value] ~= nil then return self:node("constant", CONSTANTS[token.value]) end
    if token.value == "none" or token.value == "None" then return self:node "none" end
    return { op = "name", line = token.line, token.value }
  elseif token.kind == "string" then
    local parts = {}
    while self:is "string" do parts[#parts + 1] = self:next().value end
    return { op = "constant", line = token.line, table.concat(parts) }
  elseif token.kind == "number" then
    self:next()
    return { op = "constant", line = token.line, token.value }
  elseif self:skip("op", "(") then
    local node = self:tuple(true)
    self:expect("op", ")")
    return node
  elseif self:skip("op", "[") then
    return self:list()
  elseif self:skip("op", "{") then
    return self:dict()
  end
  return self:fail("unexpected " .. described(token))
end

function Parser:list()
  local node = self:node "list"
  while not self:is("op", "]") do
    node[#node + 1] = self:expression()
    if not self:skip("op", ",") then break end
  end
  self:expect("op", "]")
  return node
end

function Parser:dict()
  local node = self:node "dict"
  while not self:is("op", "}") do
    local key = self:expression()
    self:expect("op", ":")
    node[#node + 1] = { key, self:expression() }
    if not self:skip("op", ",") then break end
  end
  self:expect("op", "}")
  return node
end

--- One expression, or several with commas between, which make a tuple.
function Parser:tuple(parenthesised, no_condition)
  local node = self:node "tuple"
  local comma = false
  while not (self:is "close" or self:is("op", ")")) do
    node[#node + 1] = self:expression(no_condition)
    if not self:skip("op", ",") then
      if not comma then return node[1] end
      return node
    end
    comma = true
  end
  if #node == 0 and not parenthesised then self:fail("expected an expression") end
  return node
end

function Parser:postfix(node)
  while true do
    local line = self:peek().line
    if self:skip("op", ".") then
      local token = self:next()
      if token.kind == "name" then
        node = { op = "attribute", line = line, node, token.value }
      elseif math.type(token.value) == "integer" then
        node = { op = "item", line = line, node, { op = "constant", line = line, token.value } }
      else
        self:fail("expected a name after '.'")
      end
    elseif self:skip("op", "[") then
      node = self:subscript(node, line)
    elseif self:is("op", "(") then
      node = self:call(node)
    else
      return node
    end
  end
end

function Parser:subscript(target, line)
  local bounds, colons = {}, 0
  while not self:is("op", "]") do
    if self:skip("op", ":") then
      colons = colons + 1
    elseif self:is("op", ",") then
      self:fail("subscripts with a comma are not supported", "unsupported")
    elseif bounds[colons] or colons > 2 then
      self:fail("expected ']', found " .. described(self:peek()))
    else
      bounds[colons] = self:expression()
    end
  end
  self:expect("op", "]")
  if colons == 0 then
    if not bounds[0] then self:fail "empty subscript" end
    return { op = "item", line = line, target, bounds[0] }
  end
  if colons > 2 then self:fail "too many ':' in a slice" end
  return { op = "slice", line = line, target, start = bounds[0], stop = bounds[1], step = bounds[2] }
end

--- Arguments in parentheses: positional ones in the list part, named ones in `named` (a list of {name,
--- node}).
function Parser:arguments()
  local arguments = { named = {} }
  self:expect("op", "(")
  while not self:is("op", ")") do
    if self:is("op", "*") or self:is("op", "**") then
      self:fail("'*' arguments are not supported", "unsupported")
    end
    if self:is "name" and self:is("op", "=", 1) then
      local name = self:next().value
      self:next()
      arguments.named[#arguments.named + 1] = { name, self:expression() }
    else
      if #arguments.named > 0 then self:fail "a positional argument follows a named one" end
      arguments[#arguments + 1] = self:expression()
    end
    if not self:skip("op", ",") then break end
  end
  self:expect("op", ")")
  return arguments
end

function Parser:call(target)
  return { op = "call", line = self:peek().line, target, arguments = self:arguments() }
end

function Parser:dotted_name()
  local name = self:expect("name").value
  while self:skip("op", ".") do name = name .. "." .. self:expect("name").value end
  return name
end

function Parser:filters(node)
  while true do
    if self:skip("op", "|") then
      node = self:filter(node)
    elseif self:skip("name", "is") then
      node = self:test(node)
    elseif self:is("op", "(") then
      node = self:call(node)
    else
      return node
    end
  end
end

function Parser:filter(value)
  local node = self:node("filter", value)
  node.name = self:dotted_name()
  node.arguments = self:is("op", "(") and self:arguments() or { named = {} }
  if not self.filter_names[node.name] then
    self:fail(("filter '%s' is not supported"):format(node.name), "unsupported")
  end
  return node
end

local NO_ARGUMENT <const> = { ["else"] = true, ["or"] = true, ["and"] = true }

function Parser:test(value)
  local negated = self:skip("name", "not")
  local node = self:node("test", value)
  node.name, node.arguments = self:dotted_name(), { named = {} }
  local token = self:peek()
  if self:is("op", "(") then
    node.arguments = self:arguments()
  elseif (token.kind == "name" and not NO_ARGUMENT[token.value]) or token.kind == "string"
    or token.kind == "number" or self:is("op", "[") or self:is("op", "{") then
    if token.value == "is" and token.kind == "name" then self:fail "tests cannot be chained with 'is'" end
    node.arguments[1] = self:postfix(self:primary())
  end
  if not self.test_names[node.name] then
    self:fail(("test '%s' is not supported"):format(node.name), "unsupported")
  end
  return negated and { op = "not", line = node.line, node } or node
end

-- Statements ------------------------------------------------------------------------------------------------

--- Nodes up to a block that starts with one of `endings`, whose name is consumed and returned as well.
function Parser:body(endings, opened)
  local nodes = {}
  while true do
    local token = self:next()
    if token.kind == "eof" then
      self.at = self.at - 1
      if not endings then return nodes end
      lexer.fail("format", opened.line, ("'{%% %s %%}' is never closed"):format(opened.name))
    elseif token.kind == "data" then
      nodes[#nodes + 1] = { op = "data", line = token.line, token.value }
    elseif token.value == "variable" then
      nodes[#nodes + 1] = { op = "print", line = token.line, self:tuple() }
      self:expect("close", "variable")
    else
      local name = self:expect("name").value
      if endings and endings[name] then return nodes, name end
      local node = self:deeper(self.statement, name, token.line)
      if node then nodes[#nodes + 1] = node end
    end
  end
end

function Parser:end_tag() self:expect("close", "block") end

function Parser:statement(name, line)
  local parse = self["parse_" .. name]
  if not parse then
    if NOT_SUPPORTED[name] then self:fail(("'{%% %s %%}' is not supported"):format(name), "unsupported") end
    self:fail(("unexpected '{%% %s %%}'"):format(name))
  end
  return parse(self, { name = name, line = line })
end

local IF_ENDINGS <const> = { ["elif"] = true, ["else"] = true, ["endif"] = true }

function Parser:parse_if(opened)
  local node = { op = "if", line = opened.line }
  local ending = "if"
  while ending ~= "endif" do
    local branch = {}
    if ending ~= "else" then branch.condition = self:tuple() end
    self:end_tag()
    branch.body, ending = self:body(node.closed and { endif = true } or IF_ENDINGS, opened)
    node.closed = node.closed or ending == "else"
    node[#node + 1] = branch
  end
  self:end_tag()
  return node
end

function Parser:targets()
  local names = {}
  local parenthesised = self:skip("op", "(")
  repeat
    local token = self:expect "name"
    if CONSTANTS[token.value] ~= nil or token.value == "none" or token.value == "None" then
      self:fail(("cannot assign to '%s'"):format(token.value))
    end
    names[#names + 1] = token.value
  until not self:skip("op", ",") or self:is("op", ")")
  if parenthesised then self:expect("op", ")") end
  return names
end

function Parser:parse_for(opened)
  local node = { op = "for", line = opened.line }
  node.names = self:targets()
  self:expect("name", "in")
  node.list = self:tuple(false, true)
  if self:skip("name", "if") then node.condition = self:expression() end
  if self:is("name", "recursive") then self:fail("recursive loops are not supported", "unsupported") end
  self:end_tag()
  local ending
  self.loops = self.loops + 1
  node.body, ending = self:body({ ["endfor"] = true, ["else"] = true }, opened)
  self.loops = self.loops - 1
  self:end_tag()
  if ending == "else" then
    node.otherwise = self:body({ endfor = true }, opened)
    self:end_tag()
  end
  return node
end

local function loop_control(op)
  return function(self, opened)
    if self.loops == 0 then self:fail(("'%s' outside a loop"):format(op)) end
    self:end_tag()
    return { op = op, line = opened.line }
  end
end

Parser.parse_break = loop_control "break"
Parser.parse_continue = loop_control "continue"

function Parser:parse_set(opened)
  local node = { op = "set", line = opened.line }
  if self:is "name" and self:is("op", ".", 1) then
    node.namespace = self:next().value
    self:next()
    node.field = self:expect("name").value
  else
    node.names = self:targets()
  end
  if self:skip("op", "=") then
    node.value = self:tuple()
    self:end_tag()
    return node
  end
  if node.names and #node.names > 1 then self:fail "expected '='" end
  node.op, node.captured = "set_block", { op = "captured", line = opened.line }
  node.value = self:filters(node.captured)
  self:end_tag()
  node.body = self:body({ endset = true }, opened)
  self:end_tag()
  return node
end

function Parser:parse_macro(opened)
  local node = { op = "macro", line = opened.line, name = self:expect("name").value, parameters = {} }
  self:expect("op", "(")
  while not self:is("op", ")") do
    local parameter = { name = self:expect("name").value }
    if self:skip("op", "=") then parameter.default = self:expression() end
    node.parameters[#node.parameters + 1] = parameter
    if not self:skip("op", ",") then break end
  end
  self:expect("op", ")")
  self:end_tag()
  local loops, first = self.loops, self.at
  self.loops = 0
  node.body = self:body({ endmacro = true }, opened)
  self.loops = loops
  for at = first, self.at do
    local token = self.tokens[at]
    if token.kind == "name" and MACRO_NAMES[token.value] then
      lexer.fail("unsupported", token.line, ("'%s' in a macro is not supported"):format(token.value))
    end
  end
  self:end_tag()
  return node
end

--- {% generation %} marks the assistant's words for training; rendering ignores it.
function Parser:parse_generation(opened)
  self:end_tag()
  local body = self:body({ endgeneration = true }, opened)
  self:end_tag()
  return { op = "scope", line = opened.line, body = body }
end

--- The tree of a template; raises a failure. `filters` and `tests` are the tables of what is supported.
---@param source string
---@param filters table<string, any>
---@param tests table<string, any>
---@return table body
return function(source, filters, tests)
  local self = setmetatable({
    tokens = lexer.tokenize(source), at = 1, depth = 0, loops = 0, filter_names = filters, test_names = tests,
  }, Parser)
  return (self:body())
end
