--- Files that appear whole or not at all: written under a temporary name, synced and renamed.

local _ENV <const> = require "qlua.strict"

local failure = require "qlua.failure"
local lfs = require "lfs"
local sys = require "qlua.sys"

local files = {}

--- Makes a folder and those above it.
---@param path string
---@return boolean?, qlua.failure?
function files.make_folder(path)
  local at = path:sub(1, 1) == "/" and "/" or ""
  for part in path:gmatch "[^/]+" do
    at = at .. part
    if lfs.attributes(at, "mode") == nil then
      local ok, why = lfs.mkdir(at)
      -- another process may have made it in between
      if not ok and lfs.attributes(at, "mode") ~= "directory" then
        return nil, failure("io", ("%s: cannot make the folder (%s)"):format(at, why))
      end
    elseif lfs.attributes(at, "mode") ~= "directory" then
      return nil, failure("io", ("%s: not a folder"):format(at), "choose another --output_path")
    end
    at = at .. "/"
  end
  return true
end

--- Whether files can be written into a folder: said before the work, not after it. A folder that is not there
--- is made and taken away again.
---@param folder string
---@return boolean?, qlua.failure?
function files.writable(folder)
  local existed = lfs.attributes(folder, "mode") ~= nil
  local made, err = files.make_folder(folder)
  if not made then return nil, err end
  local probe = ("%s/.qlua.%d"):format(folder, sys.pid())
  local file, why = io.open(probe, "wb")
  if not file then return nil, failure("io", ("%s: cannot write here (%s)"):format(folder, why)) end
  file:close()
  os.remove(probe)
  if not existed then lfs.rmdir(folder) end -- made again when there is something to write
  return true
end

--- The message of the C library without the name it may begin with.
local function reason(why, path) return (why:gsub("^" .. path:gsub("%p", "%%%0") .. ": ", "")) end

--- The bytes of `temporary`, on the disk; nil and why not.
local function fill(temporary, text)
  local file, why = io.open(temporary, "wb")
  if not file then return nil, reason(why, temporary) end
  local written, write_why = file:write(text)
  local closed, close_why = file:close()
  if not (written and closed) then return nil, reason(write_why or close_why, temporary) end
  local synced, err = sys.fsync(temporary)
  if not synced then return nil, reason(err.message, temporary) end
  return true
end

--- Writes `text` as `path`, whole or not at all: what was there before stays when this fails.
---@param path string
---@param text string
---@return boolean?, qlua.failure?
function files.write(path, text)
  local folder, name = path:match "^(.*)/([^/]*)$"
  folder, name = folder or ".", name or path
  local made, err = files.make_folder(folder)
  if not made then return nil, err end
  local temporary = ("%s/.%s.%d"):format(folder, name, sys.pid())
  local filled, why = fill(temporary, text)
  if filled then
    filled, err = sys.rename(temporary, path)
    why = err and reason(err.message, path)
  end
  if not filled then
    os.remove(temporary)
    return nil, failure("io", ("%s: cannot write (%s)"):format(path, why),
      ("it needs %d bytes; what was there before is untouched"):format(#text))
  end
  return sys.fsync(folder)
end

return files
