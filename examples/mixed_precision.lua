#!/usr/bin/env qlua
--- Which parts of a model may be quantized?
---
--- First each layer (or kind of matrix) alone in 4 bits, ranked by how far it moves the answers (KL
--- divergence from the full model). Then layers are quantized one after the other, the harmless ones first:
--- how much memory buys how much drift.

local cli = require "qlua.cli"
local experiment = require "qlua.experiment"
local results = require "qlua.results"
local variants = require "qlua.variants"

local opts = cli.parse {
  name = "mixed_precision.lua",
  summary = "Which layers or kinds of matrices may be quantized: a policy swept from Lua.",
  options = experiment.options {
    { "tasks", default = { experiment.bundled_task } }, { "limit", default = 100 }, "batch_size",
    { "by", default = "layer", choices = { "layer", "kind" }, help = "what is quantized together" },
  },
}
local run <close> = experiment.open("mixed_precision.lua", opts, { twin = false })

--- The group a matrix belongs to: "layer 3", or "mlp.up_proj".
local function group_of(name)
  local layer, kind = name:match "^model%.layers%.(%d+)%.(.+)$"
  if not layer then return nil end
  return opts.by == "layer" and "layer " .. layer or kind
end

local groups, known = {}, {}
for _, m in ipairs(run.full:matrices()) do
  local group = group_of(m.name)
  if group and not known[group] then
    known[group] = true
    groups[#groups + 1] = group
  end
end

--- Quantize only the matrices whose group is in `chosen`.
local function only(chosen)
  local scheme = run:scheme()
  scheme.policy = function(name) return chosen[group_of(name)] and opts.quant or nil end
  return scheme
end

local alone = {}
for i, group in ipairs(groups) do alone[i] = { label = "only " .. group, spec = only { [group] = true },
  group = group } end
local measured = variants.run(run, alone)
for i, row in ipairs(measured) do row.group = groups[i] end
table.sort(measured, function(a, b)
  if a.kl.value ~= b.kl.value then return a.kl.value < b.kl.value end
  return a.group < b.group
end)

local steps, chosen = { { label = "full" } }, {}
for i, row in ipairs(measured) do
  chosen[row.group] = true
  local now = {}
  for group in pairs(chosen) do now[group] = true end
  steps[i + 1] = { label = "+ " .. row.group, spec = only(now) }
end
local cumulative = run.stopped and {} or variants.run(run, steps)
table.move(cumulative, 1, #cumulative, #measured + 1, measured)
results.variants(run, measured,
  ("Above: one %s in %s at a time, least harm first. Below: added up in that order."):format(
  opts.by, opts.quant))
run:finish()
