--- Several quantizations of one model on the same questions.

local _ENV <const> = require "qlua.strict"

local evaluate = require "qlua.evaluate"
local json = require "qlua.json"
local metrics = require "qlua.metrics"
local policy = require "qlua.policy"
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
  local parts, size, fitting = {}, run.opts.batch_size, {}
  local shared = evaluate.shared_tokens(prepared)
  for _, p in ipairs(prepared) do if not p.too_long then fitting[#fitting + 1] = p end end
  for _, entry in ipairs(list) do
    local made = fingerprint(run, entry.spec)
    for first = 1, #fitting, size do
      local questions = table.move(fitting, first, math.min(first + size - 1, #fitting), 1, {})
      local ids = { made }
      for i, p in ipairs(questions) do ids[i + 1] = evaluate.row_id(p, first .. "/" .. shared) end
      parts[#parts + 1] = { entry = entry, first = first, questions = questions,
        id = sys.sha256(table.concat(ids)) }
    end
  end
  return parts
end

--- Makes a variant's twin, ready to be asked.
local function open_twin(run, entry, prepared, each)
  local twin = run:must(run.full:quantize(entry.spec or { policy = function() return nil end }))
  local info = twin:info()
  local own = { entry = entry, bytes = info.bytes, bits = info.quant.bits,
    scorer = evaluate.scorer({ run.full, twin }, prepared, { device = run.device,
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
  metrics.restore(list, rows, "values")
  local summary = metrics.summary(list, seed)
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
  local task = tasks.mmlu { subject = run.items.subject }
  local prepared = evaluate.prepare(run.tokenizer, task, run.items, { max_context = run.context })
  local done = { too_long = 0 }
  for _, p in ipairs(prepared) do if p.too_long then done.too_long = done.too_long + 1 end end
  done.scored = #prepared - done.too_long
  run:some(done.scored, done.too_long, run.context)
  if run:foresee(evaluate.loglikelihood_passes(prepared, { batch_size = run.opts.batch_size })) then
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
  local scorer = nil -- of the variant that runs now
  local function scorer_of(part)
    if scorer and scorer.entry == part.entry then return scorer end
    if scorer then scorer:close() end
    scorer = open_twin(run, part.entry, prepared, function(reference, test, p)
      return { values = metrics.add({ kl, agreement }, reference, test, p) }
    end)
    return scorer
  end
  local values = run:map("variants", parts, { inputs = { questions = run.opts.batch_size },
    data = { run.items }, id = function(part) return part.id end }, function(batch)
      local part = batch[1]
      local own = scorer_of(part)
      local rows, err = own.scorer:rows(part.questions, part.first)
      return rows and { { rows = rows, bytes = own.bytes, bits = own.bits } }, err
    end)
  if scorer then scorer:close() end
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
