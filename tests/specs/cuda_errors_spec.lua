--- CUDA that is missing, too old, full or faulty: what is said, and what of the results is kept. The plug-ins
--- are those of tests/plugin (the CPU under the name of CUDA, with faults on demand) and, where it is built,
--- the real one over an emulated CUDA runtime (tests/cuda_emu).

local json = require "qlua.json"
local lfs = require "lfs"
local support = require "tests.specs.support"

local BUILD <const> = support.QLUA:match "^(.*)/[^/]*$" or "."
local FAKE <const> = BUILD .. "/tests/plugin/fake_cuda.so"
local EMULATED <const> = BUILD .. "/libqlua_cuda_emulated.so"

local function plugin(path, settings)
  -- leak checking needs ptrace, which containers do not always grant
  return ("ASAN_OPTIONS=detect_leaks=0 QLUA_CUDA_PLUGIN='%s' %s"):format(path, settings or "")
end

local function fake(settings) return plugin(FAKE, ("QLUA_FAKE_CUDA='%s'"):format(settings)) end

--- Output of Lua code under an environment; the code must succeed.
local function output(code, environment)
  local text, ok = support.run(code, environment)
  assert.is_true(ok, text)
  return text
end

--- Runs a shell command: stdout, stderr, exit code.
local function shell(command)
  local folder = support.folder()
  local _, _, code = os.execute(("%s >%s/out 2>%s/err </dev/null"):format(command, folder, folder))
  return support.read(folder .. "/out"), support.read(folder .. "/err"), code
end

local function holds(text, ...)
  for _, part in ipairs { ... } do
    assert.truthy(text:find(part, 1, true), ("'%s' is not in: %s"):format(part, text))
  end
end

--- The one file of a folder whose name holds a text, decoded.
local function result(folder, part)
  for name in lfs.dir(folder) do
    if name:find(part, 1, true) then return assert(json.decode(support.read(folder .. "/" .. name))) end
  end
  error("no " .. part .. " in " .. folder)
end

local OPEN <const> = [[
local qlua = require "qlua"
local device, err = qlua.device "cuda"
print(device and device:info().name or err)
local auto = assert(qlua.device "auto")
print(auto:info().name)
]]

setup(function() assert(support.exists(FAKE), FAKE .. " is missing: build all of qlua's targets") end)
teardown(support.cleanup)

describe("a CUDA plug-in", function()
  it("that is missing or none is told of by cuda, and passed over by auto", function()
    for path, texts in pairs {
      ["/no/such/plugin.so"] = { "QLUA_CUDA_PLUGIN=/no/such/plugin.so", "No such file" },
      ["README.md"] = { "README.md does not load", "invalid ELF header" },
      [BUILD .. "/tests/plugin/fake_empty.so"] = { "fake_empty.so is no plug-in of qlua" },
      [BUILD .. "/tests/plugin/fake_old.so"] = { "another version", "its interface is 1", "together" },
    } do
      local text = output(OPEN, plugin(path))
      holds(text, "device 'cuda': ", "use --device cpu)\ncpu\n", table.unpack(texts))
    end
  end)

  it("that finds no device passes on what is missing", function()
    local text = output(OPEN, fake "devices=0")
    holds(text, "device 'cuda': no NVIDIA driver: libcuda.so.1 is not there (install the driver; or use "
      .. "--device cpu)\ncpu\n")
  end)

  it("lists its devices, and says of one that cannot be opened why", function()
    local code <const> = [[
      local devices, missing = require("qlua").devices()
      for _, d in ipairs(devices) do
        print(d.name, d.hardware, d.driver, d.clock_mhz, d.energy_joules, d.throttled_seconds, d.neighbours)
      end
      print(missing)
    ]]
    local text = output(code, fake "devices=2")
    holds(text, "cuda:0\tImaginary GPU\tdriver 13.0, runtime 13.0\t1980\t12.5\t0.25\t2\n",
      "cuda:1\tImag", "nil\n")
    text = output(code, fake "devices=1 refuse=1")
    assert.is_nil(text:find("Imaginary", 1, true))
    holds(text, "cuda:0 is an sm_70: qlua needs sm_75")
    holds(output(OPEN, fake "devices=1 refuse=1"), "sm_70", "\ncpu\n")
  end)

  it("has devices by index", function()
    local text = output([[
      local qlua = require "qlua"
      print(assert(qlua.device "cuda:1"):info().name)
      print(select(2, qlua.device "cuda:3"))
    ]], fake "devices=2")
    holds(text, "cuda:1\n", "device 'cuda:3': there are 2 CUDA devices, cuda:0 and cuda:1")
  end)

  it("is told the numerics, and tells memory by device", function()
    local text = output([[
      local qlua = require "qlua"
      for _, numerics in ipairs { "invariant", "fast" } do
        local device <close> = assert(qlua.device("cuda", { numerics = numerics }))
        print(device:info().numerics)
      end
      local device <close> = assert(qlua.device "cuda")
      print(device:info().numerics)
      local model <close> = assert(device:load "tests/golden/models/llama3_bf16")
      local memory = device:memory()
      print(memory.process_peak, memory.process >= model:memory().weights, device:reset_peak())
      print(memory.total - memory.free == memory.process)
    ]], fake "devices=1")
    assert.equal("invariant\nfast\nfast\nnil\ttrue\tfalse\ntrue\n", text)
  end)
end)

