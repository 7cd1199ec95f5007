// Small vector functions shared by the kernels. All are elementwise or reduce in a fixed order.
#pragma once
#include "target.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace loramux {

inline __m512 bf16_to_float(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }

#ifdef __AVX512BF16__
inline __m256i float_to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// bf16 of `low`, then of `high`.
inline __m512i float_to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// sum[i] + x[2 i] y[2 i] + x[2 i + 1] y[2 i + 1], for bf16 x and y.
inline __m512 dot_bf16(__m512 sum, __m512i x, __m512i y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
#else
inline __m256i float_to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x),
                odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(even, nan, _mm512_set1_epi32(0x7fc00000)), 16));
}

inline __m512i float_to_bf16(__m512 low, __m512 high) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(float_to_bf16(low)), float_to_bf16(high), 1);
}

inline __m512 dot_bf16(__m512 sum, __m512i x, __m512i y) {
  const auto first = [](__m512i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); };
  const auto second = [](__m512i v) {
    return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  };
  return _mm512_fmadd_ps(second(x), second(y), _mm512_fmadd_ps(first(x), first(y), sum));
}
#endif

inline float bf16_to_float(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float half_to_float(uint16_t h) { return _cvtsh_ss(h); }

// Loads 16 float16 values.
inline __m512 load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __m512 decode(const uint8_t* codes, float step, float base) {
  const __m512 c = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))));
  const __m512 value = _mm512_add_ps(_mm512_mul_ps(c, _mm512_set1_ps(step)), _mm512_set1_ps(base));
  return _mm512_cvtph_ps(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// The NF4 levels in units of 1/127, plus 128, since vpdpbusd needs one unsigned operand.
inline __m512i nf4_levels() {
  return _mm512_broadcast_i32x4(_mm_setr_epi8(1, 40, 61, 78, 92, 105, 116, (char)128, (char)138, (char)148, (char)159,
                                              (char)171, (char)184, (char)199, (char)220, (char)255));
}

// Calls f(std::integral_constant<int, N>()) with N = count, or MAX if count is larger.
template <int MAX, int N = 1, class F>
__attribute__((always_inline)) inline void dispatch(int64_t count, F&& f) {
  if constexpr (N < MAX)
    if (count != N) return dispatch<MAX, N + 1>(count, f);
  f(std::integral_constant<int, N>());
}

inline __mmask16 first_lanes(int64_t n) {
  return n >= 16 ? 0xffff : static_cast<__mmask16>(n <= 0 ? 0 : (1u << n) - 1);
}

inline __mmask32 first_of_32(int64_t n) {
  return n >= 32 ? 0xffffffffu : static_cast<__mmask32>(n <= 0 ? 0 : (1ull << n) - 1);
}

// Broadcasts the 32 bits at p.
inline __m512i broadcast32(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

// Duplicates each of 16 words into a 32-bit lane: words 16 * half to 16 * half + 15 at `at`.
inline __m512i duplicate_words(const int16_t* at, int half) {
#ifdef __AVX512VNNI__  // one load for both halves
  const __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i twice = _mm512_or_si512(column, _mm512_slli_epi32(column, 16));
  const __m512i from = _mm512_or_si512(twice, _mm512_set1_epi16(static_cast<int16_t>(16 * half)));
  return _mm512_permutexvar_epi16(from, _mm512_loadu_si512(at));
#else
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 16 * half));
  const __m512i each = _mm512_cvtepu16_epi32(words);
  return _mm512_or_si512(each, _mm512_slli_epi32(each, 16));
#endif
}

// 2^n for n in -126..127.
inline __m512 power_of_two(__m512i n) {
  return (__m512)_mm512_slli_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(127)), 23);
}

// exp with about one ulp of error: 2^n * p(r), r in [-ln2/2, ln2/2] (Cephes polynomial). NaN stays NaN.
inline __m512 exp_ps(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f),
                    _mm512_min_ps(_mm512_set1_ps(88.7f), x));  // min and max return the second operand if one is NaN
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

inline __m512 silu(__m512 x) {
  const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), x));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

// Reduces each of four vectors to one lane with f, in a fixed order.
template <class F>
inline __m128 reduce_lanes(__m512 a, __m512 b, __m512 c, __m512 d, F f) {
  const __m512 ab = f(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = f(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
  const __m512 all = f(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  const __m512 half = f(all, _mm512_shuffle_f32x4(all, all, 0x4e));
  return _mm512_castps512_ps128(f(half, _mm512_shuffle_f32x4(half, half, 0xb1)));
}

// Below this a reciprocal would overflow; rows with a smaller maximum count as zero.
constexpr float MIN_PEAK = 1e-30f;

// The largest magnitude of a split16 value, 256 high + low.
constexpr float SPLIT16_MAX = 127 * 256 + 127;

// The largest magnitude. Magnitudes compare as integers like as floats, and NaN is the largest.
inline float max_magnitude(const float* x, int64_t n) {
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < n; i += 16)
    most = _mm512_max_epi32(most, (__m512i)_mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(n - i), x + i)));
  return _mm_cvtss_f32((__m128)_mm_cvtsi32_si128(_mm512_reduce_max_epi32(most)));
}

// Four accumulators, to hide the latency of additions.
inline float sum_of_squares(const float* x, int64_t n) {
  __m512 sum[4];
  for (__m512& s : sum) s = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 64)
    for (int64_t j = 0; j < 4; j++) {
      const __m512 v = _mm512_maskz_loadu_ps(first_lanes(n - i - j * 16), x + i + j * 16);
      sum[j] = _mm512_fmadd_ps(v, v, sum[j]);
    }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
}

// out = x / rms(x) * weight
inline void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / static_cast<float>(n) + eps);
  const __m512 s = _mm512_set1_ps(scale);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_lanes(n - i);
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), s);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight + i)));
  }
}

inline void add_row(float* to, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_lanes(n - i);
    _mm512_mask_storeu_ps(to + i, mask,
                          _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to + i), _mm512_maskz_loadu_ps(mask, x + i)));
  }
}

inline void copy_row(float* to, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = first_lanes(n - i);
    _mm512_mask_storeu_ps(to + i, mask, _mm512_maskz_loadu_ps(mask, x + i));
  }
}

}  // namespace loramux
