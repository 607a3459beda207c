/* Text <-> token ids, from a Hugging Face tokenizer.json.
 *
 * Runs BPE models: byte-level ones (Llama 3, GPT-2, SmolLM2) and the Llama-2 kind (normaliser or Metaspace,
 * byte fallback). Anything in the file that would change the ids and is not run here is refused by name
 * (QL_ERR_UNSUPPORTED): an approximated tokenizer gives plausible and wrong numbers.
 *
 * The `truncation` and `padding` sections are not applied, as transformers does not unless asked; neither is
 * `clean_up_tokenization_spaces`, which rewrites decoded text. The `legacy` switch of tokenizer_config.json
 * steers only how a tokenizer.json is made from a SentencePiece file, and tokenizer.json is what is read
 * here.
 *
 * A tokenizer owns everything it holds; strings it lends live as long as it does. After loading only scratch
 * memory changes, in ql_tokenizer_encode alone: one encode at a time per tokenizer, the other functions at
 * any time.
 */
#ifndef QL_TOKENIZER_H
#define QL_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "err.h"

typedef struct ql_tokenizer ql_tokenizer;
typedef struct ql_token_stream ql_token_stream;

/* Flags of ql_tokenizer_encode. */
enum {
    QL_TOKENIZER_BOS = 1, /* let the post-processor add its tokens: BOS, and EOS where the file asks for it */
    QL_TOKENIZER_SPECIAL =
        2, /* recognise special tokens written in the text; without it they are plain text, so
            * that content cannot forge a turn. Added tokens that are not special always are. */
};

/* Ids of the tokens with a role, -1 where there is none. Roles come from tokenizer_config.json, else
 * special_tokens_map.json; `unk` else from the model. A name that is no token counts as none. */
typedef struct {
    int32_t bos, eos, unk, pad;
} ql_tokenizer_roles;

/* Load from a folder (its tokenizer.json, tokenizer_config.json, special_tokens_map.json) or from a
 * tokenizer.json, whose folder is then searched for the other two. *out [OUT] is NULL on failure; free with
 * ql_tokenizer_free. */
ql_status ql_tokenizer_load(const char *path, ql_tokenizer **out, ql_err *err);
void ql_tokenizer_free(ql_tokenizer *t); /* NULL is fine */

/* Ids of `text` [len bytes, UTF-8, NUL allowed]. Invalid UTF-8 is refused (QL_ERR_FORMAT, naming the byte
 * offset): Hugging Face never sees such text either, since Python strings cannot hold it. *ids [OUT, *n
 * values] is freed with ql_free; NULL and 0 on failure (and may be NULL when *n is 0). */
ql_status ql_tokenizer_encode(ql_tokenizer *t, const char *text, size_t len, unsigned flags, int32_t **ids,
                              size_t *n, ql_err *err);

/* Text of `ids` [n]. An id without a token (a padded embedding row) gives nothing, as in Hugging Face; a
 * negative one is QL_ERR_ARG. Bytes that form no UTF-8 become U+FFFD. *out [OUT, *len bytes and a closing
 * NUL] is freed with ql_free; NULL and 0 on failure. */
ql_status ql_tokenizer_decode(const ql_tokenizer *t, const int32_t *ids, size_t n, bool skip_special,
                              char **out, size_t *len, ql_err *err);

/* One past the largest id that has a token: the size of a table indexed by id. Ids below it may be unused. */
int32_t ql_tokenizer_vocab_size(const ql_tokenizer *t);

/* The token as the file writes it (byte-level tokens in their printable alphabet, "▁" for a space). Borrowed;
 * *len [OUT] may be NULL; the bytes end with a NUL. NULL for an id without a token. */
const char *ql_tokenizer_token(const ql_tokenizer *t, int32_t id, size_t *len);

/* Id of a token written as the file writes it, or -1. */
int32_t ql_tokenizer_id(const ql_tokenizer *t, const char *token, size_t len);

/* True for added tokens marked special. */
bool ql_tokenizer_is_special(const ql_tokenizer *t, int32_t id);

ql_tokenizer_roles ql_tokenizer_special(const ql_tokenizer *t);

/* Streaming decode: what push returns, put together and followed by flush, is ql_tokenizer_decode of all ids.
 * Bytes of an incomplete character are held back. One exception: where a run of byte-fallback tokens is not
 * UTF-8, decode gives U+FFFD for every byte of the run, the stream only for those that belong to no
 * character. Decoders whose text depends on later tokens (none of the Llama family) give all of it at flush.
 * The stream borrows the tokenizer, which must outlive it. *out [OUT] is NULL on failure. */
ql_status ql_token_stream_new(const ql_tokenizer *t, bool skip_special, ql_token_stream **out, ql_err *err);
void ql_token_stream_free(ql_token_stream *s); /* NULL is fine */

/* *text [OUT, *len bytes, complete UTF-8, possibly none]: borrowed until the next call with this stream. */
ql_status ql_token_stream_push(ql_token_stream *s, int32_t id, const char **text, size_t *len, ql_err *err);

/* The held-back rest; the stream then starts afresh. */
ql_status ql_token_stream_flush(ql_token_stream *s, const char **text, size_t *len, ql_err *err);

#endif
