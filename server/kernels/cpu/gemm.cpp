#include "gemm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "amx_gemm.h"
#include "simd.h"

namespace loramux {

// Eight-row tiles save instructions that mask codes and convert scales, but keep more accumulators than registers. They
// pay off on Intel, where all 512-bit instructions share two ports, and without VNNI, where unpacking codes costs more
// than multiplying. On AMD other ports do that work in parallel.
bool eight_row_tiles = HAS_AVX512 ? __builtin_cpu_is("intel") : !HAS_VNNI;

// Most rows of a tile.
inline int64_t max_tile_rows() { return eight_row_tiles ? 2 * ROWS : ROWS; }

int64_t passes_over(int64_t rows) {
  const int64_t most = max_tile_rows();
  return rows / most + (rows % most + ROWS - 1) / ROWS;
}

// The quantiles of NormalFloat4 (QLoRA, appendix E), as in server/kernels/packed_format.py.
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

struct GroupScale {
  __m512 scale, zero;
};

template <int S, bool DOUBLE>
inline GroupScale scales(const Matrix& w, int64_t tile, int64_t groups, int64_t g) {
  GroupScale s;
  if constexpr (DOUBLE) {
    const int64_t at = tile * groups + g, pair = tile * ((groups + 15) / 16) + g / 16;
    s.scale = decode(w.scale_codes + at * 16, w.scale_step[pair], w.scale_base[pair]);
    if constexpr (S == INT4) s.zero = decode(w.zero_codes + at * 16, w.zero_step[pair], w.zero_base[pair]);
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
    _mm_prefetch(reinterpret_cast<const char*>(w.scale + at * 16), _MM_HINT_T1);
  }
}

// What to prefetch of the next tiles: so many lines with each group, from `next` on, and their scales.
struct NextTile {
  const uint8_t* next;
  int64_t lines;
  bool scales;
};

// Prefetches lines of the next tile and `extra_lines` lines from `extra` on, and advances both. Into the L2 cache:
// prefetches to L1 would occupy line fill buffers that the loop's own loads need.
__attribute__((always_inline)) inline void prefetch_lines(NextTile& next_tile, int64_t extra_lines,
                                                          const char*& extra) {
  for (int64_t l = 0; l < next_tile.lines; l++)
    _mm_prefetch(reinterpret_cast<const char*>(next_tile.next + l * 64), _MM_HINT_T1);
  next_tile.next += next_tile.lines * 64;
  for (int64_t l = 0; l < extra_lines; l++) _mm_prefetch(extra + l * 64, _MM_HINT_T1);
  extra += extra_lines * 64;
}

// Rows of a tile, in blocks of ROWS.
struct Rows {
  const int8_t* codes;
  const float* params;
  int64_t codes_stride, params_stride;

