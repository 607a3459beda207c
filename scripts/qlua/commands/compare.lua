--- qlua compare: two runs against each other, or the runs there are.

local cli = require "qlua.cli"
local compare = require "qlua.compare"
local json = require "qlua.json"
local runs = require "qlua.runs"
local sys = require "qlua.sys"
local tables = require "qlua.table"
local text = require "qlua.compare.text"

local NAME <const> = "qlua compare"

local opts = cli.parse {
  name = NAME,
  summary = "What differs between two runs, and every figure that both have; without runs: which there are.",
  options = {
    { "runs", positional = true, many = true,
      help = "a number, latest, FOLDER:NUMBER, FOLDER:latest, or the file of an exported document" },
    { "output_path", default = "qlua-results", help = "the folder whose runs plain numbers are" },
    { "format", default = "text", choices = { "text", "json", "csv", "md" }, help = "of the comparison" },
  },
}

local function must(value, err)
  if value == nil then cli.fail(NAME, err) end
  return value
end

local colour <const> = tables.bold_allowed(sys.isatty(1))

if #opts.runs == 0 then
  local store <close> = must(runs.open(opts.output_path))
  io.stdout:write(must(runs.table(store)):text { bold = colour })
  return
end
if #opts.runs ~= 2 then
  cli.fail(NAME, ("two runs are compared, not %d (see --help)"):format(#opts.runs))
end

local a <close> = must(runs.find(opts.runs[1], opts.output_path))
local b <close> = must(runs.find(opts.runs[2], opts.output_path))
local result = must(compare.runs(a, b))

if opts.format == "json" then
  io.stdout:write(json.encode(result, { indent = 2 }), "\n")
elseif opts.format == "csv" then
  io.stdout:write(text.csv(result))
else
  io.stdout:write(text.text(result, { markdown = opts.format == "md",
    colour = opts.format == "text" and colour }))
end
