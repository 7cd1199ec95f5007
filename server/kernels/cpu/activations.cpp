#include "activations.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "simd.h"

namespace loramux {
namespace {

// How often a quarter's scale may be halved: 16 products with 16 times a nibble need 20 bits of 32, and there are two
// quarters.
constexpr int MAX_HALVINGS = 11;

// Limits on how much finer the scale of a first half may be than the second's (so that INT4 accumulators only shift
// left), and the other way round (so that eight times the codes' sum is an integer). Finer scales would not reduce the
// error of both halves together.
constexpr int MAX_FIRST_FINER = 4, MAX_SECOND_FINER = 3;

constexpr int QUARTERS = 4;
constexpr __mmask16 FIRST_HALVES = 0x0f0f, SECOND_GROUPS = 0xff00;  // lane masks of a span's quarters

// A span of one row and its destination.
struct Span {
  const float* from;
  int8_t* codes;        // of the first group; the second group is ROWS * GROUP further on
  float* float_params;  // null if not wanted, like the next two
  float* int_params;
  Quarter* quarters;

  __m512 quarter(int q) const { return _mm512_loadu_ps(from + q * 16); }
};

// Scales are computed for four spans at once: element n of 128-bit lane q belongs to quarter q of span n.
constexpr int SPANS_PER_VECTOR = 4;
constexpr int MAX_SPANS = 16;  // spans that are read before the first is written

// Transposes 4 x 4 elements of 32 bits.
inline __m512i transpose(__m512i x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

// Swaps the quarters of each group, and the groups of a span.
inline __m512i swap_quarters(__m512i x) { return _mm512_shuffle_i32x4(x, x, 0xb1); }
inline __m512i swap_groups(__m512i x) { return _mm512_shuffle_i32x4(x, x, 0x4e); }

inline __m512i max32(__m512i x, __m512i y) { return _mm512_max_epi32(x, y); }
inline __m512i max_quarter(__m512i x) {
  const __m512i groups = max32(x, swap_quarters(x));
  return max32(groups, swap_groups(groups));
}

// The largest magnitudes as integers, which compare like floats; NaN is the largest.
__m512i max_magnitudes(const Span* spans) {
  __m512i nonzero[SPANS_PER_VECTOR];  // element q of a lane belongs to quarter q
  for (int n = 0; n < SPANS_PER_VECTOR; n++) {
    __m512i x[QUARTERS];
    for (int q = 0; q < QUARTERS; q++) x[q] = (__m512i)_mm512_abs_ps(spans[n].quarter(q));
    const __m512i first = max32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const __m512i second = max32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    nonzero[n] = max32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  }
  const auto lanes = [](__m512i x, __m512i y) {
    return max32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
  };
  return transpose(lanes(lanes(nonzero[0], nonzero[1]), lanes(nonzero[2], nonzero[3])));
}

// How often `from` must be doubled (halved if negative) to be at least `to`; both are bits of positive floats.
inline __m512i doublings(__m512i from, __m512i to) {
  return _mm512_srai_epi32(_mm512_add_epi32(_mm512_sub_epi32(to, from), _mm512_set1_epi32((1 << 23) - 1)), 23);
}

inline __m512i doubled(__m512i x, __m512i times) { return _mm512_add_epi32(x, _mm512_slli_epi32(times, 23)); }

// The scale with the least squared error if each quarter doubles it as often as needed: one of the quarters' maxima.
// The largest if errors cannot be compared (not finite, or near zero).
__m512i best_scale(__m512i peak, __m512i top) {
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), (__m512)top);
  __m512 least = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  __m512i best = top;
  const auto compare = [&](__m512i scale) {
    const __m512 multiple = _mm512_mul_ps((__m512)doubled(scale, doublings(scale, peak)), inverse);
    const __m512 square = _mm512_mul_ps(multiple, multiple);
    const __m512 group = _mm512_add_ps(square, (__m512)swap_quarters((__m512i)square));
    const __m512 error = _mm512_add_ps(group, (__m512)swap_groups((__m512i)group));
    const __mmask16 better = _mm512_cmp_ps_mask(error, least, _CMP_LT_OQ) &
                             _mm512_cmp_ps_mask((__m512)scale, _mm512_set1_ps(MIN_PEAK), _CMP_GT_OQ);
    least = _mm512_mask_mov_ps(least, better, error);
    best = _mm512_mask_mov_epi32(best, better, scale);
  };
  compare(_mm512_shuffle_i32x4(peak, peak, 0x00));
  compare(_mm512_shuffle_i32x4(peak, peak, 0x55));
  compare(_mm512_shuffle_i32x4(peak, peak, 0xaa));
  compare(_mm512_shuffle_i32x4(peak, peak, 0xff));
  return best;
}

struct SpanScales {
  __m512i halved;  // how often a quarter's scale is halved from the coarsest one
  __m512 scale, inverse;
};

SpanScales choose_scales(const Span* spans) {
  const __m512i most_beside =
      _mm512_mask_set1_epi32(_mm512_set1_epi32(MAX_SECOND_FINER), FIRST_HALVES, MAX_FIRST_FINER);
  const __m512i peak = max_magnitudes(spans), top = max_quarter(peak), unit_peak = best_scale(peak, top);
  const __m512i need = doublings(unit_peak, peak), most = max_quarter(need);
  const __m512i halvings = _mm512_min_epi32(_mm512_sub_epi32(most, need), _mm512_set1_epi32(MAX_HALVINGS));
  const __m512i halved = _mm512_min_epi32(halvings, _mm512_add_epi32(swap_quarters(halvings), most_beside));
  const __mmask16 nonzero = _mm512_cmp_ps_mask((__m512)top, _mm512_set1_ps(MIN_PEAK), _CMP_NLT_UQ);
  const __m512 coarsest = (__m512)doubled(unit_peak, most), most_code = _mm512_set1_ps(127.0f);
  const __m512 inverse = _mm512_mul_ps(_mm512_maskz_div_ps(nonzero, most_code, coarsest), power_of_two(halved));
  const __m512 scale = _mm512_mul_ps(_mm512_maskz_div_ps(nonzero, coarsest, most_code),
                                     power_of_two(_mm512_sub_epi32(_mm512_setzero_si512(), halved)));
  return {halved, scale, inverse};
}

// Sums the four elements of each lane of four vectors; element n of a result lane belongs to vector n.
inline __m512i sum_lanes(const __m512i* of) {
  const auto pair = [](__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
  };
  const __m512i low = pair(of[0], of[1]), high = pair(of[2], of[3]);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

// Stores the group sums of four spans, divided by 256, as split16 codes.
inline void store_group_sums(const __m512i* of, int8_t* to, int64_t to_low) {
  const __m512i quarters = sum_lanes(of), groups = _mm512_add_epi32(quarters, swap_quarters(quarters));
  const auto put = [](__m512i codes, int8_t* at) {  // for each pair of spans: first groups, then second groups
    const __m512i order = _mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_permutexvar_epi32(order, codes));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(at), bytes);
  };
  const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(groups, _mm512_set1_epi32(1 << 15)), 16);
  const __m512i left = _mm512_sub_epi32(groups, _mm512_slli_epi32(high, 16));
  const __m512i low = _mm512_srai_epi32(_mm512_add_epi32(left, _mm512_set1_epi32(1 << 7)), 8);
  put(high, to);
  put(_mm512_min_epi32(low, _mm512_set1_epi32(127)), to + to_low);
}

