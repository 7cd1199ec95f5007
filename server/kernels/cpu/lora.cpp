#include "lora.h"

#include <algorithm>

#include "simd.h"

namespace loramux {
namespace {

// Sum of 16 lanes, always in this order: halves, quarters, pairs, neighbours.
inline float total(__m512 x) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}

// R rows of x by J rows of A.
template <int R, int J>
void shrink_tile(const uint16_t* a, const uint16_t* const* x, int64_t in, const float* factor, float* const* v) {
  __m512 sum[R][J];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) sum[r][j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < in; i += 32) {
    const __mmask32 mask = first_halves(in - i);
    __m512bh row[R];
    for (int r = 0; r < R; r++) row[r] = (__m512bh)_mm512_maskz_loadu_epi16(mask, x[r] + i);
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
      const __m512bh w = (__m512bh)_mm512_maskz_loadu_epi16(mask, a + j * in + i);
      for (int r = 0; r < R; r++) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], row[r], w);
    }
  }
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) v[r][j] = total(sum[r][j]) * factor[r];
}

template <int R>
void shrink_rows(const LoraSite& site, const uint16_t* const* x, int64_t in, const float* factor, float* const* v) {
  constexpr int J = R == 1 ? 8 : 4;
  float* at[R];
  int64_t j = 0;
  for (; j + J <= site.rank; j += J) {
    for (int r = 0; r < R; r++) at[r] = v[r] + j;
    shrink_tile<R, J>(site.a + j * in, x, in, factor, at);
  }
  for (; j < site.rank; j++) {
    for (int r = 0; r < R; r++) at[r] = v[r] + j;
    shrink_tile<R, 1>(site.a + j * in, x, in, factor, at);
  }
}

constexpr int VECTORS = 2;  // of 16 columns

template <int R>
void expand_rows(const MixRows& mix, const std::vector<const LoraSite*>& slots, int64_t at, const float* const* v,
                 float* const* y, int64_t column, int64_t columns, int64_t out) {
  const __mmask16 mask[VECTORS] = {first_lanes(columns), first_lanes(columns - 16)};
  __m512 sum[R][VECTORS];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < VECTORS; c++) sum[r][c] = _mm512_maskz_loadu_ps(mask[c], y[r] + c * 16);
  for (const Entry& entry : mix.entries) {
    const LoraSite& site = slots[entry.slot][at];
    const uint16_t* b = site.b + column;
    for (int64_t j = 0; j < site.rank; j++, b += out) {
      __m512 w[VECTORS];
      for (int c = 0; c < VECTORS; c++) w[c] = bf16_to_float(_mm256_maskz_loadu_epi16(mask[c], b + c * 16));
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const __m512 f = _mm512_set1_ps(v[r][entry.offset + j]);
        for (int c = 0; c < VECTORS; c++) sum[r][c] = _mm512_fmadd_ps(w[c], f, sum[r][c]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int c = 0; c < VECTORS; c++) _mm512_mask_storeu_ps(y[r] + c * 16, mask[c], sum[r][c]);
}

}  // namespace

void plan_shrink(const LoraPlan& plan, const std::vector<const LoraSite*>& slots, int64_t layer,
                 const std::vector<int>& sites, std::vector<ShrinkTask>& tasks) {
  constexpr int EACH = 16;
  tasks.clear();
  for (size_t s = 0; s < plan.slots.size(); s++)
    for (const int site : sites) {
      if (slots[plan.slots[s].slot][layer * SITES + site].rank == 0) continue;
      const int count = static_cast<int>(plan.slots[s].uses.size());
      for (int first = 0; first < count; first += EACH)
        tasks.push_back({static_cast<int32_t>(s), site, first, std::min(count, first + EACH)});
    }
}

void shrink(const LoraSite& site, const SlotRows& slot, int first, int last, const uint16_t* x, int64_t padded,
            int64_t in, float* v, int64_t width) {
  const uint16_t* rows[4];
  float* at[4];
  float factor[4];
  for (int u = first; u < last; u += 4) {
    const int count = std::min(4, last - u);
    for (int r = 0; r < count; r++) {
      const Use& use = slot.uses[u + r];
      rows[r] = x + use.row * padded;
      at[r] = v + use.row * width + use.offset;
      factor[r] = static_cast<float>(use.weight * site.scale);
    }
    switch (count) {
      case 1: shrink_rows<1>(site, rows, in, factor, at); break;
      case 2: shrink_rows<2>(site, rows, in, factor, at); break;
      case 3: shrink_rows<3>(site, rows, in, factor, at); break;
      default: shrink_rows<4>(site, rows, in, factor, at);
    }
  }
}

void expand(const LoraPlan& plan, const std::vector<const LoraSite*>& slots, int64_t at, const float* v, float* y,
            int64_t stride, int64_t column, int64_t columns, int64_t out) {
  for (const MixRows& mix : plan.mixes) {
    const int count = static_cast<int>(mix.rows.size());
    const float* from[4];
    float* to[4];
    for (int u = 0; u < count; u += 4) {
      const int some = std::min(4, count - u);
      for (int r = 0; r < some; r++) {
        from[r] = v + mix.rows[u + r] * plan.width;
        to[r] = y + mix.rows[u + r] * stride;
      }
      switch (some) {
        case 1: expand_rows<1>(mix, slots, at, from, to, column, columns, out); break;
        case 2: expand_rows<2>(mix, slots, at, from, to, column, columns, out); break;
        case 3: expand_rows<3>(mix, slots, at, from, to, column, columns, out); break;
        default: expand_rows<4>(mix, slots, at, from, to, column, columns, out);
      }
    }
  }
}

void prefetch_expand(const LoraPlan& plan, const std::vector<const LoraSite*>& slots, int64_t at, int64_t column,
                     int64_t columns, int64_t out) {
  for (const SlotRows& slot : plan.slots) {
    const LoraSite& site = slots[slot.slot][at];
    for (int64_t j = 0; j < site.rank; j++) {
      const char* p = reinterpret_cast<const char*>(site.b + j * out + column);
      _mm_prefetch(p, _MM_HINT_T1);
      if (columns > 16) _mm_prefetch(p + 62, _MM_HINT_T1);
    }
  }
}

}  // namespace loramux
