/* The emulated device runs kernels as a device would, and finds what a device would not say. */
#include "cuda_help.h"
#include "test_kernels.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *const orders[] = {"forward", "reverse", "1", "2", "77"};
enum { ORDERS = 5 };

static int forget_order(void **state)
{
    (void)state;
    cuda_free_all();
    return unsetenv("QLUA_EMU_ORDER");
}

static void test_warps(void **state)
{
    (void)state;
    uint32_t got[10][32];
    for (int o = 0; o < ORDERS; o++) {
        setenv("QLUA_EMU_ORDER", orders[o], 1);
        uint32_t *out = cuda_new(sizeof got);
        CUDA_RUN(test_warps_launch(out));
        cuda_get(got, out, sizeof got);
        for (int i = 0; i < 32; i++) {
            assert_int_equal(got[0][i], (i + 5) % 32 * 3);
            assert_int_equal(got[1][i], (i / 8 * 8 + 1) * 3);
            assert_int_equal(got[2][i], i % 16 < 3 ? i : i - 3);
            assert_int_equal(got[3][i], i % 16 > 12 ? i : i + 3);
            assert_int_equal(got[4][i], i ^ 6);
            assert_int_equal(got[5][i], 0x49249249u);
            assert_int_equal(got[6][i], i < 8 ? 107 : 2);
            uint32_t same = 0;
            for (int j = i % 5; j < 32; j += 5) same |= 1u << j;
            assert_int_equal(got[7][i], same);
            assert_int_equal((int32_t)got[8][i], 31 * 16 - 20 * 32);
            assert_int_equal(got[9][i], 4 * (i ^ 1) + 1);
        }
        cuda_free(out);
    }
}

static void test_votes(void **state)
{
    (void)state;
    int got[3][96];
    int *out = cuda_new(sizeof got);
    CUDA_RUN(test_votes_launch(out));
    cuda_get(got, out, sizeof got);
    for (int i = 0; i < 96; i++) {
        assert_int_equal(got[0][i], 1);
        assert_int_equal(got[1][i], 0);
        assert_int_equal(got[2][i], 32);
    }
}

static void test_mma(void **state)
{
    (void)state;
    uint16_t a[16][16], b[16][8];
    float d[16][8], got[16][8];
    for (int bf16 = 0; bf16 < 2; bf16++) {
        for (int i = 0; i < 256; i++) {
            float x = random_unit() * 8;
            a[i / 16][i % 16] = bf16 ? qk_f32_to_bf16(x) : qk_f32_to_f16(x);
        }
        for (int i = 0; i < 128; i++) {
            float x = random_unit();
            b[i / 8][i % 8] = bf16 ? qk_f32_to_bf16(x) : qk_f32_to_f16(x);
            d[i / 8][i % 8] = random_unit();
        }
        float *device = cuda_put(d, sizeof d);
        CUDA_RUN(test_mma_launch(bf16, cuda_put(a, sizeof a), cuda_put(b, sizeof b), device));
        cuda_get(got, device, sizeof got);
        for (int row = 0; row < 16; row++)
            for (int col = 0; col < 8; col++) {
                double sum = d[row][col];
                for (int k = 0; k < 16; k++)
                    sum += bf16 ? (double)qk_bf16_to_f32(a[row][k]) * qk_bf16_to_f32(b[k][col])
                                : (double)qk_f16_to_f32(a[row][k]) * qk_f16_to_f32(b[k][col]);
                /* half a unit in the last place, and another for the order of the float64 sum */
                assert_true(fabs(got[row][col] - sum) <= fabs(sum) * 0x1.001p-24 + 1e-14);
            }
    }
}

static void test_ldmatrix(void **state)
{
    (void)state;
    uint16_t m[4][8][8], got[4][8][8];
    for (int i = 0; i < 256; i++) m[i / 64][i / 8 % 8][i % 8] = (uint16_t)(i * 37);
    for (int transposed = 0; transposed < 2; transposed++) {
        uint16_t *out = cuda_new(sizeof got);
        CUDA_RUN(test_ldmatrix_launch(transposed, cuda_put(m, sizeof m), out));
        cuda_get(got, out, sizeof got);
        for (int i = 0; i < 4; i++)
            for (int row = 0; row < 8; row++)
                for (int col = 0; col < 8; col++)
                    assert_int_equal(got[i][row][col], transposed ? m[i][col][row] : m[i][row][col]);
    }
}

/* A copy that nobody waited for has not happened, and has spoilt its target. */
static void test_copies(void **state)
{
    (void)state;
    uint32_t in[3][32][4], got[9][32];
    for (int i = 0; i < 384; i++) in[i / 128][i / 4 % 32][i % 4] = (uint32_t)i;
    uint32_t *out = cuda_new(sizeof got);
    CUDA_RUN(test_copies_launch(cuda_put(in, sizeof in), out));
    cuda_get(got, out, sizeof got);
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 9; i++) {
            uint32_t expect = i == 3 || i == 6 ? in[0][lane][0] : i == 7 ? in[1][lane][0] : i == 8 ? 0 : ~0u;
            assert_int_equal(got[i][lane], expect);
        }
}

