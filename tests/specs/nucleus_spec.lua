-- The section of candidate sets: its figures from the lists they come from, its sheet, its chart.

local document = require "qlua.document"
local json = require "qlua.json"
local report = require "qlua.report"
local sheets = require "qlua.sheets"
local stats = require "qlua.stats"

--- Two settings, `n` questions: at the second the twin's nucleus is half as large as the full model's.
local function section_of(n, top_p)
  local values = {}
  for i = 1, n do
    local inside = i % 4 == 0 and 0 or 1
    values[i] = { pair = { { 1, 3, 3, 0.9, 0.9, 1 }, { i % 3 / 2, 2 * i, i, 0.5, 0.25, inside } },
      control = { { 1, 3, 3, 0.9, 0.9, 1 }, { 1, 2 * i, 2 * i, 0.95, 0.95, 1 } } }
  end
  return document.nucleus({ labels = { "full", "nf4" }, context = 64, opts = { seed = 1 },
    items = { path = "s_test.csv", sha256 = "ab", all = 120 } }, { task = "s, after the question",
    questions = n + 1, too_long = 1, values = values, set = "key", temperature = { 0.7 },
    top_p = top_p or { 0.5, 0.9 } })
end

describe("the section of nuclei", function()
  it("has means, medians, intervals and shares by setting", function()
    local n = 40
    local section = json.decode(json.encode(section_of(n)))
    assert.same({ 40, 1, 41, 2 }, { section.scored, section.too_long, section.questions, #section.rows })
    local same, row = section.rows[1], section.rows[2]
    assert.same({ 0.7, 0.5, 0.7, 0.9 }, { same.temperature, same.top_p, row.temperature, row.top_p })
    assert.same({ 1, 1, 0 }, { same.overlap.value, same.control.value, same.outside.count })
    local overlaps, sizes = {}, {}
    for i = 1, n do overlaps[i], sizes[i] = i % 3 / 2, 2 * i end
    local low, high = stats.bootstrap(overlaps, { seed = 1 })
    assert.same({ stats.mean(overlaps), low, high }, { row.overlap.value, row.overlap.low, row.overlap.high })
    assert.same({ 41, stats.median(sizes), 20.5 }, { row.sizes[1].mean, row.sizes[1].median,
      row.sizes[2].mean })
    assert.same({ 0.5, 0.25 }, { row.masses[1].value, row.masses[2].value })
    assert.same({ n = n, count = 10, share = 0.25, wilson = { stats.wilson(10, n) } }, row.outside)
  end)

  it("tells what differs from the noise, after Holm", function()
    local section = section_of(40)
    assert.is_false(section.rows[1].established)
    assert.equal(1, section.rows[1].adjusted_p)
    assert.is_true(section.rows[2].established)
    assert.is_true(section.rows[2].adjusted_p < 0.01)
  end)

  it("holds one question, and none", function()
    assert.equal(2, #section_of(1).rows)
    local none = section_of(0)
    assert.same({ 0, 0 }, { #none.rows, none.scored })
    for n = 0, 1 do
      local html = report.html { { run = 1, labels = { "full", "nf4" }, sections = { section_of(n) } } }
      assert.truthy(html:find("Candidates of sampling", 1, true))
      assert.is_nil(html:find "nan" or html:find "[^%a]inf[^%a]")
    end
  end)

  it("is a sheet and a chart with the same figures", function()
    local section = section_of(40)
    local sheet = sheets.of(section, { "full", "nf4" })[1]
    local at = {}
    for c, heading in ipairs(sheet.headings) do at[heading] = c end
    local row, second = sheet.rows[2], section.rows[2]
    assert.same({ second.overlap.value, 41, 20.5, 0.25, 10 }, { row[at.overlap_value],
      row[at.tokens_full_mean], row[at.tokens_quantized_mean], row[at.mass_of_full_in_quantized_value],
      row[at.top_outside] })
    local html = report.html { { run = 1, labels = { "full", "nf4" }, sections = { section } } }
    local line = html:match 'data%-key="nucleus/0.7/0.9"(.-)</tr>'
    local shown = {}
    for value in line:gmatch 'data%-value="(.-)"' do shown[#shown + 1] = tonumber(value) end
    assert.same({ 0.9, second.overlap.value, 1, second.adjusted_p, 41, 20.5, 0.5, 0.25, 0.25 }, shown)
    local _, marks = html:match('id="nucleus"(.-)</figure>'):gsub('class="m2 halo"', "")
    assert.equal(2, marks)
  end)
end)
