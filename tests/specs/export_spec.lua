local data = require "qlua.data"
local export = require "qlua.export"
local json = require "qlua.json"
local lfs = require "lfs"
local tasks = require "qlua.tasks"

local GOLDEN <const> = "tests/golden/lm_eval/"

local function read(path)
  local file <close> = assert(io.open(path, "rb"))
  return file:read("a")
end

--- A new folder, removed with everything in it when the value is closed.
local function temporary_folder()
  local path = os.tmpname()
  os.remove(path)
  assert(lfs.mkdir(path))
  local function remove(at)
    for name in lfs.dir(at) do
      local inside = at .. "/" .. name
      if name ~= "." and name ~= ".." then
        if lfs.symlinkattributes(inside, "mode") == "directory" then remove(inside) else os.remove(inside) end
      end
    end
    lfs.rmdir(at)
  end
  return setmetatable({ path = path }, { __close = function() remove(path) end })
end

local function names_in(path)
  local names = {}
  for name in lfs.dir(path) do
    if name ~= "." and name ~= ".." then names[#names + 1] = name end
  end
  table.sort(names)
  return names
end

describe("export.write", function()
  it("makes folders, replaces a file whole and leaves nothing else behind", function()
    local folder <close> = temporary_folder()
    local path = folder.path .. "/a/b/x.json"
    assert(export.write(path, "one"))
    assert(export.write(path, "two\0\n"))
    assert.equal("two\0\n", read(path))
    assert.same({ "x.json" }, names_in(folder.path .. "/a/b"))
  end)

  it("names what it cannot write, and leaves no partial file", function()
    local folder <close> = temporary_folder()
    assert(export.write(folder.path .. "/file", "x"))
    local ok, err = export.write(folder.path .. "/file/x.json", "x")
    assert.is_nil(ok)
    assert.equal("io", err.code)
    assert.truthy(err.message:find(folder.path .. "/file", 1, true))
    assert(lfs.mkdir(folder.path .. "/taken"))
    ok, err = export.write(folder.path .. "/taken", "x")
    assert.is_nil(ok)
    assert.truthy(err.message:find("taken", 1, true))
    assert.same({ "file", "taken" }, names_in(folder.path))
  end)
end)

describe("result files", function()
  --- A run of the bundled quiz with lm-eval's own scores in the place of a model's.
  local function fake(folder, golden)
    local items = assert(data.read(GOLDEN .. "farm_life_test.csv"))
    local task = tasks.mmlu { subject = items.subject }
    local results = {}
    for i, row in ipairs(golden.rows) do
      local answer = tasks.argmax(row.loglik)
      results[i] = {
        prepared = { item = items[i], index = i, prompt = task:prompt(items[i]) },
        scores = row.loglik, greedy = row.greedy, answer = answer, correct = answer == items[i].answer,
        kernels = { "matmul_" .. i % 2, "attention" },
      }
    end
    local evaluation = { results = results, seconds = 1.5, prompt_tokens = 900, prefill_seconds = 1.0 }
    local model = { info = function()
      return { dtype = "float32", quant = { label = "none" }, params = 260032, device = "cpu" }
    end }
    local run = {
      name = "mmlu.lua", full = model, test = model, labels = { "full", "nf4" }, date = 1721995200,
      opts = { output_path = folder, model = "models/stories260K", log_samples = true, batch_size = 8,
        seed = 1, protocol = "sound" },
      facts = function() return { version = "0" } end, hardware = { name = "cuda:0", numerics = "fast" },
      must = function(_, value, err) return value or error(tostring(err)) end,
    }
    return run, { { task = task, items = items, too_long = 0, evaluations = { evaluation, evaluation } } }
  end

  it("hold lm-eval's own samples, hashes included", function()
    local folder <close> = temporary_folder()
    local golden = assert(json.decode(read(GOLDEN .. "farm_life.json")))
    local paths = export.mmlu(fake(folder.path, golden))
    local samples = read(folder.path .. "/stories260K__full/samples_mmlu_farm_life_2024-07-26T12-00-00.jsonl")
    local lines, n = {}, 0
    for line in samples:gmatch("[^\n]+") do lines[#lines + 1] = assert(json.decode(line)) end
    assert.equal(7, #lines)
    for line in read(GOLDEN .. "samples_example.jsonl"):gmatch("[^\n]+") do
      n = n + 1
      local expected, got = assert(json.decode(line)), lines[n]
      for key, value in pairs(expected) do assert.same(value, got[key], key) end
      assert.equal("fast", got.numerics)
      assert.same({ "matmul_" .. n % 2, "attention" }, got.kernels)
      got.numerics, got.kernels = nil, nil -- lm-eval has no such fields, and all others are its own
      for key in pairs(got) do assert.is_not_nil(expected[key], key) end
    end
    assert.is_true(n > 0)
    assert.equal(5, #paths)
  end)

  it("hold lm-eval's fields of results", function()
    local folder <close> = temporary_folder()
    export.mmlu(fake(folder.path, assert(json.decode(read(GOLDEN .. "farm_life.json")))))
    local path = folder.path .. "/stories260K__full/results_2024-07-26T12-00-00.json"
    local got = assert(json.decode(read(path)))
    local expected = assert(json.decode(read(GOLDEN .. "results_example.json")))
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
    for _, key in ipairs {
      "model", "model_args", "batch_size", "device", "limit", "model_dtype", "random_seed",
    } do
      assert.is_not_nil(got.config[key], key)
    end
    assert.equal("fast", got.config.numerics)
    assert.same({ "attention", "matmul_0", "matmul_1" }, got.results.mmlu_farm_life.kernels)
    assert.is_number(got.date)
    assert.is_not_nil(got.git_hash)
  end)
end)
