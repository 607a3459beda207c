--- Log-likelihoods of the choices of questions under several models, batch by batch.
---
--- What all questions begin with (the task's description, its examples) goes through each model once, and so
--- does each question, whatever the number and length of its choices: the rest goes on from the keys and
--- values of what came before.

local _ENV <const> = require "qlua.strict"

local batches = require "qlua.batches"
local json = require "qlua.json"
local questions = require "qlua.questions"
local sys = require "qlua.sys"
local tasks = require "qlua.tasks"

---@class qlua.scorer    scores the choices of questions with every model, batch by batch
---@field skip integer     tokens that all questions begin with: they go through each model once, before the
---  first batch that is run
local scorer = {}
scorer.__index = scorer

--- Whether all choices of a question follow its context, token for token: only then they can share it.
local function follows_context(p)
  for _, choice in ipairs(p.choices) do
    if #choice.row - #choice.continuation + 1 ~= #p.context then return false end
    for i, id in ipairs(p.context) do
      if choice.row[i] ~= id then return false end
    end
  end
  return true
end

--- Rows of a question that begin with what all questions begin with.
---@param p qlua.prepared
---@return integer
function scorer.rows_of(p)
  return p.choices and not follows_context(p) and #p.choices or 1
end

--- What a batch feeds to the models, after the `skip` first tokens of every row, which are there already.
---
--- First one row for each question: its context, whose last logits score the first token of every choice; a
--- question whose choices do not all follow its context has a row for each of them. Then, where choices are
--- longer than one token, a row for the rest of each, which goes on from the question's row.
---@param batch qlua.prepared[]
---@param skip integer
---@return { rows: integer[][], counts: integer[], places: table, rest: table, fed: integer[] }
---  fed: tokens of each question; places[question][choice] = { first, last } among the logits of `rows`; rest
---  = { rows, counts, parents, places }, places nil where a choice has none
function scorer.layout(batch, skip)
  local plan = { rows = {}, counts = {}, places = {}, fed = {},
    rest = { rows = {}, counts = {}, parents = {}, places = {} } }
  local rest, at, rest_at = plan.rest, 0, 0
  local function add(b, ids, last, count)
    local row = table.move(ids, skip + 1, last, 1, {})
    plan.rows[#plan.rows + 1], plan.counts[#plan.counts + 1] = row, count
    plan.fed[b], at = plan.fed[b] + #row, at + count
    return at
  end
  for b, p in ipairs(batch) do
    plan.places[b], rest.places[b], plan.fed[b] = {}, {}, 0
    local shared = follows_context(p) and add(b, p.context, #p.context, 1)
    local parent = #plan.rows
    for c, choice in ipairs(p.choices) do
      local n = #choice.continuation
      if shared then
        plan.places[b][c] = { shared, shared }
        if n > 1 then
          local row = table.move(choice.row, #p.context + 1, #choice.row, 1, {})
          rest.rows[#rest.rows + 1], rest.counts[#rest.counts + 1] = row, n - 1
          rest.parents[#rest.parents + 1] = parent
          rest.places[b][c] = { rest_at + 1, rest_at + n - 1 }
          plan.fed[b], rest_at = plan.fed[b] + #row, rest_at + n - 1
        end
      else
        local last = add(b, choice.row, #choice.row, n)
        plan.places[b][c] = { last - n + 1, last }
      end
    end
  end
  return plan
end

--- Adds ln p and greediness of every choice's tokens that `places` names to `results`; from[question][choice]
--- tokens of each have been scored, and are counted here.
local function score(batch, places, logits, results, from)
  local lse, best = logits:logsumexp():totable(), logits:argmax()
  local widest = 0
  for _, p in ipairs(batch) do widest = math.max(widest, #p.choices) end
  for c = 1, widest do
    local targets = {}
    for i = 1, #lse do targets[i] = 0 end
    for b, p in ipairs(batch) do
      local place = places[b][c]
      for i = place and place[1] or 1, place and place[2] or 0 do
        targets[i] = p.choices[c].continuation[from[b][c] + i - place[1] + 1]
      end
    end
    local picked <close> = logits:gather(targets)
    local values = picked:totable()
    for b, r in ipairs(results) do
      local place = places[b][c]
      for i = place and place[1] or 1, place and place[2] or 0 do
        r.scores[c] = r.scores[c] + (values[i] - lse[i])
        r.greedy[c] = r.greedy[c] and best[i] == targets[i]
        from[b][c] = from[b][c] + 1
      end
    end
  end
end

--- Results that no token has been scored of.
local function unscored(batch)
  local results, from = {}, {}
  for b, p in ipairs(batch) do
    results[b], from[b] = { scores = {}, greedy = {} }, {}
    for c in ipairs(p.choices) do results[b].scores[c], results[b].greedy[c], from[b][c] = 0.0, true, 0 end
  end
  return results, from
end

--- A pass that reads all weights for a few tokens costs as much as one over this many: the shared beginning
--- must save more.
local WORTHWHILE <const> = 32

--- Tokens that all rows of all questions begin with, and that each has more than, so that the first logits a
--- choice needs come after them; 0 where they are too few to be worth a pass of their own.
---@param prepared qlua.prepared[]
---@return integer
function scorer.shared_tokens(prepared)
  local first, least, rows = nil, math.huge, 0
  for _, p in ipairs(prepared) do
    for _, choice in ipairs(p.too_long and {} or p.choices) do
      first, rows = first or choice.row, rows + 1
      least = math.min(least, #choice.row - #choice.continuation)
      local n = 0
      while n < least and choice.row[n + 1] == first[n + 1] do n = n + 1 end
      least = n
    end
  end
  local others = #questions.fitting(prepared) - 1
  return others > 0 and least * others > WORTHWHILE and least or 0
end

--- One batch through one model: the results, and the logits that the first tokens were scored on. `begun`:
--- what the model keeps of the tokens that all rows begin with, or nil.
local function run_batch(model, batch, plan, begun, device)
  local rest <const> = plan.rest
  local more = #rest.rows > 0
  local kept <close> = batches.together()
  local logits, seen = model:forward(plan.rows, { rows = plan.counts, after = begun, keep = more })
  if not logits then return nil, seen end
  kept.logits, kept.seen = logits, more and seen or nil
  if more then
    local last, err = model:forward(rest.rows, { rows = rest.counts, after = seen, parents = rest.parents })
    if not last then return nil, err end
    kept.last = last
  end
  local synced, err = device:sync()
  if not synced then return nil, err end
  local prefilled = sys.time()
  local results, from = unscored(batch)
  score(batch, plan.places, logits, results, from)
  if more then score(batch, rest.places, kept.last, results, from) end
  kept.logits = nil
  return results, logits, prefilled
end

---@param models qlua.model[]
---@param prepared qlua.prepared[]
---@param options qlua.evaluate_options
---@return qlua.scorer
function scorer.new(models, prepared, options)
  local self = setmetatable({ models = models, options = options, device = options.device,
    skip = options.share ~= false and scorer.shared_tokens(prepared) or 0, seconds = {} }, scorer)
  local first = questions.fitting(prepared)[1]
  self.head = first and table.move(first.choices[1].row, 1, self.skip, 1, {})
  return self
end

function scorer:close()
  for _, kept in pairs(self.begun or {}) do kept:close() end
  self.begun = nil
end

scorer.__close = scorer.close

--- Runs every model over the tokens that all rows begin with.
function scorer:begin()
  if self.begun or self.skip == 0 then return true end
  self.begun = {}
  for m, model in ipairs(self.models) do
    self.device:sync()
    local begin = sys.time()
    local none, kept = model:forward({ self.head }, { rows = { 0 }, keep = true })
    if not none then return nil, kept end
    none:close()
    self.begun[m] = kept
    local synced, err = self.device:sync()
    if not synced then return nil, err end
    self.seconds[m] = batches.share(sys.time() - begin, 1)
  end
  return true
end

--- A batch through model m: a part of every question's row, and the logits with the plan of where they are.
function scorer:run(m, batch)
  local plan = scorer.layout(batch, self.skip)
  self.device:kernels()
  self.device:sync()
  local begin = sys.time()
  local parts, logits, prefilled = run_batch(self.models[m], batch, plan, self.begun and self.begun[m],
    self.device)
  if not parts then return nil, logits end
  local seconds, kernels = sys.time() - begin, json.array(self.device:kernels())
  for b, part in ipairs(parts) do
    part.answer = tasks.argmax(part.scores)
    part.correct = part.answer == batch[b].item.answer
    part.kernels, part.begun_seconds = kernels, self.seconds[m]
    part.seconds = batches.share(seconds, #batch)
    part.prefill_seconds = batches.share(prefilled - begin, #batch)
    part.prompt_tokens = plan.fed[b] + scorer.rows_of(batch[b]) * self.skip
  end
  return parts, logits, plan
end

--- The first model again, in batches of half the size; a question that is alone has itself beside it.
--- kept[b]: the logits at question b's answer.
function scorer:again(batch, rows, kept)
  local size = math.max(1, #batch // 2)
  for first = 1, #batch, size do
    local some = table.move(batch, first, math.min(first + size - 1, #batch), 1, {})
    local n = #some
    if #batch == 1 then some[2] = some[1] end
    local parts, logits, plan = self:run(1, some)
    if not parts then return nil, logits end
    kept["of " .. first] = logits
    for b = 1, n do
      rows[first + b - 1].control = parts[b]
      kept[first + b - 1] = logits:select(1, plan.places[b][1][1])
    end
  end
  return true
end

--- The rows of a batch, the one that begins with question `first` of those that are not too long.
---@param batch qlua.prepared[]
---@param first integer
---@return qlua.question_row[]?, qlua.failure?
function scorer:rows(batch, first)
  local begun, err = self:begin()
  if not begun then return nil, err end
  local options, rows = self.options, {}
  for b, p in ipairs(batch) do rows[b] = questions.row(p) end
  local kept <close> = batches.together()
  local again <close> = batches.together()
  local plan
  for _, m in ipairs(batches.order(#self.models, first, options.batch_size)) do
    local parts, logits
    parts, logits, plan = self:run(m, batch)
    if not parts then return nil, logits end
    kept[m] = logits
    for b, part in ipairs(parts) do rows[b].models[m] = part end
  end
  if options.control then
    local done, why = self:again(batch, rows, again)
    if not done then return nil, why end
  end
  for b, p in ipairs(options.each and #self.models > 1 and batch or {}) do
    local at = plan.places[b][1][1]
    local reference <close> = kept[1]:select(1, at)
    local test <close> = kept[2]:select(1, at)
    for field, value in pairs(options.each(reference, test, p, again[b]) or {}) do rows[b][field] = value end
  end
  return rows
end

return scorer
