--- The question browser: every question's answers of both models side by side, filtered without a script, and
--- what to leave out where they are too many for a page.

local _ENV <const> = require "qlua.strict"

local markup = require "qlua.report.markup"
local parts = require "qlua.report.parts"

local h <const> = markup.tags

local questions = {}

local LETTERS <const> = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
local LONGEST <const> = 3000 -- characters of one text

--- The classes of the filter, those first that tell most. `short` stands on the question itself.
local CLASSES <const> = { "quantized", "full", "differ", "wrong", "right" }

local function number_of(value) return type(value) == "number" and value or nil end

local function letter(answer)
  answer = math.tointeger(number_of(answer) or 0)
  return answer and answer >= 1 and answer <= #LETTERS and LETTERS:sub(answer, answer) or nil
end

--- Which class a row of the store belongs to.
local function class_of(row)
  local gold = row.doc.answer
  local a, b = number_of(row.models[1].answer), number_of(row.models[2].answer)
  local right_a, right_b = a == gold, b == gold
  if right_a and right_b then return "right" end
  if right_a then return "quantized" end
  if right_b then return "full" end
  return a == b and "wrong" or "differ"
end

---@class qlua.report_question
---@field task string
---@field class string
---@field row table      value of the store's row

--- The rows of all outcomes, the most telling first, and how many there are of each class.
---@param outcomes { outcome: table, rows: table[] }[]  rows: values as the store's rows hold them
---@return qlua.report_question[], table<string, integer>
function questions.sorted(outcomes)
  local by_class, counts = {}, {}
  for _, class in ipairs(CLASSES) do by_class[class], counts[class] = {}, 0 end
  for _, entry in ipairs(outcomes) do
    for _, row in ipairs(entry.rows) do
      if type(row.models) == "table" and row.models[1] and row.models[2] and type(row.doc) == "table" then
        local class = class_of(row)
        counts[class] = counts[class] + 1
        table.insert(by_class[class], { task = entry.outcome.task, class = class, row = row })
      end
    end
  end
  local list = {}
  for _, class in ipairs(CLASSES) do table.move(by_class[class], 1, #by_class[class], #list + 1, list) end
  return list, counts
end

--- At most `longest` characters, and how many more there are.
local function cut(text, longest)
  text = markup.clean(text)
  local length = utf8.len(text)
  if length <= longest then return text, 0 end
  return text:sub(1, utf8.offset(text, longest + 1) - 1), length - longest
end

--- Where two texts part: the first byte of the first word that differs, in each; nil where they are equal.
local function parting(a, b)
  if a == b then return nil end
  local at = 1
  while true do
    local word_a, end_a = a:match("^%s*()%S*()", at)
    local word_b, end_b = b:match("^%s*()%S*()", at)
    if a:sub(at, end_a - 1) ~= b:sub(at, end_b - 1) then return word_a, word_b end
    at = end_a
  end
end

--- A model's text with the word marked where it parts from the other's.
local function marked(text, from)
  local shown, more = cut(text, LONGEST)
  if not from or from > #shown + 1 then
    return { shown, more > 0 and h.em { (" … %d more characters"):format(more) } or false }
  end
  local _, last = shown:find("^%S*", from)
  if last < from then last = math.min(#shown, from) end
  local word = from > #shown and "⏎ ends here" or shown:sub(from, last)
  return { shown:sub(1, from - 1), h.mark { word }, shown:sub(last + 1),
    more > 0 and h.em { (" … %d more characters"):format(more) } or false }
end

local function written(row, labels)
  local texts = {}
  for m = 1, 2 do texts[m] = markup.clean(tostring(row.models[m].text or "")) end
  local from, columns = { parting(texts[1], texts[2]) }, {}
  for m = 1, 2 do
    local model = row.models[m]
    columns[m] = h.div { class = "o" .. m, h.h4 { labels[m], ": ", letter(model.answer) or "no letter",
      model.stop == "length" and " (cut off)" or "" }, h.pre { dir = "auto", marked(texts[m], from[m]) } }
  end
  return h.div { class = "two-up", columns, not from[1] and h.p { class = "note", "Both wrote the same." }
    or false }
end

--- Choices with both models' log-likelihoods, what each picked and what is right.
local function scored(row, labels)
  local body = {}
  for i, choice in ipairs(row.doc.choices or {}) do
    local cells = { h.th { scope = "row", LETTERS:sub(i, i), i == row.doc.answer and " ✓" or "" },
      h.td { dir = "auto", (cut(tostring(choice), LONGEST)) } }
    for m = 1, 2 do
      local model = row.models[m]
      local score = number_of((model.scores or {})[i])
      cells[#cells + 1] = h.td { class = number_of(model.answer) == i and "n p" .. m or "n",
        ["data-value"] = score, score and ("%.3f"):format(score) or "–",
        number_of(model.answer) == i and { " ", h.i { m == 1 and "●" or "■" } } or "" }
    end
    body[i] = h.tr { class = i == row.doc.answer and "gold" or nil, cells }
  end
  return h.div { class = "scroll", h.table { h.thead { h.tr { h.td {}, h.th { scope = "col", "choice" },
    h.th { scope = "col", class = "n", labels[1], " ln p" },
    h.th { scope = "col", class = "n", labels[2], " ln p" } } }, h.tbody { body } } }
end

local function choices(row)
  local items = {}
  for i, choice in ipairs(row.doc.choices or {}) do
    items[i] = h.li { dir = "auto", class = i == row.doc.answer and "gold" or nil,
      (cut(tostring(choice), LONGEST)), i == row.doc.answer and " ✓" or "" }
  end
  return h.ol { type = "A", items }
end

---@param entry qlua.report_question
---@param labels string[]
---@return qlua.markup
function questions.item(entry, labels)
  local row = entry.row
  local text = markup.clean(tostring(row.doc.question or ""))
  local head, more = cut(text:gsub("%s+", " "), 110)
  local a, b = letter(row.models[1].answer) or "–", letter(row.models[2].answer) or "–"
  return h.details { class = "q q-" .. entry.class,
    h.summary { h.span { class = "qn", ("%s %s"):format(entry.task, row.index or "") },
      h.span { class = "qt", dir = "auto", head, more > 0 and "…" or "" },
      h.span { class = "qa", title = ("right: %s, %s: %s, %s: %s"):format(letter(row.doc.answer) or "–",
        labels[1], a, labels[2], b), "✓", letter(row.doc.answer) or "–", " ",
          h.i { class = "i1", "●" }, a, " ",
        h.i { class = "i2", "■" }, b } },
    (more > 0 or text:find "\n") and h.p { class = "full", dir = "auto", (cut(text, LONGEST)) } or false,
    row.models[1].text and { choices(row), written(row, labels) } or scored(row, labels) }
end

local function filter(names, counts, total)
  local list = {}
  for i, entry in ipairs(names) do
    local class, name = entry[1], entry[2]
    list[i] = { h.input { type = "radio", name = "show", id = "f-" .. class, checked = class == "all" },
      h.label { ["for"] = "f-" .. class, name, " ", h.b { class == "all" and total or counts[class] } } }
  end
  return list
end

--- The browser with as many questions as fit into `budget` bytes, in the order given; and how many those are.
---@param list qlua.report_question[]
---@param counts table<string, integer>
---@param labels string[]
---@param budget integer
---@param details string  name of the file that has them all
---@return qlua.markup, integer
function questions.browser(list, counts, labels, budget, details)
  local head = h.h2 { id = "questions-h", "Questions" }
  if #list == 0 then
    return h.section { id = "questions", ["aria-labelledby"] = "questions-h", head,
      h.p { class = "note",
        "No question’s answers are at hand: the runs asked none, or their store is not here." } }, 0
  end
  local items, used = {}, 0
  for i, entry in ipairs(list) do
    local item = questions.item(entry, labels)
    used = used + #item.text
    if used > budget then break end
    items[i] = item
  end
  local names = { { "all", "all" }, { "quantized", ("only %s wrong"):format(labels[2]) },
    { "full", ("only %s wrong"):format(labels[1]) }, { "differ", "both wrong, other answers" },
    { "wrong", "both wrong, same answer" }, { "right", "both right" } }
  local left = #list - #items
  local note = left == 0 and ("All %s are here."):format(parts.plural(#list, "question"))
    or ("The page has room for %d of %d questions, the most telling first; all are in "):format(#items, #list)
  return h.section { id = "questions", ["aria-labelledby"] = "questions-h", head,
    h.p { class = "note", note, left > 0 and { h.code { details }, ", beside this page." } or false,
      " ✓ right answer, ● ", labels[1], ", ■ ", labels[2], "." },
    h.div { class = "browser", h.fieldset { h.legend { "Show" }, filter(names, counts, #list) },
      h.div { class = "list", items } } }, #items
end

return questions