  const int8_t* codes_of(int r) const { return codes + r / ROWS * codes_stride + r % ROWS * GROUP; }
  const float* param(int r, int number) const { return params + r / ROWS * params_stride + number * ROWS + r % ROWS; }
};

// A vector of one half of a group's codes. For INT4 its bytes contain both halves.
template <int S>
__attribute__((always_inline)) inline __m512i load_codes(const uint8_t* codes, int half, int b) {
  const __m512i w = _mm512_loadu_si512(codes + (S == INT8 ? half * 256 : 0) + b * 64);
  if constexpr (S != NF4) return w;
  const __m512i low = _mm512_set1_epi8(15);
  return _mm512_shuffle_epi8(nf4_levels(), _mm512_and_si512(half == 0 ? w : _mm512_srli_epi16(w, 4), low));
}

// dot[t][r] += dot product of one half of a group's codes of T tiles with R rows. Codes in the high nibble count 16
// times.
template <int S, int R, int T>
__attribute__((always_inline)) inline void add_products(const uint8_t* codes, int64_t stride, int half, const Rows& x,
                                                        __m512i (&dot)[T][R]) {
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(static_cast<char>(0xf0));
#pragma GCC unroll 4
  for (int b = 0; b < 4; b++) {
    __m512i w[T];
    for (int t = 0; t < T; t++) {
      w[t] = load_codes<S>(codes + t * stride, half, b);
      if constexpr (S == INT4) w[t] = _mm512_and_si512(w[t], half == 0 ? low : high);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512i a = broadcast32(x.codes_of(r) + half * GROUP / 2 + b * 4);
      for (int t = 0; t < T; t++) dot[t][r] = _mm512_dpbusd_epi32(dot[t][r], w[t], a);
    }
  }
}

// The same without VNNI: eight products with nibbles fit in 16 bits, two products with bytes do not. A byte is two
// nibbles.
template <int S, int R, int T>
__attribute__((always_inline)) inline void add_nibbles(const uint8_t* codes, int64_t stride, int half, const Rows& x,
                                                       __m512i (&dot)[T][R]) {
  const __m512i low = _mm512_set1_epi8(15);
#pragma GCC unroll 2
  for (int high = 0; high < 2; high++) {
    if (S == INT4 && high != half) continue;
    for (int t = 0; t < T; t++) {
      __m512i w[4];
      for (int b = 0; b < 4; b++) {
        w[b] = load_codes<S>(codes + t * stride, half, b);
        w[b] = _mm512_and_si512(high == 0 ? w[b] : _mm512_srli_epi16(w[b], 4), low);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        __m512i pairs[4];
        for (int b = 0; b < 4; b++)
          pairs[b] = _mm512_maddubs_epi16(w[b], broadcast32(x.codes_of(r) + half * GROUP / 2 + b * 4));
        const __m512i all =
            _mm512_add_epi16(_mm512_add_epi16(pairs[0], pairs[1]), _mm512_add_epi16(pairs[2], pairs[3]));
        dot[t][r] = _mm512_add_epi32(dot[t][r], _mm512_madd_epi16(all, _mm512_set1_epi16(high == 0 ? 1 : 16)));
      }
    }
  }
}

// dot[t][r] = dot product of a group's codes of T tiles with R rows, in the scale of the rows' second halves (1/16 of
// it for INT4, whose high nibbles count 16 times). SECOND: whether it is the second group of its span. CENTRED: INT4
// codes count as code - 8, and parameters are IntParam.
template <int S, bool CENTRED, int SECOND, int R, int T>
__attribute__((always_inline)) inline void dot_products(const uint8_t* codes, int64_t stride, const Rows& x,
                                                        __m512i (&dot)[T][R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      if constexpr (S == INT4 && !CENTRED)
        dot[t][r] = _mm512_setzero_si512();
      else
        dot[t][r] = broadcast32(x.param(r, (CENTRED ? int{BEGIN} : int{OFFSET}) + SECOND));
    }
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    if (half == 1) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
          if constexpr (S == INT4) {
            const __m512i up = broadcast32(x.param(r, (CENTRED ? int{HALF_SHIFT} : int{NIBBLE_SHIFT}) + SECOND));
            dot[t][r] = _mm512_sllv_epi32(dot[t][r], up);
          } else {
            const __m512i right = broadcast32(x.param(r, RIGHT_SHIFT + SECOND)),
                          left = broadcast32(x.param(r, LEFT_SHIFT + SECOND));
            dot[t][r] = _mm512_sllv_epi32(_mm512_srav_epi32(dot[t][r], right), left);
          }
        }
    }
    if constexpr (HAS_VNNI)
      add_products<S>(codes, stride, half, x, dot);
    else
      add_nibbles<S>(codes, stride, half, x, dot);
  }
}

// Calls `group` for each group and `end_span` after every two; an odd last group has a span of its own.
template <class Group, class EndSpan>
__attribute__((always_inline)) inline void for_each_group(int64_t steps, Group& group, EndSpan& end_span) {
  for (int64_t i = 0; i < steps / 2; i++) {
    group(std::integral_constant<int, 0>());
    group(std::integral_constant<int, 1>());
    end_span();
  }
  if (steps % 2) {
    group(std::integral_constant<int, 0>());
    end_span();
  }
}

