// Unpacks quantized weights for AMX: to 16-bit integers, split into high and low bytes, in units of 1/256 of the
// column's 8-bit scale; or to 8-bit integers with a remainder per group. Also what the AMX kernels and the vector
// kernels in gemv.h share.
#pragma once
#include "target.h"

#include <algorithm>
#include <cstdint>

#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace loramux {

constexpr int64_t TILE_BYTES = 1024;  // 16 rows of 64 bytes: a span of 16 columns
constexpr uint64_t ODD_BYTES = 0xaaaaaaaaaaaaaaaaull;

// 1 / the 8-bit scale of each column of a tile.
inline __m512 inverse_scales(const Matrix& w, int64_t tile) {
  return bf16_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.inverse_scale + tile * 16)));
}

// Scale and zero point of a group, in 1/256 of the column's scale, per column lane: the same value in both 16-bit
// halves, or the first group's in the low and the second's in the high half.
struct ScaleZero {
  __m512i scale, zero;
};

// Splits 16-bit weights of even and odd inputs into high and low bytes.
inline void split_words(__m512i even, __m512i odd, int8_t* to) {
  const __m512i crossed = _mm512_shldi_epi16(odd, even, 8);  // low bytes of odd inputs, high bytes of even ones
  _mm512_store_si512(to, _mm512_mask_blend_epi8(ODD_BYTES, crossed, odd));
  _mm512_store_si512(to + TILE_BYTES, _mm512_mask_blend_epi8(ODD_BYTES, even, crossed));
}

// A quarter of a group of 16 columns of INT4: w = code scale + zero, which fits in 16 bits.
inline void split_nibbles(const uint8_t* codes, const ScaleZero& per_group, int8_t* to) {
  const __m512i low = _mm512_set1_epi16(15), w = _mm512_loadu_si512(codes);
  const auto word = [&](__m512i code) {
    return _mm512_add_epi16(_mm512_mullo_epi16(code, per_group.scale), per_group.zero);
  };
  split_words(word(_mm512_and_si512(w, low)), word(_mm512_and_si512(_mm512_srli_epi16(w, 8), low)), to);
  split_words(word(_mm512_and_si512(_mm512_srli_epi16(w, 4), low)), word(_mm512_srli_epi16(w, 12)), to + 256);
}

// Scale and zero for 8-bit weights, w = floor(code scale / 2^12) + zero, with the zero in the high byte. The remainder
// of a group (signed, in 1/256 of the column's scale, in the low byte) is the rest of the zero point plus the mean loss
// of rounding down.
struct Int8Scales {
  ScaleZero per_group;
  __m512i remainder;
};
inline Int8Scales int8_scales(const ScaleZero& of) {
  const __m512i scale = _mm512_slli_epi16(of.scale, 4);
  const __m512i taken =
      _mm512_min_epu16(_mm512_srli_epi16(_mm512_sub_epi16(scale, of.scale), 1), _mm512_set1_epi16(120));
  const __m512i zero = _mm512_add_epi16(of.zero, taken);
  return {{scale, _mm512_add_epi16(zero, _mm512_set1_epi16(128))}, _mm512_and_si512(zero, _mm512_set1_epi16(255))};
}

// The high byte of each lane's low word, or of its high word, in all four bytes.
inline __m512i high_bytes(__m512i words, bool second) {
  const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13));
  return _mm512_shuffle_epi8(words, second ? _mm512_add_epi8(first, _mm512_set1_epi8(2)) : first);
}

// 8-bit weights from codes in the high nibbles. The low byte of a word is multiplied at 1/256 of its value.
inline __m512i int8_from_nibbles(__m512i codes, const ScaleZero& per_group) {
  const __m512i low = _mm512_set1_epi16(0x00f0), high = _mm512_set1_epi16(static_cast<int16_t>(0xf000));
  const __m512i even = _mm512_mulhi_epu16(_mm512_and_si512(codes, low), per_group.scale);
  const __m512i odd = _mm512_mulhi_epu16(_mm512_and_si512(codes, high), per_group.scale);
  return _mm512_add_epi8(_mm512_mask_blend_epi8(ODD_BYTES, even, odd), per_group.zero);
}

inline void unpack_int8(const uint8_t* codes, const ScaleZero& per_group, int8_t* to) {
  const __m512i w = _mm512_loadu_si512(codes);
  _mm512_store_si512(to, int8_from_nibbles(_mm512_slli_epi16(w, 4), per_group));
  _mm512_store_si512(to + 256, int8_from_nibbles(w, per_group));
}

// Stores the remainders of a tile's groups in the AMX layout: four values per column for two spans.
inline void store_remainder(__m512i remainder, int64_t span, int8_t* to) {
  int8_t* at = to + span % SPANS_PER_SUM_SPAN / 2 * 64;
  _mm512_store_si512(
      at, span % 2 == 0 ? remainder : _mm512_or_si512(_mm512_load_si512(at), _mm512_slli_epi16(remainder, 8)));
}

