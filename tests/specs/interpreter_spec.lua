--- The qlua binary as a program: everything that the stand-alone lua does, seen from outside.

local lfs = require "lfs"

local QLUA <const> = os.getenv("QLUA") or arg[-1]
local BYTECODE <const> = string.dump(function() print("ran") end)

local function quote(text)
  return "'" .. text:gsub("'", "'\\''") .. "'"
end

local function read(path)
  local file <close> = assert(io.open(path, "rb"))
  return file:read("a")
end

local folder -- of one test; removed with what is in it

local function write(name, text)
  local file <close> = assert(io.open(folder .. "/" .. name, "wb"))
  file:write(text)
  return folder .. "/" .. name
end

--- Run a shell command in the folder; $Q is the binary. Returns stdout, stderr, exit code.
local function shell(command)
  local out, err = folder .. "/.out", folder .. "/.err"
  -- leak checking needs ptrace, which containers and `script` do not always grant; the C tests have it
  local _, _, code = os.execute(("cd %s && export Q=%s HOME=%s QLUA_HISTORY= ASAN_OPTIONS=detect_leaks=0 && "
    .. "unset LUA_INIT LUA_INIT_5_4 LUA_PATH LUA_PATH_5_4 && { %s\n} >%s 2>%s </dev/null")
    :format(quote(folder), quote(QLUA), quote(folder), command, quote(out), quote(err)))
  return read(out), read(err), code
end

local function stdout_of(command)
  local out, err, code = shell(command)
  assert.equal("", err)
  assert.equal(0, code)
  return out
end

before_each(function()
  folder = os.tmpname()
  os.remove(folder)
  assert(lfs.mkdir(folder))
end)

after_each(function()
  os.execute("rm -rf " .. quote(folder))
end)

