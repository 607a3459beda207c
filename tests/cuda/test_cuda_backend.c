/* Whole passes on the CUDA backend: against steps and against the CPU, graphs, invariance, workspaces. Runs
 * on the emulated device and on a real one.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "llama.h"
#include "ops.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 48, LAYERS = 2, CONTEXT = 256, MOST = 128 };

static const ql_config shape = {.architecture = "LlamaForCausalLM",
                                .hidden = 64,
                                .intermediate = 128,
                                .layers = LAYERS,
                                .heads = 2,
                                .kv_heads = 1,
                                .head_dim = 32,
                                .vocab = VOCAB,
                                .max_positions = CONTEXT,
                                .rms_eps = 1e-5,
                                .rope = {.type = QL_ROPE_NONE, .theta = 10000, .factor = 1},
                                .bos = -1};

/* Sizes that tensor cores and tiles do not take. */
static const ql_config odd = {.architecture = "LlamaForCausalLM",
                              .hidden = 36,
                              .intermediate = 52,
                              .layers = LAYERS,
                              .heads = 3,
                              .kv_heads = 1,
                              .head_dim = 8,
                              .vocab = VOCAB + 1,
                              .max_positions = CONTEXT,
                              .rms_eps = 1e-5,
                              .rope = {.type = QL_ROPE_NONE, .theta = 10000, .factor = 1},
                              .bos = -1};

/* ---- models ---- */

typedef struct {
    const char *name;
    const ql_config *config;
    ql_dtype dtype;
    bool quantized, with_double, mixed, head;
    int last;          /* batch that is tried: emulated float32 takes its time */
    double steps, cpu; /* bounds on the normalized mean square error of the logits */
} model_case;

/* Against the steps: the same kernels in another order, so that a 16-bit input rounds the other way now and
 * then. Against the CPU: the bounds of the project's numerics, 5e-4 with 16-bit inputs and 1e-7 in float32.
 */
static const model_case cases[] = {
    {"bf16", &shape, QL_BF16, .last = 4, .steps = 1e-5, .cpu = 5e-4},
    {"f16", &shape, QL_F16, .last = 2, .steps = 1e-5, .cpu = 5e-4},
    {"f32", &shape, QL_F32, .last = 3, .steps = 1e-10, .cpu = 1e-7},
    {"nf4", &shape, QL_BF16, .quantized = true, .last = 3, .steps = 1e-5, .cpu = 5e-4},
    {"nf4 double", &shape, QL_BF16, .quantized = true, .with_double = true, .last = 3, .steps = 1e-5,
     .cpu = 5e-4},
    {"nf4 head too", &shape, QL_BF16, .quantized = true, .head = true, .last = 4, .steps = 1e-5, .cpu = 5e-4},
    {"nf4 in f16", &shape, QL_F16, .quantized = true, .last = 2, .steps = 1e-5, .cpu = 5e-4},
    {"nf4 in f32", &shape, QL_F32, .quantized = true, .last = 1, .steps = 1e-10, .cpu = 1e-7},
    {"mixed", &shape, QL_BF16, .quantized = true, .mixed = true, .last = 3, .steps = 1e-5, .cpu = 5e-4},
    {"odd bf16", &odd, QL_BF16, .last = 1, .steps = 1e-5, .cpu = 5e-4},
    {"odd nf4", &odd, QL_BF16, .quantized = true, .last = 1, .steps = 1e-5, .cpu = 5e-4},
};
enum { CASES = sizeof cases / sizeof *cases, CHOSEN = 4 };
static const int chosen[CHOSEN] = {0, 2, 4, 8}; /* bf16, f32, nf4 double, mixed */

/* Mixed: k, gate and the second layer's o and down are quantized, so that every group of products is split.
 */
static bool policy(void *ud, const char *name, int64_t n, int64_t k, ql_quant_spec *spec, ql_err *err)
{
    (void)n;
    (void)k;
    const model_case *c = ud;
    if (!c->head && strcmp(name, "lm_head") == 0) return false;
    if (c->mixed && !strstr(name, "k_proj") && !strstr(name, "gate_proj") &&
        !strstr(name, "1.self_attn.o_proj") && !strstr(name, "1.mlp.down_proj"))
        return false;
    if (ql_quant_spec_init("nf4", spec, err) != QL_OK) return false;
    spec->double_quant = c->with_double;
    return true;
}

