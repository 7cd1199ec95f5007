#include "gemm.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "amx_gemm.h"
#include "simd.h"

namespace loramux {

// Intel's processors begin two instructions of 512 bits at a time, whatever they do: those that mask the codes of four rows
// are a seventh of all, those that make floats of their scales are a few, and sums may as well wait in the first cache. AMD's
// multiply with half of their pipes or fewer, and the others have time for the rest. Where products of bytes are no
// instructions, codes cost more to make ready than to multiply, on all of them.
bool by_eight = WHOLE_VECTORS ? __builtin_cpu_is("intel") : !BYTE_PRODUCTS;

// Rows of a walk at most.
inline int64_t most_rows() { return by_eight ? 2 * ROWS : ROWS; }

int64_t walks_over(int64_t rows) {
  const int64_t most = most_rows();
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

struct GroupScales {
  __m512 scale, zero;
};

template <int S, bool DOUBLE>
inline GroupScales scales(const Matrix& w, int64_t tile, int64_t groups, int64_t g) {
  GroupScales s;
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

// What a walk asks for of the tiles behind these: so many lines with each group, from `next` on, and their scales.
struct Ahead {
  const uint8_t* next;
  int64_t lines;
  bool scales;
};

// Asks for these lines, and for `side` lines from `aside` on; both go on.
// Into the second cache: a line under way to the first holds one of its few places, and the walk's own loads wait.
__attribute__((always_inline)) inline void ask(Ahead& ahead, int64_t side, const char*& aside) {
  for (int64_t l = 0; l < ahead.lines; l++) _mm_prefetch(reinterpret_cast<const char*>(ahead.next + l * 64), _MM_HINT_T1);
  ahead.next += ahead.lines * 64;
  for (int64_t l = 0; l < side; l++) _mm_prefetch(aside + l * 64, _MM_HINT_T1);
  aside += side * 64;
}

// A walk's rows lie in blocks of ROWS, so many codes and words apart.
struct Rows {
  const int8_t* codes;
  const float* words;
  int64_t codes_apart, words_apart;

  const int8_t* codes_of(int r) const { return codes + r / ROWS * codes_apart + r % ROWS * GROUP; }
  const float* word(int r, int number) const { return words + r / ROWS * words_apart + number * ROWS + r % ROWS; }
};

// A vector of one half of a group's codes. Of INT4 it is bytes of both halves.
template <int S>
__attribute__((always_inline)) inline __m512i load_codes(const uint8_t* codes, int half, int b) {
  const __m512i w = _mm512_loadu_si512(codes + (S == INT8 ? half * 256 : 0) + b * 64);
  if constexpr (S != NF4) return w;
  const __m512i low = _mm512_set1_epi8(15);
  return _mm512_shuffle_epi8(nf4_levels(), _mm512_and_si512(half == 0 ? w : _mm512_srli_epi16(w, 4), low));
}

// dot[t][r] += the products of one half of a group's codes of T tiles with R rows' codes. Nibbles in the high half of a byte
// count 16 times.
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
      const __m512i a = broadcast_word(x.codes_of(r) + half * GROUP / 2 + b * 4);
      for (int t = 0; t < T; t++) dot[t][r] = _mm512_dpbusd_epi32(dot[t][r], w[t], a);
    }
  }
}

// The same where products of bytes are no instructions: eight of nibbles fit into 16 bits, where two of bytes do not. A byte
// is two nibbles.
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
          pairs[b] = _mm512_maddubs_epi16(w[b], broadcast_word(x.codes_of(r) + half * GROUP / 2 + b * 4));
        const __m512i all = _mm512_add_epi16(_mm512_add_epi16(pairs[0], pairs[1]), _mm512_add_epi16(pairs[2], pairs[3]));
        dot[t][r] = _mm512_add_epi32(dot[t][r], _mm512_madd_epi16(all, _mm512_set1_epi16(high == 0 ? 1 : 16)));
      }
    }
  }
}

