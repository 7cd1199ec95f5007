// Loop over the keys of a head, shared by the vector and AMX kernels.
#pragma once
#include "target.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "attention.h"

namespace loramux {

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Calls score(vectors, keys, next, scores) for V vectors of 16 tokens at a time, then for the remaining ones. `next`
// points to the data to prefetch, NEXT vectors further on; the first values follow the last keys.
template <int V, int NEXT, class Score>
void score_all(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, float* scores, Score score) {
  const int64_t vectors = (context + 15) / 16, each = cache.size / 16;
  const auto at = [&](int64_t v) -> const uint16_t* {
    if (v < vectors) return cache.keys(blocks[v / each], head) + v % each * cache.dim * 16;
    const int64_t behind = v - vectors;
    return cache.values(blocks[std::min(behind, vectors - 1) / each], head) + behind % each * cache.dim * 16;
  };
  const uint16_t *keys[V], *next[V];
  for (int64_t v = 0; v < vectors; v += V) {
    const int64_t some = std::min<int64_t>(V, vectors - v);
    for (int64_t i = 0; i < some; i++) keys[i] = at(v + i), next[i] = at(v + NEXT + i);
    float* to = scores + v * 16;
    switch (V - some) {
      case 0: score(std::integral_constant<int, V>(), keys, next, to); break;
      case 1: score(std::integral_constant<int, std::max(1, V - 1)>(), keys, next, to); break;
      case 2: score(std::integral_constant<int, std::max(1, V - 2)>(), keys, next, to); break;
      default: score(std::integral_constant<int, 1>(), keys, next, to);
    }
  }
}

}  // namespace loramux
