--- The quantized twin: schemes, options, what it shares, and who owns it.

local qlua = require "qlua"
local support = require "tests.specs.support"

local raises = support.raises
local FOLDER <const> = support.MODELS .. "llama3_bf16"
local IDS <const> = { 1, 21, 61, 77, 32, 19, 69, 22 }

local full

setup(function() full = assert(support.device():load(FOLDER)) end)
teardown(function()
  full:close()
  support.cleanup()
end)

local function hash(model, ids)
  local logits <close> = assert(model:forward(ids or IDS))
  return support.hash(logits)
end

local function by_name(model)
  local map = {}
  for _, m in ipairs(model:matrices()) do map[m.name] = m end
  return map
end

--- Bytes in memory of a 4-bit matrix: codes, and scales in float32.
local function quantized_bytes(m, block)
  local n = m.rows * m.columns
  return (n + 1) // 2 + 4 * ((n + block - 1) // block)
end

describe("quantize", function()
  it("takes every scheme, with and without double quantization", function()
    local before, seen = hash(full), {}
    for _, scheme in ipairs { "nf4", "fp4" } do
      for _, double in ipairs { false, true } do
        local twin <close> = assert(full:quantize { scheme = scheme, double = double })
        local quant = twin:info().quant
        assert.equal(scheme, quant.label)
        assert.equal(scheme, quant.scheme)
        assert.equal(64, quant.block)
        assert.equal(double, quant.double)
        assert.equal(14, quant.quantized)
        local key = hash(twin)
        assert.is_nil(seen[key])
        seen[key] = true
      end
    end
    assert.is_nil(seen[before])
    assert.equal(before, hash(full))
    local plain <close> = assert(full:quantize())
    assert.equal("nf4", plain:info().quant.label)
    assert.is_false(plain:info().quant.double)
    assert.same({ full:info().dtype }, { plain:info().quant.dtype, full:info().quant.dtype })
  end)

  it("costs what its block size says", function()
    local logits <close> = assert(full:forward(IDS))
    local errors = {}
    for _, block in ipairs { 32, 64, 128, 256, 512, 1024, 2048, 4096 } do
      local twin <close> = assert(full:quantize { block = block })
      assert.equal(block, twin:info().quant.block)
      for _, m in ipairs(twin:matrices()) do
        if m.scheme then assert.equal(quantized_bytes(m, block), m.bytes) end
      end
      local other <close> = assert(twin:forward(IDS))
      local _, rms = support.difference(other, logits)
      errors[#errors + 1] = rms
    end
    assert.is_true(errors[1] < errors[#errors], "larger blocks should be worse")
  end)

  it("a code book equal to nf4's gives nf4's numbers", function()
    local book <const> = { -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
      -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534,
      0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434,
      0.5626170039176941, 0.7229568362236023, 1.0 }
    local a <close> = assert(full:quantize { scheme = "nf4" })
    local b <close> = assert(full:quantize { codebook = book })
    assert.equal(hash(a), hash(b))
    assert.equal("codebook", b:info().quant.label)
    -- scaled, shuffled: the same values
    local other = {}
    for i, value in ipairs(book) do other[(i * 5) % 16 + 1] = 4 * value end
    local c <close> = assert(full:quantize { codebook = other })
    assert.equal(hash(a), hash(c))
    -- sixteen times the same value is allowed, and coarse
    local d <close> = assert(full:quantize { codebook = { 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 } })
    assert.not_equal(hash(a), hash(d))
  end)

  it("decodes to the dtype that is asked for", function()
    local own <close> = assert(full:quantize { dtype = "auto" })
    local same <close> = assert(full:quantize { dtype = "bfloat16" })
    local wide <close> = assert(full:quantize { dtype = "float32" })
    assert.equal(hash(own), hash(same))
    assert.not_equal(hash(own), hash(wide))
  end)

  it("skips whole parts of names", function()
    local function names(skip)
      local twin <close> = assert(full:quantize { skip = skip })
      local list = {}
      for _, m in ipairs(twin:matrices()) do
        if m.scheme then list[#list + 1] = m.name:gsub("^model%.layers%.", "") end
      end
      return #list, table.concat(list, " ")
    end
    assert.equal(15, (names {}))
    assert.equal(14, (names "lm_head"))
    local n, list = names { "lm_head", "mlp" }
    assert.equal(8, n)
    assert.is_nil(list:find "mlp")
    n, list = names { "lm_head", "layers.1" }
    assert.equal(7, n)
    assert.is_nil(list:find "1%.")
    n, list = names { "lm_head", "model.layers.0.mlp.down_proj" }
    assert.equal(13, n)
    assert.is_nil(list:find("0.mlp.down_proj", 1, true))
    assert.is_truthy(list:find("1.mlp.down_proj", 1, true))
    assert.equal(14, (names { "lm_head", "q_pro", "layers.2", "ayers.0" })) -- no whole parts of any name
  end)

  it("asks a policy for every matrix that is not skipped", function()
    local asked = {}
    local twin <close> = assert(full:quantize {
      policy = function(name, shape)
        asked[name] = shape
        if name:find "q_proj" then return "fp4" end
        if name:find "up_proj" then return { scheme = "nf4", block = 128, double = true } end
        if name:find "layers.1.mlp.down_proj" then
          return { codebook = { 0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -2, -3, -4, -5, -6, -7 } }
        end
        return nil
      end,
      block = 32,
    })
    local original, map = by_name(full), by_name(twin)
    assert.is_nil(asked.lm_head)
    for name, shape in pairs(asked) do
      assert.same({ original[name].rows, original[name].columns }, shape)
    end
    assert.equal("fp4", map["model.layers.0.self_attn.q_proj"].scheme)
    assert.equal(32, map["model.layers.0.self_attn.q_proj"].block)
    assert.equal(128, map["model.layers.1.mlp.up_proj"].block)
    assert.is_true(map["model.layers.1.mlp.up_proj"].double)
    assert.equal("codebook", map["model.layers.1.mlp.down_proj"].scheme)
    assert.is_nil(map["model.layers.0.mlp.down_proj"].scheme)
    assert.is_true(map["model.layers.0.mlp.down_proj"].shared)
    assert.equal("mixed 5/14", twin:info().quant.label)
    assert.is_nil(twin:info().quant.scheme)
    local none <close> = assert(full:quantize { policy = function() return nil end })
    assert.equal("bfloat16", none:info().quant.label)
    assert.equal(hash(full), hash(none))
  end)

  it("mixed twins differ from both ends", function()
    local attention <close> = assert(full:quantize { skip = { "lm_head", "mlp" } })
    local everything <close> = assert(full:quantize {})
    local a, b, c = hash(full), hash(attention), hash(everything)
    assert.is_true(a ~= b and b ~= c and a ~= c)
    assert.equal("nf4 8/14", attention:info().quant.label)
  end)
end)

describe("the twin", function()
  it("shares what it does not change", function()
    local twin <close> = assert(full:quantize {})
    local memory, expected = twin:memory(), 0
    for _, m in ipairs(twin:matrices()) do
      if m.scheme then
        expected = expected + quantized_bytes(m, 64)
        assert.is_false(m.shared)
      else
        assert.is_true(m.shared)
      end
    end
    assert.equal(expected, memory.weights)
    assert.equal(twin:info().bytes, memory.resident)
    assert.is_true(memory.resident > memory.weights)
    assert.is_true(memory.resident < full:memory().resident)
  end)

  it("counts double-quantized scales, beside decoded ones on the CPU, else in their place", function()
    local before = full:memory()
    local single <close> = assert(full:quantize {})
    local double <close> = assert(full:quantize { double = true })
    local more = 0
    for _, m in ipairs(double:matrices()) do
      local blocks = m.rows * m.columns // 64
      local nested = blocks + 4 * ((blocks + 255) // 256)
      -- elsewhere the map of 256 values and the offset lie with each matrix
      if support.DEVICE ~= "cpu" then nested = nested + 4 * 257 - 4 * blocks end
      if m.scheme then more = more + nested end
    end
    assert.not_equal(0, more)
    assert.equal(more, double:memory().weights - single:memory().weights)
    assert.equal(more, double:info().bytes - single:info().bytes)
    assert.equal(double:info().bytes, double:memory().resident)
    assert.same(before, full:memory())
  end)

  it("and the full model outlive each other, in any order", function()
    local device = support.device()
    for _ = 1, 2 do
      local a = assert(device:load(FOLDER))
      local b = assert(a:quantize {})
      local ha, hb = hash(a), hash(b)
      b:close()
      assert.equal(ha, hash(a))
      b = assert(a:quantize {})
      a:close()
      collectgarbage()
      assert.equal(hb, hash(b))
      raises(function() hash(a) end, "closed")
      b:close()
    end
  end)

  it("of a tied model keeps the embedding, whatever is asked of lm_head", function()
    local tied <close> = assert(support.device():load(support.MODELS .. "llama31_bf16"))
    assert.is_true(tied:info().tied)
    local twin <close> = assert(tied:quantize {})
    assert.equal(14, twin:info().quant.quantized)
    local head <close> = assert(tied:quantize { skip = {} })
    assert.equal(15, head:info().quant.quantized)
    assert.not_equal(hash(twin), hash(head))
    assert.is_false(head:info().bytes < twin:info().bytes) -- the embedding stays, the head comes on top
  end)

  it("runs from random weights too", function()
    local device = support.device()
    local function tiny(seed, quant)
      return assert(qlua.load_synthetic("tiny", { device = device, dtype = "float32", seed = seed,
        quant = quant }))
    end
    local dense <close> = tiny(3)
    local twin <close> = assert(dense:quantize { double = true })
    local direct <close> = tiny(3, { scheme = "nf4", double = true })
    assert.equal(hash(twin), hash(direct))
    assert.equal("nf4", direct:info().quant.label)
    local other <close> = tiny(4)
    assert.not_equal(hash(dense), hash(other))
  end)

  it("of random weights parts a tied head from the embedding too", function()
    local shape <const> = { device = support.device(), layers = 1 }
    local dense <close> = assert(qlua.load_synthetic("smollm2-135m", shape))
    local twin <close> = assert(dense:quantize { skip = {} })
    shape.quant = { skip = {} }
    local direct <close> = assert(qlua.load_synthetic("smollm2-135m", shape))
    assert.same(twin:info(), direct:info())
    assert.equal("nf4", by_name(direct).lm_head.scheme)
  end)
end)

describe("a model loaded with quant", function()
  local CHOICES <const> = {
    { scheme = "nf4", double = true },
    { scheme = "fp4", block = 128, skip = { "mlp" } },
    { codebook = { -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7 }, dtype = "float32" },
    { skip = {} },
    { policy = function(name) return name:find "up_proj" and "nf4" or nil end },
  }

  it("is the twin of the full one, bit by bit, and shares nothing", function()
    for _, folder in ipairs { FOLDER, support.MODELS .. "llama31_bf16", support.MODELS .. "biases_bf16" } do
      local source <close> = assert(support.device():load(folder))
      for _, quant in ipairs(CHOICES) do
        local twin <close> = assert(source:quantize(quant))
        local direct <close> = assert(support.device():load(folder, { quant = quant }))
        assert.same(twin:info(), direct:info())
        assert.equal(hash(twin), hash(direct))
        assert.equal(direct:info().bytes, direct:memory().weights)
        local map = by_name(direct)
        for _, m in ipairs(twin:matrices()) do
          -- a tied head that stays as it is shares the embedding's memory
          local tied = m.name == "lm_head" and not m.scheme and source:info().tied
          assert.equal(tied, map[m.name].shared)
          m.shared = map[m.name].shared
          assert.same(m, map[m.name])
        end
        local outline <close> = assert(support.device():outline(folder, { quant = quant }))
        assert.same(direct:info(), outline:info())
        assert.equal(direct:memory().weights, outline:memory().weights)
      end
    end
  end)

  it("takes a scheme's name and the other options of load", function()
    local options <const> = { dtype = "float32", max_context = 20 }
    local source <close> = assert(support.device():load(FOLDER, options))
    local twin <close> = assert(source:quantize { scheme = "fp4" })
    options.quant = "fp4"
    local direct <close> = assert(support.device():load(FOLDER, options))
    assert.same(twin:info(), direct:info())
    assert.equal(hash(twin), hash(direct))
  end)

  it("is saved as the twin is, and loads back", function()
    local folder, quant = support.folder(), { double = true }
    local twin <close> = assert(full:quantize(quant))
    local direct <close> = assert(support.device():load(FOLDER, { quant = quant }))
    assert(twin:save(folder .. "/twin"))
    assert(direct:save(folder .. "/direct"))
    for _, file in ipairs { "model.safetensors", "config.json" } do
      assert.is_true(support.read(folder .. "/twin/" .. file) == support.read(folder .. "/direct/" .. file))
    end
    local again <close> = assert(support.device():load(folder .. "/direct"))
    assert.equal(hash(direct), hash(again))
  end)

  it("refuses what quantize refuses, as an outline does", function()
    for _, make in ipairs { "load", "outline" } do
      local function attempt(quant, name)
        return function()
          local device = support.device()
          local model = device[make](device, name and support.MODELS .. name or FOLDER, { quant = quant })
          return model -- no tail call: the message names this file
        end
      end
      raises(attempt "nf5", "'nf5'", "nf4 and fp4")
      raises(attempt { schem = "nf4" }, "quantize_spec", "'schem'")
      raises(attempt { block = 48 }, "48", "power of two")
      raises(attempt(true), "quantize_spec", "table", "boolean")
      raises(attempt { policy = function() error "enough" end }, "enough")
      raises(attempt({}, "fp4"), "q_proj", "already quantized", "fp4")
      -- what is not quantized yet can be
      local more <close> = assert(attempt({ skip = "layers" }, "fp4")())
      assert.equal("fp4", by_name(more)["model.layers.0.mlp.up_proj"].scheme)
      assert.equal("nf4", by_name(more).lm_head.scheme)
    end
  end)
end)

describe("codes", function()
  it("are those of bitsandbytes where its own values are encoded again", function()
    -- a decoded value is its own nearest entry, and every block holds its absmax: the codes come back, and
    -- with scales in float32 (theirs are 8 bits) the same weights
    local source <const> = support.MODELS .. "nf4_f32"
    local ck <close> = assert(qlua.open_checkpoint(source))
    local folder, tensors = support.folder(), {}
    for _, name in ipairs(ck:names()) do
      if not name:find "%.weight%." then
        local value = ck:tensor(name)
        tensors[#tensors + 1] = { name = name, shape = value:shape(), bytes = support.bytes(value) }
      end
    end
    support.write_safetensors(folder .. "/model.safetensors", tensors)
    local config = support.json(source .. "/config.json")
    config.quantization_config = nil
    support.write(folder .. "/config.json", require("qlua.json").encode(config))
    local dense <close> = assert(support.device():load(folder))
    local twin <close> = assert(dense:quantize { scheme = "nf4" })
    assert(twin:save(folder .. "/saved"))
    local theirs = support.raw_tensors(source .. "/model.safetensors")
    local ours = support.raw_tensors(folder .. "/saved/model.safetensors")
    local compared = 0
    for _, m in ipairs(twin:matrices()) do
      for _, suffix in ipairs { ".weight", ".weight.quant_map" } do
        if m.scheme then
          local name = m.name .. suffix
          assert.is_true(theirs[name] ~= nil and theirs[name] == ours[name], name)
          compared = compared + 1
        end
      end
    end
    assert.equal(2 * 7, compared)
    assert.equal(hash(twin), hash(assert(support.device():load(source))))
  end)
end)

describe("wrong options", function()
  it("raise, naming option and value", function()
    local function quantize(options) return function() full:quantize(options) end end
    raises(quantize { scheme = "nf5" }, "'nf5'", "nf4 and fp4")
    raises(quantize { schem = "nf4" }, "'schem'", "scheme")
    raises(quantize { block = 48 }, "48", "power of two")
    raises(quantize { block = 16 }, "16", "32 to 4096")
    raises(quantize { block = 8192 }, "8192", "32 to 4096")
    raises(quantize { block = 64.5 }, "'block'")
    raises(quantize { double = 1 }, "'double'")
    raises(quantize { dtype = "int4" }, "'dtype'")
    raises(quantize { skip = 5 }, "'skip'")
    raises(quantize "nf4", "table", "string")
    local book = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15 }
    raises(quantize { codebook = book }, "'codebook'", "16 numbers")
    book[16] = 0 / 0
    raises(quantize { codebook = book }, "entry 16", "finite")
    book[16] = "x"
    raises(quantize { codebook = book }, "entry 16", "'codebook'")
    book[16] = 16
    raises(quantize { codebook = book, scheme = "nf4" }, "'codebook'", "'scheme'")
    raises(quantize { codebook = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0 } }, "zero")
  end)

  it("of a policy raise too, and leave no twin behind", function()
    local function policy(answer)
      return function() full:quantize { policy = function() return answer end } end
    end
    raises(function() full:quantize { policy = "nf4" } end, "'policy'", "string")
    raises(policy(4), "model.layers.0.self_attn.q_proj", "number")
    raises(policy(true), "q_proj", "boolean")
    raises(policy "nf9", "'nf9'")
    raises(policy { blok = 32 }, "'blok'")
    raises(policy { block = 33 }, "33")
    local count, before = 0, hash(full)
    raises(function()
      full:quantize {
        policy = function()
          count = count + 1
          if count == 9 then error "enough" end
          return "nf4"
        end,
      }
    end, "enough")
    assert.equal(9, count)
    assert.equal(before, hash(full))
  end)

  it("a policy that raises a table gets it back", function()
    local thrown <const> = { "thrown" }
    local ok, why = pcall(full.quantize, full, { policy = function() error(thrown) end })
    assert.is_false(ok)
    assert.equal(thrown, why)
  end)

  it("a quantized model is not quantized again", function()
    local twin <close> = assert(full:quantize {})
    raises(function() twin:quantize {} end, "q_proj", "already quantized", "nf4")
    -- but what it left alone can be
    local more <close> = assert(twin:quantize { skip = { "layers" } })
    assert.equal(15, more:info().quant.quantized)
    local loaded <close> = assert(support.device():load(support.MODELS .. "fp4"))
    raises(function() loaded:quantize {} end, "already quantized", "fp4")
  end)
end)
