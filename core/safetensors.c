#include "safetensors.h"
#include "file.h"
#include "hash.h"
#include "json_scan.h"
#include "mem.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PREFIX 8       /* bytes of the header's length */
#define HEADER_DEPTH 3 /* {"name": {"shape": [ */

/* The header is scanned twice: once to check and count, once to fill arrays of exactly that size. Names are
 * decoded in place in the second pass and stay in the header's buffer. For the smallest tensor entry (about
 * 50 bytes) that makes 96 bytes of ql_st_tensor, 11 of hash slots and at most 32 for the order check: under
 * four times the header. */
struct ql_st {
    char *path;
    int fd;
    uint64_t file_bytes, data_begin, data_bytes;
    char *header;
    size_t header_bytes;
    ql_st_tensor *tensors;
    size_t count;
    uint32_t *slots; /* open addressing: index + 1 of a tensor, 0 free */
    size_t mask;
    uint64_t hash_key;
};

/* One pass over the header. */
typedef struct {
    ql_st *st;
    ql_json_scan scan;
    bool fill;               /* the second pass */
    size_t tensors, entries; /* met so far; entries are those of __metadata__ */
    uint32_t *slots;         /* of __metadata__: offset of a key in the header + 1 */
    size_t mask;
} header_pass;

static ql_status bad(const ql_st *st, const char *name, size_t size, const char *what, ql_err *err)
{
    char text[QL_JSON_SHOWN];
    return ql_err_set(err, QL_ERR_FORMAT, "%s: tensor \"%s\": %s", st->path, ql_json_shown(name, size, text),
                      what);
}

static ql_status next(header_pass *pass, ql_json_token *token, ql_err *err)
{
    ql_status status = ql_json_scan_next(&pass->scan, token, err);
    if (status && err) ql_err_prefix(err, "%s: header, ", pass->st->path);
    return status;
}

static bool token_is(const ql_json_token *token, const char *text)
{
    char decoded[64];
    size_t n = strlen(text);
    if (!token->escaped) return token->size == n && memcmp(token->text, text, n) == 0;
    if (token->size > sizeof decoded) return false;
    return ql_json_unescape(token, decoded) == n && memcmp(decoded, text, n) == 0;
}

/* Decode a string in place and end it with NUL: the closing quote makes the room. */
static char *settle(header_pass *pass, const ql_json_token *token)
{
    char *text = pass->st->header + (token->text - pass->st->header);
    text[ql_json_unescape(token, text)] = '\0';
    return text;
}

/* Power of two that leaves a quarter of the slots free. */
static bool make_slots(size_t count, uint32_t **slots, size_t *mask)
{
    size_t capacity = 4;
    while (capacity / 4 * 3 < count) capacity *= 2;
    *slots = ql_calloc(capacity, sizeof **slots);
    *mask = capacity - 1;
    return *slots != NULL;
}

static size_t tensor_slot(const ql_st *st, const char *name)
{
    size_t i = (size_t)ql_hash(st->hash_key, name, strlen(name)) & st->mask;
    while (st->slots[i] && strcmp(st->tensors[st->slots[i] - 1].name, name)) i = (i + 1) & st->mask;
    return i;
}

static ql_status read_dtype(header_pass *pass, const ql_json_token *name, ql_st_tensor *tensor, ql_err *err)
{
    ql_json_token token;
    char text[QL_JSON_SHOWN], what[2 * QL_JSON_SHOWN];
    ql_status status = next(pass, &token, err);
    if (status) return status;
    if (token.kind != QL_JSON_STRING)
        return bad(pass->st, name->text, name->size, "dtype is not a string", err);
    for (int i = 0; i < QL_DTYPE_COUNT; i++) {
        if (!token_is(&token, ql_dtype_name((ql_dtype)i))) continue;
        tensor->dtype = (ql_dtype)i;
        return QL_OK;
    }
    snprintf(what, sizeof what, "unknown dtype %s", ql_json_shown(token.text, token.size, text));
    return bad(pass->st, name->text, name->size, what, err);
}

