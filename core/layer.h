/* The weights of one transformer layer, as the backends and the loader see them. Owned by ql_weights. */
#ifndef QL_LAYER_H
#define QL_LAYER_H

#include "matrix.h"

typedef enum { QL_Q, QL_K, QL_V, QL_O, QL_GATE, QL_UP, QL_DOWN, QL_LINEARS } ql_linear;

typedef struct {
    ql_tensor input_norm, post_norm; /* F32 [hidden] */
    ql_matrix linear[QL_LINEARS];
} ql_layer;

#endif
