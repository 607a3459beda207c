--- Result files of a run, made from its document and the rows in its store, never from live objects.
---
---   <folder>/<model>__full/results_<time>.json, samples_<task>_<time>.jsonl   see qlua.lm_eval
---   <folder>/<model>__nf4/...                      the same for the quantized twin
---   <folder>/comparison_<time>.json                the document, where it compares accuracies; else
---   <folder>/<script>_results_<time>.json          the document
---   <folder>/<script>_samples_<time>.jsonl         every question's metrics
---   <folder>/<script>_<table>_<time>.csv           every table
---   <folder>/<script>_llama-bench_<time>.<format>  batch sweeps, see qlua.llama_bench
---
--- <time> is when the run began, in UTC and to the microsecond, as lm-eval writes it: exporting a run again
--- gives the same names, two runs never share one. Each file appears whole or not at all.

local _ENV <const> = require "qlua.strict"

local failure = require "qlua.failure"
local files = require "qlua.files"
local json = require "qlua.json"
local llama_bench = require "qlua.llama_bench"
local lm_eval = require "qlua.lm_eval"
local sheets = require "qlua.sheets"

local export = {}

---@class qlua.run_document
---@field format 1
---@field run integer?          its number in the store
---@field name string           of the script
---@field started number        seconds since 1970
---@field finished number?
---@field status string?
---@field command string[]?
---@field options table
---@field labels string[]       {"full", "nf4"}
---@field facts table
---@field fairness table?
---@field rows table?
---@field sections qlua.section[]

local DOCUMENT_KEYS <const> = { "format", "run", "name", "status", "started", "finished", "command",
  "options", "script_sha256", "labels", "facts", "fairness", "rows", "sections", "kind", "task" }

--- A file name's worth of a model's name: its last folder, other signs as underscores.
local function file_name(text) return (text:gsub("/+$", ""):match "([^/]*)$":gsub("[^%w%.%-_+]", "_")) end

--- 2024-01-31T12-34-56.123456, in UTC.
---@param time number  seconds since 1970
---@return string
function export.stamp(time)
  local microseconds = math.floor(time * 1e6 + 0.5) -- exact: below 2^53 until the year 2255
  return ("%s.%06d"):format(os.date("!%Y-%m-%dT%H-%M-%S", math.tointeger(microseconds // 1000000)),
    math.tointeger(microseconds % 1000000))
end

--- The files of an export, written one after the other.
local plan = {}
plan.__index = plan

--- `path` holds %s where the time goes. Where two sections want one name, the later gets a number.
function plan:add(path, text)
  local at, n = path:format(self.time), 1
  while self.taken[at] do
    n = n + 1
    at = path:format(("%s-%d"):format(self.time, n))
  end
  self.taken[at] = true
  local written, err = files.write(at, text)
  if not written then error(err, 0) end
  self.paths[#self.paths + 1] = at
end

--- The rows that a section's result consists of, in their order.
function plan:rows(set)
  if not (set and self.store) then
    error(failure("not_found", ("%s: no samples of this run are in a store"):format(self.doc.name)), 0)
  end
  local found, err = self.store:run_rows(self.doc.run, set)
  if not found then error(err, 0) end
  local rows = {}
  for i, row in ipairs(found) do
    rows[i], err = json.decode(row[2], { name = ("%s, row %s"):format(self.doc.name, row[1]) })
    if not rows[i] then error(err, 0) end
  end
  return rows
end

local by_kind = {}

function by_kind.mmlu(self, section)
  local doc = self.doc
  local read = {}
  for i, outcome in ipairs(self.opts.log_samples and section.outcomes or {}) do
    read[i] = self:rows(outcome.set)
  end
  for m, label in ipairs(doc.labels) do
    local folder = ("%s/%s__%s"):format(self.folder, file_name(doc.options.model), file_name(label))
    self:add(folder .. "/results_%s.json", lm_eval.results(doc, section, m))
    for i, rows in ipairs(read) do
      local outcome, lines = section.outcomes[i], {}
      for r, row in ipairs(rows) do lines[r] = lm_eval.sample(doc, outcome, row, m) end
      self:add(("%s/samples_%s_%%s.jsonl"):format(folder, file_name(outcome.task)), table.concat(lines))
    end
  end
end

function by_kind.metrics(self, section)
  if not self.opts.log_samples then return end
  local lines = {}
  for i, row in ipairs(self:rows(section.set)) do
    lines[i] = json.encode({ doc_id = row.index - 1, question = row.question, values = row.values,
      control = row.control }, { keys = { "doc_id", "question" } }) .. "\n"
  end
  self:add(self.base .. "_samples_%s.jsonl", table.concat(lines))
end

function by_kind.sweep(self, section)
  for _, format in ipairs(self.opts.output_format or {}) do
    self:add(("%s_llama-bench_%%s.%s"):format(self.base, format), llama_bench.text(self.doc, section, format))
  end
end

local function wants(opts, format)
  for _, one in ipairs(opts.output_format or {}) do if one == format then return true end end
  return false
end

local function write_all(self)
  local of_accuracies = false
  for _, section in ipairs(self.doc.sections) do
    if by_kind[section.kind] then by_kind[section.kind](self, section) end
    for _, sheet in ipairs(wants(self.opts, "csv") and sheets.of(section, self.doc.labels) or {}) do
      self:add(("%s_%s_%%s.csv"):format(self.base, sheet.name), sheets.csv(sheet))
    end
    of_accuracies = of_accuracies or section.kind == "mmlu"
  end
  self:add(of_accuracies and self.folder .. "/comparison_%s.json" or self.base .. "_results_%s.json",
    json.encode(self.doc, { indent = 2, keys = DOCUMENT_KEYS }) .. "\n")
end

---@class qlua.export_options
---@field log_samples boolean?     a line of every question as well; needs the store
---@field output_format string[]?  "csv": every table; a batch sweep in qlua.llama_bench's formats

--- Writes the files of a run. Returns their names; where one cannot be written, the error says what is kept.
---@param doc qlua.run_document
---@param store qlua.store?
---@param folder string
---@param opts? qlua.export_options
---@return string[]?, qlua.failure?
function export.write(doc, store, folder, opts)
  local self = setmetatable({ doc = doc, store = store, folder = folder, opts = opts or {}, paths = {},
    taken = {}, time = export.stamp(doc.started),
    base = ("%s/%s"):format(folder, file_name(doc.name):gsub("%.lua$", "")):gsub("%%", "%%%%") }, plan)
  self.folder = folder:gsub("%%", "%%%%")
  local ok, err = xpcall(write_all, function(e)
    return type(e) == "table" and e.message and e or debug.traceback(e, 2)
  end, self)
  if ok then return self.paths end
  if type(err) ~= "table" then error(err, 0) end
  local kept = {}
  if #self.paths > 0 then kept[1] = ("kept: %s"):format(table.concat(self.paths, ", ")) end
  if store then kept[#kept + 1] = ("the results are in %s"):format(store:path()) end
  local hint = err.hint and { err.hint, table.unpack(kept) } or kept
  return nil, failure(err.code, err.message, #hint > 0 and table.concat(hint, "; ") or nil)
end

return export
