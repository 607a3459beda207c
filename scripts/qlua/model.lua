--- What a model can do, beyond the primitives in C: text in and out, generation with stop strings, its
--- quantized twin.

local _ENV <const> = require "qlua.strict"

local core = require "qlua.core"
local failure = require "qlua.failure"
local policy = require "qlua.policy"

local model = core.methods "model"

local primitive_info = model.info

local tokenizers = setmetatable({}, { __mode = "k" })

--- The tokenizer of the model's folder, loaded at the first call.
---@return qlua.tokenizer?, qlua.failure?
function model:tokenizer()
  local known = tokenizers[self]
  if known then return known end
  local folder = self:info().folder
  if not folder then
    return nil, failure("not_found", "a synthetic model has no tokenizer", "pass token ids")
  end
  local tok, err = require("qlua.tokenizer").load(folder)
  if tok then tokenizers[self] = tok end
  return tok, err
end

--- Token ids of `text`; bos (default true): with the post-processor's tokens; special (default false):
--- special tokens written in the text are recognised.
---@param text string
---@param options? { bos: boolean?, special: boolean? }
---@return integer[]?, qlua.failure?
function model:encode(text, options)
  local tok, err = self:tokenizer()
  if not tok then return nil, err end
  return tok:encode(text, options)
end

---@param ids integer[]
---@param options? { skip_special: boolean? }
---@return string?, qlua.failure?
function model:decode(ids, options)
  local tok, err = self:tokenizer()
  if not tok then return nil, err end
  return tok:decode(ids, options)
end