describe("options", function()
  it("-e runs statements in order, -l requires into a global", function()
    assert.equal("1\n2\n", stdout_of([[$Q -e 'x = 1 print(x)' -e'print(x + 1)']]))
    assert.equal("aa\n", stdout_of([[$Q -l string -e 'print(string.rep("a", 2))']]))
    write("mod.lua", "print('loading', ...) return { n = 5 }")
    assert.equal("loading\tmod\t./mod.lua\n5\n5\n",
      stdout_of([[$Q -l mod -l g=mod -e 'print(mod.n)' -e 'print(g.n)']]))
    write("lib-v2.lua", "return { n = 6 }")
    assert.equal("6\n", stdout_of([[$Q -llib-v2 -e 'print(lib.n)']]))
  end)

  it("-v prints the versions and stops where there is nothing to run", function()
    local out = stdout_of("$Q -v")
    assert.matches("^Lua 5%.4%.%d.*PUC%-Rio; qlua %d+%.%d+%.%d+\n$", out)
    assert.matches("PUC%-Rio[^\n]*\n7\n$", stdout_of("$Q -v -e 'print(7)'"))
  end)

  it("-E ignores the environment", function()
    assert.equal("init\n", stdout_of([[LUA_INIT="print('init')" $Q -e '']]))
    assert.equal("", stdout_of([[LUA_INIT="print('init')" $Q -E -e '']]))
    local show = [[-e 'print(package.path:match("/else"))']]
    assert.equal("nil\n", stdout_of("LUA_PATH='/else/?.lua' $Q -E " .. show))
    assert.equal("/else\n", stdout_of("LUA_PATH='/else/?.lua' $Q " .. show))
  end)

  it("-W and @on turn warnings on", function()
    local function stderr_of(command) return (select(2, shell(command))) end
    assert.equal("", stderr_of([[$Q -e 'warn("w")']]))
    assert.equal("Lua warning: w\n", stderr_of([[$Q -W -e 'warn("w")']]))
    assert.equal("Lua warning: ab\n",
      stderr_of([[$Q -e 'warn("@on") warn("a", "b") warn("@off") warn("c")']]))
    assert.equal("Lua warning: error in __gc\n",
      (stderr_of([[$Q -W -e 'setmetatable({}, {__gc = function() error("x", 0) end}) collectgarbage()']])
        :gsub("__gc.*\n", "__gc\n")))
  end)

  it("-- ends options, - runs standard input", function()
    write("-e", "print('a file named -e', ...)")
    assert.equal("a file named -e\tx\n", stdout_of("$Q -- -e x"))
    assert.equal("from stdin\ta\tb\n", stdout_of("echo 'print([[from stdin]], ...)' | $Q - a b"))
    assert.equal("no option\n", stdout_of("echo 'print([[no option]])' | $Q"))
    assert.equal("-\n", stdout_of("echo 'print(arg[0])' | $Q -"))
  end)

  it("that are wrong end with usage and 1", function()
    for option, message in pairs {
      ["-x"] = "unrecognized option '-x'", ["-vv"] = "unrecognized option '-vv'",
      ["--help"] = "unrecognized option '--help'",
      ["-e"] = "'-e' needs argument", ["-l"] = "'-l' needs argument", ["-e -v"] = "'-e' needs argument",
    } do
      local out, err, code = shell("$Q " .. option)
      assert.equal("", out)
      assert.matches("qlua: " .. message:gsub("%p", "%%%0") .. "\nusage: ", err)
      assert.equal(1, code)
    end
  end)

  it("give the same arg as lua5.4", function()
    write("args.lua", [[for i = -9, 9 do
        if arg[i] then print(i, i < 0 and arg[i]:match("[^/]*$") or arg[i]) end
      end
      print(select("#", ...), ...)]])
    assert.equal("-4\tqlua\n-3\t-e\n-2\tx=1\n-1\t--\n0\targs.lua\n1\ta\n2\t-e\n3\tb c\n3\ta\t-e\tb c\n",
      stdout_of("$Q -e 'x=1' -- args.lua a -e 'b c'"))
    assert.equal("qlua\t-e\n", (stdout_of([[$Q -e 'print(arg[0]:match("[^/]*$"), arg[1])']])))
    assert.equal("2\tz\n", stdout_of([[echo 'print(...)' > s.lua; $Q -e 'arg = {2, "z"}' s.lua]]))
    local _, err, code = shell([[echo '' > s.lua; $Q -e 'arg = 1' s.lua]])
    assert.matches("'arg' is not a table", err)
    assert.equal(1, code)
  end)
end)

