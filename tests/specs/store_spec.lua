--- The results store: what is put is there, in order and to the byte; what is wrong is said.

local lfs = require "lfs"
local store_module = require "qlua.store"
local support = require "tests.specs.support"
local sys = require "qlua.sys"

local failed, raises = support.failed, support.raises
local KEY <const>, OTHER <const> = sys.sha256 "a", sys.sha256 "b"

--- A new store in a folder of its own.
local function fresh()
  local path = support.folder() .. "/qlua.sqlite"
  return assert(store_module.open(path)), path
end

local function begin(store, name)
  return assert(store:begin_run { name = name or "mmlu.lua", started = 1000.5, command = [=[["mmlu.lua"]]=],
    script_sha256 = OTHER })
end

describe("a results store", function()
  teardown(support.cleanup)

  it("keeps rows to the byte, replaces by id, and gives them back in a run's order", function()
    local store <close>, path = fresh()
    local run = begin(store)
    assert.is_true(store:set(KEY, "mmlu", "{}"))
    local value = '{"text": "é\u{1F600}\\u0000 \\"", "n": 0.1}'
    assert.is_true(store:put(run, KEY, { { "1", "old" }, { "2", value } }))
    assert.is_true(store:put(run, KEY, { { "1", "new" }, { "10", "3" } }))
    local rows, count = store:rows(KEY)
    assert.same({ ["1"] = "new", ["2"] = value, ["10"] = "3" }, rows)
    assert.equal(3, count)
    assert.is_true(store:use(run, KEY, { "10", "1" }))
    assert.is_true(store:use(run, KEY, { "2", "10", "1" }))
    assert.same({ { "2", value }, { "10", "3" }, { "1", "new" } }, store:run_rows(run, KEY))
    assert.same({}, store:rows(OTHER))
    assert.same({}, store:run_rows(run, OTHER))
    begin(store)
    assert.equal(2, #store:runs())
    assert.equal(run, store:runs(KEY)[1].id)
    assert.equal(1, #store:runs(KEY))
    assert.is_true(store:put(run, KEY, {}))
    assert.equal(path, store:path())
    assert.equal("store " .. path, tostring(store))
    store:close()
    local again <close> = assert(store_module.open(path, { readonly = true }))
    assert.same(rows, (again:rows(KEY)))
    assert.same({ { "2", value }, { "10", "3" }, { "1", "new" } }, again:run_rows(run, KEY))
  end)

  it("lists runs and sets, newest first", function()
    local store <close> = fresh()
    local first, second = begin(store, "a.lua"), begin(store, "b.lua")
    assert.is_true(store:end_run(first, { finished = 2000.25, status = "interrupted" }))
    assert.is_true(store:end_run(first, { finished = 2001.25, status = "finished", document = "{}" }))
    assert.same({
      { id = second, name = "b.lua", started = 1000.5, status = "running", pid = sys.pid(), alive = true },
      { id = first, name = "a.lua", started = 1000.5, finished = 2001.25, status = "finished",
        pid = sys.pid(), alive = true },
    }, store:runs())
    assert.same({}, store:runs(KEY))
    assert.same({ id = first, name = "a.lua", started = 1000.5, finished = 2001.25, status = "finished",
      pid = sys.pid(), alive = true, command = [=[["mmlu.lua"]]=], script_sha256 = OTHER, document = "{}" },
      store:run(first))
    failed(store:run(7), select(2, store:run(7)), "has no run 7", "it has 2, 1")
    assert.equal("not_found", select(2, store:run(7)).code)
    local ended, why = store:end_run(7, { finished = 1, status = "failed" })
    failed(ended, why, "has no run 7")
    assert.is_true(store:set(KEY, "mmlu", '{"seed": 1}'))
    assert.is_true(store:set(OTHER, "mmlu", '{"seed": 2}'))
    assert.is_true(store:set(KEY, "mmlu", '{"seed": 3}'))
    local sets = store:sets "mmlu"
    assert.same({ OTHER, KEY }, { sets[1].key, sets[2].key })
    assert.equal('{"seed": 1}', sets[2].inputs)
    assert.is_true(math.abs(sets[2].created - os.time()) < 60)
    assert.same({}, store:sets "other")
  end)

  it("says that a run whose process is gone was killed", function()
    local store <close>, path = fresh()
    local output = support.run(([[
      local store = assert(require("qlua.store").open %q)
      local run = assert(store:begin_run { name = "x", started = 1, command = "[]" })
      io.stdout:write(run, "\n"):flush()
      os.execute("kill -9 " .. require("qlua.sys").pid())
    ]]):format(path))
    local run = store:run(math.tointeger(output:match "^%d+"))
    assert.equal("killed", run.status)
    assert.is_false(run.alive)
    assert.is_nil(run.finished)
    assert.is_nil(run.script_sha256)
  end)

  it("is usable in SQL", function()
    if not os.execute "command -v sqlite3 >/dev/null" then return pending "no sqlite3 program" end
    local store <close>, path = fresh()
    local run = begin(store)
    assert(store:set(KEY, "mmlu", "{}"))
    assert(store:put(run, KEY, { { "q1", '{"x": 3}' } }))
    assert(store:use(run, KEY, { "q1" }))
    store:close()
    local pipe <close> = assert(io.popen(
      ("sqlite3 %s \"SELECT run, name, seq, id, value ->> '$.x' FROM samples\""):format(path)))
    assert.equal("1|mmlu|1|q1|3\n", pipe:read "a")
  end)

  it("raises for misuse and changes nothing then", function()
    local store <close> = fresh()
    local run = begin(store)
    assert(store:set(KEY, "mmlu", "{}"))
    raises(function() store:put(run, "ABC", {}) end, "'ABC' is no key")
    raises(function() store:set(KEY:upper(), "mmlu", "{}") end, "is no key")
    raises(function() store:rows "a" end, "is no key")
    raises(function() store:run_rows(run, "a") end, "is no key")
    raises(function() store:use(run, "a", {}) end, "is no key")
    raises(function() store:runs "a" end, "is no key")
    raises(function() store:put(run, OTHER, { { "1", "1" } }) end, "add them first")
    raises(function() store:put(run, KEY, { { "1", "1" }, { "2" } }) end, "value is a nil, not a string")
    raises(function() store:put(run, KEY, { { "1", "1" }, "2" }) end, "row 2 is a string")
    raises(function() store:put(run, KEY, { { 1, "1" } }) end, "a row's id is a number")
    raises(function() store:put(run, KEY, { { "1", "a\0b" } }) end, "NUL")
    raises(function() store:put(run, KEY) end, "table expected")
    raises(function() store:put("x", KEY, {}) end, "number expected")
    raises(function() store:use(run, KEY, { "1" }) end, "no row '1'")
    raises(function() store:use(run, KEY, { {} }) end, "a row's id is a table")
    raises(function() store:begin_run {} end, "name is a nil")
    raises(function() store:begin_run { name = "x", started = 0 / 0, command = "" } end, "finite")
    raises(function() store:begin_run { name = "x", when = 1 } end, "unknown option 'when'")
    raises(function() store:end_run(run, { finished = 1, status = "done" }) end, "not as 'done'")
    raises(function() store:sha256() end, "path is a no value")
    raises(function() store_module.open(1) end, "not a string")
    raises(function() store_module.open "" end, "empty")
    raises(function() store_module.open("x", { wait = -1 }) end, "negative")
    raises(function() store_module.open("x", { read = true }) end, "unknown option 'read'")
    assert.same({}, store:rows(KEY))
    assert.equal(1, #store:runs())
  end)

  it("closes once and for all", function()
    local store, path = fresh()
    store:close()
    store:close()
    assert.equal("store (closed)", tostring(store))
    for name in pairs(getmetatable(store).__index) do
      if name ~= "close" then raises(function() store[name](store, KEY, KEY, {}) end, "closed") end
    end
    assert.is_nil(lfs.attributes(path .. "-wal"))
    assert.is_nil(lfs.attributes(path .. "-shm"))
  end)
end)
