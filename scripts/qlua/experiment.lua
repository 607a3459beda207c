--- What every bundled experiment does before and after its own part: open the device, load the full model,
--- make its quantized twin, read the questions; say what ran on what; keep every finished row in the results
--- store, so that a run that was stopped goes on where it was; write result files.
---
---   local run <close> = experiment.open("jaccard.lua", opts)
---   run.device, run.full, run.test, run.items
---   local values = run:map("name", list, { batch = 8 }, function(elements) return ... end)
---   run:finish()
---
--- A failure of the outside world ends the script with one line and exit code 1 (qlua.cli.fail).

local _ENV <const> = require "qlua.strict"

local chat = require "qlua.chat"
local cli = require "qlua.cli"
local code = require "qlua.code"
local data = require "qlua.data"
local evaluate = require "qlua.evaluate"
local export = require "qlua.export"
local failure = require "qlua.failure"
local fairness = require "qlua.fairness"
local files = require "qlua.files"
local forecast = require "qlua.forecast"
local interrupt = require "qlua.interrupt"
local json = require "qlua.json"
local key = require "qlua.key"
local lfs = require "lfs"
local metrics = require "qlua.metrics"
local passes = require "qlua.passes"
local plot = require "qlua.plot"
local policy = require "qlua.policy"
local progress = require "qlua.progress"
local qlua = require "qlua"
local report = require "qlua.report"
local runs = require "qlua.runs"
local this_run = require "qlua.run"
local sys = require "qlua.sys"
local table_text = require "qlua.table"
local tasks = require "qlua.tasks"

local experiment = {}

--- The folder of the running script, for what is bundled beside it.
local function beside(path)
  local arguments = _G.arg -- nil where no script runs
  local folder = (arguments and arguments[0] or ""):match("^(.*)/[^/]*$") or "."
  return folder .. "/" .. path
end

experiment.bundled_model = beside "models/demo"
experiment.bundled_task = beside "data/lantern_isles_test.csv"

--- Flags that choose the two models and the questions. A script lists those it has by name.
experiment.model_options = {
  { "model", default = experiment.bundled_model },
  { "quantized", metavar = "FOLDER",
    help = "a quantized checkpoint to compare with, instead of quantizing here" },
  { "quant", kind = "string", default = "nf4", choices = { "nf4", "fp4" },
    help = "scheme of the quantized twin" },
  { "double_quant", kind = "string", default = "true", choices = { "true", "false" },
    help = "quantize the scales to 8 bits too" },
  { "block_size", kind = "integer", default = 64,
    help = "weights that share a scale: a power of two, 32 to 4096",
    check = function(n)
      if n < 32 or n > 4096 or n & (n - 1) ~= 0 then return "is not a power of two from 32 to 4096" end
    end },
  { "skip", kind = "strings", default = { "lm_head" },
    help = "modules that stay as they are, in place of the default" },
  "dtype", "device", "threads", "numerics", "max_context", "seed", "dry_run", "output_path",
  "output_format", "fresh", "no_output",
}

