--- What the two benchmarks, bench.lua and bench_device.lua, share: prompts, and what a pass has to read and
--- do.

local stats = require "qlua.stats"

local work = {}

--- What one pass has to do, from the model itself.
function work.of(model)
  local info = model:info()
  local whole = { bytes = 0, linear = 0, head = 0, slot = model:expected_memory(1, 1, 0).kv,
    attention = 4 * info.heads * info.head_dim * info.layers }
  for _, m in ipairs(model:matrices()) do
    whole.bytes = whole.bytes + m.bytes
    local kind = m.name == "lm_head" and "head" or "linear"
    whole[kind] = whole[kind] + m.rows * m.columns
  end
  return whole
end

--- Bytes and flops of one pass: `tokens` new ones in each of `rows` rows, after `context` earlier ones.
function work.pass(whole, rows, tokens, context)
  local pairs_read = tokens * context + tokens * (tokens + 1) / 2
  return whole.bytes + rows * whole.slot * (context + tokens),
    rows * (2 * (tokens * whole.linear + whole.head) + whole.attention * pairs_read)
end

--- Rows of random token ids.
function work.prompts(rows, length, vocab, seed)
  local random, list = stats.random(seed), {}
  for i = 1, rows do
    list[i] = {}
    for j = 1, length do list[i][j] = (random() >> 1) % vocab end
  end
  return list
end

return work
