--- Latency and memory of one forward pass over batch sizes, two models side by side.

local _ENV <const> = require "qlua.strict"

local device_methods = require "qlua.device"
local json = require "qlua.json"
local stats = require "qlua.stats"
local sys = require "qlua.sys"

local sweep = {}

---@class qlua.sweep_point
---@field batch integer
---@field model integer             1 = full, 2 = quantized
---@field tokens number             mean tokens of a pass
---@field pass_tokens integer[]     of every timed pass
---@field time table?               median, p10, p90, ... in seconds, samples kept; nil: out of memory
---@field peak table?               arena high-water marks: weights, kv, activations, total (bytes)
---@field reserved integer?         bytes the arena holds between passes
---@field process integer?          CPU: resident high-water mark of the whole process in its warm-up; else
---  what the process holds on the device after it, nil where the driver does not tell (bytes)
---@field expected table            analytic: weights, kv, activations, total (bytes)
---@field kernels string[]          product and attention kernels that ran, in alphabetical order
---@field oom string?               the message, when a pass did not fit: bytes needed and bytes free

--- The rows of every pass: `runs` seeded samples of `size` rows (with repetition where there are too few).
local function plan(rows, size, passes, seed)
  local list = {}
  for i = 1, passes do
    local batch = {}
    while #batch < size do
      for _, index in ipairs(stats.shuffled(#rows, seed * 1000003 + i + #batch, math.min(size - #batch,
        #rows))) do
        batch[#batch + 1] = rows[index].ids
      end
    end
    list[i] = batch
  end
  return list
end

local function tokens_of(batch)
  local n, longest = 0, 0
  for _, ids in ipairs(batch) do
    n = n + #ids
    longest = math.max(longest, #ids)
  end
  return n, longest
end

--- The batch with most tokens, and what its pass is expected to hold: all tokens, those of the longest row of
--- any batch, rows of logits.
local function widest_of(batches, logits)
  local w = { tokens = 0, longest = 0 }
  for _, batch in ipairs(batches) do
    local tokens, longest = tokens_of(batch)
    if tokens > w.tokens then
      w.batch, w.tokens, w.outputs = batch, tokens, logits == "all" and tokens or #batch
    end
    w.longest = math.max(w.longest, longest)
  end
  return w
end

--- One timed pass: seconds, or nil and the error that the batch does not fit. Any other error ends the sweep.
--- `ran` collects the kernels.
local function pass(run, model, batch, logits_rows, ran)
  run.device:kernels()
  run:must(run.device:sync())
  local begin = sys.time()
  local logits, err = model:forward(batch, { rows = logits_rows })
  if not logits then
    if err.code ~= "memory" then run:must(nil, err) end
    return nil, err
  end
  run:must(run.device:sync())
  local seconds = sys.time() - begin
  logits:close()
  for _, name in ipairs(run.device:kernels()) do ran[name] = true end
  return seconds
end

local function sorted_keys(set)
  local list = {}
  for key in pairs(set) do list[#list + 1] = key end
  table.sort(list)
  return list
end

--- Both models at one batch size: two points.
local function measure(run, rows, size, options, step)
  local models, warmup = { run.full, run.test }, math.max(1, options.warmup)
  local batches = plan(rows, size, options.runs, options.seed)
  local widest = widest_of(batches, options.logits)
  local samples, failed, process, ran = { {}, {} }, {}, {}, { {}, {} }
  local total, tokens_by_pass = 0, {}
  for i, batch in ipairs(batches) do
    tokens_by_pass[i] = tokens_of(batch)
    total = total + tokens_by_pass[i]
  end
  local function try(m, batch)
    if failed[m] then return end
    local seconds
    seconds, failed[m] = pass(run, models[m], batch, options.logits, ran[m])
    return seconds
  end
  for m, model in ipairs(models) do
    model:reset_peak()
    run.device:reset_peak()
    -- on the widest batch, so that arena and process have met their peak before the other model runs
    for _ = 1, warmup do
      try(m, widest.batch)
      step(1, ("batch %d"):format(size))
    end
    local memory = run:must(run.device:memory())
    process[m] = memory.process_peak or memory.process
  end
  for i, batch in ipairs(batches) do
    for half = 1, 2 do
      local m = i % 2 == 1 and half or 3 - half
      samples[m][#samples[m] + 1] = try(m, batch)
      step(1, ("batch %d"):format(size))
    end
  end
  local points = {}
  for m, model in ipairs(models) do
    local point = { batch = size, model = m, tokens = total / #batches,
      pass_tokens = json.array(tokens_by_pass), kernels = json.array(sorted_keys(ran[m])),
      expected = model:expected_memory(widest.tokens, widest.longest, widest.outputs) }
    if failed[m] then
      point.oom = failed[m].message
    else
      local memory = model:memory()
      point.time = device_methods.summary(samples[m])
      point.peak = memory.peak
      -- Tensors that the twin shares with the full model are resident for it as well, and counted in both.
      point.peak.shared = memory.resident - memory.weights
      point.peak.resident = memory.peak.total + point.peak.shared
      point.reserved = memory.total + point.peak.shared
      point.process = process[m]
    end
    points[m] = point
  end
  return points
end

--- The digest of all rows' tokens: a pass takes its batch from all of them.
local function ids_of(rows)
  local texts = {}
  for i, row in ipairs(rows) do texts[i] = table.concat(row.ids, " ") end
  return sys.sha256(table.concat(texts, "\n"))
end

--- Every batch size with both models. Returns points ordered by batch size, then model: those of the sizes
--- that were finished, where Ctrl-C or a device that fails ends the sweep.
---@param run qlua.experiment
---@param rows { ids: integer[] }[]
---@param options { sizes: integer[], runs: integer, warmup: integer, logits:
---  "all"|"last", seed: integer }
---@return qlua.sweep_point[] points, string? set  key in the store
function sweep.run(run, rows, options)
  if run.opts.dry_run then
    for _, size in ipairs(options.sizes) do
      local w = widest_of(plan(rows, size, options.runs, options.seed), options.logits)
      run:foresee { { label = size, tokens = w.tokens, longest = w.longest, outputs = w.outputs,
        slots = w.tokens } }
    end
    run:foretell { what = "batch" }
  end
  local points = {}
  local sizes, set = run:map("batch sizes", options.sizes, { weight = 2 * (options.runs + math.max(1,
    options.warmup)), inputs = { options = { options.runs, options.warmup, options.logits, options.seed },
    rows = ids_of(rows) }, data = { run.items } }, function(list, _, step)
      return { measure(run, rows, list[1], options, step) }
    end)
  for _, pair in ipairs(sizes) do table.move(pair, 1, 2, #points + 1, points) end
  return points, set
end

return sweep
