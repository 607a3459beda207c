--- What computed values depend on, and the key of those that depend on the same: the SHA-256 of all of it.
---
--- Inputs are a table that JSON can hold. Files stand in it by their bytes' digest, never by their names; the
--- checkpoint of a model by digests of its weights, configuration and tokenizer.

local _ENV <const> = require "qlua.strict"

local core = require "qlua.core"
local json = require "qlua.json"
local lfs = require "lfs"
local sys = require "qlua.sys"

local key = {}

--- Files of the library that show values and make none: a change in them leaves what is computed as it is.
local SHOWING <const> = { bars = true, cli = true, compare = true, document = true, export = true,
  fairness = true, files = true, llama_bench = true, lm_eval = true, machine = true, meta = true,
  plot = true, progress = true, repl = true, report = true, results = true, runs = true,
  sheets = true, study = true, table = true }

--- Bytes up to which a file is read again rather than remembered, which costs a write to the disk.
local SMALL <const> = 1 << 20

local function sha256(store, path)
  if (lfs.attributes(path, "size") or SMALL) >= SMALL then return store:sha256(path) end
  local file <close> = io.open(path, "rb")
  local text = file and file:read "a"
  if not text then return store:sha256(path) end -- for its error
  return sys.sha256(text)
end

--- The digest of a list of files, each by its name and its bytes; nil where the list is empty.
local function digest(store, paths)
  if #paths == 0 then return nil end
  table.sort(paths)
  local lines = {}
  for i, path in ipairs(paths) do
    local hex, err = sha256(store, path)
    if not hex then return nil, err end
    lines[i] = ("%s  %s\n"):format(hex, path:match "[^/]*$")
  end
  -- as qlua.core's model:sha256() has it: one file is its own digest
  return #paths == 1 and lines[1]:sub(1, 64) or sys.sha256(table.concat(lines))
end

--- The program that computes: the interpreter, the library's files and, on another device than the CPU, its
--- plug-in.
---@param store qlua.store
---@param device string  name
---@return table?, qlua.failure?
function key.engine(store, device)
  local folder, paths = package.searchpath("qlua.key", package.path):match "^(.*)/[^/]*$", {}
  for name in lfs.dir(folder) do
    local module = name:match "^(.*)%.lua$"
    if module and not SHOWING[module] then paths[#paths + 1] = folder .. "/" .. name end
  end
  local engine = {}
  local err
  engine.program, err = store:sha256 "/proc/self/exe"
  if not engine.program then return nil, err end
  engine.library, err = digest(store, paths)
  if not engine.library then return nil, err end
  local plugin = device ~= "cpu" and core.cuda().plugin or nil
  if plugin then
    engine.plugin, err = store:sha256(plugin)
    if not engine.plugin then return nil, err end
  end
  return engine
end

--- The shards that an index names; nil where it cannot be read.
local function shards(folder)
  local file <close> = io.open(folder .. "/model.safetensors.index.json", "rb")
  local index = file and json.decode(file:read "a")
  if not (index and type(index.weight_map) == "table") then return nil end
  local known, paths = {}, {}
  for _, name in pairs(index.weight_map) do
    if not known[name] then known[name], paths[#paths + 1] = true, folder .. "/" .. name end
  end
  return paths
end

--- The files of a checkpoint by what they are: weights, configuration, tokenizer.
local function files_of(path, folder)
  local weights = path:find "%.safetensors$" and { path } or nil
  local single = folder .. "/model.safetensors"
  if not weights then weights = lfs.attributes(single, "mode") and { single } or shards(folder) or {} end
  local config, tokenizer = {}, {}
  for name in lfs.dir(folder) do
    if name:find "^tokenizer" or name:find "^special_tokens" or name:find "%.jinja$" then
      tokenizer[#tokenizer + 1] = folder .. "/" .. name
    elseif name:find "%.json$" and not name:find "%.index%.json$" then
      config[#config + 1] = folder .. "/" .. name
    end
  end
  return { weights = weights, config = config, tokenizer = tokenizer }
end

--- How the linear layers are stored, one by one.
local function quantization(model)
  local list, quant = {}, model:info().quant
  for i, m in ipairs(model:matrices()) do
    list[i] = { name = m.name, dtype = m.dtype, scheme = m.scheme, block = m.block, double = m.double,
      codebook = m.codebook and json.array(m.codebook) }
  end
  return { label = quant.label, block = quant.block, double = quant.double,
    matrices = sys.sha256(json.encode(list)) }
end

--- What has been said of models: their files may change while they are open.
local told = setmetatable({}, { __mode = "k" })

--- A model: digests of its checkpoint, in what types it is held, how it is quantized.
---@param store qlua.store
---@param model qlua.model
---@param source? string  what --model named; default: its folder
---@return table?, qlua.failure?
function key.model(store, model, source)
  if told[model] then return told[model] end
  local info = model:info()
  local made = { dtype = info.dtype, kv_dtype = info.kv_dtype, quantization = quantization(model) }
  for kind, paths in pairs(info.folder and files_of(source and core.resolve(source) or "", info.folder)
    or {}) do
    local hex, err = digest(store, paths)
    if err then return nil, err end
    made[kind] = hex
  end
  told[model] = made
  return made
end

local DEVICE <const> = { "name", "hardware", "isa", "driver", "threads", "numerics" }
--- What a CUDA device's bits or speed depend on beside.
local CUDA <const> = { "QLUA_CUDA_SLICE", "QLUA_CUDA_GRAPHS", "QLUA_CUDA_PDL", "QLUA_CUDA_SYNC" }

--- What of a device its values may depend on.
---@param info qlua.device_info
---@return table
function key.device(info)
  local made = {}
  for _, field in ipairs(DEVICE) do made[field] = info[field] end
  for _, name in ipairs(info.name ~= "cpu" and CUDA or {}) do made[name] = os.getenv(name) end
  return made
end

--- The key of a table of inputs: the same for equal tables.
---@param inputs table
---@return string key, string text  of the inputs, as JSON
function key.of(inputs)
  local text = json.encode(inputs)
  return sys.sha256(text), text
end

local function shown(value)
  if value == nil then return "nothing" end
  if type(value) == "table" then return json.encode(value) end
  return tostring(value)
end

local function is_digest(value) return type(value) == "string" and #value == 64 and not value:find "%X" end

--- A list of plain values is shown as a whole.
local function is_list(value)
  return type(value) == "table" and #value > 0 and type(value[1]) ~= "table" and not is_digest(value[1])
end

--- What differs between two tables of inputs, in words: "models.2.quantization.label is fp4, was nf4"; of
--- digests only that they differ.
---@param now table
---@param before table
---@return string[]
function key.differences(now, before)
  local list = {}
  local function compare(path, a, b)
    if is_list(a) and is_list(b) then a, b = json.encode(a), json.encode(b) end
    if type(a) == "table" and type(b) == "table" then
      local names, known = {}, {}
      for _, t in ipairs { a, b } do
        for name in pairs(t) do
          if not known[name] then known[name], names[#names + 1] = true, name end
        end
      end
      table.sort(names, function(x, y) return tostring(x) < tostring(y) end)
      for _, name in ipairs(names) do
        compare(path == "" and tostring(name) or path .. "." .. tostring(name), a[name], b[name])
      end
    elseif a ~= b then
      if is_digest(a) or is_digest(b) then
        list[#list + 1] = path .. (b == nil and " is new" or a == nil and " is gone" or " differs")
      else
        list[#list + 1] = ("%s is %s, was %s"):format(path, shown(a), shown(b))
      end
    end
  end
  compare("", now, before)
  return list
end

return key
