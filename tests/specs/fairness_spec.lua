-- What is recorded of the machine, from files of our making in place of /proc and /sys, and each rule of
-- fairness lit once.

local device_methods = require "qlua.device"
local fairness = require "qlua.fairness"
local json = require "qlua.json"
local lfs = require "lfs"
local machine = require "qlua.machine"
local support = require "tests.specs.support"

teardown(support.cleanup)

local function near(expected, actual)
  assert.is_true(math.abs(expected - actual) < 1e-9, ("expected %.12g, got %s"):format(expected, actual))
end

--- Files of a machine with three processors, of which processes may use the last two.
local function proc(root, m)
  local function put(path, text)
    for at in path:gmatch "()/" do lfs.mkdir(root .. path:sub(1, at - 1)) end
    support.write(root .. path, text)
  end
  put("proc/stat", ("cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 7777 0 0 0 0 0 0 0 0 0\ncpu1 %d 10 %d %d 5 1 2 %d 40 0\n"
    .. "cpu2 %d 0 0 %d 0 0 0 0 0 0\nintr 1 2 3\n"):format(m.user, m.system, m.idle, m.steal, m.user2,
    m.idle2))
  put("proc/self/stat", ("42 (a (b) c) R 1 1 1 0 -1 4194304 98 0 0 0 %d %d 3 4 20 0 1 0 5"):format(m.own, 10))
  put("proc/self/status", ("Name:\tx\nVmSwap:\t  %d kB\nCpus_allowed:\t6\nCpus_allowed_list:\t1-2\n"):format(
    m.swap or 0))
  put("proc/loadavg", "1.25 0.5 0.1 1/100 42\n")
  put("proc/pressure/memory", ("some avg10=0.00 avg60=0.00 avg300=0.00 total=%d\nfull avg10=0.00 avg60=0.00 "
    .. "avg300=0.00 total=77\n"):format(m.stalled or 0))
  put("sys/fs/cgroup/cpu.stat", ("usage_usec 5\nnr_throttled 2\nthrottled_usec %d\n"):format(m.quota or 0))
  for cpu = 1, 2 do
    put(("sys/devices/system/cpu/cpu%d/thermal_throttle/core_throttle_count"):format(cpu),
      (m.hot or 0) .. "\n")
    put(("sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq"):format(cpu), 1000000 * cpu .. "\n")
  end
  return root
end

local IDLE <const> = { user = 100, system = 100, idle = 100, steal = 0, user2 = 100, idle2 = 100,
  own = 200 }
--- Ten seconds later: 2000 ticks of two processors, 900 of them this process'.
local BUSY <const> = { user = 1000, system = 100, idle = 200, steal = 0, user2 = 200, idle2 = 1000,
  own = 1100 }

local function after(changes)
  local state = {}
  for key, value in pairs(BUSY) do state[key] = value end
  for key, value in pairs(changes or {}) do state[key] = value end
  return state
end

local function load_between(a, b)
  local root = support.folder() .. "/"
  local from = machine.state(proc(root, a), 5.0)
  return machine.load(from, machine.state(proc(root, b), 15.0))
end

describe("the machine's load", function()
  it("is what the processors that this process may use did for others", function()
    local load = load_between(IDLE, BUSY)
    assert.equal(2, load.processors)
    near(10, load.seconds)
    near(900 / 2000, load.own)
    near(100 / 2000, load.others)
    near(0, load.stolen)
    near(0, load.quota)
    near(0, load.stalled)
    assert.same({ 1.25, 0, 0, { 1500.0, 1500.0 } }, { load.load_average, load.swapped, load.throttled,
      load.mhz })
  end)

  it("counts what a hypervisor took", function()
    local load = load_between(IDLE, after { idle = 100, steal = 100 })
    near(200 / 2000, load.others)
    near(100 / 2000, load.stolen)
  end)

  it("knows waiting for memory, swap, quota and heat", function()
    local load = load_between(IDLE, after { stalled = 5e5, swap = 3, quota = 1e6, hot = 2 })
    near(0.05, load.stalled)
    near(0.1, load.quota)
    assert.same({ 3072, 4 }, { load.swapped, load.throttled })
  end)

  it("is not known of a moment, or where nothing is told", function()
    assert.is_nil(load_between(IDLE, after { user = 110, idle = 110, user2 = 110, idle2 = 110 }).others)
    local nowhere = support.folder() .. "/"
    local load = machine.load(machine.state(nowhere, 1.0), machine.state(nowhere, 3.0))
    assert.same({ seconds = 2.0 }, load)
  end)

  it("is told by this machine, at little cost", function()
    local from = machine.state()
    local last = from
    for _ = 1, 100 do last = machine.state() end
    local load = machine.load(from, last)
    assert.is_true(load.seconds > 0 and load.seconds < 10)
    assert.is_true(from.processors > 0 and from.own >= 0 and last.all >= from.all)
  end)
end)