--- Splits `stop` into token ids and strings.
local function stops(stop)
  local ids, strings = {}, {}
  if stop == nil then return ids, strings end
  if type(stop) ~= "table" then stop = { stop } end
  for _, entry in ipairs(stop) do
    if math.type(entry) == "integer" and entry >= 0 and entry < 1 << 31 then
      ids[#ids + 1] = entry
    elseif type(entry) == "string" and entry ~= "" then
      strings[#strings + 1] = entry
    else
      error(("option 'stop' holds token ids and texts, not %s"):format(tostring(entry)), 3)
    end
  end
  return ids, strings
end

--- A function that says whether a row's text so far holds one of `strings`.
local function string_stopper(tok, strings)
  local longest = 0
  for _, s in ipairs(strings) do longest = math.max(longest, #s) end
  local streams, tails = {}, {}
  return function(row, id)
    streams[row] = streams[row] or tok:stream()
    local tail = (tails[row] or "") .. streams[row]:push(id)
    for _, s in ipairs(strings) do
      if tail:find(s, 1, true) then return true end
    end
    tails[row] = tail:sub(-longest)
    return false
  end
end

local PASSED <const> = { "max_new_tokens", "temperature", "top_k", "top_p", "seed", "streams" }
local KNOWN <const> = { max_new_tokens = true, temperature = true, top_k = true, top_p = true, seed = true,
  streams = true, stop = true, on_token = true, ignore_eos = true }

--- Generates after one prompt or a batch of prompts. temperature 0 (default) is greedy. `stop`: ids and
--- texts, beside the model's own end-of-sequence ids (unless ignore_eos). `streams`: a number for each row
--- that its draws depend on, beside the seed, so that a row draws the same in any batch. on_token(row, id)
--- may return true to end its row; so does a stop text, and its tokens stay in the result.
---@param prompts integer[]|integer[][]
---@param options? { max_new_tokens: integer?, temperature: number?, top_k: integer?, top_p: number?, seed:
---  integer?,
---  streams: integer[]?, stop: (integer|string)[]?, on_token: function?, ignore_eos: boolean? }
---@return integer[]|integer[][]|nil ids, table stats  stats: prefill_seconds, decode_seconds, prompt_tokens,
---  decode_tokens, decode_steps, stop ("length", "token", "caller", "context"; one for each row of a batch)
function model:generate(prompts, options)
  options = options or {}
  if type(prompts) ~= "table" then
    error(("prompts are token ids, or a list of such lists, not a %s"):format(type(prompts)), 2)
  end
  for key in pairs(options) do
    if not KNOWN[key] then
      error(("unknown option '%s' (options are: ignore_eos, max_new_tokens, on_token, seed, stop, streams, "
        .. "temperature, top_k, top_p)"):format(tostring(key)), 2)
    end
  end
  local passed = {}
  for _, key in ipairs(PASSED) do passed[key] = options[key] end
  local ids, strings = stops(options.stop)
  if not options.ignore_eos then
    for _, id in ipairs(primitive_info(self).eos) do ids[#ids + 1] = id end
  end
  passed.stop_ids = ids
  local user, text_stop = options.on_token, nil
  if user ~= nil and type(user) ~= "function" then
    error(("option 'on_token' is a %s, not a function"):format(type(user)), 2)
  end
  if #strings > 0 then
    local tok, err = self:tokenizer()
    if not tok then return nil, err end
    text_stop = string_stopper(tok, strings)
  end
  if user or text_stop then
    passed.on_token = function(row, id)
      local wanted = user and user(row, id)
      return (text_stop and text_stop(row, id)) or wanted
    end
  end
  local batch = type(prompts[1]) == "table"
  local rows, timing = self:_generate(batch and prompts or { prompts }, passed)
  if not rows then return nil, timing end
  local result, ends = {}, {}
  for i, row in ipairs(rows) do result[i], ends[i] = row.ids, row.stop end
  timing.stop = batch and ends or ends[1]
  return batch and result or result[1], timing
end

--- The quantized twin: shares every tensor that it does not change. Options: see qlua.policy.
---@param options? table
---@return qlua.model?, qlua.failure?
function model:quantize(options)
  local twin, err = self:_quantize(policy.make(options or {}))
  if twin then tokenizers[twin] = tokenizers[self] end
  return twin, err
end

--- How the linear layers are stored: { label, scheme, block, double, dtype, quantized, matrices, bits,
--- stored_bits }; label is "nf4", "bfloat16", "mixed nf4 12/30" and the like. dtype: the type that 4-bit
--- weights decode to, nil where there are none. bits: memory for each weight of the layers (on the CPU scales
--- are float32 and double quantization keeps its own beside them); stored_bits: the same in a checkpoint
--- (nf4-format of bitsandbytes), where all layers are alike.
local function quantization(self, dtype)
  local quantized, first, same = 0, nil, true
  local bytes, weights = 0, 0
  local matrices = self:_matrices()
  for _, m in ipairs(matrices) do
    if m.name ~= "lm_head" then bytes, weights = bytes + m.bytes, weights + m.rows * m.columns end
    if m.scheme then
      quantized = quantized + 1
      first = first or m
      same = same and m.scheme == first.scheme and m.block == first.block and m.double == first.double
    end
  end
  local bits = 8 * bytes / weights
  if not first then return { label = dtype, quantized = 0, matrices = #matrices, bits = bits } end
  local linears = #matrices - (matrices[#matrices].scheme and 0 or 1)
  local label = same and first.scheme or "mixed"
  if quantized < linears then label = ("%s %d/%d"):format(label, quantized, linears) end
  local decoded = first.dtype
  if not same then first = {} end
  local stored = same and quantized >= linears and 4 + (first.double
    and 8 / first.block + 32 / (256 * first.block)
    or 32 / first.block) or nil
  return { label = label, scheme = first.scheme, block = first.block, double = first.double, dtype = decoded,
    quantized = quantized, matrices = #matrices, bits = bits, stored_bits = stored }
end

--- What the model is: architecture, params, bytes (resident), layers, hidden, intermediate, heads, kv_heads,
--- head_dim, vocab, max_context, dtype, kv_dtype, tied, bos, eos, device, folder, quant (see above).
---@return table
function model:info()
  local info = primitive_info(self)
  info.quant = quantization(self, info.dtype)
  return info
end

--- The linear layers, in order: { name, rows, columns, bytes, dtype, shared, scheme, block, double }, and
--- where the scheme is "codebook" its 16 values.
---@return table[]
function model:matrices()
  return self:_matrices()
end

--- The analytic expectation in bytes of the first forward pass of a model just loaded.
---@param tokens integer   of all rows together
---@param longest integer  of the longest row
---@param outputs integer  rows of logits wanted
---@param slots? integer   tokens that the cache has room for; default: `tokens`
---@return { weights: integer, kv: integer, activations: integer, total: integer }
function model:expected_memory(tokens, longest, outputs, slots)
  local activations, slot = self:_expect(tokens, longest, outputs)
  local result = { weights = primitive_info(self).bytes, kv = (slots or tokens) * slot,
    activations = activations }
  result.total = result.weights + result.kv + result.activations
  return result
end

return model
