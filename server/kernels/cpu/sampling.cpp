#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "simd.h"

namespace loramux {
namespace {

constexpr int64_t SUM_BLOCK = 256;  // ids that have a common sum
constexpr int64_t MAX_BLOCK = 64;   // ids that have a common maximum

int64_t sum_blocks(int64_t vocab) { return (vocab + SUM_BLOCK - 1) / SUM_BLOCK; }

// Bits of positive floats sort like floats. The upper bits are a histogram bin, 16 per doubling up to 1.
constexpr int SHIFT = 19;
constexpr int64_t BINS = (0x3f800000 >> SHIFT) + 1;

int64_t bin_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return std::min<int64_t>(bits >> SHIFT, BINS - 1);
}

// exp((x - top) / temperature) with maxima per CHUNK and sums per STRETCH; zeros after the last id.
void softmax_weights(const float* x, int64_t vocab, float top, float temperature, SamplerScratch& s) {
  const __m512 max = _mm512_set1_ps(top), divisor = _mm512_set1_ps(temperature), least = _mm512_set1_ps(-104.0f);
  for (int64_t block = 0; block < sum_blocks(vocab); block++) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t chunk = block * SUM_BLOCK; chunk < (block + 1) * SUM_BLOCK; chunk += MAX_BLOCK) {
      __m512 most = _mm512_setzero_ps();
      for (int64_t i = chunk; i < chunk + MAX_BLOCK; i += 16) {
        const __mmask16 mask = first_lanes(vocab - i);
        // A very low temperature gives minus infinity, which counts as zero.
        const __m512 column = _mm512_div_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), max), divisor);
        const __mmask16 some = _mm512_mask_cmp_ps_mask(mask, column, least, _CMP_GE_OQ);
        const __m512 w = _mm512_maskz_mov_ps(some, exp_ps(column));
        _mm512_storeu_ps(s.weights.get() + i, w);
        most = _mm512_max_ps(most, w);
        sum = _mm512_add_ps(sum, w);
      }
      s.peaks.get()[chunk / MAX_BLOCK] = _mm512_reduce_max_ps(most);
    }
    s.sums.get()[block] = static_cast<double>(_mm512_reduce_add_ps(sum));
  }
}

// The id at which the cumulative sum of all weights passes `noise` times the total.
int32_t sample_all(int64_t vocab, double noise, const SamplerScratch& s) {
  const float* w = s.weights.get();
  const double* sums = s.sums.get();
  const int64_t count = sum_blocks(vocab);
  double total = 0;
  for (int64_t i = 0; i < count; i++) total += sums[i];
  const double goal = noise * total;
  double before = 0;
  int64_t block = 0;
  while (block + 1 < count && before + sums[block] <= goal) before += sums[block++];
  int64_t last = 0;  // the last id with a weight above zero
  for (int64_t i = block * SUM_BLOCK; i < std::min(vocab, (block + 1) * SUM_BLOCK); i++) {
    if (w[i] == 0) continue;
    last = i;
    before += w[i];
    if (before > goal) return static_cast<int32_t>(i);
  }
  // Rounding: no id passed the goal.
  for (int64_t i = (block + 1) * SUM_BLOCK - 1; w[last] == 0 && i >= 0; i--)
    if (w[i] != 0) last = i;
  return static_cast<int32_t>(last);
}

// Where top_k or top_p cut the candidates in descending order: their number, the smallest and their sum.
struct Cutoff {
  int64_t count = 0;
  float least = 0;
  double mass = 0;
};

