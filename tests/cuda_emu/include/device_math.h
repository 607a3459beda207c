/* CUDA's integer and float functions that C has not. */
#ifndef DEVICE_MATH_H
#define DEVICE_MATH_H

/* ---- bits ---- */

/* PTX prmt, default mode: result byte i is byte (s >> 4i) & 7 of y:x; bit 3 of the digit spreads its sign. */
static inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t s)
{
    uint64_t both = (uint64_t)y << 32 | x;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t digit = s >> 4 * i & 15, byte = (uint32_t)(both >> 8 * (digit & 7)) & 0xff;
        if (digit & 8) byte = byte & 0x80 ? 0xff : 0;
        r |= byte << 8 * i;
    }
    return r;
}
static inline int __popc(uint32_t x)
{
    return __builtin_popcount(x);
}
static inline int __popcll(uint64_t x)
{
    return __builtin_popcountll(x);
}
static inline int __clz(int x)
{
    return x ? __builtin_clz((uint32_t)x) : 32;
}
static inline int __clzll(long long x)
{
    return x ? __builtin_clzll((unsigned long long)x) : 64;
}
static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
static inline int __ffsll(long long x)
{
    return __builtin_ffsll(x);
}
static inline uint32_t __brev(uint32_t x)
{
    uint32_t r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
static inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift)
{
    return (uint32_t)(((uint64_t)high << 32 | low) << (shift & 31) >> 32);
}
static inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift)
{
    return (uint32_t)(((uint64_t)high << 32 | low) >> (shift & 31));
}
static inline uint32_t __funnelshift_lc(uint32_t low, uint32_t high, uint32_t shift)
{
    return (uint32_t)(((uint64_t)high << 32 | low) << (shift < 32 ? shift : 32) >> 32);
}
static inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t shift)
{
    return (uint32_t)(((uint64_t)high << 32 | low) >> (shift < 32 ? shift : 32));
}
static inline uint32_t __umulhi(uint32_t a, uint32_t b)
{
    return (uint32_t)((uint64_t)a * b >> 32);
}
static inline int __mulhi(int a, int b)
{
    return (int)((int64_t)a * b >> 32);
}
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b)
{
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

static inline float __uint_as_float(uint32_t x)
{
    return emu_cast<float>(x);
}
static inline uint32_t __float_as_uint(float x)
{
    return emu_cast<uint32_t>(x);
}
static inline float __int_as_float(int x)
{
    return emu_cast<float>(x);
}
static inline int __float_as_int(float x)
{
    return emu_cast<int>(x);
}
static inline double __longlong_as_double(long long x)
{
    return emu_cast<double>(x);
}
static inline long long __double_as_longlong(double x)
{
    return emu_cast<long long>(x);
}
static inline int __double2hiint(double x)
{
    return (int)((uint64_t)__double_as_longlong(x) >> 32);
}
static inline int __double2loint(double x)
{
    return (int)__double_as_longlong(x);
}
static inline double __hiloint2double(int high, int low)
{
    return emu_cast<double>((uint64_t)(uint32_t)high << 32 | (uint32_t)low);
}

/* ---- arithmetic, each rounded once to nearest even: built with -ffp-contract=off ---- */

static inline float __fmul_rn(float a, float b)
{
    return a * b;
}
static inline float __fadd_rn(float a, float b)
{
    return a + b;
}
static inline float __fsub_rn(float a, float b)
{
    return a - b;
}
static inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
static inline float __frcp_rn(float a)
{
    return 1 / a;
}
static inline float __fsqrt_rn(float a)
{
    return sqrtf(a);
}
static inline float __fmaf_rn(float a, float b, float c)
{
    return fmaf(a, b, c);
}
static inline double __dmul_rn(double a, double b)
{
    return a * b;
}
static inline double __dadd_rn(double a, double b)
{
    return a + b;
}
static inline double __dsub_rn(double a, double b)
{
    return a - b;
}
static inline double __ddiv_rn(double a, double b)
{
    return a / b;
}
static inline double __fma_rn(double a, double b, double c)
{
    return fma(a, b, c);
}
static inline float rsqrtf(float x)
{
    return (float)(1 / sqrt((double)x));
}
static inline double rsqrt(double x)
{
    return 1 / sqrt(x);
}
static inline float __saturatef(float x)
{
    return x > 0 ? x < 1 ? x : 1 : 0;
}

/* To an integer: NaN gives 0, what does not fit the nearest that does. */
static inline int emu_to_int(double whole)
{
    return whole != whole           ? 0
           : whole >= 2147483647    ? 2147483647
           : whole <= -2147483648.0 ? INT32_MIN
                                    : (int)whole;
}
static inline int __float2int_rn(float x)
{
    return emu_to_int(nearbyintf(x));
}
static inline int __float2int_rd(float x)
{
    return emu_to_int(floorf(x));
}
static inline int __float2int_ru(float x)
{
    return emu_to_int(ceilf(x));
}
static inline int __float2int_rz(float x)
{
    return emu_to_int(truncf(x));
}
static inline float __int2float_rn(int x)
{
    return (float)x;
}
static inline float __uint2float_rn(unsigned x)
{
    return (float)x;
}
static inline float __double2float_rn(double x)
{
    return (float)x;
}

/* min and max in CUDA's overloads; those of floats drop a NaN, as fmin does. */
#define EMU_MIN_MAX(type)                                                                                    \
    static inline type min(type a, type b)                                                                   \
    {                                                                                                        \
        return a < b ? a : b;                                                                                \
    }                                                                                                        \
    static inline type max(type a, type b)                                                                   \
    {                                                                                                        \
        return a > b ? a : b;                                                                                \
    }
#define EMU_MIN_MAX_MIXED(type, other, common)                                                               \
    static inline common min(type a, other b)                                                                \
    {                                                                                                        \
        return (common)a < (common)b ? (common)a : (common)b;                                                \
    }                                                                                                        \
    static inline common min(other a, type b)                                                                \
    {                                                                                                        \
        return (common)a < (common)b ? (common)a : (common)b;                                                \
    }                                                                                                        \
    static inline common max(type a, other b)                                                                \
    {                                                                                                        \
        return (common)a > (common)b ? (common)a : (common)b;                                                \
    }                                                                                                        \
    static inline common max(other a, type b)                                                                \
    {                                                                                                        \
        return (common)a > (common)b ? (common)a : (common)b;                                                \
    }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
EMU_MIN_MAX_MIXED(int, unsigned, unsigned)
EMU_MIN_MAX_MIXED(long, unsigned long, unsigned long)
EMU_MIN_MAX_MIXED(long long, unsigned long long, unsigned long long)
#undef EMU_MIN_MAX_MIXED
#undef EMU_MIN_MAX
static inline float min(float a, float b)
{
    return fminf(a, b);
}
static inline float max(float a, float b)
{
    return fmaxf(a, b);
}
static inline double min(double a, double b)
{
    return fmin(a, b);
}
static inline double max(double a, double b)
{
    return fmax(a, b);
}

/* ---- loads and stores with a hint ---- */

template <class T> static inline T __ldg(const T *p)
{
    return emu_checked(p);
}
template <class T> static inline T __ldcs(const T *p)
{
    return emu_checked(p);
}
template <class T> static inline T __ldcg(const T *p)
{
    return emu_checked(p);
}
template <class T> static inline T __ldca(const T *p)
{
    return emu_checked(p);
}
template <class T> static inline void __stcs(T *p, T value)
{
    if ((uintptr_t)p % alignof(T)) emu_fail("a store of %zu bytes at %p is misaligned", sizeof(T), (void *)p);
    *p = value;
}
template <class T> static inline void __stcg(T *p, T value)
{
    __stcs(p, value);
}

[[noreturn]] static inline void __trap(void)
{
    emu_fail("__trap");
}

#endif
