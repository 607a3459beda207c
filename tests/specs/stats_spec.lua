local stats = require "qlua.stats"
local resample = require("qlua.core").resample

local function near(expected, actual, tolerance)
  tolerance = tolerance or 1e-12
  assert.is_true(math.abs(expected - actual) <= tolerance * math.max(1e-300, math.abs(expected)),
    ("expected %.17g, got %.17g"):format(expected, actual))
end

local function against_control(values, control)
  return stats.against_controls({ { values = values, control = control } }, { seed = 4 })[1]
end

local function read(path)
  local file = io.open(path, "rb")
  if not file then return nil end
  local text = file:read("a")
  file:close()
  return text
end

describe("moments", function()
  it("sums without losing small terms", function()
    assert.equal(2.0, stats.sum { 1, 1e100, 1, -1e100 })
  end)

  it("mean, sd and standard error", function()
    local values = { 2, 4, 4, 4, 5, 5, 7, 9 }
    near(5, stats.mean(values))
    near(2.1380899352993952, stats.sd(values))
    near(2.1380899352993952 / math.sqrt(8), stats.stderr(values))
    assert.is_nil(stats.sd { 1 })
    assert.is_nil(stats.stderr { 1 })
  end)

  it("the stderr of a share is the harness's", function()
    local values = {}
    for i = 1, 79 do values[i] = i <= 38 and 1 or 0 end
    near(math.sqrt(38 / 79 * 41 / 79 / 78), stats.stderr(values))
  end)

  it("percentiles are linear at f*(n-1)", function()
    local values = { 40, 10, 30, 20 }
    assert.same({ 10, 25, 40 }, {
      stats.percentile(values, 0), stats.percentile(values, 0.5), stats.percentile(values, 1),
    })
    near(17.5, stats.percentile(values, 0.25))
    assert.equal(25, stats.median(values))
    assert.same({ 40, 10, 30, 20 }, values)
    assert.equal(7, stats.percentile({ 7 }, 0.999))
    assert.same({ { share = 1, value = 40 }, { share = 0.25, value = 17.5 } },
      stats.percentiles(values, { 1, 0.25 }))
  end)

  it("refuses what has no answer", function()
    for _, call in ipairs {
      function() stats.mean {} end, function() stats.mean { 1, 0 / 0 } end,
      function() stats.percentile({ 1 }, 1.1) end, function() stats.covariance({ 1, 2 }, { 1 }) end,
      function() stats.wilson(3, 2) end, function() stats.tango(2, 1, 2) end,
      function() stats.tango(-1, 1, 2) end, function() stats.tango(0, 0, 0) end,
      function() stats.wilson(0, 0) end, function() stats.wilson(1, 2, 1) end,
      function() stats.mcnemar(-1, 2) end,
      function() stats.bootstrap {} end, function() stats.flips({ 1 }, { 1, 2 }, { 1 }) end,
      function() stats.random(1.5) end, function() stats.normal_quantile(0) end,
      function() stats.mcnemar(1.5, 2) end, function() stats.holm { 0.5, 1.5 } end,
      function() stats.holm { 0 / 0 } end, function() stats.newcombe(3, 2, 1, 2) end,
      function() stats.bootstrap({ 1 }, { resample = 5 }) end,
      function() stats.bootstrap({ 1 }, { resamples = 0 }) end,
      function() stats.bootstrap({ 1 }, { seed = 0.5 }) end, function() stats.bootstrap { math.huge } end,
      function() stats.bootstrap_difference({ 1, 2 }, { 1 }) end,
      function() stats.bootstrap_ratio { { 1 }, { 1 }, { 1 } } end,
      function() stats.bootstrap_ratio { { 1 }, { 1, 2 } } end,
      function() stats.bootstrap_ratio({ { 1 }, { 1 } }, { of = "mode" }) end,
      function() stats.sign_flip {} end, function() stats.sign_flip { 1, "2" } end,
      function() against_control({ 1, 2 }, { 1 }) end, function() against_control({}, {}) end,
    } do
      assert.has_error(call)
    end
  end)
end)