/* An array of non-negative integers, at most `limit` of them. */
static ql_status read_integers(header_pass *pass, const ql_json_token *name, const char *field, int limit,
                               int64_t *values, int *count, ql_err *err)
{
    ql_json_token token;
    char text[QL_JSON_SHOWN], what[2 * QL_JSON_SHOWN];
    *count = 0;
    ql_status status = next(pass, &token, err);
    if (status) return status;
    if (token.kind != QL_JSON_ARRAY) {
        snprintf(what, sizeof what, "%s is not an array", field);
        return bad(pass->st, name->text, name->size, what, err);
    }
    for (;;) {
        status = next(pass, &token, err);
        if (status) return status;
        if (token.kind == QL_JSON_ARRAY_END) return QL_OK;
        if (token.kind != QL_JSON_INT || token.text[0] == '-') {
            bool is_number = token.kind == QL_JSON_INT || token.kind == QL_JSON_FLOAT;
            snprintf(what, sizeof what, "%s holds %s, expected integers from 0 to 2^63-1", field,
                     is_number ? ql_json_shown(token.text, token.size, text) : "something that is no number");
            return bad(pass->st, name->text, name->size, what, err);
        }
        if (*count == limit) {
            snprintf(what, sizeof what, "%s has more than %d numbers", field, limit);
            return bad(pass->st, name->text, name->size, what, err);
        }
        values[(*count)++] = token.integer;
    }
}

/* Bytes of a shape. The product of its non-zero extents must fit too: then no order of multiplying overflows.
 */
static bool shape_bytes(const ql_st_tensor *tensor, uint64_t *bytes)
{
    uint64_t product = ql_dtype_size(tensor->dtype);
    bool empty = false;
    for (int i = 0; i < tensor->ndim; i++) {
        if (tensor->shape[i] == 0)
            empty = true;
        else if (__builtin_mul_overflow(product, (uint64_t)tensor->shape[i], &product))
            return false;
    }
    *bytes = empty ? 0 : product;
    return product <= INT64_MAX;
}

static ql_status check_span(const ql_st *st, const ql_json_token *name, const ql_st_tensor *tensor,
                            ql_err *err)
{
    uint64_t bytes;
    char what[160];
    if (!shape_bytes(tensor, &bytes))
        return bad(st, name->text, name->size, "shape overflows: it has more bytes than any file", err);
    unsigned long long begin = tensor->begin, end = tensor->end;
    if (begin > end) {
        snprintf(what, sizeof what, "data_offsets begin at %llu after they end at %llu", begin, end);
        return bad(st, name->text, name->size, what, err);
    }
    if (end > st->data_bytes) {
        snprintf(what, sizeof what, "data_offsets end at %llu, but the file has %llu bytes of data", end,
                 (unsigned long long)st->data_bytes);
        bad(st, name->text, name->size, what, err);
        return err ? ql_err_hint(err, "the file is truncated: download or copy it again") : QL_ERR_FORMAT;
    }
    if (end - begin != bytes) {
        snprintf(what, sizeof what, "data_offsets span %llu bytes, but shape and dtype make %llu",
                 end - begin, (unsigned long long)bytes);
        return bad(st, name->text, name->size, what, err);
    }
    return QL_OK;
}

static ql_status read_tensor(header_pass *pass, const ql_json_token *name, ql_st_tensor *tensor, ql_err *err)
{
    enum { DTYPE = 1, SHAPE = 2, OFFSETS = 4 };
    const ql_st *st = pass->st;
    ql_json_token token;
    int seen = 0, count = 0;
    int64_t offsets[2] = {0, 0};
    char text[QL_JSON_SHOWN], what[2 * QL_JSON_SHOWN];
    memset(tensor, 0, sizeof *tensor);
    ql_status status = next(pass, &token, err);
    if (status) return status;
    if (token.kind != QL_JSON_OBJECT)
        return bad(st, name->text, name->size, "is described by something other than an object", err);
    for (;;) {
        status = next(pass, &token, err);
        if (status) return status;
        if (token.kind == QL_JSON_OBJECT_END) break;
        int field = token_is(&token, "dtype")          ? DTYPE
                    : token_is(&token, "shape")        ? SHAPE
                    : token_is(&token, "data_offsets") ? OFFSETS
                                                       : 0;
        if (!field || seen & field) {
            ql_json_shown(token.text, token.size, text);
            snprintf(what, sizeof what, field ? "field \"%s\" is given twice" : "unknown field \"%s\"", text);
            return bad(st, name->text, name->size, what, err);
        }
        seen |= field;
        if (field == DTYPE) status = read_dtype(pass, name, tensor, err);
        if (field == SHAPE)
            status = read_integers(pass, name, "shape", QL_ST_DIMS, tensor->shape, &tensor->ndim, err);
        if (field == OFFSETS) status = read_integers(pass, name, "data_offsets", 2, offsets, &count, err);
        if (status) return status;
    }
    if (!(seen & DTYPE)) return bad(st, name->text, name->size, "dtype is missing", err);
    if (!(seen & SHAPE)) return bad(st, name->text, name->size, "shape is missing", err);
    if (!(seen & OFFSETS)) return bad(st, name->text, name->size, "data_offsets is missing", err);
    if (count != 2) return bad(st, name->text, name->size, "data_offsets are not two numbers", err);
    tensor->begin = (uint64_t)offsets[0];
    tensor->end = (uint64_t)offsets[1];
    return check_span(st, name, tensor, err);
}

