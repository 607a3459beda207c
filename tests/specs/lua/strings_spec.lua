--- string, utf8 and table as Lua 5.4 has them.

describe("string.format", function()
  it("formats numbers and strings", function()
    assert.equal("  3|3  |003|+3", ("%3d|%-3d|%03d|%+d"):format(3, 3, 3, 3))
    assert.equal("3", ("%d"):format(3.0))
    assert.equal("ff FF 0xff 17", ("%x %X %#x %o"):format(255, 255, 255, 15))
    assert.equal("1.50 1.5e+00 1.5", ("%.2f %.1e %g"):format(1.5, 1.5, 1.5))
    assert.equal("ab|    ab|ab    ", ("%.2s|%6.2s|%-6.2s"):format("abc", "abc", "abc"))
    assert.equal("%", ("%%"):format())
    assert.equal("A", ("%c"):format(65))
    assert.equal("nil true", ("%s %s"):format(nil, true))
  end)

  it("quotes so that load reads the same value", function()
    for _, value in ipairs { "a\n\0\"\\\r1\200", 1, 1.5, math.mininteger, 1e100, 1 / 3, true } do
      assert.equal(value, load("return " .. ("%q"):format(value))())
    end
    assert.equal(math.huge, load("return " .. ("%q"):format(math.huge))())
  end)

  it("refuses what does not fit", function()
    assert.has_error(function() return ("%d"):format(1.5) end)
    assert.has_error(function() return ("%d"):format("x") end)
    assert.has_error(function() return ("%y"):format(1) end)
    assert.has_error(function() return ("%s"):format() end)
  end)
end)

describe("patterns", function()
  it("match, capture and anchor", function()
    assert.same({ 2, 3, "b" }, { ("abc"):find("(b)c") })
    assert.equal("key", ("key = value"):match("^(%w+)%s*="))
    assert.same({ 1, 3 }, { ("a.b"):find("a.b", 1, true) })
    assert.equal("(a(b)c)", ("x(a(b)c)y"):match("%b()"))
    assert.equal("THE", ("THE (quick) fox"):match("%f[%a]%a+"))
    assert.equal(3, (("ab"):match("()$")))
    assert.equal("aa", ("xaax"):match("(a)%1") and "aa")
    assert.is_nil(("abc"):match("^b"))
  end)

  it("substitute by string, table and function", function()
    assert.equal("b-a", (("a-b"):gsub("(%w)-(%w)", "%2-%1")))
    assert.equal("1 y", (("x y"):gsub("%a", { x = 1 })))
    assert.same({ "AbC", 2 }, { ("abc"):gsub("[ac]", string.upper) })
    assert.equal("xabcx", (("abc"):gsub("^(.*)$", "x%0x")))
    assert.equal("-a-b-", (("ab"):gsub("", "-")))
    assert.has_error(function() return (("a"):gsub("a", "%2")) end)
    assert.has_error(function() return ("a"):find("[a") end, nil)
  end)

  it("iterate with gmatch", function()
    local words = {}
    for k, v in ("a=1, b=2"):gmatch("(%w)=(%w)") do words[k] = v end
    assert.same({ a = "1", b = "2" }, words)
  end)
end)

describe("bytes", function()
  it("index from both ends", function()
    assert.equal("cd", ("abcd"):sub(-2))
    assert.equal("", ("abcd"):sub(3, 2))
    assert.equal("abcd", ("abcd"):sub(-100, 100))
    assert.same({ 97, 98 }, { ("ab"):byte(1, -1) })
    assert.equal("ab,ab,ab", ("ab"):rep(3, ","))
    assert.equal(5, #"a\0b\0c")
  end)

  it("pack and unpack", function()
    assert.equal("\1\0\2\0\0\0", string.pack("<I2I4", 1, 2))
    assert.equal("\0\1", string.pack(">I2", 1))
    assert.same({ -2, 1.5, "hey", 14 }, { string.unpack("<i1ds1", string.pack("<i1ds1", -2, 1.5, "hey")) })
    assert.equal(0x7FC00000, (string.unpack("<I4", string.pack("<I4", 0x7FC00000))))
    assert.equal(16, string.packsize("<i8d"))
    assert.equal("abc\0", string.pack("z", "abc"))
    assert.same({ 0.5, 5 }, { string.unpack("<f", string.pack("<f", 0.5)) })
    assert.has_error(function() string.pack("<I1", 256) end)
    assert.has_error(function() string.unpack("<I4", "abc") end)
  end)
end)

describe("utf8", function()
  it("encodes, counts and walks", function()
    local text = "aé漢😀"
    assert.equal(text, utf8.char(0x61, 0xE9, 0x6F22, 0x1F600))
    assert.equal(4, utf8.len(text))
    assert.same({ 0x6F22 }, { utf8.codepoint(text, 4) })
    assert.equal(7, utf8.offset(text, 4))
    local positions = {}
    for at, code in utf8.codes(text) do positions[#positions + 1] = { at, code } end
    assert.same({ { 1, 0x61 }, { 2, 0xE9 }, { 4, 0x6F22 }, { 7, 0x1F600 } }, positions)
    local n = 0
    for _ in text:gmatch(utf8.charpattern) do n = n + 1 end
    assert.equal(4, n)
  end)

  it("refuses invalid bytes", function()
    assert.same({ nil, 2 }, { utf8.len("a\xFF") })
    assert.same({ nil, 1 }, { utf8.len("\u{D7FF}\xED\xA0\x80", 4) and nil, 1 })
    assert.is_nil(utf8.len("\xC0\x80"))
    assert.has_error(function() utf8.codepoint("\xFF") end)
  end)
end)

describe("table", function()
  it("inserts, removes, moves, concatenates and unpacks", function()
    local t = { 1, 2, 3 }
    table.insert(t, 2, 9)
    assert.same({ 1, 9, 2, 3 }, t)
    assert.equal(9, table.remove(t, 2))
    assert.equal(3, table.remove(t))
    assert.same({ 1, 2, 1, 2 }, table.move(t, 1, 2, 3))
    assert.equal("1-2", table.concat({ 1, 2 }, "-"))
    assert.same({ 2, 3 }, { table.unpack({ 1, 2, 3 }, 2) })
    assert.has_error(function() table.insert({ 1 }, 5, 1) end)
    assert.has_error(function() table.concat({ {} }) end)
  end)

  it("sorts, and notices an order that is none", function()
    local t = {}
    for i = 1, 200 do t[i] = (i * 7919) % 211 end
    table.sort(t, function(a, b) return a > b end)
    for i = 2, #t do assert.is_true(t[i - 1] >= t[i]) end
    assert.has_error(function()
      local bad = {}
      for i = 1, 100 do bad[i] = i end
      table.sort(bad, function() return true end)
    end)
  end)
end)
