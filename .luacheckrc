std = "lua54"
max_line_length = 110
codes = true
ignore = { "211/_ENV" } -- reads of globals through a strict _ENV are not seen as uses
exclude_files = { "build*/**" }
files["tests/specs/**"] = { std = "+busted" }
files["scripts/qlua/meta.lua"] = { ignore = { "211", "212", "241" } } -- annotations only
