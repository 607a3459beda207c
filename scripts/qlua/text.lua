--- Text as people count it: white space, columns, how many of a thing there are. All functions take any
--- bytes, valid UTF-8 or not.

local _ENV <const> = require "qlua.strict"

local text = {}

-- What Python's str.isspace() accepts beyond ASCII; ASCII is \t..\r, 0x1C..0x1F and the space.
local WIDE_SPACES <const> = {}
for _, code in ipairs { 0x85, 0xA0, 0x1680, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000 } do
  WIDE_SPACES[utf8.char(code)] = true
end
for code = 0x2000, 0x200A do WIDE_SPACES[utf8.char(code)] = true end

--- Length in bytes of the white space character that starts at `at`; nil when there is none.
local function space_at(s, at)
  if s:find("^[\t-\r\x1C-\x20]", at) then return 1 end
  if WIDE_SPACES[s:sub(at, at + 1)] then return 2 end
  if WIDE_SPACES[s:sub(at, at + 2)] then return 3 end
end

--- The same for the character that ends at `at`.
local function space_before(s, at)
  if s:find("^[\t-\r\x1C-\x20]", at) then return 1 end
  if at >= 2 and WIDE_SPACES[s:sub(at - 1, at)] then return 2 end
  if at >= 3 and WIDE_SPACES[s:sub(at - 2, at)] then return 3 end
end

--- The first position from `at` on that is no white space.
---@param s string
---@param at integer
---@return integer
function text.skip_space(s, at)
  while at <= #s do
    local length = space_at(s, at)
    if not length then break end
    at = at + length
  end
  return at
end

--- Without leading white space, as Python's str.lstrip().
---@param s string
---@return string
function text.lstrip(s)
  return s:sub(text.skip_space(s, 1))
end

--- Without trailing white space, as Python's str.rstrip().
---@param s string
---@return string
function text.rstrip(s)
  local last = #s
  while last >= 1 do
    local length = space_before(s, last)
    if not length then break end
    last = last - length
  end
  return s:sub(1, last)
end

--- Without white space at both ends, as Python's str.strip().
---@param s string
---@return string
function text.strip(s)
  return text.rstrip(text.lstrip(s))
end

--- The words of a text, as Python's str.split() without argument.
---@param s string
---@return string[]
function text.words(s)
  local words, start, at = {}, nil, 1
  while at <= #s do
    local length = space_at(s, at)
    if length and start then
      words[#words + 1], start = s:sub(start, at - 1), nil
    elseif not length and not start then
      start = at
    end
    at = at + (length or 1)
  end
  if start then words[#words + 1] = s:sub(start) end
  return words
end

-- Ranges of zero and of double width (Unicode 15: combining marks; East Asian Width W and F, emoji).
local ZERO <const> = {
  { 0x300, 0x36F }, { 0x200B, 0x200F }, { 0x20D0, 0x20F0 }, { 0xFE00, 0xFE0F }, { 0xFE20, 0xFE2F },
}
local DOUBLE <const> = {
  { 0x1100, 0x115F }, { 0x2E80, 0x303E }, { 0x3041, 0xA4CF }, { 0xA960, 0xA97F }, { 0xAC00, 0xD7A3 },
  { 0xF900, 0xFAFF }, { 0xFE30, 0xFE6F }, { 0xFF00, 0xFF60 }, { 0xFFE0, 0xFFE6 }, { 0x1F300, 0x1F64F },
  { 0x1F680, 0x1F6FF }, { 0x1F900, 0x1FAFF }, { 0x20000, 0x3FFFD },
}

local function within(code, ranges)
  for _, range in ipairs(ranges) do
    if code >= range[1] and code <= range[2] then return true end
  end
  return false
end

--- Columns that a text takes on a terminal; bytes that are no UTF-8 count one each.
---@param s string
---@return integer
function text.width(s)
  if not s:find("[\x80-\xFF]") then return #s end
  if not utf8.len(s) then return #s end
  local columns = 0
  for _, code in utf8.codes(s) do
    if within(code, DOUBLE) then
      columns = columns + 2
    elseif not within(code, ZERO) then
      columns = columns + 1
    end
  end
  return columns
end

--- "1 question", "12 questions", "2 passes".
---@param n integer
---@param one string
---@param many? string  default: `one` with an s
---@return string
function text.plural(n, one, many) return ("%d %s"):format(n, n == 1 and one or many or one .. "s") end

return text
