--- Perplexity of a text under two models, and how far their distributions lie apart, with the statistics of
--- llama.cpp's `perplexity` tool.
---
--- The text's tokens, the beginning-of-sequence token in front where the tokenizer adds one, are cut into
--- windows of n tokens that do not overlap; what is left at the end is not used. In every window the first
--- token is replaced by that token (where there is one), the first half is context only, and the logits at
--- positions n/2 .. n-2 (from 0) are scored on the tokens after them: n - 1 - n/2 predictions a window.

local _ENV <const> = require "qlua.strict"

local batches = require "qlua.batches"
local core = require "qlua.core"
local failure = require "qlua.failure"
local stats = require "qlua.stats"
local tables = require "qlua.table"

local perplexity = {}

---@class qlua.perplexity_windows
---@field [integer] { ids: integer[], targets: integer[] }  what is fed; what its last logits are scored on
---@field context integer
---@field bos integer?      at every window's start
---@field tokens integer    of the whole text
---@field all integer       windows in the whole text
---@field stopped boolean?  the run ended before the last of those that it was to score

--- The windows of a text's token ids (without the beginning-of-sequence token).
---@param ids integer[]
---@param options { context: integer, bos: integer?, limit: integer? }
---@return qlua.perplexity_windows?, qlua.failure?
function perplexity.windows(ids, options)
  local n, bos = options.context, options.bos
  if n < 4 then error("a window has at least 4 tokens", 2) end
  local shift = bos and 1 or 0
  local tokens = #ids + shift
  local windows = { context = n, bos = bos, tokens = tokens, all = tokens // n }
  if windows.all == 0 then
    return nil, failure("format", ("the text has %d tokens, which is less than one window of %d"):format(
      tokens, n), "take a longer text or a smaller --context")
  end
  local first = n // 2
  for w = 1, math.min(windows.all, options.limit or windows.all) do
    -- ids[from + j] is the window's token at position j, from 0
    local from = (w - 1) * n + 1 - shift
    -- nothing is predicted after the last token, so it is a target only
    local fed = { bos or ids[from] }
    table.move(ids, from + 1, from + n - 2, 2, fed)
    windows[w] = { ids = fed, targets = table.move(ids, from + first + 1, from + n - 1, 1, {}) }
  end
  return windows
end

---@class qlua.perplexity_values  one value a prediction
---@field reference number[]  negative log-likelihood in nats under the full model
---@field test number[]       likewise under the quantized one
---@field kl number[]         KL(full || quantized) in nats over the whole vocabulary
---@field delta_p number[]    q(next token) - p(next token)
---@field same number[]       1 where both have the same most likely token

--- The values of one window, which is number `w`: its logits are in memory, and no others.
local function measure(reference, test, window, w)
  local metrics = core.metrics
  local options = { rows = { #window.targets } }
  local pair = { reference, test }
  -- the models take turns in going first, so that neither always finds the other's leftovers in the caches
  if w % 2 == 0 then pair = { test, reference } end
  local one <close>, err = pair[1]:forward({ window.ids }, options)
  if not one then return nil, err end
  local other <close>, why = pair[2]:forward({ window.ids }, options)
  if not other then return nil, why end
  local a, b = one, other
  if w % 2 == 0 then a, b = other, one end
  local values = { reference = metrics.loglik(a, window.targets), test = metrics.loglik(b, window.targets),
    kl = metrics.kl(a, b), delta_p = metrics.delta_p(a, b, window.targets), same = metrics.agreement(a, b) }
  for i = 1, #window.targets do
    values.reference[i], values.test[i] = -values.reference[i], -values.test[i]
    values.same[i] = values.same[i] and 1 or 0
  end
  return values
end

--- Runs every window through both models, one after the other. Windows that a stopped run has not finished
--- are taken off.
---@param reference qlua.model
---@param test qlua.model
---@param windows qlua.perplexity_windows
---@param map? function  run:map of qlua.experiment, less its name; default: all in memory
---@return qlua.perplexity_values?, qlua.failure?
function perplexity.run(reference, test, windows, map)
  local rows, err = (map or batches.map)(windows, { batch = 1 }, function(list, w)
    local values, why = measure(reference, test, list[1], w)
    return values and { values }, why
  end)
  if not rows then return nil, err end
  windows.stopped = #rows < #windows
  for i = #windows, #rows + 1, -1 do windows[i] = nil end
  local values = { reference = {}, test = {}, kl = {}, delta_p = {}, same = {} }
  for _, row in ipairs(rows) do
    for name, list in pairs(row) do table.move(list, 1, #list, #values[name] + 1, values[name]) end
  end
  return values
end

--- exp of a mean with the standard error that follows from the mean's.
local function exponential(values)
  local value = math.exp(stats.mean(values))
  return { value = value, stderr = value * stats.stderr(values) }
end

local function mean(values)
  return { value = stats.mean(values), stderr = stats.stderr(values) }
end

local KL_PERCENTILES <const> = { 0.5, 0.9, 0.95, 0.99, 0.999, 1 }
local DELTA_PERCENTILES <const> = { 0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1 }

---@class qlua.perplexity_summary
---@field n integer                                  predictions
---@field reference { value: number, stderr: number } perplexity
---@field test { value: number, stderr: number }
---@field log_ratio { value: number, stderr: number } ln(PPL_quantized / PPL_full), sqrt(s_a^2+s_b^2-2cov)
---@field ratio { value: number, stderr: number }
---@field correlation number                         of the two models' log-likelihoods
---@field kl { value: number, stderr: number }
---@field kl_percentiles { share: number, value: number }[]
---@field delta_p { value: number, stderr: number }
---@field delta_p_rms { value: number, stderr: number }
---@field delta_p_percentiles { share: number, value: number }[]
---@field same_top { value: number, stderr: number }

--- Figures of a run; needs two predictions at least. Percentiles are linear at f*(n-1).
---@param values qlua.perplexity_values
---@return qlua.perplexity_summary
function perplexity.summary(values)
  local a, b, n = values.reference, values.test, #values.reference
  local s = { n = n, reference = exponential(a), test = exponential(b), kl = mean(values.kl),
    kl_percentiles = stats.percentiles(values.kl, KL_PERCENTILES), delta_p = mean(values.delta_p),
    delta_p_percentiles = stats.percentiles(values.delta_p, DELTA_PERCENTILES), same_top = mean(values.same) }
  local var_a, var_b, both = stats.covariance(a, a), stats.covariance(b, b), stats.covariance(a, b)
  s.log_ratio = { value = stats.mean(b) - stats.mean(a),
    stderr = math.sqrt(math.max(0, var_a + var_b - 2 * both) / n) }
  s.ratio = { value = math.exp(s.log_ratio.value), stderr = math.exp(s.log_ratio.value) * s.log_ratio.stderr }
  s.correlation = var_a > 0 and var_b > 0 and both / math.sqrt(var_a * var_b) or nil
  local squares = {}
  for i, d in ipairs(values.delta_p) do squares[i] = d * d end
  local rms = math.sqrt(stats.mean(squares))
  -- the error of a root follows from the mean's under it: d sqrt(x) = dx / (2 sqrt(x))
  s.delta_p_rms = { value = rms, stderr = rms > 0 and stats.stderr(squares) / (2 * rms) or 0 }
  return s
end

local function share_name(share)
  if share == 0 then return "minimum" end
  if share == 0.5 then return "median" end
  if share == 1 then return "maximum" end
  return ("%g %%"):format(100 * share)
end

--- How the text was cut, in words.
---@param windows qlua.perplexity_windows
---@return string
function perplexity.protocol(windows)
  local n = windows.context
  local left_out = windows.all > #windows and (" of %d (%s)"):format(windows.all,
    windows.stopped and "interrupted" or "--limit") or ""
  return ("%d windows%s of %d tokens, stride %d, %s; scored: the last %d tokens of each, after %d of context")
    :format(#windows, left_out, n, n, windows.bos and ("token %d (BOS) put at each start"):format(windows.bos)
      or "no BOS", n - 1 - n // 2, n // 2 + 1)
end

--- The aligned table of a summary.
---@param s qlua.perplexity_summary
---@param labels string[]  of the two models
---@return qlua.table
function perplexity.table(s, labels)
  local t = tables.new { "measure", { "value", align = "right" }, { "standard error", align = "right" } }
  local function row(name, figure, format, scale)
    scale = scale or 1
    t:add(name, format:format(scale * figure.value),
      figure.stderr and format:format(scale * figure.stderr) or "-")
  end
  row("perplexity, " .. labels[1], s.reference, "%.4f")
  row("perplexity, " .. labels[2], s.test, "%.4f")
  row("ratio", s.ratio, "%.6f")
  row(("ln(PPL_%s / PPL_%s)"):format(labels[2], labels[1]), s.log_ratio, "%.6f")
  if s.correlation then row("correlation of the two log-likelihoods", { value = s.correlation }, "%.6f") end
  t:rule()
  row(("KL(%s || %s), nats, mean"):format(labels[1], labels[2]), s.kl, "%.6f")
  for _, p in ipairs(s.kl_percentiles) do row("  " .. share_name(p.share), p, "%.6f") end
  t:rule()
  row("change of p(next token), points, mean", s.delta_p, "%.4f", 100)
  row("  root mean square", s.delta_p_rms, "%.4f", 100)
  for _, p in ipairs(s.delta_p_percentiles) do row("  " .. share_name(p.share), p, "%.4f", 100) end
  t:rule()
  row("same most likely token, %", s.same_top, "%.3f", 100)
  return t
end

return perplexity
