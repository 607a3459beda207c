--- Accuracy: the picture with intervals, the two-by-two tables, the pace of answering.

local _ENV <const> = require "qlua.strict"

local markup = require "qlua.report.markup"
local parts = require "qlua.report.parts"
local stats = require "qlua.stats"
local svg = require "qlua.report.svg"
local tables = require "qlua.table"
local verdict = require "qlua.report.verdict"

local h <const> = markup.tags

local accuracy = {}

local DRAWN <const> = 10 -- tasks that the picture shows
local TABLES <const> = 4 -- two-by-two tables that the page shows

--- Every outcome that was scored, of all sections.
local function scored(sections)
  local list = {}
  for _, section in ipairs(sections) do
    for _, o in ipairs(section.outcomes) do
      if o.comparison then list[#list + 1] = o end
    end
  end
  return list
end

--- What the picture shows: { name, full, quantized, again? } each. With many tasks, all of them as one and
--- those that differ most.
local function drawn(outcomes, pools)
  local list, chosen = {}, table.move(outcomes, 1, #outcomes, 1, {})
  if #outcomes > DRAWN then
    for _, pool in ipairs(pools) do
      list[#list + 1] = { name = ("all %d tasks %s"):format(#pool.tasks, pool.name), full = pool.full,
        quantized = pool.quantized }
    end
    table.sort(chosen, function(a, b)
      local x, y = math.abs(a.comparison.difference), math.abs(b.comparison.difference)
      if x ~= y then return x > y end
      return a.task < b.task
    end)
  end
  for i = 1, math.min(#chosen, DRAWN) do
    local o = chosen[i]
    list[#list + 1] = { name = o.task, full = o.models[1], quantized = o.models[2], again = o.control_model }
  end
  return list
end

local LEFT <const>, RIGHT <const> = 12, svg.W - 62

local function picture(rows, labels, id, lead)
  local top, row_height = 46, 58
  local bottom = top + row_height * #rows + 4
  local x = svg.linear(0, 100, LEFT, RIGHT, 5)
  local names, controlled = { labels[1], labels[2] }, false
  local body = { svg.bottom_axis(x, top, bottom, parts.tick),
    svg.text((LEFT + RIGHT) / 2, bottom + 34, "right answers, %", { ["text-anchor"] = "middle",
      class = "a" }),
    svg.line(x.at(25), top, x.at(25), bottom, "chance"),
    svg.text(x.at(25), top - 6, "guessing", { ["text-anchor"] = "middle", class = "a" }) }
  for i, row in ipairs(rows) do
    local y = top + (i - 1) * row_height
    body[#body + 1] = svg.text(LEFT, y + 17, svg.shortened(row.name, 56), { class = "k halo" })
    for m, model in ipairs { row.full, row.quantized } do
      local line = y + 16 + m * 14
      body[#body + 1] = svg.whisker(m, x.at(100 * model.wilson[1]), line, x.at(100 * model.wilson[2]), line)
      if m == 1 and row.again and row.again.accuracy then
        controlled = true
        body[#body + 1] = svg.mark(1, x.at(100 * row.again.accuracy), line, 6.5, "hollow")
      end
      body[#body + 1] = svg.mark(m, x.at(100 * model.accuracy), line, 4.5)
      body[#body + 1] = svg.text(svg.W - 4, line + 4, ("%.1f %%"):format(100 * model.accuracy),
        { ["text-anchor"] = "end", class = "v" })
    end
  end
  local legend, at = svg.legend(names, LEFT, 10)
  body[#body + 1] = legend
  if controlled then
    body[#body + 1] = { svg.mark(1, at + 4, 10, 6.5, "hollow"), svg.text(at + 16, 14, labels[1]
      .. " again") }
  end
  return svg.picture(id, bottom + 42, "Accuracy", lead .. " The numbers are in the table below.", body)
end

local function accuracy_table(outcomes, labels)
  local rows = {}
  local function share(model)
    return { value = model.accuracy, low = model.wilson[1], high = model.wilson[2],
      text = ("%.1f [%.1f, %.1f]"):format(100 * model.accuracy, 100 * model.wilson[1],
        100 * model.wilson[2]) }
  end
  for i, o in ipairs(outcomes) do
    local c = o.comparison
    rows[i] = { key = "accuracy/" .. o.task, o.task, parts.cell(o.models[1].n), share(o.models[1]),
      share(o.models[2]),
      { value = c.difference, low = c.difference_95[1], high = c.difference_95[2],
        text = ("%s [%s, %s]"):format(verdict.points(c.difference), verdict.points(c.difference_95[1]),
          verdict.points(c.difference_95[2])) },
      parts.cell(c.mcnemar_p, ("%.3g"):format(c.mcnemar_p)), parts.cell(c.adjusted_p, ("%.3g"):format(
        c.adjusted_p)), parts.cell(c.flips.flips, ("%.1f %%"):format(100 * c.flips.flips)),
      c.questions_needed and parts.cell(c.questions_needed) or { text = "–" } }
  end
  return parts.grid("Accuracy by task", { "task", "n", labels[1] .. " % [95 % Wilson]", labels[2]
    .. " % [95 % Wilson]", "difference, points [95 % Tango]", "McNemar p", "adjusted p", "flips",
    "questions for 80 % power" }, rows)
end

--- One cell of a two-by-two table, tinted by its share.
local function square(key, count, n, class)
  return h.td { class = "n " .. class, ["data-key"] = key, ["data-value"] = count,
    style = ("--s:%.3f"):format(n > 0 and count / n or 0), h.b { count }, " ",
    h.small { ("%.1f %%"):format(n > 0 and 100 * count / n or 0) } }
end

--- The two-by-two table of right and wrong, and McNemar's test of it.
---@param entry { name: string, flips: qlua.flips, mcnemar_p: number }
---@param labels string[]
local function contingency(entry, labels)
  local f, key = entry.flips, "flips/" .. entry.name
  local function column(word) return h.th { scope = "col", class = "n", labels[2] .. word } end
  local function row(word, first, second)
    return h.tr { h.th { scope = "row", labels[1] .. word }, first, second }
  end
  local note = { "Exact McNemar ", parts.figure(key .. "/mcnemar_p", entry.mcnemar_p,
    stats.p_text(entry.mcnemar_p)), (" on %d against %d."):format(f.right_wrong, f.wrong_right) }
  if f.right_a > 0 then note[#note + 1] = (" Recovery %.3f."):format(f.right_b / f.right_a) end
  if f.other_wrong > 0 then
    note[#note + 1] = (" %s wrong in two different ways."):format(parts.plural(f.other_wrong, "question"))
  end
  return h.div { class = "pair", h.table { class = "two", h.caption { entry.name },
    h.thead { h.tr { h.td {}, column " right", column " wrong" } }, h.tbody {
      row(" right", square(key .. "/both_right", f.both_right, f.n, "t0"),
        square(key .. "/right_wrong", f.right_wrong, f.n, "t1")),
      row(" wrong", square(key .. "/wrong_right", f.wrong_right, f.n, "t2"),
        square(key .. "/both_wrong", f.same_wrong + f.other_wrong, f.n, "t0")) } },
    h.p { class = "note", note } }
end

local function contingencies(outcomes, pools, labels)
  local list = {}
  if #outcomes <= TABLES then
    for _, o in ipairs(outcomes) do
      list[#list + 1] = contingency({ name = o.task, flips = o.comparison.flips,
        mcnemar_p = o.comparison.mcnemar_p }, labels)
    end
  else
    for _, pool in ipairs(pools) do
      list[#list + 1] = contingency({ name = ("all %d tasks %s"):format(#pool.tasks, pool.name),
        flips = pool.flips, mcnemar_p = pool.mcnemar_p }, labels)
    end
  end
  return h.div { class = "pairs", list }
end

--- How fast answers came, and what became of those without a letter.
local function pace_table(outcomes)
  local rows, longest <const> = {}, 24
  local function number(value) return parts.cell(value, value and parts.brief(value)) end
  local notes = {}
  for i = 1, math.min(#outcomes, longest) do
    local o = outcomes[i]
    local ratio = o.comparison.words_per_minute_ratio
    if ratio and ratio.low then
      notes[#notes + 1] = h.p { class = "note", ("%s: words per minute of %s / %s %s, 95 %% bootstrap of the "
        .. "batches."):format(o.task, o.models[2].label, o.models[1].label, tables.interval(ratio.value,
        ratio.low, ratio.high)) }
    end
    local written = o.output_type == "generate_until"
    for m, model in ipairs(o.models) do
      rows[#rows + 1] = { key = ("pace/%s/%d"):format(o.task, m), o.task, { text = model.label },
        number(model.words_per_minute), number(model.prefill_tokens_per_second),
        number(model.decode_tokens_per_second), number(model.seconds),
        parts.cell(written and model.unparsed or nil), parts.cell(written and model.cut or nil) }
    end
  end
  return { parts.grid("Pace of answering", { "task", "model", "words/min", "prefill tok/s", "decode tok/s",
    "seconds", "no letter", "cut off" }, rows), notes }
end

local function metrics_table(outcomes)
  local rows = {}
  for _, o in ipairs(outcomes) do
    local control = tables.by_name(o.control_metrics)
    for _, row in ipairs(o.metrics or {}) do
      local same = control[row.name]
      rows[#rows + 1] = { key = ("answer/%s/%s"):format(o.task, row.name), o.task, { text = row.name },
        parts.bounded(row.value, row.low, row.high, "%.4g"), row.median and parts.cell(row.median,
          parts.short(row.median)) or { text = "–" },
        same and parts.bounded(same.value, same.low, same.high, "%.4g") or { text = "–" } }
    end
  end
  if #rows == 0 or #rows > 60 then return nil end
  return parts.grid("Logits at the answer", { "task", "metric", "mean [95 %]", "median",
    "full v full" }, rows)
end

--- The accuracy chart of all mmlu sections, with the tables that belong to it.
---@param sections qlua.section_mmlu[]
---@param pools table[]  of qlua.report.verdict
---@param labels string[]
function accuracy.chart(sections, pools, labels)
  local outcomes = scored(sections)
  if #outcomes == 0 then return nil end
  local rows = drawn(outcomes, pools)
  local lead = "Share of right answers with its 95 % interval (Wilson)."
  if #outcomes > DRAWN then
    lead = lead .. (" Of %d tasks the %d that differ most are drawn; all are in the table."):format(#outcomes,
      DRAWN)
  end
  local notes = {}
  for _, section in ipairs(sections) do
    if section.protocol == "post" then
      notes[1] = "Protocol of the post of 2024: its prompt, its short questions, answers without a letter "
        .. "counted as wrong."
    end
  end
  for _, o in ipairs(outcomes) do
    if o.too_long > 0 then
      notes[#notes + 1] = ("%s: %s longer than the context of %d tokens, not scored."):format(o.task,
        parts.plural(o.too_long, "question"), o.context)
    end
    if #notes > 4 then break end
  end
  local logits, many = metrics_table(outcomes), #outcomes > TABLES
  local pace = not many and { h.h4 { "Pace of answering" }, pace_table(outcomes) } or false
  return parts.chart { id = "accuracy", title = "Accuracy", lead = lead, notes = notes, wide = true,
    picture = h.div { class = "side", h.div { picture(rows, labels, "accuracy", lead), pace },
      contingencies(outcomes, pools, labels) },
    table = { accuracy_table(outcomes, labels), many and pace_table(outcomes) or false, logits or false } }
end

return accuracy
