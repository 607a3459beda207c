--- Flags of the scripts, as lm-evaluation-harness names them.
---
---   local opts = cli.parse {
---     name = "jaccard.lua", summary = "How far the most likely tokens of two models agree.",
---     options = {
---       "model", "tasks", "limit",                                     -- from the shared list
---       { "seed", default = 7 },                                       -- shared, with another default
---       { "k", kind = "integers", default = { 1, 3, 5 }, min = 1, help = "sizes of the token sets" },
---     },
---   }
---   print(opts.model, opts.k[1])
---
--- `-` and `_` inside a flag's name are alike. A mistake ends the script with one line on stderr and code 1.

local _ENV <const> = require "qlua.strict"

local argparse = require "argparse"

local cli = {}

---@class qlua.option
---@field [1] string        name, with underscores; the key in the result
---@field kind? "string"|"integer"|"number"|"integers"|"numbers"|"strings"|"flag"
---@field help? string
---@field default? any      already of the kind; shown by --help
---@field min? number       lowest value
---@field max? number       highest value
---@field above? number     the value must be greater than this
---@field choices? string[]
---@field short? string     one letter
---@field metavar? string   what stands for the value in --help
---@field many? boolean     may be given again; the result is a list
---@field optional_value? boolean  the value may be left out, and then reads as true
---@field positional? boolean
---@field required? boolean
---@field check? fun(value: any): string?  returns what is wrong with a value

---@type table<string, qlua.option>
local SHARED <const> = {
  model = { "model", short = "M", help = "folder of a checkpoint, or an id in the Hugging Face cache" },
  tasks = { "tasks", short = "t", kind = "strings", metavar = "FILE,...",
    help = "question files, CSV or JSONL" },
  limit = {
    "limit", short = "L", kind = "number", above = 0, metavar = "N",
    help = "only the first N questions; below 1, that share of them",
  },
  num_fewshot = { "num_fewshot", short = "f", kind = "integer", min = 0, max = 1000, default = 0,
    metavar = "N", help = "answered examples in front of each question" },
  batch_size = { "batch_size", short = "b", kind = "integer", min = 1, max = 4096, default = 8, metavar = "N",
    help = "questions in one forward pass" },
  device = { "device", default = "auto", help = "auto, cpu, cuda or cuda:N" },
  numerics = { "numerics", default = "fast", choices = { "fast", "invariant" },
    help = "CUDA's kernels: whether a row's bits may depend on its batch, which the CPU's never do" },
  dtype = { "dtype", default = "auto", choices = { "auto", "float32", "float16", "bfloat16" },
    help = "type of the full model's weights" },
  seed = { "seed", kind = "integer", default = 1, metavar = "N", help = "seed of every random choice" },
  threads = { "threads", kind = "integer", min = 0, max = 1024, default = 0, metavar = "N",
    help = "threads of the CPU backend; 0 takes all cores" },
  max_context = { "max_context", kind = "integer", min = 1, metavar = "N",
    help = "longest text in tokens; default is the model's own" },
  output_path = { "output_path", short = "o", metavar = "FOLDER", default = "qlua-results",
    help = "where results are kept: the store that a stopped run goes on from, and result files" },
  output_format = { "output_format", kind = "strings", metavar = "FORMAT,...", choices = { "csv" },
    help = "every table as a file too" },
  fresh = { "fresh", kind = "flag", help = "compute everything again, whatever is in the store" },
  no_output = { "no_output", kind = "flag", help = "write nothing, and reuse nothing" },
  log_samples = { "log_samples", short = "s", kind = "flag", help = "write one line per question as well" },
  apply_chat_template = { "apply_chat_template", optional_value = true, metavar = "NAME",
    help = "put questions into the model's chat template (of that name)" },
  dry_run = { "dry_run", kind = "flag",
    help = "only say what memory the run would need; nothing is loaded; exit code 1 where it does not fit" },
  metric = { "metric", many = true, metavar = "FILE", help = "a metric of yours in a Lua file" },
}

local KINDS <const> = {
  string = "VALUE", integer = "N", number = "X", integers = "N,...", numbers = "X,...",
  strings = "VALUE,...", flag = "",
}

local COMPLETION_HELP <const> = "print completion code for a shell and exit: bash, zsh, fish"

local function canonical(name) return (name:gsub("-", "_")) end

