--- Sections beside the post's four charts: several quantizations, perplexity, and tables of any other kind.

local _ENV <const> = require "qlua.strict"

local markup = require "qlua.report.markup"
local parts = require "qlua.report.parts"
local svg = require "qlua.report.svg"
local tables = require "qlua.table"

local h <const> = markup.tags

local others = {}

local LEFT <const>, RIGHT <const> = 48, svg.W - 14

--- Labels beside their points, moved down or up until they meet no other; a thin line where they moved far.
local function label_points(points, top, bottom)
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
    for _, shift in ipairs { 0, 13, -13, 26, -26, 39, -39, 52, -52 } do
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
local function against_memory(section, labels, id, options)
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
  local x = svg.linear(0, unit * largest, LEFT, RIGHT)
  local y = svg.linear(options.zero and 0 or low, high, bottom, top)
  local body, points, marks = { svg.left_axis(y, LEFT, RIGHT, parts.tick),
    svg.bottom_axis(x, top, bottom, parts.tick),
    svg.text(LEFT, 13, options.axis, { class = "a" }),
    svg.text((LEFT + RIGHT) / 2, bottom + 33, "resident weights, " .. name,
      { ["text-anchor"] = "middle", class = "a" }) }, {}, {}
  for i, r in ipairs(rows) do
    local px, py = x.at(unit * r.row.bytes), y.at(r.value)
    if r.to > r.from then marks[#marks + 1] = svg.whisker(r.model, px, y.at(r.from), px, y.at(r.to)) end
    marks[#marks + 1] = h.g { h.title { ("%s: %s"):format(r.row.label, parts.short(r.value)) },
      svg.mark(r.model, px, py, 4.5) }
    points[i] = { x = px, y = py, label = r.row.label }
  end
  body[#body + 1] = { marks, label_points(points, top, bottom) }
  return svg.picture(id, 282, options.title, options.lead .. " The numbers are in the table below.", body)
end

local function variants_table(section)
  local rows = {}
  for i, row in ipairs(section.rows) do
    local a = row.accuracy
    rows[i] = { key = "variants/" .. row.label, row.label, parts.cell(row.bytes, tables.bytes(row.bytes)),
      parts.cell(row.bits, ("%.2f"):format(row.bits)),
      parts.bounded(row.kl.value, row.kl.low, row.kl.high, "%.5f"),
      parts.bounded(row.agreement.value, row.agreement.low, row.agreement.high, "%.3f"),
      a and a.accuracy and { value = a.accuracy, low = a.wilson[1], high = a.wilson[2],
        text = tables.interval(a.accuracy, a.wilson[1], a.wilson[2]) } or { text = "–" } }
  end
  return parts.grid("Quantizations", { "variant", "resident", "bits a weight", "KL, nats [95 %]",
    "top-1 agreement", "accuracy [95 % Wilson]" }, rows)
end

--- Accuracy and KL divergence against memory: what each quantization costs and saves.
---@param section qlua.section_variants
---@param labels string[]
---@param id string
function others.variants(section, labels, id)
  local list = {}
  local asked = ("%s, %s"):format(section.task, parts.plural(section.scored or section.questions, "question"))
  for _, options in ipairs {
    { name = "accuracy", title = "Accuracy against memory", axis = "right answers, %",
      lead = ("Each quantization of the model: %s, 95 %% intervals (Wilson)."):format(asked),
      figure = function(row)
        local a = row.accuracy
        if a and a.accuracy then return 100 * a.accuracy, 100 * a.wilson[1], 100 * a.wilson[2] end
      end },
    { name = "kl", title = "KL divergence against memory", axis = "KL from the full model, nats",
      zero = true,
      lead = ("KL divergence of each one’s predictions from the full model’s: %s, 95 %% intervals; lower is "
        .. "nearer."):format(asked),
      figure = function(row) return row.kl.value, row.kl.low, row.kl.high end },
  } do
    local picture_id = id .. "-" .. options.name
    local picture = against_memory(section, labels, picture_id, options)
    if picture then
      list[#list + 1] = parts.chart { id = picture_id, title = options.title, lead = options.lead,
        notes = { section.note }, picture = picture, table = variants_table(section) }
    end
  end
  return list
end

local function share_text(share)
  return share == 0 and "min" or share == 0.5 and "median" or share == 1 and "max"
    or ("%g %%"):format(100 * share)
end

--- The quantiles of the divergence on a logarithmic axis: how rare the large ones are.
local function quantiles(section, id)
  local list, low, high = {}, math.huge, 0
  for _, p in ipairs(section.summary.kl_percentiles or {}) do
    if p.value > 0 and p.share >= 0.5 then
      list[#list + 1] = p
      low, high = math.min(low, p.value), math.max(high, p.value)
    end
  end
  if #list < 2 then return nil end
  local top, bottom = 28, 150
  local y = svg.log(low, high, bottom, top)
  local columns, line, body = svg.columns(#list, LEFT, RIGHT), {}, { svg.left_axis(y, LEFT,
    RIGHT, parts.tick),
    svg.text(LEFT, 14, "KL quantiles over predictions, nats (logarithmic)",
      { class = "a" }) }
  for i, p in ipairs(list) do
    line[i] = { columns.at(i), y.at(p.value) }
    body[#body + 1] = { svg.mark(2, columns.at(i), y.at(p.value)), svg.text(columns.at(i), bottom + 16,
      share_text(p.share), { ["text-anchor"] = "middle" }) }
  end
  table.insert(body, 1, svg.path(line, "l2"))
  return svg.picture(id, 172, "Quantiles of the KL divergence",
    "The numbers are in the table beside it.", body)
end

--- Perplexity, and how far the predictions lie apart.
---@param section qlua.section_perplexity
---@param labels string[]
---@param id string
function others.perplexity(section, labels, id)
  local s, rows = section.summary, {}
  local function add(key, name, figure, scale)
    if not figure then return end
    scale = scale or 1
    rows[#rows + 1] = { key = "perplexity/" .. key, name, parts.cell(figure.value, parts.short(scale
      * figure.value)), figure.stderr and parts.cell(figure.stderr, parts.short(scale * figure.stderr))
      or { text = "–" } }
  end
  add("reference", "perplexity, " .. labels[1], s.reference)
  add("test", "perplexity, " .. labels[2], s.test)
  add("ratio", "ratio", s.ratio)
  add("log_ratio", ("ln(PPL %s / PPL %s)"):format(labels[2], labels[1]), s.log_ratio)
  add("kl", ("KL(%s ‖ %s), nats"):format(labels[1], labels[2]), s.kl)
  for _, p in ipairs(s.kl_percentiles or {}) do
    add(("kl/%g"):format(p.share), "KL, " .. share_text(p.share), p)
  end
  add("delta_p", "change of p(next token), points", s.delta_p, 100)
  add("delta_p_rms", "root mean square of it, points", s.delta_p_rms, 100)
  add("same_top", "same most likely token, %", s.same_top, 100)
  local protocol = section.protocol and section.protocol.description or ""
  return parts.chart { id = id, title = "Perplexity", beside = true,
    lead = ("%s: %s."):format(section.text, protocol),
    picture = h.div { h.div { class = "big", h.span { class = "c1", parts.figure("perplexity/" .. labels[1],
      s.reference.value, parts.short(s.reference.value)), h.small { labels[1] } },
      h.span { class = "c2", parts.figure("perplexity/" .. labels[2], s.test.value,
        parts.short(s.test.value)),
        h.small { labels[2] } } }, quantiles(section, id) or false },
    notes = { ("Lower is better. Ratio %s ± %s (standard error)."):format(parts.short(s.ratio.value),
      parts.short(s.ratio.stderr)) },
    table = parts.grid("Perplexity", { "measure", "value", "standard error" }, rows) }
