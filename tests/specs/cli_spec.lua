local cli = require "qlua.cli"

local SPEC <const> = {
  name = "x.lua",
  summary = "A script.",
  options = {
    { "model", default = "here" }, "tasks", "limit", "num_fewshot", "batch_size", "seed", "output_path",
    "log_samples", "apply_chat_template", "metric",
    { "protocol", choices = { "sound", "post" }, default = "sound", help = "which" },
    { "k", kind = "integers", default = { 1, 3 }, min = 1, max = 1000, help = "sizes" },
    { "share", kind = "number", min = 0, max = 1, help = "a share" },
    { "shares", kind = "numbers", above = 0, max = 1, help = "shares" },
    { "format", kind = "strings", choices = { "csv", "json" }, help = "of files" },
  },
}

local function try(line)
  local args = {}
  for word in line:gmatch("%S+") do args[#args + 1] = word end
  return cli.try(SPEC, args)
end

describe("cli.try", function()
  it("gives the defaults", function()
    local opts = assert(try "")
    assert.equal("here", opts.model)
    assert.same({ 1, 3 }, opts.k)
    assert.same({}, opts.metric)
    assert.is_false(opts.log_samples)
    assert.is_nil(opts.limit)
    assert.is_nil(opts.apply_chat_template)
    assert.equal(8, opts.batch_size)
  end)

  it("takes - and _ alike, = and short flags", function()
    local opts = assert(try("--batch-size 4 --num_fewshot=2 -L 0.5 --log-samples "
      .. "--k 5,10 --metric a --metric=b"))
    assert.same({ 4, 2, 0.5, true }, { opts.batch_size, opts.num_fewshot, opts.limit, opts.log_samples })
    assert.same({ 5, 10 }, opts.k)
    assert.same({ "a", "b" }, opts.metric)
    assert.equal("integer", math.type(opts.batch_size))
  end)

  it("takes several of an option's choices", function()
    assert.same({ "json", "csv" }, assert(try "--format json,csv").format)
  end)

  it("takes several numbers", function()
    assert.same({ 0.25, 1 }, assert(try "--shares 0.25,1").shares)
  end)

  it("leaves - in values alone", function()
    assert.equal("my-model", try("--model my-model").model)
    assert.equal("a-b_c", try("--model=a-b_c").model)
    assert.equal(-5, try("--seed -5").seed)
  end)

  it("takes a flag whose value may be left out", function()
    assert.is_true(try("--apply_chat_template").apply_chat_template)
    assert.equal("tool_use", try("--apply_chat_template tool_use").apply_chat_template)
    assert.is_true(try("--apply-chat-template --limit 3").apply_chat_template)
  end)

  it("takes the last of two", function()
    assert.equal(3, try("--limit 1 --limit 3").limit)
  end)

  local mistakes = {
    ["--format csv,jsn"] = "x.lua: --format must be one of csv, json, not 'jsn', did you mean json?\n",
    ["--format csv,"] = "x.lua: --format has an empty part in 'csv,'\n",
    ["--limt 3"] = "x.lua: unknown flag --limt, did you mean --limit?\n",
    ["--log-sample"] = "x.lua: unknown flag --log_sample, did you mean --log_samples?\n",
    ["--frobnicate"] = "x.lua: unknown flag --frobnicate (see --help)\n",
    ["-q"] = "x.lua: unknown flag -q (see --help)\n",
    ["--batch_size 0"] = "x.lua: --batch_size must be a whole number from 1 to 4096, not '0'\n",
    ["--batch_size -1"] = "x.lua: --batch_size must be a whole number from 1 to 4096, not '-1'\n",
    ["--batch_size 1e3"] = "x.lua: --batch_size must be a whole number from 1 to 4096, not '1e3'\n",
    ["--batch_size 99999999999999999999"] = "x.lua: --batch_size must be a whole number from 1 to 4096, "
      .. "not '99999999999999999999'\n",
    ["--limit 0"] = "x.lua: --limit must be a number above 0, not '0'\n",
    ["--limit nan"] = "x.lua: --limit must be a number above 0, not 'nan'\n",
    ["--share 1.5"] = "x.lua: --share must be a number from 0 to 1, not '1.5'\n",
    ["--shares 0.5,0"] = "x.lua: --shares must be a number above 0 of at most 1, not '0'\n",
    ["--shares 0.5,x"] = "x.lua: --shares must be a number above 0 of at most 1, not 'x'\n",
    ["--k 1,2000"] = "x.lua: --k must be a whole number from 1 to 1000, not '2000'\n",
    ["--k 1,,2"] = "x.lua: --k must be a whole number from 1 to 1000, not ''\n",
    ["--protocol pots"] = "x.lua: --protocol must be one of sound, post, not 'pots', did you mean post?\n",
    ["--limit"] = "x.lua: --limit requires an argument\n",
    ["--limit 2 extra"] = "x.lua: unexpected argument 'extra' (see --help)\n",
    ["--log_samples=1"] = "x.lua: --log_samples does not take arguments\n",
    ["--completion tcsh"] = "x.lua: --completion must be bash, zsh or fish, not 'tcsh'\n",
  }
  for line, message in pairs(mistakes) do
    it("refuses " .. line, function()
      local opts, text, code = try(line)
      assert.is_nil(opts)
      assert.equal(message, text)
      assert.equal(1, code)
    end)
  end

  it("checks by the option's own function, and what is required", function()
    local spec = { name = "y", options = {
      { "source", positional = true, required = true },
      { "n", kind = "integer", check = function(n) return n % 2 == 1 and "must be even" or nil end },
    } }
    assert.equal("y: --n must be even\n", (select(2, cli.try(spec, { "s", "--n", "3" }))))
    local opts = assert(cli.try(spec, { "s", "--n", "4" }))
    assert.same({ source = "s", n = 4 }, opts)
    assert.truthy(select(2, cli.try(spec, {})):find("source"))
  end)

  it("explains itself within 100 columns, every flag with its default", function()
    local opts, text, code = try "--limit bad --help"
    assert.is_nil(opts)
    assert.equal(0, code)
    for line in text:gmatch("[^\n]*") do assert.is_true(#line <= 100, line) end
    for _, option in ipairs(SPEC.options) do
      local name = type(option) == "string" and option or option[1]
      assert.truthy(text:find("--" .. name, 1, true), name)
    end
    assert.truthy(text:find("(default: 1,3)", 1, true))
    assert.truthy(text:find("(default: here)", 1, true))
    assert.truthy(text:find("which: sound, post (default: sound)", 1, true))
  end)

  it("prints completion code", function()
    for _, shell in ipairs { "bash", "zsh", "fish" } do
      local _, text, code = try("--completion " .. shell)
      assert.equal(0, code)
      assert.truthy(text:find("batch_size"))
    end
  end)

  it("refuses a wrong spec", function()
    assert.has_error(function() cli.try({ name = "x", options = { "nonsense" } }, {}) end)
    assert.has_error(function() cli.try({ name = "x", options = { { "a", kind = "colour" } } }, {}) end)
  end)
end)
