-- Tables for spreadsheets, as RFC 4180 has them.

local csv = require "qlua.csv"
local json = require "qlua.json"

describe("csv.text", function()
  it("quotes what would break a row, and ends rows with CRLF", function()
    assert.equal('a,"b,c"\r\n"say ""no""","two\nlines"\r\nplain,\r\n', csv.text({ "a", "b,c" },
      { { 'say "no"', "two\nlines" }, { "plain", nil } }))
    assert.equal('a\r\n" kept "\r\n', csv.text({ "a" }, { { " kept " } }))
  end)

  it("keeps every digit, tells false from nothing", function()
    local x = 0.1 + 0.2
    local text = csv.text({ "x", "n", "b", "none" }, { { x, 3, false, json.null } })
    assert.equal("x,n,b,none\r\n0.30000000000000004,3,false,\r\n", text)
    assert.equal(x, tonumber(text:match "\r\n([^,]+)"))
  end)

  it("has as many cells in every row as there are headings", function()
    assert.equal("a,b,c\r\n,,3\r\n,,\r\n", csv.text({ "a", "b", "c" }, { { nil, nil, 3 }, {} }))
  end)
end)
