--- Progress of a long run on stderr: one line redrawn on a terminal, a plain line every 30 s elsewhere.
---
---   local bar <close> = progress.new { total = #items, label = "full" }
---   for _, item in ipairs(items) do ...; bar:step() end

local _ENV <const> = require "qlua.strict"

local progress = {}

local REDRAW_SECONDS <const> = 0.1
local LINE_SECONDS <const> = 30

---@class qlua.progress
---@field label string
---@field total integer
---@field done integer
local bar = {}
bar.__index = bar

--- Seconds as a person says them: "4 s", "2 min 05 s", "3 h 07 min".
---@param seconds number
---@return string
function progress.duration(seconds)
  seconds = math.floor(seconds + 0.5)
  if seconds < 60 then return ("%d s"):format(seconds) end
  if seconds < 3600 then return ("%d min %02d s"):format(seconds // 60, seconds % 60) end
  return ("%d h %02d min"):format(seconds // 3600, seconds % 3600 // 60)
end

---@class qlua.progress_options
---@field total integer
---@field done? integer  steps that were finished before
---@field label? string
---@field sys? { time: (fun(): number), isatty: (fun(fd: integer): boolean) } default: qlua.sys
---@field out? { write: function } default: io.stderr
---@field quiet? boolean

---@param options qlua.progress_options
---@return qlua.progress
function progress.new(options)
  local sys = options.sys or require "qlua.sys"
  local now = sys.time()
  return setmetatable({
    label = options.label or "", total = options.total, done = options.done or 0, started = now,
    shown_at = now,
    time = sys.time, terminal = sys.isatty(2), out = options.out or io.stderr, quiet = options.quiet or false,
    drawn = 0, first_done = nil, first_at = nil,
  }, bar)
end

--- Seconds still to go, from the pace since the first step ended: the first one also pays for warming up.
--- nil until there is a pace.
---@return number?
function bar:remaining()
  if not self.first_at or self.done <= self.first_done then return nil end
  local pace = (self.shown_at - self.first_at) / (self.done - self.first_done)
  return pace * (self.total - self.done)
end

local function line_of(self)
  local share = self.total > 0 and self.done / self.total or 1
  local line = ("%s%d/%d (%d %%), %s"):format(self.label == "" and "" or self.label .. ": ", self.done,
    self.total, math.floor(100 * share), progress.duration(self.shown_at - self.started))
  local remaining = self:remaining()
  if remaining and self.done < self.total then
    line = line .. ", " .. progress.duration(remaining) .. " to go"
  end
  return self.note and line .. ", " .. self.note or line
end

local function show(self)
  local line = line_of(self)
  if self.terminal then
    local columns = utf8.len(line) or #line
    self.out:write("\r", line, (" "):rep(math.max(0, self.drawn - columns)))
    self.drawn = columns
  else
    self.out:write(line, "\n")
  end
  if self.out.flush then self.out:flush() end
end

--- Counts `n` finished steps (default 1) and shows the state when it is time to. `note` stands at the line's
--- end.
---@param n? integer
---@param note? string
function bar:step(n, note)
  self.done = self.done + (n or 1)
  self.note = note or self.note
  local now = self.time()
  if not self.first_at then self.first_at, self.first_done = now, self.done end
  if self.quiet or self.closed then return end
  if now - self.shown_at >= (self.terminal and REDRAW_SECONDS or LINE_SECONDS) then
    self.shown_at = now
    show(self)
  end
end

--- Prints a whole line above the redrawn one.
---@param message string
function bar:say(message)
  if self.quiet then return end
  if self.terminal and self.drawn > 0 then
    self.out:write("\r", (" "):rep(self.drawn), "\r")
    self.drawn = 0
  end
  self.out:write(message, "\n")
end

--- Shows the last state and ends the line; safe to call again.
function bar:close()
  if self.closed then return end
  self.closed = true
  self.shown_at = self.time()
  if self.quiet then return end
  show(self)
  if self.terminal then self.out:write "\n" end
end

bar.__close = bar.close

return progress
