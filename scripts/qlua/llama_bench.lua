--- Batch sweeps as llama.cpp's llama-bench prints its results: md, csv, json, jsonl and sql with its columns,
--- so that what reads those reads these.
---
--- A pass over a batch of prompts is its test "pp": n_prompt is the tokens of a pass (their mean where passes
--- differ), n_batch and n_ubatch are as large, for a pass takes them all at once. A column that has no
--- counterpart here is empty. All but sql, whose table others fill too, end with n_rows, the rows of a batch.

local _ENV <const> = require "qlua.strict"

local csv = require "qlua.csv"
local json = require "qlua.json"
local stats = require "qlua.stats"
local tables = require "qlua.table"

local llama_bench = {}

llama_bench.formats = { "md", "csv", "json", "jsonl", "sql" }

-- The columns and types of llama-bench at the end of 2025.
local TEXT <const>, INTEGER <const>, REAL <const> = "TEXT", "INTEGER", "REAL"
local COLUMNS <const> = {
  { "build_commit", TEXT }, { "build_number", INTEGER }, { "cpu_info", TEXT }, { "gpu_info", TEXT },
  { "backends", TEXT }, { "model_filename", TEXT }, { "model_type", TEXT }, { "model_size", INTEGER },
  { "model_n_params", INTEGER }, { "n_batch", INTEGER }, { "n_ubatch", INTEGER }, { "n_threads", INTEGER },
  { "cpu_mask", TEXT }, { "cpu_strict", INTEGER }, { "poll", INTEGER }, { "type_k", TEXT },
  { "type_v", TEXT }, { "n_gpu_layers", INTEGER }, { "n_cpu_moe", INTEGER }, { "split_mode", TEXT },
  { "main_gpu", INTEGER }, { "no_kv_offload", INTEGER }, { "flash_attn", INTEGER }, { "devices", TEXT },
  { "tensor_split", TEXT }, { "tensor_buft_overrides", TEXT }, { "use_mmap", INTEGER },
  { "embeddings", INTEGER }, { "no_op_offload", INTEGER }, { "no_host", INTEGER }, { "n_prompt", INTEGER },
  { "n_gen", INTEGER }, { "n_depth", INTEGER }, { "test_time", TEXT }, { "avg_ns", INTEGER },
  { "stddev_ns", INTEGER }, { "avg_ts", REAL }, { "stddev_ts", REAL },
}

local NAMES <const> = {}
for i, column in ipairs(COLUMNS) do NAMES[i] = column[1] end

local function rounded(x) return math.tointeger(math.floor(x + 0.5)) end

local function nanoseconds(seconds) return rounded(1e9 * seconds) end

local function parameters(n) return n >= 1e9 and ("%.2f B"):format(n / 1e9) or ("%.2f M"):format(n / 1e6) end

--- Tokens a second of every pass and over all of them.
local function add_rates(row, point)
  local seconds, counts = point.seconds, point.pass_tokens
  row.samples_ns = json.array()
  for i, s in ipairs(seconds.samples) do row.samples_ns[i] = nanoseconds(s) end
  if counts and #counts == #seconds.samples then
    row.samples_ts = json.array()
    for i, s in ipairs(seconds.samples) do row.samples_ts[i] = counts[i] / s end
    row.avg_ts = stats.mean(row.samples_ts)
    row.stddev_ts = stats.sd(row.samples_ts) or 0.0
  else
    row.avg_ts = point.tokens / seconds.mean
  end
end

