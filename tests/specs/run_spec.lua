--- Runs that are stopped and go on, on the bundled model: what is reused, what never is, and that the result
--- is that of a run which was not stopped.

local json = require "qlua.json"
local lfs = require "lfs"
local runs = require "qlua.runs"
local support = require "tests.specs.support"
local sys = require "qlua.sys"

local DEMO <const> = "examples/models/demo"
local QUIZ <const> = "examples/data/lantern_isles_test.csv"
local KILLS <const> = tonumber(os.getenv "QLUA_KILLS") or 6

-- whole experiments, dozens of times; examples_spec.lua and the store's own tests run with sanitizers too
if os.getenv "UBSAN_OPTIONS" then
  describe("rows", function()
    it("are resumed", function() return pending "skipped: takes minutes under sanitizers" end)
  end)
  return
end

local folder

before_each(function() folder = support.folder() end)
after_each(support.cleanup)

--- Runs a command of the shell: stdout and stderr together, exit code.
local function shell(command)
  local pipe <close> = assert(io.popen("exec 2>&1; export ASAN_OPTIONS=detect_leaks=0; " .. command
    .. '; echo "rc $?"'))
  local text, code = pipe:read("a"):match "^(.*)rc (%d+)\n$"
  return text, tonumber(code)
end

--- Runs an example with its results in `folder`/out; fails where the exit code is another.
local function example(words, code)
  local text, got = shell(("'%s' examples/%s --output_path %s/out"):format(support.QLUA, words, folder))
  assert.equal(code or 0, got, text)
  return text
end

