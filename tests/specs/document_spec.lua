-- Sections of a run's document: figures against the lists they come from, and what JSON makes of them.

local document = require "qlua.document"
local json = require "qlua.json"
local stats = require "qlua.stats"

local ITEMS <const> = { subject = "s", path = "s_test.csv", sha256 = "ab", all = 120 }

local function run_with(opts)
  return { labels = { "full", "nf4" }, context = 64, opts = opts or { seed = 1 }, items = ITEMS }
end

--- One model's answers; false: none could be read.
local function evaluation(answers, more)
  local e = { results = {}, seconds = 2.0, prefill_seconds = 0.5, decode_seconds = 1.0, prompt_tokens = 100,
    shared_tokens = 7, decode_tokens = 30, words = 12 }
  for i, answer in ipairs(answers) do
    e.results[i] = { prepared = { item = { answer = 1 } }, answer = answer or nil, correct = answer == 1,
      kernels = { "k" .. i % 2 }, stop = more and more[i] }
  end
  return e
end

local function filled(n, value)
  local list = {}
  for i = 1, n do list[i] = value end
  return list
end

--- A task of `n` questions: both models right on all but `lost`, which only the full one answers rightly.
local function outcome(n, lost, kind)
  local second = filled(n, 1)
  for i = 1, lost do second[i] = false end
  local prepared = filled(n, {})
  prepared[n + 1] = { too_long = true }
  return { task = { name = "mmlu_s", subject = "s", kind = kind or "loglikelihood", num_fewshot = 0,
    continuations = { " A" } }, items = setmetatable({}, { __index = ITEMS, __len = function()
      return n + 1
    end }), prepared = prepared, evaluations = { evaluation(filled(n, 1)), evaluation(second) } }
end

local function section_of(...) return document.mmlu(run_with { seed = 3, protocol = "sound" }, { ... }) end