// Descends until `most` candidates are passed or their sum reaches `goal`.
Cutoff descend(const SamplerScratch& s, int64_t candidates, int64_t most, double goal) {
  const float* values = s.values.get();
  float* sorted = s.sorted.get();
  Cutoff cutoff;
  for (int64_t bin = BINS - 1; bin >= 0; bin--) {
    const int64_t here = s.count.get()[bin];
    if (here == 0) continue;
    if (cutoff.count + here < most && cutoff.mass + s.mass.get()[bin] < goal) {
      cutoff.count += here;
      cutoff.mass += s.mass.get()[bin];
      continue;
    }
    int64_t n = 0;
    for (int64_t i = 0; i < candidates && n < here; i++)
      if (bin_of(values[i]) == bin) sorted[n++] = values[i];
    std::sort(sorted, sorted + n, std::greater<float>());
    for (int64_t i = 0; i < n; i++) {
      cutoff.count++;
      cutoff.mass += sorted[i];
      cutoff.least = sorted[i];
      if (cutoff.count == most || cutoff.mass >= goal) return cutoff;
    }
  }
  return cutoff;
}

// A lower bound of the weights of all candidates.
float lower_bound(int64_t vocab, const SamplingParams& params, int64_t top_k, double total, SamplerScratch& s) {
  if (top_k > 0) {
    // At least k chunks have a maximum that is at least the k-th largest chunk maximum.
    const int64_t chunks = sum_blocks(vocab) * (SUM_BLOCK / MAX_BLOCK);
    if (top_k > chunks) return 0;
    float* sorted = s.sorted.get();
    std::copy_n(s.peaks.get(), chunks, sorted);
    std::nth_element(sorted, sorted + top_k - 1, sorted + chunks, std::greater<float>());
    return sorted[top_k - 1];
  }
  if (params.top_p >= 1.0f) return params.min_p;
  // All weights below it sum to less than 1 - top_p of the total.
  return static_cast<float>((1.0 - static_cast<double>(params.top_p)) * total / static_cast<double>(vocab) * 0.999);
}

int32_t sample_filtered(int64_t vocab, const SamplingParams& params, int64_t top_k, SamplerScratch& s) {
  double total = 0;
  for (int64_t i = 0; i < sum_blocks(vocab); i++) total += s.sums.get()[i];
  const __m512 floor = _mm512_set1_ps(lower_bound(vocab, params, top_k, total, s));
  float* values = s.values.get();
  int32_t* ids = s.ids.get();
  int64_t n = 0;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t i = 0; i < vocab; i += 16) {
    const __m512 w = _mm512_loadu_ps(s.weights.get() + i);
    const __mmask16 mask = _mm512_mask_cmp_ps_mask(first_lanes(vocab - i), w, floor, _CMP_GE_OQ);
    if (mask == 0) continue;
    // Compress in registers: compressing stores are many times slower.
    _mm512_storeu_ps(values + n, _mm512_maskz_compress_ps(mask, w));
    const __m512i column = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(i)));
    _mm512_storeu_si512(ids + n, _mm512_maskz_compress_epi32(mask, column));
    n += __builtin_popcount(mask);
  }

  int64_t count = n;
  float bound = params.min_p, least = 0;
  if (top_k > 0 || params.top_p < 1.0f) {
    std::fill_n(s.mass.get(), BINS, 0.0);
    std::fill_n(s.count.get(), BINS, int64_t{0});
    for (int64_t i = 0; i < n; i++) {
      const int64_t bin = bin_of(values[i]);
      s.mass.get()[bin] += values[i];
      s.count.get()[bin]++;
    }
    constexpr double NEVER = std::numeric_limits<double>::infinity();
    Cutoff cutoff;
    if (top_k > 0) cutoff = descend(s, n, std::min(top_k, n), NEVER), total = cutoff.mass;
    if (params.top_p < 1.0f)
      cutoff = descend(s, n, top_k > 0 ? cutoff.count : n, static_cast<double>(params.top_p) * total);
    count = cutoff.count;
    least = cutoff.least;
    bound = std::max(bound, least);
  }

  // Among weights equal to the least, only the first ids are kept.
  int64_t kept = 0, equal = 0;
  double sum = 0;
  for (int64_t i = 0; i < n; i++)
    if (values[i] >= bound) kept++, equal += values[i] == least;
  int64_t keep = equal - std::max<int64_t>(0, kept - count);
  kept = 0;
  for (int64_t i = 0; i < n; i++) {
    if (values[i] < bound || (values[i] == least && keep-- <= 0)) continue;
    sum += values[i];
    values[kept] = values[i];
    ids[kept++] = ids[i];
  }
  const double goal = static_cast<double>(params.noise) * sum;
  double passed = 0;
  for (int64_t i = 0; i + 1 < kept; i++) {
    passed += values[i];
    if (passed > goal) return ids[i];
  }
  return ids[kept - 1];
}

}  // namespace

