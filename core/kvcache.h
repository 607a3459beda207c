/* Keys and values of past tokens for several sequences of different length without padding.
 *
 * Per layer K and V are [kv_heads, slots, D] in F32, F16 or BF16; sequence i owns slots start[i] .. start[i]
 * + capacity[i]. The cache owns its tensors, charged to the arena as QL_MEM_KV. Freed by ql_kvcache_free;
 * empty and safe to free after a failed creation.
 */
#ifndef QL_KVCACHE_H
#define QL_KVCACHE_H

#include "backend.h"

typedef struct {
    int layers, sequences;
    ql_tensor *k, *v;                   /* [layers] tensors [kv_heads, slots, D] */
    ql_kv_view *view;                   /* [layers] of them */
    int32_t *start, *capacity, *length; /* [sequences], in tokens */
} ql_kvcache;

/* capacity: [sequences] tokens, each at least 1. */
ql_status ql_kvcache_new(ql_device *dev, ql_arena *arena, int layers, int64_t kv_heads, int64_t head_dim,
                         ql_dtype dtype, int sequences, const int32_t *capacity, ql_kvcache *out /* [OUT] */,
                         ql_err *err);
/* Sequence `to` of `dst`, which is empty, begins with what sequence `from` of `src` holds: two caches of one
 * model. The slots are copied on the device. */
ql_status ql_kvcache_copy(const ql_kvcache *src, int from, ql_kvcache *dst, int to, ql_err *err);
void ql_kvcache_free(ql_kvcache *c);

#endif
