-- The experiments that complete the study, and the study as a whole: real runs on the bundled model.

local json = require "qlua.json"
local lfs = require "lfs"
local stats = require "qlua.stats"
local store = require "qlua.store"
local study = require "qlua.study"
local support = require "tests.specs.support"

local QUICK <const> = "--limit 6 --threads 1 --output_path "

local folder
before_each(function() folder = support.folder() end)
after_each(support.cleanup)

--- Runs an example: stdout, stderr, exit code.
local function example(words)
  local err = folder .. "/stderr"
  local pipe = assert(io.popen(("'%s' examples/%s 2>%s </dev/null"):format(support.QLUA, words, err)))
  local out = pipe:read "a"
  local _, _, code = pipe:close()
  return out, support.read(err), code
end

--- The documents of all runs in a store, oldest first.
local function documents(path)
  local opened <close> = assert(store.open(path .. "/qlua.sqlite", { readonly = true }))
  local list = {}
  for _, entry in ipairs(assert(opened:runs())) do
    table.insert(list, 1, json.decode(assert(opened:run(entry.id)).document))
  end
  return list, opened
end

--- One line on stderr that has every word, exit code 1, nothing printed.
local function refused(words, ...)
  local out, err, code = example(words)
  assert.equal(1, code, err)
  assert.equal("", out)
  assert.equal(1, select(2, err:gsub("\n", "\n")), err)
  for _, word in ipairs { ... } do assert.truthy(err:find(word, 1, true), err) end
end

