#include "matrix_unit.h"

#ifdef __AMX_INT8__

#include <algorithm>
#include <type_traits>
#include <utility>

#include "simd.h"

namespace loramux {
namespace {

constexpr int64_t TILE_BYTES = 1024;  // of 16 rows of 64 bytes
constexpr int64_t KEPT = 4;           // unpacked spans where each is wanted once: one is read while the next is written
constexpr int64_t AT_MOST = 16;       // and where many rows want them
constexpr int64_t MOST_ROWS = 256;    // of a call
constexpr int64_t SUMS = 256;         // of a tile

// Eight tiles of 64 bytes a row. 0 to 3 are sums, of the first and the second tile of columns with the first block of rows,
// and of both with the second; 4 and 5 are weights, 6 and 7 rows.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};

// Whoever has used the unit in this thread before may have left it otherwise. To ask takes a tenth of the time of saying so.
inline void configure(int64_t rows_of_tile) {
  const auto twofold = static_cast<uint8_t>(2 * rows_of_tile);
  TileConfig now;
  TileConfig wanted;
  for (int tile = 0; tile < 8; tile++) wanted.rows[tile] = tile == 4 || tile == 5 ? 16 : twofold;
  _tile_storeconfig(&now);
  if (_mm512_cmpneq_epi32_mask(_mm512_load_si512(&now), _mm512_load_si512(&wanted)) != 0) _tile_loadconfig(&wanted);
}

// Intrinsics of tiles do not tell the compiler what memory they read.
inline void written() { asm volatile("" ::: "memory"); }

// T tiles of columns by B blocks of rows; sums [B][T][16][16].
template <int T, int B>
inline void zero_sums() {
  _tile_zero(0);
  if constexpr (T == 2) _tile_zero(1);
  if constexpr (B == 2) _tile_zero(2);
  if constexpr (T == 2 && B == 2) _tile_zero(3);
}

template <int T, int B>
inline void store_sums(int32_t* to) {
  _tile_stored(0, to, 64);
  if constexpr (T == 2) _tile_stored(1, to + SUMS, 64);
  if constexpr (B == 2) _tile_stored(2, to + T * SUMS, 64);
  if constexpr (T == 2 && B == 2) _tile_stored(3, to + 3 * SUMS, 64);
  written();
}

template <int T, int B>
inline void load_sums(const int32_t* from) {
  written();
  _tile_loadd(0, from, 64);
  if constexpr (T == 2) _tile_loadd(1, from + SUMS, 64);
  if constexpr (B == 2) _tile_loadd(2, from + T * SUMS, 64);
  if constexpr (T == 2 && B == 2) _tile_loadd(3, from + 3 * SUMS, 64);
}

// One of eight parts of the products of a span, so that other work can lie between them: the unit takes as long for each as
// a few dozen other instructions, and the processor does not look much further ahead. `next` is the block behind `rows`.
template <int T, int B, int PART>
__attribute__((always_inline)) inline void add_part(const int8_t* weights, const int8_t* rows, const int8_t* next) {
  written();
  if constexpr (PART == 0) {
    _tile_loadd(4, weights, 64);
    _tile_loadd(6, rows, 64);
  }
  if constexpr (PART == 1) _tile_dpbssd(0, 6, 4);
  if constexpr (PART == 2 && B == 2) _tile_loadd(7, next, 64);
  if constexpr (PART == 3 && B == 2) _tile_dpbssd(2, 7, 4);
  if constexpr (PART == 4 && T == 2) _tile_loadd(5, weights + TILE_BYTES, 64);
  if constexpr (PART == 5 && T == 2) _tile_dpbssd(1, 6, 5);
  if constexpr (PART == 6 && T == 2 && B == 2) _tile_dpbssd(3, 7, 5);
}

template <int T, int B, int... PART>
__attribute__((always_inline)) inline void add_span(const int8_t* weights, const int8_t* rows, const int8_t* next,
                                                    std::integer_sequence<int, PART...> = {}) {
  if constexpr (sizeof...(PART) == 0)
    add_span<T, B>(weights, rows, next, std::make_integer_sequence<int, 8>());
  else
    (add_part<T, B, PART>(weights, rows, next), ...);
}

// The bytes that are wanted of two vectors of words: the high ones, of `even` for even bytes.
inline __m512i high_bytes(__m512i even, __m512i odd) {
  return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, _mm512_srli_epi16(even, 8), odd);
}

// Each lane's low word in both.
inline __m512i twice(__m512i words) {
  return _mm512_or_si512(_mm512_and_si512(words, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(words, 16));
}

// A group's scale, and zero, as words that its codes are brought to the column's unit by.
struct Words {
  __m512i scale, zero;
};

// w = (code scale + zero) / 256 for nibbles: 16 bits keep the sum, whatever the two are. Rounded, by what `zero` has more.
inline void nibbles(const uint8_t* codes, const Words& by, int8_t* to) {
  const __m512i low = _mm512_set1_epi16(15), w = _mm512_loadu_si512(codes);
  const auto scaled = [&](__m512i code) { return _mm512_add_epi16(_mm512_mullo_epi16(code, by.scale), by.zero); };
  const __m512i even = scaled(_mm512_and_si512(w, low));
  const __m512i odd = scaled(_mm512_and_si512(_mm512_srli_epi16(w, 8), low));
  _mm512_store_si512(to, high_bytes(even, odd));
  const __m512i even_up = scaled(_mm512_and_si512(_mm512_srli_epi16(w, 4), low)), odd_up = scaled(_mm512_srli_epi16(w, 12));
  _mm512_store_si512(to + 256, high_bytes(even_up, odd_up));
}

// w = code scale / 2^15, rounded, of bytes with 128 added.
inline __m512i scaled_bytes(__m512i w, __m512i scale) {
  const __m512i code = _mm512_xor_si512(w, _mm512_set1_epi8(static_cast<char>(128)));
  const __m512i even = _mm512_mulhrs_epi16(_mm512_srai_epi16(_mm512_slli_epi16(code, 8), 8), scale);
  const __m512i odd = _mm512_mulhrs_epi16(_mm512_srai_epi16(code, 8), scale);
  return _mm512_mask_blend_epi8(0xaaaaaaaaaaaaaaaaull, even, _mm512_slli_epi16(odd, 8));
}

// A half of a group of a tile's codes as the matrix unit reads them.
template <int S>
__attribute__((always_inline)) inline void unpack(const uint8_t* codes, int half, const Words& by, int8_t* to) {
  for (int b = half * 2; b < half * 2 + 2; b++) {
    if constexpr (S == INT4) nibbles(codes + b * 64, by, to + b * 64);
    if constexpr (S == NF4) {
      const __m512i low = _mm512_set1_epi8(15), levels = nf4_levels(), c = _mm512_loadu_si512(codes + b * 64);
      const auto level = [&](__m512i at) { return scaled_bytes(_mm512_shuffle_epi8(levels, _mm512_and_si512(at, low)), by.scale); };
      _mm512_store_si512(to + b * 64, level(c));
      _mm512_store_si512(to + 256 + b * 64, level(_mm512_srli_epi16(c, 4)));
    }
  }
}

// What the groups of a tile's spans are multiplied by, one span after the other: of INT4 whose scales are whole numbers.
template <bool WHOLE>
struct OfSpans {
  static constexpr int SCHEME = INT4;
  Words by[2];
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
    factor = twice(_mm512_cvtps_epi32(_mm512_div_ps(fine, _mm512_loadu_ps(w.unit + tile * 16))));
  }

  // For what the tile so many behind will read where this one is.
  void ask(int64_t tiles) const {
    const char* p = reinterpret_cast<const char*>(scales + tiles * stride);
    _mm_prefetch(p, _MM_HINT_T1);
    if constexpr (!WHOLE) _mm_prefetch(p + 64, _MM_HINT_T1);
  }

  void next() {
    __m512i s, z;
    if constexpr (WHOLE) {
      const __m512i all = _mm512_loadu_si512(scales);
      const __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i both = _mm512_or_si512(column, _mm512_slli_epi32(column, 16));
      s = _mm512_permutexvar_epi16(both, all);
      z = _mm512_permutexvar_epi16(_mm512_or_si512(both, _mm512_set1_epi16(16)), all);
      if (--left == 0) scales += 32, left = each;
    } else {
      s = _mm512_loadu_si512(scales);
      z = _mm512_loadu_si512(scales + 32);
      scales += 64;
    }
    s = _mm512_mulhrs_epi16(s, factor);
    z = _mm512_sub_epi16(_mm512_mulhrs_epi16(z, factor), s);
    z = _mm512_add_epi16(_mm512_slli_epi16(z, 3), _mm512_set1_epi16(128));
    if constexpr (WHOLE) {
      by[0] = by[1] = {s, z};
    } else {
      const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13));
      const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi8(2));
      by[0] = {_mm512_shuffle_epi8(s, first), _mm512_shuffle_epi8(z, first)};
      by[1] = {_mm512_shuffle_epi8(s, second), _mm512_shuffle_epi8(z, second)};
    }
  }
};

