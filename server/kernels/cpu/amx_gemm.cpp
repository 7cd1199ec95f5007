#include "amx_gemm.h"

#ifdef __AMX_INT8__

#include <algorithm>
#include <type_traits>

#include "gemv.h"
#include "tiles.h"
#include "weight_layout.h"

namespace loramux {
namespace {

constexpr int64_t KEPT = 4;         // unpacked spans where each is wanted once: one is read while the next is written
constexpr int64_t AT_MOST = 12;     // and where many rows want them
constexpr int64_t MOST_ROWS = 256;  // of a call
constexpr int64_t SUMS = 256;       // of a tile
constexpr int64_t MOST_RESTS = 20;  // tiles of what bytes leave: of packing.py's MOST_INPUTS

// Tiles of 64 bytes a row: 0 to 3 are sums, 4 is weights, 5 rows. Fewer in use are faster: where a core has another thread,
// little is left to rename them to, and a product with what it reads takes 15 ns with four or five in use, 30 with eight.
inline TileConfig config_of(int sums, int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < sums; tile++) config.set(tile, rows, 64);
  config.set(4, 16, 64);
  config.set(5, rows, 64);
  return config;
}

// Where the codes of a block's rows are for a span: low ones behind high ones.
struct Rows {
  const int8_t *high, *low;
};

inline Rows rows_at(const Walk& walk, int64_t block, int64_t span) {
  const int64_t rows = walk.x.rows_of_tile;
  const int8_t* high = walk.x.wide.get() + block * rows * walk.x.wide_codes() + span * 2 * rows * SPAN;
  return {high, high + rows * SPAN};
}

// How the tiles are used. STACKED: high and low codes of up to eight rows are one tile. FINE: for one tile of columns, with
// weights' low bytes, which have no sign; else for TILES of columns, with bytes of weights, and behind their spans some of what
// these leave of groups, by sums of groups.
template <bool FINE_, bool STACKED_, int TILES_>
struct Use {
  static constexpr bool FINE = FINE_, STACKED = STACKED_, TWO = FINE_ || TILES_ == 2;  // tiles of weights
  static constexpr int TILES = TILES_, COUNT = FINE ? (STACKED ? 2 : 3) : (STACKED ? 1 : 2) * TILES;
  static_assert(!FINE || TILES == 1);
  static constexpr int64_t UNPACKED = FINE ? 2 * TILE_BYTES : TILE_BYTES;  // bytes of a tile of columns

  static void zero() {
    _tile_zero(0);
    if constexpr (COUNT > 1) _tile_zero(1);
    if constexpr (COUNT > 2) _tile_zero(2);
    if constexpr (COUNT > 3) _tile_zero(3);
  }
  static void store(int32_t* to) {
    _tile_stored(0, to, 64);
    if constexpr (COUNT > 1) _tile_stored(1, to + SUMS, 64);
    if constexpr (COUNT > 2) _tile_stored(2, to + 2 * SUMS, 64);
    if constexpr (COUNT > 3) _tile_stored(3, to + 3 * SUMS, 64);
    written();
  }
  static void load(const int32_t* from) {
    written();
    _tile_loadd(0, from, 64);
    if constexpr (COUNT > 1) _tile_loadd(1, from + SUMS, 64);
    if constexpr (COUNT > 2) _tile_loadd(2, from + 2 * SUMS, 64);
    if constexpr (COUNT > 3) _tile_loadd(3, from + 3 * SUMS, 64);
  }

  // One of eight parts of the products of a span, so that other work can lie between them: the unit takes as long for each as
  // a few dozen other instructions, and the processor does not look much further ahead.
  template <int PART>
  __attribute__((always_inline)) static void add(const int8_t* weights, const Rows& rows) {
    if constexpr (PART % 2 == 0) written();
    if constexpr (PART == 0) {
      _tile_loadd(4, weights, 64);
      _tile_loadd(5, rows.high, 64);
    }
    if constexpr (PART == 1) _tile_dpbssd(0, 5, 4);
    if constexpr (PART == 2 && !STACKED) _tile_loadd(5, rows.low, 64);
    if constexpr (PART == 3 && !STACKED) _tile_dpbssd(1, 5, 4);
    if constexpr (PART == 4 && TWO) _tile_loadd(4, weights + TILE_BYTES, 64);
    if constexpr (PART == 5 && TWO) {
      if constexpr (FINE && STACKED) _tile_dpbsud(1, 5, 4);
      if constexpr (FINE && !STACKED) _tile_dpbsud(2, 5, 4);
      if constexpr (!FINE && STACKED) _tile_dpbssd(1, 5, 4);
      if constexpr (!FINE && !STACKED) _tile_dpbssd(3, 5, 4);
    }
    if constexpr (PART == 6 && TWO && !STACKED) _tile_loadd(5, rows.high, 64);
    if constexpr (PART == 7 && TWO && !STACKED) {
      if constexpr (FINE)
        _tile_dpbsud(1, 5, 4);
      else
        _tile_dpbssd(2, 5, 4);
    }
  }
  static void add_all(const int8_t* weights, const Rows& rows) {
    add<0>(weights, rows), add<1>(weights, rows), add<2>(weights, rows), add<3>(weights, rows);
    add<4>(weights, rows), add<5>(weights, rows), add<6>(weights, rows), add<7>(weights, rows);
  }

