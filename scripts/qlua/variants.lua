--- Several quantizations of one model on the same questions.

local _ENV <const> = require "qlua.strict"

local batches = require "qlua.batches"
local evaluate = require "qlua.evaluate"
local json = require "qlua.json"
local metrics = require "qlua.metrics"
local passes = require "qlua.passes"
local policy = require "qlua.policy"
local questions = require "qlua.questions"
local scorer = require "qlua.scorer"
local sys = require "qlua.sys"
local tasks = require "qlua.tasks"

local variants = {}

---@class qlua.variant
---@field label string
---@field spec table        options of model:quantize
---@field bytes integer     resident
---@field bits number       resident bits per weight of the linear layers (lm_head left out)
---@field kl table          row of qlua.metrics.summary
---@field agreement table
---@field accuracy { n: integer, correct: integer }
---@field kernels string[]  product and attention kernels that ran

--- What tells a variant from others: each matrix's scheme, as model:quantize would choose it.
local function fingerprint(run, spec)
  if not spec then return "full" end
  local choose, list = policy.make(spec), {}
  for i, m in ipairs(run.full:matrices()) do
    list[i] = { m.name, choose(m.name, m.rows, m.columns) or json.null }
  end
  return json.encode(list)
end

--- What every variant is asked, batch by batch: one element each of the list that is resumed.
local function parts_of(run, list, prepared)
  local parts, size, shared = {}, run.opts.batch_size, scorer.shared_tokens(prepared)
  for _, entry in ipairs(list) do
    local made = fingerprint(run, entry.spec)
    for b, batch in ipairs(batches.cut(questions.fitting(prepared), size)) do
      local first, ids = (b - 1) * size + 1, { made }
      for i, p in ipairs(batch) do ids[i + 1] = questions.id(p, first .. "/" .. shared) end
      parts[#parts + 1] = { entry = entry, first = first, batch = batch, id = sys.sha256(table.concat(ids)) }
    end
  end
  return parts
end

--- Makes a variant's twin, ready to be asked.
local function open_twin(run, entry, prepared, each)
  local twin = run:must(run.full:quantize(entry.spec or { policy = function() return nil end }))
  local info = twin:info()
  local own = { entry = entry, bytes = info.bytes, bits = info.quant.bits,
    scorer = scorer.new({ run.full, twin }, prepared, { device = run.device,
      batch_size = run.opts.batch_size, each = each }) }
  function own:close()
    self.scorer:close()
    twin:close()
  end
  return own
end

--- A variant's row from its parts; nil where one is missing.
local function summed(entry, parts, values, scored, list, seed)
  local rows, row = {}, { label = entry.label, spec = entry.spec }
  local test = { results = {} }
  for i, value in ipairs(values) do
    if parts[i].entry == entry then
      table.move(value.rows, 1, #value.rows, #rows + 1, rows)
      row.bytes, row.bits = value.bytes, value.bits
    end
  end
  if #rows < scored then return nil end
  local summary = metrics.summary(metrics.restore(list, rows, "values"), seed)
  for i, r in ipairs(rows) do test.results[i] = r.models[2] end
  row.kl, row.agreement = summary[1], summary[2]
  row.accuracy, row.kernels = evaluate.accuracy(test), evaluate.kernels(test)
  return row
end

--- Measures every { label =, spec = } at the position of the answer's letter; fills in the fields above. The
--- full model stands in the first row, against itself. What Ctrl-C or a failing device left out is missing.
---@param run qlua.experiment
---@param list { label: string, spec: table? }[]
---@return qlua.variant[]
function variants.run(run, list)
  run:check_scheme()
  local task = tasks.mmlu { subject = run.items.subject }
  local prepared = questions.prepare(run.tokenizer, task, run.items, { max_context = run.context })
  local done = { scored = #questions.fitting(prepared) }
  done.too_long = #prepared - done.scored
  run:some(done.scored, done.too_long, run.context)
  if run:foresee(passes.loglikelihood(prepared, { batch_size = run.opts.batch_size })) then
    local twins = {}
    for _, entry in ipairs(list) do
      if entry.spec then
        twins[#twins + 1] = { label = entry.label, model = run:must(run:twin(entry.spec)) }
      end
    end
    run:foretell { twins = twins }
  end
  local kl, agreement = metrics.kl(), metrics.agreement()
  local parts = parts_of(run, list, prepared)
  local open = nil -- the twin that is asked now
  local function twin_of(part)
    if open and open.entry == part.entry then return open end
    if open then open:close() end
    open = open_twin(run, part.entry, prepared, function(reference, test, p)
      return { values = metrics.add({ kl, agreement }, reference, test, p) }
    end)
    return open
  end
  local values = run:map("variants", parts, { inputs = { questions = run.opts.batch_size },
    data = { run.items }, id = function(part) return part.id end }, function(elements)
      local part = elements[1]
      local twin = twin_of(part)
      local rows, err = twin.scorer:rows(part.batch, part.first)
      return rows and { { rows = rows, bytes = twin.bytes, bits = twin.bits } }, err
    end)
  if open then open:close() end
  for i, entry in ipairs(list) do
    local row = summed(entry, parts, values, done.scored, { kl, agreement }, run.opts.seed)
    if not row then break end
    done[i] = row
  end
  return done
end

---@alias qlua.grouping "layer"|"kind"|"matrix"

--- The group that a matrix is quantized with: "layer 3", "mlp.up_proj", or it alone, "3.mlp.up_proj"; one
--- outside the layers is a group of its own, as lm_head.
local function group_of(name, by)
  local layer, kind = name:match "^model%.layers%.(%d+)%.(.+)$"
  if not layer then return name end
  return by == "layer" and "layer " .. layer or by == "kind" and kind or layer .. "." .. kind
end

--- Quantization of only the matrices whose group is in `chosen`; --skip goes before it.
---@param run qlua.experiment
---@param by qlua.grouping
---@param chosen table<string, boolean>
---@return table  options of model:quantize
function variants.only(run, by, chosen)
  local scheme = run:scheme()
  scheme.policy = function(name) return chosen[group_of(name, by)] and run.opts.quant or nil end
  return scheme
end

--- Every group of matrices quantized by itself, the rest as it is: variants with their `group`, the one that
--- moves the answers least (by KL divergence) first.
---@param run qlua.experiment
---@param by qlua.grouping
---@return qlua.variant[]
function variants.alone(run, by)
  local choose, list, known = policy.make(run:scheme()), {}, {}
  for _, m in ipairs(run.full:matrices()) do
    local group = group_of(m.name, by)
    if not known[group] and choose(m.name, m.rows, m.columns) then
      known[group] = true
      list[#list + 1] = { label = "only " .. group, group = group,
        spec = variants.only(run, by, { [group] = true }) }
    end
  end
  local measured = variants.run(run, list)
  for i, row in ipairs(measured) do row.group = list[i].group end
  table.sort(measured, function(a, b)
    if a.kl.value ~= b.kl.value then return a.kl.value < b.kl.value end
    return a.group < b.group
  end)
  return measured
end

return variants
