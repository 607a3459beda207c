--- What else the machine was doing between two moments: processors, memory and clocks as the Linux kernel
--- counts them in /proc and /sys. What a system does not tell is nil.

local _ENV <const> = require "qlua.strict"

local sys = require "qlua.sys"

local machine = {}

local function read(root, path)
  local file <close> = io.open(root .. path, "rb")
  return file and file:read "a" or nil
end

--- The number after `key` in a file of lines such as "VmSwap:  0 kB" or "throttled_usec 12".
local function figure(text, key)
  return text and tonumber(("\n" .. text):match("\n" .. key .. "[:%s]%s*(%d+)"))
end

local function number(root, path)
  local text = read(root, path)
  return text and tonumber(text:match "^%s*(%d+)%s*$")
end

--- "0-2,5" as {0, 1, 2, 5}.
local function expanded(ranges)
  local list = {}
  for first, last in ranges:gmatch "(%d+)%-?(%d*)" do
    for i = math.tointeger(first), math.tointeger(last) or math.tointeger(first) do list[#list + 1] = i end
  end
  return list
end

--- Ticks of the processors that this process may use: all, those in which something ran or another machine on
--- the same hardware had the processor, and the latter alone. user nice system idle iowait irq softirq steal
--- (guest is in user).
local function processor_ticks(root, processors)
  local text = read(root, "proc/stat")
  if not text then return nil end
  local all, busy, stolen = 0, 0, 0
  for _, i in ipairs(processors) do
    local fields = {}
    for field in (("\n" .. text):match(("\ncpu%d ([%%d ]+)"):format(i)) or ""):gmatch "%d+" do
      fields[#fields + 1] = math.tointeger(field)
    end
    for k = 1, math.min(8, #fields) do all = all + fields[k] end
    busy = busy + (fields[1] or 0) + (fields[2] or 0) + (fields[3] or 0) + (fields[6] or 0) + (fields[7] or 0)
      + (fields[8] or 0)
    stolen = stolen + (fields[8] or 0)
  end
  return all, busy, stolen
end

--- Ticks of this process and of those it has waited for: fields 14 to 17, after a name that may hold spaces.
local function own_ticks(root)
  local text, sum, i = read(root, "proc/self/stat"), 0, 2
  for field in (text and text:match "%)([^)]*)$" or ""):gmatch "%S+" do
    i = i + 1
    if i >= 14 and i <= 17 then sum = sum + math.tointeger(field) end
  end
  return i >= 17 and sum or nil
end

--- Times that the processors were slowed down for heat, and their mean clock now, in MHz.
local function clocks(root, processors)
  local throttled, khz, clocked
  local sum = 0
  for _, i in ipairs(processors) do
    local folder = ("sys/devices/system/cpu/cpu%d/"):format(i)
    for _, name in ipairs { "core", "package" } do
      local count = number(root, folder .. "thermal_throttle/" .. name .. "_throttle_count")
      if count then throttled = (throttled or 0) + count end
    end
    khz = number(root, folder .. "cpufreq/scaling_cur_freq")
    if khz then sum, clocked = sum + khz, (clocked or 0) + 1 end
  end
  return throttled, clocked and sum / clocked / 1000
end

--- Seconds that the control group's processor quota has held its processes back (versions 2 and 1).
local function quota_seconds(root)
  local micro = figure(read(root, "sys/fs/cgroup/cpu.stat"), "throttled_usec")
  if micro then return micro * 1e-6 end
  local nano = figure(read(root, "sys/fs/cgroup/cpu/cpu.stat"), "throttled_time")
  return nano and nano * 1e-9
end

---@class qlua.machine_state  counters at one moment

---@param root? string  the folder in place of /, ending in a slash
---@param time? number  monotonic seconds in place of now
---@return qlua.machine_state
function machine.state(root, time)
  root = root or "/"
  local status, pressure = read(root, "proc/self/status"), read(root, "proc/pressure/memory")
  local processors = expanded(status and status:match "\nCpus_allowed_list:%s*(%S+)" or "")
  local state = { time = time or sys.time(), processors = #processors, own = own_ticks(root) }
  state.all, state.busy, state.stolen = processor_ticks(root, processors)
  state.throttled, state.mhz = clocks(root, processors)
  state.quota = quota_seconds(root)
  state.load_average = tonumber((read(root, "proc/loadavg") or ""):match "^%S+")
  local swapped = figure(status, "VmSwap")
  state.swapped = swapped and math.tointeger(swapped) * 1024
  local stalled = pressure and tonumber(pressure:match "some[^\n]*total=(%d+)")
  state.stalled = stalled and stalled * 1e-6
  return state
end

---@class qlua.machine_load
---@field seconds number
---@field processors integer?  that this process may use
---@field own number?          share of their time that this process took
---@field others number?       share that other processes took, or other machines on the same hardware
---@field stolen number?       share of the latter alone
---@field quota number?        share of the time in which a quota held this process' control group back
---@field load_average number? at the end, of the last minute
---@field mhz number[]?        mean clock of the processors at both ends
---@field throttled integer?   times that they were slowed down for heat
---@field swapped integer?     bytes of this process that are swapped out at the end
---@field stalled number?      share of the time in which some process waited for memory

--- A tick is 10 ms: shares of fewer are not worth much.
local LEAST_TICKS <const> = 50

local function grown(from, to, key) return from[key] and to[key] and to[key] - from[key] or nil end

---@param from qlua.machine_state
---@param to qlua.machine_state
---@return qlua.machine_load
function machine.load(from, to)
  local seconds = to.time - from.time
  local load = { seconds = seconds, load_average = to.load_average, swapped = to.swapped,
    throttled = grown(from, to, "throttled"), processors = to.processors > 0 and to.processors or nil,
    mhz = from.mhz and to.mhz and { from.mhz, to.mhz } }
  local all, own = grown(from, to, "all") or 0, grown(from, to, "own")
  if all >= LEAST_TICKS and own then
    load.own = math.min(1, own / all)
    load.others = math.min(1, math.max(0, grown(from, to, "busy") - own) / all)
    load.stolen = math.min(1, grown(from, to, "stolen") / all)
  end
  for _, key in ipairs { "quota", "stalled" } do
    local spent = grown(from, to, key)
    if spent and seconds > 0 then load[key] = math.min(1, math.max(0, spent / seconds)) end
  end
  return load
end

return machine
