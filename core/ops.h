/* Operations on tensors: shapes, dtypes and devices are checked here once, then the backend of the tensors
 * does the work. Output tensors are allocated by the caller. See backend.h for what each operation computes.
 */
#ifndef QL_OPS_H
#define QL_OPS_H

#include "backend.h"

ql_status ql_op_embed(const ql_matrix *table, const ql_tensor *ids, ql_tensor *y, ql_err *err);
ql_status ql_op_rmsnorm(const ql_tensor *x, const ql_tensor *w, float eps, ql_tensor *y, ql_err *err);
ql_status ql_op_matmul(const ql_tensor *x, const ql_matrix *w, bool add, ql_tensor *y, ql_err *err);
ql_status ql_op_rope(ql_tensor *x, const ql_tensor *pos, const ql_tensor *cos, const ql_tensor *sin,
                     int heads, ql_err *err);
ql_status ql_op_kv_write(const ql_tensor *k, const ql_tensor *v, const ql_tensor *start, const ql_tensor *pos,
                         ql_kv_view cache, ql_err *err);
/* One device; the caller sees to it that the runs do not meet. */
ql_status ql_op_kv_copy(ql_kv_view src, int64_t from, ql_kv_view dst, int64_t to, int64_t n, ql_err *err);
ql_status ql_op_attention(const ql_tensor *q, ql_kv_view cache, const ql_tensor *start, const ql_tensor *pos,
                          int heads, ql_tensor *y, ql_err *err);
ql_status ql_op_swiglu(const ql_tensor *gate, const ql_tensor *up, ql_tensor *y, ql_err *err);
ql_status ql_op_gather_rows(const ql_tensor *x, const ql_tensor *rows, ql_tensor *y, ql_err *err);
/* Indices in the host arrays are the caller's to check. */
ql_status ql_op_pass(ql_device *dev, const ql_pass *p, ql_err *err);

ql_status ql_op_topk(const ql_tensor *x, int k, ql_tensor *values, ql_tensor *ids, ql_err *err);
ql_status ql_op_logsumexp(const ql_tensor *x, double temperature, ql_tensor *out, ql_err *err);
/* targets may be NULL. */
ql_status ql_op_row_stats(const ql_tensor *x, const ql_tensor *targets, ql_tensor *stats, ql_tensor *found,
                          ql_err *err);
ql_status ql_op_softmax(const ql_tensor *x, double temperature, ql_tensor *y, ql_err *err);
ql_status ql_op_gather_cols(const ql_tensor *x, const ql_tensor *cols, ql_tensor *out, ql_err *err);
ql_status ql_op_kl(const ql_tensor *a, const ql_tensor *b, ql_tensor *out, ql_err *err);
ql_status ql_op_binary(ql_binary_op op, const ql_tensor *a, const ql_tensor *b, ql_tensor *y, ql_err *err);
/* y = a op scalar, or scalar op a when `reversed`. */
ql_status ql_op_binary_scalar(ql_binary_op op, const ql_tensor *a, float scalar, bool reversed, ql_tensor *y,
                              ql_err *err);
ql_status ql_op_convert(const ql_tensor *src, ql_tensor *dst, ql_err *err);
ql_status ql_op_find_bad(const ql_tensor *x, int64_t *at /* [OUT] */, ql_err *err);
ql_status ql_op_random(uint64_t seed, uint64_t first, ql_tensor *y, ql_err *err);
ql_status ql_op_quantize4(const ql_tensor *src, int block, const float thresholds[15],
                          const uint8_t order[16], int zero_code, ql_tensor *packed, ql_tensor *absmax,
                          ql_err *err);
ql_status ql_op_dequantize4(const ql_matrix *w, ql_tensor *dst, ql_err *err);
ql_status ql_op_pack4(const ql_matrix *w, ql_tensor *dst, int *layout /* [OUT] */, ql_err *err);
ql_status ql_op_unpack4(const ql_matrix *w, ql_tensor *dst, ql_err *err);

#endif
