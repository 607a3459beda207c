-- Log-likelihood scores equal lm-evaluation-harness's, question by question.

local data = require "qlua.data"
local evaluate = require "qlua.evaluate"
local questions = require "qlua.questions"
local json = require "qlua.json"
local lfs = require "lfs"
local qlua = require "qlua"
local tasks = require "qlua.tasks"

local TOLERANCE <const> = 2e-4 -- sums of up to three float32 log-probabilities on both sides

local function read(path)
  local file <close> = assert(io.open(path, "rb"))
  return file:read "a"
end

--- Scores of every question of `csv`, by its place in the file; those that are too long have none.
local function scores(model, csv)
  local items = assert(data.read(csv))
  local task = tasks.mmlu { subject = items.subject }
  local tok = assert(model:tokenizer())
  local prepared = questions.prepare(tok, task, items, { max_context = model:info().max_context })
  return prepared, function(device, batch_size)
    local evaluation = assert(evaluate.loglikelihood({ model }, prepared, { device = device,
      batch_size = batch_size }))[1]
    local by_index = {}
    for _, r in ipairs(evaluation.results) do by_index[r.prepared.index] = r end
    return by_index, evaluate.accuracy(evaluation)
  end
end

--- Compares with the golden file; returns how many questions the harness cut and we left out.
local function compare(golden_path, folder, csv, dtype)
  local golden = assert(json.decode(read(golden_path)))
  local device <close> = assert(qlua.device "cpu")
  local model <close> = assert(device:load(folder, { dtype = dtype }))
  local prepared, run = scores(model, csv)
  assert.equal(golden.n, #prepared)
  local by_index, accuracy = run(device, 8)
  local left_out, correct = 0, 0
  for i, row in ipairs(golden.rows) do
    local mine = by_index[i]
    if row.truncated then
      assert.is_nil(mine, "question " .. i .. " does not fit and must not be scored")
      assert.is_true(prepared[i].too_long)
      left_out = left_out + 1
    else
      for c = 1, 4 do
        local off = math.abs(mine.scores[c] - row.loglik[c])
        assert.is_true(off <= TOLERANCE, ("question %d choice %d: %.6f v %.6f"):format(i, c, mine.scores[c],
          row.loglik[c]))
        assert.equal(row.greedy[c], mine.greedy[c])
      end
      assert.equal(row.acc == 1, mine.correct)
      correct = correct + (row.acc == 1 and 1 or 0)
    end
  end
  assert.equal(correct, accuracy.correct)
  return left_out
end

describe("mmlu by log-likelihood equals lm-evaluation-harness", function()
  local stories = "../shared/data/models/stories260K"

  it("on questions with quotes, line breaks and odd spaces", function()
    if not lfs.attributes(stories) then return pending "skipped: no ../shared/data" end
    assert.equal(0, compare("tests/golden/lm_eval/farm_life.json", stories,
      "tests/golden/lm_eval/farm_life_test.csv"))
  end)

  it("on MMLU virology, with continuations of several tokens", function()
    if not lfs.attributes(stories) then return pending "skipped: no ../shared/data" end
    local csv = "../shared/data/mmlu/test/virology_test.csv"
    assert.equal(2, compare("tests/golden/lm_eval/stories260K_virology.json", stories, csv))
  end)

  it("on the bundled quiz", function()
    local golden = "tests/golden/lm_eval/quiz.json"
    local facts = assert(json.decode(read(golden)))
    assert.equal(0, compare(golden, facts.model, facts.csv, "float32"))
  end)
end)
