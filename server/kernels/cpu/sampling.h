// Sampling: from a row of logits to a token, greedy or with temperature, top_k, top_p and min_p.
#pragma once
#include "target.h"

#include <cstdint>

#include "gemm.h"

namespace loramux {

// Running maximum and argmax of a row of logits in 16 lanes.
struct RowMax {
  __m512 value, not_finite;  // not_finite: logits times zero, NaN if one is not finite
  __m512i column;            // first column with the lane's maximum

  RowMax();
  void update(const float* x, int64_t n, int64_t column);  // x[0..n) starts at `column`
  void update(const RowMax& other);
  int64_t argmax() const;  // the column, -1 if a logit is not finite

 private:
  void update(__mmask16 mask, __m512 v, __m512i columns);
};

// Sampling parameters of a row. Temperature 0 is greedy; `noise` is uniform in [0, 1). float32 [4] in memory.
struct SamplingParams {
  float temperature, top_p, min_p, noise;
};

// Scratch memory of one thread. Call `reserve` first; it throws bad_alloc.
struct SamplerScratch {
  Buffer<float> weights, peaks, values, sorted;
  Buffer<int32_t> ids;
  Buffer<double> sums, mass;
  Buffer<int64_t> count;

  void reserve(int64_t vocab);
  int64_t bytes() const;
};

// The token of a row of `vocab` logits, -1 if one is not finite. Filters apply in the order temperature, top_k, top_p,
// min_p; top_k 0 keeps all. Then the token is where the cumulative sum over ids passes `noise`. Among equal
// probabilities at a limit, lower ids are kept.
int32_t sample(const float* x, int64_t vocab, const SamplingParams& params, int32_t top_k, SamplerScratch& scratch);

}  // namespace loramux
