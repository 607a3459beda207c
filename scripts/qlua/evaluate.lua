--- Two models on the same questions: by log-likelihood of the choices, and by the text they write.
---
--- Both models see the same rows in the same batches; which one goes first alternates from batch to batch,
--- and the clock is read only after the device has finished. A question that does not fit the model's
--- context is not cut: it is counted as too long and has no score.

local _ENV <const> = require "qlua.strict"

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

--- The questions in batches of at most `size`, those that are too long left out.
local function batches(prepared, size)
  local list, batch = {}, {}
  for _, p in ipairs(prepared) do
    if not p.too_long then
      batch[#batch + 1] = p
      if #batch == size then list[#list + 1], batch = batch, {} end
    end
  end
  if #batch > 0 then list[#list + 1] = batch end
  return list
end

--- Model numbers in the order of batch `i`: A B, then B A.
local function order(count, i)
  local list = {}
  for k = 1, count do list[k] = i % 2 == 1 and k or count + 1 - k end
  return list
end

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

--- What a batch feeds to the models, after the `skip` first tokens of every row, which are there already.
---
--- First one row for each question: its context, whose last logits score the first token of every choice; a
--- question whose choices do not all follow its context has a row for each of them. Then, where choices are
--- longer than one token, a row for the rest of each, which goes on from the question's row.
---@return { rows: integer[][], counts: integer[], places: table, rest: table, tokens: integer }
---  places[question][choice] = { first, last } among the logits of `rows`; rest = { rows, counts, parents,
---  places }, places nil where a choice has none
local function layout(batch, skip)
  local plan = { rows = {}, counts = {}, places = {}, tokens = 0,
    rest = { rows = {}, counts = {}, parents = {}, places = {} } }
  local rest, at, rest_at = plan.rest, 0, 0
  local function add(ids, last, count)
    local row = table.move(ids, skip + 1, last, 1, {})
    plan.rows[#plan.rows + 1], plan.counts[#plan.counts + 1] = row, count
    plan.tokens, at = plan.tokens + #row, at + count
    return at
  end
  for b, p in ipairs(batch) do
    plan.places[b], rest.places[b] = {}, {}
    local shared = follows_context(p) and add(p.context, #p.context, 1)
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
          plan.tokens, rest_at = plan.tokens + #row, rest_at + n - 1
        end
      else
        local last = add(choice.row, #choice.row, n)
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
---@field words integer?
---@field stop string?       why it stopped writing
---@field kernels string[]   product and attention kernels that ran for its batch

---@class qlua.evaluation    one model
---@field results qlua.scored[]  in the items' order, without those that are too long
---@field seconds number     all batches of this model
---@field prefill_seconds number
---@field decode_seconds number
---@field prompt_tokens integer  that went through the model
---@field shared_tokens integer  of prompts that did not, for the model had their keys and values
---@field decode_tokens integer
---@field words integer?

--- Empty evaluations for `count` models, to be filled in as batches finish: what an interrupted run keeps.
---@param count integer
---@return qlua.evaluation[]
function evaluate.evaluations(count)
  local list = {}
  for i = 1, count do
    list[i] = { results = {}, seconds = 0, prefill_seconds = 0, decode_seconds = 0, prompt_tokens = 0,
      shared_tokens = 0, decode_tokens = 0, words = 0 }
  end
  return list
end

--- Drops results of a batch that only some of the models finished, so that all have the same questions.
---@param evaluations qlua.evaluation[]
function evaluate.trim(evaluations)
  local least = math.huge
  for _, e in ipairs(evaluations) do least = math.min(least, #e.results) end
  for _, e in ipairs(evaluations) do
    for i = #e.results, least + 1, -1 do
      e.words = e.words - (e.results[i].words or 0)
      e.results[i] = nil
    end
  end
end

---@class qlua.run_options
---@field device qlua.device
---@field batch_size integer
---@field share? boolean  false: every row goes through the models whole (default true)
---@field progress? { step: function }
---@field evaluations? qlua.evaluation[]  filled in batch by batch; default: new ones
---@field each? fun(reference: qlua.tensor, test: qlua.tensor, prepared: qlua.prepared)  logits at the answer
---  position

--- The kernels that ran are those of the last `count` results.
local function add_kernels(evaluation, count, kernels)
  for i = #evaluation.results - count + 1, #evaluation.results do
    evaluation.results[i].kernels = kernels
  end
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

--- Runs every model over the tokens that all rows begin with: what each keeps of them. The time and the
--- tokens are the model's.
local function begin_rows(models, prepared, options, evaluations, begun)
  local skip = options.share ~= false and evaluate.shared_tokens(prepared) or 0
  if skip == 0 then return skip end
  local ids
  for _, p in ipairs(prepared) do
    if not p.too_long then
      ids = table.move(p.choices[1].row, 1, skip, 1, {})
      break
    end
  end
  for m, model in ipairs(models) do
    options.device:sync()
    local begin = sys.time()
    local none, kept = model:forward({ ids }, { rows = { 0 }, keep = true })
    if not none then return nil, kept end
    none:close()
    begun[m] = kept
    local synced, err = options.device:sync()
    if not synced then return nil, err end
    local e, seconds = evaluations[m], sys.time() - begin
    e.prefill_seconds, e.seconds = e.prefill_seconds + seconds, e.seconds + seconds
    e.prompt_tokens = e.prompt_tokens + skip
  end
  return skip
end

--- Scores the choices of every question with every model. What all questions begin with (the task's
--- description, its examples) goes through each model once, and so does each question, whatever the number
--- and length of its choices: the rest goes on from the keys and values of what came before.
---@param models qlua.model[]
---@param prepared qlua.prepared[]
---@param options qlua.run_options
---@return qlua.evaluation[]?, qlua.failure?
function evaluate.loglikelihood(models, prepared, options)
  local evaluations = options.evaluations or evaluate.evaluations(#models)
  local begun <close> = together()
  local skip, why = begin_rows(models, prepared, options, evaluations, begun)
  if not skip then return nil, why end
  for i, batch in ipairs(batches(prepared, options.batch_size)) do
    local plan = layout(batch, skip)
    local kept <close> = together()
    for _, m in ipairs(order(#models, i)) do
      options.device:kernels()
      options.device:sync()
      local begin = sys.time()
      local results, logits, prefilled = run_batch(models[m], batch, plan, begun[m], options.device)
      if not results then return nil, logits end
      kept[m] = logits
      local e = evaluations[m]
      e.prefill_seconds = e.prefill_seconds + prefilled - begin
      for b, r in ipairs(results) do
        r.prepared = batch[b]
        r.answer = tasks.argmax(r.scores)
        r.correct = r.answer == batch[b].item.answer
        e.results[#e.results + 1] = r
      end
      e.seconds = e.seconds + sys.time() - begin
      e.prompt_tokens, e.shared_tokens = e.prompt_tokens + plan.tokens, e.shared_tokens + #batch * skip
      add_kernels(e, #batch, options.device:kernels())
    end
    if options.each and #models > 1 then
      for b, p in ipairs(batch) do
        local at = plan.places[b][1][1]
        local reference <close> = kept[1]:select(1, at)
        local test <close> = kept[2]:select(1, at)
        options.each(reference, test, p)
      end
    end
    if options.progress then options.progress:step(#batch) end
  end
  return evaluations
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

--- The passes of evaluate.loglikelihood.
---@param prepared qlua.prepared[]
---@param options { batch_size: integer, share: boolean? }
---@return qlua.pass[]
function evaluate.loglikelihood_passes(prepared, options)
  local skip = options.share ~= false and evaluate.shared_tokens(prepared) or 0
  local list = {}
  if skip > 0 then list[1] = { tokens = skip, longest = skip, outputs = 0, slots = skip } end
  for _, batch in ipairs(batches(prepared, options.batch_size)) do
    local plan = layout(batch, skip)
    local longest, tokens = longest_of(plan.rows)
    local pass = { tokens = tokens, longest = skip + longest, outputs = sum(plan.counts),
      slots = skip + #plan.rows * skip + tokens }
    list[#list + 1] = pass
    local more, rest = longest_of(plan.rest.rows)
    if rest > 0 then
      -- the questions' rows and logits are still there, their working memory until the new rows have slots
      local slots = pass.slots + rest
      for _, parent in ipairs(plan.rest.parents) do slots = slots + skip + #plan.rows[parent] end
      list[#list + 1] = { tokens = tokens, longest = pass.longest, outputs = pass.outputs, slots = slots }
      list[#list + 1] = { tokens = rest, longest = pass.longest + more,
        outputs = pass.outputs + sum(plan.rest.counts), slots = slots }
    end
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
---@param options { batch_size: integer, progress: table?, control: boolean?,
---  each: fun(reference: qlua.tensor, test: qlua.tensor, item: table, control: qlua.tensor?) }
---@return boolean?, qlua.failure?
function evaluate.last_positions(full, test, rows, options)
  for first = 1, #rows, options.batch_size do
    local last = math.min(first + options.batch_size - 1, #rows)
    local ids = {}
    for i = first, last do ids[#ids + 1] = rows[i].ids end
    local logits, models = {}, { full, test }
    for _, m in ipairs(order(2, (first - 1) // options.batch_size + 1)) do
      local one, err = models[m]:forward(ids, { rows = "last" })
      if not one then return nil, err end
      logits[m] = one
    end
    local a <close> = logits[1]
    local b <close> = logits[2]
    for i = first, last do
      local x <close> = a:select(1, i - first + 1)
      local y <close> = b:select(1, i - first + 1)
      local again <close>, err = again_alone(full, rows[i].ids, options)
      if err then return nil, err end
      local z <close> = again and again:select(1, 1) or nil
      options.each(x, y, rows[i].item, z)
    end
    if options.progress then options.progress:step(last - first + 1) end
  end
  return true
end

--- Lets every model write an answer to every question. The time counts the chat template, tokenizing,
--- generating and decoding; template and tokenizing are timed again here, for preparing has done them once
--- for both.
---@param models qlua.model[]
---@param tok qlua.tokenizer
---@param task qlua.task
---@param prepared qlua.prepared[]
---@param options { device: qlua.device, batch_size: integer, generation: table, template: table?, progress:
---  table?,
---  bos: boolean? }
---@return qlua.evaluation[]?, qlua.failure?
function evaluate.generation(models, tok, task, prepared, options)
  local evaluations = options.evaluations or evaluate.evaluations(#models)
  for i, batch in ipairs(batches(prepared, options.batch_size)) do
    for _, m in ipairs(order(#models, i)) do
      options.device:kernels()
      options.device:sync()
      local begin = sys.time()
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
      local rows, timing = models[m]:generate(prompts, passed)
      if not rows then return nil, timing end
      local texts = {}
      for b, ids in ipairs(rows) do texts[b] = tok:decode(ids, { skip_special = not task.answer_text }) end
      local e = evaluations[m]
      e.seconds = e.seconds + sys.time() - begin
      for _, key in ipairs { "prefill_seconds", "decode_seconds", "prompt_tokens", "decode_tokens" } do
        e[key] = e[key] + timing[key]
      end
      for b, p in ipairs(batch) do
        local text = task.answer_text and task:answer_text(texts[b]) or texts[b]
        local answer, words = task:parse(text), tasks.words(text)
        e.words = e.words + words
        e.results[#e.results + 1] = { prepared = p, text = text, answer = answer, words = words,
          correct = answer == p.item.answer, stop = timing.stop[b], ids = rows[b] }
      end
      add_kernels(e, #batch, options.device:kernels())
    end
    if options.progress then options.progress:step(#batch) end
  end
  return evaluations
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
