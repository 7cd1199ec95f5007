// The AVX512 intrinsics that the kernels use, as two AVX2 halves with the same names. Results are equal bit for bit for
// the arguments that the kernels pass. Functions without a short AVX2 form are not used in hot loops.
#pragma once

#include <immintrin.h>

#include <cstdint>

// Some compilers define these as macros, and all do without optimization.
#undef _mm256_dpbusd_epi32
#undef _mm512_cmp_ps_mask
#undef _mm512_cmpeq_epi32_mask
#undef _mm512_cmpgt_epi32_mask
#undef _mm512_cvtps_ph
#undef _mm512_extracti32x4_epi32
#undef _mm512_extracti64x4_epi64
#undef _mm512_getexp_ps
#undef _mm512_inserti64x4
#undef _mm512_mask_blend_epi16
#undef _mm512_mask_cmp_ps_mask
#undef _mm512_mask_cmplt_epi32_mask
#undef _mm512_roundscale_ps
#undef _mm512_setr_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_i32x4
#undef _mm512_slli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srai_epi16
#undef _mm512_srai_epi32
#undef _mm512_srli_epi16
#undef _mm512_srli_epi32

#define FORCE_INLINE inline __attribute__((always_inline))

namespace loramux {

struct __m512i;
struct __m512d {
  __m256d low, high;
};
struct __m512 {
  __m256 low, high;
  FORCE_INLINE explicit operator __m512i() const;
};
struct __m512i {
  __m256i low, high;
  FORCE_INLINE explicit operator __m512() const { return {_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)}; }
};
__m512::operator __m512i() const { return {_mm256_castps_si256(low), _mm256_castps_si256(high)}; }

FORCE_INLINE __m512 operator+(__m512 x, __m512 y) {
  return {_mm256_add_ps(x.low, y.low), _mm256_add_ps(x.high, y.high)};
}

FORCE_INLINE __m512i _mm512_castps_si512(__m512 x) { return (__m512i)x; }
FORCE_INLINE __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)x; }
FORCE_INLINE __m512d _mm512_castps_pd(__m512 x) { return {_mm256_castps_pd(x.low), _mm256_castps_pd(x.high)}; }
FORCE_INLINE __m512 _mm512_castpd_ps(__m512d x) { return {_mm256_castpd_ps(x.low), _mm256_castpd_ps(x.high)}; }
FORCE_INLINE __m128 _mm512_castps512_ps128(__m512 x) { return _mm256_castps256_ps128(x.low); }
FORCE_INLINE __m128i _mm512_castsi512_si128(__m512i x) { return _mm256_castsi256_si128(x.low); }
FORCE_INLINE __m256i _mm512_castsi512_si256(__m512i x) { return x.low; }
FORCE_INLINE __m512i _mm512_castsi256_si512(__m256i x) { return {x, x}; }

// ---- broadcast, load, store --------------------------------------------------------------

