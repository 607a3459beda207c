--- The page of a report: what stands where.

local _ENV <const> = require "qlua.strict"

local accuracy = require "qlua.report.accuracy"
local cards = require "qlua.report.cards"
local charts = require "qlua.report.charts"
local markup = require "qlua.report.markup"
local nucleus = require "qlua.report.nucleus"
local others = require "qlua.report.others"
local parts = require "qlua.report.parts"
local style = require "qlua.report.style"
local svg = require "qlua.report.svg"
local variants = require "qlua.report.variants"
local verdict = require "qlua.report.verdict"

local h <const> = markup.tags

local page = {}

--- Nothing may be fetched, no script may run: a text that got past the escaping could do neither.
local POLICY <const> = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

local function base_name(path) return (tostring(path):gsub("/+$", ""):match "([^/]*)$") end

local function model_name(doc)
  local name = doc.options and doc.options.model or doc.facts and doc.facts.full and doc.facts.full.folder
  return name and base_name(name) or "the model"
end

local function date_of(time)
  return type(time) == "number" and os.date("!%Y-%m-%d %H:%M UTC", math.floor(time)) or "–"
end

local function plain(value)
  return (type(value) == "string" or type(value) == "number") and tostring(value) or nil
end

local function device_text(doc)
  local d = doc.facts and doc.facts.device
  if not d then return nil end
  local list = {}
  for _, value in ipairs { plain(d.name) or "", plain(d.hardware) or "", plain(d.isa) or "",
    plain(d.threads) and ("%s threads"):format(d.threads) or "", plain(d.driver) or "" } do
    if value ~= "" then list[#list + 1] = value end
  end
  return table.concat(list, ", ")
end

local function weights_text(doc, labels)
  local f, list = doc.facts or {}, {}
  for m, info in ipairs { f.full or false, f.quantized or false } do
    if info then
      local quant = type(info.quant) == "table" and info.quant or {}
      list[#list + 1] = ("%s: %s%s"):format(labels[m], m == 1 and plain(info.dtype) or plain(quant.label)
        or labels[m], type(quant.bits) == "number" and m == 2
          and (", %.2f bits a weight"):format(quant.bits) or "")
    end
  end
  return table.concat(list, "; ")
end

local function banners(docs)
  local list, devices = {}, {}
  for _, doc in ipairs(docs) do
    if doc.status ~= "finished" then
      list[#list + 1] = h.p { class = "banner", h.b { "Not finished. " },
        ("Run %s (%s) is %s: this page shows what it had finished."):format(doc.run, doc.name, doc.status) }
    end
    local device = device_text(doc)
    if device and not devices[device] then
      devices[device] = true
      devices[#devices + 1] = device
    end
  end
  if #devices > 1 then
    list[#list + 1] = h.p { class = "banner", h.b { "Several devices. " },
      "The runs were made on different devices, so their times cannot be set beside each other: ",
      table.concat(devices, "; "), "." }
  end
  return list
end

local function header(docs, labels)
  local doc = docs[1]
  local runs = {}
  for i, d in ipairs(docs) do runs[i] = tostring(d.run) end
  return h.header { h.p { class = "kicker", "qlua report" },
    h.h1 { ("Should %s be quantized%s?"):format(model_name(doc), doc.labels[2] and " to " .. doc.labels[2]
      or "") },
    h.p { class = "note", ("%s. %s. Run%s %s, %s."):format(weights_text(doc, labels), device_text(doc) or
      "device not recorded", #runs == 1 and "" or "s", table.concat(runs, ", "),
        date_of(docs[#docs].started)) },
    h.nav { ["aria-label"] = "Parts of the page", h.a { href = "#verdict", "Verdict" },
      h.a { href = "#charts",
      "Charts" }, h.a { href = "#fairness", "Fairness" }, h.a { href = "#questions", "Questions" },
      h.a { href = "#repeat", "Repeat it" } }, banners(docs) }
end

local DRAW <const> = {
  sweep = function(section, labels, id) return { charts.latency(section, labels, id .. "-latency") or false,
    charts.memory(section, labels, id .. "-memory") or false } end,
  metrics = charts.metrics, perplexity = others.perplexity, variants = variants.charts,
  sensitivity = variants.ranking, nucleus = nucleus.chart,
}
local ORDER <const> = { "sweep", "metrics", "mmlu", "variants", "nucleus", "sensitivity", "perplexity" }

local function charts_section(docs, v, labels)
  local list, known = {}, {}
  for _, kind in ipairs(ORDER) do
    known[kind] = true
    local sections = verdict.sections(docs, kind)
    if kind == "mmlu" then
      list[#list + 1] = #sections > 0 and accuracy.chart(sections, v.pools, labels) or false
    else
      for i, section in ipairs(sections) do
        local id = i == 1 and kind or ("%s-%d"):format(kind, i)
        list[#list + 1] = DRAW[kind](section, labels, id)
      end
    end
  end
  for d, doc in ipairs(docs) do
    for s, section in ipairs(doc.sections or {}) do
      if not known[section.kind] then
        list[#list + 1] = others.table(section, labels,
          svg.identifier(("%s-%d-%d"):format(section.kind, d, s)))
      end
    end
  end
  return h.section { id = "charts", ["aria-labelledby"] = "charts-h", h.h2 { id = "charts-h", "Charts" },
    #list > 0 and h.div { class = "charts", list } or h.p { class = "note",
      "No run has a section to draw." } }
end

local function check_item(check)
  local class = check.ok == true and "ok" or check.ok == false and "bad" or nil
  local word = check.ok == true and "fair: " or check.ok == false and "amber: " or "recorded: "
  return h.li { class = class, h.span { class = "vh", word }, h.b { check.name }, ": ", check.text,
    check.ok == false and check.reason and { h.br {}, h.span { check.reason } } or false }
end

--- The checks of a run: those that failed in sight, of several runs the others folded.
local function run_checks(doc, fold)
  local bad, good = {}, {}
  for _, check in ipairs(doc.fairness and doc.fairness.checks or {}) do
    table.insert(fold and check.ok ~= false and good or bad, check_item(check))
  end
  if #bad + #good == 0 then return h.p { class = "note", "No checks were recorded." } end
  return { #bad > 0 and h.ul { class = "checks", bad } or false, #good > 0 and h.details { class = "data",
    h.summary { #bad == 0 and "All is fair: " or "", parts.plural(#good, "check"),
      #bad > 0 and " more" or "" },
    h.ul { class = "checks", good } } or false }
end

local function fairness(docs, v)
  local boxes, checked = {}, false
  for i, doc in ipairs(docs) do
    checked = checked or doc.fairness and #(doc.fairness.checks or {}) > 0
    boxes[i] = { #docs > 1 and h.h3 { ("Run %s, %s"):format(doc.run, doc.name) } or false,
      run_checks(doc, #docs > 1) }
  end
  local said = #v.unfair == 0 and "What would make the comparison unfair, and what was found."
    or #v.unfair == 1 and "One check is amber, with the reason."
    or ("%d checks are amber, with their reasons."):format(#v.unfair)
  return h.section { id = "fairness", ["aria-labelledby"] = "fairness-h",
    h.h2 { id = "fairness-h", "Fairness" }, h.div { class = #v.unfair > 0 and "box amber" or "box",
      checked and { h.p { said }, boxes } or h.p { "No checks were recorded with these runs." } } }
end

--- An argument as a shell takes it.
local function quoted(argument)
  argument = tostring(argument)
  if argument:find "^[%w%-_./:=,@%%+]+$" then return argument end
  return "'" .. argument:gsub("'", "'\\''") .. "'"
end

local function command_of(doc)
  local list = {}
  for i, argument in ipairs(doc.command or {}) do list[i] = quoted(argument) end
  return "qlua " .. table.concat(list, " ")
end

--- Files of questions and texts of a run with their hashes, each once.
local function data_of(doc)
  local list, seen = {}, {}
  local function add(path, sha256)
    if type(path) ~= "string" or seen[path] then return end
    seen[path] = true
    list[#list + 1] = { path, type(sha256) == "string" and sha256 or nil }
  end
  for _, section in ipairs(doc.sections or {}) do
    if section.data then add(section.data.path, section.data.sha256) end
    if section.kind == "perplexity" then add(section.text, section.sha256) end
    for _, o in ipairs(section.outcomes or {}) do
      if o.data then add(o.data.path, o.data.sha256) end
    end
  end
  return list
end

local SHOWN <const> = 8 -- data files of a run that are listed

local function repeat_run(doc)
  local f, rows, data = doc.facts or {}, doc.rows or {}, {}
  for i, entry in ipairs(data_of(doc)) do
    if i <= SHOWN then
      data[i] = { i > 1 and h.br {} or false, h.code { entry[1] }, entry[2] and { " sha256 ",
        h.code { entry[2] } }
        or false }
    elseif i == SHOWN + 1 then
      data[i] = { h.br {}, ("and %d more; the store has their hashes"):format(#data_of(doc) - SHOWN) }
    end
  end
  local function entry(name, value) return value and { h.dt { name }, h.dd { value } } or false end
  return { h.h3 { ("Run %s: %s"):format(doc.run, doc.name) },
    h.dl { class = "again", h.dt { "Command" }, h.dd { h.pre { tabindex = "0", command_of(doc) } },
      entry("qlua", plain(f.qlua_version)),
      entry("Model", plain(f.model_sha256) and { h.code { tostring(doc.options and doc.options.model
        or "") },
        " sha256 ", h.code { f.model_sha256 } }),
      entry("Data", #data > 0 and data), entry("Seed", plain(f.seed)), entry("Device", device_text(doc)),
      entry("Numerics", plain(f.numerics)), entry("Script", plain(doc.script_sha256) and { "sha256 ",
        h.code { doc.script_sha256 } }),
      entry("Time", ("%s to %s"):format(date_of(doc.started), date_of(doc.finished))),
      entry("Rows", rows.ran and ("%d reused from earlier runs, %d computed"):format(rows.reused or 0,
        rows.ran)) } }
end

local function again(docs)
  local list = {}
  for i, doc in ipairs(docs) do list[i] = repeat_run(doc) end
  return h.section { id = "repeat", ["aria-labelledby"] = "repeat-h", h.h2 { id = "repeat-h",
    "How to repeat it" },
    h.div { class = "box", list } }
end

--- The whole page; `browser(budget)` makes the questions, given the bytes that are left for them.
---@param docs table[]
---@param options { margin: number?, budget: integer, browser: fun(labels: string[], budget: integer):
---   qlua.markup }
---@return string
function page.html(docs, options)
  local labels = { docs[1].labels[1] or "full", docs[1].labels[2] or "quantized" }
  local v = verdict.of(docs, { margin = options.margin })
  local title = ("%s: %s v %s – qlua report"):format(model_name(docs[1]), labels[2], labels[1])
  local head = h.head { h.meta { charset = "utf-8" }, h.meta { ["http-equiv"] = "Content-Security-Policy",
    content = POLICY }, h.meta { name = "viewport", content = "width=device-width, initial-scale=1" },
    h.meta { name = "referrer", content = "no-referrer" }, h.title { title }, h.style { markup.raw(style) } }
  local top = { h.a { class = "skip", href = "#main", "Skip to the verdict" }, header(docs, labels) }
  local before = markup.join { cards.verdict(v), cards.row(v, labels), charts_section(docs, v, labels),
    fairness(docs, v) }
  local after = again(docs)
  local function whole(questions)
    return "<!doctype html>\n" .. h.html { lang = "en", head, h.body { top,
      h.main { id = "main", before, questions,
      after }, h.footer {
        "Made by qlua. This file is complete: it needs no network and runs no script." } } }.text .. "\n"
  end
  return whole(options.browser(labels, options.budget - #whole(false)))
end

return page