// dot[t][r] = the products of a group's codes of T tiles with R rows' codes x, in the units of the rows' second halves, or
// in sixteenths of these for INT4: its nibbles are read where they lie, those in the high half of a byte as 16 times as
// much. SECOND: whether it is the second one of its span. CENTRED: the codes of INT4 are taken as 8 less than they are, and
// the words are Pairs.
template <int S, bool CENTRED, int SECOND, int R, int T>
__attribute__((always_inline)) inline void dot_products(const uint8_t* codes, int64_t stride, const Rows& x,
                                                        __m512i (&dot)[T][R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
    for (int t = 0; t < T; t++) {
      if constexpr (S == INT4 && !CENTRED)
        dot[t][r] = _mm512_setzero_si512();
      else
        dot[t][r] = broadcast_word(x.word(r, (CENTRED ? int{MIDDLE} : int{OFFSET}) + SECOND));
    }
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    if (half == 1) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++) {
          if constexpr (S == INT4) {
            const __m512i up = broadcast_word(x.word(r, (CENTRED ? int{HALF_UP} : int{NIBBLE}) + SECOND));
            dot[t][r] = _mm512_sllv_epi32(dot[t][r], up);
          } else {
            const __m512i right = broadcast_word(x.word(r, RIGHT + SECOND)), left = broadcast_word(x.word(r, LEFT + SECOND));
            dot[t][r] = _mm512_sllv_epi32(_mm512_srav_epi32(dot[t][r], right), left);
          }
        }
    }
    if constexpr (BYTE_PRODUCTS)
      add_products<S>(codes, stride, half, x, dot);
    else
      add_nibbles<S>(codes, stride, half, x, dot);
  }
}

// Over all groups, two of them a span; the last one is alone if their number is odd.
template <class Group, class EndSpan>
__attribute__((always_inline)) inline void walk(int64_t steps, Group& group, EndSpan& end_span) {
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

// R rows by T tiles of 16 columns over all of k. Groups of weights are whole numbers of groups of activations. `side` is
// how many lines from `aside` on are asked for with each of these.
//
// Inlined, as a call costs half of a group's time, and of a small model there is one for every 18 groups.
template <int S, bool DOUBLE, int R, int T>
__attribute__((always_inline)) inline void product(const Matrix& w, int64_t tile, Rows x, float* out, int64_t stride,
                                                   Ahead ahead, const char* aside, int64_t side) {
  constexpr int64_t BYTES = bytes_of_group(S);
  const int64_t steps = w.padded() / GROUP, groups = w.k / w.group, each = w.group / GROUP;
  const uint8_t* codes = w.codes + tile * steps * BYTES;
  __m512 sum[T][R], span[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sum[t][r] = _mm512_setzero_ps();
  int64_t g = 0, left = each;  // of this group of weights
  const auto group = [&](auto second) __attribute__((always_inline)) {
    if (ahead.scales && left == each)
      for (int t = 0; t < T; t++) prefetch_scales<S, DOUBLE>(w, tile + T + t, groups, g);
    ask(ahead, side, aside);
    __m512i dot[T][R];
    dot_products<S, false, second, R, T>(codes, steps * BYTES, x, dot);
    GroupScales s[T];
    for (int t = 0; t < T; t++) s[t] = scales<S, DOUBLE>(w, tile + t, groups, g);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        if constexpr (second) {
          span[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[t][r]), s[t].scale, span[t][r]);
        } else {
          const __m512i right = broadcast_word(x.word(r, JOIN_RIGHT)), up = broadcast_word(x.word(r, JOIN_LEFT));
          const __m512i joined = _mm512_sllv_epi32(_mm512_srav_epi32(dot[t][r], right), up);
          span[t][r] = _mm512_mul_ps(_mm512_cvtepi32_ps(joined), s[t].scale);
        }
        if constexpr (S == INT4)
          sum[t][r] = _mm512_fmadd_ps(s[t].zero, _mm512_set1_ps(*x.word(r, SUM + second)), sum[t][r]);
      }
    codes += BYTES;
    x.codes += ROWS * GROUP;
    if (--left == 0) g++, left = each;
  };
  const auto end_span = [&]() __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        const __m512 scale = _mm512_set1_ps(*x.word(r, S == INT4 ? SIXTEENTH : SCALE));
        sum[t][r] = _mm512_fmadd_ps(span[t][r], scale, sum[t][r]);
      }
    x.words += FLOATS;
  };
  walk(steps, group, end_span);
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * stride + t * 16, sum[t][r]);
}