describe("document.mmlu", function()
  it("of one task is McNemar's test", function()
    local c = section_of(outcome(100, 6)).outcomes[1].comparison
    assert.equal(2 / 2 ^ 6, c.mcnemar_p)
    assert.equal(c.mcnemar_p, c.adjusted_p)
    assert.is_true(c.established)
    assert.equal(-0.06, c.difference)
    assert.equal(0.94, c.recovery)
    assert.truthy(c.sentence:find("exact McNemar p = 0.031", 1, true))
  end)

  it("of several is decided by Holm's adjusted p", function()
    local section = section_of(outcome(100, 6), outcome(0, 0), outcome(100, 5))
    local one, none, other = table.unpack(section.outcomes)
    assert.equal(2 / 2 ^ 6, one.comparison.mcnemar_p)
    assert.equal(2 * one.comparison.mcnemar_p, one.comparison.adjusted_p)
    assert.is_false(one.comparison.established)
    assert.truthy(one.comparison.sentence:find("not established at n = 100 (adjusted p = 0.062", 1, true))
    assert.is_true(other.comparison.adjusted_p >= other.comparison.mcnemar_p)
    assert.is_nil(none.comparison)
    assert.equal(0, none.models[1].n)
    assert.is_nil(none.models[1].accuracy)
  end)

  it("has an interval of the difference that does not vanish where no answer changed", function()
    local one = section_of(outcome(100, 6)).outcomes[1].comparison.difference_95
    assert.same({ stats.tango(6, 0, 100) }, { one[1], one[2] })
    local none = section_of(outcome(100, 0)).outcomes[1].comparison.difference_95
    assert.is_true(none[1] < -0.03 and none[2] > 0.03)
  end)

  it("has each model's share with its interval, speeds and kernels", function()
    local o = section_of(outcome(100, 6)).outcomes[1]
    local full, nf4 = o.models[1], o.models[2]
    assert.equal("nf4", nf4.label)
    assert.equal(94, nf4.correct)
    assert.equal(6, nf4.unparsed)
    assert.same({ stats.wilson(94, 100) }, { nf4.wilson[1], nf4.wilson[2] })
    assert.is_true(math.abs(nf4.stderr - math.sqrt(0.94 * 0.06 / 99)) < 1e-15)
    assert.equal(200.0, full.prefill_tokens_per_second)
    assert.same({ "k0", "k1" }, { table.unpack(full.kernels) })
    assert.is_nil(full.words) -- nothing was written
    assert.equal(1, o.too_long)
    assert.equal(101, o.questions)
    assert.same({ path = "s_test.csv", sha256 = "ab", all = 120 }, o.data)
  end)

  it("counts written answers that the length cut off", function()
    local o = outcome(4, 0, "generate")
    o.evaluations[2] = evaluation({ 1, false, false, 2 }, { "length", "length", "eos", "eos" })
    local section = section_of(o)
    local nf4 = section.outcomes[1].models[2]
    assert.equal(2, nf4.unparsed)
    assert.equal(1, nf4.cut)
    assert.equal(360.0, nf4.words_per_minute)
    assert.equal(30.0, nf4.decode_tokens_per_second)
  end)

  it("has intervals of words per minute and of their ratio, where times are known by question", function()
    local o = outcome(6, 0, "generate")
    for m = 1, 2 do
      for i, r in ipairs(o.evaluations[m].results) do r.words, r.seconds = 2 * i + i % 2, m * i / 10 end
    end
    local made = section_of(o).outcomes[1]
    local bounds = made.models[1].words_per_minute_95
    assert.is_true(bounds[1] > 1200 and bounds[1] < 1300 and bounds[2] > 1300 and bounds[2] < 1800)
    local ratio = made.comparison.words_per_minute_ratio
    assert.is_true(math.abs(ratio.value - 0.5) < 1e-12)
    assert.is_nil(ratio.low) -- the same in every resample
    o.evaluations[2].results[3].seconds = nil
    made = section_of(o).outcomes[1]
    assert.is_nil(made.models[2].words_per_minute_95)
    assert.is_nil(made.comparison.words_per_minute_ratio)
  end)

  it("redraws whole batches, whose answers share one time", function()
    local function answers(seconds)
      local list = {}
      for i, s in ipairs(seconds) do list[i] = { words = i, seconds = s } end
      return list
    end
    assert.same({ { 3, 3, 9 }, { 1.0, 2.0, 1.5 } },
      document.by_batch { answers { 0.5, 0.5, 2.0, 0.75, 0.75 } })
    -- of two runs those with fewer batches tell
    assert.same({ { 3, 7 }, { 3.0, 7.0 }, { 3, 7 }, { 0.5, 1.0 } }, document.by_batch {
      answers { 1.0, 2.0, 3.0, 4.0 }, answers { 0.25, 0.25, 0.5, 0.5 } })
    assert.is_nil(document.by_batch { answers { 0.5 }, { { words = 1 } } })
    assert.is_nil(document.by_batch { {} })
  end)

  it("compares the full model with itself where it ran again, in a family of its own", function()
    local one, other = outcome(100, 6), outcome(100, 6)
    one.evaluations[3] = evaluation(filled(100, 1))
    local section = section_of(one, other)
    local o = section.outcomes[1]
    assert.equal(0, o.control.flips.flips)
    assert.equal(1.0, o.control.adjusted_p)
    assert.equal(100, o.control_model.correct)
    assert.equal(2 * o.comparison.mcnemar_p, o.comparison.adjusted_p)
    assert.is_nil(section.outcomes[2].control)
  end)
end)

