--- The charts of batch size and of next tokens: latency, peak memory, Jaccard.

local _ENV <const> = require "qlua.strict"

local markup = require "qlua.report.markup"
local parts = require "qlua.report.parts"
local svg = require "qlua.report.svg"
local tables = require "qlua.table"

local h <const> = markup.tags

local charts = {}

local LEFT <const>, RIGHT <const> = 48, svg.W - 10

--- Points of a sweep by batch size: sizes in order, and [batch][model].
local function by_batch(section)
  local sizes, map = {}, {}
  for _, p in ipairs(section.points) do
    if not map[p.batch] then
      map[p.batch] = {}
      sizes[#sizes + 1] = p.batch
    end
    map[p.batch][p.model] = p
  end
  table.sort(sizes)
  return sizes, map
end

local function labels_of(section, labels)
  return labels or { section.points[1].label, section.points[2] and section.points[2].label }
end

--- Scale of batch sizes by their logarithm to base 2, labelled with the sizes themselves.
local function batch_axis(sizes, top, bottom)
  local low, high = math.log(sizes[1], 2), math.log(sizes[#sizes], 2)
  local from, to = LEFT + 22, RIGHT - 22
  local function at(size)
    if high == low then return (from + to) / 2 end
    return from + (math.log(size, 2) - low) / (high - low) * (to - from)
  end
  local axis = { svg.text((LEFT + RIGHT) / 2, bottom + 33, "batch size (logarithmic)",
    { ["text-anchor"] = "middle", class = "a" }) }
  for _, size in ipairs(sizes) do
    axis[#axis + 1] = svg.line(at(size), top, at(size), bottom, "g")
    axis[#axis + 1] = svg.text(at(size), bottom + 16, size, { ["text-anchor"] = "middle" })
  end
  return at, axis
end

local function oom_mark(model, x, y)
  return { h.path { class = "x" .. model, d = ("M%s %sl8 8m0 -8l-8 8"):format(svg.coordinate(x - 4),
    svg.coordinate(y - 4)) }, svg.text(x, y + 17, "OOM", { ["text-anchor"] = "middle", class = "oom" }) }
end

local function latency_table(sizes, map)
  local rows = {}
  for _, size in ipairs(sizes) do
    for m = 1, 2 do
      local p = map[size][m]
      if p then
        local s = p.seconds
        local function seconds(value) return s and parts.cell(value, parts.short(1e3 * value))
          or { text = "–" } end
        rows[#rows + 1] = { key = ("latency/%d/%d"):format(size, m), tostring(size), { text = p.label },
          parts.cell(p.tokens, ("%.0f"):format(p.tokens)), s and seconds(s.median)
            or { text = "out of memory" }, seconds(s and s.p10), seconds(s and s.p90), seconds(s and s.min),
          seconds(s and s.max), s and parts.cell(s.n) or { text = "–" } }
      end
    end
  end
  return parts.grid("Latency by batch size", { "batch", "model", "tokens", "median ms",
    "p10", "p90", "min", "max",
    "passes" }, rows)
end

local function latency_extent(section)
  local low, high = math.huge, 0
  for _, p in ipairs(section.points) do
    if p.seconds then
      low, high = math.min(low, p.seconds.p10, p.seconds.median), math.max(high, p.seconds.p90,
        p.seconds.median)
    end
  end
  return low, high
end

local function out_of_memory(section)
  local notes = {}
  for _, p in ipairs(section.points) do
    if p.oom then notes[#notes + 1] = ("Batch %d, %s: %s"):format(p.batch, p.label, p.oom) end
  end
  return notes
end

--- Lines and bands of one model.
local function latency_series(m, sizes, map, x, y)
  local line, upper, lower, marks = {}, {}, {}, {}
  for i, size in ipairs(sizes) do
    local s = map[size][m] and map[size][m].seconds
    line[i] = s and { x(size), y(s.median) } or false
    if s then
      upper[#upper + 1] = { x(size), y(s.p90) }
      table.insert(lower, 1, { x(size), y(s.p10) })
      marks[#marks + 1] = svg.mark(m, x(size), y(s.median))
    end
  end
  local band = svg.path(table.move(lower, 1, #lower, #upper + 1, upper), "b" .. m)
  return { band, svg.path(line, "l" .. m), marks }
end

--- Median seconds of a pass by batch size, with the band from the 10th to the 90th percentile.
---@param section qlua.section_sweep
---@param labels string[]
---@param id string
function charts.latency(section, labels, id)
  local sizes, map = by_batch(section)
  if #sizes == 0 then return nil end
  labels = labels_of(section, labels)
  local top, bottom, height = 34, 246, 290
  local x, axis = batch_axis(sizes, top, bottom)
  local low, high = latency_extent(section)
  local body, logarithmic = { axis, (svg.legend(labels, LEFT, 12)) }, false
  local y
  if high > 0 then
    local unit, name = parts.seconds_unit(high)
    logarithmic = high / low > 20
    local scale = logarithmic and svg.log(unit * low, unit * high, bottom, top)
      or svg.linear(0, unit * high, bottom, top)
    y = function(seconds) return scale.at(unit * seconds) end
    body[#body + 1] = svg.left_axis(scale, LEFT, RIGHT, parts.tick)
    body[#body + 1] = svg.text(RIGHT, 16, name .. (logarithmic and ", logarithmic" or ""),
      { ["text-anchor"] = "end", class = "a" })
    for m = 1, 2 do body[#body + 1] = latency_series(m, sizes, map, x, y) end
  end
  for _, size in ipairs(sizes) do
    for m = 1, 2 do
      local p = map[size][m]
      if p and p.oom then body[#body + 1] = oom_mark(m, x(size) + (m == 1 and -7 or 7),
        top + 12 + (m - 1) * 30) end
    end
  end
  local lead = ("One forward pass: median of %d, band from the 10th to the 90th percentile%s."):format(
    section.runs, logarithmic and "; the axis is logarithmic" or "")
  return parts.chart { id = id, title = "Latency by batch size", lead = lead, notes = out_of_memory(section),
    picture = svg.picture(id, height, "Latency by batch size", lead
      .. " The numbers are in the table below.", body),
    table = latency_table(sizes, map) }
end

--- Weights (with what the model shares), KV cache and activations of a point; of the computed need where it
--- ran out of memory.
local function pieces(p)
  local from = p.peak or p.expected
  return { from.weights + (from.shared or 0), from.kv, from.activations }
end

local function memory_table(sizes, map)
  local rows = {}
  for _, size in ipairs(sizes) do
    for m = 1, 2 do
      local p = map[size][m]
      if p then
        local function mib(value) return value and parts.cell(value, parts.short(value / 2 ^ 20))
          or { text = "–" } end
        local peak = p.peak or {}
        rows[#rows + 1] = { key = ("memory/%d/%d"):format(size, m), tostring(size), { text = p.label },
          p.oom and { text = "out of memory" } or mib(peak.resident), mib(peak.weights), mib(peak.shared),
          mib(peak.kv), mib(peak.activations), mib(p.reserved), mib(p.process),
          mib(p.expected and p.expected.total) }
      end
    end
  end
  return parts.grid("Peak memory by batch size, MiB", { "batch", "model", "peak MiB", "own weights", "shared",
    "KV cache", "activations", "reserved", "process", "computed" }, rows)
end

--- A stack of the three kinds; dashed and hollow where it did not fit.
local function stack(p, x, width, y, unit)
  local list, from, sum = {}, y(0), 0
  for i, bytes in ipairs(pieces(p)) do
    sum = sum + bytes
    local to = y(sum * unit)
    list[i] = svg.rect(x, to, width, from - to, ("s%d%d%s"):format(p.model, i, p.oom and " not" or ""))
    from = to
  end
  local high = p.oom and from or math.min(from, y(p.peak.resident * unit))
  if not p.oom then
    local peak = y(p.peak.resident * unit)
    list[#list + 1] = svg.line(x - 1.5, peak, x + width + 1.5, peak, "peak")
  end
  return list, high
end

local function memory_legend(labels)
  local list, x = {}, LEFT
  for m, label in ipairs(labels) do
    list[#list + 1] = svg.rect(x, 5, 12, 12, ("s%d1"):format(m))
    list[#list + 1] = svg.text(x + 17, 16, label, { class = "k" })
    x = x + 17 + svg.width(label) + 16
  end
  x = LEFT
  for i, name in ipairs { "weights", "KV cache", "activations" } do
    list[#list + 1] = svg.rect(x, 25, 12, 12, "s3" .. i)
    list[#list + 1] = svg.text(x + 17, 36, name)
    x = x + 17 + svg.width(name) + 14
  end
  list[#list + 1] = svg.line(x, 31, x + 14, 31, "peak")
  list[#list + 1] = svg.text(x + 19, 36, "peak")
  return list
end

--- High-water mark of each model's memory by batch size, its parts apart.
---@param section qlua.section_sweep
---@param labels string[]
---@param id string
function charts.memory(section, labels, id)
  local sizes, map = by_batch(section)
  if #sizes == 0 then return nil end
  labels = labels_of(section, labels)
  local top, bottom, height, largest, failed = 64, 256, 300, 0, false
  for _, p in ipairs(section.points) do
    local sum = 0
    for _, bytes in ipairs(pieces(p)) do sum = sum + bytes end
    largest, failed = math.max(largest, sum, p.peak and p.peak.resident or 0), failed or p.oom ~= nil
  end
  local unit, name = parts.bytes_unit(largest)
  local scale = svg.linear(0, unit * largest, bottom, top)
  local columns = svg.columns(#sizes, LEFT, RIGHT)
  local width = math.min(26, columns.width * 0.36)
  local body = { svg.left_axis(scale, LEFT, RIGHT, parts.tick), memory_legend(labels),
    svg.text(RIGHT, 16, name, { ["text-anchor"] = "end", class = "a" }),
    svg.text((LEFT + RIGHT) / 2, bottom + 33, "batch size", { ["text-anchor"] = "middle", class = "a" }) }
  for i, size in ipairs(sizes) do
    local x = columns.at(i)
    body[#body + 1] = svg.text(x, bottom + 16, size, { ["text-anchor"] = "middle" })
    for m = 1, 2 do
      local p = map[size][m]
      if p then
        local left = x + (m == 1 and -width - 1.5 or 1.5)
        local bars, high = stack(p, left, width, scale.at, unit)
        body[#body + 1] = bars
        local text = p.oom and "OOM" or width >= 20 and parts.brief(unit * p.peak.resident)
        if text then
          body[#body + 1] = svg.text(left + width / 2, high - 4, text, { ["text-anchor"] = "middle",
            class = "v" })
        end
      end
    end
  end
  local lead = "High-water mark of each model’s own memory, with the tensors that it shares"
    .. (failed and "; dashed: computed, for it did not fit." or ".")
  return parts.chart { id = id, title = "Peak memory by batch size", lead = lead,
    notes = out_of_memory(section), table = memory_table(sizes, map),
    picture = svg.picture(id, height, "Peak memory by batch size", lead
      .. " The numbers are in the table below.", body) }
end

--- Questions by value: { value, count } in order.
local function counted(values)
  local counts, list = {}, {}
  for _, value in ipairs(values) do
    if not counts[value] then list[#list + 1] = value end
    counts[value] = (counts[value] or 0) + 1
  end
  table.sort(list)
  local most = 0
  for i, value in ipairs(list) do
    list[i] = { value = value, count = counts[value] }
    most = math.max(most, counts[value])
  end
  return list, most
end

--- How tall the dots of one value may stand, and the least distance of dots that the eye tells apart.
local TALL <const>, LEAST <const> = 14, 1.7

--- Dots in rows around their value, one a question; bars where they are too many for dots.
local function swarm(values, x, width, y)
  local list, most = counted(values)
  local pitch = math.min(4, math.sqrt(TALL * width / most))
  if pitch < LEAST then
    local bars = {}
    for i, group in ipairs(list) do
      local w = width * group.count / most
      bars[i] = svg.rect(x - w / 2, y(group.value) - 2.5, w, 5, "d2")
    end
    return bars, false
  end
  local per_row, dots = math.max(1, math.floor(width / pitch)), {}
  for _, group in ipairs(list) do
    local rows = math.ceil(group.count / per_row)
    for i = 0, group.count - 1 do
      local row = i // per_row
      local in_row = math.min(per_row, group.count - row * per_row)
      dots[#dots + 1] = ("M%s %sh0"):format(svg.coordinate(x + (i % per_row - (in_row - 1) / 2) * pitch),
        svg.coordinate(y(group.value) + (row - (rows - 1) / 2) * pitch))
    end
  end
  return h.path { class = "dots", ["stroke-width"] = svg.coordinate(pitch * 0.82),
    d = table.concat(dots) }, true
end

local function metrics_table(section)
  local control, tests, rows = tables.by_name(section.control), tables.by_name(section.tests), {}
  local function shown(row)
    if not row then return { text = "–" } end
    local format = row.value and row.value ~= 0 and math.abs(row.value) < 0.01 and "%.2e" or "%.3f"
    return parts.bounded(row.value, row.low, row.high, format)
  end
  for i, row in ipairs(section.pair) do
    local test = tests[row.name]
    local same = control[row.name]
    local noise = shown(same)
    if same and same.value then noise.text = parts.short(same.value) end
    rows[i] = { key = "metrics/" .. row.name, row.name, shown(row), row.median
      and parts.cell(row.median, parts.short(row.median)) or { text = "–" }, noise,
      test and parts.cell(test.adjusted_p, ("%.2g"):format(test.adjusted_p)) or { text = "–" } }
  end
  return parts.grid("Agreement on the next token", { "metric", "mean [95 %]", "median", "full v full",
    "adjusted p" }, rows)
end

local function jaccard_rows(section)
  local list = {}
  for _, row in ipairs(section.pair) do
    local k = row.name:match "^jaccard@(%d+)$"
    if k and row.value then list[#list + 1] = { k = math.tointeger(tonumber(k)), row = row } end
  end
  table.sort(list, function(a, b) return a.k < b.k end)
  return list
end

local function jaccard_picture(section, list, labels, id, lead)
  local top, bottom = 40, 262
  local scale = { at = function(v) return bottom - 8 - v * (bottom - top - 16) end,
    ticks = { 0, 0.2, 0.4, 0.6, 0.8, 1 } }
  local columns, control = svg.columns(#list, LEFT, RIGHT), {}
  for _, row in ipairs(section.control or {}) do control[row.name] = row.value and row or nil end
  local body, noise, marks, separate = { svg.left_axis(scale, LEFT, RIGHT, parts.tick),
    svg.text((LEFT + RIGHT) / 2, bottom + 33, "k: size of both sets of most likely tokens",
      { ["text-anchor"] = "middle", class = "a" }) }, {}, {}, true
  for i, entry in ipairs(list) do
    local row, x = entry.row, columns.at(i)
    local same = control[row.name]
    body[#body + 1] = svg.text(x, bottom + 16, entry.k, { ["text-anchor"] = "middle" })
    if row.values and #row.values > 0 then
      local dots, each = swarm(row.values, x, columns.width - 16, scale.at)
      body[#body + 1], separate = dots, separate and each
    end
    noise[i] = same and { x, scale.at(same.value) } or false
    if same then marks[#marks + 1] = svg.mark(1, x, scale.at(same.value), 3.5, "halo") end
    if row.low then
      marks[#marks + 1] = svg.whisker(2, x, scale.at(row.low), x, scale.at(row.high))
    end
    marks[#marks + 1] = svg.mark(2, x, scale.at(row.value), 4.5, "halo")
    marks[#marks + 1] = svg.text(x + 9, scale.at(row.value) + 4, ("%.3f"):format(row.value),
      { class = "v halo" })
  end
  local names = { "full v full", ("full v %s"):format(labels[2]) }
  body[#body + 1] = { svg.path(noise, "l1") or false, marks, (svg.legend(names, LEFT, 14)) }
  return svg.picture(id, 304, "Jaccard similarity of the k most likely tokens",
    lead .. " The numbers are in the table below.", body), separate
end

--- Jaccard by k with interval, every question, and the full model against itself; other metrics in the table.
---@param section qlua.section_metrics
---@param labels string[]
---@param id string
function charts.metrics(section, labels, id)
  local list = jaccard_rows(section)
  local accounted = ("%s, %s"):format(section.task, parts.plural(section.scored, "question"))
  if #list == 0 then
    return parts.chart { id = id, title = "Agreement on the next token", lead = accounted .. ".",
      table = metrics_table(section) }
  end
  local lead = "Shared part of both models’ k most likely next tokens (" .. accounted
    .. "): mean with 95 % interval."
  local picture, separate = jaccard_picture(section, list, labels, id, lead)
  local notes = { separate and "Each dot is a question." or "Bars: how many questions have the value.",
    section.control and #section.control > 0 and
      "Full v full is the same model in another batch size: below 1 it is noise." or
      "Full v full was not measured.",
    "Intervals: Wilson’s where every value is yes or no, else from a bootstrap of the questions.",
    section.tests and "Adjusted p: the pair against full v full, paired by question, after Holm." or nil }
  return parts.chart { id = id, title = "Agreement on the next token", lead = lead, picture = picture,
    beside = true, notes = { table.concat(notes, " ") }, table = metrics_table(section) }
end

return charts