// Writes one kind of parameters for four spans: directly if they belong to one row block, else one by one.
class ParamWriter {
 public:
  ParamWriter(const Span* spans, float* Span::*kind, int each) : spans_(spans), kind_(kind), count_(each) {
    for (int n = 1; n < SPANS_PER_VECTOR; n++) block_ = block_ && spans[n].*kind == spans[0].*kind + n;
    to_ = block_ ? spans[0].*kind : buffer_;
  }
  ~ParamWriter() {
    for (int n = 0; n < SPANS_PER_VECTOR && !block_; n++)
      for (int i = 0; i < count_; i++) (spans_[n].*kind_)[i * ROWS] = buffer_[i * ROWS + n];
  }
  ParamWriter(const ParamWriter&) = delete;
  ParamWriter& operator=(const ParamWriter&) = delete;

  void put(int i, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to_ + i * ROWS), x); }
  void put_first_halves(int i, __m512i x) {  // takes the value of the first halves
    put(i, _mm512_castsi512_si128(x));
    put(i + 1, _mm512_extracti32x4_epi32(x, 2));
  }

 private:
  const Span* spans_;
  float* Span::*kind_;
  const int count_;
  bool block_ = SPANS_PER_VECTOR == ROWS;
  float buffer_[std::max(FLOAT_PARAMS, INT_PARAMS)];
  float* to_;
};

