// Products of FEW_ROWS rows or fewer with INT4, as amx_gemm.h defines them, by vector instructions: codes are multiplied
// as they are, and a group's sums by its scale. And of one row where weights are bytes.
#pragma once
#include "target.h"

#include "weight_layout.h"

namespace loramux {

// Sums of T tiles over a few spans are kept in 32 bits: 2^15 for a weight, 127 for a code of an activation.
constexpr int64_t SPANS_OF_32_BITS = 8;

// R rows by T tiles.
template <class Scales, int R, int T>
void few_rows(const Walk& walk, int64_t tile) {
  static_assert(Scales::SCHEME == INT4);
  constexpr int64_t BYTES = bytes_of_group(INT4);
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8(static_cast<char>(0xf0));
  const int64_t stride = walk.bytes_of_tile(), spans = walk.spans(), steps = walk.steps();
  const uint8_t* codes = walk.w.codes + tile * stride;
  const SpanSums* sums[R];
  const int8_t* rows[R];
  for (int r = 0; r < R; r++) sums[r] = walk.x.sums.get() + r * spans, rows[r] = walk.x.wide.get() + r * SPAN;
  const int64_t to_low = walk.x.rows_of_tile * SPAN;
  Scales scales[] = {Scales(walk.w, tile), Scales(walk.w, tile + T - 1)};
  Asking<T, Scales> asking(walk, scales, tile);
  __m512i total[T][R][2];  // of 8 columns each, 64 bits
  __m512i of_high[T][R], of_low[T][R];
  for (int t = 0; t < T; t++)
    for (int r = 0; r < R; r++)
      total[t][r][0] = total[t][r][1] = of_high[t][r] = of_low[t][r] = _mm512_setzero_si512();
  for (int64_t s = 0; s < spans; s++) {
    __m512i pairs[T][R][2] = {};  // a column's sums of high and of low codes, of the first group and of the second one
    for (int t = 0; t < T; t++) scales[t].template next<true>();
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
      for (int part = g * 4; part < g * 4 + 4; part++) asking.part(part);
      if (2 * s + g == steps) break;
      __m512i dot[T][R][2];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
          for (int c = 0; c < 2; c++) dot[t][r][c] = broadcast_word(&sums[r][s].begin[c][g]);
#pragma GCC unroll 2
      for (int half = 1; half >= 0; half--) {
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
          __m512i w[T];
          for (int t = 0; t < T; t++)
            w[t] = _mm512_and_si512(_mm512_loadu_si512(codes + t * stride + (2 * s + g) * BYTES + b * 64), half ? high : low);
#pragma GCC unroll 8
          for (int r = 0; r < R; r++) {
            const int8_t* at = rows[r] + s * 2 * to_low + g * GROUP + half * GROUP / 2 + b * 4;
            const __m512i a = broadcast_word(at), fine = broadcast_word(at + to_low);
            for (int t = 0; t < T; t++) {
              dot[t][r][0] = _mm512_dpbusd_epi32(dot[t][r][0], w[t], a);
              dot[t][r][1] = _mm512_dpbusd_epi32(dot[t][r][1], w[t], fine);
            }
          }
        }
        for (int r = 0; r < R && half == 1; r++)  // nibbles in the high half of a byte were read as 16 times as much
          for (int t = 0; t < T; t++)
            for (int c = 0; c < 2; c++) dot[t][r][c] = _mm512_srai_epi32(dot[t][r][c], 4);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
        for (int t = 0; t < T; t++)
          for (int c = 0; c < 2; c++)
            pairs[t][r][c] = g == 0 ? _mm512_maskz_mov_epi16(0x55555555, dot[t][r][c])
                                    : _mm512_mask_blend_epi16(0xaaaaaaaa, pairs[t][r][c], _mm512_slli_epi32(dot[t][r][c], 16));
    }
    const bool flush = s + 1 == spans || (s + 1) % SPANS_OF_32_BITS == 0;
    for (int t = 0; t < T; t++) {
      // Sums are of codes less 8.
      const __m512i scale = scales[t].both.scale;
      const __m512i zero = _mm512_add_epi16(scales[t].both.zero, _mm512_slli_epi16(scale, 3));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const auto add = [&](__m512i sum, int c) {
          const __m512i scaled = _mm512_dpwssd_epi32(sum, pairs[t][r][c], scale);
          return _mm512_dpwssd_epi32(scaled, broadcast_word(sums[r][s].inputs[c]), zero);
        };
        of_high[t][r] = add(of_high[t][r], 0);
        of_low[t][r] = add(of_low[t][r], 1);
        if (!flush) continue;
        const auto more = [&](__m512i sum, __m256i by_high, __m256i by_low) {
          const __m512i wide = _mm512_slli_epi64(_mm512_cvtepi32_epi64(by_high), 8);
          return _mm512_add_epi64(sum, _mm512_add_epi64(wide, _mm512_cvtepi32_epi64(by_low)));
        };
        total[t][r][0] = more(total[t][r][0], _mm512_castsi512_si256(of_high[t][r]), _mm512_castsi512_si256(of_low[t][r]));
        total[t][r][1] =
            more(total[t][r][1], _mm512_extracti64x4_epi64(of_high[t][r], 1), _mm512_extracti64x4_epi64(of_low[t][r], 1));
        of_high[t][r] = of_low[t][r] = _mm512_setzero_si512();
      }
    }
  }
  for (int t = 0; t < T; t++) {
    const __m512 columns = walk.columns(tile + t);
    for (int r = 0; r < R; r++) {
      const auto rounded = [&](__m512i sum) {
        return _mm512_cvtepi64_epi32(_mm512_srai_epi64(_mm512_add_epi64(sum, _mm512_set1_epi64(1 << 15)), 16));
      };
      const __m512i first = _mm512_castsi256_si512(rounded(total[t][r][0]));
      walk.finish(r, tile + t, _mm512_inserti64x4(first, rounded(total[t][r][1]), 1), columns);
    }
  }
}

