#!/usr/bin/env qlua
--- Tokens per second of prefill and decode, and what share of this machine they reach.
---
--- Models have random weights in a known shape, so nothing is downloaded. In every round each format takes
--- its turn (the order turns from round to round), and before each turn the two ceilings are measured:
--- reading memory, and float32 multiply-adds on registers. So what else runs here disturbs all alike.
---
---   decode   one sample a step: tokens/s = rows / seconds of the step, sampling included
---   prefill  one sample a round: tokens/s = rows * tokens / seconds, logits of the last token only
---   bytes    weights of all linear layers and the head once a pass, and the KV cache, per token
---   flops    two a weight and token (the head: last tokens only), attention counted
---   shares   of the ceilings, "a / b": a is median by median; b is 90th percentile by 90th percentile, which
---            a busy machine spoils less. Above 100 % of the bandwidth the weights come from the caches.
---
--- That is the CPU's; --device cuda measures other things against other limits, see bench_device.lua.

local cli = require "qlua.cli"
local json = require "qlua.json"
local probe = require "qlua.probe"
local progress = require "qlua.progress"
local qlua = require "qlua"
local shapes = require "qlua.shapes"
local stats = require "qlua.stats"
local sys = require "qlua.sys"
local tables = require "qlua.table"
local work = require "bench_work"

local NAME <const> = "bench"

--- What load_synthetic takes for a format, and bytes a weight of its linear layers.
local FORMATS <const> = {
  f32 = { dtype = "float32", dense = 4, linear = 4 },
  f16 = { dtype = "float16", dense = 2, linear = 2 },
  bf16 = { dtype = "bfloat16", dense = 2, linear = 2 },
  nf4 = { dtype = "bfloat16", quant = { scheme = "nf4", double = true }, dense = 2, linear = 0.5 + 4 / 64 },
  fp4 = { dtype = "bfloat16", quant = { scheme = "fp4", double = true }, dense = 2, linear = 0.5 + 4 / 64 },
}

