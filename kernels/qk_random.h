/* Near-normal random numbers by counter, the same bits on host and device.
 *
 * Draw i of stream `seed` is SplitMix64 (Steele, Lea & Flood 2014) after i + 1 steps from state `seed`; its
 * four 16-bit parts are summed (Irwin-Hall) and scaled to mean 0, standard deviation 0.02.
 */
#ifndef QK_RANDOM_H
#define QK_RANDOM_H

#include "qk_half.h"

QK_HD float qk_random_normal(uint64_t seed, uint64_t i)
{
    uint64_t z = seed + (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    z ^= z >> 31;
    int sum = (int)(z & 0xffff) + (int)(z >> 16 & 0xffff) + (int)(z >> 32 & 0xffff) + (int)(z >> 48);
    return (float)(sum - 2 * 65535) * (float)(0.02 / (65536 * 0.57735026918962576));
}

#endif
