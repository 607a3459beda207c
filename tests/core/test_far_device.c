/* Core on a device whose memory the host cannot touch (far_backend.h): whatever the device holds in its own
 * way - codes in tiles, scales in 8 bits, whole passes - comes out as on the CPU, bit by bit. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "far_backend.h"
#include "generate.h"
#include "device_help.h"
#include "metrics.h"
#include "ops.h"
#include "outline.h"

#include <dirent.h>
#include <math.h>
#include <stdio.h>
#include <unistd.h>

#define MODELS QLUA_SOURCE_DIR "/tests/golden/models/"

static ql_device *far;
static ql_err error;

#define OK(expr)                                                                                             \
    do {                                                                                                     \
        if ((expr) != QL_OK) fail_msg("%s: %s", #expr, error.message);                                       \
    } while (0)

static int open_both(void **state)
{
    return setup(state) == 0 && far_open(&far, NULL) == QL_OK ? 0 : -1;
}

static int close_both(void **state)
{
    ql_device_release(far);
    return teardown(state);
}

static float noise(uint64_t seed, uint64_t i)
{
    double u = ql_sampler_uniform(seed, 0, 2 * i) + 1e-12, v = ql_sampler_uniform(seed, 0, 2 * i + 1);
    return (float)(sqrt(-2 * log(u)) * cos(6.283185307179586 * v));
}

static ql_tensor upload(ql_device *on, ql_dtype dtype, int64_t rows, int64_t cols, const void *values)
{
    ql_tensor t;
    OK(ql_tensor_new_2d(on, NULL, QL_MEM_WEIGHTS, dtype, rows, cols, &t, &error));
    OK(ql_tensor_upload(&t, values, ql_tensor_bytes(&t), &error));
    return t;
}

static void *download(const ql_tensor *t)
{
    void *bytes = malloc(ql_tensor_bytes(t) + 1);
    OK(ql_tensor_download(t, bytes, ql_tensor_bytes(t), &error));
    return bytes;
}

static void assert_same_tensor(const ql_tensor *a, const ql_tensor *b)
{
    assert_int_equal(ql_tensor_bytes(a), ql_tensor_bytes(b));
    void *x = download(a), *y = download(b);
    assert_memory_equal(x, y, ql_tensor_bytes(a));
    free(x);
    free(y);
}

/* ---- matrices ---- */

static void decode_alike(const ql_matrix *near_one, const ql_matrix *far_one)
{
    size_t bytes = (size_t)(near_one->n * near_one->k) * sizeof(float);
    float *x = malloc(bytes), *y = malloc(bytes);
    OK(ql_quant_decode(near_one, x, &error));
    OK(ql_quant_decode(far_one, y, &error));
    assert_memory_equal(x, y, bytes);
    free(x);
    free(y);
}

static void multiply_alike(const ql_matrix *near_one, const ql_matrix *far_one)
{
    const int64_t n = near_one->n, k = near_one->k;
    float *x = malloc((size_t)(3 * k) * sizeof *x);
    for (int64_t i = 0; i < 3 * k; i++) x[i] = noise(4, (uint64_t)i);
    ql_tensor a = upload(dev, QL_F32, 3, k, x), b = upload(far, QL_F32, 3, k, x), ya, yb;
    OK(ql_tensor_new_2d(dev, NULL, QL_MEM_ACTIVATIONS, QL_F32, 3, n, &ya, &error));
    OK(ql_tensor_new_2d(far, NULL, QL_MEM_ACTIVATIONS, QL_F32, 3, n, &yb, &error));
    OK(ql_op_matmul(&a, near_one, false, &ya, &error));
    OK(ql_op_matmul(&b, far_one, false, &yb, &error));
    assert_same_tensor(&ya, &yb);
    ql_tensor_free(&a);
    ql_tensor_free(&b);
    ql_tensor_free(&ya);
    ql_tensor_free(&yb);
    free(x);
}