// Writes the int_params. `total` are the sums of the quarters' codes, `size` the sums of their magnitudes, `shift` the
// bits from the first halves' scales to the second halves'.
inline void put_int_params(__m512i total, __m512i size, const SpanScales& scales, __m512i shift, ParamWriter& to) {
  const __m512i zero = _mm512_setzero_si512(), halved = scales.halved;
  const auto of_groups = [&](__m512i x, __m512i times) {  // group sums in the coarsest scale, doubled `times` times
    const __m512 each = _mm512_mul_ps(_mm512_cvtepi32_ps(x), power_of_two(_mm512_sub_epi32(times, halved)));
    return _mm512_add_ps(each, (__m512)swap_quarters((__m512i)each));
  };
  // Bound of a dot product: eight times the sum of magnitudes, plus rounding.
  const __m512 each = of_groups(size, _mm512_set1_epi32(3));
  const __m512 most = _mm512_add_ps(_mm512_max_ps(each, (__m512)swap_groups((__m512i)each)), _mm512_set1_ps(2.0f));
  const __m512 times = _mm512_min_ps(_mm512_div_ps(_mm512_set1_ps(32767.0f), most), _mm512_set1_ps(16.0f));
  const __m512i halvings = _mm512_cvtps_epi32(_mm512_getexp_ps(times));  // how often the coarsest scale can be halved
  const __m512i down = _mm512_sub_epi32(_mm512_add_epi32(halved, _mm512_set1_epi32(4)), halvings);
  to.put(COMMON_SCALE, _mm512_castsi512_si128(
                           (__m512i)_mm512_mul_ps(scales.scale, power_of_two(_mm512_sub_epi32(halved, halvings)))));
  const __m512i inputs = _mm512_cvtps_epi32(of_groups(total, _mm512_add_epi32(halvings, _mm512_set1_epi32(3))));
  to.put(INPUT_SUM, _mm512_castsi512_si128(
                        _mm512_mask_blend_epi16(0xaaaaaaaa, inputs, _mm512_slli_epi32(swap_groups(inputs), 16))));
  to.put(FIRST_SHIFT, _mm512_extracti32x4_epi32(down, 1));
  to.put(SECOND_SHIFT, _mm512_extracti32x4_epi32(_mm512_sub_epi32(_mm512_set1_epi32(16), down), 3));
  // 128 times the codes' sum and half of the common scale, in 1/16 of the second half's scale.
  const __m512i codes = _mm512_slli_epi32(total, 7);
  const __m512i left = max32(shift, zero), right = max32(_mm512_sub_epi32(zero, shift), zero);
  const __m512i first_half = _mm512_srav_epi32(_mm512_sllv_epi32(codes, left), right);
  const __m512i half = _mm512_srli_epi32(_mm512_sllv_epi32(_mm512_set1_epi32(1), swap_quarters(down)), 1);
  const __m512i begin = _mm512_sub_epi32(half, _mm512_add_epi32(first_half, swap_quarters(codes)));
  const __m512i nibble = _mm512_add_epi32(shift, _mm512_set1_epi32(4));
  to.put_first_halves(HALF_SHIFT, nibble);
  // Half of the common scale is lost if it is below the first half's resolution. Where the second half is finer than
  // the common scale this would bias second groups, so they get one more.
  const __mmask16 lost =
      _mm512_cmpeq_epi32_mask(halved, halvings) & _mm512_cmpgt_epi32_mask(swap_quarters(halved), halvings);
  const __m512i start = _mm512_srav_epi32(begin, nibble);
  to.put_first_halves(BEGIN, _mm512_mask_add_epi32(start, lost & SECOND_GROUPS, start, _mm512_set1_epi32(1)));
}

