/* Transposing for both x86 instruction sets. Included by their headers only. */

/* 16 inputs of `rows` rows `stride` apart, 4 <= rows <= 8, lane by lane: to[lane * apart + row]. */
QK_INLINE void v16_transpose(const float *p, int64_t stride, int rows, float *to, int64_t apart)
{
    for (int lane = 0; lane < 16; lane += 4, p += 4) {
        __m256 a[4]; /* rows i and i + 4 side by side */
        QK_UNROLL for (int i = 0; i < 4; i++)
        {
            __m128 upper = i + 4 < rows ? _mm_loadu_ps(p + (i + 4) * stride) : _mm_setzero_ps();
            a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + i * stride)), upper, 1);
        }
        __m256 b0 = _mm256_unpacklo_ps(a[0], a[1]), b1 = _mm256_unpackhi_ps(a[0], a[1]);
        __m256 b2 = _mm256_unpacklo_ps(a[2], a[3]), b3 = _mm256_unpackhi_ps(a[2], a[3]);
        a[0] = _mm256_shuffle_ps(b0, b2, 0x44), a[1] = _mm256_shuffle_ps(b0, b2, 0xee);
        a[2] = _mm256_shuffle_ps(b1, b3, 0x44), a[3] = _mm256_shuffle_ps(b1, b3, 0xee);
        QK_UNROLL for (int i = 0; i < 4; i++, to += apart)
        {
            __m128 upper = _mm256_extractf128_ps(a[i], 1);
            _mm_storeu_ps(to, _mm256_castps256_ps128(a[i]));
            memcpy(to + 4, &upper, (size_t)(rows - 4) * sizeof *to);
        }
    }
}
