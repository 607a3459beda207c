local tasks = require "qlua.tasks"

local ITEM <const> = { question = " What is it? ", choices = { "w", "x ", "y", "z" }, answer = 3 }
local DEV <const> = {
  { question = "One?", choices = { "a", "b", "c", "d" }, answer = 2 },
  { question = "Two?", choices = { "e", "f", "g", "h" }, answer = 4 },
}
local HEAD <const> = "The following are multiple choice questions (with answers) about high school "
  .. "physics.\n\n"

describe("tasks.mmlu", function()
  it("builds the harness's zero-shot prompt", function()
    local task = tasks.mmlu { subject = "high_school_physics" }
    assert.equal("mmlu_high_school_physics", task.name)
    assert.equal(HEAD .. "What is it?\nA. w\nB. x \nC. y\nD. z\nAnswer:", task:prompt(ITEM))
    assert.same({ " A", " B", " C", " D" }, task.continuations)
    assert.same({
      { role = "system", content = HEAD },
      { role = "user", content = "What is it?\nA. w\nB. x \nC. y\nD. z\nAnswer:" },
    }, task:messages(ITEM))
  end)

  it("puts the first examples in front, answered, with an empty line between", function()
    local task = tasks.mmlu { subject = "high_school_physics", fewshot = DEV, num_fewshot = 2 }
    assert.equal(HEAD .. "One?\nA. a\nB. b\nC. c\nD. d\nAnswer: B\n\n"
      .. "Two?\nA. e\nB. f\nC. g\nD. h\nAnswer: D\n\n"
      .. "What is it?\nA. w\nB. x \nC. y\nD. z\nAnswer:", task:prompt(ITEM))
    local turns = task:messages(ITEM)
    assert.equal(6, #turns)
    assert.same({ role = "assistant", content = "B" }, turns[3])
  end)

  it("refuses more examples than there are", function()
    assert.has_error(function() tasks.mmlu { subject = "s", fewshot = DEV, num_fewshot = 3 } end,
      "num_fewshot is 3, but there are only 2 examples")
  end)
end)

describe("tasks.boxed", function()
  local task = tasks.boxed { subject = "human_aging" }

  it("asks for a box", function()
    assert.equal("mmlu_human_aging_boxed", task.name)
    assert.equal("Answer this multiple choice question about human aging. Give the letter of the correct "
      .. "choice in double square brackets: [[A]], [[B]], [[C]] or [[D]].\n\nQ\nA. 1\nB. 2\nC. 3\nD. 4",
      task:prompt { question = "Q", choices = { "1", "2", "3", "4" } })
    assert.equal("user", task:messages(ITEM)[1].role)
  end)

  for text, answer in pairs {
    ["[[C]]"] = 3, ["It is not [[A]] but [[D]]."] = 4, ["[[ B ]]"] = 2, ["[[A]] or [[F]]"] = 1,
    ["[[[B]]]"] = 2,
  } do
    it("reads " .. text, function() assert.equal(answer, task:parse(text)) end)
  end

  for _, text in ipairs { "", "C", "[C]", "[[c]]", "[[E]]", "[[AB]]", "[[]]", "[[A]" } do
    it("finds no answer in '" .. text .. "'", function() assert.is_nil(task:parse(text)) end)
  end
end)

describe("tasks.post", function()
  local task = tasks.post { subject = "virology" }

  it("keeps the post's prompt with its faults", function()
    assert.equal("mmlu_virology_post", task.name)
    assert.equal("Recall your virology knowledge and box your final answer with [[A]] or [[B]] [[F]] or "
      .. "[[D]], etc\n\nQ\n\nA: 1\nB: 2\nC: 3\nD: 4",
      task:prompt { question = "Q", choices = { "1", "2", "3", "4" } })
    assert.equal("human", task:messages(ITEM)[1].role)
    assert.is_false(task.chat.add_generation_prompt)
    assert.is_true(task.keep { question = ("é"):rep(63) })
    assert.is_false(task.keep { question = ("x"):rep(64) })
  end)

  it("takes the first box and the text after the last header", function()
    assert.equal(6, task:parse("[[F]] and [[A]]"))
    assert.is_nil(task:parse("[[ A ]]"))
    assert.equal("It is [[B]]", task:answer_text("<|begin_of_text|><|start_header_id|>human<|end_header_id|>"
      .. "\n\nQ<|eot_id|>"
      .. "<|start_header_id|>assistant<|end_header_id|>\n\nIt is [[B]]<|eot_id|>rest"))
    assert.equal("plain", task:answer_text(" plain "))
  end)
end)

describe("small things", function()
  it("argmax takes the first on ties", function()
    assert.equal(2, tasks.argmax { -3, -1, -1, -2 })
    assert.equal(1, tasks.argmax { -1, -1, -1, -1 })
  end)

  it("counts words between white space", function()
    assert.equal(3, tasks.words("a  b\n\tc "))
    assert.equal(0, tasks.words(" "))
  end)
end)
