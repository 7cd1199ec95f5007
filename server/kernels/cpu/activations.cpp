#include "activations.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "simd.h"

namespace loramux {
namespace {

// How often a quarter's unit is halved, at most: what is left of 32 bits where sums of 16 products with 16 times a nibble have
// 20, and there are two of them.
constexpr int MOST_FINER = 11;

// And how much finer than the half behind it a first half can be, so that sums for INT4 are shifted up only, and how much
// finer than that the second, so that eight times its codes are a whole number in the first one's units: if one is finer by
// more, it adds nothing to the error of the two.
constexpr int MOST_AHEAD = 4, MOST_BEHIND = 3;

constexpr int QUARTERS = 4;
constexpr __mmask16 FIRST_HALVES = 0x0f0f, SECOND_GROUPS = 0xff00;  // of a span's quarters, a lane each

// A span of one row's inputs on its way into codes.
struct Span {
  const float* from;
  int8_t* codes;  // of its first group; the second one's lie ROWS * GROUP behind
  float* floats;  // null if nobody asks for them, like these
  float* pairs;
  Quarter* quarters;

  __m512 quarter(int q) const { return _mm512_loadu_ps(from + q * 16); }
};

// What is one number for a quarter of a span is worked out for four spans at once, as it would otherwise cost as much as the
// span: element n of lane q (of 128 bits) is quarter q's of span n.
constexpr int TOGETHER = 4;
constexpr int AT_ONCE = 16;  // spans that are known before the first is written

// Four by four of 32 bits, lanes for elements.
inline __m512i turned(__m512i x) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x);
}

// Each quarter's neighbour in its group, and the one that has its place in the other group.
inline __m512i neighbours(__m512i x) { return _mm512_shuffle_i32x4(x, x, 0xb1); }
inline __m512i others(__m512i x) { return _mm512_shuffle_i32x4(x, x, 0x4e); }

inline __m512i larger(__m512i x, __m512i y) { return _mm512_max_epi32(x, y); }
inline __m512i largest_quarter(__m512i x) {
  const __m512i groups = larger(x, neighbours(x));
  return larger(groups, others(groups));
}

