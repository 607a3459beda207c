---@meta qlua
--- What the modules in C offer, for editors (LuaCATS) and for readers. Never loaded; a test checks that
--- every function exported from C stands here. Methods written in Lua are annotated where they are defined:
--- qlua/device.lua, qlua/model.lua, qlua/init.lua.

--- The value that stands for a failure of the outside world; tostring gives "message (hint)".
---@class qlua.failure
---@field code "argument"|"not_found"|"io"|"format"|"unsupported"|"memory"|"device"|"interrupted"
---@field message string
---@field hint string?

--- A dense tensor on a device. Dimensions and positions count from 1; token ids from 0.
---@class qlua.tensor
---@operator add(qlua.tensor|number): qlua.tensor
---@operator sub(qlua.tensor|number): qlua.tensor
---@operator mul(qlua.tensor|number): qlua.tensor
---@operator div(qlua.tensor|number): qlua.tensor
---@operator unm: qlua.tensor
local tensor = {}

--- Entries of dimension `dim`.
---@param dim integer
---@return integer
function tensor:size(dim) end

---@return integer[]
function tensor:shape() end

---@return "float32"|"float64"|"int32"
function tensor:dtype() end

--- One element; as many indices as dimensions.
---@param ... integer
---@return number
function tensor:get(...) end

--- Slice `index` of dimension `dim`, without that dimension. Dimension 1 is a view, 2 a copy.
---@param dim integer
---@param index integer
---@return qlua.tensor
function tensor:select(dim, index) end

--- Entries first .. first + count - 1 of dimension `dim`. Dimension 1 is a view, 2 a copy.
---@param dim integer
---@param first integer
---@param count integer
---@return qlua.tensor
function tensor:narrow(dim, first, count) end

--- The k largest of each row (last dimension), largest first, ties to the lower id: values, ids (from 0).
---@param k integer
---@return qlua.tensor values, qlua.tensor ids
function tensor:topk(k) end

--- Id (from 0) of the largest value; for a matrix, a table with one id a row. Ties to the lower id.
---@return integer|integer[]
function tensor:argmax() end

--- ln sum exp(x / temperature) over the last dimension, in float64: a number, or a tensor [n].
---@param options? { temperature: number? }
---@return number|qlua.tensor
function tensor:logsumexp(options) end

--- softmax(x / temperature) over the last dimension.
---@param options? { temperature: number? }
---@return qlua.tensor
function tensor:softmax(options) end

--- Matrix [n, vocab] with n ids: the value at each row's id, [n]. Vector with an id: a number; with ids: a
--- tensor.
---@param ids integer|integer[]
---@return number|qlua.tensor
function tensor:gather(ids) end

--- Sum over the last dimension in float64: a number, or a tensor [n].
---@return number|qlua.tensor
function tensor:sum() end

--- Largest value of the last dimension: a number, or a tensor [n].
---@return number|qlua.tensor
function tensor:max() end

--- Nested tables of numbers.
---@return table
function tensor:totable() end

--- The tensor on the CPU.
---@param device "cpu"
---@return qlua.tensor
function tensor:to(device) end

--- Frees the memory now instead of at collection; idempotent.
function tensor:close() end

---@class qlua.device
local device = {}

---@class qlua.device_info
---@field name string           "cpu", "cuda:0"
---@field hardware string       what the device calls itself
---@field isa string            instruction set in use; CUDA: "sm_90"
---@field driver string?        CUDA: driver and runtime versions
---@field numerics "fast"|"invariant"  invariant: a row's bits do not depend on its batch; the CPU always is
---@field threads integer?      CPU
---@field memory_total integer  bytes
---@field memory_free integer   bytes
---@field clock_mhz integer?    CUDA, where the driver tells
---@field energy_joules number? CUDA, where the driver tells: since it was loaded
---@field throttled_seconds number?  the same: in which heat held its clock down
---@field neighbours integer?   CUDA, where the driver tells: other processes that may compute on it

---@return qlua.device_info?, qlua.failure?
function device:info() end

--- Bytes. On the CPU process is resident memory; on another device it is what this process holds there, nil
--- where the driver does not tell, and no peak is kept.
---@return { total: integer, free: integer, process: integer?, process_peak: integer? }?
---@return qlua.failure?
function device:memory() end

--- What the device reaches in a short run of its own: bytes read a second, float32 operations a second, on
--- CUDA bfloat16 operations a second of a large product. `bytes`: size of the buffer read.
---@param bytes? integer
---@return { read_bytes_per_second: number, flops_per_second: number?, matrix_flops_per_second: number? }?
---@return qlua.failure?
function device:ceiling(bytes) end

