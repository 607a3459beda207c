#!/usr/bin/env qlua
--- Runs the Lua specs in this interpreter: `build/qlua tests/run_specs.lua [text ...]`.
--- With arguments only files whose name contains one of the texts. Failures are shown as they come; the last
--- line is `specs: N passed, N failed, N skipped`. Exit code 1 after a failure or when nothing ran.
--- QLUA_TEST_DEVICE=<name> has the models run there; where it cannot be opened, the run is one skipped test.

local lfs = require "lfs"

local MESSAGE_LINES <const> = 12

local root = arg[0]:match("^(.*)/[^/]*$") or "."
assert(lfs.chdir(root .. "/.."))
-- specs that start a qlua of their own take this one
local binary = os.getenv("QLUA") or lfs.symlinkattributes("/proc/self/exe", "target") or arg[-1]

local device_name <const> = os.getenv "QLUA_TEST_DEVICE"
if device_name then
  local device, why = require("qlua").device(device_name)
  if not device then
    print(("  skipped, no device '%s': %s"):format(device_name, why.message))
    print "specs: 0 passed, 0 failed, 1 skipped"
    os.exit(0, true)
  end
  device:close()
end

local function chosen(name)
  if #arg == 0 then return true end
  for _, text in ipairs(arg) do
    if name:find(text, 1, true) then return true end
  end
  return false
end

local function find(folder, list)
  for entry in lfs.dir(folder) do
    local path = folder .. "/" .. entry
    if entry:sub(1, 1) ~= "." and lfs.attributes(path, "mode") == "directory" then
      find(path, list)
    elseif entry:find("_spec%.lua$") and chosen(path) then
      list[#list + 1] = path
    end
  end
  table.sort(list)
  return list
end

local total = { passed = 0, failed = 0, skipped = 0 }
local file = nil -- counts of the file that runs now

local function count(what)
  total[what] = total[what] + 1
  if file then file[what] = file[what] + 1 end
end

local function full_name(busted, element)
  local names = {}
  while element and element.descriptor and element.descriptor ~= "file" do
    table.insert(names, 1, element.name or element.descriptor)
    element = busted.context.parent(element)
  end
  return table.concat(names, " ")
end

local busted = require "busted.core" ()
require "busted" (busted)

local function report(element, message, trace)
  local where = trace and trace.short_src and (trace.short_src .. ":" .. trace.currentline) or ""
  print(("  FAILED %s  %s"):format(full_name(busted, element), where))
  local lines = 0
  for line in tostring(message):gmatch("[^\n]+") do
    lines = lines + 1
    if lines <= MESSAGE_LINES then print("    " .. line) end
  end
end

busted.subscribe({ "file", "start" }, function(element)
  file = { passed = 0, failed = 0, skipped = 0, started = busted.monotime(), name = element.name }
  return nil, true
end)

busted.subscribe({ "file", "end" }, function()
  local seconds = busted.monotime() - file.started
  print(("%-44s %4d passed %3d failed %3d skipped %7.2f s"):format(file.name, file.passed, file.failed,
    file.skipped, seconds))
  io.stdout:flush()
  file = nil
  -- what a spec forgot to close shows here, in its own file
  collectgarbage()
  collectgarbage()
  return nil, true
end)

busted.subscribe({ "test", "end" }, function(_, _, status)
  count(status == "success" and "passed" or status == "pending" and "skipped" or "failed")
  return nil, true
end)

busted.subscribe({ "pending" }, function(element, _, message)
  print(("  skipped %s: %s"):format(full_name(busted, element), tostring(message or "")))
  return nil, true
end)

for _, kind in ipairs { "failure", "error" } do
  busted.subscribe({ kind }, function(element, _, message, trace)
    report(element, message, trace)
    if element.descriptor ~= "it" then count("failed") end
    return nil, true
  end)
end

local files = find("tests/specs", {})
local load_files = require "busted.modules.test_file_loader" (busted, { "lua" })
-- busted reads this global; the specs find the binary in it
_G.arg = { [0] = arg[0], [-1] = binary }
if #files > 0 then
  load_files(files, {}, { excludes = {} })
  require "busted.execute" (busted)(1, { seed = 1 })
end

print(("specs: %d passed, %d failed, %d skipped"):format(total.passed, total.failed, total.skipped))
if #files == 0 then io.stderr:write("no spec matches\n") end
os.exit(total.failed == 0 and #files > 0 and total.passed + total.skipped > 0, true)