FORCE_INLINE __m512 _mm512_setzero_ps() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
FORCE_INLINE __m512i _mm512_setzero_si512() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
FORCE_INLINE __m512 _mm512_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
FORCE_INLINE __m512i _mm512_set1_epi32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
FORCE_INLINE __m512i _mm512_set1_epi16(short x) { return {_mm256_set1_epi16(x), _mm256_set1_epi16(x)}; }
FORCE_INLINE __m512i _mm512_set1_epi8(char x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
FORCE_INLINE __m512i _mm512_setr_epi32(int a, int b, int c, int d, int e, int f, int g, int h, int i, int j, int k,
                                       int l, int m, int n, int o, int p) {
  return {_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(i, j, k, l, m, n, o, p)};
}
FORCE_INLINE __m512i _mm512_broadcast_i32x4(__m128i x) {
  return {_mm256_broadcastsi128_si256(x), _mm256_broadcastsi128_si256(x)};
}

FORCE_INLINE __m512 _mm512_loadu_ps(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
FORCE_INLINE void _mm512_storeu_ps(float* p, __m512 x) { _mm256_storeu_ps(p, x.low), _mm256_storeu_ps(p + 8, x.high); }
FORCE_INLINE void _mm512_store_ps(void* p, __m512 x) { _mm512_storeu_ps(static_cast<float*>(p), x); }
FORCE_INLINE __m512i _mm512_loadu_si512(const void* p) {
  const auto* at = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
}
FORCE_INLINE void _mm512_storeu_si512(void* p, __m512i x) {
  auto* at = static_cast<__m256i*>(p);
  _mm256_storeu_si256(at, x.low), _mm256_storeu_si256(at + 1, x.high);
}

// ---- masks -------------------------------------------------------------------------------

// A mask's bits as 32-bit lanes of all ones or zeros.
FORCE_INLINE __m512i lanes_of(__mmask16 mask) {
  const __m256i all = _mm256_set1_epi32(mask), low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i high = _mm256_slli_epi32(low, 8);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low), _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high)};
}
// A mask's bits as 16-bit lanes.
FORCE_INLINE __m256i words_of(__mmask16 mask) {
  const __m256i bits = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                         static_cast<short>(0x8000));
  return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<short>(mask)), bits), bits);
}
FORCE_INLINE __mmask16 mask_of(__m256 low, __m256 high) {
  return static_cast<__mmask16>(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
}
FORCE_INLINE __mmask16 mask_of(__m256i low, __m256i high) {
  return mask_of(_mm256_castsi256_ps(low), _mm256_castsi256_ps(high));
}

FORCE_INLINE __m512 _mm512_mask_mov_ps(__m512 x, __mmask16 mask, __m512 y) {
  const __m512 lanes = (__m512)lanes_of(mask);
  return {_mm256_blendv_ps(x.low, y.low, lanes.low), _mm256_blendv_ps(x.high, y.high, lanes.high)};
}
FORCE_INLINE __m512i _mm512_mask_mov_epi32(__m512i x, __mmask16 mask, __m512i y) {
  return (__m512i)_mm512_mask_mov_ps((__m512)x, mask, (__m512)y);
}
FORCE_INLINE __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) {
  return _mm512_mask_mov_ps(_mm512_setzero_ps(), mask, x);
}
FORCE_INLINE __m512i _mm512_mask_set1_epi32(__m512i x, __mmask16 mask, int y) {
  return _mm512_mask_mov_epi32(x, mask, _mm512_set1_epi32(y));
}
FORCE_INLINE __m512i _mm512_mask_blend_epi16(__mmask32 mask, __m512i x, __m512i y) {
  return {_mm256_blendv_epi8(x.low, y.low, words_of(static_cast<__mmask16>(mask))),
          _mm256_blendv_epi8(x.high, y.high, words_of(static_cast<__mmask16>(mask >> 16)))};
}

// Masked lanes are neither read nor written. Most masks are full.
FORCE_INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const float* p) {
  if (mask == 0xffff) return _mm512_loadu_ps(p);
  const __m512i lanes = lanes_of(mask);
  return {_mm256_maskload_ps(p, lanes.low), _mm256_maskload_ps(p + 8, lanes.high)};
}
FORCE_INLINE __m512 _mm512_mask_loadu_ps(__m512 x, __mmask16 mask, const float* p) {
  return mask == 0xffff ? _mm512_loadu_ps(p) : _mm512_mask_mov_ps(x, mask, _mm512_maskz_loadu_ps(mask, p));
}
FORCE_INLINE void _mm512_mask_storeu_ps(float* p, __mmask16 mask, __m512 x) {
  if (mask == 0xffff) return _mm512_storeu_ps(p, x);
  const __m512i lanes = lanes_of(mask);
  _mm256_maskstore_ps(p, lanes.low, x.low), _mm256_maskstore_ps(p + 8, lanes.high, x.high);
}
FORCE_INLINE __m256 _mm256_maskz_loadu_ps(__mmask8 mask, const float* p) {
  return _mm256_maskload_ps(p, lanes_of(mask).low);
}
FORCE_INLINE void _mm256_mask_storeu_ps(float* p, __mmask8 mask, __m256 x) {
  _mm256_maskstore_ps(p, lanes_of(mask).low, x);
}

