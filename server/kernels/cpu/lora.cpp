#include "lora.h"

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace loramux {
namespace {

// The sums of four vectors' lanes.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  return across(a, b, c, d, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
}

// Bytes ahead of a walk that are asked for: more than a block of B's rows, which is not walked from end to end. The
// processor's own prefetching ends with each small page.
constexpr int64_t AHEAD = 6144;

// Into the second cache, which has more misses under way at once than the first.
inline void prefetch(const uint16_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

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
      for (int j = 0; j < J; j++) {
        w[j] = (__m512bh)_mm512_loadu_si512(a + j * in + i + h * 32);
        prefetch(a + AHEAD / 2 + (i + h * 32) * J + j * 32);
      }
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
  constexpr int J = 2;
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
inline void expand_tile(const uint16_t* b, int64_t columns, const float* const* v, float* const* y) {
  __m512 f[R][J];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) f[r][j] = _mm512_set1_ps(v[r][j]);
  int64_t c = 0;
  for (; c + 16 <= columns; c += 16) {
    __m512 sum[R];
    for (int r = 0; r < R; r++) sum[r] = _mm512_loadu_ps(y[r] + c);
    for (int l = 0; l < J / 2; l++) prefetch(b + AHEAD / 2 + c * J + l * 32);
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
      const __m512 w = bf16_to_float(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + j * columns + c)));
      for (int r = 0; r < R; r++) sum[r] = _mm512_fmadd_ps(w, f[r][j], sum[r]);
    }
    for (int r = 0; r < R; r++) _mm512_storeu_ps(y[r] + c, sum[r]);
  }
  if (c == columns) return;
  const __mmask16 mask = first_lanes(columns - c);
  for (int r = 0; r < R; r++) {
    __m512 sum = _mm512_maskz_loadu_ps(mask, y[r] + c);
    for (int j = 0; j < J; j++)
      sum = _mm512_fmadd_ps(bf16_to_float(_mm256_maskz_loadu_epi16(mask, b + j * columns + c)), f[r][j], sum);
    _mm512_mask_storeu_ps(y[r] + c, mask, sum);
  }
}

template <int R>
void expand_rows(const LoraSite& site, int64_t out, const float* const* v, float* const* z) {
  constexpr int J = 4;
  const float* from[R];
  int64_t j = 0;
  for (; j + J <= site.rank; j += J) {
    for (int r = 0; r < R; r++) from[r] = v[r] + j;
    expand_tile<R, J>(site.b + j * out, out, from, z);
  }
  for (; j < site.rank; j++) {
    for (int r = 0; r < R; r++) from[r] = v[r] + j;
    expand_tile<R, 1>(site.b + j * out, out, from, z);
  }
}

// The rows of a task, up to 4 at a time.
template <class F>
inline void by_fours(const UpdateTask& task, F&& f) {
  for (int r = task.first; r < task.last; r += 4) f(r, std::min(4, task.last - r));
}

}  // namespace

void plan_updates(const LoraPlan& plan, const std::vector<const LoraSite*>& slots, const std::vector<Update>& sites,
                  std::vector<UpdateTask>& tasks) {
  tasks.clear();
  bool used = false;
  for (const MixRows& mix : plan.mixes)
    for (const Entry& entry : mix.entries)
      for (const Update& site : sites) used = used || slots[static_cast<size_t>(entry.slot)][site.at].rank > 0;
  if (!used) return;
  for (const MixRows& mix : plan.mixes) {
    const int count = static_cast<int>(mix.rows.size());
    for (int first = 0; first < count; first += UPDATE_ROWS)
      tasks.push_back({&mix, first, std::min(count, first + UPDATE_ROWS)});
  }
}

void update(const UpdateTask& task, const std::vector<const LoraSite*>& slots, const std::vector<Update>& sites,
            const uint16_t* x, int64_t padded, int64_t in, float* ranks) {
  const MixRows& mix = *task.mix;
  const auto row = [&](int r) { return static_cast<int64_t>(mix.rows[static_cast<size_t>(r)]); };
  for (const Update& site : sites)
    for (int r = task.first; r < task.last; r++) std::memset(site.z + row(r) * site.stride, 0, site.out * sizeof(float));
  const uint16_t* rows[4];
  float *to[4], *v[4];
  for (const Entry& entry : mix.entries) {
    const LoraSite* slot = slots[static_cast<size_t>(entry.slot)];
    float* at = ranks;
    for (const Update& update : sites) {
      const LoraSite& site = slot[update.at];
      const __m128 factor = _mm_set1_ps(static_cast<float>(entry.weight * site.scale));
      by_fours(task, [&](int first, int count) {
        for (int r = 0; r < count; r++, at += site.rank) rows[r] = x + row(first + r) * padded, v[r] = at;
        switch (count) {
          case 1: shrink_rows<1>(site, rows, in, factor, v); break;
          case 2: shrink_rows<2>(site, rows, in, factor, v); break;
          case 3: shrink_rows<3>(site, rows, in, factor, v); break;
          default: shrink_rows<4>(site, rows, in, factor, v);
        }
      });
    }
    at = ranks;
    for (const Update& update : sites) {
      const LoraSite& site = slot[update.at];
      by_fours(task, [&](int first, int count) {
        for (int r = 0; r < count; r++, at += site.rank) to[r] = update.z + row(first + r) * update.stride, v[r] = at;
        switch (count) {
          case 1: expand_rows<1>(site, update.out, v, to); break;
          case 2: expand_rows<2>(site, update.out, v, to); break;
          case 3: expand_rows<3>(site, update.out, v, to); break;
          default: expand_rows<4>(site, update.out, v, to);
        }
      });
    }
  }
}

}  // namespace loramux
