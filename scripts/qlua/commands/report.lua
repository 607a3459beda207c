--- qlua report: one HTML page of a run, or of several that measured the same two models.

local cli = require "qlua.cli"
local failure = require "qlua.failure"
local lfs = require "lfs"
local report = require "qlua.report"
local runs = require "qlua.runs"
local verdict = require "qlua.report.verdict"

local NAME <const> = "qlua report"

local opts = cli.parse {
  name = NAME,
  summary = "Should the model be quantized? One offline page with the verdict, its rule and the charts.",
  options = {
    { "runs", positional = true, many = true,
      help = "a number, latest, FOLDER:NUMBER, FOLDER:latest, or the file of an exported document; default: "
        .. "the newest run, and the newest of every other script on the same two models" },
    { "output_path", default = "qlua-results", metavar = "FOLDER",
      help = "the folder, or qlua.sqlite itself, whose runs plain numbers are" },
    { "output", metavar = "FILE", help = "the page (default: report.html in that folder)" },
    { "margin", kind = "number", default = verdict.MARGIN, min = 0, max = 100, metavar = "POINTS",
      help = "the loss of accuracy that you can accept" },
  },
}

local function must(value, err)
  if value == nil then cli.fail(NAME, err) end
  return value
end

--- Numbers of the runs that `runs.newest` chooses.
local function newest(folder)
  local store <close> = must(runs.open(folder))
  local numbers = {}
  for i, doc in ipairs(must(runs.newest(store))) do numbers[i] = tostring(doc.run) end
  if #numbers == 0 then
    must(nil, failure("not_found", ("%s: no run has results yet"):format(store:path()),
      "run an experiment: qlua examples/mmlu.lua"))
  end
  return numbers
end

local function by_age(a, b)
  local x, y = a.document.started or 0, b.document.started or 0
  if x ~= y then return x < y end
  return a.name < b.name
end

local names = #opts.runs > 0 and opts.runs or newest(opts.output_path)
local found, docs, by_document, seen = {}, {}, {}, {}
for _, name in ipairs(names) do
  local run = must(runs.find(name, opts.output_path))
  if seen[run.name] then cli.fail(NAME, name .. ": named twice") end
  seen[run.name] = true
  found[#found + 1] = run
end
table.sort(found, by_age)
for i, run in ipairs(found) do docs[i], by_document[run.document] = run.document, run end

local folder = lfs.attributes(opts.output_path, "mode") == "file" and (opts.output_path:match "^(.*)/" or ".")
  or opts.output_path
local path = opts.output or folder:gsub("(.)/+$", "%1") .. "/report.html"
must(report.save(docs, function(doc, set)
  local store = by_document[doc].store
  if not store then return {} end
  return report.texts(store, doc.run, set)
end, path, { margin = opts.margin }))
for _, run in ipairs(found) do run:close() end
for _, doc in ipairs(docs) do
  io.stdout:write(("run %s (%s)%s\n"):format(doc.run or "–", doc.name, doc.status ~= "finished"
    and doc.status and ": " .. doc.status .. ", what it had finished" or ""))
end
io.stdout:write("wrote ", path, "\n")
