// Weights as whole numbers of 16 bits in 256ths of their column's unit, code by code: what the matrix unit multiplies, high
// bytes and low ones apart, and what products of few rows make of the codes as they are. Or as bytes, and what these leave of
// a group. And what walks over such weights share, be they the unit's or not: what they ask for beside, and how their sums
// become floats.
#pragma once
#include "target.h"

#include <algorithm>
#include <cstdint>

#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace loramux {

constexpr int64_t TILE_BYTES = 1024;  // of 16 rows of 64 bytes: of a span of 16 columns
constexpr uint64_t ODD_BYTES = 0xaaaaaaaaaaaaaaaaull;

// How many of its units 1 is, for each column of a tile.
inline __m512 fineness_of(const Matrix& w, int64_t tile) {
  return bf16_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.fineness + tile * 16)));
}

// What codes of a group are multiplied by, and what is added then, in 256ths of the column's unit. In each column's lane: twice
// the same, or the first group's in the low half and the second one's in the high one.
struct Words {
  __m512i scale, zero;
};

// The bytes of weights in two vectors of words, those for even inputs and those for odd ones.
inline void split_words(__m512i even, __m512i odd, int8_t* to) {
  const __m512i crossed = _mm512_shldi_epi16(odd, even, 8);  // the low bytes of odd inputs, and the high ones of even ones
  _mm512_store_si512(to, _mm512_mask_blend_epi8(ODD_BYTES, crossed, odd));
  _mm512_store_si512(to + TILE_BYTES, _mm512_mask_blend_epi8(ODD_BYTES, even, crossed));
}

// A quarter of a group of 16 columns of INT4: w = code scale + zero. 16 bits hold the sum, whatever the two are.
inline void split_nibbles(const uint8_t* codes, const Words& by, int8_t* to) {
  const __m512i low = _mm512_set1_epi16(15), w = _mm512_loadu_si512(codes);
  const auto word = [&](__m512i code) { return _mm512_add_epi16(_mm512_mullo_epi16(code, by.scale), by.zero); };
  split_words(word(_mm512_and_si512(w, low)), word(_mm512_and_si512(_mm512_srli_epi16(w, 8), low)), to);
  split_words(word(_mm512_and_si512(_mm512_srli_epi16(w, 4), low)), word(_mm512_srli_epi16(w, 12)), to + 256);
}

// What bytes are made by: w = floor(code scale / 2^12) + zero, the zero in high bytes. What that leaves of a group, in 256ths
// of the unit, in low bytes with a sign, is the rest of its zero and what rounding down takes of its codes: of one in 25, the
// least, nothing, of the others half a unit, and of scales of less than a 16th 7.5 of them.
struct ForBytes {
  Words by;
  __m512i rest;
};
inline ForBytes for_bytes(const Words& of) {
  const __m512i scale = _mm512_slli_epi16(of.scale, 4);
  const __m512i taken = _mm512_min_epu16(_mm512_srli_epi16(_mm512_sub_epi16(scale, of.scale), 1), _mm512_set1_epi16(120));
  const __m512i zero = _mm512_add_epi16(of.zero, taken);
  return {{scale, _mm512_add_epi16(zero, _mm512_set1_epi16(128))}, _mm512_and_si512(zero, _mm512_set1_epi16(255))};
}

// The high byte of a lane's low word in all four, or of its high one.
inline __m512i high_bytes(__m512i words, bool second) {
  const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(1, 1, 1, 1, 5, 5, 5, 5, 9, 9, 9, 9, 13, 13, 13, 13));
  return _mm512_shuffle_epi8(words, second ? _mm512_add_epi8(first, _mm512_set1_epi8(2)) : first);
}

// The same in bytes, of one half of the nibbles, those in the high halves of bytes. They are multiplied where they lie: in the
// low byte of a word by a 256th of what they are in the high one.
inline __m512i bytes_of_nibbles(__m512i codes, const Words& by) {
  const __m512i low = _mm512_set1_epi16(0x00f0), high = _mm512_set1_epi16(static_cast<int16_t>(0xf000));
  const __m512i even = _mm512_mulhi_epu16(_mm512_and_si512(codes, low), by.scale);
  const __m512i odd = _mm512_mulhi_epu16(_mm512_and_si512(codes, high), by.scale);
  return _mm512_add_epi8(_mm512_mask_blend_epi8(ODD_BYTES, even, odd), by.zero);
}

inline void byte_nibbles(const uint8_t* codes, const Words& by, int8_t* to) {
  const __m512i w = _mm512_loadu_si512(codes);
  _mm512_store_si512(to, bytes_of_nibbles(_mm512_slli_epi16(w, 4), by));
  _mm512_store_si512(to + 256, bytes_of_nibbles(w, by));
}

