/* The table of this instruction set. */
#include "ops.h"

#define QK_STRING2(x) #x
#define QK_STRING(x) QK_STRING2(x)

extern const qk_cpu QK_NAME(cpu);

const qk_cpu QK_NAME(cpu) = {
    .isa = QK_STRING(QK_ISA),
    .matmul_rows_multiple = 48,
    .matmul_packed = QK_NAME(matmul_packed),
    .matmul_pack = QK_NAME(matmul_pack),
    .matmul_scratch = QK_NAME(matmul_scratch),
    .matmul = QK_NAME(matmul),
    .attention = QK_NAME(attention),
    .attention_run = QK_NAME(attention_run),
    .attention_join = QK_NAME(attention_join),
    .rmsnorm = QK_NAME(rmsnorm),
    .rope = QK_NAME(rope),
    .swiglu = QK_NAME(swiglu),
    .exp = QK_NAME(exp),
    .binary = QK_NAME(binary),
    .convert = QK_NAME(convert),
    .quantize4 = QK_NAME(quantize4),
    .dequantize4 = QK_NAME(dequantize4),
    .probe_read = QK_NAME(probe_read),
    .probe_fma = QK_NAME(probe_fma),
};
