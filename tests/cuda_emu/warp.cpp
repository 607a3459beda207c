/* What warp operations compute, once all their lanes are there. */
#include <cuda_runtime.h>

#include "ptx.cuh"

#define FOR_LANES(lane, mask)                                                                                \
    for (int lane = 0; lane < 32; lane++)                                                                    \
        if ((mask) >> lane & 1)

/* Lane reads lane `source`, or itself where that lies outside its segment. */
static void take(uint32_t mask, emu_hand *hand, int lane, int source, bool inside)
{
    if (!inside) source = lane;
    if (!(mask >> source & 1))
        emu_fail("lane %d reads lane %d, which is not in the mask %08x", lane, source, mask);
    hand[lane].result = hand[source].value;
}

static int width_of(const emu_hand *hand)
{
    if (hand->width < 1 || hand->width > 32 || (hand->width & (hand->width - 1)))
        emu_fail("a shuffle's width is %d, not a power of two up to 32", hand->width);
    return hand->width;
}

void emu_shfl_index(uint32_t mask, emu_hand *hand)
{
    FOR_LANES(lane, mask)
    {
        int width = width_of(&hand[lane]);
        take(mask, hand, lane, (lane & ~(width - 1)) | (hand[lane].argument & (width - 1)), true);
    }
}

void emu_shfl_up(uint32_t mask, emu_hand *hand)
{
    FOR_LANES(lane, mask)
    {
        int width = width_of(&hand[lane]), source = lane - hand[lane].argument;
        take(mask, hand, lane, source, source >= (lane & ~(width - 1)));
    }
}

void emu_shfl_down(uint32_t mask, emu_hand *hand)
{
    FOR_LANES(lane, mask)
    {
        int width = width_of(&hand[lane]), source = lane + hand[lane].argument;
        take(mask, hand, lane, source, source <= (lane | (width - 1)));
    }
}

/* As shfl.bfly: only a source past the end of the segment is outside. */
void emu_shfl_xor(uint32_t mask, emu_hand *hand)
{
    FOR_LANES(lane, mask)
    {
        int width = width_of(&hand[lane]), source = lane ^ hand[lane].argument;
        take(mask, hand, lane, source, source <= (lane | (width - 1)));
    }
}

void emu_ballot(uint32_t mask, emu_hand *hand)
{
    uint32_t votes = 0;
    FOR_LANES(lane, mask) votes |= (uint32_t)(hand[lane].value != 0) << lane;
    FOR_LANES(lane, mask) hand[lane].result = votes;
}

void emu_nothing(uint32_t mask, emu_hand *hand)
{
    FOR_LANES(lane, mask) hand[lane].result = 0;
}

void emu_match_any(uint32_t mask, emu_hand *hand)
{
    FOR_LANES(lane, mask)
    {
        uint32_t same = 0;
        FOR_LANES(other, mask) same |= (uint32_t)(hand[other].value == hand[lane].value) << other;
        hand[lane].result = same;
    }
}

#define REDUCE(name, type, first, expression)                                                                \
    void emu_reduce_##name(uint32_t mask, emu_hand *hand)                                                    \
    {                                                                                                        \
        type sum = first;                                                                                    \
        FOR_LANES(lane, mask)                                                                                \
        {                                                                                                    \
            type v = (type)(uint32_t)hand[lane].value;                                                       \
            sum = expression;                                                                                \
        }                                                                                                    \
        FOR_LANES(lane, mask) hand[lane].result = (uint32_t)sum;                                             \
    }
REDUCE(add, uint32_t, 0, sum + v)
REDUCE(and, uint32_t, 0xffffffffu, sum &v)
REDUCE(or, uint32_t, 0, sum | v)
REDUCE(xor, uint32_t, 0, sum ^ v)
REDUCE(min_u, uint32_t, UINT32_MAX, v < sum ? v : sum)
REDUCE(max_u, uint32_t, 0, v > sum ? v : sum)
REDUCE(min_s, int32_t, INT32_MAX, v < sum ? v : sum)
REDUCE(max_s, int32_t, INT32_MIN, v > sum ? v : sum)

/* ---- matrices; fragments as kernels/cuda/ptx.cuh says ---- */

/* Both 16-bit halves of a register. */
static void widen(uint32_t pair, float (*convert)(uint16_t), double *low, double *high)
{
    *low = convert((uint16_t)pair);
    *high = convert((uint16_t)(pair >> 16));
}

/* The 16 products of an instruction are exact and summed in float64; the result is rounded once. Hardware
 * keeps less than that inside an instruction, in an order of its own. */
static void mma(emu_hand *hand, float (*convert)(uint16_t))
{
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const emu_mma *m = (const emu_mma *)hand[lane].value;
        int g = lane >> 2, t = lane & 3;
        for (int i = 0; i < 4; i++) {
            double *at = &a[g + (i & 1) * 8][2 * t + (i >> 1) * 8];
            widen(m->a[i], convert, at, at + 1);
        }
        for (int i = 0; i < 2; i++) widen(m->b[i], convert, &b[2 * t + i * 8][g], &b[2 * t + i * 8 + 1][g]);
    }
    for (int lane = 0; lane < 32; lane++) {
        const emu_mma *m = (const emu_mma *)hand[lane].value;
        int g = lane >> 2, t = lane & 3;
        for (int i = 0; i < 4; i++) {
            int row = g + (i >> 1) * 8, column = 2 * t + (i & 1);
            double sum = 0;
            for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
            m->d[i] = (float)(m->d[i] + sum);
        }
        hand[lane].result = 0;
    }
}

void emu_mma_bf16(uint32_t, emu_hand *hand)
{
    mma(hand, qk_bf16_to_f32);
}

void emu_mma_f16(uint32_t, emu_hand *hand)
{
    mma(hand, qk_f16_to_f32);
}

static void ldmatrix(emu_hand *hand, bool transposed)
{
    uint16_t matrix[4][8][8];
    for (int lane = 0; lane < 32; lane++) {
        const void *row = ((const emu_rows *)hand[lane].value)->row;
        if ((uintptr_t)row % 16) emu_fail("ldmatrix: lane %d's row %p is not 16-byte aligned", lane, row);
        if (emu_is_device(row, 1)) emu_fail("ldmatrix: lane %d's row %p is not shared memory", lane, row);
        memcpy(matrix[lane / 8][lane % 8], row, 16);
    }
    for (int lane = 0; lane < 32; lane++) {
        for (int i = 0; i < 4; i++) {
            int row = lane / 4, column = lane % 4 * 2;
            uint32_t low = transposed ? matrix[i][column][row] : matrix[i][row][column];
            uint32_t high = transposed ? matrix[i][column + 1][row] : matrix[i][row][column + 1];
            ((const emu_rows *)hand[lane].value)->r[i] = low | high << 16;
        }
        hand[lane].result = 0;
    }
}

void emu_ldmatrix(uint32_t, emu_hand *hand)
{
    ldmatrix(hand, false);
}

void emu_ldmatrix_t(uint32_t, emu_hand *hand)
{
    ldmatrix(hand, true);
}
