#include "gemm.h"

#include <algorithm>
#include <cstring>

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
  const __m512i low = _mm512_set1_epi8(15);
  [[maybe_unused]] const __m512i levels = nf4_levels();
  __m512 sum[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sum[t][r] = _mm512_setzero_ps();
  for (int64_t g = 0; g < groups; g++) {
    GroupScales s[T];
    for (int t = 0; t < T; t++) s[t] = scales<S, DOUBLE>(w, tile + t, groups, g);
    if (ahead.first == 0 && ahead.last > 0)
      for (int t = 0; t < T; t++) prefetch_scales<S, DOUBLE>(w, tile + T + t, groups, g);
    for (int64_t e = 0; e < each; e++) {
      // Into the second cache: a line under way to the first holds one of its few places, and the walk's own loads wait.
      for (int l = ahead.first; l < ahead.last; l++)
        _mm_prefetch(reinterpret_cast<const char*>(next + l * 64), _MM_HINT_T1);
      next += T * BYTES;
      for (int64_t l = 0; l < side; l++) _mm_prefetch(aside + l * 64, _MM_HINT_T1);
      aside += side * 64;
      __m512i dot[T][R];
      for (int t = 0; t < T; t++)
        for (int r = 0; r < R; r++) dot[t][r] = broadcast_word(meta + START * ROWS + r);
#pragma GCC unroll 8
      for (int b = 0; b < 4; b++) {
        __m512i first[T], second[T];
        for (int t = 0; t < T; t++) {
          const uint8_t* at = codes + t * steps * BYTES;
          if constexpr (S == INT8) {
            first[t] = _mm512_loadu_si512(at + b * 128);
            second[t] = _mm512_loadu_si512(at + b * 128 + 64);
          } else {
            const __m512i packed = _mm512_loadu_si512(at + b * 64);
            first[t] = _mm512_and_si512(packed, low);
            second[t] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
            if constexpr (S == NF4) {
              first[t] = _mm512_shuffle_epi8(levels, first[t]);
              second[t] = _mm512_shuffle_epi8(levels, second[t]);
            }
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const __m512i a = broadcast_word(x + r * GROUP + b * 8);
          if (b == 2) {  // the second half begins: into its units
            const __m512i right = broadcast_word(meta + RIGHT * ROWS + r), left = broadcast_word(meta + LEFT * ROWS + r);
            for (int t = 0; t < T; t++) {
              dot[t][r] = _mm512_sllv_epi32(_mm512_srav_epi32(dot[t][r], right), left);
              if constexpr (S != INT4) dot[t][r] = _mm512_add_epi32(dot[t][r], broadcast_word(meta + OFFSET * ROWS + r));
            }
          }
          for (int t = 0; t < T; t++) dot[t][r] = _mm512_dpbusd_epi32(dot[t][r], first[t], a);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const __m512i a = broadcast_word(x + r * GROUP + b * 8 + 4);
          for (int t = 0; t < T; t++) dot[t][r] = _mm512_dpbusd_epi32(dot[t][r], second[t], a);
        }
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
          const __m512 d = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[t][r]), _mm512_set1_ps(meta[SCALE * ROWS + r]));
          sum[t][r] = _mm512_fmadd_ps(d, s[t].scale, sum[t][r]);
          if constexpr (S == INT4) sum[t][r] = _mm512_fmadd_ps(s[t].zero, _mm512_set1_ps(meta[SUM * ROWS + r]), sum[t][r]);
        }
      codes += BYTES;
      x += ROWS * GROUP;
      meta += META;
    }
  }
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) _mm512_storeu_ps(out + r * stride + t * 16, sum[t][r]);
}