--- The options of a spec with everything filled in; mistakes in the spec itself raise.
local function completed(spec)
  local options = {}
  for i, given in ipairs(spec.options or {}) do
    local name = type(given) == "string" and given or given[1]
    if type(name) ~= "string" then error(("option %d has no name"):format(i), 3) end
    local shared = SHARED[name]
    if type(given) == "string" and not shared then error(("no shared option '%s'"):format(name), 3) end
    local option = {}
    for key, value in pairs(shared or {}) do option[key] = value end
    if type(given) == "table" then
      for key, value in pairs(given) do option[key] = value end
    end
    option[1] = canonical(name)
    option.kind = option.kind or "string"
    if not KINDS[option.kind] then error(("option %s: no kind '%s'"):format(name, option.kind), 3) end
    options[i] = option
  end
  return options
end

local function shown(value)
  if type(value) ~= "table" then return tostring(value) end
  local parts = {}
  for i, part in ipairs(value) do parts[i] = tostring(part) end
  return table.concat(parts, ",")
end

local function help_line(option)
  local help = option.help or ""
  if option.choices then help = ("%s: %s"):format(help, table.concat(option.choices, ", ")) end
  local default = option.default
  if default ~= nil and default ~= false and shown(default) ~= "" then
    help = ("%s (default: %s)"):format(help, shown(default))
  end
  if option.many then help = help .. " (may be repeated)" end
  return help
end

local function flag_names(option)
  return (option.short and "-" .. option.short .. " " or "") .. "--" .. option[1]
end

local function build(spec, options)
  local parser = argparse(spec.name, spec.summary, spec.epilog)
  parser:add_help(false)
  for _, option in ipairs(options) do
    local metavar = option.metavar or KINDS[option.kind]
    if option.positional then
      local argument = parser:argument(option[1], help_line(option))
      argument:args(option.many and (option.required and "+" or "*") or (option.required and "1" or "?"))
    elseif option.kind == "flag" then
      parser:flag(flag_names(option), help_line(option)):target(option[1])
    else
      local element = parser:option(flag_names(option), help_line(option)):target(option[1]):argname(metavar)
      element:args(option.optional_value and "?" or "1"):count(option.many and "*" or "?")
    end
  end
  parser:flag("-h --help", "show this text and exit")
  parser:option("--completion", COMPLETION_HELP):argname "SHELL"
  return parser
end

