/* SHA-256, incremental, over libcrypto. A digest is handed out as 64 lower-case hex digits and a NUL. */
#ifndef QL_SHA256_H
#define QL_SHA256_H

#include "err.h"

#include <stddef.h>

#define QL_SHA256_HEX 65

typedef struct {
    void *context; /* owned; NULL when closed */
} ql_sha256;

/* Start a digest; pair with ql_sha256_finish or ql_sha256_close. */
ql_status ql_sha256_open(ql_sha256 *sha /* [OUT] */, ql_err *err);
ql_status ql_sha256_update(ql_sha256 *sha, const void *data, size_t bytes, ql_err *err);
/* Write the digest and close. */
ql_status ql_sha256_finish(ql_sha256 *sha, char hex[QL_SHA256_HEX] /* [OUT] */, ql_err *err);
/* Idempotent. */
void ql_sha256_close(ql_sha256 *sha);

/* Digest of one buffer. */
ql_status ql_sha256_of(const void *data, size_t bytes, char hex[QL_SHA256_HEX] /* [OUT] */, ql_err *err);

#endif
