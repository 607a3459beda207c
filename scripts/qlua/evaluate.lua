--- Two models on the same questions: by log-likelihood of the choices, and by the text they write.
---
--- Both models see the same rows in the same batches; which one goes first alternates from batch to batch,
--- and the clock is read only after the device has finished. A question that does not fit the model's
--- context is not cut: it is counted as too long and has no score.

local _ENV <const> = require "qlua.strict"

local json = require "qlua.json"
local sys = require "qlua.sys"
local tasks = require "qlua.tasks"

local evaluate = {}

---@class qlua.prepared           one question, tokenized
---@field item qlua.item
---@field index integer           1-based place in the file's list
---@field prompt string
---@field context integer[]       token ids of the prompt
---@field choices { row: integer[], continuation: integer[] }[]?  row = context and continuation but its last
---  token
---@field too_long boolean
---@field tokens integer          of the longest row

--- One of n equal parts of a time, in whole nanoseconds: more digits would only make rows longer.
local function share(seconds, n) return math.floor(1e9 * seconds / n + 0.5) / 1e9 end

local function ends_in_space(text) return text:match("%s+$") or "" end

--- Token ids of a context and its continuation: the continuation is what encoding both together adds, and
--- white space at the context's end belongs to it, as in lm-evaluation-harness (HFLM._encode_pair).
local function encode_pair(tok, context, continuation, options)
  local space = ends_in_space(context)
  if space ~= "" then
    context, continuation = context:sub(1, #context - #space), space .. continuation
  end
  local head = assert(tok:encode(context, options))
  local whole = assert(tok:encode(context .. continuation, options))
  return head, table.move(whole, #head + 1, #whole, 1, {}), table.move(whole, 1, #whole - 1, 1, {})
end

local function same(a, b)
  if #a ~= #b then return false end
  for i, id in ipairs(a) do
    if b[i] ~= id then return false end
  end
  return true
end

--- The same for a conversation. Where a message spells a special token, which must stay text, the whole
--- rendered text may not be encoded at once: then the continuation is encoded by itself.
local function encode_turn(tok, template, messages, options, rendered, continuation)
  local head = assert(template:encode(tok, messages, options))
  local special = { bos = false, special = true }
  if same(head, assert(tok:encode(rendered, special))) then
    return encode_pair(tok, rendered, continuation, special)
  end
  local tail = assert(tok:encode(continuation, { bos = false }))
  local row = table.move(head, 1, #head, 1, {})
  return head, tail, table.move(tail, 1, #tail - 1, #row + 1, row)
end

---@class qlua.prepare_options
---@field max_context integer
---@field bos boolean?            put the tokenizer's own tokens in front (default true)
---@field template table?         chat template (qlua.chat); nil: the plain prompt

--- Tokenizes the questions of a task, once for both models.
---@param tok qlua.tokenizer
---@param task qlua.task
---@param items qlua.items
---@param options qlua.prepare_options
---@return qlua.prepared[]
function evaluate.prepare(tok, task, items, options)
  local list = {}
  local plain = { bos = options.bos ~= false, special = false }
  for index, item in ipairs(items) do
    local p = { item = item, index = index }
    if task.kind == "loglikelihood" then
      p.prompt = task:prompt(item)
      local continuations = task.continuations
      if options.template then
        p.prompt = assert(options.template:render(task:messages(item), task.chat))
        continuations = task.chat_continuations
      end
      p.choices, p.tokens = {}, 0
      for i, continuation in ipairs(continuations) do
        local head, tail, row
        if options.template then
          head, tail, row = encode_turn(tok, options.template, task:messages(item), task.chat, p.prompt,
            continuation)
        else
          head, tail, row = encode_pair(tok, p.prompt, continuation, plain)
        end
        p.context = head
        p.choices[i] = { row = row, continuation = tail }
        p.tokens = math.max(p.tokens, #row + 1)
      end
      p.too_long = p.tokens - 1 > options.max_context
      p.target = p.choices[item.answer].continuation[1]
    else
      if options.template then
        p.prompt = assert(options.template:render(task:messages(item), task.chat))
        p.context = assert(options.template:encode(tok, task:messages(item), task.chat))
      else
        p.prompt = task:prompt(item)
        p.context = assert(tok:encode(p.prompt, plain))
      end
      p.tokens = #p.context
      p.too_long = p.tokens + 1 > options.max_context
    end
    list[index] = p
  end
  return list
end

--- The questions that are not too long.
local function fitting(prepared)
  local list = {}
  for _, p in ipairs(prepared) do
    if not p.too_long then list[#list + 1] = p end
  end
  return list
end

--- The same in batches of at most `size`.
local function batches(prepared, size)
  local list, all = {}, fitting(prepared)
  for first = 1, #all, size do
    list[#list + 1] = table.move(all, first, math.min(first + size - 1, #all), 1, {})
  end
  return list
end

--- qlua.experiment's run:map without a store: fn's values for a list of elements, batch by batch.
local function in_memory(list, options, fn)
  local values = {}
  for first = 1, #list, options.batch do
    local made, err = fn(table.move(list, first, math.min(first + options.batch - 1, #list), 1, {}), first)
    if not made then return nil, err end
    table.move(made, 1, #made, first, values)
  end
  return values
end

--- Model numbers in the order of batch `i`: A B, then B A.
local function order(count, i)
  local list = {}
  for k = 1, count do list[k] = i % 2 == 1 and k or count + 1 - k end
  return list
end

--- The number of the batch that begins with element `first`.
local function turn(first, options) return (first - 1) // options.batch_size + 1 end

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
local function rows_of(p) return p.choices and not follows_context(p) and #p.choices or 1 end

--- What a batch feeds to the models, after the `skip` first tokens of every row, which are there already.
---
--- First one row for each question: its context, whose last logits score the first token of every choice; a
--- question whose choices do not all follow its context has a row for each of them. Then, where choices are
--- longer than one token, a row for the rest of each, which goes on from the question's row.
---@return { rows: integer[][], counts: integer[], places: table, rest: table, fed: integer[] }
---  fed: tokens of each question; places[question][choice] = { first, last } among the logits of `rows`; rest
---  = { rows, counts, parents, places }, places nil where a choice has none
local function layout(batch, skip)
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
function evaluate.shared_tokens(prepared)
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
  local questions = 0
  for _, p in ipairs(prepared) do questions = questions + (p.too_long and 0 or 1) end
  return questions > 1 and least * (questions - 1) > WORTHWHILE and least or 0
end

---@class qlua.scored        one question, one model
---@field prepared qlua.prepared
---@field scores number[]    ln p of each choice (log-likelihood)
---@field greedy boolean[]
---@field answer integer?    the model's choice 1..4; nil: none could be read (generation)
---@field correct boolean
---@field text string?       what the model wrote (generation)
---@field ids integer[]?     its tokens
---@field words integer?
---@field stop string?       why it stopped writing
---@field kernels string[]   product and attention kernels that ran for its batch
---@field seconds number     its share of its batch's, as prefill_seconds and decode_seconds
---@field prompt_tokens integer

---@class qlua.evaluation    one model
---@field results qlua.scored[]  in the items' order, without those that are too long
---@field seconds number     all batches of this model
---@field prefill_seconds number
---@field decode_seconds number
---@field prompt_tokens integer  that went through the model
---@field shared_tokens integer  of prompts that did not, for the model had their keys and values
---@field decode_tokens integer
---@field words integer?

---@class qlua.question_row  what is known of a question when its batch is finished; JSON can hold it
---@field index integer      place of the question in the list
---@field doc { question: string, choices: string[], answer: integer }
---@field prompt string
---@field models table[]     qlua.scored of each model, without `prepared`
---@field control table?     of the first model again, in batches of another size
---@field [string] any       fields that `each` returned

---@class qlua.evaluate_options
---@field device qlua.device
---@field batch_size integer
---@field share? boolean    false: every row goes through the models whole (default true)
---@field control? boolean  the first model once more, in batches of another size: what differs is noise
---@field map? fun(list: any[], options: table, fn: function): any[]?, qlua.failure?  run:map of
---  qlua.experiment, less its name; default: all in memory
---@field each? fun(reference: qlua.tensor, test: qlua.tensor, prepared: qlua.prepared, control:
---  qlua.tensor?): table?  logits at the answer's position; the fields it returns stand in the row

--- A question's row, still without what the models made of it.
local function row_of(p)
  return { index = p.index, prompt = p.prompt, models = {}, doc = { question = p.item.question,
    choices = p.item.choices, answer = p.item.answer } }
end

--- What tells a question's row from others of its set: the prompt, and with `shared` how many of its tokens
--- all questions begin with.
---@param p qlua.prepared
---@param shared integer|string|false|nil
---@return string
function evaluate.row_id(p, shared)
  return sys.sha256(("%d %s %d %s"):format(p.index, shared or "-", p.item.answer, p.prompt))
end

local ADDED <const> = { "seconds", "prefill_seconds", "decode_seconds", "prompt_tokens", "decode_tokens",
  "words" }

--- One model's evaluation, from its part of every row. `shared` tokens, which all prompts begin with, went
--- through the model once.
local function evaluation_of(rows, by_index, part_of, shared)
  local e = { results = {}, shared_tokens = #rows * shared }
  for _, field in ipairs(ADDED) do e[field] = field:find "seconds" and 0.0 or 0 end
  local begun = 0.0
  for i, row in ipairs(rows) do
    local part = part_of(row)
    part.prepared = by_index[row.index]
    e.results[i] = part
    for _, field in ipairs(ADDED) do e[field] = e[field] + (part[field] or 0) end
    if shared > 0 then
      e.prompt_tokens = e.prompt_tokens - rows_of(part.prepared) * shared
      begun = begun + part.begun_seconds / #rows
    end
  end
  if #rows > 0 then e.prompt_tokens = e.prompt_tokens + shared end
  e.seconds, e.prefill_seconds = e.seconds + begun, e.prefill_seconds + begun
  return e
end

--- Evaluations of `count` models and, where there was one, of the control.
local function gathered(rows, prepared, count, shared, control)
  local by_index, list = {}, {}
  for _, p in ipairs(prepared) do by_index[p.index] = p end
  for m = 1, count do
    list[m] = evaluation_of(rows, by_index, function(row) return row.models[m] end, shared)
  end
  if control then
    list[count + 1] = evaluation_of(rows, by_index, function(row) return row.control end, shared)
  end
  return list
end

--- Names of all kernels that ran for the results of one model, in alphabetical order.
---@param evaluation qlua.evaluation
---@return string[]
function evaluate.kernels(evaluation)
  local known, names = {}, {}
  for _, r in ipairs(evaluation.results) do
    for _, name in ipairs(r.kernels) do
      if not known[name] then known[name], names[#names + 1] = true, name end
    end
  end
  table.sort(names)
  return names
end

--- Several things that close together.
local function together()
  return setmetatable({}, { __close = function(list)
    for _, one in pairs(list) do one:close() end
  end })
end

--- One batch through one model: the results, and the logits that the first tokens were scored on. `begun`:
--- what the model keeps of the tokens that all rows begin with, or nil.
local function run_batch(model, batch, plan, begun, device)
  local rest <const> = plan.rest
  local more = #rest.rows > 0
  local kept <close> = together()
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

---@class qlua.scorer    scores the choices of questions with every model, batch by batch
---@field skip integer     tokens that all questions begin with: they go through each model once, before the
---  first batch that is run
local scorer = {}
scorer.__index = scorer

---@param models qlua.model[]
---@param prepared qlua.prepared[]
---@param options qlua.evaluate_options
---@return qlua.scorer
function evaluate.scorer(models, prepared, options)
  local self = setmetatable({ models = models, options = options, device = options.device,
    skip = options.share ~= false and evaluate.shared_tokens(prepared) or 0, seconds = {} }, scorer)
  local first = fitting(prepared)[1]
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
    self.seconds[m] = share(sys.time() - begin, 1)
  end
  return true
end

--- A batch through model m: a part of every question's row, and the logits with the plan of where they are.
function scorer:run(m, batch)
  local plan = layout(batch, self.skip)
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
    part.seconds, part.prefill_seconds = share(seconds, #batch), share(prefilled - begin, #batch)
    part.prompt_tokens = plan.fed[b] + rows_of(batch[b]) * self.skip
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
  for b, p in ipairs(batch) do rows[b] = row_of(p) end
  local kept <close> = together()
  local again <close> = together()
  local plan
  for _, m in ipairs(order(#self.models, turn(first, options))) do
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

--- Scores the choices of every question with every model. What all questions begin with (the task's
--- description, its examples) goes through each model once, and so does each question, whatever the number
--- and length of its choices: the rest goes on from the keys and values of what came before.
---@param models qlua.model[]
---@param prepared qlua.prepared[]
---@param options qlua.evaluate_options
---@return qlua.evaluation[]?  one a model, and one of the control
---@return qlua.question_row[]|qlua.failure
function evaluate.loglikelihood(models, prepared, options)
  local all <close> = evaluate.scorer(models, prepared, options)
  local rows, err = (options.map or in_memory)(fitting(prepared), { batch = options.batch_size,
    id = function(p, _, exact) return evaluate.row_id(p, not exact and all.skip) end },
    function(batch, first) return all:rows(batch, first) end)
  if not rows then return nil, err end
  return gathered(rows, prepared, #models, all.skip, options.control), rows
end

--- What the passes of a run will hold at once: qlua.forecast makes bytes of it.
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
  local plan = layout(batch, skip)
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
function evaluate.loglikelihood_passes(prepared, options)
  local skip = options.share ~= false and evaluate.shared_tokens(prepared) or 0
  local list = {}
  if skip > 0 then list[1] = { tokens = skip, longest = skip, outputs = 0, slots = skip } end
  for _, batch in ipairs(batches(prepared, options.batch_size)) do
    add_passes(list, batch, skip)
    if options.control and #batch == 1 then add_passes(list, { batch[1], batch[1] }, skip) end
  end
  return list
end

--- The passes of evaluate.generation: prompts, whose caches have room for the answers.
---@param prepared qlua.prepared[]
---@param options { batch_size: integer, max_new_tokens: integer, max_context: integer }
---@return qlua.pass[]
function evaluate.generation_passes(prepared, options)
  local list = {}
  for i, batch in ipairs(batches(prepared, options.batch_size)) do
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
function evaluate.last_positions_passes(rows, batch_size)
  local list = {}
  for first = 1, #rows, batch_size do
    local pass = { tokens = 0, longest = 0, outputs = 0 }
    for i = first, math.min(first + batch_size - 1, #rows) do
      pass.tokens, pass.outputs = pass.tokens + #rows[i].ids, pass.outputs + 1
      pass.longest = math.max(pass.longest, #rows[i].ids)
    end
    pass.slots = pass.tokens
    list[#list + 1] = pass
  end
  return list
end

--- A row once more in a batch of another size: alone, or beside itself where batches hold one row anyway.
local function again_alone(full, ids, options)
  if not options.control then return nil end
  return full:forward(options.batch_size == 1 and { ids, ids } or { ids }, { rows = "last" })
end

--- The logits after the last token of every row, batch by batch, of two models and, with `control`, of the
--- first one again with every row in a batch of its own: the noise floor. Rows: { ids = {...}, item = ... }.
---@param full qlua.model
---@param test qlua.model
---@param rows { ids: integer[], item: table }[]
---@param options { batch_size: integer, control: boolean?, map: function?,
---  each: fun(reference: qlua.tensor, test: qlua.tensor, item: table, control: qlua.tensor?): any }
---@return any[]? values  what `each` returned, and true where that was nothing
---@return qlua.failure?
function evaluate.last_positions(full, test, rows, options)
  return (options.map or in_memory)(rows, { batch = options.batch_size }, function(batch, begin)
    local ids, values = {}, {}
    for i, row in ipairs(batch) do ids[i] = row.ids end
    local models = { full, test }
    local logits <close> = together()
    for _, m in ipairs(order(2, turn(begin, options))) do
      local one, err = models[m]:forward(ids, { rows = "last" })
      if not one then return nil, err end
      logits[m] = one
    end
    for i, row in ipairs(batch) do
      local x <close> = logits[1]:select(1, i)
      local y <close> = logits[2]:select(1, i)
      local again <close>, err = again_alone(full, row.ids, options)
      if err then return nil, err end
      local z <close> = again and again:select(1, 1) or nil
      local value = options.each(x, y, row.item, z)
      values[i] = value == nil or value
    end
    return values
  end)
end

--- Encodes a batch's prompts again, generates and decodes: texts, tokens and timing of one model.
local function write(model, tok, task, batch, options)
  local prompts, streams = {}, {}
  for b, p in ipairs(batch) do
    if options.template then
      prompts[b] = assert(options.template:encode(tok, task:messages(p.item), task.chat))
    else
      prompts[b] = assert(tok:encode(task:prompt(p.item), { bos = options.bos ~= false }))
    end
    streams[b] = p.index
  end
  local passed = { streams = streams }
  for _, key in ipairs { "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop" } do
    passed[key] = options.generation[key]
  end
  local ids, timing = model:generate(prompts, passed)
  if not ids then return nil, timing end
  local texts = {}
  for b, row in ipairs(ids) do texts[b] = tok:decode(row, { skip_special = not task.answer_text }) end
  return texts, ids, timing, prompts
end

--- The parts of a batch's rows that one model writes.
local function written(model, tok, task, batch, options)
  options.device:kernels()
  options.device:sync()
  local begin = sys.time()
  local texts, ids, timing, prompts = write(model, tok, task, batch, options)
  if not texts then return nil, ids end
  local seconds, n, parts = sys.time() - begin, #batch, {}
  local kernels = json.array(options.device:kernels())
  for b, p in ipairs(batch) do
    local text = task.answer_text and task:answer_text(texts[b]) or texts[b]
    local answer = task:parse(text)
    parts[b] = { text = text, answer = answer, correct = answer == p.item.answer, words = tasks.words(text),
      stop = timing.stop[b], ids = json.array(ids[b]), kernels = kernels, seconds = share(seconds, n),
      prefill_seconds = share(timing.prefill_seconds, n), decode_seconds = share(timing.decode_seconds, n),
      prompt_tokens = #prompts[b],
      decode_tokens = timing.decode_tokens // n + (b <= timing.decode_tokens % n and 1 or 0) }
  end
  return parts
end

--- Lets every model write an answer to every question. The time counts the chat template, tokenizing,
--- generating and decoding; template and tokenizing are timed again here, for preparing has done them once
--- for both.
---@param models qlua.model[]
---@param tok qlua.tokenizer
---@param task qlua.task
---@param prepared qlua.prepared[]
---@param options { device: qlua.device, batch_size: integer, generation: table, template: table?, map:
---  function?, bos: boolean? }
---@return qlua.evaluation[]?
---@return qlua.question_row[]|qlua.failure
function evaluate.generation(models, tok, task, prepared, options)
  local rows, err = (options.map or in_memory)(fitting(prepared), { batch = options.batch_size,
    id = function(p) return evaluate.row_id(p) end }, function(batch, first)
      local rows = {}
      for b, p in ipairs(batch) do rows[b] = row_of(p) end
      for _, m in ipairs(order(#models, turn(first, options))) do
        local parts, why = written(models[m], tok, task, batch, options)
        if not parts then return nil, why end
        for b, part in ipairs(parts) do rows[b].models[m] = part end
      end
      return rows
    end)
  if not rows then return nil, err end
  return gathered(rows, prepared, #models, 0), rows
end

--- Shares of one model's results: { n, correct, unparsed, accuracy }; accuracy is over all n, nil where n is
--- 0.
---@param evaluation qlua.evaluation
---@return { n: integer, correct: integer, unparsed: integer, accuracy: number? }
function evaluate.accuracy(evaluation)
  local n, correct, unparsed = #evaluation.results, 0, 0
  for _, r in ipairs(evaluation.results) do
    if r.correct then correct = correct + 1 end
    if not r.answer then unparsed = unparsed + 1 end
  end
  return { n = n, correct = correct, unparsed = unparsed, accuracy = n > 0 and correct / n or nil }
end

return evaluate
