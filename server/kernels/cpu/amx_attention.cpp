#include "amx_attention.h"

#ifdef __AMX_INT8__

#include <algorithm>

#include "simd.h"
#include "tiles.h"
#include "attention_loops.h"

namespace loramux {
namespace {

constexpr int FEW = 4;                     // queries that are vector instructions'
constexpr int64_t DIMS = 32, TOKENS = 16;  // that are added up at a time: of keys, and of values
constexpr int64_t NEXT = 4;                // vectors of 16 tokens that are asked for before they are read

// ---- few queries, by vector instructions ------------------------------------------------------------------------------

// The unit's way with denormal numbers, for as long as this lives.
class WithoutDenormals {
 public:
  WithoutDenormals() { _mm_setcsr(before_ | 0x8040); }
  ~WithoutDenormals() { _mm_setcsr(before_); }
  WithoutDenormals(const WithoutDenormals&) = delete;
  WithoutDenormals& operator=(const WithoutDenormals&) = delete;

 private:
  const unsigned before_ = _mm_getcsr();
};

// What is added up of one vector of keys or values.
struct Halves {
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();

  __attribute__((always_inline)) void add(__m512i pairs, const float* by) {
    const __m512i second = _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), _mm512_set1_ps(by[0]), even);
    odd = _mm512_fmadd_ps(_mm512_castsi512_ps(second), _mm512_set1_ps(by[1]), odd);
  }
  __m512 all() const { return _mm512_add_ps(even, odd); }
};

// Scores of N queries with V vectors of 16 tokens. A line of what comes `next` is asked for with every one that is read.
template <int N, int V>
inline void score_few(const uint16_t* const* keys, const uint16_t* const* next, int64_t dim, const float* queries,
                      float* scores, int64_t stride) {
  __m512 sum[N][V];
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) sum[n][v] = _mm512_setzero_ps();
  for (int64_t d = 0; d < dim; d += DIMS) {
    Halves halves[N][V];
    for (int64_t i = d; i < d + DIMS; i += 2)
      for (int v = 0; v < V; v++) {
        const __m512i pairs = _mm512_loadu_si512(keys[v] + i * 16);
        prefetch(next[v] + i * 16);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) halves[n][v].add(pairs, queries + n * dim + i);
      }
    for (int n = 0; n < N; n++)
      for (int v = 0; v < V; v++) sum[n][v] = _mm512_add_ps(sum[n][v], halves[n][v].all());
  }
  for (int n = 0; n < N; n++)
    for (int v = 0; v < V; v++) _mm512_storeu_ps(scores + n * stride + v * 16, sum[n][v]);
}

// ---- many, by tiles: 0 to 3 are sums, 4 keys, 5 queries, 6 values, 7 powers -------------------------------------------

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

// Stores the sums side by side, 16 columns each; `stride` floats from a row to the next.
template <int V>
inline void store(float* to, int64_t stride) {
  const auto bytes = static_cast<size_t>(stride) * sizeof(float);
  _tile_stored(0, to, bytes);
  if constexpr (V > 1) _tile_stored(1, to + 16, bytes);
  if constexpr (V > 2) _tile_stored(2, to + 32, bytes);
  if constexpr (V > 3) _tile_stored(3, to + 48, bytes);
  written();
}

// As `score_few`, of as many queries as tiles have rows.
template <int V>
inline void score_many(const uint16_t* const* keys, const uint16_t* const* next, int64_t dim, const uint16_t* queries,
                       float* scores, int64_t stride) {
  zero<V>();
  for (int64_t d = 0; d < dim; d += DIMS) {
    const auto ask = [&](int v) __attribute__((always_inline)) {
      for (int64_t i = d; i < d + DIMS; i += 2) prefetch(next[v] + i * 16);
    };
    written();
    _tile_loadd(5, queries + d, static_cast<size_t>(dim) * 2);
    _tile_loadd(4, keys[0] + d * 16, 64);
    _tile_dpbf16ps(0, 5, 4);
    ask(0);
    if constexpr (V > 1) {
      _tile_loadd(4, keys[1] + d * 16, 64);
      _tile_dpbf16ps(1, 5, 4);
      ask(1);
    }
    if constexpr (V > 2) {
      _tile_loadd(4, keys[2] + d * 16, 64);
      _tile_dpbf16ps(2, 5, 4);
      ask(2);
    }
    if constexpr (V > 3) {
      _tile_loadd(4, keys[3] + d * 16, 64);
      _tile_dpbf16ps(3, 5, 4);
      ask(3);
    }
  }
  store<V>(scores, stride);
}