describe("nucleus.lua", function()
  it("has figures of every setting that follow from its rows, and reuses them", function()
    local path = folder .. "/results"
    local words = "nucleus.lua --top_p 0.5,0.9,1 --temperature 0.7,1.5 " .. QUICK .. path
    local out, err, code = example(words)
    assert.equal(0, code, err)
    assert.truthy(out:find("full v full", 1, true))
    local section = documents(path)[1].sections[1]
    assert.same({ "nucleus", 6, 6 }, { section.kind, section.scored, #section.rows })
    local opened <close> = assert(store.open(path .. "/qlua.sqlite", { readonly = true }))
    local rows = assert(opened:run_rows(1, section.set))
    assert.equal(6, #rows)
    for setting, row in ipairs(section.rows) do
      local overlaps, sizes = {}, {}
      for i, stored in ipairs(rows) do
        local value = json.decode(stored[2]).pair[setting]
        overlaps[i], sizes[i] = value[1], value[3]
        for _, share in ipairs { value[1], value[4], value[5], value[6] } do
          assert.is_true(share >= 0 and share <= 1 + 1e-12)
        end
      end
      assert.equal(stats.mean(overlaps), row.overlap.value)
      assert.equal(stats.median(sizes), row.sizes[2].median)
    end
    assert.same({ 1, 1, 0 }, { section.rows[3].overlap.value, section.rows[3].masses[1].value,
      section.rows[3].outside.count })
    assert.is_true(section.rows[1].sizes[1].mean <= section.rows[2].sizes[1].mean)
    assert.is_true(section.rows[2].sizes[1].mean <= section.rows[5].sizes[1].mean)

    local again, told = example(words)
    assert.truthy(told:find("all 6 rows reused", 1, true), told)
    assert.equal(out:match "^(.-)\nwrote", again:match "^(.-)\nwrote")
  end)

  it("refuses settings that are none, and foretells", function()
    refused("nucleus.lua --no_output --top_p 0.9,1.1", "--top_p", "1.1")
    refused("nucleus.lua --no_output --top_p 0", "--top_p", "0")
    refused("nucleus.lua --no_output --temperature 0.7,0", "--temperature", "0")
    refused("nucleus.lua --no_output --temperature hot", "--temperature", "hot")
    local out, err, code = example "nucleus.lua --dry_run"
    assert.equal(0, code, err)
    assert.truthy(out:find("it fits", 1, true))
  end)
end)

describe("sensitivity.lua", function()
  it("ranks every kind of matrix, and mixed_precision.lua starts from the same rows", function()
    local path = folder .. "/results"
    local out, err, code = example("sensitivity.lua --by kind " .. QUICK .. path)
    assert.equal(0, code, err)
    assert.truthy(out:find("KL per MiB saved", 1, true))
    local section = documents(path)[1].sections[1]
    assert.same({ "sensitivity", "kind", 7, 6 }, { section.kind, section.by, #section.rows, section.scored })
    local saved = 0
    for i, row in ipairs(section.rows) do
      assert.is_true(i == 1 or row.kl.value <= section.rows[i - 1].kl.value)
      assert.near(row.kl.value, row.kl_per_mib * row.saved / 2 ^ 20, 1e-15)
      saved = saved + row.saved
    end
    assert.equal(section.all.saved, saved)

    local _, told, other = example("mixed_precision.lua --by kind " .. QUICK .. path)
    assert.equal(0, other, told)
    assert.truthy(told:find("variants: all 7 rows reused", 1, true), told)
    local ranked = documents(path)[2].sections[1].rows
    for i = 1, 7 do assert.equal(section.rows[8 - i].kl.value, ranked[i].kl.value) end
  end)

  it("takes single matrices, leaves skipped ones out, refuses other groups", function()
    local path = folder .. "/results"
    local _, err, code = example("sensitivity.lua --by matrix --skip mlp,lm_head,layers.0 " .. QUICK .. path)
    assert.equal(0, code, err)
    local rows = documents(path)[1].sections[1].rows
    assert.equal(16, #rows)
    for _, row in ipairs(rows) do
      assert.truthy(row.label:find "^[1-4]%.self_attn%.[qkvo]_proj$", row.label)
    end
    refused("sensitivity.lua --no_output --by head", "--by", "layer, kind, matrix")
  end)
end)

describe("report_all.lua", function()
  it("runs the study, writes one report of it, and goes on where it was", function()
    local path, text = folder .. "/results", support.write(folder .. "/text.txt",
      ("The lantern keeper counts the boats. "):rep(400))
    local words = ("report_all.lua --quick --text %s --parts batch_sweep,jaccard,nucleus,mmlu,perplexity,"
      .. "sensitivity "):format(text) .. QUICK .. path
    local out, err, code = example(words)
    assert.equal(0, code, err)
    local names, kinds = {}, {}
    for i, doc in ipairs(documents(path)) do
      names[i], kinds[i] = doc.name, doc.sections[1].kind
      assert.equal("finished", doc.status)
    end
    assert.same({ "batch_sweep.lua", "jaccard.lua", "nucleus.lua", "mmlu.lua", "perplexity.lua",
      "sensitivity.lua" }, names)
    assert.same({ "sweep", "metrics", "nucleus", "mmlu", "perplexity", "sensitivity" }, kinds)
    for _, name in ipairs(names) do
      assert.truthy(out:match("\n" .. name:gsub("%.lua", "") .. " +finished\n"), out)
    end
    local html = support.read(path .. "/report.html")
    for _, id in ipairs { "sweep%-latency", "metrics", "nucleus", "sensitivity", "perplexity" } do
      assert.truthy(html:find('id="' .. id .. '"'), id)
    end
    local headline, because = out:match "\n\n(%u[^\n]-%.) ([^\n]+)\n  "
    assert.truthy(html:find(headline, 1, true) and html:find(because, 1, true), out)
    assert.truthy(out:find("wrote " .. path .. "/report.html\n$"))

    local _, told = example(words)
    assert.equal(8, select(2, told:gsub("rows reused %(", "")), told)
    assert.is_nil(told:find("to run", 1, true), told)
  end)

  it("reports a part that fails, and goes on", function()
    local tasks = support.write(folder .. "/isles_test.csv",
      support.read "examples/data/lantern_isles_test.csv")
    local path = folder .. "/results"
    local out, err, code = example(("report_all.lua --quick --parts mmlu,jaccard,sensitivity --tasks %s "
      .. "--num_fewshot 2 %s"):format(tasks, QUICK .. path))
    assert.equal(1, code, err)
    assert.truthy(err:find("mmlu.lua: ", 1, true) and err:find("isles_dev.csv", 1, true), err)
    assert.truthy(out:find "\nmmlu +failed: [^\n]*isles_dev%.csv", out)
    assert.truthy(out:find "\njaccard +finished\n" and out:find "\nsensitivity +finished\n", out)
    local done = {}
    for i, doc in ipairs(documents(path)) do done[i] = doc.name end
    assert.same({ "jaccard.lua", "sensitivity.lua" }, done)
    assert.truthy(lfs.attributes(path .. "/report.html"))
  end)

  it("refuses what no part could run with, at once", function()
    refused("report_all.lua --no_output --parts jaccard,jacard", "--parts", "jaccard?")
    refused("report_all.lua --no_output --parts perplexity", "--text")
    refused("report_all.lua --no_output --parts jaccard --text README.md", "--text", "perplexity")
    refused("report_all.lua --no_output --text " .. folder .. "/none.txt", "none.txt")
    refused("report_all.lua --no_output --model ./no/such", "no/such")
    refused("report_all.lua --no_output --tasks nothing.csv", "nothing.csv")
    refused("report_all.lua --no_output --block_size 48", "--block_size")
  end)

  it("foretells every part, and writes nothing then", function()
    local out, err, code = example("report_all.lua --dry_run --parts batch_sweep,mmlu,sensitivity "
      .. "--output_path " .. folder .. "/results")
    assert.equal(0, code, err)
    assert.equal(3, select(2, out:gsub("it fits\n", "")))
    assert.truthy(out:find "\nmmlu +finished\n", out)
    assert.is_nil(lfs.attributes(folder .. "/results"))
  end)
end)

describe("a study", function()
  local OPEN <const> = [[
    local experiment, cli = require "qlua.experiment", require "qlua.cli"
    local opts = cli.parse { name = "part.lua", options = experiment.options {} }
    local run <close> = experiment.open("part.lua", opts)
    seen[#seen + 1] = { full = run.full, test = run.test, device = run.device }
    %s]]

  local function part(all, code, ...)
    return all:run("part", support.write(folder .. "/part.lua", OPEN:format(code)), { "--no_output",
      "--model=examples/models/demo", "--device=cpu", "--threads=1", ... })
  end

  before_each(function() rawset(_G, "seen", {}) end)
  after_each(function() rawset(_G, "seen", nil) end)

  it("loads models once, and others where others are asked for", function()
    local seen, before = rawget(_G, "seen"), arg
    do
      local all <close> = study.begin()
      assert.is_true(part(all, "").ok)
      assert.is_true(part(all, "").ok)
      assert.is_true(part(all, "", "--quant=fp4").ok)
    end
    for _, name in ipairs { "full", "test", "device" } do
      assert.is_true(rawequal(seen[1][name], seen[2][name]), name)
      assert.equal(name ~= "test", rawequal(seen[1][name], seen[3][name]), name)
      support.raises(function() return seen[1][name]:memory() end, "closed")
    end
    assert.is_true(rawequal(before, arg))
  end)

  it("ends with a part neither at a failure, nor at an error, nor at its flags", function()
    local all <close> = study.begin()
    local failed = part(all, "run:must(nil, 'no luck')")
    assert.same({ name = "part", ok = false, interrupted = false, message = "failed: no luck" }, failed)
    failed = part(all, "error 'a bug'")
    assert.is_false(failed.ok)
    assert.truthy(failed.message:find("a bug", 1, true))
    failed = part(all, "", "--modle=x")
    assert.is_false(failed.ok)
    assert.truthy(failed.message:find("--model", 1, true), failed.message)
    assert.truthy(part(all, "").ok)
    assert.is_false(all:run("none", folder .. "/none.lua", {}).ok)
    assert.equal(1, all:code())
    assert.equal(5, #all.parts)
    assert.truthy(all:outcomes():find "\npart +finished\n" and all:outcomes():find "\nnone +failed: ")
  end)

  it("begins no part after Ctrl-C, and ends with 130", function()
    local all <close> = study.begin()
    assert.is_true(part(all, "").ok)
    assert.same({ true, false }, { part(all, "cli.exit(130, 'interrupted')").interrupted, part(all, "").ok })
    assert.equal(2, #rawget(_G, "seen"))
    assert.equal(130, all:code())
    assert.truthy(all:outcomes():find("not begun", 1, true))
  end)

  it("says by arguments what differs from the defaults", function()
    local defaults = { seed = 1, k = { 1, 3 }, fresh = false, name = "x" }
    assert.same({}, study.arguments(defaults, defaults, { "seed", "k", "fresh", "name", "limit" }))
    assert.same({ "--limit=0.5", "--k=1,5", "--fresh", "--chat" }, study.arguments({ seed = 1, k = { 1, 5 },
      fresh = true, limit = 0.5, chat = true }, defaults, { "limit", "seed", "k", "fresh", "chat" }))
  end)
end)