end

local function flat_columns(rows)
  local columns, seen = {}, {}
  for _, row in ipairs(rows) do
    for key, value in pairs(row) do
      local plain = type(value) ~= "table" or type(value.value) == "number"
      if type(key) == "string" and plain and type(value) ~= "userdata" and not seen[key] then
        seen[key] = true
        columns[#columns + 1] = key
      end
    end
  end
  table.sort(columns, function(a, b)
    if (a == "label") ~= (b == "label") then return a == "label" end
    return a < b
  end)
  return columns
end

--- A section of a kind that has no picture: its `rows` as a table, its `title` and `note`.
---@param section table
---@param id string
function others.table(section, _, id)
  local rows, title = {}, section.title or section.kind
  local columns = flat_columns(section.rows or {})
  for i, row in ipairs(section.rows or {}) do
    rows[i] = { key = ("%s/%d"):format(id, i) }
    for j, name in ipairs(columns) do
      local value = row[name]
      if type(value) == "table" then
        rows[i][j] = parts.bounded(value.value, value.low, value.high, "%.4g")
      elseif type(value) == "number" then
        rows[i][j] = j == 1 and markup.number(value) or parts.cell(value, parts.short(value))
      else
        rows[i][j] = value ~= nil and tostring(value) or "–"
      end
    end
  end
  return parts.chart { id = id, title = title, lead = section.note or "",
    picture = #rows == 0 and h.p { class = "note", "No rows." } or nil,
    table = #rows > 0 and parts.grid(title, columns, rows) or false }
end

return others
