#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd.h"

namespace loramux {

// The quantiles of NormalFloat4 (QLoRA, appendix E), as in server/kernels/stored.py.
const float NF4_TABLE[16] = {-1.0f,
                             -0.6961928009986877f,
                             -0.5250730514526367f,
                             -0.39491748809814453f,
                             -0.28444138169288635f,
                             -0.18477343022823334f,
                             -0.09105003625154495f,
                             0.0f,
                             0.07958029955625534f,
                             0.16093020141124725f,
                             0.24611230194568634f,
                             0.33791524171829224f,
                             0.44070982933044434f,
                             0.5626170039176941f,
                             0.7229568362236023f,
                             1.0f};

namespace {

// NF4_TABLE in units of 1/127, plus 128: vpdpbusd wants one operand without a sign.
inline __m512i nf4_levels() {
  return _mm512_broadcast_i32x4(
      _mm_setr_epi8(1, 40, 61, 78, 92, 105, 116, (char)128, (char)138, (char)148, (char)159, (char)171, (char)184,
                    (char)199, (char)220, (char)255));
}

struct GroupScales {
  __m512 scale, zero;
};

inline __m512 decode(const uint8_t* codes, float step, float base) {
  const __m512 c = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
  const __m512 value = _mm512_add_ps(_mm512_mul_ps(c, _mm512_set1_ps(step)), _mm512_set1_ps(base));
  return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

inline __m512 load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

template <int S, bool DOUBLE>
inline GroupScales scales(const Matrix& w, int64_t tile, int64_t groups, int64_t g) {
  GroupScales s;
  if constexpr (DOUBLE) {
    const int64_t at = tile * groups + g, pair = tile * ((groups + 15) / 16) + g / 16;
    s.scale = decode(w.scale_codes + at * 16, w.scale_step[pair], w.scale_base[pair]);
    if constexpr (S == INT4) s.zero = decode(w.zero_codes + at * 16, w.zero_step[pair], w.zero_base[pair]);
  } else if constexpr (S == INT4) {
    const uint16_t* p = w.scale + (tile * groups + g) * 32;
    s.scale = load_half(p);
    s.zero = load_half(p + 16);
  } else {
    s.scale = load_half(w.scale + (tile * groups + g) * 16);
  }
  if constexpr (S == NF4) s.scale = _mm512_mul_ps(s.scale, _mm512_set1_ps(1.0f / 127.0f));
  return s;
}

template <int S, bool DOUBLE>
inline void prefetch_scales(const Matrix& w, int64_t tile, int64_t groups, int64_t g) {
  const int64_t at = tile * groups + g;
  if constexpr (DOUBLE) {
    _mm_prefetch(reinterpret_cast<const char*>(w.scale_codes + at * 16), _MM_HINT_T1);
    if constexpr (S == INT4) _mm_prefetch(reinterpret_cast<const char*>(w.zero_codes + at * 16), _MM_HINT_T1);
  } else {
    _mm_prefetch(reinterpret_cast<const char*>(w.scale + at * (S == INT4 ? 32 : 16)), _MM_HINT_T1);
  }
}

// Which lines of the tiles behind these a walk asks for: of the T * bytes_of_group / 64 that it passes a step.
struct Ahead {
  int first, last;
};

// dot[t][r] = the products of a group's codes of T tiles with R rows' codes x, in the units of the rows' second halves, or
// in sixteenths of these for INT4: its nibbles are read where they lie, those in the high half of a byte as 16 times as
// much. `meta` points at the words of this group.
template <int S, int R, int T>
__attribute__((always_inline)) inline void dot_products(const uint8_t* codes, int64_t stride, const int8_t* x,
                                                        const float* meta, __m512i (&dot)[T][R]) {
  constexpr int HALF = GROUP / 2;
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(static_cast<char>(0xf0));
  [[maybe_unused]] const __m512i levels = nf4_levels();
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++)
      dot[t][r] = S == INT4 ? _mm512_setzero_si512() : broadcast_word(meta + OFFSET * ROWS + r);
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    if (half == 1) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
          if constexpr (S == INT4) {
            dot[t][r] = _mm512_sllv_epi32(dot[t][r], broadcast_word(meta + NIBBLE * ROWS + r));
          } else {
            const __m512i right = broadcast_word(meta + RIGHT * ROWS + r), left = broadcast_word(meta + LEFT * ROWS + r);
            dot[t][r] = _mm512_sllv_epi32(_mm512_srav_epi32(dot[t][r], right), left);
          }
        }
    }
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++) {
      __m512i w[T];
      for (int t = 0; t < T; t++) {
        w[t] = _mm512_loadu_si512(codes + t * stride + (S == INT8 ? half * 256 : 0) + b * 64);
        if constexpr (S == INT4) w[t] = _mm512_and_si512(w[t], half == 0 ? low : high);
        if constexpr (S == NF4)
          w[t] = _mm512_shuffle_epi8(levels, _mm512_and_si512(half == 0 ? w[t] : _mm512_srli_epi16(w[t], 4), low));
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512i a = broadcast_word(x + r * GROUP + half * HALF + b * 4);
        for (int t = 0; t < T; t++) dot[t][r] = _mm512_dpbusd_epi32(dot[t][r], w[t], a);
      }
    }
  }
}

