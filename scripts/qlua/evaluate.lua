--- Two models on the same questions: by log-likelihood of the choices, and by the text they write.
---
--- Both models see the same rows in the same batches; which one goes first alternates from batch to batch,
--- and the clock is read only after the device has finished. A question that does not fit the model's
--- context is not cut: it is counted as too long and has no score.

local _ENV <const> = require "qlua.strict"

local batches = require "qlua.batches"
local json = require "qlua.json"
local questions = require "qlua.questions"
local scorer = require "qlua.scorer"
local sys = require "qlua.sys"
local tasks = require "qlua.tasks"

local evaluate = {}

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
      e.prompt_tokens = e.prompt_tokens - scorer.rows_of(part.prepared) * shared
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

--- Scores the choices of every question with every model. What all questions begin with (the task's
--- description, its examples) goes through each model once, and so does each question, whatever the number
--- and length of its choices: the rest goes on from the keys and values of what came before.
---@param models qlua.model[]
---@param prepared qlua.prepared[]
---@param options qlua.evaluate_options
---@return qlua.evaluation[]?  one a model, and one of the control
---@return qlua.question_row[]|qlua.failure
function evaluate.loglikelihood(models, prepared, options)
  local all <close> = scorer.new(models, prepared, options)
  local rows, err = (options.map or batches.map)(questions.fitting(prepared), { batch = options.batch_size,
    id = function(p) return questions.id(p, all.skip) end, code = { options.each } },
    function(batch, first) return all:rows(batch, first) end)
  if not rows then return nil, err end
  return gathered(rows, prepared, #models, all.skip, options.control), rows
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
  return (options.map or batches.map)(rows, { batch = options.batch_size, code = { options.each } },
    function(batch, begin)
      local ids, values = {}, {}
      for i, row in ipairs(batch) do ids[i] = row.ids end
      local models = { full, test }
      local logits <close> = batches.together()
      for _, m in ipairs(batches.order(2, begin, options.batch_size)) do
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
local function write(model, batch, options)
  local tok, task, prompts, streams = options.tokenizer, options.task, {}, {}
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
local function written(model, batch, options)
  options.device:kernels()
  options.device:sync()
  local begin = sys.time()
  local texts, ids, timing, prompts = write(model, batch, options)
  if not texts then return nil, ids end
  local seconds, n, parts, task = sys.time() - begin, #batch, {}, options.task
  local kernels = json.array(options.device:kernels())
  for b, p in ipairs(batch) do
    local text = task.answer_text and task:answer_text(texts[b]) or texts[b]
    local answer = task:parse(text)
    parts[b] = { text = text, answer = answer, correct = answer == p.item.answer, words = tasks.words(text),
      stop = timing.stop[b], ids = json.array(ids[b]), kernels = kernels, seconds = batches.share(seconds, n),
      prefill_seconds = batches.share(timing.prefill_seconds, n),
      decode_seconds = batches.share(timing.decode_seconds, n),
      prompt_tokens = #prompts[b],
      decode_tokens = timing.decode_tokens // n + (b <= timing.decode_tokens % n and 1 or 0) }
  end
  return parts
end

--- Lets every model write an answer to every question. The time counts the chat template, tokenizing,
--- generating and decoding; template and tokenizing are timed again here, for preparing has done them once
--- for both.
---@param models qlua.model[]
---@param prepared qlua.prepared[]
---@param options { device: qlua.device, tokenizer: qlua.tokenizer, task: qlua.task, batch_size: integer,
---  generation: table, template: table?, map: function?, bos: boolean? }
---@return qlua.evaluation[]?
---@return qlua.question_row[]|qlua.failure
function evaluate.generate(models, prepared, options)
  local rows, err = (options.map or batches.map)(questions.fitting(prepared), { batch = options.batch_size,
    id = function(p) return questions.id(p) end }, function(batch, first)
      local rows = {}
      for b, p in ipairs(batch) do rows[b] = questions.row(p) end
      for _, m in ipairs(batches.order(#models, first, options.batch_size)) do
        local parts, why = written(models[m], batch, options)
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
