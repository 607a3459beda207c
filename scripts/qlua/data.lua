--- Multiple-choice questions from files: MMLU's CSV as released and JSON lines.
---
--- A file from a stranger either becomes a list of items or an error that names the file and the line on
--- which the offending row starts; a bad row is never skipped. Lines count from 1. Answers are 1..4.

local _ENV <const> = require "qlua.strict"

local failure = require "qlua.failure"
local sys = require "qlua.sys"

local data = {}

local LETTERS <const> = { A = 1, B = 2, C = 3, D = 4 }
local MAX_BYTES <const> = 256 * 1024 * 1024 -- all of MMLU is 15 MB; more than this is not a list of questions

---@class qlua.item
---@field question string
---@field choices string[]  four texts
---@field answer integer    1..4
---@field line integer      where the row starts in the file
---@field subject string?   only where a JSON line names one

---@class qlua.items
---@field [integer] qlua.item
---@field subject string    from the file's name
---@field path string
---@field sha256 string?   of the file's bytes
---@field all integer?  questions of the file, where some were left out

local function format_error(path, line, message, hint)
  local where = line and (path .. ":" .. line) or path
  return nil, failure("format", where .. ": " .. message, hint)
end

local function count_newlines(text, first, last)
  local n, at = 0, first
  while true do
    at = text:find("\n", at, true)
    if not at or at > last then return n end
    n, at = n + 1, at + 1
  end
end

