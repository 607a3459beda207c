#!/usr/bin/env qlua
--- Rows a second that the results store takes and gives back, by the number of rows put at once.
---
---   qlua scripts/bench_store.lua [--output_path DIR] [--rows 4000] [--bytes 1500] [--batch_sizes 1,16]
---
--- Each put is one transaction that waits until the disk of DIR has it: with small groups the disk decides;
--- the last line says how often in a second it takes one block. Every turn begins with no store.

local cli = require "qlua.cli"
local store_module = require "qlua.store"
local stats = require "qlua.stats"
local sys = require "qlua.sys"
local tables = require "qlua.table"

local NAME <const> = "bench_store"

local opts = cli.parse {
  name = NAME,
  summary = "Rows a second that the results store takes, by rows put at once.",
  options = {
    { "output_path", default = ".", metavar = "DIR", help = "folder on the disk to measure" },
    { "rows", kind = "integer", default = 4000, min = 1, max = 10000000, help = "rows of each round" },
    { "bytes", kind = "integer", default = 1500, min = 1, max = 1 << 20, help = "bytes of a row" },
    { "batch_sizes", short = "b", kind = "integers", default = { 1, 16, 128 }, min = 1, max = 100000,
      help = "rows put at once" },
    { "rounds", kind = "integer", default = 3, min = 1, max = 1000, help = "turns of each batch size" },
  },
}

local function must(value, err)
  if not value then cli.fail(NAME, err) end
  return value
end

local path <const> = ("%s/bench-store-%d.sqlite"):format(opts.output_path, sys.pid())
local key <const> = sys.sha256 "bench"
local text <const> = ("%q"):format(("x"):rep(math.max(0, opts.bytes - 2)))

local function remove()
  for _, ending in ipairs { "", "-wal", "-shm" } do os.remove(path .. ending) end
end

--- Seconds to put all rows in groups of `batch`, and to read them.
local function turn(batch)
  remove()
  local store <close> = must(store_module.open(path))
  local run = must(store:begin_run { name = NAME, started = os.time(), command = "[]" })
  must(store:set(key, NAME, "{}"))
  local started = sys.time()
  for first = 1, opts.rows, batch do
    local rows = {}
    for i = first, math.min(first + batch - 1, opts.rows) do rows[#rows + 1] = { tostring(i), text } end
    must(store:put(run, key, rows))
  end
  local put = sys.time()
  local rows, count = store:rows(key)
  must(rows, count)
  assert(count == opts.rows)
  return put - started, sys.time() - put
end

--- How often in a second a block that is written reaches the disk.
local function raw_syncs()
  local file <close> = assert(io.open(path, "wb"))
  local started, n = sys.time(), 0
  while sys.time() - started < 0.5 do
    file:write(("x"):rep(4096))
    file:flush()
    must(sys.fsync(path))
    n = n + 1
  end
  return n / (sys.time() - started)
end

local function whole(heading)
  return { heading, format = "%.0f" }
end

local grid = tables.new { "rows at once", whole "rows/s", whole "transactions/s", whole "read rows/s" }
local syncs, taken, read = {}, {}, {}
for round = 1, opts.rounds do
  syncs[round] = raw_syncs()
  for i, batch in ipairs(opts.batch_sizes) do
    taken[i], read[i] = taken[i] or {}, read[i] or {}
    taken[i][round], read[i][round] = turn(batch)
  end
end
remove()

for i, batch in ipairs(opts.batch_sizes) do
  local put, got = stats.median(taken[i]), stats.median(read[i])
  grid:add(batch, opts.rows / put, math.ceil(opts.rows / batch) / put, opts.rows / got)
end
io.write(grid:text())
io.write(("raw syncs of this disk: %.0f a second; medians of %d rounds of %d rows of %d bytes\n"):format(
  stats.median(syncs), opts.rounds, opts.rows, opts.bytes))