// The largest magnitudes, as integers: these have the order that they have as numbers, and NaN is the largest.
__m512i peaks(const Span* spans) {
  __m512i some[TOGETHER];  // element q of a lane is of quarter q
  for (int n = 0; n < TOGETHER; n++) {
    __m512i x[QUARTERS];
    for (int q = 0; q < QUARTERS; q++) x[q] = (__m512i)_mm512_abs_ps(spans[n].quarter(q));
    const __m512i first = larger(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
    const __m512i second = larger(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
    some[n] = larger(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  }
  const auto lanes = [](__m512i x, __m512i y) {
    return larger(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
  };
  return turned(lanes(lanes(some[0], some[1]), lanes(some[2], some[3])));
}

// How often `from` has to be doubled (or halved, if negative) to be no less than `to`, both the bits of floats above zero:
// these have one place for each doubling at 2^23.
inline __m512i doublings(__m512i from, __m512i to) {
  return _mm512_srai_epi32(_mm512_add_epi32(_mm512_sub_epi32(to, from), _mm512_set1_epi32((1 << 23) - 1)), 23);
}

inline __m512i doubled(__m512i x, __m512i times) { return _mm512_add_epi32(x, _mm512_slli_epi32(times, 23)); }

// What leaves the least error if each quarter has it doubled as often as it needs: one of their own peaks, whose multiples'
// squares are compared. The largest where they cannot be, as it is not finite or next to nothing.
__m512i best_unit(__m512i peak, __m512i top) {
  const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), (__m512)top);
  __m512 least = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  __m512i best = top;
  const auto compare = [&](__m512i unit) {
    const __m512 multiple = _mm512_mul_ps((__m512)doubled(unit, doublings(unit, peak)), inverse);
    const __m512 square = _mm512_mul_ps(multiple, multiple);
    const __m512 group = _mm512_add_ps(square, (__m512)neighbours((__m512i)square));
    const __m512 error = _mm512_add_ps(group, (__m512)others((__m512i)group));
    const __mmask16 better = _mm512_cmp_ps_mask(error, least, _CMP_LT_OQ) &
                             _mm512_cmp_ps_mask((__m512)unit, _mm512_set1_ps(LEAST_PEAK), _CMP_GT_OQ);
    least = _mm512_mask_mov_ps(least, better, error);
    best = _mm512_mask_mov_epi32(best, better, unit);
  };
  compare(_mm512_shuffle_i32x4(peak, peak, 0x00));
  compare(_mm512_shuffle_i32x4(peak, peak, 0x55));
  compare(_mm512_shuffle_i32x4(peak, peak, 0xaa));
  compare(_mm512_shuffle_i32x4(peak, peak, 0xff));
  return best;
}

struct Units {
  __m512i halved;  // how often a quarter's unit is halved, from the coarsest one
  __m512 unit, inverse;
};

Units choose_units(const Span* spans) {
  const __m512i most_beside = _mm512_mask_set1_epi32(_mm512_set1_epi32(MOST_BEHIND), FIRST_HALVES, MOST_AHEAD);
  const __m512i peak = peaks(spans), top = largest_quarter(peak), unit_peak = best_unit(peak, top);
  const __m512i need = doublings(unit_peak, peak), most = largest_quarter(need);
  const __m512i finer = _mm512_min_epi32(_mm512_sub_epi32(most, need), _mm512_set1_epi32(MOST_FINER));
  const __m512i halved = _mm512_min_epi32(finer, _mm512_add_epi32(neighbours(finer), most_beside));
  const __mmask16 some = _mm512_cmp_ps_mask((__m512)top, _mm512_set1_ps(LEAST_PEAK), _CMP_NLT_UQ);
  const __m512 coarsest = (__m512)doubled(unit_peak, most), most_code = _mm512_set1_ps(127.0f);
  const __m512 inverse = _mm512_mul_ps(_mm512_maskz_div_ps(some, most_code, coarsest), power_of_two(halved));
  const __m512 unit = _mm512_mul_ps(_mm512_maskz_div_ps(some, coarsest, most_code),
                                    power_of_two(_mm512_sub_epi32(_mm512_setzero_si512(), halved)));
  return {halved, unit, inverse};
}

// Four spans' sums of four elements of each lane, element n of a lane being span n's.
inline __m512i added_up(const __m512i* of) {
  const auto pair = [](__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
  };
  const __m512i low = pair(of[0], of[1]), high = pair(of[2], of[3]);
  return _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));
}

// 256ths of four spans' groups' sums, of sums of four codes: in two codes each, low ones behind high ones.
inline void put_sums(const __m512i* of, int8_t* to, int64_t to_low) {
  const __m512i quarters = added_up(of), groups = _mm512_add_epi32(quarters, neighbours(quarters));
  const auto put = [](__m512i codes, int8_t* at) {  // of two spans each a first group's, then the second ones'
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

// Where four spans' words of one kind go: at once to those of a block, else one by one.
class Words {
 public:
  Words(const Span* spans, float* Span::*kind, int each) : spans_(spans), kind_(kind), each_(each) {
    for (int n = 1; n < TOGETHER; n++) block_ = block_ && spans[n].*kind == spans[0].*kind + n;
    to_ = block_ ? spans[0].*kind : elsewhere_;
  }
  ~Words() {
    for (int n = 0; n < TOGETHER && !block_; n++)
      for (int i = 0; i < each_; i++) (spans_[n].*kind_)[i * ROWS] = elsewhere_[i * ROWS + n];
  }
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;

  void put(int i, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to_ + i * ROWS), x); }
  void put_both(int i, __m512i x) {  // of first halves
    put(i, _mm512_castsi512_si128(x));
    put(i + 1, _mm512_extracti32x4_epi32(x, 2));
  }

 private:
  const Span* spans_;
  float* Span::*kind_;
  const int each_;
  bool block_ = TOGETHER == ROWS;
  float elsewhere_[std::max(FLOATS, PAIRS)];
  float* to_;
};