static void quantize_alike(int64_t n, int64_t k, const ql_quant_spec *spec)
{
    float *x = malloc((size_t)(n * k) * sizeof *x);
    for (int64_t i = 0; i < n * k; i++) x[i] = 0.02f * noise(2, (uint64_t)i);
    ql_matrix a = {.n = n, .k = k, .dtype = QL_F32}, b = a, qa, qb;
    ql_arena *arena = ql_arena_new();
    size_t before = ql_tensor_live_bytes();
    a.data = upload(dev, QL_F32, n, k, x);
    b.data = upload(far, QL_F32, n, k, x);
    OK(ql_quant_matrix(&a, spec, NULL, &qa, &error));
    OK(ql_quant_matrix(&b, spec, arena, &qb, &error));

    bool tiles = qk_tiles_fit(n, k, spec->block);
    assert_int_equal(qb.layout, tiles ? QK_LAYOUT_TILES : QK_LAYOUT_ROWS);
    assert_int_equal(qa.layout, 0);
    void *near_codes = download(&qa.data), *far_codes = download(&qb.data);
    assert_int_equal(memcmp(near_codes, far_codes, ql_tensor_bytes(&qa.data)) != 0, tiles);
    free(near_codes);
    free(far_codes);
    decode_alike(&qa, &qb);
    multiply_alike(&qa, &qb);

    /* What the device holds is what the arena is charged with, and what the formula says. */
    size_t blocks = qb.quant->blocks, codes = (size_t)(n * k + 1) / 2;
    size_t scales =
        spec->double_quant ? blocks + (257 + (blocks + 255) / 256) * sizeof(float) : blocks * sizeof(float);
    assert_int_equal(ql_matrix_bytes(&qb), codes + scales);
    assert_int_equal(ql_arena_stats(arena).current[QL_MEM_WEIGHTS], codes + scales);
    assert_int_equal(ql_quant_host_bytes(qb.quant), 0);
    assert_null(qb.quant->absmax8);
    assert_int_equal(qb.absmax.dtype, spec->double_quant ? QL_U8 : QL_F32);
    ql_matrix again = ql_matrix_ref(&qb);
    ql_matrix_free(&qb);
    assert_int_equal(ql_arena_stats(arena).current[QL_MEM_WEIGHTS], codes + scales);
    decode_alike(&qa, &again);
    ql_matrix_free(&again);
    assert_int_equal(ql_arena_stats(arena).current_total, 0);
    ql_arena_release(arena);
    ql_matrix_free(&qa);
    ql_matrix_free(&a);
    ql_matrix_free(&b);
    assert_int_equal(ql_tensor_live_bytes(), before);
    free(x);
}

static void matrices(void **state)
{
    (void)state;
    const int64_t shapes[][2] = {{16, 64}, {32, 320}, {48, 256}, {16, 960}, {24, 128}, {16, 96}, {5, 7}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        for (int with_double = 0; with_double < 2; with_double++) {
            ql_quant_spec spec;
            OK(ql_quant_spec_init(i % 2 ? "fp4" : "nf4", &spec, &error));
            spec.double_quant = with_double;
            quantize_alike(shapes[i][0], shapes[i][1], &spec);
            spec.block = 32; /* tiles need 64 */
            quantize_alike(shapes[i][0], shapes[i][1], &spec);
            spec.block = 128;
            quantize_alike(shapes[i][0], shapes[i][1], &spec);
        }
    }
}

static void damaged_weights(void **state)
{
    (void)state;
    static float x[33 * 100];
    ql_quant_spec spec;
    OK(ql_quant_spec_init("nf4", &spec, &error));
    x[20 * 100 + 7] = INFINITY;
    x[25 * 100] = NAN;
    ql_matrix m = {.n = 33, .k = 100, .data = upload(far, QL_F32, 33, 100, x)}, q;
    far_seen.bytes = 0;
    assert_int_equal(ql_quant_matrix(&m, &spec, NULL, &q, &error), QL_ERR_FORMAT);
    assert_non_null(strstr(error.message, "row 21, column 8"));
    assert_int_equal(far_seen.bytes, 0); /* the weight stays where it is */
    ql_matrix_free(&m);
}

/* ---- checkpoints ---- */

static bool quantize_all(void *ud, const char *name, int64_t n, int64_t k, ql_quant_spec *spec, ql_err *err)
{
    (void)n;
    (void)k;
    if (strcmp(name, "lm_head") == 0 || ql_quant_spec_init("nf4", spec, err) != QL_OK) return false;
    spec->double_quant = *(const bool *)ud;
    return true;
}

