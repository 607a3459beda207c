/* Reading the `normalizer`, `pre_tokenizer`, `decoder` and `post_processor`
 * sections of tokenizer.json. */
#ifndef QL_TOKENIZER_STEPS_H
#define QL_TOKENIZER_STEPS_H

#include "tokenizer_impl.h"
#include "tokenizer_json.h"

typedef enum { QL_TOK_NORMALIZER, QL_TOK_PRETOKENIZER, QL_TOK_DECODER } ql_tok_section;

/* Append the steps of `item` (NULL: none), sequences unrolled. What was
 * appended stays owned by *steps on failure. */
ql_status ql_tok_steps_read(ql_tok_section section, const cJSON *item, ql_tok_steps *steps, ql_err *err);

/* The ids that the post-processor puts around a single text. *found [OUT]: a
 * template says so at all. */
ql_status ql_tok_postprocessor_read(const cJSON *item, const ql_tok_vocab *vocab, ql_tok_ids *prefix,
                                    ql_tok_ids *suffix, bool *found, ql_err *err);

#endif
