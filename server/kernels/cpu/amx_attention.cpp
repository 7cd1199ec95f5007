#include "amx_attention.h"

#ifdef __AMX_INT8__

#include <algorithm>

#include "simd.h"
#include "amx_tiles.h"
#include "attention_loops.h"

namespace loramux {
namespace {

constexpr int FEW_QUERIES = 4;             // queries that vector instructions handle
constexpr int64_t DIMS = 32, TOKENS = 16;  // dimensions of keys, and tokens of values, that are accumulated at a time
constexpr int64_t PREFETCH_VECTORS = 4;    // vectors of 16 tokens to prefetch

// ---- few queries: vector instructions ----------------------------------------------------

// Treats denormals as zero, like AMX, while it lives.
class FlushDenormals {
 public:
  FlushDenormals() { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
};

// Even and odd partial sums of one vector of keys or values.
struct EvenOdd {
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();

  __attribute__((always_inline)) void add(__m512i pairs, const float* by) {
    const __m512i second = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_set1_ps(by[0]), even);
    odd = _mm512_fmadd_ps(_mm512_castsi512_ps(second), _mm512_set1_ps(by[1]), odd);
  }
  __m512 all() const { return _mm512_add_ps(even, odd); }
};

// Scores of N queries with V vectors of 16 tokens, prefetching one line of `next` per line read.
template <int N, int V>
inline void score_few(const uint16_t* const* keys, const uint16_t* const* next, int64_t dim, const float* queries,
                      float* scores, int64_t stride) {
  __m512 sum[N][V];
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) sum[n][v] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += DIMS) {
    EvenOdd partial[N][V];
    for (int64_t i = d; i < d + DIMS; i += 2)
      for (int v = 0; v < V; v++) {
        const __m512i pairs = _mm512_loadu_si512(keys[v] + i * 16);
        prefetch(next[v] + i * 16);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) partial[n][v].add(pairs, queries + n * dim + i);
      }
    for (int n = 0; n < N; n++)
      for (int v = 0; v < V; v++) sum[n][v] = _mm512_add_ps(sum[n][v], partial[n][v].all());
  }
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) _mm512_storeu_ps(scores + n * stride + v * 16, sum[n][v]);
}

// ---- many queries: AMX. Tiles 0 to 3 are accumulators, 4 keys, 5 queries, 6 values, 7 probabilities ---

constexpr int SUMS = 4;

inline TileConfig config_of(int queries) {
  TileConfig config;
  for (int tile = 0; tile < SUMS; tile++) config.set(tile, queries, 64);
  config.set(4, DIMS / 2, 64);
  config.set(5, queries, DIMS * 2);
  config.set(6, TOKENS / 2, 64);
  config.set(7, queries, TOKENS * 2);
  return config;
}

template <int V>
inline void zero() {
  _tile_zero(0);
  if constexpr (V > 1) _tile_zero(1);
  if constexpr (V > 2) _tile_zero(2);
  if constexpr (V > 3) _tile_zero(3);
}

// Stores the accumulators side by side, 16 columns each, `stride` floats per row.
template <int V>
inline void store(float* to, int64_t stride) {
  const auto bytes = static_cast<size_t>(stride) * sizeof(float);
  _tile_stored(0, to, bytes);
  if constexpr (V > 1) _tile_stored(1, to + 16, bytes);
  if constexpr (V > 2) _tile_stored(2, to + 32, bytes);
  if constexpr (V > 3) _tile_stored(3, to + 48, bytes);
  compiler_barrier();
}

// As `score_few`, for up to 16 queries.
template <int V>
inline void score_many(const uint16_t* const* keys, const uint16_t* const* next, int64_t dim, const uint16_t* queries,
                       float* scores, int64_t stride) {
  zero<V>();
  for (int64_t d = 0; d < dim; d += DIMS) {
    const auto prefetch_next = [&](int v) __attribute__((always_inline)) {
      for (int64_t i = d; i < d + DIMS; i += 2) prefetch(next[v] + i * 16);
    };
    compiler_barrier();
    _tile_loadd(5, queries + d, static_cast<size_t>(dim) * 2);
    _tile_loadd(4, keys[0] + d * 16, 64);
    _tile_dpbf16ps(0, 5, 4);
    prefetch_next(0);
    if constexpr (V > 1) {
      _tile_loadd(4, keys[1] + d * 16, 64);
      _tile_dpbf16ps(1, 5, 4);
      prefetch_next(1);
    }
    if constexpr (V > 2) {
      _tile_loadd(4, keys[2] + d * 16, 64);
      _tile_dpbf16ps(2, 5, 4);
      prefetch_next(2);
    }
    if constexpr (V > 3) {
      _tile_loadd(4, keys[3] + d * 16, 64);
      _tile_dpbf16ps(3, 5, 4);
      prefetch_next(3);
    }
  }
  store<V>(scores, stride);
}