// R rows by T tiles of 16 columns over all of k. Groups of weights are whole numbers of groups of activations. `side` is
// how many lines from `aside` on are asked for with each of these.
//
// Inlined, as a call costs half of a group's time, and there are four calls for every 18 groups of a small model.
template <int S, bool DOUBLE, int R, int T>
__attribute__((always_inline)) inline void product(const Matrix& w, int64_t tile, const int8_t* x, const float* meta,
                                                   float* out, int64_t stride, Ahead ahead, const char* aside,
                                                   int64_t side) {
  constexpr int64_t BYTES = bytes_of_group(S);
  const int64_t steps = w.padded() / GROUP, groups = w.k / w.group, each = w.group / GROUP;
  const uint8_t* codes = w.codes + tile * steps * BYTES;
  const uint8_t* next = codes + T * steps * BYTES;
  __m512 sum[T][R], span[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sum[t][r] = _mm512_setzero_ps();
  int64_t g = 0, left = each;  // of this group of weights
  const auto group = [&](auto second) __attribute__((always_inline)) {
    if (ahead.first == 0 && ahead.last > 0 && left == each)
      for (int t = 0; t < T; t++) prefetch_scales<S, DOUBLE>(w, tile + T + t, groups, g);
    // Into the second cache: a line under way to the first holds one of its few places, and the walk's own loads wait.
    for (int l = ahead.first; l < ahead.last; l++) _mm_prefetch(reinterpret_cast<const char*>(next + l * 64), _MM_HINT_T1);
    next += T * BYTES;
    for (int64_t l = 0; l < side; l++) _mm_prefetch(aside + l * 64, _MM_HINT_T1);
    aside += side * 64;
    __m512i dot[T][R];
    dot_products<S, R, T>(codes, steps * BYTES, x, meta + second * ROWS, dot);
    GroupScales s[T];
    for (int t = 0; t < T; t++) s[t] = scales<S, DOUBLE>(w, tile + t, groups, g);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        if constexpr (second) {
          span[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][r]), s[t].scale, span[t][r]);
        } else {
          const __m512i right = broadcast_word(meta + JOIN_RIGHT * ROWS + r), up = broadcast_word(meta + JOIN_LEFT * ROWS + r);
          const __m512i joined = _mm512_sllv_epi32(_mm512_srav_epi32(dot[t][r], right), up);
          span[t][r] = _mm512_mul_ps(_mm512_cvtepi32_ps(joined), s[t].scale);
        }
        if constexpr (S == INT4)
          sum[t][r] = _mm512_fmadd_ps(s[t].zero, _mm512_set1_ps(meta[(SUM + second) * ROWS + r]), sum[t][r]);
      }
    codes += BYTES;
    x += ROWS * GROUP;
    if (--left == 0) g++, left = each;
  };
  const auto end_span = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        const __m512 scale = _mm512_set1_ps(meta[(S == INT4 ? SIXTEENTH : SCALE) * ROWS + r]);
        sum[t][r] = _mm512_fmadd_ps(span[t][r], scale, sum[t][r]);
      }
    meta += META;
  };
  for (int64_t i = 0; i < steps / 2; i++) {
    group(std::integral_constant<int, 0>());
    group(std::integral_constant<int, 1>());
    end_span();
  }
  if (steps % 2) {
    group(std::integral_constant<int, 0>());
    end_span();
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * stride + t * 16, sum[t][r]);
}

