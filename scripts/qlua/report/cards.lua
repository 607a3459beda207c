--- The top of the page: the verdict with its rule, and three cards.

local _ENV <const> = require "qlua.strict"

local markup = require "qlua.report.markup"
local parts = require "qlua.report.parts"
local stats = require "qlua.stats"
local svg = require "qlua.report.svg"
local tables = require "qlua.table"
local verdict = require "qlua.report.verdict"

local h <const> = markup.tags

local cards = {}

local WIDTH <const> = 300

--- Two bars on one scale, each with its mark and text.
local function bars(id, labels, values, texts, description)
  local largest, body = math.max(values[1], values[2]), {}
  for m = 1, 2 do
    local y = (m - 1) * 30
    body[m] = { svg.mark(m, 5, y + 6, 4), svg.text(15, y + 10, labels[m], { class = "k" }),
      svg.text(WIDTH, y + 10, texts[m], { ["text-anchor"] = "end", class = "v" }),
      svg.rect(0, y + 15, WIDTH * values[m] / largest, 7, ("s%d1"):format(m)) }
  end
  return svg.picture(id, 53, description, ("%s: %s; %s: %s"):format(labels[1], texts[1],
    labels[2], texts[2]), body, WIDTH)
end

local function card(name, body) return h.section { class = "card", h.h2 { name }, body } end

local function missing(name, what)
  return card(name, { h.p { class = "fig", "–" }, h.p { what } })
end

--- "−9.9 GiB", "+12.0 KiB": what a saving changes.
local function change(m) return (m.saved >= 0 and "−" or "+") .. tables.bytes(math.abs(m.saved)) end

local function memory_card(m, labels)
  if not m then return missing("Memory", "Not measured in this report.") end
  local share = ("%.0f %% %s"):format(100 * math.abs(m.share), m.saved >= 0 and "less" or "more")
  return card("Memory", { h.p { class = "fig", parts.figure("card/memory", m.saved, change(m)), " ",
      h.small { share } },
    h.p { ("%s%s. Counted, not sampled."):format(m.what:gsub("^%l", string.upper), m.batch
      and " " .. m.where or "") },
    m.last and h.p { ("At batch %d: "):format(m.last.batch), parts.figure("card/memory/last", m.last.saved,
      change(m.last)), "." } or false,
    bars("card-memory", labels, { m.full, m.quantized }, { tables.bytes(m.full),
      tables.bytes(m.quantized) }, "Memory") })
end

local function seconds_text(seconds)
  local scale, unit = parts.seconds_unit(seconds)
  return parts.brief(scale * seconds) .. " " .. unit
end

local function speed_card(s, labels)
  if not s then return missing("Speed", "Batch sizes were not measured in this report.") end
  return card("Speed", { h.p { class = "fig", parts.figure("card/speed", s.ratio,
    ("%.2f×"):format(s.ratio)), " ",
      h.small { s.slower and "as fast: slower" or "as fast" } },
    h.p { s.low and { "95 % ", h.span { class = "num", ["data-low"] = s.low, ["data-high"] = s.high,
        ("[%.2f, %.2f]"):format(s.low, s.high) }, (" over %d rounds at batch %d%s."):format(s.rounds, s.batch,
          (s.faster or s.slower) and "" or ": not established") }
      or ("Median at batch %d; too few rounds for an interval."):format(s.batch) },
    s.last and h.p { ("At batch %d: "):format(s.last.batch), parts.figure("card/speed/last", s.last.ratio,
      ("%.2f×"):format(s.last.ratio)), s.last.low and (" [%.2f, %.2f]."):format(s.last.low, s.last.high)
      or "." } or false,
    bars("card-speed", labels, { s.full.median, s.quantized.median }, { seconds_text(s.full.median),
      seconds_text(s.quantized.median) }, "Median seconds of a pass") })
end

--- Differences of accuracy on one axis around 0, the tolerated loss shaded.
local function differences(pools, margin)
  local low, high = -margin, margin
  for _, pool in ipairs(pools) do low, high = math.min(low, 100 * pool.low), math.max(high,
    100 * pool.high) end
  local x = svg.linear(low, high, 10, WIDTH - 10, 5)
  local bottom = 14 + 18 * #pools
  local body = { svg.rect(x.at(-margin), 0, x.at(0) - x.at(-margin), bottom, "band"),
    svg.bottom_axis(x, 0, bottom,
    parts.tick), svg.line(x.at(0), 0, x.at(0), bottom, "peak") }
  local texts = {}
  for i, pool in ipairs(pools) do
    local y = 18 * i - 2
    body[#body + 1] = { svg.whisker(2, x.at(100 * pool.low), y, x.at(100 * pool.high), y),
      svg.mark(2, x.at(100 * pool.difference), y, 4) }
    texts[i] = ("%s: %s points"):format(pool.name, verdict.points(pool.difference))
  end
  return svg.picture("card-quality", bottom + 20, "Difference of accuracy in points with its 95 % interval",
    table.concat(texts, "; ") .. ". The loss that is tolerated is shaded.", body, WIDTH)
end

local function quality_card(pools, margin)
  if #pools == 0 then return missing("Quality", "Accuracy was not measured in this report.") end
  local worst, lines = pools[1], {}
  for _, pool in ipairs(pools) do if pool.difference < worst.difference then worst = pool end end
  for i, pool in ipairs(pools) do
    lines[i] = h.p { ("%s: "):format(pool.name:gsub("^%l", string.upper)), parts.figure("card/quality/"
      .. pool.kind,
      pool.difference, verdict.points(pool.difference)), " ", h.span { class = "num",
        ["data-low"] = pool.low,
      ["data-high"] = pool.high, ("[%s, %s]"):format(verdict.points(pool.low), verdict.points(pool.high)) },
      (", n = %d, %s%s%s."):format(pool.n, #pools > 1 and "adjusted " or "", stats.p_text(pool.p),
        (pool.lost or pool.gained) and "" or ": not established") }
  end
  return card("Quality", { h.p { class = "fig", verdict.points(worst.difference), " ", h.small {
      "points of accuracy" } }, lines, differences(pools, margin) })
end

---@param v qlua.verdict
---@param labels string[]
function cards.row(v, labels)
  return h.div { class = "cards", memory_card(v.memory, labels), speed_card(v.speed, labels),
    quality_card(v.pools, v.margin) }
end

---@param v qlua.verdict
function cards.verdict(v)
  local evidence, rule, unfair = {}, {}, {}
  for i, sentence in ipairs(v.evidence) do evidence[i] = h.li { sentence } end
  for i, entry in ipairs(v.rule) do rule[i] = { h.dt { entry[1] }, h.dd { entry[2] } } end
  for _, check in ipairs(v.unfair) do
    if not unfair[check.name] then unfair[#unfair + 1] = check.name end
    unfair[check.name] = true
  end
  return h.section { class = "verdict " .. v.word, id = "verdict", ["aria-labelledby"] = "verdict-h",
    h.div { h.p { class = "kicker", "Verdict" }, h.h2 { id = "verdict-h", v.headline },
      h.p { class = "why", v.because }, h.ul { evidence },
      #unfair > 0 and h.p { class = "note", ("▲ %s amber: %s. See "):format(#unfair == 1
        and "A fairness check is"
        or "Fairness checks are", table.concat(unfair, ", ")), h.a { href = "#fairness", "fairness" }, "." }
          or false },
    h.aside { class = "rule", ["aria-label"] = "The rule of the verdict", h.p { class = "kicker",
      "The rule" },
      h.dl { rule } } }
end

return cards
