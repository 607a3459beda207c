#!/usr/bin/env qlua
--- Is NF4's code book the right one? NF4, FP4 and sixteen numbers of your own, on the same questions.
---
--- A code book is a Lua file that returns 16 numbers in any order and unit; the largest magnitude is scaled
--- to the block's largest weight. Without --codebook, sixteen evenly spaced values (what "int4" would be)
--- stand in for yours.

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local results = require "qlua.results"
local variants = require "qlua.variants"

local opts = cli.parse {
  name = "codebook.lua",
  summary = "NF4, FP4 and a code book of your own on the same questions.",
  options = experiment.options {
    { "tasks", default = { experiment.bundled_task } }, "limit", "batch_size",
    { "codebook", metavar = "FILE", help = "Lua file that returns 16 numbers (default: evenly spaced ones)" },
  },
}
local run <close> = experiment.open("codebook.lua", opts, { twin = false })

local function own_codebook()
  if not opts.codebook then
    local even = {}
    for i = 0, 15 do even[i + 1] = -1 + 2 * i / 15 end
    return even, "evenly spaced"
  end
  local chunk, why = loadfile(opts.codebook, "t")
  if not chunk then run:must(nil, why) end
  local ok, numbers = pcall(chunk)
  local good, largest = ok and type(numbers) == "table" and #numbers == 16, 0
  for i = 1, good and 16 or 0 do
    local x = numbers[i]
    good = good and math.type(x) and math.abs(x) < math.huge
    largest = good and math.max(largest, math.abs(x)) or largest
  end
  if not good or largest == 0 then
    run:must(nil, opts.codebook .. ": does not return 16 finite numbers, not all of them zero")
  end
  return numbers, opts.codebook
end

local codebook, name = own_codebook()
local block, skip, double = opts.block_size, opts.skip, opts.double_quant == "true"
local rows = variants.run(run, {
  { label = "full" },
  { label = "nf4", spec = { scheme = "nf4", block = block, double = double, skip = skip } },
  { label = "fp4", spec = { scheme = "fp4", block = block, double = double, skip = skip } },
  { label = name, spec = { codebook = codebook, block = block, double = double, skip = skip } },
})
results.variants(run, rows,
  ("All 4-bit variants: block %d, %s; KL and agreement at the answer's letter, against full."):format(
  block, double and "double quantization" or "float32 scales"))
run:finish()
