/* Cosines and sines of rotary position embeddings (Su et al. 2021), grown as positions are asked for.
 *
 * Owns two device tensors F32 [positions, D/2]. Angles follow transformers' modeling_rope_utils.py:
 * frequencies and angle in float32, so that far positions rotate as they did in training; cos and sin then
 * rounded from float64.
 */
#ifndef QL_ROPE_H
#define QL_ROPE_H

#include "config.h"
#include "tensor.h"

typedef struct {
    float *inv_freq; /* [D/2] radians per position, host */
    int64_t half;    /* D/2 */
    int64_t positions;
    ql_tensor cos, sin;
} ql_rope;

/* Frequencies of `config`, no table yet. Free with ql_rope_free, also after a failure. */
ql_status ql_rope_init(const ql_config *config, ql_rope *out /* [OUT] */, ql_err *err);
/* Positions that a table reserved for `longest` has. */
int64_t ql_rope_positions(int64_t longest);
/* Make the table hold at least `positions`; doubles, so that decoding does not rebuild it each token. */
ql_status ql_rope_reserve(ql_rope *r, ql_device *dev, ql_arena *arena, int64_t positions, ql_err *err);
/* Give the tables back; the next ql_rope_reserve makes them again. */
void ql_rope_drop(ql_rope *r);
void ql_rope_free(ql_rope *r);

#endif
