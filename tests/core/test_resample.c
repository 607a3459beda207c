/* Resampling: what is refused, and what stops it. The figures themselves are checked against SciPy in
 * tests/specs/stats_spec.lua. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "interrupt.h"
#include "mem.h"
#include "resample.h"

static const double ones[3] = {1, 1, 1}, values[30] = {1, 2, 3};
static const double *const lists[QL_RESAMPLE_LISTS] = {ones, ones, ones, ones};

static void test_arguments(void **state)
{
    (void)state;
    double out[5];
    ql_err err;
    assert_int_equal(ql_resample_bootstrap(QL_RESAMPLE_MEAN, lists, 1, 0, 5, 1, out, &err), QL_ERR_ARG);
    assert_int_equal(ql_resample_bootstrap(QL_RESAMPLE_MEAN, lists, 3, 3, 5, 1, out, &err), QL_ERR_ARG);
    assert_int_equal(ql_resample_bootstrap(QL_RESAMPLE_MEAN, lists, 1, QL_RESAMPLE_MAX + 1, 5, 1, out, &err),
                     QL_ERR_ARG);
    assert_int_equal(ql_resample_bootstrap(QL_RESAMPLE_MEDIAN, lists, 4, 3, 5, 1, out, &err), QL_OK);
    for (int r = 0; r < 5; r++) assert_true(out[r] == 1);
}

static void test_no_memory(void **state)
{
    (void)state;
    double out[5];
    ql_err err;
    for (long n = 0; n < 2; n++) {
        ql_mem_fail_after(n, false);
        assert_int_equal(ql_resample_bootstrap(QL_RESAMPLE_MEAN, lists, 1, 3, 5, 1, out, &err),
                         QL_ERR_MEMORY);
    }
    ql_mem_fail_after(-1, false);
}

static void test_sign_flips(void **state)
{
    (void)state;
    int64_t extreme, total;
    ql_err err;
    assert_int_equal(ql_resample_sign_flips(ones, 3, 100, 1, &extreme, &total, &err), QL_OK);
    assert_int_equal(extreme, 2);
    assert_int_equal(total, 8);
    assert_int_equal(ql_resample_sign_flips(NULL, 0, 100, 1, &extreme, &total, &err), QL_OK);
    assert_int_equal(extreme, 1);
    assert_int_equal(total, 1);
    assert_int_equal(ql_resample_sign_flips(values, 30, 100, 1, &extreme, &total, &err), QL_OK);
    assert_int_equal(total, 100);
    assert_in_range(extreme, 5, 45); /* of 100 where a quarter is due */
}

static void test_interrupt(void **state)
{
    (void)state;
    double out[5];
    int64_t extreme, total;
    ql_err err;
    ql_interrupt_set();
    assert_int_equal(ql_resample_bootstrap(QL_RESAMPLE_MEAN, lists, 1, 3, 5, 1, out, &err),
                     QL_ERR_INTERRUPTED);
    assert_int_equal(ql_resample_sign_flips(values, 30, 100, 1, &extreme, &total, &err), QL_ERR_INTERRUPTED);
    ql_interrupt_clear();
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_arguments), cmocka_unit_test(test_no_memory),
                                       cmocka_unit_test(test_sign_flips), cmocka_unit_test(test_interrupt)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
