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

--- The distinct rows of a batch and where each choice finds its logits: places[item][choice] = { first, last
--- }, counted in the packed logits. Choices of one token share the row of their question.
local function layout(batch)
  local rows, counts, ends, known = {}, {}, {}, {}
  local chosen = {}
  for b, p in ipairs(batch) do
    chosen[b] = {}
    for c, choice in ipairs(p.choices) do
      local key = b .. ":" .. table.concat(choice.row, ",")
      local r = known[key]
      if not r then
        r = #rows + 1
        known[key], rows[r], counts[r] = r, choice.row, 0
      end
      counts[r] = math.max(counts[r], #choice.continuation)
      chosen[b][c] = r
    end
  end
  local total = 0
  for r, count in ipairs(counts) do
    total = total + count
    ends[r] = total
  end
  local places = {}
  for b, p in ipairs(batch) do
    places[b] = {}
    for c, choice in ipairs(p.choices) do
      local last = ends[chosen[b][c]]
      places[b][c] = { last - #choice.continuation + 1, last }
    end
  end
  return rows, counts, places, total
end

--- ln p and greediness of every choice of a batch: { {scores}, {greedy} } an item.
local function score(batch, places, total, logits)
  local lse, best = logits:logsumexp():totable(), logits:argmax()
  local results = {}
  for b = 1, #batch do results[b] = { scores = {}, greedy = {} } end
  local widest = 0
  for _, p in ipairs(batch) do widest = math.max(widest, #p.choices) end
  for c = 1, widest do
    local targets = {}
    for i = 1, total do targets[i] = 0 end
    for b, p in ipairs(batch) do
      local first = places[b][c][1]
      for j, id in ipairs(p.choices[c].continuation) do targets[first + j - 1] = id end
    end
    local picked <close> = logits:gather(targets)
    local values = picked:totable()
    for b = 1, #batch do
      local sum, greedy = 0.0, true
      for i = places[b][c][1], places[b][c][2] do
        sum = sum + (values[i] - lse[i])
        greedy = greedy and best[i] == targets[i]
      end
      results[b].scores[c], results[b].greedy[c] = sum, greedy
    end
  end
  return results
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
---@field prompt_tokens integer
---@field decode_tokens integer
---@field words integer?

--- Empty evaluations for `count` models, to be filled in as batches finish: what an interrupted run keeps.
---@param count integer
---@return qlua.evaluation[]
function evaluate.evaluations(count)
  local list = {}
  for i = 1, count do
    list[i] = { results = {}, seconds = 0, prefill_seconds = 0, decode_seconds = 0, prompt_tokens = 0,
      decode_tokens = 0, words = 0 }
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

--- Scores the choices of every question with every model.
---@param models qlua.model[]
---@param prepared qlua.prepared[]
---@param options qlua.run_options
---@return qlua.evaluation[]?, qlua.failure?
function evaluate.loglikelihood(models, prepared, options)
  local evaluations = options.evaluations or evaluate.evaluations(#models)
  for i, batch in ipairs(batches(prepared, options.batch_size)) do
    local rows, counts, places, total = layout(batch)
    local tokens = 0
    for _, row in ipairs(rows) do tokens = tokens + #row end
    local kept = {}
    for _, m in ipairs(order(#models, i)) do
      options.device:kernels()
      options.device:sync()
      local begin = sys.time()
      local logits, err = models[m]:forward(rows, { rows = counts })
      if not logits then return nil, err end
      local synced
      synced, err = options.device:sync()
      if not synced then return nil, err end
      local e = evaluations[m]
      e.prefill_seconds = e.prefill_seconds + sys.time() - begin
      for b, r in ipairs(score(batch, places, total, logits)) do
        r.prepared = batch[b]
        r.answer = tasks.argmax(r.scores)
        r.correct = r.answer == batch[b].item.answer
        e.results[#e.results + 1] = r
      end
      e.seconds = e.seconds + sys.time() - begin
      e.prompt_tokens = e.prompt_tokens + tokens
      add_kernels(e, #batch, options.device:kernels())
      kept[m] = logits
    end
    if options.each and #models > 1 then
      for b, p in ipairs(batch) do
        local at = places[b][1][1]
        local reference <close> = kept[1]:select(1, at)
        local test <close> = kept[2]:select(1, at)
        options.each(reference, test, p)
      end
    end
    for _, logits in pairs(kept) do logits:close() end
    if options.progress then options.progress:step(#batch) end
  end
  return evaluations
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