// What bytes of weights leave of a tile's groups, as the unit reads weights: of two spans each four numbers a column.
inline void put_rest(__m512i rest, int64_t span, int8_t* to) {
  int8_t* at = to + span % SPANS_OF_SUMS / 2 * 64;
  _mm512_store_si512(at, span % 2 == 0 ? rest : _mm512_or_si512(_mm512_load_si512(at), _mm512_slli_epi16(rest, 8)));
}

// w = code scale / 2^7, rounded, of codes of eight bits.
inline void split_bytes(__m512i codes, const Words& by, int8_t* to) {
  const __m512i odd = _mm512_and_si512(codes, _mm512_set1_epi16(static_cast<int16_t>(0xff00)));
  split_words(_mm512_mulhrs_epi16(_mm512_slli_epi16(codes, 8), by.scale), _mm512_mulhrs_epi16(odd, by.scale), to);
}

// A quarter of a group of 16 columns, as the matrix unit reads it: four inputs a column in each 64 bytes.
template <int S, bool FINE>
__attribute__((always_inline)) inline void unpack_quarter(const uint8_t* codes, int quarter, const Words& by, int8_t* to) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(128));
  if constexpr (S == INT8) {
    for (int b = quarter * 2; b < quarter * 2 + 2; b++)
      split_bytes(_mm512_xor_si512(_mm512_loadu_si512(codes + b * 64), sign), by, to + b * 64);
    return;
  }
  codes += quarter * 64, to += quarter * 64;
  if constexpr (S == INT4) FINE ? split_nibbles(codes, by, to) : byte_nibbles(codes, by, to);
  if constexpr (S == NF4) {
    const __m512i low = _mm512_set1_epi8(15), levels = _mm512_xor_si512(nf4_levels(), sign), c = _mm512_loadu_si512(codes);
    split_bytes(_mm512_shuffle_epi8(levels, _mm512_and_si512(c, low)), by, to);
    split_bytes(_mm512_shuffle_epi8(levels, _mm512_and_si512(_mm512_srli_epi16(c, 4), low)), by, to + 256);
  }
}

// Each lane's low word in both.
inline __m512i twice(__m512i words) {
  return _mm512_or_si512(_mm512_and_si512(words, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(words, 16));
}

// The words of a tile's spans, one after the other, of INT4 whose scales are whole numbers. `by` has a group each, for bytes if
// not FINE, `both` the two side by side, `rest` too.
template <bool WHOLE>
struct OfSpans {
  static constexpr int SCHEME = INT4;
  Words by[2], both;
  __m512i rest;
  const int64_t stride, each;
  const int16_t* scales;
  int64_t left;
  __m512i factor;  // of scales and zeros, 2^15 times

  OfSpans(const Matrix& w, int64_t tile)
      : stride(w.span_scale_count() * (WHOLE ? 32 : 64)),
        each(WHOLE ? w.group / SPAN : 1),
        scales(w.span_scales + tile * stride),
        left(each) {
    const __m128i exponent = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.exponents + tile * 16));
    const __m512i up = _mm512_add_epi32(_mm512_cvtepi8_epi32(exponent), _mm512_set1_epi32(23));
    const __m512 fine = _mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_cvtepi32_ps(up));
    factor = twice(_mm512_cvtps_epi32(_mm512_mul_ps(fine, fineness_of(w, tile))));
  }

  // For what the tile so many behind will read where this one is.
  void ask(int64_t tiles) const {
    const char* p = reinterpret_cast<const char*>(scales + tiles * stride);
    _mm_prefetch(p, _MM_HINT_T1);
    if constexpr (!WHOLE) _mm_prefetch(p + 64, _MM_HINT_T1);
  }

  template <bool FINE>
  void next() {
    __m512i s, z;
    if constexpr (WHOLE) {
      s = words_twice(scales, 0);
      z = words_twice(scales, 1);
      if (--left == 0) scales += 32, left = each;
    } else {
      s = _mm512_loadu_si512(scales);
      z = _mm512_loadu_si512(scales + 32);
      scales += 64;
    }
    s = _mm512_mulhrs_epi16(s, factor);
    z = _mm512_slli_epi16(_mm512_sub_epi16(_mm512_mulhrs_epi16(z, factor), s), 3);
    both = {s, z};
    Words words = both;
    if constexpr (!FINE) {
      const ForBytes bytes = for_bytes(both);
      words = bytes.by, rest = bytes.rest;
    }
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
    for (int g = 0; g < 2; g++) {
      const __m512i one = g == 0 ? first : _mm512_add_epi8(first, _mm512_set1_epi8(2));
      by[g].scale = WHOLE ? words.scale : _mm512_shuffle_epi8(words.scale, one);
      by[g].zero = !FINE ? high_bytes(words.zero, g == 1) : WHOLE ? words.zero : _mm512_shuffle_epi8(words.zero, one);
    }
  }
};