// The same for bf16 weights and activations: pairs of inputs in ascending order.
template <int R, int T>
void product_half(const Matrix& w, int64_t tile, const uint16_t* x, int64_t ldx, float* out, int64_t stride) {
  const int64_t pairs = w.padded() / 2;
  const uint16_t* codes = reinterpret_cast<const uint16_t*>(w.codes) + tile * pairs * 32;
  __m512 sum[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sum[t][r] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; p++) {
    __m512i b[T];
    for (int t = 0; t < T; t++) b[t] = _mm512_loadu_si512(codes + t * pairs * 32 + p * 32);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512i a = broadcast_word(x + r * ldx + 2 * p);
      for (int t = 0; t < T; t++) sum[t][r] = add_pairs(sum[t][r], b[t], a);
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * stride + t * 16, sum[t][r]);
}

template <int S, bool DOUBLE, int T>
void columns(const Matrix& w, int64_t tile, const Activations& x, int64_t rows, float* out, int64_t stride,
             bool prefetch, Aside& aside) {
  const int64_t steps = w.padded() / GROUP;
  // The walks over the rows share the asking, so that it is spread over the time until the bytes are wanted.
  constexpr int LINES = static_cast<int>(T * bytes_of_group(S) / 64);
  const int walks = static_cast<int>(std::min<int64_t>((rows + ROWS - 1) / ROWS, LINES));
  for (int64_t first = 0, walk = 0; first < rows; first += ROWS, walk++) {
    Ahead ahead{0, 0};
    if (prefetch && walk < walks)
      ahead = {static_cast<int>(LINES * walk / walks), static_cast<int>(LINES * (walk + 1) / walks)};
    const int8_t* codes = x.codes.get() + first * x.padded;
    const float* meta = x.meta.get() + first / ROWS * (x.padded / SPAN) * META;
    float* at = out + first * stride;
    if (aside.lines.count == 0) aside.refill();
    const int64_t side = std::min(aside.pace, (aside.lines.count + steps - 1) / steps);
    const char* beside = aside.lines.at;
    switch (rows - first) {
      case 1: product<S, DOUBLE, 1, T>(w, tile, codes, meta, at, stride, ahead, beside, side); break;
      case 2: product<S, DOUBLE, 2, T>(w, tile, codes, meta, at, stride, ahead, beside, side); break;
      case 3: product<S, DOUBLE, 3, T>(w, tile, codes, meta, at, stride, ahead, beside, side); break;
      default: product<S, DOUBLE, 4, T>(w, tile, codes, meta, at, stride, ahead, beside, side);
    }
    const int64_t asked = std::min(aside.lines.count, side * steps);
    aside.lines.at += asked * 64;
    aside.lines.count -= asked;
  }
}

template <int T>
void columns_half(const Matrix& w, int64_t tile, const Activations& x, int64_t rows, float* out, int64_t stride) {
  for (int64_t first = 0; first < rows; first += 8) {
    const uint16_t* half = x.half.get() + first * x.padded;
    float* at = out + first * stride;
    switch (rows - first) {
      case 1: product_half<1, T>(w, tile, half, x.padded, at, stride); break;
      case 2: product_half<2, T>(w, tile, half, x.padded, at, stride); break;
      case 3: product_half<3, T>(w, tile, half, x.padded, at, stride); break;
      case 4: product_half<4, T>(w, tile, half, x.padded, at, stride); break;
      case 5: product_half<5, T>(w, tile, half, x.padded, at, stride); break;
      case 6: product_half<6, T>(w, tile, half, x.padded, at, stride); break;
      case 7: product_half<7, T>(w, tile, half, x.padded, at, stride); break;
      default: product_half<8, T>(w, tile, half, x.padded, at, stride);
    }
  }
}

