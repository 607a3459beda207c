/* Causal grouped-query attention with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
 *
 * A sequence's keys are taken in blocks of 64 counted from its first position, and the running maximum, sum
 * and output of a query are rescaled at the block borders only. Every QK_ATTENTION_RUN positions they begin
 * anew, and what the runs gave is joined in their order; so the runs of a long context can be spread over
 * threads. Every sum has a fixed order, so the bits of a token do not depend on which tokens and heads share
 * the call nor on who computes its runs: prefill equals decode. The queries of a group and of adjacent tokens
 * go through a block together, while its keys and values are in cache; memory does not grow with the context.
 */
#include "ops.h"

#include <math.h>

enum {
    KEYS = 64,    /* keys a block */
    QUERIES = 64, /* most queries, (token, head) pairs, taken through the blocks together */
    SIDE = 4,     /* of them that go through a block side by side: 8 accumulators of AVX2 */
#ifdef QK_ISA_avx512
    WIDE = 8, /* vectors of an output row kept in registers at a time */
#else
    WIDE = 4,
#endif
};

/* Attention of one query to some of its keys, with weights exp(score - max): `out` is not divided yet. */
typedef struct {
    float *out; /* [d] padded to 16, the sum of values so far */
    float max, sum;
} state;

typedef struct {
    const float *q;
    int64_t len; /* keys it sees */
    state all, run;
} query;

/* s[x][j] = q[x] . key[j] * scale for j < count, minus infinity up to KEYS; a key is loaded once for n
 * queries.
 */
QK_INLINE void score_block(const float *const *q, int n, const float *keys, int d, int count, float scale,
                           float (*s)[KEYS])
{
    float acc[SIDE][256] __attribute__((aligned(64)));
    const v16 vscale = v16_set1(scale);
    for (int j = 0; j < KEYS; j += 16) {
        if (j >= count) {
            for (int x = 0; x < n; x++) v16_store(s[x] + j, v16_set1(-INFINITY));
            continue;
        }
        int m = count - j < 16 ? count - j : 16;
        for (int r = 0; r < m; r++) {
            const float *key = keys + (int64_t)(j + r) * d;
            v16 a[SIDE];
            int i = 0;
            QK_UNROLL for (int x = 0; x < n; x++) a[x] = v16_zero();
            for (; i + 16 <= d; i += 16) {
                v16 k = v16_load(key + i);
                QK_UNROLL for (int x = 0; x < n; x++) a[x] = v16_fma(k, v16_load(q[x] + i), a[x]);
            }
            if (i < d) {
                v16 k = v16_load_n(key + i, d - i);
                QK_UNROLL for (int x = 0; x < n; x++) a[x] = v16_fma(k, v16_load_n(q[x] + i, d - i), a[x]);
            }
            QK_UNROLL for (int x = 0; x < n; x++) v16_store(acc[x] + 16 * r, a[x]);
        }
        for (int x = 0; x < n; x++) {
            for (int r = m; r < 16; r++) v16_store(acc[x] + 16 * r, v16_zero());
            v16_store(s[x] + j, v16_mul(v16_hsum16(acc[x]), vscale));
            for (int r = m; r < 16; r++) s[x][j + r] = -INFINITY;
        }
    }
}

static void score_one(const float *const *q, const float *keys, int d, int count, float scale,
                      float (*s)[KEYS])
{
    score_block(q, 1, keys, d, count, scale, s);
}

static void score_side(const float *const *q, const float *keys, int d, int count, float scale,
                       float (*s)[KEYS])
{
    score_block(q, SIDE, keys, d, count, scale, s);
}

/* out[0 .. 16 * vectors) = out * factor + sum_j p[j] value[j], j ascending. */
QK_INLINE void add_values(float *out, const float *values, int d, int vectors, const float *p, int count,
                          float factor)
{
    v16 o[WIDE];
    QK_UNROLL for (int i = 0; i < vectors; i++) o[i] = v16_mul(v16_load(out + 16 * i), v16_set1(factor));
    for (int j = 0; j < count; j++) {
        v16 w = v16_set1(p[j]);
        QK_UNROLL for (int i = 0; i < vectors; i++)
        {
            o[i] = v16_fma(w, v16_load(values + (int64_t)j * d + 16 * i), o[i]);
        }
    }
    QK_UNROLL for (int i = 0; i < vectors; i++) v16_store(out + 16 * i, o[i]);
}