static void assert_same_files(const char *a, const char *b)
{
    int files = 0;
    DIR *d = opendir(a);
    assert_non_null(d);
    for (struct dirent *f; (f = readdir(d));) {
        if (f->d_name[0] == '.') continue;
        char pa[600], pb[600], command[1300];
        snprintf(pa, sizeof pa, "%s/%s", a, f->d_name);
        snprintf(pb, sizeof pb, "%s/%s", b, f->d_name);
        snprintf(command, sizeof command, "cmp -s '%s' '%s'", pa, pb);
        assert_int_equal(system(command), 0);
        files++;
        unlink(pa);
        unlink(pb);
    }
    closedir(d);
    assert_true(files >= 2);
    assert_int_equal(rmdir(a), 0);
    assert_int_equal(rmdir(b), 0); /* empty: it had the same files */
}

static void save_alike(const ql_llama *near_one, const ql_llama *far_one)
{
    char root[] = "/tmp/test_farXXXXXX", a[64], b[64];
    ql_save_options options = {0};
    assert_non_null(mkdtemp(root));
    snprintf(a, sizeof a, "%s/near", root);
    snprintf(b, sizeof b, "%s/far", root);
    OK(ql_llama_save(near_one, a, &options, &error));
    OK(ql_llama_save(far_one, b, &options, &error));
    assert_same_files(a, b);
    rmdir(root);
}

/* `with_double`: what to quantize with while loading, or NULL. */
static ql_llama *load(ql_device *on, const char *name, bool *with_double)
{
    char folder[300];
    ql_llama *m;
    ql_load_options options = {.dtype = QL_DTYPE_COUNT};
    snprintf(folder, sizeof folder, MODELS "%s", name);
    OK(ql_llama_load(on, folder, &options, with_double ? quantize_all : NULL, with_double, &m, &error));
    return m;
}

static void checkpoints(void **state)
{
    (void)state;
    static const char *const names[] = {"nf4",     "nf4_double",  "fp4_double",
                                        "odd_nf4", "llama3_bf16", "nf4_f16"};
    size_t before = ql_tensor_live_bytes();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        ql_llama *a = load(dev, names[i], NULL), *b = load(far, names[i], NULL);
        save_alike(a, b);
        assert_int_equal(ql_arena_stats(b->arena).current[QL_MEM_WEIGHTS], ql_weights_bytes(&b->weights));
        for (int with_double = 0; with_double < 2 && !ql_weights_is_quantized(&a->weights); with_double++) {
            ql_llama *qa, *qb;
            bool wanted = with_double;
            OK(ql_llama_quantize(a, quantize_all, &wanted, &qa, &error));
            OK(ql_llama_quantize(b, quantize_all, &wanted, &qb, &error));
            save_alike(qa, qb);
            ql_llama_free(qb);
            qb = load(far, names[i], &wanted);
            save_alike(qa, qb);
            ql_llama_free(qa);
            ql_llama_free(qb);
        }
        ql_llama_free(a);
        ql_llama_free(b);
    }
    assert_int_equal(ql_tensor_live_bytes(), before);
}

/* ---- models ---- */

enum { VOCAB = 320 };

static const ql_config shape = {.architecture = "LlamaForCausalLM",
                                .hidden = 64,
                                .intermediate = 192,
                                .layers = 2,
                                .heads = 4,
                                .kv_heads = 2,
                                .head_dim = 16,
                                .vocab = VOCAB,
                                .max_positions = 128,
                                .rms_eps = 1e-5,
                                .rope = {.type = QL_ROPE_NONE, .theta = 10000, .factor = 1},
                                .bos = -1};

static ql_llama *make(ql_device *on, ql_dtype dtype, bool quantized)
{
    ql_llama *m;
    bool with_double = true;
    OK(ql_llama_random(on, &shape, dtype, 5, quantized ? quantize_all : NULL, &with_double, &m, &error));
    return m;
}

