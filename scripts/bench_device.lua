--- scripts/bench on a device other than the CPU: decode after a context and prefill of several lengths, at
--- every batch size, in every format, each beside its limit.
---
---   limit    the longer of bytes / read bandwidth and operations / matrix rate, both measured by the device
---            before each turn of this run; "of limit" is limit / median. Formats in float32 are held against
---            the float32 rate.
---   bytes    of one pass: every matrix once, keys and values of all positions
---   flops    of one pass: two a weight and token (the head: last tokens only), attention counted
---   memory   high-water mark of the model's arena, and by how much it is above weights + KV cache

local json = require "qlua.json"
local progress = require "qlua.progress"
local qlua = require "qlua"
local shapes = require "qlua.shapes"
local stats = require "qlua.stats"
local sys = require "qlua.sys"
local tables = require "qlua.table"
local work = require "bench_work"

local FIELDS <const> = { "date", "version", "hardware", "isa", "driver", "numerics", "shape", "layers",
  "format", "test", "tokens", "context", "batch", "n", "tokens_per_second", "p10", "p90", "bytes", "flops",
  "limit_seconds", "limit_tokens_per_second", "limit_share", "bytes_per_second", "flops_per_second",
  "weight_bytes", "kv_bytes", "peak_bytes", "kernels", "ceiling_read_bytes_per_second",
  "ceiling_flops_per_second", "ceiling_matrix_flops_per_second" }

local Bench = {}
Bench.__index = Bench

