// AMX build: GEMM with at most FEW_ROWS rows by vector instructions, with the result that amx_gemm.h defines. Codes of
// INT4 weights are multiplied directly and each group's accumulator by its scale. Also GEMV with 8-bit weights.
#pragma once
#include "target.h"

#include "weight_layout.h"

namespace loramux {

// Spans whose sums fit in 32 bits: a weight has at most 15 bits, an activation code 7.
constexpr int64_t SPANS_PER_FLUSH = 8;

// R rows by T tiles.
template <class Scales, int R, int T>
void gemv_int16(const GemmArgs& args, int64_t tile) {
  static_assert(Scales::SCHEME == INT4);
  constexpr int64_t BYTES = bytes_of_group(INT4);
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(static_cast<char>(0xf0));
  const int64_t stride = args.bytes_of_tile(), spans = args.spans(), steps = args.steps();
  const uint8_t* codes = args.w.codes + tile * stride;
  const SpanSums* sums[R];
  const int8_t* rows[R];
  for (int r = 0; r < R; r++) sums[r] = args.x.sums.get() + r * spans, rows[r] = args.x.split16.get() + r * SPAN;
  const int64_t to_low = args.x.tile_rows * SPAN;
  Scales scales[] = {Scales(args.w, tile), Scales(args.w, tile + T - 1)};
  TilePrefetch<T, Scales> tile_prefetch(args, scales, tile);
  __m512i total[T][R][2];  // 64-bit accumulators of 8 columns each
  __m512i high_sums[T][R], low_sums[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++)
      total[t][r][0] = total[t][r][1] = high_sums[t][r] = low_sums[t][r] = _mm512_setzero_si512();
  for (int64_t s = 0; s < spans; s++) {
    __m512i pairs[T][R][2] = {};  // accumulators of high and low codes; int16 pairs of both groups
    for (int t = 0; t < T; t++) scales[t].template next<true>();
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
      for (int step = g * 4; step < g * 4 + 4; step++) tile_prefetch.step(step);
      if (2 * s + g == steps) break;
      __m512i dot[T][R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
          for (int c = 0; c < 2; c++) dot[t][r][c] = broadcast32(&sums[r][s].begin[c][g]);
#pragma GCC unroll 2
      for (int half = 1; half >= 0; half--) {
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
          __m512i w[T];
          for (int t = 0; t < T; t++)
            w[t] = _mm512_and_si512(_mm512_loadu_si512(codes + t * stride + (2 * s + g) * BYTES + b * 64),
                                    half ? high : low);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const int8_t* at = rows[r] + s * 2 * to_low + g * GROUP + half * GROUP / 2 + b * 4;
            const __m512i a = broadcast32(at), fine = broadcast32(at + to_low);
            for (int t = 0; t < T; t++) {
              dot[t][r][0] = _mm512_dpbusd_epi32(dot[t][r][0], w[t], a);
              dot[t][r][1] = _mm512_dpbusd_epi32(dot[t][r][1], w[t], fine);
            }
          }
        }
        for (int r = 0; r < R && half == 1; r++)  // codes in the high nibble were multiplied as 16 times their value
          for (int t = 0; t < T; t++)
            for (int c = 0; c < 2; c++) dot[t][r][c] = _mm512_srai_epi32(dot[t][r][c], 4);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
          for (int c = 0; c < 2; c++)
            pairs[t][r][c] =
                g == 0 ? _mm512_maskz_mov_epi16(0x55555555, dot[t][r][c])
                       : _mm512_mask_blend_epi16(0xaaaaaaaa, pairs[t][r][c], _mm512_slli_epi32(dot[t][r][c], 16));
    }
    const bool flush = s + 1 == spans || (s + 1) % SPANS_PER_FLUSH == 0;
    for (int t = 0; t < T; t++) {
      // The accumulators are for codes minus 8.
      const __m512i scale = scales[t].both.scale;
      const __m512i zero = _mm512_add_epi16(scales[t].both.zero, _mm512_slli_epi16(scale, 3));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const auto add = [&](__m512i sum, int c) {
          const __m512i scaled = _mm512_dpwssd_epi32(sum, pairs[t][r][c], scale);
          return _mm512_dpwssd_epi32(scaled, broadcast32(sums[r][s].inputs[c]), zero);
        };
        high_sums[t][r] = add(high_sums[t][r], 0);
        low_sums[t][r] = add(low_sums[t][r], 1);
        if (!flush) continue;
        const auto more = [&](__m512i sum, __m256i by_high, __m256i by_low) {
          const __m512i wide = _mm512_slli_epi64(_mm512_cvtepi32_epi64(by_high), 8);
          return _mm512_add_epi64(sum, _mm512_add_epi64(wide, _mm512_cvtepi32_epi64(by_low)));
        };
        total[t][r][0] =
            more(total[t][r][0], _mm512_castsi512_si256(high_sums[t][r]), _mm512_castsi512_si256(low_sums[t][r]));
        total[t][r][1] = more(total[t][r][1], _mm512_extracti64x4_epi64(high_sums[t][r], 1),
                              _mm512_extracti64x4_epi64(low_sums[t][r], 1));
        high_sums[t][r] = low_sums[t][r] = _mm512_setzero_si512();
      }
    }
  }
  for (int t = 0; t < T; t++) {
    const __m512 columns = args.columns(tile + t);
    for (int r = 0; r < R; r++) {
      const auto rounded = [&](__m512i sum) {
        return _mm512_cvtepi64_epi32(_mm512_srai_epi64(_mm512_add_epi64(sum, _mm512_set1_epi64(1 << 15)), 16));
      };
      const __m512i first = _mm512_castsi256_si512(rounded(total[t][r][0]));
      args.store_results(r, tile + t, _mm512_inserti64x4(first, rounded(total[t][r][1]), 1), columns);
    }
  }
}

