#include "lora_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "simd.h"

namespace loramux {
namespace {

template <class T, class F>
void read(const LoraFactor& factor, int64_t rank, float* to, F&& value) {
  const T* from = static_cast<const T*>(factor.values) + rank * factor.rank_stride;
  if (factor.stride == 1) {  // vectorizable
    for (int64_t i = 0; i < factor.width; i++) to[i] = value(from[i]);
  } else {
    for (int64_t i = 0; i < factor.width; i++) to[i] = value(from[i * factor.stride]);
  }
}

// A rank: a row of A, or a column of B.
void read(const LoraFactor& factor, int64_t rank, float* to) {
  switch (factor.type) {
    case BFLOAT16: return read<uint16_t>(factor, rank, to, [](uint16_t h) { return bf16_to_float(h); });
    case FLOAT16: return read<uint16_t>(factor, rank, to, [](uint16_t h) { return half_to_float(h); });
    default: return read<float>(factor, rank, to, [](float x) { return x; });
  }
}

// Quantizes a row: codes [n] plus 128. Returns the scale, infinite or NaN if a value is.
float encode_row(const float* x, int64_t n, uint8_t* codes) {
  const float peak = max_magnitude(x, n);
  if (!std::isfinite(peak)) return peak;
  const bool count = peak >= MIN_PEAK;
  const __m512 inverse = _mm512_set1_ps(count ? 127.0f / peak : 0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_lanes(n - i);
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
    _mm_mask_storeu_epi8(codes + i, mask, _mm512_cvtepi32_epi8(_mm512_add_epi32(code, _mm512_set1_epi32(128))));
  }
  return count ? peak / 127.0f : 0.0f;
}

// Interleaves four ranks' codes of 16 columns: four bytes per column.
void interleave(const uint8_t* const* ranks, int64_t column, uint8_t* to) {
  const auto load = [&](int j) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(ranks[j] + column)); };
  const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
  const __m128i ab[2] = {_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)};
  const __m128i cd[2] = {_mm_unpacklo_epi8(c, d), _mm_unpackhi_epi8(c, d)};
  for (int h = 0; h < 2; h++) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + h * 32), _mm_unpacklo_epi16(ab[h], cd[h]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + h * 32 + 16), _mm_unpackhi_epi16(ab[h], cd[h]));
  }
}

// Stores a tile of A: four inputs' codes of each rank side by side.
void store_tile(const uint8_t* ranks, int64_t padded, int64_t count, uint8_t* to) {
  for (int64_t j = 0; j < count; j++)
    for (int64_t i = 0; i < padded / 4; i++) std::memcpy(to + (i * count + j) * 4, ranks + j * padded + i * 4, 4);
}

}  // namespace

int64_t encode(const LoraSource* modules, int64_t count) {
  std::vector<float> row, rank_scales;
  std::vector<uint8_t> tile, four_ranks;
  const auto encode_rank = [&](const LoraFactor& factor, int64_t rank, uint8_t* codes) {
    row.resize(static_cast<size_t>(factor.width));
    read(factor, rank, row.data());
    return encode_row(row.data(), factor.width, codes);
  };
  for (int64_t m = 0; m < count; m++) {
    const LoraSource& module = modules[m];
    rank_scales.resize(static_cast<size_t>(module.rank));
    const int64_t padded = padded_inputs(module.a.width);
    uint8_t* a = module.a.codes;
    for (int64_t first = 0; first < module.rank;) {
      const int64_t count = ranks_of_tile(module.rank - first);
      tile.assign(static_cast<size_t>(count * padded), 128);  // padding is zero
      for (int64_t j = first; j < std::min(module.rank, first + count); j++)
        rank_scales[static_cast<size_t>(j)] = encode_rank(module.a, j, tile.data() + (j - first) * padded);
      store_tile(tile.data(), padded, count, a);
      a += count * padded;
      first += count;
    }
    const int64_t tiles = (module.b.width + 15) / 16, fours = (module.rank + 3) / 4;
    for (int64_t g = 0; g < fours; g++) {
      four_ranks.assign(static_cast<size_t>(4 * tiles * 16), 128);  // padding is zero
      const uint8_t* ranks[4];
      for (int64_t i = 0; i < 4; i++) {
        uint8_t* codes = four_ranks.data() + i * tiles * 16;
        ranks[i] = codes;
        const int64_t j = g * 4 + i;
        if (j >= module.rank) continue;
        const double scale_a = rank_scales[static_cast<size_t>(j)], scale_b = encode_rank(module.b, j, codes);
        module.rank_scales[j] = static_cast<float>(scale_a * scale_b);
        if (!std::isfinite(scale_a) || !std::isfinite(scale_b) || !std::isfinite(module.rank_scales[j])) return m;
      }
      for (int64_t t = 0; t < tiles; t++) interleave(ranks, t * 16, module.b.codes + (t * fours + g) * 64);
    }
  }
  return -1;
}

}  // namespace loramux