static uint64_t splitmix(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* `m` holds the next numbers of the stream, drawn one after the other, rounded by the hardware's rule. */
static void assert_stream(const ql_matrix *m, uint64_t *stream)
{
    uint16_t *got = download(&m->data);
    for (int64_t i = 0; i < m->n * m->k; i++) {
        uint64_t r = splitmix(stream);
        int sum = (int)(r & 0xffff) + (int)(r >> 16 & 0xffff) + (int)(r >> 32 & 0xffff) + (int)(r >> 48);
        float x = (float)(sum - 2 * 65535) * (float)(0.02 / (65536 * 0.57735026918962576));
        assert_int_equal(got[i], qk_f32_to_bf16(x));
    }
    free(got);
}

static void random_models_are_one_stream(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        ql_llama *m = make(i ? far : dev, QL_BF16, false);
        uint64_t stream = 5;
        assert_stream(&m->weights.embed, &stream);
        assert_stream(&m->weights.lm_head, &stream);
        for (int layer = 0; layer < 2; layer++) {
            for (int kind = 0; kind < QL_LINEARS; kind++)
                assert_stream(&m->weights.layer[layer].linear[kind], &stream);
        }
        ql_llama_free(m);
    }
}

/* Three rows of different length through one forward pass; *logits is the caller's. */
static ql_status forward(ql_llama *m, const ql_trace *trace, ql_tensor *logits, ql_err *err)
{
    const int32_t lengths[] = {37, 1, 23}, outputs[] = {37, 1, 0};
    int32_t ids[61];
    ql_kvcache cache;
    for (int i = 0; i < 61; i++) ids[i] = (i * 37 + 11) % VOCAB;
    OK(ql_llama_cache(m, 3, lengths, &cache, err));
    ql_batch batch = {3, ids, lengths, outputs, NULL};
    ql_status status = ql_llama_forward(m, &cache, &batch, trace, logits, err);
    ql_kvcache_free(&cache);
    return status;
}

/* The last of a row's logits after `head` tokens of it went through another cache; 0: all at once. */
static void after_copy(ql_llama *m, int32_t head, ql_tensor *logits)
{
    enum { ROW = 30 };
    int32_t ids[ROW], rest = ROW - head, none = 0, one = 1, capacity = ROW;
    ql_kvcache first = {0}, second;
    for (int i = 0; i < ROW; i++) ids[i] = (i * 29 + 5) % VOCAB;
    OK(ql_llama_cache(m, 1, &capacity, &second, &error));
    if (head > 0) {
        ql_batch begin = {1, ids, &head, &none, NULL};
        OK(ql_llama_cache(m, 1, &head, &first, &error));
        OK(ql_llama_forward(m, &first, &begin, NULL, logits, &error));
        long downloads = far_seen.downloads;
        OK(ql_kvcache_copy(&first, 0, &second, 0, &error));
        assert_int_equal(far_seen.downloads, downloads); /* the slots stay on the device */
    }
    ql_batch batch = {1, ids + head, &rest, &one, NULL};
    OK(ql_llama_forward(m, &second, &batch, NULL, logits, &error));
    ql_kvcache_free(&first);
    ql_kvcache_free(&second);
}

static void copied_sequences(void **state)
{
    (void)state;
    ql_llama *a = make(dev, QL_BF16, true), *b = make(far, QL_BF16, true);
    ql_tensor want = {0}, got = {0};
    after_copy(a, 0, &want);
    for (int32_t head = 1; head < 30; head += 7) {
        after_copy(b, head, &got);
        assert_same_tensor(&want, &got);
    }
    ql_tensor_free(&want);
    ql_tensor_free(&got);
    ql_llama_free(a);
    ql_llama_free(b);
}

static ql_status ignore(void *ud, const char *name, const ql_tensor *value, ql_err *err)
{
    (void)name;
    (void)value;
    (void)err;
    ++*(int *)ud;
    return QL_OK;
}

