--- Paired comparisons of several tasks: what Holm's correction decides, and the interval of the difference.

local results = require "qlua.results"

--- A task of `n` questions: both models right on all but `lost`, which only the reference answers rightly.
local function outcome(n, lost)
  local evaluations = { { results = {} }, { results = {} } }
  for i = 1, n do
    local prepared = { item = { answer = 1 } }
    evaluations[1].results[i] = { prepared = prepared, answer = 1 }
    evaluations[2].results[i] = { prepared = prepared, answer = i > lost and 1 or nil }
  end
  return { evaluations = evaluations }
end

describe("results.compare", function()
  it("of one task is McNemar's test", function()
    local one = outcome(100, 6)
    results.compare({ one }, 1)
    assert.equal(2 / 2 ^ 6, one.mcnemar)
    assert.equal(one.mcnemar, one.comparison.p)
    assert.is_true(one.comparison.established)
    assert.truthy(one.comparison.sentence:find("exact McNemar p = 0.031", 1, true))
  end)

  it("of several is decided by Holm's adjusted p", function()
    local one, other = outcome(100, 6), outcome(100, 5)
    results.compare({ one, outcome(0, 0), other }, 1)
    assert.equal(2 / 2 ^ 6, one.mcnemar)
    assert.equal(2 * one.mcnemar, one.comparison.p)
    assert.is_false(one.comparison.established)
    assert.truthy(one.comparison.sentence:find("not established at n=100 (adjusted p = 0.062", 1, true))
    assert.is_true(other.comparison.p >= other.mcnemar)
  end)

  it("has a seeded interval of the difference, and nothing where nothing was scored", function()
    local one, again, none = outcome(100, 6), outcome(100, 6), outcome(0, 0)
    results.compare({ one, none }, 3)
    results.compare({ again }, 3)
    assert.same(one.interval, again.interval)
    assert.is_true(one.interval[1] < -0.06 and one.interval[2] > -0.06 and one.interval[2] <= 0)
    assert.is_nil(none.comparison)
    assert.is_nil(none.flips)
  end)
end)
