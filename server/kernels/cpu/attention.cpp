#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "amx_attention.h"
#include "simd.h"
#include "attention_loops.h"

namespace loramux {
namespace {

// Scores of N queries with V vectors of 16 tokens, prefetching one line of each of `next` per line read.
template <int N, int V>
inline void score_tile(const uint16_t* const* keys, const uint16_t* const* next, int64_t dim, const uint16_t* const* q,
                       float* scores, int64_t stride) {
  __m512 sum[N][V];
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) sum[n][v] = _mm512_setzero_ps();
  for (int64_t p = 0; p < dim / 2; p++) {
    __m512i k[V];
    for (int v = 0; v < V; v++) {
      k[v] = _mm512_loadu_si512(keys[v] + p * 32);
      prefetch(next[v] + p * 32);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      const __m512i a = broadcast32(q[n] + 2 * p);
      for (int v = 0; v < V; v++) sum[n][v] = dot_bf16(sum[n][v], k[v], a);
    }
  }
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) _mm512_storeu_ps(scores + n * stride + v * 16, sum[n][v]);
}

// Unnormalized softmax: exp((s - max) scale) of N queries as bf16, zero after a query's last token; with AMX also as
// float in place of the scores. `inverse` are the reciprocal sums. N queries at once hide the latency of the
// reductions.
template <int N>
void softmax(float* scores, const int64_t* position, float scale, int64_t stride, uint16_t* probs, float* inverse) {
  const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 peak[N], sum[N];
  for (int n = 0; n < N; n++) peak[n] = least, sum[n] = _mm512_setzero_ps();
  for (int64_t i = 0; i < stride; i += 16)
    for (int n = 0; n < N; n++)
      peak[n] = _mm512_max_ps(peak[n],
                              _mm512_mask_loadu_ps(least, first_lanes(position[n] + 1 - i), scores + n * stride + i));
  const __m512 factor = _mm512_set1_ps(scale);
  for (int n = 0; n < N; n++) peak[n] = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(peak[n])), factor);
  for (int64_t i = 0; i < stride; i += 16)
    for (int n = 0; n < N; n++) {
      const __mmask16 mask = first_lanes(position[n] + 1 - i);
      const __m512 s = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, scores + n * stride + i), factor);
      const __m512 e = exp_ps(_mm512_sub_ps(s, peak[n]));
      const __m256i h = float_to_bf16(_mm512_maskz_mov_ps(mask, e));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(probs + n * stride + i), h);
      const __m512 stored = bf16_to_float(h);
      if constexpr (HAS_AMX) _mm512_storeu_ps(scores + n * stride + i, stored);
      sum[n] = _mm512_add_ps(sum[n], stored);
    }
  for (int n = 0; n < N; n++) inverse[n] = 1.0f / _mm512_reduce_add_ps(sum[n]);
}

// Weighted sums of the values for N queries and W vectors of 16 dimensions from `from` on.
template <int N, int W>
void weighted_sum(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int64_t from,
                  const uint16_t* probs, int64_t stride, const float* inverse, float* const* out,
                  const uint16_t* const* next_blocks) {
  const int64_t padded = cache.padded(), last = (context - 1) / cache.size;
  __m512 sum[N][W];
  for (int n = 0; n < N; n++)
    for (int w = 0; w < W; w++) sum[n][w] = _mm512_setzero_ps();
  for (int64_t start = 0, b = 0; start < context; start += cache.size, b++) {
    const uint16_t* values = cache.values(blocks[b], head) + from * 2;
    const int64_t later = b + PREFETCH_BLOCKS;
    const uint16_t* next = later <= last ? cache.values(blocks[later], head) : next_blocks[later - last - 1];
    next += from * 2;
    const int64_t pairs = (std::min(cache.size, context - start) + 1) / 2;
    for (int64_t p = 0; p < pairs; p++) {
      __m512i v[W];
      for (int w = 0; w < W; w++) {
        v[w] = _mm512_loadu_si512(values + p * padded * 2 + w * 32);
        prefetch(next + p * padded * 2 + w * 32);
      }
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const __m512i a = broadcast32(probs + n * stride + start + 2 * p);
        for (int w = 0; w < W; w++) sum[n][w] = dot_bf16(sum[n][w], v[w], a);
      }
    }
  }
  for (int n = 0; n < N; n++)
    for (int w = 0; w < W; w++)
      _mm512_mask_storeu_ps(out[n] + from + w * 16, first_lanes(cache.dim - from - w * 16),
                            _mm512_mul_ps(sum[n][w], _mm512_set1_ps(inverse[n])));
}