static void passes_give_the_bits_of_the_steps(void **state)
{
    (void)state;
    static const ql_dtype dtypes[] = {QL_F32, QL_F16, QL_BF16};
    for (int i = 0; i < 6; i++) {
        ql_llama *a = make(dev, dtypes[i % 3], i >= 3), *b = make(far, dtypes[i % 3], i >= 3);
        ql_tensor want = {0}, got = {0}, traced = {0};
        int seen = 0;
        ql_trace trace = {ignore, &seen};
        far_seen.passes = far_seen.widest = 0;
        OK(forward(a, NULL, &want, &error));
        OK(forward(b, NULL, &got, &error));
        assert_int_equal(far_seen.passes, 3); /* 61 tokens in pieces of 24 */
        assert_int_equal(far_seen.widest, 24);
        assert_same_tensor(&want, &got);
        OK(forward(b, &trace, &traced, &error)); /* a trace sees the steps */
        assert_int_equal(far_seen.passes, 3);
        assert_true(seen > 10);
        assert_same_tensor(&want, &traced);
        ql_tensor_free(&want);
        ql_tensor_free(&got);
        ql_tensor_free(&traced);
        ql_llama_free(a);
        ql_llama_free(b);
    }
}

static void memory_of_a_pass(void **state)
{
    (void)state;
    ql_llama *m = make(far, QL_BF16, true);
    ql_tensor logits = {0};
    ql_llama_size size;
    OK(ql_llama_expect(m, 20, 20, 1, &size, &error));
    ql_llama_reset_peak(m);
    ql_kvcache cache;
    int32_t ids[20] = {1, 2, 3}, n = 20, one = 1, capacity = 40;
    OK(ql_llama_cache(m, 1, &capacity, &cache, &error));
    ql_batch batch = {1, ids, &n, &one, NULL};
    OK(ql_llama_forward(m, &cache, &batch, NULL, &logits, &error));
    ql_mem_stats stats = ql_arena_stats(m->arena);
    assert_int_equal(stats.peak[QL_MEM_ACTIVATIONS], size.activations);
    assert_int_equal(stats.peak[QL_MEM_KV], size.slot * 40);

    /* Steps of one shape find the workspace where it was; another shape gets another size. */
    size_t held = ql_tensor_bytes(&m->work.workspace);
    ql_batch step = {1, ids, &one, &one, NULL};
    OK(ql_llama_forward(m, &cache, &step, NULL, &logits, &error));
    assert_true(ql_tensor_bytes(&m->work.workspace) < held);
    far_seen.moves = 0;
    for (int i = 0; i < 10; i++) OK(ql_llama_forward(m, &cache, &step, NULL, &logits, &error));
    assert_int_equal(far_seen.moves, 0);
    assert_null(m->work.x.storage);

    ql_tensor_free(&logits);
    ql_kvcache_free(&cache);
    ql_llama_reset_peak(m);
    stats = ql_arena_stats(m->arena);
    assert_int_equal(stats.current[QL_MEM_ACTIVATIONS], 0);
    assert_int_equal(stats.peak[QL_MEM_ACTIVATIONS], 0);
    ql_llama_free(m);
}

/* A backend says what its cache is made of; float32 models keep float32. The CPU has no other. */
static bool nested_nf4(void *ud, const char *name, int64_t n, int64_t k, ql_quant_spec *spec, ql_err *err)
{
    (void)ud;
    (void)n;
    (void)k;
    if (strcmp(name, "lm_head") == 0 || ql_quant_spec_init("nf4", spec, err) != QL_OK) return false;
    spec->double_quant = true;
    return true;
}

/* An outline takes no memory of the device, and foretells what a model holds there, workspaces included. */
static void outlines(void **state)
{
    (void)state;
    const ql_config c = {.architecture = "LlamaForCausalLM",
                         .hidden = 128,
                         .intermediate = 192,
                         .layers = 3,
                         .heads = 4,
                         .kv_heads = 2,
                         .head_dim = 32,
                         .vocab = VOCAB,
                         .max_positions = 256,
                         .rms_eps = 1e-5,
                         .rope = {.type = QL_ROPE_NONE, .theta = 10000, .factor = 1},
                         .bos = -1};
    for (int i = 0; i < 4; i++) {
        ql_device *on = i % 2 ? far : dev;
        ql_quant_policy policy = i < 2 ? NULL : nested_nf4;
        ql_llama *m, *o;
        ql_llama_size real, drawn;
        OK(ql_llama_random(on, &c, QL_BF16, 3, policy, NULL, &m, &error));
        OK(ql_outline_random(on, &c, QL_BF16, policy, NULL, &o, &error));
        assert_int_equal(ql_weights_bytes(&m->weights), ql_weights_bytes(&o->weights));
        assert_int_equal(ql_weights_params(&m->weights), ql_weights_params(&o->weights));
        assert_int_equal(ql_arena_stats(m->arena).current_total, ql_arena_stats(o->arena).current_total);
        assert_string_equal(m->device->label, o->device->label);
        OK(ql_llama_expect(m, 100, 30, 7, &real, &error));
        OK(ql_llama_expect(o, 100, 30, 7, &drawn, &error));
        assert_int_equal(real.activations, drawn.activations);
        assert_int_equal(real.slot, drawn.slot);
        ql_tensor logits = {0};
        ql_kvcache cache;
        const int32_t id = 1, one = 1;
        ql_batch batch = {1, &id, &one, &one, NULL};
        OK(ql_llama_cache(o, 1, &one, &cache, &error));
        assert_int_equal(ql_llama_forward(o, &cache, &batch, NULL, &logits, &error), QL_ERR_UNSUPPORTED);
        assert_null(logits.storage);
        ql_kvcache_free(&cache);
        ql_llama_free(m);
        ql_llama_free(o);
    }
}

