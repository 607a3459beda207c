/* That the other emulated_test programs meet the emulated table: they take the tables that there are. */
#include "qk.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static void test_is_offered(void **state)
{
    (void)state;
    if (!qk_cpu_select("avx2", NULL)) skip();
    assert_string_equal(qk_cpu_select(NULL, NULL)->isa, "avx512");
}

static void test_lacks_what_it_is_told(void **state)
{
    (void)state;
    if (!qk_cpu_select("avx2", NULL)) skip();
    int status = QK_OK;
    setenv("SIMD_EMU_WITHOUT", "avx512bw", 1);
    assert_null(qk_cpu_select("avx512", &status));
    assert_int_equal(status, QK_ERR_MISSING);
    assert_string_equal(qk_cpu_select(NULL, NULL)->isa, "avx2");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_is_offered),
        cmocka_unit_test(test_lacks_what_it_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
