/* The emulated CUDA runtime itself. */
#include "cuda_help.h"

static void test_memory(void **state)
{
    (void)state;
    size_t before, after, total;
    CUDA_OK(cudaMemGetInfo(&before, &total));
    float *p = cuda_new(400);
    float host[100];
    cuda_get(host, p, sizeof host);
    for (int i = 0; i < 100; i++) assert_true(isnan(host[i]));
    CUDA_OK(cudaMemGetInfo(&after, &total));
    assert_int_equal(before - after, 400 + CUDA_GUARD);
    cuda_free(p);
    CUDA_OK(cudaMemGetInfo(&after, &total));
    assert_int_equal(before, after);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_memory)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