static ql_device *open_device(const char *name, ql_numerics numerics)
{
    ql_device *dev = NULL;
    ql_err err;
    ql_device_options options = {.threads = 1, .numerics = numerics};
    if (ql_device_open(name, &options, &dev, &err) != QL_OK) fail_msg("%s: %s", name, err.message);
    return dev;
}

static ql_llama *make(ql_device *dev, const model_case *c)
{
    ql_llama *m = NULL;
    ql_err err;
    if (ql_llama_random(dev, c->config, c->dtype, 5, c->quantized ? policy : NULL, (void *)c, &m, &err) !=
        QL_OK)
        fail_msg("%s: %s", c->name, err.message);
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
    int32_t all[MOST];
    ql_kvcache cache;
    ql_err err;
    for (int i = 0; i < sequences; i++) all[i] = capacity;
    assert_int_equal(ql_llama_cache(m, sequences, all, &cache, &err), QL_OK);
    return cache;
}

static ql_status ignore(void *ud, const char *name, const ql_tensor *value, ql_err *err)
{
    (void)ud;
    (void)name;
    (void)value;
    (void)err;
    return QL_OK;
}

/* Logits of one forward pass on the host: out [*, vocab]. A trace makes the model go step by step. */
static void forward(ql_llama *m, ql_kvcache *cache, const ql_batch *batch, bool steps, float *out)
{
    static const ql_trace trace = {.fn = ignore};
    ql_tensor logits = {0};
    ql_err err = {0};
    if (ql_llama_forward(m, cache, batch, steps ? &trace : NULL, &logits, &err) != QL_OK)
        fail_msg("forward: %s", err.message);
    assert_int_equal(ql_tensor_download(&logits, out, ql_tensor_bytes(&logits), &err), QL_OK);
    ql_tensor_free(&logits);
}

static double error_of(const float *got, const float *want, int64_t n)
{
    double sum = 0, square = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(got[i])) return INFINITY;
        sum += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        square += (double)want[i] * want[i];
    }
    return sum / square;
}

/* ---- passes ---- */

typedef struct {
    int rows;
    int32_t lengths[MOST], outputs[MOST];
} batch_shape;

/* 1 token, a few, more than a tile of 8, more than the own products take at once; in the last all logits. */
static const batch_shape batches[] = {
    {1, {1}, {1}},         {3, {1, 6, 2}, {1, 0, 2}}, {4, {5, 1, 11, 3}, {5, 1, 1, 2}},
    {2, {37, 29}, {2, 1}}, {1, {66}, {66}},
};
enum { MANY = 3, BATCHES = sizeof batches / sizeof *batches };

/* A batch, then one more token for each of its rows, so that what the first left in the cache is read: out
 * gets the logits of both; returns their number. */
static int64_t two_passes(ql_llama *m, const batch_shape *b, bool steps, float *out)
{
    int32_t ids[MOST], ones[MOST];
    int64_t tokens = 0, outputs = 0;
    for (int i = 0; i < b->rows; i++) {
        ones[i] = 1;
        tokens += b->lengths[i];
        outputs += b->outputs[i];
    }
    draw(ids, (int)tokens, 7);
    ql_kvcache cache = cache_for(m, b->rows, 80);
    forward(m, &cache, &(ql_batch){b->rows, ids, b->lengths, b->outputs, NULL}, steps, out);
    forward(m, &cache, &(ql_batch){b->rows, ids, ones, ones, NULL}, steps, out + outputs * m->config.vocab);
    ql_kvcache_free(&cache);
    return (outputs + b->rows) * m->config.vocab;
}

static float first_logits[MOST * (VOCAB + 1)], second_logits[MOST * (VOCAB + 1)];

static void check_case(const model_case *c, const batch_shape *b, ql_llama *cuda, ql_llama *cpu,
                       bool against_steps)
{
    int64_t n = two_passes(cuda, b, false, first_logits);
    two_passes(cpu, b, false, second_logits);
    double error = error_of(first_logits, second_logits, n);
    if (!(error <= c->cpu)) fail_msg("%s, %d rows: error %g against the CPU", c->name, b->rows, error);
    if (!against_steps) return;
    two_passes(cuda, b, true, second_logits);
    error = error_of(first_logits, second_logits, n);
    if (!(error <= c->steps)) fail_msg("%s, %d rows: error %g against the steps", c->name, b->rows, error);
}

