local progress = require "qlua.progress"

local function fake(terminal)
  local world = { now = 100, text = "" }
  world.sys = { time = function() return world.now end, isatty = function() return terminal end }
  world.out = { write = function(_, ...) world.text = world.text .. table.concat({ ... }) end }
  return world
end

describe("progress", function()
  it("redraws one line on a terminal, with the time to go", function()
    local world = fake(true)
    local bar = progress.new { total = 10, label = "full", sys = world.sys, out = world.out }
    for _ = 1, 4 do
      world.now = world.now + 2
      bar:step()
    end
    assert.truthy(world.text:find("\rfull: 4/10 (40 %), 8 s, 12 s to go", 1, true), world.text)
    assert.is_nil(world.text:find("\n"))
    bar:say "hello"
    assert.truthy(world.text:find("\r +\rhello\n$"))
    bar:close()
    bar:close()
    assert.equal(2, select(2, world.text:gsub("\n", "")))
  end)

  it("does not redraw more than ten times a second", function()
    local world = fake(true)
    local bar = progress.new { total = 1000, sys = world.sys, out = world.out }
    for _ = 1, 1000 do
      world.now = world.now + 0.001
      bar:step()
    end
    assert.is_true(select(2, world.text:gsub("\r", "")) <= 10)
  end)

  it("erases the rest of a longer line", function()
    local world = fake(true)
    local bar = progress.new { total = 2, sys = world.sys, out = world.out }
    world.now = 101
    bar:step(1, "a long note")
    world.now = 102
    bar:step(1, "x")
    assert.truthy(world.text:find("x +$"))
  end)

  it("writes a plain line every 30 s elsewhere, and one at the end", function()
    local world = fake(false)
    do
      local bar <close> = progress.new { total = 100, label = "nf4", sys = world.sys, out = world.out }
      for _ = 1, 100 do
        world.now = world.now + 1
        bar:step()
      end
    end
    assert.equal("nf4: 30/100 (30 %), 30 s, 1 min 10 s to go\nnf4: 60/100 (60 %), 1 min 00 s, 40 s to go\n"
      .. "nf4: 90/100 (90 %), 1 min 30 s, 10 s to go\nnf4: 100/100 (100 %), 1 min 40 s\n", world.text)
  end)

  it("is silent when asked to, and knows empty runs", function()
    local world = fake(true)
    local bar = progress.new { total = 0, sys = world.sys, out = world.out, quiet = true }
    bar:step()
    bar:close()
    assert.equal("", world.text)
    progress.new({ total = 0, sys = world.sys, out = world.out }):close()
    assert.truthy(world.text:find("0/0 (100 %)", 1, true))
  end)

  it("says durations", function()
    assert.equal("0 s", progress.duration(0.2))
    assert.equal("2 min 05 s", progress.duration(125))
    assert.equal("3 h 07 min", progress.duration(3 * 3600 + 7 * 60 + 2))
  end)
end)