template <int T>
void columns_any(const Matrix& w, int64_t tile, const Activations& x, int64_t rows, float* out, int64_t stride,
                 Aside& aside) {
  // The tiles after these are wanted next, by this thread or another.
  const bool prefetch = tile + 2 * T <= w.tiles();
  const bool twice = w.scale_codes != nullptr;
  switch (w.scheme) {
    case INT4:
      twice ? columns<INT4, true, T>(w, tile, x, rows, out, stride, prefetch, aside)
            : columns<INT4, false, T>(w, tile, x, rows, out, stride, prefetch, aside);
      break;
    case NF4:
      twice ? columns<NF4, true, T>(w, tile, x, rows, out, stride, prefetch, aside)
            : columns<NF4, false, T>(w, tile, x, rows, out, stride, prefetch, aside);
      break;
    case INT8:
      twice ? columns<INT8, true, T>(w, tile, x, rows, out, stride, prefetch, aside)
            : columns<INT8, false, T>(w, tile, x, rows, out, stride, prefetch, aside);
      break;
    default: columns_half<T>(w, tile, x, rows, out, stride);
  }
}

// How often a quarter's unit is halved, at most: what is left of 32 bits where sums of 16 products with 16 times a nibble have
// 20, and there are two of them.
constexpr int MOST_FINER = 11;

// And how much finer than the half behind it a first half can be, so that sums for INT4 are shifted up only: if it is finer
// by more, it adds nothing to the error of the two.
constexpr int MOST_AHEAD = 4;

// Below this a reciprocal would overflow; a span without more is as good as zero.
constexpr float LEAST_PEAK = 1e-30f;

constexpr int QUARTERS = 4;

// A span of one row's inputs on its way into codes.
struct Span {
  const float* from;
  int8_t* codes;  // of its first group; the second one's lie ROWS * GROUP behind
  float* meta;
  float* units;  // null if nobody asks for them

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

// 2^n, n in -126..127.
inline __m512 power_of_two(__m512i n) { return (__m512)_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23); }

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
  constexpr __mmask16 FIRST_HALVES = 0x0f0f;
  const __m512i peak = peaks(spans), top = largest_quarter(peak), unit_peak = best_unit(peak, top);
  const __m512i need = doublings(unit_peak, peak), most = largest_quarter(need);
  const __m512i finer = _mm512_min_epi32(_mm512_sub_epi32(most, need), _mm512_set1_epi32(MOST_FINER));
  const __m512i bound = _mm512_add_epi32(neighbours(finer), _mm512_set1_epi32(MOST_AHEAD));
  const __m512i halved = _mm512_mask_min_epi32(finer, FIRST_HALVES, finer, bound);
  const __mmask16 some = _mm512_cmp_ps_mask((__m512)top, _mm512_set1_ps(LEAST_PEAK), _CMP_NLT_UQ);
  const __m512 coarsest = (__m512)doubled(unit_peak, most), most_code = _mm512_set1_ps(127.0f);
  const __m512 inverse = _mm512_mul_ps(_mm512_maskz_div_ps(some, most_code, coarsest), power_of_two(halved));
  const __m512 unit = _mm512_mul_ps(_mm512_maskz_div_ps(some, coarsest, most_code),
                                    power_of_two(_mm512_sub_epi32(_mm512_setzero_si512(), halved)));
  return {halved, unit, inverse};
}

