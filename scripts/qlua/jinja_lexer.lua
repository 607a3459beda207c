--- Cuts a Jinja template into tokens, with the white space rules of trim_blocks and lstrip_blocks switched
--- on, as Hugging Face compiles chat templates.

local _ENV <const> = require "qlua.strict"

local failure = require "qlua.failure"
local text = require "qlua.text"

local lexer = {}

---@class qlua.jinja_token
---@field kind "data"|"name"|"string"|"number"|"op"|"open"|"close"|"eof"
---@field value any     for open and close: "variable" or "block"
---@field line integer

--- Raises a failure that names the template's line; caught where a template is compiled or rendered.
---@param code string
---@param line integer
---@param message string
function lexer.fail(code, line, message)
  error(failure(code, ("template line %d: %s"):format(line, message)), 0)
end

local ESCAPES <const> = {
  n = "\n", t = "\t", r = "\r", a = "\a", b = "\b", f = "\f", v = "\v", ["\\"] = "\\", ["'"] = "'",
  ['"'] = '"', ["\n"] = "",
}

-- Longest first, so that "//" is not read as two divisions.
local OPERATORS <const> = {
  "**", "//", "==", "!=", ">=", "<=", "+", "-", "*", "/", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
  "=", ".", ":", "|", ",", ";",
}
local CLOSING <const> = { ["("] = ")", ["["] = "]", ["{"] = "}" }

