--- Which matrices of a model are quantized, and how: from the options of model:quantize to one function.
---
--- Options, the same for every matrix unless `policy` says otherwise:
---   scheme   "nf4" (default) or "fp4"
---   codebook 16 numbers instead of a scheme: any 4-bit code book
---   block    weights that share one scale: a power of two, 32 to 4096 (default 64)
---   double   quantize the scales too (default false)
---   skip     modules that stay as they are (default {"lm_head"}): whole dotted parts of a name, such as
---            "lm_head", "mlp", "layers.0" or "model.layers.3.mlp.down_proj"
---   dtype    what weights decode to: "auto" (default: as the dense matrix), "float32", "bfloat16", "float16"
---   policy   function(name, shape) -> nil (leave it), a scheme's name, or a table of these options for that
---   matrix

local _ENV <const> = require "qlua.strict"

local policy = {}

local KNOWN <const> = { scheme = true, codebook = true, block = true, double = true, skip = true,
  policy = true,
  dtype = true }

--- `level`: of the caller who is told, 1 being the function that calls this one; 0 tells nobody.
local function check_keys(options, level)
  for key in pairs(options) do
    if not KNOWN[key] then
      error(("unknown option '%s' (options are: block, codebook, double, dtype, policy, scheme, skip)")
        :format(tostring(key)), level > 0 and level + 1 or 0)
    end
  end
end

--- True when `entry` is `name` or a run of whole parts of it.
---@param name string
---@param entry string
---@return boolean
function policy.matches(name, entry)
  return ("." .. name .. "."):find("." .. entry .. ".", 1, true) ~= nil
end

local function specification(options)
  return { scheme = not options.codebook and (options.scheme or "nf4") or nil, codebook = options.codebook,
    block = options.block, double = options.double, dtype = options.dtype }
end

--- The function that core asks for each matrix: (name, rows, columns) -> a table for core, or nil.
---@param options table
---@return fun(name: string, rows: integer, columns: integer): table?
function policy.make(options)
  if type(options) ~= "table" then
    error(("quantization options are a table, not a %s"):format(type(options)), 3)
  end
  check_keys(options, 3)
  local skip = options.skip or { "lm_head" }
  if type(skip) == "string" then skip = { skip } end
  if type(skip) ~= "table" then error("option 'skip' is not a list of module names", 3) end
  if options.policy ~= nil and type(options.policy) ~= "function" then
    error(("option 'policy' is a %s, not a function"):format(type(options.policy)), 3)
  end
  if options.scheme and options.codebook then error("option 'codebook' stands instead of 'scheme'", 3) end
  local base = specification(options)
  return function(name, rows, columns)
    for _, entry in ipairs(skip) do
      if policy.matches(name, entry) then return nil end
    end
    if not options.policy then return base end
    local answer = options.policy(name, { rows, columns })
    if not answer then return nil end
    if type(answer) == "string" then answer = { scheme = answer } end
    if type(answer) ~= "table" then
      error(("the policy's answer for %s is a %s, not nil, a scheme's name or a table"):format(name,
        type(answer)), 0)
    end
    check_keys(answer, 0)
    local merged = specification(answer)
    if merged.block == nil then merged.block = options.block end
    if merged.double == nil then merged.double = options.double end
    return merged
  end
end

--- The same of an option `quant`: a scheme's name, a table of options, or nothing.
---@param quant string|table|nil
---@return (fun(name: string, rows: integer, columns: integer): table?)?
function policy.of(quant)
  if not quant then return nil end
  return policy.make(type(quant) == "string" and { scheme = quant } or quant)
end

return policy
