/* The forward pass over its cache: in pieces as at once, in company as alone, and after every failure as
 * before. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "backend_cpu.h"
#include "generate.h"
#include "interrupt.h"
#include "mem.h"
#include "device_help.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MODELS QLUA_SOURCE_DIR "/tests/golden/models/"

enum { VOCAB = 64, TOKENS = 37 };

static bool nf4(void *ud, const char *name, int64_t n, int64_t k, ql_quant_spec *spec, ql_err *err)
{
    (void)n;
    (void)k;
    const bool *with_double = ud;
    if (strcmp(name, "lm_head") == 0 || ql_quant_spec_init("nf4", spec, err) != QL_OK) return false;
    spec->double_quant = *with_double;
    return true;
}

static const ql_config shape = {.architecture = "LlamaForCausalLM",
                                .hidden = 48,
                                .intermediate = 80,
                                .layers = 2,
                                .heads = 6,
                                .kv_heads = 2,
                                .head_dim = 8,
                                .vocab = VOCAB,
                                .max_positions = 64,
                                .rms_eps = 1e-5,
                                .rope = {.type = QL_ROPE_NONE, .theta = 10000, .factor = 1},
                                .bos = -1};

static ql_llama *make(ql_dtype dtype, bool quantized)
{
    bool with_double = true;
    ql_llama *m;
    ql_err err;
    assert_int_equal(ql_llama_random(dev, &shape, dtype, 5, quantized ? nf4 : NULL, &with_double, &m, &err),
                     QL_OK);
    return m;
}

static void draw(int32_t *ids, int n, uint32_t seed)
{
    for (int i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        ids[i] = (int32_t)(seed >> 16) % VOCAB;
    }
}

static ql_kvcache cache_for(ql_llama *m, int sequences, int32_t capacity)
{
    int32_t all[8];
    ql_kvcache cache;
    ql_err err;
    for (int i = 0; i < sequences; i++) all[i] = capacity;
    assert_int_equal(ql_llama_cache(m, sequences, all, &cache, &err), QL_OK);
    return cache;
}

/* Logits of all of ids [n] in one pass: out [n, VOCAB]. */
static void whole(ql_llama *m, const int32_t *ids, int32_t n, float *out)
{
    ql_kvcache cache = cache_for(m, 1, n);
    ql_tensor logits = {0};
    ql_err err;
    ql_batch batch = {1, ids, &n, &n, NULL};
    assert_int_equal(ql_llama_forward(m, &cache, &batch, NULL, &logits, &err), QL_OK);
    assert_int_equal(cache.length[0], n);
    memcpy(out, logits.data, (size_t)n * VOCAB * sizeof *out);
    ql_tensor_free(&logits);
    ql_kvcache_free(&cache);
}

static void in_pieces(ql_llama *m)
{
    static const int32_t steps[] = {1, 2, 3, 7, 16, 36};
    int32_t ids[TOKENS];
    static float expected[TOKENS * VOCAB];
    draw(ids, TOKENS, 1);
    whole(m, ids, TOKENS, expected);
    for (size_t s = 0; s < sizeof steps / sizeof *steps; s++) {
        ql_kvcache cache = cache_for(m, 1, TOKENS + 3);
        ql_tensor logits = {0};
        ql_err err;
        for (int32_t at = 0; at < TOKENS; at += steps[s]) {
            int32_t n = TOKENS - at < steps[s] ? TOKENS - at : steps[s];
            ql_batch batch = {1, ids + at, &n, &n, NULL};
            assert_int_equal(ql_llama_forward(m, &cache, &batch, NULL, &logits, &err), QL_OK);
            assert_memory_equal(logits.data, expected + at * VOCAB, (size_t)n * VOCAB * sizeof(float));
        }
        assert_int_equal(cache.length[0], TOKENS);
        ql_tensor_free(&logits);
        ql_kvcache_free(&cache);
    }
}

static void pieces_give_the_bits_of_the_whole(void **state)
{
    (void)state;
    static const ql_dtype dtypes[] = {QL_F32, QL_F16, QL_BF16};
    for (int i = 0; i < 3; i++) {
        for (int quantized = 0; quantized < 2; quantized++) {
            ql_llama *m = make(dtypes[i], quantized);
            in_pieces(m);
            ql_llama_free(m);
        }
    }
}

/* Two rows that go on from one, and one from a row of another length: the bits of whole rows, and the source
 * is as it was. */
