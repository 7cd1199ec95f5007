#include "amx_gemm.h"

#ifdef __AMX_INT8__

#include <algorithm>
#include <type_traits>

#include "gemv.h"
#include "amx_tiles.h"
#include "weight_layout.h"

namespace loramux {
namespace {

constexpr int64_t UNPACKED_SPANS = 4;        // unpacked spans with one row block: one is read while the next is written
constexpr int64_t MAX_UNPACKED_SPANS = 12;   // unpacked spans with several row blocks
constexpr int64_t MAX_ROWS = 256;            // of a call
constexpr int64_t TILE_VALUES = 256;         // values of an accumulator tile
constexpr int64_t MAX_REMAINDER_TILES = 20;  // tiles of remainders, for MAX_INPUTS of packing.py

// Tiles have 64 bytes per row: 0 to 3 are accumulators, 4 weights, 5 activations. Few tiles leave more registers for
// renaming, which is faster with hyper-threading.
inline TileConfig config_of(int sums, int64_t rows) {
  TileConfig config;
  for (int tile = 0; tile < sums; tile++) config.set(tile, rows, 64);
  config.set(4, 16, 64);
  config.set(5, rows, 64);
  return config;
}

// The codes of a row block for a span.
struct Rows {
  const int8_t *high, *low;
};

inline Rows rows_at(const GemmArgs& args, int64_t block, int64_t span) {
  const int64_t rows = args.x.tile_rows;
  const int8_t* high = args.x.split16.get() + block * rows * args.x.split16_codes() + span * 2 * rows * SPAN;
  return {high, high + rows * SPAN};
}

// How tiles are used. STACKED: high and low codes of up to eight rows share a tile. INT16: one tile of columns of
// 16-bit weights (signed high and unsigned low bytes); otherwise TILES of columns of 8-bit weights, with remainders
// times group sums after their spans.
template <bool INT16_, bool STACKED_, int TILES_>
struct TileUse {
  static constexpr bool INT16 = INT16_, STACKED = STACKED_,
                        TWO_WEIGHT_TILES = INT16_ || TILES_ == 2;  // whether there are two weight tiles
  static constexpr int TILES = TILES_, COUNT = INT16 ? (STACKED ? 2 : 3) : (STACKED ? 1 : 2) * TILES;
  static_assert(!INT16 || TILES == 1);
  static constexpr int64_t UNPACKED = INT16 ? 2 * TILE_BYTES : TILE_BYTES;  // bytes of an unpacked tile of columns

  static void zero() {
    _tile_zero(0);
    if constexpr (COUNT > 1) _tile_zero(1);
    if constexpr (COUNT > 2) _tile_zero(2);
    if constexpr (COUNT > 3) _tile_zero(3);
  }
  static void store(int32_t* to) {
    _tile_stored(0, to, 64);
    if constexpr (COUNT > 1) _tile_stored(1, to + TILE_VALUES, 64);
    if constexpr (COUNT > 2) _tile_stored(2, to + 2 * TILE_VALUES, 64);
    if constexpr (COUNT > 3) _tile_stored(3, to + 3 * TILE_VALUES, 64);
    compiler_barrier();
  }
  static void load(const int32_t* from) {
    compiler_barrier();
    _tile_loadd(0, from, 64);
    if constexpr (COUNT > 1) _tile_loadd(1, from + TILE_VALUES, 64);
    if constexpr (COUNT > 2) _tile_loadd(2, from + 2 * TILE_VALUES, 64);
    if constexpr (COUNT > 3) _tile_loadd(3, from + 3 * TILE_VALUES, 64);
  }

  // One of eight steps of a span's multiplication. Other work goes between the steps, because an AMX instruction takes
  // as long as dozens of others and out-of-order execution does not reach further.
  template <int PART>
  __attribute__((always_inline)) static void add(const int8_t* weights, const Rows& rows) {
    if constexpr (PART % 2 == 0) compiler_barrier();
    if constexpr (PART == 0) {
      _tile_loadd(4, weights, 64);
      _tile_loadd(5, rows.high, 64);
    }
    if constexpr (PART == 1) _tile_dpbssd(0, 5, 4);
    if constexpr (PART == 2 && !STACKED) _tile_loadd(5, rows.low, 64);
    if constexpr (PART == 3 && !STACKED) _tile_dpbssd(1, 5, 4);
    if constexpr (PART == 4 && TWO_WEIGHT_TILES) _tile_loadd(4, weights + TILE_BYTES, 64);
    if constexpr (PART == 5 && TWO_WEIGHT_TILES) {
      if constexpr (INT16 && STACKED) _tile_dpbsud(1, 5, 4);
      if constexpr (INT16 && !STACKED) _tile_dpbsud(2, 5, 4);
      if constexpr (!INT16 && STACKED) _tile_dpbssd(1, 5, 4);
      if constexpr (!INT16 && !STACKED) _tile_dpbssd(3, 5, 4);
    }
    if constexpr (PART == 6 && TWO_WEIGHT_TILES && !STACKED) _tile_loadd(5, rows.high, 64);
    if constexpr (PART == 7 && TWO_WEIGHT_TILES && !STACKED) {
      if constexpr (INT16)
        _tile_dpbsud(1, 5, 4);
      else
        _tile_dpbssd(2, 5, 4);
    }
  }
  static void add_all(const int8_t* weights, const Rows& rows) {
    add<0>(weights, rows), add<1>(weights, rows), add<2>(weights, rows), add<3>(weights, rows);
    add<4>(weights, rows), add<5>(weights, rows), add<6>(weights, rows), add<7>(weights, rows);
  }

