-- What experiment.open refuses before any work is done.

local QLUA <const> = os.getenv "QLUA" or (arg and arg[-1]) or "build/qlua"

local function quote(text) return "'" .. text:gsub("'", "'\\''") .. "'" end

--- stderr and exit code of an example that is meant to be refused.
local function refused(script, ...)
  local words = { quote(QLUA), quote(("examples/%s.lua"):format(script)) }
  local given = false
  for _, word in ipairs { ... } do
    words[#words + 1] = quote(word)
    given = given or word == "--output_path"
  end
  if not given then words[#words + 1] = "--no_output" end
  local pipe <close> = assert(io.popen(table.concat(words, " ") .. " 2>&1 >/dev/null; echo $?"))
  local text = pipe:read "a"
  local message, code = text:match "^(.*)\n(%d+)\n$"
  assert.equal("1", code, text)
  assert.is_nil(message:find "\n", text)
  return message
end

local function says(message, ...)
  for _, words in ipairs { ... } do assert.truthy(message:find(words, 1, true), message) end
end

describe("an experiment refuses, before it begins,", function()
  it("a name to skip that no module has", function()
    says(refused("jaccard", "--skip", "lm_haed"), "lm_haed", "no module")
  end)

  it("several question files where it takes one", function()
    local quiz = "examples/data/lantern_isles_test.csv"
    says(refused("jaccard", "--tasks", quiz .. "," .. quiz), "one file")
  end)

  it("two files of one subject, whose results would share a name", function()
    local quiz = "examples/data/lantern_isles_test.csv"
    says(refused("mmlu", "--tasks", quiz .. "," .. quiz), "lantern_isles")
  end)

  it("results that have no place", function()
    says(refused("jaccard", "--output_path", "/dev/null"), "/dev/null")
    says(refused("jaccard", "--log_samples", "--no_output"), "--no_output")
  end)

  it("few-shot examples that are not there", function()
    says(refused("mmlu", "--num_fewshot", "2", "--output_path", os.tmpname() .. "x"), "lantern_isles_dev.csv")
  end)
end)

describe("standard output that is full", function()
  it("is a failure, not a silence", function()
    local pipe <close> = assert(io.popen(quote(QLUA) .. " -e 'print(1)' 2>&1 >/dev/full; echo $?"))
    local text = pipe:read "a"
    says(text, "cannot write to standard output")
    assert.truthy(text:find "\n1\n$", text)
  end)
end)
