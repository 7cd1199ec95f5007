// From a row of logits to a token: the largest, or a draw with temperature, top_k, top_p and min_p. Knows no step.
#pragma once
#include "target.h"

#include <cstdint>

#include "gemm.h"

namespace loramux {

// What a row is drawn by. `temperature` 0 is the largest; `noise` is in [0, 1]. float32 [4] in memory.
struct Drawing {
  float temperature, top_p, min_p, noise;
};

// What one thread draws with; `reserve` comes first. Throws bad_alloc.
struct DrawScratch {
  Buffer<float> weights, peaks, values, few;
  Buffer<int32_t> ids;
  Buffer<double> sums, mass;
  Buffer<int64_t> count;

  void reserve(int64_t vocab);
  int64_t bytes() const;
};

// The token of a row of `vocab` logits, -1 if one is not finite. With top_k 0 all tokens are candidates. The order is
// temperature, top_k, top_p, min_p, and then the noise against the candidates' sum over ids, ascending; among equals
// the lower ids stay.
int32_t draw(const float* x, int64_t vocab, const Drawing& how, int32_t top_k, DrawScratch& scratch);

}  // namespace loramux