function Bench:note(text, ...) self.notes[#self.notes + 1] = text:format(...) end

function Bench:measure_ceiling()
  local c = self.must(self.device:ceiling(self.opts.buffer << 20))
  for name, list in pairs(self.ceilings) do list[#list + 1] = c[name] end
end

--- The rate that a format's products are held against.
function Bench:rate(format)
  local matrix = self.ceilings.matrix_flops_per_second
  local plain = self.ceilings.flops_per_second
  local wide = self.formats[format].dtype == "float32"
  return stats.median((wide and #plain > 0 or #matrix == 0) and plain or matrix)
end

--- Lengths of prompts: those of prefill, and the context of decode.
function Bench:lengths()
  local list, seen = {}, {}
  for _, length in ipairs(self.opts.prefills) do
    if not seen[length] then list[#list + 1] = { tokens = length, prefill = true } end
    seen[length] = list[#list]
  end
  if seen[self.opts.context] then
    seen[self.opts.context].decode = true
  else
    list[#list + 1] = { tokens = self.opts.context, decode = true }
  end
  return list
end

--- One turn at a batch size: prefill of a prompt, then steps of decode where it is the context. A batch that
--- does not fit into the device's memory is marked so.
function Bench:turn(entry, rows, length, round)
  local stamps = {}
  local samples = entry.samples[rows]
  local prompts = work.prompts(rows, length.tokens, entry.vocab, self.opts.seed + round)
  local texts, timing = entry.model:generate(prompts, { ignore_eos = true,
    max_new_tokens = length.decode and self.opts.decode + 1 or 1,
    on_token = function(row) if row == 1 then stamps[#stamps + 1] = sys.time() end end })
  if not texts and timing.code == "memory" then
    self:note("%s in %s: batch %d does not fit: %s", entry.shape, entry.format, rows, timing.message)
    samples.full = true
    return
  end
  self.must(texts, timing)
  if round == 0 then return end -- warming up
  if length.prefill then
    local list = samples.prefill[length.tokens] or {}
    samples.prefill[length.tokens] = list
    list[#list + 1] = timing.prefill_seconds
  end
  for i = 2, length.decode and #stamps or 0 do
    samples.decode[#samples.decode + 1] = stamps[i] - stamps[i - 1]
  end
end

function Bench:row(entry, rows, test, tokens, context, seconds)
  local new = test == "prefill" and tokens or 1
  local bytes, flops = work.pass(entry.work, rows, new, context)
  local median, samples = stats.median(seconds), entry.samples[rows]
  local fields = { shape = entry.shape, format = entry.format, test = test, batch = rows, tokens = tokens,
    context = context, n = #seconds, tokens_per_second = rows * new / median, seconds = seconds,
    p10 = rows * new / stats.percentile(seconds, 0.9), p90 = rows * new / stats.percentile(seconds, 0.1),
    bytes = bytes, flops = flops, bytes_per_second = bytes / median, flops_per_second = flops / median,
    weight_bytes = entry.weights, kv_bytes = samples.kv, peak_bytes = samples.peak,
    kernels = table.concat(samples.kernels, ", ") }
  self.rows[#self.rows + 1] = fields
end

--- Limits want the ceilings of the whole run.
function Bench:finish_rows()
  local read = stats.median(self.ceilings.read_bytes_per_second)
  for _, r in ipairs(self.rows) do
    r.limit_seconds = math.max(r.bytes / read, r.flops / self:rate(r.format))
    local tokens = r.batch * (r.test == "prefill" and r.tokens or 1)
    r.limit_tokens_per_second = tokens / r.limit_seconds
    r.limit_share = r.tokens_per_second / r.limit_tokens_per_second
  end
end

function Bench:open(entry)
  local f = self.formats[entry.format]
  local model, err = qlua.load_synthetic(entry.shape, { device = self.device, dtype = f.dtype,
    quant = f.quant, layers = self.opts.layers, seed = self.opts.seed })
  if not model and err.code == "memory" then
    self:note("%s in %s left out: %s", entry.shape, entry.format, err.message)
    return false
  end
  entry.model = self.must(model, err)
  entry.work, entry.vocab, entry.samples = work.of(model), model:info().vocab, {}
  entry.weights = model:memory().resident or model:memory().weights
  for _, rows in ipairs(self.opts.batch_sizes) do entry.samples[rows] = { prefill = {}, decode = {} } end
  return true
end

--- All turns of one batch size; the models take turns, and memory and kernels belong to one of them.
function Bench:run_batch(entries, rows, bar)
  local lengths = self:lengths()
  for round = 0, self.opts.rounds do
    for i = 1, #entries do
      local entry = entries[(round + i - 1) % #entries + 1]
      local samples = entry.samples[rows]
      if round > 0 then self:measure_ceiling() end
      entry.model:reset_peak()
      self.device:kernels()
      for _, length in ipairs(lengths) do
        if not samples.full then self:turn(entry, rows, length, round) end
      end
      samples.kernels = self.device:kernels()
      local memory = entry.model:memory()
      samples.peak, samples.kv = memory.peak.total + (memory.resident - memory.weights), memory.peak.kv
      bar:step(1, ("%s %s, batch %d"):format(entry.shape, entry.format, rows))
    end
  end
end

function Bench:collect(entry)
  for _, rows in ipairs(self.opts.batch_sizes) do
    local samples = entry.samples[rows]
    if not samples.full then
      local middle = self.opts.context + (self.opts.decode - 1) / 2
      self:row(entry, rows, "decode", self.opts.decode, middle, samples.decode)
      for _, length in ipairs(self.opts.prefills) do
        self:row(entry, rows, "prefill", length, 0, samples.prefill[length])
      end
    end
  end
end

function Bench:run_shape(shape, bar)
  local s, opts = shapes[shape], self.opts
  local longest = math.max(opts.context + opts.decode, table.unpack(opts.prefills))
  if longest > s.max_context then
    self.must(nil, ("--context and --decode, or --prefills, are %d tokens; %s ends at %d"):format(longest,
      shape, s.max_context))
  end
  local entries = {}
  for _, format in ipairs(opts.formats) do
    local entry = { shape = shape, format = format }
    if self:open(entry) then entries[#entries + 1] = entry end
  end
  for _, rows in ipairs(opts.batch_sizes) do self:run_batch(entries, rows, bar) end
  for _, entry in ipairs(entries) do
    self:collect(entry)
    entry.model:close()
  end
end

-- ---- printing ----

local function gigas(values, format)
  if #values == 0 then return "-" end
  return (format .. " (p10-p90 " .. format .. "-" .. format .. ")"):format(stats.median(values) / 1e9,
    stats.percentile(values, 0.1) / 1e9, stats.percentile(values, 0.9) / 1e9)
end

function Bench:header()
  local m, c, opts = self.machine, self.ceilings, self.opts
  local lines = {
    ("qlua %s on %s: %s%s, numerics %s"):format(qlua.version, m.hardware, m.isa,
      m.driver and m.driver ~= "" and ", " .. m.driver or "", m.numerics or "invariant"),
    ("reads %s GB/s, matrix products %s GFLOP/s, float32 %s GFLOP/s; n = %d"):format(
      gigas(c.read_bytes_per_second, "%.0f"), gigas(c.matrix_flops_per_second, "%.0f"),
      gigas(c.flops_per_second, "%.0f"), #c.read_bytes_per_second),
    ("decode: %d steps after %d tokens; prefill: logits of the last token; %d rounds in turn"):format(
      opts.decode, opts.context, opts.rounds),
  }
  if opts.layers then self:note("--layers %d: not the whole shape", opts.layers) end
  table.move(self.notes, 1, #self.notes, #lines + 1, lines)
  return table.concat(lines, "\n") .. "\n"
end

function Bench:table()
  local function right(name, unit, format) return { name, unit = unit, format = format, align = "right" } end
  local t = tables.new { "shape", "format", "test", right "batch", right("tok/s", nil, "%.1f"),
    right "p10-p90", right("MB", nil, "%.0f"), right("GFLOP", nil, "%.0f"),
    right("limit tok/s", nil, "%.1f"),
    right("of limit", "%", "%.1f"), right("peak MB", nil, "%.0f"), right("over w+kv", "%", "%.1f"),
    "kernels" }
  for _, r in ipairs(self.rows) do
    local plain = r.weight_bytes + r.kv_bytes
    t:add(r.shape, r.format, r.test == "prefill" and ("prefill %d"):format(r.tokens)
      or ("decode @%d"):format(self.opts.context), r.batch, r.tokens_per_second,
      ("%.1f-%.1f"):format(r.p10, r.p90), r.bytes / 1e6, r.flops / 1e9, r.limit_tokens_per_second,
      100 * r.limit_share, r.peak_bytes / 1e6,
      100 * (r.peak_bytes / plain - 1), r.kernels)
  end
  return t
end

function Bench:flat_rows()
  local date, list = os.date "!%Y-%m-%dT%H:%M:%SZ", {}
  for i, r in ipairs(self.rows) do
    local row = { date = date, version = qlua.version, hardware = self.machine.hardware,
      isa = self.machine.isa, driver = self.machine.driver or "",
      numerics = self.machine.numerics or "invariant",
      layers = self.opts.layers or shapes[r.shape].layers }
    for name, values in pairs(self.ceilings) do
      row["ceiling_" .. name] = #values > 0 and stats.median(values) or 0
    end
    for key, value in pairs(r) do row[key] = value end
    list[i] = row
  end
  return list
end

local PRINT <const> = {
  text = function(self) return self:header() .. "\n" .. self:table():text() end,
  md = function(self) return self:header():gsub("\n", "  \n") .. "\n" .. self:table():markdown() end,
  csv = function(self, cell)
    local lines = { table.concat(FIELDS, ",") }
    for i, row in ipairs(self:flat_rows()) do
      local cells = {}
      for c, key in ipairs(FIELDS) do cells[c] = cell(row[key]) end
      lines[i + 1] = table.concat(cells, ",")
    end
    return table.concat(lines, "\n") .. "\n"
  end,
  json = function(self)
    local rows, ceilings = self:flat_rows(), {}
    for _, row in ipairs(rows) do row.seconds = json.array(row.seconds) end
    for name, values in pairs(self.ceilings) do ceilings[name] = json.array(values) end
    return json.encode({ rows = json.array(rows), notes = json.array(self.notes), ceilings = ceilings },
      { indent = 2, keys = FIELDS }) .. "\n"
  end,
}

--- Runs and prints. `formats` and `cell` are bench.lua's; `must(value, err)` ends the program on a failure.
return function(opts, formats, must, cell)
  local device <close> = must(qlua.device(opts.device, { numerics = opts.numerics }))
  local self = setmetatable({ opts = opts, formats = formats, must = must, device = device,
    machine = must(device:info()), notes = {}, rows = {},
    ceilings = { read_bytes_per_second = {}, flops_per_second = {}, matrix_flops_per_second = {} } }, Bench)
  do
    local turns = #opts.shape * #opts.formats * #opts.batch_sizes * (opts.rounds + 1)
    local bar <close> = progress.new { total = turns, label = "turns" }
    for _, shape in ipairs(opts.shape) do self:run_shape(shape, bar) end
  end
  if #self.rows == 0 then must(nil, "nothing was measured: " .. table.concat(self.notes, "; ")) end
  self:finish_rows()
  io.stdout:write((PRINT[opts.output](self, cell)))
end