static void passes(ql_numerics numerics, int first, bool against_steps)
{
    ql_device *gpu = open_device("cuda", numerics), *host = open_device("cpu", QL_NUMERICS_FAST);
    for (int i = 0; i < CASES; i++) {
        ql_llama *cuda = make(gpu, &cases[i]), *cpu = make(host, &cases[i]);
        for (int j = first; j <= cases[i].last; j++)
            check_case(&cases[i], &batches[j], cuda, cpu, against_steps);
        ql_llama_free(cuda);
        ql_llama_free(cpu);
    }
    ql_device_release(gpu);
    ql_device_release(host);
}

static void test_passes_agree_with_steps_and_the_cpu(void **state)
{
    (void)state;
    passes(QL_NUMERICS_FAST, 0, true);
}

/* Up to QK_PRODUCT_TOKENS tokens nothing differs from FAST. */
static void test_invariant_passes_agree_with_the_cpu(void **state)
{
    (void)state;
    passes(QL_NUMERICS_INVARIANT, MANY, false);
}

/* The kernels that one pass of `tokens` tokens of a case names. */
static void kernels_of(ql_device *dev, const model_case *c, int32_t tokens, char out[512])
{
    int32_t ids[MOST], one = 1;
    ql_llama *m = make(dev, c);
    ql_kvcache cache = cache_for(m, 1, MOST);
    draw(ids, tokens, 3);
    dev->backend->kernels(dev->ctx, out, 512);
    forward(m, &cache, &(ql_batch){1, ids, &tokens, &one, NULL}, false, first_logits);
    dev->backend->kernels(dev->ctx, out, 512);
    ql_kvcache_free(&cache);
    ql_llama_free(m);
}

static void test_the_kernels_that_ran_are_named(void **state)
{
    (void)state;
    char names[512];
    ql_device *dev = open_device("cuda", QL_NUMERICS_FAST);
    kernels_of(dev, &cases[0], 2, names);
    assert_string_equal(names, "16-bit mma m16n8k16, flash-decoding in pieces of 128");
    kernels_of(dev, &cases[0], 70, names);
    assert_string_equal(names, "16-bit mma m16n8k16, cuBLASLt bf16, flash attention mma");
    kernels_of(dev, &cases[2], 2, names);
    assert_string_equal(names, "plain float32, flash-decoding in pieces of 128");
    kernels_of(dev, &cases[3], 2, names);
    assert_string_equal(names,
                        "16-bit mma m16n8k16, 4-bit tiles mma m16n8k16, flash-decoding in pieces of 128");
    kernels_of(dev, &cases[3], 70, names);
    assert_string_equal(names, "16-bit mma m16n8k16, cuBLASLt bf16, 4-bit decoded for cuBLASLt, "
                               "flash attention mma");
    dev->backend->kernels(dev->ctx, names, sizeof names);
    assert_string_equal(names, "");
    ql_device_release(dev);

    dev = open_device("cuda", QL_NUMERICS_INVARIANT);
    kernels_of(dev, &cases[3], 70, names);
    assert_string_equal(names,
                        "16-bit mma m16n8k16, 4-bit tiles mma m16n8k16, flash-decoding in pieces of 128");
    ql_device_release(dev);
}

static void test_no_cublaslt_is_no_error(void **state)
{
    (void)state;
    char names[512];
    char *named = getenv("QLUA_CUBLASLT");
    if (named) named = strdup(named);
    setenv("QLUA_CUBLASLT", "/nonexistent/libcublasLt.so", 1);
    ql_device *dev = open_device("cuda", QL_NUMERICS_FAST), *host = open_device("cpu", QL_NUMERICS_FAST);
    ql_device_info info;
    assert_int_equal(dev->backend->info(dev->ctx, &info, NULL), QL_OK);
    assert_non_null(strstr(info.driver, "cuBLASLt not found"));
    kernels_of(dev, &cases[3], 70, names);
    assert_non_null(strstr(names, "cuBLASLt not found"));
    ql_llama *cuda = make(dev, &cases[3]), *cpu = make(host, &cases[3]);
    check_case(&cases[3], &batches[MANY], cuda, cpu, true);
    ql_llama_free(cuda);
    ql_llama_free(cpu);
    ql_device_release(dev);
    ql_device_release(host);
    unsetenv("QLUA_CUBLASLT");
    if (named) setenv("QLUA_CUBLASLT", named, 1);
    free(named);
}

#ifdef QLUA_EMULATED_PLUGIN
/* Large weights are decoded slice by slice. The emulated cuBLASLt sums every output alone, so slices of some
 * rows give the bits of the whole. */
