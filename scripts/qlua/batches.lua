--- What all evaluations do alike with a batch of questions and several models.

local _ENV <const> = require "qlua.strict"

local batches = {}

--- One of n equal parts of a time, in whole nanoseconds: more digits would only make rows longer.
function batches.share(seconds, n) return math.floor(1e9 * seconds / n + 0.5) / 1e9 end

--- Numbers of `count` models in the order of the batch that begins with element `first`, where batches have
--- `size`: A B, then B A.
---@param count integer
---@param first integer
---@param size integer
---@return integer[]
function batches.order(count, first, size)
  local list, odd = {}, (first - 1) // size % 2 == 1
  for k = 1, count do list[k] = odd and count + 1 - k or k end
  return list
end

--- A list of things that close together.
function batches.together()
  return setmetatable({}, { __close = function(list)
    for _, one in pairs(list) do one:close() end
  end })
end

--- A list in pieces of at most `size`.
---@param list any[]
---@param size integer
---@return any[][]
function batches.cut(list, size)
  local pieces = {}
  for first = 1, #list, size do
    pieces[#pieces + 1] = table.move(list, first, math.min(first + size - 1, #list), 1, {})
  end
  return pieces
end

--- qlua.experiment's run:map without a store: fn's values for a list of elements, batch by batch.
---@param list any[]
---@param options { batch: integer }
---@param fn fun(elements: any[], first: integer): any[]?, qlua.failure?
---@return any[]?, qlua.failure?
function batches.map(list, options, fn)
  local values = {}
  for _, piece in ipairs(batches.cut(list, options.batch)) do
    local made, err = fn(piece, #values + 1)
    if not made then return nil, err end
    table.move(made, 1, #made, #values + 1, values)
  end
  return values
end

return batches