// The same of scales that are floats, or codes of such.
template <int S, bool DOUBLE>
struct OfFloats {
  static constexpr int SCHEME = S;
  Words by[2], both;
  __m512i rest;
  const Matrix& w;
  const int64_t tile, groups, each;
  int64_t group = 0, left = 0;
  __m512 factor;
  Words now = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // of the group before `group`

  OfFloats(const Matrix& w, int64_t tile) : w(w), tile(tile), groups(w.k / w.group), each(w.group / GROUP) {
    constexpr float TIMES = S == INT4 ? 256.0f : S == NF4 ? 32767.0f / 127.0f : 32768.0f;
    factor = _mm512_mul_ps(_mm512_set1_ps(TIMES), fineness_of(w, tile));
  }

  void ask(int64_t tiles) const {
    const int64_t at = ((tile + tiles) * groups + std::min(group, groups - 1)) * 16;
    _mm_prefetch(DOUBLE ? reinterpret_cast<const char*>(w.scale_codes + at) : reinterpret_cast<const char*>(w.scale + at),
                 _MM_HINT_T1);
    if constexpr (S == INT4) _mm_prefetch(reinterpret_cast<const char*>(w.zero_codes + at), _MM_HINT_T1);
  }

  __m512i words(const uint8_t* codes, const float* step, const float* base) const {
    const int64_t at = (tile * groups + group) * 16, pair = tile * ((groups + 15) / 16) + group / 16;
    const __m512 value = DOUBLE ? decode(codes + at, step[pair], base[pair]) : load_half(w.scale + at);
    return twice(_mm512_cvtps_epi32(_mm512_mul_ps(value, factor)));
  }

  template <bool FINE>
  void next() {
    for (Words& one : by) {
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
    both = {_mm512_mask_blend_epi16(SECOND, by[0].scale, by[1].scale), _mm512_mask_blend_epi16(SECOND, by[0].zero, by[1].zero)};
    if constexpr (!FINE) {
      rest = for_bytes(both).rest;
      for (Words& one : by) one = for_bytes(one).by, one.zero = high_bytes(one.zero, false);
    }
  }
};

// What products of some tiles have in common.
struct Walk {
  const Matrix& w;
  const Activations& x;
  int64_t rows;
  float* out;  // of tile 0
  int64_t stride;
  Aside& aside;

  int64_t steps() const { return w.padded() / GROUP; }
  int64_t spans() const { return x.padded / SPAN; }
  int64_t bytes_of_tile() const { return steps() * bytes_of_group(w.scheme); }

  // What sums of a tile's columns are told in. Asked once a tile, as it is a division.
  __m512 columns(int64_t tile) const { return _mm512_div_ps(_mm512_set1_ps(256.0f), fineness_of(w, tile)); }

  // Sums of a row with 16 columns, as multiples of 2^16.
  void finish(int64_t row, int64_t tile, __m512i sums, __m512 columns) const {
    const __m512 y = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), columns), _mm512_set1_ps(x.units.get()[row]));
    _mm512_storeu_ps(out + row * stride + tile * 16, y);
  }
};

// What is asked for beside T tiles, some of it with each part of a span: more at once would hold up what the span itself reads.
template <int T, class Scales>
struct Asking {
  static constexpr int PARTS = 8, LINES = T * 2 * bytes_of_group(Scales::SCHEME) / 64 / PARTS;
  static constexpr int64_t AHEAD = 2;  // tiles
  const Scales* scales;
  const char* behind = nullptr;  // what the tiles so far behind read where these are, null if there are none
  Aside& aside;
  const int64_t side;

  Asking(const Walk& walk, const Scales* scales, int64_t tile)
      : scales(scales), aside(walk.aside), side((walk.aside.pace + PARTS - 1) / PARTS) {
    if (tile + AHEAD + T <= walk.w.tiles())
      behind = reinterpret_cast<const char*>(walk.w.codes + (tile + AHEAD) * walk.bytes_of_tile());
    if (aside.lines.count == 0) aside.refill();
  }

  __attribute__((always_inline)) inline void part(int number) {
    if (behind != nullptr) {
      if (number < T) scales[number].ask(AHEAD);
      for (int l = 0; l < LINES; l++) _mm_prefetch(behind + l * 64, _MM_HINT_T1);
      behind += LINES * 64;
    }
    const int64_t some = std::min(side, aside.lines.count);
    for (int64_t l = 0; l < some; l++) _mm_prefetch(aside.lines.at + l * 64, _MM_HINT_T1);
    aside.lines.at += some * 64;
    aside.lines.count -= some;
  }
};

}  // namespace loramux