describe("a device that has failed", function()
  it("says so in whatever it is asked for, and can be closed", function()
    local text = output([[
      local device <close> = assert(require("qlua").device "cuda")
      local model <close> = assert(device:load "tests/golden/models/llama3_bf16")
      local _, first = model:forward { 1, 2, 3 }
      print(first.code, first)
      for _, name in ipairs { "info", "memory", "sync" } do print(select(2, device[name](device)).code) end
      print(select(2, device:time(function() end)))
      print(select(2, model:forward { 1 }))
    ]], fake "fault=1")
    holds(text, "device\tmatmul: an illegal memory access was encountered\ndevice\ndevice\ndevice\n",
      "\nthe device is refused after a fault in matmul (start again)\n")
    assert.is_nil(text:find("nil", 1, true), text)
  end)
end)

describe("qlua doctor", function()
  local function doctor(environment)
    local out, err, code = shell(("%s '%s' doctor"):format(environment, support.QLUA))
    assert.equal("", err)
    return out, code
  end

  it("shows plug-in and devices", function()
    local out, code = doctor(fake "devices=2")
    holds(out, "cuda plug-in   ", "/tests/plugin/fake_cuda.so\n", "cuda:0 ", "cuda:1 ",
      "Imaginary GPU, sm_90, 1.0 of 1.0 GiB free, driver 13.0, runtime 13.0")
    assert.equal(0, code)
  end)

  it("says what is missing and what to do", function()
    local out, code = doctor(fake "devices=0")
    holds(out, "cuda           note: no NVIDIA driver", "-> install the driver")
    assert.equal(0, code)
    out, code = doctor(fake "devices=1 refuse=1")
    holds(out, "cuda:0         note: cuda:0 is an sm_70")
    assert.equal(0, code)
    out, code = doctor(plugin(BUILD .. "/tests/plugin/fake_old.so"))
    holds(out, "cuda plug-in   error: ", "another version", "-> build qlua and its plug-in together")
    assert.equal(1, code)
    out, code = doctor(plugin "/no/such/file")
    holds(out, "error: QLUA_CUDA_PLUGIN=/no/such/file", "-> unset QLUA_CUDA_PLUGIN")
    assert.equal(1, code)
  end)
end)

--- Runs an example on the fake device: stdout, stderr, exit code, folder of its files.
local function example(settings, arguments)
  local folder = support.folder()
  local out, err, code = shell(("%s '%s' examples/%s --device cuda --output_path %s"):format(fake(settings),
    support.QLUA, arguments, folder))
  return out, err, code, folder
end