--- A string literal's value by Python's escapes; an unknown escape keeps its backslash.
local function unescape(body, line)
  local parts, at = {}, 1
  while true do
    local slash = body:find("\\", at, true)
    if not slash then
      parts[#parts + 1] = body:sub(at)
      return table.concat(parts)
    end
    parts[#parts + 1] = body:sub(at, slash - 1)
    local char = body:sub(slash + 1, slash + 1)
    local width = ({ x = 2, u = 4, U = 8 })[char]
    if width then
      local digits = body:match("^%x+", slash + 2)
      digits = digits and digits:sub(1, width) or ""
      local code = tonumber(digits, 16) or 0
      if #digits < width or code > 0x10FFFF or (code >= 0xD800 and code <= 0xDFFF) then
        lexer.fail("format", line, "bad \\" .. char .. " escape")
      end
      parts[#parts + 1], at = utf8.char(code), slash + 2 + width
    elseif char:find("[0-7]") then
      local digits = body:match("^[0-7]+", slash + 1):sub(1, 3)
      parts[#parts + 1], at = utf8.char(tonumber(digits, 8)), slash + 1 + #digits
    elseif char == "N" then
      lexer.fail("unsupported", line, "the \\N{...} escape is not supported")
    else
      parts[#parts + 1], at = ESCAPES[char] or "\\" .. char, slash + 2
    end
  end
end

local Lexer = {}
Lexer.__index = Lexer

function Lexer:push(kind, value)
  self.tokens[#self.tokens + 1] = { kind = kind, value = value, line = self.line }
end

--- Moves to `at`, counting lines.
function Lexer:advance(at)
  local _, newlines = self.source:sub(self.at, at - 1):gsub("\n", "")
  self.line, self.at = self.line + newlines, at
end

function Lexer:match(pattern)
  return self.source:match("^" .. pattern, self.at)
end

--- Skips white space after a closing mark: all of it after "-", one line break after a block or comment.
function Lexer:after_close(sign, trims)
  if sign == "-" then
    self:advance(text.skip_space(self.source, self.at))
    self.line_start = false
  elseif trims and sign ~= "+" and self.source:sub(self.at, self.at) == "\n" then
    self:advance(self.at + 1)
    self.line_start = true
  else
    self.line_start = false
  end
end

--- The text before a tag, with what "-" or lstrip_blocks takes from its end.
function Lexer:before_open(data, sign, strips)
  if sign == "-" then return text.rstrip(data) end
  if not strips or sign == "+" then return data end
  local newline = data:find("\n[^\n]*$")
  if not newline and not self.line_start then return data end
  local last_line = data:sub((newline or 0) + 1)
  if text.strip(last_line) ~= "" then return data end
  return data:sub(1, newline or 0)
end

function Lexer:string_token(quote)
  local at = self.at + 1
  while true do
    local stop = self.source:find("[\\" .. quote .. "]", at)
    if not stop then lexer.fail("format", self.line, "a string is never closed") end
    if self.source:byte(stop) == 92 then
      at = stop + 2
    else
      self:push("string", unescape(self.source:sub(self.at + 1, stop - 1), self.line))
      self:advance(stop + 1)
      return
    end
  end
end

function Lexer:number_token()
  local digits = self:match("%d[%d_]*%.%d[%d_]*[eE][+-]?%d+") or self:match("%d[%d_]*%.%d[%d_]*")
    or self:match("%d[%d_]*[eE][+-]?%d+") or self:match("%d[%d_]*")
  self:advance(self.at + #digits)
  if self:match("[%a_]") then
    local tail = self:match("[%w_]+")
    lexer.fail("unsupported", self.line, ("number '%s%s' is not decimal"):format(digits, tail))
  end
  local value = tonumber((digits:gsub("_", "")))
  if not digits:find("[.eE]") and math.type(value) ~= "integer" then
    lexer.fail("unsupported", self.line, "integer beyond 64 bits: " .. digits)
  end
  self:push("number", value)
end

--- Tokens up to the end of a {{ }} or {% %}.
function Lexer:inside(kind)
  local ending, stack, opened = kind == "variable" and "}}" or "%}", {}, self.line
  while true do
    self:advance(self.at + #self:match("%s*"))
    if self.at > #self.source then
      lexer.fail("format", opened, ("'%s' is never closed"):format(kind == "variable" and "{{" or "{%"))
    end
    if #stack == 0 then
      local sign = self:match(kind == "variable" and "(%-?)}}" or "([-+]?)%%}")
      if sign then
        self:push("close", kind)
        self:advance(self.at + #sign + #ending)
        self:after_close(sign, kind == "block")
        return
      end
    end
    local char = self.source:sub(self.at, self.at)
    if char == "'" or char == '"' then
      self:string_token(char)
    elseif char:find("%d") then
      self:number_token()
    elseif char:find("[%a_]") then
      local name = self:match("[%w_]+")
      self:push("name", name)
      self:advance(self.at + #name)
    else
      self:operator(stack)
    end
  end
end

function Lexer:operator(stack)
  for _, op in ipairs(OPERATORS) do
    if self.source:sub(self.at, self.at + #op - 1) == op then
      if CLOSING[op] then
        stack[#stack + 1] = CLOSING[op]
      elseif op == ")" or op == "]" or op == "}" then
        if table.remove(stack) ~= op then lexer.fail("format", self.line, ("unexpected '%s'"):format(op)) end
      end
      self:push("op", op)
      self:advance(self.at + #op)
      return
    end
  end
  local stop = (utf8.offset(self.source, 2, self.at) or self.at + 1) - 1
  lexer.fail("format", self.line, ("unexpected character '%s'"):format(self.source:sub(self.at, stop)))
end

function Lexer:comment()
  local opened = self.line
  local stop = self.source:find("#}", self.at, true)
  if not stop then lexer.fail("format", opened, "'{#' is never closed") end
  local sign = self.source:sub(stop - 1, stop - 1)
  if not (sign == "-" or sign == "+") or stop - 1 < self.at then sign = "" end
  self:advance(stop + 2)
  self:after_close(sign, true)
end

--- {% raw %} ... {% endraw %}; returns false when the block that starts here is another one.
function Lexer:raw()
  local head, sign = self:match("(%s*raw%s*(%-?)%%})")
  if not head then return false end
  self:advance(self.at + #head)
  self:after_close(sign, false)
  local first, last, open_sign, close_sign = self.source:find("{%%([-+]?)%s*endraw%s*([-+]?)%%}", self.at)
  if not first then lexer.fail("format", self.line, "'{% raw %}' is never closed") end
  local body = self.source:sub(self.at, first - 1)
  self:push("data", self:before_open(body, open_sign, true))
  self:advance(last + 1)
  self:after_close(close_sign, true)
  return true
end

--- Tokens of a template; raises a failure.
---@param source string
---@return qlua.jinja_token[]
function lexer.tokenize(source)
  source = source:gsub("\r\n?", "\n"):gsub("\n$", "")
  local self = setmetatable({ source = source, at = 1, line = 1, tokens = {}, line_start = true }, Lexer)
  while self.at <= #source do
    local open = source:find("{[{%%#]", self.at)
    local data = source:sub(self.at, (open or #source + 1) - 1)
    if not open then
      self:push("data", data)
      break
    end
    local mark = source:sub(open + 1, open + 1)
    local sign = source:match("^[-+]", open + 2) or ""
    local kept = self:before_open(data, sign, mark ~= "{")
    if kept ~= "" then self:push("data", kept) end
    self:advance(open + 2 + #sign)
    if mark == "#" then
      self:comment()
    elseif mark == "{" then
      self:push("open", "variable")
      self:inside "variable"
    elseif not self:raw() then
      self:push("open", "block")
      self:inside "block"
    end
  end
  self:push("eof")
  return self.tokens
end

return lexer