--- Lets process_peak start again from now; false where there is none or the kernel does not allow it.
---@return boolean
function device:reset_peak() end

--- Waits until everything queued has finished.
---@return boolean?, qlua.failure?
function device:sync() end

function device:close() end

---@class qlua.model
local model = {}

--- Logits of one row of token ids, or of several rows packed one after the other: [positions, vocab].
--- rows: "all" positions (default), the "last" one, or how many trailing ones for each row.
--- trace(name, tensor) sees every intermediate value ("embed", "layers.0.q", ...).
--- keep: returns what the model knows of the rows as well. after: rows so kept, which these go on from: row i
--- from row parents[i]; without parents all from the one that was kept, or each from its own. Kept rows cost
--- the memory of their tokens until they are closed; going on from them does not change them.
---@param rows integer[]|integer[][]
---@param options? { rows: "all"|"last"|integer[]|nil, trace: fun(name: string, value: qlua.tensor)?,
---  after: qlua.kvcache?, parents: integer[]?, keep: boolean? }
---@return qlua.tensor?, qlua.kvcache|qlua.failure|nil
function model:forward(rows, options) end

--- Keys and values of rows that a pass has seen; #kept is the number of rows.
---@class qlua.kvcache
local kvcache = {}

--- Tokens of each row, with those of the row it went on from.
---@return integer[]
function kvcache:tokens() end

function kvcache:close() end

--- Bytes in the model's own arena: weights, kv, activations, total; `peak` likewise; `resident` counts
--- weights that it shares with another model too.
---@return table
function model:memory() end

--- Lets the peaks start again from what is held now.
function model:reset_peak() end

--- Writes a Hugging Face folder, 4-bit weights in bitsandbytes' format.
---@param folder string
---@param options? { force: boolean?, shard_bytes: integer? }
---@return boolean?, qlua.failure?
function model:save(folder, options) end

--- Identity of the checkpoint's bytes.
---@return string?, qlua.failure?
function model:sha256() end

---@return string
function model:device_name() end

function model:close() end

--- Primitive of model:generate.
function model:_generate(rows, options) end

--- Primitive of model:quantize: policy(name, rows, columns) -> table or nil.
function model:_quantize(policy) end

--- Primitive of model:matrices.
function model:_matrices() end

--- Bytes of the activations of a forward pass, and of one cache slot.
---@param tokens integer
---@param longest integer  tokens of the longest row
---@param outputs integer  rows of logits
---@return integer activations, integer slot
function model:_expect(tokens, longest, outputs) end

--- A safetensors file or folder of shards.
---@class qlua.checkpoint
local checkpoint = {}

---@return string[]
function checkpoint:names() end

--- { dtype, shape, bytes, file } and, for a 4-bit weight, quantized ("nf4", "fp4") and decoded_shape.
---@param name string
---@return table?, qlua.failure?
function checkpoint:info(name) end

--- The tensor as float32 (float64 for float64 and wide integers); 4-bit weights decoded.
---@param name string
---@return qlua.tensor?, qlua.failure?
function checkpoint:tensor(name) end

--- Identity of the content.
---@return string?, qlua.failure?
function checkpoint:sha256() end

function checkpoint:close() end

--- What two models' logits say about each other: [n, vocab] or [vocab], one value a row.
---@class qlua.core.metrics
local metrics = {}

--- Jaccard of the k most likely tokens: one list of values for each k.
---@param a qlua.tensor
---@param b qlua.tensor
---@param ks integer[]
---@return number[][]
function metrics.jaccard(a, b, ks) end

--- Whether both have the same most likely token.
---@return boolean[]
function metrics.agreement(a, b) end

--- KL(a || b) in nats.
---@return number[]
function metrics.kl(a, b) end

--- q(target) - p(target).
---@param targets integer[]
---@return number[]
function metrics.delta_p(a, b, targets) end

--- Jaccard of the nuclei.
---@param top_p number
---@param temperature number?
---@return number[]
function metrics.nucleus(a, b, top_p, temperature) end

---@class qlua.nucleus_pair   the nuclei of the first [1] and the second [2] at one top_p and temperature
---@field overlap number      Jaccard of the two sets
---@field sizes integer[]     tokens
---@field masses number[]     of the second's nucleus in the first's distribution, and the reverse
---@field has_top boolean     whether the first's most likely token is in the second's nucleus