static ql_status read_metadata(header_pass *pass, ql_err *err)
{
    ql_json_token token, value;
    char text[QL_JSON_SHOWN];
    const char *path = pass->st->path;
    ql_status status = next(pass, &token, err);
    if (status) return status;
    if (token.kind != QL_JSON_OBJECT)
        return ql_err_set(err, QL_ERR_FORMAT, "%s: __metadata__ is not an object", path);
    for (;; pass->entries++) {
        status = next(pass, &token, err);
        if (status) return status;
        if (token.kind == QL_JSON_OBJECT_END) return QL_OK;
        status = next(pass, &value, err);
        if (status) return status;
        if (value.kind != QL_JSON_STRING)
            return ql_err_set(err, QL_ERR_FORMAT, "%s: __metadata__.%s is not a string", path,
                              ql_json_shown(token.text, token.size, text));
        if (token.has_nul) return ql_err_set(err, QL_ERR_FORMAT, "%s: __metadata__ has a key with NUL", path);
        if (!pass->fill) continue;
        const char *base = pass->st->header, *key = settle(pass, &token);
        size_t i = (size_t)ql_hash(pass->st->hash_key, key, strlen(key)) & pass->mask;
        while (pass->slots[i] && strcmp(base + pass->slots[i] - 1, key)) i = (i + 1) & pass->mask;
        if (pass->slots[i])
            return ql_err_set(err, QL_ERR_FORMAT, "%s: __metadata__.%s is given twice", path,
                              ql_json_shown(key, strlen(key), text));
        pass->slots[i] = (uint32_t)(key - base) + 1;
    }
}

static ql_status check_name(const ql_st *st, const ql_json_token *name, ql_err *err)
{
    if (name->size == 0) return ql_err_set(err, QL_ERR_FORMAT, "%s: a tensor's name is empty", st->path);
    if (name->has_nul) return bad(st, name->text, name->size, "its name holds NUL", err);
    if (name->size > QL_ST_NAME_MAX)
        return bad(st, name->text, name->size, "its name is over 1024 bytes long", err);
    return QL_OK;
}

static ql_status run_pass(header_pass *pass, ql_err *err)
{
    ql_st *st = pass->st;
    ql_json_token token;
    ql_st_tensor tensor;
    bool metadata = false;
    ql_json_scan_init(&pass->scan, st->header, st->header_bytes, HEADER_DEPTH);
    ql_status status = next(pass, &token, err);
    if (status) return status;
    for (;;) {
        status = next(pass, &token, err);
        if (status) return status;
        if (token.kind == QL_JSON_OBJECT_END) break;
        if (token_is(&token, "__metadata__")) {
            if (metadata) return ql_err_set(err, QL_ERR_FORMAT, "%s: __metadata__ is given twice", st->path);
            metadata = true;
            status = read_metadata(pass, err);
            if (status) return status;
            continue;
        }
        status = check_name(st, &token, err);
        if (!status) status = read_tensor(pass, &token, &tensor, err);
        if (status) return status;
        if (pass->fill) {
            tensor.name = settle(pass, &token);
            size_t slot = tensor_slot(st, tensor.name);
            if (st->slots[slot]) return bad(st, tensor.name, strlen(tensor.name), "is given twice", err);
            st->tensors[pass->tensors] = tensor;
            st->slots[slot] = (uint32_t)pass->tensors + 1;
        }
        pass->tensors++;
    }
    return next(pass, &token, err); /* nothing but white space may follow */
}

typedef struct {
    uint64_t begin, end;
} span;

static int compare_spans(const void *a, const void *b)
{
    const span *x = a, *y = b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return x->end < y->end ? -1 : x->end > y->end;
}

