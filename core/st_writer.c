#include "file.h"
#include "json_scan.h"
#include "mem.h"
#include "safetensors.h"
#include "text.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    char *name; /* owned */
    ql_dtype dtype;
    int ndim;
    int64_t shape[QL_ST_DIMS];
    uint64_t bytes, begin, written;
} entry;

struct ql_st_writer {
    ql_file_writer file;
    entry *entries;
    size_t count, capacity;
    uint64_t data_begin; /* 0 until begun */
};

ql_status ql_st_writer_open(const char *path, ql_st_writer **writer, ql_err *err)
{
    *writer = ql_calloc(1, sizeof **writer);
    if (!*writer) return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to write it", path);
    ql_status status = ql_file_create(path, &(*writer)->file, err);
    if (status) {
        ql_free(*writer);
        *writer = NULL;
    }
    return status;
}

static bool name_ok(const char *name)
{
    size_t n = strlen(name);
    const char *p = name, *end = name + n;
    if (n == 0 || n > QL_ST_NAME_MAX || strcmp(name, "__metadata__") == 0) return false;
    while (p < end) {
        size_t step = ql_utf8_length(p, end);
        if (!step) return false;
        p += step;
    }
    return true;
}

ql_status ql_st_writer_add(ql_st_writer *writer, const char *name, ql_dtype dtype, int ndim,
                           const int64_t *shape, size_t *index, ql_err *err)
{
    entry item = {.dtype = dtype, .ndim = ndim, .bytes = ql_dtype_size(dtype)};
    if (!writer->file.path || writer->data_begin)
        return ql_err_set(err, QL_ERR_ARG, "tensor \"%.100s\" is added after the header was written", name);
    if (!name_ok(name)) return ql_err_set(err, QL_ERR_ARG, "\"%.100s\" cannot name a tensor", name);
    bool ok = item.bytes > 0 && ndim >= 0 && ndim <= QL_ST_DIMS;
    for (int i = 0; ok && i < ndim; i++) {
        ok = shape[i] >= 0 && !__builtin_mul_overflow(item.bytes, (uint64_t)shape[i], &item.bytes) &&
             item.bytes <= INT64_MAX;
        item.shape[i] = shape[i];
    }
    if (!ok) return ql_err_set(err, QL_ERR_ARG, "tensor \"%.100s\" has a dtype or shape out of range", name);
    if (writer->count == writer->capacity) {
        size_t capacity = writer->capacity ? writer->capacity * 2 : 64;
        entry *wider = ql_realloc(writer->entries, capacity * sizeof *wider);
        if (!wider) goto fail;
        writer->entries = wider;
        writer->capacity = capacity;
    }
    item.name = ql_strdup(name);
    if (!item.name) goto fail;
    if (index) *index = writer->count;
    writer->entries[writer->count++] = item;
    return QL_OK;

fail:
    return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to write it", writer->file.path);
}

static int by_name(const void *a, const void *b)
{
    const entry *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

/* The reference writer's order: wide elements first, so that every tensor is aligned to its element. */
static int by_width(const void *a, const void *b)
{
    const entry *const *x = a, *const *y = b;
    size_t n = ql_dtype_size((*x)->dtype), m = ql_dtype_size((*y)->dtype);
    return n != m ? (n > m ? -1 : 1) : by_name(a, b);
}

static void put_entry(ql_text *to, const entry *item)
{
    ql_text_puts(to, ",");
    ql_text_json(to, item->name, strlen(item->name));
    ql_text_printf(to, ":{\"dtype\":\"%s\",\"shape\":[", ql_dtype_name(item->dtype));
    for (int i = 0; i < item->ndim; i++) ql_text_printf(to, i ? ",%lld" : "%lld", (long long)item->shape[i]);
    ql_text_printf(to, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)item->begin,
                   (unsigned long long)(item->begin + item->bytes));
}

