#include "lora.h"

#include <algorithm>

#include "simd.h"

namespace loramux {
namespace {

// The sums of four vectors' lanes, always in this order.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(
      _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))),
      _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd))));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Bytes ahead of a walk that are asked for. Pages are small and the processor's own prefetching ends with each.
constexpr int64_t AHEAD = 3072;

inline void prefetch(const uint16_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

// R rows of x by J rows of A. Each product has two sums, of the even and of the odd vectors of inputs.
template <int R, int J>
inline void shrink_tile(const uint16_t* a, const uint16_t* const* x, int64_t in, __m128 factor, float* const* v) {
  __m512 sum[J][R][2];
  for (int j = 0; j < J; j++)
    for (int r = 0; r < R; r++) sum[j][r][0] = sum[j][r][1] = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 64 <= in; i += 64) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      __m512bh w[J];
      for (int j = 0; j < J; j++) w[j] = (__m512bh)_mm512_loadu_si512(a + j * in + i + h * 32);
      if constexpr (R == 1) prefetch(a + i + h * 32 + AHEAD / 2);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) {
        const __m512bh row = (__m512bh)_mm512_loadu_si512(x[r] + i + h * 32);
        for (int j = 0; j < J; j++) sum[j][r][h] = _mm512_dpbf16_ps(sum[j][r][h], row, w[j]);
      }
    }
  }
  for (int h = 0; i < in; i += 32, h++) {
    const __mmask32 mask = first_halves(in - i);
    for (int j = 0; j < J; j++) {
      const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + j * in + i);
      for (int r = 0; r < R; r++) {
        const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[r] + i);
        sum[j][r][h] = _mm512_dpbf16_ps(sum[j][r][h], row, w);
      }
    }
  }
  for (int j = 0; j < J; j++) {
    __m512 each[4];
    for (int r = 0; r < 4; r++) each[r] = r < R ? _mm512_add_ps(sum[j][r % R][0], sum[j][r % R][1]) : _mm512_setzero_ps();
    alignas(16) float result[4];
    _mm_store_ps(result, _mm_mul_ps(totals(each[0], each[1], each[2], each[3]), factor));
    for (int r = 0; r < R; r++) v[r][j] = result[r];
  }
}

template <int R>
void shrink_rows(const LoraSite& site, const uint16_t* const* x, int64_t in, __m128 factor, float* const* v) {
  // For one row alone the walk over A is what costs, and it goes from end to end.
  constexpr int J = R == 1 ? 1 : 2;
  float* at[R];
  int64_t j = 0;
  for (; j + J <= site.rank; j += J) {
    for (int r = 0; r < R; r++) at[r] = v[r] + j;
    shrink_tile<R, J>(site.a + j * in, x, in, factor, at);
  }
  if (j < site.rank) {
    for (int r = 0; r < R; r++) at[r] = v[r] + j;
    shrink_tile<R, 1>(site.a + j * in, x, in, factor, at);
  }
}

// R rows, J ranks: columns are walked along the rows of B.
template <int R, int J>
inline void expand_tile(const uint16_t* b, int64_t out, const float* const* v, float* const* y, int64_t columns) {
  __m512 f[R][J];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) f[r][j] = _mm512_set1_ps(v[r][j]);
  int64_t c = 0;
  for (; c + 16 <= columns; c += 16) {
    __m512 sum[R];
    for (int r = 0; r < R; r++) sum[r] = _mm512_loadu_ps(y[r] + c);
    if constexpr (R == 1 && J > 1)
      for (int j = c % 32 == 0 ? 0 : J / 2; j < (c % 32 == 0 ? J / 2 : J); j++) prefetch(b + (J + j) * out + c);
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
      const __m512 w = bf16_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + j * out + c)));
      for (int r = 0; r < R; r++) sum[r] = _mm512_fmadd_ps(w, f[r][j], sum[r]);
    }
    for (int r = 0; r < R; r++) _mm512_storeu_ps(y[r] + c, sum[r]);
  }
  if (c == columns) return;
  const __mmask16 mask = first_lanes(columns - c);
  for (int r = 0; r < R; r++) {
    __m512 sum = _mm512_maskz_loadu_ps(mask, y[r] + c);
    for (int j = 0; j < J; j++)
      sum = _mm512_fmadd_ps(bf16_to_float(_mm256_maskz_loadu_epi16(mask, b + j * out + c)), f[r][j], sum);
    _mm512_mask_storeu_ps(y[r] + c, mask, sum);
  }
}

template <int R>
void expand_rows(const MixRows& mix, const std::vector<const LoraSite*>& slots, int64_t at, const float* const* v,
                 float* const* y, int64_t column, int64_t columns, int64_t out) {
  constexpr int J = R == 1 ? 8 : 4;
  for (const Entry& entry : mix.entries) {
    const LoraSite& site = slots[static_cast<size_t>(entry.slot)][at];
    const uint16_t* b = site.b + column;
    const float* from[R];
    int64_t j = 0;
    for (; j + J <= site.rank; j += J) {
      for (int r = 0; r < R; r++) from[r] = v[r] + entry.offset + j;
      expand_tile<R, J>(b + j * out, out, from, y, columns);
    }
    for (; j < site.rank; j++) {
      for (int r = 0; r < R; r++) from[r] = v[r] + entry.offset + j;
      expand_tile<R, 1>(b + j * out, out, from, y, columns);
    }
  }
}

