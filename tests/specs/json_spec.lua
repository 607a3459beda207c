local json = require "qlua.json"

describe("qlua.json", function()
  it("keeps integers and floats apart both ways", function()
    local t = assert(json.decode('[1, 1.0, 1e3, -9223372036854775808, 9223372036854775808, -0.0]'))
    local kinds = {}
    for i, v in ipairs(t) do kinds[i] = math.type(v) end
    assert.same({ "integer", "float", "float", "integer", "float", "float" }, kinds)
    assert.equal("[1,1.0,1000.0,-9223372036854775808,9.223372036854776e+18,-0.0]", json.encode(t))
  end)

  it("writes floats that read back the same", function()
    math.randomseed(7)
    for _ = 1, 2000 do
      local x = (math.random() - 0.5) * 10.0 ^ math.random(-300, 300)
      assert.equal(x, json.decode(json.encode(x)))
    end
  end)

  it("decodes strings with escapes and surrogate pairs", function()
    assert.equal("a\"\\/\b\f\n\r\té😀\0", json.decode([["a\"\\\/\b\f\n\r\t\u00e9\ud83d\ude00\u0000"]]))
  end)

  it("has a value for null", function()
    assert.equal(json.null, json.decode("null"))
    assert.equal('{"a":null}', json.encode { a = json.null })
    assert.equal("null", json.encode(nil))
  end)

  it("tells empty arrays from empty objects", function()
    assert.equal("{}", json.encode {})
    assert.equal("[]", json.encode(json.array()))
    assert.equal('{"a":[],"b":{}}', json.encode(json.decode '{"b": {}, "a": []}'))
    assert.is_true(json.is_array(json.decode "[]"))
    assert.is_false(json.is_array(json.decode "{}"))
  end)

  it("sorts keys, or puts them in the order asked for", function()
    local t = { beta = 1, alpha = 2, gamma = { beta = 1, alpha = 2 } }
    assert.equal('{"alpha":2,"beta":1,"gamma":{"alpha":2,"beta":1}}', json.encode(t))
    assert.equal('{"gamma":{"beta":1,"alpha":2},"beta":1,"alpha":2}',
      json.encode(t, { keys = { "gamma", "beta" } }))
    local text = '{"z":1,"a":[{"q":1,"b":2}],"m":3}'
    assert.equal(text, json.encode(json.decode(text, { order = true })))
  end)

  it("indents", function()
    local text = json.encode({ a = { 1, 2 }, b = {} }, { indent = 2 })
    assert.equal('{\n  "a": [\n    1,\n    2\n  ],\n  "b": {}\n}', text)
  end)

  it("names the position of what is wrong", function()
    local cases = {
      [""] = "ends early",
      ["[1,]"] = "line 1, column 4",
      ["{\n  \"a\" 1}"] = "line 2, column 7",
      ['{"a":1,"a":2}'] = 'key "a" is given twice',
      ["01"] = "leading zero",
      ["1e999"] = "too large",
      ["NaN"] = "expected a value",
      ['"\\ud800"'] = "surrogate",
      ['"\xff"'] = "UTF%-8",
      ['"\1"'] = "control character",
      ["[1] x"] = "after the document",
      ["\xef\xbb\xbf1"] = "byte%-order mark",
      [("["):rep(201) .. ("]"):rep(201)] = "nested too deeply",
    }
    for text, pattern in pairs(cases) do
      local value, err = json.decode(text, { name = "file.json" })
      assert.is_nil(value)
      assert.equal("format", err.code)
      assert.matches("^file.json: not valid JSON: ", err.message)
      assert.matches(pattern, err.message)
    end
    assert.is_nil((json.decode("[[1]]", { max_depth = 1 })))
  end)

  it("raises on what JSON cannot hold", function()
    local loop = {}
    loop.x = loop
    local refused = { { 1, nil, 3 }, { 1, x = 2 }, { [5] = 1 }, { 0 / 0 }, { math.huge }, { print }, loop }
    for _, bad in ipairs(refused) do
      assert.has_error(function() json.encode(bad) end)
    end
    assert.has_error(function() json.encode(1, { indent = "x" }) end)
  end)

  it("makes text valid UTF-8, or refuses", function()
    assert.equal('"a\u{fffd}b"', json.encode("a\xffb"))
    assert.has_error(function() json.encode("a\xffb", { invalid = "error" }) end)
  end)
end)