// w = code scale / 2^7, rounded, for 8-bit codes.
inline void split_bytes(__m512i codes, const ScaleZero& per_group, int8_t* to) {
  const __m512i odd = _mm512_and_si512(codes, _mm512_set1_epi16(static_cast<int16_t>(0xff00)));
  split_words(_mm512_mulhrs_epi16(_mm512_slli_epi16(codes, 8), per_group.scale),
              _mm512_mulhrs_epi16(odd, per_group.scale), to);
}

// Unpacks a quarter of a group of 16 columns to the AMX layout: four inputs per column in each 64 bytes.
template <int S, bool INT16>
__attribute__((always_inline)) inline void unpack_quarter(const uint8_t* codes, int quarter, const ScaleZero& per_group,
                                                          int8_t* to) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(128));
  if constexpr (S == INT8) {
    for (int b = quarter * 2; b < quarter * 2 + 2; b++)
      split_bytes(_mm512_xor_si512(_mm512_loadu_si512(codes + b * 64), sign), per_group, to + b * 64);
    return;
  }
  codes += quarter * 64, to += quarter * 64;
  if constexpr (S == INT4) INT16 ? split_nibbles(codes, per_group, to) : unpack_int8(codes, per_group, to);
  if constexpr (S == NF4) {
    const __m512i low = _mm512_set1_epi8(15), levels = _mm512_xor_si512(nf4_levels(), sign),
                  c = _mm512_loadu_si512(codes);
    split_bytes(_mm512_shuffle_epi8(levels, _mm512_and_si512(c, low)), per_group, to);
    split_bytes(_mm512_shuffle_epi8(levels, _mm512_and_si512(_mm512_srli_epi16(c, 4), low)), per_group, to + 256);
  }
}

// Copies each lane's low word to its high word.
inline __m512i duplicate_low(__m512i words) {
  return _mm512_or_si512(_mm512_and_si512(words, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(words, 16));
}

// Iterates over the group scales of a tile, span by span, for INT4 with integer scales. `per_group` has one entry per
// group, `both` has the two side by side.
template <bool WHOLE>
struct IntScales {
  static constexpr int SCHEME = INT4;
  ScaleZero per_group[2], both;
  __m512i remainder;
  const int64_t stride, each;
  const int16_t* scales;
  int64_t left;
  __m512i factor;  // of scales and zeros, times 2^15

  IntScales(const Matrix& w, int64_t tile)
      : stride(w.span_scale_count() * (WHOLE ? 32 : 64)),
        each(WHOLE ? w.group / SPAN : 1),
        scales(w.span_scales + tile * stride),
        left(each) {
    const __m128i exponent = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.exponents + tile * 16));
    const __m512i up = _mm512_add_epi32(_mm512_cvtepi8_epi32(exponent), _mm512_set1_epi32(23));
    const __m512 fine = _mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_cvtepi32_ps(up));
    factor = duplicate_low(_mm512_cvtps_epi32(_mm512_mul_ps(fine, inverse_scales(w, tile))));
  }

  // Prefetches the scales of the tile that many tiles further on.
  void prefetch(int64_t run_tiles) const {
    const char* p = reinterpret_cast<const char*>(scales + run_tiles * stride);
    _mm_prefetch(p, _MM_HINT_T1);
    if constexpr (!WHOLE) _mm_prefetch(p + 64, _MM_HINT_T1);
  }

  template <bool INT16>
  void next() {
    __m512i s, z;
    if constexpr (WHOLE) {
      s = duplicate_words(scales, 0);
      z = duplicate_words(scales, 1);
      if (--left == 0) scales += 32, left = each;
    } else {
      s = _mm512_loadu_si512(scales);
      z = _mm512_loadu_si512(scales + 32);
      scales += 64;
    }
    s = _mm512_mulhrs_epi16(s, factor);
    z = _mm512_slli_epi16(_mm512_sub_epi16(_mm512_mulhrs_epi16(z, factor), s), 3);
    both = {s, z};
    ScaleZero words = both;
    if constexpr (!INT16) {
      const Int8Scales bytes = int8_scales(both);
      words = bytes.per_group, remainder = bytes.remainder;
    }
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
    for (int g = 0; g < 2; g++) {
      const __m512i one = g == 0 ? first : _mm512_add_epi8(first, _mm512_set1_epi8(2));
      per_group[g].scale = WHOLE ? words.scale : _mm512_shuffle_epi8(words.scale, one);
      per_group[g].zero = !INT16  ? high_bytes(words.zero, g == 1)
                          : WHOLE ? words.zero
                                  : _mm512_shuffle_epi8(words.zero, one);
    }
  }
};

// The same for float or double-quantized scales.
template <int S, bool DOUBLE>
struct FloatScales {
  static constexpr int SCHEME = S;
  ScaleZero per_group[2], both;
  __m512i remainder;
  const Matrix& w;
  const int64_t tile, groups, each;
  int64_t group = 0, left = 0;
  __m512 factor;
  ScaleZero now = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // of the group before `group`