--- Reads one quoted field whose opening quote is at `from`. Returns the text and the position after the
--- closing quote, or nil when the file ends first.
local function quoted_field(text, from)
  local parts, at = {}, from + 1
  while true do
    local close = text:find('"', at, true)
    if not close then return nil end
    if text:byte(close + 1) ~= 34 then
      parts[#parts + 1] = text:sub(at, close - 1)
      return table.concat(parts), close + 1
    end
    parts[#parts + 1] = text:sub(at, close)
    at = close + 2
  end
end

--- Splits CSV text (RFC 4180: quoted fields hold commas, newlines and doubled quotes; LF or CRLF) into rows
--- of fields, calling `each(fields, line)`; a row is dropped only when it is an empty line. Stops at the
--- first failure: returns nil and the error, which `each` may also return.
local function each_row(text, path, each)
  local at, line, size = 1, 1, #text
  while at <= size do
    local fields, row_line = {}, line
    local ended = false
    while not ended do
      local field
      if text:byte(at) == 34 then
        local field_line, start = line, at
        field, at = quoted_field(text, start)
        if not field then
          return format_error(path, field_line, "quoted field is never closed",
            'add the missing " or double it')
        end
        line = line + count_newlines(text, start, at - 1)
        if at <= size and not text:find("^[,\r\n]", at) then
          return format_error(path, row_line, "text after the closing quote of field " .. #fields + 1,
            'a quote inside a quoted field is written ""')
        end
      else
        local stop = text:find("[,\r\n]", at) or size + 1
        field, at = text:sub(at, stop - 1), stop
      end
      fields[#fields + 1] = field
      local byte = text:byte(at)
      if byte == 44 then
        at = at + 1
        if at > size then fields[#fields + 1], ended = "", true end
      else
        ended = true
        at = at + ((byte == 13 and text:byte(at + 1) == 10) and 2 or 1)
        line = line + 1
      end
    end
    if #fields > 1 or fields[1] ~= "" then
      local ok, err = each(fields, row_line)
      if not ok then return nil, err end
    end
  end
  return true
end

--- Checks what every reader needs of a text and drops a byte order mark.
local function clean(text, path)
  if text:sub(1, 3) == "\xEF\xBB\xBF" then text = text:sub(4) end
  local nul = text:find("\0", 1, true)
  if nul then
    return format_error(path, 1 + count_newlines(text, 1, nul), "NUL byte: this is not a text file")
  end
  local length, bad = utf8.len(text)
  if not length then
    return format_error(path, 1 + count_newlines(text, 1, bad), "not valid UTF-8",
      "convert the file, e.g. iconv -f latin1 -t utf-8")
  end
  if not text:find("%S") then
    return format_error(path, nil, "the file is empty", "expected rows of question,A,B,C,D,answer")
  end
  if text:find("^version https://git%-lfs") then
    return format_error(path, nil, "this is a Git LFS pointer, not the file itself", "run: git lfs pull")
  end
  return text
end

local function checked_choices(choices)
  for i, choice in ipairs(choices) do
    if not choice:find("%S") then return nil, "choice " .. ("ABCD"):sub(i, i) .. " is empty" end
  end
  return choices
end

--- Items from the text of a CSV file; `path` only names it in errors.
---@param text string
---@param path string
---@return qlua.items?, qlua.failure?
function data.parse_csv(text, path)
  local cleaned, err = clean(text, path)
  if not cleaned then return nil, err end
  local items = { subject = data.subject(path), path = path }
  local ok, row_err = each_row(cleaned, path, function(fields, line)
    if #fields ~= 6 then
      return format_error(path, line, ("%d fields, expected 6: question,A,B,C,D,answer"):format(#fields),
        "quote fields that hold commas or newlines")
    end
    local letter = fields[6]:match("^%s*(.-)%s*$")
    local answer = LETTERS[letter]
    if not answer then
      local header = line == 1 and letter:lower() == "answer"
      return format_error(path, line, ('answer "%s" is not A, B, C or D'):format(letter:sub(1, 40)),
        header and "remove the header line: MMLU files have none" or nil)
    end
    if not fields[1]:find("%S") then return format_error(path, line, "the question is empty") end
    local choices, bad = checked_choices { fields[2], fields[3], fields[4], fields[5] }
    if not choices then return format_error(path, line, bad) end
    items[#items + 1] = { question = fields[1], choices = choices, answer = answer, line = line }
    return true
  end)
  if not ok then return nil, row_err end
  return items
end

local function jsonl_choices(row)
  if row.choices == nil then return { row.A, row.B, row.C, row.D } end
  return row.choices
end

local function jsonl_answer(row)
  local answer = row.answer
  if math.type(answer) == "integer" and answer >= 0 and answer <= 3 then return answer + 1 end
  return type(answer) == "string" and LETTERS[answer] or nil
end

local function jsonl_item(row, path, line)
  if type(row) ~= "table" then return format_error(path, line, "not a JSON object") end
  if type(row.question) ~= "string" or not row.question:find("%S") then
    return format_error(path, line, 'field "question" is missing or not a text')
  end
  local choices = jsonl_choices(row)
  local whole = type(choices) == "table" and #choices == 4
  for i = 1, whole and 4 or 0 do whole = whole and type(choices[i]) == "string" end
  if not whole then
    return format_error(path, line, 'field "choices" must be a list of four texts',
      "or give fields A, B, C and D")
  end
  local checked, bad = checked_choices { table.unpack(choices, 1, 4) }
  if not checked then return format_error(path, line, bad) end
  local answer = jsonl_answer(row)
  if not answer then
    return format_error(path, line, 'field "answer" must be A, B, C or D, or 0 to 3')
  end
  local subject = type(row.subject) == "string" and row.subject or nil
  return { question = row.question, choices = checked, answer = answer, line = line, subject = subject }
end

--- Items from the text of a JSON-lines file: {"question": ..., "choices": [4 texts], "answer": 0..3 or
--- "A".."D"}.
---@param text string
---@param path string
---@return qlua.items?, qlua.failure?
function data.parse_jsonl(text, path)
  local json = require "qlua.json"
  local cleaned, err = clean(text, path)
  if not cleaned then return nil, err end
  local items, line = { subject = data.subject(path), path = path }, 0
  for row_text in (cleaned .. "\n"):gmatch("(.-)\r?\n") do
    line = line + 1
    if row_text:find("%S") then
      local row, why = json.decode(row_text)
      if row == nil then return format_error(path, line, tostring(why)) end
      local item, bad = jsonl_item(row, path, line)
      if not item then return nil, bad end
      items[#items + 1] = item
    end
  end
  return items
end

local function read_all(path)
  local file, why = io.open(path, "rb")
  if not file then
    return nil, failure("not_found", ("%s: cannot open (%s)"):format(path, (why:gsub("^.*: ", ""))))
  end
  local chunks, total, read_why = {}, 0, nil
  while total <= MAX_BYTES do
    local chunk
    chunk, read_why = file:read(1 << 20)
    if not chunk then break end
    chunks[#chunks + 1], total = chunk, total + #chunk
  end
  file:close()
  if read_why then return nil, failure("io", ("%s: cannot read (%s)"):format(path, read_why)) end
  if total > MAX_BYTES then
    return nil, failure("unsupported", ("%s: larger than %d MiB"):format(path, MAX_BYTES >> 20))
  end
  return table.concat(chunks)
end

--- Reads a file of questions; the name's ending decides the format (.jsonl or .json lines, else CSV).
---@param path string
---@return qlua.items?, qlua.failure?
function data.read(path)
  local text, err = read_all(path)
  if not text then return nil, err end
  local parse = path:lower():find("%.jsonl?$") and data.parse_jsonl or data.parse_csv
  local items
  items, err = parse(text, path)
  if items then items.sha256 = sys.sha256(text) end
  return items, err
end

--- The subject that a file's name states: "data/test/virology_test.csv" -> "virology".
---@param path string
---@return string
function data.subject(path)
  local name = path:match("([^/]+)/*$") or path
  name = name:gsub("%.%w+$", "")
  for _, split in ipairs { "test", "dev", "val" } do
    local stem = name:match("^(.+)_" .. split .. "$")
    if stem then return stem end
  end
  return name
end

--- The file that holds the examples for few-shot prompts of `path`, as MMLU lays its folders out:
--- test/virology_test.csv -> dev/virology_dev.csv, or the same folder when there is no folder `test`. Never
--- the file of the questions itself.
---@param path string
---@return string?, qlua.failure?
function data.dev_path(path)
  local folder, name = path:match("^(.*/)([^/]*)$")
  folder, name = folder or "", name or path
  local dev_name, renamed = name:gsub("_test(%.%w+)$", "_dev%1")
  if renamed == 0 then
    return nil, failure("argument", ("%s: no name for its few-shot examples"):format(path),
      "name the files <subject>_test.csv and <subject>_dev.csv")
  end
  return folder:gsub("test/$", "dev/") .. dev_name
end

--- The first items of a list as lm-eval's --limit counts: a share of the list below 1 (rounded up), else a
--- number.
---@param items qlua.items
---@param limit number?
---@return qlua.items
function data.take(items, limit)
  if not limit then return items end
  if limit <= 0 then error("limit must be above 0", 2) end
  local n = limit < 1 and math.ceil(#items * limit) or math.floor(limit)
  local taken = table.move(items, 1, math.min(n, #items), 1, {})
  taken.subject, taken.path, taken.sha256 = items.subject, items.path, items.sha256
  taken.all = items.all or #items
  return taken
end

--- The items for which `keep(item)` is true, e.g. the short questions.
---@param items qlua.items
---@param keep fun(item: qlua.item): boolean
---@return qlua.items
function data.filter(items, keep)
  local kept = { subject = items.subject, path = items.path, sha256 = items.sha256,
    all = items.all or #items }
  for _, item in ipairs(items) do
    if keep(item) then kept[#kept + 1] = item end
  end
  return kept
end

return data