// Adds the values of 16 tokens for W vectors of 16 dimensions; `stride` values between pairs of tokens.
template <int W>
inline void add_tokens(const uint16_t* values, int64_t stride, const uint16_t* probs, int64_t stride_of_powers) {
  const auto bytes = static_cast<size_t>(stride) * 2;
  compiler_barrier();
  _tile_loadd(7, probs, static_cast<size_t>(stride_of_powers) * 2);
  _tile_loadd(6, values, bytes);
  _tile_dpbf16ps(0, 7, 6);
  if constexpr (W > 1) {
    _tile_loadd(6, values + 32, bytes);
    _tile_dpbf16ps(1, 7, 6);
  }
  if constexpr (W > 2) {
    _tile_loadd(6, values + 64, bytes);
    _tile_dpbf16ps(2, 7, 6);
  }
  if constexpr (W > 3) {
    _tile_loadd(6, values + 96, bytes);
    _tile_dpbf16ps(3, 7, 6);
  }
}

// ---- both --------------------------------------------------------------------------------

// The values for W vectors of 16 dimensions from `from` on.
template <int W>
struct Values {
  const Cache& cache;
  const int32_t* blocks;
  int64_t head, context, from;
  const uint16_t* const* next_blocks;

  int64_t pair_stride() const { return cache.dim * 2; }  // values between pairs of tokens

  // Calls add(start, values, next, pairs) for every 16 tokens; the last call may have fewer pairs.
  template <class Add>
  __attribute__((always_inline)) void for_each_16(Add add) const {
    const int64_t last = (context - 1) / cache.size;
    for (int64_t start = 0; start < context; start += TOKENS) {
      const int64_t b = start / cache.size, later = b + PREFETCH_BLOCKS,
                    within = start % cache.size / 2 * pair_stride() + from * 2;
      const uint16_t* next =
          (later <= last ? cache.values(blocks[later], head) : next_blocks[later - last - 1]) + within;
      add(start, cache.values(blocks[b], head) + within, next, (std::min(TOKENS, context - start) + 1) / 2);
    }
  }
};

template <int N, int W>
void weighted_sum_few(const Values<W>& values_of, const float* probs, int64_t stride, const float* inverse,
                      float* const* out) {
  alignas(64) __m512 sum[N][W];
  for (int n = 0; n < N; n++)
    for (int w = 0; w < W; w++) sum[n][w] = _mm512_setzero_ps();
  values_of.for_each_16([&](int64_t start, const uint16_t* values, const uint16_t* next,
                            int64_t pairs) __attribute__((always_inline)) {
    EvenOdd partial[N][W];
    for (int64_t p = 0; p < pairs; p++)
      for (int w = 0; w < W; w++) {
        const __m512i both = _mm512_loadu_si512(values + p * values_of.pair_stride() + w * 32);
        prefetch(next + p * values_of.pair_stride() + w * 32);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) partial[n][w].add(both, probs + n * stride + start + 2 * p);
      }
    for (int n = 0; n < N; n++)
      for (int w = 0; w < W; w++) sum[n][w] = _mm512_add_ps(sum[n][w], partial[n][w].all());
  });
  for (int n = 0; n < N; n++)
    for (int w = 0; w < W; w++)
      _mm512_storeu_ps(out[n] + values_of.from + w * 16, _mm512_mul_ps(sum[n][w], _mm512_set1_ps(inverse[n])));
}