// R rows by T tiles of 16 columns over all of k. A weight group is a whole number of activation groups. `extra_lines`
// lines from `extra` on are prefetched with each. Inlined, because a call would cost half of a group's time.
template <int S, bool DOUBLE, int R, int T>
__attribute__((always_inline)) inline void gemm_tile(const Matrix& w, int64_t tile, Rows x, float* out, int64_t stride,
                                                     NextTile next_tile, const char* extra, int64_t extra_lines) {
  constexpr int64_t BYTES = bytes_of_group(S);
  const int64_t steps = w.padded() / GROUP, groups = w.k / w.group, each = w.group / GROUP;
  const uint8_t* codes = w.codes + tile * steps * BYTES;
  __m512 sum[T][R], span[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sum[t][r] = _mm512_setzero_ps();
  int64_t g = 0, left = each;  // activation groups left of this weight group
  const auto group = [&](auto second) __attribute__((always_inline)) {
    if (next_tile.scales && left == each)
      for (int t = 0; t < T; t++) prefetch_scales<S, DOUBLE>(w, tile + T + t, groups, g);
    prefetch_lines(next_tile, extra_lines, extra);
    __m512i dot[T][R];
    dot_products<S, false, second, R, T>(codes, steps * BYTES, x, dot);
    GroupScale s[T];
    for (int t = 0; t < T; t++) s[t] = scales<S, DOUBLE>(w, tile + t, groups, g);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        if constexpr (second) {
          span[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][r]), s[t].scale, span[t][r]);
        } else {
          const __m512i right = broadcast32(x.param(r, JOIN_RIGHT)), up = broadcast32(x.param(r, JOIN_LEFT));
          const __m512i joined = _mm512_sllv_epi32(_mm512_srav_epi32(dot[t][r], right), up);
          span[t][r] = _mm512_mul_ps(_mm512_cvtepi32_ps(joined), s[t].scale);
        }
        if constexpr (S == INT4)
          sum[t][r] = _mm512_fmadd_ps(s[t].zero, _mm512_set1_ps(*x.param(r, SUM + second)), sum[t][r]);
      }
    codes += BYTES;
    x.codes += ROWS * GROUP;
    if (--left == 0) g++, left = each;
  };
  const auto end_span = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        const __m512 scale = _mm512_set1_ps(*x.param(r, S == INT4 ? SCALE_16TH : SCALE));
        sum[t][r] = _mm512_fmadd_ps(span[t][r], scale, sum[t][r]);
      }
    x.params += FLOAT_PARAMS;
  };
  for_each_group(steps, group, end_span);
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * stride + t * 16, sum[t][r]);
}

// 2^exponent for each column of a tile.
inline __m512 column_units(const Matrix& w, int64_t tile) {
  const __m128i exponent = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.exponents + tile * 16));
  return power_of_two(_mm512_cvtepi8_epi32(exponent));
}

// Scales and zeros of a span's two groups, extra_lines by extra_lines for 16 columns.
struct SpanScales {
  __m512i scale, zero;
};

// WHOLE: a span lies within one weight group.
template <bool WHOLE>
inline SpanScales span_scales(const int16_t* at) {
  if constexpr (WHOLE) return {duplicate_words(at, 0), duplicate_words(at, 1)};
  return {_mm512_loadu_si512(at), _mm512_loadu_si512(at + 32)};
}

// `gemm_tile` for INT4 with integer scales: the 16-bit accumulators of both groups of a span meet their scales in one
// instruction, and so do the input sums and zeros. Codes count as code - 8, so that sums fit and zeros are small.
template <bool WHOLE, int R, int T>
__attribute__((always_inline)) inline void gemm_tile_int_scales(const Matrix& w, int64_t tile, Rows x, float* out,
                                                                int64_t stride, NextTile next_tile, const char* extra,
                                                                int64_t extra_lines) {
  constexpr int64_t BYTES = bytes_of_group(INT4), SCALES = WHOLE ? 32 : 64;
  const int64_t steps = w.padded() / GROUP, count = w.span_scale_count(), each = WHOLE ? w.group / SPAN : 1;
  const uint8_t* codes = w.codes + tile * steps * BYTES;
  const int16_t* scales = w.span_scales + tile * count * SCALES;
  __m512 sum[T][R];
  __m512i both[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sum[t][r] = _mm512_setzero_ps();
  int64_t left = each;  // spans left of this weight group
  const auto group = [&](auto second) __attribute__((always_inline)) {
    if (next_tile.scales && left == each && second < SCALES / 32)
      for (int t = T; t < 2 * T; t++)
        _mm_prefetch(reinterpret_cast<const char*>(scales + t * count * SCALES + second * 32), _MM_HINT_T1);
    prefetch_lines(next_tile, extra_lines, extra);
    __m512i dot[T][R];
    dot_products<INT4, true, second, R, T>(codes, steps * BYTES, x, dot);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        if constexpr (second) {
          const __m512i up = _mm512_sllv_epi32(dot[t][r], broadcast32(x.param(r, SECOND_SHIFT)));
          both[t][r] = _mm512_mask_blend_epi16(0xaaaaaaaa, both[t][r], up);
        } else {
          both[t][r] = _mm512_srav_epi32(dot[t][r], broadcast32(x.param(r, FIRST_SHIFT)));
        }
      }
    codes += BYTES;
    x.codes += ROWS * GROUP;
  };
  const auto end_span = [&]() __attribute__((always_inline)) {
    SpanScales s[T];
    for (int t = 0; t < T; t++) s[t] = span_scales<WHOLE>(scales + t * count * SCALES);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        const __m512i scaled = _mm512_dpwssd_epi32(_mm512_setzero_si512(), both[t][r], s[t].scale);
        const __m512i all = _mm512_dpwssd_epi32(scaled, broadcast32(x.param(r, INPUT_SUM)), s[t].zero);
        sum[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(*x.param(r, COMMON_SCALE)), sum[t][r]);
      }
    x.params += INT_PARAMS;
    if (--left == 0) scales += SCALES, left = each;
  };
  for_each_group(steps, group, end_span);  // an odd last group has a zero scale beside its own
  for (int t = 0; t < T; t++) {
    const __m512 unit = column_units(w, tile + t);
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * stride + t * 16, _mm512_mul_ps(sum[t][r], unit));
  }
}

