--- The report in a headless Chromium (Debian's package `chromium`): its figures in the DOM are the store's,
--- its filter works without a script of its own, nothing overlaps or leaves the page in any width, and every
--- text has enough contrast in light and dark. Skipped where there is no Chromium.

local documents = require "tests.specs.report_documents"
local json = require "qlua.json"
local report = require "qlua.report"
local store_module = require "qlua.store"
local support = require "tests.specs.support"

local function browser()
  for _, name in ipairs { "chromium", "chromium-browser", "google-chrome" } do
    for folder in (os.getenv "PATH" or ""):gmatch "[^:]+" do
      local path = folder .. "/" .. name
      if support.exists(path) then return path end
    end
  end
end

local CHROMIUM <const> = browser()

--- What Chromium prints for a page, with these flags.
local function run(page, flags)
  local command = ("timeout 120 '%s' --headless --no-sandbox --disable-gpu --disable-dev-shm-usage " ..
    "--user-data-dir='%s' --hide-scrollbars %s 'file://%s' 2>/dev/null"):format(CHROMIUM,
    support.folder(), flags, page)
  local pipe = assert(io.popen(command))
  local output = pipe:read "a"
  pipe:close()
  return output
end

local function values(html)
  local list = {}
  for value in html:gmatch ' data%-value="([^"]*)"' do list[#list + 1] = value end
  return list
end

--- A store with the study in it, and the page made of it.
local function study()
  local folder = support.folder()
  local doc, rows = documents.study(40)
  local store <close> = assert(store_module.open(folder .. "/qlua.sqlite"))
  doc.run = assert(store:begin_run { name = doc.name, started = doc.started, command = "[]",
    script_sha256 = doc.script_sha256 })
  for i, o in ipairs(doc.sections[3].outcomes) do
    local list, ids, key = {}, {}, ("%064x"):format(i)
    for q, row in ipairs(rows(doc, o.set)) do
      list[q], ids[q] = { tostring(q), json.encode(row) }, tostring(q)
    end
    o.set = key
    assert(store:set(key, "mmlu", "{}"))
    assert(store:put(doc.run, key, list))
    assert(store:use(doc.run, key, ids))
  end
  assert(store:end_run(doc.run, { finished = doc.finished, status = "finished",
    document = json.encode(doc) }))
  local kept = assert(json.decode(assert(store:run(doc.run)).document))
  local path = folder .. "/report.html"
  assert(report.write({ kept }, store, path))
  return path, kept
end

--- Looks at the page in a frame of each width; what it finds becomes the text of its own page.
local PROBE <const> = [[
<!doctype html><meta charset="utf-8"><body><script>
const found = { wide: [], outside: [], overlaps: [], pale: [], shown: {}, tabs: 0, dark: false,
  elements: 0 };
function luminance(c) {
  const f = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  return 0.2126 * f(c[0]) + 0.7152 * f(c[1]) + 0.0722 * f(c[2]);
}
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgba(text) {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  const d = canvas.getImageData(0, 0, 1, 1).data;
  return [d[0], d[1], d[2], d[3] / 255];
}
const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
function background(w, e) {
  const layers = [];
  for (; e; e = e.parentElement) layers.unshift(rgba(w.getComputedStyle(e).backgroundColor));
  return layers.reduce((below, top) => over(top, below), [255, 255, 255]);
}
function pale(w, d) {
  for (const e of d.querySelectorAll("body *")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    if (!e.getClientRects().length || e.closest("title,desc,.vh,.skip")) continue;
    if (e.tagName === "I") continue; // the models' marks, which are graphics
    const s = w.getComputedStyle(e), svg = e instanceof w.SVGElement;
    const b = background(w, e), c = over(rgba(svg ? s.fill : s.color), b);
    const hi = Math.max(luminance(b), luminance(c)), lo = Math.min(luminance(b), luminance(c));
    if ((hi + 0.05) / (lo + 0.05) < 4.5) found.pale.push(e.tagName + "." + e.getAttribute("class") + ": "
      + e.textContent.slice(0, 30));
  }
}
function labels(d, width) {
  for (const svg of d.querySelectorAll("svg")) {
    const box = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
    const boxes = texts.map(t => t.getBoundingClientRect());
    boxes.forEach((a, i) => {
      const name = width + " " + svg.getAttribute("aria-labelledby") + ": " + texts[i].textContent;
      if (a.left < box.left - 1 || a.right > box.right + 2 || a.top < box.top - 3
          || a.bottom > box.bottom + 2)
        found.outside.push(name);
      for (let j = 0; j < i; j++) {
        const b = boxes[j];
        const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (x > 1 && y > 4) found.overlaps.push(name + " / " + texts[j].textContent);
      }
    });
  }
}
const widths = [320, 390, 768, 1180], frames = widths.map(width => {
  const f = document.createElement("iframe");
  f.style.cssText = "border:0;height:900px;width:" + width + "px";
  f.src = "report.html";
  document.body.append(f);
  return new Promise(done => f.onload = () => done(f));
});
Promise.all(frames).then(list => {
  list.forEach((f, i) => {
    const d = f.contentDocument, w = f.contentWindow, root = d.documentElement;
    if (root.scrollWidth > root.clientWidth) found.wide.push(widths[i] + ": " + root.scrollWidth);
    for (const e of d.querySelectorAll("details")) e.open = true;
    for (const e of root.scrollWidth > root.clientWidth ? d.querySelectorAll("body *") : [])
      if (e.getBoundingClientRect().right > root.clientWidth && !e.closest(".scroll"))
        found.wide.push(widths[i] + ": " + e.tagName + "." + e.className);
    labels(d, widths[i]);
    if (i === 3) {
      pale(w, d);
      for (const id of ["all", "quantized", "full", "differ", "wrong", "right"]) {
        d.getElementById("f-" + id).click();
        found.shown[id] = [...d.querySelectorAll(".q")].filter(q => q.getClientRects().length).length;
      }
      found.tabs = [...d.querySelectorAll("a,summary,input,[tabindex]")].filter(e => e.tabIndex >= 0).length;
      found.dark = luminance(rgba(w.getComputedStyle(d.body).backgroundColor)) < 0.2;
      found.elements = d.querySelectorAll("script,img,iframe,object,embed,link,form").length;
    }
  });
  const p = document.createElement("pre");
  p.id = "found";
  p.textContent = encodeURIComponent(JSON.stringify(found));
  document.body.append(p);
});
</script></body>]]

local function probe(page, flags)
  local path = page:gsub("[^/]*$", "probe.html")
  support.write(path, PROBE)
  local dom = run(path, "--allow-file-access-from-files --virtual-time-budget=20000 --dump-dom "
    .. (flags or ""))
  local text = assert(dom:match '<pre id="found">(.-)</pre>', "the probe did not end"):gsub("%%(%x%x)",
    function(hex) return string.char(tonumber(hex, 16)) end)
  return assert(json.decode(text))
end

describe("the report in Chromium", function()
  if not CHROMIUM then
    pending "no Chromium here (apt install chromium)"
    return
  end
  local page, doc
  setup(function() page, doc = study() end)
  teardown(support.cleanup)

  it("has the store's figures in its DOM", function()
    local source, dom = support.read(page), run(page, "--dump-dom")
    assert.is_true(#values(source) > 300)
    assert.same(values(source), values(dom))
    for _, o in ipairs(doc.sections[3].outcomes) do
      local row = assert(dom:match('<tr data%-key="accuracy/' .. o.task .. '">(.-)</tr>'))
      local c = o.comparison
      local got = {}
      for i, value in ipairs(values(row)) do got[i] = tonumber(value) end
      assert.same({ o.models[1].n, o.models[1].accuracy, o.models[2].accuracy, c.difference, c.mcnemar_p,
        c.adjusted_p, c.flips.flips, c.questions_needed }, got)
    end
    for _, p in ipairs(doc.sections[1].points) do
      local row = assert(dom:match(('<tr data%%-key="latency/%d/%d">(.-)</tr>'):format(p.batch, p.model)))
      assert.equal(p.seconds and p.seconds.median, tonumber(values(row)[2]))
    end
  end)

  for _, scheme in ipairs { { "light", 1 }, { "dark", 0 } } do
    it("fits any width, reads well and filters without a script, " .. scheme[1], function()
      local found = probe(page, "--blink-settings=preferredColorScheme=" .. scheme[2])
      assert.equal(scheme[1] == "dark", found.dark)
      assert.same({}, found.wide)
      assert.same({}, found.outside)
      assert.same({}, found.overlaps)
      assert.same({}, found.pale)
      assert.equal(0, found.elements)
      local f = { doc.sections[3].outcomes[1].comparison.flips,
        doc.sections[3].outcomes[2].comparison.flips }
      local function sum(name) return f[1][name] + f[2][name] end
      assert.same({ all = f[1].n + f[2].n, quantized = sum "right_wrong", full = sum "wrong_right",
        differ = sum "other_wrong", wrong = sum "same_wrong", right = sum "both_right" }, found.shown)
      assert.is_true(found.tabs > 20)
    end)
  end

  it("runs nothing of what a model wrote", function()
    local attack = [["><script>document.title='ran'</script><img src=x onerror="document.title='ran'">]]
    local rows = documents.rows(3, { written = true, keeps = 0 })
    for _, row in ipairs(rows) do
      row.doc.question, row.models[1].text, row.models[2].text = attack, attack, "</pre>" .. attack
    end
    local outcome = documents.outcome("mmlu_" .. attack, rows, { written = true })
    local hostile = documents.document({ documents.sweep(), { kind = "mmlu", outcomes = { outcome } } },
      { labels = { "full", attack }, name = attack, options = { model = "m" } })
    local path = support.folder() .. "/report.html"
    support.write(path, (report.html({ hostile }, function() return rows end)))
    local dom = run(path, "--dump-dom --virtual-time-budget=2000")
    assert.is_nil(dom:find "<script" or dom:find "<img" or dom:find "<title>ran")
    assert.truthy(dom:find("&lt;script&gt;document.title='ran'&lt;/script&gt;", 1, true))
    assert.equal(0, probe(path).elements)
  end)

  it("is drawn on the screen", function()
    local pictures = {}
    for i, flags in ipairs { "--window-size=1180,3000", "--window-size=390,3000" } do
      local path = support.folder() .. "/page.png"
      run(page, flags .. " --screenshot='" .. path .. "'")
      pictures[i] = support.read(path)
      local width, height = string.unpack(">I4I4", pictures[i], 17)
      assert.same({ i == 1 and 1180 or 390, 3000 }, { width, height })
      assert.is_true(#pictures[i] > 100000, #pictures[i]) -- an empty page of that size packs into 20 kB
    end
  end)
end)