template <int W>
void weighted_sum_many(const Values<W>& values_of, int count, const uint16_t* probs, int64_t stride,
                       const float* inverse, float* const* out) {
  alignas(64) uint16_t end[TOKENS / 2 * W * 32];
  alignas(64) float sums[QUERIES * W * 16];
  zero<W>();
  values_of.for_each_16([&](int64_t start, const uint16_t* values, const uint16_t* next,
                            int64_t pairs) __attribute__((always_inline)) {
    for (int64_t p = 0; p < pairs; p++)
      for (int w = 0; w < W; w++) prefetch(next + p * values_of.pair_stride() + w * 32);
    if (pairs == TOKENS / 2) return add_tokens<W>(values, values_of.pair_stride(), probs + start, stride);
    // Memory after the last token may hold anything, even NaN.
    for (int64_t p = 0; p < TOKENS / 2; p++)
      for (int w = 0; w < W; w++)
        _mm512_store_si512(
            end + (p * W + w) * 32,
            p < pairs ? _mm512_loadu_si512(values + p * values_of.pair_stride() + w * 32) : _mm512_setzero_si512());
    add_tokens<W>(end, W * 32, probs + start, stride);
  });
  store<W>(sums, W * 16);
  for (int n = 0; n < count; n++)
    for (int w = 0; w < W; w++)
      _mm512_storeu_ps(out[n] + values_of.from + w * 16,
                       _mm512_mul_ps(_mm512_load_ps(sums + (n * W + w) * 16), _mm512_set1_ps(inverse[n])));
}

template <int W>
void weighted_sum(const Values<W>& values_of, int count, const AttentionScratch& scratch, int64_t stride,
                  const float* inverse, float* const* out) {
  const float* probs = scratch.scores.get();
  if (count > FEW_QUERIES) return weighted_sum_many(values_of, count, scratch.probs.get(), stride, inverse, out);
  dispatch<FEW_QUERIES>(count,
                        [&](auto queries) { weighted_sum_few<queries>(values_of, probs, stride, inverse, out); });
}

template <int N>
void scores_of_few(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, const uint16_t* const* q,
                   AttentionScratch& scratch, int64_t stride) {
  float* queries = scratch.floats.get();
  for (int n = 0; n < N; n++)
    for (int64_t d = 0; d < cache.dim; d += 16)
      _mm512_storeu_ps(queries + n * cache.dim + d,
                       bf16_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(q[n] + d))));
  constexpr int V = N <= 3 ? 4 : 2;
  float* scores = scratch.scores.get();
  score_all<V, PREFETCH_VECTORS>(cache, blocks, head, context, scores, [&](auto v, auto* keys, auto* next, float* to) {
    score_few<N, decltype(v)::value>(keys, next, cache.dim, queries, to, stride);
  });
}

}  // namespace

void scores_amx(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int count,
                const uint16_t* const* q, AttentionScratch& scratch, int64_t stride) {
  if (count <= FEW_QUERIES) {
    const FlushDenormals mode;
    return dispatch<FEW_QUERIES>(
        count, [&](auto queries) { scores_of_few<queries>(cache, blocks, head, context, q, scratch, stride); });
  }
  uint16_t* queries = scratch.queries.get();
  for (int n = 0; n < count; n++)
    for (int64_t d = 0; d < cache.dim; d += DIMS)
      _mm512_storeu_si512(queries + n * cache.dim + d, _mm512_loadu_si512(q[n] + d));
  configure_tiles(config_of(count));
  float* scores = scratch.scores.get();
  score_all<SUMS, PREFETCH_VECTORS>(cache, blocks, head, context, scores,
                                    [&](auto v, auto* keys, auto* next, float* to) {
                                      score_many<decltype(v)::value>(keys, next, cache.dim, queries, to, stride);
                                    });
}

void weighted_sums_amx(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int count,
                       const AttentionScratch& scratch, int64_t stride, const float* inverse, float* const* out,
                       const uint16_t* const* next_blocks) {
  const FlushDenormals mode;
  if (count > FEW_QUERIES) configure_tiles(config_of(count));
  int64_t from = 0;
  for (; from + 64 <= cache.dim; from += 64)
    weighted_sum(Values<4>{cache, blocks, head, context, from, next_blocks}, count, scratch, stride, inverse, out);
  if (from < cache.dim)
    weighted_sum(Values<2>{cache, blocks, head, context, from, next_blocks}, count, scratch, stride, inverse, out);
}

}  // namespace loramux

#endif
