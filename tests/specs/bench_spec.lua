-- What scripts/bench.lua prints: that the rows are complete. How fast they are is nobody's test.

local json = require "qlua.json"
local support = require "tests.specs.support"

local function run(arguments)
  local pipe = assert(io.popen(("ASAN_OPTIONS=detect_leaks=0 '%s' scripts/bench.lua %s 2>%s"):format(
    support.QLUA, arguments, arguments:find "json" and "/dev/null" or "&1")))
  local output = pipe:read "a"
  return output, pipe:close() == true
end

describe("bench", function()
  it("gives one row for each format, batch size and test", function()
    local output, ok = run "--shape tiny --formats bf16,nf4 --batch_sizes 1,2 --prefill 4 --decode 3 \z
      --rounds 1 --buffer 16 --output json"
    assert(ok, output)
    local result = assert(json.decode(output))
    assert.equal(2 * 2 * 2, #result.rows)
    assert.equal(2 * 2, #result.ceilings.read_bytes_per_second)
    for _, row in ipairs(result.rows) do
      assert.equal(row.test == "decode" and 3 or 1, #row.seconds)
      assert.equal("tiny", row.shape)
      for _, key in ipairs { "tokens_per_second", "bytes_per_token", "read_share", "peak_share" } do
        assert(row[key] > 0, key)
      end
    end
    -- bytes of a decode step: all matrices once, and keys and values of 4 + (3 - 1) / 2 + 1 tokens
    local row = result.rows[2]
    assert.equal("decode", row.test)
    local matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 256 * 64
    assert.equal(2 * matrices + 6 * (2 * 2 * 2 * 16 * 4), row.bytes_per_token)
  end)

  it("refuses what it does not know, and what does not fit", function()
    local output, ok = run "--shape llama-9"
    assert.falsy(ok)
    assert.truthy(output:find("no 'llama-9'", 1, true), output)
    output, ok = run "--shape tiny --batch_sizes 1 --prefill 500 --decode 64"
    assert.falsy(ok)
    assert.truthy(output:find("tiny ends at 512", 1, true), output)
  end)
end)
