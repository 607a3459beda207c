--- Metrics on the logits of two models at one position, and the contract they share with a user's own.
---
--- A metric has
---   name              what the table calls it
---   add(self, reference, test, item)   one position: logits [vocab] of the full model and of the
---                     quantized one, and the item they belong to (question, choices, answer, and
---                     `target`, the token id of the right answer, where the task has one)
---   value(self)       a number, or a table of numbers by name
--- and may have
---   higher_is_better  boolean
---   values            list that add appends one number an item to: the table then shows mean, interval and
---                     median, and a run that goes on where another ended need not measure an item again
---   share             true: every value is 1 (yes) or 0 (no), and the interval of their mean is Wilson's
---
--- A user's metric is a Lua file that returns one, or a function that makes one, or a list of these.

local _ENV <const> = require "qlua.strict"

local core = require "qlua.core"
local failure = require "qlua.failure"
local json = require "qlua.json"
local stats = require "qlua.stats"

local metrics = {}

---@class qlua.metric
---@field name string
---@field higher_is_better boolean?
---@field values number[]?
---@field share boolean?
---@field add fun(self, reference: qlua.tensor, test: qlua.tensor, item: table)
---@field value fun(self): number|table<string, number>

--- A metric with one number an item, `measure(reference, test, item)`; nil leaves the item out.
---@param name string
---@param higher_is_better boolean?
---@param measure fun(reference: qlua.tensor, test: qlua.tensor, item: table): number?
---@param share? boolean  its numbers are 1 and 0
---@return qlua.metric
function metrics.per_item(name, higher_is_better, measure, share)
  local metric = { name = name, higher_is_better = higher_is_better, share = share, values = {} }
  function metric:add(reference, test, item)
    self.values[#self.values + 1] = measure(reference, test, item)
  end
  function metric:value() return stats.mean(self.values) end
  return metric
end

--- Jaccard@k: shared part of the two sets of the k most likely tokens; ties go to the lower id.
---@param k integer
---@return qlua.metric
function metrics.jaccard(k)
  local ks = { k }
  return metrics.per_item("jaccard@" .. k, true, function(reference, test)
    if k > reference:size(1) then
      error(("k = %d is larger than the vocabulary of %d"):format(k, reference:size(1)), 0)
    end
    return core.metrics.jaccard(reference, test, ks)[1][1]
  end, k == 1)
end

--- Share of positions where both models have the same most likely token.
---@return qlua.metric
function metrics.agreement()
  return metrics.per_item("top1_agreement", true, function(reference, test)
    return core.metrics.agreement(reference, test)[1] and 1 or 0
  end, true)
end

--- KL(full || quantized) in nats over the whole vocabulary.
---@return qlua.metric
function metrics.kl()
  return metrics.per_item("kl_full_quantized", false, function(reference, test)
    return core.metrics.kl(reference, test)[1]
  end)
end

--- Change of the probability of the right answer's token; only for items that have a target.
---@return qlua.metric
function metrics.delta_p()
  return metrics.per_item("delta_p", nil, function(reference, test, item)
    return item.target and core.metrics.delta_p(reference, test, { item.target })[1] or nil
  end)
end

--- Jaccard of the nuclei at top_p and a temperature.
---@param top_p number
---@param temperature number?
---@return qlua.metric
function metrics.nucleus(top_p, temperature)
  temperature = temperature or 1
  return metrics.per_item(("nucleus@%g,t=%g"):format(top_p, temperature), true, function(reference, test)
    return core.metrics.nucleus(reference, test, top_p, temperature)[1]
  end)
end

local function check(metric, where)
  if type(metric) ~= "table" then
    return nil, failure("format", ("%s: a metric is a table, not a %s"):format(where, type(metric)))
  end
  for _, required in ipairs { { "name", "string" }, { "add", "function" }, { "value", "function" } } do
    local field, kind = table.unpack(required)
    if type(metric[field]) ~= kind then
      return nil, failure("format", ("%s: the metric's field '%s' is a %s, not a %s"):format(where, field,
        type(metric[field]), kind), "see examples/metrics for one that works")
    end
  end
  if metric.values ~= nil and type(metric.values) ~= "table" then
    return nil, failure("format", where .. ": the metric's field 'values' is not a list of numbers")
  end
  return metric
end

--- The metrics that a Lua file returns.
---@param path string
---@return qlua.metric[]?, qlua.failure?
function metrics.load(path)
  local chunk, why = loadfile(path, "t")
  if not chunk then
    if not why:find(path, 1, true) then why = path .. ": " .. why end
    local code = why:find "^cannot open" and "not_found" or "format"
    return nil, failure(code, ("cannot load the metric: %s"):format(why))
  end
  local ok, made = pcall(chunk)
  if not ok then return nil, failure("format", ("%s: %s"):format(path, tostring(made))) end
  if type(made) ~= "table" or made.name or #made == 0 then made = { made } end
  local list = {}
  for i, entry in ipairs(made) do
    if type(entry) == "function" then
      ok, entry = pcall(entry)
      if not ok then return nil, failure("format", ("%s: %s"):format(path, tostring(entry))) end
    end
    local metric, err = check(entry, path)
    if not metric then return nil, err end
    list[i] = metric
  end
  if #list == 0 then return nil, failure("format", path .. ": the file returns no metric") end
  return list
end

--- All metrics of several files.
---@param paths string[]
---@return qlua.metric[]?, qlua.failure?
function metrics.load_all(paths)
  local list = {}
  for _, path in ipairs(paths or {}) do
    local more, err = metrics.load(path)
    if not more then return nil, err end
    table.move(more, 1, #more, #list + 1, list)
  end
  return list
end

local function finite(metric, number, what)
  if type(number) ~= "number" or number - number ~= 0 then
    error(("metric %s: %s is %s, not a finite number"):format(metric.name, what, tostring(number)), 0)
  end
end

--- Gives one position to every metric of a list; an error in a user's metric names it. Returns what each has
--- added to its values, by name: a number, or a list where it is not one.
---@param list qlua.metric[]
---@param reference qlua.tensor
---@param test qlua.tensor
---@param item table
---@return table<string, number|number[]>
function metrics.add(list, reference, test, item)
  local added = {}
  for _, metric in ipairs(list) do
    local before = metric.values and #metric.values
    local ok, why = pcall(metric.add, metric, reference, test, item)
    if not ok then error(("metric %s: %s"):format(metric.name, tostring(why)), 0) end
    if before and #metric.values > before then
      for i = before + 1, #metric.values do finite(metric, metric.values[i], ("value %d"):format(i)) end
      local new = table.move(metric.values, before + 1, #metric.values, 1, json.array())
      added[metric.name] = #new == 1 and new[1] or new
    end
  end
  return added
end

--- Puts what metrics.add returned, position by position, into the values of the metrics of a list: those that
--- another process has measured too, in their order.
---@param list qlua.metric[]
---@param rows table[]
---@param field string  of a row, where it stands
---@return qlua.metric[] list
function metrics.restore(list, rows, field)
  for _, metric in ipairs(list) do
    local values = metric.values
    for i = values and #values or 0, 1, -1 do values[i] = nil end
    for _, row in ipairs(values and rows or {}) do
      local new = row[field][metric.name]
      if type(new) == "table" then
        table.move(new, 1, #new, #values + 1, values)
      else
        values[#values + 1] = new
      end
    end
  end
  return list
end

--- Why measured positions cannot be taken from a store, where they cannot: a metric that keeps no values of
--- its own has to see all of them.
---@param list qlua.metric[]
---@return string?
function metrics.unkept(list)
  for _, metric in ipairs(list) do
    if not metric.values then return ("the metric '%s' keeps no values by question"):format(metric.name) end
  end
end

--- A list of metrics in which every name is there once.
---@param list qlua.metric[]
---@return qlua.metric[]?, qlua.failure?
function metrics.distinct(list)
  local known = {}
  for _, metric in ipairs(list) do
    if known[metric.name] then
      return nil, failure("argument", ("two metrics have the name '%s'"):format(metric.name))
    end
    known[metric.name] = true
  end
  return list
end

--- 95 % interval of the mean of a metric's values: Wilson's where they are yes and no, else from a bootstrap.
local function interval(metric, seed)
  if not metric.share then return stats.bootstrap(metric.values, { seed = seed or 1 }) end
  local yes = 0
  for i, value in ipairs(metric.values) do
    if value ~= 0 and value ~= 1 then
      error(("metric %s: value %d is %s, and those of a share are 1 and 0"):format(metric.name, i, value), 0)
    end
    yes = yes + math.tointeger(value)
  end
  return stats.wilson(yes, #metric.values)
end

--- The row of a metric with one number an item.
local function item_row(metric, seed)
  local values = metric.values
  local row = { n = 0 }
  for i, value in ipairs(values) do finite(metric, value, ("value %d"):format(i)) end
  if #values > 0 then
    row = stats.summary(values)
    row.value = row.mean
    row.low, row.high = interval(metric, seed)
  end
  row.name, row.higher_is_better, row.values = metric.name, metric.higher_is_better, values
  return row
end

--- Rows for a table: { name, value, n, higher_is_better }. Where the metric keeps one number an item also
--- what qlua.stats.summary says of them, and low and high, a 95 % interval of the mean (seeded where it is a
--- bootstrap); if no item gave a number, value is nil and n is 0.
---@param list qlua.metric[]
---@param seed integer?
---@return table[]
function metrics.summary(list, seed)
  local rows = {}
  for _, metric in ipairs(list) do
    if metric.values then
      rows[#rows + 1] = item_row(metric, seed)
    else
      local ok, value = pcall(metric.value, metric)
      if not ok then error(("metric %s: %s"):format(metric.name, tostring(value)), 0) end
      if value == nil then value = "nothing" end
      if type(value) ~= "table" then value = { [""] = value } end
      local names = {}
      for name, number in pairs(value) do
        if type(name) ~= "string" or type(number) ~= "number" then
          error(("metric %s: value() gives a number or a table of numbers by name"):format(metric.name), 0)
        end
        finite(metric, number, name == "" and "value()" or "value()." .. name)
        names[#names + 1] = name
      end
      table.sort(names)
      for _, name in ipairs(names) do
        rows[#rows + 1] = { name = name == "" and metric.name or metric.name .. "." .. name,
          value = value[name], higher_is_better = metric.higher_is_better }
      end
    end
  end
  return rows
end

return metrics
