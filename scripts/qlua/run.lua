--- One run of a script in the results store: which rows it can take from there, which it has still to
--- compute, and what it found. Scripts meet it as run:map, run:record and run:finish of qlua.experiment.
---
--- A row is the finished value of one element, as JSON; a set is the rows whose values depend on the same
--- inputs (qlua.key). Elements are computed in batches, cut as if nothing were known, and only the batches
--- that are not wholly in the store: so a resumed run computes exactly what an uninterrupted one does.

local _ENV <const> = require "qlua.strict"

local files = require "qlua.files"
local json = require "qlua.json"
local key = require "qlua.key"
local lfs = require "lfs"
local store = require "qlua.store"
local sys = require "qlua.sys"

local STORE <const> = "qlua.sqlite"
--- Seconds of work that a kill may cost, beside the batch that runs: the most where a commit is so slow that
--- committing more often would take a larger share of the run's time.
local COMMIT_SECONDS <const>, COMMIT_SECONDS_MOST <const>, COMMIT_SHARE <const> = 0.2, 1, 1 / 500

---@class qlua.run
---@field name string         of the script
---@field folder string?      where the store is; nil: nothing is written
---@field store qlua.store?
---@field id integer?         once it has begun
---@field sections table[]    of the document
---@field reused integer      rows taken from the store
---@field ran integer         rows computed
local run = {}
run.__index = run

---@param options { name: string, folder: string?, fresh: boolean?, command: string[], script: string?, out:
---  table? }  script: its file; out: where announcements go (default: stderr)
---@return qlua.run
local function new(options)
  return setmetatable({ name = options.name, folder = options.folder, fresh = options.fresh,
    command = json.array(options.command), script = options.script, out = options.out or io.stderr,
    started = sys.now(), begun_at = sys.time(), sections = json.array(),
    reused = 0, ran = 0 }, run)
end

--- Opens the store; without `make` only if there is one.
---@param make? "make"
---@return boolean?, qlua.failure?
function run:open(make)
  if self.store or not self.folder then return true end
  local path = ("%s/%s"):format(self.folder, STORE)
  if not make and not lfs.attributes(path, "mode") then return true end
  local made, err = files.make_folder(self.folder)
  if made then made, err = store.open(path) end
  if not made then return nil, err end
  self.store = made
  return true
end

--- Enters the run into the store, if it has not been.
---@return boolean?, qlua.failure?
function run:begin()
  if self.id or not self.folder then return true end
  local ok, err = self:open "make"
  if not ok then return nil, err end
  if self.script then
    self.script_sha256, err = self.store:sha256(self.script)
    if not self.script_sha256 then return nil, err end
  end
  self.id, err = self.store:begin_run { name = self.name, started = self.started,
    command = json.encode(self.command), script_sha256 = self.script_sha256 }
  return self.id and true, err
end

--- Seconds since 1970, on the clock that runs evenly.
---@return number
function run:now() return self.started + sys.time() - self.begun_at end

--- Ends it. The document is kept with it.
---@param status "finished"|"interrupted"|"failed"
---@param document table?
---@return boolean?, qlua.failure?
function run:finish(status, document)
  if not self.id or self.ended then return true end
  self.ended = true
  return self.store:end_run(self.id, { status = status,
    finished = document and document.finished or self:now(), document = document and json.encode(document) })
end

function run:close()
  if self.store then self.store:close() end
  self.store = nil
end

function run:say(...) self.out:write(self.store:path(), ": ", table.concat { ... }, "\n") end

---@class qlua.run_set
---@field key string?          nil where nothing is written
---@field todo { first: integer, last: integer }[]  batches to compute
---@field known integer        elements that need none
local set = {}
set.__index = set