--- Points of a sweep whose passes last 10 ms and `slope` more a pass.
local function points(slope, counts)
  local list = {}
  for m = 1, 2 do
    local samples, tokens = {}, {}
    for i = 1, 20 do
      tokens[i] = 40 + (i * 7) % 11
      samples[i] = 1e-3 * m * (3 + tokens[i] / 10) * (1 + slope * i) * (1 + 0.002 * math.sin(9 * i * m))
    end
    local seconds = device_methods.summary(samples)
    list[m] = { batch = 4, model = m, label = m == 1 and "full" or "nf4", tokens = 45, seconds = seconds,
      pass_tokens = counts ~= false and tokens or nil, kernels = { "matmul" .. m } }
  end
  return list
end

local function sweep(fields)
  local section = { kind = "sweep", runs = 20, warmup = 2, points = points(0) }
  section.drift = fairness.drift(section.points)
  for key, value in pairs(fields or {}) do section[key] = value end
  return section
end

local function outcome(fields)
  local model = { unparsed = 0, kernels = { "matmul" } }
  local o = { output_type = "multiple_choice", questions = 9, data = { all = 9 }, models = { model, model },
    chat_template = false }
  for key, value in pairs(fields or {}) do o[key] = value end
  return o
end

local function facts(changes)
  local function model(label, memory)
    return { label = label, memory = { resident = memory }, info = { dtype = "bfloat16", bytes = 1000,
      quant = { dtype = label == "nf4" and "bfloat16" or nil } } }
  end
  local f = { opts = { batch_size = 8 }, labels = { "full", "nf4" }, sections = { sweep() },
    device = { name = "cpu", threads = 2 }, models = { model("full", 1000), model("nf4", 1000) },
    rows = { reused = 0, ran = 5 },
    load = { seconds = 10, processors = 2, own = 0.9, others = 0.02, stolen = 0, load_average = 1.5,
      swapped = 0, stalled = 0, quota = 0, throttled = 0 } }
  for key, value in pairs(changes or {}) do
    if key == "load" then
      for name, number in pairs(value) do f.load[name] = number end
    else
      f[key] = value
    end
  end
  return f
end

