--- The value that stands for "the outside world failed": returned as the second result after nil.
--- Failures that come out of C look the same.
---
--- Codes are the ones of core/err.h in lower case: "argument", "not_found", "io", "format", "unsupported",
--- "memory", "device", "interrupted".

local _ENV <const> = require "qlua.strict"

---@class qlua.failure
---@field code string    one of the codes above
---@field message string what is wrong and where: file, line or field, value
---@field hint string?   what to do about it

local meta = { __name = "qlua.error" }

function meta.__tostring(failure)
  if not failure.hint then return failure.message end
  return ("%s (%s)"):format(failure.message, failure.hint)
end

---@param code string
---@param message string
---@param hint? string
---@return qlua.failure
return function(code, message, hint)
  return setmetatable({ code = code, message = message, hint = hint }, meta)
end
