--- Documents of runs as the store would hold them, for the specs of the report: answers and times are drawn
--- by a seed, everything that follows from them is computed as in a run.

local document = require "qlua.document"
local stats = require "qlua.stats"

local documents = {}

local function uniform(random) return (random() >> 11) / 2 ^ 53 end

--- Rows of an MMLU set as the store holds them.
---@param n integer
---@param options { seed: integer?, written: boolean?, full: number?, keeps: number? } full: share of right
---  answers of the full model; keeps: share of answers that the quantized one leaves as they are
function documents.rows(n, options)
  options = options or {}
  local random, list = stats.random(options.seed or 1), {}
  local function other(than) return (than - 1 + 1 + math.floor(3 * uniform(random))) % 4 + 1 end
  for i = 1, n do
    local gold = 1 + math.floor(4 * uniform(random))
    local a = uniform(random) < (options.full or 0.6) and gold or other(gold)
    local b = uniform(random) < (options.keeps or 0.88) and a or other(a)
    local models = {}
    for m, answer in ipairs { a, b } do
      if options.written then
        models[m] = { answer = answer, correct = answer == gold, words = 14, stop = "eos", seconds = 0.1,
          text = ("The virus of question %d enters the cell by fusion, so the answer is %s. [[%s]]"):format(i,
            m == 1 and "clear from the envelope" or "clear from its capsid", ("ABCD"):sub(answer, answer)) }
      else
        local scores = {}
        for c = 1, 4 do scores[c] = -2 - 3 * uniform(random) end
        scores[answer] = -1 - uniform(random) / 2
        models[m] = { answer = answer, correct = answer == gold, scores = scores,
          greedy = { false, false, false, false } }
      end
    end
    list[i] = { index = i, prompt_sha256 = ("0"):rep(64), models = models, doc = { answer = gold,
      question = (
        "Question %d: which of these statements about the replication of virus %d is right?"):format(i,
        i * 7 % 31), choices = { "It replicates in the nucleus", "It carries its own polymerase",
        "It needs a helper virus", "None of these" } } }
  end
  return list
end

local function share(correct, n, label)
  return { n = n, correct = correct, accuracy = correct / n, wilson = { stats.wilson(correct, n) },
    label = label,
    unparsed = 0, cut = 0, seconds = 12.5, prompt_tokens = 4711, shared_tokens = 0,
    prefill_tokens_per_second = 3766.8, kernels = { "matmul_f32" } }
end

