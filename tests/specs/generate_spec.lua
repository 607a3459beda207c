--- Generation: sampling that can be repeated, what ends a row, and rows that do not know of each other.

local support = require "tests.specs.support"

local MODEL <const> = support.MODELS .. "llama3_bf16"
local VOCAB <const> = 96

local model, small

setup(function()
  model = assert(support.device():load(MODEL))
  small = assert(support.device():load(MODEL, { max_context = 24 }))
end)
teardown(function()
  model:close()
  small:close()
end)

local function prompt(n, seed)
  return support.ids(n, VOCAB, seed)
end

--- model:generate without the model's own stop ids.
local function generate(prompts, options)
  options.ignore_eos = true
  return assert(model:generate(prompts, options))
end

--- One token more by a forward pass over everything so far: what incremental decoding has to equal.
local function greedy(ids, count)
  local all, new = table.move(ids, 1, #ids, 1, {}), {}
  for i = 1, count do
    local logits <close> = assert(model:forward(all, { rows = "last" }))
    new[i] = logits:argmax()[1]
    all[#all + 1] = new[i]
  end
  return new
end

describe("generate", function()
  it("greedily gives what whole forward passes give", function()
    for seed = 1, 4 do
      local ids = prompt(3 * seed, seed)
      local new = generate(ids, { max_new_tokens = 12 })
      assert.same(greedy(ids, 12), new)
      assert.same(new, generate(ids, { max_new_tokens = 12, temperature = 0, seed = 99 }))
      assert.same(new, generate(ids, { max_new_tokens = 12, temperature = 3, top_k = 1 }))
      assert.same(new, generate(ids, { max_new_tokens = 12, temperature = 3, top_p = 1e-9 }))
    end
  end)

  it("repeats itself with the same seed only", function()
    local ids, options = prompt(5, 1), { max_new_tokens = 32, temperature = 1, seed = 7 }
    local a, b = generate(ids, options), generate(ids, options)
    assert.same(a, b)
    options.seed = 8
    assert.not_same(a, generate(ids, options))
    options.seed, options.streams = 7, { 3 }
    assert.not_same(a, generate(ids, options))
    options.streams = { 0 } -- the number of the first row, counted from 0
    assert.same(a, generate(ids, options))
    options.seed = -1
    assert.equal(32, #generate(ids, options))
  end)

  it("top_k and top_p keep to the likeliest tokens", function()
    local ids = prompt(6, 2)
    local logits <close> = assert(model:forward(ids, { rows = "last" }))
    local _, best = logits:topk(5)
    local allowed = {}
    for _, id in ipairs(best:totable()[1]) do allowed[id] = true end
    local probabilities, order = logits:select(1, 1):softmax { temperature = 1.5 }:totable(), {}
    for id = 0, VOCAB - 1 do order[id + 1] = id end
    table.sort(order, function(a, b) return probabilities[a + 1] > probabilities[b + 1] end)
    local nucleus, mass = {}, 0
    for _, id in ipairs(order) do
      nucleus[id] = true
      mass = mass + probabilities[id + 1]
      if mass >= 0.4 then break end
    end
    local seen = {}
    for seed = 1, 60 do
      local k = generate(ids, { max_new_tokens = 1, temperature = 5, top_k = 5, seed = seed })[1]
      assert.is_true(allowed[k], "outside the top 5")
      local p = generate(ids, { max_new_tokens = 1, temperature = 1.5, top_p = 0.4, seed = seed })[1]
      assert.is_true(nucleus[p], "outside the nucleus")
      seen[k] = true
    end
    local n = 0
    for _ in pairs(seen) do n = n + 1 end
    assert.equal(5, n)
  end)

  it("draws as often as the probabilities say", function()
    local ids = prompt(4, 3)
    local logits <close> = assert(model:forward(ids, { rows = "last" }))
    local p, counts, draws = logits:select(1, 1):softmax():totable(), {}, 2000
    local prompts, streams = {}, {}
    for i = 1, 100 do prompts[i], streams[i] = ids, i end
    for round = 1, draws // 100 do
      for _, row in ipairs(generate(prompts, { max_new_tokens = 1, temperature = 1, seed = round,
        streams = streams })) do
        counts[row[1]] = (counts[row[1]] or 0) + 1
      end
    end
    -- chi square over tokens with an expectation of 5 or more
    local chi, cells, rest, expected = 0, 0, draws, draws
    for id = 0, VOCAB - 1 do
      local e = p[id + 1] * draws
      if e >= 5 then
        chi = chi + ((counts[id] or 0) - e) ^ 2 / e
        cells, rest, expected = cells + 1, rest - (counts[id] or 0), expected - e
      end
    end
    if expected >= 5 then chi, cells = chi + (rest - expected) ^ 2 / expected, cells + 1 end
    assert.is_true(cells > 10)
    local most = (cells - 1) + 5 * (2 * (cells - 1)) ^ 0.5
    assert.is_true(chi < most, ("chi square %g of %d"):format(chi, cells))
  end)
end)

describe("a batch", function()
  local prompts, streams = {}, {}
  for i = 1, 9 do prompts[i], streams[i] = prompt(i * i % 13 + 1, i), 100 + i end

  it("gives each row what it gives alone, greedily", function()
    local rows, stats = generate(prompts, { max_new_tokens = 10 })
    for i, ids in ipairs(prompts) do
      assert.same(generate(ids, { max_new_tokens = 10 }), rows[i])
      assert.equal("length", stats.stop[i])
    end
  end)

  it("and sampled, when its stream is named", function()
    local options = { max_new_tokens = 10, temperature = 1.2, top_p = 0.95, top_k = 50, seed = 5,
      streams = streams }
    local rows = generate(prompts, options)
    for i, ids in ipairs(prompts) do
      options.streams = { streams[i] }
      assert.same(generate(ids, options), rows[i])
    end
    -- in another order and another company
    local backwards, numbers = {}, {}
    for i = #prompts, 1, -2 do
      backwards[#backwards + 1], numbers[#numbers + 1] = prompts[i], streams[i]
    end
    options.streams = numbers
    for i, row in ipairs(generate(backwards, options)) do
      assert.same(rows[#prompts - 2 * (i - 1)], row)
    end
  end)

  it("goes on when rows leave it", function()
    -- every row has a stop token of its own place: the i-th token of its greedy text, told by on_token
    local alone, ends = {}, {}
    for i, ids in ipairs(prompts) do
      alone[i] = generate(ids, { max_new_tokens = 12 })
      ends[i] = i * 5 % 12 + 1
    end
    local counts = {}
    local rows, stats = generate(prompts, {
      max_new_tokens = 12,
      on_token = function(row, id)
        counts[row] = (counts[row] or 0) + 1
        assert(alone[row][counts[row]] == id)
        return counts[row] == ends[row]
      end,
    })
    for i, row in ipairs(rows) do
      assert.same(table.move(alone[i], 1, ends[i], 1, {}), row)
      assert.equal("caller", stats.stop[i])
      assert.equal(ends[i], counts[i])
    end
    local steps, fed = 0, 0
    for _, n in ipairs(ends) do steps, fed = math.max(steps, n - 1), fed + n - 1 end
    assert.equal(steps, stats.decode_steps)
    assert.equal(fed, stats.decode_tokens)
  end)

  it("says what it did", function()
    local total = 0
    for _, ids in ipairs(prompts) do total = total + #ids end
    local _, stats = generate(prompts, { max_new_tokens = 4 })
    assert.equal(total, stats.prompt_tokens)
    assert.equal(3, stats.decode_steps)
    assert.equal(3 * #prompts, stats.decode_tokens)
    assert.is_true(stats.prefill_seconds > 0 and stats.decode_seconds > 0)
    local one, single = generate({ prompts[1] }, { max_new_tokens = 1 })
    assert.equal(1, #one[1])
    assert.equal(0, single.decode_steps)
    assert.same({ "length" }, single.stop)
  end)
end)

describe("a row ends", function()
  it("before a stop id, which is not part of the result", function()
    local ids = prompt(7, 5)
    local all = generate(ids, { max_new_tokens = 16 })
    for _, place in ipairs { 1, 2, 9 } do
      local first = place
      for i = place - 1, 1, -1 do
        if all[i] == all[place] then first = i end
      end
      local new, stats = generate(ids, { max_new_tokens = 16, stop = { 1000, all[place] } })
      assert.same(table.move(all, 1, first - 1, 1, {}), new)
      assert.equal("token", stats.stop)
      assert.same(new, generate(ids, { max_new_tokens = 16, stop = all[place] }))
    end
  end)

  it("at the model's end-of-sequence id unless told not to", function()
    local eos = model:info().eos
    assert.is_true(#eos > 0)
    local found
    for seed = 1, 80 do
      local options = { max_new_tokens = 60, temperature = 2, seed = seed, ignore_eos = true }
      local long = assert(model:generate({ 1, 5, 9 }, options))
      for i, id in ipairs(long) do
        if id == eos[1] then
          options.ignore_eos = nil
          local cut, stats = model:generate({ 1, 5, 9 }, options)
          assert.equal("token", stats.stop)
          assert.same(table.move(long, 1, i - 1, 1, {}), cut)
          found = true
          break
        end
      end
      if found then break end
    end
    assert.is_true(found)
  end)

  it("where the context is full, with one token that needs no room", function()
    for _, n in ipairs { 1, 10, 23, 24 } do
      local ids = prompt(n, 4)
      local new, stats = assert(small:generate(ids, { max_new_tokens = 100, ignore_eos = true }))
      assert.equal("context", stats.stop)
      assert.equal(24 - n + 1, #new)
      assert.same(generate(ids, { max_new_tokens = 24 - n + 1 }), new)
    end
    local rows, stats = assert(small:generate({ prompt(20, 1), prompt(3, 2) }, { max_new_tokens = 8,
      ignore_eos = true }))
    assert.same({ "context", "length" }, stats.stop)
    assert.equal(5, #rows[1])
    assert.equal(8, #rows[2])
  end)

  it("when on_token says so, and gives an error to the caller", function()
    local ids, seen = prompt(4, 6), {}
    local new, stats = generate(ids, {
      max_new_tokens = 10,
      on_token = function(row, id)
        assert(row == 1)
        seen[#seen + 1] = id
        return #seen == 3
      end,
    })
    assert.same(seen, new)
    assert.equal(3, #new)
    assert.equal("caller", stats.stop)
    local calls = 0
    support.raises(function()
      generate({ ids, ids, ids }, {
        on_token = function(row)
          calls = calls + 1
          if row == 2 then error "no more" end
        end,
      })
    end, "no more")
    assert.equal(2, calls)
    assert.equal(5, #generate(ids, { max_new_tokens = 5 }))
  end)

  it("when a coroutine's on_token tries to yield it is told that it cannot", function()
    local routine = coroutine.wrap(function()
      return pcall(model.generate, model, { 1 }, { on_token = coroutine.yield, ignore_eos = true })
    end)
    local ok, why = routine()
    assert.is_false(ok)
    assert.matches("yield", why)
  end)

  it("at a stop text, wherever the tokens cut it", function()
    if not support.exists(support.STORIES) then return pending("no " .. support.STORIES) end
    local stories <close> = assert(support.device():load(support.STORIES))
    local ids = assert(stories:encode "Once upon a time")
    local long = assert(stories:generate(ids, { max_new_tokens = 60 }))
    local text = stories:decode(long)
    local stop = text:sub(20, 29) -- letters, not tokens
    local new, stats = assert(stories:generate(ids, { max_new_tokens = 60, stop = { "never there", stop } }))
    assert.equal("caller", stats.stop)
    assert.is_true(#new < #long)
    assert.same(table.move(long, 1, #new, 1, {}), new)
    local cut = stories:decode(new)
    assert.is_truthy(cut:find(stop, 1, true))
    assert.is_nil(stories:decode(table.move(new, 1, #new - 1, 1, {})):find(stop, 1, true))
    -- in a batch every row looks at its own text
    local rows, all = assert(stories:generate({ ids, { 1 }, ids }, { max_new_tokens = 60, stop = { stop } }))
    assert.same(new, rows[1])
    assert.same(new, rows[3])
    assert.same({ "caller", "caller" }, { all.stop[1], all.stop[3] })
  end)
end)
