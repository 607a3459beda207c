--- `qlua doctor [--json]`: what this machine offers and what is missing, each finding with its fix.
--- Exit code 1 when something that qlua needs does not work.

local _ENV <const> = require "qlua.strict"

local lines = {} -- { group, name, value, problem?, fix? }
local groups = {}

local function note(group, name, value)
  if not groups[group] then
    groups[group] = {}
    groups[#groups + 1] = group
  end
  local entry = { name = name, value = value }
  groups[group][#groups[group] + 1] = entry
  lines[#lines + 1] = entry
  return entry
end

--- severity "error": qlua cannot do its work; "note": something optional is absent
local function problem(group, name, severity, message, fix)
  local entry = note(group, name, message)
  entry.severity, entry.fix = severity, fix
end

local function read(path)
  local file <close> = io.open(path, "r")
  return file and file:read("a")
end

local function first_line(message)
  return tostring(message):match("[^\n]*")
end

local function gib(bytes)
  return ("%.1f GiB"):format(bytes / 2 ^ 30)
end

local function check_versions()
  note("versions", "lua", _VERSION)
  local ok, core = pcall(require, "qlua.core")
  if ok then
    note("versions", "qlua", core.version)
  else
    problem("versions", "qlua", "error", "the C modules did not load: " .. first_line(core),
      "build qlua again")
  end
  note("versions", "library", package.searchpath("qlua.strict", package.path):match("^(.*)/strict%.lua$"))
  for _, name in ipairs { "argparse", "lfs", "lpeg" } do
    local loaded, module = pcall(require, name)
    if loaded then
      local version = type(module) == "table" and (module._VERSION or module.version) or "present"
      if type(version) == "function" then version = version() end
      note("versions", name, tostring(version))
    else
      local package_name = name == "lfs" and "lua-filesystem" or "lua-" .. name
      problem("versions", name, "error", "not found", "apt install " .. package_name)
    end
  end
end

local WANTED_FLAGS <const> = {
  "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16",
}

local function check_cpu()
  local cpuinfo = read("/proc/cpuinfo") or ""
  note("cpu", "model", cpuinfo:match("model name%s*:%s*([^\n]*)") or "unknown")
  local flags, present = " " .. (cpuinfo:match("flags%s*:%s*([^\n]*)") or "") .. " ", {}
  for _, flag in ipairs(WANTED_FLAGS) do
    if flags:find(" " .. flag .. " ", 1, true) then present[#present + 1] = flag end
  end
  note("cpu", "features", #present > 0 and table.concat(present, " ") or "none of AVX2 and AVX-512")
  if not flags:find(" avx2 ", 1, true) then
    problem("cpu", "speed", "note", "no AVX2: products run in plain C, several times slower",
      "use a processor from 2015 or later for timings")
  end
  local _, processors = cpuinfo:gsub("processor%s*:", "")
  local status = read("/proc/self/status") or ""
  note("cpu", "processors", processors)
  note("cpu", "allowed", status:match("Cpus_allowed_list:%s*(%S+)") or "unknown")
  local limit = read("/sys/fs/cgroup/cpu.max")
  local quota, period = (limit or ""):match("^(%d+) (%d+)")
  if quota then note("cpu", "cgroup limit", ("%.2f processors"):format(quota / period)) end
  for _, name in ipairs { "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS" } do
    if os.getenv(name) then note("cpu", name, os.getenv(name)) end
  end
  local governor = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
  if governor and not governor:find("performance", 1, true) then
    problem("cpu", "governor", "note", governor:match("%S+"),
      "cpupower frequency-set -g performance for timings")
  end
end

local function check_memory()
  local meminfo = read("/proc/meminfo") or ""
  local function kilobytes(key) return tonumber(meminfo:match(key .. ":%s*(%d+)") or 0) * 1024 end
  local total, available = kilobytes("MemTotal"), kilobytes("MemAvailable")
  note("memory", "total", gib(total))
  note("memory", "available", gib(available))
  if available < 2 ^ 30 then
    problem("memory", "free", "note", "less than 1 GiB is available",
      "end other programs or take a smaller model")
  end
end

local CUDA_VARIABLES <const> = {
  "CUDA_VISIBLE_DEVICES", "QLUA_CUBLASLT", "QLUA_CUDA_SYNC", "QLUA_CUDA_GRAPHS", "QLUA_CUDA_PDL",
  "QLUA_CUDA_SLICE",
}

--- The CUDA plug-in: where it was found, whether it loads, and what it says that is missing.
local function check_cuda(cuda)
  local driver = read "/proc/driver/nvidia/version"
  note("devices", "NVIDIA driver", driver and first_line(driver):match "%d[%d.]+" or "none loaded")
  for _, name in ipairs(CUDA_VARIABLES) do
    if os.getenv(name) then note("devices", name, os.getenv(name)) end
  end
  if cuda.loaded then
    note("devices", "cuda plug-in", cuda.plugin)
  elseif cuda.plugin or os.getenv "QLUA_CUDA_PLUGIN" then
    -- a file that was put there to be used, or named, and cannot be
    problem("devices", "cuda plug-in", "error", cuda.missing.message, cuda.missing.hint)
    return
  else
    problem("devices", "cuda plug-in", "note", cuda.missing.message, cuda.missing.hint)
    return
  end
  if cuda.missing then
    problem("devices", "cuda", "note", cuda.missing.message, cuda.missing.hint or "models run on the CPU")
  end
end

--- One line a device: "NVIDIA H100 80GB HBM3, sm_90, 78.9 of 79.1 GiB free, driver 13.0, runtime 13.0".
local function described(info)
  local parts = { info.hardware, info.isa, ("%.1f of %.1f GiB free"):format(info.memory_free / 2 ^ 30,
    info.memory_total / 2 ^ 30) }
  if info.threads then parts[#parts + 1] = ("%d threads"):format(info.threads) end
  if info.driver then parts[#parts + 1] = info.driver end
  return table.concat(parts, ", ")
end

local function check_devices()
  local ok, core = pcall(require, "qlua.core")
  if not ok then return end -- told of under versions
  local cuda = core.cuda()
  check_cuda(cuda)
  local names = { "cpu" }
  for index = 0, cuda.count - 1 do names[#names + 1] = "cuda:" .. index end
  for _, name in ipairs(names) do
    local device <close>, err = core.device(name)
    local info
    if device then info, err = device:info() end
    if info then
      note("devices", name, described(info))
    else
      problem("devices", name, name == "cpu" and "error" or "note", err.message, err.hint)
    end
  end
end

local function check_hub()
  local home = os.getenv("HOME") or ""
  local user_cache = os.getenv("XDG_CACHE_HOME") or home .. "/.cache"
  local hf_home = os.getenv("HF_HOME") or user_cache .. "/huggingface"
  local cache = os.getenv("HF_HUB_CACHE") or hf_home .. "/hub"
  local lfs = require "lfs"
  local models = {}
  if lfs.attributes(cache, "mode") == "directory" then
    for entry in lfs.dir(cache) do
      local org_and_name = entry:match("^models%-%-(.*)")
      if org_and_name then models[#models + 1] = (org_and_name:gsub("%-%-", "/")) end
    end
    table.sort(models)
    note("hub", "cache", cache)
    note("hub", "models", #models > 0 and table.concat(models, ", ") or "none")
  else
    note("hub", "cache", cache .. " (does not exist yet)")
  end
  -- whether there is a token, never what it is
  local token = os.getenv("HF_TOKEN") or read(os.getenv("HF_TOKEN_PATH") or hf_home .. "/token") or ""
  note("hub", "token", token:find("%S") and "present" or "none (only gated models need one)")
  if os.getenv("HF_HUB_OFFLINE") then note("hub", "HF_HUB_OFFLINE", os.getenv("HF_HUB_OFFLINE")) end
end

local function print_text()
  for _, group in ipairs(groups) do
    print(group)
    for _, entry in ipairs(groups[group]) do
      print(("  %-14s %s%s"):format(entry.name, entry.severity and entry.severity .. ": " or "", entry.value))
      if entry.fix then print(("  %-14s -> %s"):format("", entry.fix)) end
    end
  end
end

local function print_json()
  local ok, json = pcall(require, "qlua.json")
  if not ok then
    io.stderr:write("qlua doctor: --json needs the module qlua.json: build qlua again\n")
    os.exit(1, true)
  end
  local document = {}
  for _, group in ipairs(groups) do document[group] = groups[group] end
  print(json.encode(document))
end

local as_json = false
for _, argument in ipairs(arg) do
  if argument == "--json" then
    as_json = true
  elseif argument == "--help" or argument == "-h" then
    print("usage: qlua doctor [--json]\n\nWhat this machine offers, and what is missing with its fix.")
    return
  else
    io.stderr:write("qlua doctor: unknown argument '", argument, "' (usage: qlua doctor [--json])\n")
    os.exit(1, true)
  end
end

check_versions()
check_cpu()
check_memory()
check_devices()
check_hub()
if as_json then print_json() else print_text() end
for _, entry in ipairs(lines) do
  if entry.severity == "error" then os.exit(1, true) end
end