static void caches_of_another_type(void **state)
{
    (void)state;
    ql_llama *wide = make(far, QL_F32, false), *half = make(far, QL_BF16, false);
    ql_llama_size a, b;
    ql_tensor logits = {0};
    far_backend.kv_dtype = QL_BF16;
    OK(ql_llama_expect(wide, 1, 1, 1, &a, &error));
    OK(ql_llama_expect(half, 1, 1, 1, &b, &error));
    assert_int_equal(a.slot, 2 * 2 * 2 * 16 * 4);
    assert_int_equal(b.slot, a.slot / 2);
    assert_int_equal(ql_llama_kv_dtype(wide), QL_F32);
    OK(forward(wide, NULL, &logits, &error));
    ql_tensor_free(&logits);
    assert_int_equal(forward(half, NULL, &logits, &error), QL_ERR_UNSUPPORTED);
    assert_non_null(strstr(error.message, "keeps keys and values in float32, not bfloat16"));
    assert_null(logits.storage);
    far_backend.kv_dtype = QL_F32;
    ql_llama_free(wide);
    ql_llama_free(half);
}

static void generate_alike(ql_llama *a, ql_llama *b, ql_sampling sampling, size_t most)
{
    enum { ROWS = 3, NEW = 20 };
    static const int32_t p0[] = {1, 2, 3, 4, 5}, p1[] = {9}, p2[] = {300, 12};
    const int32_t *prompts[ROWS] = {p0, p1, p2};
    const int32_t lengths[ROWS] = {5, 1, 2}, stops[] = {17};
    ql_generate_options options = {
        .max_new_tokens = NEW, .sampling = sampling, .stop_ids = stops, .stop_count = 1};
    ql_generated ga, gb;
    OK(ql_generate(a, ROWS, prompts, lengths, NULL, &options, &ga, &error));
    far_seen.downloads = 0;
    far_seen.bytes = 0;
    OK(ql_generate(b, ROWS, prompts, lengths, NULL, &options, &gb, &error));
    for (int i = 0; i < ROWS; i++) {
        assert_int_equal(ga.counts[i], gb.counts[i]);
        assert_int_equal(ga.stops[i], gb.stops[i]);
        assert_memory_equal(ga.ids[i], gb.ids[i], (size_t)ga.counts[i] * sizeof(int32_t));
    }
    assert_int_equal(far_seen.downloads, 1 + gb.decode_steps); /* one a step, the device is waited for once */
    assert_true(far_seen.bytes <= (size_t)far_seen.downloads * most);
    ql_generated_free(&ga);
    ql_generated_free(&gb);
}

static void generation(void **state)
{
    (void)state;
    const struct {
        ql_sampling sampling;
        size_t bytes; /* of a step of three rows */
    } cases[] = {{{0, 0, 1, 1}, 256},          {{1, 1, 1, 1}, 256},           {{1, 8, 1, 2}, 512},
                 {{0.7, 40, 0.9, 3}, 1400},    {{1, 0, 0.9, 4}, 3 * 8 * 330}, {{2, 0, 0.3, 5}, 3 * 8 * 330},
                 {{1, 0, 1, 6}, 3 * 4 * VOCAB}};
    ql_llama *a = make(dev, QL_BF16, true), *b = make(far, QL_BF16, true);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        generate_alike(a, b, cases[i].sampling, cases[i].bytes);
    ql_llama_free(a);
    ql_llama_free(b);
}

