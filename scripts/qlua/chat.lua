--- A model's chat template: turns of a conversation to the text, or the token ids, that the model was trained
--- on.
---
---   local template = assert(chat.load(folder))
---   local text = assert(template:render(messages, { add_generation_prompt = true }))
---   local ids = assert(template:encode(tok, messages, { add_generation_prompt = true }))
---
--- Special tokens come from the template's text only. Where nothing in the messages spells a special token,
--- `encode` is the tokenizer on the whole rendered text, as in transformers. Where something does
--- ("<|eot_id|>" inside a question), that spelling is rendered as a mark that occurs nowhere else, the result
--- is cut at the template's own special tokens, where a tokenizer cuts in any case, and the stretches with a
--- mark are encoded as plain text.

local _ENV <const> = require "qlua.strict"

local failure = require "qlua.failure"
local jinja = require "qlua.jinja"
local json = require "qlua.json"

local chat = {}

-- Noncharacters of a private plane: no tokenizer file or text has a use for them.
local MARK_OPEN <const>, MARK_CLOSE <const> = "\u{FFFFE}", "\u{FFFFF}"
local SPECIAL_NAMES <const> = { "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
  "mask_token" }

---@class qlua.chat_template
---@field name string        "default", or the name that was asked for
---@field source string      the Jinja text
---@field path string        the file it came from
---@field special table<string, string>  bos_token, eos_token, ... as the template sees them
---@field added string[]     texts of the special tokens
local Template = {}
Template.__index = Template

local function read_text(path)
  local file, why = io.open(path, "rb")
  if not file then return nil, failure("not_found", ("%s: cannot open (%s)"):format(path, why)) end
  local text, read_why = file:read("a")
  file:close()
  if not text then return nil, failure("io", ("%s: cannot read (%s)"):format(path, read_why)) end
  return text
end

--- A JSON object from a file; {} when there is no such file.
local function read_object(path)
  local text = read_text(path)
  if not text then return {} end
  local object, why = json.decode(text)
  if type(object) ~= "table" then
    return nil, failure("format", ("%s: %s"):format(path, why and tostring(why) or "not a JSON object"))
  end
  return object
end

--- The text of a special token, which a config gives plainly or as {"content": ...}.
local function token_text(entry)
  if type(entry) == "table" then entry = entry.content end
  return type(entry) == "string" and entry or nil
end

--- Templates by name, and the file they come from. A file chat_template.jinja precedes the config, as in
--- transformers.
local function templates_of(folder, config)
  local path = folder .. "/chat_template.jinja"
  local text = read_text(path)
  if text then return { default = text }, path end
  path = folder .. "/tokenizer_config.json"
  local given = config.chat_template
  if type(given) == "string" then return { default = given }, path end
  if type(given) ~= "table" then return {}, path end
  local named = {}
  for i, entry in ipairs(given) do
    if type(entry) ~= "table" or type(entry.name) ~= "string" or type(entry.template) ~= "string" then
      return nil, failure("format", ("%s: chat_template[%d] needs a name and a template"):format(path, i))
    end
    named[entry.name] = entry.template
  end
  return named, path
end