// Adds 16 tokens' values of W vectors of 16 dims; `stride` halves from a pair of tokens to the next.
template <int W>
inline void add_tokens(const uint16_t* values, int64_t stride, const uint16_t* powers, int64_t stride_of_powers) {
  const auto bytes = static_cast<size_t>(stride) * 2;
  written();
  _tile_loadd(7, powers, static_cast<size_t>(stride_of_powers) * 2);
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

// ---- both ---------------------------------------------------------------------------------------------------------------

// What weighs W vectors of 16 dims from `from` on.
template <int W>
struct Values {
  const Cache& cache;
  const int32_t* blocks;
  int64_t head, context, from;
  const uint16_t* const* following;

  int64_t wide() const { return cache.dim * 2; }  // halves from a pair of tokens to the next

  // Calls add(start, values, next, pairs) for every 16 tokens, of which there may be fewer at the end.
  template <class Add>
  __attribute__((always_inline)) void walk(Add add) const {
    const int64_t last = (context - 1) / cache.size;
    for (int64_t start = 0; start < context; start += TOKENS) {
      const int64_t b = start / cache.size, later = b + AHEAD, within = start % cache.size / 2 * wide() + from * 2;
      const uint16_t* next = (later <= last ? cache.values(blocks[later], head) : following[later - last - 1]) + within;
      add(start, cache.values(blocks[b], head) + within, next, (std::min(TOKENS, context - start) + 1) / 2);
    }
  }
};

template <int N, int W>
void weigh_few(const Values<W>& of, const float* powers, int64_t stride, const float* inverse, float* const* out) {
  alignas(64) __m512 sum[N][W];
  for (int n = 0; n < N; n++)
    for (int w = 0; w < W; w++) sum[n][w] = _mm512_setzero_ps();
  of.walk([&](int64_t start, const uint16_t* values, const uint16_t* next, int64_t pairs) __attribute__((always_inline)) {
    Halves halves[N][W];
    for (int64_t p = 0; p < pairs; p++)
      for (int w = 0; w < W; w++) {
        const __m512i both = _mm512_loadu_si512(values + p * of.wide() + w * 32);
        prefetch(next + p * of.wide() + w * 32);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) halves[n][w].add(both, powers + n * stride + start + 2 * p);
      }
    for (int n = 0; n < N; n++)
      for (int w = 0; w < W; w++) sum[n][w] = _mm512_add_ps(sum[n][w], halves[n][w].all());
  });
  for (int n = 0; n < N; n++)
    for (int w = 0; w < W; w++)
      _mm512_storeu_ps(out[n] + of.from + w * 16, _mm512_mul_ps(sum[n][w], _mm512_set1_ps(inverse[n])));
}

template <int W>
void weigh_many(const Values<W>& of, int count, const uint16_t* powers, int64_t stride, const float* inverse,
                float* const* out) {
  alignas(64) uint16_t end[TOKENS / 2 * W * 32];
  alignas(64) float sums[QUERIES * W * 16];
  zero<W>();
  of.walk([&](int64_t start, const uint16_t* values, const uint16_t* next, int64_t pairs) __attribute__((always_inline)) {
    for (int64_t p = 0; p < pairs; p++)
      for (int w = 0; w < W; w++) prefetch(next + p * of.wide() + w * 32);
    if (pairs == TOKENS / 2) return add_tokens<W>(values, of.wide(), powers + start, stride);
    // Behind the last token lies what somebody has left there, numbers or not.
    for (int64_t p = 0; p < TOKENS / 2; p++)
      for (int w = 0; w < W; w++)
        _mm512_store_si512(end + (p * W + w) * 32,
                           p < pairs ? _mm512_loadu_si512(values + p * of.wide() + w * 32) : _mm512_setzero_si512());
    add_tokens<W>(end, W * 32, powers + start, stride);
  });
  store<W>(sums, W * 16);
  for (int n = 0; n < count; n++)
    for (int w = 0; w < W; w++)
      _mm512_storeu_ps(out[n] + of.from + w * 16,
                       _mm512_mul_ps(_mm512_load_ps(sums + (n * W + w) * 16), _mm512_set1_ps(inverse[n])));
}

template <int W>
void weigh(const Values<W>& of, int count, const AttentionScratch& scratch, int64_t stride, const float* inverse,
           float* const* out) {
  const float* powers = scratch.scores.get();
  switch (count) {
    case 1: return weigh_few<1>(of, powers, stride, inverse, out);
    case 2: return weigh_few<2>(of, powers, stride, inverse, out);
    case 3: return weigh_few<3>(of, powers, stride, inverse, out);
    case 4: return weigh_few<4>(of, powers, stride, inverse, out);
    default: weigh_many(of, count, scratch.powers.get(), stride, inverse, out);
  }
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
  score_all<V, NEXT>(cache, blocks, head, context, scores, [&](auto v, auto* keys, auto* next, float* to) {
    score_few<N, decltype(v)::value>(keys, next, cache.dim, queries, to, stride);
  });
}

}  // namespace

void scores_by_unit(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int count,
                    const uint16_t* const* q, AttentionScratch& scratch, int64_t stride) {
  if (count <= FEW) {
    const WithoutDenormals mode;
    switch (count) {
      case 1: return scores_of_few<1>(cache, blocks, head, context, q, scratch, stride);
      case 2: return scores_of_few<2>(cache, blocks, head, context, q, scratch, stride);
      case 3: return scores_of_few<3>(cache, blocks, head, context, q, scratch, stride);
      default: return scores_of_few<4>(cache, blocks, head, context, q, scratch, stride);
    }
  }
  uint16_t* queries = scratch.queries.get();
  for (int n = 0; n < count; n++)
    for (int64_t d = 0; d < cache.dim; d += DIMS)
      _mm512_storeu_si512(queries + n * cache.dim + d, _mm512_loadu_si512(q[n] + d));
  configure(config_of(count));
  float* scores = scratch.scores.get();
  score_all<SUMS, NEXT>(cache, blocks, head, context, scores, [&](auto v, auto* keys, auto* next, float* to) {
    score_many<decltype(v)::value>(keys, next, cache.dim, queries, to, stride);
  });
}

void weigh_by_unit(const Cache& cache, const int32_t* blocks, int64_t head, int64_t context, int count,
                   const AttentionScratch& scratch, int64_t stride, const float* inverse, float* const* out,
                   const uint16_t* const* following) {
  const WithoutDenormals mode;
  if (count > FEW) configure(config_of(count));
  int64_t from = 0;
  for (; from + 64 <= cache.dim; from += 64)
    weigh(Values<4>{cache, blocks, head, context, from, following}, count, scratch, stride, inverse, out);
  if (from < cache.dim)
    weigh(Values<2>{cache, blocks, head, context, from, following}, count, scratch, stride, inverse, out);
}

}  // namespace loramux

#endif
