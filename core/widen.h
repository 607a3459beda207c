/* Stored numbers of any type as float32 or float64 on the host. */
#ifndef QL_WIDEN_H
#define QL_WIDEN_H

#include "dtype.h"

#include <stdbool.h>
#include <stddef.h>

/* True when float32 holds every value of `dtype` exactly. */
bool ql_widen_fits_f32(ql_dtype dtype);
/* dst[i] = src[i] for n elements; src need not be aligned. False for a type without a widening (8-bit
 * floats). */
bool ql_widen_f32(ql_dtype dtype, const void *src, size_t n, float *dst /* [OUT] */);
bool ql_widen_f64(ql_dtype dtype, const void *src, size_t n, double *dst /* [OUT] */);

#endif
