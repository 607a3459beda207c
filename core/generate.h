/* Generation: prefill a batch of prompts, then decode them together until each row ends.
 *
 * Rows that end leave the batch. A row's tokens depend on its prompt, the options and its stream number only,
 * not on the rows beside it.
 */
#ifndef QL_GENERATE_H
#define QL_GENERATE_H

#include "llama.h"
#include "sampler.h"

typedef enum {
    QL_STOP_LENGTH,  /* max_new_tokens reached */
    QL_STOP_TOKEN,   /* a stop id was drawn; it is not part of the result */
    QL_STOP_CALLER,  /* on_token said so; the token is part of the result */
    QL_STOP_CONTEXT, /* the model's context is full */
} ql_stop;

typedef struct {
    int64_t max_new_tokens; /* >= 1 */
    ql_sampling sampling;
    const int32_t *stop_ids; /* [stop_count] */
    int stop_count;
    /* Called for each token that joins a row's result; true ends the row. May be NULL. */
    bool (*on_token)(void *ud, int row, int32_t id);
    void *ud;
} ql_generate_options;

typedef struct {
    int rows;
    int32_t **ids;   /* [rows] new tokens */
    int64_t *counts; /* [rows] */
    ql_stop *stops;  /* [rows] */
    /* Of the batch, the device synchronised at both ends: until every row has its first token, and from there
     * to the last. */
    double prefill_seconds, decode_seconds;
    int64_t prompt_tokens, decode_steps;
    int64_t decode_tokens; /* fed in the decode steps: what decode_seconds was spent on */
} ql_generated;

/* prompts: [rows] arrays of lengths[i] ids; streams: [rows] numbers that seed each row's draws, NULL: row
 * index. */
ql_status ql_generate(ql_llama *m, int rows, const int32_t *const *prompts, const int32_t *lengths,
                      const uint64_t *streams, const ql_generate_options *options,
                      ql_generated *out /* [OUT] */, ql_err *err);
void ql_generated_free(ql_generated *g);

const char *ql_stop_name(ql_stop stop); /* "length", "token", "caller", "context" */

#endif
