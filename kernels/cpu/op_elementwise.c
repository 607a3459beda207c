/* Elementwise: SwiGLU, exp, and the four binary operations. */
#include "ops.h"

/* x / (1 + exp(-x)) * up */
QK_INLINE v16 swiglu(v16 x, v16 up)
{
    v16 e = v16_exp(v16_sub(v16_zero(), x));
    return v16_mul(v16_div(x, v16_add(v16_set1(1.0f), e)), up);
}

void QK_NAME(swiglu)(const float *gate, const float *up, float *y, int64_t i0, int64_t i1)
{
    int64_t i = i0;
    for (; i + 16 <= i1; i += 16) v16_store(y + i, swiglu(v16_load(gate + i), v16_load(up + i)));
    if (i < i1) {
        int n = (int)(i1 - i);
        v16_store_n(y + i, swiglu(v16_load_n(gate + i, n), v16_load_n(up + i, n)), n);
    }
}

void QK_NAME(exp)(const float *x, float *y, int64_t i0, int64_t i1)
{
    int64_t i = i0;
    for (; i + 16 <= i1; i += 16) v16_store(y + i, v16_exp(v16_load(x + i)));
    if (i < i1) v16_store_n(y + i, v16_exp(v16_load_n(x + i, (int)(i1 - i))), (int)(i1 - i));
}

QK_INLINE v16 apply(qk_binary op, v16 a, v16 b)
{
    switch (op) {
    case QK_ADD:
        return v16_add(a, b);
    case QK_SUB:
        return v16_sub(a, b);
    case QK_MUL:
        return v16_mul(a, b);
    default:
        return v16_div(a, b);
    }
}

void QK_NAME(binary)(qk_binary op, const float *a, const float *b, float scalar, bool reversed, float *y,
                     int64_t i0, int64_t i1)
{
    for (int64_t i = i0; i < i1; i += 16) {
        int n = i1 - i < 16 ? (int)(i1 - i) : 16;
        v16 va = v16_load_n(a + i, n);
        v16 vb = b ? v16_load_n(b + i, n) : v16_set1(scalar);
        v16_store_n(y + i, !b && reversed ? apply(op, vb, va) : apply(op, va, vb), n);
    }
}
