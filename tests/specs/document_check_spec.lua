local check = require "qlua.document_check"
local compare = require "qlua.compare"
local document = require "qlua.document"
local documents = require "tests.specs.report_documents"
local json = require "qlua.json"
local report = require "qlua.report"
local stats = require "qlua.stats"

--- A small document of every kind of section, as it is read from a file.
local function whole()
  local random = stats.random(1)
  local function figures()
    local list = {}
    for i = 1, 4 do
      list[i] = { pair = { { 0.25 * (random() & 3), 3, 4, 0.9, 0.8, i % 2 } },
        control = { { 1.0, 3, 3, 1.0, 1.0, 1 } } }
    end
    return list
  end
  local sweep, variants = documents.sweep { oom = 2 }, documents.variants()
  sweep.points = table.move(sweep.points, 1, 4, 1, {})
  for _, point in ipairs(sweep.points) do -- short lists: medians of many resamples are drawn from them
    if point.seconds then point.seconds.samples = table.move(point.seconds.samples, 1, 3, 1, {}) end
  end
  local sensitivity = documents.variants()
  sensitivity.kind, sensitivity.all = "sensitivity", table.remove(sensitivity.rows)
  local nucleus = document.nucleus({ items = { path = "x.csv" }, context = 99, opts = { seed = 1 } },
    { task = "x", questions = 4, too_long = 0, top_p = { 0.9 }, temperature = { 1 }, values = figures() })
  return assert(json.decode(json.encode(documents.document { sweep, documents.metrics(5), { kind = "mmlu",
    protocol = "sound", outcomes = { documents.outcome("mmlu_virology", documents.rows(9)) } }, variants,
    sensitivity, documents.perplexity(), nucleus })))
end

--- Every place in a value: its path, the table and the key; of a list only the first element.
local function places(value, path, list)
  for key, child in pairs(value) do
    if type(key) ~= "number" or key == 1 or path == "sections" then
      local at = path == "" and key or path .. "." .. key
      list[#list + 1] = { at = at, of = value, key = key }
      if type(child) == "table" then places(child, at, list) end
    end
  end
  return list
end

describe("the document of a run", function()
  it("passes as it is written", function()
    assert.is_table(check(whole(), "x.json"))
  end)

  it("is of this format", function()
    local _, err = check({ format = 2 }, "x.json")
    assert.equal("x.json: a document of format 2, and this qlua reads format 1", err.message)
    for _, other in ipairs { 1, "x", {}, { format = "1" }, json.null } do
      _, err = check(other, "x.json")
      assert.truthy(err.message:find("x.json: not the document of a run", 1, true))
    end
  end)

  it("names the field that is wrong", function()
    local doc = whole()
    doc.sections[3].outcomes[1].models[1].accuracy = "high"
    local _, err = check(doc, "x.json")
    assert.equal("x.json: not the document of a run: sections[3].outcomes[1].models[1].accuracy: a string, "
      .. "not a number", err.message)
    doc = whole()
    doc.labels = nil
    _, err = check(doc, "x.json")
    assert.equal("x.json: not the document of a run: labels: missing, not a list", err.message)
  end)

  it("is refused, or read without a fault, whatever field is missing or of another type", function()
    local doc, other = whole(), { name = "b", document = whole(), rows = function() return nil end }
    local changed = { name = "a", document = doc, rows = other.rows }
    local refused, taken, faults = 0, 0, {}
    for _, place in ipairs(places(doc, "", {})) do
      local kept = place.of[place.key]
      for _, value in ipairs { type(kept) == "string" and json.null or "x", "gone" } do
        local gone = value == "gone"
        if not gone or type(place.key) == "string" then
          if gone then place.of[place.key] = nil else place.of[place.key] = value end
          if check(doc, "x.json") then
            taken = taken + 1
            for _, read in ipairs { report.html, compare.runs } do
              local ok, why = pcall(read, read == compare.runs and changed or { doc }, read == compare.runs
                and other or nil)
              if not ok then faults[#faults + 1] = ("%s = %s: %s"):format(place.at, tostring(value), why) end
            end
          else
            refused = refused + 1
          end
          place.of[place.key] = kept
        end
      end
    end
    assert.equal("", table.concat(faults, "\n"))
    assert.is_true(refused > 300 and taken > 100, ("%d refused, %d taken"):format(refused, taken))
  end)
end)
