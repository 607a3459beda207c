--- Results for people: the tables that the bundled experiments print. Files are written by qlua.export.

local _ENV <const> = require "qlua.strict"

local evaluate = require "qlua.evaluate"
local export = require "qlua.export"
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

local function plural(n, word) return ("%d %s%s"):format(n, word, n == 1 and "" or "s") end

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

local function written(paths)
  for _, path in ipairs(paths) do say("wrote ", path, "\n") end
end

--- The rows of qlua.metrics.summary, with the full-v-full control beside them.
---@param run qlua.experiment
---@param r { task: string, questions: integer, too_long: integer, pair: table[], control: table[], rows:
---  table[] }
function results.metrics(run, r)
  say(run:header(), ("task      %s: %s\n\n"):format(r.task, accounted(r.questions, #r.rows, r.too_long,
    run.context, run.items.all)))
  local control, columns = {}, { "metric", { "mean [95 % bootstrap]", align = "right" },
    { "median", align = "right" } }
  for _, row in ipairs(r.control) do control[row.name] = row end
  local controlled = #r.control > 0
  if controlled then columns[4] = { "full v full", align = "right" } end
  local t = tables.new(columns)
  local function shown(value) return value and format_of(value):format(value) or "-" end
  for _, row in ipairs(r.pair) do
    local same = control[row.name]
    local cells = { row.name, bounded(row.value, row.low, row.high, format_of(row.value)), shown(row.median) }
    if controlled then cells[4] = shown(same and same.value) end
    t:add(table.unpack(cells))
  end
  say(t:text { bold = tables.bold_allowed(run.stdout_is_terminal) })
  say(("\n%s v %s%s\n"):format(run.labels[1], run.labels[2],
    controlled and "; full v full is the same model in another batch size: what it shows is noise" or ""))
  if run.opts.output_path then written(export.metrics(run, r)) end
end

local function wilson(k, n)
  if n == 0 then return "-" end
  local low, high = stats.wilson(k, n)
  return tables.interval(k / n, low, high)
end

--- The paired answers of one task: flips, and an interval of the difference of accuracies from a bootstrap
--- of the questions. nil where nothing was scored.
local function paired(outcome, seed)
  local a, b, gold, right_a, right_b = {}, {}, {}, {}, {}
  for i, r in ipairs(outcome.evaluations[1].results) do
    local other = outcome.evaluations[2].results[i]
    a[i], b[i], gold[i] = r.answer or false, other.answer or false, r.prepared.item.answer
    right_a[i], right_b[i] = a[i] == gold[i] and 1 or 0, b[i] == gold[i] and 1 or 0
  end
  if #gold == 0 then return nil end
  return stats.flips(a, b, gold), { stats.bootstrap_difference(right_a, right_b, { seed = seed }) }
end