// `gemm_tile` for bf16 weights and activations: pairs of inputs in ascending order.
template <int R, int T>
void gemm_tile_bf16(const Matrix& w, int64_t tile, const uint16_t* x, int64_t ldx, float* out, int64_t stride) {
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
      const __m512i a = broadcast32(x + r * ldx + 2 * p);
      for (int t = 0; t < T; t++) sum[t][r] = dot_bf16(sum[t][r], b[t], a);
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * stride + t * 16, sum[t][r]);
}

// The kernels for each kind of scales.
template <int S, bool DOUBLE>
struct FloatScaleGemm {
  static constexpr int SCHEME = S, PARAMS = FLOAT_PARAMS;
  static const float* params(const Activations& x) { return x.float_params.get(); }
  template <int R, int T, class... A>
  __attribute__((always_inline)) static void rows(A... a) {
    gemm_tile<S, DOUBLE, R, T>(a...);
  }
};
template <bool WHOLE>
struct IntScaleGemm {
  static constexpr int SCHEME = INT4, PARAMS = INT_PARAMS;
  static const float* params(const Activations& x) { return x.int_params.get(); }
  template <int R, int T, class... A>
  __attribute__((always_inline)) static void rows(A... a) {
    gemm_tile_int_scales<WHOLE, R, T>(a...);
  }
};

template <class Product, int T>
void gemm_columns(const Matrix& w, int64_t tile, const Activations& x, int64_t rows, float* out, int64_t stride,
                  bool prefetch, Prefetcher& prefetcher) {
  const int64_t steps = w.padded() / GROUP;
  // The passes over the rows share the prefetches, to spread them over time.
  constexpr int64_t BYTES = bytes_of_group(Product::SCHEME), LINES = T * BYTES / 64;
  const int64_t max_rows = max_tile_rows(), passes = std::min(passes_over(rows), LINES);
  const uint8_t* next = w.codes + (tile + T) * steps * BYTES;
  Rows at{x.codes.get(), Product::params(x), ROWS * x.padded, x.padded / SPAN * Product::PARAMS};
  for (int64_t first = 0, pass = 0, count; first < rows; first += count, pass++) {
    count = rows - first >= max_rows ? max_rows : std::min<int64_t>(ROWS, rows - first);
    NextTile next_tile{next, 0, false};
    if (prefetch && pass < passes) next_tile = {next, LINES * (pass + 1) / passes - LINES * pass / passes, pass == 0};
    next += next_tile.lines * steps * 64;
    float* to = out + first * stride;
    if (prefetcher.lines.count == 0) prefetcher.refill();
    const int64_t extra_lines = std::min(prefetcher.rate, (prefetcher.lines.count + steps - 1) / steps);
    const char* extra = prefetcher.lines.at;
    switch (count) {
      case 1: Product::template rows<1, T>(w, tile, at, to, stride, next_tile, extra, extra_lines); break;
      case 2: Product::template rows<2, T>(w, tile, at, to, stride, next_tile, extra, extra_lines); break;
      case 3: Product::template rows<3, T>(w, tile, at, to, stride, next_tile, extra, extra_lines); break;
      case ROWS: Product::template rows<ROWS, T>(w, tile, at, to, stride, next_tile, extra, extra_lines); break;
      default: Product::template rows<2 * ROWS, T>(w, tile, at, to, stride, next_tile, extra, extra_lines);
    }
    at.codes += count / ROWS * at.codes_stride;
    at.params += count / ROWS * at.params_stride;
    const int64_t prefetched = std::min(prefetcher.lines.count, extra_lines * steps);
    prefetcher.lines.at += prefetched * 64;
    prefetcher.lines.count -= prefetched;
  }
}