template <class T>
FORCE_INLINE void store_some(T* p, uint32_t mask, const T* from) {
  for (; mask != 0; mask &= mask - 1) p[__builtin_ctz(mask)] = from[__builtin_ctz(mask)];
}
FORCE_INLINE void _mm_mask_storeu_epi8(void* p, __mmask16 mask, __m128i x) {
  alignas(16) uint8_t each[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(each), x);
  store_some(static_cast<uint8_t*>(p), mask, each);
}
FORCE_INLINE void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i x) {
  if (mask == 0xffff) return _mm256_storeu_si256(static_cast<__m256i*>(p), x);
  alignas(32) uint16_t each[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(each), x);
  store_some(static_cast<uint16_t*>(p), mask, each);
}
FORCE_INLINE void _mm512_mask_storeu_epi16(void* p, __mmask32 mask, __m512i x) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), x.low);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + 16, static_cast<__mmask16>(mask >> 16), x.high);
}
FORCE_INLINE __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  if (mask == 0xffff) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  alignas(32) uint16_t each[16] = {};
  store_some(each, mask, static_cast<const uint16_t*>(p));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(each));
}
FORCE_INLINE __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return {_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p),
          _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask >> 16), static_cast<const uint16_t*>(p) + 16)};
}

// ---- arithmetic --------------------------------------------------------------------------

#define OF_ONE(type, name, half) \
  FORCE_INLINE type _mm512_##name(type x) { return {half(x.low), half(x.high)}; }
#define OF_TWO(type, name, half) \
  FORCE_INLINE type _mm512_##name(type x, type y) { return {half(x.low, y.low), half(x.high, y.high)}; }
#define OF_THREE(type, name, half)                                    \
  FORCE_INLINE type _mm512_##name(type x, type y, type z) {           \
    return {half(x.low, y.low, z.low), half(x.high, y.high, z.high)}; \
  }
#define SHIFT(name, half)                                                           \
  FORCE_INLINE __m512i _mm512_##name(__m512i x, unsigned by) {                      \
    return {half(x.low, static_cast<int>(by)), half(x.high, static_cast<int>(by))}; \
  }
OF_TWO(__m512, add_ps, _mm256_add_ps)
OF_TWO(__m512, sub_ps, _mm256_sub_ps)
OF_TWO(__m512, mul_ps, _mm256_mul_ps)
OF_TWO(__m512, div_ps, _mm256_div_ps)
OF_TWO(__m512, max_ps, _mm256_max_ps)
OF_TWO(__m512, min_ps, _mm256_min_ps)
OF_THREE(__m512, fmadd_ps, _mm256_fmadd_ps)
OF_THREE(__m512, fnmadd_ps, _mm256_fnmadd_ps)
OF_TWO(__m512, unpacklo_ps, _mm256_unpacklo_ps)
OF_TWO(__m512, unpackhi_ps, _mm256_unpackhi_ps)
OF_TWO(__m512d, unpacklo_pd, _mm256_unpacklo_pd)
OF_TWO(__m512d, unpackhi_pd, _mm256_unpackhi_pd)
OF_TWO(__m512i, add_epi32, _mm256_add_epi32)
OF_TWO(__m512i, sub_epi32, _mm256_sub_epi32)
OF_TWO(__m512i, max_epi32, _mm256_max_epi32)
OF_TWO(__m512i, min_epi32, _mm256_min_epi32)
OF_TWO(__m512i, sllv_epi32, _mm256_sllv_epi32)
OF_TWO(__m512i, srav_epi32, _mm256_srav_epi32)
OF_TWO(__m512i, and_si512, _mm256_and_si256)
OF_TWO(__m512i, or_si512, _mm256_or_si256)
OF_TWO(__m512i, add_epi16, _mm256_add_epi16)
OF_TWO(__m512i, sub_epi16, _mm256_sub_epi16)
OF_TWO(__m512i, madd_epi16, _mm256_madd_epi16)
OF_TWO(__m512i, maddubs_epi16, _mm256_maddubs_epi16)
OF_TWO(__m512i, max_epi8, _mm256_max_epi8)
OF_ONE(__m512i, abs_epi8, _mm256_abs_epi8)
OF_TWO(__m512i, packs_epi32, _mm256_packs_epi32)
OF_TWO(__m512i, packs_epi16, _mm256_packs_epi16)
OF_TWO(__m512i, shuffle_epi8, _mm256_shuffle_epi8)
OF_TWO(__m512i, unpacklo_epi32, _mm256_unpacklo_epi32)
OF_TWO(__m512i, unpackhi_epi32, _mm256_unpackhi_epi32)
OF_TWO(__m512i, unpacklo_epi64, _mm256_unpacklo_epi64)
OF_TWO(__m512i, unpackhi_epi64, _mm256_unpackhi_epi64)
SHIFT(slli_epi32, _mm256_slli_epi32)
SHIFT(srli_epi32, _mm256_srli_epi32)
SHIFT(srai_epi32, _mm256_srai_epi32)
SHIFT(slli_epi16, _mm256_slli_epi16)
SHIFT(srli_epi16, _mm256_srli_epi16)
SHIFT(srai_epi16, _mm256_srai_epi16)
#undef OF_ONE
#undef OF_TWO
#undef OF_THREE
#undef SHIFT

