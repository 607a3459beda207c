local data = require "qlua.data"

local VIROLOGY <const> = "../shared/data/mmlu/test/virology_test.csv"

local function exists(path)
  local file = io.open(path)
  if file then file:close() end
  return file ~= nil
end

describe("data.parse_csv", function()
  it("reads quoted commas, doubled quotes, newlines and CRLF", function()
    local items = assert(data.parse_csv('"a, ""b""\nc",1,2,3,4,B\r\nq2,w,x,y,z,D', "x/virology_test.csv"))
    assert.equal(2, #items)
    assert.equal('a, "b"\nc', items[1].question)
    assert.same({ "1", "2", "3", "4" }, items[1].choices)
    assert.same({ 2, 1 }, { items[1].answer, items[1].line })
    assert.same({ 4, 3 }, { items[2].answer, items[2].line })
    assert.equal("virology", items.subject)
  end)

  it("drops a byte order mark and empty lines", function()
    local items = assert(data.parse_csv("\xEF\xBB\xBFq,1,2,3,4,A\n\nr,1,2,3,4,C\n", "f.csv"))
    assert.equal("q", items[1].question)
    assert.same({ 3, 3 }, { items[2].answer, items[2].line })
  end)

  it("keeps a quote in the middle of an unquoted field", function()
    assert.equal('a "b" c', assert(data.parse_csv('a "b" c,1,2,3,4,A', "f"))[1].question)
  end)

  local bad = {
    { "q,1,2,3,A\n", "f.csv:1: 5 fields" },
    { "q,1,2,3,4,A\nr,1,2,3,4,5,A\n", "f.csv:2: 7 fields" },
    { '"two\nlines",1,2,3,4,A\nq,1,2,3,4,E\n', 'f.csv:3: answer "E"' },
    { "q,1,2,3,4,A,", "f.csv:1: 7 fields" },
    { "question,A,B,C,D,answer\n", "header" },
    { 'q,1,2,3,4,A\n"never closed,1,2,3,4,A\n\n\n', "f.csv:2: quoted field" },
    { '"x"y,1,2,3,4,A', "f.csv:1: text after the closing quote of field 1" },
    { "", "f.csv: the file is empty" },
    { " \n\n", "f.csv: the file is empty" },
    { "q,1,2,3,4,A\nr,\xff,2,3,4,A", "f.csv:2: not valid UTF%-8" },
    { "q,1,2,3,4,A\n\0", "f.csv:2: NUL byte" },
    { ",1,2,3,4,A", "f.csv:1: the question is empty" },
    { "q,1,,3,4,A", "f.csv:1: choice B is empty" },
    { "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull" },
  }
  for i, case in ipairs(bad) do
    it("refuses bad file " .. i, function()
      local items, err = data.parse_csv(case[1], "f.csv")
      assert.is_nil(items)
      assert.equal("format", err.code)
      assert.truthy(tostring(err):find(case[2]), tostring(err))
    end)
  end

  it("survives every truncation of a valid file", function()
    local text = '"a, ""b""\nc",1,2,"3\r\n",4,B\r\nq2,w,x,y,z,D\n'
    for n = 0, #text do
      local items, err = data.parse_csv(text:sub(1, n), "f")
      assert.truthy(items or err)
    end
  end)
end)

describe("data.parse_jsonl", function()
  it("reads both layouts", function()
    local items = assert(data.parse_jsonl(
      '{"question":"q","choices":["a","b","c","d"],"answer":3,"subject":"s"}\n\n'
      .. '{"question":"r","A":"1","B":"2","C":"3","D":"4","answer":"B"}', "f.jsonl"))
    assert.same({ 4, 1, "s" }, { items[1].answer, items[1].line, items[1].subject })
    assert.same({ 2, 3 }, { items[2].answer, items[2].line })
    assert.same({ "1", "2", "3", "4" }, items[2].choices)
  end)

  for i, row in ipairs {
    "{", "[]", '"x"', '{"question":"q","choices":["a","b","c"],"answer":0}',
    '{"question":"q","choices":["a","b","c","d"],"answer":4}',
    '{"question":"q","choices":["a","b","c",1],"answer":1}',
    '{"question":"q","choices":["a","b","c","d"],"answer":1.0}',
    '{"choices":["a","b","c","d"],"answer":1}',
    '{"question":null,"choices":["a","b","c","d"],"answer":1}', '{"question":"q","answer":1}',
  } do
    it("refuses bad row " .. i, function()
      local good = '{"question":"q","choices":["a","b","c","d"],"answer":0}\n'
      local items, err = data.parse_jsonl(good .. row, "f.jsonl")
      assert.is_nil(items)
      assert.truthy(err.message:find("f.jsonl:2: ", 1, true), tostring(err))
    end)
  end
end)

describe("data.read", function()
  it("names a file that is not there", function()
    local items, err = data.read("/nonexistent/x_test.csv")
    assert.is_nil(items)
    assert.equal("not_found", err.code)
    assert.truthy(err.message:find("x_test.csv: cannot open (No such file or directory)", 1, true))
  end)

  it("refuses a folder", function()
    local items, err = data.read("/")
    assert.is_nil(items)
    assert.truthy(err.message)
  end)

  it("reads MMLU's virology as released", function()
    if not exists(VIROLOGY) then return pending("skipped: no " .. VIROLOGY) end
    local items = assert(data.read(VIROLOGY))
    assert.equal(166, #items)
    assert.equal("virology", items.subject)
    local under_512, under_64 = 0, 0
    for _, item in ipairs(items) do
      if utf8.len(item.question) < 512 then under_512 = under_512 + 1 end
      if utf8.len(item.question) < 64 then under_64 = under_64 + 1 end
    end
    assert.same({ 163, 79 }, { under_512, under_64 })
    assert.equal(5, #assert(data.read(data.dev_path(VIROLOGY))))
  end)
end)

describe("small things", function()
  it("subject comes from the file's name", function()
    assert.equal("virology", data.subject("a/b/virology_test.csv"))
    assert.equal("high_school_physics", data.subject("high_school_physics_dev.csv"))
    assert.equal("quiz", data.subject("quiz.jsonl"))
    assert.equal("test_me", data.subject("test_me.csv"))
  end)

  it("finds the dev file", function()
    assert.equal("m/dev/x_dev.csv", data.dev_path("m/test/x_test.csv"))
    assert.equal("x_dev.csv", data.dev_path("x_test.csv"))
    local none, err = data.dev_path("x.csv") -- else the questions would be their own examples
    assert.is_nil(none)
    assert.truthy(err.message:find("x.csv", 1, true))
  end)

  it("takes and filters as lm-eval's --limit", function()
    local items = { { answer = 1 }, { answer = 2 }, { answer = 1 }, subject = "s", path = "p" }
    assert.equal(items, data.take(items, nil))
    assert.equal(2, #data.take(items, 2))
    assert.equal(3, #data.take(items, 99))
    assert.equal(2, #data.take(items, 0.5))
    assert.equal("s", data.take(items, 1).subject)
    assert.has_error(function() data.take(items, 0) end)
    assert.equal(2, #data.filter(items, function(item) return item.answer == 1 end))
  end)
end)