--- The names of the checks that failed, and the reason of the last.
local function failed(list)
  local names, reason = {}, nil
  for _, check in ipairs(list) do
    assert.is_true(#check.text > 0)
    assert.equal(check.ok == false, check.reason ~= nil)
    if check.ok == false then names[#names + 1], reason = check.name, check.reason end
  end
  return table.concat(names, ","), reason
end

local function found(list, name)
  for _, check in ipairs(list) do
    if check.name == name then return check end
  end
end

describe("a fair comparison", function()
  it("lights nothing", function()
    local list = fairness.judge(facts())
    assert.equal("", (failed(list)))
    assert.same({}, fairness.lines(list))
    for _, name in ipairs { "dtypes", "resident", "origin", "batch sizes", "order", "warm-up",
      "synchronisation", "threads", "load", "clock", "memory", "drift", "rows" } do
      assert.is_true(found(list, name).ok, name)
    end
    assert.is_nil(found(list, "kernels").ok)
    assert(json.decode(json.encode(list)))
  end)

  --- One rule, lit by one change.
  local function lights(name, changes, words)
    it("is spoilt: " .. name .. ", " .. words, function()
      local list = fairness.judge(facts(changes))
      local names, reason = failed(list)
      assert.equal(name, names)
      assert.truthy(reason:find(words, 1, true), reason)
      assert.same({ ("unfair, %s: %s"):format(name, reason) }, fairness.lines(list))
    end)
  end

  local function models(full, nf4, resident)
    local list = facts().models
    list[1].info.dtype, list[2].info.quant.dtype, list[1].memory.resident = full, nf4, resident or 1000
    return list
  end
  lights("dtypes", { models = models("float32", "bfloat16") },
    "nf4 computes from bfloat16 and the full model from float32")
  lights("dtypes", { stored = "bfloat16", models = models("float32", "float32") },
    "though its checkpoint holds bfloat16: it takes 2 times the bytes")
  lights("resident", { models = models("bfloat16", "bfloat16", 400) }, "only 400 B of 1000 B")
  lights("batch sizes", { sections = { sweep { points = { points(0)[1] } } } }, "not measured as often")
  lights("order", { sections = { sweep { runs = 1 } } }, "always goes first")
  lights("warm-up", { sections = { sweep { warmup = 0 } } }, "the first pass")
  lights("threads", { device = { name = "cpu", threads = 4 } }, "4 threads take turns on 2 processors")
  lights("load", { load = { others = 0.11 } }, "other processes took 11.0 % of the time of the 2 processors")
  lights("load", { load = { others = 0.2, stolen = 0.15 } }, "other machines on the same hardware")
  lights("load", { load = { quota = 0.02 } }, "a quota of processor time")
  lights("device", { device = { name = "cuda:0" }, load = { neighbours = 2 } },
    "2 other programs shared cuda:0")
  lights("clock", { load = { throttled = 3 } }, "slowed down for heat 3 times")
  lights("clock", { device = { name = "cuda:0" }, load = { throttled_seconds = 0.25, device_mhz = { 1980,
    1700 } } }, "heat held the clock of cuda:0 down for 0.2 s")
  lights("memory", { load = { swapped = 4096 } }, "4.0 KiB of this process were swapped out")
  lights("memory", { load = { stalled = 0.03 } }, "waited for memory during 3.0 %")
  lights("drift", { sections = { sweep { drift = fairness.drift(points(0.01)) } } }, "slower by")
  lights("rows", { rows = { reused = 3, ran = 2 } }, "the speeds of 3 rows come from other runs")

  it("is not judged by what is not known", function()
    local f = facts()
    f.load = { seconds = 1 }
    f.sections = { sweep() }
    f.sections[1].drift = nil
    local list = fairness.judge(f)
    assert.equal("", (failed(list)))
    for _, name in ipairs { "load", "clock", "memory", "drift" } do assert.is_nil(found(list, name).ok) end
  end)

  it("of answers has a noise floor, and reused rows spoil only what was timed", function()
    local control = { kind = "metrics", control = { { name = "kl" } } }
    local list = fairness.judge(facts { sections = { control }, rows = { reused = 3, ran = 0 } })
    assert.is_true(found(list, "noise floor").ok)
    assert.is_nil(found(list, "rows").ok)
    list = fairness.judge(facts { sections = { control }, load = { others = 0.5, swapped = 5 } })
    assert.equal("", (failed(list)))
    assert.equal("others took 50.0 % of the processors' time, load average 1.50; nothing was timed",
      found(list, "load").text)
    list = fairness.judge(facts { sections = { { kind = "mmlu", outcomes = { outcome() } } } })
    assert.is_nil(found(list, "noise floor").ok)
    assert.equal("full: matmul; nf4: matmul", found(list, "kernels").text)
  end)

  it("lights every fault of the post that is repeated", function()
    local section = { kind = "mmlu", protocol = "post", outcomes = { outcome { questions = 4,
      data = { all = 9 }, output_type = "generate_until", chat_template = true,
      generation = { temperature = 0.1 } } } }
    local names = failed(fairness.judge(facts { sections = { section } }))
    assert.equal("post: prompt,post: role,post: header,post: questions,post: unread answers,"
      .. "post: temperature", names)
    section.outcomes = { outcome { generation = { temperature = 0 } } }
    names = failed(fairness.judge(facts { sections = { section } }))
    assert.equal("post: prompt,post: unread answers", names)
  end)
end)

describe("drift", function()
  it("is the last passes over the first, whatever their tokens", function()
    local steady, slower, faster = fairness.drift(points(0)), fairness.drift(points(0.01)),
      fairness.drift(points(-0.006))
    assert.equal(12, steady.passes)
    assert.is_true(math.abs(steady.ratio - 1) < 0.01 and not steady.exceeded)
    assert.is_true(slower.low > 1.05 and slower.exceeded)
    assert.is_true(faster.high < 0.96 and faster.exceeded)
    assert.is_true(fairness.drift(points(0.01, false)).ratio > 1.05)
  end)

  it("that noise explains is not one", function()
    local list = points(0)
    for _, p in ipairs(list) do
      local samples = p.seconds.samples
      for i = 1, #samples do samples[i] = samples[i] * (1 + 0.5 * math.sin(i * i)) end
      samples[20], samples[19] = 3 * samples[20], 2 * samples[19]
    end
    assert.is_false(fairness.drift(list).exceeded)
  end)

  it("needs six passes", function()
    local list = points(0)
    for _, p in ipairs(list) do p.seconds.samples, p.pass_tokens = { 1, 2, 3, 4, 5 }, nil end
    assert.is_nil(fairness.drift(list))
    list[1].seconds = nil
    assert.is_nil(fairness.drift(list))
  end)
end)

describe("the recorder", function()
  it("gathers what the models and the machine say", function()
    local device <close> = support.device()
    local full <close> = assert(device:load("examples/models/demo", { dtype = "float32" }))
    local nf4 <close> = assert(full:quantize { scheme = "nf4" })
    local run = { opts = { model = "examples/models/demo", dtype = "float32", seed = 1 }, device = device,
      hardware = device:info(), full = full, test = nf4, labels = { "full", "nf4" } }
    local root = support.folder() .. "/"
    local recorder = fairness.begin(run, proc(root, IDLE))
    proc(root, after { idle = 100, user2 = 300 })
    local section = sweep { drift = false }
    section.drift = nil
    local report = recorder:finish({ section }, { reused = 0, ran = 2 })
    assert.is_false(section.drift.exceeded)
    near(200 / 2000, report.load.others)
    assert.truthy(found(report.checks, "dtypes").reason:find("holds bfloat16", 1, true))
    assert.is_true(found(report.checks, "resident").ok)
    assert(json.decode(json.encode(report)))
  end)
end)
