/* Models without weights: what a model would hold and what its passes would take, before any of it is there.
 *
 * An outline is a ql_llama whose tensors have shapes, types and an account like any other's and no memory: it
 * is made from config.json and the headers of the weights, in milliseconds, whatever the size. Sizes,
 * matrices, the arena's figures and ql_llama_expect are those that the model would have on the device.
 * Whatever would need a weight is refused. Free it by ql_llama_free; it keeps the device open.
 */
#ifndef QL_OUTLINE_H
#define QL_OUTLINE_H

#include "llama.h"

/* The model in `folder` as ql_llama_load would load it. With a `policy` also its quantized twin as
 * ql_llama_quantize would make it, but counting what the two share as its own. */
ql_status ql_outline_load(ql_device *dev, const char *folder, const ql_load_options *options,
                          ql_quant_policy policy, void *ud, ql_llama **out /* [OUT] */, ql_err *err);
/* The same of ql_llama_random. */
ql_status ql_outline_random(ql_device *dev, const ql_config *config, ql_dtype dtype, ql_quant_policy policy,
                            void *ud, ql_llama **out /* [OUT] */, ql_err *err);

#endif