describe("document.metrics", function()
  it("tests every metric against its noise floor, where there is one", function()
    local function row(name, values) return { name = name, n = #values, values = values } end
    local moved, still = {}, {}
    for i = 1, 12 do moved[i], still[i] = i / 100, 0.0 end
    local section = document.metrics(run_with { seed = 1 }, { task = "t", questions = 12, too_long = 0,
      rows = filled(12, {}), pair = { row("kl", moved), row("rank", still), row("alone", moved),
        { name = "one number", value = 3 } },
      control = { row("kl", still), row("rank", still), row("silent", {}), { name = "one number" } } })
    assert.equal(2, #section.tests)
    local kl, rank = section.tests[1], section.tests[2]
    assert.equal("kl", kl.name)
    assert.is_true(math.abs(kl.difference - 0.065) < 1e-12)
    assert.equal(2 / 2 ^ 12, kl.p) -- all twelve moved one way, or all the other
    assert.equal(2 * kl.p, kl.adjusted_p)
    assert.is_true(kl.established)
    assert.is_false(rank.established)
  end)
end)

describe("a section", function()
  it("comes back from JSON as it was, to the last digit", function()
    local run = run_with { seed = 1, runs = 2, max_length = 512, protocol = "sound" }
    local metric = { name = "kl", value = 0.1 + 0.2, mean = 0.1 + 0.2, n = 2, low = 1e-300, high = 1 / 3,
      higher_is_better = false, values = { 0.1, 0.2 }, extra = print }
    local sections = {
      section_of(outcome(10, 3)),
      document.metrics(run, { task = "t", questions = 2, too_long = 0, rows = { {}, {} }, pair = { metric },
        control = {} }),
      document.sweep(run, {
        { batch = 1, model = 1, tokens = 31 / 3, kernels = {}, expected = { total = 5 },
          time = { median = 0.1, mean = 0.1, sd = 0, p10 = 0.1, p90 = 0.1, min = 0.1, max = 0.1, n = 1,
            samples = { 0.1 } }, peak = { total = 4 }, reserved = 4, process = 9 },
        { batch = 1, model = 2, tokens = 31 / 3, kernels = {}, expected = { total = 5 }, oom = "no room" },
      }, { questions = 3, too_long = 0 }),
      document.variants(run, { scored = 2, too_long = 0, { label = "nf4", bytes = 10, bits = 4.5,
        kl = metric, agreement = metric, accuracy = { n = 2, correct = 1 }, kernels = { "k" } } }, "note"),
    }
    for _, section in ipairs(sections) do
      local text = json.encode(section)
      assert.equal(text, json.encode(assert(json.decode(text))), section.kind)
    end
    assert.equal("[]", json.encode(sections[2].control))
    assert.same({ 0.1, 0.2 }, { table.unpack(sections[2].pair[1].values) })
    assert.is_nil(sections[2].pair[1].extra)
    assert.equal("nf4", sections[3].points[2].label)
    assert.is_nil(sections[3].points[2].seconds)
    assert.equal(0.5, sections[4].rows[1].accuracy.accuracy)
    assert.is_nil(sections[4].rows[1].kl.values)
  end)
end)

describe("document.sensitivity", function()
  it("ranks the most harmful first, with what each saves and what a saved MiB costs", function()
    local function variant(label, kl, bytes)
      return { label = "only " .. label, group = label, bytes = bytes, bits = 8, kernels = {},
        kl = { name = "kl", value = kl, low = 0, high = 2 * kl, n = 4 },
        agreement = { name = "agreement", value = 1, n = 4 }, accuracy = { n = 4, correct = 3 } }
    end
    local run = run_with { seed = 1, quant = "nf4", by = "layer" }
    run.full = { info = function() return { bytes = 5 * 2 ^ 20 } end }
    local rows = { variant("layer 1", 0.25, 3 * 2 ^ 20), variant("layer 0", 0.5, 5 * 2 ^ 20), scored = 4,
      too_long = 1 }
    local all = variant("all", 1, 2 ^ 20)
    all.group = nil
    local section = json.decode(json.encode(document.sensitivity(run, rows, all)))
    assert.same({ "sensitivity", "layer", 4, 1 }, { section.kind, section.by, section.scored,
      section.too_long })
    assert.same({ "layer 0", "layer 1" }, { section.rows[1].label, section.rows[2].label })
    assert.same({ 0, 2 ^ 21, 2 ^ 22 }, { section.rows[1].saved, section.rows[2].saved, section.all.saved })
    assert.is_nil(section.rows[1].kl_per_mib)
    assert.same({ 0.125, 0.25 }, { section.rows[2].kl_per_mib, section.all.kl_per_mib })
    assert.is_nil(document.sensitivity(run, rows).all)
  end)
end)