void encode(const Span* spans, const Units& units) {
  const __m512i zero = _mm512_setzero_si512(), halved = units.halved;
  alignas(64) float factor[QUARTERS][TOGETHER];
  _mm512_store_ps(factor, units.inverse);
  __m512i sum[TOGETHER];
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
  }
  const auto pair = [](__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
  };
  const __m512i low = pair(sum[0], sum[1]), high = pair(sum[2], sum[3]);
  const __m512i total = _mm512_add_epi32(_mm512_unpacklo_epi64(low, high), _mm512_unpackhi_epi64(low, high));

  bool side_by_side = TOGETHER == ROWS;  // rows of one block
  for (int n = 1; n < TOGETHER; n++) side_by_side = side_by_side && spans[n].meta == spans[0].meta + n;
  float elsewhere[META];
  float* to = side_by_side ? spans[0].meta : elsewhere;
  const auto put = [&](int i, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * ROWS), x); };
  const auto put_both = [&](int i, __m512i x) {  // of first halves
    put(i, _mm512_castsi512_si128(x));
    put(i + 1, _mm512_extracti32x4_epi32(x, 2));
  };
  const auto positive = [&](__m512i x) { return larger(x, zero); };
  const auto negative = [&](__m512i x) { return larger(_mm512_sub_epi32(zero, x), zero); };
  put(SCALE, _mm512_extracti32x4_epi32((__m512i)units.unit, 3));
  put(SIXTEENTH, _mm512_extracti32x4_epi32((__m512i)_mm512_mul_ps(units.unit, _mm512_set1_ps(1.0f / 16.0f)), 3));
  const auto inputs = (__m512i)_mm512_mul_ps(_mm512_cvtepi32_ps(total), units.unit);
  put_both(SUM, (__m512i)_mm512_add_ps((__m512)inputs, (__m512)neighbours(inputs)));
  const __m512i shift = _mm512_sub_epi32(neighbours(halved), halved), left = positive(shift), right = negative(shift);
  put_both(NIBBLE, _mm512_add_epi32(shift, _mm512_set1_epi32(4)));
  put_both(LEFT, left);
  put_both(RIGHT, right);
  // 128 times the sum of the codes, to less than one unit.
  const __m512i times = _mm512_slli_epi32(total, 7);
  const __m512i behind = _mm512_srav_epi32(_mm512_sllv_epi32(neighbours(times), right), left);
  put_both(OFFSET, _mm512_sub_epi32(zero, _mm512_add_epi32(times, behind)));
  const __m512i join = _mm512_sub_epi32(others(halved), halved);  // of second halves
  put(JOIN_LEFT, _mm512_extracti32x4_epi32(positive(join), 1));
  put(JOIN_RIGHT, _mm512_extracti32x4_epi32(negative(join), 1));

  if (!side_by_side)
    for (int n = 0; n < TOGETHER; n++)
      for (int i = 0; i < METAS; i++) spans[n].meta[i * ROWS] = elsewhere[i * ROWS + n];
  if (spans[0].units == nullptr) return;
  alignas(64) float each[TOGETHER][QUARTERS];
  _mm512_store_si512(each, turned((__m512i)units.unit));
  for (int n = 0; n < TOGETHER; n++) std::memcpy(spans[n].units, each[n], sizeof each[n]);
}

// In two passes, as what follows from one number to the next takes longer than the work, and only one pass is so short that
// the processor sees the next four spans'.
void quantize(Span* spans, int count) {
  Units units[AT_ONCE / TOGETHER];
  for (; count % TOGETHER != 0; count++) spans[count] = spans[count - 1];  // once more what is written anyhow
  for (int n = 0; n < count; n += TOGETHER) units[n / TOGETHER] = choose_units(spans + n);
  for (int n = 0; n < count; n += TOGETHER) encode(spans + n, units[n / TOGETHER]);
}

float scale_of(const Matrix& w, int64_t row, int64_t g, bool zero) {
  const int64_t tile = row / 16, groups = w.k / w.group, lane = row % 16;
  if (w.scale_codes) {
    const uint8_t* codes = zero ? w.zero_codes : w.scale_codes;
    const int64_t pair = tile * ((groups + 15) / 16) + g / 16;
    const float step = (zero ? w.zero_step : w.scale_step)[pair], base = (zero ? w.zero_base : w.scale_base)[pair];
    const float product = codes[(tile * groups + g) * 16 + lane] * step;
    return half_to_float(_cvtss_sh(product + base, _MM_FROUND_TO_NEAREST_INT));
  }
  if (w.scheme == INT4) return half_to_float(w.scale[(tile * groups + g) * 32 + (zero ? 16 : 0) + lane]);
  return half_to_float(w.scale[(tile * groups + g) * 16 + lane]);
}

}  // namespace

