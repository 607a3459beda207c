--- What functions compute, as a digest: their code and everything that they refer to, as it stands in memory.
---
--- Followed are functions, numbers, texts and tables, however deep, and the globals that a script has set;
--- models and tensors stand by what is in them. Of the library's own functions only the code and the plain
--- values count, and its objects do not: who gives them to run:map says what they depend on.

local _ENV <const> = require "qlua.strict"

local lua = _G.package
local code = {}

local LIBRARY <const> = debug.getinfo(1, "S").source:match "^@.*/"

local function of_library(fn)
  local source = debug.getinfo(fn, "S").source
  return source == "=[C]" or source:sub(1, #LIBRARY) == LIBRARY
end

--- Compiled code without the numbers of its lines, which move with every line put above it. The format is
--- that of Lua 5.4 (ldump.c), stripped; anything else is an error.
local function without_lines(dump)
  local at, kept = 1, {}
  local function take(n)
    kept[#kept + 1] = dump:sub(at, at + n - 1)
    at = at + n
  end
  local function number() -- seven bits a byte; the last has the eighth
    local n, byte = 0
    repeat
      byte = dump:byte(at)
      n, at = n << 7 | byte & 0x7f, at + 1
    until byte >= 0x80
    return n
  end
  local function count()
    local n = number()
    kept[#kept + 1] = ("%d "):format(n)
    return n
  end
  local function text() take(math.max(0, count() - 1)) end
  local function body()
    text() -- the source's name
    number() -- first line
    number() -- last line
    take(3) -- parameters, whether there may be more, registers
    take(4 * count()) -- instructions
    for _ = 1, count() do
      local kind = dump:byte(at)
      take(1)
      if kind == 0x03 or kind == 0x13 then take(8) elseif kind == 0x04 or kind == 0x14 then text() end
    end
    take(3 * count()) -- upvalues
    for _ = 1, count() do body() end
    for _ = 1, 4 do assert(number() == 0) end -- what a stripped function lacks
  end
  take(32)
  body()
  assert(at == #dump + 1)
  return table.concat(kept)
end

--- Names of what need not be followed: modules of C and of the library, and the functions written in C.
local function named()
  local names, functions = {}, {}
  local function add(path, module, deep)
    for key, value in pairs(module) do
      if type(value) == "function" then
        functions[value] = path .. "." .. tostring(key)
      elseif deep and type(value) == "table" then
        add(path .. "." .. tostring(key), value)
      end
    end
  end
  for name, module in pairs(lua.loaded) do
    if type(module) == "table" and module ~= _G
      and (name:find "^qlua" or not lua.searchpath(name, lua.path)) then
      names[module] = name
      add(name, module, true)
    end
  end
  if _G.arg then names[_G.arg] = "arg" end
  return names, functions
end

---@class qlua.code_walk
---@field parts string[]
---@field names table<any, string>          what stands for a thing that is not followed, or has been
---@field functions table<function, string>  those written in C
---@field model fun(model: qlua.model): table
local walk = {}
walk.__index = walk

--- Whether a table is one of the library's objects, by its methods.
local function is_object(meta)
  for _, list in ipairs { meta, type(meta.__index) == "table" and meta.__index or nil } do
    for _, method in pairs(list) do
      if type(method) == "function" then return of_library(method) end
    end
  end
  return false
end

function walk:add_function(fn)
  local dumped, dump = pcall(string.dump, fn, true)
  if not dumped then return self:put(self.functions[fn] or "C") end
  local cut, rest = pcall(without_lines, dump)
  self:put(cut and rest or dump)
  local ours = of_library(fn)
  for i = 1, math.huge do
    local name, value = debug.getupvalue(fn, i)
    if not name then return end
    local kind = type(value)
    if not (ours and (kind == "table" or kind == "userdata")) then self:add(value) end
  end
end

function walk:add_table(list)
  local meta = debug.getmetatable(list)
  if meta and is_object(meta) then return end
  self:add(meta)
  local keys, n = {}, rawlen(list)
  for i = 1, n do self:add(rawget(list, i)) end
  for key in next, list do
    local kind = type(key)
    if (kind == "string" or kind == "number" or kind == "boolean")
      and not (math.type(key) == "integer" and key >= 1 and key <= n) then
      keys[#keys + 1] = key
    end
  end
  table.sort(keys, function(a, b) return ("%q"):format(a) < ("%q"):format(b) end)
  for _, key in ipairs(keys) do
    self:add(key)
    self:add(rawget(list, key))
  end
end

--- A closed model or tensor gives no values.
function walk:add_userdata(value)
  local meta = debug.getmetatable(value)
  local name = meta and meta.__name
  if name == "qlua.model" and pcall(value.info, value) then
    self:add(self.model(value))
  elseif name == "qlua.tensor" then
    local open, numbers = pcall(value.totable, value)
    self:add(open and numbers or nil)
  end
end

function walk:put(text) self.parts[#self.parts + 1] = text end

function walk:add(value)
  local kind = type(value)
  local add = self["add_" .. kind]
  if not add then
    self:put(kind == "thread" and kind or ("%q"):format(value))
  elseif self.names[value] then
    self:put(self.names[value])
  else
    self.names[value] = ("#%d"):format(#self.parts)
    self:put(kind)
    add(self, value)
  end
end

--- The digest of a list of functions and tables.
---@param list (function|table)[]
---@param known table<any, string>  what is not followed, and what stands for it
---@param model fun(model: qlua.model): table  what stands for another model
---@return string
function code.digest(list, known, model)
  local names, functions = named()
  for thing, name in pairs(known) do names[thing] = name end
  local self = setmetatable({ parts = {}, names = names, functions = functions, model = model }, walk)
  for _, entry in ipairs(list) do self:add(entry) end
  return require("qlua.sys").sha256(table.concat(self.parts, "\0"))
end

return code
