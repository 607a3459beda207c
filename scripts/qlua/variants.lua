--- Several quantizations of one model on the same questions.

local _ENV <const> = require "qlua.strict"

local evaluate = require "qlua.evaluate"
local metrics = require "qlua.metrics"
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
  local bar <close> = run:progress(done.scored * #list, "questions")
  run:keeping(function()
    for i, entry in ipairs(list) do
      local twin <close> = run:must(run.full:quantize(entry.spec or { policy = function() return nil end }))
      local kl, agreement = metrics.kl(), metrics.agreement()
      local evaluations = run:must(evaluate.loglikelihood({ run.full, twin }, prepared, {
        device = run.device, batch_size = run.opts.batch_size, progress = bar,
        each = function(reference, test, p) metrics.add({ kl, agreement }, reference, test, p) end,
      }))
      local summary = metrics.summary({ kl, agreement }, run.opts.seed)
      local info = twin:info()
      done[i] = { label = entry.label, spec = entry.spec, bytes = info.bytes, bits = info.quant.bits,
        kl = summary[1], agreement = summary[2], accuracy = evaluate.accuracy(evaluations[2]),
        kernels = evaluate.kernels(evaluations[2]) }
    end
  end)
  return done
end

return variants