--- The points of a sweep that were timed, as rows of llama-bench.
---@param doc qlua.run_document
---@param section qlua.section_sweep
---@return table[]
function llama_bench.rows(doc, section)
  local facts, list = doc.facts, {}
  local device = facts.device
  local on_cpu = device.name == "cpu"
  for _, point in ipairs(section.points) do
    local info = point.model == 1 and facts.full or facts.quantized
    if point.seconds then
      local tokens = rounded(point.tokens)
      local row = {
        build_commit = "qlua " .. facts.qlua_version, cpu_info = on_cpu and device.hardware or nil,
        gpu_info = not on_cpu and device.hardware or nil, backends = on_cpu and "CPU" or "CUDA",
        model_filename = point.model == 2 and doc.options.quantized or doc.options.model,
        model_type = ("%s %s %s"):format(info.architecture, parameters(info.params),
          point.model == 1 and info.dtype or point.label),
        model_size = info.bytes, model_n_params = info.params, n_batch = tokens, n_ubatch = tokens,
        n_threads = device.threads, type_k = info.kv_dtype, type_v = info.kv_dtype,
        n_gpu_layers = on_cpu and 0 or info.layers, devices = device.name, n_prompt = tokens, n_gen = 0,
        n_depth = 0, test_time = os.date("!%Y-%m-%dT%H:%M:%SZ", math.floor(doc.started)),
        avg_ns = nanoseconds(point.seconds.mean), stddev_ns = nanoseconds(point.seconds.sd),
        n_rows = point.batch,
      }
      add_rates(row, point)
      list[#list + 1] = row
    end
  end
  return list
end

local function markdown(rows, section)
  local on_cpu = rows[1] and rows[1].backends == "CPU"
  local t = tables.new { "model", { "size", align = "right" }, { "params", align = "right" }, "backend",
    { on_cpu and "threads" or "ngl", align = "right" }, { "n_rows", align = "right" },
    { "test", align = "right" }, { "t/s", align = "right" } }
  for _, row in ipairs(rows) do
    t:add(row.model_type, tables.bytes(row.model_size), parameters(row.model_n_params), row.backends,
      on_cpu and row.n_threads or row.n_gpu_layers, row.n_rows, "pp" .. row.n_prompt,
      row.stddev_ts and ("%.2f ± %.2f"):format(row.avg_ts, row.stddev_ts) or ("%.2f"):format(row.avg_ts))
  end
  local lines = { t:markdown() }
  for _, p in ipairs(section.points) do
    if p.oom then lines[#lines + 1] = ("\n%s, batch %d: %s\n"):format(p.label, p.batch, p.oom) end
  end
  if rows[1] then lines[#lines + 1] = ("\nbuild: %s\n"):format(rows[1].build_commit) end
  return table.concat(lines)
end

local function with_rows()
  local names = table.move(NAMES, 1, #NAMES, 1, {})
  names[#names + 1] = "n_rows"
  return names
end

local function as_csv(rows)
  local names, lines = with_rows(), {}
  for i, row in ipairs(rows) do
    lines[i] = {}
    for c, name in ipairs(names) do lines[i][c] = row[name] end
  end
  return csv.text(names, lines)
end

local function sql_value(value)
  if value == nil then return "NULL" end
  if type(value) == "string" then return "'" .. value:gsub("'", "''") .. "'" end
  return json.encode(value)
end

local function sql(rows)
  local fields, lines = {}, {}
  for i, column in ipairs(COLUMNS) do fields[i] = ("  %s %s"):format(column[1], column[2]) end
  lines[1] = ("CREATE TABLE IF NOT EXISTS llama_bench (\n%s\n);\n\n"):format(table.concat(fields, ",\n"))
  for _, row in ipairs(rows) do
    local values = {}
    for i, name in ipairs(NAMES) do values[i] = sql_value(row[name]) end
    lines[#lines + 1] = ("INSERT INTO llama_bench (%s) VALUES (%s);\n"):format(table.concat(NAMES, ", "),
      table.concat(values, ", "))
  end
  return table.concat(lines)
end

--- A sweep in one of llama_bench.formats.
---@param doc qlua.run_document
---@param section qlua.section_sweep
---@param format "md"|"csv"|"json"|"jsonl"|"sql"
---@return string
function llama_bench.text(doc, section, format)
  local rows, keys = llama_bench.rows(doc, section), with_rows()
  if format == "md" then return markdown(rows, section) end
  if format == "csv" then return as_csv(rows) end
  if format == "sql" then return sql(rows) end
  if format == "json" then return json.encode(json.array(rows), { indent = 2, keys = keys }) .. "\n" end
  local lines = {}
  for i, row in ipairs(rows) do lines[i] = json.encode(row, { keys = keys }) .. "\n" end
  return table.concat(lines)
end

return llama_bench
