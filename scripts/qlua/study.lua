--- Several experiments in one process: each is a script like any other, run with arguments of its own, and
--- what ends a script ends only that part of the study. Models are loaded once (qlua.experiment).
---
---   local study <close> = study.begin()
---   local part = study:run("examples/jaccard.lua", { "--limit=20" })
---   if not part.ok then print(part.message) end

local _ENV <const> = require "qlua.strict"

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local interrupt = require "qlua.interrupt"
local json = require "qlua.json"

---@class qlua.study
---@field shared table  devices and models that stay open
local study = {}
study.__index = study

---@class qlua.study_part
---@field ok boolean
---@field interrupted boolean  by Ctrl-C
---@field message string?      in one line, where it is not ok

---@return qlua.study
local function begin() return setmetatable({ shared = experiment.share() }, study) end

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

local function outcome(finished, err)
  if interrupt.pending() then
    interrupt.clear()
    return { ok = false, interrupted = true }
  elseif finished then
    return { ok = true, interrupted = false }
  elseif getmetatable(err) == ending then
    return { ok = err.code == 0, interrupted = err.code == 130, message = err.message or "see above" }
  end
  return { ok = false, interrupted = false, message = tostring(err):match "[^\n]*" }, err
end

--- Runs a script as if the interpreter had been started with it. Why it failed stands on stderr as well.
---@param path string
---@param words string[]
---@return qlua.study_part
function study.run(_, path, words)
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

return { begin = begin, arguments = arguments }