--- Both nuclei for every top_p at every temperature: [row][temperature][top_p].
---@param top_ps number[]
---@param temperatures number[]
---@return qlua.nucleus_pair[][][]
function metrics.nuclei(a, b, top_ps, temperatures) end

--- ln p(target), and whether the target is the most likely token.
---@param logits qlua.tensor
---@param targets integer[]
---@return number[], boolean[]
function metrics.loglik(logits, targets) end

--- In nats.
---@param logits qlua.tensor
---@return number[]
function metrics.entropy(logits) end

--- Resampling for qlua.stats.
---@class qlua.core.resample
local resample = {}

--- What each resample of the paired lists says: one list's mean or median, two lists' ratio of them, or four
--- lists' quotient of two such ratios. Whole questions are redrawn.
---@param kind "mean"|"median"
---@param lists number[][]
---@param resamples integer
---@param seed integer
---@return number[]
function resample.bootstrap(kind, lists, resamples, seed) end

--- How many assignments of signs bring the sum as far from 0 as it is, of how many that were tried, and
--- whether those are all there are (up to 20 values).
---@param values number[]
---@param draws integer
---@param seed integer
---@return integer extreme, integer total, boolean exact
function resample.sign_flips(values, draws, seed) end

---@class qlua.core
---@field version string
---@field metrics qlua.core.metrics
---@field resample qlua.core.resample
local core = {}

--- The folder or file that a --model argument means: a path, or an id in the Hugging Face cache.
---@param name string
---@return string?, qlua.failure?
function core.resolve(name) end

--- The Hugging Face cache folder in force.
---@return string?, qlua.failure?
function core.hub_cache() end

--- The method table of a type, which the library adds to.
---@param type "tensor"|"device"|"model"|"checkpoint"
---@return table
function core.methods(type) end

--- What there is of CUDA: number of devices, file of the plug-in and whether it could be loaded, and what is
--- missing where count is 0.
---@return { count: integer, plugin: string?, loaded: boolean, missing: qlua.failure? }
function core.cuda() end

--- Primitives of qlua.tensor, qlua.device, device:load, qlua.load_synthetic and qlua.open_checkpoint.
function core.tensor(values) end
function core.device(name, options) end
function core.load(dev, folder, options, policy) end
function core.outline(dev, source, options, policy) end
function core.load_random(dev, shape, dtype, seed, policy) end
function core.open_checkpoint(path) end

---@class qlua.sys
local sys = {}

--- Monotonic seconds.
---@return number
function sys.time() end

--- Seconds since 1970, with their fraction; the clock may be set.
---@return number
function sys.now() end

---@param fd integer
---@return boolean
function sys.isatty(fd) end

--- Width of the terminal, or nil.
---@param fd integer
---@return integer?
function sys.columns(fd) end

--- Renames in one step, replacing `to`.
---@param from string
---@param to string
---@return boolean?, qlua.failure?
function sys.rename(from, to) end

--- Puts the bytes of a file, or the names of a folder, on the disk.
---@param path string
---@return boolean?, qlua.failure?
function sys.fsync(path) end

---@return integer
function sys.pid() end

--- Resident bytes of the process, and their peak.
---@return integer, integer
function sys.memory() end

---@param text string
---@return string  64 hexadecimal digits
function sys.sha256(text) end

---@class qlua.store.module
local store_module = {}

--- Opens the results store `path`, made when it is not there: its folder must be. ":memory:" ends with the
--- process. wait: seconds to wait for another process that is writing. Misuse of a store's functions raises.
---@param path string
---@param options? { readonly: boolean?, wait: number? }  false and 10
---@return qlua.store?, qlua.failure?
function store_module.open(path, options) end

--- What runs have computed, in one SQLite file. What was written is there, whole, once the call has returned.
---@class qlua.store
local store = {}

---@class qlua.store_run
---@field id integer
---@field name string
---@field started number        Unix time, as finished
---@field finished number?
---@field status "running"|"finished"|"interrupted"|"failed"|"killed"  killed: its process is gone
---@field pid integer
---@field alive boolean         that process still runs
---@field command string?       JSON; this and the two below only from store:run
---@field script_sha256 string?
---@field document string?      JSON

--- Begins a run of this process.
---@param run { name: string, started: number, command: string, script_sha256: string? }  command: JSON
---@return integer? id, qlua.failure?
function store:begin_run(run) end

