--- Whether a decoded JSON value is the document of a run: what a stranger's file is asked before anything
--- reads its fields, which qlua.document describes.

local _ENV <const> = require "qlua.strict"

local failure = require "qlua.failure"
local json = require "qlua.json"

-- A shape is the name of a type, a record of shapes, a list (of a fixed length where one is given, else of at
-- least `least`), or one of these that may be absent. Fields that no record names are not looked at.
local NUMBER <const>, STRING <const>, BOOLEAN <const> = "number", "string", "boolean"

local list, maybe = {}, {}

local function list_of(shape, length, least)
  return setmetatable({ shape = shape, length = length, least = least or 0 }, list)
end

local function optional(shape) return setmetatable({ shape = shape }, maybe) end

--- A record of fields of one shape, and others.
local function record(shape, names, others)
  local made = others or {}
  for name in names:gmatch "%S+" do made[name] = shape end
  return made
end

--- The fields of a record and others, which win.
local function table_with(fields, others)
  local made = {}
  for name, shape in pairs(fields) do made[name] = shape end
  for name, shape in pairs(others) do made[name] = shape end
  return made
end

local A_NUMBER <const>, A_STRING <const> = optional(NUMBER), optional(STRING)
local PAIR <const> = list_of(NUMBER, 2)

local figure <const> = record(A_NUMBER,
  "value low high n mean stderr rms min median p90 p95 p99 p999 max",
  { name = STRING, higher_is_better = optional(BOOLEAN), values = optional(list_of(NUMBER)) })
local figures <const> = list_of(figure)
local valued <const> = table_with(figure, { value = NUMBER })
local summed <const> = table_with(figure, { mean = NUMBER, median = NUMBER })
local share <const> = { n = NUMBER, correct = NUMBER, accuracy = A_NUMBER, wilson = optional(PAIR) }
local model <const> = record(A_NUMBER, "accuracy stderr unparsed cut seconds prompt_tokens "
  .. "shared_tokens decode_tokens words words_per_minute decode_tokens_per_second prefill_tokens_per_second",
  { n = NUMBER, correct = NUMBER, label = STRING, wilson = optional(PAIR),
    words_per_minute_95 = optional(PAIR) })
local compared <const> = record(A_NUMBER, "adjusted_p questions_needed recovery", {
  flips = record(NUMBER, "n both_right right_wrong wrong_right same_wrong other_wrong right_a right_b flips "
    .. "all_flips"), difference = NUMBER, difference_95 = PAIR, mcnemar_p = NUMBER, sentence = A_STRING,
  words_per_minute_ratio = optional { value = NUMBER, low = A_NUMBER, high = A_NUMBER } })
local comparison <const> = table_with(compared, { adjusted_p = NUMBER })
local data <const> = optional { path = A_STRING, sha256 = A_STRING, all = A_NUMBER }
local test <const> = record(NUMBER, "difference p adjusted_p", { name = STRING, low = A_NUMBER,
  high = A_NUMBER })

local outcome <const> = { task = STRING, output_type = STRING, set = A_STRING, data = data,
  questions = A_NUMBER, too_long = NUMBER, context = A_NUMBER, models = list_of(model, 2),
  comparison = optional(comparison), control = optional(compared), control_model = optional(model),
  metrics = figures, control_metrics = optional(figures) }

local point <const> = { batch = NUMBER, model = NUMBER, label = STRING, tokens = NUMBER, reserved = A_NUMBER,
  process = A_NUMBER, oom = A_STRING, pass_tokens = optional(list_of(NUMBER)),
  expected = record(NUMBER, "weights kv activations total"),
  seconds = optional(record(NUMBER, "median mean sd p10 p90 min max n",
    { samples = list_of(NUMBER, nil, 1) })),
  peak = optional(record(NUMBER, "weights kv activations total resident", { shared = A_NUMBER })) }

local measured <const> = { value = NUMBER, stderr = NUMBER }
local percentiles <const> = list_of { share = NUMBER, value = NUMBER }
local variant <const> = { label = STRING, bytes = NUMBER, bits = A_NUMBER, saved = A_NUMBER,
  kl_per_mib = A_NUMBER, kl = figure, agreement = figure, accuracy = share }

