#include "quant_state.h"
#include "json.h"
#include "json_scan.h"

#include <float.h>
#include <stdio.h>
#include <string.h>

#define DIM_MAX INT64_C(0x7fffffff) /* of each of two extents: their product fits int64 */

bool ql_quant_block_ok(int64_t block)
{
    return block >= QL_QUANT_BLOCK_MIN && block <= QL_QUANT_BLOCK_MAX && (block & (block - 1)) == 0;
}

static ql_status read_type(ql_json_at at, const char *type, ql_quant_state *state, ql_err *err)
{
    const char *stored;
    ql_status status = ql_json_string(at, "quant_type", NULL, &stored, err);
    if (status) return status;
    if (strcmp(stored, type) || (strcmp(type, "nf4") && strcmp(type, "fp4")))
        return ql_err_set(err, QL_ERR_FORMAT, "%s: quant_type is \"%.40s\", but the tensor's name says %s",
                          at.file, stored, type);
    snprintf(state->type, sizeof state->type, "%s", type);
    return QL_OK;
}

static ql_status read_dtype(ql_json_at at, const char *key, const char *fallback, ql_dtype *dtype,
                            ql_err *err)
{
    const char *name;
    ql_status status = ql_json_string(at, key, fallback ? &fallback : NULL, &name, err);
    if (status) return status;
    if (!ql_dtype_parse(name, dtype) || !ql_dtype_is_weight(*dtype))
        return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: %s \"%.40s\" is not float32, float16 or bfloat16",
                          at.file, key, name);
    return QL_OK;
}

static ql_status read_block(ql_json_at at, const char *key, const int64_t *fallback, int *block, ql_err *err)
{
    int64_t value;
    ql_status status = ql_json_int(at, key, 0, INT32_MAX, fallback, &value, err);
    if (status) return status;
    *block = (int)value;
    if (ql_quant_block_ok(value) || (fallback && value == 0)) return QL_OK;
    return ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: %s %lld is not a power of two from %d to %d", at.file,
                      key, (long long)value, QL_QUANT_BLOCK_MIN, QL_QUANT_BLOCK_MAX);
}

static ql_status read_shape(ql_json_at at, int64_t shape[2], ql_err *err)
{
    const cJSON *array = ql_json_get(at.object, "shape");
    if (!cJSON_IsArray(array) || cJSON_GetArraySize(array) != 2)
        return ql_err_set(err, QL_ERR_FORMAT, "%s: shape is not two numbers", at.file);
    for (int i = 0; i < 2; i++) {
        const cJSON *item = cJSON_GetArrayItem(array, i);
        double value = cJSON_IsNumber(item) ? item->valuedouble : 0;
        if (!(value >= 1 && value <= (double)DIM_MAX) || value != (double)(int64_t)value)
            return ql_err_set(err, QL_ERR_FORMAT,
                              "%s: shape holds something other than integers from 1 to %lld", at.file,
                              (long long)DIM_MAX);
        shape[i] = (int64_t)value;
    }
    return QL_OK;
}

static ql_status read_state(ql_json_at at, const char *type, ql_quant_state *state, ql_err *err)
{
    const int64_t none = 0;
    ql_dtype nested_dtype;
    double offset;
    ql_status status = read_type(at, type, state, err);
    if (!status) status = read_block(at, "blocksize", NULL, &state->block, err);
    if (!status) status = read_dtype(at, "dtype", NULL, &state->dtype, err);
    if (!status) status = read_shape(at, state->shape, err);
    if (!status) status = read_block(at, "nested_blocksize", &none, &state->nested_block, err);
    if (status || state->nested_block == 0) return status;
    state->nested = true;
    status = read_dtype(at, "nested_dtype", "float32", &nested_dtype, err);
    if (!status && nested_dtype != QL_F32)
        status = ql_err_set(err, QL_ERR_UNSUPPORTED, "%s: nested_dtype is not float32", at.file);
    if (!status)
        status = ql_json_number(at, "nested_offset", -(double)FLT_MAX, (double)FLT_MAX, NULL, &offset, err);
    if (!status) state->nested_offset = (float)offset;
    return status;
}

ql_status ql_quant_state_parse(const char *text, size_t size, const char *file, const char *tensor,
                               const char *type, ql_quant_state *state, ql_err *err)
{
    char where[1024];
    cJSON *root;
    memset(state, 0, sizeof *state);
    snprintf(where, sizeof where, "%.500s: tensor \"%.400s\"", file, tensor);
    ql_status status = ql_json_parse(text, size, where, &root, err);
    if (status) return status;
    if (cJSON_IsObject(root))
        status = read_state((ql_json_at){root, where, ""}, type, state, err);
    else
        status = ql_err_set(err, QL_ERR_FORMAT, "%s: is not a JSON object", where);
    cJSON_Delete(root);
    if (status) memset(state, 0, sizeof *state);
    return status;
}

ql_status ql_quant_state_format(const ql_quant_state *state, char *text, size_t capacity, size_t *size,
                                ql_err *err)
{
    char nested[160] = "", offset[QL_JSON_NUMBER];
    *size = 0;
    if (state->nested) {
        ql_json_number_text((double)state->nested_offset, offset);
        snprintf(nested, sizeof nested,
                 ", \"nested_blocksize\": %d, \"nested_dtype\": \"float32\", \"nested_offset\": %s",
                 state->nested_block, offset);
    }
    int n =
        snprintf(text, capacity,
                 "{\"quant_type\": \"%s\", \"blocksize\": %d, \"dtype\": \"%s\", \"shape\": [%lld, %lld]%s}",
                 state->type, state->block, ql_dtype_label(state->dtype), (long long)state->shape[0],
                 (long long)state->shape[1], nested);
    if (n < 0 || (size_t)n >= capacity) return ql_err_set(err, QL_ERR_ARG, "no room for the quant_state");
    *size = (size_t)n;
    return QL_OK;
}

int64_t ql_quant_state_elements(const ql_quant_state *state)
{
    return state->shape[0] * state->shape[1];
}

int64_t ql_quant_state_bytes(const ql_quant_state *state)
{
    return (ql_quant_state_elements(state) + 1) / 2;
}

int64_t ql_quant_state_blocks(const ql_quant_state *state)
{
    return (ql_quant_state_elements(state) - 1) / state->block + 1;
}

int64_t ql_quant_state_nested(const ql_quant_state *state)
{
    return state->nested ? (ql_quant_state_blocks(state) - 1) / state->nested_block + 1 : 0;
}