  // A row's sums with tile t of the columns as multiples of 2^16, of tiles that have `rows` rows.
  static __m512i total(const int32_t* sums, int t, int64_t row, int64_t rows) {
    const auto of = [&](int tile, bool low) { return _mm512_load_si512(sums + tile * SUMS + (row + (low ? rows : 0)) * 16); };
    const __m512i half = _mm512_set1_epi32(128);
    if constexpr (FINE) {
      const __m512i low = STACKED ? of(1, true) : of(2, false);
      const __m512i crossed = STACKED ? _mm512_add_epi32(of(0, true), of(1, false)) : of(1, false);
      const __m512i all = _mm512_add_epi32(crossed, _mm512_srai_epi32(low, 8));
      return _mm512_add_epi32(of(0, false), _mm512_srai_epi32(_mm512_add_epi32(all, half), 8));
    }
    const __m512i low = STACKED ? of(t, true) : of(2 * t + 1, false);
    return _mm512_add_epi32(of(STACKED ? t : 2 * t, false), _mm512_srai_epi32(_mm512_add_epi32(low, half), 8));
  }
};

// What sums of T tiles' columns are told in.
template <int T>
struct Columns {
  __m512 of[T];

  void set(const Walk& walk, int64_t tile) {
    for (int t = 0; t < T; t++) of[t] = walk.columns(tile + t);
  }
};

// Rows first..last of a block whose sums are [COUNT].
template <class Use>
__attribute__((always_inline)) inline void finish(const Walk& walk, const int32_t* sums, int64_t tile,
                                                  const Columns<Use::TILES>& columns, int64_t block, int64_t first,
                                                  int64_t last) {
  const int64_t rows = walk.x.rows_of_tile;
  for (int t = 0; t < Use::TILES; t++)
    for (int64_t r = first; r < std::min(last, walk.rows - block * rows); r++)
      walk.finish(block * rows + r, tile + t, Use::total(sums, t, r, rows), columns.of[t]);
}

// A span of tiles, unpacked in eight parts; `before` is called with the number of each before it.
template <class Use, class Scales, class Before>
__attribute__((always_inline)) inline void unpack_span(Scales* scales, const uint8_t* codes, int64_t stride, int64_t span,
                                                       bool whole, int8_t* to, int8_t* rest, Before before) {
  constexpr int T = Use::TILES, S = Scales::SCHEME;
  const auto part = [&](auto number) __attribute__((always_inline)) {
    constexpr int first = number * T, t = first / 8, group = first / 4 % 2;  // quarters of groups
    before(number);
    if constexpr (first % 8 == 0) {
      scales[t].template next<Use::FINE>();
      if constexpr (!Use::FINE) put_rest(scales[t].rest, span, rest + t * TILE_BYTES);
    }
    if (group == 1 && !whole) return;
    const uint8_t* from = codes + t * stride + span * 2 * bytes_of_group(S) + group * bytes_of_group(S);
    for (int quarter = first % 4; quarter < first % 4 + T; quarter++)
      unpack_quarter<S, Use::FINE>(from, quarter, scales[t].by[group], to + t * Use::UNPACKED + group * TILE_BYTES / 2);
  };
  part(std::integral_constant<int, 0>()), part(std::integral_constant<int, 1>());
  part(std::integral_constant<int, 2>()), part(std::integral_constant<int, 3>());
  part(std::integral_constant<int, 4>()), part(std::integral_constant<int, 5>());
  part(std::integral_constant<int, 6>()), part(std::integral_constant<int, 7>());
}

// Tiles by one block of rows. The products of a span come between the parts in which the next one is unpacked, be that one of
// the tiles behind.
template <class Use, class Scales>
void one_block(const Walk& walk, int64_t first_tile, int64_t last_tile) {
  constexpr int T = Use::TILES;
  constexpr int64_t NONE = -1;
  const int64_t stride = walk.bytes_of_tile(), spans = walk.spans(), steps = walk.steps();
  alignas(64) int8_t weights[KEPT * T * Use::UNPACKED];
  alignas(64) int8_t rest[T * TILE_BYTES];
  alignas(64) int32_t sums[Use::COUNT * SUMS];
  const int8_t* before = nullptr;
  Rows rows = {};
  // Sums that are done become floats while the next span but one is unpacked, two rows with each part of it: all at once
  // they would have the unit wait.
  Columns<T> columns;
  int64_t told = NONE;
  const auto done = [&](int64_t tile) {
    Use::store(sums);
    Use::zero();
    columns.set(walk, tile);
    told = tile;
  };
  const auto finish_some = [&](int64_t number) __attribute__((always_inline)) {
    constexpr int64_t some = ROWS_OF_UNIT / 8;
    if (told != NONE) finish<Use>(walk, sums, told, columns, 0, number * some, (number + 1) * some);
  };
  Use::zero();
  int64_t step = 0;
  for (int64_t tile = first_tile; tile < last_tile; tile += T) {
    const uint8_t* codes = walk.w.codes + tile * stride;
    Scales scales[] = {Scales(walk.w, tile), Scales(walk.w, tile + T - 1)};
    Asking<T, Scales> asking(walk, scales, tile);
    for (int64_t s = 0; s < spans; s++, step++) {
      int8_t* to = weights + step % KEPT * T * Use::UNPACKED;
      const bool whole = 2 * s + 1 < steps;
      if (step == 0)
        unpack_span<Use>(scales, codes, stride, s, whole, to, rest, [&](auto part) { asking.part(part); });
      else
        unpack_span<Use>(scales, codes, stride, s, whole, to, rest, [&](auto part) __attribute__((always_inline)) {
          asking.part(part);
          Use::template add<part>(before, rows);
          finish_some(part);
        });
      told = NONE;
      if (s == 0 && step > 0) done(tile - T);
      before = to, rows = rows_at(walk, 0, s);
      if (!Use::FINE && (s + 1 == spans || (s + 1) % SPANS_OF_SUMS == 0))
        Use::add_all(rest, rows_at(walk, 0, spans + s / SPANS_OF_SUMS));
    }
  }
  Use::add_all(before, rows);
  const auto finish_all = [&] {
    for (int64_t number = 0; number < 8; number++) finish_some(number);
  };
  finish_all();  // of tiles of one span, the sums of those just before the last are not floats yet either
  done(last_tile - T);
  finish_all();
}

// The tiles of one use by any rows: some spans are unpacked, and met by all rows.
template <class Use, class Scales>
void many_blocks(const Walk& walk, int64_t tile) {
  constexpr int T = Use::TILES;
  const int64_t stride = walk.bytes_of_tile(), spans = walk.spans(), steps = walk.steps();
  const int64_t blocks = (walk.rows + walk.x.rows_of_tile - 1) / walk.x.rows_of_tile;
  const int64_t parts = (spans + AT_MOST - 1) / AT_MOST, part = (spans + parts - 1) / parts;
  const int64_t rests = Use::FINE ? 0 : walk.x.spans_of_sums();
  alignas(64) int8_t weights[AT_MOST * T * Use::UNPACKED];
  alignas(64) int8_t rest[(Use::FINE ? 1 : MOST_RESTS) * T * TILE_BYTES];
  alignas(64) int32_t sums[MOST_ROWS / ROWS_OF_UNIT * Use::COUNT * SUMS];
  const uint8_t* codes = walk.w.codes + tile * stride;
  Columns<T> columns;
  columns.set(walk, tile);
  const auto rest_at = [&](int64_t n) { return rest + (Use::FINE ? 0 : n * T * TILE_BYTES); };
  Scales scales[] = {Scales(walk.w, tile), Scales(walk.w, tile + T - 1)};
  Asking<T, Scales> asking(walk, scales, tile);
  for (int64_t first = 0; first < spans; first += part) {
    const int64_t last = std::min(spans, first + part);
    const auto kept = [&](int64_t s) { return weights + (s - first) * T * Use::UNPACKED; };
    for (int64_t s = first; s < last; s++)
      unpack_span<Use>(scales, codes, stride, s, 2 * s + 1 < steps, kept(s), rest_at(s / SPANS_OF_SUMS),
                       [&](auto part) { asking.part(part); });
    for (int64_t block = 0; block < blocks; block++) {
      int32_t* of_block = sums + (parts == 1 ? 0 : block * Use::COUNT * SUMS);
      if (first == 0)
        Use::zero();
      else
        Use::load(of_block);
      for (int64_t s = first; s < last; s++) Use::add_all(kept(s), rows_at(walk, block, s));
      for (int64_t n = 0; n < rests && last == spans; n++) Use::add_all(rest_at(n), rows_at(walk, block, spans + n));
      Use::store(of_block);
      // While they are in the first cache.
      if (last == spans) finish<Use>(walk, of_block, tile, columns, block, 0, walk.x.rows_of_tile);
    }
  }
}

// As many of the tiles as are whole uses; where the others begin.
template <class Use, class Scales>
int64_t tiles_used(const Walk& walk, int64_t tile, int64_t last) {
  const int64_t end = tile + (last - tile) / Use::TILES * Use::TILES, rows = walk.x.rows_of_tile;
  if (tile == end) return end;
  configure(config_of(Use::COUNT, Use::STACKED ? 2 * rows : rows));
  if (walk.rows <= rows)
    one_block<Use, Scales>(walk, tile, end);
  else
    for (; tile < end; tile += Use::TILES) many_blocks<Use, Scales>(walk, tile);
  return end;
}

template <class Scales, int R>
void rows_alone(const Walk& walk, int64_t tile, int64_t last) {
  for (; tile + 2 <= last; tile += 2) few_rows<Scales, R, 2>(walk, tile);
  if (tile < last) few_rows<Scales, R, 1>(walk, tile);
}

template <class Scales, bool STACKED>
void tiles(const Walk& walk, int64_t tile, int64_t last) {
  if constexpr (Scales::SCHEME == INT4) {
    if (walk.w.coarse) {
      if (walk.rows == 1) {
        for (; tile + 2 <= last; tile += 2) row_of_bytes<Scales, 2>(walk, tile);
        if (tile < last) row_of_bytes<Scales, 1>(walk, tile);
        return;
      }
      tile = tiles_used<Use<false, STACKED, 2>, Scales>(walk, tile, last);
      tiles_used<Use<false, STACKED, 1>, Scales>(walk, tile, last);
      return;
    }
    if (walk.x.few) switch (walk.rows) {
        case 1: return rows_alone<Scales, 1>(walk, tile, last);
        case 2: return rows_alone<Scales, 2>(walk, tile, last);
        case 3: return rows_alone<Scales, 3>(walk, tile, last);
      }
  }
  tiles_used<Use<true, STACKED, 1>, Scales>(walk, tile, last);
}

}  // namespace