local SECTIONS <const> = {
  mmlu = { protocol = A_STRING, outcomes = list_of(outcome) },
  metrics = { task = STRING, set = A_STRING, data = data, questions = NUMBER, scored = NUMBER, pair = figures,
    control = optional(figures), tests = optional(list_of(test)) },
  sweep = { task = A_STRING, data = data, runs = NUMBER, warmup = A_NUMBER, points = list_of(point) },
  perplexity = { text = STRING, sha256 = A_STRING, set = A_STRING,
    protocol = record(A_NUMBER, "context bos", { description = STRING }),
    summary = record(measured, "reference test ratio log_ratio kl delta_p delta_p_rms same_top",
      { n = NUMBER, correlation = A_NUMBER, kl_percentiles = percentiles,
        delta_p_percentiles = optional(percentiles) }) },
  variants = { task = STRING, data = data, questions = NUMBER, scored = A_NUMBER, note = A_STRING,
    rows = list_of(variant) },
  nucleus = { task = STRING, set = A_STRING, data = data, questions = NUMBER, scored = NUMBER,
    rows = list_of(record(NUMBER, "temperature top_p adjusted_p", { label = STRING, overlap = valued,
      control = valued, sizes = list_of(summed, 2), masses = list_of(valued, 2),
      outside = record(NUMBER, "n count share") })) },
}
SECTIONS.sensitivity = table_with(SECTIONS.variants, { all = optional(variant) })

-- Fields that are there together or not at all.
local SHARE <const>, BOUNDS <const> = { "accuracy", "wilson" }, { "low", "high" }
local TOGETHER <const> = { [figure] = BOUNDS, [valued] = BOUNDS, [share] = SHARE, [model] = SHARE,
  [point] = { "seconds", "peak" } }

local checks <const> = list_of { name = STRING, text = STRING, ok = optional(BOOLEAN), reason = A_STRING }
local device <const> = record(A_STRING, "name hardware isa driver", { threads = A_NUMBER })
local its_model <const> = optional { bytes = A_NUMBER, dtype = A_STRING, quant = optional { label = A_STRING,
  bits = A_NUMBER, block = A_NUMBER } }

local DOCUMENT <const> = { run = A_NUMBER, name = STRING, started = NUMBER, finished = A_NUMBER,
  status = A_STRING, command = optional(list_of(STRING)), options = {}, labels = list_of(STRING),
  facts = { full = its_model, quantized = its_model, device = optional(device), model_sha256 = A_STRING,
    seed = A_NUMBER },
  fairness = optional { checks = optional(checks) }, rows = optional { reused = A_NUMBER, ran = A_NUMBER },
  sections = list_of { kind = STRING } }

local function type_of(value)
  if value == nil then return "missing" end
  if value == json.null then return "null" end
  local name = type(value)
  return name == "table" and "a list or an object" or "a " .. name
end

--- What is wrong with a value: where and what; nil where nothing is.
local function fault(value, shape, at)
  if getmetatable(shape) == maybe then
    if value == nil then return nil end
    shape = shape.shape
  end
  if type(shape) == "string" then
    if type(value) == shape then return nil end
    return ("%s: %s, not a %s"):format(at, type_of(value), shape)
  end
  if type(value) ~= "table" then
    return ("%s: %s, not %s"):format(at, type_of(value), getmetatable(shape) == list and "a list"
      or "an object")
  end
  if getmetatable(shape) == list then
    if #value ~= (shape.length or math.max(#value, shape.least)) then
      return ("%s: %d elements, not %d"):format(at, #value, shape.length or shape.least)
    end
    for i, element in ipairs(value) do
      local found = fault(element, shape.shape, ("%s[%d]"):format(at, i))
      if found then return found end
    end
    return nil
  end
  for name, field in pairs(shape) do
    local found = fault(value[name], field, at == "" and name or at .. "." .. name)
    if found then return found end
  end
  local together = TOGETHER[shape] or {}
  for _, name in ipairs(together) do
    if (value[name] == nil) ~= (value[together[1]] == nil) then
      return ("%s: %s and %s belong together"):format(at, together[1], name)
    end
  end
end

--- The document, if it is one of this version's.
---@param doc any
---@param name string  of where it comes from, for messages
---@return qlua.run_document?, qlua.failure?
return function(doc, name)
  if type(doc) ~= "table" or math.type(doc.format) ~= "integer" then
    return nil, failure("format", name .. ": not the document of a run",
      "comparison_*.json and *_results_*.json beside the store are")
  elseif doc.format ~= 1 then
    return nil, failure("format", ("%s: a document of format %d, and this qlua reads format 1"):format(name,
      doc.format), "read it with the qlua that wrote it, or run the experiment again")
  end
  local found = fault(doc, DOCUMENT, "")
  for i, section in ipairs(not found and doc.sections or {}) do
    found = found or fault(section, SECTIONS[section.kind] or {}, ("sections[%d]"):format(i))
  end
  if found then return nil, failure("format", ("%s: not the document of a run: %s"):format(name, found)) end
  return doc
end
