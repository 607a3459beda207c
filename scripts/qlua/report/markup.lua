--- HTML and SVG as values. Text is escaped wherever it is put; only what this module made is markup.
---
---   local h = markup.tags
---   h.td { class = "n", ["data-value"] = 0.5, "a < b", h.b { "c" } }    -- <td class="n" ...>a &lt;
--- b<b>c</b></td>
---
--- Children are strings and numbers (escaped), markup, lists of these, and nil or false, which stand for
--- nothing. Attributes appear in alphabetical order, so that equal values are equal bytes.

local _ENV <const> = require "qlua.strict"

local markup = {}

---@class qlua.markup
---@field text string
local made = {}
made.__index = made
made.__name = "qlua.markup"
function made:__tostring() return self.text end

local REPLACEMENT <const> = "\u{FFFD}"

local function control(c)
  local code = c:byte()
  return utf8.char(code == 127 and 0x2421 or 0x2400 + code)
end

--- Valid UTF-8: every byte that is none becomes U+FFFD.
local function valid(s)
  local parts, at = {}, 1
  while at <= #s do
    local _, bad = utf8.len(s, at)
    if not bad then break end
    parts[#parts + 1] = s:sub(at, bad - 1) .. REPLACEMENT
    at = bad + 1
  end
  return #parts > 0 and table.concat(parts) .. s:sub(at) or s
end

--- Text that shows as it is: no control characters but tab and line feed (their pictures instead), no line
--- separators that a reader of the source takes for a line's end, no characters that HTML and XML forbid.
---@param s string
---@return string
function markup.clean(s)
  s = s:gsub("\r\n?", "\n")
  if s:find "[\0-\8\11-\31\127]" then s = s:gsub("[\0-\8\11-\31\127]", control) end
  if not s:find "[\x80-\xFF]" then return s end
  s = valid(s)
  s = s:gsub("\u{2028}", "\n"):gsub("\u{2029}", "\n")
  s = s:gsub("\xC2[\x80-\x9F]", REPLACEMENT) -- C1 controls
  return (s:gsub("\xEF\xBF[\xBE\xBF]", REPLACEMENT)) -- U+FFFE, U+FFFF
end

local ESCAPES <const> = { ["&"] = "&amp;", ["<"] = "&lt;", [">"] = "&gt;", ['"'] = "&quot;",
  ["'"] = "&#39;" }

local function escape(s) return (markup.clean(s):gsub("[&<>\"']", ESCAPES)) end

--- Shortest text that reads back as the same number.
---@param x number
---@return string
function markup.number(x)
  if math.type(x) == "integer" then return tostring(x) end
  if x == math.floor(x) and math.abs(x) < 1e15 then return ("%d"):format(math.tointeger(x)) end
  for digits = 6, 17 do
    local s = ("%%.%dg"):format(digits):format(x)
    if tonumber(s) == x then return s end
  end
  return ("%.17g"):format(x)
end

local function escaped(value)
  if type(value) == "number" then return markup.number(value) end
  return escape(tostring(value))
end

local function put(parts, child)
  if child == nil or child == false then return end
  if type(child) ~= "table" then
    parts[#parts + 1] = escaped(child)
  elseif getmetatable(child) == made then
    parts[#parts + 1] = child.text
  else
    for i = 1, #child do put(parts, child[i]) end
  end
end

--- Several pieces as one.
---@param list any[]
---@return qlua.markup
function markup.join(list)
  local parts = {}
  put(parts, list)
  return setmetatable({ text = table.concat(parts) }, made)
end

--- Markup written by hand: a constant of the report's own, never text from outside.
---@param text string
---@return qlua.markup
function markup.raw(text) return setmetatable({ text = text }, made) end

local VOID <const> = { meta = ">", br = ">", hr = ">", input = ">", path = "/>", circle = "/>", rect = "/>",
  line = "/>", polyline = "/>", polygon = "/>" }

local function element(name, given)
  local names, parts = {}, { "<" .. name }
  local last = 0
  for key in pairs(given) do
    if type(key) == "string" then names[#names + 1] = key else last = math.max(last, key) end
  end
  table.sort(names)
  for _, key in ipairs(names) do
    local value = given[key]
    if value == true then
      parts[#parts + 1] = " " .. key
    elseif value ~= false then
      parts[#parts + 1] = (' %s="%s"'):format(key, (escaped(value):gsub("\n", "&#10;")))
    end
  end
  if VOID[name] then
    parts[#parts + 1] = VOID[name]
  else
    parts[#parts + 1] = ">"
    for i = 1, last do put(parts, given[i]) end
    parts[#parts + 1] = "</" .. name .. ">"
  end
  return setmetatable({ text = table.concat(parts) }, made)
end

--- `tags.name { attribute = value, child, ... }`: an element.
markup.tags = setmetatable({}, { __index = function(tags, name)
  local function make(given) return element(name, given) end
  rawset(tags, name, make)
  return make
end })

return markup