--- Ids of the rows: place in the list, what the element is and, where bits depend on it, what was computed
--- beside it.
local function row_ids(name, list, options)
  local ids, parts = {}, {}
  for i, element in ipairs(list) do
    local made, text = pcall(options.id or json.encode, element, options.id and i)
    if not made or type(text) ~= "string" then
      error(("%s: what tells element %d from others (its `id`, or it as JSON): %s"):format(name, i,
        made and "no text" or text), 0)
    end
    parts[i] = sys.sha256(text):sub(1, 16)
  end
  for first = 1, #list, options.batch do
    local last = math.min(first + options.batch - 1, #list)
    local beside = options.alone and "" or ":" .. sys.sha256(table.concat(parts, ",", first, last)):sub(1, 8)
    for i = first, last do ids[i] = ("%d:%s%s"):format(i, parts[i], beside) end
  end
  return ids
end

--- Other runs that have rows of a set, newest first.
local function others(self, set_key)
  local list = {}
  for _, r in ipairs(assert(self.store:runs(set_key))) do
    if r.id ~= self.id then list[#list + 1] = r end
  end
  return list
end

--- What differs between inputs and those of the set of the same name that are nearest to them.
local function nearest_differences(self, s, inputs)
  local now, nearest = json.decode(json.encode(inputs)), nil
  for _, entry in ipairs(assert(self.store:sets(s.name))) do
    local list = entry.key ~= s.key and key.differences(now, json.decode(entry.inputs))
    if list and not (nearest and #nearest <= #list) then nearest = list end
  end
  return nearest and table.concat(nearest, ", ")
end

--- Why rows that could be there are not.
local function reason(self, s, inputs, options)
  if self.fresh then return "of --fresh" end
  if options.again then return options.again end
  local newest = others(self, s.key)[1]
  if not newest then return nearest_differences(self, s, inputs) end
  if newest.status == "running" then
    return ("run %d (process %d) is not at its end"):format(newest.id, newest.pid)
  elseif newest.status ~= "finished" then
    return ("run %d %s"):format(newest.id, newest.status == "failed" and "failed" or "was " .. newest.status)
  end
  return ("run %d had other elements, or others beside them in a batch"):format(newest.id)
end

local function announce(self, s, inputs, options)
  if #s.list == 0 then return end
  local missing = #s.list - s.known
  local why = missing > 0 and reason(self, s, inputs, options)
  if missing == 0 then
    self:say(s.name, (": all %d rows reused (--fresh computes them again)"):format(s.known))
  elseif why then
    self:say(s.name, (": %d rows reused, %d to run, because %s"):format(s.known, missing, why))
  end
end

local function warn_of_others(self, s)
  if s.warned then return end
  for _, r in ipairs(others(self, s.key)) do
    if r.status == "running" then
      s.warned = true
      self:say(s.name, (": process %d is computing the same rows (run %d); both go on"):format(r.pid, r.id))
    end
  end
end

--- What is to be done for a list: nothing is computed yet.
---@param name string
---@param list any[]
---@param options { batch: integer, id: (fun(element: any, index: integer): string)?, alone: boolean?, again:
---  string? }  alone: values do not depend on what is in the batch beside; again: why nothing can be reused
---@param inputs table?  what values depend on; nil where nothing is written
---@return qlua.run_set?, qlua.failure?
function run:set(name, list, options, inputs)
  local s = setmetatable({ run = self, name = name, list = list, texts = {}, todo = {}, known = 0,
    pending = {}, committed_at = sys.time(), interval = COMMIT_SECONDS }, set)
  local rows = {}
  if self.folder then
    local ok, err = self:begin()
    if not ok then return nil, err end
    local text
    s.ids = row_ids(name, list, options)
    s.key, text = key.of(inputs)
    rows, err = self.store:rows(s.key)
    if not rows then return nil, err end
    ok, err = self.store:set(s.key, name, text)
    if not ok then return nil, err end
  end
  for first = 1, #list, options.batch do
    local last, whole = math.min(first + options.batch - 1, #list), not (self.fresh or options.again)
    for i = first, last do whole = whole and s.ids and rows[s.ids[i]] end
    if whole then
      for i = first, last do s.texts[i] = rows[s.ids[i]] end
      s.known = s.known + last - first + 1
    else
      s.todo[#s.todo + 1] = { first = first, last = last }
    end
  end
  self.reused = self.reused + s.known
  if self.folder then
    announce(self, s, inputs, options)
    warn_of_others(self, s)
    if s.known > 0 then
      local ok, err = s:use()
      if not ok then return nil, err end
    end
  end
  return s
end

--- Records which rows the run's result consists of so far.
function set:use()
  local ids = {}
  for i = 1, #self.list do
    if self.texts[i] then ids[#ids + 1] = self.ids[i] end
  end
  return self.run.store:use(self.run.id, self.key, ids)
end

--- Puts what is finished into the store.
---@return boolean?, qlua.failure?
function set:commit()
  if not self.key or #self.pending == 0 then return true end
  local rows, begin = self.pending, sys.time()
  self.pending = {}
  local ok, err = self.run.store:put(self.run.id, self.key, rows)
  if ok and not self.used then
    -- from now on others see that this run is at it
    self.used = true
    warn_of_others(self.run, self)
    ok, err = self:use()
  end
  self.committed_at = sys.time()
  self.interval = math.max(COMMIT_SECONDS, math.min(COMMIT_SECONDS_MOST, (self.committed_at - begin)
    / COMMIT_SHARE))
  return ok, err
end

--- Takes the values of a batch; they are in the store soon.
---@param batch { first: integer, last: integer }
---@param values any[]
---@return boolean?, qlua.failure?
function set:add(batch, values)
  local n = batch.last - batch.first + 1
  if type(values) ~= "table" or #values ~= n then
    error(("%s: of %d elements came %s values, not one for each"):format(self.name, n,
      type(values) == "table" and #values or "no"), 0)
  end
  for i = batch.first, batch.last do
    local made, text = pcall(json.encode, values[i - batch.first + 1])
    if not made then error(("%s: the value of element %d: %s"):format(self.name, i, text), 0) end
    self.texts[i] = text
    if self.key then self.pending[#self.pending + 1] = { self.ids[i], text } end
  end
  self.run.ran = self.run.ran + n
  if sys.time() - self.committed_at < self.interval then return true end
  return self:commit()
end

--- The values in the list's order, as JSON gives them back; up to the first that is missing.
---@return any[]?, qlua.failure?
function set:values()
  local ok, err = self:commit()
  if ok and self.key then ok, err = self:use() end
  if not ok then return nil, err end
  local values = {}
  for i = 1, #self.list do
    if not self.texts[i] then break end
    values[i] = json.decode(self.texts[i])
  end
  return values
end

--- Keeps what an error in the middle of a list has left.
function set:__close(err)
  if err ~= nil then pcall(self.commit, self) end
end

return { new = new }
