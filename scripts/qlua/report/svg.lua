--- Pieces of charts: scales, axes, marks. Lengths are SVG units; a chart is W wide and as high as it asks
--- for.
---
--- Everywhere `model` 1 is the full model: blue, a circle, a solid line; 2 the quantized one: vermilion, a
--- square, a dashed line.

local _ENV <const> = require "qlua.strict"

local markup = require "qlua.report.markup"

local h <const> = markup.tags

local svg = { W = 440 }

--- A coordinate: a tenth of a unit is enough for the eye.
local function c(x) return markup.number(math.floor(x * 10 + 0.5) / 10) end

svg.coordinate = c

---@class qlua.scale
---@field low number
---@field high number
---@field ticks number[]
---@field at fun(value: number): number  place of a value in SVG units

local function placed(low, high, from, to, map)
  map = map or function(v) return v end
  local a, b = map(low), map(high)
  return function(value) return from + (map(value) - a) / (b - a) * (to - from) end
end

--- Steps of 1, 2, 2.5 or 5 times a power of ten; about `count` of them.
local function step_of(span, count)
  local rough = span / count
  local unit = 10.0 ^ math.floor(math.log(rough, 10))
  for _, m in ipairs { 1, 2, 2.5, 5 } do
    if m * unit >= rough * 0.999 then return m * unit end
  end
  return 10 * unit
end

