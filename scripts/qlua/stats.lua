--- Statistics of paired evaluations: intervals, exact tests, bootstrap, and the sentence that says what they
--- mean.
---
--- Plain lists of numbers in, numbers out; no value is ever NaN. Misuse (an empty list, a NaN in it, k > n)
--- raises. The same seed gives the same bits on every machine: the random generator is the module's own.

local _ENV <const> = require "qlua.strict"

local plural = require("qlua.text").plural
local resample = require("qlua.core").resample

local stats = {}

--- Sum with Neumaier's compensation (ZAMM 54, 1974): the error does not grow with the number of values.
---@param values number[]
---@return number
function stats.sum(values)
  local sum, lost = 0.0, 0.0
  for _, value in ipairs(values) do
    local next_sum = sum + value
    if math.abs(sum) >= math.abs(value) then
      lost = lost + ((sum - next_sum) + value)
    else
      lost = lost + ((value - next_sum) + sum)
    end
    sum = next_sum
  end
  return sum + lost
end

local function checked(values, least, level)
  if #values < least then
    error(("needs at least %d value%s, got %d"):format(least, least == 1 and "" or "s", #values), level + 1)
  end
  for i, value in ipairs(values) do
    if type(value) ~= "number" or value ~= value then
      error(("value %d is %s, not a number"):format(i, tostring(value)), level + 1)
    end
  end
  return values
end

---@param values number[]
---@return number
function stats.mean(values)
  return stats.sum(checked(values, 1, 2)) / #values
end

--- Sample covariance (divisor n - 1) of two lists of equal length, at least two values each.
---@param a number[]
---@param b number[]
---@return number
function stats.covariance(a, b)
  if #a ~= #b then error(("lists of %d and %d values are not paired"):format(#a, #b), 2) end
  checked(a, 2, 2)
  checked(b, 2, 2)
  local mean_a, mean_b, products = stats.sum(a) / #a, stats.sum(b) / #b, {}
  for i = 1, #a do products[i] = (a[i] - mean_a) * (b[i] - mean_b) end
  return stats.sum(products) / (#a - 1)
end

--- Sample standard deviation (divisor n - 1); nil for a single value.
---@param values number[]
---@return number?
function stats.sd(values)
  checked(values, 1, 2)
  if #values < 2 then return nil end
  return math.sqrt(stats.covariance(values, values))
end

--- Standard error of the mean: sd / sqrt(n); nil for a single value.
---@param values number[]
---@return number?
function stats.stderr(values)
  checked(values, 1, 2)
  if #values < 2 then return nil end
  return math.sqrt(stats.covariance(values, values) / #values)
end

local function sorted_copy(values)
  local copy = table.move(values, 1, #values, 1, {})
  table.sort(copy)
  return copy
end

local function percentile_of_sorted(sorted, f)
  local position = f * (#sorted - 1) + 1
  local below = math.floor(position)
  local rest = position - below
  if rest == 0 then return sorted[below] end
  return sorted[below] + rest * (sorted[below + 1] - sorted[below])
end

--- Percentile at share f of 0..1, linear between neighbours at position f*(n-1).
---@param values number[]
---@param f number
---@return number
function stats.percentile(values, f)
  if not (f >= 0 and f <= 1) then error("the share must lie in 0..1", 2) end
  return percentile_of_sorted(sorted_copy(checked(values, 1, 2)), f)
end

--- Several percentiles at once.
---@param values number[]
---@param shares number[]
---@return { share: number, value: number }[]
function stats.percentiles(values, shares)
  local sorted, list = sorted_copy(checked(values, 1, 2)), {}
  for i, share in ipairs(shares) do
    if not (share >= 0 and share <= 1) then error("the share must lie in 0..1", 2) end
    list[i] = { share = share, value = percentile_of_sorted(sorted, share) }
  end
  return list
end

---@param values number[]
---@return number
function stats.median(values)
  return percentile_of_sorted(sorted_copy(checked(values, 1, 2)), 0.5)
end

---@class qlua.summary
---@field n integer
---@field mean number
---@field stderr number?
---@field rms number
---@field min number
---@field median number
---@field p90 number
---@field p95 number
---@field p99 number
---@field p999 number
---@field max number

--- What experiment tables report of a list of per-question values.
---@param values number[]
---@return qlua.summary
function stats.summary(values)
  local sorted, squares = sorted_copy(checked(values, 1, 2)), {}
  for i, value in ipairs(values) do squares[i] = value * value end
  return {
    n = #values,
    mean = stats.mean(values),
    stderr = stats.stderr(values),
    rms = math.sqrt(stats.sum(squares) / #values),
    min = sorted[1],
    median = percentile_of_sorted(sorted, 0.5),
    p90 = percentile_of_sorted(sorted, 0.9),
    p95 = percentile_of_sorted(sorted, 0.95),
    p99 = percentile_of_sorted(sorted, 0.99),
    p999 = percentile_of_sorted(sorted, 0.999),
    max = sorted[#sorted],
  }
end

--- Cumulative standard normal. Series around 0 (Abramowitz & Stegun 26.2.11), beyond 5 the continued fraction
--- of the tail (26.2.14); relative error of either tail under 1e-13.
---@param x number
---@return number
function stats.normal_cdf(x)
  local density = math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
  if x > 5 then return 1 - stats.normal_cdf(-x) end
  if x < -2.5 then
    local fraction = 0.0
    for i = 120, 1, -1 do fraction = i / (-x + fraction) end
    return density / (-x + fraction)
  end
  local term, sum, i = x, x, 1
  while math.abs(term) > 1e-18 * math.abs(sum) and i < 400 do
    i = i + 2
    term = term * x * x / i
    sum = sum + term
  end
  return 0.5 + density * sum
end

--- Quantile of the standard normal for p in (0, 1), by Newton steps on normal_cdf.
---@param p number
---@return number
function stats.normal_quantile(p)
  if not (p > 0 and p < 1) then error("the probability must lie inside 0..1", 2) end
  if p == 0.5 then return 0.0 end
  if p > 0.5 then return -stats.normal_quantile(1 - p) end
  -- From the left of the solution Newton overshoots never: the cdf is convex for x < 0.
  local x = -math.sqrt(-2 * math.log(p))
  for _ = 1, 200 do
    local step = (stats.normal_cdf(x) - p) * math.sqrt(2 * math.pi) * math.exp(x * x / 2)
    x = x - step
    if math.abs(step) < 1e-15 * math.max(1, math.abs(x)) then break end
  end
  return x
end

local function z_of(confidence, level)
  confidence = confidence or 0.95
  if not (confidence > 0 and confidence < 1) then error("the confidence must lie inside 0..1", level + 1) end
  return stats.normal_quantile(0.5 + confidence / 2), confidence
end

--- Wilson's interval (JASA 22, 1927) of a share k of n.
---@param k integer
---@param n integer
---@param confidence? number default 0.95
---@return number low, number high
function stats.wilson(k, n, confidence)
  if not (k >= 0 and n > 0 and k <= n) then error(("%s of %s is not a share"):format(k, n), 2) end
  local z = z_of(confidence, 2)
  local share, z2 = k / n, z * z
  local middle = (share + z2 / (2 * n)) / (1 + z2 / n)
  local half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
  return k == 0 and 0.0 or math.max(0, middle - half), k == n and 1.0 or math.min(1, middle + half)
end

--- Interval of the difference k_b / n_b - k_a / n_a of two shares that have nothing to do with each other, by
--- Newcombe's method 10 (Statistics in Medicine 17, 1998): Wilson's limits of both, squared and added.
---@param k_a integer
---@param n_a integer
---@param k_b integer
---@param n_b integer
---@param confidence? number default 0.95
---@return number low, number high
function stats.newcombe(k_a, n_a, k_b, n_b, confidence)
  local low_a, high_a = stats.wilson(k_a, n_a, confidence)
  local low_b, high_b = stats.wilson(k_b, n_b, confidence)
  local a, b = k_a / n_a, k_b / n_b
  return b - a - math.sqrt((b - low_b) ^ 2 + (high_a - a) ^ 2),
    b - a + math.sqrt((high_b - b) ^ 2 + (a - low_a) ^ 2)
end

--- Tango's score of the hypothesis that two paired shares differ by d; falls as d grows.
local function tango_score(lost, won, n, d)
  local linear, constant = -won - lost + (2 * n - won + lost) * d, -lost * d * (1 - d)
  local share = (math.sqrt(math.max(0, linear * linear - 8 * n * constant)) - linear) / (4 * n)
  local variance, distance = n * (2 * share + d * (1 - d)), won - lost - n * d
  if variance <= 0 then return distance == 0 and 0 or distance > 0 and math.huge or -math.huge end
  return distance / math.sqrt(variance)
end

--- Interval of the difference of two shares of the same questions by Tango's score test (Statistics in
--- Medicine 17, 1998): the differences that the test does not reject.
---
--- This and not a bootstrap of the questions, which shrinks to nothing where no answer changed, though more
--- questions may well bring a change: none of 240 still leaves room for 1.6 points either way.
---@param right_wrong integer questions that only the first answers rightly
---@param wrong_right integer questions that only the second answers rightly
---@param n integer           all questions
---@param confidence? number  default 0.95
---@return number low, number high  of second - first
function stats.tango(right_wrong, wrong_right, n, confidence)
  if not (right_wrong >= 0 and wrong_right >= 0 and n > 0 and right_wrong + wrong_right <= n) then
    error(("%s and %s of %s are not two shares"):format(right_wrong, wrong_right, n), 2)
  end
  local z, estimate = z_of(confidence, 2), (wrong_right - right_wrong) / n
  local function limit(target, low, high)
    for _ = 1, 60 do
      local middle = (low + high) / 2
      if tango_score(right_wrong, wrong_right, n, middle) > target then low = middle else high = middle end
    end
    return (low + high) / 2
  end
  return limit(z, -1, estimate), limit(-z, estimate, 1)
end

--- Probability of k heads among n fair coins. The halvings are spread over the product, so that nothing
--- overflows and no logarithm is rounded: relative error about n * 1e-16.
local function coin_probability(n, k)
  local product, halvings = 1.0, 0
  for j = 1, math.min(k, n - k) do
    product = product * (n - j + 1) / j
    while product > 1 and halvings < n do product, halvings = product / 2, halvings + 1 end
  end
  return product * 2.0 ^ (halvings - n)
end

--- Exact two-sided McNemar test: p of a split as uneven as b : c among b + c fair coin tosses.
---@param b integer questions that only the reference answered rightly
---@param c integer questions that only the test answered rightly
---@return number p
function stats.mcnemar(b, c)
  if not (math.tointeger(b) and math.tointeger(c) and b >= 0 and c >= 0) then
    error(("%s and %s are not two counts"):format(b, c), 2)
  end
  local n, smaller = b + c, math.min(b, c)
  if b == c then return 1.0 end
  local term = coin_probability(n, smaller) -- the largest of the sum; the others are ratios of it
  local sum = 0.0
  for i = smaller, 0, -1 do
    sum = sum + term
    term = term * i / (n - i + 1)
    if term < sum * 1e-18 then break end
  end
  return math.min(1.0, 2 * sum)
end

--- Holm's adjustment (Scand. J. Statist. 6, 1979): p-values in the order given, each to be held against the
--- level.
---@param p number[]
---@return number[]
function stats.holm(p)
  local order, adjusted, running = {}, {}, 0.0
  for i, value in ipairs(p) do
    if not (value >= 0 and value <= 1) then error(("p value %d is %s"):format(i, value), 2) end
    order[i] = i
  end
  table.sort(order, function(i, j)
    if p[i] ~= p[j] then return p[i] < p[j] end
    return i < j
  end)
  for rank, i in ipairs(order) do
    running = math.max(running, math.min(1.0, (#p - rank + 1) * p[i]))
    adjusted[i] = running
  end
  return adjusted
end

---@class qlua.flips
---@field n integer
---@field both_right integer
---@field right_wrong integer   reference right, test wrong: McNemar's b
---@field wrong_right integer   reference wrong, test right: McNemar's c
---@field same_wrong integer    both wrong with the same answer
---@field other_wrong integer   both wrong with different answers
---@field right_a integer
---@field right_b integer
---@field flips number          (right_wrong + wrong_right) / n
---@field all_flips number      flips and other_wrong, / n

--- The 2 x 2 table of paired answers. An answer that could not be read is `false`, which is wrong and equals
--- itself.
---@param a (integer|false)[]  the reference's answers
---@param b (integer|false)[]  the test's answers
---@param gold integer[]
---@return qlua.flips
function stats.flips(a, b, gold)
  local n = #gold
  if #a ~= n or #b ~= n or n == 0 then
    error(("answers and keys must be as many: %d, %d, %d"):format(#a, #b, n), 2)
  end
  local t = { n = n, both_right = 0, right_wrong = 0, wrong_right = 0, same_wrong = 0, other_wrong = 0 }
  for i, key in ipairs(gold) do
    local right_a, right_b = a[i] == key, b[i] == key
    local cell = right_a and (right_b and "both_right" or "right_wrong")
      or right_b and "wrong_right" or (a[i] == b[i] and "same_wrong" or "other_wrong")
    t[cell] = t[cell] + 1
  end
  t.right_a, t.right_b = t.both_right + t.right_wrong, t.both_right + t.wrong_right
  t.flips = (t.right_wrong + t.wrong_right) / n
  t.all_flips = t.flips + t.other_wrong / n
  return t
end

--- What is left of the reference's accuracy: accuracy_b / accuracy_a; nil when the reference has none.
---@param accuracy_a number
---@param accuracy_b number
---@return number?
function stats.recovery(accuracy_a, accuracy_b)
  if accuracy_a == 0 then return nil end
  return accuracy_b / accuracy_a
end

local function rotl(x, k) return x << k | x >> (64 - k) end

--- Four words of state for xoshiro256** from one seed by splitmix64 (Blackman & Vigna, 2018).
local function seeded(seed)
  local function next_word()
    seed = seed + 0x9E3779B97F4A7C15
    local z = seed
    z = (z ~ z >> 30) * 0xBF58476D1CE4E5B9
    z = (z ~ z >> 27) * 0x94D049BB133111EB
    return z ~ z >> 31
  end
  return next_word(), next_word(), next_word(), next_word()
end

--- A generator: calling it gives the next 64 random bits as an integer.
---@param seed integer
---@return fun(): integer
function stats.random(seed)
  local s0, s1, s2, s3 = seeded(math.tointeger(seed) or error("the seed must be an integer", 2))
  return function()
    local result = rotl(s1 * 5, 7) * 9
    local t = s1 << 17
    s2, s3 = s2 ~ s0, s3 ~ s1
    s1, s0 = s1 ~ s2, s0 ~ s3
    s2, s3 = s2 ~ t, rotl(s3, 45)
    return result
  end
end

--- A random order of 1..n, or the first `count` of it.
---@param n integer
---@param seed integer
---@param count? integer
---@return integer[]
function stats.shuffled(n, seed, count)
  local random, order = stats.random(seed), {}
  for i = 1, n do order[i] = i end
  count = math.min(count or n, n)
  for i = 1, count do
    local j = i + ((random() >> 32) * (n - i + 1) >> 32)
    order[i], order[j] = order[j], order[i]
  end
  return table.move(order, 1, count, 1, {})
end

---@class qlua.bootstrap_options
---@field seed integer?       default 1
---@field resamples integer?  default 10000
---@field confidence number?  default 0.95
---@field of? "mean"|"median" stats.bootstrap_ratio: default "mean"
---@field level number?       tests: what p must be under, default 0.05

local OPTIONS <const> = { seed = true, resamples = true, confidence = true, of = true, level = true }

local function options_of(options, level)
  for key in pairs(options or {}) do
    if not OPTIONS[key] then
      error(("unknown option '%s' (options are: confidence, level, of, resamples, seed)"):format(
        tostring(key)), level + 1)
    end
  end
  return options or {}
end

--- Percentile interval of what the resamples of paired lists say; nil where one of them divides by zero, and
--- where all say the same but for rounding, for then they cannot tell how far off it may be.
local function interval(kind, lists, options)
  local _, confidence = z_of(options.confidence, 3)
  local drawn = resample.bootstrap(kind, lists, options.resamples or 10000, options.seed or 1)
  for _, value in ipairs(drawn) do
    if value - value ~= 0 then return nil end
  end
  table.sort(drawn)
  if drawn[#drawn] - drawn[1] <= 1e-12 * math.abs(drawn[1]) then return nil end
  return percentile_of_sorted(drawn, (1 - confidence) / 2), percentile_of_sorted(drawn, (1 + confidence) / 2)
end

--- Percentile bootstrap interval of a mean; nil where all values are the same, as of a single one.
---@param values number[]
---@param options? qlua.bootstrap_options
---@return number? low, number? high
function stats.bootstrap(values, options)
  return interval("mean", { checked(values, 1, 2) }, options_of(options, 2))
end

--- b - a, for values that belong together.
local function differences(a, b, level)
  if #a ~= #b then error(("lists of %d and %d values are not paired"):format(#a, #b), level + 1) end
  checked(a, 1, level + 1)
  checked(b, 1, level + 1)
  local list = {}
  for i = 1, #a do list[i] = b[i] - a[i] end
  return list
end

--- Interval of mean(b) - mean(a) when a[i] and b[i] belong to the same question: whole questions are
--- redrawn. nil where all differences are the same.
---@param a number[]
---@param b number[]
---@param options? qlua.bootstrap_options
---@return number? low, number? high
function stats.bootstrap_difference(a, b, options)
  return stats.bootstrap(differences(a, b, 2), options)
end

--- A ratio and its interval; element i of every list belongs to the same question or the same pass. {a, b}
--- is mean(a) / mean(b) (words and seconds) or, with `of` = "median", the medians' ratio (two models' seconds
--- of a pass); {a, b, c, d} is the quotient of a / b and c / d (two models' words per minute). nil where a
--- divisor is 0; without low and high where one can be 0 in a resample, or where all resamples are the same.
---@param lists number[][]  2 or 4
---@param options? qlua.bootstrap_options
---@return number? ratio, number? low, number? high
function stats.bootstrap_ratio(lists, options)
  options = options_of(options, 2)
  if #lists ~= 2 and #lists ~= 4 then error(("a ratio has 2 or 4 lists, not %d"):format(#lists), 2) end
  local of = { 1.0, 1.0, 1.0, 1.0 }
  local center = options.of == "median" and stats.median or stats.mean
  for i, list in ipairs(lists) do of[i] = center(checked(list, 1, 2)) end
  local ratio = of[1] / of[2] / (of[3] / of[4])
  if ratio - ratio ~= 0 then return nil end
  return ratio, interval(options.of or "mean", lists, options)
end

--- Two-sided p of a mean of paired differences, if each could as well have had the other sign: the share of
--- sign assignments that bring the sum as far from 0 (Fisher, The Design of Experiments, 1935, ch. 3). Exact
--- for up to 20 differences that are not 0; else `resamples` random assignments, counted as (hits + 1) /
--- (draws + 1), which is never too small (Phipson & Smyth, Stat. Appl. Genet. Mol. Biol. 9, 2010).
---
--- This and not Wilcoxon's signed ranks, because it tests the mean, which is what tables show, and because it
--- needs no rule for ties and zeros, of which metrics such as Jaccard's are full.
---@param values number[]  differences
---@param options? qlua.bootstrap_options
---@return number p, boolean exact
function stats.sign_flip(values, options)
  options = options_of(options, 2)
  local moved = {}
  for _, value in ipairs(checked(values, 1, 2)) do
    if value ~= 0 then moved[#moved + 1] = value end
  end
  local hits, draws, exact = resample.sign_flips(moved, options.resamples or 10000, options.seed or 1)
  return exact and hits / draws or (hits + 1) / (draws + 1), exact
end

--- z of a two-sided level and of a power, and the fewest values that can differ at all for a sign test to go
--- under the level: 2 of 2^n assignments.
local function power_of(power, level)
  level = level or 0.05
  return stats.normal_quantile(1 - level / 2), stats.normal_quantile(power or 0.8),
    math.ceil(1 - math.log(level, 2))
end

--- Questions needed to show a paired difference of two shares by the exact McNemar test; nil when there is no
--- difference to show. Connor's figure for the asymptotic test (Biometrics 43, 1987) and 1 / difference for
--- the coarseness of the exact one, without which the power is 0.74 to 0.78 instead of 0.8.
---@param right_wrong number share of questions that only the reference answers rightly
---@param wrong_right number share that only the test answers rightly
---@param power? number      default 0.8
---@param level? number      two-sided, default 0.05
---@return integer?
function stats.questions_needed(right_wrong, wrong_right, power, level)
  local difference, discordant = math.abs(right_wrong - wrong_right), right_wrong + wrong_right
  if difference == 0 then return nil end
  local z_level, z_power, least = power_of(power, level)
  local root = z_level * math.sqrt(discordant) + z_power * math.sqrt(discordant - difference * difference)
  return math.ceil(math.max((root / difference) ^ 2 + 1 / difference, least / discordant))
end

--- Questions needed to show a mean of paired differences; nil where it is 0. The normal figure with
--- Guenther's correction for an estimated standard deviation (The American Statistician 35, 1981).
---@param difference number
---@param sd number          of the differences
---@param power? number      default 0.8
---@param level? number      two-sided, default 0.05
---@return integer?
function stats.questions_needed_mean(difference, sd, power, level)
  if difference == 0 then return nil end
  local z_level, z_power, least = power_of(power, level)
  return math.ceil(math.max(((z_level + z_power) * sd / difference) ^ 2 + z_level ^ 2 / 2, least))
end

--- A number of questions as it is said: two digits, rounded up.
---@param n integer
---@return integer
function stats.rounded_up(n)
  local unit = 10 ^ math.max(0, math.floor(math.log(n, 10)) - 1)
  return math.tointeger(math.ceil(n / unit) * unit) or n
end

--- "p = 0.031" or "p < 0.001".
---@param p number
---@return string
function stats.p_text(p) return p < 0.001 and "p < 0.001" or ("p = %.3f"):format(p) end

--- "not established at n = 79 (exact McNemar p = 0.092); about 180 questions would show a difference of this
--- size at 80 % power".
local function established_text(established, n, why, needed)
  local text = ("%s at n = %d (%s)"):format(established and "established" or "not established", n, why)
  if established or not needed then return text end
  return ("%s; about %d questions would show a difference of this size at 80 %% power"):format(text,
    stats.rounded_up(needed))
end

---@class qlua.comparison
---@field n integer
---@field flips qlua.flips
---@field difference number   accuracy_b - accuracy_a
---@field p number            McNemar's, or the one given (e.g. after Holm)
---@field established boolean p < level
---@field needed integer?     questions for 80 % power if the shares seen are the true ones
---@field sentence string

--- Whether two models' accuracies differ, as numbers and in words.
---@param flips qlua.flips
---@param p? number         an adjusted p (Holm); default: McNemar's of `flips`
---@param level? number     default 0.05
---@return qlua.comparison
function stats.compare(flips, p, level)
  level = level or 0.05
  local b, c, n = flips.right_wrong, flips.wrong_right, flips.n
  local p_name = p and "adjusted" or "exact McNemar"
  p = p or stats.mcnemar(b, c)
  local result = {
    n = n, flips = flips, difference = (c - b) / n, p = p, established = p < level,
    needed = stats.questions_needed(b / n, c / n, 0.8, level),
  }
  if b == c then
    result.sentence = ("no difference at n = %d: %s"):format(n, b == 0
      and "both are right on the same questions" or "each model alone is right on " .. plural(b, "question"))
  else
    result.sentence = ("difference of %+.1f points "):format(100 * result.difference)
      .. established_text(result.established, n, p_name .. " " .. stats.p_text(p),
        result.needed > n and result.needed or nil)
  end
  return result
end

---@class qlua.control_test   of a metric of two models and its noise floor
---@field name string?
---@field n integer
---@field difference number   mean(pair) - mean(control)
---@field low number?         95 % paired bootstrap interval of it; nil where all differences are the same
---@field high number?
---@field p number            sign-flip test
---@field adjusted_p number   Holm's over the tests of one table; p where there is only one
---@field established boolean adjusted_p < level: the pair differs by more than noise
---@field questions_needed integer?  for 80 % power, if the differences seen are typical
---@field sentence string

--- Whether metrics of two models differ from their noise floors, the same metrics of the full model against
--- itself: values of the same questions in the same order. Holm's correction over all of them.
---@param list { name: string?, values: number[], control: number[] }[]
---@param options? qlua.bootstrap_options
---@return qlua.control_test[]
function stats.against_controls(list, options)
  options = options_of(options, 2)
  local tests, p, level = {}, {}, options.level or 0.05
  for i, entry in ipairs(list) do
    local moved = differences(entry.control, entry.values, 2)
    local test = { name = entry.name, n = #moved, difference = stats.mean(moved) }
    test.low, test.high = stats.bootstrap(moved, options)
    test.p = stats.sign_flip(moved, options)
    test.questions_needed = stats.questions_needed_mean(test.difference, stats.sd(moved) or 0, 0.8, level)
    tests[i], p[i] = test, test.p
  end
  for i, adjusted in ipairs(stats.holm(p)) do
    local test = tests[i]
    test.adjusted_p, test.established = adjusted, adjusted < level
    local needed = test.questions_needed or 0
    test.sentence = test.difference == 0 and ("no difference from the noise floor at n = %d"):format(test.n)
      or ("difference of %+.3g from the noise floor "):format(test.difference)
        .. established_text(test.established, test.n,
          (#tests > 1 and "adjusted " or "sign-flip ") .. stats.p_text(adjusted),
          needed > test.n and needed or nil)
  end
  return tests
end

return stats