/* A weight that is not a number reaches the logits: the error is that of the CPU, greedy or not. */
static void generation_of_a_damaged_model(void **state)
{
    (void)state;
    const int32_t prompt[] = {1, 2}, length = 2;
    const int32_t *prompts[] = {prompt};
    const ql_sampling samplings[] = {{0, 0, 1, 1}, {1, 5, 1, 1}, {1, 0, 0.5, 1}};
    char said[sizeof error.message];
    for (int i = 0; i < 3; i++) {
        for (int on = 0; on < 2; on++) {
            ql_llama *m = make(on ? far : dev, QL_F32, false);
            ql_tensor *head = &m->weights.lm_head.data;
            float *values = download(head);
            values[40 * 64 + 3] = NAN;
            OK(ql_tensor_upload(head, values, ql_tensor_bytes(head), &error));
            free(values);
            ql_generate_options options = {.max_new_tokens = 4, .sampling = samplings[i]};
            ql_generated g;
            assert_int_equal(ql_generate(m, 1, prompts, &length, NULL, &options, &g, &error), QL_ERR_FORMAT);
            if (on)
                assert_string_equal(error.message, said);
            else
                strcpy(said, error.message);
            assert_non_null(strstr(said, "the logit of token 40 is NaN"));
            ql_llama_free(m);
        }
    }
}

/* ---- metrics ---- */

enum { ROWS = 6, COLS = 3000 };

typedef struct {
    double jaccard[ROWS * 2], kl[ROWS], delta[ROWS], nucleus[ROWS], flat[ROWS], loglik[ROWS], entropy[ROWS];
    uint8_t same[ROWS], greedy[ROWS];
} figures;

static void measure(const ql_tensor *a, const ql_tensor *b, figures *f)
{
    const int32_t targets[ROWS] = {0, 2999, 17, 1500, 3, 2048};
    memset(f, 0, sizeof *f);
    OK(ql_metrics_jaccard(a, b, (const int[]){1, 50}, 2, f->jaccard, &error));
    OK(ql_metrics_agreement(a, b, f->same, &error));
    OK(ql_metrics_kl(a, b, f->kl, &error));
    OK(ql_metrics_delta_p(a, b, targets, f->delta, &error));
    OK(ql_metrics_nucleus(a, b, 0.5, 1, f->nucleus, &error));
    OK(ql_metrics_loglik(a, targets, f->loglik, f->greedy, &error));
    OK(ql_metrics_entropy(a, f->entropy, &error));
}

