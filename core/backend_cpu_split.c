/* How the CPU backend cuts an operation into pieces; arithmetic only, so that it can be tried for machines
 * that are not at hand (tests/core/test_split.c). What is cut where never changes a bit of the result. */
#include "backend_cpu.h"

enum {
    INLINE_WORK = 1 << 16, /* multiply-adds, or so, that are not worth another thread */
    PIECE_WORK = 1 << 14,  /* at least, in a piece: a few microseconds, as long as meeting again takes */
    PIECES = 8,            /* a thread, at most: enough to even out a busy machine */
    ATTENTION_TOKENS = 16, /* tokens a piece of attention: its keys are read once for all of them */
    PARTIAL_BYTES = 64 << 20,
};

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

cpu_split ql_cpu_split(int threads, int64_t total, int64_t unit, double work)
{
    cpu_split s = {total, unit, 1};
    double all = (double)total * work;
    if (threads == 1 || all <= INLINE_WORK) return s;
    double worth = all / PIECE_WORK;
    int64_t units = divide_up(total, unit), most = least((int64_t)threads * PIECES, units);
    s.pieces = worth < (double)most ? (int64_t)worth : most;
    /* as many for each thread */
    if (s.pieces > threads) s.pieces = s.pieces / threads * threads;
    if (s.pieces < 1) s.pieces = 1;
    return s;
}

void ql_cpu_piece(const cpu_split *s, int64_t piece, int64_t *i0, int64_t *i1)
{
    int64_t units = divide_up(s->total, s->unit);
    *i0 = piece * units / s->pieces * s->unit;
    *i1 = least((piece + 1) * units / s->pieces * s->unit, s->total);
}

int64_t ql_cpu_product_unit(int threads, int64_t n, int64_t multiple)
{
    const int64_t units[] = {multiple, 16, 4}; /* kernels fold 16 outputs at a time, and read 2 to 8 rows */
    int64_t best = multiple;
    double evenness = 0;
    for (int i = 0; i < 3; i++) {
        /* the mean share over the largest */
        double even = (double)n / (double)(divide_up(divide_up(n, units[i]), threads) * units[i] * threads);
        if (even <= evenness) continue;
        best = units[i];
        evenness = even;
        if (even >= 0.95) break;
    }
    return best;
}

cpu_attention_split ql_cpu_split_attention(int threads, int64_t tokens, int kv_heads, int64_t longest,
                                           double work, int64_t record_bytes)
{
    cpu_attention_split s = {
        .tokens = tokens, .step = ATTENTION_TOKENS, .runs = 1, .kv_heads = kv_heads, .threads = threads};
    if (work <= INLINE_WORK) s.threads = threads = 1;
    const int64_t enough = (int64_t)threads * PIECES;
    while (s.step > 1 && divide_up(tokens, s.step) * kv_heads < enough) s.step /= 2;
    int64_t pieces = divide_up(tokens, s.step) * kv_heads, runs = divide_up(longest, QK_ATTENTION_RUN);
    if (threads > 1 && pieces < enough && runs <= PARTIAL_BYTES / (tokens * record_bytes)) s.runs = runs;
    s.columns = divide_up(pieces * s.runs, threads);
    s.pieces = s.columns * threads;
    return s;
}

bool ql_cpu_attention_piece(const cpu_attention_split *s, int64_t piece, int64_t *t0, int64_t *t1,
                            int *kv_head, int64_t *run)
{
    /* ql_pool_share gives a thread `columns` pieces in a row: they are dealt out in turn */
    int64_t number = piece % s->columns * s->threads + piece / s->columns;
    int64_t groups = divide_up(s->tokens, s->step), group = number / (s->kv_heads * s->runs);
    if (group >= groups) return false;
    *t0 = (groups - 1 - group) * s->step;
    *t1 = least(*t0 + s->step, s->tokens);
    *kv_head = (int)(number % s->kv_heads);
    *run = number / s->kv_heads % s->runs;
    return true;
}
