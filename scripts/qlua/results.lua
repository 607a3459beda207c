--- Results for people: the tables that the bundled experiments print, drawn from the section that they hand
--- to the run (see qlua.document). Files are written when the run ends, by qlua.export.

local _ENV <const> = require "qlua.strict"

local document = require "qlua.document"
local perplexity = require "qlua.perplexity"
local plural = require("qlua.text").plural
local stats = require "qlua.stats"
local tables = require "qlua.table"

local results = {}

local function percent(k, n) return n > 0 and ("%.1f %%"):format(100 * k / n) or "-" end

--- "0.780 [0.717, 0.832]"
local function bounded(value, low, high, format)
  if not low then return value and (format or "%.3f"):format(value) or "-" end
  return tables.interval(value, low, high, format)
end

--- Four digits behind the point, or three that count where those would be zeros.
local function format_of(value)
  return value and value ~= 0 and math.abs(value) < 0.01 and "%.2e" or "%.4f"
end

--- How many questions there were and what became of those that have no score.
local function accounted(total, scored, too_long, context, all)
  local parts = { plural(total, "question"), scored .. " scored" }
  if scored + too_long < total then
    parts[#parts + 1] = ("%d not reached (interrupted)"):format(total - scored - too_long)
  end
  if too_long > 0 then parts[#parts + 1] = ("%d longer than the %d-token context"):format(too_long,
    context) end
  if all and all > total then
    parts[#parts + 1] = ("%d of the file's %d left out"):format(all - total, all)
  end
  return table.concat(parts, ", ")
end

local function say(...) io.stdout:write(...) end

--- What stands above the table of a section that scores every question once.
local function introduce(run, s)
  say(run:header(), ("task      %s: %s\n\n"):format(s.task, accounted(s.questions, s.scored, s.too_long,
    s.context, s.data.all)))
end

local function show(run, t) say(t:text { bold = tables.bold_allowed(run.stdout_is_terminal) }) end

local function share_text(share)
  if share.n == 0 then return "-" end
  return tables.interval(share.accuracy, share.wilson[1], share.wilson[2])
end

--- Which metrics differ from what the full model differs from itself.
local function noise_lines(tests)
  local beyond, within = {}, {}
  for _, test in ipairs(tests) do
    local list = test.established and beyond or within
    list[#list + 1] = test.name
  end
  local function line(heading, names)
    if #names > 0 then say(("%s: %s\n"):format(heading, table.concat(names, ", "))) end
  end
  line("beyond that noise (sign-flip tests, Holm's adjusted p < 0.05)", beyond)
  line("not established to be beyond it", within)
end

--- The rows of qlua.metrics.summary, with the full-v-full control beside them.
---@param run qlua.experiment
---@param r { task: string, questions: integer, too_long: integer, pair: table[], control: table[], rows:
---  table[], set: string? }
function results.metrics(run, r)
  local section = document.metrics(run, r)
  introduce(run, section)
  local control, columns = tables.by_name(section.control), { "metric", { "mean [95 %]", align = "right" },
    { "median", align = "right" } }
  local controlled = #section.control > 0
  if controlled then columns[4] = { "full v full", align = "right" } end
  local t = tables.new(columns)
  local function shown(value) return value and format_of(value):format(value) or "-" end
  for _, row in ipairs(section.pair) do
    local same = control[row.name]
    local cells = { row.name, bounded(row.value, row.low, row.high, format_of(row.value)), shown(row.median) }
    if controlled then cells[4] = shown(same and same.value) end
    t:add(table.unpack(cells))
  end
  show(run, t)
  say(("\n%s v %s%s\n"):format(run.labels[1], run.labels[2],
    controlled and "; full v full is the same model in another batch size: what it shows is noise" or ""))
  say "intervals: Wilson's where every value is yes or no, else from a bootstrap of the questions\n"
  noise_lines(section.tests)
  run:record(section)
end

local function whole(value) return value and ("%.0f"):format(value) or "-" end

local function mmlu_table(outcomes)
  local t = tables.new { "task", "model", { "accuracy [95 % Wilson]", align = "right" }, { "n",
    align = "right" },
    { "no letter", align = "right" }, { "words/min", align = "right" }, { "prefill tok/s", align = "right" },
    { "decode tok/s", align = "right" } }
  for i, o in ipairs(outcomes) do
    if i > 1 then t:rule() end
    for m, model in ipairs(o.models) do
      t:add(m == 1 and o.task or "", model.label, share_text(model), model.n,
        o.output_type == "generate_until" and model.unparsed or "-", whole(model.words_per_minute),
        whole(model.prefill_tokens_per_second), whole(model.decode_tokens_per_second))
    end
  end
  return t
end

--- The paired comparison of one task in words.
---@param o qlua.section_outcome
local function paired_lines(o)
  local c, flips = o.comparison, o.comparison.flips
  local reference, test = o.models[1], o.models[2]
  say(("%s: %s.\n"):format(o.task, c.sentence))
  say(("  %s - %s %+.1f points [%+.1f, %+.1f], 95 %% Tango; exact McNemar %s\n"):format(test.label,
    reference.label, 100 * c.difference, 100 * c.difference_95[1], 100 * c.difference_95[2],
    stats.p_text(c.mcnemar_p)))
  local n, changed = flips.n, flips.right_wrong + flips.wrong_right
  say(("  flips %s (%s): %d right only in %s, %d right only in %s; "):format(plural(changed, "question"),
    percent(changed, n), flips.right_wrong, reference.label, flips.wrong_right, test.label))
  say(("%d more wrong in two ways (all-flips %s)\n"):format(flips.other_wrong,
    percent(changed + flips.other_wrong, n)))
  if c.recovery then
    say(("  recovery (accuracy of %s / %s) %.3f\n"):format(test.label, reference.label, c.recovery))
  end
  local speed = c.words_per_minute_ratio
  if speed then
    say(("  words per minute of %s / %s %s%s\n"):format(test.label, reference.label,
      bounded(speed.value, speed.low, speed.high), speed.low and ", 95 % bootstrap of the batches" or ""))
  end
  if o.control then
    say(("  noise: %s between %s and itself in another batch size\n"):format(
      plural(o.control.flips.right_wrong + o.control.flips.wrong_right, "flip"), reference.label))
  end
  if o.output_type == "generate_until" then
    if reference.cut + test.cut > 0 then
      say(("  no letter because the answer met --max_gen_toks: %d %s, %d %s\n"):format(reference.cut,
        reference.label, test.cut, test.label))
    end
    if not o.chat_template then say("  the model has no chat template: plain prompts were used\n") end
  end
end

--- Says that the p values of several comparisons are Holm's.
local function holm_line(outcomes)
  local n = 0
  for _, o in ipairs(outcomes) do if o.comparison then n = n + 1 end end
  if n > 1 then say(("adjusted p: McNemar's after Holm's correction over %d comparisons\n"):format(n)) end
end

--- Accuracy, words per minute and the paired comparison of every task.
---@param run qlua.experiment
---@param outcomes table[]  what document.mmlu takes
function results.mmlu(run, outcomes)
  local section = document.mmlu(run, outcomes)
  say(run:header())
  for _, o in ipairs(section.outcomes) do
    say(("task      %s: %s\n"):format(o.task, accounted(o.questions, o.models[1].n, o.too_long, o.context,
      o.data.all)))
  end
  say "\n"
  show(run, mmlu_table(section.outcomes))
  say "\n"
  for _, o in ipairs(section.outcomes) do
    if o.comparison then paired_lines(o) end
    for _, row in ipairs(o.metrics) do
      say(("  %s %s%s\n"):format(row.name, bounded(row.value, row.low, row.high, format_of(row.value)),
        row.median and (", median " .. format_of(row.median)):format(row.median) or ""))
    end
  end
  holm_line(section.outcomes)
  if section.protocol == "post" then
    say("protocol post: prompt, role, short questions and unparsed-is-wrong as in the post of 2024;\n",
      "both models are whole in memory and the clock stops after the device,\n",
      "so its speeds and memory are not repeated\n")
  end
  run:record(section)
end

--- Latency and the four memory figures by batch size.
---@param run qlua.experiment
---@param points qlua.sweep_point[]
---@param r { questions: integer, too_long: integer, drift: table? }
function results.sweep(run, points, r)
  local section = document.sweep(run, points, r)
  say(run:header(), ("task      %s: %s\n\n"):format(section.task, accounted(section.questions,
    section.questions - section.too_long, section.too_long, section.max_length, section.data.all)))
  local MIB <const> = 1024 * 1024
  local t = tables.new { { "batch", align = "right" }, "model", { "tokens", align = "right" },
    { "ms [p10, p90]", align = "right" }, { "tok/s", align = "right" }, { "weights", align = "right",
      unit = "MiB" },
    { "KV", align = "right", unit = "MiB" }, { "activations", align = "right", unit = "MiB" },
    { "peak", align = "right", unit = "MiB" }, { "reserved", align = "right", unit = "MiB" },
    { "process", align = "right", unit = "MiB" }, { "expected", align = "right", unit = "MiB" } }
  local function mib(bytes) return bytes and ("%.2f"):format(bytes / MIB) end
  for i, p in ipairs(section.points) do
    if i > 1 and p.model == 1 then t:rule() end
    if p.oom then
      t:add(p.batch, p.label, ("%.0f"):format(p.tokens), "OOM", nil, nil, nil, nil, nil, nil, nil,
        mib(p.expected.total))
    else
      local s = p.seconds
      t:add(p.batch, p.label, ("%.0f"):format(p.tokens), tables.interval(1e3 * s.median, 1e3 * s.p10,
        1e3 * s.p90, "%.2f"), ("%.0f"):format(p.tokens / s.mean), mib(p.peak.weights + p.peak.shared),
        mib(p.peak.kv), mib(p.peak.activations), mib(p.peak.resident), mib(p.reserved), mib(p.process),
        mib(p.expected.total))
    end
  end
  show(run, t)
  say("\nmedian of ", plural(section.runs, "pass", "passes"), ", tok/s over all of them;\n",
    "peak: high-water mark of the model's own arena with the tensors it shares;\n",
    "reserved: held between passes; process: ", run.hardware.name == "cpu"
      and "resident peak of this process, which holds both models;\n"
      or "what this process holds on the device, both models;\n",
    "expected: computed.\n")
  for _, p in ipairs(section.points) do
    if p.oom then say(("OOM at batch %d, %s: %s\n"):format(p.batch, p.label, p.oom)) end
  end
  run:record(section)
end

--- Perplexity of a text under both models and how far their predictions lie apart.
---@param run qlua.experiment
---@param windows qlua.perplexity_windows
---@param summary qlua.perplexity_summary
---@param r? { sha256: string?, set: string? }
function results.perplexity(run, windows, summary, r)
  local section = document.perplexity(run, windows, summary, r)
  say(run:header(), ("text      %s: %d tokens, %d predictions\n"):format(section.text,
    section.protocol.tokens_in_text, section.summary.n),
    ("protocol  %s\n\n"):format(section.protocol.description))
  show(run, perplexity.table(section.summary, run.labels))
  run:record(section)
end

--- A table of several quantizations against the full model: one row each.
---@param run qlua.experiment
---@param rows qlua.variant[]
---@param note string
function results.variants(run, rows, note)
  local section = document.variants(run, rows, note)
  local t = tables.new { "variant", { "resident", align = "right" }, { "bits/weight", align = "right" },
    { "KL mean [95 %]", align = "right" }, { "top-1 agreement", align = "right" },
    { "accuracy [95 % Wilson]", align = "right" } }
  for _, row in ipairs(section.rows) do
    t:add(row.label, tables.bytes(row.bytes), ("%.2f"):format(row.bits), bounded(row.kl.value, row.kl.low,
      row.kl.high, "%.5f"), ("%.3f"):format(row.agreement.value), share_text(row.accuracy))
  end
  introduce(run, section)
  show(run, t)
  say("\n", section.note, "\n")
  run:record(section)
end

--- What quantizing one group of matrices at a time does, the most harmful first.
---@param run qlua.experiment
---@param rows qlua.variant[]
---@param all qlua.variant?
function results.sensitivity(run, rows, all)
  local section = document.sensitivity(run, rows, all)
  local t = tables.new { { "quantized alone" }, { "saved", align = "right" },
    { "KL mean [95 %]", align = "right" }, { "KL per MiB saved", align = "right" },
    { "top-1 agreement", align = "right" }, { "accuracy [95 % Wilson]", align = "right" } }
  local function add(row)
    local kl = row.kl
    t:add(row.label, tables.bytes(row.saved), bounded(kl.value, kl.low, kl.high, format_of(kl.value)),
      row.kl_per_mib and ("%.2e"):format(row.kl_per_mib), ("%.3f"):format(row.agreement.value),
      share_text(row.accuracy))
  end
  for _, row in ipairs(section.rows) do add(row) end
  if section.all then
    t:rule()
    add(section.all)
  end
  introduce(run, section)
  show(run, t)
  say("\n", section.note, " KL: divergence of the answers from the full model's, in nats.\n")
  run:record(section)
end

--- How the nuclei of both models differ, by temperature and top_p.
---@param run qlua.experiment
---@param r table  what document.nucleus takes
function results.nucleus(run, r)
  local section, full, test = document.nucleus(run, r), run.labels[1], run.labels[2]
  introduce(run, section)
  local t = tables.new { { "temperature", align = "right" }, { "top-p", align = "right" },
    { "overlap [95 %]", align = "right" }, { "full v full", align = "right" },
    { "tokens " .. full, align = "right" }, { "tokens " .. test, align = "right" },
    { ("mass of %s's"):format(test), align = "right" }, { ("mass of %s's"):format(full), align = "right" },
    { "top token out", align = "right" } }
  for i, row in ipairs(section.rows) do
    if i > 1 and row.temperature ~= section.rows[i - 1].temperature then t:rule() end
    local function tokens(size) return ("%.1f (%g)"):format(size.mean, size.median) end
    t:add(("%g"):format(row.temperature), ("%g"):format(row.top_p), bounded(row.overlap.value,
      row.overlap.low, row.overlap.high) .. (row.established and " *" or "  "),
      format_of(row.control.value):format(row.control.value), tokens(row.sizes[1]), tokens(row.sizes[2]),
      bounded(row.masses[1].value, row.masses[1].low, row.masses[1].high),
      bounded(row.masses[2].value, row.masses[2].low, row.masses[2].high),
      percent(row.outside.count, row.outside.n))
  end
  show(run, t)
  say(("\noverlap: Jaccard of both nuclei, mean; * differs from full v full, which is noise (sign-flip "
    .. "tests,\nHolm's adjusted p < 0.05); tokens: mean (median) size of a nucleus; mass of %s's: what its "
    .. "nucleus\nweighs in the distribution of %s, and of %s's the reverse; top token out: questions where "
    .. "the most\nlikely token of %s is not in the nucleus of %s\n"):format(test, full, full, full, test))
  run:record(section)
end

return results