void Activations::reserve(int64_t rows, int64_t k, bool with_codes, bool with_units, bool with_half) {
  padded = (k + SPAN - 1) / SPAN * SPAN;
  wants_codes = with_codes;
  wants_units = with_units;
  wants_half = with_half;
  const int64_t whole = (rows + ROWS - 1) / ROWS * ROWS;
  if (with_codes) {
    codes.reserve(whole * padded);
    meta.reserve(whole / ROWS * (padded / SPAN) * META);
  }
  if (with_units) units.reserve(rows * (padded / SPAN) * QUARTERS);
  if (with_half) half.reserve(rows * padded);
}

void Activations::set(int64_t row, int64_t rows, int64_t from, int64_t to, const float* x, int64_t stride) {
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
      if (wants_half)
        for (int q = 0; q < SPAN; q += 32)
          _mm512_storeu_si512(half.get() + r * padded + i + q,
                              float_to_bf16(_mm512_loadu_ps(at + q), _mm512_loadu_ps(at + q + 16)));
      if (!wants_codes) continue;
      const int64_t step = r / ROWS * (padded / GROUP) + i / GROUP, lane = r % ROWS;
      spans[n++] = {at, codes.get() + (step * ROWS + lane) * GROUP, meta.get() + step / 2 * META + lane,
                    wants_units ? units.get() + (r * padded + i) / SPAN * QUARTERS : nullptr};
      if (n == AT_ONCE) quantize(spans, n), n = 0;
    }
  }
  quantize(spans, n);
}

void Activations::fetch(int64_t rows) const {
  if (!wants_codes) return;
  const int64_t whole = (rows + ROWS - 1) / ROWS * ROWS;
  const char* c = reinterpret_cast<const char*>(codes.get());
  const char* m = reinterpret_cast<const char*>(meta.get());
  const int64_t meta_bytes = whole / ROWS * (padded / SPAN) * META * static_cast<int64_t>(sizeof(float));
  for (int64_t i = 0; i < whole * padded; i += 64) _mm_prefetch(c + i, _MM_HINT_T0);
  for (int64_t i = 0; i < meta_bytes; i += 64) _mm_prefetch(m + i, _MM_HINT_T0);
}

void multiply(const Matrix& w, int64_t first_tile, int64_t last_tile, const Activations& x, int64_t rows, float* out,
              int64_t stride, Aside& aside) {
  int64_t tile = first_tile;
  for (; tile + 2 <= last_tile; tile += 2)
    columns_any<2>(w, tile, x, rows, out + (tile - first_tile) * 16, stride, aside);
  if (tile < last_tile) columns_any<1>(w, tile, x, rows, out + (tile - first_tile) * 16, stride, aside);
}

void dequantize_row(const Matrix& w, int64_t row, float* out) {
  const int64_t tile = row / 16, lane = row % 16, padded = w.padded();
  if (w.scheme == NONE) {
    const uint16_t* codes = reinterpret_cast<const uint16_t*>(w.codes) + tile * padded * 16 + lane * 2;
    for (int64_t i = 0; i < w.k; i++) out[i] = bf16_to_float(codes[i / 2 * 32 + i % 2]);
    return;
  }
  const uint8_t* codes = w.codes + tile * (padded / GROUP) * bytes_of_group(w.scheme) + lane * 4;
  for (int64_t g = 0; g < w.k / w.group; g++) {
    const float scale = scale_of(w, row, g, false);
    const float zero = w.scheme == INT4 ? scale_of(w, row, g, true) : 0.0f;
    for (int64_t i = g * w.group; i < (g + 1) * w.group; i++) {
      if (w.scheme == INT8) {
        out[i] = static_cast<float>(codes[i / 4 * 64 + i % 4] - 128) * scale;
        continue;
      }
      const uint8_t byte = codes[i / GROUP * 256 + i % 16 / 4 * 64 + i % 4];
      const int code = i % GROUP < 16 ? byte & 15 : byte >> 4;
      out[i] = w.scheme == NF4 ? NF4_TABLE[code] * scale : static_cast<float>(code) * scale + zero;
    }
  }
}

}  // namespace loramux
