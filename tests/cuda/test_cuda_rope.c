/* Rotary positions and writing to the cache on the device: bit for bit what the CPU kernels give. */
#include "cuda_help.h"

enum { TOKENS = 5, POSITIONS = 40, SLOTS = 70 };
static const int32_t start[TOKENS] = {3, 3, 3, 61, 20}, pos[TOKENS] = {0, 1, 2, 8, 39};

typedef struct {
    int heads, kv_heads, d;
    float *q, *k, *v, *cos, *sin; /* host */
    float *dev_q, *dev_k, *dev_v, *dev_cos, *dev_sin;
    int32_t *dev_start, *dev_pos;
} rope_case;

static size_t q_bytes(const rope_case *c)
{
    return (size_t)TOKENS * (size_t)(c->heads * c->d) * sizeof(float);
}

static size_t kv_bytes(const rope_case *c)
{
    return (size_t)TOKENS * (size_t)(c->kv_heads * c->d) * sizeof(float);
}

static rope_case new_case(int heads, int kv_heads, int d)
{
    rope_case c = {.heads = heads, .kv_heads = kv_heads, .d = d};
    size_t angles = (size_t)POSITIONS * (size_t)(d / 2);
    c.q = new_floats(q_bytes(&c) / sizeof(float));
    c.k = new_floats(kv_bytes(&c) / sizeof(float));
    c.v = new_floats(kv_bytes(&c) / sizeof(float));
    c.cos = new_floats(angles);
    c.sin = new_floats(angles);
    c.dev_q = cuda_put(c.q, q_bytes(&c));
    c.dev_k = cuda_put(c.k, kv_bytes(&c));
    c.dev_v = cuda_put(c.v, kv_bytes(&c));
    c.dev_cos = cuda_put(c.cos, angles * sizeof(float));
    c.dev_sin = cuda_put(c.sin, angles * sizeof(float));
    c.dev_start = cuda_put(start, sizeof start);
    c.dev_pos = cuda_put(pos, sizeof pos);
    return c;
}

static void free_case(rope_case *c)
{
    free(c->q);
    free(c->k);
    free(c->v);
    free(c->cos);
    free(c->sin);
    cuda_free_all();
}

/* What the cache must hold: poison but for the tokens' slots. */
static void *expected_cache(const rope_case *c, const float *src, qk_format f, size_t bytes)
{
    unsigned char *cache = new_bytes(bytes);
    memset(cache, 0xff, bytes);
    for (int64_t t = 0; t < TOKENS; t++)
        for (int64_t h = 0; h < c->kv_heads; h++) {
            int64_t to = (h * SLOTS + start[t] + pos[t]) * c->d, from = (t * c->kv_heads + h) * c->d;
            qk_cpu_select(NULL, NULL)
                ->convert(QK_F32, src + from, f, cache + (size_t)to * format_size(f), 0, c->d);
        }
    return cache;
}

static void check_cache(const rope_case *c, const void *device, const float *src, qk_format f)
{
    size_t bytes = (size_t)c->kv_heads * SLOTS * (size_t)c->d * format_size(f);
    void *expect = expected_cache(c, src, f, bytes), *got = cuda_copy(device, bytes);
    assert_memory_equal(got, expect, bytes);
    free(expect);
    free(got);
}

static void check_shape(int heads, int kv_heads, int d)
{
    const qk_cpu *cpu = qk_cpu_select(NULL, NULL);
    rope_case c = new_case(heads, kv_heads, d);
    float *rotated = new_bytes(kv_bytes(&c)), *got = new_bytes(q_bytes(&c));
    memcpy(rotated, c.k, kv_bytes(&c));
    cpu->rope(c.q, pos, c.cos, c.sin, heads, d, 0, TOKENS);
    cpu->rope(rotated, pos, c.cos, c.sin, kv_heads, d, 0, TOKENS);
    for (qk_format f = QK_F32; f <= QK_BF16; f++) {
        size_t bytes = (size_t)kv_heads * SLOTS * (size_t)d * format_size(f);
        void *cache_k = cuda_new(bytes), *cache_v = cuda_new(bytes);
        CUDA_RUN(qk_cuda_kv_write(NULL, c.dev_k, c.dev_v, c.dev_start, c.dev_pos, kv_heads, d, SLOTS, TOKENS,
                                  f, cache_k, cache_v));
        check_cache(&c, cache_k, c.k, f);
        check_cache(&c, cache_v, c.v, f);
        void *q = cuda_new(q_bytes(&c));
        CUDA_OK(cudaMemcpy(q, c.dev_q, q_bytes(&c), cudaMemcpyDeviceToDevice));
        CUDA_RUN(qk_cuda_rope_kv(NULL, q, c.dev_k, c.dev_v, c.dev_start, c.dev_pos, c.dev_cos, c.dev_sin,
                                 heads, kv_heads, d, SLOTS, TOKENS, f, cache_k, cache_v));
        check_cache(&c, cache_k, rotated, f);
        check_cache(&c, cache_v, c.v, f);
        cuda_get(got, q, q_bytes(&c));
        assert_same_bits(got, c.q, q_bytes(&c) / sizeof(float));
    }
    CUDA_RUN(qk_cuda_rope(NULL, c.dev_q, c.dev_pos, c.dev_cos, c.dev_sin, heads, d, TOKENS));
    cuda_get(got, c.dev_q, q_bytes(&c));
    assert_same_bits(got, c.q, q_bytes(&c) / sizeof(float));
    free(rotated);
    free(got);
    free_case(&c);
}

static void test_shapes(void **state)
{
    (void)state;
    const int shapes[][3] = {{1, 1, 2},  {4, 2, 6},   {9, 3, 64},   {8, 8, 32}, {32, 8, 8},
                             {5, 1, 80}, {4, 1, 128}, {12, 4, 256}, {3, 3, 24}, {2, 1, 10}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        check_shape(shapes[i][0], shapes[i][1], shapes[i][2]);
    }
}

static void test_bad_format_is_refused(void **state)
{
    (void)state;
    assert_int_not_equal(qk_cuda_kv_write(NULL, NULL, NULL, NULL, NULL, 1, 8, 1, 1, QK_4BIT, NULL, NULL), 0);
    assert_int_not_equal(
        qk_cuda_rope_kv(NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 1, 1, 8, 1, 1, QK_4BIT, NULL, NULL),
        0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_bad_format_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
