--- The same bits whatever the company: threads, batch, pieces, instruction set, run.

local qlua = require "qlua"
local support = require "tests.specs.support"

local VOCAB <const> = 256
-- weights of each kind; the 4-bit one decodes to bfloat16
local FORMATS <const> = {
  { name = "float32", dtype = "float32" },
  { name = "bfloat16", dtype = "bfloat16" },
  { name = "float16", dtype = "float16" },
  { name = "nf4", dtype = "bfloat16", quant = { scheme = "nf4", double = true } },
}

local function tiny(format, device)
  return assert(qlua.load_synthetic("tiny", { device = device or support.device(), dtype = format.dtype,
    quant = format.quant, seed = 11 }))
end

--- `count` rows of 1 to 41 tokens.
local function rows(count)
  local list = {}
  for i = 1, count do list[i] = support.ids((i * 17) % 41 + 1, VOCAB, i) end
  return list
end

--- Bytes of each row's logits.
local function all_logits(model, batch, which)
  local logits <close> = assert(model:forward(batch, { rows = which }))
  local list, first = {}, 1
  for i, ids in ipairs(batch) do
    local n = which == "last" and 1 or #ids
    local part <close> = logits:narrow(1, first, n)
    list[i] = support.bytes(part)
    first = first + n
  end
  assert(first == logits:size(1) + 1)
  return list
end

local function last(model, ids)
  return all_logits(model, { ids }, "last")[1]
end

local function expect_equal(expected, value, ...)
  if expected ~= value then error(table.concat({ "other bits: ", ... }, " "), 2) end
end

