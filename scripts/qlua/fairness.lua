--- Whether a comparison of two models is fair: what is recorded with every run, and judged by rules that are
--- written here.
---
---   local recorder = fairness.begin(run)              -- models are loaded, nothing has been measured
---   document.fairness = recorder:finish(sections)     -- { checks, load }
---
--- A check that failed does not make figures wrong: it says what beside the models may have made them differ.

local _ENV <const> = require "qlua.strict"

local json = require "qlua.json"
local machine = require "qlua.machine"
local plural = require("qlua.text").plural
local stats = require "qlua.stats"
local table_text = require "qlua.table"

local fairness = {}

--- Share of the processors' time that others may take. Alternating order gives both models their part of it,
--- but above a tenth the spread of the samples is no longer the models' own.
fairness.OTHERS = 0.10
--- Share of the time in which processes may wait for memory: an idle machine shows under 0.001.
fairness.STALLED = 0.01
--- Share of the time in which a quota may hold the process back.
fairness.QUOTA = 0.01
--- Change of speed from the first to the last third of the passes: half of what differences of clocks between
--- two devices of one kind come to.
fairness.DRIFT = 0.05

---@class qlua.check
---@field name string
---@field text string     what was found
---@field ok boolean?     nil: recorded, not judged
---@field reason string?  where ok is false: why the comparison is unfair

---@class qlua.drift
---@field passes integer  in each of the two blocks
---@field ratio number    seconds of the last third of the passes / of the first
---@field low number?     95 % bootstrap interval
---@field high number?
---@field exceeded boolean  by more than fairness.DRIFT, and the interval leaves 1 out

--- Seconds of a point's passes, each over what its tokens let expect: a line through the point's passes.
local function relative(point)
  local seconds, tokens = point.seconds.samples, point.pass_tokens
  local slope, mean_tokens = 0.0, 0.0
  if tokens and #tokens == #seconds then
    local spread = stats.covariance(tokens, tokens)
    slope = spread > 0 and math.max(0, stats.covariance(tokens, seconds) / spread) or 0.0
    mean_tokens = stats.mean(tokens)
  end
  local mean, list = stats.mean(seconds), {}
  for i, value in ipairs(seconds) do
    list[i] = value / (mean + slope * ((tokens and tokens[i] or 0) - mean_tokens))
  end
  return list
end