// One row by T tiles of 8-bit weights. An AMX tile takes as long for one row as for sixteen. With two rows AMX is
// faster.
template <class Scales, int T>
void gemv_int8(const GemmArgs& args, int64_t tile) {
  static_assert(Scales::SCHEME == INT4);
  constexpr int64_t BYTES = bytes_of_group(INT4);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(128));
  const int64_t stride = args.bytes_of_tile(), spans = args.spans(), steps = args.steps(),
                to_low = args.x.tile_rows * SPAN;
  const uint8_t* codes = args.w.codes + tile * stride;
  const int8_t* row = args.x.split16.get();
  alignas(64) int8_t remainder[T * TILE_BYTES];
  Scales scales[] = {Scales(args.w, tile), Scales(args.w, tile + T - 1)};
  TilePrefetch<T, Scales> tile_prefetch(args, scales, tile);
  __m512i sums[T][2];  // for high and low codes, of weights with 128 added
  for (int t = 0; t < T; t++)
    for (int c = 0; c < 2; c++) sums[t][c] = _mm512_set1_epi32(args.x.begins.get()[c]);
  const auto add = [&](int t, __m512i w, const int8_t* at) __attribute__((always_inline)) {
    for (int c = 0; c < 2; c++) sums[t][c] = _mm512_dpbusd_epi32(sums[t][c], w, broadcast32(at + c * to_low));
  };
  for (int64_t s = 0; s < spans; s++) {
    for (int t = 0; t < T; t++) {
      scales[t].template next<false>();
      store_remainder(scales[t].remainder, s, remainder + t * TILE_BYTES);
    }
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
      for (int step = g * 4; step < g * 4 + 4; step++) tile_prefetch.step(step);
      if (2 * s + g == steps) break;
      const int8_t* at = row + s * 2 * to_low + g * GROUP;
      for (int t = 0; t < T; t++) {
        const ScaleZero per_group = {scales[t].per_group[g].scale, _mm512_xor_si512(scales[t].per_group[g].zero, sign)};
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
          const __m512i w = _mm512_loadu_si512(codes + t * stride + (2 * s + g) * BYTES + b * 64);
          add(t, int8_from_nibbles(_mm512_slli_epi16(w, 4), per_group), at + b * 4);
          add(t, int8_from_nibbles(w, per_group), at + GROUP / 2 + b * 4);
        }
      }
    }
    if (s + 1 < spans && (s + 1) % SPANS_PER_SUM_SPAN != 0) continue;
    const int8_t* sums_at = row + (spans + s / SPANS_PER_SUM_SPAN) * 2 * to_low;
    for (int64_t i = 0; i <= s % SPANS_PER_SUM_SPAN / 2; i++)
      for (int t = 0; t < T; t++)
        add(t, _mm512_xor_si512(_mm512_load_si512(remainder + t * TILE_BYTES + i * 64), sign), sums_at + i * 4);
    for (int c = 0; c < 2; c++) {
      const __m512i x = _mm512_loadu_si512(sums_at + c * to_low);
      const int32_t sum = _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), x));
      for (int t = 0; t < T; t++) sums[t][c] = _mm512_sub_epi32(sums[t][c], _mm512_set1_epi32(128 * sum));
    }
  }
  for (int t = 0; t < T; t++) {
    const __m512i low = _mm512_srai_epi32(_mm512_add_epi32(sums[t][1], _mm512_set1_epi32(128)), 8);
    args.store_results(0, tile + t, _mm512_add_epi32(sums[t][0], low), args.columns(tile + t));
  }
}

}  // namespace loramux