static ql_status gap(const ql_st *st, span at, uint64_t due, ql_err *err)
{
    size_t i = 0;
    while (i + 1 < st->count && (st->tensors[i].begin != at.begin || st->tensors[i].end != at.end)) i++;
    const char *name = st->tensors[i].name;
    char what[120];
    snprintf(what, sizeof what, "its data begins at %llu and %s the tensor before, which ends at %llu",
             (unsigned long long)at.begin, at.begin < due ? "overlaps" : "leaves a hole after",
             (unsigned long long)due);
    return bad(st, name, strlen(name), what, err);
}

/* Every byte of the data part belongs to exactly one tensor. */
static ql_status check_cover(const ql_st *st, ql_err *err)
{
    uint64_t due = 0;
    size_t i = 0;
    while (i < st->count && st->tensors[i].begin == due) due = st->tensors[i++].end;
    if (i < st->count) { /* the header is not in the order of the data */
        span *spans = ql_malloc(st->count * sizeof *spans);
        if (!spans) return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory for its header", st->path);
        for (i = 0; i < st->count; i++) spans[i] = (span){st->tensors[i].begin, st->tensors[i].end};
        qsort(spans, st->count, sizeof *spans, compare_spans);
        ql_status status = QL_OK;
        for (i = 0, due = 0; i < st->count && !status; i++) {
            if (spans[i].begin != due) status = gap(st, spans[i], due, err);
            due = spans[i].end;
        }
        ql_free(spans);
        if (status) return status;
    }
    if (due == st->data_bytes) return QL_OK;
    ql_err_set(err, QL_ERR_FORMAT, "%s: has %llu bytes of data, but its tensors end at %llu", st->path,
               (unsigned long long)st->data_bytes, (unsigned long long)due);
    return err ? ql_err_hint(err,
                             "bytes were added or the header is damaged: download or save the file again")
               : QL_ERR_FORMAT;
}

static ql_status read_header(ql_st *st, ql_err *err)
{
    header_pass pass = {.st = st};
    ql_status status = run_pass(&pass, err);
    if (status) return status;
    st->count = pass.tensors;
    st->hash_key = ql_hash_key();
    st->tensors = ql_malloc(st->count * sizeof *st->tensors);
    if (!st->tensors || !make_slots(st->count, &st->slots, &st->mask) ||
        (pass.entries && !make_slots(pass.entries, &pass.slots, &pass.mask))) {
        status = ql_err_set(err, QL_ERR_MEMORY, "%s: no memory for its header of %zu bytes", st->path,
                            st->header_bytes);
    } else {
        pass = (header_pass){.st = st, .fill = true, .slots = pass.slots, .mask = pass.mask};
        status = run_pass(&pass, err);
    }
    ql_free(pass.slots);
    return status ? status : check_cover(st, err);
}

/* What people have under the name of a safetensors file, by its first bytes. */
static ql_status foreign(const char *path, const char *head, size_t size, ql_err *err)
{
    static const struct {
        const char *magic, *what, *hint;
    } kinds[] = {
        {"version https://git-lfs", "is a Git-LFS pointer, not the weights themselves",
         "fetch the weights: run `git lfs pull` in its folder, or `huggingface-cli download <org/name>`"},
        {"GGUF", "is a GGUF file", "qlua reads safetensors: use the Hugging Face folder it was made from"},
        {"PK\x03\x04", "is a PyTorch pickle (.bin)",
         "save it again with save_pretrained(..., safe_serialization=True)"},
        {"<!DOCTYPE", "is an HTML page",
         "the download failed and saved the server's answer: download it again"},
        {"<html", "is an HTML page", "the download failed and saved the server's answer: download it again"},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        size_t n = strlen(kinds[i].magic);
        if (size < n || memcmp(head, kinds[i].magic, n)) continue;
        ql_err_set(err, QL_ERR_FORMAT, "%s: %s", path, kinds[i].what);
        if (err) ql_err_hint(err, "%s", kinds[i].hint);
        return QL_ERR_FORMAT;
    }
    return QL_OK;
}