---@param run integer
---@param result { finished: number, status: "finished"|"interrupted"|"failed", document: string? }
---@return boolean?, qlua.failure?
function store:end_run(run, result) end

--- Newest first.
---@param key? string  only runs whose result has rows of this set
---@return qlua.store_run[]?, qlua.failure?
function store:runs(key) end

---@param run integer
---@return qlua.store_run?, qlua.failure?
function store:run(run) end

--- Names the set of rows that depend on `inputs`; nothing changes when it is there. key: 64 hex digits.
---@param key string
---@param name string
---@param inputs string  JSON
---@return boolean?, qlua.failure?
function store:set(key, name, inputs) end

--- Newest first.
---@param name string
---@return { key: string, inputs: string, created: number }[]?, qlua.failure?
function store:sets(name) end

--- The rows of a set by their ids, and how many there are.
---@param key string
---@return table<string, string>?, integer|qlua.failure|nil
function store:rows(key) end

--- Puts rows { id, value } that `run` has computed, all or none; one whose id is there is replaced.
---@param run integer
---@param key string
---@param rows string[][]
---@return boolean?, qlua.failure?
function store:put(run, key, rows) end

--- Records which rows of a set the result of a run consists of, in this order, in place of an earlier record.
---@param run integer
---@param key string
---@param ids string[]
---@return boolean?, qlua.failure?
function store:use(run, key, ids) end

--- Those rows { id, value }, in that order.
---@param run integer
---@param key string
---@return string[][]?, qlua.failure?
function store:run_rows(run, key) end

--- Digest of a file's bytes: 64 hexadecimal digits. Remembered, so that only a file that may have changed is
--- read again.
---@param path string
---@return string?, qlua.failure?
function store:sha256(path) end

---@return string
function store:path() end

--- Idempotent.
function store:close() end

---@class qlua.probe
local probe = {}

--- What the processor can do at most: reading memory far larger than its caches, and float32 multiply-adds
--- on registers (each counts as two), all threads at once; the best of `rounds`. bytes (default 256 MiB):
--- size of the buffer read.
---@param options? { threads: integer?, bytes: integer?, rounds: integer? }
---@return { isa: string, threads: integer, read_bytes_per_second: number, flops_per_second: number }?
---@return qlua.failure?
function probe.cpu(options) end

---@class qlua.tokenizer
local tokenizer = {}

--- Token ids of valid UTF-8. bos (default true): the post-processor's tokens; special (default false):
--- special tokens written in the text are recognised.
---@param text string
---@param options? { bos: boolean?, special: boolean? }
---@return integer[]?, qlua.failure?
function tokenizer:encode(text, options) end

---@param ids integer[]
---@param options? { skip_special: boolean? }
---@return string
function tokenizer:decode(ids, options) end

--- A decoder that takes one id at a time and holds back incomplete characters.
---@param options? { skip_special: boolean? }
---@return qlua.token_stream
function tokenizer:stream(options) end

--- Id of a token as the file writes it, or nil.
---@param token string
---@return integer?
function tokenizer:id(token) end

--- Token of an id as the file writes it, or nil.
---@param id integer
---@return string?
function tokenizer:token(id) end

---@param id integer
---@return boolean
function tokenizer:is_special(id) end

--- Ids by role: { bos, eos, unk, pad }; a role without a token is absent.
---@return table<string, integer>
function tokenizer:special() end

--- One past the largest id.
---@return integer
function tokenizer:vocab_size() end

function tokenizer:close() end

---@class qlua.token_stream
local stream = {}

---@param id integer
---@return string  complete characters
function stream:push(id) end

---@return string  what was held back
function stream:flush() end

function stream:close() end

---@class qlua.tokenizer.module
local tokenizers = {}

---@param path string  folder or tokenizer.json
---@return qlua.tokenizer?, qlua.failure?
function tokenizers.load(path) end

---@class qlua.json
---@field null lightuserdata
local json = {}

---@param text string
---@param options? table
---@return any, qlua.failure?
function json.decode(text, options) end

---@param value any
---@param options? table
---@return string
function json.encode(value, options) end

--- Marks a table as an array, so that an empty one encodes as [].
---@param list table?
---@return table
function json.array(list) end

---@param value any
---@return boolean
function json.is_array(value) end

---@class qlua.interrupt
local interrupt = {}

--- Whether Ctrl-C was pressed and not yet answered.
---@return boolean
function interrupt.pending() end

--- Forgets it.
function interrupt.clear() end