--- Fills in every outcome's flips, interval (of the difference, 95 %), mcnemar (its p) and comparison, nil
--- where nothing was scored. Where there are several, Holm's adjusted p values decide what is established.
---@param outcomes table[]  { task, items, evaluations }
---@param seed integer?     of the bootstrap
function results.compare(outcomes, seed)
  local scored, p = {}, {}
  for _, o in ipairs(outcomes) do
    o.flips, o.interval = paired(o, seed)
    if o.flips then
      o.mcnemar = stats.mcnemar(o.flips.right_wrong, o.flips.wrong_right)
      scored[#scored + 1], p[#p + 1] = o, o.mcnemar
    end
  end
  local adjusted = #p > 1 and stats.holm(p) or {}
  for i, o in ipairs(scored) do o.comparison = stats.compare(o.flips, adjusted[i]) end
end

--- Seconds to minutes: words (or tokens) per minute or second.
local function rate(amount, seconds, unit)
  if not amount or seconds <= 0 then return "-" end
  return ("%.0f"):format(amount / seconds * unit)
end

--- Answers counted as wrong for want of a letter, and how many of them the length cut off.
local function unparsed_note(evaluation)
  local cut = 0
  for _, r in ipairs(evaluation.results) do
    if not r.answer and r.stop == "length" then cut = cut + 1 end
  end
  return cut
end

local function mmlu_table(run, outcomes)
  local t = tables.new { "task", "model", { "accuracy [95 % Wilson]", align = "right" }, { "n",
    align = "right" },
    { "no letter", align = "right" }, { "words/min", align = "right" }, { "prefill tok/s", align = "right" },
    { "decode tok/s", align = "right" } }
  for i, o in ipairs(outcomes) do
    if i > 1 then t:rule() end
    local generates = o.task.kind == "generate"
    for m, e in ipairs(o.evaluations) do
      local s = evaluate.accuracy(e)
      t:add(m == 1 and o.task.name or "", run.labels[m], wilson(s.correct, s.n), s.n,
        generates and s.unparsed or "-",
        generates and rate(e.words, e.seconds, 60) or "-", rate(e.prompt_tokens, e.prefill_seconds, 1),
        generates and rate(e.decode_tokens, e.decode_seconds, 1) or "-")
    end
  end
  return t
end

local function paired_lines(run, o)
  local reference, test, flips = run.labels[1], run.labels[2], o.flips
  say(("%s: %s.\n"):format(o.task.name, o.comparison.sentence))
  say(("  %s - %s %+.1f points [%+.1f, %+.1f], 95 %% paired bootstrap; exact McNemar p %s\n"):format(test,
    reference, 100 * o.comparison.difference, 100 * o.interval[1], 100 * o.interval[2],
    o.mcnemar < 0.001 and "< 0.001" or ("= %.3f"):format(o.mcnemar)))
  local n, changed = flips.n, flips.right_wrong + flips.wrong_right
  say(("  flips %s (%s): %d right only in %s, %d right only in %s; "):format(plural(changed, "question"),
    percent(changed, n), flips.right_wrong, reference, flips.wrong_right, test))
  say(("%d more wrong in two ways (all-flips %s)\n"):format(flips.other_wrong,
    percent(changed + flips.other_wrong, n)))
  local recovery = stats.recovery(flips.right_a / flips.n, flips.right_b / flips.n)
  if recovery then say(("  recovery (accuracy of %s / %s) %.3f\n"):format(test, reference, recovery)) end
  if o.task.kind == "generate" then
    local cut = { unparsed_note(o.evaluations[1]), unparsed_note(o.evaluations[2]) }
    if cut[1] + cut[2] > 0 then
      say(("  no letter because the answer met --max_gen_toks: %d %s, %d %s\n"):format(cut[1], reference,
        cut[2], test))
    end
    if not o.template then say("  the model has no chat template: plain prompts were used\n") end
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
---@param outcomes table[]  { task, items, prepared, evaluations, template, metrics }
function results.mmlu(run, outcomes)
  say(run:header())
  for _, o in ipairs(outcomes) do
    local too_long = 0
    for _, p in ipairs(o.prepared) do if p.too_long then too_long = too_long + 1 end end
    o.too_long = too_long
    say(("task      %s: %s\n"):format(o.task.name, accounted(#o.items, #o.evaluations[1].results, too_long,
      run.context, o.items.all)))
  end
  say "\n"
  say(mmlu_table(run, outcomes):text { bold = tables.bold_allowed(run.stdout_is_terminal) })
  say "\n"
  results.compare(outcomes, run.opts.seed)
  for _, o in ipairs(outcomes) do
    if o.comparison then paired_lines(run, o) end
    for _, row in ipairs(o.metrics or {}) do
      say(("  %s %s%s\n"):format(row.name, bounded(row.value, row.low, row.high, format_of(row.value)),
        row.median and (", median " .. format_of(row.median)):format(row.median) or ""))
    end
  end
  holm_line(outcomes)
  if run.opts.protocol == "post" then
    say("protocol post: prompt, role, short questions and unparsed-is-wrong as in the post of 2024;\n",
      "both models are whole in memory and the clock stops after the device,\n",
      "so its speeds and memory are not repeated\n")
  end
  if run.opts.output_path then
    say "\n"
    written(export.mmlu(run, outcomes))
  end
end

--- Latency and the four memory figures by batch size.
---@param run qlua.experiment
---@param points qlua.sweep_point[]
---@param r { questions: integer, too_long: integer }
function results.sweep(run, points, r)
  say(run:header(), ("task      %s: %s\n\n"):format(run.items.subject, accounted(r.questions,
    r.questions - r.too_long,
    r.too_long, run.opts.max_length, run.items.all)))
  local MIB <const> = 1024 * 1024
  local t = tables.new { { "batch", align = "right" }, "model", { "tokens", align = "right" },
    { "ms [p10, p90]", align = "right" }, { "tok/s", align = "right" }, { "weights", align = "right",
      unit = "MiB" },
    { "KV", align = "right", unit = "MiB" }, { "activations", align = "right", unit = "MiB" },
    { "peak", align = "right", unit = "MiB" }, { "reserved", align = "right", unit = "MiB" },
    { "process", align = "right", unit = "MiB" }, { "expected", align = "right", unit = "MiB" } }
  local function mib(bytes) return bytes and ("%.2f"):format(bytes / MIB) end
  for i, p in ipairs(points) do
    if i > 1 and p.model == 1 then t:rule() end
    if p.oom then
      t:add(p.batch, run.labels[p.model], ("%.0f"):format(p.tokens), "OOM", nil, nil, nil, nil, nil, nil, nil,
        mib(p.expected.total))
    else
      t:add(p.batch, run.labels[p.model], ("%.0f"):format(p.tokens),
        tables.interval(1e3 * p.time.median, 1e3 * p.time.p10, 1e3 * p.time.p90, "%.2f"),
        ("%.0f"):format(p.tokens / p.time.mean), mib(p.peak.weights + p.peak.shared), mib(p.peak.kv),
        mib(p.peak.activations), mib(p.peak.resident), mib(p.reserved), mib(p.process), mib(p.expected.total))
    end
  end
  say(t:text { bold = tables.bold_allowed(run.stdout_is_terminal) })
  say("\nmedian of ", tostring(run.opts.runs), " passes, tok/s over all of them;\n",
    "peak: high-water mark of the model's own arena with the tensors it shares;\n",
    "reserved: held between passes; process: ", run.hardware.name == "cpu"
      and "resident peak of this process, which holds both models;\n"
      or "what this process holds on the device, both models;\n",
    "expected: computed.\n")
  for _, p in ipairs(points) do
    if p.oom then say(("OOM at batch %d, %s: %s\n"):format(p.batch, run.labels[p.model], p.oom)) end
  end
  if run.opts.output_path then written(export.sweep(run, points)) end
end

--- A table of several quantizations against the full model: one row each.
---@param run qlua.experiment
---@param rows { label: string, bytes: integer, kl: table, agreement: table, accuracy: table?, note: string?
---  }[]
---@param note string
function results.variants(run, rows, note)
  local with_accuracy = rows[1] and rows[1].accuracy ~= nil
  local columns = { "variant", { "resident", align = "right" }, { "bits/weight", align = "right" },
    { "KL mean [95 %]", align = "right" }, { "top-1 agreement", align = "right" } }
  if with_accuracy then columns[#columns + 1] = { "accuracy [95 % Wilson]", align = "right" } end
  local t = tables.new(columns)
  for _, row in ipairs(rows) do
    t:add(row.label, tables.bytes(row.bytes), ("%.2f"):format(row.bits), bounded(row.kl.value, row.kl.low,
      row.kl.high, "%.5f"),
      ("%.3f"):format(row.agreement.value), row.accuracy and wilson(row.accuracy.correct,
        row.accuracy.n) or nil)
  end
  say(run:header(), ("task      %s: %s\n\n"):format(run.items.subject, accounted(#run.items, rows.scored,
    rows.too_long,
    run.context, run.items.all)))
  say(t:text { bold = tables.bold_allowed(run.stdout_is_terminal) }, "\n", note, "\n")
  if run.opts.output_path then written(export.variants(run, rows)) end
end

return results
