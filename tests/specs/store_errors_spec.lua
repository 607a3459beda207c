--- What a store says, and keeps, when the disk is full or read-only. That takes mounting, or is said to be
--- skipped; a limit on the size of files stands in for a full disk everywhere.

local store_module = require "qlua.store"
local support = require "tests.specs.support"
local sys = require "qlua.sys"

local KEY <const> = sys.sha256 "a"

--- A process that puts rows until it fails, then says what it was told and how many rows were acknowledged.
local FILL <const> = [[
  local store = assert(require("qlua.store").open(%q))
  local run = assert(store:begin_run { name = "x", started = 1, command = "[]" })
  assert(store:set(%q, "x", "{}"))
  local done, ok, err = 0, true, nil
  while ok and done < 100000 do
    ok, err = store:put(run, %q, { { tostring(done), ("x"):rep(1000) } })
    if ok then done = done + 1 end
  end
  store:close()
  print(done, err and err.code, err)
]]

local OPEN <const> = [[
  local store, err = require("qlua.store").open(%q, { readonly = %s })
  print(store and #store:runs(), err and err.code, err)
]]

--- Runs Lua code in a qlua that a shell starts after `before` and followed by `after`.
local function run_in(shell, before, code, after)
  local folder = support.folder()
  local script = support.write(folder .. "/script.lua", code)
  local commands = support.write(folder .. "/commands", table.concat({ "export ASAN_OPTIONS=detect_leaks=0",
    before, ("'%s' '%s'"):format(support.QLUA, script), after }, "\n"))
  local pipe <close> = assert(io.popen(("%s '%s' 2>&1"):format(shell, commands)))
  return pipe:read "a"
end

--- A shell that sees mounts of its own.
local MOUNTS <const> = "unshare -rm sh -e"
local can_mount = os.execute "unshare -rm mount -t tmpfs x /mnt 2>/dev/null"

--- Has the shell see what is in `folder` read-only in `at`.
local function fix(folder, at)
  return ("mount -t tmpfs x %s; cp %s/* %s; mount -o remount,bind,ro %s"):format(at, folder, at, at)
end

local function new_store()
  local folder = support.folder()
  local path = folder .. "/qlua.sqlite"
  local store <close> = assert(store_module.open(path))
  assert(store:begin_run { name = "x", started = 1, command = "[]" })
  return path, folder
end

--- What was acknowledged is there once there is room again.
local function check_full(output, path, reason)
  local done, code, message = output:match "^(%d+)\t(%S+)\t(.*)\n$"
  assert.equal("io", code, output)
  assert.is_truthy(message:find(reason, 1, true), output)
  assert.is_true(tonumber(done) > 10, output)
  local store <close> = assert(store_module.open(path))
  assert.equal(tonumber(done), select(2, store:rows(KEY)))
  local run = assert(store:begin_run { name = "y", started = 2, command = "[]" })
  assert(store:put(run, KEY, { { "more", "1" } }))
end

describe("a store", function()
  teardown(support.cleanup)

  it("outlives the limit on the size of a file", function()
    local path = new_store()
    local output = run_in("sh", "trap '' XFSZ; ulimit -f 400", FILL:format(path, KEY, KEY))
    check_full(output, path, "qlua.sqlite: cannot read or write: File too large")
  end)

  it("outlives a full disk", function()
    if not can_mount then return pending "mounting is not allowed here" end
    local small, kept = support.folder(), support.folder()
    local output = run_in(MOUNTS, "mount -t tmpfs -o size=600k x " .. small,
      FILL:format(small .. "/qlua.sqlite", KEY, KEY), ("cp %s/* %s"):format(small, kept))
    check_full(output, kept .. "/qlua.sqlite", "qlua.sqlite: the disk is full (free disk space")
  end)

  it("says that there is no room for a new one", function()
    if not can_mount then return pending "mounting is not allowed here" end
    local small = support.folder()
    local output = run_in(MOUNTS, "mount -t tmpfs -o size=8k x " .. small,
      OPEN:format(small .. "/qlua.sqlite", "false"))
    assert.matches("^nil\tio\t.*qlua.sqlite: the disk is full", output)
  end)

  it("in a read-only folder can be read, not written nor made", function()
    if not can_mount then return pending "mounting is not allowed here" end
    local path, folder = new_store()
    local at = support.folder()
    assert.matches("^nil\tio\t.*qlua.sqlite: the file or its folder is read%-only %(change",
      run_in(MOUNTS, fix(folder, at), OPEN:format(at .. "/qlua.sqlite", "false")))
    assert.matches("^nil\tio\t.*new.sqlite: the file or its folder is read%-only %(change",
      run_in(MOUNTS, fix(folder, at), OPEN:format(at .. "/new.sqlite", "false")))
    assert.equal("1\tnil\tnil\n", run_in(MOUNTS, fix(folder, at), OPEN:format(at .. "/qlua.sqlite", "true")))
    -- with a log beside it that cannot be read without writing
    support.run(([[
      local store = assert(require("qlua.store").open(%q))
      assert(store:begin_run { name = "y", started = 1, command = "[]" })
      os.execute("rm " .. store:path() .. "-shm; kill -9 " .. require("qlua.sys").pid())
    ]]):format(path))
    assert.matches("^nil\tio\t.*read%-only %(copy it and the %-wal file",
      run_in(MOUNTS, fix(folder, at), OPEN:format(at .. "/qlua.sqlite", "true")))
    local store <close> = assert(store_module.open(path))
    assert.equal(2, #store:runs())
  end)

  it("in a read-only file can be read, not written", function()
    if not can_mount then return pending "mounting is not allowed here" end
    local path, folder = new_store()
    local at = support.folder()
    local before = ("%s; mount --bind %s/qlua.sqlite %s"):format(fix(folder, at), at, path)
    assert.matches("^nil\tio\t.*read%-only %(change", run_in(MOUNTS, before, OPEN:format(path, "false")))
    assert.equal("1\tnil\tnil\n", run_in(MOUNTS, before, OPEN:format(path, "true")))
  end)
end)
