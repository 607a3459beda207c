#include "interrupt.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <lauxlib.h>
#include <lualib.h>

#include "../core/interrupt.h"

enum {
    CHAIN_MAX = 256,   /* Lua itself refuses to nest more than about 200 resumes */
    EXIT_SIGINT = 130, /* 128 + SIGINT, as shells report it */
    GRACE_MS = 250     /* for cleaning up after the first "interrupted!" */
};

/* chain[0] is the main thread, chain[depth - 1] the coroutine that runs now. The handler reads both, so an
 * entry is written before depth covers it and stays valid until depth has left it. */
static lua_State *volatile chain[CHAIN_MAX];
static volatile sig_atomic_t depth;
static volatile sig_atomic_t at_prompt;
static pthread_t lua_thread;

/* When the first error after Ctrl-C was raised, in ms; 0 while none was. Only the Lua thread touches it. */
static long long raised_at;

/* Lua's own functions, called in the frame of ours so that results, messages and levels stay theirs. */
static struct {
    lua_CFunction create, resume, close;
} original;

static long long now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000 + t.tv_nsec / 1000000 + 1;
}

static bool in_grace(void)
{
    return raised_at != 0 && now_ms() - raised_at < GRACE_MS;
}

/* level 0 names the function that a hook stopped, level 1 the caller of a C function */
static int raise_at(lua_State *L, int level)
{
    if (raised_at == 0) raised_at = now_ms();
    luaL_where(L, level);
    lua_pushliteral(L, "interrupted!");
    lua_concat(L, 2);
    return lua_error(L);
}

int qlua_interrupt_raise(lua_State *L)
{
    return raise_at(L, 1);
}

static void on_instruction(lua_State *L, lua_Debug *ar)
{
    (void)ar;
    if (!ql_interrupted())
        lua_sethook(L, NULL, 0, 0); /* armed for a Ctrl-C that is over */
    else if (!in_grace())
        raise_at(L, 0);
}

/* lua_sethook is the one function of Lua's API that may run at any moment, in a handler too. */
static void arm(lua_State *L)
{
    lua_sethook(L, on_instruction, LUA_MASKCOUNT, 1);
}

static void on_sigint(int signal_number)
{
    int saved = errno;
    if (!pthread_equal(pthread_self(), lua_thread)) {
        pthread_kill(lua_thread, signal_number); /* hooks may only be set from the thread that runs Lua */
    } else if (at_prompt) {
        ql_interrupt_set();
    } else if (ql_interrupted()) {
        _exit(EXIT_SIGINT);
    } else {
        ql_interrupt_set();
        int n = depth < CHAIN_MAX ? depth : CHAIN_MAX;
        for (int i = 0; i < n; i++) arm(chain[i]);
    }
    errno = saved;
}

static void chain_push(lua_State *co)
{
    int n = depth;
    if (n < CHAIN_MAX) chain[n] = co;
    atomic_signal_fence(memory_order_seq_cst);
    depth = n + 1;
    /* A Ctrl-C before this line did not see co, one after it does. */
    if (ql_interrupted()) arm(co);
}

static void chain_pop(void)
{
    depth = depth - 1;
    atomic_signal_fence(memory_order_seq_cst);
}

static bool chain_has(const lua_State *co)
{
    int n = depth < CHAIN_MAX ? depth : CHAIN_MAX;
    for (int i = 0; i < n; i++)
        if (chain[i] == co) return true;
    return false;
}

/* Given a thread as first argument, Lua's resume reports every failure as values: the pop is never jumped
 * over. */
static int tracked_resume(lua_State *L, lua_State *co)
{
    chain_push(co);
    int results = original.resume(L);
    chain_pop();
    return results;
}

static int resume(lua_State *L)
{
    lua_State *co = lua_tothread(L, 1);
    if (!co) return original.resume(L); /* for its argument error */
    if (ql_interrupted() && !in_grace()) return raise_at(L, 1);
    return tracked_resume(L, co);
}

static int call_wrapped(lua_State *L)
{
    lua_State *co = lua_tothread(L, lua_upvalueindex(1));
    if (ql_interrupted() && !in_grace()) return raise_at(L, 1);
    lua_pushvalue(L, lua_upvalueindex(1));
    lua_insert(L, 1);
    int results = tracked_resume(L, co);
    if (lua_toboolean(L, -results)) return results - 1;

    /* A coroutine that died of an error still holds its to-be-closed variables; closing them may change the
     * error. One that could not be resumed at all (dead, running) is left alone. */
    int status = lua_status(co);
    if (status != LUA_OK && status != LUA_YIELD) {
        lua_settop(L, 0);
        lua_pushvalue(L, lua_upvalueindex(1));
        chain_push(co);
        original.close(L);
        chain_pop();
    }
    if (status != LUA_ERRMEM && lua_type(L, -1) == LUA_TSTRING) {
        luaL_where(L, 1);
        lua_insert(L, -2);
        lua_concat(L, 2);
    }
    return lua_error(L);
}

static int wrap(lua_State *L)
{
    original.create(L);
    lua_pushcclosure(L, call_wrapped, 1);
    return 1;
}

static int close_thread(lua_State *L)
{
    lua_State *co = lua_tothread(L, 1);
    if (!co || chain_has(co)) return original.close(L); /* both are errors */
    chain_push(co);
    int results = original.close(L);
    chain_pop();
    return results;
}

static lua_CFunction replace(lua_State *L, const char *name, lua_CFunction ours)
{
    lua_getfield(L, -1, name);
    lua_CFunction theirs = lua_tocfunction(L, -1);
    lua_pop(L, 1);
    if (ours) {
        lua_pushcfunction(L, ours);
        lua_setfield(L, -2, name);
    }
    return theirs;
}

void qlua_interrupt_open(lua_State *L)
{
    lua_getglobal(L, LUA_COLIBNAME);
    original.create = replace(L, "create", NULL);
    original.resume = replace(L, "resume", resume);
    original.close = replace(L, "close", close_thread);
    replace(L, "wrap", wrap);
    lua_pop(L, 1);

    lua_thread = pthread_self();
    depth = 0;
    chain_push(L);

    /* Without SA_RESTART a blocked io.read returns and its caller meets the hook. Set even where the signal
     * was ignored, as `qlua script &` in a shell script does: an explicit kill -INT is meant. */
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_sigint;
    sigemptyset(&action.sa_mask);
    sigaction(SIGINT, &action, NULL);
}

void qlua_interrupt_close(void)
{
    depth = 0;
    atomic_signal_fence(memory_order_seq_cst);
}

void qlua_interrupt_clear(void)
{
    raised_at = 0;
    ql_interrupt_clear();
}

void qlua_interrupt_at_prompt(bool prompt)
{
    at_prompt = prompt;
}

static int pending(lua_State *L)
{
    lua_pushboolean(L, ql_interrupted());
    return 1;
}

static int clear(lua_State *L)
{
    (void)L;
    qlua_interrupt_clear();
    return 0;
}

int luaopen_qlua_interrupt(lua_State *L)
{
    static const luaL_Reg functions[] = {{"pending", pending}, {"clear", clear}, {NULL, NULL}};
    luaL_newlib(L, functions);
    return 1;
}