static void copied_sequences_go_on(void **state)
{
    (void)state;
    ql_llama *m = make(QL_BF16, true);
    enum { HEAD = 11, SHORT = 3 };
    static float expected[2][TOKENS * VOCAB];
    int32_t ids[2][TOKENS], heads[HEAD + SHORT], head_lengths[] = {HEAD, SHORT}, none[] = {0, 0};
    for (int i = 0; i < 2; i++) {
        draw(ids[i], TOKENS, (uint32_t)i + 40);
        whole(m, ids[i], TOKENS, expected[i]);
    }
    memcpy(heads, ids[0], HEAD * sizeof *heads);
    memcpy(heads + HEAD, ids[1], SHORT * sizeof *heads);
    ql_kvcache source, target;
    ql_tensor logits = {0};
    ql_err err;
    assert_int_equal(ql_llama_cache(m, 2, (int32_t[]){HEAD + 4, SHORT}, &source, &err), QL_OK);
    ql_batch begin = {2, heads, head_lengths, none, NULL};
    assert_int_equal(ql_llama_forward(m, &source, &begin, NULL, &logits, &err), QL_OK);

    target = cache_for(m, 3, TOKENS);
    static const int from[] = {0, 1, 0};
    int32_t packed[3 * TOKENS], lengths[3];
    int at = 0;
    for (int i = 0; i < 3; i++) {
        assert_int_equal(ql_kvcache_copy(&source, from[i], &target, i, &err), QL_OK);
        assert_int_equal(target.length[i], head_lengths[from[i]]);
        lengths[i] = TOKENS - head_lengths[from[i]];
        memcpy(packed + at, ids[from[i]] + head_lengths[from[i]], (size_t)lengths[i] * sizeof *packed);
        at += lengths[i];
    }
    ql_batch rest = {3, packed, lengths, lengths, NULL};
    assert_int_equal(ql_llama_forward(m, &target, &rest, NULL, &logits, &err), QL_OK);
    const float *got = logits.data;
    for (int i = 0; i < 3; i++) {
        size_t count = (size_t)lengths[i] * VOCAB;
        assert_memory_equal(got, expected[from[i]] + (size_t)head_lengths[from[i]] * VOCAB,
                            count * sizeof *got);
        got += count;
    }
    assert_int_equal(source.length[0], HEAD);

    /* Only into an empty sequence that is long enough. */
    assert_int_equal(ql_kvcache_copy(&source, 0, &target, 1, &err), QL_ERR_ARG);
    assert_int_equal(ql_kvcache_copy(&source, 2, &target, 1, &err), QL_ERR_ARG);
    ql_kvcache small = cache_for(m, 1, HEAD - 1);
    assert_int_equal(ql_kvcache_copy(&source, 0, &small, 0, &err), QL_ERR_ARG);
    assert_int_equal(small.length[0], 0);
    ql_tensor_free(&logits);
    ql_kvcache_free(&small);
    ql_kvcache_free(&source);
    ql_kvcache_free(&target);
    ql_llama_free(m);
}

/* More than there is of memory is refused before any is taken, with what is needed and what there is. */
static void what_cannot_fit_is_refused(void **state)
{
    (void)state;
    ql_config large = shape;
    large.layers = 512;
    large.kv_heads = 6;
    large.head_dim = 512;
    large.heads = 6;
    large.hidden = 1;
    large.intermediate = 1;
    large.max_positions = 1 << 24;
    ql_llama m = {.device = dev, .config = large, .max_context = large.max_positions};
    m.weights.dtype = QL_F32;
    int32_t capacity = 1 << 24; /* each of its 1024 tensors alone is 192 GiB in 4-byte numbers */
    size_t live = ql_tensor_live_bytes();
    ql_kvcache cache;
    ql_err err;
    assert_int_equal(ql_llama_cache(&m, 1, &capacity, &cache, &err), QL_ERR_MEMORY);
    assert_non_null(
        strstr(err.message, "211106232532992 bytes (201326592.0 MiB) needed for a cache of 16777216 tokens"));
    assert_non_null(strstr(err.message, "MiB available"));
    assert_int_equal(ql_tensor_live_bytes(), live);
}