void encode(const Span* spans, const SpanScales& scales) {
  const __m512i zero = _mm512_setzero_si512(), halved = scales.halved;
  alignas(64) float factor[QUARTERS][SPANS_PER_VECTOR];
  _mm512_store_ps(factor, scales.inverse);
  __m512i sum[SPANS_PER_VECTOR], size[SPANS_PER_VECTOR];
  for (int n = 0; n < SPANS_PER_VECTOR; n++) {
    __m512i code[QUARTERS];
    for (int q = 0; q < QUARTERS; q++)
      code[q] = _mm512_cvtps_epi32(_mm512_mul_ps(spans[n].quarter(q), _mm512_set1_ps(factor[q][n])));
    const __m512i first = _mm512_packs_epi32(code[0], code[1]), second = _mm512_packs_epi32(code[2], code[3]);
    const __m512i bytes = transpose(_mm512_packs_epi16(first, second));  // pack works per 128-bit lane
    auto* groups = reinterpret_cast<__m256i*>(spans[n].codes);
    _mm256_storeu_si256(groups, _mm512_castsi512_si256(bytes));
    _mm256_storeu_si256(groups + ROWS, _mm512_extracti64x4_epi64(bytes, 1));
    sum[n] = _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(1), bytes);
    size[n] = _mm512_dpbusd_epi32(zero, _mm512_abs_epi8(bytes), _mm512_set1_epi8(1));
  }
  const __m512i total = sum_lanes(sum);

  const __m512i shift = _mm512_sub_epi32(swap_quarters(halved), halved), times = _mm512_slli_epi32(total, 7);
  if (spans[0].float_params != nullptr) {
    ParamWriter to(spans, &Span::float_params, FLOAT_PARAM_COUNT);
    const auto positive = [&](__m512i x) { return max32(x, zero); };
    const auto negative = [&](__m512i x) { return max32(_mm512_sub_epi32(zero, x), zero); };
    to.put(SCALE, _mm512_extracti32x4_epi32((__m512i)scales.scale, 3));
    to.put(SCALE_16TH,
           _mm512_extracti32x4_epi32((__m512i)_mm512_mul_ps(scales.scale, _mm512_set1_ps(1.0f / 16.0f)), 3));
    const auto inputs = (__m512i)_mm512_mul_ps(_mm512_cvtepi32_ps(total), scales.scale);
    to.put_first_halves(SUM, (__m512i)_mm512_add_ps((__m512)inputs, (__m512)swap_quarters(inputs)));
    const __m512i left = positive(shift), right = negative(shift);
    to.put_first_halves(NIBBLE_SHIFT, _mm512_add_epi32(shift, _mm512_set1_epi32(4)));
    to.put_first_halves(LEFT_SHIFT, left);
    to.put_first_halves(RIGHT_SHIFT, right);
    // 128 times the sum of the codes.
    const __m512i behind = _mm512_srav_epi32(_mm512_sllv_epi32(swap_quarters(times), right), left);
    to.put_first_halves(OFFSET, _mm512_sub_epi32(zero, _mm512_add_epi32(times, behind)));
    const __m512i join = _mm512_sub_epi32(swap_groups(halved), halved);  // from second halves
    to.put(JOIN_LEFT, _mm512_extracti32x4_epi32(positive(join), 1));
    to.put(JOIN_RIGHT, _mm512_extracti32x4_epi32(negative(join), 1));
  }
  if (spans[0].int_params != nullptr) {
    ParamWriter to(spans, &Span::int_params, INT_PARAM_COUNT);
    put_int_params(total, sum_lanes(size), scales, shift, to);
  }
  if (spans[0].quarters == nullptr) return;
  const __m512i scale = transpose((__m512i)scales.scale),
                begin = transpose(_mm512_sub_epi32(zero, times));  // one 128-bit lane per span
  const __m512i two[] = {_mm512_unpacklo_epi32(scale, begin), _mm512_unpackhi_epi32(scale, begin)};
  alignas(64) Quarter each[2][SPANS_PER_VECTOR][QUARTERS / 2];
  std::memcpy(each, two, sizeof each);
  for (int n = 0; n < SPANS_PER_VECTOR; n++)
    for (int h = 0; h < 2; h++) std::memcpy(spans[n].quarters + h * QUARTERS / 2, each[h][n], sizeof each[h][n]);
}

