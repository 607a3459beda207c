--- What the specs of the library share: golden folders, bits of tensors, temporary folders, child processes.

local lfs = require "lfs"
local qlua = require "qlua"
local sys = require "qlua.sys"

local support = {}

support.QLUA = os.getenv("QLUA") or arg[-1]
support.MODELS = "tests/golden/models/"
support.STORIES = "../shared/data/models/stories260K"

---@param path string
---@return string
function support.read(path)
  local file <close> = assert(io.open(path, "rb"))
  return file:read("a")
end

---@param path string
---@param text string
---@return string path
function support.write(path, text)
  local file <close> = assert(io.open(path, "wb"))
  file:write(text)
  return path
end

---@param path string
---@return any
function support.json(path)
  return assert(require("qlua.json").decode(support.read(path)))
end

---@param path string
---@return boolean
function support.exists(path)
  return lfs.attributes(path, "mode") ~= nil
end

--- Names of the folders of golden models.
---@return string[]
function support.variants()
  local list = {}
  for name in lfs.dir(support.MODELS) do
    if name:sub(1, 1) ~= "." then list[#list + 1] = name end
  end
  table.sort(list)
  return list
end

--- The numbers of a tensor, row by row, in one list.
---@param t qlua.tensor
---@return number[]
function support.flat(t)
  local values = t:totable()
  while type(values[1]) == "table" do
    local list = {}
    for _, row in ipairs(values) do table.move(row, 1, #row, #list + 1, list) end
    values = list
  end
  return values
end

--- Whole numbers of a checkpoint's tensor (token ids), which arrive as float64.
---@param t qlua.tensor
---@return integer[]
function support.integers(t)
  local list = {}
  for i, value in ipairs(support.flat(t)) do list[i] = math.tointeger(value) end
  return list
end

--- The bytes of a tensor as float32.
---@param t qlua.tensor
---@return string
function support.bytes(t)
  local values, parts = support.flat(t), {}
  local piece <const> = 128
  for i = 1, #values, piece do
    local n = math.min(piece, #values - i + 1)
    parts[#parts + 1] = string.pack("<" .. ("f"):rep(n), table.unpack(values, i, i + n - 1))
  end
  return table.concat(parts)
end

--- What stands for a tensor's bits.
---@param t qlua.tensor
---@return string
function support.hash(t)
  return sys.sha256(support.bytes(t))
end

--- Largest and root mean square difference, and the root mean square of `b`.
---@param a qlua.tensor
---@param b qlua.tensor
---@return number largest, number rms, number scale
function support.difference(a, b)
  local x, y = support.flat(a), support.flat(b)
  assert(#x == #y, "tensors of different size")
  local largest, sum, scale = 0, 0, 0
  for i = 1, #x do
    local d = math.abs(x[i] - y[i])
    if d ~= d then return math.huge, math.huge, 0 end
    largest = math.max(largest, d)
    sum = sum + d * d
    scale = scale + y[i] * y[i]
  end
  return largest, (sum / #x) ^ 0.5, (scale / #x) ^ 0.5
end

--- Seeded token ids from 0 to vocab - 1.
---@param n integer
---@param vocab integer
---@param seed integer
---@return integer[]
function support.ids(n, vocab, seed)
  local list, state = {}, seed * 2654435761 + 12345
  for i = 1, n do
    state = (state * 6364136223846793005 + 1442695040888963407)
    list[i] = (state >> 33) % vocab
  end
  return list
end

--- Writes a safetensors file of float32 tensors.
---@param path string
---@param tensors { name: string, shape: integer[], bytes: string }[]
function support.write_safetensors(path, tensors)
  local header, parts, at = {}, {}, 0
  for i, t in ipairs(tensors) do
    header[i] = ('"%s":{"dtype":"F32","shape":[%s],"data_offsets":[%d,%d]}'):format(t.name,
      table.concat(t.shape, ","), at, at + #t.bytes)
    parts[i] = t.bytes
    at = at + #t.bytes
  end
  support.write(path, string.pack("<s8", "{" .. table.concat(header, ",") .. "}") .. table.concat(parts))
end

--- The stored bytes of every tensor of a safetensors file.
---@param path string
---@return table<string, string>
function support.raw_tensors(path)
  local text, map = support.read(path), {}
  local header, data = string.unpack("<s8", text)
  for name, entry in pairs(assert(require("qlua.json").decode(header))) do
    if entry.data_offsets then
      map[name] = text:sub(data + entry.data_offsets[1], data + entry.data_offsets[2] - 1)
    end
  end
  return map
end

local folders = {}

--- A new empty folder; support.cleanup removes it.
---@return string
function support.folder()
  local path = os.tmpname()
  os.remove(path)
  assert(lfs.mkdir(path))
  folders[#folders + 1] = path
  return path
end

function support.cleanup()
  for _, path in ipairs(folders) do os.execute("rm -rf '" .. path .. "'") end
  folders = {}
end

--- A copy of a golden model's config and weights, to be spoiled.
---@param name string
---@return string folder
function support.copy(name)
  local folder = support.folder()
  for file in lfs.dir(support.MODELS .. name) do
    if file:sub(1, 1) ~= "." and not file:find "^golden" then
      support.write(folder .. "/" .. file, support.read(support.MODELS .. name .. "/" .. file))
    end
  end
  return folder
end

--- Runs Lua code in a qlua of its own; `environment`: "NAME=value ...".
---@param code string
---@param environment? string
---@return string output stdout and stderr
---@return boolean ok
function support.run(code, environment)
  local script = os.tmpname()
  support.write(script, code)
  -- leak checking needs ptrace, which containers do not always grant; this process has it where it works
  local pipe = assert(io.popen(("ASAN_OPTIONS=detect_leaks=0 %s '%s' '%s' 2>&1"):format(environment or "",
    support.QLUA, script)))
  local output = pipe:read("a")
  local ok = pipe:close()
  os.remove(script)
  return output, ok == true
end

--- Name of the device that models run on: "cpu", unless QLUA_TEST_DEVICE says another.
support.DEVICE = os.getenv "QLUA_TEST_DEVICE" or "cpu"

--- That device, open for the whole run; the CPU with two threads where the machine has them.
---@return qlua.device
function support.device()
  local options = support.DEVICE == "cpu" and { threads = 2 } or nil
  support.shared = support.shared or qlua.device(support.DEVICE, options)
    or assert(qlua.device(support.DEVICE))
  return support.shared
end

--- Whether a model in this type computes in float32: all do on the CPU; elsewhere activations meet 16-bit
--- weights in 16 bits.
---@param dtype string
---@return boolean
function support.is_exact(dtype)
  return support.DEVICE == "cpu" or dtype == "float32" or dtype == "f32"
end

--- A copy of a tensor of floats on the CPU.
---@param t qlua.tensor
---@return qlua.tensor
function support.on_cpu(t)
  return qlua.tensor(t:totable())
end

--- The second result of something that failed because of the outside world, its text checked.
---@param value any
---@param err any
---@param ... string texts that the message or the hint hold
---@return qlua.failure
function support.failed(value, err, ...)
  assert(value == nil, "it did not fail")
  assert(type(err) == "table" and err.code and err.message, "no error table: " .. tostring(err))
  for _, text in ipairs { ... } do
    if not tostring(err):find(text, 1, true) then
      error(("'%s' is not in: %s"):format(text, tostring(err)), 2)
    end
  end
  return err
end

--- The message that `fn` raises, its texts checked.
---@param fn function
---@param ... string
---@return string
function support.raises(fn, ...)
  local ok, why = pcall(fn)
  if ok then error("nothing was raised", 2) end
  for _, text in ipairs { ... } do
    if not tostring(why):find(text, 1, true) then
      error(("'%s' is not in: %s"):format(text, tostring(why)), 2)
    end
  end
  return tostring(why)
end

return support
