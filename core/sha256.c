#include "sha256.h"

#include <openssl/evp.h>

static ql_status failed(ql_sha256 *sha, ql_err *err)
{
    ql_sha256_close(sha);
    return ql_err_set(err, QL_ERR_MEMORY, "SHA-256 could not be computed: libcrypto refused");
}

ql_status ql_sha256_open(ql_sha256 *sha, ql_err *err)
{
    sha->context = EVP_MD_CTX_new();
    if (!sha->context || EVP_DigestInit_ex(sha->context, EVP_sha256(), NULL) != 1) return failed(sha, err);
    return QL_OK;
}

ql_status ql_sha256_update(ql_sha256 *sha, const void *data, size_t bytes, ql_err *err)
{
    if (!sha->context) return ql_err_set(err, QL_ERR_ARG, "SHA-256 is closed");
    if (EVP_DigestUpdate(sha->context, data, bytes) != 1) return failed(sha, err);
    return QL_OK;
}

ql_status ql_sha256_finish(ql_sha256 *sha, char hex[QL_SHA256_HEX], ql_err *err)
{
    static const char digits[] = "0123456789abcdef";
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned size = 0;
    hex[0] = '\0';
    if (!sha->context) return ql_err_set(err, QL_ERR_ARG, "SHA-256 is closed");
    if (EVP_DigestFinal_ex(sha->context, digest, &size) != 1) return failed(sha, err);
    ql_sha256_close(sha);
    for (unsigned i = 0; i < size && 2 * i + 2 < QL_SHA256_HEX; i++) {
        hex[2 * i] = digits[digest[i] >> 4];
        hex[2 * i + 1] = digits[digest[i] & 15];
    }
    hex[QL_SHA256_HEX - 1] = '\0';
    return QL_OK;
}

void ql_sha256_close(ql_sha256 *sha)
{
    if (sha->context) EVP_MD_CTX_free(sha->context);
    sha->context = NULL;
}

ql_status ql_sha256_of(const void *data, size_t bytes, char hex[QL_SHA256_HEX], ql_err *err)
{
    ql_sha256 sha;
    hex[0] = '\0';
    ql_status status = ql_sha256_open(&sha, err);
    if (!status) status = ql_sha256_update(&sha, data, bytes, err);
    if (!status) status = ql_sha256_finish(&sha, hex, err);
    ql_sha256_close(&sha);
    return status;
}
