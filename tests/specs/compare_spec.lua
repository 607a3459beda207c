-- Two runs against each other: pairing, what is said to spoil a comparison, and the command.

local compare = require "qlua.compare"
local document = require "qlua.document"
local json = require "qlua.json"
local stats = require "qlua.stats"
local store_module = require "qlua.store"
local support = require "tests.specs.support"

local KEYS <const> = { ("a"):rep(64), ("b"):rep(64) }

local function question(i)
  return { question = "What is " .. i .. "?", choices = { "1", "2", "3", "4" }, answer = 1 }
end

--- A run of mmlu.lua on questions first..last: the models answer as `answers(m, i)` says.
local function mmlu(folder, first, last, answers, change)
  local evaluations, rows, prepared = { { results = {} }, { results = {} } }, {}, {}
  for i = first, last do
    local doc, models = question(i), {}
    prepared[#prepared + 1] = {}
    for m = 1, 2 do
      local answer = answers(m, i)
      models[m] = { answer = answer or nil, correct = answer == 1, kernels = {} }
      table.insert(evaluations[m].results, { prepared = { item = doc }, answer = answer or nil,
        correct = answer == 1, kernels = {} })
    end
    rows[#rows + 1] = { tostring(i), json.encode { index = i - first + 1, doc = doc, models = models } }
  end
  for m = 1, 2 do
    for _, key in ipairs { "prefill_seconds", "decode_seconds", "decode_tokens", "words", "shared_tokens" } do
      evaluations[m][key] = 0
    end
    evaluations[m].seconds, evaluations[m].prompt_tokens = 1.0, 100 * m
    evaluations[m].prefill_seconds = 0.5
  end
  local doc = { format = 1, name = "mmlu.lua", started = 1721995200.25, status = "finished",
    options = { model = "demo", batch_size = 8, limit = json.null }, labels = { "full", "nf4" },
    facts = { qlua_version = "0.1", seed = 1, model_sha256 = "cd", numerics = "fast", full = {},
      device = { name = "cpu", hardware = "a CPU", threads = 2 },
      quantized = { quant = { label = "nf4" } } } }
  local items = { subject = "s", path = "s_test.csv", sha256 = "ef" }
  for i = first, last do items[i - first + 1] = question(i) end
  local run = { labels = doc.labels, context = 64, opts = { seed = 1, protocol = "sound" }, items = items }
  local task = { name = "mmlu_s", subject = "s", kind = "loglikelihood", num_fewshot = 0 }
  if change then change(doc, items) end
  local store <close> = assert(store_module.open(folder .. "/qlua.sqlite"))
  local id = assert(store:begin_run { name = doc.name, started = doc.started, command = '["--limit","9"]' })
  local key = doc.options.limit == 1 and KEYS[1] or KEYS[id] or KEYS[2]
  doc.run, doc.sections = id, json.array { document.mmlu(run, { { task = task, items = items,
    prepared = prepared, evaluations = evaluations, set = key } }) }
  local ids = {}
  for i, row in ipairs(rows) do ids[i] = row[1] end
  assert(store:set(key, "mmlu_s", "{}"))
  assert(store:put(id, key, rows))
  assert(store:use(id, key, ids))
  assert(store:end_run(id, { finished = doc.started + 5, status = "finished", document = json.encode(doc) }))
  return doc
end

local function all_right() return 1 end

--- Wrong (no letter) on the first `n` questions in the quantized model.
local function wrong_on(n) return function(m, i) return (m == 1 or i > n) and 1 end end

local function qlua(...)
  local words = { support.QLUA }
  for _, word in ipairs { ... } do words[#words + 1] = "'" .. word .. "'" end
  local pipe <close> = assert(io.popen(table.concat(words, " ") .. " 2>&1; echo $?"))
  local text = pipe:read "a"
  local out, code = text:match "^(.*)%f[%d](%d+)\n$"
  return out, tonumber(code)
end

local function figure(result, name, of)
  for _, section in ipairs(result.sections) do
    for _, f in ipairs(section.figures) do
      if f.name == name and (not of or f.of == of) then return f end
    end
  end
end

after_each(support.cleanup)

describe("qlua compare", function()
  it("pairs answers by their question, whatever else the runs asked", function()
    local folder = support.folder()
    mmlu(folder, 1, 20, all_right)
    mmlu(folder, 3, 30, wrong_on(10)) -- 3..20 are in both; wrong on 3..10
    local out, code = qlua("compare", folder .. ":1", folder .. ":2", "--format", "json")
    assert.equal(0, code, out)
    local result = assert(json.decode(out))
    local nf4 = figure(result, "accuracy", "nf4")
    assert.equal(18, nf4.comparison.flips.n)
    assert.equal(8, nf4.comparison.flips.right_wrong)
    assert.equal(-8 / 18, nf4.value)
    assert.equal(1.0, nf4.a)
    assert.equal(2 / 2 ^ 8, nf4.comparison.mcnemar_p)
    assert.equal(2 * nf4.comparison.mcnemar_p, nf4.comparison.adjusted_p) -- two models were compared
    assert.is_true(nf4.low <= nf4.value and nf4.high >= nf4.value)
    assert.equal(0.0, figure(result, "accuracy", "full").value)
    assert.equal(1.0, figure(result, "prefill tok/s", "nf4").value)
    assert.same({}, { table.unpack(result.facts) })
  end)

  it("reads exported documents, and takes their answers for independent", function()
    local folder = support.folder()
    local doc = mmlu(folder, 1, 20, all_right)
    local path = support.write(folder .. "/comparison_x.json", json.encode(doc))
    mmlu(folder, 1, 20, wrong_on(10))
    local out = qlua("compare", path, "latest", "--output_path", folder, "--format", "json")
    local f = figure(assert(json.decode(out)), "accuracy", "nf4")
    assert.is_nil(f.comparison)
    assert.same({ stats.newcombe(20, 20, 10, 20) }, { f.low, f.high })
  end)

  it("says first what differs, and warns of what spoils the comparison", function()
    local folder = support.folder()
    mmlu(folder, 1, 20, all_right)
    mmlu(folder, 1, 20, wrong_on(5), function(doc, items)
      doc.facts.device.threads, doc.facts.model_sha256, items.sha256 = 4, "dd", "00"
      doc.options.batch_size = 16
      doc.fairness = { checks = { { name = "load", ok = false, text = "load 3.1", reason = "others ran" },
        { name = "order", ok = true, text = "alternating" } } }
    end)
    local out, code = qlua("compare", "1", "2", "--output_path", folder)
    assert.equal(0, code, out)
    for _, pattern in ipairs { "\nthreads +2 +4\n", "\nmodel's weights %(SHA%-256%) +cd +dd\n",
      "\n%-%-batch_size +8 +16\n", "warning: different threads: .- speeds", "warning: different questions",
      "warning: [^\n]*:2, load: others ran", "nf4, B against A: difference of %-25.0 points",
      "flips 5 to wrong, 0 to right of 20" } do
      assert.truthy(out:find(pattern), pattern .. " in\n" .. out)
    end
    assert.is_nil(out:find("alternating", 1, true))
    assert.is_true(out:find("threads", 1, true) < out:find("accuracy", 1, true))
    assert.is_nil(out:find("\27", 1, true))
  end)

  it("says when runs share their rows", function()
    local folder = support.folder()
    mmlu(folder, 1, 3, all_right)
    mmlu(folder, 1, 3, all_right, function(doc) doc.options.limit = 1 end)
    local out = qlua("compare", "1", "2", "--output_path", folder)
    assert.truthy(out:find("mmlu_s: the runs share rows of the store", 1, true), out)
    mmlu(folder, 1, 3, all_right)
    assert.is_nil(qlua("compare", "1", "3", "--output_path", folder):find("share rows", 1, true))
  end)

  it("pairs words per minute and metrics by question too", function()
    local function sides_of(scale)
      local rows, models = {}, {}
      for i = 1, 5 do
        local part = { answer = 1, words = 3 * i, seconds = scale * i }
        rows[i] = { doc = question(i), models = { part, part }, values = { kl = scale * i } }
      end
      for m = 1, 2 do
        models[m] = { label = m == 1 and "full" or "nf4", n = 5, correct = 5, accuracy = 1.0, words = 45,
          words_per_minute = 180 / scale }
      end
      return { kind = "mmlu", outcomes = { { task = "t", set = "k", models = models, metrics = {
        { name = "kl", value = 9.0 } } } } }, rows
    end
    local one, rows_one = sides_of(1.0)
    local two, rows_two = sides_of(2.0)
    local function side(name, section, rows)
      return { name = name, rows = function() return rows end, document = { format = 1, name = "x.lua",
        started = 0.5, labels = { "full", "nf4" }, options = {}, facts = {}, sections = { section } } }
    end
    local f = figure(assert(compare.runs(side("a", one, rows_one), side("b", two, rows_two))), "words/min")
    assert.equal(180.0, f.a)
    assert.equal(90.0, f.b)
    assert.is_true(math.abs(f.value - 0.5) < 1e-12 and f.low == nil) -- it is the same in every resample
    local kl = figure(assert(compare.runs(side("a", one, rows_one), side("b", two, rows_two))), "kl")
    assert.equal(3.0, kl.a) -- of the rows, and not what the section says
    assert.equal(3.0, kl.value)
    assert.is_true(kl.low < 3.0 and kl.high > 3.0)
    f = figure(assert(compare.runs(side("a", one), side("b", two))), "words/min")
    assert.equal(0.5, f.value)
    assert.is_nil(f.low)
  end)

  it("gives Markdown and CSV", function()
    local folder = support.folder()
    mmlu(folder, 1, 9, all_right)
    mmlu(folder, 1, 9, wrong_on(2), function(doc) doc.facts.seed = 7 end)
    local out = qlua("compare", "1", "2", "--output_path", folder, "--format", "md")
    assert.truthy(out:find("| seed", 1, true), out)
    assert.truthy(out:find("| mmlu_s", 1, true), out)
    out = qlua("compare", "1", "2", "--output_path", folder, "--format", "csv")
    assert.truthy(out:find("\r\nfact,,,seed,1,7,", 1, true), out)
    assert.truthy(out:find("\r\nmmlu,mmlu_s,nf4,accuracy,1.0,0.7777777777777778,difference,", 1, true), out)
  end)

  it("explains itself", function()
    local out, code = qlua("compare", "--help")
    assert.equal(0, code)
    for _, words in ipairs { "qlua compare", "FOLDER:NUMBER", "--output_path", "text, json, csv, md" } do
      assert.truthy(out:find(words, 1, true), out)
    end
  end)

  it("without runs lists them, newest first", function()
    local folder = support.folder()
    mmlu(folder, 1, 3, all_right)
    mmlu(folder, 1, 4, all_right)
    local out, code = qlua("compare", "--output_path", folder)
    assert.equal(0, code)
    assert.truthy(out:find "  2  mmlu.lua  2024%-07%-26 12:00 +5  finished  %-%-limit 9\n +1  mmlu.lua", out)
  end)

  it("names a run that is not there, with those that are, and what has no results", function()
    local folder = support.folder()
    mmlu(folder, 1, 3, all_right)
    do
      local store <close> = assert(store_module.open(folder .. "/qlua.sqlite"))
      local id = assert(store:begin_run { name = "jaccard.lua", started = 1.0, command = "[]" })
      assert(store:end_run(id, { finished = 2.0, status = "failed" }))
    end
    local function refused(words, ...)
      local out, code = qlua("compare", "--output_path", folder, ...)
      assert.equal(1, code, out)
      assert.equal(1, select(2, out:gsub("\n", "\n")), out)
      for _, word in ipairs(words) do assert.truthy(out:find(word, 1, true), out) end
    end
    refused({ "7", "1", "2" }, "1", "7")
    refused({ "99999999999999999999" }, "1", "99999999999999999999")
    refused({ "run 2 (jaccard.lua) is failed", "no results" }, "1", "2")
    refused({ "nowhere", "qlua.sqlite" }, "1", "nowhere:1")
    refused({ "nonsense", "neither a run nor a file" }, "1", "nonsense")
    refused({ "two runs", "3" }, "1", "1", "1")
    local text = support.write(folder .. "/other.json", '{"format":1}')
    refused({ "other.json", "not the document of a run" }, "1", text)
  end)

  it("says when two runs have nothing in common", function()
    local folder = support.folder()
    mmlu(folder, 1, 3, all_right)
    mmlu(folder, 4, 6, all_right, function(doc) doc.name = "other.lua" end)
    local doc = mmlu(folder, 1, 3, all_right)
    doc.sections = { { kind = "sweep", task = "s", runs = 1, points = json.array() } }
    local path = support.write(folder .. "/d.json", json.encode(doc))
    local out, code = qlua("compare", "--output_path", folder, "1", path)
    assert.equal(1, code)
    assert.truthy(out:find("have no figure in common", 1, true), out)
    -- the same task of other questions is compared as two independent shares
    out, code = qlua("compare", "--output_path", folder, "1", "2", "--format", "json")
    assert.equal(0, code, out)
    assert.is_nil(figure(assert(json.decode(out)), "accuracy", "nf4").comparison)
  end)
end)

--- Two documents with one section each, as found in a store whose rows are `rows`.
local function sides(sections, rows)
  local list = {}
  for i, section in ipairs(sections) do
    list[i] = { name = "run " .. i, rows = function() return rows and rows[i] end,
      document = { format = 1, name = "x.lua", started = 0.5, labels = { "full", "nf4" }, options = {},
        facts = { seed = 1 }, sections = { section } } }
  end
  return list[1], list[2]
end

describe("compare.runs", function()
  it("takes the ratio of a sweep's medians, with an interval where passes can be paired", function()
    local function point(model, scale, n)
      local samples = {}
      for i = 1, n do samples[i] = scale * (1 + i / 100) end
      return { batch = 4, model = model, label = model == 1 and "full" or "nf4", peak = { resident = 1000 },
        seconds = { median = stats.median(samples), n = n, samples = samples } }
    end
    local faster = point(1, 0.5, 9)
    faster.seconds.samples[4] = 0.515
    local a, b = sides { { kind = "sweep", task = "s", points = { point(1, 1.0, 9), point(2, 1.0, 9),
      { batch = 8, model = 1, label = "full", oom = "no room" } } },
      { kind = "sweep", task = "s", points = { faster, point(2, 0.25, 7),
        { batch = 8, model = 1, label = "full", oom = "no room" } } } }
    local result = assert(compare.runs(a, b))
    local full, nf4 = figure(result, "median seconds", "full"), figure(result, "median seconds", "nf4")
    assert.is_true(math.abs(full.value - 0.5) < 1e-12)
    assert.is_true(full.low > 0.49 and full.low < 0.5 and full.high >= 0.5 and full.high < 0.51)
    assert.is_true(nf4.value < 0.26 and nf4.low == nil)
    assert.equal(1.0, figure(result, "peak bytes", "full").value)
    assert.equal(4, #result.sections[1].figures)
  end)

  it("pairs metrics by question, or takes their errors for independent", function()
    local function section(values)
      return { kind = "metrics", task = "s", set = "k", pair = { { name = "kl", value = stats.mean(values),
        stderr = stats.stderr(values), n = #values } } }
    end
    local one, two = { 0.1, 0.2, 0.3, 0.9 }, { 0.2, 0.3, 0.7 }
    local function rows(values)
      local list = {}
      for i, value in ipairs(values) do list[i] = { question = "q" .. i, values = { kl = value } } end
      return list
    end
    local paired = figure(assert(compare.runs(sides({ section(one), section(two) },
      { rows(one), rows(two) }))), "kl")
    assert.is_true(math.abs(paired.value - 0.2) < 1e-12 and math.abs(paired.a - 0.2) < 1e-12)
    assert.is_true(math.abs(paired.low - 0.1) < 1e-12 and math.abs(paired.high - 0.4) < 1e-12)
    local alone = figure(assert(compare.runs(sides { section(one), section(two) })), "kl")
    local half = stats.normal_quantile(0.975) * math.sqrt(stats.stderr(one) ^ 2 + stats.stderr(two) ^ 2)
    assert.is_true(math.abs(alone.value - (0.4 - 0.375)) < 1e-12)
    assert.is_true(math.abs(alone.high - alone.low - 2 * half) < 1e-12)
  end)

  it("pairs nuclei by question and setting, whatever settings the runs had beside", function()
    local function section(settings, means)
      local made = { kind = "nucleus", task = "s", set = "k", rows = {} }
      for i, label in ipairs(settings) do
        made.rows[i] = { label = label, overlap = { name = "overlap", value = means[i], stderr = 0.1 } }
      end
      return made
    end
    local function rows(overlaps)
      local list = {}
      for i, of in ipairs(overlaps) do
        list[i] = { question = "q" .. i, pair = {} }
        for setting, overlap in ipairs(of) do list[i].pair[setting] = { overlap, 3, 3, 1, 1, 1 } end
      end
      return list
    end
    local result = assert(compare.runs(sides({ section({ "cool", "warm" }, { 0.9, 0.5 }),
      section({ "warm", "hot" }, { 0.25, 0.9 }) }, { rows { { 0.9, 0.5 }, { 0.9, 0.75 }, { 0.9, 0.25 } },
      rows { { 0.25, 0.9 }, { 0.5, 0.9 } } })))
    assert.equal(1, #result.sections[1].figures)
    local f = figure(result, "overlap")
    assert.same({ "warm", 0.625, 0.375, -0.25 }, { f.task, f.a, f.b, f.value })
    f = figure(assert(compare.runs(sides { section({ "warm" }, { 0.5 }), section({ "warm" }, { 0.25 }) })),
      "overlap")
    assert.equal(-0.25, f.value)
    assert.truthy(f.method:find("independent", 1, true))
  end)

  it("compares sensitivities group by group, and says how both were quantized", function()
    local function row(label, kl)
      return { label = label, bytes = 100, kl = { name = "kl", value = kl, stderr = 0.1 },
        agreement = { name = "agreement", value = 1, stderr = 0 }, accuracy = { n = 0, correct = 0 } }
    end
    local function section(first, all)
      return { kind = "sensitivity", task = "s", rows = { row("layer 0", first), row("layer 1", 0.5) },
        all = row("all of them", all) }
    end
    local first, second = sides { section(0.25, 1), section(0.5, 2) }
    first.document.options, second.document.options = { quant = "nf4" }, { quant = "fp4" }
    local result = assert(compare.runs(first, second))
    local differences = {}
    for _, f in ipairs(result.sections[1].figures) do
      if f.name == "kl" then differences[f.of] = f.value end
    end
    assert.same({ ["layer 0"] = 0.25, ["layer 1"] = 0, ["all of them"] = 1 }, differences)
    local told = {}
    for _, fact in ipairs(result.facts) do told[fact.name] = { fact.a, fact.b } end
    assert.same({ "nf4", "fp4" }, told["--quant"])
  end)

  it("tells questions of the same text apart", function()
    local function section(values)
      return { kind = "metrics", task = "s", set = "k", pair = { { name = "kl", value =
        stats.mean(values) } } }
    end
    local function rows(values)
      local list = {}
      for i, value in ipairs(values) do list[i] = { question = "twice", values = { kl = value } } end
      return list
    end
    local f = figure(assert(compare.runs(sides({ section { 1, 2 }, section { 3, 5 } },
      { rows { 1, 2 }, rows { 3, 5 } }))), "kl")
    assert.equal(2.5, f.value)
    assert.equal(2.0, f.low)
    assert.equal(3.0, f.high)
  end)

  --- A perplexity section, and its windows of predictions where there are any.
  local function text_section(ppl, kl)
    local function f(value, stderr) return { value = value, stderr = stderr } end
    return { kind = "perplexity", text = "t", sha256 = "ab", set = "k", protocol = { context = 8 },
      summary = { reference = f(10, 0.1), test = f(ppl, 0.2), kl = f(kl, 0.001), delta_p = f(0.0, 0.01),
        same_top = f(0.9, 0.01) } }
  end

  it("compares perplexities as a ratio and the figures beside them", function()
    local result = assert(compare.runs(sides { text_section(11, 0.1), text_section(12, 0.2) }))
    local f = figure(result, "perplexity", "nf4")
    local half = stats.normal_quantile(0.975) * math.sqrt((0.2 / 11) ^ 2 + (0.2 / 12) ^ 2)
    assert.is_true(math.abs(f.value - 12 / 11) < 1e-12)
    assert.is_true(math.abs(math.log(f.high / f.low) - 2 * half) < 1e-12)
    assert.is_true(math.abs(figure(result, "kl").value - 0.1) < 1e-12)
  end)

  it("pairs the predictions of the windows that both runs had", function()
    local function windows(count, more)
      local list = {}
      for w = 1, count do
        list[w] = { reference = { 1.0, 2.0 * w }, test = { 1.0 + more, 2.0 * w + more },
          kl = { 0.1, 0.3 + more }, delta_p = { 0.0, more }, same = { 1, 0 } }
      end
      return list
    end
    local rows = { windows(3, 0.0), windows(5, 0.5) }
    local result = assert(compare.runs(sides({ text_section(11, 0.1), text_section(12, 0.2) }, rows)))
    local f = figure(result, "perplexity", "nf4")
    assert.is_true(math.abs(f.a - math.exp((3 + 12) / 6)) < 1e-9)
    assert.is_true(math.abs(f.value - math.exp(0.5)) < 1e-12)
    assert.is_true(math.abs(f.high - f.low) < 1e-9) -- every prediction moved alike
    local kl = figure(result, "kl")
    assert.is_true(math.abs(kl.value - 0.25) < 1e-12)
    local half = stats.normal_quantile(0.975) * stats.stderr { 0, 0.5, 0, 0.5, 0, 0.5 }
    assert.is_true(math.abs(kl.high - kl.value - half) < 1e-12)
    assert.equal(0.0, figure(result, "same_top").value)
    -- another text
    local other = text_section(12, 0.2)
    other.sha256 = "cd"
    result = assert(compare.runs(sides({ text_section(11, 0.1), other }, rows)))
    assert.is_true(math.abs(figure(result, "perplexity", "nf4").value - 12 / 11) < 1e-12)
  end)
end)