for _, format in ipairs(FORMATS) do
  describe(format.name, function()
    it("rows are alone in a batch of 1 to 32", function()
      local model <close> = tiny(format)
      local batch, alone = rows(32), {}
      for i, ids in ipairs(batch) do alone[i] = all_logits(model, { ids }, "all")[1] end
      for _, size in ipairs { 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32 } do
        local part = table.move(batch, 1, size, 1, {})
        for i, bytes in ipairs(all_logits(model, part, "all")) do
          expect_equal(alone[i], bytes, "row", i, "of", size)
        end
        for i, bytes in ipairs(all_logits(model, part, "last")) do
          expect_equal(alone[i]:sub(-4 * VOCAB), bytes, "last of row", i, "of", size)
        end
      end
    end)

    it("a row is the same at every place", function()
      local model <close> = tiny(format)
      local batch = rows(12)
      local mine = table.remove(batch, 5)
      local alone = last(model, mine)
      for place = 1, 12 do
        table.insert(batch, place, mine)
        expect_equal(alone, all_logits(model, batch, "last")[place], "place", place)
        table.remove(batch, place)
      end
    end)

    it("a prefix is the same in a longer row", function()
      local model <close> = tiny(format)
      local ids = support.ids(70, VOCAB, 3)
      local whole = all_logits(model, { ids }, "all")[1]
      for n = 1, 70, 3 do
        local prefix = table.move(ids, 1, n, 1, {})
        expect_equal(whole:sub(1, 4 * VOCAB * n), all_logits(model, { prefix }, "all")[1], n, "tokens")
      end
    end)

    it("across the border between two pieces of a long batch", function()
      local model <close> = tiny(format)
      local batch = { support.ids(500, VOCAB, 1), support.ids(30, VOCAB, 2), support.ids(1, VOCAB, 3),
        support.ids(481, VOCAB, 4), support.ids(512, VOCAB, 5), support.ids(11, VOCAB, 6) }
      local together = all_logits(model, batch, "last")
      local counts, first = {}, 1
      for i, ids in ipairs(batch) do
        expect_equal(last(model, ids), together[i], "row", i)
        counts[i] = i % 3 * 5 % (#ids + 1)
      end
      -- some rows of each: outputs on both sides of a border, and rows without any
      local logits <close> = assert(model:forward(batch, { rows = counts }))
      for i, ids in ipairs(batch) do
        if counts[i] > 0 then
          local part <close> = logits:narrow(1, first, counts[i])
          local own <close> = assert(model:forward({ ids }, { rows = { counts[i] } }))
          expect_equal(support.bytes(own), support.bytes(part), "counts of row", i)
        end
        first = first + counts[i]
      end
      assert.equal(logits:size(1) + 1, first)
    end)

    it("a trace changes nothing that is not fused", function()
      local model <close> = tiny(format)
      local ids, names = support.ids(20, VOCAB, 9), {}
      local plain <close> = assert(model:forward(ids))
      local traced <close> = assert(model:forward(ids, {
        trace = function(name, value)
          names[#names + 1] = name
          value:close()
        end,
      }))
      assert.equal(2 + 2 * 7, #names)
      assert.is_true(support.difference(plain, traced) < 1e-5)
    end)

    it("one thread and two, and run to run", function()
      local one <close> = assert(qlua.device("cpu", { threads = 1 }))
      local two <close> = qlua.device("cpu", { threads = 2 }) or assert(qlua.device "cpu")
      local a <close> = tiny(format, one)
      local b <close> = tiny(format, two)
      local batch = rows(19)
      local first, second = all_logits(a, batch, "all"), all_logits(b, batch, "all")
      for i = 1, #batch do expect_equal(first[i], second[i], "threads, row", i) end
      local long = support.ids(300, VOCAB, 8)
      local want = last(a, long)
      for run = 1, 4 do
        expect_equal(want, last(b, long), "run", run)
        expect_equal(first[run], all_logits(b, { batch[run] }, "all")[1], "decode", run)
      end
    end)

    it("step by step as at once", function()
      -- near ties would hide a difference of bits, so the sampled texts are long and the temperature high
      local model <close> = tiny(format)
      local ids, streams, prompts = support.ids(9, VOCAB, 21), { 1, 2, 3, 4, 5 }, {}
      for i = 1, 5 do prompts[i] = table.move(ids, 1, 2 * i - 1, 1, {}) end
      local new = assert(model:generate(prompts, { max_new_tokens = 48, temperature = 1, seed = 2,
        streams = streams }))
      for i, row in ipairs(new) do
        local full = table.move(row, 1, #row, #prompts[i] + 1, table.move(prompts[i], 1, #prompts[i], 1, {}))
        local draw = assert(model:generate({ table.move(full, 1, #full - 1, 1, {}) }, { max_new_tokens = 1 }))
        local logits <close> = assert(model:forward(table.move(full, 1, #full - 1, 1, {}), { rows = "last" }))
        assert.equal(logits:argmax()[1], draw[1][1])
        -- continuing a text from any place gives the text: every step's logits were those of a whole pass
        for _, cut in ipairs { 1, 20, 47 } do
          local head = table.move(full, 1, #prompts[i] + cut, 1, {})
          local again = assert(model:generate(head, { max_new_tokens = 48 - cut }))
          local greedy = {}
          for step = 1, math.min(6, 48 - cut) do
            local whole <close> = assert(model:forward(head, { rows = "last" }))
            greedy[step] = whole:argmax()[1]
            head[#head + 1] = greedy[step]
          end
          assert.same(greedy, table.move(again, 1, #greedy, 1, {}))
        end
      end
    end)
  end)
end

describe("instruction sets", function()
  it("give the same bits", function()
    local code <const> = [[
      local qlua, sys = require "qlua", require "qlua.sys"
      package.path = "./?.lua;" .. package.path
      arg[-1] = arg[-1] or "qlua"
      local support = require "tests.specs.support"
      local device <close> = assert(qlua.device("cpu", { threads = 1 }))
      local parts = { device:info().isa }
      for _, name in ipairs { "llama2_f32", "llama31_bf16", "linear_f16", "odd_bf16", "odd_nf4",
        "nf4_double", "fp4", "biases_bf16" } do
        local model <close> = assert(device:load(support.MODELS .. name))
        local vocab = model:info().vocab
        local logits <close> = assert(model:forward { support.ids(37, vocab, 1), support.ids(1, vocab, 2),
          support.ids(12, vocab, 3) })
        parts[#parts + 1] = name .. "=" .. support.hash(logits)
        local new = assert(model:generate({ 1, 2, 3 }, { max_new_tokens = 20, temperature = 1 }))
        parts[#parts + 1] = sys.sha256(table.concat(new, " "))
        if not model:info().quant.scheme then
          local twin <close> = assert(model:quantize { double = true })
          local other <close> = assert(twin:forward(support.ids(9, vocab, 4)))
          parts[#parts + 1] = support.hash(other)
          local p <close> = other:softmax { temperature = 0.7 }
          parts[#parts + 1] = support.hash(p) .. support.hash(other:logsumexp())
        end
      end
      print(table.concat(parts, "\n"))
    ]]
    local seen, first = {}, nil
    for _, isa in ipairs { "scalar", "avx2", "avx512" } do
      local output, ok = support.run(code, "QLUA_CPU=" .. isa)
      if ok then
        assert.equal(isa, output:match "^%S+")
        first = first or output:gsub("^%S+", "")
        assert.equal(first, (output:gsub("^%S+", "")))
        seen[#seen + 1] = isa
      else
        assert.matches("this processor does not have it", output)
      end
    end
    assert.equal("scalar", seen[1])
  end)

  it("that do not exist are refused", function()
    local output, ok = support.run([[assert(require("qlua").device "cpu")]], "QLUA_CPU=mmx")
    assert.is_false(ok)
    assert.matches("QLUA_CPU=mmx", output)
  end)
end)

describe("a real model", function()
  it("of 512 positions gives the same bits alone and in long batches", function()
    if not support.exists(support.STORIES) then return pending("no " .. support.STORIES) end
    local model <close> = assert(support.device():load(support.STORIES))
    local twin <close> = assert(model:quantize { double = true })
    local context = model:info().max_context
    local batch = { support.ids(context, 512, 1), support.ids(context - 5, 512, 2), support.ids(3, 512, 3),
      support.ids(200, 512, 4) }
    for _, m in ipairs { model, twin } do
      local together = all_logits(m, batch, "last")
      for i, ids in ipairs(batch) do expect_equal(last(m, ids), together[i], "row", i) end
    end
  end)
end)