/* Four sequences at different places: one starts while another decodes and a third is fed five tokens. */
static void sequences_do_not_meet(void **state)
{
    (void)state;
    ql_llama *m = make(QL_BF16, true);
    static float expected[4][TOKENS * VOCAB];
    int32_t ids[4][TOKENS], fed[4] = {0};
    for (int i = 0; i < 4; i++) {
        draw(ids[i], TOKENS, (uint32_t)i + 7);
        whole(m, ids[i], TOKENS, expected[i]);
    }
    ql_kvcache cache = cache_for(m, 4, TOKENS);
    ql_tensor logits = {0};
    ql_err err;
    uint32_t seed = 3;
    for (int round = 0; round < 60; round++) {
        int32_t packed[4 * 5], lengths[4], outputs[4], seq[4];
        int rows = 0, at = 0;
        for (int k = 0; k < 4; k++) {
            int i = (k + round) % 4;
            seed = seed * 1664525u + 1013904223u;
            int32_t n = (int32_t)(seed >> 20) % 6, left = TOKENS - fed[i];
            if (n > left) n = left;
            if (n == 0) continue;
            memcpy(packed + at, ids[i] + fed[i], (size_t)n * sizeof *packed);
            at += n;
            seq[rows] = i;
            lengths[rows] = n;
            outputs[rows++] = (int32_t)(seed >> 8) % (n + 1);
        }
        if (rows == 0) continue;
        ql_batch batch = {rows, packed, lengths, outputs, seq};
        assert_int_equal(ql_llama_forward(m, &cache, &batch, NULL, &logits, &err), QL_OK);
        const float *got = logits.data;
        for (int r = 0; r < rows; r++) {
            fed[seq[r]] += lengths[r];
            assert_int_equal(cache.length[seq[r]], fed[seq[r]]);
            const float *want = expected[seq[r]] + (fed[seq[r]] - outputs[r]) * VOCAB;
            assert_memory_equal(got, want, (size_t)outputs[r] * VOCAB * sizeof(float));
            got += outputs[r] * VOCAB;
        }
    }
    for (int i = 0; i < 4; i++) assert_int_equal(fed[i], TOKENS);
    ql_tensor_free(&logits);
    ql_kvcache_free(&cache);
    ql_llama_free(m);
}