bool uses(const MixRows& mix, const std::vector<const LoraSite*>& slots, int64_t at) {
  for (const Entry& entry : mix.entries)
    if (slots[static_cast<size_t>(entry.slot)][at].rank > 0) return true;
  return false;
}

}  // namespace

void prefetch_site(const LoraSite& site, int64_t in) {
  for (int64_t i = 0; i < std::min(AHEAD, site.rank * in * 2); i += 64) prefetch(site.a + i / 2);
}

void plan_shrink(const LoraPlan& plan, const std::vector<const LoraSite*>& slots, int64_t layer,
                 const std::vector<int>& sites, std::vector<ShrinkTask>& tasks) {
  constexpr int EACH = 8;
  tasks.clear();
  for (size_t s = 0; s < plan.slots.size(); s++)
    for (const int site : sites) {
      if (slots[static_cast<size_t>(plan.slots[s].slot)][layer * SITES + site].rank == 0) continue;
      const int count = static_cast<int>(plan.slots[s].uses.size());
      for (int first = 0; first < count; first += EACH)
        tasks.push_back({static_cast<int32_t>(s), site, first, std::min(count, first + EACH)});
    }
}

void shrink(const LoraSite& site, const SlotRows& slot, int first, int last, const uint16_t* x, int64_t padded,
            int64_t in, float* v, int64_t width) {
  const uint16_t* rows[4];
  float* at[4];
  alignas(16) float factor[4] = {};
  for (int u = first; u < last; u += 4) {
    const int count = std::min(4, last - u);
    for (int r = 0; r < count; r++) {
      const Use& use = slot.uses[static_cast<size_t>(u + r)];
      rows[r] = x + use.row * padded;
      at[r] = v + use.row * width + use.offset;
      factor[r] = static_cast<float>(use.weight * site.scale);
    }
    const __m128 f = _mm_load_ps(factor);
    switch (count) {
      case 1: shrink_rows<1>(site, rows, in, f, at); break;
      case 2: shrink_rows<2>(site, rows, in, f, at); break;
      case 3: shrink_rows<3>(site, rows, in, f, at); break;
      default: shrink_rows<4>(site, rows, in, f, at);
    }
  }
}

void plan_expand(const LoraPlan& plan, const std::vector<const LoraSite*>& slots, int64_t layer,
                 const std::vector<int>& sites, const int64_t* out, std::vector<ExpandTask>& tasks) {
  constexpr int64_t WIDE = 320;  // columns: long enough for B's rows to be walked, short enough to share one
  tasks.clear();
  for (size_t m = 0; m < plan.mixes.size(); m++) {
    const MixRows& mix = plan.mixes[m];
    const int count = static_cast<int>(mix.rows.size());
    for (const int site : sites) {
      if (!uses(mix, slots, layer * SITES + site)) continue;
      const int64_t parts = plan.rows < 8 ? (out[site] + WIDE - 1) / WIDE : 1;
      const int64_t columns = (out[site] + parts - 1) / parts;
      for (int first = 0; first < count; first += 4)
        for (int64_t c = 0; c < out[site]; c += columns)
          tasks.push_back({static_cast<int32_t>(m), site, first, std::min(count, first + 4), c,
                           std::min(columns, out[site] - c)});
    }
  }
}

void expand(const MixRows& mix, int64_t width, const std::vector<const LoraSite*>& slots, int64_t at, int first,
            int last, const float* v, float* y, int64_t stride, int64_t column, int64_t columns, int64_t out) {
  const float* from[4];
  float* to[4];
  for (int r = first; r < last; r++) {
    from[r - first] = v + mix.rows[static_cast<size_t>(r)] * width;
    to[r - first] = y + mix.rows[static_cast<size_t>(r)] * stride;
  }
  switch (last - first) {
    case 1: expand_rows<1>(mix, slots, at, from, to, column, columns, out); break;
    case 2: expand_rows<2>(mix, slots, at, from, to, column, columns, out); break;
    case 3: expand_rows<3>(mix, slots, at, from, to, column, columns, out); break;
    default: expand_rows<4>(mix, slots, at, from, to, column, columns, out);
  }
}

void expand_all(const LoraPlan& plan, const std::vector<const LoraSite*>& slots, int64_t at, const float* v, float* y,
                int64_t stride, int64_t column, int64_t columns, int64_t out) {
  for (const MixRows& mix : plan.mixes) {
    const int count = static_cast<int>(mix.rows.size());
    for (int first = 0; first < count; first += 4)
      expand(mix, plan.width, slots, at, first, std::min(count, first + 4), v, y, stride, column, columns, out);
  }
}

}  // namespace loramux