describe("intervals and tests", function()
  it("normal distribution", function()
    for x, p in pairs {
      [-10] = 7.61985302416047e-24, [-5] = 2.866515718791933e-07, [-2.6] = 0.004661188023718747,
      [-1] = 0.15865525393145707, [2] = 0.9772498680518208, [0] = 0.5,
    } do
      near(p, stats.normal_cdf(x), 1e-13)
    end
    near(1.959963984540054, stats.normal_quantile(0.975), 1e-13)
    near(-6.361340902404056, stats.normal_quantile(1e-10), 1e-13)
    near(0.8416212335729143, stats.normal_quantile(0.8), 1e-13)
  end)

  it("Wilson", function()
    local low, high = stats.wilson(38, 79)
    near(0.37429730453787924, low)
    near(0.5894889440059407, high)
    assert.equal(0.0, (stats.wilson(0, 10)))
    assert.equal(1.0, select(2, stats.wilson(10, 10)))
  end)

  it("exact McNemar", function()
    for _, case in ipairs {
      { 3, 10, 0.09228515625 }, { 10, 3, 0.09228515625 }, { 0, 1, 1.0 }, { 0, 0, 1.0 }, { 5, 5, 1.0 },
      { 0, 40, 1.8189894035458565e-12 }, { 100, 150, 0.0018833009350761602 },
      { 1000, 1200, 2.1817026407914194e-05 }, { 7000, 7300, 0.012403909154548443 },
    } do
      near(case[3], stats.mcnemar(case[1], case[2]))
    end
    assert.equal(0.0, stats.mcnemar(0, 5000))
  end)

  it("Holm keeps the order and stays monotone", function()
    local adjusted = stats.holm { 0.01, 0.04, 0.03, 0.005 }
    for i, p in ipairs { 0.03, 0.06, 0.06, 0.02 } do near(p, adjusted[i]) end
    assert.same({ 1.0, 1.0 }, stats.holm { 0.7, 0.9 })
    assert.same({}, stats.holm {})
  end)
end)

describe("bootstrap", function()
  local values = {}
  for i = 1, 101 do values[i] = math.sin(i) ^ 2 end

  it("gives xoshiro256**'s bits from splitmix64's seed", function()
    local random = stats.random(42)
    assert.equal(0x15780b2e0c2ec716, random())
    assert.equal(0x6104d9866d113a7e, random())
    assert.equal(math.tointeger(0xae17533239e499a1), random())
  end)

  it("is the same for the same seed, near the normal interval", function()
    local low, high = stats.bootstrap(values, { seed = 7 })
    local low2, high2 = stats.bootstrap(values, { seed = 7 })
    assert.same({ low, high }, { low2, high2 })
    assert.not_equal(low, (stats.bootstrap(values, { seed = 8 })))
    local mean, stderr = stats.mean(values), stats.stderr(values)
    near(mean - 1.96 * stderr, low, 0.02)
    near(mean + 1.96 * stderr, high, 0.02)
  end)

  it("pairs what belongs together", function()
    local shifted = {}
    for i, value in ipairs(values) do shifted[i] = value + 0.25 + i % 2 * 1e-6 end
    local low, high = stats.bootstrap_difference(values, shifted, { resamples = 200 })
    near(0.25, low, 1e-5)
    near(0.25, high, 1e-5)
  end)

  it("draws every value equally often", function()
    for n = 6, 7 do
      for i = 1, n do
        local one = {}
        for j = 1, n do one[j] = j == i and n or 0 end
        near(1, stats.mean(resample.bootstrap("mean", { one }, 10000, i)), 0.05)
      end
    end
  end)

  it("draws two indices from each word of the module's generator, whole questions at a time", function()
    local list, other, n = { 1, 10, 100, 1000, 1e4 }, { 2, 20, 200, 2000, 2e4 }, 5
    local random, expected = stats.random(9), {}
    for r = 1, 50 do
      local sum = 0
      for i = 1, n, 2 do
        local bits = random()
        sum = sum + list[((bits >> 32) * n >> 32) + 1]
        if i < n then sum = sum + list[((bits & 0xFFFFFFFF) * n >> 32) + 1] end
      end
      expected[r] = sum / n
    end
    assert.same(expected, resample.bootstrap("mean", { list }, 50, 9))
    for _, ratio in ipairs(resample.bootstrap("mean", { list, other }, 50, 9)) do assert.equal(0.5, ratio) end
    for _, ratio in ipairs(resample.bootstrap("median", { other, list, list, other }, 50, 9)) do
      assert.equal(4.0, ratio)
    end
  end)

  it("has no interval where all resamples say the same, which is no certainty", function()
    assert.is_nil(stats.bootstrap { 3.5 })
    assert.is_nil(stats.bootstrap({ 2, 2, 2 }, { resamples = 100 }))
    assert.is_nil(stats.bootstrap_difference({ 0.1, 0.2, 0.3 }, { 0.2, 0.3, 0.4 })) -- but for rounding
    assert.same({ 2.0 }, { stats.bootstrap_ratio { { 3, 5 }, { 1.5, 2.5 } } })
  end)

  it("of a ratio is absent where the divisor can be 0", function()
    assert.is_nil((stats.bootstrap_ratio { { 1, 2 }, { 0, 0 } }))
    assert.same({ 3.0 }, { stats.bootstrap_ratio { { 1, 2 }, { 0, 1 } } })
  end)

  it("shuffles without repeats", function()
    local order = stats.shuffled(50, 3)
    local sorted = table.move(order, 1, 50, 1, {})
    table.sort(sorted)
    for i = 1, 50 do assert.equal(i, sorted[i]) end
    assert.same(order, stats.shuffled(50, 3))
    assert.same(table.move(order, 1, 5, 1, {}), stats.shuffled(50, 3, 5))
  end)
end)