--- The outcome that rows lead to.
function documents.outcome(task, rows, options)
  options = options or {}
  local answers, gold = { {}, {} }, {}
  for i, row in ipairs(rows) do
    answers[1][i], answers[2][i] = row.models[1].answer, row.models[2].answer
    gold[i] = row.doc.answer
  end
  local comparison = document.paired(answers[1], answers[2], gold, 1)
  local control = not options.uncontrolled and document.paired(answers[1], answers[1], gold, 1) or nil
  document.holm { comparison }
  local f = comparison.flips
  return { task = task, subject = task:gsub("^mmlu_", ""), num_fewshot = 0, questions = #rows, too_long = 0,
    output_type = options.written and "generate_until" or "multiple_choice", context = 4096,
      chat_template = false,
    set = options.set or ("set of %s"):format(task), data = { path = task .. ".csv", sha256 = ("d"):rep(64),
      all = #rows },
    models = { share(f.right_a, f.n, "full"), share(f.right_b, f.n, "nf4") }, comparison = comparison,
    control = control, control_model = control and share(f.right_a, f.n, "full"), metrics = {} }
end

--- A sweep of both models; the full one does not fit at the batch sizes of `oom`.
function documents.sweep(options)
  options = options or {}
  local random, points = stats.random(3), {}
  for i, batch in ipairs { 1, 2, 4, 8, 16, 32 } do
    for m = 1, 2 do
      local samples, base = {}, (m == 1 and 0.166 or 0.117) * (0.9 + 0.1 * batch)
      for s = 1, 20 do samples[s] = base * (0.97 + 0.1 * uniform(random)) end
      local sorted = table.move(samples, 1, 20, 1, {})
      table.sort(sorted)
      local weights = m == 1 and 16.06e9 or 5.4e9
      local kv, activations = 3.2e7 * batch, 6.5e7 * batch
      local point = { batch = batch, model = m, label = m == 1 and "full" or "nf4", tokens = 41.5 * batch,
        kernels = {}, expected = { weights = weights, kv = kv, activations = activations,
          total = weights + kv + activations } }
      if m == 1 and batch >= (options.oom or 1000) then
        point.oom = "17.9 GiB needed, 15.2 GiB free"
      else
        point.seconds = { median = stats.median(samples), mean = stats.mean(samples), sd = stats.sd(samples),
          p10 = stats.percentile(samples, 0.1), p90 = stats.percentile(samples, 0.9), min = sorted[1],
          max = sorted[20], n = 20, samples = samples }
        local shared = m == 2 and 1.05e9 or 0
        point.peak = { weights = weights - shared, kv = kv, activations = activations,
          total = weights - shared + kv + activations, shared = shared,
            resident = weights + kv + activations }
        point.reserved, point.process = point.peak.total, 3e10
      end
      points[2 * i - 2 + m] = point
    end
  end
  return { kind = "sweep", task = "virology", questions = 166, too_long = 3, max_length = 512, runs = 20,
    warmup = 3,
    data = { path = "virology.csv", sha256 = ("e"):rep(64), all = 166 }, points = points }
end

local function metric(name, values, higher)
  local low, high = stats.bootstrap(values, { seed = 1, resamples = 500 })
  local row = stats.summary(values)
  row.name, row.value, row.low, row.high, row.values, row.higher_is_better = name, row.mean,
    low, high, values, higher
  return row
end

--- Jaccard at five k and a divergence, of n questions.
function documents.metrics(n)
  local random, pair, control = stats.random(5), {}, {}
  for i, k in ipairs { 1, 3, 5, 10, 20 } do
    local values, same = {}, {}
    for q = 1, n do
      local shared = 0
      for _ = 1, k do shared = shared + (uniform(random) < 0.87 and 1 or 0) end
      values[q] = shared / (2 * k - shared)
      same[q] = q % 40 == 0 and k > 1 and (k - 1) / (k + 1) or 1.0
    end
    pair[i], control[i] = metric("jaccard@" .. k, values, true), metric("jaccard@" .. k, same, true)
  end
  local values = {}
  for q = 1, n do values[q] = 0.08 * uniform(random) ^ 3 end
  pair[6] = metric("kl_full_quantized", values, false)
  return { kind = "metrics", task = "virology, after the question", questions = n, scored = n, too_long = 0,
    context = 4096, data = { path = "virology.csv", sha256 = ("e"):rep(64), all = n }, pair = pair,
      control = control }
end

function documents.variants()
  local rows = {}
  for i, v in ipairs { { "full", 16.06e9, 16, 0 }, { "int8", 9.1e9, 8.5, 0.0014 }, { "nf4",
    5.5e9, 4.13, 0.031 },
    { "nf4, float32 scales", 5.9e9, 4.5, 0.0308 }, { "fp4", 5.5e9, 4.13, 0.072 },
      { "nf4, block 256", 5.4e9, 4.03,
      0.036 } } do
    rows[i] = { label = v[1], bytes = math.floor(v[2]), bits = v[3], kernels = {},
      kl = { name = "kl_full_quantized", value = v[4], low = v[4] * 0.8, high = v[4] * 1.3, n = 163 },
      agreement = { name = "top1_agreement", value = 1 - 3 * v[4], low = 1 - 4 * v[4], high = 1 - 2 * v[4],
        n = 163 },
      accuracy = { n = 163, correct = 98 - 2 * i, accuracy = (98 - 2 * i) / 163,
        wilson = { stats.wilson(98 - 2 * i, 163) } } }
  end
  return { kind = "variants", task = "virology", questions = 163, scored = 163, too_long = 0, context = 4096,
    note = "Every variant is made from the same checkpoint.", data = { path = "virology.csv", all = 163 },
      rows = rows }
end

function documents.perplexity()
  local function figure(value, stderr) return { value = value, stderr = stderr } end
  return { kind = "perplexity", text = "wikitext.txt", sha256 = ("f"):rep(64), protocol = { context = 512,
    stride = 512,
    scored_per_window = 255, windows = 40, windows_in_text = 40, tokens_in_text = 20480,
    description = "40 windows of 512 tokens, stride 512" },
    summary = { n = 10200, reference = figure(7.214, 0.051), test = figure(7.446, 0.053),
      ratio = figure(1.0322, 0.0019),
      log_ratio = figure(0.03169, 0.00184), correlation = 0.9951, kl = figure(0.0412, 0.0009),
      kl_percentiles = { { share = 0, value = 0 }, { share = 0.5, value = 0.011 }, { share = 0.9,
        value = 0.1 },
        { share = 0.95, value = 0.17 }, { share = 0.99, value = 0.42 }, { share = 1, value = 3.1 } },
      delta_p = figure(-0.0061, 0.0004), delta_p_rms = figure(0.051, 0.001), same_top = figure(0.917,
        0.0027) } }
end

--- A document with these sections.
function documents.document(sections, fields)
  local doc = { format = 1, run = 3, name = "mmlu.lua", started = 1793000000, finished = 1793000600,
    status = "finished", command = { "examples/mmlu.lua", "--model", "models/Llama-3-8B-Instruct" },
    options = { model = "models/Llama-3-8B-Instruct" }, script_sha256 = ("a"):rep(64),
      labels = { "full", "nf4" },
    facts = { qlua_version = "0.1.0", seed = 1, numerics = "fast", model_sha256 = ("b"):rep(64),
      device = { name = "cuda:0", hardware = "NVIDIA A100", isa = "sm_80", driver = "driver 13.0" },
      full = { dtype = "bfloat16", bytes = 16060522496, quant = { label = "bfloat16" } },
      quantized = { dtype = "bfloat16", bytes = 5504000000, quant = { label = "nf4", bits = 4.13 } } },
    fairness = { checks = { { name = "resident", text = "both models lie wholly on cuda:0", ok = true },
      { name = "synchronisation", text = "the clock stops after the device", ok = true },
      { name = "order", text = "the models take turns, each first in half of the rounds", ok = true },
      { name = "dtypes", text = "full bfloat16; nf4 decoded to bfloat16" } } },
    rows = { reused = 40, ran = 120 }, sections = sections }
  for key, value in pairs(fields or {}) do doc[key] = value end
  return doc
end

--- The whole study in one document, and its rows by set.
function documents.study(n)
  n = n or 163
  local scored, written = documents.rows(n, { seed = 11 }), documents.rows(79, { seed = 12, written = true,
    full = 0.57, keeps = 0.76 })
  local one, two = documents.outcome("mmlu_virology", scored),
    documents.outcome("mmlu_virology_boxed", written,
    { written = true })
  document.holm { one.comparison, two.comparison }
  local rows = { [one.set] = scored, [two.set] = written }
  local doc = documents.document { documents.sweep { oom = 32 }, documents.metrics(n),
    { kind = "mmlu", protocol = "sound", outcomes = { one, two } }, documents.variants(),
      documents.perplexity() }
  return doc, function(_, set) return rows[set] end
end

return documents
