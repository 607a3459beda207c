--- Shapes of well-known models, for random weights. From their config.json.

local _ENV <const> = require "qlua.strict"

local function shape(s)
  return setmetatable(s, { __index = { max_context = 8192, rms_eps = 1e-5, rope_theta = 500000.0,
    tied = false } })
end

---@type table<string, table>
local shapes = {
  ["llama-3-8b"] = shape { hidden = 4096, intermediate = 14336, layers = 32, heads = 32, kv_heads = 8,
    head_dim = 128, vocab = 128256 },
  ["llama-3.2-1b"] = shape { hidden = 2048, intermediate = 8192, layers = 16, heads = 32, kv_heads = 8,
    head_dim = 64, vocab = 128256, tied = true },
  ["llama-3.2-3b"] = shape { hidden = 3072, intermediate = 8192, layers = 28, heads = 24, kv_heads = 8,
    head_dim = 128, vocab = 128256, tied = true },
  ["tinyllama-1.1b"] = shape { hidden = 2048, intermediate = 5632, layers = 22, heads = 32, kv_heads = 4,
    head_dim = 64, vocab = 32000, max_context = 2048, rope_theta = 10000.0 },
  ["smollm2-135m"] = shape { hidden = 576, intermediate = 1536, layers = 30, heads = 9, kv_heads = 3,
    head_dim = 64, vocab = 49152, rope_theta = 100000.0, tied = true },
  ["tiny"] = shape { hidden = 64, intermediate = 128, layers = 2, heads = 4, kv_heads = 2, head_dim = 16,
    vocab = 256, max_context = 512 },
}

--- Names of the numbers of a shape, for whoever copies one. Not a shape itself: kept out of pairs().
local fields <const> = { "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocab",
  "max_context",
  "rms_eps", "rope_theta", "tied" }

return setmetatable(shapes, { __index = { fields = fields } })
