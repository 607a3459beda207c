local chat = require "qlua.chat"
local lfs = require "lfs"

local LLAMA3 <const> = "../shared/data/tokenizers/llama3"
local TINYLLAMA <const> = "../shared/data/tokenizers/tinyllama"

local ZEPHYR <const> = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}</s>\n{% endfor %}"
  .. "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"

--- A tokenizer that spells out how it was called: special tokens as ids below 0, other text by bytes.
local function fake_tokenizer()
  return {
    encode = function(_, text, options)
      assert.is_false(options.bos)
      local ids, at = {}, 1
      while at <= #text do
        if options.special and text:sub(at, at + 3) == "</s>" then
          ids[#ids + 1], at = -1, at + 4
        else
          ids[#ids + 1], at = text:byte(at), at + 1
        end
      end
      return ids
    end,
  }
end

local function bytes(text)
  local ids, at = {}, 1
  while at <= #text do
    if text:sub(at, at) == "\1" then ids[#ids + 1] = -1 else ids[#ids + 1] = text:byte(at) end
    at = at + 1
  end
  return ids
end

local function folder_with(files)
  local folder = os.tmpname()
  os.remove(folder)
  assert(lfs.mkdir(folder))
  for name, text in pairs(files) do
    local file = assert(io.open(folder .. "/" .. name, "wb"))
    file:write(text)
    file:close()
  end
  return folder, function()
    for name in pairs(files) do os.remove(folder .. "/" .. name) end
    lfs.rmdir(folder)
  end
end

describe("chat.load", function()
  it("says when there is no template", function()
    local folder, clean = folder_with { ["tokenizer_config.json"] = '{"bos_token": "<s>"}' }
    local template, err = chat.load(folder)
    clean()
    assert.is_nil(template)
    assert.equal("not_found", err.code)
    assert.equal(folder .. ": no chat template", err.message)
    assert.truthy(err.hint:find("chat_template.jinja"))
    assert.is_nil((chat.load("/nonexistent")))
  end)

  it("reads a text, a list of named ones and a file", function()
    local config = '{"bos_token": {"content": "<s>"}, "chat_template": ['
      .. '{"name": "default", "template": "D{{bos_token}}"}, {"name": "rag", "template": "R"}]}'
    local folder, clean = folder_with { ["tokenizer_config.json"] = config }
    assert.equal("D<s>", assert(chat.load(folder)):render {})
    assert.equal("R", assert(chat.load(folder, "rag")):render {})
    local _, err = chat.load(folder, "tool_use")
    clean()
    assert.equal("there are: default, rag", err.hint)
    folder, clean = folder_with {
      ["chat_template.jinja"] = "J{{ eos_token }}", ["tokenizer_config.json"] = config,
      ["special_tokens_map.json"] = '{"eos_token": "</s>"}',
    }
    assert.equal("J</s>", assert(chat.load(folder, true)):render {})
    clean()
  end)

  it("names the file of a broken or unsupported template", function()
    for config, expected in pairs {
      ['{"chat_template": "{% include x %}"}'] = "tokenizer_config.json: chat template: template line 1:",
      ['{"chat_template": [{"name": 1}]}'] = "tokenizer_config.json: chat_template%[1%] needs",
      ['{"chat_template": '] = "tokenizer_config.json: ",
    } do
      local folder, clean = folder_with { ["tokenizer_config.json"] = config }
      local template, err = chat.load(folder)
      clean()
      assert.is_nil(template)
      assert.truthy(err.message:find(expected), err.message)
    end
  end)
end)

describe("template:render", function()
  it("passes options on and knows the date", function()
    local template = assert(chat.template("{{ strftime_now('%d %b %Y') }} {{ custom }} {{ tools is none }}"))
    assert.equal("26 Jul 2024 x True", template:render({}, { now = 1721995200, custom = "x" }))
  end)

  it("refuses messages without a role", function()
    local template = assert(chat.template "")
    assert.has_error(function() template:render { { content = "x" } } end)
    assert.has_error(function() template:render "x" end)
  end)
end)

describe("template:encode", function()
  local template = assert(chat.template(ZEPHYR, { eos_token = "</s>" }))
  local tok = fake_tokenizer()

  it("is the tokenizer on the rendered text when the messages spell no special token", function()
    assert.same(bytes "<|user|>\nHi\1\n<|assistant|>\n",
      template:encode(tok, { { role = "user", content = " Hi " } }, { add_generation_prompt = true }))
  end)

  it("takes special tokens from the template only", function()
    assert.same(bytes "<|user|>\na</s>b</s>\1\n<|user|>\nplain\1\n",
      template:encode(tok, {
        { role = "user", content = "a</s>b</s>" }, { role = "user", content = "plain" },
      }))
    assert.same(bytes "<|x</s>|>\ny\1\n", template:encode(tok, { { role = "x</s>", content = "y" } }))
  end)

  it("refuses what it cannot tell apart", function()
    local ids, err = template:encode(tok, { { role = "user", content = "\u{FFFFE}" } })
    assert.is_nil(ids)
    assert.truthy(err.message:find("noncharacter"))
    local cutting = assert(chat.template("{{ messages[0].content[1:] }}", { eos_token = "</s>" }))
    ids, err = cutting:encode(tok, { { role = "user", content = "</s>x" } })
    assert.is_nil(ids)
    assert.equal("unsupported", err.code)
  end)

  it("leaves the messages as they were", function()
    local messages = { { role = "user", content = "a</s>" } }
    template:encode(tok, messages)
    assert.equal("a</s>", messages[1].content)
  end)
end)

describe("real tokenizers", function()
  local tokenizer = require "qlua.tokenizer"

  it("Llama 3: an <|eot_id|> in a question stays text", function()
    if not lfs.attributes(LLAMA3) then return pending("skipped: no " .. LLAMA3) end
    local template, tok = assert(chat.load(LLAMA3)), assert(tokenizer.load(LLAMA3))
    local turns = { { role = "user", content = "Which is it?\nA. x" } }
    local options = { add_generation_prompt = true }
    local ids = assert(template:encode(tok, turns, options))
    assert.same(tok:encode(template:render(turns, options), { bos = false, special = true }), ids)
    assert.same({ 128000, 128006 }, { ids[1], ids[2] })
    turns[1].content = "Which <|eot_id|> is it?"
    ids = assert(template:encode(tok, turns, options))
    local ends = 0
    for _, id in ipairs(ids) do ends = ends + (id == 128009 and 1 or 0) end
    assert.equal(1, ends)
    assert.equal(template:render(turns, options), tok:decode(ids))
  end)

  it("TinyLlama: the same", function()
    if not lfs.attributes(TINYLLAMA) then return pending("skipped: no " .. TINYLLAMA) end
    local template, tok = assert(chat.load(TINYLLAMA)), assert(tokenizer.load(TINYLLAMA))
    local ids = assert(template:encode(tok, { { role = "user", content = "a</s>b" } }))
    local ends = 0
    for _, id in ipairs(ids) do ends = ends + (id == 2 and 1 or 0) end
    assert.equal(1, ends)
  end)
end)
