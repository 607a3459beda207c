-- Batch sweeps in llama-bench's formats.

local json = require "qlua.json"
local llama_bench = require "qlua.llama_bench"

-- what llama-bench -o csv of the end of 2025 writes as its first line
local COLUMNS <const> = "build_commit,build_number,cpu_info,gpu_info,backends,model_filename,model_type,"
  .. "model_size,model_n_params,n_batch,n_ubatch,n_threads,cpu_mask,cpu_strict,poll,type_k,type_v,"
  .. "n_gpu_layers,n_cpu_moe,split_mode,main_gpu,no_kv_offload,flash_attn,devices,tensor_split,"
  .. "tensor_buft_overrides,use_mmap,embeddings,no_op_offload,no_host,n_prompt,n_gen,n_depth,test_time,"
  .. "avg_ns,stddev_ns,avg_ts,stddev_ts"

local function sweep(device)
  local info = { architecture = "LlamaForCausalLM", params = 2100000, bytes = 4 << 20, dtype = "bfloat16",
    kv_dtype = "float32", layers = 6 }
  local function seconds(samples, mean, sd)
    return { n = #samples, samples = samples, mean = mean, sd = sd, median = mean }
  end
  local section = { kind = "sweep", points = {
    { batch = 2, model = 1, label = "full", tokens = 150.5, pass_tokens = { 100, 201 },
      seconds = seconds({ 0.5, 1.0 }, 0.75, 0.25) },
    { batch = 2, model = 2, label = "nf4", tokens = 150.5, seconds = seconds({ 0.25, 0.25 }, 0.25, 0.0) },
    { batch = 64, model = 1, label = "full", tokens = 9000, oom = "out of memory: 5 bytes" },
  } }
  return { started = 1721995200.25, options = { model = "it's", quantized = "q4" },
    facts = { qlua_version = "0.1", device = device or { name = "cpu", hardware = "a, \"CPU\"", threads = 3 },
      full = info, quantized = info } }, section
end

describe("llama_bench", function()
  it("has llama-bench's columns, and nothing where qlua has no counterpart", function()
    local lines = {}
    local doc, section = sweep()
    for line in llama_bench.text(doc, section, "csv"):gmatch "(.-)\r\n" do lines[#lines + 1] = line end
    assert.equal(COLUMNS .. ",n_rows", lines[1])
    assert.equal(3, #lines) -- what did not fit has no row
    assert.equal('qlua 0.1,,"a, ""CPU""",,CPU,it\'s,LlamaForCausalLM 2.10 M bfloat16,4194304,2100000,151,151,'
      .. '3,,,,float32,float32,0,,,,,,cpu,,,,,,,151,0,0,2024-07-26T12:00:00Z,750000000,250000000,200.5,'
      .. '0.7071067811865476,2', lines[2])
    assert.truthy(lines[3]:find("q4,LlamaForCausalLM 2.10 M nf4,", 1, true))
  end)

  it("has the rate of every pass where passes' tokens are known, else only their mean", function()
    local doc, section = sweep()
    local rows = assert(json.decode(llama_bench.text(doc, section, "json")))
    assert.equal(2, #rows)
    assert.same({ 500000000, 1000000000 }, { table.unpack(rows[1].samples_ns) })
    assert.same({ 200.0, 201.0 }, { table.unpack(rows[1].samples_ts) })
    assert.equal(200.5, rows[1].avg_ts)
    assert.is_nil(rows[2].samples_ts)
    assert.is_nil(rows[2].stddev_ts)
    assert.equal(602.0, rows[2].avg_ts)
  end)

  it("writes the same rows as lines", function()
    local doc, section = sweep()
    local rows = assert(json.decode(llama_bench.text(doc, section, "json")))
    local n = 0
    for line in llama_bench.text(doc, section, "jsonl"):gmatch "[^\n]+" do
      n = n + 1
      assert.equal(json.encode(rows[n]), json.encode(assert(json.decode(line))))
    end
    assert.equal(2, n)
  end)

  it("writes SQL that names its columns and quotes its texts", function()
    local doc, section = sweep()
    local text = llama_bench.text(doc, section, "sql")
    local names = {}
    for name, kind in text:match "^CREATE TABLE IF NOT EXISTS llama_bench %((.-)\n%);":gmatch "(%S+) (%u+)" do
      names[#names + 1] = name
      assert.truthy(kind == "TEXT" or kind == "INTEGER" or kind == "REAL", name)
    end
    assert.equal(COLUMNS, table.concat(names, ","))
    assert.equal(2, select(2, text:gsub("\nINSERT INTO llama_bench %(build_commit, ", "")))
    assert.truthy(text:find("VALUES ('qlua 0.1', NULL, 'a, \"CPU\"', NULL, 'CPU', 'it''s', ", 1, true))
  end)

  it("writes Markdown, with what did not fit below", function()
    local doc, section = sweep { name = "cuda:0", hardware = "a GPU" }
    local text = llama_bench.text(doc, section, "md")
    assert.truthy(text:find "^| model +|", text)
    assert.truthy(text:find("| CUDA    |   6 |      2 | pp151 |", 1, true), text)
    assert.truthy(text:find("200.50 ± 0.71 |", 1, true), text)
    assert.truthy(text:find("\nfull, batch 64: out of memory: 5 bytes\n", 1, true), text)
    assert.truthy(text:find("build: qlua 0.1\n", 1, true), text)
  end)
end)
