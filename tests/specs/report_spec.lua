--- report.html: what stands in it, what can never stand in it, and that its figures are the document's.

local documents = require "tests.specs.report_documents"
local json = require "qlua.json"
local markup = require "qlua.report.markup"
local plot = require "qlua.plot"
local report = require "qlua.report"
local store_module = require "qlua.store"
local support = require "tests.specs.support"
local text = require "qlua.text"
local verdict = require "qlua.report.verdict"

local BUDGET <const> = 300000

--- Every cell of the table row with this key, as numbers.
local function cells(html, key)
  local row = html:match('<tr data%-key="' .. key:gsub("%p", "%%%0") .. '">(.-)</tr>')
  assert(row, "no row " .. key)
  local list = {}
  for value in row:gmatch ' data%-value="([^"]*)"' do list[#list + 1] = tonumber(value) end
  return list
end

local function figure(html, key)
  return tonumber((html:match('data%-key="' .. key:gsub("%p", "%%%0") .. '" data%-value="([^"]*)"')))
end

--- A document of one task answered by `rows`.
local function asked(rows, options)
  local outcome = documents.outcome("mmlu_virology", rows, options)
  return documents.document { documents.sweep(), { kind = "mmlu", protocol = "sound",
    outcomes = { outcome } } }, outcome
end

--- Answers with given numbers of questions: both right, only full, only quantized, both wrong.
local function answered(both, full, quantized, wrong)
  local rows = documents.rows(both + full + quantized + wrong)
  for i, row in ipairs(rows) do
    local gold = row.doc.answer
    local other = gold % 4 + 1
    local a = (i <= both + full) and gold or other
    local b = (i <= both or i > both + full and i <= both + full + quantized) and gold or other
    row.models[1].answer, row.models[2].answer = a, b
  end
  return rows
end

describe("markup", function()
  it("escapes text and attributes, and shows what cannot be shown", function()
    local h <const> = markup.tags
    assert.equal('<td class="&quot;&gt;&#39;&amp;" data-value="0.1">&lt;b&gt;<b>x</b>2</td>',
      h.td { class = "\">'&", ["data-value"] = 0.1, "<b>", h.b { "x" }, nil, false, { 2 } }.text)
    assert.equal("␀␛\u{FFFD}|\u{FFFD}\u{FFFD}|a\nb\n",
      markup.clean "\0\27\xFF|\xC2\x80\xEF\xBF\xBE|a\u{2028}b\r\n")
    assert.equal("\u{FFFD}\u{FFFD}\u{FFFD}", markup.clean "\xED\xA0\x80") -- half of a surrogate pair
    assert.equal("漢字 é\t", markup.clean "漢字 é\t")
  end)

  it("writes numbers that read back as themselves", function()
    for _, x in ipairs { 0.1, 1 / 3, 45 / 79, 1e-300, 1e22, 3.0, -0.08860759493670886, 7 } do
      assert.equal(x, tonumber(markup.number(x)))
    end
    assert.equal("3", markup.number(3.0))
  end)
end)

describe("the verdict", function()
  it("says quantize only where a loss beyond the margin is ruled out", function()
    local doc = asked(answered(900, 12, 10, 300))
    local v = verdict.of { doc }
    assert.equal("quantize", v.word)
    assert.is_true(v.pools[1].low > -0.02)
    assert.equal("open", verdict.of({ doc }, { margin = 0.5 }).word)
    -- the same shares of fewer questions show nothing
    assert.equal("open", verdict.of({ (asked(answered(90, 1, 1, 30))) }).word)
    -- no answer changed at all, but ten questions are no evidence
    assert.equal("open", verdict.of({ (asked(answered(8, 0, 0, 2))) }).word)
  end)

  it("says don't where a loss is established, and names it", function()
    local doc = asked(answered(500, 120, 20, 160))
    local v = verdict.of { doc }
    assert.equal("dont", v.word)
    assert.near(-0.125, v.pools[1].difference, 1e-12)
    assert.truthy(v.because:find("more than 2 points of accuracy: −12.5 points", 1, true))
    v = verdict.of({ doc }, { margin = 12 })
    assert.truthy(v.because:find("−12.5 points", 1, true)
      and v.because:find("more than 12 cannot be ruled out", 1, true))
  end)

  it("does not take noise for a loss", function()
    local doc, outcome = asked(answered(500, 120, 20, 160))
    outcome.control = outcome.comparison -- the full model differs from itself as much
    local v = verdict.of { doc }
    assert.equal("open", v.word)
    assert.truthy(v.because:find("differs from itself", 1, true))
  end)

  it("does not judge by questions that the full model guesses", function()
    local v = verdict.of { (asked(answered(260, 2, 2, 736))) }
    assert.equal("open", v.word)
    assert.truthy(v.because:find("guessing", 1, true))
    -- a loss that is established but smaller than the margin is not said to be larger
    v = verdict.of { (asked(answered(3500, 100, 40, 10360))) }
    assert.is_true(v.pools[1].lost and v.pools[1].low > -0.02 and v.pools[1].guessing)
    assert.equal("open", v.word)
  end)

  it("says how many questions would show what was not shown", function()
    local doc = asked(answered(33, 12, 5, 29))
    local v = verdict.of { doc }
    assert.equal("open", v.word)
    local said = table.concat(v.evidence, " ")
    assert.truthy(said:find("−8.9 points", 1, true))
    assert.truthy(said:find("not established at n = 79 (exact McNemar p = 0.143)", 1, true))
    assert.truthy(said:find "about %d+ questions would show")
    assert.truthy(said:find "nf4 saves 9.9 GiB %(66 %%%) at batch 1")
  end)

  it("names what was not measured", function()
    local v = verdict.of { documents.document { documents.sweep() } }
    assert.equal("open", v.word)
    assert.truthy(table.concat(v.evidence, " "):find "Accuracy was not measured in this report")
    v = verdict.of { documents.document { { kind = "mmlu", protocol = "sound",
      outcomes = { documents.outcome("mmlu_virology", answered(900, 12, 10, 300)) } } } }
    assert.equal("quantize", v.word)
    assert.truthy(table.concat(v.evidence, " "):find "Speed by batch size was not measured in this report")
  end)

  it("does not count speed where a fairness check is amber, and says which", function()
    local doc = asked(answered(900, 12, 10, 300))
    doc.fairness.checks[2] = { name = "load", text = "other load", ok = false,
      reason = "load 7.1 on 2 cores" }
    for _, p in ipairs(doc.sections[1].points) do p.peak.resident = 1e9 end
    local v = verdict.of { doc }
    assert.equal("open", v.word) -- no memory is saved, and the time is not to be trusted
    assert.truthy(v.because:find("not measured fairly", 1, true))
    assert.same({ "load" }, { v.unfair[1].name })
    local html = report.html { doc }
    assert.truthy(html:find('class="box amber"', 1, true))
    assert.truthy(html:find("load 7.1 on 2 cores", 1, true))
  end)

  it("says don't where nothing is saved, and not where that is not known", function()
    local doc = asked(answered(900, 12, 10, 300))
    for _, p in ipairs(doc.sections[1].points) do p.peak.resident = 1e9 end
    assert.equal("quantize", verdict.of({ doc }).word) -- it is faster
    for _, p in ipairs(doc.sections[1].points) do p.model = 3 - p.model end
    local v = verdict.of { doc }
    assert.equal("dont", v.word)
    assert.truthy(v.because:find("takes longer", 1, true))
    for _, p in ipairs(doc.sections[1].points) do p.seconds = doc.sections[1].points[1].seconds end
    v = verdict.of { doc }
    assert.equal("open", v.word)
    assert.truthy(v.because:find("not established", 1, true))
    table.remove(doc.sections, 1)
    doc.facts.quantized.bytes = doc.facts.full.bytes
    assert.truthy(verdict.of({ doc }).because:find("its speed was not measured", 1, true))
  end)

  it("does not judge by the protocol of the post", function()
    for _, rows in ipairs { answered(900, 12, 10, 300), answered(500, 120, 20, 160) } do
      local doc = asked(rows)
      doc.sections[2].protocol = "post"
      local v = verdict.of { doc }
      assert.equal("open", v.word)
      assert.truthy(v.because:find("as in the post of 2024", 1, true))
    end
  end)

  it("takes many subjects as one, and a task of two runs once", function()
    local outcomes = {}
    for i = 1, 57 do
      outcomes[i] = documents.outcome("mmlu_subject_" .. i, documents.rows(20, { seed = i }))
    end
    local doc = documents.document { { kind = "mmlu", protocol = "sound", outcomes = outcomes } }
    local v = verdict.of { doc, doc }
    assert.equal(1, #v.pools)
    assert.equal(57 * 20, v.pools[1].n)
  end)
end)

describe("the report", function()
  it("is one small page that fetches nothing and runs nothing", function()
    local doc, rows = documents.study()
    local html = report.html({ doc }, rows)
    assert.is_true(#html < BUDGET, #html)
    assert.truthy(html:find("default-src 'none'", 1, true)
      or html:find("default-src &#39;none&#39;", 1, true))
    for _, never in ipairs { "<script", "<link", "<img", "<iframe", "@import", "url(", "http:", "https:",
      "javascript:", " on%a+=" } do
      assert.is_nil(html:lower():find(never), never)
    end
    for _, part in ipairs { 'id="verdict"', 'id="charts"', 'id="fairness"', 'id="questions"', 'id="repeat"',
      'id="sweep-latency"', 'id="sweep-memory"', 'id="metrics"', 'id="accuracy"', 'id="variants-accuracy"',
      'id="perplexity"', "OOM", "qlua examples/mmlu.lua --model models/Llama-3-8B-Instruct", ("b"):rep(64),
      ("d"):rep(64), "40 reused" } do
      assert.truthy(html:find(part, 1, true), part)
    end
  end)

  it("is the same bytes for the same document, read back from JSON", function()
    local doc, rows = documents.study()
    local first = report.html({ doc }, rows)
    assert.equal(first, (report.html({ assert(json.decode(json.encode(doc))) }, rows)))
  end)

  it("closes every element, and has every id once", function()
    local doc, rows = documents.study()
    local html, open, ids = report.html({ doc }, rows), {}, {}
    for slash, name, rest in html:gsub("<style>.-</style>", ""):gmatch "<(/?)([%a][%w]*)([^>]*)>" do
      if slash == "/" then
        assert.equal(table.remove(open), name)
      elseif not (rest:sub(-1) == "/" or name == "meta" or name == "br" or name == "input") then
        open[#open + 1] = name
      end
      local id = rest:match ' id="([^"]*)"'
      if id then
        assert.is_nil(ids[id], id)
        ids[id] = true
      end
    end
    assert.same({}, open)
    for what in html:gmatch ' aria%-%l+by="([^"]*)"' do assert.is_true(ids[what], what) end
    for what in html:gmatch ' href="#([^"]*)"' do assert.is_true(ids[what], what) end
  end)

  it("has the document's figures, whole", function()
    local doc, rows = documents.study()
    local html = report.html({ doc }, rows)
    local sweep, metrics, mmlu = doc.sections[1], doc.sections[2], doc.sections[3]
    for _, p in ipairs(sweep.points) do
      local got = cells(html, ("latency/%d/%d"):format(p.batch, p.model))
      local s = p.seconds
      assert.same(s and { p.tokens, s.median, s.p10, s.p90, s.min, s.max, s.n } or { p.tokens }, got)
      if p.peak then
        local peak = p.peak
        assert.same({ peak.resident, peak.weights, peak.shared, peak.kv, peak.activations, p.reserved,
          p.process, p.expected.total }, cells(html, ("memory/%d/%d"):format(p.batch, p.model)))
      end
    end
    for i, row in ipairs(metrics.pair) do
      local same = metrics.control[i]
      assert.same({ row.value, row.median, same and same.value }, cells(html, "metrics/" .. row.name))
    end
    for _, o in ipairs(mmlu.outcomes) do
      local c, f = o.comparison, o.comparison.flips
      assert.same({ o.models[1].n, o.models[1].accuracy, o.models[2].accuracy, c.difference, c.mcnemar_p,
        c.adjusted_p, f.flips, c.questions_needed }, cells(html, "accuracy/" .. o.task))
      for name, count in pairs { both_right = f.both_right, right_wrong = f.right_wrong,
        wrong_right = f.wrong_right,
        both_wrong = f.same_wrong + f.other_wrong } do
        assert.equal(count, figure(html, ("flips/%s/%s"):format(o.task, name)))
      end
    end
    assert.equal(sweep.points[1].peak.resident - sweep.points[2].peak.resident, figure(html, "card/memory"))
    assert.equal(doc.sections[5].summary.test.value, figure(html, "perplexity/nf4"))
  end)

  it("lets no text of a model or a file become markup", function()
    local attacks = { "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>',
      "</script><svg onload=alert(1)>",
      "]]>", "</style><b>", "' onmouseover='alert(1)", "javascript:alert(1)", "\u{2028}alert(1)\u{2029}",
      "\0\1\27[31m\127", "\xFF\xC0\xAF", "&lt;b&gt;", "-->", "<!--", "{{x}}", "%s%d%n", "\u{202E}desrever" }
    local rows = documents.rows(#attacks, { written = true, keeps = 0.3 })
    for i, attack in ipairs(attacks) do
      rows[i].doc.question, rows[i].doc.choices = attack, { attack, attack, attack, attack }
      rows[i].models[1].text, rows[i].models[2].text = attack, attack .. attack
    end
    local all = table.concat(attacks, " ")
    local outcome = documents.outcome("mmlu_" .. all, rows, { written = true })
    outcome.models[1].label, outcome.models[2].label = all, all
    local study = documents.study()
    local sections = study.sections
    sections[1].points[2].label, sections[1].points[1].oom = all, all
    sections[1].points[1].seconds, sections[1].points[1].peak = nil, nil
    sections[2].task, sections[2].pair[1].name = all, all
    sections[3].outcomes = { outcome }
    sections[4].rows[2].label, sections[4].note = all, all
    sections[5].text = all
    sections[6] = { kind = all, note = all, rows = { { label = all, [all] = 1.5, value = { value = 2 } } } }
    local doc = documents.document(sections, { name = all, labels = { "full", all }, command = attacks,
      options = { model = all }, status = all, script_sha256 = all })
    doc.facts.device.hardware, doc.facts.quantized.quant.label, doc.facts.model_sha256 = all, all, all
    doc.fairness.checks[1] = { name = all, text = all, ok = false, reason = all }
    local html = report.html({ doc }, function() return rows end)
    assert.truthy(utf8.len(html))
    assert.is_nil(html:find "[\0-\8\11-\31\127]")
    assert.is_nil(html:find("\u{2028}", 1, true))
    local known = {}
    for name in (
      "a aside b body br caption circle code dd desc details div dl dt em fieldset figcaption figure g " ..
      "footer h1 h2 h3 h4 head header html i input label legend li line main mark meta nav ol p path pre " ..
      "rect section small span style summary svg table tbody td text th thead title tr ul"):gmatch "%S+" do
      known[name] = true
    end
    for name, rest in html:gmatch "<([^%s>/!]+)([^>]*)>" do
      assert.is_true(known[name], name)
      assert.is_nil(rest:gsub('"[^"]*"', ""):find "[<'`]", name .. rest)
      for attribute in rest:gsub('"[^"]*"', ""):gmatch "([%w:-]+)=" do
        assert.is_nil(attribute:find "^on", attribute)
      end
    end
    local _, comments = html:gsub("<!", "")
    assert.equal(1, comments) -- the doctype
    assert.truthy(html:find("&lt;script&gt;alert(1)&lt;/script&gt;", 1, true))
  end)

  it("marks the first word that differs, and says where one text ends", function()
    local rows = documents.rows(2, { written = true })
    for m, answer in ipairs { "It is the <same> until here", "It is the <same> until there" } do
      rows[1].models[m].text = answer
    end
    rows[2].models[1].text, rows[2].models[2].text = "alpha beta", "alpha"
    local doc = asked(rows, { written = true })
    local html = report.html({ doc }, function() return rows end)
    assert.truthy(html:find("It is the &lt;same&gt; until <mark>here</mark>", 1, true))
    assert.truthy(html:find("It is the &lt;same&gt; until <mark>there</mark>", 1, true))
    assert.truthy(html:find("alpha <mark>beta</mark>", 1, true))
  end)

  it("keeps the most telling of 14,042 questions and writes the others beside the page", function()
    local outcomes, by_set, store = {}, {}, {}
    local n <const>, wrong = 14042, 0
    for i = 1, 57 do
      local rows = documents.rows(i < 57 and 246 or n - 56 * 246, { seed = i })
      outcomes[i] = documents.outcome("mmlu_subject_" .. i, rows, { uncontrolled = true })
      by_set[outcomes[i].set] = rows
      wrong = wrong + outcomes[i].comparison.flips.right_wrong
    end
    function store.run_rows(_, _, set)
      local list = {}
      for i, row in ipairs(by_set[set]) do list[i] = { tostring(i), json.encode(row) } end
      return list
    end
    local doc = documents.document { documents.sweep(), documents.metrics(1000),
      { kind = "mmlu", protocol = "sound", outcomes = outcomes } }
    local path = support.folder() .. "/report.html"
    assert.equal(path, report.write({ doc }, store, path))
    local html = support.read(path)
    assert.is_true(#html < BUDGET, #html)
    assert.truthy(html:find("of 14042 questions", 1, true))
    local _, shown = html:gsub('<details class="q q%-quantized">', "")
    local _, any = html:gsub('<details class="q ', "")
    assert.is_true(shown > 50 and any == math.min(any, shown) and wrong > shown, shown)
    local details, rows = support.json(path:gsub("report.html", "report_details.json")), 0
    for _, set in ipairs(details.sets) do rows = rows + #set.rows end
    assert.equal(n, rows)
    assert.same(assert(json.decode(json.encode(by_set[outcomes[3].set][5]))), details.sets[3].rows[5])
    support.cleanup()
  end)

  it("says what is not finished, and refuses two pairs of models", function()
    local doc = documents.document({ documents.sweep() }, { status = "interrupted" })
    assert.truthy(report.html({ doc }):find("Not finished.", 1, true))
    local other = documents.document({ documents.sweep() }, { run = 4, labels = { "full", "fp4" } })
    support.failed(nil, select(2, report.write({ doc, other }, {}, "never.html")), "run 3 (nf4",
      "run 4 (fp4",
      "make a report of each")
    other = documents.document({ documents.sweep() }, { run = 4 })
    other.facts.quantized.quant = { label = "nf4", bits = 4.63, block = 128 }
    support.failed(nil, select(2, report.write({ doc, other }, {}, "never.html")), "block 128")
    other = documents.document({ documents.variants() }, { run = 4, labels = { "full" } })
    other.facts.quantized = nil -- variants of the full model go with any pair of it
    assert.is_true(report.same_pair { other, doc })
    assert.truthy(report.html({ other, doc }):find("be quantized to nf4?", 1, true))
    assert.truthy(report.html({ other }):find("be quantized?", 1, true))
  end)

  it("shows a section of an unknown kind as a table", function()
    local doc = documents.document { { kind = "weather", note = "Sizes", rows = {
      { label = "top_p 0.9", overlap = { value = 0.81, low = 0.7, high = 0.9 }, size = 12 } } } }
    local html = report.html { doc }
    assert.same({ 0.81, 12 }, cells(html, "weather-1-1/1"))
  end)

  it("ranks what harms most where there are many variants", function()
    local section = documents.variants()
    for i = 7, 40 do
      local row = {}
      for key, value in pairs(section.rows[3]) do row[key] = value end
      row.label, row.kl = "only layer " .. i, { value = i / 1000, low = i / 1100, high = i / 900 }
      section.rows[i] = row
    end
    local html = report.html { documents.document { section } }
    assert.truthy(html:find('id="variants-ranking"', 1, true))
    assert.is_nil(html:find('id="variants-kl"', 1, true))
    local picture = html:find('id="variants-ranking"', 1, true)
    assert.is_true(html:find(">fp4</text>", picture,
      true) < html:find(">only layer 40</text>", picture, true))
    assert.truthy(html:find("The 24 with most of 40", 1, true))
    section.kind = "sensitivity"
    section.rows[40].saved, section.rows[40].kl_per_mib = 2 ^ 21, 0.02
    section.all = { label = "all of them", saved = 2 ^ 23, kl = { value = 0.5 }, kl_per_mib = 0.0625 }
    html = report.html { documents.document { section } }
    assert.truthy(html:find('<figure class="chart" id="sensitivity"', 1, true))
    local line = cells(html, "variants/" .. section.rows[40].label)
    assert.same({ 2 ^ 21, 0.04, 0.02 }, { table.unpack(line, 3, 5) })
    assert.same({ 2 ^ 23, 0.5, 0.0625 }, cells(html, "variants/all of them"))
  end)

  it("draws extreme sections: one batch, nothing that fits, no question, no value", function()
    local sweep = documents.sweep()
    sweep.points = { sweep.points[1] }
    assert.truthy(report.html({ documents.document { sweep } }))
    sweep = documents.sweep { oom = 1 }
    for _, p in ipairs(sweep.points) do p.seconds, p.peak, p.oom = nil, nil, "no room" end
    assert.truthy(report.html({ documents.document { sweep } }):find("OOM", 1, true))
    sweep.points = {}
    local empty = documents.outcome("mmlu_virology", answered(1, 0, 0, 0))
    empty.comparison, empty.control = nil, nil
    for _, model in ipairs(empty.models) do model.n, model.accuracy, model.wilson = 0, nil, nil end
    local metrics = documents.metrics(1)
    metrics.pair[1].value, metrics.pair[1].low = nil, nil
    metrics.control = {}
    local html = report.html { documents.document { sweep, metrics, { kind = "mmlu", outcomes = { empty } },
      { kind = "variants", task = "t", questions = 0, note = "", rows = {} } } }
    assert.is_nil(html:find "nan" or html:find "[^%a]inf[^%a]")
  end)
end)

describe("qlua report", function()
  teardown(support.cleanup)

  --- Runs the command in `folder`.
  local function command(arguments)
    local pipe = assert(io.popen(("ASAN_OPTIONS=detect_leaks=0 '%s' report %s 2>&1"):format(support.QLUA,
      arguments)))
    local output = pipe:read "a"
    return output, pipe:close() == true
  end

  local function enter(store, doc, rows_of, status)
    local run = assert(store:begin_run { name = doc.name, started = doc.started, command = "[]",
      script_sha256 = doc.script_sha256 })
    doc.run = run
    for _, section in ipairs(doc.sections) do
      for _, o in ipairs(section.outcomes or {}) do
        local list, ids = {}, {}
        for i, row in ipairs(rows_of(doc, o.set)) do list[i], ids[i] = { tostring(i),
          json.encode(row) }, tostring(i) end
        o.set = ("%064x"):format(#o.task)
        assert(store:set(o.set, "mmlu", "{}"))
        assert(store:put(run, o.set, list))
        assert(store:use(run, o.set, ids))
      end
    end
    assert(store:end_run(run, { finished = doc.finished, status = status or "finished",
      document = status ~= "none"
      and json.encode(doc) or nil }))
    return run
  end

  it("makes the page of a store's newest runs, and says what there is", function()
    local folder = support.folder()
    local output, ok = command("--output_path " .. folder)
    assert.is_false(ok)
    assert.truthy(output:find("no such store", 1, true))
    local doc, rows = documents.study(60)
    do
      local store <close> = assert(store_module.open(folder .. "/qlua.sqlite"))
      enter(store, documents.document({ documents.sweep() }, { name = "batch_sweep.lua",
        started = 1792990000 }), rows)
      enter(store, documents.document({ documents.sweep() }, { name = "jaccard.lua", labels = { "full",
        "fp4" } }), rows)
      enter(store, doc, rows)
    end
    output, ok = command("--output_path " .. folder)
    assert.is_true(ok, output)
    assert.truthy(output:find("run 1 (batch_sweep.lua)", 1, true)
      and output:find("run 3 (mmlu.lua)", 1, true))
    assert.is_nil(output:find("run 2", 1, true))
    local html = support.read(folder .. "/report.html")
    assert.truthy(html:find("Runs 1, 3", 1, true))
    assert.truthy(html:find('<details class="q q-quantized">', 1, true))
    output, ok = command(("9 --output_path %s"):format(folder))
    assert.is_false(ok)
    assert.truthy(output:find("9", 1, true) and output:find("3", 1, true))
    output, ok = command(("2 3 --output_path %s"):format(folder))
    assert.is_false(ok)
    assert.truthy(output:find("different models", 1, true))
    output, ok = command(("1 --output_path %s --output %s/one.html --margin 3"):format(folder, folder))
    assert.is_true(ok, output)
    assert.truthy(support.read(folder .. "/one.html"):find("more than 3 points", 1, true))
  end)
end)

describe("plot", function()
  local function widest(drawn)
    local most = 0
    for line in drawn:gmatch "[^\n]+" do most = math.max(most,
      text.width((line:gsub("\27%[[%d;]*m", "")))) end
    return most
  end

  it("draws bars on one scale within the columns, in ASCII too", function()
    local style = { columns = 60, unicode = true, color = false }
    local rows = { { "full", 1, 4.0, "4 s" }, { "nf4", 2, 1.0, "1 s" }, {}, { "tiny", 1, 1e-9, "0 s" },
      { "none", 2, nil, "OOM" } }
    local lines = {}
    for line in plot.bars("latency", rows, 4, style):gmatch "([^\n]*)\n" do lines[#lines + 1] = line end
    assert.equal("latency", lines[1])
    assert.near(text.width(lines[2]:match "█[█]*") / 4, text.width(lines[3]:match "▒[▒]*"), 0.5)
    assert.truthy(lines[5]:find("▏", 1, true))
    assert.equal("none" .. (" "):rep(51) .. "  OOM", lines[6])
    style.unicode = false
    assert.is_nil(plot.bars("latency", rows, 4, style):find "[\x80-\xFF]")
    style.color = true
    assert.truthy(plot.bars("latency", rows, 4, style):find("\27[38;2;213;94;0m=", 1, true))
  end)

  it("draws every section of a study in any width", function()
    local doc = documents.study(40)
    doc.sections[3].outcomes[1].task = ("漢字\27[2J"):rep(30)
    for _, columns in ipairs { 40, 60, 100 } do
      for _, section in ipairs(doc.sections) do
        for _, unicode in ipairs { true, false } do
          local drawn = plot.section(section, { columns = columns, unicode = unicode, color = false })
          assert.is_true(widest(drawn) <= columns, section.kind)
          assert.is_nil(drawn:find("\27", 1, true))
        end
      end
    end
    assert.equal("", plot.section({ kind = "perplexity" }, { columns = 80, unicode = true, color = false }))
  end)
end)