// Weighted sums for N queries, 64 dimensions at a time.
template <int N>
void weighted_sums(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, const uint16_t* probs,
                   int64_t stride, const float* inverse, float* const* out, const uint16_t* const* next_blocks) {
  int64_t from = 0;
  for (; from + 64 <= cache.padded(); from += 64)
    weighted_sum<N, 4>(cache, blocks, head, context, from, probs, stride, inverse, out, next_blocks);
  for (; from < cache.padded(); from += 16)
    weighted_sum<N, 1>(cache, blocks, head, context, from, probs, stride, inverse, out, next_blocks);
}

template <int N>
void scores_for(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, const uint16_t* const* q,
                float* scores, int64_t stride) {
  constexpr int V = N <= 4 ? 4 : 2;  // enough accumulators to hide latency
  score_all<V, V>(cache, blocks, head, context, scores, [&](auto v, auto* now, auto* next, float* to) {
    score_tile<N, decltype(v)::value>(now, next, cache.dim, q, to, stride);
  });
}

// The scores of all queries. Keys after the last one, up to a multiple of 16 tokens, give unspecified scores.
void all_scores(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int count,
                const uint16_t* const* q, AttentionScratch& scratch, int64_t stride) {
  if constexpr (HAS_AMX) {
    if (uses_amx_attention(cache)) return scores_amx(cache, blocks, head, context, count, q, scratch, stride);
  }
  for (int n = 0; n < count; n += 8) {
    float* s = scratch.scores.get() + n * stride;
    dispatch<8>(count - n, [&](auto queries) { scores_for<queries>(cache, blocks, head, context, q + n, s, stride); });
  }
}

// The weighted sums of all queries.
void all_weighted_sums(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int count,
                       const AttentionScratch& scratch, int64_t stride, const float* inverse, float* const* out,
                       const uint16_t* const* next_blocks) {
  if constexpr (HAS_AMX) {
    if (uses_amx_attention(cache))
      return weighted_sums_amx(cache, blocks, head, context, count, scratch, stride, inverse, out, next_blocks);
  }
  for (int n = 0; n < count; n += 4) {
    const uint16_t* p = scratch.probs.get() + n * stride;
    const float* i = inverse + n;
    dispatch<4>(count - n, [&](auto queries) {
      weighted_sums<queries>(cache, blocks, head, context, p, stride, i, out + n, next_blocks);
    });
  }
}

}  // namespace

void write_token(const Cache& cache, int64_t block, int64_t head, int64_t offset, const float* key, const float* value,
                 bool last) {
  const int64_t padded = cache.padded();
  uint32_t pairs[16];
  auto* k = reinterpret_cast<uint32_t*>(cache.keys(block, head) + offset / 16 * cache.dim * 16) + offset % 16;
  for (int64_t d = 0; d < cache.dim; d += 32) {
    const __m512 a = _mm512_maskz_loadu_ps(first_lanes(cache.dim - d), key + d);
    const __m512 b = _mm512_maskz_loadu_ps(first_lanes(cache.dim - d - 16), key + d + 16);
    _mm512_storeu_si512(pairs, float_to_bf16(a, b));
    for (int64_t p = 0; p < std::min<int64_t>(16, (cache.dim - d) / 2); p++) k[(d / 2 + p) * 16] = pairs[p];
  }
  // Writes only this token's half of the pair, unless nothing else will write the other half.
  const bool first = offset % 2 == 0;
  uint16_t* v = cache.values(block, head) + offset / 2 * padded * 2;
  for (int64_t d = 0; d < padded; d += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(first_lanes(cache.dim - d), value + d);
    const __m512i half = _mm512_cvtepu16_epi32(float_to_bf16(x));
    if (first && last)
      _mm512_storeu_si512(v + d * 2, half);
    else
      _mm512_mask_storeu_epi16(v + d * 2, first ? 0x55555555u : 0xaaaaaaaau,
                               first ? half : _mm512_slli_epi32(half, 16));
  }
}

void attend(const Cache& cache, const int32_t* blocks, int64_t head, int count, const uint16_t* const* q,
            const int64_t* position, float scale, AttentionScratch& scratch, float* const* out,
            const uint16_t* const* next_blocks) {
  const int64_t context = *std::max_element(position, position + count) + 1;
  const int64_t stride = (context + 31) / 32 * 32;
  float inverse[QUERIES];
  all_scores(cache, blocks, head, context, count, q, scratch, stride);
  for (int n = 0; n < count; n += 4) {
    float* s = scratch.scores.get() + n * stride;
    uint16_t* p = scratch.probs.get() + n * stride;
    dispatch<4>(count - n, [&](auto queries) { softmax<queries>(s, position + n, scale, stride, p, inverse + n); });
  }
  all_weighted_sums(cache, blocks, head, context, count, scratch, stride, inverse, out, next_blocks);
}

}  // namespace loramux