FORCE_INLINE __m512 _mm512_abs_ps(__m512 x) {
  const __m256 all = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.low, all), _mm256_and_ps(x.high, all)};
}
FORCE_INLINE __m512 _mm512_maskz_div_ps(__mmask16 mask, __m512 x, __m512 y) {
  return _mm512_maskz_mov_ps(mask, _mm512_div_ps(x, y));
}
FORCE_INLINE __m512i _mm512_mask_add_epi32(__m512i x, __mmask16 mask, __m512i y, __m512i z) {
  return _mm512_mask_mov_epi32(x, mask, _mm512_add_epi32(y, z));
}

// Rounds to the nearest integer, the only mode that the kernels use.
FORCE_INLINE __m512 _mm512_roundscale_ps(__m512 x, int how) {
  if (how != 0) __builtin_trap();
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, NEAREST), _mm256_round_ps(x.high, NEAREST)};
}
// x 2^n for integral n in -252..252, where x 2^(n/2) is normal: only the second multiplication rounds.
FORCE_INLINE __m256 scaled(__m256 x, __m256 n) {
  const __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1);
  const auto power = [](__m256i of) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(of, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(all, half)));
}
FORCE_INLINE __m512 _mm512_scalef_ps(__m512 x, __m512 n) { return {scaled(x.low, n.low), scaled(x.high, n.high)}; }
// The exponent of normal numbers above zero.
FORCE_INLINE __m256 exponent(__m256 x) {
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(_mm256_castps_si256(x), 23), _mm256_set1_epi32(127)));
}
FORCE_INLINE __m512 _mm512_getexp_ps(__m512 x) { return {exponent(x.low), exponent(x.high)}; }

// vpdpbusd: sum[i] + the dot product of four unsigned bytes of x and signed bytes of y.
FORCE_INLINE __m256i _mm256_dpbusd_epi32(__m256i sum, __m256i x, __m256i y) {
#ifdef __AVXVNNI__
  return _mm256_dpbusd_avx_epi32(sum, x, y);
#else
  // vpmaddubsw would saturate at 16 bits.
  const __m256i even =
      _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#endif
}
FORCE_INLINE __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i x, __m512i y) {
  return {_mm256_dpbusd_epi32(sum.low, x.low, y.low), _mm256_dpbusd_epi32(sum.high, x.high, y.high)};
}
FORCE_INLINE __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i x, __m512i y) {
  return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(x.low, y.low)),
          _mm256_add_epi32(sum.high, _mm256_madd_epi16(x.high, y.high))};
}