// Two loops: the dependency chain of one span is longer than its work, so independent spans must overlap.
void quantize(Span* spans, int count) {
  SpanScales scales[MAX_SPANS / SPANS_PER_VECTOR];
  for (; count % SPANS_PER_VECTOR != 0; count++) spans[count] = spans[count - 1];  // repeats the last span
  for (int n = 0; n < count; n += SPANS_PER_VECTOR) scales[n / SPANS_PER_VECTOR] = choose_scales(spans + n);
  for (int n = 0; n < count; n += SPANS_PER_VECTOR) encode(spans + n, scales[n / SPANS_PER_VECTOR]);
}

}  // namespace

void Activations::reserve(int64_t rows, int64_t k, ActivationFormats wanted) {
  padded = (k + SPAN - 1) / SPAN * SPAN;
  formats = wanted;
  const int64_t whole = (rows + ROWS - 1) / ROWS * ROWS;
  if (formats.codes) {
    codes.reserve(whole * padded);
    if (formats.float_params) float_params.reserve(whole / ROWS * (padded / SPAN) * FLOAT_PARAMS);
    if (formats.int_params) int_params.reserve(whole / ROWS * (padded / SPAN) * INT_PARAMS);
  }
  if (formats.quarters) quarters.reserve(rows * (padded / SPAN) * QUARTERS);
  if (formats.bf16) bf16.reserve(rows * padded);
  if (formats.split16) {
    tile_rows = std::clamp<int64_t>(rows, 1, AMX_ROWS);
    split16.reserve((rows + tile_rows - 1) / tile_rows * tile_rows * split16_codes());
    scales.reserve(rows);
    begins.reserve(rows * 2);
    few = rows <= FEW_ROWS;
    if (few) sums.reserve(rows * (padded / SPAN));
  }
}

void Activations::set(int64_t row, int64_t rows, int64_t from, int64_t to, const float* x, int64_t stride) {
  if (!formats.codes && !formats.bf16) return;
  Span spans[MAX_SPANS];
  float parts[MAX_SPANS][SPAN];  // incomplete spans, zero-padded
  int n = 0;
  for (int64_t i = from; i < to; i += SPAN) {
    for (int64_t r = row; r < row + rows; r++) {
      const float* at = x + (r - row) * stride + (i - from);
      if (to - i < SPAN) {
        std::fill(std::copy(at, at + (to - i), parts[n]), parts[n] + SPAN, 0.0f);
        at = parts[n];
      }
      if (formats.bf16)
        for (int q = 0; q < SPAN; q += 32)
          _mm512_storeu_si512(bf16.get() + r * padded + i + q,
                              float_to_bf16(_mm512_loadu_ps(at + q), _mm512_loadu_ps(at + q + 16)));
      if (!formats.codes) continue;
      const int64_t step = r / ROWS * (padded / GROUP) + i / GROUP, lane = r % ROWS;
      spans[n++] = {at, codes.get() + (step * ROWS + lane) * GROUP,
                    formats.float_params ? float_params.get() + step / 2 * FLOAT_PARAMS + lane : nullptr,
                    formats.int_params ? int_params.get() + step / 2 * INT_PARAMS + lane : nullptr,
                    formats.quarters ? quarters.get() + (r * padded + i) / SPAN * QUARTERS : nullptr};
      if (n == MAX_SPANS) quantize(spans, n), n = 0;
    }
  }
  quantize(spans, n);
}

