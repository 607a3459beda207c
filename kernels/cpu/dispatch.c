/* Which instruction set runs: the best that the processor and the operating system support, or the one named.
 */
#include "../qk.h"

#include <string.h>

extern const qk_cpu qk_cpu_scalar;
#if defined(__x86_64__)
extern const qk_cpu qk_cpu_avx2, qk_cpu_avx512;
#endif

static bool always(void)
{
    return true;
}

#if defined(__x86_64__)
/* gcc's own detection also asks the operating system whether it saves the wide registers. */
static bool has_avx2(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

static const struct {
    const qk_cpu *cpu;
    const char *name;
    bool (*supported)(void);
} tables[] = {
#if defined(__x86_64__)
    {&qk_cpu_avx512, "avx512", has_avx512},
    {&qk_cpu_avx2, "avx2", has_avx2},
#endif
    {&qk_cpu_scalar, "scalar", always},
};

enum { TABLES = (int)(sizeof tables / sizeof *tables) };

const qk_cpu *qk_cpu_select(const char *isa, int *status)
{
    int result = QK_ERR_NAME;
    const qk_cpu *cpu = NULL;
    for (int i = 0; i < TABLES && !cpu; i++) {
        if (isa && strcmp(isa, tables[i].name) != 0) continue;
        if (tables[i].supported()) {
            cpu = tables[i].cpu;
            result = QK_OK;
        } else {
            result = QK_ERR_MISSING;
        }
    }
    if (status) *status = result;
    return cpu;
}

const char *qk_cpu_name(int i)
{
    return i >= 0 && i < TABLES ? tables[i].name : NULL;
}
