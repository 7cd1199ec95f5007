#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "simd.h"

namespace loramux {
namespace {

constexpr int64_t STRETCH = 256;  // ids whose weights are summed before the sums are
constexpr int64_t PIECE = 64;     // ids of whose weights the largest is known

int64_t stretches(int64_t vocab) { return (vocab + STRETCH - 1) / STRETCH; }

// As numbers the bits of weights are in their order. The upper ones are a weight's bin, 16 to each doubling up to 1.
constexpr int SHIFT = 19;
constexpr int64_t BINS = (0x3f800000 >> SHIFT) + 1;

int64_t bin_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return std::min<int64_t>(bits >> SHIFT, BINS - 1);
}

// exp((x - top) / temperature), its largest by pieces and its sums by stretches; zeros behind the last id.
void weigh(const float* x, int64_t vocab, float top, float temperature, DrawScratch& s) {
  const __m512 from = _mm512_set1_ps(top), by = _mm512_set1_ps(temperature), least = _mm512_set1_ps(-104.0f);
  for (int64_t stretch = 0; stretch < stretches(vocab); stretch++) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t piece = stretch * STRETCH; piece < (stretch + 1) * STRETCH; piece += PIECE) {
      __m512 most = _mm512_setzero_ps();
      for (int64_t i = piece; i < piece + PIECE; i += 16) {
        const __mmask16 mask = first_lanes(vocab - i);
        // Of a temperature that is very low minus infinity, of which nothing is left.
        const __m512 at = _mm512_div_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), from), by);
        const __mmask16 some = _mm512_mask_cmp_ps_mask(mask, at, least, _CMP_GE_OQ);
        const __m512 w = _mm512_maskz_mov_ps(some, exp_ps(at));
        _mm512_storeu_ps(s.weights.get() + i, w);
        most = _mm512_max_ps(most, w);
        sum = _mm512_add_ps(sum, w);
      }
      s.peaks.get()[piece / PIECE] = _mm512_reduce_max_ps(most);
    }
    s.sums.get()[stretch] = static_cast<double>(_mm512_reduce_add_ps(sum));
  }
}

// The id at which the sums of all weights pass their `noise`th part.
int32_t draw_of_all(int64_t vocab, double noise, const DrawScratch& s) {
  const float* w = s.weights.get();
  const double* sums = s.sums.get();
  const int64_t count = stretches(vocab);
  double total = 0;
  for (int64_t i = 0; i < count; i++) total += sums[i];
  const double goal = noise * total;
  double before = 0;
  int64_t stretch = 0;
  while (stretch + 1 < count && before + sums[stretch] <= goal) before += sums[stretch++];
  int64_t chance = 0;  // the last id that has one
  for (int64_t i = stretch * STRETCH; i < std::min(vocab, (stretch + 1) * STRETCH); i++) {
    if (w[i] == 0) continue;
    chance = i;
    before += w[i];
    if (before > goal) return static_cast<int32_t>(i);
  }
  // Rounding: nothing passed it.
  for (int64_t i = (stretch + 1) * STRETCH - 1; w[chance] == 0 && i >= 0; i--)
    if (w[i] != 0) chance = i;
  return static_cast<int32_t>(chance);
}

// Where a walk over candidates from the largest down ends: how many it has passed, the last one, and their sum.
struct Walk {
  int64_t count = 0;
  float least = 0;
  double mass = 0;
};

// Until `most` candidates are passed or their sum is at least `goal`.
Walk descend(const DrawScratch& s, int64_t candidates, int64_t most, double goal) {
  const float* values = s.values.get();
  float* few = s.few.get();
  Walk walk;
  for (int64_t bin = BINS - 1; bin >= 0; bin--) {
    const int64_t here = s.count.get()[bin];
    if (here == 0) continue;
    if (walk.count + here < most && walk.mass + s.mass.get()[bin] < goal) {
      walk.count += here;
      walk.mass += s.mass.get()[bin];
      continue;
    }
    int64_t n = 0;
    for (int64_t i = 0; i < candidates && n < here; i++)
      if (bin_of(values[i]) == bin) few[n++] = values[i];
    std::sort(few, few + n, std::greater<float>());
    for (int64_t i = 0; i < n; i++) {
      walk.count++;
      walk.mass += few[i];
      walk.least = few[i];
      if (walk.count == most || walk.mass >= goal) return walk;
    }
  }
  return walk;
}

// What no candidate is below.
float floor_of(int64_t vocab, const Drawing& how, int64_t top_k, double total, DrawScratch& s) {
  if (top_k > 0) {
    // As many pieces have a weight of at least the k-th largest of their peaks.
    const int64_t pieces = stretches(vocab) * (STRETCH / PIECE);
    if (top_k > pieces) return 0;
    float* few = s.few.get();
    std::copy_n(s.peaks.get(), pieces, few);
    std::nth_element(few, few + top_k - 1, few + pieces, std::greater<float>());
    return few[top_k - 1];
  }
  if (how.top_p >= 1.0f) return how.min_p;
  // What is below it adds up to less than what top_p leaves out.
  return static_cast<float>((1.0 - static_cast<double>(how.top_p)) * total / static_cast<double>(vocab) * 0.999);
}