--- Whether passes became slower or faster in the course of a sweep: the last third of each point's passes
--- against the first, over all points; nil where no point has six.
---@param points qlua.section_point[]
---@param seed integer?
---@return qlua.drift?
function fairness.drift(points, seed)
  local first, last = {}, {}
  for _, point in ipairs(points) do
    local n = point.seconds and #point.seconds.samples or 0
    if n >= 6 then
      local list, block = relative(point), n // 3
      table.move(list, 1, block, #first + 1, first)
      table.move(list, n - block + 1, n, #last + 1, last)
    end
  end
  if #first == 0 then return nil end
  local ratio, low, high = stats.bootstrap_ratio({ last, first }, { of = "median", seed = seed })
  if not ratio then return nil end
  return { passes = #first, ratio = ratio, low = low, high = high,
    exceeded = math.abs(ratio - 1) > fairness.DRIFT and low ~= nil and (low > 1 or high < 1) }
end

local function percent(share) return ("%.1f %%"):format(100 * share) end

local function bytes(n) return table_text.bytes(n) end

--- What the checks look at: everything that was found, in plain tables.
---@class qlua.fairness_facts
---@field opts table
---@field labels string[]
---@field device qlua.device_info
---@field models { label: string, info: table, memory: table }[]  full, quantized
---@field stored string?     type of the full model's checkpoint
---@field sections table[]
---@field rows { reused: integer, ran: integer }?
---@field load table         qlua.machine_load, and of another device than the CPU neighbours (other processes
---  that may compute there), throttled_seconds (of heat), device_mhz (at both ends), where its driver tells

--- One function a check; gives text, ok and the reason, or nothing where it does not apply.
local checks = {}

local function sections_of(facts, kind)
  local list = {}
  for _, section in ipairs(facts.sections) do
    if section.kind == kind then list[#list + 1] = section end
  end
  return list
end

--- A run has one sweep at most.
local function sweep_of(facts) return sections_of(facts, "sweep")[1] end

local function outcomes_of(facts)
  local list = {}
  for _, section in ipairs(sections_of(facts, "mmlu")) do
    table.move(section.outcomes, 1, #section.outcomes, #list + 1, list)
  end
  return list
end

local function is_post(facts)
  for _, section in ipairs(sections_of(facts, "mmlu")) do
    if section.protocol == "post" then return true end
  end
  return false
end

--- Whether speeds are among the results.
local function is_timed(facts) return sweep_of(facts) ~= nil or #outcomes_of(facts) > 0 end

local WIDTH <const> = { float32 = 4, bfloat16 = 2, float16 = 2 }

function checks.dtypes(facts)
  local full, quantized = facts.models[1], facts.models[2]
  local dtype, decoded = full.info.dtype, quantized and (quantized.info.quant.dtype or quantized.info.dtype)
  local text = ("%s %s%s, activations float32"):format(full.label, dtype,
    quantized and ("; %s computes from %s"):format(quantized.label, decoded) or "")
  if decoded and decoded ~= dtype then
    return text, false, ("%s computes from %s and the full model from %s: a part of every difference is that "
      .. "of the types"):format(quantized.label, decoded, dtype)
  end
  local stored = facts.stored
  if stored and (WIDTH[stored] or 4) < (WIDTH[dtype] or 4) then
    return text, false, ("the full model runs in %s though its checkpoint holds %s: it takes %d times the "
      .. "bytes, and time to read them, for the same weights"):format(dtype, stored,
      WIDTH[dtype] // WIDTH[stored])
  end
  return text, decoded and true or nil
end

function checks.resident(facts)
  local parts = {}
  for i, model in ipairs(facts.models) do
    parts[i] = ("%s %s"):format(model.label, bytes(model.memory.resident))
  end
  local text = ("%s of weights on %s, nothing offloaded"):format(table.concat(parts, ", "),
    facts.device.name)
  for i, model in ipairs(facts.models) do
    if model.memory.resident < model.info.bytes then
      return ("%s of weights on %s"):format(table.concat(parts, ", "), facts.device.name), false,
        ("only %s of %s of the %s model lie on %s"):format(bytes(model.memory.resident),
          bytes(model.info.bytes), facts.labels[i], facts.device.name)
    end
  end
  return text, true
end

function checks.origin(facts)
  if not facts.models[2] then return nil end
  if not facts.opts.quantized then return "quantized here, from the full model's weights", true end
  return ("%s is a checkpoint of its own; that it was made from the full model is not checked"):format(
    facts.opts.quantized)
end

function checks.synchronisation(facts)
  if #facts.sections == 0 then return nil end
  return "the clock is read after the device has finished", true
end

checks["warm-up"] = function(facts)
  local sweep = sweep_of(facts)
  if sweep then
    local n = sweep.warmup or 0
    local text = ("%d before the %d passes of each model and batch size that count"):format(n, sweep.runs)
    if n < 1 then return text, false, "the first pass of each model counts, with all that is set up in it" end
    return text, true
  end
  for _, o in ipairs(outcomes_of(facts)) do
    if o.output_type == "generate_until" then return "none before written answers: the first batch counts" end
  end
end

function checks.order(facts)
  if not facts.models[2] then return nil end
  local text = "the models take turns, each first in every other batch"
  local sweep = sweep_of(facts)
  if sweep and sweep.runs < 2 then
    return text, false, "with one pass of each batch size (--runs 1) the full model always goes first"
  end
  if sweep or #sections_of(facts, "mmlu") + #sections_of(facts, "metrics") > 0 then return text, true end
end

local function sweep_sizes(points)
  local sizes, missing = {}, {}
  for i = 1, #points, 2 do
    local a, b = points[i], points[i + 1]
    sizes[#sizes + 1] = tostring(a.batch)
    local sizes_text = table.concat(sizes, ", ")
    if not b or a.batch ~= b.batch or (a.seconds and b.seconds and a.seconds.n ~= b.seconds.n) then
      return sizes_text, false, ("batch %d was not measured as often with both models"):format(a.batch)
    elseif a.tokens ~= b.tokens then
      return sizes_text, false, ("at batch %d the models had other rows"):format(a.batch)
    end
    for _, p in ipairs { a, b } do
      if p.oom then missing[#missing + 1] = ("; batch %d did not fit %s"):format(p.batch, p.label) end
    end
  end
  return ("%s: the same rows for both models%s"):format(table.concat(sizes, ", "),
    table.concat(missing)), true
end

checks["batch sizes"] = function(facts)
  local sweep = sweep_of(facts)
  if sweep then return sweep_sizes(sweep.points) end
  if #facts.sections > 0 and facts.models[2] and facts.opts.batch_size then
    return ("%d, the same rows for both models"):format(facts.opts.batch_size), true
  end
end

function checks.threads(facts)
  local device, processors = facts.device, facts.load.processors
  if not device.threads then
    return ("both models on %s, %s numerics"):format(device.name, device.numerics or "the same"), true
  end
  local text = ("%s%s, the same for both models"):format(plural(device.threads, "thread"),
    processors and " on " .. plural(processors, "processor") or "")
  if processors and device.threads > processors then
    return text, false, ("%d threads take turns on %s"):format(device.threads,
      plural(processors, "processor"))
  end
  return text, true
end

function checks.load(facts)
  local load = facts.load
  local average = load.load_average and (", load average %.2f"):format(load.load_average) or ""
  if not load.others then return "what else ran is not known: too short a run, or no /proc" .. average end
  local text = ("others took %s of the processors' time%s"):format(percent(load.others), average)
  if load.others > fairness.OTHERS then
    local stolen = load.stolen > load.others / 2
    return text, false, ("%s took %s of the time of the %s while the models were measured"):format(
      stolen and "other machines on the same hardware" or "other processes", percent(load.others),
      plural(load.processors, "processor"))
  elseif (load.quota or 0) > fairness.QUOTA then
    return text, false, ("a quota of processor time held this process back for %s of the run"):format(
      percent(load.quota))
  end
  return text, true
end

function checks.device(facts)
  local load = facts.load
  if facts.device.name == "cpu" then return nil end
  if not load.neighbours then return "others on the device: not known, its driver does not tell" end
  local text = plural(load.neighbours, "other process", "other processes") .. " may compute on it"
  if load.neighbours > 0 then
    return text, false, ("%s shared %s, which is not divided as processors are"):format(
      plural(load.neighbours, "other program"), facts.device.name)
  end
  return text, true
end

function checks.clock(facts)
  local load = facts.load
  local mhz = load.device_mhz or load.mhz
  local at = mhz and ("%.0f MHz at the beginning, %.0f at the end"):format(mhz[1], mhz[2])
  if (load.throttled or 0) > 0 then
    return at or "slowed down for heat", false,
      ("the processors were slowed down for heat %s"):format(plural(load.throttled, "time"))
  end
  if (load.throttled_seconds or 0) > 0 then
    return at or "slowed down for heat", false, ("heat held the clock of %s down for %.1f s"):format(
      facts.device.name, load.throttled_seconds)
  end
  if load.throttled or load.throttled_seconds then
    return (at and at .. ", " or "") .. "not slowed down for heat", true
  end
  return at or "not told by this system"
end

function checks.memory(facts)
  local load = facts.load
  if not load.swapped and not load.stalled then return "swap and pressure are not told by this system" end
  local text = ("%s swapped out, %s of the time waiting for memory"):format(
    load.swapped and bytes(load.swapped) or "unknown", load.stalled and percent(load.stalled)
      or "unknown")
  if (load.swapped or 0) > 0 then
    return text, false, ("%s of this process were swapped out"):format(bytes(load.swapped))
  elseif (load.stalled or 0) > fairness.STALLED then
    return text, false, ("processes waited for memory during %s of the run"):format(percent(load.stalled))
  end
  return text, true
end

function checks.drift(facts)
  local sweep = sweep_of(facts)
  if not sweep then return nil end
  local d = sweep.drift
  if not d then return "not known: fewer than six passes of each batch size" end
  local text = ("last third of the passes / first third: %.3f%s"):format(d.ratio,
    d.low and (" [%.3f, %.3f]"):format(d.low, d.high) or "")
  if d.exceeded then
    return text, false, ("passes became %s by %s in the course of each batch size"):format(
      d.ratio > 1 and "slower" or "faster", percent(math.abs(d.ratio - 1)))
  end
  return text, true
end

function checks.rows(facts)
  local rows = facts.rows
  if not rows then return nil end
  local text = ("%s reused, %d computed in this run"):format(plural(rows.reused, "row"), rows.ran)
  if rows.reused == 0 then return text, true end
  return text, false, ("the speeds of %s come from other runs, on another day or under another load "
    .. "(--fresh measures all anew)"):format(plural(rows.reused, "row"))
end

function checks.kernels(facts)
  local of = { {}, {} }
  local function add(m, kernels)
    for _, name in ipairs(kernels or {}) do
      if not of[m][name] then of[m][name], of[m][#of[m] + 1] = true, name end
    end
  end
  for _, p in ipairs(sweep_of(facts) and sweep_of(facts).points or {}) do add(p.model, p.kernels) end
  for _, o in ipairs(outcomes_of(facts)) do
    for m, model in ipairs(o.models) do add(m, model.kernels) end
  end
  if #of[1] + #of[2] == 0 then return nil end
  for m = 1, 2 do table.sort(of[m]) end
  return ("%s: %s; %s: %s"):format(facts.labels[1], table.concat(of[1], ", "), facts.labels[2] or "-",
    table.concat(of[2], ", "))
end

checks["noise floor"] = function(facts)
  local has, can = false, false
  for _, section in ipairs(sections_of(facts, "metrics")) do
    has, can = has or #section.control > 0, true
  end
  for _, o in ipairs(outcomes_of(facts)) do has, can = has or o.control ~= nil, true end
  if has then return "the full model was compared with itself too", true end
  if can then return "the full model was not compared with itself" end
end

--- The faults of the post of 2024 that --protocol post repeats, each as a check that fails.
local function add_post(list, facts)
  local function fault(name, text, reason)
    list[#list + 1] = { name = "post: " .. name, text = text, ok = false, reason = reason }
  end
  fault("prompt", "asks for [[A]] or [[B]] [[F]] or [[D]]", "the prompt names [[F]] where [[C]] is meant: a "
    .. "model that obeys loses every question whose answer is C")
  local questions, all, unparsed, templated, temperature = 0, 0, 0, false, 0
  for _, o in ipairs(outcomes_of(facts)) do
    questions, all = questions + o.questions, all + o.data.all
    templated = templated or o.chat_template
    temperature = math.max(temperature, o.generation and o.generation.temperature or 0)
    for _, model in ipairs(o.models) do unparsed = unparsed + model.unparsed end
  end
  if templated then
    fault("role", 'the question comes from the role "human"', "a role that chat models are not trained on: "
      .. "both answer worse than they can, and not equally so")
    fault("header", "no header of the answer", "the model has to write the header of its own turn, which "
      .. "counts as time and words, before it answers")
  end
  if questions < all then
    fault("questions", ("%d of the file's %d"):format(questions, all),
      "only questions under 64 characters are asked: the result is not that of the test set")
  end
  fault("unread answers", plural(unparsed, "answer") .. " without a letter", "answers without a letter in "
    .. "brackets count as wrong, and letters after D as answers: format is measured with knowledge")
  if temperature > 0 then
    fault("temperature", ("%.1f"):format(temperature),
      "each answer is one draw: asked again, a model differs from itself")
  end
  list[#list + 1] = { name = "post: not repeated", text = "both models are whole in memory, the clock stops "
    .. "after the device, and each model has a memory account of its own" }
end

--- Checks of what can only spoil speeds: recorded where nothing was timed.
local OF_SPEED <const> = { threads = true, load = true, device = true, clock = true, memory = true,
  rows = true }

local ORDER <const> = { "dtypes", "resident", "origin", "batch sizes", "order", "warm-up", "synchronisation",
  "threads", "kernels", "load", "device", "clock", "memory", "drift", "rows", "noise floor" }

--- Judges what was found.
---@param facts qlua.fairness_facts
---@return qlua.check[]
function fairness.judge(facts)
  local list = json.array()
  for _, name in ipairs(ORDER) do
    local text, ok, reason = checks[name](facts)
    if ok == false and OF_SPEED[name] and not is_timed(facts) then
      text, ok, reason = text .. "; nothing was timed", nil, nil
    end
    if text then list[#list + 1] = { name = name, text = text, ok = ok, reason = reason } end
  end
  if is_post(facts) then add_post(list, facts) end
  return list
end

--- A line for every check that failed.
---@param list qlua.check[]
---@return string[]
function fairness.lines(list)
  local lines = {}
  for _, check in ipairs(list) do
    if check.ok == false then lines[#lines + 1] = ("unfair, %s: %s"):format(check.name, check.reason) end
  end
  return lines
end

--- The type that the full model's checkpoint holds, where the run was told to use another.
local function stored_type(run)
  local o = run.opts
  if not o.model or not o.dtype or o.dtype == "auto" then return nil end
  local outline <close> = run.device:outline(o.model)
  return outline and outline:info().dtype
end

--- Adds what the driver of another device than the CPU tells; from, to: device:info().
local function add_device(load, from, to)
  if not (from and to) then return end -- it failed
  if from.neighbours and to.neighbours then load.neighbours = math.max(from.neighbours, to.neighbours) end
  if from.throttled_seconds and to.throttled_seconds then
    load.throttled_seconds = to.throttled_seconds - from.throttled_seconds
  end
  if from.clock_mhz and to.clock_mhz then
    load.device_mhz = json.array { from.clock_mhz, to.clock_mhz }
  end
end

---@class qlua.fairness_recorder
local recorder = {}
recorder.__index = recorder

--- Begins to watch: when the models are loaded and nothing has been measured.
---@param run qlua.experiment
---@param root? string  see qlua.machine
---@return qlua.fairness_recorder
function fairness.begin(run, root)
  return setmetatable({ run = run, root = root, device = run.device:info(), from = machine.state(root) },
    recorder)
end

--- What the run did to the comparison. Sweeps among the sections are given their drift.
---@param sections table[]
---@param rows? { reused: integer, ran: integer }
---@return { checks: qlua.check[], load: qlua.machine_load }
function recorder:finish(sections, rows)
  local run, load = self.run, machine.load(self.from, machine.state(self.root))
  add_device(load, self.device, (run.device:info()))
  if load.mhz then load.mhz = json.array(load.mhz) end
  local models, labels = {}, run.labels or { "full" }
  for i, model in ipairs { run.full, run.test } do
    models[i] = { label = labels[i], info = model:info(), memory = model:memory() }
  end
  for _, section in ipairs(sections) do
    if section.kind == "sweep" then
      section.drift = section.drift or fairness.drift(section.points, run.opts.seed)
    end
  end
  return { load = load, checks = fairness.judge { opts = run.opts, labels = labels, device = run.hardware,
    models = models, stored = stored_type(run), sections = sections, rows = rows, load = load } }
end

return fairness
