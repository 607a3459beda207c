/* Causal grouped-query attention with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022).
 *
 * A sequence's keys are taken in blocks of 64 counted from its first position, and the running maximum, sum
 * and output of a query are rescaled at the block borders only. Every sum has a fixed order, so the bits of a
 * token do not depend on which tokens and heads share the call: prefill equals decode. The queries of a group
 * and of adjacent tokens go through a block together, while its keys and values are in cache; memory does not
 * grow with the context.
 */
#include "ops.h"

#include <math.h>

enum {
    KEYS = 64,    /* keys a block */
    QUERIES = 64, /* most queries, (token, head) pairs, taken through the blocks together */
    WIDE = 8,     /* vectors of an output row kept in registers at a time */
};

typedef struct {
    const float *q;
    float *out;  /* [d], the sum of values so far */
    int64_t len; /* keys it sees */
    float max, sum;
} query;

/* s[j] = q . key[j] * scale for j < count, minus infinity up to KEYS. */
static void score_block(const float *q, const float *keys, int d, int count, float scale, float *s)
{
    float acc[256] __attribute__((aligned(64)));
    const v16 vscale = v16_set1(scale);
    for (int j = 0; j < KEYS; j += 16) {
        if (j >= count) {
            v16_store(s + j, v16_set1(-INFINITY));
            continue;
        }
        int n = count - j < 16 ? count - j : 16;
        for (int r = 0; r < n; r++) {
            const float *key = keys + (int64_t)(j + r) * d;
            v16 a = v16_zero();
            int i = 0;
            for (; i + 16 <= d; i += 16) a = v16_fma(v16_load(key + i), v16_load(q + i), a);
            if (i < d) a = v16_fma(v16_load_n(key + i, d - i), v16_load_n(q + i, d - i), a);
            v16_store(acc + 16 * r, a);
        }
        for (int r = n; r < 16; r++) v16_store(acc + 16 * r, v16_zero());
        v16_store(s + j, v16_mul(v16_hsum16(acc), vscale));
        for (int r = n; r < 16; r++) s[j + r] = -INFINITY;
    }
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
    for (; i + 64 <= d; i += 64) add_values(out + i, values + i, d, 4, p, count, factor);
    for (; i + 16 <= d; i += 16) add_values(out + i, values + i, d, 1, p, count, factor);
    if (i == d) return;
    v16 o = v16_mul(v16_load_n(out + i, d - i), v16_set1(factor));
    for (int j = 0; j < count; j++) {
        o = v16_fma(v16_set1(p[j]), v16_load_n(values + (int64_t)j * d + i, d - i), o);
    }
    v16_store_n(out + i, o, d - i);
}

static void through_block(query *it, const float *keys, const float *values, int d, int count, float scale)
{
    float s[KEYS] __attribute__((aligned(64)));
    score_block(it->q, keys, d, count, scale, s);
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

/* Queries [i0, i1) of one sequence and cache head, counted as token * group + head within the group. */
static void attend(const qk_attention *a, int64_t first_token, int64_t i0, int64_t i1, int kv_head,
                   float *out)
{
    const int d = a->d, group = a->heads / a->kv_heads, stride = (d + 15) / 16 * 16;
    const float scale = 1.0f / sqrtf((float)d);
    const int64_t offset = (kv_head * a->slots + a->start[first_token]) * d;
    query queries[QUERIES];
    int64_t longest = 0;
    for (int64_t i = i0; i < i1; i++) {
        int64_t t = first_token + i / group, head = (int64_t)kv_head * group + i % group;
        query *it = &queries[i - i0];
        *it = (query){a->q + (t * a->heads + head) * d, out + (i - i0) * stride, (int64_t)a->pos[t] + 1,
                      -INFINITY, 0};
        if (it->len > longest) longest = it->len;
        memset(it->out, 0, (size_t)stride * sizeof(float));
    }
    for (int64_t j = 0; j < longest; j += KEYS) {
        for (int64_t i = 0; i < i1 - i0; i++) {
            int64_t count = queries[i].len - j;
            if (count <= 0) continue;
            through_block(&queries[i], a->k + offset + j * d, a->v + offset + j * d, d,
                          count < KEYS ? (int)count : KEYS, scale);
        }
    }
    for (int64_t i = i0; i < i1; i++) {
        const query *it = &queries[i - i0];
        float *y = a->y + (it->q - a->q);
        v16 sum = v16_set1(it->sum);
        for (int e = 0; e < d; e += 16) {
            v16_store_n(y + e, v16_div(v16_load(it->out + e), sum), d - e < 16 ? d - e : 16);
        }
    }
}

void QK_NAME(attention)(const qk_attention *a, int64_t t0, int64_t t1, int kv_head, void *scratch)
{
    const int group = a->heads / a->kv_heads, stride = (a->d + 15) / 16 * 16;
    int64_t room = QK_ATTENTION_SCRATCH / (stride * (int64_t)sizeof(float));
    if (room > QUERIES) room = QUERIES;
    for (int64_t t = t0; t < t1;) {
        int64_t end = t + 1;
        while (end < t1 && a->start[end] == a->start[t]) end++;
        int64_t count = (end - t) * group;
        for (int64_t i = 0; i < count; i += room) {
            attend(a, t, i, count - i < room ? count : i + room, kv_head, scratch);
        }
        t = end;
    }
}