static void add_values_all(float *out, const float *values, int d, const float *p, int count, float factor)
{
    int i = 0;
    for (; i + 16 * WIDE <= d; i += 16 * WIDE) add_values(out + i, values + i, d, WIDE, p, count, factor);
    if (WIDE > 4)
        for (; i + 64 <= d; i += 64) add_values(out + i, values + i, d, 4, p, count, factor);
    for (; i + 16 <= d; i += 16) add_values(out + i, values + i, d, 1, p, count, factor);
    if (i == d) return;
    v16 o = v16_mul(v16_load_n(out + i, d - i), v16_set1(factor));
    for (int j = 0; j < count; j++) {
        o = v16_fma(v16_set1(p[j]), v16_load_n(values + (int64_t)j * d + i, d - i), o);
    }
    v16_store_n(out + i, o, d - i);
}

/* The scores s of a block's keys, and its values, into a query's state. */
static void through_block(state *it, float *s, const float *values, int d, int count)
{
    v16 v[KEYS / 16];
    QK_UNROLL for (int j = 0; j < KEYS / 16; j++) v[j] = v16_load(s + 16 * j);
    float top = v16_hmax(v16_max(v16_max(v[0], v[1]), v16_max(v[2], v[3])));
    float max = top > it->max ? top : it->max;
    v16 vmax = v16_set1(max);
    QK_UNROLL for (int j = 0; j < KEYS / 16; j++)
    {
        v[j] = v16_exp(v16_sub(v[j], vmax));
        v16_store(s + 16 * j, v[j]);
    }
    float lanes[16];
    v16_store(lanes, v16_exp(v16_sub(v16_set1(it->max), vmax)));
    it->sum = it->sum * lanes[0] + v16_hsum(v16_add(v16_add(v[0], v[1]), v16_add(v[2], v[3])));
    it->max = max;
    add_values_all(it->out, values, d, s, count, lanes[0]);
}

static void start(state *it, float *out, int stride)
{
    *it = (state){out, -INFINITY, 0};
    memset(out, 0, (size_t)stride * sizeof(float));
}

/* all = all and then next. */
static void join(state *all, const state *next, int stride)
{
    float max = next->max > all->max ? next->max : all->max, lanes[32];
    v16_store(lanes, v16_exp(v16_sub(v16_set1(all->max), v16_set1(max))));
    v16_store(lanes + 16, v16_exp(v16_sub(v16_set1(next->max), v16_set1(max))));
    v16 before = v16_set1(lanes[0]), after = v16_set1(lanes[16]);
    all->sum = all->sum * lanes[0] + next->sum * lanes[16];
    all->max = max;
    for (int e = 0; e < stride; e += 16) {
        v16 o = v16_mul(v16_load(all->out + e), before);
        v16_store(all->out + e, v16_fma(v16_load(next->out + e), after, o));
    }
}

static void finish(const state *all, int d, float *y)
{
    v16 sum = v16_set1(all->sum);
    for (int e = 0; e < d; e += 16) {
        v16_store_n(y + e, v16_div(v16_load(all->out + e), sum), d - e < 16 ? d - e : 16);
    }
}

static int padded(const qk_attention *a)
{
    return (a->d + 15) / 16 * 16;
}

/* Some queries of one sequence and cache head. */
typedef struct {
    query list[QUERIES];
    int count;
    int64_t longest;            /* keys */
    const float *keys, *values; /* of the sequence's first position */
    int d, stride;
    float scale;
} party;

/* Queries [i0, i1), counted as token * group + head within the group; rows of `out` for their states. */
static void gather(const qk_attention *a, int64_t first_token, int64_t i0, int64_t i1, int kv_head,
                   float *out, party *p)
{
    const int group = a->heads / a->kv_heads;
    const int64_t offset = (kv_head * a->slots + a->start[first_token]) * a->d;
    p->d = a->d;
    p->stride = padded(a);
    p->scale = 1.0f / sqrtf((float)a->d);
    p->keys = a->k + offset;
    p->values = a->v + offset;
    p->count = (int)(i1 - i0);
    p->longest = 0;
    for (int64_t i = i0; i < i1; i++, out += 2 * p->stride) {
        int64_t t = first_token + i / group, head = (int64_t)kv_head * group + i % group;
        query *it = &p->list[i - i0];
        *it = (query){.q = a->q + (t * a->heads + head) * a->d, .len = (int64_t)a->pos[t] + 1};
        it->all.out = out;
        it->run.out = out + p->stride;
        if (it->len > p->longest) p->longest = it->len;
    }
}

/* Keys of the block from `j` that a query sees. */
static int seen(const query *it, int64_t j)
{
    return it->len - j <= 0 ? 0 : it->len - j < KEYS ? (int)(it->len - j) : KEYS;
}

/* Queries from i on through the block from position `j`: SIDE of them side by side where they see as many of
 * its keys, as the heads of a token do, else one. Returns how many. */
