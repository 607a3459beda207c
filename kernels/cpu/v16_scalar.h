/* v16 in plain C: the reference, and the only one where there is no x86. Included by v16.h only. */
#include <math.h>

typedef struct {
    float f[16];
} v16;

#define V16_TILE_ROWS 2
#define V16_TILE_COLS 2
#define V16_TILE_PIECE 512
#define V16_PREFILL_VECTORS 1
#define V16_PREFILL_COLS 4
#define V16_PREFILL_STEPS 64
#define V16_DIRECT_ROWS 2
#define V16_DIRECT_COLS 2
#define V16_DIRECT_STEP 16

#define V16_EACH(expr)                                                                                       \
    v16 r;                                                                                                   \
    for (int l = 0; l < 16; l++) r.f[l] = (expr);                                                            \
    return r

QK_INLINE v16 v16_set1(float f)
{
    V16_EACH(f);
}

QK_INLINE v16 v16_zero(void)
{
    return v16_set1(0.0f);
}

QK_INLINE v16 v16_load(const float *p)
{
    V16_EACH(p[l]);
}

QK_INLINE v16 v16_load_n(const float *p, int n)
{
    V16_EACH(l < n ? p[l] : 0.0f);
}

QK_INLINE void v16_store(float *p, v16 v)
{
    memcpy(p, v.f, sizeof v.f);
}

QK_INLINE void v16_store_n(float *p, v16 v, int n)
{
    memcpy(p, v.f, (size_t)n * sizeof *p);
}

QK_INLINE v16 v16_fma(v16 a, v16 b, v16 c)
{
    V16_EACH(fmaf(a.f[l], b.f[l], c.f[l]));
}

QK_INLINE v16 v16_add(v16 a, v16 b)
{
    V16_EACH(a.f[l] + b.f[l]);
}

QK_INLINE v16 v16_sub(v16 a, v16 b)
{
    V16_EACH(a.f[l] - b.f[l]);
}

QK_INLINE v16 v16_mul(v16 a, v16 b)
{
    V16_EACH(a.f[l] * b.f[l]);
}

QK_INLINE v16 v16_div(v16 a, v16 b)
{
    V16_EACH(a.f[l] / b.f[l]);
}

QK_INLINE v16 v16_max(v16 a, v16 b)
{
    V16_EACH(a.f[l] > b.f[l] ? a.f[l] : b.f[l]);
}

QK_INLINE v16 v16_min(v16 a, v16 b)
{
    V16_EACH(a.f[l] < b.f[l] ? a.f[l] : b.f[l]);
}

/* 2^n for whole -126 <= n <= 127; a NaN gives some number, and the caller's product is a NaN all the same. */
QK_INLINE v16 v16_pow2(v16 n)
{
    V16_EACH(n.f[l] == n.f[l] ? qk_from_bits((uint32_t)((int32_t)n.f[l] + 127) << 23) : 1.0f);
}

QK_INLINE v16 v16_load_bf16(const uint16_t *p)
{
    V16_EACH(qk_bf16_to_f32(p[l]));
}

QK_INLINE v16 v16_load_f16(const uint16_t *p)
{
    V16_EACH(qk_f16_to_f32(p[l]));
}

QK_INLINE v16 v16_round_bf16(v16 v)
{
    V16_EACH(qk_round_bf16(v.f[l]));
}

QK_INLINE v16 v16_round_bf16_number(v16 v)
{
    return v16_round_bf16(v);
}

QK_INLINE v16 v16_round_f16(v16 v)
{
    V16_EACH(qk_round_f16(v.f[l]));
}

QK_INLINE void v16_store_bf16(uint16_t *p, v16 v)
{
    for (int l = 0; l < 16; l++) p[l] = qk_f32_to_bf16(v.f[l]);
}

QK_INLINE void v16_store_f16(uint16_t *p, v16 v)
{
    for (int l = 0; l < 16; l++) p[l] = qk_f32_to_f16(v.f[l]);
}

/* The 16 nibbles of 8 bytes, high one first, looked up in `lut`. */
QK_INLINE v16 v16_lut4(const uint8_t *p, v16 lut)
{
    V16_EACH(lut.f[qk_nibble(p, l)]);
}

QK_INLINE float v16_hsum(v16 v)
{
    for (int half = 8; half; half /= 2)
        for (int l = 0; l < half; l++) v.f[l] += v.f[l + half];
    return v.f[0];
}

/* The largest lane: for numbers only. */
QK_INLINE float v16_hmax(v16 v)
{
    float m = v.f[0];
    for (int l = 1; l < 16; l++)
        if (v.f[l] > m) m = v.f[l];
    return m;
}

/* Lane r of the result is v16_hsum of rows[16 * r .. 16 * r + 15]. */
QK_INLINE v16 v16_hsum16(const float *rows)
{
    V16_EACH(v16_hsum(v16_load(rows + 16 * l)));
}

/* 16 inputs of `rows` rows `stride` apart, lane by lane: to[lane * apart + row]. */
QK_INLINE void v16_transpose(const float *p, int64_t stride, int rows, float *to, int64_t apart)
{
    for (int lane = 0; lane < 16; lane++)
        for (int r = 0; r < rows; r++) to[lane * apart + r] = p[r * stride + lane];
}

/* The product's register tile holds whole v16. */
typedef v16 vt;
#define VT_LANES 16
#define vt_zero v16_zero
#define vt_set1 v16_set1
#define vt_load v16_load
#define vt_store v16_store
#define vt_add v16_add
#define vt_fma v16_fma