/* With its barrier a kernel gives the same in every order; without it, in none. */
static void test_orders(void **state)
{
    (void)state;
    float in[64], got[64];
    for (int i = 0; i < 64; i++) in[i] = random_unit();
    for (int barrier = 0; barrier < 2; barrier++)
        for (int o = 0; o < ORDERS; o++) {
            setenv("QLUA_EMU_ORDER", orders[o], 1);
            float *out = cuda_new(sizeof got);
            CUDA_RUN(test_exchange_launch(barrier, cuda_put(in, sizeof in), out));
            cuda_get(got, out, sizeof got);
            int wrong = 0;
            for (int i = 0; i < 64; i++) wrong += !(got[i] == in[i] + in[63 - i]);
            if (barrier)
                assert_int_equal(wrong, 0);
            else
                assert_in_range(wrong, 1, 63);
        }
}

static void test_fresh_shared(void **state)
{
    (void)state;
    uint32_t got[2], *out = cuda_new(sizeof got);
    CUDA_RUN(test_fresh_shared_launch(out));
    cuda_get(got, out, sizeof got);
    assert_int_equal(got[0], ~0u);
    assert_int_equal(got[1], ~0u);
}

static void test_block_order(void **state)
{
    (void)state;
    enum { BLOCKS = 50 };
    int got[BLOCKS], seen[BLOCKS] = {0}, zero = 0;
    for (int o = 0; o < 3; o++) {
        setenv("QLUA_EMU_ORDER", orders[o], 1);
        int *order = cuda_new(sizeof got);
        CUDA_RUN(test_block_order_launch(BLOCKS, cuda_put(&zero, sizeof zero), order));
        cuda_get(got, order, sizeof got);
        bool forward = true, reverse = true;
        for (int i = 0; i < BLOCKS; i++) {
            seen[got[i]]++;
            forward = forward && got[i] == i;
            reverse = reverse && got[i] == BLOCKS - 1 - i;
        }
        assert_int_equal(forward, o == 0);
        assert_int_equal(reverse, o == 1);
    }
    for (int i = 0; i < BLOCKS; i++) assert_int_equal(seen[i], 3);
}

/* What a process that launches it says before it dies; fails when it lives. */
static void last_words(wrong_kernel which, char *text, size_t size)
{
    int ends[2];
    assert_int_equal(pipe(ends), 0);
    uint32_t *memory = cuda_new(1024);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        signal(SIGABRT, SIG_DFL); /* cmocka's handler would go on with the tests */
        test_wrong_launch(which, memory);
        _exit(0);
    }
    close(ends[1]);
    size_t used = 0;
    for (ssize_t n; (n = read(ends[0], text + used, size - 1 - used)) > 0;) used += (size_t)n;
    text[used] = 0;
    close(ends[0]);
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) fail_msg("wrong kernel %d ends well", which);
    cuda_free(memory);
}

static void test_wrong_kernels(void **state)
{
    (void)state;
    static const char *const words[WRONG_COUNT] = {
        [WRONG_BARRIER_SKIPPED] = "waits at __syncthreads",
        [WRONG_BARRIER_OTHER] = "at different barriers",
        [WRONG_WARP_RETURNED] = "has returned",
        [WRONG_WARP_ELSEWHERE] = "cannot go on",
        [WRONG_WARP_SELF] = "lacks the lane itself",
        [WRONG_WARP_SOURCE] = "not in the mask",
#ifdef __SANITIZE_ADDRESS__
        [WRONG_SHARED_END] = "heap-buffer-overflow",
#else
        [WRONG_SHARED_END] = "past its 256 bytes of shared memory",
#endif
        [WRONG_ALIGNMENT] = "misaligned",
        [WRONG_COPY_SOURCE] = "not in one device allocation",
        [WRONG_COPY_TARGET] = "is not shared memory",
    };
    static char text[1 << 16];
    for (int which = 0; which < WRONG_COUNT; which++)
        for (int o = 0; o < 3; o++) {
            setenv("QLUA_EMU_ORDER", orders[o], 1);
            last_words((wrong_kernel)which, text, sizeof text);
            if (!strstr(text, words[which])) fail_msg("wrong kernel %d, %s: %s", which, orders[o], text);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_warps, forget_order),
        cmocka_unit_test_teardown(test_votes, forget_order),
        cmocka_unit_test_teardown(test_mma, forget_order),
        cmocka_unit_test_teardown(test_ldmatrix, forget_order),
        cmocka_unit_test_teardown(test_copies, forget_order),
        cmocka_unit_test_teardown(test_orders, forget_order),
        cmocka_unit_test_teardown(test_fresh_shared, forget_order),
        cmocka_unit_test_teardown(test_block_order, forget_order),
        cmocka_unit_test_teardown(test_wrong_kernels, forget_order),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