// What products want that have both groups' sums in 16 bits each. `total` are the sums of the quarters' codes, `size` those
// of their magnitudes, `shift` the bits from first halves' units to second ones'.
inline void put_pairs(__m512i total, __m512i size, const Units& units, __m512i shift, Words& to) {
  const __m512i zero = _mm512_setzero_si512(), halved = units.halved;
  const auto of_groups = [&](__m512i x, __m512i times) {  // a group's sum in the coarsest units, doubled so often
    const __m512 each = _mm512_mul_ps(_mm512_cvtepi32_ps(x), power_of_two(_mm512_sub_epi32(times, halved)));
    return _mm512_add_ps(each, (__m512)neighbours((__m512i)each));
  };
  // Eight times the magnitudes is what a sum can be, and one more as it is rounded.
  const __m512 each = of_groups(size, _mm512_set1_epi32(3));
  const __m512 most = _mm512_add_ps(_mm512_max_ps(each, (__m512)others((__m512i)each)), _mm512_set1_ps(2.0f));
  const __m512 times = _mm512_min_ps(_mm512_div_ps(_mm512_set1_ps(32767.0f), most), _mm512_set1_ps(16.0f));
  const __m512i finer = _mm512_cvtps_epi32(_mm512_getexp_ps(times));  // how often the coarsest unit is halved
  const __m512i down = _mm512_sub_epi32(_mm512_add_epi32(halved, _mm512_set1_epi32(4)), finer);
  to.put(COMMON, _mm512_castsi512_si128((__m512i)_mm512_mul_ps(units.unit, power_of_two(_mm512_sub_epi32(halved, finer)))));
  const __m512i inputs = _mm512_cvtps_epi32(of_groups(total, _mm512_add_epi32(finer, _mm512_set1_epi32(3))));
  to.put(INPUTS, _mm512_castsi512_si128(_mm512_mask_blend_epi16(0xaaaaaaaa, inputs, _mm512_slli_epi32(others(inputs), 16))));
  to.put(FIRST_DOWN, _mm512_extracti32x4_epi32(down, 1));
  to.put(SECOND_UP, _mm512_extracti32x4_epi32(_mm512_sub_epi32(_mm512_set1_epi32(16), down), 3));
  // 128 times the codes' sum and half of the common unit, in sixteenths of the second half's units.
  const __m512i codes = _mm512_slli_epi32(total, 7);
  const __m512i left = larger(shift, zero), right = larger(_mm512_sub_epi32(zero, shift), zero);
  const __m512i ahead = _mm512_srav_epi32(_mm512_sllv_epi32(codes, left), right);
  const __m512i half = _mm512_srli_epi32(_mm512_sllv_epi32(_mm512_set1_epi32(1), neighbours(down)), 1);
  const __m512i middle = _mm512_sub_epi32(half, _mm512_add_epi32(ahead, neighbours(codes)));
  const __m512i nibble = _mm512_add_epi32(shift, _mm512_set1_epi32(4));
  to.put_both(HALF_UP, nibble);
  // A half unit that is less than the first half's is lost, and with it half a unit on average where the second half is
  // finer than the common one. Where that is the first half's, second groups have one more.
  const __mmask16 lost = _mm512_cmpeq_epi32_mask(halved, finer) & _mm512_cmpgt_epi32_mask(neighbours(halved), finer);
  const __m512i begin = _mm512_srav_epi32(middle, nibble);
  to.put_both(MIDDLE, _mm512_mask_add_epi32(begin, lost & SECOND_GROUPS, begin, _mm512_set1_epi32(1)));
}

