--- Several quantizations of one model: what each costs against what it saves, and which harm most.

local _ENV <const> = require "qlua.strict"

local markup = require "qlua.report.markup"
local parts = require "qlua.report.parts"
local svg = require "qlua.report.svg"
local tables = require "qlua.table"

local h <const> = markup.tags

local variants = {}

local CROWD <const> = 14 -- more points than this are not told apart on a picture
local RANKED <const> = 24 -- rows of a ranking
local SHIFTS <const> = { 0, 13, -13, 26, -26, 39, -39, 52, -52 } -- of labels, down and up

local LEFT <const>, RIGHT <const> = 48, svg.W - 14

--- Labels beside their points, moved down or up until they meet no other; a thin line where they moved far.
local function label_points(points, top, bottom, shifts)
  table.sort(points, function(a, b)
    if a.y ~= b.y then return a.y < b.y end
    return a.x < b.x
  end)
  local taken, list = {}, {}
  local function free(x1, x2, y)
    for _, t in ipairs(taken) do
      if x1 < t[2] and x2 > t[1] and math.abs(y - t[3]) < 12.5 then return false end
    end
    return y > top and y < bottom
  end
  for _, p in ipairs(points) do taken[#taken + 1] = { p.x - 6, p.x + 6, p.y } end
  for _, p in ipairs(points) do
    local width, best = svg.width(p.label), nil
    for _, shift in ipairs(shifts) do
      for _, side in ipairs { 1, -1 } do
        local x1 = side == 1 and p.x + 9 or p.x - 9 - width
        if not best and x1 > LEFT and x1 + width < RIGHT + 8 and free(x1, x1 + width, p.y + shift) then
          best = { x1, p.y + shift, side, shift }
        end
      end
    end
    if best then
      taken[#taken + 1] = { best[1], best[1] + width, best[2] }
      if best[4] ~= 0 then
        list[#list + 1] = svg.line(p.x, p.y, best[3] == 1 and best[1] - 2
          or best[1] + width + 2, best[2], "lead")
      end
      list[#list + 1] = svg.text(best[1], best[2] + 4, p.label, { class = "halo" })
    end
  end
  return list
end

--- A picture of a figure, with its interval, against resident bytes.
local function against_memory(section, labels, id, options, lead)
  local top, bottom, low, high, largest = 26, 240, math.huge, -math.huge, 0
  local rows = {}
  for _, row in ipairs(section.rows) do
    local value, from, to = options.figure(row)
    if value then
      from, to = from or value, to or value
      rows[#rows + 1] = { row = row, value = value, from = from, to = to, model = row.label == labels[1]
        and 1 or 2 }
      low, high, largest = math.min(low, from), math.max(high, to), math.max(largest, row.bytes)
    end
  end
  if #rows == 0 then return nil end
  local unit, name = parts.bytes_unit(largest)
  local crowded = #rows > CROWD -- then without intervals, and only labels that have room
  local x = svg.linear(0, unit * largest, LEFT, RIGHT)
  local y = svg.linear(options.zero and 0 or low, high, bottom, top)
  local body, points, marks = { svg.left_axis(y, LEFT, RIGHT, parts.tick),
    svg.bottom_axis(x, top, bottom, parts.tick),
    svg.text(LEFT, 13, options.axis, { class = "a" }),
    svg.text((LEFT + RIGHT) / 2, bottom + 33, "resident weights, " .. name,
      { ["text-anchor"] = "middle", class = "a" }) }, {}, {}
  for i, r in ipairs(rows) do
    local px, py = x.at(unit * r.row.bytes), y.at(r.value)
    if r.to > r.from and not crowded then marks[#marks + 1] = svg.whisker(r.model, px, y.at(r.from), px,
      y.at(r.to)) end
    marks[#marks + 1] = h.g { h.title { ("%s: %s"):format(r.row.label, parts.short(r.value)) },
      svg.mark(r.model, px, py, 4.5) }
    points[i] = { x = px, y = py, label = r.row.label }
  end
  body[#body + 1] = { marks, label_points(points, top, bottom, crowded and { 0 } or SHIFTS) }
  return svg.picture(id, 282, options.title, lead .. " The numbers are in the table below.", body)
end

local function bounded(figure, format)
  if not figure then return parts.cell(nil) end
  return parts.bounded(figure.value, figure.low, figure.high, format)
end

local function numbers(section)
  local rows, list = {}, table.move(section.rows, 1, #section.rows, 1, {})
  list[#list + 1] = section.all
  for i, row in ipairs(list) do
    local a = row.accuracy
    rows[i] = { key = "variants/" .. row.label, row.label, parts.cell(row.bytes, row.bytes
      and tables.bytes(row.bytes)),
      parts.cell(row.bits, row.bits and ("%.2f"):format(row.bits)),
      parts.cell(row.saved, row.saved and tables.bytes(row.saved)), bounded(row.kl, "%.5f"),
      parts.cell(row.kl_per_mib, row.kl_per_mib and parts.short(row.kl_per_mib)),
      bounded(row.agreement, "%.3f"),
      a and a.accuracy and { value = a.accuracy, low = a.wilson[1], high = a.wilson[2],
        text = tables.interval(a.accuracy, a.wilson[1], a.wilson[2]) } or { text = "–" } }
  end
  return parts.grid("Quantizations", { "variant", "resident", "bits a weight", "saved", "KL, nats [95 %]",
    "KL per MiB saved", "top-1 agreement", "accuracy [95 % Wilson]" }, rows)
end

local function asked(section)
  return ("%s, %s"):format(section.task, parts.plural(section.scored or section.questions, "question"))
end

--- The variants by their divergence, the most harmful first.
---@param section qlua.section_variants
---@param _ string[]
---@param id string
function variants.ranking(section, _, id)
  local rows, largest, widest = {}, 0, 0
  for _, row in ipairs(section.rows) do
    if row.kl and row.kl.value then rows[#rows + 1] = row end
  end
  table.sort(rows, function(a, b)
    if a.kl.value ~= b.kl.value then return a.kl.value > b.kl.value end
    return a.label < b.label
  end)
  local shown = math.min(#rows, RANKED)
  for i = 1, shown do
    largest = math.max(largest, rows[i].kl.high or rows[i].kl.value)
    widest = math.max(widest, svg.width(svg.shortened(rows[i].label, 24)))
  end
  local lead = "KL divergence of each one’s predictions from the full model’s, in nats: " .. asked(section)
    .. ", 95 % intervals."
  if shown < #rows then lead = lead .. (" The %d with most of %d."):format(shown, #rows) end
  local left, top, height = 12 + widest, 8, 19
  local bottom = top + height * shown
  local x = svg.linear(0, largest, left, RIGHT, 4)
  local body = { svg.bottom_axis(x, top, bottom, parts.tick) }
  for i = 1, shown do
    local row, y = rows[i], top + (i - 0.5) * height
    body[#body + 1] = { svg.text(left - 8, y + 4, svg.shortened(row.label, 24), { ["text-anchor"] = "end" }),
      svg.rect(left, y - 5, x.at(row.kl.value) - left, 10, "s23"),
      row.kl.low and svg.whisker(2, x.at(row.kl.low), y, x.at(row.kl.high), y) or false,
      svg.mark(2, x.at(row.kl.value), y, 3.5) }
  end
  return parts.chart { id = id, title = section.title or "Which harm most", lead = lead,
    notes = { section.note }, table = numbers(section),
    picture = shown > 0 and svg.picture(id, bottom + 24, "KL divergence, most harmful first", lead, body)
      or nil }
end

local ACCURACY <const> = { name = "accuracy", title = "Accuracy against memory", axis = "right answers, %",
  lead = "Each quantization of the model: %s, 95 %% intervals (Wilson).",
  figure = function(row)
    local a = row.accuracy
    if a and a.accuracy then return 100 * a.accuracy, 100 * a.wilson[1], 100 * a.wilson[2] end
  end }
local DIVERGENCE <const> = { name = "kl", title = "KL divergence against memory", zero = true,
  axis = "KL from the full model, nats",
  lead = "KL divergence of their predictions from the full model’s: %s, 95 %% intervals; lower is nearer.",
  figure = function(row) return row.kl.value, row.kl.low, row.kl.high end }

--- Accuracy and divergence against memory; of many variants a ranking instead of the second.
---@param section qlua.section_variants
---@param labels string[]
---@param id string
function variants.charts(section, labels, id)
  local list, crowded = {}, #section.rows > CROWD
  for _, options in ipairs { ACCURACY, not crowded and DIVERGENCE or nil } do
    local picture_id, lead = id .. "-" .. options.name, options.lead:format(asked(section))
    if crowded then lead = lead .. " So many that the intervals are in the table only." end
    local picture = against_memory(section, labels, picture_id, options, lead)
    if picture then
      list[#list + 1] = parts.chart { id = picture_id, title = options.title, lead = lead,
        notes = { section.note }, picture = picture, table = numbers(section) }
    end
  end
  if crowded then list[#list + 1] = variants.ranking(section, labels, id .. "-ranking") end
  return list
end

return variants
