/* Element types of stored tensors, as safetensors names them.
 *
 * qlua computes with F32, F16 and BF16 weights and 4-bit codes held in U8; the others are known so that a
 * file holding them is read and listed, never skipped.
 */
#ifndef QL_DTYPE_H
#define QL_DTYPE_H

#include <stdbool.h>
#include <stddef.h>

typedef enum {
    QL_F32 = 0,
    QL_F16,
    QL_BF16,
    QL_F64,
    QL_F8_E4M3,
    QL_F8_E5M2,
    QL_U8,
    QL_I8,
    QL_U16,
    QL_I16,
    QL_U32,
    QL_I32,
    QL_U64,
    QL_I64,
    QL_BOOL,
    QL_DTYPE_COUNT,
} ql_dtype;

/* Bytes of one element; 0 for a value outside the enum. */
size_t ql_dtype_size(ql_dtype dtype);

/* The spelling in safetensors headers, "F32"; "?" for a value outside the enum. */
const char *ql_dtype_name(ql_dtype dtype);

/* The spelling people use and config.json has, "float32"; "?" for a value outside the enum. */
const char *ql_dtype_label(ql_dtype dtype);

/* Read either spelling ("BF16", "bfloat16", "torch.bfloat16"); false when `text` names no type we know. */
bool ql_dtype_parse(const char *text, ql_dtype *out /* [OUT] */);

/* True for the float types that weights may be stored in: F32, F16, BF16. */
bool ql_dtype_is_weight(ql_dtype dtype);

#endif
