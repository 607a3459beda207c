/* The description bitsandbytes stores beside a 4-bit weight, checked against the tensors it describes.
 *
 * `P.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) is a U8 tensor that holds JSON. Format read from
 * bitsandbytes/functional.py (QuantState.as_dict, from_dict). Plain data; owns nothing.
 */
#ifndef QL_QUANT_STATE_H
#define QL_QUANT_STATE_H

#include "dtype.h"
#include "err.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QL_QUANT_MAP 16         /* entries of a 4-bit code book */
#define QL_QUANT_NESTED_MAP 256 /* entries of the 8-bit code book of the scales */
#define QL_QUANT_BLOCK_MIN 32   /* elements; powers of two between these are supported */
#define QL_QUANT_BLOCK_MAX 4096

typedef struct {
    char type[8];     /* "nf4" or "fp4" */
    int block;        /* elements that share one absmax */
    ql_dtype dtype;   /* what a weight decodes to: F32, F16 or BF16 */
    int64_t shape[2]; /* [out, in] of the weight */
    bool nested;      /* double quantization */
    int nested_block; /* absmax values that share one nested absmax; 0 without nesting */
    float nested_offset;
} ql_quant_state;

/* True for a block size that qlua can decode. */
bool ql_quant_block_ok(int64_t block);

/* Read JSON text[0 .. size). `file` and `tensor` name it in messages. `type` is what the tensor's name says.
 */
ql_status ql_quant_state_parse(const char *text, size_t size, const char *file, const char *tensor,
                               const char *type, ql_quant_state *state /* [OUT] */, ql_err *err);

/* The JSON as bitsandbytes writes it (key order and separators), into `text`; *size bytes without the NUL. */
ql_status ql_quant_state_format(const ql_quant_state *state, char *text /* [OUT] capacity */, size_t capacity,
                                size_t *size /* [OUT] */, ql_err *err);

int64_t ql_quant_state_elements(const ql_quant_state *state); /* out x in */
int64_t ql_quant_state_bytes(const ql_quant_state *state);    /* of packed codes: ceil(elements / 2) */
int64_t ql_quant_state_blocks(const ql_quant_state *state);   /* absmax values: ceil(elements / block) */
int64_t ql_quant_state_nested(const ql_quant_state *state);   /* nested absmax values; 0 without nesting */

#endif