static void test_slices_of_a_weight_are_its_product(void **state)
{
    (void)state;
    const int picked[] = {3, 5}; /* nf4; with its head */
    for (int i = 0; i < 2; i++) {
        ql_device *dev = open_device("cuda", QL_NUMERICS_FAST);
        ql_llama *m = make(dev, &cases[picked[i]]);
        int64_t n = two_passes(m, &batches[4], false, first_logits);
        ql_llama_free(m);
        ql_device_release(dev);
        setenv("QLUA_CUDA_SLICE", "4096", 1); /* 32 rows of 64 inputs, 16 of 128 */
        dev = open_device("cuda", QL_NUMERICS_FAST);
        unsetenv("QLUA_CUDA_SLICE");
        m = make(dev, &cases[picked[i]]);
        two_passes(m, &batches[4], false, second_logits);
        ql_llama_free(m);
        ql_device_release(dev);
        assert_memory_equal(first_logits, second_logits, (size_t)n * sizeof(float));
    }
}
#endif

/* ---- graphs ---- */

enum { STEPS = 4 };

/* A prompt for three rows, then some steps: the logits of all steps, [STEPS, 3, VOCAB]. */
static void decode_run(ql_device *dev, const model_case *c, float *out)
{
    int32_t ids[MOST], lengths[3] = {4, 9, 2}, ones[3] = {1, 1, 1};
    ql_llama *m = make(dev, c);
    ql_kvcache cache = cache_for(m, 3, 40);
    ql_tensor logits = {0};
    draw(ids, MOST, 11);
    forward(m, &cache, &(ql_batch){3, ids, lengths, ones, NULL}, false, out);
    for (int i = 0; i < STEPS; i++) {
        ql_err err = {0};
        ql_batch batch = {3, ids + 20 + 3 * i, ones, ones, NULL};
        if (ql_llama_forward(m, &cache, &batch, NULL, &logits, &err) != QL_OK) fail_msg("%s", err.message);
        assert_int_equal(ql_tensor_download(&logits, out + i * 3 * VOCAB, ql_tensor_bytes(&logits), &err),
                         QL_OK);
    }
    ql_tensor_free(&logits);
    ql_kvcache_free(&cache);
    ql_llama_free(m);
}

static void test_graphs_change_no_bit(void **state)
{
    (void)state;
    static float with[STEPS * 3 * VOCAB], without[STEPS * 3 * VOCAB];
    char names[512];
    for (int j = 0; j < CHOSEN; j++) {
        const int i = chosen[j];
        ql_device *dev = open_device("cuda", QL_NUMERICS_FAST);
        decode_run(dev, &cases[i], with);
        dev->backend->kernels(dev->ctx, names, sizeof names);
        assert_non_null(strstr(names, "CUDA graph"));
        decode_run(dev, &cases[i], with); /* another model and cache, another key */
        ql_device_release(dev);
        setenv("QLUA_CUDA_GRAPHS", "0", 1);
        dev = open_device("cuda", QL_NUMERICS_FAST);
        unsetenv("QLUA_CUDA_GRAPHS");
        decode_run(dev, &cases[i], without);
        dev->backend->kernels(dev->ctx, names, sizeof names);
        assert_null(strstr(names, "CUDA graph"));
        ql_device_release(dev);
        assert_memory_equal(with, without, sizeof with);
    }
}

#ifdef QLUA_EMULATED_PLUGIN
/* A launch that fails while it is captured: the pass goes on without a graph, and the next one has it. */
static void test_a_capture_that_fails_is_no_error(void **state)
{
    (void)state;
    const int32_t id = 3, one = 1;
    float want[VOCAB], got[VOCAB];
    char names[512];
    ql_device *dev = open_device("cuda", QL_NUMERICS_FAST);
    ql_llama *m = make(dev, &cases[0]);
    ql_kvcache cache = cache_for(m, 1, 4);
    ql_tensor logits = {0};
    ql_err err = {0};
    for (int i = 0; i < 5; i++) { /* as it is; captured in vain; as it is; captured; replayed */
        cache.length[0] = 0;
        if (i == 1) setenv("QLUA_EMU_CUDA", "launchfault=1", 1);
        dev->backend->kernels(dev->ctx, names, sizeof names);
        if (ql_llama_forward(m, &cache, &(ql_batch){1, &id, &one, &one, NULL}, NULL, &logits, &err) != QL_OK)
            fail_msg("pass %d: %s", i, err.message);
        unsetenv("QLUA_EMU_CUDA");
        dev->backend->kernels(dev->ctx, names, sizeof names);
        assert_true(!strstr(names, "CUDA graph") == (i < 3));
        assert_int_equal(ql_tensor_download(&logits, i ? got : want, sizeof got, &err), QL_OK);
        if (i) assert_memory_equal(got, want, sizeof want);
    }
    ql_tensor_free(&logits);
    ql_kvcache_free(&cache);
    ql_llama_free(m);
    ql_device_release(dev);
}
#endif

