--- What the passes of an evaluation will hold at once: qlua.forecast makes bytes of it.

local _ENV <const> = require "qlua.strict"

local batches = require "qlua.batches"
local questions = require "qlua.questions"
local scorer = require "qlua.scorer"

local passes = {}

---@class qlua.pass
---@field tokens integer    that go through the layers
---@field longest integer   tokens of the longest row, with those it goes on from
---@field outputs integer   rows of logits
---@field slots integer     tokens of the cache
---@field label string|integer|nil  what the pass is called in a table

local function longest_of(rows)
  local longest, tokens = 0, 0
  for _, row in ipairs(rows) do longest, tokens = math.max(longest, #row), tokens + #row end
  return longest, tokens
end

local function sum(list)
  local total = 0
  for _, n in ipairs(list) do total = total + n end
  return total
end

--- Adds the passes of a batch, which goes on from `skip` tokens.
local function add_passes(list, batch, skip)
  local plan = scorer.layout(batch, skip)
  local longest, tokens = longest_of(plan.rows)
  local pass = { tokens = tokens, longest = skip + longest, outputs = sum(plan.counts),
    slots = skip + #plan.rows * skip + tokens }
  list[#list + 1] = pass
  local more, rest = longest_of(plan.rest.rows)
  if rest == 0 then return end
  -- the questions' rows and logits are still there, their working memory until the new rows have slots
  local slots = pass.slots + rest
  for _, parent in ipairs(plan.rest.parents) do slots = slots + skip + #plan.rows[parent] end
  list[#list + 1] = { tokens = tokens, longest = pass.longest, outputs = pass.outputs, slots = slots }
  list[#list + 1] = { tokens = rest, longest = pass.longest + more,
    outputs = pass.outputs + sum(plan.rest.counts), slots = slots }
end

--- The passes of evaluate.loglikelihood.
---@param prepared qlua.prepared[]
---@param options { batch_size: integer, share: boolean?, control: boolean? }
---@return qlua.pass[]
function passes.loglikelihood(prepared, options)
  local skip = options.share ~= false and scorer.shared_tokens(prepared) or 0
  local list = {}
  if skip > 0 then list[1] = { tokens = skip, longest = skip, outputs = 0, slots = skip } end
  for _, batch in ipairs(batches.cut(questions.fitting(prepared), options.batch_size)) do
    add_passes(list, batch, skip)
    if options.control and #batch == 1 then add_passes(list, { batch[1], batch[1] }, skip) end
  end
  return list
end

--- The passes of evaluate.generate: prompts, whose caches have room for the answers.
---@param prepared qlua.prepared[]
---@param options { batch_size: integer, max_new_tokens: integer, max_context: integer }
---@return qlua.pass[]
function passes.generate(prepared, options)
  local list = {}
  for i, batch in ipairs(batches.cut(questions.fitting(prepared), options.batch_size)) do
    local pass = { tokens = 0, longest = 0, outputs = #batch, slots = 0 }
    for _, p in ipairs(batch) do
      -- the last token drawn is never fed
      local room = math.min(#p.context + options.max_new_tokens - 1, options.max_context)
      pass.tokens, pass.slots = pass.tokens + #p.context, pass.slots + room
      pass.longest = math.max(pass.longest, room)
    end
    list[i] = pass
  end
  return list
end

--- The passes of evaluate.last_positions.
---@param rows { ids: integer[] }[]
---@param batch_size integer
---@return qlua.pass[]
function passes.last_positions(rows, batch_size)
  local list = {}
  for i, batch in ipairs(batches.cut(rows, batch_size)) do
    local pass = { tokens = 0, longest = 0, outputs = #batch }
    for _, row in ipairs(batch) do
      pass.tokens, pass.longest = pass.tokens + #row.ids, math.max(pass.longest, #row.ids)
    end
    pass.slots = pass.tokens
    list[i] = pass
  end
  return list
end

return passes
