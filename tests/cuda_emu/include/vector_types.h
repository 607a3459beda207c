/* CUDA's vector types: the same sizes and alignments, so that a 16-byte load of one is as strict here. */
#ifndef VECTOR_TYPES_H
#define VECTOR_TYPES_H

#define EMU_ALIGNED(n) __attribute__((aligned(n)))
#define EMU_VECTOR(name, type, two, four)                                                                    \
    typedef struct name##1                                                                                   \
    {                                                                                                        \
        type x;                                                                                              \
    }                                                                                                        \
    name##1;                                                                                                 \
    typedef struct EMU_ALIGNED(two) name##2                                                                  \
    {                                                                                                        \
        type x, y;                                                                                           \
    }                                                                                                        \
    name##2;                                                                                                 \
    typedef struct name##3                                                                                   \
    {                                                                                                        \
        type x, y, z;                                                                                        \
    }                                                                                                        \
    name##3;                                                                                                 \
    typedef struct EMU_ALIGNED(four) name##4                                                                 \
    {                                                                                                        \
        type x, y, z, w;                                                                                     \
    }                                                                                                        \
    name##4;
EMU_VECTOR(char, signed char, 2, 4)
EMU_VECTOR(uchar, unsigned char, 2, 4)
EMU_VECTOR(short, short, 4, 8)
EMU_VECTOR(ushort, unsigned short, 4, 8)
EMU_VECTOR(int, int, 8, 16)
EMU_VECTOR(uint, unsigned, 8, 16)
EMU_VECTOR(float, float, 8, 16)
EMU_VECTOR(longlong, long long, 16, 16)
EMU_VECTOR(ulonglong, unsigned long long, 16, 16)
EMU_VECTOR(double, double, 16, 16)
#undef EMU_VECTOR

typedef struct dim3 {
    unsigned x, y, z;
#ifdef __cplusplus
    constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz)
    {
    }
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z)
    {
    }
#endif
} dim3;

#endif
