// Attention where the processor has a matrix unit (AMX), and heads are of whole 32 dims: products of queries of bf16 with keys,
// and of powers with values, as the cache's blocks have them. The unit adds up 32 dims of a key, or 16 tokens' values, as
//
//   sum + (e + o),   e = ((0 + a[0] b[0]) + a[2] b[2]) + ...,   o = ((0 + a[1] b[1]) + a[3] b[3]) + ...,
//
// each sum rounded to float32 and denormal numbers taken for zero (TDPBF16PS in Intel's manual). Of few queries vector
// instructions do the same, and wait less for memory. So what a query sees has one value, whatever is computed with it.
#pragma once
#include "target.h"

#include <cstdint>

#include "attention.h"

namespace loramux {

inline bool by_unit(const Cache& cache) { return MATRIX_UNIT && cache.dim % 32 == 0; }

// Scores [count][stride] of queries q[i] (bf16 [dim]) with the first `context` keys of a head, and with what lies behind them
// up to a multiple of 16 tokens.
void scores_by_unit(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int count,
                    const uint16_t* const* q, AttentionScratch& scratch, int64_t stride);

// out[i] [dim] = values weighted by the powers of `scratch` (in both of its forms), zero behind what a query sees, times
// inverse[i].
void weigh_by_unit(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int count,
                   const AttentionScratch& scratch, int64_t stride, const float* inverse, float* const* out,
                   const uint16_t* const* following);

}  // namespace loramux