describe("paired answers", function()
  it("fills the 2 x 2 table and counts unreadable answers as wrong", function()
    local reference, test = { 1, 1, 2, 3, false, false }, { 1, 2, 1, 4, false, 1 }
    local t = stats.flips(reference, test, { 1, 1, 1, 1, 1, 1 })
    assert.same({ 1, 1, 2, 1, 1 },
      { t.both_right, t.right_wrong, t.wrong_right, t.same_wrong, t.other_wrong })
    assert.same({ 2, 3 }, { t.right_a, t.right_b })
    near(3 / 6, t.flips)
    near(4 / 6, t.all_flips)
  end)

  it("says that 45 v 38 of 79 is not established", function()
    local result = stats.compare { n = 79, right_wrong = 10, wrong_right = 3 }
    assert.is_false(result.established)
    assert.equal(174, result.needed)
    assert.equal("difference of -8.9 points not established at n = 79 (exact McNemar p = 0.092); about 180 "
      .. "questions would show a difference of this size at 80 % power", result.sentence)
  end)

  it("says so when it is, and when there is none", function()
    local result = stats.compare { n = 1000, right_wrong = 80, wrong_right = 30 }
    assert.is_true(result.established)
    assert.equal("difference of -5.0 points established at n = 1000 (exact McNemar p < 0.001)",
      result.sentence)
    assert.equal("no difference at n = 9: each model alone is right on 1 question",
      stats.compare({ n = 9, right_wrong = 1, wrong_right = 1 }).sentence)
    assert.equal("difference of -5.0 points not established at n = 1000 (adjusted p = 0.070)",
      stats.compare({ n = 1000, right_wrong = 80, wrong_right = 30 }, 0.07).sentence)
  end)

  it("are never foretold to be established by fewer than the test can ever call so", function()
    assert.equal(6, stats.questions_needed(0, 1))
    assert.is_true(stats.mcnemar(0, 6) < 0.05 and stats.mcnemar(0, 5) > 0.05)
    assert.equal(6, stats.questions_needed_mean(-1, 0))
    assert.is_true(stats.sign_flip { 1, 1, 1, 1, 1, 1 } < 0.05 and stats.sign_flip { 1, 1, 1, 1, 1 } > 0.05)
    assert.is_nil(stats.questions_needed(0.1, 0.1))
    assert.is_nil(stats.questions_needed_mean(0, 1))
  end)

  it("recovery", function()
    near(0.8444444444444444, stats.recovery(0.45, 0.38))
    assert.is_nil(stats.recovery(0, 0))
  end)
end)

describe("a metric against its noise floor", function()
  it("is no difference where both are the same", function()
    local test = against_control({ 1, 0.5, 0.25 }, { 1, 0.5, 0.25 })
    assert.same({ 3, 0.0, 1.0, 1.0, false }, { test.n, test.difference, test.p, test.adjusted_p,
      test.established })
    assert.is_nil(test.low)
    assert.is_nil(test.questions_needed)
    assert.equal("no difference from the noise floor at n = 3", test.sentence)
  end)

  it("is not established by one question", function()
    local test = against_control({ 0.25 }, { 1 })
    assert.same({ -0.75, 1.0, false, 6 }, { test.difference, test.p, test.established,
      test.questions_needed })
    assert.equal("difference of -0.75 from the noise floor not established at n = 1 (sign-flip p = 1.000); "
      .. "about 6 questions would show a difference of this size at 80 % power", test.sentence)
  end)

  it("is the same for the same seed, and Holm's p decides in a table", function()
    local values, control = {}, {}
    for i = 1, 40 do values[i], control[i] = 0.9 + math.sin(i) / 3, 1 end
    local one = against_control(values, control)
    assert.same(one, against_control(values, control))
    assert.is_true(one.p < 0.05 and one.established)
    local list = {}
    for i = 1, 5 do list[i] = { name = "m" .. i, values = values, control = control } end
    local tests = stats.against_controls(list, { seed = 4 })
    near(5 * one.p, tests[5].adjusted_p)
    assert.same({ "m5", 5 * one.p < 0.05 }, { tests[5].name, tests[5].established })
    assert.truthy(tests[5].sentence:find("adjusted p", 1, true))
    assert.same({}, stats.against_controls {})
  end)
end)