// A row by T tiles of weights that are bytes to the unit, which takes as long for a row as for sixteen. Two rows take longer
// here than there, as multiplications begin one at a time.
template <class Scales, int T>
void row_of_bytes(const Walk& walk, int64_t tile) {
  static_assert(Scales::SCHEME == INT4);
  constexpr int64_t BYTES = bytes_of_group(INT4);
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(128));
  const int64_t stride = walk.bytes_of_tile(), spans = walk.spans(), steps = walk.steps(), to_low = walk.x.rows_of_tile * SPAN;
  const uint8_t* codes = walk.w.codes + tile * stride;
  const int8_t* row = walk.x.wide.get();
  alignas(64) int8_t rest[T * TILE_BYTES];
  Scales scales[] = {Scales(walk.w, tile), Scales(walk.w, tile + T - 1)};
  Asking<T, Scales> asking(walk, scales, tile);
  __m512i sums[T][2];  // by high codes and by low ones, of weights with 128 added
  for (int t = 0; t < T; t++)
    for (int c = 0; c < 2; c++) sums[t][c] = _mm512_set1_epi32(walk.x.begins.get()[c]);
  const auto add = [&](int t, __m512i w, const int8_t* at) __attribute__((always_inline)) {
    for (int c = 0; c < 2; c++) sums[t][c] = _mm512_dpbusd_epi32(sums[t][c], w, broadcast_word(at + c * to_low));
  };
  for (int64_t s = 0; s < spans; s++) {
    for (int t = 0; t < T; t++) {
      scales[t].template next<false>();
      put_rest(scales[t].rest, s, rest + t * TILE_BYTES);
    }
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
      for (int part = g * 4; part < g * 4 + 4; part++) asking.part(part);
      if (2 * s + g == steps) break;
      const int8_t* at = row + s * 2 * to_low + g * GROUP;
      for (int t = 0; t < T; t++) {
        const Words by = {scales[t].by[g].scale, _mm512_xor_si512(scales[t].by[g].zero, sign)};
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
          const __m512i w = _mm512_loadu_si512(codes + t * stride + (2 * s + g) * BYTES + b * 64);
          add(t, bytes_of_nibbles(_mm512_slli_epi16(w, 4), by), at + b * 4);
          add(t, bytes_of_nibbles(w, by), at + GROUP / 2 + b * 4);
        }
      }
    }
    if (s + 1 < spans && (s + 1) % SPANS_OF_SUMS != 0) continue;
    const int8_t* of_sums = row + (spans + s / SPANS_OF_SUMS) * 2 * to_low;
    for (int64_t i = 0; i <= s % SPANS_OF_SUMS / 2; i++)
      for (int t = 0; t < T; t++)
        add(t, _mm512_xor_si512(_mm512_load_si512(rest + t * TILE_BYTES + i * 64), sign), of_sums + i * 4);
    for (int c = 0; c < 2; c++) {
      const __m512i x = _mm512_loadu_si512(of_sums + c * to_low);
      const int32_t sum = _mm512_reduce_add_epi32(_mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), x));
      for (int t = 0; t < T; t++) sums[t][c] = _mm512_sub_epi32(sums[t][c], _mm512_set1_epi32(128 * sum));
    }
  }
  for (int t = 0; t < T; t++) {
    const __m512i low = _mm512_srai_epi32(_mm512_add_epi32(sums[t][1], _mm512_set1_epi32(128)), 8);
    walk.finish(0, tile + t, _mm512_add_epi32(sums[t][0], low), walk.columns(tile + t));
  }
}

}  // namespace loramux