RowMax::RowMax()
    : value(_mm512_set1_ps(-INFINITY)), not_finite(_mm512_setzero_ps()), column(_mm512_set1_epi32(INT32_MAX)) {}

inline void RowMax::update(__mmask16 mask, __m512 v, __m512i columns) {
  const __mmask16 equal = _mm512_mask_cmp_ps_mask(mask, v, value, _CMP_EQ_OQ);
  const __mmask16 greater =
      _mm512_mask_cmp_ps_mask(mask, v, value, _CMP_GT_OQ) | _mm512_mask_cmplt_epi32_mask(equal, columns, column);
  value = _mm512_mask_mov_ps(value, greater, v);
  column = _mm512_mask_mov_epi32(column, greater, columns);
}

void RowMax::update(const float* x, int64_t n, int64_t column) {
  RowMax now = *this;  // keeps it in registers
  __m512i columns = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                     _mm512_set1_epi32(static_cast<int32_t>(column)));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_lanes(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    now.not_finite = _mm512_fmadd_ps(v, _mm512_setzero_ps(), now.not_finite);
    now.update(mask, v, columns);
    columns = _mm512_add_epi32(columns, _mm512_set1_epi32(16));
  }
  *this = now;
}

void RowMax::update(const RowMax& other) {
  not_finite = _mm512_add_ps(not_finite, other.not_finite);
  update(0xffff, other.value, other.column);
}

int64_t RowMax::argmax() const {
  if (std::isnan(_mm512_reduce_add_ps(not_finite))) return -1;
  const __mmask16 argmax = _mm512_cmp_ps_mask(value, _mm512_set1_ps(_mm512_reduce_max_ps(value)), _CMP_EQ_OQ);
  return _mm512_mask_reduce_min_epi32(argmax, column);
}

void SamplerScratch::reserve(int64_t vocab) {
  const int64_t whole = sum_blocks(vocab) * SUM_BLOCK;
  weights.reserve(whole);
  peaks.reserve(whole / MAX_BLOCK);
  values.reserve(whole + 16);
  sorted.reserve(whole + 16);
  ids.reserve(whole + 16);
  sums.reserve(whole / SUM_BLOCK);
  mass.reserve(BINS);
  count.reserve(BINS);
}

int64_t SamplerScratch::bytes() const {
  return weights.bytes() + peaks.bytes() + values.bytes() + sorted.bytes() + ids.bytes() + sums.bytes() + mass.bytes() +
         count.bytes();
}

int32_t sample(const float* x, int64_t vocab, const SamplingParams& params, int32_t top_k, SamplerScratch& scratch) {
  RowMax peaks;
  peaks.update(x, vocab, 0);
  const int64_t best = peaks.argmax();
  if (best < 0 || params.temperature <= 0) return static_cast<int32_t>(best);
  softmax_weights(x, vocab, x[best], params.temperature, scratch);
  const int64_t limit = top_k > 0 && top_k < vocab ? top_k : 0;
  if (limit == 0 && params.top_p >= 1.0f && params.min_p <= 0.0f) return sample_all(vocab, params.noise, scratch);
  return sample_filtered(vocab, params, limit, scratch);
}

}  // namespace loramux
