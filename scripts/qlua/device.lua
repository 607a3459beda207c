--- What a device can do, beyond the primitives in C: load models, measure time.

local _ENV <const> = require "qlua.strict"

local core = require "qlua.core"
local policy = require "qlua.policy"
local shapes = require "qlua.shapes"
local stats = require "qlua.stats"
local sys = require "qlua.sys"

local device = core.methods "device"

--- What core takes of the options of load and outline.
local function primitives(options)
  for key in pairs(options) do
    if key ~= "dtype" and key ~= "max_context" and key ~= "quant" then
      error(("unknown option '%s' (options are: dtype, max_context, quant)"):format(tostring(key)), 3)
    end
  end
  return { dtype = options.dtype, max_context = options.max_context }
end

--- Loads a model from a folder or, by id, from the Hugging Face cache on disk. With `quant` it becomes what
--- model:quantize would make of it, matrix by matrix: the model in full is never in memory.
---@param model string
---@param options? { dtype: string?, max_context: integer?, quant: table|string|nil }  dtype: "auto" (as
---  stored), "float32", "bfloat16", "float16"; quant: options of model:quantize (see qlua.policy), or a
---  scheme's name
---@return qlua.model?, qlua.failure?
function device:load(model, options)
  options = options or {}
  local passed, choose = primitives(options), policy.of(options.quant)
  local folder, err = core.resolve(model)
  if not folder then return nil, err end
  return core.load(self, folder, passed, choose)
end

--- A model without weights, from the headers of its files: :info(), :matrices() and :expected_memory() say
--- what they would say of the model that device:load makes with these options. Whatever needs a weight fails.
--- `model` may be a shape as in qlua.shapes, which needs a dtype.
---@param model string|table
---@param options? { dtype: string?, max_context: integer?, quant: table|string|nil }
---@return qlua.model?, qlua.failure?
function device:outline(model, options)
  options = options or {}
  local passed, choose = primitives(options), policy.of(options.quant)
  local source = model
  if type(model) == "string" then
    local folder, err = core.resolve(model)
    if not folder then return nil, err end
    source = folder
  elseif type(model) == "table" then
    source = {}
    for _, key in ipairs(shapes.fields) do source[key] = model[key] end
  end
  return core.outline(self, source, passed, choose)
end

local recent = device.kernels
local since_opened = setmetatable({}, { __mode = "k" })

--- Names of the product and attention kernels that ran since the last call.
---@return string[]
function device:kernels()
  local names, all = recent(self), since_opened[self] or {}
  for _, name in ipairs(names) do all[name] = true end
  since_opened[self] = all
  return names
end

--- Names of all that ran since the device was opened, in alphabetical order.
---@return string[]
function device:all_kernels()
  self:kernels()
  local names = {}
  for name in pairs(since_opened[self]) do names[#names + 1] = name end
  table.sort(names)
  return names
end

--- What is reported of a list of seconds.
---@param samples number[]
---@return { median: number, mean: number, sd: number, p10: number, p90: number, min: number, max: number, n:
---  integer,
---  samples: number[] }
function device.summary(samples)
  local s = stats.summary(samples)
  return { median = s.median, mean = s.mean, sd = #samples > 1 and stats.sd(samples) or 0, min = s.min,
    max = s.max,
    p10 = stats.percentile(samples, 0.1), p90 = s.p90, n = #samples, samples = samples }
end

--- Times `fn`: `warmup` calls that do not count, then at least `runs` calls and `min_seconds` seconds, the
--- device synchronised before each reading of the clock. A device that has failed gives its error.
---@param fn function
---@param options? { warmup: integer?, runs: integer?, min_seconds: number? }
---@return { median: number, mean: number, sd: number, p10: number, p90: number, min: number, max: number, n:
---  integer,
---  samples: number[] }?  seconds
---@return qlua.failure?
function device:time(fn, options)
  options = options or {}
  for key in pairs(options) do
    if key ~= "warmup" and key ~= "runs" and key ~= "min_seconds" then
      error(("unknown option '%s' (options are: min_seconds, runs, warmup)"):format(tostring(key)), 2)
    end
  end
  local runs, least = options.runs or 20, options.min_seconds or 0.5
  for _ = 1, options.warmup or 3 do fn() end
  local samples, spent = {}, 0
  while #samples < runs or spent < least do
    local ready, err = self:sync()
    if not ready then return nil, err end
    local begin = sys.time()
    fn()
    ready, err = self:sync()
    if not ready then return nil, err end
    local seconds = sys.time() - begin
    samples[#samples + 1] = seconds
    spent = spent + seconds
  end
  return device.summary(samples)
end

return device