local function one_of(known)
  return function(names)
    for _, name in ipairs(names) do
      if not known[name] then
        local list = {}
        for key in pairs(known) do list[#list + 1] = key end
        table.sort(list)
        return ("has no '%s' (there are: %s)"):format(name, table.concat(list, ", "))
      end
    end
  end
end

local opts = cli.parse {
  name = NAME,
  summary = "Tokens per second of prefill and decode with random weights in known shapes, beside what this "
    .. "machine reached in reading memory and in arithmetic in the same run.",
  options = {
    { "device", default = "cpu", help = "cpu, cuda or cuda:N" },
    "numerics",
    { "shape", kind = "strings", metavar = "NAME,...", check = one_of(shapes),
      help = "shapes of known models (default: llama-3.2-1b, on another device llama-3-8b); one that does "
        .. "not fit into the memory is left out" },
    { "formats", kind = "strings", metavar = "NAME,...", check = one_of(FORMATS),
      help = "how the linear layers are stored (default: f32,bf16,nf4, on another device bf16,nf4); also "
        .. "f16, fp4" },
    { "batch_sizes", short = "b", kind = "integers", min = 1, max = 1024,
      help = "rows at once (default: 1,4,16, on another device 1,2,4,8,16,32)" },
    { "prefill", kind = "integer", default = 128, min = 1, max = 100000,
      help = "CPU: tokens of each prompt" },
    { "prefills", kind = "integers", default = { 128, 512 }, min = 1, max = 100000,
      help = "other devices: tokens of the prompts whose prefill is timed" },
    { "context", kind = "integer", default = 512, min = 1, max = 100000,
      help = "other devices: tokens before the steps of decode" },
    { "decode", kind = "integer", default = 64, min = 1, max = 100000, help = "steps after it" },
    { "rounds", kind = "integer", default = 5, min = 1, max = 1000, help = "turns of each format and batch" },
    { "layers", kind = "integer", min = 1, max = 1000,
      help = "keep so many layers of the shape only; then no whole model's speed" },
    { "quick", kind = "flag", help = "2 rounds and 16 steps of decode, on the CPU batch sizes 1 and 4, "
      .. "whatever else is said" },
    { "buffer", kind = "integer", default = 512, min = 16, max = 1 << 20, metavar = "MIB",
      help = "MiB read to measure the bandwidth: many times the caches" },
    "threads", "seed",
    { "output", default = "text", choices = { "text", "md", "csv", "json" },
      help = "how the rows are printed" },
  },
}
local on_cpu <const> = opts.device == "cpu"
opts.shape = opts.shape or { on_cpu and "llama-3.2-1b" or "llama-3-8b" }
opts.formats = opts.formats or on_cpu and { "f32", "bf16", "nf4" } or { "bf16", "nf4" }
opts.batch_sizes = opts.batch_sizes or on_cpu and { 1, 4, 16 } or { 1, 2, 4, 8, 16, 32 }
if opts.quick then opts.rounds, opts.decode = 2, 16 end
if opts.quick and on_cpu then opts.batch_sizes = { 1, 4 } end

local probe_bytes <const> = opts.buffer << 20

local function must(value, err)
  if not value then cli.fail(NAME, err) end
  return value
end

local function csv_cell(value)
  if type(value) == "number" then
    return math.type(value) == "float" and ("%.6g"):format(value) or tostring(value)
  end
  local text = tostring(value)
  return text:find '[,"\n]' and '"' .. text:gsub('"', '""') .. '"' or text
end

if not on_cpu then return require "bench_device"(opts, FORMATS, must, csv_cell) end

local device <close> = must(qlua.device("cpu", { threads = opts.threads }))
local machine = device:info()

local most_rows = 0
for _, batch in ipairs(opts.batch_sizes) do most_rows = math.max(most_rows, batch) end

--- Bytes that a shape takes in a format: weights, KV cache and activations of the largest batch.
local function expected_bytes(name, format)
  local s, f = shapes[name], FORMATS[format]
  local layers, q, kv = opts.layers or s.layers, s.heads * s.head_dim, s.kv_heads * s.head_dim
  local linear = layers * (2 * s.hidden * (q + kv) + 3 * s.hidden * s.intermediate)
  local dense = s.vocab * s.hidden * (s.tied and 1 or 2)
  local cache = most_rows * (opts.prefill + opts.decode + 1) * layers * kv * 2 * 4
  local floats = opts.prefill * (4 * s.hidden + 2 * (q + kv + s.intermediate)) + 2 * s.vocab
  return math.ceil(linear * f.linear + dense * f.dense + cache + most_rows * floats * 4)
end

local notes = {}
local function note(text, ...) notes[#notes + 1] = text:format(...) end

--- Groups of { shape, format } whose models are open together: one group a shape where they fit, else one
--- group a model. What does not fit alone is left out, with a note.
local function plan()
  local free = math.floor(0.9 * device:memory().free) - probe_bytes
  local groups = {}
  for _, shape in ipairs(opts.shape) do
    if opts.prefill + opts.decode > shapes[shape].max_context then
      must(nil, ("--prefill and --decode are %d tokens together; %s ends at %d"):format(
        opts.prefill + opts.decode, shape, shapes[shape].max_context))
    end
    local fitting, total = {}, 0
    for _, format in ipairs(opts.formats) do
      local bytes = expected_bytes(shape, format)
      if bytes > free then
        note("%s in %s left out: it takes %s, and %s are free for it", shape, format, tables.bytes(bytes),
          tables.bytes(math.max(0, free)))
      else
        fitting[#fitting + 1] = { shape = shape, format = format }
        total = total + bytes
      end
    end
    if total <= free then
      if #fitting > 0 then groups[#groups + 1] = fitting end
    else
      note("%s: the formats do not fit into the memory together and ran one after the other", shape)
      for _, entry in ipairs(fitting) do groups[#groups + 1] = { entry } end
    end
  end
  return groups
end

local ceilings = { read = {}, flops = {} }

local function measure_ceilings()
  local c = must(probe.cpu { threads = machine.threads, bytes = probe_bytes, rounds = 1 })
  ceilings.read[#ceilings.read + 1] = c.read_bytes_per_second
  ceilings.flops[#ceilings.flops + 1] = c.flops_per_second
end

--- One turn: a prefill, then the steps of decode, each with its seconds.
local function turn(entry, rows, round)
  local stamps = {}
  local _, timing = entry.model:generate(
    work.prompts(rows, opts.prefill, entry.vocab, opts.seed + round), {
    max_new_tokens = opts.decode + 1, ignore_eos = true,
    on_token = function(row) if row == 1 then stamps[#stamps + 1] = sys.time() end end,
  })
  if not timing.prefill_seconds then must(nil, timing) end
  local samples = entry.samples[rows]
  samples.prefill[#samples.prefill + 1] = timing.prefill_seconds
  for i = 2, #stamps do samples.decode[#samples.decode + 1] = stamps[i] - stamps[i - 1] end
end

local results = {}

local function collect(entry)
  for _, rows in ipairs(opts.batch_sizes) do
    for _, test in ipairs { "prefill", "decode" } do
      local tokens = test == "prefill" and opts.prefill or 1
      local context = test == "prefill" and 0 or opts.prefill + (opts.decode - 1) / 2
      local bytes, flops = work.pass(entry.work, rows, tokens, context)
      local seconds = entry.samples[rows][test]
      local median = stats.median(seconds)
      results[#results + 1] = { shape = entry.shape, format = entry.format, test = test, batch = rows,
        tokens = test == "prefill" and opts.prefill or opts.decode, n = #seconds,
        tokens_per_second = rows * tokens / median,
        p10 = rows * tokens / stats.percentile(seconds, 0.9),
        p90 = rows * tokens / stats.percentile(seconds, 0.1),
        bytes_per_token = bytes / (rows * tokens), bytes_per_second = bytes / median,
        flops_per_second = flops / median, best = median / stats.percentile(seconds, 0.1),
        resident_bytes = entry.resident, seconds = seconds }
    end
  end
end

local function run_group(group, bar)
  for _, entry in ipairs(group) do
    local f = FORMATS[entry.format]
    entry.model = must(qlua.load_synthetic(entry.shape, { device = device, dtype = f.dtype, quant = f.quant,
      layers = opts.layers, seed = opts.seed }))
    local info = entry.model:info()
    entry.work, entry.vocab, entry.resident, entry.samples = work.of(entry.model), info.vocab, info.bytes, {}
    for _, rows in ipairs(opts.batch_sizes) do entry.samples[rows] = { prefill = {}, decode = {} } end
    -- the first pass makes the pages of weights and buffers resident
    local prompt = work.prompts(1, opts.prefill, info.vocab, opts.seed)[1]
    must(entry.model:forward(prompt, { rows = "last" })):close()
  end
  for round = 1, opts.rounds do
    for _, rows in ipairs(opts.batch_sizes) do
      for i = 1, #group do
        local entry = group[(round + i - 2) % #group + 1]
        measure_ceilings()
        turn(entry, rows, round)
        bar:step(1, ("%s %s, batch %d"):format(entry.shape, entry.format, rows))
      end
    end
  end
  for _, entry in ipairs(group) do
    collect(entry)
    entry.model:close()
  end
end

--- Median and p10-p90 of a list, as text in a unit.
local function spread(values, unit, format)
  return (format .. " (p10-p90 " .. format .. "-" .. format .. ")"):format(stats.median(values) / unit,
    stats.percentile(values, 0.1) / unit, stats.percentile(values, 0.9) / unit)
end

local function header()
  local lines = {
    ("qlua %s on %s: %s, %d threads"):format(qlua.version, machine.hardware, machine.isa, machine.threads),
    ("read bandwidth %s GB/s, float32 multiply-add peak %s GFLOP/s, best %.1f and %.0f; n = %d"):format(
      spread(ceilings.read, 1e9, "%.1f"), spread(ceilings.flops, 1e9, "%.0f"),
      stats.percentile(ceilings.read, 1) / 1e9, stats.percentile(ceilings.flops, 1) / 1e9,
      #ceilings.read),
    ("prefill of %d tokens, then %d steps of decode; %d rounds, formats in turn"):format(opts.prefill,
      opts.decode, opts.rounds),
  }
  if opts.layers then note("--layers %d: not the whole shape", opts.layers) end
  table.move(notes, 1, #notes, #lines + 1, lines)
  return table.concat(lines, "\n") .. "\n"
end

--- "a / b", see the top: `rate` is the median, `best` what the 90th percentile of rates is to it.
local function share(rate, best, ceiling)
  return ("%.0f / %.0f"):format(100 * rate / stats.median(ceiling),
    100 * rate * best / stats.percentile(ceiling, 0.9))
end

local function result_table()
  local function right(name, unit, format) return { name, unit = unit, format = format, align = "right" } end
  local t = tables.new { "shape", "format", "test", right "batch", right("tok/s", nil, "%.2f"),
    right "p10-p90", right("MB/token", nil, "%.1f"), right("GB/s", nil, "%.1f"), right("of read", "%"),
    right("GFLOP/s", nil, "%.1f"), right("of peak", "%") }
  local before
  for _, r in ipairs(results) do
    local group = r.shape .. r.format
    if before and before ~= group and opts.output == "text" then t:rule() end
    before = group
    t:add(r.shape, r.format, ("%s %d"):format(r.test, r.tokens), r.batch, r.tokens_per_second,
      ("%.2f-%.2f"):format(r.p10, r.p90), r.bytes_per_token / 1e6, r.bytes_per_second / 1e9,
      share(r.bytes_per_second, r.best, ceilings.read), r.flops_per_second / 1e9,
      share(r.flops_per_second, r.best, ceilings.flops))
  end
  return t
end

local FIELDS <const> = { "date", "version", "hardware", "isa", "threads", "shape", "layers", "format", "test",
  "tokens", "batch", "n", "tokens_per_second", "p10", "p90", "bytes_per_token", "bytes_per_second",
  "read_share", "flops_per_second", "peak_share", "resident_bytes", "ceiling_read_bytes_per_second",
  "ceiling_flops_per_second" }

--- The rows with the facts of the run in each, as llama-bench has them.
local function flat_rows()
  local read, peak = stats.median(ceilings.read), stats.median(ceilings.flops)
  local date, list = os.date "!%Y-%m-%dT%H:%M:%SZ", {}
  for i, r in ipairs(results) do
    local row = { date = date, version = qlua.version, hardware = machine.hardware, isa = machine.isa,
      threads = machine.threads, layers = opts.layers or shapes[r.shape].layers,
      read_share = r.bytes_per_second / read, peak_share = r.flops_per_second / peak,
      ceiling_read_bytes_per_second = read, ceiling_flops_per_second = peak }
    for key, value in pairs(r) do row[key] = value end
    row.best = nil
    list[i] = row
  end
  return list
end

local PRINT <const> = {
  text = function() return header() .. "\n" .. result_table():text() end,
  md = function() return header():gsub("\n", "  \n") .. "\n" .. result_table():markdown() end,
  csv = function()
    local lines = { table.concat(FIELDS, ",") }
    for i, row in ipairs(flat_rows()) do
      local cells = {}
      for c, key in ipairs(FIELDS) do cells[c] = csv_cell(row[key]) end
      lines[i + 1] = table.concat(cells, ",")
    end
    return table.concat(lines, "\n") .. "\n"
  end,
  json = function()
    local rows = flat_rows()
    for _, row in ipairs(rows) do row.seconds = json.array(row.seconds) end
    return json.encode({ rows = json.array(rows), notes = json.array(notes),
      ceilings = { read_bytes_per_second = json.array(ceilings.read),
        flops_per_second = json.array(ceilings.flops) } }, { indent = 2, keys = FIELDS }) .. "\n"
  end,
}

local groups, turns = plan(), 0
for _, group in ipairs(groups) do turns = turns + #group * #opts.batch_sizes * opts.rounds end
if turns == 0 then must(nil, "nothing to run: " .. table.concat(notes, "; ")) end
do
  local bar <close> = progress.new { total = turns, label = "turns" }
  for _, group in ipairs(groups) do run_group(group, bar) end
end
io.stdout:write((PRINT[opts.output]()))