local function wrapped(text, width, indent)
  local lines, line = {}, ""
  for word in text:gmatch("%S+") do
    if line ~= "" and #line + 1 + #word > width then
      lines[#lines + 1], line = line, word
    else
      line = line == "" and word or line .. " " .. word
    end
  end
  lines[#lines + 1] = line
  return table.concat(lines, "\n" .. (" "):rep(indent))
end

--- One flag a line, names and descriptions in two columns, at most 100 columns wide.
local function help_text(spec, options)
  local rows, usage = {}, { "Usage: " .. spec.name .. " [flags]" }
  for _, option in ipairs(options) do
    local metavar = option.metavar or KINDS[option.kind]
    if option.optional_value then metavar = "[" .. metavar .. "]" end
    if option.positional then
      local name = option[1] .. (option.many and " ..." or "")
      usage[#usage + 1] = option.required and name or "[" .. name .. "]"
      rows[#rows + 1] = { "  " .. option[1], help_line(option) }
    else
      local short = option.short and ("-%s, "):format(option.short) or "    "
      local gap = metavar == "" and "" or " "
      rows[#rows + 1] = { ("  %s--%s%s%s"):format(short, option[1], gap, metavar), help_line(option) }
    end
  end
  rows[#rows + 1] = { "  -h, --help", "show this text and exit" }
  rows[#rows + 1] = { "      --completion SHELL", COMPLETION_HELP }
  local left = 0
  for _, row in ipairs(rows) do left = math.max(left, #row[1] + 2) end
  local lines = { table.concat(usage, " "), "" }
  if spec.summary then lines = { lines[1], "", wrapped(spec.summary, 100, 0), "" } end
  for _, row in ipairs(rows) do
    lines[#lines + 1] = row[1] .. (" "):rep(left - #row[1]) .. wrapped(row[2], 100 - left, left)
  end
  if spec.epilog then lines[#lines + 1] = "\n" .. spec.epilog end
  return table.concat(lines, "\n") .. "\n"
end

--- Distance in insertions, deletions, replacements and swaps of neighbours (Damerau, restricted).
local function distance(a, b)
  local rows = { [0] = {} }
  for j = 0, #b do rows[0][j] = j end
  for i = 1, #a do
    rows[i] = { [0] = i }
    for j = 1, #b do
      local cost = a:byte(i) == b:byte(j) and 0 or 1
      local best = math.min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + cost)
      if i > 1 and j > 1 and a:byte(i) == b:byte(j - 1) and a:byte(i - 1) == b:byte(j) then
        best = math.min(best, rows[i - 2][j - 2] + 1)
      end
      rows[i][j] = best
    end
  end
  return rows[#a][#b]
end

--- The candidate that a mistyped word most likely meant; nil when none is near.
---@param word string
---@param candidates string[]
---@return string?
function cli.nearest(word, candidates)
  local best, best_distance = nil, (#word < 3 and 0 or math.max(2, #word // 3)) + 1
  for _, candidate in ipairs(candidates) do
    local d = distance(word:sub(1, 64), candidate)
    if #word >= 2 and candidate:sub(1, #word) == word then d = 0 end
    if d < best_distance then best, best_distance = candidate, d end
  end
  return best
end

local function range_text(option)
  local what = option.kind:find("^integer") and "a whole number" or "a number"
  if option.above then what = ("%s above %s"):format(what, option.above) end
  if option.min and option.max then return ("%s from %s to %s"):format(what, option.min, option.max) end
  if option.min then return ("%s of at least %s"):format(what, option.min) end
  if option.max then return ("%s of at most %s"):format(what, option.max) end
  return what
end

local function convert_number(option, text)
  local value = tonumber(text)
  if option.kind:find("^integer") then
    -- "1e3" and "0x10" are no way to write a count; a float that happens to be whole is refused too.
    value = text:find("^[+-]?%d+$") and math.tointeger(value) or nil
  elseif value and (value ~= value or value == math.huge or value == -math.huge) then
    value = nil
  end
  if not value or (option.min and value < option.min) or (option.max and value > option.max)
    or (option.above and value <= option.above) then
    return nil, ("must be %s, not '%s'"):format(range_text(option), text)
  end
  return value
end

local function split(text)
  local parts = {}
  for part in (text .. ","):gmatch("%s*(.-)%s*,") do parts[#parts + 1] = part end
  return parts
end

--- One of an option's choices; a text that is none is nil, and what is wrong with it.
local function chosen(option, text)
  for _, choice in ipairs(option.choices) do
    if text == choice then return text end
  end
  local near = cli.nearest(text, option.choices)
  return nil, ("must be one of %s, not '%s'%s"):format(table.concat(option.choices, ", "), text,
    near and (", did you mean %s?"):format(near) or "")
end

local function convert_one(option, text)
  if option.kind == "integer" or option.kind == "number" then return convert_number(option, text) end
  if option.kind == "integers" or option.kind == "numbers" or option.kind == "strings" then
    local values = {}
    for i, part in ipairs(split(text)) do
      local value, why = part, nil
      if option.kind ~= "strings" then value, why = convert_number(option, part) end
      if value == "" then return nil, ("has an empty part in '%s'"):format(text) end
      if value and option.choices then value, why = chosen(option, value) end
      if not value then return nil, why end
      values[i] = value
    end
    return values
  end
  if option.choices then return chosen(option, text) end
  if text == "" then return nil, "must not be empty" end
  return text
end

--- The value of one option from what argparse collected (a text, a list of texts, true, or nil).
local function convert(option, raw)
  if option.kind == "flag" then return raw == true end
  if raw == nil or (type(raw) == "table" and #raw == 0 and not option.optional_value) then
    if option.many and option.default == nil then return {} end
    return option.default
  end
  if option.optional_value then
    if type(raw) == "table" then raw = raw[1] end
    if raw == nil then return true end
  end
  local value, why
  if option.many then
    value = {}
    for i, text in ipairs(raw) do
      value[i], why = convert_one(option, text)
      if value[i] == nil then return nil, why end
    end
  else
    value, why = convert_one(option, raw)
    if value == nil then return nil, why end
  end
  local wrong = option.check and option.check(value)
  if wrong then return nil, wrong end
  return value
end

--- Flag names with underscores, whichever way the user wrote them; everything after "--" stays as it is.
--- A negative number after a flag is joined to it, for argparse would take it for another flag.
local function normalised(args)
  local result, verbatim = {}, false
  for i, argument in ipairs(args) do
    if argument == "--" then verbatim = true end
    local name, rest = argument:match("^%-%-([%a][%w_-]*)(.*)$")
    if argument:find("^%-%.?%d") and not verbatim and (args[i - 1] or ""):find("^%-%-%a[^=]*$") then
      result[#result] = result[#result] .. "=" .. argument
    else
      result[#result + 1] = (name and not verbatim) and "--" .. canonical(name) .. rest or argument
    end
  end
  return result
end

local function wants(args, ...)
  for _, argument in ipairs(args) do
    if argument == "--" then return false end
    for _, name in ipairs { ... } do
      if argument == name then return true end
    end
  end
  return false
end

--- The first argument that is neither a flag nor a flag's value.
local function stray(args, options)
  local takes_value = { ["--completion"] = true }
  for _, option in ipairs(options) do
    if option.kind ~= "flag" and not option.optional_value then
      takes_value["--" .. option[1]] = true
      if option.short then takes_value["-" .. option.short] = true end
    end
  end
  local skip = false
  for _, argument in ipairs(args) do
    if not skip and not argument:find("^%-") then return argument end
    skip = not skip and takes_value[argument]
  end
  return "-"
end

--- One line out of argparse's message, with our own guess at what was meant.
local function one_line(message, options, args)
  if message == "too many arguments" then
    return ("unexpected argument '%s' (see --help)"):format(stray(args, options))
  end
  local unknown = message:match("^unknown option '(.-)'")
  if not unknown then return (message:gsub("\n.*", ""):gsub("^option '(%-.-)'", "%1")) end
  local names = { "help", "completion" }
  for _, option in ipairs(options) do
    if not option.positional then names[#names + 1] = option[1] end
  end
  local near = cli.nearest(unknown:gsub("^%-+", ""), names)
  local advice = near and (", did you mean --%s?"):format(near) or " (see --help)"
  return ("unknown flag %s%s"):format(unknown, advice)
end

--- As cli.parse, but returns instead of exiting: the options, or nil, the text to print and the exit code.
---@param spec table
---@param args string[]
---@return table<string, any>? options, string? text, integer? exit_code
function cli.try(spec, args)
  local options = completed(spec)
  local parser = build(spec, options)
  args = normalised(args)
  if wants(args, "-h", "--help") then return nil, help_text(spec, options), 0 end
  local function fail(message) return nil, ("%s: %s\n"):format(spec.name, message), 1 end

  local parsed, raw = parser:pparse(args)
  if not parsed then return fail(one_line(raw, options, args)) end
  if raw.completion then
    local writers = {
      bash = parser.get_bash_complete, zsh = parser.get_zsh_complete, fish = parser.get_fish_complete,
    }
    local writer = writers[raw.completion]
    if not writer then
      return fail(("--completion must be bash, zsh or fish, not '%s'"):format(raw.completion))
    end
    return nil, writer(parser), 0
  end
  local values = {}
  for _, option in ipairs(options) do
    local value, why = convert(option, raw[option[1]])
    local shown_name = option.positional and option[1] or "--" .. option[1]
    if why then return fail(("%s %s"):format(shown_name, why)) end
    if value == nil and option.required then return fail(shown_name .. " is required") end
    values[option[1]] = value
  end
  return values
end

--- Ends the script; all that the library ends scripts with comes here. qlua.study puts its own in place.
---@param code integer
---@param message? string  of a failure
function cli.exit(code, message) -- luacheck: no unused args
  os.exit(code, true)
end

--- The options of this run as a plain table; prints and exits on --help, --completion and on mistakes.
---@param spec { name: string, summary: string, options: (string|qlua.option)[], epilog: string? }
---@param args? string[] default: the script's own
---@return table<string, any>
function cli.parse(spec, args)
  local values, text, code = cli.try(spec, args or _G.arg or {})
  if values then return values end
  if code == 0 then io.stdout:write(text) else io.stderr:write(text) end
  cli.exit(code, text:match "[^\n]*")
end

--- Ends the script as a failed step must end: one line on stderr, exit code 1.
---@param name string
---@param err any a failure or a text
function cli.fail(name, err)
  local message = tostring(err):gsub("%s*\n%s*", " ")
  io.stderr:write(name, ": ", message, "\n")
  cli.exit(1, message)
end

return cli
