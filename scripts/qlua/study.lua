--- Several experiments in one process: each is a script like any other, run with arguments of its own, and
--- what ends a script ends only that part of the study. Models are loaded once (qlua.experiment).
---
---   local all <close> = study.begin()
---   all:run("jaccard", "examples/jaccard.lua", { "--limit=20" })
---   io.write(all:outcomes())

local _ENV <const> = require "qlua.strict"

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local interrupt = require "qlua.interrupt"
local json = require "qlua.json"
local runs = require "qlua.runs"
local tables = require "qlua.table"
local verdict = require "qlua.report.verdict"

---@class qlua.study
---@field shared table  devices and models that stay open
---@field parts qlua.study_part[]
local study = {}
study.__index = study

---@class qlua.study_part
---@field name string
---@field ok boolean
---@field interrupted boolean  by Ctrl-C; the parts after it are not begun
---@field message string?      in one line, where it failed

---@return qlua.study
local function begin() return setmetatable({ shared = experiment.share(), parts = {} }, study) end

function study:__close() self.shared:close() end

--- Arguments that say to another script what options say here; those that stand as they would by default are
--- left out.
---@param opts table<string, any>
---@param defaults table<string, any>
---@param names string[]
---@return string[]
local function arguments(opts, defaults, names)
  local words = {}
  for _, name in ipairs(names) do
    local value, before = opts[name], defaults[name]
    if value ~= nil and (before == nil or json.encode(value) ~= json.encode(before)) then
      if type(value) == "table" then value = table.concat(value, ",") end
      words[#words + 1] = value == true and "--" .. name or ("--%s=%s"):format(name, value)
    end
  end
  return words
end

--- What a script ends itself with, here an error that only `outcome` meets.
local ending = {}

--- How a script ended, and the whole of an error that it did not mean.
local function outcome(finished, err)
  if interrupt.pending() then
    interrupt.clear()
    return { ok = false, interrupted = true }
  elseif finished then
    return { ok = true, interrupted = false }
  elseif getmetatable(err) == ending then
    return { ok = err.code == 0, interrupted = err.code == 130, message = err.message }
  end
  return { ok = false, interrupted = false, message = tostring(err):match "[^\n]*" }, err
end

local function run(path, words)
  local script, why = loadfile(path, "t")
  if not script then return { ok = false, interrupted = false, message = why } end
  local given, exit = _G.arg, cli.exit
  _G.arg = table.move(words, 1, #words, 1, { [0] = path })
  function cli.exit(code, message)
    error(setmetatable({ code = code, message = code ~= 0 and message or nil }, ending), 0)
  end
  local part, bug = outcome(xpcall(script, function(err)
    return type(err) == "string" and debug.traceback(err, 2) or err
  end))
  _G.arg, cli.exit = given, exit
  if bug then io.stderr:write(path, ": ", tostring(bug), "\n") end
  collectgarbage() -- what the script left open without naming it
  return part
end

--- Runs a script as if the interpreter had been started with it; none after Ctrl-C. Why it failed stands on
--- stderr as well.
---@param name string  of the part
---@param path string
---@param words string[]
---@return qlua.study_part
function study:run(name, path, words)
  local last = self.parts[#self.parts]
  local part = { ok = false, interrupted = true, message = "not begun" }
  if not (last and last.interrupted) then
    io.stdout:write(last and "\n" or "", "== ", name, "\n\n")
    part = run(path, words)
    part.message = not part.ok and (part.interrupted and "interrupted: run this again to go on"
      or "failed: " .. (part.message or "see above")) or nil
  end
  part.name, self.parts[#self.parts + 1] = name, part
  return part
end

--- A table of the parts and how each ended.
---@return string
function study:outcomes()
  local t = tables.new { "part", "outcome" }
  for _, part in ipairs(self.parts) do t:add(part.name, part.message or "finished") end
  return t:text()
end

--- The exit code that the parts lead to.
---@return integer
function study:code()
  local code = 0
  for _, part in ipairs(self.parts) do
    if part.interrupted then return 130 end
    if not part.ok then code = 1 end
  end
  return code
end

--- In words what the report in a folder says; nil where no run of it has results.
---@param folder string
---@return string?
local function said(folder)
  local store <close> = runs.open(folder)
  local docs = store and runs.newest(store) or {}
  if #docs == 0 then return nil end
  local v = verdict.of(docs)
  local lines = { v.headline .. " " .. v.because }
  for _, sentence in ipairs(v.evidence) do lines[#lines + 1] = "  " .. sentence end
  for _, check in ipairs(v.unfair) do lines[#lines + 1] = "  unfair: " .. (check.reason or check.text) end
  return table.concat(lines, "\n") .. "\n"
end

return { begin = begin, arguments = arguments, verdict = said }
