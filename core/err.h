/* Status codes and the one error record that every core function fills.
 *
 * A core function that can fail returns a ql_status and takes `ql_err *err` last. `err` may be NULL when the
 * caller only wants the code. On QL_OK the record is left as it was. The record owns no memory.
 */
#ifndef QL_ERR_H
#define QL_ERR_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    QL_OK = 0,
    QL_ERR_ARG,         /* the caller's argument is wrong: a misuse */
    QL_ERR_NOT_FOUND,   /* no such file, folder, tensor or name */
    QL_ERR_IO,          /* open, read, write, fsync or rename failed */
    QL_ERR_FORMAT,      /* a file's content breaks its format */
    QL_ERR_UNSUPPORTED, /* well-formed, but not something qlua runs */
    QL_ERR_MEMORY,      /* host or device memory ran out */
    QL_ERR_DEVICE,      /* driver, device or kernel failure */
    QL_ERR_INTERRUPTED, /* the user pressed Ctrl-C */
} ql_status;

typedef struct {
    ql_status code;
    char message[1024]; /* what is wrong and where: file, field, value */
    char hint[512];     /* what to do about it; "" when there is nothing to say */
} ql_err;

#define QL_PRINTF(f, a) __attribute__((format(printf, f, a)))

/* Fill `err` (hint cleared) and return `code`, so that `return ql_err_set(...)` reads well. */
ql_status ql_err_set(ql_err *err, ql_status code, const char *fmt, ...) QL_PRINTF(3, 4);

/* Add advice to an error already set; returns err->code (QL_ERR_ARG for a NULL err). */
ql_status ql_err_hint(ql_err *err, const char *fmt, ...) QL_PRINTF(2, 3);

/* Put context in front of the message: ql_err_prefix(err, "%s: ", path). Returns err->code. */
ql_status ql_err_prefix(ql_err *err, const char *fmt, ...) QL_PRINTF(2, 3);

/* Stable short name of a code for Lua and JSON: "ok", "argument", "not_found", "io", ... Never NULL. */
const char *ql_err_name(ql_status code);

/* Leave the function with the status of `call` unless it is QL_OK; for functions with nothing to clean up. */
#define QL_TRY(call)                                                                                         \
    do {                                                                                                     \
        ql_status try_status = (call);                                                                       \
        if (try_status != QL_OK) return try_status;                                                          \
    } while (0)

#ifdef __cplusplus
}
#endif
#endif
