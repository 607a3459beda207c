/* 4-bit quantization of weights: what a scheme is, making it, reading it, and what it costs.
 *
 * A scheme is a code book of 16 values in units of a block's absmax. Encoding takes x = w * (1 / absmax), in
 * float32, to the code book entry that is nearest: code = order[number of thresholds t with x > t], so that a
 * tie goes to the smaller value. Formats and constants: bitsandbytes (Dettmers et al. 2023, QLoRA), see
 * ql_quant_tables_make. Matrices come out on the device of their input and are owned by the caller.
 */
#ifndef QL_QUANT_H
#define QL_QUANT_H

#include "arena.h"
#include "checkpoint.h"
#include "matrix.h"

#define QL_QUANT_NESTED_BLOCK 256 /* scales that share one of their own, as bitsandbytes has it */

/* value_dtype: that of the dense matrix, as bitsandbytes does. */
#define QL_QUANT_VALUE_DENSE QL_DTYPE_COUNT

typedef struct {
    char scheme[16];      /* "nf4", "fp4" or "codebook" */
    float code[16];       /* value of each code; the largest magnitude is 1 */
    int block;            /* weights that share one absmax: power of two, 32..4096 */
    bool double_quant;    /* quantize absmax to 8 bits too */
    ql_dtype value_dtype; /* decoded values are rounded to this: F32, F16, BF16 or QL_QUANT_VALUE_DENSE */
} ql_quant_spec;

/* "nf4" or "fp4" with bitsandbytes' defaults (block 64, no double quantization, the dense dtype); an unknown
 * scheme is an error that lists the known ones. */
ql_status ql_quant_spec_init(const char *scheme, ql_quant_spec *spec /* [OUT] */, ql_err *err);

/* A code book of the user's: any 16 finite values in any order, repeats allowed, not all zero. They are
 * divided by their largest magnitude, so that the outermost code meets absmax whatever their unit (as
 * bitsandbytes does with its own tables). */
ql_status ql_quant_spec_codebook(const double code[16], ql_quant_spec *spec /* [OUT] */, ql_err *err);

ql_status ql_quant_spec_check(const ql_quant_spec *spec, ql_err *err);

/* What the encoder needs of a code book. `order` lists codes by value (equal values by number); thresholds
 * are float32 midpoints of neighbours, (a + b) / 2 with both steps rounded, as in bitsandbytes' CPU path; for
 * NF4 they are the constants of its CUDA kernel, four of which differ by one unit in the last place. */
typedef struct {
    float thresholds[15]; /* ascending */
    uint8_t order[16];
    int zero_code; /* the code of 0: all-zero blocks and the padding nibble */
} ql_quant_tables;

void ql_quant_tables_make(const float code[16], ql_quant_tables *tables /* [OUT] */);

/* The 8-bit code book of double quantization: bitsandbytes' signed dynamic map, ascending (Dettmers 2016). */
void ql_quant_dynamic_map(float map[256] /* [OUT] */);

/* Quantize a dense matrix [n, k] on its own device; the bias is shared. A weight that is not finite is an
 * error. */
ql_status ql_quant_matrix(const ql_matrix *dense, const ql_quant_spec *spec, ql_arena *arena,
                          ql_matrix *out /* [OUT] */, ql_err *err);

/* Read the 4-bit weight `name` ("...weight") of a checkpoint onto `dev`, without bias. The code book is the
 * quant_map of the file; where that is not the table of the type it claims, the matrix says "codebook". */
ql_status ql_quant_load(const ql_checkpoint *ck, const char *name, ql_device *dev, ql_arena *arena,
                        ql_matrix *out /* [OUT] */, ql_err *err);

/* The matrix decoded to F32 on the host, for listing and tests: out [n*k]. */
ql_status ql_quant_decode(const ql_matrix *m, float *out /* [OUT] [n, k] */, ql_err *err);

/* The analytic expectation for a weight [n, k]. */
typedef struct {
    int64_t weights, blocks, nested_blocks;
    size_t stored_bytes; /* in a checkpoint: codes, absmax as stored, nested absmax and offset */
    size_t device_bytes; /* in memory: codes and absmax in F32; a device with nested_scales holds less */
    double stored_bits;  /* per weight: 4 + 32/block, or 4 + 8/block + 32/(256 block) when double */
} ql_quant_size;

ql_status ql_quant_expect(int64_t n, int64_t k, const ql_quant_spec *spec, ql_quant_size *size /* [OUT] */,
                          ql_err *err);

#endif