describe("SciPy's and statsmodels' values", function()
  local text = read "tests/golden/stats.json"
  local golden = text and assert(require("qlua.json").decode(text))

  --- One test over all cases of a kind.
  local function agree(kind, check)
    it("agree: " .. kind, function()
      assert(golden, "tests/golden/stats.json cannot be read")
      assert.is_true(#golden[kind] > 0)
      for _, case in ipairs(golden[kind]) do check(case) end
    end)
  end

  agree("wilson", function(case)
    local low, high = stats.wilson(case.k, case.n, case.confidence)
    near(case.low, low, 1e-11)
    near(case.high, high, 1e-11)
  end)

  agree("mcnemar", function(case) near(case.p, stats.mcnemar(case.b, case.c), 1e-11) end)

  agree("holm", function(case)
    for i, p in ipairs(stats.holm(case.p)) do near(case.adjusted[i], p) end
  end)

  agree("summary", function(case)
    local summary = stats.summary(case.values)
    near(case.mean, summary.mean, 1e-11)
    near(case.rms, summary.rms, 1e-11)
    if summary.stderr then
      near(case.stderr, summary.stderr, 1e-11)
      near(case.sd, stats.sd(case.values), 1e-11)
    else
      assert.equal(1, case.n)
    end
    for _, pair in ipairs(case.percentiles) do
      near(pair[2], stats.percentile(case.values, pair[1]), 1e-11)
    end
  end)

  agree("covariance", function(case)
    near(case.covariance, stats.covariance(case.a, case.b), 1e-11)
    local differences = {}
    for i = 1, #case.a do differences[i] = case.b[i] - case.a[i] end
    near(case.paired_error, stats.stderr(differences), 1e-11)
  end)

  agree("bootstrap_difference", function(case)
    local low, high = stats.bootstrap_difference(case.a, case.b, { confidence = case.confidence })
    assert.is_true(math.abs(low - case.low) <= case.tolerance, case.name)
    assert.is_true(math.abs(high - case.high) <= case.tolerance, case.name)
  end)

  agree("questions_needed", function(case)
    assert.equal(case.n,
      stats.questions_needed(case.right_wrong, case.wrong_right, case.power, case.level))
    assert.is_true(math.abs(case.reached - case.power) < 0.09) -- what the exact test makes of them
  end)

  agree("newcombe", function(case)
    local low, high = stats.newcombe(case.a[1], case.a[2], case.b[1], case.b[2], case.confidence)
    assert.is_true(math.abs(case.low - low) < 1e-11 and math.abs(case.high - high) < 1e-11)
  end)

  agree("tango", function(case)
    local low, high = stats.tango(case.right_wrong, case.wrong_right, case.n, case.confidence)
    assert.is_true(math.abs(case.low - low) < 1e-9 and math.abs(case.high - high) < 1e-9)
    local again_low, again_high = stats.tango(case.wrong_right, case.right_wrong, case.n, case.confidence)
    assert.is_true(math.abs(low + again_high) < 1e-12 and math.abs(high + again_low) < 1e-12)
  end)

  agree("ratio", function(case)
    local ratio, low, high = stats.bootstrap_ratio(case.lists, { of = case.of })
    near(case.ratio, ratio, 1e-12)
    assert.is_true(math.abs(low - case.low) <= case.tolerance)
    assert.is_true(math.abs(high - case.high) <= case.tolerance)
  end)

  agree("sign_flip", function(case)
    local p, exact = stats.sign_flip(case.values)
    assert.equal(case.exact, exact)
    assert.is_true(math.abs(case.p - p) <= case.tolerance, ("p %.6f, is %.6f"):format(p, case.p))
  end)

  it("agree: against_controls", function()
    assert(golden, "tests/golden/stats.json cannot be read")
    local tests = stats.against_controls(golden.against_controls)
    for i, case in ipairs(golden.against_controls) do
      near(case.difference, tests[i].difference)
      near(case.p, tests[i].p)
      near(case.adjusted, tests[i].adjusted_p)
      assert.equal(case.adjusted < 0.05, tests[i].established)
      assert.is_true(math.abs(math.max(case.needed, 6) - tests[i].questions_needed) <= 1.5)
    end
  end)

  agree("questions_needed_mean", function(case)
    local n = stats.questions_needed_mean(case.difference, case.sd, case.power, case.level)
    assert.is_true(math.abs(case.n - n) <= 1.5, ("%d, is %.2f"):format(n, case.n))
  end)

  it("agree: normal", function()
    assert(golden, "tests/golden/stats.json cannot be read")
    for _, pair in ipairs(golden.normal.cdf) do near(pair[2], stats.normal_cdf(pair[1]), 1e-12) end
    for _, pair in ipairs(golden.normal.quantile) do
      assert.is_true(math.abs(pair[2] - stats.normal_quantile(pair[1])) < 1e-12)
    end
  end)
end)