// 2 to the exponent of each column of a tile.
inline __m512 column_units(const Matrix& w, int64_t tile) {
  const __m128i exponent = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.exponents + tile * 16));
  return power_of_two(_mm512_cvtepi8_epi32(exponent));
}

// The scales of a span's two groups side by side, for 16 columns, and what is left of their zeros.
struct SpanScales {
  __m512i scale, zero;
};

// WHOLE: the span is of one group.
template <bool WHOLE>
inline SpanScales span_scales(const int16_t* at) {
  if constexpr (WHOLE) return {words_twice(at, 0), words_twice(at, 1)};
  return {_mm512_loadu_si512(at), _mm512_loadu_si512(at + 32)};
}

// `product` for INT4 whose scales are whole numbers: the sums of both groups of a span, in 16 bits each, meet their scales
// in one instruction, and so do those of the inputs what is left of the zeros. Codes are taken as 8 less than they are, as
// then the sums fit and little is left of the zeros.
template <bool WHOLE, int R, int T>
__attribute__((always_inline)) inline void product_of_spans(const Matrix& w, int64_t tile, Rows x, float* out,
                                                            int64_t stride, Ahead ahead, const char* aside, int64_t side) {
  constexpr int64_t BYTES = bytes_of_group(INT4), SCALES = WHOLE ? 32 : 64;
  const int64_t steps = w.padded() / GROUP, count = w.span_scale_count(), each = WHOLE ? w.group / SPAN : 1;
  const uint8_t* codes = w.codes + tile * steps * BYTES;
  const int16_t* scales = w.span_scales + tile * count * SCALES;
  __m512 sum[T][R];
  __m512i both[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sum[t][r] = _mm512_setzero_ps();
  int64_t left = each;  // spans of this group of weights
  const auto group = [&](auto second) __attribute__((always_inline)) {
    if (ahead.scales && left == each && second < SCALES / 32)
      for (int t = T; t < 2 * T; t++)
        _mm_prefetch(reinterpret_cast<const char*>(scales + t * count * SCALES + second * 32), _MM_HINT_T1);
    ask(ahead, side, aside);
    __m512i dot[T][R];
    dot_products<INT4, true, second, R, T>(codes, steps * BYTES, x, dot);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
      for (int t = 0; t < T; t++) {
        if constexpr (second) {
          const __m512i up = _mm512_sllv_epi32(dot[t][r], broadcast_word(x.word(r, SECOND_UP)));
          both[t][r] = _mm512_mask_blend_epi16(0xaaaaaaaa, both[t][r], up);
        } else {
          both[t][r] = _mm512_srav_epi32(dot[t][r], broadcast_word(x.word(r, FIRST_DOWN)));
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
        const __m512i all = _mm512_dpwssd_epi32(scaled, broadcast_word(x.word(r, INPUTS)), s[t].zero);
        sum[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(*x.word(r, COMMON)), sum[t][r]);
      }
    x.words += PAIRS;
    if (--left == 0) scales += SCALES, left = each;
  };
  walk(steps, group, end_span);  // a last group that is alone has a scale of zero beside its own
  for (int t = 0; t < T; t++) {
    const __m512 unit = column_units(w, tile + t);
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * stride + t * 16, _mm512_mul_ps(sum[t][r], unit));
  }
}

// `product` for bf16 weights and activations: pairs of inputs in ascending order.
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

// How a matrix's products are computed.
template <int S, bool DOUBLE>
struct InFloats {
  static constexpr int SCHEME = S, WORDS = FLOATS;
  static const float* words(const Activations& x) { return x.floats.get(); }
  template <int R, int T, class... A>
  __attribute__((always_inline)) static void rows(A... a) { product<S, DOUBLE, R, T>(a...); }
};
template <bool WHOLE>
struct InSpans {
  static constexpr int SCHEME = INT4, WORDS = PAIRS;
  static const float* words(const Activations& x) { return x.pairs.get(); }
  template <int R, int T, class... A>
  __attribute__((always_inline)) static void rows(A... a) { product_of_spans<WHOLE, R, T>(a...); }
};

template <class Product, int T>
void columns(const Matrix& w, int64_t tile, const Activations& x, int64_t rows, float* out, int64_t stride,
             bool prefetch, Aside& aside) {
  const int64_t steps = w.padded() / GROUP;
  // The walks over the rows share the asking, so that it is spread over the time until the bytes are wanted. Each asks for
  // those behind the last one's: what is asked for last is not what the next tiles begin with.
  constexpr int64_t BYTES = bytes_of_group(Product::SCHEME), LINES = T * BYTES / 64;
  const int64_t most = most_rows(), walks = std::min(walks_over(rows), LINES);
  const uint8_t* next = w.codes + (tile + T) * steps * BYTES;
  Rows at{x.codes.get(), Product::words(x), ROWS * x.padded, x.padded / SPAN * Product::WORDS};
  for (int64_t first = 0, walk = 0, some; first < rows; first += some, walk++) {
    some = rows - first >= most ? most : std::min<int64_t>(ROWS, rows - first);
    Ahead ahead{next, 0, false};
    if (prefetch && walk < walks) ahead = {next, LINES * (walk + 1) / walks - LINES * walk / walks, walk == 0};
    next += ahead.lines * steps * 64;
    float* to = out + first * stride;
    if (aside.lines.count == 0) aside.refill();
    const int64_t side = std::min(aside.pace, (aside.lines.count + steps - 1) / steps);
    const char* beside = aside.lines.at;
    switch (some) {
      case 1: Product::template rows<1, T>(w, tile, at, to, stride, ahead, beside, side); break;
      case 2: Product::template rows<2, T>(w, tile, at, to, stride, ahead, beside, side); break;
      case 3: Product::template rows<3, T>(w, tile, at, to, stride, ahead, beside, side); break;
      case ROWS: Product::template rows<ROWS, T>(w, tile, at, to, stride, ahead, beside, side); break;
      default: Product::template rows<2 * ROWS, T>(w, tile, at, to, stride, ahead, beside, side);
    }
    at.codes += some / ROWS * at.codes_apart;
    at.words += some / ROWS * at.words_apart;
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
  const auto with = [&](auto product) { columns<decltype(product), T>(w, tile, x, rows, out, stride, prefetch, aside); };
  switch (w.scheme) {
    case INT4:
      if (twice) return with(InFloats<INT4, true>());
      return w.whole_spans() ? with(InSpans<true>()) : with(InSpans<false>());
    case NF4: return twice ? with(InFloats<NF4, true>()) : with(InFloats<NF4, false>());
    case INT8: return twice ? with(InFloats<INT8, true>()) : with(InFloats<INT8, false>());
    default: columns_half<T>(w, tile, x, rows, out, stride);
  }
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
  if (w.scheme != INT4) return half_to_float(w.scale[(tile * groups + g) * 16 + lane]);
  const int64_t* odd = std::lower_bound(w.odd_at, w.odd_at + w.odd_count, row * groups + g);
  if (odd != w.odd_at + w.odd_count && *odd == row * groups + g) return half_to_float(w.odd[(odd - w.odd_at) * 2 + zero]);
  const int64_t step = g * w.group / GROUP;  // the group's first one of GROUP
  const int16_t* at = w.span_scales + tile * w.span_scale_count() * (w.whole_spans() ? 32 : 64);
  at += w.whole_spans() ? g * 32 + lane : step / 2 * 64 + lane * 2 + step % 2;
  const int scale = at[0], rest = at[w.whole_spans() ? 16 : 32];
  const float value = std::ldexp(static_cast<float>(zero ? 8 * (rest - scale) : scale), w.exponents[tile * 16 + lane]);
  return half_to_float(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace

void multiply(const Matrix& w, int64_t first_tile, int64_t last_tile, const Activations& x, int64_t rows, float* out,
              int64_t stride, Aside& aside) {
  if constexpr (MATRIX_UNIT) {
    if (w.by_unit()) return multiply_by_unit(w, first_tile, last_tile, x, rows, out, stride, aside);
  }
  constexpr int TOGETHER = WHOLE_VECTORS ? 2 : 1;  // tiles whose sums registers have room for
  int64_t tile = first_tile;
  for (; tile + TOGETHER <= last_tile; tile += TOGETHER)
    columns_any<TOGETHER>(w, tile, x, rows, out + (tile - first_tile) * 16, stride, aside);
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
