--- Perplexity, and tables of the sections that have no picture.

local _ENV <const> = require "qlua.strict"

local markup = require "qlua.report.markup"
local parts = require "qlua.report.parts"
local svg = require "qlua.report.svg"

local h <const> = markup.tags

local others = {}

local LEFT <const>, RIGHT <const> = 48, svg.W - 14

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
