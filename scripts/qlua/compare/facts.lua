--- What is not the same in how two runs were made, and what that spoils.

local _ENV <const> = require "qlua.strict"

local json = require "qlua.json"

local facts = {}

local function at(value, ...)
  for _, key in ipairs { ... } do
    if type(value) ~= "table" then return nil end
    value = value[key]
  end
  if value == json.null then return nil end
  return value
end

--- What is looked at in the facts of both: name, path, what a difference spoils.
local FACTS <const> = {
  { "script", { "name" } },
  { "qlua", { "facts", "qlua_version" } },
  { "model", { "options", "model" } },
  { "model's weights (SHA-256)", { "facts", "model_sha256" } },
  { "full model's type", { "facts", "full", "dtype" } },
  { "quantized checkpoint", { "options", "quantized" } },
  { "quantization", { "facts", "quantized", "quant", "label" } },
  { "quantization block", { "facts", "quantized", "quant", "block" } },
  { "double quantization", { "facts", "quantized", "quant", "double" } },
  { "quantized model's bytes", { "facts", "quantized", "bytes" } },
  { "device", { "facts", "device", "name" }, "speeds and memory" },
  { "hardware", { "facts", "device", "hardware" }, "speeds" },
  { "instruction set", { "facts", "device", "isa" }, "speeds" },
  { "driver", { "facts", "device", "driver" }, "speeds" },
  { "threads", { "facts", "device", "threads" }, "speeds" },
  { "numerics", { "facts", "numerics" }, "speeds" },
  { "kernels", { "facts", "kernels" } },
  { "seed", { "facts", "seed" }, "what is drawn at random" },
  { "status", { "status" } },
}

-- Options that are facts already, or only say where results go.
local NOT_COMPARED <const> = {}
for _, name in ipairs { "model", "quantized", "quant", "double_quant", "block_size", "dtype", "device",
  "threads", "numerics", "seed", "tasks", "text", "output_path", "output_format", "log_samples", "fresh",
  "no_output", "dry_run" } do
  NOT_COMPARED[name] = true
end

-- Facts of the quantized model; options only of scripts that make variants of their own.
local QUANTIZATION <const> = { quant = true, double_quant = true, block_size = true }

local SPOILS <const> = { num_fewshot = "accuracies", apply_chat_template = "accuracies",
  protocol = "accuracies", mode = "accuracies", max_gen_toks = "accuracies", temperature = "accuracies",
  max_context = "the questions that fit", limit = "the questions asked", batch_size = "speeds",
  batch_sizes = "speeds", max_length = "the questions that fit", position = "metrics",
  context = "perplexities", logits = "speeds" }

local function same(x, y) return x == y or json.encode(x) == json.encode(y) end

local function add_fact(list, name, x, y, spoils)
  if (x == nil and y == nil) or same(x, y) then return end
  list[#list + 1] = { name = name, a = x, b = y, spoils = spoils }
end

--- The questions of a document's sections: file and digest by kind.
local function data_of(doc)
  local list = json.array()
  for _, section in ipairs(doc.sections) do
    for _, part in ipairs(section.outcomes or { section }) do
      local digest = at(part, "data", "sha256") or at(part, "sha256") or at(part, "data", "path")
      if digest then list[#list + 1] = digest end
    end
  end
  return list
end

--- Every fact that is not the same in both documents.
---@param a qlua.run_document
---@param b qlua.run_document
---@return qlua.compared_fact[]
function facts.differing(a, b)
  local list = json.array()
  for _, fact in ipairs(FACTS) do
    add_fact(list, fact[1], at(a, table.unpack(fact[2])), at(b, table.unpack(fact[2])), fact[3])
  end
  add_fact(list, "questions (SHA-256)", data_of(a), data_of(b), "every figure of them")
  local names = {}
  for _, doc in ipairs { a, b } do
    for name in pairs(doc.options or {}) do names[name] = true end
  end
  local sorted = {}
  local variants = not (at(a, "facts", "quantized") or at(b, "facts", "quantized"))
  for name in pairs(names) do
    if not NOT_COMPARED[name] or variants and QUANTIZATION[name] then sorted[#sorted + 1] = name end
  end
  table.sort(sorted)
  for _, name in ipairs(sorted) do
    add_fact(list, "--" .. name, at(a, "options", name), at(b, "options", name), SPOILS[name])
  end
  return list
end

--- What may make the two runs' figures differ beside the models, and what was unfair within either.
---@param found qlua.found_run[]
---@param differing qlua.compared_fact[]
---@return string[]
function facts.warnings(found, differing)
  local list = json.array()
  for _, fact in ipairs(differing) do
    if fact.spoils then
      list[#list + 1] = ("different %s: that alone can change %s"):format(fact.name, fact.spoils)
    end
  end
  for _, one in ipairs(found) do
    if one.document.status and one.document.status ~= "finished" then
      list[#list + 1] = ("%s was %s: its figures are of a part of the questions"):format(one.name,
        one.document.status)
    end
    for _, check in ipairs(at(one.document, "fairness", "checks") or {}) do
      if check.ok == false then
        list[#list + 1] = ("%s, %s: %s"):format(one.name, check.name, check.reason or check.text)
      end
    end
  end
  return list
end

return facts
