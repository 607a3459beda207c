#include "rope.h"

#include "mem.h"

#include <math.h>
#include <string.h>

/* Llama 3.1's blend (transformers, _compute_llama3_parameters), float32 as there. */
static float llama3_scaled(float freq, const ql_rope_config *rope)
{
    float factor = (float)rope->factor, low = (float)rope->low_freq_factor,
          high = (float)rope->high_freq_factor;
    float original = (float)rope->original_max_position;
    float wavelength = (float)(2 * M_PI) / freq;
    if (wavelength > original / low) return freq / factor;
    if (wavelength < original / high) return freq;
    float smooth = (original / wavelength - low) / (high - low);
    return (1.0f - smooth) * freq / factor + smooth * freq;
}

ql_status ql_rope_init(const ql_config *config, ql_rope *out, ql_err *err)
{
    memset(out, 0, sizeof *out);
    int64_t half = config->head_dim / 2;
    out->inv_freq = ql_malloc((size_t)half * sizeof *out->inv_freq);
    if (!out->inv_freq) return ql_err_set(err, QL_ERR_MEMORY, "out of memory");
    out->half = half;
    for (int64_t i = 0; i < half; i++) {
        float exponent = (float)(2 * i) / (float)config->head_dim;
        float freq = 1.0f / (float)pow(config->rope.theta, exponent);
        switch (config->rope.type) {
        case QL_ROPE_NONE:
            break;
        case QL_ROPE_LINEAR:
            freq /= (float)config->rope.factor;
            break;
        case QL_ROPE_LLAMA3:
            freq = llama3_scaled(freq, &config->rope);
            break;
        }
        out->inv_freq[i] = freq;
    }
    return QL_OK;
}

int64_t ql_rope_positions(int64_t longest)
{
    int64_t positions = 256;
    while (positions < longest) positions *= 2;
    return positions;
}

ql_status ql_rope_reserve(ql_rope *r, ql_device *dev, ql_arena *arena, int64_t positions, ql_err *err)
{
    if (positions <= r->positions) return QL_OK;
    int64_t target = ql_rope_positions(positions);
    size_t count = (size_t)(target * r->half);
    float *host = ql_malloc(2 * count * sizeof *host);
    if (!host)
        return ql_err_set(err, QL_ERR_MEMORY, "out of memory for rotary tables of %lld positions",
                          (long long)target);
    for (int64_t p = 0; p < target; p++) {
        for (int64_t i = 0; i < r->half; i++) {
            float angle = r->inv_freq[i] * (float)p;
            host[p * r->half + i] = (float)cos((double)angle);
            host[(int64_t)count + p * r->half + i] = (float)sin((double)angle);
        }
    }
    ql_tensor tables[2] = {{0}};
    ql_status status = QL_OK;
    for (int i = 0; i < 2 && status == QL_OK; i++) {
        status = ql_tensor_new_2d(dev, arena, QL_MEM_ACTIVATIONS, QL_F32, target, r->half, &tables[i], err);
        if (status == QL_OK)
            status = ql_tensor_upload(&tables[i], host + (size_t)i * count, count * sizeof *host, err);
    }
    ql_free(host);
    if (status != QL_OK) {
        ql_tensor_free(&tables[0]);
        ql_tensor_free(&tables[1]);
        return status;
    }
    ql_tensor_free(&r->cos);
    ql_tensor_free(&r->sin);
    r->cos = tables[0];
    r->sin = tables[1];
    r->positions = target;
    return QL_OK;
}

void ql_rope_drop(ql_rope *r)
{
    ql_tensor_free(&r->cos);
    ql_tensor_free(&r->sin);
    r->positions = 0;
}

void ql_rope_free(ql_rope *r)
{
    ql_free(r->inv_freq);
    ql_rope_drop(r);
    memset(r, 0, sizeof *r);
}
