#include "lora_codes.h"

#include <cmath>
#include <vector>

#include "simd.h"

namespace loramux {
namespace {

template <class T, class F>
void read(const Factor& factor, int64_t rank, float* to, F&& value) {
  const T* from = static_cast<const T*>(factor.values) + rank * factor.rank_stride;
  if (factor.stride == 1) {  // a loop that compilers make vectors of
    for (int64_t i = 0; i < factor.width; i++) to[i] = value(from[i]);
  } else {
    for (int64_t i = 0; i < factor.width; i++) to[i] = value(from[i * factor.stride]);
  }
}

// What belongs to a rank: a row of A, or a column of B.
void read(const Factor& factor, int64_t rank, float* to) {
  switch (factor.type) {
    case BFLOAT16: return read<uint16_t>(factor, rank, to, [](uint16_t h) { return bf16_to_float(h); });
    case FLOAT16: return read<uint16_t>(factor, rank, to, [](uint16_t h) { return half_to_float(h); });
    default: return read<float>(factor, rank, to, [](float x) { return x; });
  }
}

// Codes [n], and their unit: infinite or NaN if a value is.
float encode_row(const float* x, int64_t n, int8_t* codes) {
  // As integers magnitudes have the order that they have as numbers, and NaN is the largest.
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i magnitude = (__m512i)_mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(n - i), x + i));
    most = _mm512_max_epi32(most, magnitude);
  }
  const float peak = _mm_cvtss_f32((__m128)_mm_cvtsi32_si128(_mm512_reduce_max_epi32(most)));
  if (!std::isfinite(peak)) return peak;
  // Below this the reciprocal would overflow; such a rank is as good as zero.
  const bool some = peak >= 1e-30f;
  const __m512 inverse = _mm512_set1_ps(some ? 127.0f / peak : 0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_lanes(n - i);
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
    _mm_mask_storeu_epi8(codes + i, mask, _mm512_cvtsepi32_epi8(code));
  }
  return some ? peak / 127.0f : 0.0f;
}

}  // namespace

int64_t encode(const LoraSource* modules, int64_t count) {
  std::vector<float> row;
  const auto encode_rank = [&](const Factor& factor, int64_t rank) -> double {
    row.resize(static_cast<size_t>(factor.width));
    read(factor, rank, row.data());
    return encode_row(row.data(), factor.width, factor.codes + rank * factor.width);
  };
  for (int64_t m = 0; m < count; m++) {
    const LoraSource& module = modules[m];
    for (int64_t j = 0; j < module.rank; j++) {
      const double unit_a = encode_rank(module.a, j), unit_b = encode_rank(module.b, j);
      module.units[j] = static_cast<float>(unit_a * unit_b);
      if (!std::isfinite(unit_a) || !std::isfinite(unit_b) || !std::isfinite(module.units[j])) return m;
    }
  }
  return -1;
}

}  // namespace loramux
