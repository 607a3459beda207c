--- Finished runs by what a person calls them: a number in the store, `latest`, either of them after a folder
--- ("results:3"), or the file of an exported document.

local _ENV <const> = require "qlua.strict"

local checked = require "qlua.document_check"
local failure = require "qlua.failure"
local json = require "qlua.json"
local lfs = require "lfs"
local report = require "qlua.report"
local store_module = require "qlua.store"
local tables = require "qlua.table"

local runs = {}

local STORE <const> = "qlua.sqlite"

--- A run that was found. `store` is nil for an exported document: then there are no samples.
---@class qlua.found_run
---@field name string           as it was asked for, for messages: "qlua-results:3"
---@field document qlua.run_document
---@field store qlua.store?     to be closed by qlua.found_run:close
local found = {}
found.__index = found

function found:close() if self.store then self.store:close() end end

found.__close = found.close

--- The rows that a section's result consists of, decoded and in order; nil where there are none at hand.
---@param set string?
---@return table[]?, qlua.failure?
function found:rows(set)
  if not (self.store and set) then return nil end
  local list, err = self.store:run_rows(self.document.run, set)
  if not list then return nil, err end
  local rows = {}
  for i, row in ipairs(list) do
    rows[i], err = json.decode(row[2], { name = ("%s, row %s"):format(self.name, row[1]) })
    if rows[i] == nil then return nil, err end
  end
  return rows
end

--- The store in a folder, or that is the file itself.
---@param folder string
---@return qlua.store?, qlua.failure?
function runs.open(folder)
  local path = lfs.attributes(folder, "mode") == "file" and folder or folder:gsub("/+$", "") .. "/" .. STORE
  if lfs.attributes(path, "mode") == nil then
    return nil, failure("not_found", ("%s: no such store of runs"):format(path),
      "give the folder of the results as --output_path")
  end
  return store_module.open(path, { readonly = true })
end

--- The documents that belong on one page: the newest run's, and the newest of every other script that
--- measured the same models; oldest first. Empty where no run has results.
---@param store qlua.store
---@return qlua.run_document[]?, qlua.failure?
function runs.newest(store)
  local list, err = store:runs()
  if not list then return nil, err end
  local docs, seen = {}, {}
  for _, entry in ipairs(list) do
    local run
    if not seen[entry.name] then
      run, err = store:run(entry.id)
      if not run then return nil, err end
    end
    local doc = run and run.document and checked(json.decode(run.document), entry.name)
    if doc then
      docs[#docs + 1] = doc
      if report.same_pair(docs) then seen[entry.name] = true else docs[#docs] = nil end
    end
  end
  table.sort(docs, function(a, b)
    if a.started ~= b.started then return a.started < b.started end
    return a.run < b.run
  end)
  return docs
end

--- When a run began, for people; UTC.
local function when(time) return os.date("!%Y-%m-%d %H:%M", math.floor(time)) end

--- The runs of a store, newest first, as a table.
---@param store qlua.store
---@return qlua.table?, qlua.failure?
function runs.table(store)
  local list, err = store:runs()
  if not list then return nil, err end
  local t = tables.new { { "run", align = "right" }, "script", { "began (UTC)" }, { "took", align = "right",
    unit = "s" }, "status", "arguments" }
  for _, entry in ipairs(list) do
    local run
    run, err = store:run(entry.id)
    if not run then return nil, err end
    local command = run.command and json.decode(run.command)
    t:add(entry.id, entry.name, when(entry.started), entry.finished
      and ("%.0f"):format(entry.finished - entry.started) or nil, entry.status,
      type(command) == "table" and table.concat(command, " ") or "")
  end
  return t
end

local function from_file(path)
  local file, why = io.open(path, "rb")
  if not file then return nil, failure("not_found", ("%s: cannot open (%s)"):format(path, why)) end
  local text <const> = file:read "a"
  file:close()
  local doc, err = json.decode(text or "", { name = path })
  if doc == nil then return nil, err end
  doc, err = checked(doc, path)
  if not doc then return nil, err end
  return setmetatable({ name = path, document = doc }, found)
end

--- The number of the newest run that has a document, or that the text spells.
local function number_of(store, which)
  local list, err = store:runs()
  if not list then return nil, err end
  if which ~= "latest" then
    local number = math.tointeger(tonumber(which))
    if number then return number end
    return nil, failure("not_found", ("%s: no run %s"):format(store:path(), which))
  end
  for _, entry in ipairs(list) do
    if entry.finished then return entry.id end
  end
  return nil, failure("not_found", store:path() .. ": no run has finished yet")
end

local function from_store(store, which, name)
  local number, err = number_of(store, which)
  if not number then return nil, err end
  local run
  run, err = store:run(number)
  if not run then return nil, err end
  if not run.document then
    return nil, failure("not_found", ("%s: run %d (%s) is %s and has no results"):format(store:path(), number,
      run.name, run.status), "start its script again: it goes on where it was")
  end
  local doc
  doc, err = json.decode(run.document, { name = name })
  if doc == nil then return nil, err end
  return checked(doc, name)
end

--- A run by what a person calls it. A name that is none of the forms, or no run's, says which runs there are.
---@param text string    "3", "latest", "results:3", "results:latest", "results/comparison_....json"
---@param folder string  whose store plain numbers are in
---@return qlua.found_run?, qlua.failure?
function runs.find(text, folder)
  local where, which = text:match "^(.+):(%d+)$"
  if not where then where, which = text:match "^(.+):(latest)$" end
  which = which or (text:match "^%d+$" or text:match "^latest$")
  if not which then
    if lfs.attributes(text, "mode") == "file" then return from_file(text) end
    return nil, failure("argument", ("%s: neither a run nor a file"):format(text),
      "a run is a number, latest, FOLDER:NUMBER, or an exported document")
  end
  local store, err = runs.open(where or folder)
  if not store then return nil, err end
  local name = ("%s:%s"):format(where or folder, which)
  local doc
  doc, err = from_store(store, which, name)
  if not doc then
    store:close()
    return nil, err
  end
  doc.run = doc.run or math.tointeger(tonumber(which))
  name = ("%s:%d"):format(where or folder, doc.run)
  return setmetatable({ name = name, document = doc, store = store }, found)
end

return runs