void Activations::set_split16(int64_t row, int64_t rows, int64_t k, const float* x, int64_t stride) {
  for (int64_t r = row; r < row + rows; r++, x += stride) {
    const float peak = max_magnitude(x, k);
    const bool is_zero = peak < MIN_PEAK;
    const __m512 inverse = _mm512_set1_ps(is_zero ? 0.0f : SPLIT16_MAX / peak);
    scales.get()[r] = is_zero ? 0.0f : peak / SPLIT16_MAX;  // infinite or NaN if an input is
    const __m512i one = _mm512_set1_epi8(1);
    __m512i sum_high = _mm512_setzero_si512(), sum_low = sum_high;
    int8_t* to = split16.get() + r / tile_rows * split16_codes() * tile_rows + r % tile_rows * SPAN;
    int8_t* sum_spans_at = to + padded * 2 * tile_rows;
    for (int64_t n = 0; n < 2 * sum_spans(); n++)
      _mm512_storeu_si512(sum_spans_at + n * tile_rows * SPAN, _mm512_setzero_si512());
    __m512i pending[SPANS_PER_VECTOR];
    for (int64_t i = 0; i < padded; i += SPAN, to += 2 * tile_rows * SPAN) {
      __m512i code[4];
      for (int q = 0; q < 4; q++)
        code[q] = _mm512_cvtps_epi32(
            _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(k - i - q * 16), x + i + q * 16), inverse));
      const __m512i first = _mm512_packs_epi32(code[0], code[1]), second = _mm512_packs_epi32(code[2], code[3]);
      const auto low = [](__m512i c) { return _mm512_srai_epi16(_mm512_slli_epi16(c, 8), 8); };
      const auto high = [&](__m512i c) { return _mm512_srai_epi16(_mm512_sub_epi16(c, low(c)), 8); };
      const __m512i highs = transpose(_mm512_packs_epi16(high(first), high(second)));
      // Excludes -128, so that 32 products fit in 16 bits.
      const __m512i lows =
          _mm512_max_epi8(transpose(_mm512_packs_epi16(low(first), low(second))), _mm512_set1_epi8(-127));
      _mm512_storeu_si512(to, highs);
      _mm512_storeu_si512(to + tile_rows * SPAN, lows);
      const __m512i of_high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), one, highs);
      const __m512i of_low = _mm512_dpbusd_epi32(_mm512_setzero_si512(), one, lows);
      sum_high = _mm512_add_epi32(sum_high, of_high);
      sum_low = _mm512_add_epi32(sum_low, of_low);
      const int64_t span = i / SPAN, n = span % SPANS_PER_VECTOR;
      pending[n] = _mm512_add_epi32(_mm512_slli_epi32(of_high, 8), of_low);
      if (n == SPANS_PER_VECTOR - 1 || i + SPAN == padded) {
        std::fill(pending + n + 1, pending + SPANS_PER_VECTOR, _mm512_setzero_si512());
        int8_t* block = sum_spans_at + span / SPANS_PER_SUM_SPAN * 2 * tile_rows * SPAN;
        store_group_sums(pending, block + (span - n) % SPANS_PER_SUM_SPAN * 2, tile_rows * SPAN);
      }
      if (!few) continue;
      SpanSums& span_sums = sums.get()[(r * padded + i) / SPAN];
      for (int g = 0; g < 2; g++) {
        const __mmask16 group = g == 0 ? 0x00ff : 0xff00;
        const int32_t each[2] = {_mm512_mask_reduce_add_epi32(group, of_high),
                                 _mm512_mask_reduce_add_epi32(group, of_low)};
        for (int c = 0; c < 2; c++)
          span_sums.begin[c][g] = -128 * each[c], span_sums.inputs[c][g] = static_cast<int16_t>(each[c]);
      }
    }
    begins.get()[2 * r] = -128 * _mm512_reduce_add_epi32(sum_high);
    begins.get()[2 * r + 1] = -128 * _mm512_reduce_add_epi32(sum_low);
  }
}

void Activations::fetch(int64_t rows) const {
  if (formats.split16) {
    const int64_t whole = (rows + tile_rows - 1) / tile_rows * tile_rows;
    const char* w = reinterpret_cast<const char*>(split16.get());
    for (int64_t i = 0; i < whole * split16_codes(); i += 64) _mm_prefetch(w + i, _MM_HINT_T0);
  }
  if (!formats.codes) return;
  const int64_t whole = (rows + ROWS - 1) / ROWS * ROWS;
  const auto all = [](const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(from) + i, _MM_HINT_T0);
  };
  const int64_t words = whole / ROWS * (padded / SPAN) * static_cast<int64_t>(sizeof(float));
  all(codes.get(), whole * padded);
  if (formats.float_params) all(float_params.get(), words * FLOAT_PARAMS);
  if (formats.int_params) all(int_params.get(), words * INT_PARAMS);
}

}  // namespace loramux