// The same of schemes whose scales are floats.
template <int S, bool DOUBLE>
struct OfFloats {
  static constexpr int SCHEME = S;
  Words by[2];
  const Matrix& w;
  const int64_t tile, groups, each;
  int64_t group = 0, left = 0;
  __m512 factor;
  Words now = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // of the group before `group`

  OfFloats(const Matrix& w, int64_t tile) : w(w), tile(tile), groups(w.k / w.group), each(w.group / GROUP) {
    // Levels of NF4 are multiplied by what keeps 15 bits of a fraction, nibbles of INT4 by one of 8.
    factor = _mm512_div_ps(_mm512_set1_ps(S == INT4 ? 256.0f : 32767.0f / 127.0f), _mm512_loadu_ps(w.unit + tile * 16));
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
    return _mm512_cvtps_epi32(_mm512_mul_ps(value, factor));
  }

  void next() {
    for (Words& one : by) {
      if (left == 0 && group < groups) {
        now.scale = twice(words(w.scale_codes, w.scale_step, w.scale_base));
        if constexpr (S == INT4)
          now.zero = twice(_mm512_add_epi32(words(w.zero_codes, w.zero_step, w.zero_base), _mm512_set1_epi32(128)));
        group++;
        left = each;
      }
      left--;
      one = now;
    }
  }
};

