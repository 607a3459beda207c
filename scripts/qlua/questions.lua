--- Questions of a task, tokenized once for all models.
---
--- A question that does not fit the model's context is not cut: it is counted as too long and has no score.

local _ENV <const> = require "qlua.strict"

local sys = require "qlua.sys"

local questions = {}

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
function questions.prepare(tok, task, items, options)
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
---@param list qlua.prepared[]
---@return qlua.prepared[]
function questions.fitting(list)
  local fitting = {}
  for _, p in ipairs(list) do
    if not p.too_long then fitting[#fitting + 1] = p end
  end
  return fitting
end

--- A question's row, still without what the models made of it.
---@param p qlua.prepared
---@return qlua.question_row
function questions.row(p)
  return { index = p.index, prompt = p.prompt, models = {}, doc = { question = p.item.question,
    choices = p.item.choices, answer = p.item.answer } }
end

--- What tells a question's row from others of its set: the prompt, and with `shared` how many of its tokens
--- all questions begin with.
---@param p qlua.prepared
---@param shared integer|string|nil
---@return string
function questions.id(p, shared)
  return sys.sha256(("%d %s %d %s"):format(p.index, shared or "-", p.item.answer, p.prompt))
end

return questions