--- All options of a script: those of the models, and its own; a script's own take precedence.
---@param own (string|qlua.option)[]
---@return (string|qlua.option)[]
function experiment.options(own)
  local names, list = {}, {}
  for _, option in ipairs(own) do names[type(option) == "string" and option or option[1]] = true end
  for _, option in ipairs(experiment.model_options) do
    if not names[type(option) == "string" and option or option[1]] then list[#list + 1] = option end
  end
  return table.move(own, 1, #own, #list + 1, list)
end

---@class qlua.experiment
---@field name string            of the script
---@field opts table
---@field device qlua.device
---@field hardware qlua.device_info  the device, before the models were loaded
---@field full qlua.model        the reference
---@field test qlua.model        the quantized twin
---@field labels string[]        what the two are called in tables: {"full", "nf4"}
---@field items qlua.items       questions of the first task
---@field tasks qlua.items[]     questions of every task
---@field metrics qlua.metric[]  the user's own
---@field context integer        tokens that both models can take
---@field tokenizer qlua.tokenizer
---@field sha256 string?          of the full model's checkpoint, once something has asked for it
---@field kept qlua.run          its rows and its document in the results store
---@field owned string[]          fields that are closed with the run
---@field fairness table         records what beside the models may make figures differ
---@field stopped string?        why the run ended early; what is finished can still be shown
---@field stdout_is_terminal boolean
local run = {}
run.__index = run

local function is_fault(err) return type(err) == "table" and err.code == "device" end

--- The value, or the end of the script; a device that failed inside run:keeping ends that.
function run:must(value, err)
  if value == nil or value == false then
    if self.keeps and is_fault(err) then error(err, 0) end
    self:ended "failed"
    cli.fail(self.name, err)
  end
  return value, err
end

--- Several question files: only where a script takes them, and each under a name of its own.
function run:check_tasks(several)
  if not several then self:must(nil, "--tasks: this script takes one file") end
  local names = {}
  for i, items in ipairs(self.tasks) do
    if names[items.subject] then
      self:must(nil, ("--tasks: %s and %s are both the subject '%s'"):format(
        self.opts.tasks[names[items.subject]],
        self.opts.tasks[i], items.subject))
    end
    names[items.subject] = i
  end
end

--- Refuses what would make a comparison of nothing: a full model that is in 4 bits already, a name to skip
--- that is in no module's, or all of them; and a quantized checkpoint where the script quantizes by itself.
function run:check_scheme()
  if self.opts.quantized then self:must(nil, "--quantized: this script quantizes the model by itself") end
  if self.full:info().quant.quantized > 0 then
    self:must(nil, failure("argument", self.opts.model .. ": this checkpoint is already quantized",
      "give the 16-bit one as --model, and this one as --quantized"))
  end
  local choose, some = policy.make(self:scheme()), false
  for _, m in ipairs(self.full:matrices()) do some = some or choose(m.name, m.rows, m.columns) end
  if not some then self:must(nil, "--skip leaves no matrix that could be quantized") end
  for _, entry in ipairs(self.opts.skip) do
    local found = false
    for _, m in ipairs(self.full:matrices()) do found = found or policy.matches(m.name, entry) end
    if not found then
      self:must(nil, failure("argument", ("--skip %s: no module of the model has that name"):format(entry),
        "names are like lm_head, mlp, layers.0 or self_attn.q_proj"))
    end
  end
end

--- What model:quantize takes, from the flags.
function run:scheme()
  local o = self.opts
  return { scheme = o.quant, double = o.double_quant == "true", block = o.block_size, skip = o.skip }
end

--- A quantized twin of the full model; in a dry run its outline.
---@param scheme table  options of model:quantize
---@return qlua.model?, qlua.failure?
function run:twin(scheme)
  local o = self.opts
  if not o.dry_run then return self.full:quantize(scheme) end
  return self.device:outline(o.model, { dtype = o.dtype, max_context = o.max_context, quant = scheme })
end

--- In a dry run: adds passes to those that will be foretold.
---@param more qlua.pass[]
---@return boolean dry  then nothing is to be run
function run:foresee(more)
  if not self.opts.dry_run then return false end
  self.passes = self.passes or {}
  table.move(more, 1, #more, #self.passes + 1, self.passes)
  return true
end

--- The end of a dry run: what the passes foreseen need. Exit code 1 where that is more than is free.
---@param options? { what: string?, twins: { label: string, model: qlua.model }[]? }  what: the labels of the
---  passes are; twins: in place of the run's own
function run:foretell(options)
  options = options or {}
  local models = { { label = "full", model = self.full } }
  for _, twin in ipairs(options.twins or { self.test and { label = self.labels[2], model = self.test } }) do
    models[#models + 1] = { label = twin.label, model = twin.model,
      own = not self.opts.quantized and forecast.own(twin.model) or nil }
  end
  local made = forecast.make(models, self.passes or {}, self:must(self.device:memory()))
  io.stdout:write(self:header(), "\n", forecast.text(made, options.what))
  cli.exit(made.fits and 0 or 1, "more memory is needed than is free")
end

--- Ends the run in the store, unless it has ended; what it recorded so far is kept with it.
function run:ended(status)
  if not self.kept.id or self.kept.ended then return true end
  local described, document = pcall(self.document, self, status)
  return self.kept:finish(status, described and document or nil)
end

function run:close()
  if self.kept then
    self:ended "finished"
    self.kept:close()
  end
  for _, name in ipairs(self.owned) do self[name]:close() end
end

function run:__close(err)
  if err ~= nil then self:ended(interrupt.pending() and "interrupted" or "failed") end
  self:close()
end

--- Devices and models that scripts of this process share, by what they were opened from; nil: none are.
local shared = nil

--- Until the result is closed, devices and models stay open when a script ends, for the next one that asks
--- for the same.
---@return table  to be closed
function experiment.share()
  local list = {}
  shared = list
  function list:close()
    for i = #self, 1, -1 do self[i]:close() end
    shared = nil
  end
  return list
end

--- Sets a field to what `open(...)` gives, or to what an earlier script has opened with the same `from`.
function run:hold(field, from, open, ...)
  local what = json.encode { field, from }
  self[field] = shared and shared[what] or self:must(open(...))
  if not shared then
    table.insert(self.owned, 1, field)
  elseif not shared[what] then
    shared[what], shared[#shared + 1] = self[field], self[field]
  end
end

--- The words that the script was called with.
local function command_line()
  local words = _G.arg -- nil where no script runs
  return words and table.move(words, 0, #words, 1, {}) or {}
end

--- Opens device and models; with `tasks` among the options, reads the questions too.
---@param name string  of the script, for messages
---@param opts table   from cli.parse
---@param needs? { tokenizer: boolean?, twin: boolean?, several: boolean? }  several task files; defaults:
---  true, true, false
---@return qlua.experiment
function experiment.open(name, opts, needs)
  needs = needs or {}
  local self = setmetatable({ name = name, opts = opts, stdout_is_terminal = sys.isatty(1), owned = {} },
    run)
  if opts.no_output or opts.dry_run then opts.output_path = nil end
  opts.output_path = opts.output_path and opts.output_path:gsub("(.)/+$", "%1")
  self.kept = this_run.new { name = name, folder = opts.output_path, fresh = opts.fresh,
    command = command_line(), script = _G.arg and _G.arg[0] }
  if opts.log_samples and not (opts.output_path or opts.dry_run) then
    self:must(nil, "--log_samples writes files, --no_output forbids it")
  end
  if opts.output_path then self:must(files.writable(opts.output_path)) end
  self:must(self.kept:open())
  self.metrics = self:must(metrics.load_all(opts.metric))
  if opts.tasks then
    self.tasks = {}
    for i, path in ipairs(opts.tasks) do
      local items = self:must(data.read(path))
      self.tasks[i] = data.take(items, opts.limit)
    end
    self.items = self.tasks[1]
    if #self.tasks > 1 then self:check_tasks(needs.several) end
  end
  local from = { device = opts.device, threads = opts.threads, numerics = opts.numerics }
  self:hold("device", from, qlua.device, opts.device, { threads = opts.threads, numerics = opts.numerics })
  self.hardware = self:must(self.device:info())
  local load = opts.dry_run and self.device.outline or self.device.load
  from.model, from.dtype, from.max_context, from.dry = opts.model, opts.dtype, opts.max_context, opts.dry_run
  self:hold("full", from, load, self.device, opts.model, { dtype = opts.dtype,
    max_context = opts.max_context })
  self.context = self.full:info().max_context
  if needs.tokenizer ~= false then self.tokenizer = self:must(self.full:tokenizer()) end
  if needs.twin ~= false then
    if opts.quantized then
      from.quantized = opts.quantized
      self:hold("test", from, load, self.device, opts.quantized, { max_context = opts.max_context })
      if self.test:info().vocab ~= self.full:info().vocab then
        self:must(nil, ("%s: its vocabulary is not that of %s"):format(opts.quantized, opts.model))
      end
    else
      self:check_scheme()
      from.scheme = self:scheme()
      self:hold("test", from, self.twin, self, self:scheme())
    end
    self.labels = { "full", self.test:info().quant.label }
    self.context = math.min(self.context, self.test:info().max_context)
  end
  if not opts.dry_run then self.fairness = fairness.begin(self) end
  return self
end

--- The chat template of the full model; `name` is --apply_chat_template's value. With `optional`, a model
--- that has none gives nil unless the flag asked for one.
---@param name string|boolean|nil
---@param optional? "optional"
---@return qlua.chat_template?
function run:template(name, optional)
  local template, err = chat.load(self.full:info().folder, name)
  if not template and optional and not name and err.code == "not_found" then return nil end
  return self:must(template, err)
end

--- The answered examples for few-shot prompts of a task, from its dev file: at least --num_fewshot.
---@param items qlua.items
---@return qlua.items
function run:fewshot(items)
  local path = self:must(data.dev_path(items.path))
  if not lfs.attributes(path, "mode") then
    self:must(nil, failure("not_found", path .. ": there is no such file",
      "--num_fewshot takes its examples from there"))
  end
  local examples = self:must(data.read(path))
  if #examples < self.opts.num_fewshot then
    self:must(nil, ("%s: %d examples, --num_fewshot asks for %d"):format(path, #examples,
      self.opts.num_fewshot))
  end
  return examples
end

--- Every question as one row of tokens, with BOS: { ids, item = { index, question, choices, answer } }. Those
--- with more than `longest` tokens (default: what both models can take) are left out and counted; the script
--- ends where none is left.
---@param position? "question"|"answer"  the bare question, or MMLU's prompt up to the letter
---@param longest? integer
---@return { ids: integer[], item: table }[] rows, integer too_long
function run:question_rows(position, longest)
  longest = math.min(longest or self.context, self.context)
  local rows, too_long, task = {}, 0, tasks.mmlu { subject = self.items.subject }
  for index, item in ipairs(self.items) do
    local text = position == "answer" and task:prompt(item) or item.question
    local ids = self:must(self.tokenizer:encode(text, { bos = true }))
    if #ids > longest then
      too_long = too_long + 1
    else
      rows[#rows + 1] = { ids = ids, item = { index = index, question = item.question,
        choices = item.choices, answer = item.answer } }
    end
  end
  self:some(#rows, too_long, longest)
  return rows, too_long
end

--- Ends the script where no question is left to be scored.
---@param scored integer
---@param too_long integer
---@param longest integer
function run:some(scored, too_long, longest)
  if scored > 0 then return end
  self:must(nil, ("nothing to score: of %d questions %d are longer than %d tokens"):format(#self.items,
    too_long, longest))
end

--- The failure of the device that an error comes from: an operation that returned nil may have been noticed
--- only where its value was used, but a device that failed says so ever after. nil: another error.
function run:fault(err)
  if is_fault(err) then return err end
  local _, why = self.device:sync()
  return is_fault(why) and why or nil
end

--- Runs `fn`, which adds up results as it goes. Ctrl-C or a device that fails ends it and not the script:
--- what is finished is kept and shown, and run:finish ends the script with the code that belongs to it.
---@param fn function
---@return boolean finished
function run:keeping(fn)
  self.keeps = true
  local ok, err = xpcall(fn, function(e)
    return (interrupt.pending() or is_fault(e)) and e or debug.traceback(e, 2)
  end)
  self.keeps = nil
  if ok then return true end
  if interrupt.pending() then
    interrupt.clear()
    self.stopped = "interrupted"
  else
    self.failed = self:fault(err)
    if not self.failed then error(err, 0) end
    self.stopped = tostring(self.failed):gsub("%s*\n%s*", " ")
  end
  io.stderr:write("\n", self.name, ": ", self.stopped, ": what is finished follows\n")
  return false
end

--- What all values of this run may depend on.
local function inputs_of(self)
  if self.inputs then return self.inputs end
  local o, store = self.opts, self.kept.store
  local made = { engine = self:must(key.engine(store, self.hardware.name)), seed = o.seed or json.null,
    device = key.device(self.hardware), context = self.context, models = {}, metrics = json.array() }
  made.models[1] = self:must(key.model(store, self.full, o.model))
  made.models[2] = self.test and self:must(key.model(store, self.test, o.quantized or o.model))
  for i, path in ipairs(o.metric or {}) do made.metrics[i] = self:must(store:sha256(path)) end
  self.sha256 = self.sha256 or made.models[1].weights
  self.inputs = made
  return made
end

--- Options that no value depends on, or that stand among the inputs already by what they lead to.
local NO_INPUT <const> = { limit = true, output_path = true, no_output = true, fresh = true, dry_run = true,
  log_samples = true, output_format = true, model = true, quantized = true, tasks = true, metric = true,
  device = true, threads = true, numerics = true, dtype = true, max_context = true, seed = true,
  quant = true, double_quant = true, block_size = true, skip = true }

--- The inputs of one list's values: those of the run, and its own.
local function inputs_for(self, name, list, options, fn)
  local made = { name = name, batch = options.batch, data = json.array() }
  for field, value in pairs(inputs_of(self)) do made[field] = value end
  local known = { [self] = "run", [self.opts] = "options", [self.full] = "full", [list] = "list" }
  if self.test then known[self.test] = "test" end
  for i, items in ipairs(options.data or self.tasks or {}) do
    made.data[i], known[items] = items.sha256, "data " .. i
  end
  made.code = code.digest({ fn, table.unpack(options.code or {}) }, known, function(model)
    return self:must(key.model(self.kept.store, model))
  end)
  made.inputs = options.inputs
  if not made.inputs then
    made.inputs = {}
    for option, value in pairs(self.opts) do
      local batch = option == "batch_size" and value == options.batch
      if not (NO_INPUT[option] or batch) then made.inputs[option] = value end
    end
  end
  return made
end

---@class qlua.map_options
---@field batch? integer    elements that fn is given at once (default 1)
---@field id? fun(element: any, index: integer): string  what tells an element from others; default: the
---  element itself, as JSON
---@field inputs? table     what values depend on beside the models, the questions' files, seed, device, batch
---  and fn's code; JSON must hold it. Default: the script's own options
---@field code? (function|table)[]  functions and metrics that fn calls without referring to them, or that a
---  function of the library does
---@field data? qlua.items[]  the questions (default: those of every task)
---@field again? string     why nothing in the store may stand for a value
---@field weight? integer   steps of the progress line for an element (default 1)

--- The values of fn for every element of a list, each a thing that JSON can hold: the one primitive that
--- makes an experiment resumable. fn(elements, first, step) gets a batch that begins with element `first` and
--- returns one value for each; batches that the results store knows wholly from an earlier run are not
--- computed again. step(n, note) moves the progress line from within.
---
--- Ctrl-C and a device that fails end it early (run.stopped): the values are then those up to the first that
--- is missing, and what is finished stays in the store.
---@param name string   of the set of values, one in a script
---@param list any[]
---@param options qlua.map_options?
---@param fn fun(elements: any[], first: integer, step: fun(n: integer?, note: string?)): any[]?,
---  qlua.failure?
---@return any[] values, string? set  its key in the store
function run:map(name, list, options, fn)
  if type(name) ~= "string" or type(list) ~= "table" or type(fn) ~= "function" then
    error("run:map takes a name, a list, options or nil, and a function", 2)
  elseif options and options.batch and (math.type(options.batch) ~= "integer" or options.batch < 1) then
    error("run:map: a batch is a whole number of at least 1", 2)
  end
  options = setmetatable({ batch = options and options.batch or 1,
    alone = self.hardware.numerics == "invariant" }, { __index = options })
  self:must(self.kept:begin())
  local set <close> = self:must(self.kept:set(name, list, options,
    self.kept.store and inputs_for(self, name, list, options, fn)))
  if #set.todo > 0 and not self.stopped then
    local weight = options.weight or 1
    local bar <close> = self:progress(#list * weight, name, set.known * weight)
    local due = bar.done
    self:keeping(function()
      for _, batch in ipairs(set.todo) do
        local elements = table.move(list, batch.first, batch.last, 1, {})
        self:must(set:add(batch, self:must(fn(elements, batch.first, function(...) bar:step(...) end))))
        due = due + weight * #elements
        if bar.done < due then bar:step(due - bar.done) end
      end
    end)
  end
  return self:must(set:values()), set.key
end

--- run:map as qlua.evaluate takes it. The key of the set is left in `into.set`.
---@param name string
---@param extra qlua.map_options  beside those that evaluate gives
---@param into table
---@return function
function run:mapper(name, extra, into)
  return function(list, options, fn)
    for field, value in pairs(extra) do options[field] = value end
    local values
    values, into.set = self:map(name, list, options, fn)
    return values
  end
end

--- The metrics of `pair` at the last position of every row, full model v quantized, and those of `control`,
--- full v full in another batch size. Rows that Ctrl-C or a failure left out are taken off the list.
---@param rows { ids: integer[], item: table }[]
---@param pair qlua.metric[]
---@param control? qlua.metric[]
---@return string? set  key in the store
function run:last_positions(rows, pair, control)
  local size, found = self.opts.batch_size, {}
  if self:foresee(passes.last_positions(rows, size)) then self:foretell() end
  self:must(metrics.distinct(pair))
  local name = ("%s %s"):format(self.name:gsub("%.lua$", ""), self.items.subject)
  local values = self:must(evaluate.last_positions(self.full, self.test, rows, { batch_size = size,
    control = control ~= nil,
    map = self:mapper(name, { again = metrics.unkept(pair), code = pair, data = { self.items } }, found),
    each = function(reference, test, item, again)
      return { index = item.index, question = item.question,
        values = metrics.add(pair, reference, test, item),
        control = again and metrics.add(control, reference, again, item) }
    end }))
  for i = #rows, #values + 1, -1 do rows[i] = nil end
  metrics.restore(pair, values, "values")
  if control then metrics.restore(control, values, "control") end
  return found.set
end

--- Adds a section to the run's document: see qlua.document.
---@param section table
function run:record(section)
  self.kept.sections[#self.kept.sections + 1] = section
end

--- Whether what was measured is fair, as far as can be said: qlua.fairness.
function run:judged()
  return self.fairness:finish(self.kept.sections, { reused = self.kept.reused, ran = self.kept.ran })
end

--- The run's document so far.
---@param status? string
---@return table
function run:document(status)
  local kept = self.kept
  return { format = 1, run = kept.id, name = self.name, started = kept.started, finished = kept:now(),
    status = status or self.stopped and (self.failed and "failed" or "interrupted") or "finished",
    command = kept.command, options = self.opts, script_sha256 = kept.script_sha256,
    labels = self.labels or { "full" }, facts = self:facts(), fairness = self:judged(),
    rows = { reused = kept.reused, ran = kept.ran }, sections = kept.sections }
end

--- The end of a script, whose run may have been stopped: shows charts on a terminal and what was not fair,
--- puts the document into the store, writes the result files and the report.
function run:finish()
  if self.opts.dry_run then self:foretell() end
  local folder, style = self.opts.output_path, plot.style(1)
  for _, section in ipairs(style and self.kept.sections or {}) do
    io.stdout:write("\n", plot.section(section, style))
  end
  for i, line in ipairs(fairness.lines(self:judged().checks)) do
    io.stdout:write(i == 1 and "\n" or "", line, "\n")
  end
  if folder then
    self:must(self.kept:begin())
    local document = self:document()
    self:must(self.kept:finish(document.status, document))
    local store = self.kept.store
    local paths = self:must(export.write(document, store, folder, self.opts))
    if #document.sections > 0 then
      paths[#paths + 1] = self:must(report.write(self:must(runs.newest(store)), store,
        folder .. "/report.html"))
    end
    io.stdout:write("\n", "wrote ", table.concat(paths, "\nwrote "), "\n")
  end
  if self.stopped then cli.exit(self.failed and 1 or 130, self.stopped) end
end

--- A progress line on stderr.
---@param total integer
---@param label string
---@param done? integer
---@return qlua.progress
function run.progress(_, total, label, done)
  return progress.new { total = total, label = label, done = done }
end

local function millions(n)
  return n >= 1e9 and ("%.2f B"):format(n / 1e9) or ("%.2f M"):format(n / 1e6)
end

--- What stands above every result: which models, in what types, how many bytes, on what.
---@return string
function run:header()
  local device, full = self.hardware, self.full:info()
  local detail = device.threads and ("%d threads"):format(device.threads)
    or ("%s, %s numerics"):format(device.driver, device.numerics)
  local lines = {
    ("model     %s (%s, %s parameters)"):format(self.opts.model, full.architecture, millions(full.params)),
    ("device    %s: %s, %s, %s"):format(device.name, device.hardware, device.isa, detail),
    ("full      %s weights, %s resident"):format(full.dtype, table_text.bytes(full.bytes)),
  }
  if self.test then
    local test, q = self.test:info(), self.test:info().quant
    detail = q.scheme and ("block %d, %s"):format(q.block,
      q.double and "double quantization" or "float32 scales")
      or ("%d of %d matrices"):format(q.quantized, q.matrices)
    local cuda, decoded = device.name ~= "cpu", q.dtype or test.dtype
    lines[#lines + 1] = ("quantized %s (%s), %s resident, decoded to %s, activations float32%s"):format(
      q.label, detail, table_text.bytes(test.bytes), decoded,
      cuda and decoded ~= "float32" and ", in products " .. decoded or "")
    lines[#lines + 1] = ("          %.2f bits a weight in memory, where scales are %s%s"):format(q.bits,
      cuda and q.double and "quantized too" or "float32",
      q.stored_bits and ("; %.2f in a checkpoint"):format(q.stored_bits) or "")
  end
  return table.concat(lines, "\n") .. "\n"
end

--- The facts of a run for the result files.
---@return table
function run:facts()
  self.sha256 = self.sha256 or self.full:sha256() -- reads the whole checkpoint
  local facts = { qlua_version = qlua.version, device = self.hardware, full = self.full:info(),
    seed = self.opts.seed, model_sha256 = self.sha256, numerics = self.hardware.numerics,
    kernels = json.array(self.device:all_kernels()), stopped = self.stopped }
  if self.test then facts.quantized = self.test:info() end
  return facts
end

return experiment
