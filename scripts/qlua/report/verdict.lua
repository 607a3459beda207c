--- Should the model be quantized? The answer by a rule that stands beside it on the page, from documents of
--- runs; and the figures that the answer rests on.

local _ENV <const> = require "qlua.strict"

local stats = require "qlua.stats"
local tables = require "qlua.table"

local verdict = {}

--- Four choices: what a model that knows nothing gets right.
verdict.CHANCE = 0.25
--- Points of accuracy that a reader is taken to be ready to lose.
verdict.MARGIN = 2

local LEVEL <const> = 0.05

--- "-8.9", with the true minus sign.
---@param share number
---@param digits? integer
function verdict.points(share, digits)
  local text = ("%+.*f"):gsub("%*", tostring(digits or 1)):format(100 * share)
  if tonumber(text) == 0 then text = text:sub(2) end
  return (text:gsub("^%-", "−"))
end

local function sections(docs, kind)
  local list = {}
  for _, doc in ipairs(docs) do
    for _, section in ipairs(doc.sections or {}) do
      if section.kind == kind then list[#list + 1] = section end
    end
  end
  return list
end

verdict.sections = sections

local NAMES <const> = { multiple_choice = "by log-likelihood", generate_until = "in written answers" }

local function add_flips(sum, flips)
  for key, value in pairs(flips) do
    if math.type(value) == "integer" then sum[key] = (sum[key] or 0) + value end
  end
end

local function share_of(correct, n)
  return { n = n, correct = correct, accuracy = correct / n, wilson = { stats.wilson(correct, n) } }
end

--- All tasks asked in one way as one: { kind, name, tasks, flips, n, full, quantized, difference, low, high,
--- p, control? }. A task that several runs asked counts once, as the last of them answered.
local function pools(docs)
  local by_task, order, post = {}, {}, {}
  for _, section in ipairs(sections(docs, "mmlu")) do
    for _, o in ipairs(section.outcomes) do
      if o.comparison then
        if not by_task[o.task] then order[#order + 1] = o.task end
        by_task[o.task], post[o.task] = o, section.protocol == "post"
      end
    end
  end
  local list, by_kind = {}, {}
  for _, task in ipairs(order) do
    local o = by_task[task]
    local pool = by_kind[o.output_type]
    if not pool then
      pool = { kind = o.output_type, name = NAMES[o.output_type] or o.output_type, tasks = {}, flips = {},
        again = {}, controlled = 0 }
      by_kind[o.output_type], list[#list + 1] = pool, pool
    end
    pool.tasks[#pool.tasks + 1], pool.post = o, pool.post or post[task]
    add_flips(pool.flips, o.comparison.flips)
    if o.control then
      pool.controlled = pool.controlled + 1
      add_flips(pool.again, o.control.flips)
    end
  end
  return list
end

--- Fills a pool's figures in; `p` is left to Holm's correction over all pools.
local function complete(pool)
  local f = pool.flips
  pool.n = f.n
  pool.full, pool.quantized = share_of(f.right_a, f.n), share_of(f.right_b, f.n)
  pool.difference = (f.wrong_right - f.right_wrong) / f.n
  pool.low, pool.high = stats.tango(f.right_wrong, f.wrong_right, f.n)
  pool.mcnemar_p = stats.mcnemar(f.right_wrong, f.wrong_right)
  if pool.controlled > 0 then
    local again = pool.again
    pool.control = { n = again.n, changed = again.right_wrong + again.wrong_right + again.other_wrong,
      difference = (again.wrong_right - again.right_wrong) / again.n,
      p = stats.mcnemar(again.right_wrong, again.wrong_right) }
  end
end

--- What the answers show, for a reader who can lose `margin` points.
local function judge(pool, p, margin)
  pool.p = p
  local noise = pool.control and math.abs(pool.control.difference) or 0
  pool.noisy = pool.control ~= nil and pool.control.p < LEVEL
  pool.guessing = pool.full.wilson[1] <= verdict.CHANCE
  local shown = p < LEVEL and math.abs(pool.difference) > noise and not pool.noisy
  pool.lost, pool.gained = shown and pool.difference < 0, shown and pool.difference > 0
  pool.ruled_out = 100 * pool.low >= -margin
  pool.within = pool.ruled_out and not pool.guessing and not pool.noisy
  pool.needed = stats.questions_needed(pool.flips.right_wrong / pool.n, pool.flips.wrong_right / pool.n)
end

local function quality(docs, margin)
  local list, p = pools(docs), {}
  for i, pool in ipairs(list) do
    complete(pool)
    p[i] = pool.mcnemar_p
  end
  local adjusted = stats.holm(p)
  for i, pool in ipairs(list) do judge(pool, adjusted[i], margin) end
  return list
end

--- The two points of a sweep at the smallest and at the largest batch that both models could run; the second
--- is nil where that is the same.
local function extremes(sweep)
  local by_batch, first, last = {}, nil, nil
  for _, p in ipairs(sweep and sweep.points or {}) do
    by_batch[p.batch] = by_batch[p.batch] or {}
    by_batch[p.batch][p.model] = p
  end
  for batch, pair in pairs(by_batch) do
    if pair[1] and pair[2] and pair[1].seconds and pair[2].seconds then
      first, last = math.min(first or batch, batch), math.max(last or batch, batch)
    end
  end
  return first and by_batch[first], last ~= first and by_batch[last] or nil
end

local function saved(full, quantized)
  return { full = full, quantized = quantized, saved = full - quantized, share = (full - quantized) / full }
end

--- Peaks at the smallest batch, and as `last` at the largest; without a sweep the resident weights.
local function memory(docs, sweep)
  local first, last = extremes(sweep)
  if not first then
    local facts = docs[1].facts or {}
    local full, quantized = (facts.full or {}).bytes, (facts.quantized or {}).bytes
    if not (full and quantized) then return nil end
    local m = saved(full, quantized)
    m.where, m.what = "of weights", "resident weights"
    return m
  end
  local function peaks(pair)
    local m = saved(pair[1].peak.resident, pair[2].peak.resident)
    m.batch, m.where, m.what = pair[1].batch, ("at batch %d"):format(pair[1].batch), "peak of one pass"
    return m
  end
  local m = peaks(first)
  m.last = last and peaks(last)
  return m
end

--- How many times as fast the quantized model is at one batch size: ratio of the medians, with an interval
--- from redrawing whole rounds, in each of which both took the same batch.
local function speed_at(pair, seed)
  local full, quantized = pair[1].seconds, pair[2].seconds
  local s = { batch = pair[1].batch, full = full, quantized = quantized,
    ratio = full.median / quantized.median }
  local a, b = full.samples or {}, quantized.samples or {}
  if #a == #b and #a > 1 then
    s.rounds = #a
    s.ratio, s.low, s.high = stats.bootstrap_ratio({ a, b }, { of = "median", seed = seed })
    s.faster, s.slower = s.low and s.low > 1, s.high and s.high < 1
  end
  return s
end

local function speed(sweep, seed)
  local first, last = extremes(sweep)
  if not first then return nil end
  local s = speed_at(first, seed)
  s.last = last and speed_at(last, seed)
  return s
end

--- The fairness checks that failed, each with the run it belongs to; those of several runs once.
---@param docs table[]
---@return { name: string, text: string, reason: string?, run: integer }[]
function verdict.unfair(docs)
  local list, seen = {}, {}
  for _, doc in ipairs(docs) do
    for _, check in ipairs(doc.fairness and doc.fairness.checks or {}) do
      local key = ("%s\n%s"):format(check.name, check.reason or "")
      if check.ok == false and not seen[key] then
        seen[key] = true
        list[#list + 1] = { name = check.name, text = check.text, reason = check.reason, run = doc.run }
      end
    end
  end
  return list
end

--- "Accuracy by log-likelihood: −8.9 points [−18.4, 0.9] for nf4, difference not ..." of one pool.
local function pool_sentence(pool, test, several)
  local said = ("Accuracy %s: %s points [%s, %s] for %s, "):format(pool.name,
    verdict.points(pool.difference), verdict.points(pool.low), verdict.points(pool.high), test)
  if pool.noisy then
    return ("%sbut the full model differs from itself too (%s): the questions were not asked alike."):format(
      said, stats.p_text(pool.control.p))
  end
  said = said .. ("difference %s at n = %d (%s %s)"):format((pool.lost or pool.gained) and "established"
    or "not established", pool.n, several and "adjusted" or "exact McNemar", stats.p_text(pool.p))
  if not (pool.lost or pool.gained) then
    if pool.p < LEVEL then
      said = said .. ", for the full model differs from itself by as much"
    elseif pool.needed and pool.needed > pool.n then
      said = said .. ("; about %d questions would show one of this size"):format(
        stats.rounded_up(pool.needed))
    end
  end
  if pool.control then
    said = said .. (". Noise: %d of %d answers change when the full model is asked again"):format(
      pool.control.changed, pool.control.n)
  end
  if pool.guessing then
    said = said .. ". The full model is not shown to beat guessing (25 %) here, so it has little to lose"
  end
  return said .. "."
end

local function memory_sentence(m, test)
  if m.saved > 0 then
    return ("%s saves %s (%.0f %%) %s: %s instead of %s."):format(test, tables.bytes(m.saved), 100 * m.share,
      m.where, tables.bytes(m.quantized), tables.bytes(m.full))
  end
  return ("%s saves no memory %s: %s, and %s without."):format(test, m.where, tables.bytes(m.quantized),
    tables.bytes(m.full))
end

local function speed_sentence(s, test, counts)
  local text
  if s.slower then
    text = ("%s takes %.2f times as long [%.2f, %.2f] at batch %d"):format(test, 1 / s.ratio, 1 / s.high,
      1 / s.low, s.batch)
  elseif s.low then
    text = ("%s is %.2f times as fast [%.2f, %.2f] at batch %d"):format(test, s.ratio, s.low, s.high, s.batch)
    if not s.faster then text = text .. ": no difference established" end
  else
    text = ("%s is %.2f times as fast at batch %d, without an interval"):format(test, s.ratio, s.batch)
  end
  return text .. (counts and "." or "; it does not count, for a fairness check is amber.")
end

--- "x_quantized / x_full - 1" of the perplexities, with the interval of the logarithm.
local function perplexity_sentence(section, test)
  local r = section.summary.log_ratio
  local function change(ln) return verdict.points(math.exp(ln) - 1, 2) end
  local half = stats.normal_quantile(0.975) * r.stderr
  if half == 0 then return ("Perplexity %s %% for %s in every prediction."):format(change(r.value), test) end
  return ("Perplexity %s %% [%s, %s] for %s%s."):format(change(r.value), change(r.value - half),
    change(r.value + half), test, math.abs(r.value) <= half and ": no difference established" or "")
end

local function tokens_sentence(section)
  for _, name in ipairs { "jaccard@5", "jaccard@1" } do
    for _, row in ipairs(section.pair) do
      if row.name == name and row.value then
        local k = name:match "%d+"
        local text = ("%s to %s"):format(k == "1" and "The most likely next token agrees"
          or ("The %s most likely next tokens agree"):format(k), row.low
          and tables.interval(row.value, row.low, row.high) or ("%.3f"):format(row.value))
        for _, same in ipairs(section.control or {}) do
          if same.name == name and same.value then
            return ("%s; of the full model with itself to %.3f."):format(text, same.value)
          end
        end
        return text .. "."
      end
    end
  end
end

--- The figures in sentences, the missing arms named.
local function evidence(v, docs, counts)
  local list, test = {}, docs[1].labels[2] or "quantized"
  if v.memory then list[#list + 1] = memory_sentence(v.memory, test) end
  if v.memory and not v.memory.batch then
    list[#list + 1] = "Memory while it runs was not measured in this report."
  end
  list[#list + 1] = v.speed and speed_sentence(v.speed, test, counts)
    or "Speed by batch size was not measured in this report."
  for _, pool in ipairs(v.pools) do list[#list + 1] = pool_sentence(pool, test, #v.pools > 1) end
  if #v.pools == 0 then list[#list + 1] = "Accuracy was not measured in this report." end
  local metrics, texts = sections(docs, "metrics"), sections(docs, "perplexity")
  if metrics[1] then list[#list + 1] = tokens_sentence(metrics[1]) end
  for _, section in ipairs(texts) do list[#list + 1] = perplexity_sentence(section, test) end
  return list
end

local HEADLINES <const> = { quantize = "Quantize.", dont = "Don’t quantize.", open = "Not established." }

--- What is saved, in words; nil and whether it is known that nothing is, and why, where no saving is shown.
local function saving_of(v, fair)
  if not v.memory then return nil, false, "Whether it saves anything was not measured." end
  if v.memory.saved > 0 then return "saves memory" end
  if not v.speed then return nil, false, "It saves no memory, and its speed was not measured." end
  if not fair then return nil, false, "It saves no memory, and its speed was not measured fairly." end
  if v.speed.faster then return "saves time" end
  if v.speed.slower then return nil, true, "It saves no memory, and it takes longer." end
  return nil, false, "It saves no memory; that it saves time is not established."
end

local function points_text(margin) return ("%g point%s"):format(margin, margin == 1 and "" or "s") end

--- Why a loss that was established speaks against quantizing.
local function loss_text(pool, margin)
  local interval = ("%s points [%s, %s]"):format(verdict.points(pool.difference), verdict.points(pool.low),
    verdict.points(pool.high))
  if 100 * pool.high < -margin then
    return ("It loses more than %s of accuracy: %s."):format(points_text(margin), interval)
  end
  return ("It loses accuracy: %s, and more than %g cannot be ruled out."):format(interval, margin)
end

--- Why a pool does not tell.
local function doubt_text(pool, saving, margin)
  if pool.post then
    return "Accuracy was asked for as in the post of 2024, whose faults stand under fairness."
  end
  if pool.noisy then return "The full model differs from itself: the questions were not asked alike." end
  if pool.guessing then
    return "The full model is not shown to beat guessing on these questions, so they cannot tell."
  end
  return ("It %s; a loss of more than %s is neither shown nor ruled out."):format(saving,
    points_text(margin))
end

--- The worst pool decides; a reason in half a sentence goes with the word.
local function decide(v, margin, fair)
  local saving, nothing, why = saving_of(v, fair)
  local lost, doubtful = nil, nil
  for _, pool in ipairs(v.pools) do
    if pool.lost and not pool.ruled_out and not pool.post and (not lost
      or pool.difference < lost.difference) then
      lost = pool
    end
    if (not pool.within or pool.post) and (not doubtful or pool.low < doubtful.low) then doubtful = pool end
  end
  if nothing then return "dont", why end
  if lost then return "dont", loss_text(lost, margin) end
  if not saving then return "open", why end
  if #v.pools == 0 then
    return "open", ("It %s; what it costs in accuracy was not measured."):format(saving)
  end
  if doubtful then return "open", doubt_text(doubtful, saving, margin) end
  return "quantize", ("It %s, and a loss of more than %s of accuracy is ruled out."):format(saving,
    points_text(margin))
end

--- The rule as the page prints it.
---@param margin number
---@return { [1]: string, [2]: string }[]
local function rule(margin)
  local points = points_text(margin)
  return {
    { "Quantize", "where it saves memory or time, and the 95 % interval of the difference in accuracy rules "
      .. "out a loss of more than " .. points .. ", in every way of asking; the full model must beat "
      .. "guessing, and must not differ from itself (McNemar, p < 0.05)." },
    { "Don’t", ("where it saves neither; or where a loss is established (exact McNemar test, Holm’s "
      .. "correction, p < 0.05, larger than the full model’s difference from itself) and more than %s is not "
      .. "ruled out."):format(points) },
    { "Not established", "everything else, and what was asked as in the post of 2024: more questions, or "
      .. "the part that was not measured, would tell." },
    { "Intervals", "accuracy: Tango’s score interval of the paired difference; time: bootstrap of whole "
      .. "rounds, and it counts only where no fairness check is amber; memory is counted, not sampled." },
  }
end

---@class qlua.verdict
---@field word "quantize"|"dont"|"open"
---@field headline string
---@field because string
---@field evidence string[]
---@field rule { [1]: string, [2]: string }[]
---@field margin number
---@field memory table?
---@field speed table?
---@field pools table[]     accuracy by way of asking
---@field unfair table[]

--- The verdict on runs of one pair of models.
---@param docs table[]
---@param options? { margin: number? }  points of accuracy
---@return qlua.verdict
function verdict.of(docs, options)
  local margin = options and options.margin or verdict.MARGIN
  local sweeps = sections(docs, "sweep")
  local sweep = sweeps[#sweeps]
  local v = { margin = margin, unfair = verdict.unfair(docs), rule = rule(margin),
    memory = memory(docs, sweep),
    speed = speed(sweep, docs[1].facts and docs[1].facts.seed), pools = quality(docs, margin) }
  local fair = #v.unfair == 0
  v.word, v.because = decide(v, margin, fair)
  v.headline = HEADLINES[v.word]
  v.evidence = evidence(v, docs, fair)
  return v
end

return verdict
