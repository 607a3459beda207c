-- The bundled experiments as a user runs them: --help, real runs, bad input, files.

local json = require "qlua.json"
local lfs = require "lfs"

local QLUA <const> = arg and arg[-1] or "build/qlua"
local SCRIPTS <const> = { "batch_sweep", "codebook", "custom_metric", "jaccard", "mixed_precision", "mmlu",
  "nucleus", "sensitivity" }

local folder

local function quote(text) return "'" .. text:gsub("'", "'\\''") .. "'" end

--- Runs an example; returns stdout, stderr and the exit code. Without --output_path it writes nothing.
local function run(script, ...)
  local words = { quote(os.getenv "QLUA" or QLUA), quote(("examples/%s.lua"):format(script)) }
  local given = false
  for _, word in ipairs { ... } do
    words[#words + 1] = quote(word)
    given = given or word == "--output_path"
  end
  if not given then words[#words + 1] = "--no_output" end
  local out, err = folder .. "/stdout", folder .. "/stderr"
  local _, _, code = os.execute(("%s >%s 2>%s </dev/null"):format(table.concat(words, " "), out, err))
  local function text(path)
    local file <close> = assert(io.open(path))
    return file:read "a"
  end
  return text(out), text(err), code
end

local function write(name, text)
  local path = folder .. "/" .. name
  local file <close> = assert(io.open(path, "wb"))
  file:write(text)
  return path
end

--- All files below a folder, but the store's.
local function files(path, list)
  list = list or {}
  for name in lfs.dir(path) do
    if name ~= "." and name ~= ".." and not name:find "^qlua%.sqlite" then
      local full = path .. "/" .. name
      if lfs.attributes(full, "mode") == "directory" then files(full, list) else list[#list + 1] = full end
    end
  end
  table.sort(list)
  return list
end

local function remove(path)
  if lfs.attributes(path, "mode") == "directory" then
    for name in lfs.dir(path) do
      if name ~= "." and name ~= ".." then remove(path .. "/" .. name) end
    end
    lfs.rmdir(path)
  else
    os.remove(path)
  end
end

before_each(function()
  folder = os.tmpname()
  os.remove(folder)
  assert(lfs.mkdir(folder))
end)

after_each(function() remove(folder) end)

describe("every example", function()
  for _, script in ipairs(SCRIPTS) do
    it(script .. " explains itself with --help", function()
      local out, err, code = run(script, "--help")
      assert.equal(0, code)
      assert.equal("", err)
      assert.truthy(out:find("Usage: " .. script, 1, true))
      assert.truthy(out:find("--model", 1, true))
      for text in out:gmatch "[^\n]+" do assert.is_true(utf8.len(text) <= 110, text) end
    end)

    it(script .. " refuses an unknown flag and guesses what was meant", function()
      local out, err, code = run(script, "--modle", "x")
      assert.equal(1, code)
      assert.equal("", out)
      assert.truthy(err:find("--modle", 1, true) and err:find("--model", 1, true), err)
      assert.equal(1, select(2, err:gsub("\n", "\n")), err)
    end)

    it(script .. " runs on the bundled model and leaves JSON", function()
      local extra = script == "batch_sweep" and { "--batch_sizes", "1,2", "--runs", "2" } or {}
      local out, err, code = run(script, "--limit", "6", "--output_path", folder .. "/results",
        table.unpack(extra))
      assert.equal(0, code, err)
      assert.truthy(out:find("resident", 1, true))
      local found = files(folder .. "/results")
      assert.is_true(#found > 0)
      local documents = 0
      for _, path in ipairs(found) do
        local file <close> = assert(io.open(path))
        if path:find "%.json$" then
          assert.truthy(assert(json.decode(file:read "a")).sections or path:find "__")
          documents = documents + 1
        end
      end
      assert.is_true(documents > 0)
    end)
  end
end)

describe("bad input", function()
  --- One line on stderr that names everything in `words`, exit code 1, nothing printed, no file left.
  local function refused(words, script, ...)
    local out, err, code = run(script, "--output_path", folder .. "/results", ...)
    assert.equal(1, code, err)
    assert.equal("", out)
    assert.equal(1, select(2, err:gsub("\n", "\n")), err)
    for _, word in ipairs(words) do assert.truthy(err:find(word, 1, true),
      err .. " (wanted: " .. word .. ")") end
    assert.is_nil(lfs.attributes(folder .. "/results"))
  end

  it("a missing model", function() refused({ "no/such/model" }, "mmlu", "--model", "./no/such/model") end)

  it("a folder without a tokenizer", function()
    refused({ "tokenizer.json" }, "jaccard", "--model", "tests/golden/models/llama3_bf16")
  end)

  it("a question file that is not there", function()
    refused({ "nothing.csv" }, "jaccard", "--tasks", folder .. "/nothing.csv")
  end)

  it("a row with a field too few, by its line", function()
    local path = write("bad_test.csv", "Which?,a,b,c,d,A\n\"two\nlines\",a,b,c,d,B\nWhich?,a,b,c,A\n")
    refused({ "bad_test.csv:4", "5 fields" }, "mmlu", "--tasks", path)
  end)

  it("an answer outside A to D", function()
    refused({ "bad_test.csv:1", "E" }, "mmlu", "--tasks", write("bad_test.csv", "Which?,a,b,c,d,E\n"))
  end)

  it("k and batch out of range", function()
    refused({ "--k", "0" }, "jaccard", "--k", "1,0")
    refused({ "--k", "999999", "vocabulary" }, "jaccard", "--k", "999999")
    refused({ "--batch_size", "0" }, "jaccard", "--batch_size", "0")
    refused({ "--batch_sizes", "-3" }, "batch_sweep", "--batch_sizes", "1,-3")
    refused({ "--block_size", "power of two" }, "jaccard", "--block_size", "48")
  end)

  it("a metric that breaks the contract, by its field", function()
    refused({ "bad.lua", "add" }, "jaccard", "--metric", write("bad.lua",
      "return { name = 'x', value = print }"))
  end)

  it("a metric that fails, by its name", function()
    local path = write("bad.lua", [[return { name = "broken", value = function() return 0 end,
      add = function() error "on purpose" end }]])
    local _, err, code = run("jaccard", "--limit", "3", "--metric", path)
    assert.equal(1, code)
    assert.truthy(err:find("broken", 1, true) and err:find("on purpose", 1, true), err)
  end)

  it("a code book that is none", function()
    for _, text in ipairs { "return 1", "return {1, 2}", "error 'x'",
      "local t = {} for i = 1, 16 do t[i] = 0 end return t",
      "local t = {} for i = 1, 16 do t[i] = 'x' end return t",
        "local t = {} for i = 1, 16 do t[i] = 0/0 end return t" } do
      refused({ "book.lua", "16 finite numbers" }, "codebook", "--codebook", write("book.lua", text))
    end
  end)

  it("modules to skip that are none, or all", function()
    for _, script in ipairs { "jaccard", "sensitivity", "mixed_precision", "codebook" } do
      refused({ "--skip", "nothing", "no module" }, script, "--skip", "nothing")
      refused({ "--skip", "no matrix" }, script, "--skip", "layers,lm_head")
    end
  end)

  it("a quantized checkpoint where the script quantizes, and few-shot examples that are not there", function()
    refused({ "--quantized", "by itself" }, "sensitivity", "--quantized", "examples/models/demo")
    refused({ "lantern_isles_dev.csv", "--num_fewshot" }, "mmlu", "--num_fewshot", "2")
  end)

  it("a device that is not there", function() refused({ "cuda:99" }, "jaccard", "--device", "cuda:99") end)

  it("results that cannot be written", function()
    local path = write("occupied", "a file")
    local _, err, code = run("jaccard", "--limit", "3", "--output_path", path)
    assert.equal(1, code)
    assert.truthy(err:find("occupied", 1, true), err)
    assert.same({ path, folder .. "/stderr", folder .. "/stdout" }, files(folder))
  end)
end)

describe("no question that fits", function()
  it("ends the script with one line, or leaves the table empty", function()
    for _, script in ipairs(SCRIPTS) do
      local out, err, code = run(script, "--limit", "3", "--max_context", "4", "--output_path",
        folder .. "/results")
      if script == "mmlu" then
        assert.equal(0, code, err)
        assert.truthy(out:find("3 questions, 0 scored, 3 longer than the 4-token context", 1, true), out)
      else
        assert.equal(1, code, err)
        assert.equal(script .. ".lua: nothing to score: of 3 questions 3 are longer than 4 tokens\n", err)
      end
    end
  end)
end)

describe("Ctrl-C", function()
  it("keeps and shows what is finished, whole files, and ends with 130", function()
    -- A metric that presses Ctrl-C at the tenth question: the same moment on every machine.
    local metric = write("stop.lua", [[
      local stop = { name = "stop", values = {} }
      function stop:add()
        self.values[#self.values + 1] = 1
        if #self.values == 10 then io.popen("kill -INT " .. require("qlua.sys").pid()):close() end
      end
      function stop:value() return #self.values end
      return stop]])
    local command = ("%s examples/mmlu.lua --batch_size 4 --log_samples --metric %s --output_path %s/results "
      .. "2>&1; echo $?"):format(quote(os.getenv "QLUA" or QLUA), metric, folder)
    local pipe <close> = assert(io.popen(command))
    local out = pipe:read "a"
    assert.truthy(out:find "130\n$", out)
    assert.truthy(out:find("interrupted: what is finished follows", 1, true), out)
    assert.truthy(out:find("not reached (interrupted)", 1, true), out)
    local samples = {}
    for _, path in ipairs(files(folder .. "/results")) do
      assert.is_nil(path:find "/%.", path)
      local file <close> = assert(io.open(path))
      local text = file:read "a"
      if path:find "%.jsonl$" then
        local _, lines = text:gsub("\n", "\n")
        samples[#samples + 1] = lines
      elseif path:find "%.json$" then
        assert.truthy(json.decode(text))
      end
    end
    assert.is_true(#samples >= 2 and samples[1] > 0)
    assert.equal(samples[1], samples[#samples // 2 + 1]) -- both models have the same questions
  end)
end)

describe("out of memory", function()
  --- Runs an example with at most `kib` of address space.
  local function limited(kib, ...)
    local words = { ("ulimit -v %d && exec"):format(kib), quote(os.getenv "QLUA" or QLUA) }
    for _, word in ipairs { ... } do words[#words + 1] = quote(word) end
    local pipe <close> = assert(io.popen(("bash -c %s 2>&1"):format(quote(table.concat(words, " ")))))
    return pipe:read "a"
  end

  it("ends a batch, not the sweep", function()
    if os.getenv "UBSAN_OPTIONS" then return pending "skipped: sanitizers reserve address space" end
    local out = limited(200000, "examples/batch_sweep.lua", "--batch_sizes", "1,4096,2", "--runs", "2",
      "--output_path", folder .. "/results")
    assert.truthy(out:find("OOM at batch 4096, full: out of memory: %d+ bytes"), out)
    local file <close> = assert(io.open(files(folder .. "/results")[1]))
    local points = assert(json.decode(file:read "a")).sections[1].points
    assert.equal(6, #points)
    assert.truthy(points[3].oom and points[4].oom)
    assert.truthy(points[5].seconds and points[6].seconds)
  end)

  it("is said with the bytes that were asked for", function()
    if os.getenv "UBSAN_OPTIONS" then return pending "skipped: sanitizers reserve address space" end
    local out = limited(1000000, "-e", "print(require'qlua'.load_synthetic('llama-3.2-1b'))")
    assert.truthy(out:find("^nil%s+out of memory: %d+ bytes"), out)
  end)
end)

describe("a user's metric", function()
  it("stands in the table and in the JSON like the built-in ones", function()
    local out, err, code = run("jaccard", "--limit", "5", "--metric", "examples/metrics/rank.lua",
      "--output_path",
      folder .. "/results")
    assert.equal(0, code, err)
    assert.truthy(out:find("rank_of_favourite", 1, true))
    local file <close> = assert(io.open(files(folder .. "/results")[1]))
    local results = {}
    for _, row in ipairs(assert(json.decode(file:read "a")).sections[1].pair) do results[row.name] = row end
    assert.equal(5, results.rank_of_favourite.n)
    assert.is_true(results.rank_of_favourite.value >= 1)
    local kl = results.kl_full_quantized
    for _, key in ipairs { "stderr", "median", "p90", "p95", "p99", "p999", "max", "rms" } do
      assert.is_number(kl[key], key)
    end
  end)

  it("without a number for any question is shown as such", function()
    local path = write("silent.lua", [[return { name = "silent", values = {}, add = function() end,
      value = function() end }]])
    local out, err, code = run("jaccard", "--limit", "3", "--metric", path, "--output_path",
      folder .. "/results")
    assert.equal(0, code, err)
    assert.truthy(out:find "silent +%- +%- +%-", out)
  end)
end)

describe("real input", function()
  local model, tasks = "../shared/data/models/stories260K", "../shared/data/mmlu/test/virology_test.csv"

  it("accounts for all 166 questions of virology", function()
    if not lfs.attributes(model) then return pending "skipped: no ../shared/data" end
    local out, err, code = run("mmlu", "--model", model, "--tasks", tasks, "--mode", "loglikelihood",
      "--output_path",
      folder .. "/results", "--log_samples")
    assert.equal(0, code, err)
    assert.truthy(out:find("166 questions, 164 scored, 2 longer than the 512-token context", 1, true), out)
    local samples = 0
    for _, path in ipairs(files(folder .. "/results")) do
      if path:find("samples_", 1, true) then
        for text in io.lines(path) do
          local sample = assert(json.decode(text))
          assert.equal(4, #sample.resps)
          samples = samples + 1
        end
      end
    end
    assert.equal(2 * 164, samples)
  end)

  it("compares next tokens and sweeps batches", function()
    if not lfs.attributes(model) then return pending "skipped: no ../shared/data" end
    local out, err, code = run("jaccard", "--model", model, "--tasks", tasks)
    assert.equal(0, code, err)
    assert.truthy(out:find("166 questions", 1, true) and out:find("jaccard@20", 1, true))
    out, err, code = run("batch_sweep", "--model", model, "--tasks", tasks, "--runs", "2", "--batch_sizes",
      "1,4")
    assert.equal(0, code, err)
    assert.truthy(out:find("expected", 1, true))
  end)
end)
