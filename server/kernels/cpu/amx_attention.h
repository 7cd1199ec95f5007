// Attention with AMX, for head sizes that are multiples of 32. TDPBF16PS accumulates 32 dimensions of a key, or the
// values of 16 tokens, as
//
//   sum + (e + o),   e = ((0 + a[0] b[0]) + a[2] b[2]) + ...,   o = ((0 + a[1] b[1]) + a[3] b[3]) + ...,
//
// where each sum is rounded to float32 and denormals count as zero. For few queries, vector instructions compute the
// same value with less latency, so a query's result does not depend on the batch.
#pragma once
#include "target.h"

#include <cstdint>

#include "attention.h"

namespace loramux {

inline bool uses_amx_attention(const Cache& cache) { return HAS_AMX && cache.dim % 32 == 0; }

// Scores [count][stride] of queries q[i] (bf16 [dim]) with the first `context` keys of a head. Keys after these, up to
// a multiple of 16 tokens, give unspecified scores.
void scores_amx(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int count,
                const uint16_t* const* q, AttentionScratch& scratch, int64_t stride);

// out[i] [dim] = sum of the values weighted by `scratch` (probs, in both formats; zero after a query's last token),
// times inverse[i].
void weighted_sums_amx(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int count,
                       const AttentionScratch& scratch, int64_t stride, const float* inverse, float* const* out,
                       const uint16_t* const* next_blocks);

}  // namespace loramux
