--- One model with random weights that stays open and measures what it is asked: qlua in bench_peers.py.
---
---   qlua scripts/bench_serve.lua '{"shape":"llama-3.2-1b","format":"nf4","threads":2}'
---
--- One JSON object a line, in and out. First a greeting: what the model is and the work of a pass, or an
--- error.
---   {"test":"turn","batch":1,"length":128,"steps":16}  prompts of 128 tokens, then 16 steps of decode after
---                                                      two uncounted: {"prefill":s,"decode":[s,...]}
---   {"test":"ceilings","bytes":536870912}              of the machine: {"read":,"flops":}, a second
--- Without a format there is no model, and ceilings are all that can be asked.

local json = require "qlua.json"
local probe = require "qlua.probe"
local qlua = require "qlua"
local shapes = require "qlua.shapes"
local stats = require "qlua.stats"
local sys = require "qlua.sys"

local WARM_STEPS <const> = 2

--- A bf16 head is bitsandbytes' habit; "head" quantizes lm_head too. Single: no double quantization, so that
--- scales are bfloat16 as the weights were. Exact: decoded to float32, not rounded to bfloat16.
local FORMATS <const> = {
  f32 = { dtype = "float32" },
  bf16 = { dtype = "bfloat16" },
  nf4 = { dtype = "bfloat16", quant = { scheme = "nf4", double = true } },
  ["nf4-single"] = { dtype = "bfloat16", quant = { scheme = "nf4" } },
  ["nf4-single-head"] = { dtype = "bfloat16", quant = { scheme = "nf4", skip = {} } },
  ["nf4-exact-head"] = { dtype = "bfloat16",
    quant = { scheme = "nf4", double = true, skip = {}, dtype = "float32" } },
}

local function answer(value)
  io.stdout:write(json.encode(value), "\n")
  io.stdout:flush()
end

local function must(value, err)
  if value then return value end
  answer { error = tostring(err) }
  os.exit(1)
end

local options = must(json.decode(arg[1] or "{}"))
local device <close> = must(qlua.device("cpu", { threads = options.threads }))
local machine = device:info()
local greeting = { version = qlua.version, hardware = machine.hardware, isa = machine.isa,
  threads = machine.threads }

local model, vocab
if options.format then
  local format = must(FORMATS[options.format], "no format " .. options.format)
  must(shapes[options.shape], "no shape " .. tostring(options.shape))
  model = must(qlua.load_synthetic(options.shape, { device = device, dtype = format.dtype,
    quant = format.quant, layers = options.layers, seed = 1 }))
  local info = model:info()
  vocab = info.vocab
  greeting.bytes, greeting.linear, greeting.head = 0, 0, 0
  for _, m in ipairs(model:matrices()) do
    local kind = m.name == "lm_head" and "head" or "linear"
    greeting.bytes, greeting[kind] = greeting.bytes + m.bytes, greeting[kind] + m.rows * m.columns
  end
  greeting.slot = model:expected_memory(1, 1, 0).kv
  greeting.attention = 4 * info.heads * info.head_dim * info.layers
end

local function prompts_of(rows, length)
  local random, list = stats.random(rows * 8191 + length), {}
  for i = 1, rows do
    list[i] = {}
    for j = 1, length do list[i][j] = (random() >> 1) % vocab end
  end
  return list
end

local function turn(rows, length, steps)
  local stamps = {}
  local wanted = steps > 0 and WARM_STEPS + steps + 1 or 1
  local _, timing = model:generate(prompts_of(rows, length), { max_new_tokens = wanted, ignore_eos = true,
    on_token = function(row) if row == 1 then stamps[#stamps + 1] = sys.time() end end })
  if not timing.prefill_seconds then return { error = tostring(timing) } end
  local decode = {}
  for i = WARM_STEPS + 2, #stamps do decode[#decode + 1] = stamps[i] - stamps[i - 1] end
  return { prefill = timing.prefill_seconds, decode = json.array(decode) }
end

local function ceilings(bytes)
  local found, err = probe.cpu { threads = machine.threads, bytes = bytes, rounds = 1 }
  if not found then return { error = tostring(err) } end
  return { read = found.read_bytes_per_second, flops = found.flops_per_second }
end

answer(greeting)
for line in io.lines() do
  local ask = must(json.decode(line))
  if ask.test == "ceilings" then
    answer(ceilings(ask.bytes))
  elseif ask.test == "turn" and model then
    answer(turn(ask.batch, ask.length, ask.steps))
  else
    answer { error = "no such test: " .. tostring(ask.test) }
  end
end
if model then model:close() end