// A span of T tiles, unpacked in eight parts; `before` is called with the number of each before it.
template <int T, class Scales, class Before>
__attribute__((always_inline)) inline void unpack_span(Scales* scales, const uint8_t* codes, int64_t stride, bool whole,
                                                       int8_t* to, Before before) {
  const auto part = [&](auto number) __attribute__((always_inline)) {
    constexpr int t = number / 4, group = number / 2 % 2;
    before(number);
    if constexpr (t < T) {
      if constexpr (number % 4 == 0) scales[t].next();
      if (group == 0 || whole)
        unpack<Scales::SCHEME>(codes + t * stride + group * bytes_of_group(Scales::SCHEME), number % 2, scales[t].by[group],
                               to + t * TILE_BYTES + group * TILE_BYTES / 2);
    }
  };
  part(std::integral_constant<int, 0>()), part(std::integral_constant<int, 1>());
  part(std::integral_constant<int, 2>()), part(std::integral_constant<int, 3>());
  part(std::integral_constant<int, 4>()), part(std::integral_constant<int, 5>());
  part(std::integral_constant<int, 6>()), part(std::integral_constant<int, 7>());
}

// What is asked for beside a span, some of it with each of its parts: more at once would hold up what the span itself reads.
template <int T, class Scales>
struct Asking {
  static constexpr int LINES = T * 2 * bytes_of_group(Scales::SCHEME) / 64, PARTS = 8;
  const Scales* scales;
  const char* behind;  // what the tiles behind these read where they are, null if there are none
  Aside& aside;
  int64_t side;