void encode(const Span* spans, const Units& units) {
  const __m512i zero = _mm512_setzero_si512(), halved = units.halved;
  alignas(64) float factor[QUARTERS][TOGETHER];
  _mm512_store_ps(factor, units.inverse);
  __m512i sum[TOGETHER], size[TOGETHER];
  for (int n = 0; n < TOGETHER; n++) {
    __m512i code[QUARTERS];
    for (int q = 0; q < QUARTERS; q++)
      code[q] = _mm512_cvtps_epi32(_mm512_mul_ps(spans[n].quarter(q), _mm512_set1_ps(factor[q][n])));
    const __m512i first = _mm512_packs_epi32(code[0], code[1]), second = _mm512_packs_epi32(code[2], code[3]);
    const __m512i bytes = turned(_mm512_packs_epi16(first, second));  // packing goes by lanes
    auto* groups = reinterpret_cast<__m256i*>(spans[n].codes);
    _mm256_storeu_si256(groups, _mm512_castsi512_si256(bytes));
    _mm256_storeu_si256(groups + ROWS, _mm512_extracti64x4_epi64(bytes, 1));
    sum[n] = _mm512_dpbusd_epi32(zero, _mm512_set1_epi8(1), bytes);
    size[n] = _mm512_dpbusd_epi32(zero, _mm512_abs_epi8(bytes), _mm512_set1_epi8(1));
  }
  const __m512i total = added_up(sum);

  const __m512i shift = _mm512_sub_epi32(neighbours(halved), halved), times = _mm512_slli_epi32(total, 7);
  if (spans[0].floats != nullptr) {
    Words to(spans, &Span::floats, FLOATS_EACH);
    const auto positive = [&](__m512i x) { return larger(x, zero); };
    const auto negative = [&](__m512i x) { return larger(_mm512_sub_epi32(zero, x), zero); };
    to.put(SCALE, _mm512_extracti32x4_epi32((__m512i)units.unit, 3));
    to.put(SIXTEENTH, _mm512_extracti32x4_epi32((__m512i)_mm512_mul_ps(units.unit, _mm512_set1_ps(1.0f / 16.0f)), 3));
    const auto inputs = (__m512i)_mm512_mul_ps(_mm512_cvtepi32_ps(total), units.unit);
    to.put_both(SUM, (__m512i)_mm512_add_ps((__m512)inputs, (__m512)neighbours(inputs)));
    const __m512i left = positive(shift), right = negative(shift);
    to.put_both(NIBBLE, _mm512_add_epi32(shift, _mm512_set1_epi32(4)));
    to.put_both(LEFT, left);
    to.put_both(RIGHT, right);
    // 128 times the sum of the codes, to less than one unit.
    const __m512i behind = _mm512_srav_epi32(_mm512_sllv_epi32(neighbours(times), right), left);
    to.put_both(OFFSET, _mm512_sub_epi32(zero, _mm512_add_epi32(times, behind)));
    const __m512i join = _mm512_sub_epi32(others(halved), halved);  // of second halves
    to.put(JOIN_LEFT, _mm512_extracti32x4_epi32(positive(join), 1));
    to.put(JOIN_RIGHT, _mm512_extracti32x4_epi32(negative(join), 1));
  }
  if (spans[0].pairs != nullptr) {
    Words to(spans, &Span::pairs, PAIRS_EACH);
    put_pairs(total, added_up(size), units, shift, to);
  }
  if (spans[0].quarters == nullptr) return;
  const __m512i unit = turned((__m512i)units.unit), begin = turned(_mm512_sub_epi32(zero, times));  // a lane for each span
  const __m512i two[] = {_mm512_unpacklo_epi32(unit, begin), _mm512_unpackhi_epi32(unit, begin)};
  alignas(64) Quarter each[2][TOGETHER][QUARTERS / 2];
  std::memcpy(each, two, sizeof each);
  for (int n = 0; n < TOGETHER; n++)
    for (int h = 0; h < 2; h++) std::memcpy(spans[n].quarters + h * QUARTERS / 2, each[h][n], sizeof each[h][n]);
}