// The same for bf16 weights and activations: pairs of inputs in ascending order.
template <int R, int T>
void product_half(const Matrix& w, int64_t tile, const uint16_t* x, float* out, int64_t stride) {
  const int64_t pairs = w.padded() / 2, ldx = w.padded();
  const uint16_t* codes = reinterpret_cast<const uint16_t*>(w.codes) + tile * pairs * 32;
  __m512 sum[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++) sum[t][r] = _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; p++) {
    __m512bh b[T];
    for (int t = 0; t < T; t++) b[t] = (__m512bh)_mm512_loadu_si512(codes + t * pairs * 32 + p * 32);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512bh a = (__m512bh)broadcast_word(x + r * ldx + 2 * p);
      for (int t = 0; t < T; t++) sum[t][r] = _mm512_dpbf16_ps(sum[t][r], b[t], a);
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
    const int8_t* codes = x.codes.get() + first * w.padded();
    const float* meta = x.meta.get() + first / ROWS * steps * META;
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
    const uint16_t* half = x.half.get() + first * w.padded();
    float* at = out + first * stride;
    switch (rows - first) {
      case 1: product_half<1, T>(w, tile, half, at, stride); break;
      case 2: product_half<2, T>(w, tile, half, at, stride); break;
      case 3: product_half<3, T>(w, tile, half, at, stride); break;
      case 4: product_half<4, T>(w, tile, half, at, stride); break;
      case 5: product_half<5, T>(w, tile, half, at, stride); break;
      case 6: product_half<6, T>(w, tile, half, at, stride); break;
      case 7: product_half<7, T>(w, tile, half, at, stride); break;
      default: product_half<8, T>(w, tile, half, at, stride);
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

// Bits that the scales of a group's halves differ by, at most. Sums of 16 products have 19 of 32 bits before.
constexpr int MOST_SHIFT = 7;

// A group of inputs of one row on its way into codes; which of its halves' inputs are there.
struct Group {
  const float* from;
  __mmask16 first, second;
  int8_t* codes;
  float* meta;
  float* units;  // null if nobody asks for them
};

// 2^n, n in -126..127.
inline __m128 power_of_two(__m128i n) { return (__m128)_mm_slli_epi32(_mm_add_epi32(n, _mm_set1_epi32(127)), 23); }

// Four at a time, as what is one number for a group would otherwise cost as much as the group.
void quantize(const Group* groups) {
  constexpr int N = 4;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512 a[N], b[N], most_a[N], most_b[N], sum_a[N], sum_b[N];
  for (int n = 0; n < N; n++) {
    a[n] = _mm512_maskz_loadu_ps(groups[n].first, groups[n].from);
    b[n] = _mm512_maskz_loadu_ps(groups[n].second, groups[n].from + 16);
    most_a[n] = (__m512)((__m512i)a[n] & magnitude);
    most_b[n] = (__m512)((__m512i)b[n] & magnitude);
  }
  // As integers magnitudes have the order that they have as numbers, and NaN is the largest: the row must show it.
  const auto larger = [](__m512 x, __m512 y) { return (__m512)_mm512_max_epi32((__m512i)x, (__m512i)y); };
  const auto peak_a = (__m128i)across(most_a[0], most_a[1], most_a[2], most_a[3], larger);
  const auto peak_b = (__m128i)across(most_b[0], most_b[1], most_b[2], most_b[3], larger);
  const auto peak = (__m128)_mm_max_epi32(peak_a, peak_b);
  // How many times the smaller half can be doubled and not exceed the larger one: bits of floats have one place for
  // each doubling at 2^23.
  const __m128i zero = _mm_setzero_si128(), most_shift = _mm_set1_epi32(MOST_SHIFT);
  const __m128i ahead = _mm_sub_epi32(peak_a, peak_b);
  const __m128i left = _mm_min_epi32(_mm_srli_epi32(_mm_max_epi32(ahead, zero), 23), most_shift);
  const __m128i right =
      _mm_min_epi32(_mm_srli_epi32(_mm_max_epi32(_mm_sub_epi32(zero, ahead), zero), 23), most_shift);
  const __m128 most_code = _mm_set1_ps(127.0f);
  // Below this the reciprocal would overflow; such a group is as good as zero.
  const __mmask8 some = _mm_cmp_ps_mask(peak, _mm_set1_ps(1e-30f), _CMP_NLT_UQ);
  const __m128 inverse = _mm_maskz_div_ps(some, most_code, peak);
  const __m128 scale = _mm_mul_ps(_mm_maskz_div_ps(some, peak, most_code), power_of_two(_mm_sub_epi32(zero, left)));
  alignas(16) float inverse_a[N], inverse_b[N];
  _mm_store_ps(inverse_a, _mm_mul_ps(inverse, power_of_two(right)));
  _mm_store_ps(inverse_b, _mm_mul_ps(inverse, power_of_two(left)));
  __m512i words[N];
  for (int n = 0; n < N; n++) {
    const __m512i qa = _mm512_cvtps_epi32(_mm512_mul_ps(a[n], _mm512_set1_ps(inverse_a[n])));
    const __m512i qb = _mm512_cvtps_epi32(_mm512_mul_ps(b[n], _mm512_set1_ps(inverse_b[n])));
    words[n] = _mm512_packs_epi32(qa, qb);
    sum_a[n] = (__m512)qa;
    sum_b[n] = (__m512)qb;
  }
  // Packing goes by quarters of a vector; back into order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int n = 0; n < N; n += 2) {
    const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packs_epi16(words[n], words[n + 1]));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(groups[n].codes), _mm512_castsi512_si256(bytes));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(groups[n + 1].codes), _mm512_extracti64x4_epi64(bytes, 1));
  }
  const auto plus = [](__m512 x, __m512 y) { return (__m512)_mm512_add_epi32((__m512i)x, (__m512i)y); };
  const auto total_a = (__m128i)across(sum_a[0], sum_a[1], sum_a[2], sum_a[3], plus);
  const auto total_b = (__m128i)across(sum_b[0], sum_b[1], sum_b[2], sum_b[3], plus);
  const __m128 units = power_of_two(_mm_sub_epi32(left, right));  // of the first half in those of the second one
  const __m128 total = _mm_add_ps(_mm_mul_ps(_mm_cvtepi32_ps(total_a), units), _mm_cvtepi32_ps(total_b));
  alignas(16) float meta[METAS][N];
  _mm_store_ps(meta[SCALE], scale);
  _mm_store_ps(meta[SUM], _mm_mul_ps(scale, total));
  _mm_store_ps(meta[START], (__m128)_mm_srli_epi32(_mm_sllv_epi32(_mm_set1_epi32(1), right), 1));
  _mm_store_ps(meta[LEFT], (__m128)left);
  _mm_store_ps(meta[RIGHT], (__m128)right);
  const __m128i whole = _mm_srav_epi32(_mm_sllv_epi32(_mm_slli_epi32(total_a, 7), left), right);  // exactly
  _mm_store_ps(meta[OFFSET], (__m128)_mm_sub_epi32(zero, _mm_add_epi32(whole, _mm_slli_epi32(total_b, 7))));
  for (int n = 0; n < N; n++)
    for (int i = 0; i < METAS; i++) groups[n].meta[i * ROWS] = meta[i][n];
  if (groups[0].units == nullptr) return;
  alignas(16) float first[N];
  _mm_store_ps(first, _mm_mul_ps(scale, units));
  for (int n = 0; n < N; n++) groups[n].units[0] = first[n], groups[n].units[1] = meta[SCALE][n];
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
  padded = (k + GROUP - 1) / GROUP * GROUP;
  wants_codes = with_codes;
  wants_units = with_units;
  wants_half = with_half;
  const int64_t whole = (rows + ROWS - 1) / ROWS * ROWS;
  if (with_codes) {
    codes.reserve(whole * padded);
    meta.reserve(whole / ROWS * (padded / GROUP) * META);
  }
  if (with_units) units.reserve(rows * (padded / GROUP) * 2);
  if (with_half) half.reserve(rows * padded);
}