local function names_in(named)
  local names = {}
  for name in pairs(named) do names[#names + 1] = name end
  table.sort(names)
  return table.concat(names, ", ")
end

local function special_tokens(folder, config)
  local map, err = read_object(folder .. "/special_tokens_map.json")
  if not map then return nil, err end
  local special = {}
  for _, name in ipairs(SPECIAL_NAMES) do
    special[name] = token_text(config[name]) or token_text(map[name])
  end
  return special
end

--- Texts of all special tokens, from the tokenizer's file and the named ones.
local function added_tokens(folder, special)
  local file, err = read_object(folder .. "/tokenizer.json")
  if not file then return nil, err end
  local seen, list = {}, {}
  local function add(text)
    if text and text ~= "" and not seen[text] then seen[text], list[#list + 1] = true, text end
  end
  for _, token in ipairs(type(file.added_tokens) == "table" and file.added_tokens or {}) do
    if type(token) == "table" and token.special == true then add(token_text(token)) end
  end
  for _, name in ipairs(SPECIAL_NAMES) do add(special[name]) end
  table.sort(list, function(a, b) return #a > #b or #a == #b and a < b end)
  return list
end

--- A template from its text, for tests and for models without a folder.
---@param source string
---@param special? table<string, string> bos_token, eos_token, ...
---@param added? string[] all special tokens' texts; default: those of `special`
---@return qlua.chat_template?, qlua.failure?
function chat.template(source, special, added)
  local compiled, err = jinja.compile(source)
  if not compiled then return nil, err end
  local list = {}
  for _, text in pairs(special or {}) do list[#list + 1] = text end
  list = added and table.move(added, 1, #added, 1, {}) or list
  table.sort(list, function(a, b) return #a > #b or #a == #b and a < b end)
  return setmetatable({ name = "default", source = source, path = "", special = special or {}, added = list,
    compiled = compiled }, Template)
end

--- The chat template of a checkpoint's folder.
---@param folder string
---@param name? string|boolean one of several templates; default "default"
---@return qlua.chat_template?, qlua.failure?
function chat.load(folder, name)
  name = type(name) == "string" and name or "default"
  local config, err = read_object(folder .. "/tokenizer_config.json")
  if not config then return nil, err end
  local named, path = templates_of(folder, config)
  if not named then return nil, path end
  if not next(named) then
    return nil, failure("not_found", ("%s: no chat template"):format(folder),
      "it is looked for in chat_template.jinja and in tokenizer_config.json; a base model has none")
  end
  local source = named[name]
  if not source then
    return nil, failure("not_found", ("%s: no chat template named '%s'"):format(path, name),
      "there are: " .. names_in(named))
  end
  local special, added
  special, err = special_tokens(folder, config)
  if not special then return nil, err end
  added, err = added_tokens(folder, special)
  if not added then return nil, err end
  local template
  template, err = chat.template(source, special, added)
  if not template then
    return nil, failure(err.code, ("%s: chat template: %s"):format(path, err.message), err.hint)
  end
  template.name, template.path = name, path
  return template
end

local function check_messages(messages)
  if type(messages) ~= "table" then error("messages must be a list of {role=, content=}", 3) end
  for i, message in ipairs(messages) do
    if type(message) ~= "table" or type(message.role) ~= "string" then
      error(("message %d has no role"):format(i), 3)
    end
  end
end

local function context_of(self, messages, options)
  local now = options.now
  local context = {
    messages = jinja.list(messages),
    tools = jinja.none,
    documents = jinja.none,
    add_generation_prompt = false,
    strftime_now = function(format) return os.date(format, now) end,
  }
  for name, text in pairs(self.special) do context[name] = text end
  for name, value in pairs(options) do
    if name ~= "now" then context[name] = value end
  end
  return context
end

---@class qlua.chat_options
---@field add_generation_prompt? boolean  end with the header of the model's own turn
---@field now? integer                    seconds since 1970 for templates that state the date; default: now
---@field [string] any                    anything else that the template may read (tools, date_string, ...)

--- The text of a conversation.
---@param messages { role: string, content: any }[]
---@param options? qlua.chat_options
---@return string?, qlua.failure?
function Template:render(messages, options)
  check_messages(messages)
  return self.compiled:render(context_of(self, messages, options or {}))
end

--- Calls `visit(from, to, token)` for the leftmost, then longest special tokens of a text.
local function each_special(self, text, visit)
  local by_byte, set = {}, {}
  for _, token in ipairs(self.added) do
    local first = token:sub(1, 1)
    if not by_byte[first] then
      by_byte[first] = {}
      set[#set + 1] = first:gsub("[%]%^%-%%]", "%%%0")
    end
    table.insert(by_byte[first], token) -- self.added has the long ones first
  end
  if #set == 0 then return end
  local starts, at = "[" .. table.concat(set) .. "]", 1
  while true do
    local from = text:find(starts, at)
    if not from then return end
    at = from + 1
    for _, token in ipairs(by_byte[text:sub(from, from)]) do
      if text:sub(from, from + #token - 1) == token then
        at = from + #token
        visit(from, at - 1, token)
        break
      end
    end
  end
end

--- Every text inside `value` with special tokens replaced by marks; `spelled` collects what they stand for.
local function marked(self, value, spelled, depth)
  if type(value) == "string" then
    if value:find(MARK_OPEN, 1, true) or value:find(MARK_CLOSE, 1, true) then
      error(failure("argument", "a message holds a noncharacter (U+FFFFE or U+FFFFF)"), 0)
    end
    local parts, at = {}, 1
    each_special(self, value, function(from, to, token)
      spelled[#spelled + 1] = token
      parts[#parts + 1] = value:sub(at, from - 1) .. MARK_OPEN .. #spelled .. MARK_CLOSE
      at = to + 1
    end)
    parts[#parts + 1] = value:sub(at)
    return table.concat(parts)
  end
  if type(value) ~= "table" or value == jinja.none or depth > 64 then return value end
  local copy = setmetatable({}, getmetatable(value))
  for key, item in pairs(value) do copy[key] = marked(self, item, spelled, depth + 1) end
  return copy
end

--- Stretches of a rendered text as {text, special}: plain ones hold a mark, the others are the template's.
local function stretches(self, text)
  local list, buffer, at = {}, "", 1
  local function plain(run)
    if run:find(MARK_OPEN, 1, true) then
      if buffer ~= "" then list[#list + 1] = { buffer, true } end
      list[#list + 1] = { run, false }
      buffer = ""
    else
      buffer = buffer .. run
    end
  end
  each_special(self, text, function(from, to, token)
    plain(text:sub(at, from - 1))
    buffer, at = buffer .. token, to + 1
  end)
  plain(text:sub(at))
  if buffer ~= "" then list[#list + 1] = { buffer, true } end
  return list
end

--- A stretch with its marks turned back; nil when the template has cut or changed one.
local function unmarked(run, spelled)
  local text = run:gsub(MARK_OPEN .. "(%d+)" .. MARK_CLOSE, function(n) return spelled[tonumber(n)] end)
  if text:find(MARK_OPEN, 1, true) or text:find(MARK_CLOSE, 1, true) then return nil end
  return text
end

--- The token ids of a conversation; only the template's own special tokens become such.
---@param tok qlua.tokenizer
---@param messages { role: string, content: any }[]
---@param options? qlua.chat_options
---@return integer[]?, qlua.failure?
function Template:encode(tok, messages, options)
  check_messages(messages)
  local spelled = {}
  local done, copy = pcall(marked, self, messages, spelled, 0)
  if not done then return nil, copy end
  local text, err = self:render(copy, options)
  if not text then return nil, err end
  if #spelled == 0 then return tok:encode(text, { bos = false, special = true }) end
  local ids = {}
  for _, stretch in ipairs(stretches(self, text)) do
    local piece = unmarked(stretch[1], spelled)
    if not piece then
      return nil, failure("unsupported", "the chat template changes a text that spells a special token",
        "take the token's spelling out of the messages")
    end
    local part, why = tok:encode(piece, { bos = false, special = stretch[2] })
    if not part then return nil, why end
    table.move(part, 1, #part, #ids + 1, ids)
  end
  return ids
end

--- The same as template:encode.
---@param template qlua.chat_template
function chat.encode(template, tok, messages, options) return template:encode(tok, messages, options) end

return chat