int32_t draw_of_some(int64_t vocab, const Drawing& how, int64_t top_k, DrawScratch& s) {
  double total = 0;
  for (int64_t i = 0; i < stretches(vocab); i++) total += s.sums.get()[i];
  const __m512 floor = _mm512_set1_ps(floor_of(vocab, how, top_k, total, s));
  float* values = s.values.get();
  int32_t* ids = s.ids.get();
  int64_t n = 0;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < vocab; i += 16) {
    const __m512 w = _mm512_loadu_ps(s.weights.get() + i);
    const __mmask16 mask = _mm512_mask_cmp_ps_mask(first_lanes(vocab - i), w, floor, _CMP_GE_OQ);
    if (mask == 0) continue;
    // Compressed in registers: to memory it is many times slower.
    _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(mask, w));
    const __m512i at = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(i)));
    _mm512_storeu_si512(ids + n, _mm512_maskz_compress_epi32(mask, at));
    n += __builtin_popcount(mask);
  }

  int64_t count = n;
  float bound = how.min_p, least = 0;
  if (top_k > 0 || how.top_p < 1.0f) {
    std::fill_n(s.mass.get(), BINS, 0.0);
    std::fill_n(s.count.get(), BINS, int64_t{0});
    for (int64_t i = 0; i < n; i++) {
      const int64_t bin = bin_of(values[i]);
      s.mass.get()[bin] += values[i];
      s.count.get()[bin]++;
    }
    constexpr double NEVER = std::numeric_limits<double>::infinity();
    Walk walk;
    if (top_k > 0) walk = descend(s, n, std::min(top_k, n), NEVER), total = walk.mass;
    if (how.top_p < 1.0f) walk = descend(s, n, top_k > 0 ? walk.count : n, static_cast<double>(how.top_p) * total);
    count = walk.count;
    least = walk.least;
    bound = std::max(bound, least);
  }

  // Of those that equal the least only the first are kept.
  int64_t kept = 0, equal = 0;
  double sum = 0;
  for (int64_t i = 0; i < n; i++)
    if (values[i] >= bound) kept++, equal += values[i] == least;
  int64_t stay = equal - std::max<int64_t>(0, kept - count);
  kept = 0;
  for (int64_t i = 0; i < n; i++) {
    if (values[i] < bound || (values[i] == least && stay-- <= 0)) continue;
    sum += values[i];
    values[kept] = values[i];
    ids[kept++] = ids[i];
  }
  const double goal = static_cast<double>(how.noise) * sum;
  double passed = 0;
  for (int64_t i = 0; i + 1 < kept; i++) {
    passed += values[i];
    if (passed > goal) return ids[i];
  }
  return ids[kept - 1];
}

}  // namespace

Peaks::Peaks()
    : value(_mm512_set1_ps(-INFINITY)), nothing(_mm512_setzero_ps()), at(_mm512_set1_epi32(INT32_MAX)) {}

inline void Peaks::take(__mmask16 mask, __m512 v, __m512i columns) {
  const __mmask16 same = _mm512_mask_cmp_ps_mask(mask, v, value, _CMP_EQ_OQ);
  const __mmask16 better = _mm512_mask_cmp_ps_mask(mask, v, value, _CMP_GT_OQ) |
                           _mm512_mask_cmplt_epi32_mask(same, columns, at);
  value = _mm512_mask_mov_ps(value, better, v);
  at = _mm512_mask_mov_epi32(at, better, columns);
}

void Peaks::take(const float* x, int64_t n, int64_t column) {
  Peaks now = *this;  // in registers
  __m512i columns = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                     _mm512_set1_epi32(static_cast<int32_t>(column)));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_lanes(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    now.nothing = _mm512_fmadd_ps(v, _mm512_setzero_ps(), now.nothing);
    now.take(mask, v, columns);
    columns = _mm512_add_epi32(columns, _mm512_set1_epi32(16));
  }
  *this = now;
}

void Peaks::take(const Peaks& other) {
  nothing = _mm512_add_ps(nothing, other.nothing);
  take(0xffff, other.value, other.at);
}

int64_t Peaks::first_largest() const {
  if (std::isnan(_mm512_reduce_add_ps(nothing))) return -1;
  const __mmask16 largest = _mm512_cmp_ps_mask(value, _mm512_set1_ps(_mm512_reduce_max_ps(value)), _CMP_EQ_OQ);
  return _mm512_mask_reduce_min_epi32(largest, at);
}

void DrawScratch::reserve(int64_t vocab) {
  const int64_t whole = stretches(vocab) * STRETCH;
  weights.reserve(whole);
  peaks.reserve(whole / PIECE);
  values.reserve(whole + 16);
  few.reserve(whole + 16);
  ids.reserve(whole + 16);
  sums.reserve(whole / STRETCH);
  mass.reserve(BINS);
  count.reserve(BINS);
}

int64_t DrawScratch::bytes() const {
  return weights.bytes() + peaks.bytes() + values.bytes() + few.bytes() + ids.bytes() + sums.bytes() + mass.bytes() +
         count.bytes();
}

int32_t draw(const float* x, int64_t vocab, const Drawing& how, int32_t top_k, DrawScratch& scratch) {
  Peaks peaks;
  peaks.take(x, vocab, 0);
  const int64_t best = peaks.first_largest();
  if (best < 0 || how.temperature <= 0) return static_cast<int32_t>(best);
  weigh(x, vocab, x[best], how.temperature, scratch);
  const int64_t limit = top_k > 0 && top_k < vocab ? top_k : 0;
  if (limit == 0 && how.top_p >= 1.0f && how.min_p <= 0.0f) return draw_of_all(vocab, how.noise, scratch);
  return draw_of_some(vocab, how, limit, scratch);
}

}  // namespace loramux
