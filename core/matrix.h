/* The weight of one linear layer, [n, k] = (out, in), in the format it is stored in.
 *
 * Dense: `data` is [n, k] in F32, F16 or BF16. 4-bit: `quant` is set, `data` is U8 [ceil(n*k/2)] with element
 * 2j in the high nibble of byte j (bitsandbytes' layout), `absmax` F32 [ceil(n*k/block)], blocks run over the
 * flattened matrix. A matrix owns its tensors by reference and its ql_quant by reference.
 *
 * On a device whose backend says nested_scales, double-quantized scales stay as they are in a checkpoint:
 * `absmax` is U8 [blocks] and `nested` F32 [257 + nested_blocks]: the 256 entries of the 8-bit map, the
 * offset, the scale of each nested block. absmax of block b = nested[absmax[b]] * nested[257 + b /
 * nested_block] + nested[256], two roundings. Then ql_quant keeps no copy on the host.
 */
#ifndef QL_MATRIX_H
#define QL_MATRIX_H

#include "tensor.h"

/* How a 4-bit matrix was made, and what only saving it needs. Host memory, reference-counted, immutable. */
typedef struct {
    int refs;             /* atomic */
    char scheme[16];      /* "nf4", "fp4" or "codebook" */
    float code[16];       /* value of each 4-bit code, in units of absmax */
    int block;            /* weights that share one absmax: power of two, 32..4096 */
    ql_dtype value_dtype; /* decoded values are rounded to this: BF16, F16 or F32 */
    bool nested;          /* double quantization: absmax itself was quantized to 8 bits */
    int nested_block;     /* 256 */
    float nested_offset;  /* mean that was subtracted from absmax */
    size_t blocks, nested_blocks;
    uint8_t *absmax8;      /* [blocks], only when nested and not on the device */
    float *nested_absmax;  /* [nested_blocks], as absmax8 */
    float nested_map[256]; /* 8-bit code book, only when nested */
    ql_arena *arena;       /* one reference: charged with ql_quant_host_bytes; NULL: nobody is */
} ql_quant;

ql_quant *ql_quant_retain(ql_quant *q);
void ql_quant_release(ql_quant *q);
/* Bytes of host memory that double quantization keeps for saving; 0 without it, or when the device keeps
 * them. */
size_t ql_quant_host_bytes(const ql_quant *q);
/* Charge them to `arena` (may be NULL) as weights, until the last reference goes. Once. */
void ql_quant_charge(ql_quant *q, ql_arena *arena);

typedef struct {
    int64_t n, k;     /* outputs, inputs */
    ql_tensor data;   /* see above */
    ql_tensor absmax; /* 4-bit only; decoded to F32, also with double quantization, unless `nested` */
    ql_tensor nested; /* see above; else empty */
    ql_tensor bias;   /* F32 [n], or empty */
    ql_quant *quant;  /* NULL for dense */
    ql_dtype dtype;   /* dtype in the checkpoint (dense), or value_dtype (4-bit) */
    int layout;       /* order of the codes in `data`: 0 bitsandbytes', else the device's own (pack4) */
} ql_matrix;

void ql_matrix_free(ql_matrix *m);
ql_matrix ql_matrix_ref(const ql_matrix *m); /* shares everything; free it too */
size_t ql_matrix_bytes(const ql_matrix *m);  /* device bytes held: data, scales, bias */
/* And what double quantization keeps on the host. */
size_t ql_matrix_resident(const ql_matrix *m);

#endif
