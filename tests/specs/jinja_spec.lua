local jinja = require "qlua.jinja"
local json = require "qlua.json"

local function read_json(path)
  local file = io.open(path, "rb")
  if not file then return nil end
  local text = file:read("a")
  file:close()
  return assert(json.decode(text))
end

local function render(source, context)
  local template, err = jinja.compile(source)
  if not template then return nil, err end
  return template:render(context or {})
end

local function given(v) return v ~= json.null and v or nil end

describe("jinja against Jinja2", function()
  it("renders the recorded templates alike, errors included", function()
    local golden = read_json "tests/golden/jinja.json"
    assert(golden, "tests/golden/jinja.json cannot be read")
    for _, case in ipairs(golden.cases) do
      local text, err = render(case.template, golden.context)
      if case.refused then
        assert.is_nil(text, case.template)
        assert.equal("unsupported", err.code, case.template)
      else
        assert.equal(given(case.output), text, ("%s\n%s"):format(case.template, tostring(err)))
      end
    end
  end)

  it("renders the chat templates of Llama 3, 3.1, 3.2 and TinyLlama alike", function()
    local path = "../shared/data/chat/renders.json"
    local renders = read_json(path)
    if not renders then return pending("skipped: no " .. path) end
    for _, case in ipairs(renders.cases) do
      local template = renders.templates[case.template]
      local text, err = render(template.template, {
        messages = case.messages,
        add_generation_prompt = case.add_generation_prompt,
        bos_token = template.bos_token,
        eos_token = template.eos_token,
        strftime_now = function() return "26 Jul 2024" end,
      })
      assert.equal(given(case.output), text, tostring(err))
    end
    assert.equal(32, #renders.cases)
  end)
end)

describe("jinja's values from Lua", function()
  it("None, null and what is absent", function()
    assert.equal("True None True", render("{{ a is none }} {{ b }} {{ c is undefined }}",
      { a = json.null, b = jinja.none }))
  end)

  it("calls Lua functions with plain values", function()
    assert.equal("<%d>", render("{{ f('%d') }}", { f = function(format) return "<" .. format .. ">" end }))
  end)

  it("keeps the order that jinja.dict states, and makes none up", function()
    local inner = jinja.dict { { "z", 1 }, { "a", jinja.list {} } }
    local ordered = jinja.dict { { "name", "f" }, { "arguments", inner } }
    assert.equal('{"name": "f", "arguments": {"z": 1, "a": []}}', render("{{ x | tojson }}", { x = ordered }))
    assert.equal('{"only": 1}', render("{{ x | tojson }}", { x = { only = 1 } }))
    local text = '{"z": 1, "a": {"y": [], "b": {}, "c": [1.5, null]}}'
    assert.equal(text, render("{{ x | tojson }}", { x = json.decode(text, { order = true }) }))
    assert.equal("1", render("{{ x.a }}", { x = { a = 1, b = 2 } }))
    for _, source in ipairs {
      "{{ x | tojson }}", "{{ x }}", "{% for k in x %}{% endfor %}", "{{ x.items() }}",
    } do
      local rendered, err = render(source, { x = { a = 1, b = 2 } })
      assert.is_nil(rendered)
      assert.truthy(err.message:find("jinja.dict", 1, true))
    end
  end)

  it("refuses what is no value", function()
    assert.is_nil((render("", { x = io.stdout })))
    assert.is_nil((render("", { x = { 1, a = 2 } })))
    assert.is_nil((render("", { x = "\xFF" })))
    local cycle = {}
    cycle.self = cycle
    assert.is_nil((render("", { x = cycle })))
  end)
end)

describe("jinja's errors", function()
  it("name the construct and the line", function()
    for source, expected in pairs {
      ["a\n\n{% include 'x' %}"] = "template line 3: '{% include %}' is not supported",
      ["{{ a\n | nope }}"] = "template line 2: filter 'nope' is not supported",
      ["{{ a is nope }}"] = "template line 1: test 'nope' is not supported",
      ["\n{{ 'x'.zfill(3) }}"] = "template line 2: method 'zfill' of str is not supported",
      ["{% for a in b recursive %}{% endfor %}"] = "template line 1: recursive loops are not supported",
      ["{% if a %}\n\n"] = "template line 1: '{% if %}' is never closed",
      ["{{ a }\n}"] = "template line 1: unexpected '}'",
      ["\xFF"] = "the template is not valid UTF-8",
    } do
      local text, err = render(source)
      assert.is_nil(text)
      assert.equal(expected, err.message)
    end
  end)

  it("pass on what the template itself raises", function()
    local _, err = render("\n{{ raise_exception('roles must alternate') }}")
    assert.same({ "argument", "roles must alternate" }, { err.code, err.message })
  end)
end)

describe("a hostile template", function()
  local deep = 20000
  for name, source in pairs {
    ["nested brackets"] = "{{ " .. ("("):rep(deep) .. "1" .. (")"):rep(deep) .. " }}",
    ["nested lists"] = "{{ " .. ("["):rep(deep),
    ["nested blocks"] = ("{% if 1 %}"):rep(deep),
    ["long sum of not"] = "{{ " .. ("not "):rep(deep) .. "1 }}",
    ["endless loops"] = ("{% for a in range(100000) %}"):rep(4) .. ("{% endfor %}"):rep(4),
    ["endless macro"] = "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ["growing text"] = "{% set ns = namespace(s='xxxxxxxxxx') %}{% for a in range(100) %}"
      .. "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    ["repeated text"] = "{{ 'abc' * 999999999999 }}",
    ["repeated list"] = "{{ [1] * 999999999999 }}",
    ["huge range"] = "{{ range(99999999999) }}",
    ["big integers"] = "{{ 99999999 ** 99 }}",
  } do
    it("ends: " .. name, function()
      local text, err = render(source)
      assert.is_nil(text)
      assert.is_string(err.message)
    end)
  end

  it("evaluates long chains", function()
    assert.equal("20001", render("{{ 1" .. (" + 1"):rep(20000) .. " }}"))
  end)

  it("never crashes on a cut or changed template", function()
    local source = "{% set a = namespace(x=1) %}{%- for k, v in {'a': [1, 2.5]}.items() if v %}"
      .. "{{ loop.index ~ v[0:1] | join(',') -}} {% else %}x{# c #}{% endfor %}"
      .. "{{ 'q\\n' if a.x is defined else none }}"
    for cut = 1, #source do
      render(source:sub(1, cut))
      render(source:sub(cut))
      render(source:sub(1, cut - 1) .. source:sub(cut + 1))
      render(source:sub(1, cut) .. "{" .. source:sub(cut + 1))
    end
  end)
end)