--- A linear scale over low..high, its ends rounded outwards to whole steps.
---@param low number
---@param high number
---@param from number
---@param to number
---@param count? integer  of steps, about
---@return qlua.scale
function svg.linear(low, high, from, to, count)
  if high <= low then high = low + (low ~= 0 and math.abs(low) or 1) end
  local step = step_of(high - low, count or 5)
  local first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  local ticks = {}
  for i = first, last do ticks[#ticks + 1] = i * step end
  return { low = first * step, high = last * step, ticks = ticks, step = step,
    at = placed(first * step, last * step, from, to) }
end

--- A logarithmic scale, its ends rounded outwards to 1, 2 or 5 times a power of ten, which are its ticks;
--- over more than three decades to whole powers.
---@param low number  above 0
---@param high number
---@param from number
---@param to number
---@return qlua.scale
function svg.log(low, high, from, to)
  local ticks, factors = {}, math.log(high / low, 10) <= 3 and { 1, 2, 5 } or { 1 }
  for power = math.floor(math.log(low, 10)) - 1, math.ceil(math.log(high, 10)) + 1 do
    for _, factor in ipairs(factors) do
      local tick = factor * 10.0 ^ power
      if tick <= low * 1.0000001 then ticks = {} end -- the last one below is the first
      if #ticks < 2 or ticks[#ticks] < high * 0.9999999 then ticks[#ticks + 1] = tick end
    end
  end
  return { low = ticks[1], high = ticks[#ticks], ticks = ticks,
    at = placed(ticks[1], ticks[#ticks], from, to, math.log) }
end

--- Equal columns for `n` categories: at(i) is the middle of column i.
---@param n integer
---@param from number
---@param to number
function svg.columns(n, from, to)
  local width = (to - from) / n
  return { width = width, at = function(i) return from + (i - 0.5) * width end }
end

---@param x number
---@param y number
---@param text string|number
---@param options? table  attributes; class among them
function svg.text(x, y, text, options)
  local given = { x = c(x), y = c(y), text }
  for key, value in pairs(options or {}) do given[key] = value end
  return h.text(given)
end

function svg.line(x1, y1, x2, y2, class)
  return h.line { class = class, x1 = c(x1), y1 = c(y1), x2 = c(x2), y2 = c(y2) }
end

function svg.rect(x, y, width, height, class)
  return h.rect { class = class, x = c(x), y = c(y), width = c(math.max(0, width)),
    height = c(math.max(0, height)) }
end

--- A line through points { x, y }; a missing point (false) breaks it.
function svg.path(points, class)
  local parts, pen = {}, "M"
  for _, p in ipairs(points) do
    if p then
      parts[#parts + 1] = pen .. c(p[1]) .. " " .. c(p[2])
      pen = "L"
    else
      pen = "M"
    end
  end
  return #parts > 0 and h.path { class = class, d = table.concat(parts) } or nil
end

--- The mark of a model at a point: circle or square.
function svg.mark(model, x, y, size, class)
  size = size or 4
  class = ("m%d%s"):format(model, class and " " .. class or "")
  if model == 1 then return h.circle { class = class, cx = c(x), cy = c(y), r = c(size) } end
  return svg.rect(x - size, y - size, 2 * size, 2 * size, class)
end

--- A vertical or horizontal interval with end strokes.
function svg.whisker(model, x1, y1, x2, y2)
  local half <const> = 4
  local dx, dy = x1 == x2 and half or 0, y1 == y2 and half or 0
  return h.path { class = "w" .. model,
    d = ("M%s %sL%s %sM%s %sL%s %sM%s %sL%s %s"):format(c(x1), c(y1), c(x2),
    c(y2), c(x1 - dx), c(y1 - dy), c(x1 + dx), c(y1 + dy), c(x2 - dx), c(y2 - dy), c(x2 + dx), c(y2 + dy)) }
end

--- Grid lines and labels of a vertical axis at the plot's left edge.
---@param scale qlua.scale
---@param left number
---@param right number
---@param shown fun(value: number): string
function svg.left_axis(scale, left, right, shown)
  local parts = {}
  for _, tick in ipairs(scale.ticks) do
    local y = scale.at(tick)
    parts[#parts + 1] = svg.line(left, y, right, y, "g")
    parts[#parts + 1] = svg.text(left - 6, y + 4, shown(tick), { ["text-anchor"] = "end" })
  end
  return parts
end

--- The same for a horizontal axis under the plot.
function svg.bottom_axis(scale, top, bottom, shown)
  local parts = {}
  for _, tick in ipairs(scale.ticks) do
    local x = scale.at(tick)
    parts[#parts + 1] = svg.line(x, top, x, bottom, "g")
    parts[#parts + 1] = svg.text(x, bottom + 16, shown(tick), { ["text-anchor"] = "middle" })
  end
  return parts
end

--- About the width of a text of the charts' size.
---@param text string
---@return number
function svg.width(text) return 6.4 * (utf8.len(text) or #text) end

--- At most `longest` characters of a text.
---@param text string
---@param longest integer
function svg.shortened(text, longest)
  text = markup.clean(text)
  if utf8.len(text) <= longest then return text end
  return text:sub(1, utf8.offset(text, longest) - 1) .. "…"
end

--- The two models with their shapes, in a row from x on. Returns markup and the x behind it.
---@param labels string[]
---@param x number
---@param y number
function svg.legend(labels, x, y)
  local parts = {}
  for m, label in ipairs(labels) do
    parts[#parts + 1] = svg.line(x, y, x + 22, y, "l" .. m)
    parts[#parts + 1] = svg.mark(m, x + 11, y)
    parts[#parts + 1] = svg.text(x + 28, y + 4, label, { class = "k" })
    x = x + 28 + svg.width(label) + 22
  end
  return parts, x
end

local function identifier(text) return (text:lower():gsub("[^%w]+", "-"):gsub("^%-+",
  ""):gsub("%-+$", "")) end

svg.identifier = identifier

--- The picture: title and description are what a screen reader says of it.
---@param id string
---@param height number
---@param title string
---@param description string
---@param body any
---@param width? number
function svg.picture(id, height, title, description, body, width)
  id = identifier(id)
  return h.svg { viewBox = ("0 0 %s %s"):format(c(width or svg.W), c(height)), role = "img",
    ["aria-labelledby"] = id .. "-t", ["aria-describedby"] = id .. "-d",
    h.title { id = id .. "-t", title }, h.desc { id = id .. "-d", description }, body }
end

return svg