/* Give every entry its place and write the header's text. */
static ql_status make_header(ql_st_writer *writer, entry **order, ql_text *text, ql_err *err)
{
    uint64_t end = 0;
    for (size_t i = 0; i < writer->count; i++) order[i] = &writer->entries[i];
    qsort(order, writer->count, sizeof(entry *), by_name);
    for (size_t i = 1; i < writer->count; i++)
        if (strcmp(order[i - 1]->name, order[i]->name) == 0)
            return ql_err_set(err, QL_ERR_ARG, "tensor \"%.100s\" is added twice", order[i]->name);
    qsort(order, writer->count, sizeof(entry *), by_width);
    ql_text_puts(text, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (size_t i = 0; i < writer->count; i++) {
        order[i]->begin = end;
        if (__builtin_add_overflow(end, order[i]->bytes, &end) || end > INT64_MAX)
            return ql_err_set(err, QL_ERR_ARG, "%s: its tensors overflow a file", writer->file.path);
        put_entry(text, order[i]);
    }
    ql_text_puts(text, "}");
    while (text->size % 8 && !text->failed) ql_text_puts(text, " ");
    if (text->failed) return ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to write it", writer->file.path);
    if (text->size > QL_ST_HEADER_MAX)
        return ql_err_set(err, QL_ERR_ARG, "%s: too many tensors for one file", writer->file.path);
    return QL_OK;
}

ql_status ql_st_writer_begin(ql_st_writer *writer, ql_err *err)
{
    if (!writer->file.path || writer->data_begin)
        return ql_err_set(err, QL_ERR_ARG, "the header is already written");
    ql_text text = {0};
    unsigned char length[8];
    entry **order = ql_malloc(writer->count * sizeof(entry *));
    ql_status status = order ? make_header(writer, order, &text, err)
                             : ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to write it", writer->file.path);
    if (!status) {
        for (int i = 0; i < 8; i++) length[i] = (unsigned char)(text.size >> 8 * i);
        status = ql_file_pwrite(&writer->file, 0, length, sizeof length, err);
    }
    if (!status) status = ql_file_pwrite(&writer->file, sizeof length, text.data, text.size, err);
    if (!status) writer->data_begin = sizeof length + text.size;
    ql_free(order);
    ql_text_free(&text);
    return status;
}

ql_status ql_st_writer_write(ql_st_writer *writer, size_t index, const void *data, size_t bytes, ql_err *err)
{
    if (!writer->data_begin || !writer->file.path || index >= writer->count)
        return ql_err_set(err, QL_ERR_ARG, "there is no tensor %zu to write", index);
    entry *item = &writer->entries[index];
    if (bytes > item->bytes - item->written)
        return ql_err_set(err, QL_ERR_ARG, "tensor \"%.100s\": more bytes than its shape holds", item->name);
    ql_status status =
        ql_file_pwrite(&writer->file, writer->data_begin + item->begin + item->written, data, bytes, err);
    if (!status) item->written += bytes;
    return status;
}

ql_status ql_st_writer_finish(ql_st_writer *writer, ql_err *err)
{
    if (!writer->data_begin || !writer->file.path)
        return ql_err_set(err, QL_ERR_ARG, "the header is not written");
    for (size_t i = 0; i < writer->count; i++) {
        const entry *item = &writer->entries[i];
        if (item->written != item->bytes)
            return ql_err_set(err, QL_ERR_ARG, "tensor \"%.100s\": %llu of %llu bytes were written",
                              item->name, (unsigned long long)item->written, (unsigned long long)item->bytes);
    }
    return ql_file_commit(&writer->file, err);
}

void ql_st_writer_close(ql_st_writer *writer)
{
    if (!writer) return;
    ql_file_abort(&writer->file);
    for (size_t i = 0; i < writer->count; i++) ql_free(writer->entries[i].name);
    ql_free(writer->entries);
    ql_free(writer);
}
