--- The three ways in which a multiple-choice question is put to a model, and how its answer is read.
---
---   mmlu   log-likelihood of " A".." D" after the question; the same prompt and name as EleutherAI's harness
---   boxed  the model writes a text and puts its letter in double square brackets
---   post   "boxed" as the blog post of 2024 ran it, with its faults; only to set its table beside ours
---
--- They never share a task name. A task builds prompts and reads answers; it never touches a model.

local _ENV <const> = require "qlua.strict"

local text = require "qlua.text"

local tasks = {}

local LETTERS <const> = { "A", "B", "C", "D" }

---@class qlua.task
---@field name string            mmlu_<subject>, mmlu_<subject>_boxed or mmlu_<subject>_post
---@field subject string
---@field kind "loglikelihood"|"generate"
---@field num_fewshot integer
---@field continuations string[]? what is scored after prompt(item) (loglikelihood)
---@field chat_continuations string[]? the same after a rendered chat template
---@field generation table?      options for model:generate (generate)
---@field chat table?            options for the chat template (generate)
---@field prompt fun(self, item: qlua.item): string
---@field messages fun(self, item: qlua.item): table[]
---@field parse fun(self, text: string): integer?   answer 1..4; nil = none could be read (generate)

local function spoken(subject)
  return (subject:gsub("_", " "))
end

local function question_text(item)
  local c = item.choices
  return ("%s\nA. %s\nB. %s\nC. %s\nD. %s\nAnswer:"):format(text.strip(item.question), c[1], c[2], c[3], c[4])
end

local mmlu = {}
mmlu.__index = mmlu

--- The context of one question; each example ends with its letter and an empty line.
function mmlu:prompt(item)
  local parts = { self.description }
  for _, example in ipairs(self.examples) do
    parts[#parts + 1] = question_text(example) .. " " .. LETTERS[example.answer] .. "\n\n"
  end
  parts[#parts + 1] = question_text(item)
  return table.concat(parts)
end

--- The same as chat turns: the description as the system's, every example as a pair of turns.
function mmlu:messages(item)
  local turns = { { role = "system", content = self.description } }
  for _, example in ipairs(self.examples) do
    turns[#turns + 1] = { role = "user", content = question_text(example) }
    turns[#turns + 1] = { role = "assistant", content = LETTERS[example.answer] }
  end
  turns[#turns + 1] = { role = "user", content = question_text(item) }
  return turns
end

---@class qlua.task_options
---@field subject string
---@field fewshot qlua.item[]?   examples, of which the first `num_fewshot` are used
---@field num_fewshot integer?   default 0

--- MMLU by log-likelihood: the argmax over the four continuations, the first on ties.
---@param options qlua.task_options
---@return qlua.task
function tasks.mmlu(options)
  local n, pool = options.num_fewshot or 0, options.fewshot or {}
  if n > #pool then
    error(("num_fewshot is %d, but there are only %d examples"):format(n, #pool), 2)
  end
  return setmetatable({
    name = "mmlu_" .. options.subject,
    subject = options.subject,
    kind = "loglikelihood",
    num_fewshot = n,
    examples = table.move(pool, 1, n, 1, {}),
    description = ("The following are multiple choice questions (with answers) about %s.\n\n"):format(
      spoken(options.subject)),
    continuations = { " A", " B", " C", " D" },
    chat_continuations = { "A", "B", "C", "D" },
    chat = { add_generation_prompt = true },
  }, mmlu)
end

local boxed = {}
boxed.__index = boxed

function boxed:prompt(item)
  local c = item.choices
  return ("Answer this multiple choice question about %s. Give the letter of the correct choice in double "
    .. "square brackets: [[A]], [[B]], [[C]] or [[D]].\n\n%s\nA. %s\nB. %s\nC. %s\nD. %s"):format(
    spoken(self.subject), item.question, c[1], c[2], c[3], c[4])
end

function boxed:messages(item)
  return { { role = "user", content = self:prompt(item) } }
end

--- The last valid box: a model that reasons aloud names candidates first and its answer at the end.
--- Spaces inside the box are allowed; a box of anything but A..D is no answer.
function boxed.parse(_, answer_text)
  local answer
  for letter in answer_text:gmatch("%[%[%s*([ABCD])%s*%]%]") do answer = letter:byte() - 64 end
  return answer
end

--- MMLU by generation; greedy, since the question is what the model answers and not how it samples.
---@param options { subject: string }
---@return qlua.task
function tasks.boxed(options)
  return setmetatable({
    name = "mmlu_" .. options.subject .. "_boxed",
    subject = options.subject,
    kind = "generate",
    num_fewshot = 0,
    generation = { temperature = 0, max_new_tokens = 256 },
    chat = { add_generation_prompt = true },
  }, boxed)
end

local post = {}
post.__index = post

function post:prompt(item)
  local c = item.choices
  return ("Recall your %s knowledge and box your final answer with [[A]] or [[B]] [[F]] or [[D]], etc\n\n"
    .. "%s\n\n%s"):format(spoken(self.subject), item.question,
      text.strip(("A: %s\nB: %s\nC: %s\nD: %s"):format(c[1], c[2], c[3], c[4])))
end

function post:messages(item)
  return { { role = "human", content = self:prompt(item) } }
end

--- The part of the whole decoded text, special tokens included, that the post took for the answer: what
--- follows the last header, up to the end of the turn. Without a generation header the model writes that
--- header itself.
function post.answer_text(_, decoded)
  local tail, at = decoded, 1
  while true do
    local _, stop = decoded:find("<|end_header_id|>", at, true)
    if not stop then break end
    at = stop + 1
    tail = decoded:sub(at)
  end
  local stop = tail:find("<|eot_id|>", 1, true)
  return text.strip(stop and tail:sub(1, stop - 1) or tail)
end

--- The first box with any capital letter; E to Z count as an answer (a wrong one), no box as nil, which this
--- protocol counts as wrong too.
function post.parse(_, answer_text)
  local letter = answer_text:match("%[%[([A-Z])%]%]")
  return letter and letter:byte() - 64
end

--- The protocol of the post: [[F]] where [[C]] was meant, role "human", no generation header, temperature
--- 0.1, at most 256 new tokens, only questions under 64 characters, unparsed answers counted as wrong.
---@param options { subject: string }
---@return qlua.task
function tasks.post(options)
  return setmetatable({
    name = "mmlu_" .. options.subject .. "_post",
    subject = options.subject,
    kind = "generate",
    num_fewshot = 0,
    generation = { temperature = 0.1, max_new_tokens = 256 },
    chat = { add_generation_prompt = false },
    keep = function(item) return utf8.len(item.question) < 64 end,
  }, post)
end

--- Number of the largest score, the first one on ties.
---@param scores number[]
---@return integer
function tasks.argmax(scores)
  local best = 1
  for i = 2, #scores do
    if scores[i] > scores[best] then best = i end
  end
  return best
end

--- Words as the post counts them: runs of characters between white space.
---@param answer_text string
---@return integer
function tasks.words(answer_text)
  return #text.words(answer_text)
end

return tasks
