--- The candidate sets of sampling: how far the nuclei of both models overlap, by temperature and top_p.

local _ENV <const> = require "qlua.strict"

local parts = require "qlua.report.parts"
local svg = require "qlua.report.svg"

local nucleus = {}

local LEFT <const>, RIGHT <const> = 48, svg.W - 14
local LABEL <const> = 21 -- width of ".95" and a gap

local function numbers(section, labels)
  local rows = {}
  for i, row in ipairs(section.rows) do
    local function tokens(size)
      return parts.cell(size.mean, ("%s (%s)"):format(parts.short(size.mean), parts.tick(size.median)))
    end
    local function share(figure) return parts.bounded(figure.value, figure.low, figure.high, "%.3f") end
    rows[i] = { key = ("nucleus/%g/%g"):format(row.temperature, row.top_p), ("%g"):format(row.temperature),
      parts.cell(row.top_p, ("%g"):format(row.top_p)), share(row.overlap),
      parts.cell(row.control.value, parts.short(row.control.value)),
      parts.cell(row.adjusted_p, ("%.2g"):format(row.adjusted_p)), tokens(row.sizes[1]), tokens(row.sizes[2]),
      share(row.masses[1]), share(row.masses[2]),
      parts.cell(row.outside.share, ("%.1f %%"):format(100 * row.outside.share)) }
  end
  local full, test = labels[1], labels[2]
  return parts.grid("Candidates of sampling", { "temperature", "top-p", "overlap [95 %]", "full v full",
    "adjusted p", "tokens, " .. full, "tokens, " .. test, ("mass of %s’s in %s"):format(test, full),
    ("mass of %s’s in %s"):format(full, test), "top token out" }, rows)
end

--- One column a setting; a line joins those of one temperature.
local function picture(section, labels, id, lead)
  local top, bottom, rows = 40, 246, section.rows
  local scale = { at = function(v) return bottom - 8 - v * (bottom - top - 16) end,
    ticks = { 0, 0.2, 0.4, 0.6, 0.8, 1 } }
  local columns = svg.columns(#rows, LEFT, RIGHT)
  local every = math.ceil(LABEL / columns.width)
  local body = { svg.left_axis(scale, LEFT, RIGHT, parts.tick) }
  local noise, line, marks, first = {}, {}, {}, 1
  for i, row in ipairs(rows) do
    local x = columns.at(i)
    local same, y = scale.at(row.control.value), scale.at(row.overlap.value)
    noise[#noise + 1], line[#line + 1] = { x, same }, { x, y }
    marks[#marks + 1] = svg.mark(1, x, same, 3.5, "halo")
    marks[#marks + 1] = row.overlap.low and svg.whisker(2, x, scale.at(row.overlap.low), x,
      scale.at(row.overlap.high)) or false
    marks[#marks + 1] = svg.mark(2, x, y, 3.5, "halo")
    if (i - first) % every == 0 then
      body[#body + 1] = svg.text(x, bottom + 16, (("%g"):format(row.top_p):gsub("^0%.", ".")),
        { ["text-anchor"] = "middle" })
    end
    if not rows[i + 1] or rows[i + 1].temperature ~= row.temperature then
      body[#body + 1] = svg.text((columns.at(first) + x) / 2, bottom + 33, ("%s%g"):format(first == 1
        and "temperature " or "", row.temperature), { ["text-anchor"] = "middle", class = "a" })
      noise[#noise + 1], line[#line + 1], first = false, false, i + 1
    end
  end
  body[#body + 1] = { svg.path(noise, "l1"), svg.path(line, "l2"), marks,
    (svg.legend({ "full v full", ("full v %s"):format(labels[2]) }, LEFT, 14)) }
  return svg.picture(id, 290, "Overlap of the nuclei by temperature and top-p",
    lead .. " The numbers are in the table below.", body)
end

---@param section qlua.section_nucleus
---@param labels string[]
---@param id string
function nucleus.chart(section, labels, id)
  local lead = ("Shared part of both models’ nuclei, the sets that sampling draws from (%s, %s): mean with "
    .. "95 %% interval, by top-p and temperature."):format(section.task,
    parts.plural(section.scored, "question"))
  local some = #section.rows > 0
  return parts.chart { id = id, title = "Candidates of sampling", lead = lead,
    picture = some and picture(section, labels, id, lead) or nil,
    notes = { "A nucleus is the smallest set of the most likely tokens whose mass reaches top-p. Tokens: "
      .. "mean (median) size. Top token out: the full model’s first choice is not in the other’s nucleus. "
      .. "Adjusted p: the overlap against full v full, paired by question, after Holm." },
    table = some and numbers(section, labels) or false }
end

return nucleus
