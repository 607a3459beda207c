--- report.html: one offline page that answers whether to quantize, from the documents of runs.
---
---   local path, err = report.write({ run:document() }, store, "qlua-results/report.html")
---
--- The page is under 300 KB and the same bytes for the same documents. Where not all questions fit, a file
--- beside it has them: report.html -> report_details.json.

local _ENV <const> = require "qlua.strict"

local failure = require "qlua.failure"
local files = require "qlua.files"
local json = require "qlua.json"
local page = require "qlua.report.page"
local questions = require "qlua.report.questions"

local report = {}

--- Bytes of a page at most.
report.BUDGET = 299000
--- What the browser needs beside its questions: heading, filter, a note.
local FRAME <const> = 3000

--- The outcomes of all documents with the rows that they consist of.
local function gathered(docs, rows)
  local list = {}
  for _, doc in ipairs(docs) do
    for _, section in ipairs(doc.sections or {}) do
      for _, o in ipairs(section.kind == "mmlu" and section.outcomes or {}) do
        list[#list + 1] = { outcome = o, rows = o.set and rows(doc, o.set) or {} }
      end
    end
  end
  return list
end

---@class qlua.report_options
---@field margin number?   points of accuracy that a reader can lose; default 2
---@field details string?  name of the file for the questions that do not fit; default "report_details.json"

--- The documents of pairs before those of a full model alone, else in their order.
local function pairs_first(docs)
  local list, others = {}, {}
  for _, doc in ipairs(docs) do table.insert(doc.facts and doc.facts.quantized and list or others, doc) end
  return table.move(others, 1, #others, #list + 1, list)
end

--- The page, and how many questions are not on it.
---@param docs table[]  of runs of one pair of models, oldest first
---@param rows? fun(doc: table, set: string): table[]  values of the store's rows of a run
---@param options? qlua.report_options
---@return string html, integer left_out
function report.html(docs, rows, options)
  options = options or {}
  docs = pairs_first(docs)
  local list, counts = questions.sorted(gathered(docs, rows or function() return {} end))
  local shown = 0
  local html = page.html(docs, { margin = options.margin, budget = report.BUDGET,
    browser = function(labels, left)
      local made
      made, shown = questions.browser(list, counts, labels, left - FRAME, options.details
        or "report_details.json")
      return made
    end })
  return html, #list - shown
end

--- What a document measured, in words: the full model, and the quantized one where there was one.
local function pair_of(doc)
  local facts = doc.facts or {}
  local full, quantized = facts.full or {}, facts.quantized
  local model = ("%s in %s"):format(tostring(facts.model_sha256 or "unknown"):sub(1, 12), full.dtype
    or "its type")
  if not quantized then return model end
  local q = type(quantized.quant) == "table" and quantized.quant or {}
  return model, ("%s, block %s, %s bits a weight"):format(doc.labels[2] or "quantized", q.block or "–",
    q.bits and ("%.4f"):format(q.bits) or "–")
end

--- Whether the documents are of one pair of models: a page about two would mislead. One that has only the
--- full model, with variants of its own, goes with any pair of it.
---@param docs table[]
---@return boolean?, qlua.failure?
function report.same_pair(docs)
  local first, model, twin
  for _, doc in ipairs(docs) do
    local its_model, its_twin = pair_of(doc)
    if not first then
      first, model = doc, its_model
    elseif model ~= its_model or twin and its_twin and twin ~= its_twin then
      return nil, failure("argument",
        ("run %s (%s) and run %s (%s) are of different models"):format(first.run,
        twin or model, doc.run, model == its_model and its_twin or its_model), "make a report of each")
    end
    if its_twin and not twin then first, twin = doc, its_twin end
  end
  return true
end

--- Everything that the store has of the questions, as JSON; rows as they lie in the store.
local function details_of(docs, texts)
  local parts = { '{"format":1,"sets":[' }
  local first = true
  for _, entry in ipairs(gathered(docs, texts)) do
    local o = entry.outcome
    parts[#parts + 1] = ("%s\n%s"):format(first and "" or ",", json.encode { task = o.task,
      set = o.set }:sub(1, -2)
      .. ',"rows":[\n')
    parts[#parts + 1] = table.concat(entry.rows, ",\n")
    parts[#parts + 1] = "]}"
    first = false
  end
  parts[#parts + 1] = "]}\n"
  return table.concat(parts)
end

--- Writes the page as `path`, and the questions that it has no room for beside it.
---@param docs table[]
---@param text_of fun(doc: table, set: string): string[]?, qlua.failure?  rows of a run as JSON texts
---@param path string
---@param options? { margin: number? }
---@return string? path, qlua.failure? err
function report.save(docs, text_of, path, options)
  local same, err = report.same_pair(docs)
  if not same then return nil, err end
  local texts = {}
  local function remembered(doc, set)
    if not (texts[doc] and texts[doc][set]) then
      local list, why = text_of(doc, set)
      err = err or why
      texts[doc] = texts[doc] or {}
      texts[doc][set] = list or {}
    end
    return texts[doc][set]
  end
  local function rows_of(doc, set)
    local values = {}
    for i, text in ipairs(remembered(doc, set)) do
      local value, why = json.decode(text)
      err = err or why
      values[i] = value or {}
    end
    return values
  end
  local beside = path:gsub("%.html?$", "") .. "_details.json"
  local html, left = report.html(docs, rows_of, { margin = options and options.margin,
    details = beside:match "[^/]*$" })
  if err then return nil, err end
  if left > 0 then
    local ok
    ok, err = files.write(beside, details_of(docs, remembered))
    if not ok then return nil, err end
  end
  local ok
  ok, err = files.write(path, html)
  if not ok then return nil, err end
  return path
end

--- The rows of a run as JSON texts, in order.
---@param store qlua.store
---@param run integer
---@param set string
---@return string[]?, qlua.failure?
function report.texts(store, run, set)
  local list, err = store:run_rows(run, set)
  if not list then return nil, err end
  local texts = {}
  for i, row in ipairs(list) do texts[i] = row[2] end
  return texts
end

--- The same with rows out of the store that the runs are in.
---@param docs table[]
---@param store qlua.store
---@param path string
---@param options? { margin: number? }
---@return string? path, qlua.failure? err
function report.write(docs, store, path, options)
  return report.save(docs, function(doc, set) return report.texts(store, doc.run, set) end, path, options)
end

return report