// In two passes, as what follows from one number to the next takes longer than the work, and only one pass is so short that
// the processor sees the next four spans'.
void quantize(Span* spans, int count) {
  Units units[AT_ONCE / TOGETHER];
  for (; count % TOGETHER != 0; count++) spans[count] = spans[count - 1];  // once more what is written anyhow
  for (int n = 0; n < count; n += TOGETHER) units[n / TOGETHER] = choose_units(spans + n);
  for (int n = 0; n < count; n += TOGETHER) encode(spans + n, units[n / TOGETHER]);
}

}  // namespace

void Activations::reserve(int64_t rows, int64_t k, Forms wanted) {
  padded = (k + SPAN - 1) / SPAN * SPAN;
  forms = wanted;
  const int64_t whole = (rows + ROWS - 1) / ROWS * ROWS;
  if (forms.codes) {
    codes.reserve(whole * padded);
    if (forms.floats) floats.reserve(whole / ROWS * (padded / SPAN) * FLOATS);
    if (forms.pairs) pairs.reserve(whole / ROWS * (padded / SPAN) * PAIRS);
  }
  if (forms.quarters) quarters.reserve(rows * (padded / SPAN) * QUARTERS);
  if (forms.half) half.reserve(rows * padded);
  if (forms.wide) {
    rows_of_tile = std::clamp<int64_t>(rows, 1, ROWS_OF_UNIT);
    wide.reserve((rows + rows_of_tile - 1) / rows_of_tile * rows_of_tile * wide_codes());
    units.reserve(rows);
    begins.reserve(rows * 2);
    few = rows <= FEW_ROWS;
    if (few) sums.reserve(rows * (padded / SPAN));
  }
}

void Activations::set(int64_t row, int64_t rows, int64_t from, int64_t to, const float* x, int64_t stride) {
  if (!forms.codes && !forms.half) return;
  Span spans[AT_ONCE];
  float parts[AT_ONCE][SPAN];  // those that end before they are full
  int n = 0;
  for (int64_t i = from; i < to; i += SPAN) {
    for (int64_t r = row; r < row + rows; r++) {
      const float* at = x + (r - row) * stride + (i - from);
      if (to - i < SPAN) {
        std::fill(std::copy(at, at + (to - i), parts[n]), parts[n] + SPAN, 0.0f);
        at = parts[n];
      }
      if (forms.half)
        for (int q = 0; q < SPAN; q += 32)
          _mm512_storeu_si512(half.get() + r * padded + i + q,
                              float_to_bf16(_mm512_loadu_ps(at + q), _mm512_loadu_ps(at + q + 16)));
      if (!forms.codes) continue;
      const int64_t step = r / ROWS * (padded / GROUP) + i / GROUP, lane = r % ROWS;
      spans[n++] = {at, codes.get() + (step * ROWS + lane) * GROUP,
                    forms.floats ? floats.get() + step / 2 * FLOATS + lane : nullptr,
                    forms.pairs ? pairs.get() + step / 2 * PAIRS + lane : nullptr,
                    forms.quarters ? quarters.get() + (r * padded + i) / SPAN * QUARTERS : nullptr};
      if (n == AT_ONCE) quantize(spans, n), n = 0;
    }
  }
  quantize(spans, n);
}

