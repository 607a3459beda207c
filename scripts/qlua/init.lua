--- qlua: run Llama models and their quantized twins, and look at the difference.
---
---   local qlua = require "qlua"
---   local device <close> = assert(qlua.device "cpu")
---   local full <close> = assert(device:load "folder-or-hub-id")
---   local nf4 <close> = full:quantize { scheme = "nf4", double = true }
---
--- The outside world failing (no file, bad checkpoint, out of memory) returns nil and an error table {code,
--- message, hint}; misuse raises. Positions and dimensions count from 1; token ids are the vocabulary's,
--- from 0.

local _ENV <const> = require "qlua.strict"

local core = require "qlua.core"
local policy = require "qlua.policy"
local shapes = require "qlua.shapes"
require "qlua.device"
require "qlua.model"

local qlua = {
  ---@type string
  version = core.version,
}

--- Opens a device: "auto" (CUDA where there is one, else the CPU), "cpu", "cuda" or "cuda:<index>". `threads`
--- is the CPU's; by default as many as the process may use. `numerics` is CUDA's: "fast" (default) chooses
--- kernels by the number of tokens, with "invariant" a row's bits do not depend on its batch; the CPU is
--- always invariant.
---@param name? string
---@param options? { threads: integer?, numerics: "fast"|"invariant"|nil }
---@return qlua.device?, qlua.failure?
function qlua.device(name, options)
  return core.device(name or "auto", options)
end

--- The devices that can be opened, each as device:info() says it. Second, why there is no CUDA device, or why
--- the first of those that are there cannot be opened; nil where all can.
---@return qlua.device_info[], qlua.failure?
function qlua.devices()
  local cuda = core.cuda()
  local list, names, missing = {}, { "cpu" }, cuda.missing
  for index = 0, cuda.count - 1 do names[#names + 1] = "cuda:" .. index end
  for _, name in ipairs(names) do
    local device <close>, err = core.device(name)
    local info
    if device then info, err = device:info() end
    if info then list[#list + 1] = info else missing = missing or err end
  end
  return list, missing
end

--- A float32 tensor on the CPU from a nested table of numbers.
---@param values table
---@return qlua.tensor
function qlua.tensor(values)
  return core.tensor(values)
end

--- Opens a safetensors file or a folder of shards: :names(), :info(name), :tensor(name), :sha256().
---@param path string
---@return qlua.checkpoint?, qlua.failure?
function qlua.open_checkpoint(path)
  return core.open_checkpoint(path)
end

local SYNTHETIC <const> = { device = true, dtype = true, layers = true, quant = true, seed = true }

--- A model of a known shape with random weights: speed and memory without a download.
---@param name string  a key of qlua.shapes, e.g. "llama-3.2-1b"
---@param options? { device: qlua.device?, dtype: string?, quant: table|string|nil, seed: integer?, layers:
---  integer? }
---@return qlua.model?, qlua.failure?
function qlua.load_synthetic(name, options)
  options = options or {}
  for key in pairs(options) do
    if not SYNTHETIC[key] then
      error(("unknown option '%s' (options are: device, dtype, layers, quant, seed)")
        :format(tostring(key)), 2)
    end
  end
  local shape = shapes[name]
  if not shape then
    local known = {}
    for key in pairs(shapes) do known[#known + 1] = key end
    table.sort(known)
    error(("no shape '%s' (shapes are: %s)"):format(tostring(name), table.concat(known, ", ")), 2)
  end
  if options.layers then shape = setmetatable({ layers = options.layers }, { __index = shape }) end
  local flat = {}
  for _, key in ipairs(shapes.fields) do flat[key] = shape[key] end
  local device = options.device
  if not device then
    local err
    device, err = core.device "auto"
    if not device then return nil, err end
  end
  local choose = policy.of(options.quant)
  return core.load_random(device, flat, options.dtype or "bfloat16", options.seed or 1, choose)
end

return qlua
