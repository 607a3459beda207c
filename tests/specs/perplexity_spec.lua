-- Perplexity and its company against sums written out over plain logits.

local perplexity = require "qlua.perplexity"
local support = require "tests.specs.support"

local function log_softmax(logits)
  local most, sum = -math.huge, 0
  for _, x in ipairs(logits) do most = math.max(most, x) end
  for _, x in ipairs(logits) do sum = sum + math.exp(x - most) end
  local list = {}
  for i, x in ipairs(logits) do list[i] = x - most - math.log(sum) end
  return list
end

local function argmax(list)
  local best = 1
  for i = 2, #list do if list[i] > list[best] then best = i end end
  return best
end

--- The four figures over `pieces`, lists of all n tokens of a window.
local function by_hand(full, test, pieces, n)
  local sums, count = { a = 0, b = 0, kl = 0, dp = 0, same = 0 }, 0
  for _, piece in ipairs(pieces) do
    local first <close> = full:forward({ piece }, { rows = "all" })
    local second <close> = test:forward({ piece }, { rows = "all" })
    local la, lb = first:totable(), second:totable()
    for position = n // 2, n - 2 do
      local p, q = log_softmax(la[position + 1]), log_softmax(lb[position + 1])
      local target = piece[position + 2] + 1
      sums.a, sums.b = sums.a - p[target], sums.b - q[target]
      sums.dp = sums.dp + math.exp(q[target]) - math.exp(p[target])
      sums.same = sums.same + (argmax(p) == argmax(q) and 1 or 0)
      for i = 1, #p do sums.kl = sums.kl + math.exp(p[i]) * (p[i] - q[i]) end
      count = count + 1
    end
  end
  for key, sum in pairs(sums) do sums[key] = sum / count end
  return sums, count
end

local function near(expected, got, tolerance)
  if math.abs(expected - got) > tolerance * math.max(1, math.abs(expected)) then
    error(("%.12g is not %.12g"):format(got, expected), 2)
  end
end