void Activations::set_wide(int64_t row, int64_t rows, int64_t k, const float* x, int64_t stride) {
  for (int64_t r = row; r < row + rows; r++, x += stride) {
    const float peak = peak_of(x, k);
    const bool none = peak < LEAST_PEAK;
    const __m512 inverse = _mm512_set1_ps(none ? 0.0f : MOST_OF_TWO / peak);
    units.get()[r] = none ? 0.0f : peak / MOST_OF_TWO;  // infinite or NaN if an input is
    const __m512i one = _mm512_set1_epi8(1);
    __m512i sum_high = _mm512_setzero_si512(), sum_low = sum_high;
    int8_t* to = wide.get() + r / rows_of_tile * wide_codes() * rows_of_tile + r % rows_of_tile * SPAN;
    int8_t* of_sums = to + padded * 2 * rows_of_tile;
    for (int64_t n = 0; n < 2 * spans_of_sums(); n++)
      _mm512_storeu_si512(of_sums + n * rows_of_tile * SPAN, _mm512_setzero_si512());
    __m512i together[TOGETHER];
    for (int64_t i = 0; i < padded; i += SPAN, to += 2 * rows_of_tile * SPAN) {
      __m512i code[4];
      for (int q = 0; q < 4; q++)
        code[q] = _mm512_cvtps_epi32(
            _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(k - i - q * 16), x + i + q * 16), inverse));
      const __m512i first = _mm512_packs_epi32(code[0], code[1]), second = _mm512_packs_epi32(code[2], code[3]);
      const auto low = [](__m512i c) { return _mm512_srai_epi16(_mm512_slli_epi16(c, 8), 8); };
      const auto high = [&](__m512i c) { return _mm512_srai_epi16(_mm512_sub_epi16(c, low(c)), 8); };
      const __m512i highs = turned(_mm512_packs_epi16(high(first), high(second)));
      // None is -128: 32 products with such a code could be more than 16 bits hold.
      const __m512i lows = _mm512_max_epi8(turned(_mm512_packs_epi16(low(first), low(second))), _mm512_set1_epi8(-127));
      _mm512_storeu_si512(to, highs);
      _mm512_storeu_si512(to + rows_of_tile * SPAN, lows);
      const __m512i of_high = _mm512_dpbusd_epi32(_mm512_setzero_si512(), one, highs);
      const __m512i of_low = _mm512_dpbusd_epi32(_mm512_setzero_si512(), one, lows);
      sum_high = _mm512_add_epi32(sum_high, of_high);
      sum_low = _mm512_add_epi32(sum_low, of_low);
      const int64_t span = i / SPAN, n = span % TOGETHER;
      together[n] = _mm512_add_epi32(_mm512_slli_epi32(of_high, 8), of_low);
      if (n == TOGETHER - 1 || i + SPAN == padded) {
        std::fill(together + n + 1, together + TOGETHER, _mm512_setzero_si512());
        int8_t* block = of_sums + span / SPANS_OF_SUMS * 2 * rows_of_tile * SPAN;
        put_sums(together, block + (span - n) % SPANS_OF_SUMS * 2, rows_of_tile * SPAN);
      }
      if (!few) continue;
      SpanSums& beside = sums.get()[(r * padded + i) / SPAN];
      for (int g = 0; g < 2; g++) {
        const __mmask16 group = g == 0 ? 0x00ff : 0xff00;
        const int32_t each[2] = {_mm512_mask_reduce_add_epi32(group, of_high), _mm512_mask_reduce_add_epi32(group, of_low)};
        for (int c = 0; c < 2; c++) beside.begin[c][g] = -128 * each[c], beside.inputs[c][g] = static_cast<int16_t>(each[c]);
      }
    }
    begins.get()[2 * r] = -128 * _mm512_reduce_add_epi32(sum_high);
    begins.get()[2 * r + 1] = -128 * _mm512_reduce_add_epi32(sum_low);
  }
}

void Activations::fetch(int64_t rows) const {
  if (forms.wide) {
    const int64_t whole = (rows + rows_of_tile - 1) / rows_of_tile * rows_of_tile;
    const char* w = reinterpret_cast<const char*>(wide.get());
    for (int64_t i = 0; i < whole * wide_codes(); i += 64) _mm_prefetch(w + i, _MM_HINT_T0);
  }
  if (!forms.codes) return;
  const int64_t whole = (rows + ROWS - 1) / ROWS * ROWS;
  const auto all = [](const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(from) + i, _MM_HINT_T0);
  };
  const int64_t words = whole / ROWS * (padded / SPAN) * static_cast<int64_t>(sizeof(float));
  all(codes.get(), whole * padded);
  if (forms.floats) all(floats.get(), words * FLOATS);
  if (forms.pairs) all(pairs.get(), words * PAIRS);
}

}  // namespace loramux