/* More keys than there are graphs, each coming back: the oldest give way. */
static void test_graphs_give_way_to_newer_ones(void **state)
{
    (void)state;
    enum { SIZES = 10 };
    static float want[SIZES][SIZES * VOCAB], got[SIZES * VOCAB];
    int32_t ids[SIZES], ones[SIZES];
    for (int i = 0; i < SIZES; i++) ones[i] = 1;
    draw(ids, SIZES, 13);
    ql_device *dev = open_device("cuda", QL_NUMERICS_FAST);
    ql_llama *m = make(dev, &cases[0]);
    for (int round = 0; round < 2; round++) {
        for (int rows = 1; rows <= SIZES; rows++) {
            ql_kvcache cache = cache_for(m, rows, 4);
            for (int again = 0; again < 3; again++) {
                cache.length[0] = 0;
                for (int i = 0; i < rows; i++) cache.length[i] = 0;
                forward(m, &cache, &(ql_batch){rows, ids, ones, ones, NULL}, false, got);
                size_t bytes = (size_t)rows * VOCAB * sizeof(float);
                if (round == 0 && again == 0)
                    memcpy(want[rows - 1], got, bytes);
                else
                    assert_memory_equal(got, want[rows - 1], bytes);
            }
            ql_kvcache_free(&cache);
        }
    }
    ql_llama_free(m);
    ql_device_release(dev);
}

/* ---- invariance ---- */

/* The last logits of `ids` [n] run alone, n tokens at once. */
static void alone(ql_llama *m, const int32_t *ids, int32_t n, float *out)
{
    int32_t one = 1;
    ql_kvcache cache = cache_for(m, 1, n);
    forward(m, &cache, &(ql_batch){1, ids, &n, &one, NULL}, false, out);
    ql_kvcache_free(&cache);
}

/* The same token by token. */
static void in_steps(ql_llama *m, const int32_t *ids, int32_t n, float *out)
{
    int32_t one = 1;
    ql_kvcache cache = cache_for(m, 1, n);
    for (int32_t i = 0; i < n; i++) forward(m, &cache, &(ql_batch){1, ids + i, &one, &one, NULL}, false, out);
    ql_kvcache_free(&cache);
}

static void check_invariance(ql_llama *m, const char *name)
{
    int32_t ids[MOST], lengths[3] = {6, 50, 11}, ones[3] = {1, 1, 1};
    float want[VOCAB], got[3 * VOCAB];
    draw(ids, MOST, 17);
    ql_kvcache cache = cache_for(m, 3, 60);
    forward(m, &cache, &(ql_batch){3, ids, lengths, ones, NULL}, false, got); /* 67 tokens */
    ql_kvcache_free(&cache);
    for (int row = 0, first = 0; row < 3; first += lengths[row++]) {
        alone(m, ids + first, lengths[row], want);
        if (memcmp(want, got + row * VOCAB, sizeof want) != 0) fail_msg("%s: row %d, alone", name, row);
        if (lengths[row] > 20) continue;
        in_steps(m, ids + first, lengths[row], want);
        if (memcmp(want, got + row * VOCAB, sizeof want) != 0)
            fail_msg("%s: row %d, step by step", name, row);
    }
}

static void test_invariant_bits_do_not_depend_on_the_batch(void **state)
{
    (void)state;
    ql_device *dev = open_device("cuda", QL_NUMERICS_INVARIANT);
    for (int i = 0; i < CHOSEN; i++) {
        ql_llama *m = make(dev, &cases[chosen[i]]);
        check_invariance(m, cases[chosen[i]].name);
        ql_llama_free(m);
    }
    ql_device_release(dev);
}

/* ---- workspaces ---- */

enum { GUARD = 4096 };

static ql_pass pass_over(const ql_llama *m, const ql_kvcache *cache)
{
    const ql_config *c = &m->config;
    return (ql_pass){.hidden = c->hidden,
                     .intermediate = c->intermediate,
                     .vocab = c->vocab,
                     .head_dim = c->head_dim,
                     .heads = (int)c->heads,
                     .kv_heads = (int)c->kv_heads,
                     .layers = (int)m->weights.layers,
                     .eps = (float)c->rms_eps,
                     .layer = m->weights.layer,
                     .embed = &m->weights.embed,
                     .lm_head = &m->weights.lm_head,
                     .norm = &m->weights.norm,
                     .cos = &m->rope.cos,
                     .sin = &m->rope.sin,
                     .cache = cache->view};
}