describe("perplexity", function()
  describe("windows", function()
    local ids = { 10, 11, 12, 13, 14, 15, 16, 17, 18, 19 }

    it("begin with the token of beginning, and score the second half", function()
      local w = assert(perplexity.windows(ids, { context = 5, bos = 1 }))
      -- with the token in front there are 11: 1 10 11 12 13 | 14 15 16 17 18 | 19
      assert.equal(2, #w)
      assert.equal(11, w.tokens)
      assert.same({ ids = { 1, 10, 11, 12 }, targets = { 12, 13 } }, w[1])
      assert.same({ ids = { 1, 15, 16, 17 }, targets = { 17, 18 } }, w[2])
    end)

    it("are the plain text where there is no such token", function()
      local w = assert(perplexity.windows(ids, { context = 4 }))
      assert.equal(2, #w)
      assert.same({ ids = { 10, 11, 12 }, targets = { 13 } }, w[1])
      assert.same({ ids = { 14, 15, 16 }, targets = { 17 } }, w[2])
    end)

    it("stop at a limit and remember how many there were", function()
      local w = assert(perplexity.windows(ids, { context = 4, limit = 1 }))
      assert.equal(1, #w)
      assert.equal(2, w.all)
      assert.truthy(perplexity.protocol(w):find("1 windows of 2 (--limit)", 1, true))
    end)

    it("refuse a text that fills none", function()
      support.failed(nil, select(2, perplexity.windows(ids, { context = 12, bos = 1 })), "11 tokens",
        "window of 12", "--context")
    end)
  end)

  it("of a run that was stopped are those that it finished", function()
    local full <close> = assert(support.device():load(support.MODELS .. "llama2_f32"))
    local ids = support.ids(50, full:info().vocab, 7)
    local windows = assert(perplexity.windows(ids, { context = 16 }))
    local values = assert(perplexity.run(full, full, windows, function(list, _, fn)
      return fn({ list[1] }, 1)
    end))
    assert.equal(1, #windows)
    assert.is_true(windows.stopped)
    assert.equal(#windows[1].targets, #values.kl)
  end)

  for _, bos in ipairs { false, 1 } do
    it("equals plain sums over logits, " .. (bos and "with" or "without") .. " BOS", function()
      local full <close> = assert(support.device():load(support.MODELS .. "llama2_f32"))
      local test <close> = assert(full:quantize { scheme = "nf4" })
      local n, ids = 16, support.ids(50, full:info().vocab, 7)
      local windows = assert(perplexity.windows(ids, { context = n, bos = bos or nil }))
      local values = assert(perplexity.run(full, test, windows))
      local s = perplexity.summary(values)

      local text = table.move(ids, 1, #ids, bos and 2 or 1, { bos or nil })
      local pieces = {}
      for w = 1, #text // n do
        pieces[w] = table.move(text, (w - 1) * n + 1, w * n, 1, {})
        if bos then pieces[w][1] = bos end
      end
      local hand, count = by_hand(full, test, pieces, n)
      assert.equal(#pieces, #windows)
      assert.equal(count, s.n)
      near(math.exp(hand.a), s.reference.value, 1e-9)
      near(math.exp(hand.b), s.test.value, 1e-9)
      near(hand.b - hand.a, s.log_ratio.value, 1e-9)
      near(hand.kl, s.kl.value, 1e-9)
      near(hand.dp, s.delta_p.value, 1e-9)
      near(hand.same, s.same_top.value, 1e-12)
    end)
  end

  it("gives the errors that pairing leaves", function()
    local a, b = { 1, 2, 4, 3 }, { 1.5, 2.25, 4.5, 2.75 }
    local s = perplexity.summary { reference = a, test = b, kl = { 0, 1, 2, 5 },
      delta_p = { 0.3, -0.1, 0.1, -0.3 }, same = { 1, 1, 0, 1 } }
    -- differences 0.5 0.25 0.5 -0.25: mean 0.25, sample variance 0.125
    near(0.25, s.log_ratio.value, 1e-12)
    near(math.sqrt(0.125 / 4), s.log_ratio.stderr, 1e-12)
    near(math.exp(2.5), s.reference.value, 1e-12)
    near(math.exp(2.5) * math.sqrt(5 / 3 / 4), s.reference.stderr, 1e-12)
    near(math.sqrt(0.05), s.delta_p_rms.value, 1e-12)
    local kl = {}
    for i, p in ipairs(s.kl_percentiles) do kl[i] = p.value end
    near(1.5, kl[1], 1e-12)
    near(2 + 0.7 * 3, kl[2], 1e-12)
    assert.equal(5, kl[#kl])
  end)

  it("finds nothing between a model and itself", function()
    local full <close> = assert(support.device():load(support.MODELS .. "llama2_f32"))
    local windows = assert(perplexity.windows(support.ids(40, full:info().vocab, 3), { context = 8 }))
    local s = perplexity.summary(assert(perplexity.run(full, full, windows)))
    assert.equal(0, s.log_ratio.value)
    assert.equal(0, s.log_ratio.stderr)
    assert.equal(0, s.delta_p_rms.value)
    assert.equal(1, s.same_top.value)
    assert.truthy(perplexity.table(s, { "full", "nf4" }):text():find "same most likely token")
  end)

  describe("as a script", function()
    local script = ("%s examples/perplexity.lua"):format(support.QLUA)

    local function run(arguments)
      local pipe = assert(io.popen(("ASAN_OPTIONS=detect_leaks=0 %s %s 2>&1"):format(script, arguments)))
      local output = pipe:read "a"
      return output, pipe:close() == true
    end

    it("writes its results, whole", function()
      if not support.exists(support.STORIES) then return pending("no ../shared/data") end
      local folder = support.folder()
      local text = support.write(folder .. "/text", ("Once upon a time there was a little dog. "):rep(20))
      local output, ok = run(("--model %s --text %s --context 32 --limit 3 --output_path %s/out"):format(
        support.STORIES, text, folder))
      assert(ok, output)
      local path = output:match "wrote (%S+)"
      local r = support.json(path).sections[1]
      assert.equal(3, r.protocol.windows)
      assert.equal(3 * 15, r.summary.n)
      assert.truthy(r.summary.test.value > 1)
      assert.truthy(output:find(("%.4f"):format(r.summary.reference.value), 1, true))
      support.cleanup()
    end)

    it("says what is wrong with its input", function()
      local output, ok = run "--text no/such/file"
      assert.falsy(ok)
      assert.truthy(output:find("no/such/file", 1, true), output)
      output, ok = run ""
      assert.falsy(ok)
      assert.truthy(output:find("--text is required", 1, true), output)
      output, ok = run(("--text tests/golden/README.md --context 4 --limit 1 --model %s"):format(
        "examples/models/demo"))
      assert.falsy(ok)
      assert.truthy(output:find("--context (4)", 1, true) and output:find("--limit (1)", 1, true), output)
    end)
  end)
end)