static int through_side(party *p, int i, int64_t run, int64_t j)
{
    float s[SIDE][KEYS] __attribute__((aligned(64)));
    const float *q[SIDE], *keys = p->keys + j * p->d;
    const int count = seen(&p->list[i], j);
    int n = 1;
    while (n < SIDE && i + n < p->count && seen(&p->list[i + n], j) == count) n++;
    if (n < SIDE) n = 1;
    if (count == 0) return n;
    for (int x = 0; x < n; x++) q[x] = p->list[i + x].q;
    (n == 1 ? score_one : score_side)(q, keys, p->d, count, p->scale, s);
    for (int x = 0; x < n; x++) {
        query *it = &p->list[i + x];
        through_block(run ? &it->run : &it->all, s[x], p->values + j * p->d, p->d, count);
    }
    return n;
}

/* All queries through run `run`, into their `run` states, or their `all` states when it is the first. */
static void through_run(party *p, int64_t run)
{
    const int64_t first = run * QK_ATTENTION_RUN;
    int64_t last = first + QK_ATTENTION_RUN < p->longest ? first + QK_ATTENTION_RUN : p->longest;
    for (int i = 0; i < p->count; i++) {
        state *it = run ? &p->list[i].run : &p->list[i].all;
        start(it, it->out, p->stride);
    }
    for (int64_t j = first; j < last; j += KEYS) {
        for (int i = 0, n; i < p->count; i += n) n = through_side(p, i, run, j);
    }
}

static void attend(const qk_attention *a, party *p)
{
    for (int64_t run = 0; run * QK_ATTENTION_RUN < p->longest; run++) {
        through_run(p, run);
        for (int i = 0; run && i < p->count; i++) {
            query *it = &p->list[i];
            if (it->len > run * QK_ATTENTION_RUN) join(&it->all, &it->run, p->stride);
        }
    }
    for (int i = 0; i < p->count; i++) finish(&p->list[i].all, p->d, a->y + (p->list[i].q - a->q));
}

/* The record of a query, whose place follows from where it lies in a->q. */
static float *record_of(const qk_attention *a, const float *q, int64_t run)
{
    return a->partial + ((q - a->q) / a->d * a->runs + run) * QK_ATTENTION_RECORD(a->d);
}

static void attend_run(const qk_attention *a, party *p, int64_t run)
{
    if (p->longest <= run * QK_ATTENTION_RUN) return;
    for (int i = 0; i < p->count; i++) {
        query *it = &p->list[i];
        /* a token that ends before this run has room for a record, too: nobody reads it */
        it->all.out = it->run.out = record_of(a, it->q, run);
    }
    through_run(p, run);
    for (int i = 0; i < p->count; i++) {
        const state *it = run ? &p->list[i].run : &p->list[i].all;
        it->out[p->stride] = it->max;
        it->out[p->stride + 1] = it->sum;
    }
}

/* Every sequence of tokens [t0, t1), in parties that fit the scratch. run < 0: the whole of them. */
static void for_parties(const qk_attention *a, int64_t t0, int64_t t1, int kv_head, int64_t run,
                        void *scratch)
{
    const int group = a->heads / a->kv_heads;
    int64_t room = QK_ATTENTION_SCRATCH / (2 * padded(a) * (int64_t)sizeof(float));
    if (room > QUERIES) room = QUERIES;
    for (int64_t t = t0; t < t1;) {
        int64_t end = t + 1;
        while (end < t1 && a->start[end] == a->start[t]) end++;
        int64_t count = (end - t) * group;
        for (int64_t i = 0; i < count; i += room) {
            party p;
            gather(a, t, i, count - i < room ? count : i + room, kv_head, scratch, &p);
            if (run < 0)
                attend(a, &p);
            else
                attend_run(a, &p, run);
        }
        t = end;
    }
}

void QK_NAME(attention)(const qk_attention *a, int64_t t0, int64_t t1, int kv_head, void *scratch)
{
    for_parties(a, t0, t1, kv_head, -1, scratch);
}

void QK_NAME(attention_run)(const qk_attention *a, int64_t t0, int64_t t1, int kv_head, int64_t run,
                            void *scratch)
{
    for_parties(a, t0, t1, kv_head, run, scratch);
}

void QK_NAME(attention_join)(const qk_attention *a, int64_t t0, int64_t t1, int kv_head)
{
    const int group = a->heads / a->kv_heads, stride = padded(a);
    for (int64_t t = t0; t < t1; t++) {
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
            const int64_t row = (t * a->heads + head) * a->d;
            float *first = record_of(a, a->q + row, 0);
            state all = {first, first[stride], first[stride + 1]};
            for (int64_t run = 1; run * QK_ATTENTION_RUN <= a->pos[t]; run++) {
                float *r = record_of(a, a->q + row, run);
                join(&all, &(state){r, r[stride], r[stride + 1]}, stride);
            }
            finish(&all, a->d, a->y + row);
        }
    }
}