/* A pass in exactly the bytes it asked for, between guards. */
static void check_workspace(ql_device *dev, ql_llama *m, int64_t tokens, const char *name)
{
    int32_t ids[MOST], start[MOST] = {0}, pos[MOST], last = (int32_t)tokens - 1;
    static uint8_t guard[GUARD];
    ql_err err = {0};
    ql_kvcache cache = cache_for(m, 1, (int32_t)tokens);
    assert_int_equal(ql_rope_reserve(&m->rope, dev, NULL, tokens, &err), QL_OK);
    draw(ids, (int)tokens, 19);
    for (int32_t i = 0; i < tokens; i++) pos[i] = i;
    ql_pass p = pass_over(m, &cache);
    p.tokens = tokens;
    p.outputs = 1;
    p.ids = ids;
    p.start = start;
    p.pos = pos;
    p.out_token = &last;
    const int64_t bytes = (int64_t)dev->backend->pass_bytes(dev->ctx, &p);
    ql_tensor whole = {0}, logits = {0};
    assert_int_equal(ql_tensor_new_1d(dev, NULL, QL_MEM_ACTIVATIONS, QL_U8, bytes + GUARD, &whole, &err),
                     QL_OK);
    assert_int_equal(ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, 1, VOCAB, &logits, &err), QL_OK);
    memset(guard, 0xa5, sizeof guard);
    char *end = (char *)whole.data + bytes;
    assert_int_equal(dev->backend->upload(dev->ctx, end, guard, GUARD, &err), QL_OK);
    ql_tensor exact = whole;
    exact.shape[0] = bytes;
    p.workspace = &exact;
    p.logits = &logits;
    for (int round = 0; round < (tokens > 20 ? 1 : 3); round++) {
        if (ql_op_pass(dev, &p, &err) != QL_OK) fail_msg("%s: %s", name, err.message);
        memset(guard, 0, sizeof guard);
        assert_int_equal(dev->backend->download(dev->ctx, guard, end, GUARD, &err), QL_OK);
        for (int i = 0; i < GUARD; i++)
            if (guard[i] != 0xa5)
                fail_msg("%s, %d tokens: byte %d behind the workspace", name, (int)tokens, i);
    }
    exact.shape[0] = bytes - 1;
    assert_int_equal(ql_op_pass(dev, &p, &err), QL_ERR_ARG);
    assert_non_null(strstr(err.message, "workspace"));
    ql_tensor_free(&whole);
    ql_tensor_free(&logits);
    ql_kvcache_free(&cache);
}

static void test_pass_bytes_are_enough(void **state)
{
    (void)state;
    ql_device *dev = open_device("cuda", QL_NUMERICS_FAST);
    for (int i = 0; i < CHOSEN; i++) {
        const model_case *c = &cases[chosen[i]];
        ql_llama *m = make(dev, c);
        check_workspace(dev, m, 1, c->name);
        check_workspace(dev, m, c->dtype == QL_F32 ? 9 : 20, c->name);
        if (c->last >= MANY) check_workspace(dev, m, 66, c->name);
        ql_llama_free(m);
    }
    ql_device_release(dev);
}

int main(void)
{
#ifdef QLUA_EMULATED_PLUGIN
    setenv("QLUA_CUDA_PLUGIN", QLUA_EMULATED_PLUGIN, 0);
    setenv("QLUA_CUBLASLT", QLUA_EMULATED_CUBLASLT, 1);
#endif
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_passes_agree_with_steps_and_the_cpu),
        cmocka_unit_test(test_invariant_passes_agree_with_the_cpu),
        cmocka_unit_test(test_the_kernels_that_ran_are_named),
        cmocka_unit_test(test_no_cublaslt_is_no_error),
        cmocka_unit_test(test_graphs_change_no_bit),
        cmocka_unit_test(test_graphs_give_way_to_newer_ones),
        cmocka_unit_test(test_invariant_bits_do_not_depend_on_the_batch),
        cmocka_unit_test(test_pass_bytes_are_enough),
#ifdef QLUA_EMULATED_PLUGIN
        cmocka_unit_test(test_slices_of_a_weight_are_its_product),
        cmocka_unit_test(test_a_capture_that_fails_is_no_error),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