// ---- comparisons -------------------------------------------------------------------------

FORCE_INLINE __mmask16 _mm512_cmp_ps_mask(__m512 x, __m512 y, int how) {
  const auto by = [&](auto compare) { return mask_of(compare(x.low, y.low), compare(x.high, y.high)); };
  switch (how) {
    case _CMP_EQ_OQ: return by([](__m256 a, __m256 b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); });
    case _CMP_LT_OQ: return by([](__m256 a, __m256 b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); });
    case _CMP_GT_OQ: return by([](__m256 a, __m256 b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); });
    case _CMP_GE_OQ: return by([](__m256 a, __m256 b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); });
    case _CMP_NLT_UQ: return by([](__m256 a, __m256 b) { return _mm256_cmp_ps(a, b, _CMP_NLT_UQ); });
    case _CMP_UNORD_Q: return by([](__m256 a, __m256 b) { return _mm256_cmp_ps(a, b, _CMP_UNORD_Q); });
    default: __builtin_trap();  // not used by the kernels
  }
}
FORCE_INLINE __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 mask, __m512 x, __m512 y, int how) {
  return mask & _mm512_cmp_ps_mask(x, y, how);
}
FORCE_INLINE __mmask16 _mm512_cmpeq_epi32_mask(__m512i x, __m512i y) {
  return mask_of(_mm256_cmpeq_epi32(x.low, y.low), _mm256_cmpeq_epi32(x.high, y.high));
}
FORCE_INLINE __mmask16 _mm512_cmpgt_epi32_mask(__m512i x, __m512i y) {
  return mask_of(_mm256_cmpgt_epi32(x.low, y.low), _mm256_cmpgt_epi32(x.high, y.high));
}
FORCE_INLINE __mmask16 _mm512_mask_cmplt_epi32_mask(__mmask16 mask, __m512i x, __m512i y) {
  return mask & _mm512_cmpgt_epi32_mask(y, x);
}

// ---- conversions -------------------------------------------------------------------------