  FloatScales(const Matrix& w, int64_t tile) : w(w), tile(tile), groups(w.k / w.group), each(w.group / GROUP) {
    constexpr float TIMES = S == INT4 ? 256.0f : S == NF4 ? 32767.0f / 127.0f : 32768.0f;
    factor = _mm512_mul_ps(_mm512_set1_ps(TIMES), inverse_scales(w, tile));
  }

  void prefetch(int64_t run_tiles) const {
    const int64_t at = ((tile + run_tiles) * groups + std::min(group, groups - 1)) * 16;
    _mm_prefetch(
        DOUBLE ? reinterpret_cast<const char*>(w.scale_codes + at) : reinterpret_cast<const char*>(w.scale + at),
        _MM_HINT_T1);
    if constexpr (S == INT4) _mm_prefetch(reinterpret_cast<const char*>(w.zero_codes + at), _MM_HINT_T1);
  }

  __m512i words(const uint8_t* codes, const float* step, const float* base) const {
    const int64_t at = (tile * groups + group) * 16, pair = tile * ((groups + 15) / 16) + group / 16;
    const __m512 value = DOUBLE ? decode(codes + at, step[pair], base[pair]) : load_half(w.scale + at);
    return duplicate_low(_mm512_cvtps_epi32(_mm512_mul_ps(value, factor)));
  }

  template <bool INT16>
  void next() {
    for (ScaleZero& one : per_group) {
      if (left == 0 && group < groups) {
        now.scale = words(w.scale_codes, w.scale_step, w.scale_base);
        if constexpr (S == INT4) now.zero = words(w.zero_codes, w.zero_step, w.zero_base);
        group++;
        left = each;
      }
      left--;
      one = now;
    }
    constexpr __mmask32 SECOND = 0xaaaaaaaa;
    both = {_mm512_mask_blend_epi16(SECOND, per_group[0].scale, per_group[1].scale),
            _mm512_mask_blend_epi16(SECOND, per_group[0].zero, per_group[1].zero)};
    if constexpr (!INT16) {
      remainder = int8_scales(both).remainder;
      for (ScaleZero& one : per_group) one = int8_scales(one).per_group, one.zero = high_bytes(one.zero, false);
    }
  }
};

// Arguments of a GEMM over some tiles.
struct GemmArgs {
  const Matrix& w;
  const Activations& x;
  int64_t rows;
  float* out;  // column 0 of tile 0
  int64_t stride;
  Prefetcher& prefetcher;

  int64_t steps() const { return w.padded() / GROUP; }
  int64_t spans() const { return x.padded / SPAN; }
  int64_t bytes_of_tile() const { return steps() * bytes_of_group(w.scheme); }

  // The factor of a tile's accumulators. Computed once a tile, because it divides.
  __m512 columns(int64_t tile) const { return _mm512_div_ps(_mm512_set1_ps(256.0f), inverse_scales(w, tile)); }

  // Scales a row's accumulators of 16 columns (in 2^16) and stores them.
  void store_results(int64_t row, int64_t tile, __m512i sums, __m512 columns) const {
    const __m512 y =
        _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), columns), _mm512_set1_ps(x.scales.get()[row]));
    _mm512_storeu_ps(out + row * stride + tile * 16, y);
  }
};

// Prefetches the next tiles and the caller's `prefetcher` lines while T tiles are computed, spread over the steps of a
// span.
template <int T, class Scales>
struct TilePrefetch {
  static constexpr int PARTS = 8, LINES = T * 2 * bytes_of_group(Scales::SCHEME) / 64 / PARTS;
  static constexpr int64_t DISTANCE = 2;  // tiles
  const Scales* scales;
  const char* next_tile = nullptr;  // data of the tile DISTANCE further on, or null
  Prefetcher& prefetcher;
  const int64_t extra_lines;

  TilePrefetch(const GemmArgs& args, const Scales* scales, int64_t tile)
      : scales(scales), prefetcher(args.prefetcher), extra_lines((args.prefetcher.rate + PARTS - 1) / PARTS) {
    if (tile + DISTANCE + T <= args.w.tiles())
      next_tile = reinterpret_cast<const char*>(args.w.codes + (tile + DISTANCE) * args.bytes_of_tile());
    if (prefetcher.lines.count == 0) prefetcher.refill();
  }

  __attribute__((always_inline)) inline void step(int number) {
    if (next_tile != nullptr) {
      if (number < T) scales[number].prefetch(DISTANCE);
      for (int l = 0; l < LINES; l++) _mm_prefetch(next_tile + l * 64, _MM_HINT_T1);
      next_tile += LINES * 64;
    }
    const int64_t some = std::min(extra_lines, prefetcher.lines.count);
    for (int64_t l = 0; l < some; l++) _mm_prefetch(prefetcher.lines.at + l * 64, _MM_HINT_T1);
    prefetcher.lines.at += some * 64;
    prefetcher.lines.count -= some;
  }
};

}  // namespace loramux
