/* The schedule of flash-decoding, for host and device: which positions a piece covers, where its partial
 * result lies, how many tokens one launch takes. tests/core/test_attention_split.c proves it exhaustively.
 *
 * Pieces are counted from a sequence's first position, so that the sum of a token depends on its own position
 * alone; `longest` and the number of tokens change the grid and the places in scratch, never the pieces.
 *
 * Scratch: QK_ATTENTION_COUNTERS counters (int32, zero between launches; their place depends on nothing, so
 * that calls of any shape may follow one another), then for every (token, head, piece) of a launch two
 * floats, its maximum and its sum, then d floats for each, its weighted values.
 */
#ifndef QK_ATTENTION_SPLIT_H
#define QK_ATTENTION_SPLIT_H

#include "qk_cuda.h"

#define QK_ATTENTION_COUNTERS 8192 /* 32 KiB: 64 tokens of 128 heads */
#define QK_ATTENTION_TOKENS 64     /* most tokens of one launch */
/* Most bytes of partial results, unless one token needs more: bounds the scratch of a long context. */
#define QK_ATTENTION_BUDGET ((int64_t)64 << 20)

typedef struct {
    int64_t tokens;  /* of one launch; 0: more heads than there are counters */
    int64_t splits;  /* of the longest sequence: the grid's, and the stride of the partial results */
    int64_t stats;   /* byte offset of [tokens][heads][splits][2] */
    int64_t partial; /* byte offset of [tokens][heads][splits][d] */
    int64_t bytes;   /* of the scratch */
} qk_attention_plan;

/* Pieces of a token that sees `length` positions, at least one. */
QK_HD int64_t qk_attention_splits(int64_t length)
{
    return (length + QK_ATTENTION_SPLIT - 1) / QK_ATTENTION_SPLIT;
}

/* Positions of piece `split`, which begin at split * QK_ATTENTION_SPLIT; 0 or less beyond the last piece. */
QK_HD int64_t qk_attention_count(int64_t length, int64_t split)
{
    int64_t left = length - split * QK_ATTENTION_SPLIT;
    return left < QK_ATTENTION_SPLIT ? left : QK_ATTENTION_SPLIT;
}

/* Number of a partial result: of the token counted within its launch. */
QK_HD int64_t qk_attention_record(int64_t token, int heads, int head, int64_t splits, int64_t split)
{
    return (token * heads + head) * splits + split;
}

/* `bytes` grows with every argument: scratch for the largest call serves all smaller ones. */
static inline qk_attention_plan qk_attention_plan_for(int64_t tokens, int heads, int d, int64_t longest)
{
    qk_attention_plan p = {0, qk_attention_splits(longest), 0, 0, 0};
    const int64_t record = (int64_t)(d + 2) * (int64_t)sizeof(float);
    const int64_t each = heads * p.splits * record;
    int64_t most = tokens < QK_ATTENTION_TOKENS ? tokens : QK_ATTENTION_TOKENS;
    p.tokens = most;
    if (p.tokens > QK_ATTENTION_COUNTERS / heads) p.tokens = QK_ATTENTION_COUNTERS / heads;
    if (p.tokens > 1 && p.tokens * each > QK_ATTENTION_BUDGET) {
        p.tokens = QK_ATTENTION_BUDGET / each > 1 ? QK_ATTENTION_BUDGET / each : 1;
    }
    int64_t room = most * each < QK_ATTENTION_BUDGET ? most * each : QK_ATTENTION_BUDGET;
    if (room < each) room = each;
    p.stats = (int64_t)QK_ATTENTION_COUNTERS * (int64_t)sizeof(int32_t);
    p.partial = p.stats + (p.tokens * heads * p.splits * 2 * (int64_t)sizeof(float) + 15) / 16 * 16;
    p.bytes = p.stats + room + 16; /* the statistics are rounded up to 16 bytes */
    return p;
}

#endif
