--- What a run will need of memory, told before anything is loaded (--dry-run): bytes of weights, cache and
--- activations for each model, from the headers of their files and the tokens of the questions.

local _ENV <const> = require "qlua.strict"

local tables = require "qlua.table"

local forecast = {}

--- The largest of each kind that a model holds over `passes`, and the largest sum.
---@param model qlua.model  may be an outline
---@param passes qlua.pass[]
---@return { weights: integer, kv: integer, activations: integer, total: integer }
function forecast.of(model, passes)
  local most = { weights = model:info().bytes, kv = 0, activations = 0, total = 0 }
  for _, pass in ipairs(passes) do
    local one = model:expected_memory(pass.tokens, pass.longest, pass.outputs, pass.slots)
    for _, kind in ipairs { "kv", "activations", "total" } do most[kind] = math.max(most[kind], one[kind]) end
  end
  return most
end

--- Bytes of the weights that a twin does not share with the model it is made from.
---@param twin qlua.model
---@return integer
function forecast.own(twin)
  local bytes = 0
  for _, m in ipairs(twin:matrices()) do
    if m.scheme then bytes = bytes + m.bytes end
  end
  return bytes
end

--- Passes by label, in order: { { label, passes }, ... }; those without a label are together.
local function grouped(passes)
  local groups, known = {}, {}
  for _, pass in ipairs(passes) do
    local key = pass.label or ""
    if not known[key] then
      known[key] = { label = key, passes = {} }
      groups[#groups + 1] = known[key]
    end
    table.insert(known[key].passes, pass)
  end
  return groups
end

---@class qlua.forecast
---@field rows { label: string|integer, model: string, bytes: table }[]
---@field needed integer  at most at once, by all models together
---@field free integer    on the device
---@field total integer
---@field fits boolean

--- What models[1] (the full one) and its twins need over `passes`; twins are there one at a time.
---@param models { label: string, model: qlua.model, own: integer? }[]  own: bytes of a twin that shares the
---  others with the full model
---@param passes qlua.pass[]
---@param memory { free: integer, total: integer }  of the device
---@return qlua.forecast
function forecast.make(models, passes, memory)
  local made = { rows = {}, needed = 0, free = memory.free, total = memory.total }
  for _, group in ipairs(grouped(passes)) do
    local full
    for _, m in ipairs(models) do
      local bytes = forecast.of(m.model, group.passes)
      made.rows[#made.rows + 1] = { label = group.label, model = m.label, bytes = bytes }
      full = full or bytes.total
      local both = m == models[1] and full or full + bytes.total - bytes.weights + (m.own or bytes.weights)
      made.needed = math.max(made.needed, both)
    end
  end
  made.fits = made.needed <= made.free
  return made
end

local function mebibytes(bytes) return ("%.1f"):format(bytes / 0x1p20) end

--- The table and the verdict.
---@param made qlua.forecast
---@param what? string  what labels are
---@return string
function forecast.text(made, what)
  local columns = { "model" }
  for i, name in ipairs { "weights (MiB)", "KV (MiB)", "activations (MiB)", "total (MiB)" } do
    columns[i + 1] = { name, align = "right" }
  end
  if what then table.insert(columns, 1, { what, align = "right" }) end
  local t = tables.new(columns)
  local last
  for _, row in ipairs(made.rows) do
    local b = row.bytes
    local cells = { row.model, mebibytes(b.weights), mebibytes(b.kv), mebibytes(b.activations),
      mebibytes(b.total) }
    if what then
      if last and last ~= row.label then t:rule() end
      table.insert(cells, 1, row.label ~= last and tostring(row.label) or "")
    end
    last = row.label
    t:add(table.unpack(cells))
  end
  local verdict = made.fits and "it fits" or "IT DOES NOT FIT: take a smaller batch, context or model"
  return ("%s\nneeded    at most %s MiB at once, %s MiB of %s MiB free: %s\n"
    .. "time      unknown: nothing was loaded or run\n"):format(t:text(), mebibytes(made.needed),
    mebibytes(made.free), mebibytes(made.total), verdict)
end

return forecast
