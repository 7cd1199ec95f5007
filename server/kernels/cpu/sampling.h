// From a row of logits to a token: the largest, or a draw with temperature, top_k, top_p and min_p. Knows no step.
#pragma once
#include "target.h"

#include <cstdint>

#include "gemm.h"

namespace loramux {

// The largest of some logits of a row, in sixteen lanes. Which lane holds the row's is asked once, at the end.
struct Peaks {
  __m512 value, nothing;  // `nothing`: the logits times zero, NaN if one is not finite
  __m512i at;             // the first column of the lane that has the value

  Peaks();
  void take(const float* x, int64_t n, int64_t column);  // x[0..n), which begin at that column
  void take(const Peaks& other);
  int64_t first_largest() const;  // the column, -1 if one of the logits is not finite

 private:
  void take(__mmask16 mask, __m512 v, __m512i columns);
};

// What a row is drawn by. `temperature` 0 is the largest; `noise` is in [0, 1). float32 [4] in memory.
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