  Asking(const Scales* scales, const uint8_t* codes, int64_t stride, int64_t span, bool ahead, Aside& aside)
      : scales(scales),
        behind(ahead ? reinterpret_cast<const char*>(codes + T * stride) + span * LINES * 64 : nullptr),
        aside(aside),
        side((std::min(aside.pace, aside.lines.count) + PARTS - 1) / PARTS) {}

  __attribute__((always_inline)) inline void part(int number) {
    if (behind != nullptr) {
      if (number % 4 == 0 && number / 4 < T) scales[number / 4].ask(T);
      for (int l = number * LINES / PARTS; l < (number + 1) * LINES / PARTS; l++) _mm_prefetch(behind + l * 64, _MM_HINT_T1);
    }
    const int64_t some = std::min(side, aside.lines.count);
    for (int64_t l = 0; l < some; l++) _mm_prefetch(aside.lines.at + l * 64, _MM_HINT_T1);
    aside.lines.at += some * 64;
    aside.lines.count -= some;
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
  const int8_t* rows_at(int64_t block, int64_t span) const {
    return x.wide.get() + (block * spans() + span) * 2 * x.rows_of_tile * SPAN;
  }

  // The sums [blocks][T] of all rows as floats.
  template <int T>
  void finish(const int32_t* sums, int64_t tile) const {
    for (int t = 0; t < T; t++) {
      const __m512 column = _mm512_loadu_ps(w.unit + (tile + t) * 16);
      for (int64_t r = 0; r < rows; r++) {
        const int32_t* at = sums + (r / x.rows_of_tile * T + t) * SUMS + r % x.rows_of_tile * 16;
        const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(at));
        const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(at + x.rows_of_tile * 16));
        const __m512 both = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), low);
        _mm512_storeu_ps(out + r * stride + (tile + t) * 16,
                         _mm512_mul_ps(_mm512_mul_ps(both, column), _mm512_set1_ps(x.units.get()[r])));
      }
    }
  }
};

// Pairs of tiles by B blocks of rows. The products of a span come between the parts in which the next one is unpacked, be
// that one of the next pair.
template <class Scales, int B>
void few_rows(const Walk& walk, int64_t first_tile, int64_t last_tile) {
  constexpr int64_t BYTES = bytes_of_group(Scales::SCHEME);
  const int64_t stride = walk.bytes_of_tile(), spans = walk.spans(), steps = walk.steps();
  alignas(64) int8_t weights[KEPT * 2 * TILE_BYTES];
  alignas(64) int32_t sums[B * 2 * SUMS];
  const int8_t *before = nullptr, *x0 = nullptr, *x1 = nullptr;
  const auto done = [&](int64_t tile) {
    store_sums<2, B>(sums);
    zero_sums<2, B>();
    walk.finish<2>(sums, tile);
  };
  zero_sums<2, B>();
  int64_t step = 0;
  for (int64_t tile = first_tile; tile < last_tile; tile += 2) {
    const uint8_t* codes = walk.w.codes + tile * stride;
    const bool ahead = tile + 4 <= walk.w.tiles();
    if (walk.aside.lines.count == 0) walk.aside.refill();
    Scales scales[] = {Scales(walk.w, tile), Scales(walk.w, tile + 1)};
    for (int64_t s = 0; s < spans; s++, step++) {
      int8_t* to = weights + step % KEPT * 2 * TILE_BYTES;
      const uint8_t* at = codes + s * 2 * BYTES;
      Asking<2, Scales> asking(scales, codes, stride, s, ahead, walk.aside);
      if (step == 0)
        unpack_span<2>(scales, at, stride, 2 * s + 1 < steps, to, [&](auto part) { asking.part(part); });
      else
        unpack_span<2>(scales, at, stride, 2 * s + 1 < steps, to, [&](auto part) __attribute__((always_inline)) {
          asking.part(part);
          add_part<2, B, part>(before, x0, x1);
        });
      if (s == 0 && step > 0) done(tile - 2);
      before = to, x0 = walk.rows_at(0, s), x1 = walk.rows_at(B - 1, s);
    }
  }
  add_span<2, B>(before, x0, x1);
  done(last_tile - 2);
}