/* Read and check the length and bring the header into memory. */
static ql_status load_header(ql_st *st, ql_err *err)
{
    char head[64];
    size_t n = st->file_bytes < sizeof head ? (size_t)st->file_bytes : sizeof head;
    uint64_t bytes = 0;
    ql_status status = ql_file_pread(st->fd, st->path, 0, head, n, err);
    if (!status) status = foreign(st->path, head, n, err);
    if (status) return status;
    if (n < PREFIX) {
        ql_err_set(err, QL_ERR_FORMAT, "%s: has %zu bytes, a safetensors file has at least 8", st->path, n);
        return err ? ql_err_hint(err, "the file is truncated: download or copy it again") : QL_ERR_FORMAT;
    }
    for (int i = PREFIX - 1; i >= 0; i--) bytes = bytes << 8 | (unsigned char)head[i];
    if (bytes == 0) return ql_err_set(err, QL_ERR_FORMAT, "%s: header length is 0", st->path);
    if (bytes > QL_ST_HEADER_MAX)
        return ql_err_set(err, QL_ERR_FORMAT, "%s: header length %llu is over the limit of %d", st->path,
                          (unsigned long long)bytes, QL_ST_HEADER_MAX);
    if (bytes > st->file_bytes - PREFIX) {
        ql_err_set(err, QL_ERR_FORMAT, "%s: header length %llu is past the end of the file (%llu bytes)",
                   st->path, (unsigned long long)bytes, (unsigned long long)st->file_bytes);
        return err ? ql_err_hint(err, "the file is truncated: download or copy it again") : QL_ERR_FORMAT;
    }
    st->header_bytes = (size_t)bytes;
    st->data_begin = PREFIX + bytes;
    st->data_bytes = st->file_bytes - st->data_begin;
    st->header = ql_malloc(st->header_bytes + 1);
    if (!st->header)
        return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory for its header of %zu bytes", st->path,
                          st->header_bytes);
    status = ql_file_pread(st->fd, st->path, PREFIX, st->header, st->header_bytes, err);
    if (status) return status;
    st->header[st->header_bytes] = '\0';
    if (st->header[0] == '{') return QL_OK;
    bool mark = st->header_bytes >= 3 && memcmp(st->header, "\xef\xbb\xbf", 3) == 0;
    return ql_err_set(err, QL_ERR_FORMAT, "%s: header %s, expected '{'", st->path,
                      mark ? "begins with a byte-order mark" : "is not a JSON object");
}

ql_status ql_st_open(const char *path, ql_st **out, ql_err *err)
{
    *out = NULL;
    ql_st *st = ql_calloc(1, sizeof *st);
    if (!st) return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to open it", path);
    st->fd = -1;
    st->path = ql_strdup(path);
    ql_status status = st->path ? QL_OK : ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to open it", path);
    if (!status) status = ql_file_open(path, &st->fd, &st->file_bytes, err);
    if (!status) status = load_header(st, err);
    if (!status) status = read_header(st, err);
    if (status) {
        ql_st_close(st);
        return status;
    }
    *out = st;
    return QL_OK;
}

void ql_st_close(ql_st *st)
{
    if (!st) return;
    if (st->fd >= 0) close(st->fd);
    ql_free(st->slots);
    ql_free(st->tensors);
    ql_free(st->header);
    ql_free(st->path);
    ql_free(st);
}

const char *ql_st_path(const ql_st *st)
{
    return st->path;
}

uint64_t ql_st_file_bytes(const ql_st *st)
{
    return st->file_bytes;
}

size_t ql_st_count(const ql_st *st)
{
    return st->count;
}

const ql_st_tensor *ql_st_at(const ql_st *st, size_t index)
{
    return index < st->count ? &st->tensors[index] : NULL;
}

const ql_st_tensor *ql_st_find(const ql_st *st, const char *name)
{
    uint32_t found = st->slots[tensor_slot(st, name)];
    return found ? &st->tensors[found - 1] : NULL;
}

uint64_t ql_st_tensor_bytes(const ql_st_tensor *tensor)
{
    return tensor->end - tensor->begin;
}

int64_t ql_st_tensor_elements(const ql_st_tensor *tensor)
{
    return (int64_t)((tensor->end - tensor->begin) / ql_dtype_size(tensor->dtype));
}

ql_status ql_st_read(const ql_st *st, const ql_st_tensor *tensor, uint64_t offset, size_t bytes, void *dst,
                     ql_err *err)
{
    uint64_t all = ql_st_tensor_bytes(tensor);
    if (offset > all || bytes > all - offset)
        return ql_err_set(err, QL_ERR_ARG, "%s: tensor \"%.100s\": %zu bytes at %llu are past its %llu",
                          st->path, tensor->name, bytes, (unsigned long long)offset, (unsigned long long)all);
    return ql_file_pread(st->fd, st->path, st->data_begin + tensor->begin + offset, dst, bytes, err);
}

ql_status ql_st_read_file(const ql_st *st, uint64_t offset, size_t bytes, void *dst, ql_err *err)
{
    return ql_file_pread(st->fd, st->path, offset, dst, bytes, err);
}
