local grid = require "qlua.table"

describe("table", function()
  it("aligns columns, numbers to the right, by terminal columns", function()
    local t = grid.new { "model", { "acc", format = "%.3f" }, { "memory", unit = "GiB" } }
    t:add("full ±", 0.5696, 14):add("漢字 q", 0.4, 5.25):rule():add("x", nil, nil)
    assert.equal(table.concat({
      "model     acc  memory (GiB)",
      "------  -----  ------------",
      "full ±  0.570            14",
      "漢字 q  0.400          5.25",
      "------  -----  ------------",
      "x           -             -",
      "",
    }, "\n"), t:text())
  end)

  it("writes Markdown", function()
    local t = grid.new { "a", { "n", align = "right" } }
    t:add("x|y", 1):add("z", "many")
    assert.equal("| a    |    n |\n| ---- | ---: |\n| x\\|y |    1 |\n| z    | many |\n", t:markdown())
  end)

  it("keeps control characters out of the terminal", function()
    local text = grid.new({ "a" }):add("x\27[31m\ny"):text()
    assert.equal("a\n--------\nx [31m y\n", text)
  end)

  it("makes headings bold only when asked", function()
    assert.equal("\27[1ma\27[0m\n-\n", grid.new({ "a" }):text { bold = true })
    assert.is_false(grid.bold_allowed(false))
  end)

  it("shows an empty table and NaN", function()
    assert.equal("a  b\n-  -\n", grid.new({ "a", "b" }):text())
    assert.equal("a\n-\n-\n", grid.new({ "a" }):add(0 / 0):text())
    assert.has_error(function() grid.new({ "a" }):add(1, 2) end)
  end)

  it("writes bytes and intervals", function()
    assert.equal("512 B", grid.bytes(512))
    assert.equal("1.5 KiB", grid.bytes(1536))
    assert.equal("14.9 GiB", grid.bytes(16000000000))
    assert.equal("0.570 [0.459, 0.674]", grid.interval(0.5696, 0.4594, 0.6739))
  end)
end)
