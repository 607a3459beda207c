--- A metric in a file: qlua examples/jaccard.lua --metric examples/metrics/rank.lua
---
--- The place that the full model's favourite token has in the quantized model's order: 1 = it is still the
--- favourite. A metric needs a name, add(reference, test, item) and value(); `values`, one number an item,
--- is optional and brings an interval and a median. reference and test are logits [vocab].

local rank = { name = "rank_of_favourite", higher_is_better = false, values = {} }

function rank:add(reference, test)
  local favourite = reference:argmax()
  local own = test:gather(favourite)
  local place = 1
  for id, logit in ipairs(test:totable()) do
    if logit > own or (logit == own and id - 1 < favourite) then place = place + 1 end
  end
  self.values[#self.values + 1] = place
end

function rank:value()
  local sum = 0
  for _, place in ipairs(self.values) do sum = sum + place end
  return sum / #self.values
end

return rank