FORCE_INLINE __m512 _mm512_cvtepi32_ps(__m512i x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
FORCE_INLINE __m512i _mm512_cvtps_epi32(__m512 x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
FORCE_INLINE __m512 _mm512_cvtph_ps(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
FORCE_INLINE __m256i _mm512_cvtps_ph(__m512 x, int how) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT;
  if (how != (NEAREST | _MM_FROUND_NO_EXC)) __builtin_trap();
  return _mm256_set_m128i(_mm256_cvtps_ph(x.high, NEAREST), _mm256_cvtps_ph(x.low, NEAREST));
}
FORCE_INLINE __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
FORCE_INLINE __m512i _mm512_cvtepu8_epi32(__m128i x) {
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
FORCE_INLINE __m512i _mm512_cvtepi8_epi32(__m128i x) {
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
FORCE_INLINE __m256i _mm512_cvtepi32_epi16(__m512i x) {
  const __m256i low = _mm256_set1_epi32(0xffff);
  const __m256i lanes = _mm256_packus_epi32(_mm256_and_si256(x.low, low), _mm256_and_si256(x.high, low));
  return _mm256_permute4x64_epi64(lanes, 0xd8);
}
FORCE_INLINE __m128i _mm512_cvtepi32_epi8(__m512i x) {
  const __m256i words = _mm256_and_si256(_mm512_cvtepi32_epi16(x), _mm256_set1_epi16(255));
  return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

// ---- lanes -------------------------------------------------------------------------------

FORCE_INLINE __m256i _mm512_extracti64x4_epi64(__m512i x, int which) { return which == 0 ? x.low : x.high; }
FORCE_INLINE __m512i _mm512_inserti64x4(__m512i x, __m256i y, int which) {
  return which == 0 ? __m512i{y, x.high} : __m512i{x.low, y};
}
FORCE_INLINE __m128i _mm512_extracti32x4_epi32(__m512i x, int which) {
  const __m256i half = which < 2 ? x.low : x.high;
  return which % 2 == 0 ? _mm256_castsi256_si128(half) : _mm256_extracti128_si256(half, 1);
}
FORCE_INLINE __m512i _mm512_shuffle_i32x4(__m512i x, __m512i y, int how) {
  const auto lane = [&](__m512i of, int bits) { return _mm512_extracti32x4_epi32(of, how >> bits & 3); };
  return {_mm256_set_m128i(lane(x, 2), lane(x, 0)), _mm256_set_m128i(lane(y, 6), lane(y, 4))};
}
FORCE_INLINE __m512 _mm512_shuffle_f32x4(__m512 x, __m512 y, int how) {
  return (__m512)_mm512_shuffle_i32x4((__m512i)x, (__m512i)y, how);
}
FORCE_INLINE __m256i picked(__m512i x, __m256i at) {
  const __m256 of_high = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // moves bit 3 to the sign
  const __m256 low = _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(x.low, at));
  return _mm256_castps_si256(
      _mm256_blendv_ps(low, _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(x.high, at)), of_high));
}
FORCE_INLINE __m512i _mm512_permutexvar_epi32(__m512i at, __m512i x) { return {picked(x, at.low), picked(x, at.high)}; }

template <class T>
FORCE_INLINE void compress(__mmask16 mask, const void* from, T (&to)[16]) {
  for (int n = 0; mask != 0; mask &= mask - 1, n++) to[n] = static_cast<const T*>(from)[__builtin_ctz(mask)];
}
FORCE_INLINE __m512i _mm512_maskz_compress_epi32(__mmask16 mask, __m512i x) {
  alignas(64) int32_t from[16], to[16] = {};
  _mm512_storeu_si512(from, x);
  compress(mask, from, to);
  return _mm512_loadu_si512(to);
}
FORCE_INLINE __m512 _mm512_maskz_compress_ps(__mmask16 mask, __m512 x) {
  return (__m512)_mm512_maskz_compress_epi32(mask, (__m512i)x);
}

// ---- reductions, in the order that compilers use for AVX512: halves first ----------------

FORCE_INLINE float _mm512_reduce_add_ps(__m512 x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
FORCE_INLINE float _mm512_reduce_max_ps(__m512 x) {
  const __m256 eight = _mm256_max_ps(x.high, x.low);  // max returns the second operand if one is NaN
  const __m128 four = _mm_max_ps(_mm256_extractf128_ps(eight, 1), _mm256_castps256_ps128(eight));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
template <class Eight, class Four>
FORCE_INLINE int32_t reduced(__m512i x, Eight of_eight, Four of_four) {
  const __m256i eight = of_eight(x.low, x.high);
  const __m128i four = of_four(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = of_four(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(of_four(two, _mm_shuffle_epi32(two, 0xb1)));
}
FORCE_INLINE int32_t _mm512_reduce_add_epi32(__m512i x) {
  return reduced(
      x, [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); },
      [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
}
FORCE_INLINE int32_t _mm512_reduce_max_epi32(__m512i x) {
  return reduced(
      x, [](__m256i a, __m256i b) { return _mm256_max_epi32(a, b); },
      [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); });
}
FORCE_INLINE int32_t _mm512_mask_reduce_add_epi32(__mmask16 mask, __m512i x) {
  return _mm512_reduce_add_epi32(_mm512_mask_mov_epi32(_mm512_setzero_si512(), mask, x));
}
FORCE_INLINE int32_t _mm512_mask_reduce_min_epi32(__mmask16 mask, __m512i x) {
  return reduced(
      _mm512_mask_mov_epi32(_mm512_set1_epi32(INT32_MAX), mask, x),
      [](__m256i a, __m256i b) { return _mm256_min_epi32(a, b); },
      [](__m128i a, __m128i b) { return _mm_min_epi32(a, b); });
}

}  // namespace loramux

#undef FORCE_INLINE