static void metrics(void **state)
{
    (void)state;
    static float x[ROWS * COLS], y[ROWS * COLS];
    for (int i = 0; i < ROWS * COLS; i++) {
        x[i] = roundf(16 * noise(7, (uint64_t)i)) / 4; /* ties */
        y[i] = x[i] + roundf(noise(8, (uint64_t)i)) / 8;
    }
    ql_tensor a = upload(dev, QL_F32, ROWS, COLS, x), b = upload(dev, QL_F32, ROWS, COLS, y),
              c = upload(far, QL_F32, ROWS, COLS, x), d = upload(far, QL_F32, ROWS, COLS, y);
    figures near_ones, far_ones;
    measure(&a, &b, &near_ones);
    far_seen.bytes = 0;
    measure(&c, &d, &far_ones);
    assert_memory_equal(&near_ones, &far_ones, sizeof near_ones);
    /* Lists of the best tokens and figures of rows, no row of logits: one alone has 12,000 bytes, and the
     * nucleus takes 1,024 tokens with their logits of each of 12 rows. */
    assert_true(far_seen.bytes < ROWS * 2 * 1024 * 8 + 12000);

    /* What a nucleus weighs in the other's distribution needs the rows themselves. */
    ql_nucleus_pair near_pairs[ROWS * 2] = {0}, far_pairs[ROWS * 2] = {0};
    const double top_ps[] = {0.5, 0.95}, warm = 0.7;
    OK(ql_metrics_nuclei(&a, &b, top_ps, 2, &warm, 1, near_pairs, &error));
    OK(ql_metrics_nuclei(&c, &d, top_ps, 2, &warm, 1, far_pairs, &error));
    for (int i = 0; i < ROWS * 2; i++) {
        for (int m = 0; m < 2; m++) {
            assert_true(near_pairs[i].size[m] == far_pairs[i].size[m]);
            assert_true(near_pairs[i].mass[m] == far_pairs[i].mass[m]);
        }
        assert_true(near_pairs[i].overlap == far_pairs[i].overlap);
    }

    /* A flat row's nucleus is larger than that list: then, and only then, rows travel. */
    for (int i = 0; i < ROWS * COLS; i++) x[i] = (float)(i % 7) * 0.01f;
    OK(ql_tensor_upload(&a, x, sizeof x, &error));
    OK(ql_tensor_upload(&c, x, sizeof x, &error));
    OK(ql_metrics_nucleus(&a, &b, 0.9, 1, near_ones.flat, &error));
    OK(ql_metrics_nucleus(&c, &d, 0.9, 1, far_ones.flat, &error));
    assert_memory_equal(near_ones.flat, far_ones.flat, sizeof near_ones.flat);

    x[2 * COLS + 5] = -INFINITY;
    OK(ql_tensor_upload(&c, x, sizeof x, &error));
    assert_int_equal(ql_metrics_kl(&d, &c, near_ones.kl, &error), QL_ERR_FORMAT);
    assert_string_equal(error.message, "row 3 of the tested logits holds an infinity at token 5");
    x[2 * COLS + 4] = NAN;
    OK(ql_tensor_upload(&c, x, sizeof x, &error));
    assert_int_equal(ql_metrics_entropy(&c, near_ones.kl, &error), QL_ERR_FORMAT);
    assert_string_equal(error.message, "row 3 of the logits holds NaN at token 4");
    ql_tensor_free(&a);
    ql_tensor_free(&b);
    ql_tensor_free(&c);
    ql_tensor_free(&d);
}

/* ---- failures ---- */

static ql_status try_all(ql_err *err)
{
    ql_llama *m = NULL, *twin = NULL;
    ql_tensor logits = {0};
    ql_generated g = {0};
    bool with_double = true;
    const int32_t prompt[] = {1, 2}, length = 2;
    const int32_t *prompts[] = {prompt};
    ql_generate_options options = {.max_new_tokens = 3, .sampling = {1, 0, 0.9, 1}};
    ql_status status = ql_llama_random(far, &shape, QL_BF16, 1, NULL, NULL, &m, err);
    if (status == QL_OK) status = ql_llama_quantize(m, quantize_all, &with_double, &twin, err);
    if (status == QL_OK) status = ql_generate(twin, 1, prompts, &length, NULL, &options, &g, err);
    ql_generated_free(&g);
    ql_tensor_free(&logits);
    ql_llama_free(twin);
    ql_llama_free(m);
    return status;
}

static void memory_runs_out(void **state)
{
    (void)state;
    size_t before = ql_tensor_live_bytes();
    ql_status status = QL_ERR_MEMORY;
    long n = 0;
    for (; status != QL_OK && n < 2000; n++) {
        ql_err err = {0};
        ql_mem_fail_after(n, false);
        status = try_all(&err);
        ql_mem_fail_after(-1, false);
        assert_true(status == QL_OK || (status == QL_ERR_MEMORY && err.message[0]));
        assert_int_equal(ql_tensor_live_bytes(), before);
    }
    assert_true(n > 100 && n < 2000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(matrices),
        cmocka_unit_test(damaged_weights),
        cmocka_unit_test(checkpoints),
        cmocka_unit_test(random_models_are_one_stream),
        cmocka_unit_test(passes_give_the_bits_of_the_steps),
        cmocka_unit_test(copied_sequences),
        cmocka_unit_test(memory_of_a_pass),
        cmocka_unit_test(outlines),
        cmocka_unit_test(caches_of_another_type),
        cmocka_unit_test(generation),
        cmocka_unit_test(generation_of_a_damaged_model),
        cmocka_unit_test(metrics),
        cmocka_unit_test(memory_runs_out),
    };
    return cmocka_run_group_tests(tests, open_both, close_both);
}
