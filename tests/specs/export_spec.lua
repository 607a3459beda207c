-- Result files, from a run's document and the rows of its store.

local data = require "qlua.data"
local document = require "qlua.document"
local export = require "qlua.export"
local files = require "qlua.files"
local json = require "qlua.json"
local lfs = require "lfs"
local support = require "tests.specs.support"
local sys = require "qlua.sys"
local tasks = require "qlua.tasks"

local GOLDEN <const> = "tests/golden/lm_eval/"
local STARTED <const> = 1721995200.25

local function names_in(path)
  local names = {}
  for name in lfs.dir(path) do
    if name ~= "." and name ~= ".." then names[#names + 1] = name end
  end
  table.sort(names)
  return names
end

after_each(support.cleanup)

describe("files.write", function()
  it("makes folders, replaces a file whole and leaves nothing else behind", function()
    local folder = support.folder()
    local path = folder .. "/a/b/x.json"
    assert(files.write(path, "one"))
    assert(files.write(path, "two\0\n"))
    assert.equal("two\0\n", support.read(path))
    assert.same({ "x.json" }, names_in(folder .. "/a/b"))
  end)

  it("names what it cannot write, and leaves no partial file", function()
    local folder = support.folder()
    assert(files.write(folder .. "/file", "x"))
    local ok, err = files.write(folder .. "/file/x.json", "x")
    assert.equal("io", support.failed(ok, err, folder .. "/file").code)
    assert(lfs.mkdir(folder .. "/taken"))
    ok, err = files.write(folder .. "/taken", "x")
    support.failed(ok, err, "taken")
    assert.same({ "file", "taken" }, names_in(folder))
  end)
end)

describe("a file that does not fit", function()
  it("leaves what was there before, and no part of itself", function()
    local folder = support.folder()
    local script = support.write(folder .. "/write.lua", [[
      print(require("qlua.files").write(arg[1], ("x"):rep(100000)))]])
    local path = support.write(folder .. "/kept.json", "as before")
    -- the limit on a file's size stands for a disk that is full: write(2) fails in the middle of the text
    local pipe <close> = assert(io.popen(("trap '' XFSZ; ulimit -f 8; '%s' '%s' '%s' 2>&1"):format(
      support.QLUA, script, path)))
    local said = pipe:read "a"
    assert.truthy(said:find("^nil%s"), said)
    for _, words in ipairs { path .. ": cannot write (", "100000 bytes", "what was there before" } do
      assert.truthy(said:find(words, 1, true), said)
    end
    assert.equal("as before", support.read(path))
    assert.same({ "kept.json", "write.lua" }, names_in(folder))
  end)
end)

--- Two models that answered the golden quiz as lm-eval's did; the second is wrong where the first was right.
local function quiz()
  local golden = support.json(GOLDEN .. "farm_life.json")
  local items = assert(data.read(GOLDEN .. "farm_life_test.csv"))
  local task = tasks.mmlu { subject = items.subject }
  local prepared, evaluations, rows = {}, {}, {}
  for m = 1, 2 do
    evaluations[m] = { results = {}, seconds = 1.5, prompt_tokens = 900, shared_tokens = 0,
      prefill_seconds = 1.0, decode_seconds = 0, decode_tokens = 0, words = 0 }
  end
  for i, row in ipairs(golden.rows) do
    local item = items[i]
    prepared[i] = { item = item, index = i, prompt = task:prompt(item) }
    local answers = { tasks.argmax(row.loglik), item.answer % 4 + 1 }
    rows[i] = { index = i, prompt = prepared[i].prompt, prompt_sha256 = sys.sha256(prepared[i].prompt),
      doc = { question = item.question, choices = item.choices, answer = item.answer }, models = {} }
    for m = 1, 2 do
      local r = { scores = row.loglik, greedy = row.greedy, answer = answers[m],
        correct = answers[m] == item.answer, kernels = { "matmul_" .. i % 2, "attention" } }
      rows[i].models[m] = r
      evaluations[m].results[i] = setmetatable({ prepared = prepared[i] }, { __index = r })
    end
  end
  return { task = task, items = items, prepared = prepared, evaluations = evaluations, set = "key" }, rows
end

--- A run with these sections, and a store that holds its rows under the key "key".
local function finished(options, make, rows)
  local run = { labels = { "full", "nf4" }, context = 512, opts = options, items = { subject = "s",
    path = "s_test.csv" } }
  options.model, options.seed, options.protocol = "models/stories260K", 1, "sound"
  local info = { dtype = "float32", kv_dtype = "float32", quant = { label = "none" }, params = 260032,
    device = "cpu", architecture = "LlamaForCausalLM", layers = 5, bytes = 1040128 }
  local doc = { format = 1, run = 3, name = "mmlu.lua", started = STARTED, options = options,
    labels = run.labels, facts = { qlua_version = "0.1", seed = 1, numerics = "fast", full = info,
      quantized = info, device = { name = "cpu", hardware = "a, \"CPU\"", threads = 2 } },
    sections = json.array { make(run) } }
  local store = { path = function() return "qlua.sqlite" end }
  function store.run_rows(_, number, key)
    assert(number == 3 and key == "key")
    local list = {}
    for i, row in ipairs(rows or {}) do list[i] = { tostring(i), json.encode(row) } end
    return list
  end
  return doc, store
end

local function mmlu_run(options)
  local outcome, rows = quiz()
  return finished(options, function(run) return document.mmlu(run, { outcome }) end, rows)
end

describe("export.stamp", function()
  it("is lm-eval's, in UTC and to the microsecond", function()
    assert.equal("2024-07-26T12-00-00.250000", export.stamp(STARTED))
    assert.equal("2024-07-26T12-00-00.000000", export.stamp(1721995200))
    assert.equal("2024-07-26T12-00-00.999999", export.stamp(1721995200.999999))
  end)
end)

describe("lm-eval's files", function()
  local function exported()
    local folder = support.folder()
    local doc, store = mmlu_run { log_samples = true, batch_size = 8 }
    return folder, assert(export.write(doc, store, folder, doc.options)), doc
  end

  it("are one results file and one samples file a model, and the document", function()
    local folder, paths = exported()
    assert.same({
      folder .. "/stories260K__full/results_2024-07-26T12-00-00.250000.json",
      folder .. "/stories260K__full/samples_mmlu_farm_life_2024-07-26T12-00-00.250000.jsonl",
      folder .. "/stories260K__nf4/results_2024-07-26T12-00-00.250000.json",
      folder .. "/stories260K__nf4/samples_mmlu_farm_life_2024-07-26T12-00-00.250000.jsonl",
      folder .. "/comparison_2024-07-26T12-00-00.250000.json",
    }, paths)
  end)

  it("hold lm-eval's own samples, hashes included", function()
    local _, paths = exported()
    local lines, n = {}, 0
    for line in support.read(paths[2]):gmatch("[^\n]+") do lines[#lines + 1] = assert(json.decode(line)) end
    assert.equal(7, #lines)
    for line in support.read(GOLDEN .. "samples_example.jsonl"):gmatch("[^\n]+") do
      n = n + 1
      local expected, got = assert(json.decode(line)), lines[n]
      for key, value in pairs(expected) do assert.same(value, got[key], key) end
      assert.equal("fast", got.numerics)
      assert.same({ "matmul_" .. n % 2, "attention" }, got.kernels)
      got.numerics, got.kernels = nil, nil -- lm-eval has no such fields, and all others are its own
      for key in pairs(got) do assert.is_not_nil(expected[key], key) end
    end
    assert.is_true(n > 0)
    for line in support.read(paths[4]):gmatch("[^\n]+") do
      assert.equal(0.0, assert(json.decode(line)).acc)
    end
  end)

  it("hold lm-eval's fields of results, and no other where it would print them", function()
    local _, paths = exported()
    local got, expected = support.json(paths[1]), support.json(GOLDEN .. "results_example.json")
    for _, key in ipairs { "n-shot", "n-samples", "higher_is_better", "versions", "group_subtasks" } do
      assert.same(expected[key], got[key], key)
    end
    for key, value in pairs(expected.results.mmlu_farm_life) do
      local ours = got.results.mmlu_farm_life[key]
      if math.type(value) == "float" then
        assert.is_true(math.abs(value - ours) < 1e-12, key)
      else
        assert.same(value, ours, key)
      end
    end
    for key in pairs(got.results.mmlu_farm_life) do
      assert.is_not_nil(expected.results.mmlu_farm_life[key], key)
    end
    for _, key in ipairs {
      "model", "model_args", "batch_size", "device", "limit", "model_dtype", "random_seed",
    } do
      assert.is_not_nil(got.config[key], key)
    end
    assert.equal("fast", got.config.numerics)
    assert.same({ "attention", "matmul_0", "matmul_1" }, got.qlua.tasks.mmlu_farm_life.kernels)
    assert.equal(900.0, got.qlua.tasks.mmlu_farm_life.prefill_tokens_per_second)
    assert.equal(STARTED, got.date)
    assert.is_not_nil(got.git_hash)
  end)

  it("say what a written answer was", function()
    local outcome, rows = quiz()
    outcome.task = tasks.boxed { subject = "farm_life" }
    outcome.generation = { temperature = 0, max_new_tokens = 16 }
    for i, row in ipairs(rows) do
      for m = 1, 2 do
        local r = row.models[m]
        r.scores, r.greedy, r.text, r.words, r.stop = nil, nil, "[[B]] \n", 1, "eos"
        r.answer = i > 1 and 2 or nil
      end
    end
    local doc, store = finished({ log_samples = true }, function(run)
      return document.mmlu(run, { outcome })
    end, rows)
    local paths = assert(export.write(doc, store, support.folder(), doc.options))
    local lines = {}
    for line in support.read(paths[2]):gmatch("[^\n]+") do lines[#lines + 1] = assert(json.decode(line)) end
    assert.equal("[invalid]", lines[1].filtered_resps[1])
    assert.equal("B", lines[2].filtered_resps[1])
    assert.equal("[[B]] \n", lines[2].resps[1][1])
    assert.equal(16, lines[2].arguments.gen_args_0.arg_1.max_new_tokens)
    assert.equal("generate_until", support.json(paths[1]).configs.mmlu_farm_life_boxed.output_type)
    assert.equal(1, support.json(paths[1]).qlua.tasks.mmlu_farm_life_boxed.unparsed)
  end)
end)

describe("an export", function()
  it("of the same run again has the same names, and one of a run a microsecond later others", function()
    local folder, doc, store = support.folder(), mmlu_run {}
    local first = assert(export.write(doc, store, folder))
    assert.same(first, (assert(export.write(doc, store, folder))))
    doc.started = STARTED + 1e-6
    for i, path in ipairs(assert(export.write(doc, store, folder))) do
      assert.are_not.equal(first[i], path)
    end
  end)

  it("holds the document, to the last digit", function()
    local doc, store = mmlu_run {}
    local paths = assert(export.write(doc, store, support.folder()))
    local text = json.encode(doc)
    assert.equal(text, json.encode(support.json(paths[#paths])))
  end)

  it("of samples needs their rows", function()
    local doc = mmlu_run {}
    local ok, err = export.write(doc, nil, support.folder(), { log_samples = true })
    support.failed(ok, err, "mmlu.lua", "samples")
  end)

  it("that fails says what is kept, and has no partial file", function()
    local folder = support.folder()
    local doc, store = mmlu_run {}
    local comparison = folder .. "/comparison_2024-07-26T12-00-00.250000.json"
    assert(lfs.mkdir(comparison))
    local ok, err = export.write(doc, store, folder)
    support.failed(ok, err, comparison, "cannot write", "stories260K__nf4/results_", "qlua.sqlite")
    assert.same({ "comparison_2024-07-26T12-00-00.250000.json", "stories260K__full", "stories260K__nf4" },
      names_in(folder))
  end)
end)

describe("an export of metrics", function()
  local rows <const> = { { index = 2, question = "Which, \"where\"?", values = { kl = 0.1 },
    control = { kl = 0.0 } } }

  local function exported(options)
    local doc, store = finished(options, function(run)
      return document.metrics(run, { task = "s", questions = 3, too_long = 1, rows = rows, set = "key",
        pair = { { name = "kl", value = 0.1, low = 0.05, high = 0.2, n = 1, values = { 0.1 } },
          { name = "silent", n = 0, values = {} } },
        control = { { name = "kl", value = 0.0, n = 1, values = { 0.0 } } } })
    end, rows)
    doc.name = "jaccard.lua"
    return assert(export.write(doc, store, support.folder(), options))
  end

  it("is the document, and a line a question", function()
    local paths = exported { log_samples = true }
    assert.equal(2, #paths)
    assert.truthy(paths[1]:find("/jaccard_samples_2024-07-26T12-00-00.250000.jsonl", 1, true))
    assert.same({ doc_id = 1, question = "Which, \"where\"?", values = { kl = 0.1 }, control = { kl = 0.0 } },
      support.json(paths[1]))
    assert.same({ 0.1 }, support.json(paths[2]).sections[1].pair[1].values)
  end)

  it("is a table for spreadsheets", function()
    local paths = exported { output_format = { "csv" } }
    assert.truthy(paths[1]:find("/jaccard_metrics_2024-07-26T12-00-00.250000.csv", 1, true))
    local lines = {}
    for line in support.read(paths[1]):gmatch("(.-)\r\n") do lines[#lines + 1] = line end
    assert.equal(4, #lines)
    assert.truthy(lines[1]:find("^name,arm,value,low,high,n,"))
    assert.truthy(lines[2]:find("^kl,full v nf4,0.1,0.05,0.2,1,"))
    assert.truthy(lines[3]:find("^silent,full v nf4,,,,0,"))
    assert.truthy(lines[4]:find("^kl,full v full,0.0,,,1,"))
  end)
end)
