#include "config.h"
#include "file.h"
#include "json.h"
#include "json_scan.h"
#include "mem.h"
#include "text.h"

#include <string.h>

#define CONFIG_LIMIT ((size_t)4 << 20)
#define KEY "quantization_config"

/* Where quantization_config is in the text, or where it would go. Offsets in bytes. */
typedef struct {
    bool found;
    size_t begin, end; /* from the quote of its key to behind its value */
    size_t next;       /* the quote of the key that follows; 0: it is the last */
    size_t before;     /* behind the value before it; 0: it is the first */
    size_t last;       /* behind the last value of the object; 0: the object is empty */
    size_t open;       /* behind the object's brace */
} place;

static ql_status find_place(const char *text, size_t size, const char *file, place *at, ql_err *err)
{
    ql_json_scan scan;
    ql_json_token token;
    memset(at, 0, sizeof *at);
    ql_json_scan_init(&scan, text, size, QL_JSON_DEPTH);
    ql_status status = ql_json_scan_next(&scan, &token, err);
    if (status) return status;
    if (token.kind != QL_JSON_OBJECT) return ql_err_set(err, QL_ERR_FORMAT, "%s: is not a JSON object", file);
    at->open = scan.pos;
    for (;;) {
        status = ql_json_scan_next(&scan, &token, err);
        if (status || token.kind == QL_JSON_OBJECT_END) return status;
        size_t quote = (size_t)(token.text - text) - 1;
        if (at->found && !at->next) at->next = quote;
        bool mine = token.size == strlen(KEY) && memcmp(token.text, KEY, token.size) == 0;
        status = ql_json_scan_skip(&scan, err);
        if (status) return status;
        if (mine) {
            at->found = true;
            at->begin = quote;
            at->end = scan.pos;
            at->before = at->last;
        }
        at->last = scan.pos;
    }
}

/* As transformers writes it: keys sorted, two spaces. */
static void put_quant(ql_text *out, const ql_quant_config *q)
{
    ql_text_puts(out, "\"" KEY "\": {\n    \"_load_in_4bit\": true,\n    \"_load_in_8bit\": false,\n");
    ql_text_printf(out, "    \"bnb_4bit_compute_dtype\": \"%s\",\n", ql_dtype_label(q->compute_dtype));
    ql_text_printf(out, "    \"bnb_4bit_quant_storage\": \"%s\",\n", ql_dtype_label(q->storage));
    ql_text_printf(out, "    \"bnb_4bit_quant_type\": \"%s\",\n", q->type);
    ql_text_printf(out, "    \"bnb_4bit_use_double_quant\": %s,\n", q->double_quant ? "true" : "false");
    ql_text_puts(out, "    \"llm_int8_enable_fp32_cpu_offload\": false,\n"
                      "    \"llm_int8_has_fp16_weight\": false,\n"
                      "    \"llm_int8_skip_modules\": ");
    if (!q->has_skip) {
        ql_text_puts(out, "null");
    } else {
        ql_text_puts(out, "[");
        for (size_t i = 0; i < q->skip_count; i++) {
            ql_text_puts(out, i ? ",\n      " : "\n      ");
            ql_text_json(out, q->skip[i], strlen(q->skip[i]));
        }
        ql_text_puts(out, q->skip_count ? "\n    ]" : "]");
    }
    ql_text_puts(out, ",\n    \"llm_int8_threshold\": 6.0,\n    \"load_in_4bit\": true,\n"
                      "    \"load_in_8bit\": false,\n    \"quant_method\": \"bitsandbytes\"\n  }");
}

static void splice(ql_text *out, const char *text, size_t size, const place *at, const ql_quant_config *quant)
{
    if (quant && quant->present) {
        size_t keep = at->found ? at->begin : at->last ? at->last : at->open;
        ql_text_put(out, text, keep);
        if (!at->found) ql_text_puts(out, at->last ? ",\n  " : "\n  ");
        put_quant(out, quant);
        if (!at->found && !at->last) ql_text_puts(out, "\n");
        if (at->found) keep = at->end;
        ql_text_put(out, text + keep, size - keep);
        return;
    }
    size_t from = size, to = size; /* what to leave out */
    if (at->found) {
        from = at->next || !at->before ? at->begin : at->before;
        to = at->next ? at->next : at->end;
    }
    ql_text_put(out, text, from);
    ql_text_put(out, text + to, size - to);
}

ql_status ql_config_save(const char *source, const char *target, const ql_quant_config *quant, ql_err *err)
{
    char *text = NULL;
    size_t size = 0;
    place at;
    ql_text out = {0};
    ql_status status = ql_file_read(source, CONFIG_LIMIT, &text, &size, err);
    if (!status) status = ql_json_check(text, size, source, err);
    if (!status) status = find_place(text, size, source, &at, err);
    if (!status) {
        splice(&out, text, size, &at, quant);
        if (out.failed) status = ql_err_set(err, QL_ERR_MEMORY, "%s: no memory to write it", target);
    }
    if (!status) status = ql_file_write(target, out.data, out.size, err);
    ql_text_free(&out);
    ql_free(text);
    return status;
}