describe("an experiment", function()
  it("records device, numerics and kernels", function()
    local out, err, code, folder = example("devices=1",
      "batch_sweep.lua --batch_sizes 1,2 --runs 1 --warmup 1 --numerics invariant")
    assert.equal(0, code, err)
    holds(out, "cuda:0: Imaginary GPU, sm_90, driver 13.0, runtime 13.0, invariant numerics",
      "what this process holds on the device")
    local document = result(folder, "batch_sweep_results")
    assert.equal("invariant", document.facts.numerics)
    assert.equal("cuda:0", document.facts.device.name)
    assert.equal(4, #document.sections[1].points)
    for i, point in ipairs(document.sections[1].points) do
      local names = table.concat(point.kernels, " ")
      holds(names, "attention_", i % 2 == 1 and "matmul_bf16_" or "matmul_4bit_")
      assert.equal(i % 2 == 0, names:find("4bit", 1, true) ~= nil)
    end
    assert.equal(3, #document.facts.kernels)
    holds(out, "unfair, device: 2 other programs shared cuda:0")
    document = select(4, example("", "jaccard.lua --limit 3"))
    assert.equal("fast", result(document, "jaccard_results").facts.numerics)
  end)

  it("shows a batch that does not fit as OOM, with what it needed and what was free, and goes on", function()
    local out, err, code, folder = example("memory=7500000", "batch_sweep.lua --batch_sizes 1,64,2 --runs 2")
    assert.equal(0, code, err)
    local points = result(folder, "batch_sweep_results").sections[1].points
    assert.equal(6, #points)
    for i, point in ipairs(points) do
      assert.equal(i == 3 or i == 4, point.oom ~= nil)
      assert.equal(point.oom == nil, point.seconds ~= nil)
      if point.oom then assert.matches("^out of device memory: %d+ bytes needed, %d+ free$", point.oom) end
    end
    holds(out, "OOM at batch 64, full: out of device memory: ", "OOM at batch 64, nf4: ")
  end)

  it("of a device that fails keeps the rows that are finished", function()
    local out, err, code, folder = example("fault=300", "batch_sweep.lua --batch_sizes 1,2,4 --runs 2")
    assert.equal(1, code)
    local stopped <const> = "matmul: an illegal memory access was encountered"
    holds(err, "batch_sweep.lua: " .. stopped .. ": what is finished follows\n")
    assert.is_nil(err:find("traceback", 1, true))
    local document = result(folder, "batch_sweep_results")
    assert.equal(2, #document.sections[1].points)
    assert.equal(1, document.sections[1].points[2].batch)
    assert.equal(stopped, document.facts.stopped)
    holds(out, "Imaginary GPU", "wrote ")

    out, err, code, folder = example("fault=300", "jaccard.lua --limit 12 --batch_size 4 --k 1")
    assert.equal(1, code)
    holds(err, "jaccard.lua: " .. stopped)
    document = result(folder, "jaccard_results")
    local section = document.sections[1]
    assert.same({ 12, "jaccard@1" }, { section.questions, section.pair[1].name })
    assert.is_true(section.pair[1].n > 0 and section.pair[1].n < 12)
    holds(out, "not reached")

    out, err, code, folder = example("fault=300", "mmlu.lua --limit 12 --batch_size 4 --mode loglikelihood")
    assert.equal(1, code)
    holds(err, "mmlu.lua: " .. stopped)
    document = result(folder .. "/demo__nf4", "results_")
    local row = document.results.mmlu_lantern_isles
    assert.is_true(row.sample_len > 0 and row.sample_len < 12)
    holds(table.concat(document.qlua.tasks.mmlu_lantern_isles.kernels, " "), "matmul_4bit_", "attention_")
    holds(out, "accuracy")

    out, err, code, folder = example("fault=300", "perplexity.lua --text README.md --context 32 --limit 20")
    assert.equal(1, code)
    holds(err, "perplexity.lua: " .. stopped)
    document = result(folder, "perplexity_results")
    local windows = document.sections[1].protocol.windows
    assert.is_true(windows > 0 and windows < 20)
    assert.equal(15 * windows, document.sections[1].summary.n)
    holds(out, "(interrupted)")

    local _, message, last = example("fault=30", "codebook.lua --limit 4")
    assert.equal(1, last)
    holds(message, "codebook.lua: " .. stopped)
  end)

  it("that meets a faulty device at once ends in one line", function()
    local out, err, code = example("refuse=2", "jaccard.lua --limit 3")
    assert.equal(1, code)
    assert.equal("", out)
    assert.equal("jaccard.lua: cuda:0: uncorrectable memory error encountered\n", err)
  end)
end)

describe("the real backend over an emulated runtime", function()
  local function emulated(settings) return plugin(EMULATED, ("QLUA_EMU_CUDA='%s'"):format(settings)) end

  local function if_built()
    if not support.exists(EMULATED) then pending(EMULATED .. " is not built") end
  end

  it("says why there is no device", function()
    if_built()
    for settings, texts in pairs {
      ["error=driver"] = { "device 'cuda': no CUDA device: ", "driver" },
      ["error=nodevice"] = { "device 'cuda': no CUDA device: ", "sees none" },
      ["devices=0"] = { "device 'cuda': no CUDA device: " },
      ["sm=70"] = { "compute capability 7.0", "7.5" },
    } do
      local text = output(OPEN, emulated(settings))
      holds(text, "--device cpu", "\ncpu\n", table.unpack(texts))
    end
  end)

  it("has as many devices as there are", function()
    if_built()
    local text = output([[
      local qlua = require "qlua"
      for _, d in ipairs((qlua.devices())) do print(d.name, d.driver, d.memory_total) end
      print(select(2, qlua.device "cuda:2"))
    ]], emulated "devices=2,memory=1000000000")
    holds(text, "cuda:0\tdriver ", "cuda:1\tdriver ", "\t1000000000\n", "cuda:0 and cuda:1")
  end)

  it("says of a batch that does not fit what it needed and what was free, and takes the next", function()
    if_built()
    local text = output([[
      local device <close> = assert(require("qlua").device "cuda")
      local model <close> = assert(device:load "tests/golden/models/llama3_bf16")
      local before, row, many = device:memory().free, {}, {}
      for i = 1, 32 do row[i] = i end
      for i = 1, 512 do many[i] = row end
      local logits, err = model:forward(many)
      print(logits, err.code, err)
      local small <close> = assert(model:forward { 1, 2, 3 })
      print(small:size(1), device:sync(), before - device:memory().free < 4 << 20)
    ]], emulated "memory=8000000")
    assert.matches("^nil\tmemory\tcuda:0 is out of memory: %d+ bytes %b() needed, %d+ %b() of 7.6 MiB free",
      text)
    holds(text, "\n3\ttrue\ttrue\n")
  end)

  it("is what experiments run on, with the kernels that ran in their files", function()
    if_built()
    local folder = support.folder()
    local _, err, code = shell(("%s '%s' examples/jaccard.lua --device cuda --limit 1 --output_path %s")
      :format(emulated "devices=1", support.QLUA, folder))
    assert.equal(0, code, err)
    local facts = result(folder, "jaccard_results").facts
    assert.equal("fast", facts.numerics)
    assert.equal("sm_90", facts.device.isa)
    holds(table.concat(facts.kernels, "; "), "4-bit", "16-bit", "flash")
  end)

  it("refuses the device after a fault, and names the operation once", function()
    if_built()
    local text = output([[
      local device <close> = assert(require("qlua").device "cuda")
      local model, err = device:load "tests/golden/models/llama3_bf16"
      local logits, why
      if model then
        for _ = 1, 200 do
          logits, why = model:forward { 1, 2, 3 }
          if not logits then break end
          logits:close()
        end
      end
      err = err or why
      print(err.code, err)
      print(select(2, device:sync()))
    ]], emulated "fault=40")
    holds(text, "device\t")
    assert.is_nil(text:find("\nnil\n", 1, true), text)
  end)
end)