template <int T>
void gemm_columns_bf16(const Matrix& w, int64_t tile, const Activations& x, int64_t rows, float* out, int64_t stride) {
  for (int64_t first = 0; first < rows; first += 8) {
    const uint16_t* half = x.bf16.get() + first * x.padded;
    float* at = out + first * stride;
    dispatch<8>(rows - first, [&](auto n) { gemm_tile_bf16<n, T>(w, tile, half, x.padded, at, stride); });
  }
}

template <int T>
void gemm_columns_any(const Matrix& w, int64_t tile, const Activations& x, int64_t rows, float* out, int64_t stride,
                      Prefetcher& prefetcher) {
  // Whether the tiles after these exist, to prefetch them.
  const bool prefetch = tile + 2 * T <= w.tiles();
  const bool twice = w.scale_codes != nullptr;
  const auto with = [&](auto gemm_tile) {
    gemm_columns<decltype(gemm_tile), T>(w, tile, x, rows, out, stride, prefetch, prefetcher);
  };
  switch (w.scheme) {
    case INT4:
      if (twice) return with(FloatScaleGemm<INT4, true>());
      return w.whole_spans() ? with(IntScaleGemm<true>()) : with(IntScaleGemm<false>());
    case NF4: return twice ? with(FloatScaleGemm<NF4, true>()) : with(FloatScaleGemm<NF4, false>());
    case INT8: return twice ? with(FloatScaleGemm<INT8, true>()) : with(FloatScaleGemm<INT8, false>());
    default: gemm_columns_bf16<T>(w, tile, x, rows, out, stride);
  }
}

float scale_of(const Matrix& w, int64_t row, int64_t g, bool zero) {
  const int64_t tile = row / 16, groups = w.k / w.group, lane = row % 16;
  if (w.scale_codes) {
    const uint8_t* codes = zero ? w.zero_codes : w.scale_codes;
    const int64_t pair = tile * ((groups + 15) / 16) + g / 16;
    const float step = (zero ? w.zero_step : w.scale_step)[pair], base = (zero ? w.zero_base : w.scale_base)[pair];
    const float gemm_tile = codes[(tile * groups + g) * 16 + lane] * step;
    return half_to_float(_cvtss_sh(gemm_tile + base, _MM_FROUND_TO_NEAREST_INT));
  }
  if (w.scheme != INT4) return half_to_float(w.scale[(tile * groups + g) * 16 + lane]);
  const int64_t* exception_values =
      std::lower_bound(w.exception_at, w.exception_at + w.exception_count, row * groups + g);
  if (exception_values != w.exception_at + w.exception_count && *exception_values == row * groups + g)
    return half_to_float(w.exception_values[(exception_values - w.exception_at) * 2 + zero]);
  const int64_t step = g * w.group / GROUP;  // the group's first activation group
  const int16_t* at = w.span_scales + tile * w.span_scale_count() * (w.whole_spans() ? 32 : 64);
  at += w.whole_spans() ? g * 32 + lane : step / 2 * 64 + lane * 2 + step % 2;
  const int scale = at[0], rest = at[w.whole_spans() ? 16 : 32];
  const float value = std::ldexp(static_cast<float>(zero ? 8 * (rest - scale) : scale), w.exponents[tile * 16 + lane]);
  return half_to_float(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace

void multiply(const Matrix& w, int64_t first_tile, int64_t last_tile, const Activations& x, int64_t rows, float* out,
              int64_t stride, Prefetcher& prefetcher) {
  if constexpr (HAS_AMX) {
    if (w.uses_amx()) return multiply_amx(w, first_tile, last_tile, x, rows, out, stride, prefetcher);
  }
  constexpr int TOGETHER = HAS_AVX512 ? 2 : 1;  // tiles whose accumulators fit in registers
  int64_t tile = first_tile;
  for (; tile + TOGETHER <= last_tile; tile += TOGETHER)
    gemm_columns_any<TOGETHER>(w, tile, x, rows, out + (tile - first_tile) * 16, stride, prefetcher);
  if (tile < last_tile) gemm_columns_any<1>(w, tile, x, rows, out + (tile - first_tile) * 16, stride, prefetcher);
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
