--- Rows that go on from rows a model has seen give the bits of whole rows, and so does what is built on them.

local evaluate = require "qlua.evaluate"
local scorer = require "qlua.scorer"
local qlua = require "qlua"
local support = require "tests.specs.support"

local VOCAB <const> = 256
local FORMATS <const> = {
  { name = "float32", dtype = "float32" },
  { name = "bfloat16", dtype = "bfloat16" },
  { name = "nf4", dtype = "bfloat16", quant = { scheme = "nf4", double = true } },
}
-- the CPU's bits do not depend on a row's company; another device's numerics may be fast
local EXACT <const> = not os.getenv "QLUA_TEST_DEVICE"

local function tiny(format, device)
  return assert(qlua.load_synthetic("tiny", { device = device or support.device(), dtype = format.dtype,
    quant = format.quant, seed = 7 }))
end

local function joined(a, b) return table.move(b, 1, #b, #a + 1, table.move(a, 1, #a, 1, {})) end

local function expect_same(expected, got)
  assert.equal(expected:size(1), got:size(1))
  if EXACT then
    assert.is_true(support.bytes(expected) == support.bytes(got), "other bits")
  else
    assert.is_true(support.difference(expected, got) < 0.05)
  end
end

for _, format in ipairs(FORMATS) do
  describe(format.name .. " rows after kept rows", function()
    it("are the rows as a whole", function()
      local model <close> = tiny(format)
      for _, lengths in ipairs { { 1, 1 }, { 1, 30 }, { 17, 1 }, { 16, 16 }, { 40, 5 }, { 300, 90 },
        { 500, 12 } } do
        local head, tail = support.ids(lengths[1], VOCAB, 3), support.ids(lengths[2], VOCAB, 4)
        local seen <close>, kept = assert(model:forward({ head }, { keep = true }))
        local _ <close> = kept
        local alone <close> = assert(model:forward { head })
        expect_same(alone, seen)
        local whole <close> = assert(model:forward({ joined(head, tail) }, { rows = { #tail } }))
        local rest <close> = assert(model:forward({ tail }, { after = kept }))
        expect_same(whole, rest)
        -- what was kept is still there for the next
        local again <close> = assert(model:forward({ tail }, { after = kept }))
        expect_same(whole, again)
      end
    end)

    it("follow any of several, in any company", function()
      local model <close> = tiny(format)
      local heads = { support.ids(9, VOCAB, 1), support.ids(33, VOCAB, 2), support.ids(2, VOCAB, 3) }
      local none <close>, kept = assert(model:forward(heads, { rows = { 0, 0, 0 }, keep = true }))
      local _ <close> = kept
      assert.equal(0, none:size(1))
      assert.same({ 9, 33, 2 }, kept:tokens())
      assert.equal(3, #kept)
      local parents, tails, rows = { 2, 2, 1, 3, 1, 2, 3 }, {}, {}
      for i, parent in ipairs(parents) do
        tails[i] = support.ids(3 * i - 2, VOCAB, 10 + i)
        rows[i] = joined(heads[parent], tails[i])
      end
      local whole <close> = assert(model:forward(rows, { rows = "last" }))
      local rest <close>, deeper = assert(model:forward(tails, { after = kept, parents = parents,
        rows = "last", keep = true }))
      local _ <close> = deeper
      expect_same(whole, rest)
      -- and those that follow the followers
      local third = {}
      for i, row in ipairs(rows) do
        third[i] = support.ids(i, VOCAB, 50 + i)
        rows[i] = joined(row, third[i])
      end
      assert.equal(#rows[6] - 6, deeper:tokens()[6])
      kept:close() -- they have a copy
      local all <close> = assert(model:forward(rows, { rows = "last" }))
      local last <close> = assert(model:forward(third, { after = deeper, rows = "last" }))
      expect_same(all, last)
    end)
  end)
end

describe("kept rows", function()
  it("are counted, and go when they are closed", function()
    local model <close> = tiny(FORMATS[1])
    local none <close>, kept = assert(model:forward({ support.ids(40, VOCAB, 1) },
      { rows = { 0 }, keep = true }))
    assert.equal(0, none:size(1))
    local held = model:memory().kv
    assert.equal(40 * model:expected_memory(1, 1, 1).kv, held)
    local one <close> = assert(model:forward({ { 1, 2 } }, { after = kept }))
    assert.equal(2, one:size(1))
    assert.equal(held, model:memory().kv)
    kept:close()
    kept:close()
    assert.equal(0, model:memory().kv)
    assert.has_error(function() model:forward({ { 1 } }, { after = kept }) end)
    assert.has_error(function() return #kept end)
  end)

  it("are refused where they do not belong", function()
    local model <close> = tiny(FORMATS[1])
    local other <close> = tiny(FORMATS[1])
    local logits <close>, kept = assert(model:forward({ { 1, 2 }, { 3 } }, { keep = true }))
    local _ <close> = kept
    assert.equal(3, logits:size(1))
    local function refused(text, rows, options)
      local ok, why = pcall(model.forward, model, rows, options)
      assert.is_false(ok)
      assert.truthy(tostring(why):find(text, 1, true), tostring(why))
    end
    refused("not rows kept", { { 1 } }, { after = {} })
    refused("'parents' must say", { { 1 }, { 2 }, { 3 } }, { after = kept })
    refused("one number for each of 2 rows", { { 1 }, { 2 } }, { after = kept, parents = { 1 } })
    refused("entry 2 of option 'parents' is 3", { { 1 }, { 2 } }, { after = kept, parents = { 1, 3 } })
    refused("entry 1 of option 'parents' is 0", { { 1 } }, { after = kept, parents = { 0 } })
    refused("goes with option 'after'", { { 1 } }, { parents = { 1 } })
    refused("the model's context is", { support.ids(511, VOCAB, 1) }, { after = kept, parents = { 1 } })
    refused("cannot be closed", { { 1 } },
      { after = kept, parents = { 1 }, trace = function() kept:close() end })
    assert.same({ 2, 1 }, kept:tokens())
    local ok, why = pcall(other.forward, other, { { 1 }, { 2 } }, { after = kept })
    assert.is_false(ok)
    assert.truthy(tostring(why):find("another model", 1, true), tostring(why))
  end)
end)

describe("scoring by log-likelihood", function()
  --- Questions as questions.prepare makes them: one beginning, contexts and continuations of any length.
  local function questions(shared, lengths)
    local list = {}
    for i = 1, 11 do
      local context = joined(support.ids(shared, VOCAB, 1), support.ids(3 + i * 5 % 17, VOCAB, i))
      context[shared + 1] = i
      local p = { item = { answer = 1 + i % 4 }, index = i, context = context, choices = {}, tokens = 0 }
      for c = 1, 4 do
        local continuation = support.ids(lengths[1 + (i + c) % #lengths], VOCAB, 100 * i + c)
        local row = joined(context, continuation)
        row[#row] = nil
        p.choices[c] = { row = row, continuation = continuation }
        p.tokens = math.max(p.tokens, #row + 1)
      end
      p.target = p.choices[p.item.answer].continuation[1]
      list[i] = p
    end
    -- as where a merge of tokens reaches back into the context
    local odd = list[4].choices[2]
    odd.row[#list[4].context] = 200
    list[9].too_long = true
    return list
  end

  local function run(models, prepared, size, share)
    local seen = {}
    local evaluations = assert(evaluate.loglikelihood(models, prepared, { device = support.device(),
      batch_size = size, share = share,
      each = function(reference, test, p)
        seen[#seen + 1] = p.index .. support.bytes(reference) .. support.bytes(test)
      end }))
    return evaluations, table.concat(seen)
  end

  --- ln p of every choice from a pass over its row alone.
  local function reference(model, p)
    local scores = {}
    for c, choice in ipairs(p.choices) do
      local n = #choice.continuation
      local logits <close> = assert(model:forward({ choice.row }, { rows = { n } }))
      local picked, lse = logits:gather(choice.continuation):totable(), logits:logsumexp():totable()
      local sum = 0.0
      for i = 1, n do sum = sum + (picked[i] - lse[i]) end
      scores[c] = sum
    end
    return scores
  end

  for _, case in ipairs { { "one token a choice", { 1 } }, { "several", { 1, 3, 2 } } } do
    it("is the same with and without sharing, in any batch: " .. case[1], function()
      local device <const> = support.device()
      local full <close> = tiny(FORMATS[2], device)
      local twin <close> = tiny(FORMATS[3], device)
      local models = { full, twin }
      for _, shared in ipairs { 0, 1, 60 } do
        local prepared = questions(shared, case[2])
        local skip = scorer.shared_tokens(prepared)
        assert.equal(shared < 4 and 0 or shared, skip)
        local first, seen
        for _, size in ipairs { 1, 4, 16 } do
          for _, share in ipairs { true, false } do
            local evaluations, bytes = run(models, prepared, size, share)
            assert.equal(10, #evaluations[1].results)
            if EXACT then
              seen = seen or bytes
              assert.is_true(seen == bytes, "other logits")
            end
            for m, e in ipairs(evaluations) do
              assert.equal(share and 10 * skip or 0, e.shared_tokens)
              for i, r in ipairs(e.results) do
                local want = first and first[m].results[i].scores or reference(models[m], r.prepared)
                for c, score in ipairs(r.scores) do
                  if EXACT then
                    assert.equal(want[c], score)
                  else
                    assert.is_true(math.abs(want[c] - score) < 0.1)
                  end
                end
                assert.equal(r.prepared.index, i < 9 and i or i + 1)
              end
            end
            first = first or evaluations
          end
        end
      end
    end)
  end

  it("takes each shared token once", function()
    local model <close> = tiny(FORMATS[1])
    local prepared = questions(60, { 2 })
    local whole = run({ model }, prepared, 4, false)[1]
    local shared = run({ model }, prepared, 4, true)[1]
    local contexts, rows = 0, 0
    for _, p in ipairs(prepared) do
      if not p.too_long then
        -- a question with its four second tokens; the fourth has a row for each of its choices
        local alone = p.index == 4
        contexts = contexts + (alone and 4 * (#p.context - 60) or #p.context - 60) + 4
        rows = rows + (alone and 4 or 1) * #p.context + 4
      end
    end
    assert.equal(60 + contexts, shared.prompt_tokens)
    assert.equal(rows, whole.prompt_tokens)
    assert.equal(600, shared.shared_tokens)
  end)
end)