// T tiles by any rows: some spans are unpacked, and met by all rows.
template <class Scales, int T>
void columns(const Walk& walk, int64_t tile) {
  constexpr int64_t BYTES = bytes_of_group(Scales::SCHEME), BLOCKS = 2;
  const int64_t stride = walk.bytes_of_tile(), spans = walk.spans(), steps = walk.steps();
  const int64_t rows = BLOCKS * walk.x.rows_of_tile, passes = (walk.rows + rows - 1) / rows;
  const int64_t parts = (spans + AT_MOST - 1) / AT_MOST, part = (spans + parts - 1) / parts;
  alignas(64) int8_t weights[AT_MOST * T * TILE_BYTES];
  alignas(64) int32_t sums[MOST_ROWS / ROWS_OF_UNIT * T * SUMS];
  const uint8_t* codes = walk.w.codes + tile * stride;
  const bool ahead = tile + 2 * T <= walk.w.tiles();
  if (walk.aside.lines.count == 0) walk.aside.refill();
  Scales scales[] = {Scales(walk.w, tile), Scales(walk.w, tile + T - 1)};
  for (int64_t first = 0; first < spans; first += part) {
    const int64_t last = std::min(spans, first + part);
    const auto kept = [&](int64_t s) { return weights + (s - first) * T * TILE_BYTES; };
    for (int64_t s = first; s < last; s++) {
      Asking<T, Scales> asking(scales, codes, stride, s, ahead, walk.aside);
      unpack_span<T>(scales, codes + s * 2 * BYTES, stride, 2 * s + 1 < steps, kept(s), [&](auto part) { asking.part(part); });
    }
    for (int64_t pass = 0; pass < passes; pass++) {
      int32_t* of_pass = sums + pass * BLOCKS * T * SUMS;
      if (first == 0)
        zero_sums<T, BLOCKS>();
      else
        load_sums<T, BLOCKS>(of_pass);
      for (int64_t s = first; s < last; s++)
        add_span<T, BLOCKS>(kept(s), walk.rows_at(pass * BLOCKS, s), walk.rows_at(pass * BLOCKS + 1, s));
      store_sums<T, BLOCKS>(of_pass);
    }
  }
  walk.finish<T>(sums, tile);
}

template <class Scales>
void tiles(const Walk& walk, int64_t tile, int64_t last) {
  const int64_t pairs = (last - tile) / 2 * 2;
  if (walk.rows <= 2 * ROWS_OF_UNIT && pairs > 0) {
    walk.rows <= ROWS_OF_UNIT ? few_rows<Scales, 1>(walk, tile, tile + pairs) : few_rows<Scales, 2>(walk, tile, tile + pairs);
    tile += pairs;
  }
  for (; tile + 2 <= last; tile += 2) columns<Scales, 2>(walk, tile);
  if (tile < last) columns<Scales, 1>(walk, tile);
}

}  // namespace

void multiply_by_unit(const Matrix& w, int64_t first_tile, int64_t last_tile, const Activations& x, int64_t rows,
                      float* out, int64_t stride, Aside& aside) {
  configure(x.rows_of_tile);
  const Walk walk{w, x, rows, out - first_tile * 16, stride, aside};
  const bool twice = w.scale_codes != nullptr;
  const auto by = [&](auto* scales) { tiles<std::remove_pointer_t<decltype(scales)>>(walk, first_tile, last_tile); };
  if (w.scheme == NF4)
    return twice ? by(static_cast<OfFloats<NF4, true>*>(nullptr)) : by(static_cast<OfFloats<NF4, false>*>(nullptr));
  if (twice) return by(static_cast<OfFloats<INT4, true>*>(nullptr));
  w.whole_spans() ? by(static_cast<OfSpans<true>*>(nullptr)) : by(static_cast<OfSpans<false>*>(nullptr));
}

}  // namespace loramux

#endif