void multiply_by_unit(const Matrix& w, int64_t first_tile, int64_t last_tile, const Activations& x, int64_t rows,
                      float* out, int64_t stride, Aside& aside) {
  const Walk walk{w, x, rows, out - first_tile * 16, stride, aside};
  const bool twofold = w.scale_codes != nullptr;
  const auto by = [&](auto* scales) {
    using Scales = std::remove_pointer_t<decltype(scales)>;
    const bool stacked = 2 * x.rows_of_tile <= ROWS_OF_UNIT;
    stacked ? tiles<Scales, true>(walk, first_tile, last_tile) : tiles<Scales, false>(walk, first_tile, last_tile);
  };
  const auto by_floats = [&](auto scheme) {
    constexpr int S = decltype(scheme)::value;
    twofold ? by(static_cast<OfFloats<S, true>*>(nullptr)) : by(static_cast<OfFloats<S, false>*>(nullptr));
  };
  if (w.scheme == NF4) return by_floats(std::integral_constant<int, NF4>());
  if (w.scheme == INT8) return by_floats(std::integral_constant<int, INT8>());
  if (twofold) return by(static_cast<OfFloats<INT4, true>*>(nullptr));
  w.whole_spans() ? by(static_cast<OfSpans<true>*>(nullptr)) : by(static_cast<OfSpans<false>*>(nullptr));
}

}  // namespace loramux

#endif