  // A row's accumulators with column tile t, in 2^16, for tiles of `rows` rows.
  static __m512i total(const int32_t* sums, int t, int64_t row, int64_t rows) {
    const auto of = [&](int tile, bool low) {
      return _mm512_load_si512(sums + tile * TILE_VALUES + (row + (low ? rows : 0)) * 16);
    };
    const __m512i half = _mm512_set1_epi32(128);
    if constexpr (INT16) {
      const __m512i low = STACKED ? of(1, true) : of(2, false);
      const __m512i crossed = STACKED ? _mm512_add_epi32(of(0, true), of(1, false)) : of(1, false);
      const __m512i all = _mm512_add_epi32(crossed, _mm512_srai_epi32(low, 8));
      return _mm512_add_epi32(of(0, false), _mm512_srai_epi32(_mm512_add_epi32(all, half), 8));
    }
    const __m512i low = STACKED ? of(t, true) : of(2 * t + 1, false);
    return _mm512_add_epi32(of(STACKED ? t : 2 * t, false), _mm512_srai_epi32(_mm512_add_epi32(low, half), 8));
  }
};

// Factors of the accumulators of T tiles' columns.
template <int T>
struct Columns {
  __m512 of[T];

  void set(const GemmArgs& args, int64_t tile) {
    for (int t = 0; t < T; t++) of[t] = args.columns(tile + t);
  }
};

// Converts and stores rows first..last of a block whose accumulators are [COUNT].
template <class TileUse>
__attribute__((always_inline)) inline void store_results(const GemmArgs& args, const int32_t* sums, int64_t tile,
                                                         const Columns<TileUse::TILES>& columns, int64_t block,
                                                         int64_t first, int64_t last) {
  const int64_t rows = args.x.tile_rows;
  for (int t = 0; t < TileUse::TILES; t++)
    for (int64_t r = first; r < std::min(last, args.rows - block * rows); r++)
      args.store_results(block * rows + r, tile + t, TileUse::total(sums, t, r, rows), columns.of[t]);
}

// Unpacks a span of tiles in eight steps; calls `before` with the number of each step first.
template <class TileUse, class Scales, class Before>
__attribute__((always_inline)) inline void unpack_span(Scales* scales, const uint8_t* codes, int64_t stride,
                                                       int64_t span, bool whole, int8_t* to, int8_t* remainder,
                                                       Before before) {
  constexpr int T = TileUse::TILES, S = Scales::SCHEME;
  const auto step = [&](auto number) __attribute__((always_inline)) {
    constexpr int first = number * T, t = first / 8, group = first / 4 % 2;  // quarters of groups
    before(number);
    if constexpr (first % 8 == 0) {
      scales[t].template next<TileUse::INT16>();
      if constexpr (!TileUse::INT16) store_remainder(scales[t].remainder, span, remainder + t * TILE_BYTES);
    }
    if (group == 1 && !whole) return;
    const uint8_t* from = codes + t * stride + span * 2 * bytes_of_group(S) + group * bytes_of_group(S);
    for (int quarter = first % 4; quarter < first % 4 + T; quarter++)
      unpack_quarter<S, TileUse::INT16>(from, quarter, scales[t].per_group[group],
                                        to + t * TileUse::UNPACKED + group * TILE_BYTES / 2);
  };
  step(std::integral_constant<int, 0>()), step(std::integral_constant<int, 1>());
  step(std::integral_constant<int, 2>()), step(std::integral_constant<int, 3>());
  step(std::integral_constant<int, 4>()), step(std::integral_constant<int, 5>());
  step(std::integral_constant<int, 6>()), step(std::integral_constant<int, 7>());
}

// Tiles by one row block. The multiplication of a span is interleaved with unpacking of the next, which may belong to
// the next tile.
template <class TileUse, class Scales>
void one_block(const GemmArgs& args, int64_t first_tile, int64_t last_tile) {
  constexpr int T = TileUse::TILES;
  constexpr int64_t NONE = -1;
  const int64_t stride = args.bytes_of_tile(), spans = args.spans(), steps = args.steps();
  alignas(64) int8_t weights[UNPACKED_SPANS * T * TileUse::UNPACKED];
  alignas(64) int8_t remainder[T * TILE_BYTES];
  alignas(64) int32_t sums[TileUse::COUNT * TILE_VALUES];
  const int8_t* before = nullptr;
  Rows rows = {};
  // Finished accumulators are converted while a later span is unpacked, two rows per step, so that AMX does not wait.
  Columns<T> columns;
  int64_t finished_tile = NONE;
  const auto done = [&](int64_t tile) {
    TileUse::store(sums);
    TileUse::zero();
    columns.set(args, tile);
    finished_tile = tile;
  };
  const auto finish_some = [&](int64_t number) __attribute__((always_inline)) {
    constexpr int64_t some = AMX_ROWS / 8;
    if (finished_tile != NONE)
      store_results<TileUse>(args, sums, finished_tile, columns, 0, number * some, (number + 1) * some);
  };
  TileUse::zero();
  int64_t step = 0;
  for (int64_t tile = first_tile; tile < last_tile; tile += T) {
    const uint8_t* codes = args.w.codes + tile * stride;
    Scales scales[] = {Scales(args.w, tile), Scales(args.w, tile + T - 1)};
    TilePrefetch<T, Scales> tile_prefetch(args, scales, tile);
    for (int64_t s = 0; s < spans; s++, step++) {
      int8_t* to = weights + step % UNPACKED_SPANS * T * TileUse::UNPACKED;
      const bool whole = 2 * s + 1 < steps;
      if (step == 0)
        unpack_span<TileUse>(scales, codes, stride, s, whole, to, remainder,
                             [&](auto step) { tile_prefetch.step(step); });
      else
        unpack_span<TileUse>(
            scales, codes, stride, s, whole, to, remainder, [&](auto step) __attribute__((always_inline)) {
              tile_prefetch.step(step);
              TileUse::template add<step>(before, rows);
              finish_some(step);
            });
      finished_tile = NONE;
      if (s == 0 && step > 0) done(tile - T);
      before = to, rows = rows_at(args, 0, s);
      if (!TileUse::INT16 && (s + 1 == spans || (s + 1) % SPANS_PER_SUM_SPAN == 0))
        TileUse::add_all(remainder, rows_at(args, 0, spans + s / SPANS_PER_SUM_SPAN));
    }
  }
  TileUse::add_all(before, rows);
  const auto finish_all = [&] {
    for (int64_t number = 0; number < 8; number++) finish_some(number);
  };
  finish_all();  // with one span per tile, the tile before the last is not converted yet
  done(last_tile - T);
  finish_all();
}

// Tiles by any number of rows: unpacks some spans, then multiplies all row blocks by them.
template <class TileUse, class Scales>
void many_blocks(const GemmArgs& args, int64_t tile) {
  constexpr int T = TileUse::TILES;
  const int64_t stride = args.bytes_of_tile(), spans = args.spans(), steps = args.steps();
  const int64_t blocks = (args.rows + args.x.tile_rows - 1) / args.x.tile_rows;
  const int64_t parts = (spans + MAX_UNPACKED_SPANS - 1) / MAX_UNPACKED_SPANS, step = (spans + parts - 1) / parts;
  const int64_t remainder_tiles = TileUse::INT16 ? 0 : args.x.sum_spans();
  alignas(64) int8_t weights[MAX_UNPACKED_SPANS * T * TileUse::UNPACKED];
  alignas(64) int8_t remainder[(TileUse::INT16 ? 1 : MAX_REMAINDER_TILES) * T * TILE_BYTES];
  alignas(64) int32_t sums[MAX_ROWS / AMX_ROWS * TileUse::COUNT * TILE_VALUES];
  const uint8_t* codes = args.w.codes + tile * stride;
  Columns<T> columns;
  columns.set(args, tile);
  const auto remainder_at = [&](int64_t n) { return remainder + (TileUse::INT16 ? 0 : n * T * TILE_BYTES); };
  Scales scales[] = {Scales(args.w, tile), Scales(args.w, tile + T - 1)};
  TilePrefetch<T, Scales> tile_prefetch(args, scales, tile);
  for (int64_t first = 0; first < spans; first += step) {
    const int64_t last = std::min(spans, first + step);
    const auto kept = [&](int64_t s) { return weights + (s - first) * T * TileUse::UNPACKED; };
    for (int64_t s = first; s < last; s++)
      unpack_span<TileUse>(scales, codes, stride, s, 2 * s + 1 < steps, kept(s), remainder_at(s / SPANS_PER_SUM_SPAN),
                           [&](auto step) { tile_prefetch.step(step); });
    for (int64_t block = 0; block < blocks; block++) {
      int32_t* of_block = sums + (parts == 1 ? 0 : block * TileUse::COUNT * TILE_VALUES);
      if (first == 0)
        TileUse::zero();
      else
        TileUse::load(of_block);
      for (int64_t s = first; s < last; s++) TileUse::add_all(kept(s), rows_at(args, block, s));
      for (int64_t n = 0; n < remainder_tiles && last == spans; n++)
        TileUse::add_all(remainder_at(n), rows_at(args, block, spans + n));
      TileUse::store(of_block);
      // While they are in the L1 cache.
      if (last == spans) store_results<TileUse>(args, of_block, tile, columns, block, 0, args.x.tile_rows);
    }
  }
}

// Runs as many tiles as fill whole groups of Use::TILES; returns where the rest starts.
template <class TileUse, class Scales>
int64_t run_whole_uses(const GemmArgs& args, int64_t tile, int64_t last) {
  const int64_t end = tile + (last - tile) / TileUse::TILES * TileUse::TILES, rows = args.x.tile_rows;
  if (tile == end) return end;
  configure_tiles(config_of(TileUse::COUNT, TileUse::STACKED ? 2 * rows : rows));
  if (args.rows <= rows)
    one_block<TileUse, Scales>(args, tile, end);
  else
    for (; tile < end; tile += TileUse::TILES) many_blocks<TileUse, Scales>(args, tile);
  return end;
}

template <class Scales, int R>
void gemv_rows(const GemmArgs& args, int64_t tile, int64_t last) {
  for (; tile + 2 <= last; tile += 2) gemv_int16<Scales, R, 2>(args, tile);
  if (tile < last) gemv_int16<Scales, R, 1>(args, tile);
}

template <class Scales, bool STACKED>
void run_tiles(const GemmArgs& args, int64_t tile, int64_t last) {
  if constexpr (Scales::SCHEME == INT4) {
    if (args.w.as_int8) {
      if (args.rows == 1) {
        for (; tile + 2 <= last; tile += 2) gemv_int8<Scales, 2>(args, tile);
        if (tile < last) gemv_int8<Scales, 1>(args, tile);
        return;
      }
      tile = run_whole_uses<TileUse<false, STACKED, 2>, Scales>(args, tile, last);
      run_whole_uses<TileUse<false, STACKED, 1>, Scales>(args, tile, last);
      return;
    }
    if (args.x.few) switch (args.rows) {
        case 1: return gemv_rows<Scales, 1>(args, tile, last);
        case 2: return gemv_rows<Scales, 2>(args, tile, last);
        case 3: return gemv_rows<Scales, 3>(args, tile, last);
      }
  }
  run_whole_uses<TileUse<true, STACKED, 1>, Scales>(args, tile, last);
}

}  // namespace

void multiply_amx(const Matrix& w, int64_t first_tile, int64_t last_tile, const Activations& x, int64_t rows,
                  float* out, int64_t stride, Prefetcher& prefetcher) {
  const GemmArgs args{w, x, rows, out - first_tile * 16, stride, prefetcher};
  const bool double_quantized = w.scale_codes != nullptr;
  const auto per_group = [&](auto* scales) {
    using Scales = std::remove_pointer_t<decltype(scales)>;
    const bool stacked = 2 * x.tile_rows <= AMX_ROWS;
    stacked ? run_tiles<Scales, true>(args, first_tile, last_tile)
            : run_tiles<Scales, false>(args, first_tile, last_tile);
  };
  const auto by_floats = [&](auto scheme) {
    constexpr int S = decltype(scheme)::value;
    double_quantized ? per_group(static_cast<FloatScales<S, true>*>(nullptr))
                     : per_group(static_cast<FloatScales<S, false>*>(nullptr));
  };
  if (w.scheme == NF4) return by_floats(std::integral_constant<int, NF4>());
  if (w.scheme == INT8) return by_floats(std::integral_constant<int, INT8>());
  if (double_quantized) return per_group(static_cast<FloatScales<INT4, true>*>(nullptr));
  w.whole_spans() ? per_group(static_cast<IntScales<true>*>(nullptr))
                  : per_group(static_cast<IntScales<false>*>(nullptr));
}

}  // namespace loramux

#endif