--- "240 rows reused, 0 to run" and the like in what a run said, for every set; nothing at a first run.
local function reused(text)
  local list = {}
  for all, some in text:gmatch "sqlite: [^\n]-: (%l* ?%d+) rows reused%p? ?(%d*)" do
    list[#list + 1] = all:find "^all" and "all" or ("%s of %d"):format(all, tonumber(all) + tonumber(some))
  end
  return table.concat(list, "; ")
end

--- The newest run's document.
local function document(path)
  local kept <close> = assert(runs.open(path or folder .. "/out"))
  return json.decode(assert(kept:run(kept:runs()[1].id)).document), assert(kept:runs())
end

local TIMES <const> = { seconds = true, prefill_seconds = true, decode_seconds = true, begun_seconds = true,
  prefill_tokens_per_second = true, decode_tokens_per_second = true, drift = true,
  process = true, reserved = true }

--- A copy without what a clock gave.
local function timeless(value)
  if type(value) ~= "table" then return value end
  local copy = json.is_array(value) and json.array() or {}
  for name, part in pairs(value) do
    if not TIMES[name] and not tostring(name):find "^words_per_minute" then copy[name] = timeless(part) end
  end
  return copy
end

--- What a run found and the rows it consists of, without times, as text.
local function findings(path)
  local kept <close> = assert(runs.open(path))
  local run = assert(kept:run(kept:runs()[1].id))
  assert.equal("finished", run.status)
  local doc, parts = json.decode(run.document), {}
  for _, section in ipairs(doc.sections) do
    parts[#parts + 1] = json.encode(timeless(section))
    local sets = { section.set }
    for _, outcome in ipairs(section.outcomes or {}) do sets[#sets + 1] = outcome.set end
    local of_variants = section.kind == "variants" or section.kind == "sensitivity"
    assert.is_true(#sets > 0 or of_variants, section.kind .. " names no rows")
    for _, set in ipairs(sets) do
      for _, row in ipairs(assert(kept:run_rows(run.id, set))) do
        parts[#parts + 1] = row[1] .. " " .. json.encode(timeless(json.decode(row[2])))
      end
    end
  end
  return table.concat(parts, "\n")
end

--- Fails with the place where two texts differ.
local function same(what, one, other)
  if one == other then return end
  local at = 1
  while one:byte(at) == other:byte(at) do at = at + 1 end
  error(("%s: resumed is not uninterrupted\n%s\n%s"):format(what, one:sub(at - 100, at + 100),
    other:sub(at - 100, at + 100)), 2)
end

local JACCARD <const> = "jaccard.lua --limit 6 --batch_size 2 --threads 1"

describe("rows of an earlier run", function()
  it("stand for the same inputs, and for them only", function()
    local model, quiz = folder .. "/model", folder .. "/isles_test.csv"
    assert(lfs.mkdir(model))
    for name in lfs.dir(DEMO) do
      if name:find "^[^.]" then support.write(model .. "/" .. name, support.read(DEMO .. "/" .. name)) end
    end
    support.write(quiz, support.read(QUIZ))
    local metric = support.write(folder .. "/mine.lua", [[return { name = "mine", values = {},
      add = function(self, reference) self.values[#self.values + 1] = reference:max() end,
      value = function() end }]])
    local plain = ("%s --model %s --tasks %s --metric %s"):format(JACCARD, model, quiz, metric)
    local function again(words, why)
      local text = example(words)
      assert.equal("0 of 6", reused(text), words .. "\n" .. text)
      assert.truthy(text:find(why, 1, true), ("%s: no '%s' in\n%s"):format(words, why, text))
    end
    assert.equal("", reused(example(plain)))
    assert.equal("all", reused(example(plain)))
    again(plain .. " --quant fp4", "models.2.quantization.label is fp4, was nf4")
    again(plain .. " --double-quant false", "models.2.quantization.double is false")
    again(plain .. " --block-size 128", "models.2.quantization.block is 128")
    again(plain .. " --skip layers.0", "models.2.quantization.matrices differs")
    again(plain .. " --dtype float32", "models.1.dtype is float32, was bfloat16")
    again(plain .. " --seed 2", "seed is 2")
    again(plain .. " --threads 2", "device.threads is 2, was 1")
    again(plain .. " --batch-size 3", "batch is 3")
    again(plain .. " --max-context 300", "context is 300")
    again(plain .. " --k 2", "inputs.k is [2], was [1,3,5,10,20]")
    again(plain .. " --position answer", "inputs.position is answer")
    assert.equal("all", reused(example(plain))) -- all those did not replace it
    support.write(metric, (support.read(metric):gsub("max%(%)", "sum()")))
    again(plain, "metrics.1 differs")
    support.write(quiz, (support.read(quiz):gsub("^%g+", "Whether")))
    again(plain, "data.1 differs")
    support.write(model .. "/config.json", (support.read(model .. "/config.json"):gsub("\n", "\n ", 1)))
    again(plain, "models.1.config differs")
    local tokenizer = model .. "/tokenizer_config.json"
    support.write(tokenizer, support.read(tokenizer) .. "\n")
    again(plain, "models.1.tokenizer differs")
    local weights = support.read(model .. "/model.safetensors")
    support.write(model .. "/model.safetensors", weights:sub(1, -2) .. string.char(weights:byte(-1) ~ 1))
    again(plain, "models.1.weights differs")
  end)

  it("are not those of another program, library or prompt", function()
    local binary = folder .. "/bin"
    assert(lfs.mkdir(binary))
    local library = package.searchpath("qlua.run", package.path):match "^(.*)/qlua/run%.lua$"
    os.execute(("mkdir -p %s/lib && cp -rL '%s/qlua' %s/lib/"):format(folder, library, folder))
    os.execute(("cp '%s' %s/qlua"):format(support.QLUA, binary))
    local function own(words)
      local command = "LUA_PATH='F/lib/?.lua;F/lib/?/init.lua;;' F/bin/qlua examples/%s --output_path F/out"
      local text, code = shell((command:format(words):gsub("F/", folder .. "/")))
      assert.equal(0, code, text)
      return text
    end
    own(JACCARD)
    assert.equal("all", reused(own(JACCARD)))
    support.write(binary .. "/qlua", support.read(binary .. "/qlua") .. "\n")
    local text = own(JACCARD)
    assert.truthy(text:find("0 rows reused, 6 to run, because engine.program differs", 1, true), text)
    local path = folder .. "/lib/qlua/evaluate.lua"
    support.write(path, support.read(path) .. "\n-- other\n")
    text = own(JACCARD)
    assert.truthy(text:find("engine.library differs", 1, true), text)
    path = folder .. "/lib/qlua/results.lua"
    support.write(path, support.read(path) .. "\n-- other\n") -- shows results and computes none
    assert.equal("all", reused(own(JACCARD)))

    local mmlu = "mmlu.lua --mode loglikelihood --limit 4 --threads 1"
    example(mmlu)
    assert.equal("all", reused(example(mmlu)))
    assert.equal("0 of 4", reused(example(mmlu .. " --apply_chat_template")))
    assert.equal("0 of 4", reused(example(mmlu .. " --control false")))
    local boxed = "mmlu.lua --mode boxed --limit 4 --threads 1"
    example(boxed)
    assert.equal("all", reused(example(boxed)))
    assert.equal("0 of 4", reused(example(boxed .. " --temperature 0.5")))
    assert.equal("0 of 4", reused(example(boxed .. " --max_gen_toks 3")))
  end)

  it("stay those of a script whose text has changed, and of more questions", function()
    example(JACCARD)
    local changed = support.read("examples/jaccard.lua"):gsub("\n%-%-%- Every", "\n--- Each and every")
    local script = support.write(folder .. "/jaccard.lua", changed .. "\n-- the end\n")
    local text, code = shell(("'%s' %s --model %s --tasks %s --limit 10 --batch_size 2 --threads 1 "
      .. "--output_path %s/out"):format(support.QLUA, script, DEMO, QUIZ, folder))
    assert.equal(0, code, text)
    assert.equal("6 of 10", reused(text), text)
    assert.truthy(text:find("because run 1 had other elements", 1, true), text)
    text = example(JACCARD)
    assert.equal("all", reused(text), text)
    local _, list = document()
    local kept <close> = assert(runs.open(folder .. "/out"))
    assert.not_equal(assert(kept:run(list[1].id)).script_sha256, assert(kept:run(list[2].id)).script_sha256)
  end)

  it("are computed anew by --fresh, and where a metric has to see every question", function()
    example(JACCARD)
    local text = example(JACCARD .. " --fresh")
    assert.truthy(text:find("0 rows reused, 6 to run, because of --fresh", 1, true), text)
    local metric = support.write(folder .. "/total.lua", [[
      local total = 0
      return { name = "total", add = function(_, reference) total = total + reference:max() end,
        value = function() return total end }]])
    local words = ("%s --metric %s"):format(JACCARD, metric)
    example(words)
    text = example(words)
    assert.truthy(text:find("because the metric 'total' keeps no values by question", 1, true), text)
    assert.equal(6, document().rows.ran)
  end)
end)

describe("--no_output and --dry-run", function()
  it("write nothing", function()
    for _, words in ipairs { "--no_output", "--dry-run" } do
      local text, code = shell(("cd %s && '%s' '%s/examples/jaccard.lua' --limit 2 %s"):format(folder,
        support.QLUA, lfs.currentdir(), words))
      assert.equal(0, code, text)
      for name in lfs.dir(folder) do assert.truthy(name == "." or name == "..", name) end
    end
  end)
end)

describe("an experiment that is killed", function()
  local CASES <const> = {
    "jaccard.lua --limit 160 --batch_size 2", "mmlu.lua --limit 40 --batch_size 2",
    "codebook.lua --limit 40 --batch_size 4", "nucleus.lua --limit 160 --batch_size 2",
    "sensitivity.lua --by kind --limit 20",
    ("perplexity.lua --context 128 --text README.md --model %s"):format(DEMO),
  }

  --- Starts an example and kills it with SIGKILL after `seconds`; whether it had ended by itself.
  local function kill(words, seconds)
    local _, code = shell(("timeout -s KILL %.3f '%s' examples/%s --output_path %s/killed >/dev/null"):format(
      seconds, support.QLUA, words, folder))
    return code == 0
  end

  it("goes on where it was, and finds what it would have found", function()
    math.randomseed(7)
    local killed, progress = 0, 0
    for i, words in ipairs(CASES) do
      words = words .. " --threads 1"
      os.execute(("rm -rf %s/out %s/killed"):format(folder, folder))
      local begin = sys.time()
      example(words)
      local whole = sys.time() - begin
      local function compare()
        same(words, findings(folder .. "/out"), findings(folder .. "/killed"))
        local doc, list = document(folder .. "/killed")
        progress = progress + doc.rows.reused
        -- finished: killed while it wrote its files
        for r = 2, #list do assert.truthy(list[r].status == "killed" or list[r].status == "finished") end
        os.execute(("rm -rf %s/killed"):format(folder))
      end
      local most = killed + math.max(1, KILLS // #CASES + (i <= KILLS % #CASES and 1 or 0))
      while killed < most do
        if kill(words, whole * (0.2 + 0.6 * math.random())) then compare() else killed = killed + 1 end
      end
      local text, code = shell(("'%s' examples/%s --output_path %s/killed"):format(support.QLUA, words,
        folder))
      assert.equal(0, code, text)
      compare()
    end
    assert.is_true(killed > 0 and progress > 0, ("%d kills, %d rows reused"):format(killed, progress))
  end)

  it("loses nothing at Ctrl-C either, nor where its script fails", function()
    local metric = support.write(folder .. "/stop.lua", [[
      local stop = { name = "stop", values = {} }
      function stop:add()
        self.values[#self.values + 1] = 1
        local flag = #self.values == 10 and io.open(os.getenv "FLAG")
        if flag then
          local how = flag:read "a"
          if how == "fail" then error "on purpose" end
          io.popen("kill -INT " .. require("qlua.sys").pid()):close()
        end
      end
      function stop:value() return #self.values end
      return stop]])
    local words = ("jaccard.lua --limit 20 --batch_size 2 --threads 1 --metric %s"):format(metric)
    local function run(flag, where)
      local path = folder .. "/flag"
      if flag then support.write(path, flag) else os.remove(path) end
      return shell(("FLAG=%s '%s' examples/%s --output_path %s/%s"):format(path, support.QLUA, words, folder,
        where))
    end
    for flag, expected in pairs { stop = { 130, "interrupted", "was interrupted" },
      fail = { 1, "failed", "failed" } } do
      local text, code = run(flag, flag)
      assert.equal(expected[1], code, text)
      local _, list = document(folder .. "/" .. flag)
      assert.equal(expected[2], list[1].status)
      text, code = run(nil, flag)
      assert.equal(0, code, text)
      assert.equal("8 of 20", reused(text), text)
      assert.truthy(text:find("because run 1 " .. expected[3], 1, true), text)
      run(nil, "whole")
      same(flag, findings(folder .. "/whole"), findings(folder .. "/" .. flag))
    end
  end)
end)

describe("two processes on one store", function()
  it("are told of each other, and both finish", function()
    local words = "mmlu.lua --mode loglikelihood --limit 60 --batch_size 1 --threads 1"
    local one = ("'%s' examples/%s --output_path %s/out"):format(support.QLUA, words, folder)
    local text, code = shell(("{ %s >%s/first 2>&1 & } ; sleep 0.6; %s; wait $!"):format(one, folder, one))
    assert.equal(0, code, text .. support.read(folder .. "/first"))
    local both = text .. support.read(folder .. "/first")
    assert.truthy(both:find "process %d+ is computing the same rows %(run %d%); both go on", both)
    local doc, list = document()
    assert.equal(2, #list)
    for _, run in ipairs(list) do assert.equal("finished", run.status) end
    assert.equal(60, doc.sections[1].outcomes[1].models[1].n)
  end)
end)

describe("run:map", function()
  --- Runs a user's own script, which says what it computed; stdout and stderr.
  local function own(body, words)
    local script = support.write(folder .. "/own.lua", ([[
      local cli = require "qlua.cli"
      local experiment = require "qlua.experiment"
      local opts = cli.parse { name = "own.lua", summary = "x", options = experiment.options { { "power",
        kind = "number", default = 2 } } }
      opts.model, opts.threads = %q, 1
      local run <close> = experiment.open("own.lua", opts, { twin = false })
      local ran = {}
      %s
      print("ran", table.concat(ran, " "))
      run:finish()]]):format(DEMO, body))
    local text, code = shell(("'%s' %s --output_path %s/out %s"):format(support.QLUA, script, folder,
      words or ""))
    assert.equal(0, code, text)
    return text:match "ran\t([^\n]*)", text
  end

  local BODY <const> = [[
    local values = run:map("powers", { 1, 2, 3, 4, 5 }, { batch = 2 }, function(list)
      local made = {}
      for i, x in ipairs(list) do
        ran[#ran + 1] = x
        made[i] = { x ^ opts.power }
      end
      return made
    end)
    for i, value in ipairs(values) do assert(value[1] == i ^ opts.power) end]]

  it("makes a user's own experiment resumable; a flag, the list and the code count", function()
    assert.equal("1 2 3 4 5", (own(BODY)))
    assert.equal("", (own(BODY)))
    assert.equal("1 2 3 4 5", (own(BODY, "--power 3")))
    assert.equal("", (own(BODY .. "\n -- a comment")))
    local other = BODY:gsub("3, 4, 5 }, {", "3.5, 4, 5 }, {"):gsub("for i, value.*$", "")
    assert.equal("3.5 4", (own(other)))
    other = BODY:gsub("x %^ opts.power }", "x ^ opts.power + 0 }")
    assert.equal("1 2 3 4 5", (own(other)))
  end)

  --- Runs BODY, whose function also adds `term`, which stands among what `before` has defined.
  local function with(before, term)
    local body = BODY:gsub("x %^ opts.power", "x ^ opts.power + 0 * " .. term):gsub("for i, value.*$", "")
    local text = own(before .. "\n" .. body)
    return text
  end

  it("computes anew what refers to something else, however it does", function()
    local module = folder .. "/far.lua"
    support.write(module, "return { sign = 1 }")
    for _, case in ipairs {
      { "local n = 1", "local n = 2", "n" },
      { "local t = { 1, { 2, a = 3 } }", "local t = { 1, { 2, a = 4 } }", "t[2].a" },
      { "local M = {} function M.f() return 1 end", "local M = {} function M.f() return 2 end", "M.f()" },
      { "function f() return 1 end", "function f() return 2 end", "f()" },
      { "local C = {} C.__index = C function C:f() return 1 end local c = setmetatable({}, C)",
        "local C = {} C.__index = C function C:f() return 2 end local c = setmetatable({}, C)", "c:f()" },
      { "local f = math.sin", "local f = math.cos", "f(1)" },
      { "local t = qlua.tensor { 1, 2 }", "local t = qlua.tensor { 1, 3 }", "t:size(1)" },
      { "local m = run.full:quantize { block = 32 }", "local m = run.full:quantize { block = 64 }",
        "#m:matrices()" },
      { "local b = {} for i = 1, 16 do b[i] = i end local m = run.full:quantize { codebook = b } b = nil",
        "local b = {} for i = 1, 16 do b[i] = -i end local m = run.full:quantize { codebook = b } b = nil",
        "#m:matrices()" },
      { "local m = run.full", "local m = run.full:quantize()", "#m:matrices()" },
    } do
      local first, other, term = "local qlua = require 'qlua' " .. case[1], "local qlua = require 'qlua' "
        .. case[2], case[3]
      os.execute(("rm -rf %s/out"):format(folder))
      assert.equal("1 2 3 4 5", with(first, term))
      assert.equal("", with("-- a comment\n\n" .. first, term), case[1])
      assert.equal("1 2 3 4 5", with(other, term), case[2])
      assert.equal("", with(first, term), case[1])
    end
    local far = "local far = require 'far'"
    assert.equal("1 2 3 4 5", with(far, "far.sign"))
    assert.equal("", with(far, "far.sign"))
    support.write(module, "return { sign = 2 }")
    assert.equal("1 2 3 4 5", with(far, "far.sign"))
  end)

  it("tells twins of one script apart, and elements that are long and alike", function()
    local text = own [[
      for _, block in ipairs { 32, 64 } do
        local twin <close> = run.full:quantize { block = block }
        run:map("blocks", { 1 }, {}, function()
          ran[#ran + 1] = twin:info().quant.block
          return { 1 }
        end)
      end]]
    assert.equal("32 64", text)
    for _, last in ipairs { "a", "b" } do
      local long = ("x"):rep(61) .. last -- as JSON it has the length of a digest
      text = own(("run:map('long', { %q }, {}, function(list) ran[1] = list[1]:sub(-1) return { 1 } end)")
        :format(long))
      assert.equal(last, text)
    end
  end)

  it("is computed again after twenty other runs only where it has to be, and says so", function()
    local list = "run:map('many', { %s }, {}, function(l) ran[#ran + 1] = l[1] return { 1 } end)"
    assert.equal("1", (own(list:format "1")))
    for i = 1, 21 do own(("run:map('other', { %d }, {}, function() return { 1 } end)"):format(i)) end
    local ran, text = own(list:format "1, 2")
    assert.equal("2", ran)
    assert.truthy(text:find("many: 1 rows reused, 1 to run, because run 1 had other elements", 1, true), text)
  end)

  it("says what is wrong with how it is called", function()
    local _, text = own [[
      for _, words in ipairs { { "a", { 1 }, print }, { "a", { 1 }, { batch = 0 }, print }, { nil, { 1 }, nil,
        print }, { "a", { print }, nil, print }, { "b", { 1 }, { id = function() end }, print } } do
        print(select(2, pcall(run.map, run, table.unpack(words, 1, 4))))
      end]]
    assert.equal(2, select(2, text:gsub("run:map takes a name, a list, options or nil, and a function", "")))
    assert.truthy(text:find("a batch is a whole number of at least 1", 1, true), text)
    for _, words in ipairs { "a: what tells element 1 from others (its `id`, or it as JSON): cannot",
      "b: what tells element 1 from others (its `id`, or it as JSON): no text" } do
      assert.truthy(text:find(words, 1, true), text)
    end
  end)

  it("says what is wrong with what fn returns", function()
    local function fails(result, ...)
      local text, code = shell(("'%s' %s"):format(support.QLUA, support.write(folder .. "/bad.lua", ([[
        local experiment = require "qlua.experiment"
        local run <close> = experiment.open("bad.lua", { model = %q, seed = 1, device = "cpu", dtype = "auto",
          output_path = %q }, { twin = false })
        run:map("bad", { 1, 2 }, { batch = 2 }, function() return %s end)]]):format(DEMO, folder .. "/bad",
        result))))
      assert.equal(1, code, text)
      for _, words in ipairs { ... } do assert.truthy(text:find(words, 1, true), text) end
    end
    fails("{ 1 }", "bad: of 2 elements came 1 values, not one for each")
    fails("7", "bad: of 2 elements came no values")
    fails("{ 1, 0 / 0 }", "bad: the value of element 2")
    fails("{ 1, print }", "bad: the value of element 2")
    local _, list = document(folder .. "/bad")
    assert.equal(4, #list)
    for _, run in ipairs(list) do assert.equal("failed", run.status) end
  end)
end)