void Activations::set(int64_t row, int64_t rows, int64_t from, int64_t to, const float* x, int64_t stride) {
  const int64_t steps = padded / GROUP;
  Group groups[4];
  int n = 0;
  for (int64_t i = from; i < to; i += GROUP) {
    const __mmask16 first = first_lanes(to - i), second = first_lanes(to - i - 16);
    for (int64_t r = row; r < row + rows; r++) {
      const float* at = x + (r - row) * stride + (i - from);
      if (wants_half) {
        const __m512 a = _mm512_maskz_loadu_ps(first, at), b = _mm512_maskz_loadu_ps(second, at + 16);
        _mm512_storeu_si512(half.get() + r * padded + i, (__m512i)_mm512_cvtne2ps_pbh(b, a));
      }
      if (!wants_codes) continue;
      const int64_t step = r / ROWS * steps + i / GROUP, lane = r % ROWS;
      float* unit = wants_units ? units.get() + (r * steps + i / GROUP) * 2 : nullptr;
      groups[n++] = {at, first, second, codes.get() + (step * ROWS + lane) * GROUP, meta.get() + step * META + lane, unit};
      if (n == 4) quantize(groups), n = 0;
    }
  }
  if (n == 0) return;
  for (; n < 4; n++) groups[n] = groups[n - 1];  // once more what is written anyhow
  quantize(groups);
}

void Activations::fetch(int64_t rows) const {
  if (!wants_codes) return;
  const int64_t whole = (rows + ROWS - 1) / ROWS * ROWS;
  const char* c = reinterpret_cast<const char*>(codes.get());
  const char* m = reinterpret_cast<const char*>(meta.get());
  const int64_t meta_bytes = whole / ROWS * (padded / GROUP) * META * static_cast<int64_t>(sizeof(float));
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
      const uint8_t byte = codes[i / 8 * 64 + i % 4];
      const int code = i % 8 < 4 ? byte & 15 : byte >> 4;
      out[i] = w.scheme == NF4 ? NF4_TABLE[code] * scale : static_cast<float>(code) * scale + zero;
    }
  }
}

}  // namespace loramux