static void refusals_leave_the_cache_alone(void **state)
{
    (void)state;
    ql_llama *m = make(QL_F32, false);
    ql_kvcache cache = cache_for(m, 2, 10);
    ql_tensor logits = {0};
    ql_err err;
    int32_t ids[32], five = 5, one = 1;
    draw(ids, 32, 9);
    ql_batch good = {1, ids, &five, &one, NULL};
    assert_int_equal(ql_llama_forward(m, &cache, &good, NULL, &logits, &err), QL_OK);

    const struct {
        int rows;
        int32_t lengths[2], outputs[2], seq[2], first_id;
        const char *says;
    } cases[] = {
        {0, {1, 1}, {1, 1}, {0, 1}, 1, "empty batch"},
        {1, {0, 1}, {0, 1}, {0, 1}, 1, "row 1 has no tokens"},
        {2, {1, -3}, {1, 1}, {0, 1}, 1, "row 2 has no tokens"},
        {1, {2, 1}, {3, 1}, {0, 1}, 1, "asks for 3 logits of 2"},
        {1, {2, 1}, {-1, 1}, {0, 1}, 1, "asks for -1"},
        {1, {2, 1}, {1, 1}, {2, 1}, 1, "sequence 3 of a cache of 2"},
        {1, {2, 1}, {1, 1}, {-1, 1}, 1, "sequence 0"},
        {1, {6, 1}, {1, 1}, {0, 1}, 1, "needs 11 cache slots"},
        {2, {1, 2}, {1, 1}, {0, 1}, VOCAB, "token id 64"},
        {2, {1, 2}, {1, 1}, {0, 1}, -1, "token id -1"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        ids[0] = cases[i].first_id;
        ql_batch batch = {cases[i].rows, ids, cases[i].lengths, cases[i].outputs, cases[i].seq};
        assert_int_equal(ql_llama_forward(m, &cache, &batch, NULL, &logits, &err), QL_ERR_ARG);
        assert_non_null(strstr(err.message, cases[i].says));
        assert_null(logits.storage);
        assert_int_equal(cache.length[0], 5);
        assert_int_equal(cache.length[1], 0);
    }
    ql_kvcache_free(&cache);
    ql_llama_free(m);
}

/* --- allocations that fail -------------------------------------------------------------------------------
 */

typedef ql_status (*attempt)(void *ud, ql_err *err);

/* Let every allocation of `fn` fail once, then all from it on: out of memory is said, nothing leaks (the
 * sanitizer looks), and then it works. */
static void survives(attempt fn, void *ud)
{
    for (int persistent = 0; persistent < 2; persistent++) {
        for (long n = 0;; n++) {
            ql_err err = {0};
            ql_mem_fail_after(n, persistent);
            ql_status status = fn(ud, &err);
            ql_mem_fail_after(-1, false);
            if (status == QL_OK) {
                assert_true(n > 3);
                break;
            }
            assert_int_equal(status, QL_ERR_MEMORY);
            assert_int_equal(err.code, QL_ERR_MEMORY);
            assert_true(strlen(err.message) > 0);
            assert_true(n < 5000);
        }
    }
}

static ql_status load(const char *folder, ql_dtype dtype, bool quantized, ql_llama **m, ql_err *err)
{
    bool with_double = true;
    ql_load_options options = {.dtype = dtype};
    ql_status status = ql_llama_load(dev, folder, &options, quantized ? nf4 : NULL, &with_double, m, err);
    assert_true((status == QL_OK) == (*m != NULL));
    return status;
}

static ql_status try_load(void *ud, ql_err *err)
{
    ql_llama *m;
    ql_status status = load(ud, QL_DTYPE_COUNT, false, &m, err);
    ql_llama_free(m);
    return status;
}

static ql_status try_load_quantized(void *ud, ql_err *err)
{
    ql_llama *m;
    ql_status status = load(ud, QL_DTYPE_COUNT, true, &m, err);
    ql_llama_free(m);
    return status;
}

/* As stored and, where another type is asked for, converted too. */
static void loading_quantized_has_one_dense_matrix_at_a_time(void **state)
{
    (void)state;
    static const ql_dtype dtypes[] = {QL_DTYPE_COUNT, QL_F32};
    const char *folder = QLUA_SOURCE_DIR "/examples/models/demo";
    for (int i = 0; i < 2; i++) {
        ql_llama *full, *m;
        ql_err err;
        assert_int_equal(load(folder, dtypes[i], false, &full, &err), QL_OK);
        assert_int_equal(load(folder, dtypes[i], true, &m, &err), QL_OK);
        const ql_matrix *largest = &full->weights.layer[0].linear[QL_DOWN];
        size_t one = (size_t)(largest->n * largest->k) * (i == 0 ? 2 : 2 + 4);
        size_t held = ql_weights_bytes(&m->weights), all = ql_weights_bytes(&full->weights);
        ql_mem_stats s = ql_arena_stats(m->arena);
        assert_int_equal(s.current_total, held);
        assert_in_range(s.peak_total, held, held + one);
        assert_true(held + 2 * one < all);
        ql_llama_free(full);
        ql_llama_free(m);
    }
}

/* Appends n tokens to the only sequence. */
static void append(ql_llama *m, ql_kvcache *cache, const int32_t *ids, int32_t n)
{
    ql_tensor logits = {0};
    ql_err err;
    const int32_t one = 1;
    ql_batch batch = {1, ids, &n, &one, NULL};
    assert_int_equal(ql_llama_forward(m, cache, &batch, NULL, &logits, &err), QL_OK);
    ql_tensor_free(&logits);
}

/* Products' packed activations in a prefill, attention's runs for one token after many. */
static void what_the_backend_holds_for_a_pass_is_charged(void **state)
{
    (void)state;
    enum { FIRST = 40, THEN = 860 };
    static int32_t ids[FIRST + THEN];
    ql_config config = shape;
    config.max_positions = FIRST + THEN + 1;
    int threads;
    ql_device *own;
    ql_llama *m;
    ql_err err;
    assert_int_equal(ql_pool_decide_threads(0, &threads, &err), QL_OK);
    if (threads > 2) threads = 2;
    assert_int_equal(ql_device_open("cpu", &(ql_device_options){.threads = threads}, &own, &err), QL_OK);
    assert_int_equal(ql_llama_random(own, &config, QL_BF16, 5, NULL, NULL, &m, &err), QL_OK);
    const cpu_context *c = own->ctx;
    ql_kvcache cache = cache_for(m, 1, FIRST + THEN + 1);

    append(m, &cache, ids, FIRST);
    assert_int_equal(m->work.own, sizeof(float) * FIRST * 80); /* the widest input, intermediate */
    assert_int_equal(m->work.own, c->packed_bytes);
    size_t held = ql_arena_stats(m->arena).current[QL_MEM_ACTIVATIONS];
    append(m, &cache, ids, THEN);
    assert_int_equal(c->packed_bytes, sizeof(float) * (512 * 80 + 16 * 16)); /* 16 lanes, a line apart */
    assert_in_range(ql_arena_stats(m->arena).peak[QL_MEM_ACTIVATIONS], c->packed_bytes + held, SIZE_MAX);
    append(m, &cache, ids, 1);
    assert_int_equal(m->work.own, c->partial_bytes);
    assert_true(c->partial_bytes > 0 || threads == 1);
    ql_llama_reset_peak(m);
    assert_int_equal(ql_arena_stats(m->arena).current[QL_MEM_ACTIVATIONS], 0);

    ql_kvcache_free(&cache);
    ql_llama_free(m);
    ql_device_release(own);
}

static ql_status try_quantize(void *ud, ql_err *err)
{
    bool with_double = true;
    ql_llama *twin;
    ql_status status = ql_llama_quantize(ud, nf4, &with_double, &twin, err);
    assert_true((status == QL_OK) == (twin != NULL));
    ql_llama_free(twin);
    return status;
}

static ql_status try_random(void *ud, ql_err *err)
{
    (void)ud;
    bool with_double = true;
    ql_llama *m;
    ql_status status = ql_llama_random(dev, &shape, QL_BF16, 1, nf4, &with_double, &m, err);
    assert_true((status == QL_OK) == (m != NULL));
    ql_llama_free(m);
    return status;
}

static ql_status try_forward(void *ud, ql_err *err)
{
    ql_llama *m = ud;
    ql_kvcache cache;
    ql_tensor logits = {0};
    int32_t ids[12], lengths[2] = {5, 7}, outputs[2] = {1, 7};
    draw(ids, 12, 2);
    ql_status status = ql_llama_cache(m, 2, lengths, &cache, err);
    if (status != QL_OK) return status;
    ql_batch batch = {2, ids, lengths, outputs, NULL};
    status = ql_llama_forward(m, &cache, &batch, NULL, &logits, err);
    assert_true((status == QL_OK) == (logits.storage != NULL));
    assert_int_equal(cache.length[1], status == QL_OK ? 7 : 0);
    ql_tensor_free(&logits);
    ql_kvcache_free(&cache);
    return status;
}

static ql_status try_generate(void *ud, ql_err *err)
{
    int32_t a[4], b[2];
    draw(a, 4, 3);
    draw(b, 2, 4);
    const int32_t *prompts[] = {a, b};
    const int32_t lengths[] = {4, 2};
    ql_generate_options options = {.max_new_tokens = 3, .sampling = {.temperature = 1, .top_p = 0.9}};
    ql_generated g;
    ql_status status = ql_generate(ud, 2, prompts, lengths, NULL, &options, &g, err);
    if (status == QL_OK)
        assert_true(g.rows == 2 && g.counts[0] == 3 && g.counts[1] == 3);
    else
        assert_null(g.ids);
    ql_generated_free(&g);
    return status;
}

static void allocations_may_fail(void **state)
{
    (void)state;
    survives(try_load, (void *)(uintptr_t)(MODELS "nf4_double"));
    survives(try_load, (void *)(uintptr_t)(MODELS "sharded_f32"));
    survives(try_load_quantized, (void *)(uintptr_t)(MODELS "llama3_bf16"));
    survives(try_random, NULL);
    ql_llama *m = make(QL_F16, false);
    survives(try_quantize, m);
    static float before[12 * VOCAB], after[12 * VOCAB];
    int32_t ids[12];
    draw(ids, 12, 6);
    whole(m, ids, 12, before);
    ql_llama *fresh = make(QL_F16, false);
    survives(try_forward, fresh);
    survives(try_generate, fresh);
    whole(fresh, ids, 12, after);
    assert_memory_equal(before, after, sizeof before);
    ql_llama_free(m);
    ql_llama_free(fresh);
}

static void the_user_may_stop_each(void **state)
{
    (void)state;
    ql_llama *m = make(QL_BF16, false);
    const attempt tries[] = {try_load,     try_load_quantized, try_random,
                             try_quantize, try_forward,        try_generate};
    for (size_t i = 0; i < sizeof tries / sizeof *tries; i++) {
        bool loads = tries[i] == try_load || tries[i] == try_load_quantized;
        void *ud = loads ? (void *)(uintptr_t)(MODELS "llama3_bf16") : (void *)m;
        ql_err err = {0};
        ql_interrupt_set();
        assert_int_equal(tries[i](ud, &err), QL_ERR_INTERRUPTED);
        ql_interrupt_clear();
        assert_int_equal(tries[i](ud, &err), QL_OK);
    }
    ql_llama_free(m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(pieces_give_the_bits_of_the_whole),
        cmocka_unit_test(copied_sequences_go_on),
        cmocka_unit_test(what_cannot_fit_is_refused),
        cmocka_unit_test(sequences_do_not_meet),
        cmocka_unit_test(refusals_leave_the_cache_alone),
        cmocka_unit_test(loading_quantized_has_one_dense_matrix_at_a_time),
        cmocka_unit_test(what_the_backend_holds_for_a_pass_is_charged),
        cmocka_unit_test(allocations_may_fail),
        cmocka_unit_test(the_user_may_stop_each),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