describe("scripts", function()
  it("may start with a line for the shell", function()
    local path = write("tool", "#!/usr/bin/env qlua\nprint('tool', ...)\n")
    os.execute("chmod +x " .. quote(path))
    assert.equal("tool\t1\n", stdout_of([[mkdir bin; ln -s "$Q" bin/qlua; PATH="$PWD/bin:$PATH" ./tool 1]]))
    local _, err, code = shell("printf '#!x\\n\\nerror([[here]])' > s.lua; $Q s.lua")
    assert.matches("s.lua:3: here", err)
    assert.equal(1, code)
  end)

  it("find modules beside themselves and in the library, wherever they are started", function()
    lfs.mkdir(folder .. "/sub")
    write("sub/helper.lua", "return 'helped'")
    write("sub/main.lua", "print(require('helper'), type(require('qlua.strict')))")
    assert.equal("helped\ttable\n", stdout_of("$Q sub/main.lua"))
    assert.equal("helped\ttable\n", stdout_of("cd / && $Q " .. quote(folder .. "/sub/main.lua")))
    assert.equal("table\ttable\tfunction\n",
      stdout_of([[$Q -e 'print(type(require"argparse"), type(require"lfs"), type(require"lpeg".P))']]))
  end)

  it("see LUA_PATH and LUA_INIT, the versioned ones first", function()
    lfs.mkdir(folder .. "/a")
    lfs.mkdir(folder .. "/b")
    write("a/m.lua", "return 'a'")
    write("b/m.lua", "return 'b'")
    assert.equal("a\n", stdout_of([[LUA_PATH='a/?.lua' $Q -e 'print((require "m"))']]))
    assert.equal("b\n",
      stdout_of([[LUA_PATH='a/?.lua' LUA_PATH_5_4='b/?.lua;;' $Q -e 'print((require "m"))']]))
    assert.equal("2\n", stdout_of([[LUA_INIT='print(1)' LUA_INIT_5_4='print(2)' $Q -e '']]))
    write("init.lua", "print('init file')")
    assert.equal("init file\n", stdout_of("LUA_INIT=@init.lua $Q -e ''"))
    local _, err, code = shell([[LUA_INIT='error("no")' $Q -e 'print(1)']])
    assert.matches("LUA_INIT:1: no", err)
    assert.equal(1, code)
  end)

  it("end with the code they ask for", function()
    assert.equal(0, (select(3, shell("$Q -e 'return 5'"))))
    assert.equal(7, (select(3, shell("$Q -e 'os.exit(7)'"))))
    assert.equal(1, (select(3, shell("$Q -e 'os.exit(false)'"))))
    local out, _, code = shell([[$Q -e '
      local x <close> = setmetatable({}, {__close = function() print("closed") end})
      coroutine.wrap(function() os.exit(3, true) end)()']])
    assert.equal("closed\n", out)
    assert.equal(3, code)
    assert.equal("collected\n",
      stdout_of([[$Q -e 'x = setmetatable({}, {__gc = function() print("collected") end})']]))
  end)
end)

describe("errors", function()
  it("are shown with a traceback and end with 1", function()
    write("bad.lua", "local function f()\n  error('oops')\nend\nf()\n")
    local out, err, code = shell("$Q bad.lua")
    assert.equal("", out)
    assert.equal(1, code)
    assert.equal("qlua: bad.lua:2: oops\nstack traceback:\n\t[C]: in function 'error'\n\tbad.lua:2: in "
      .. "local 'f'\n\tbad.lua:4: in main chunk\n\t[C]: in ?\n",
      (err:gsub("^%S*qlua:", "qlua:"):gsub("in upvalue 'f'", "in local 'f'")))
  end)

  it("may be any value", function()
    local function first_line(code)
      local _, err = shell("$Q -e " .. quote(code))
      return err:match("qlua: ([^\n]*)\n")
    end
    assert.equal("(error object is a table value)", first_line("error({})"))
    assert.equal("(error object is a nil value)", first_line("error()"))
    assert.equal("12", first_line("error(12)"))
    local _, err = shell([[$Q -e 'error(setmetatable({}, {__tostring = function() return "speaks" end}))']])
    assert.matches("qlua: speaks\n$", err)
  end)

  it("name a file that is not there, and a syntax error", function()
    local _, err, code = shell("$Q absent.lua")
    assert.matches("qlua: cannot open absent.lua", err)
    assert.equal(1, code)
    _, err, code = shell("echo 'x =' > s.lua; $Q s.lua")
    assert.matches("qlua: s.lua:2: unexpected symbol near <eof>", err)
    assert.equal(1, code)
    _, err, code = shell("$Q -l no.such.module")
    assert.matches("qlua: module 'no.such.module' not found:", err)
    assert.equal(1, code)
  end)

  it("refuse bytecode as script, from stdin and as module", function()
    write("code.luac", BYTECODE)
    for _, command in ipairs { "$Q code.luac", "$Q - < code.luac", "$Q < code.luac",
      [[LUA_PATH='code.luac' $Q -l m]] } do
      local out, err, code = shell(command)
      assert.equal("", out)
      assert.matches("source only", err)
      assert.equal(1, code)
    end
  end)
end)

describe("subcommands", function()
  it("run from the library, but a file of that name wins", function()
    assert.matches("^usage: qlua doctor", stdout_of("$Q doctor --help"))
    write("doctor", "print('mine', ...)")
    assert.equal("mine\t--help\n", stdout_of("$Q doctor --help"))
    local _, err, code = shell("$Q doctors")
    assert.matches("qlua: cannot open doctors", err)
    assert.equal(1, code)
  end)
end)

describe("the prompt on a pipe", function()
  local function repl(input, options)
    write("input", input)
    local out, err = shell("$Q -i " .. (options or "") .. " < input")
    return out:gsub("^[^\n]*\n", "", 1), err
  end

  it("prints what expressions give and runs statements", function()
    assert.equal("> 3\n> > 5\n> 7\t8\n> nil\n> \n", (repl("1 + 2\nx = 5\nx\n=7, 8\nnil\n")))
  end)

  it("reads statements of several lines", function()
    assert.equal("> >> >> 1\n2\n> >> a\nb\n> \n", (repl("for i = 1, 2 do\nprint(i)\nend\n=[[a\nb]]\n")))
    local _, err = repl("for\n")
    assert.matches("^stdin:1: <name> expected near <eof>\n$", err)
  end)

  it("reports errors without a program name and goes on", function()
    local out, err = repl("error('e')\nx x\nlocal t = nil; t.x = 1\n'on'\n")
    assert.equal("> > > > on\n> \n", out)
    assert.matches("^stdin:1: e\nstack traceback:\n\t%[C%]: in function 'error'\n\tstdin:1: in main", err)
    assert.matches("stdin:1: syntax error near 'x'\n", err)
    assert.matches("attempt to index a nil value %(local 't'%)", err)
  end)

  it("takes _PROMPT and _PROMPT2, and a print of the program's own", function()
    local out = repl("_PROMPT = 'in: '\n"
      .. "_PROMPT2 = setmetatable({}, {__tostring = function() return '.. ' end})\nprint(\n1)\n")
    assert.equal("> in: in: .. 1\nin: \n", out)
    assert.equal("> > <1>\n> \n", (repl("function print(x) io.write('<', x, '>\\n') end\n1\n")))
  end)

  it("shows tables", function()
    assert.equal("> { 1, 2, x = { \"a\" } }\n> \n", (repl("{1, 2, x = {'a'}}\n")))
  end)

  it("comes after the script with -i", function()
    write("s.lua", "y = 9")
    assert.equal("> 9\n> \n", (repl("y\n", "s.lua")))
  end)
end)

describe("the prompt on a terminal", function()
  local has_terminal = os.execute("script -qec true /dev/null </dev/null >/dev/null 2>&1")

  it("edits, keeps a history, and comes back after Ctrl-C", function()
    if not has_terminal then return pending("no script(1), or no pseudo-terminal to be had") end
    -- \x03 typed on the terminal is the signal; \x10 (Ctrl-P) fetches the line before
    write("keys", [[
      type() { sleep 0.25; printf "$1"; }
      type '6 * 7\r'
      type 'while true do end\r'; type '\003'
      type '"half a li\003'
      type '"again"\r'
      type '\020\020\020\r'
      type '\004'
      sleep 0.25]])
    local out = shell([[sh keys | QLUA_HISTORY=$PWD/history TERM=xterm script -qec "$Q" /dev/null]])
    assert.matches("42\r\n", out)
    assert.matches("stdin:1: interrupted!", out)
    assert.matches("again\r\n", out)
    local _, answers = out:gsub("\n42\r\n", "")
    local history = read(folder .. "/history")
    assert.is_truthy(history:find("6\\040*\\0407", 1, true) or history:find("6 * 7", 1, true), history)
    assert.is_true(answers >= 1)
    assert.is_nil(history:find("half", 1, true))
  end)
end)

describe("Ctrl-C", function()
  --- Start the code, send SIGINT when it says "ready". Returns stdout, stderr, exit code, seconds.
  local function interrupt(code, signals)
    write("code.lua", "io.stdout:setvbuf('no') print('ready')\n" .. code)
    local again = (signals or 1) > 1 and "sleep 0.1; kill -INT $p 2>/dev/null;" or ""
    local out, err, status = shell([[: > printed; $Q code.lua > printed & p=$!
      while ! grep -q ready printed; do sleep 0.02; done
      sleep 0.1; kill -INT $p; from=$(date +%s%N); ]] .. again .. [[
      ( sleep 10; kill -KILL $p ) 2>/dev/null & guard=$!
      wait $p; code=$?
      kill $guard 2>/dev/null
      echo $(( ($(date +%s%N) - from) / 1000000 )) > took
      exit $code]])
    assert.equal("", out)
    local printed = read(folder .. "/printed"):gsub("^ready\n", "")
    return printed, err, status, tonumber(read(folder .. "/took")) / 1000
  end

  local programs = {
    ["a loop"] = "while true do end",
    ["a deep recursion"] =
      "local function f(n) if n == 0 then while true do end end return 1 + f(n - 1) end f(1000)",
    ["a pcall loop"] = "while true do pcall(function() while true do end end) end",
    ["nested pcall loops"] = "local function f(n) while true do pcall(f, n + 1) end end f(0)",
    ["a coroutine"] = "coroutine.wrap(function() while true do end end)()",
    ["coroutines in coroutines"] =
      "local function f(n) if n == 0 then while true do end end coroutine.wrap(f)(n - 1) end f(50)",
    ["a pcall loop in a coroutine"] =
      "local function f() for i = 1, 1e9 do end end coroutine.resume(coroutine.create(function()"
      .. " while true do pcall(f) end end)) while true do end",
    ["a loop that resumes"] = "local co = coroutine.wrap(function() while true do coroutine.yield() end end)"
      .. " while true do pcall(co) end",
    ["a loop that makes coroutines"] =
      "while true do local co = coroutine.create(function() while true do end end) coroutine.resume(co) end",
    ["a comparison inside sort"] = "local t = {} for i = 1, 100 do t[i] = i end"
      .. " while true do pcall(table.sort, t, function(a, b) for i = 1, 1e6 do end return a < b end) end",
    ["a coroutine that closes"] = "local co = coroutine.create(function()"
      .. " local x <close> = setmetatable({}, {__close = function() while true do end end})"
      .. " coroutine.yield() end) coroutine.resume(co) coroutine.close(co) while true do end",
    ["io.read"] = "os.execute('mkfifo pipe; sleep 3 >pipe &') io.input('pipe') io.read() while true do end",
  }
  for name, code in pairs(programs) do
    it("ends " .. name .. " with 130 within a second", function()
      local _, err, status, seconds = interrupt(code)
      assert.matches("qlua: code.lua:%d+: .*interrupted!\nstack traceback:\n", err)
      assert.equal(130, status)
      assert.is_true(seconds < 1, seconds .. " s")
    end)
  end

  it("leaves time for __close and error handlers", function()
    local out, _, status = interrupt([[
      local function saver(name)
        return setmetatable({}, {__close = function() for i = 1, 1e5 do end print(name) end})
      end
      local rows <close> = saver("rows")
      xpcall(function()
        local more <close> = saver("more")
        while true do end
      end, function(e) print("handled", e) return e end)
      coroutine.wrap(function() local last <close> = saver("last") error("again", 0) end)()]])
    assert.equal("handled\tcode.lua:8: interrupted!\nmore\nlast\nrows\n", out)
    assert.equal(130, status)
  end)

  it("can be taken as dealt with", function()
    local out, err, status = interrupt([[
      local interrupt = require "qlua.interrupt"
      print(interrupt.pending())
      print(pcall(function() while true do end end))
      print(interrupt.pending())
      interrupt.clear()
      for i = 1, 1e7 do end
      print(coroutine.wrap(function() return "goes on" end)())]])
    assert.equal("false\nfalse\tcode.lua:4: interrupted!\ntrue\ngoes on\n", out)
    assert.equal("", err)
    assert.equal(0, status)
  end)

  it("twice ends at once, whatever runs", function()
    local out, _, status, seconds = interrupt([[
      local x <close> = setmetatable({}, {__close = function() print("never") end})
      string.rep("a", 40):find(("a?"):rep(40) .. ("a"):rep(40))]], 2)
    assert.equal("", out)
    assert.equal(130, status)
    assert.is_true(seconds < 1)
  end)
end)
