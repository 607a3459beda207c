--- Strict globals for library modules. A file that begins with
---
---     local _ENV <const> = require "qlua.strict"
---
--- reads Lua's globals as always, but a name that is not defined is an error, and so is writing any global: a
--- misspelt local is found at once, and a library never changes the program that uses it.

local rawget, error, tostring, setmetatable, globals = rawget, error, tostring, setmetatable, _G

return setmetatable({}, {
  __index = function(_, name)
    local value = rawget(globals, name)
    if value == nil then error("undefined global '" .. tostring(name) .. "'", 2) end
    return value
  end,
  __newindex = function(_, name)
    error("a library may not write the global '" .. tostring(name) .. "'; declare it local", 2)
  end,
  __metatable = "qlua.strict",
})
