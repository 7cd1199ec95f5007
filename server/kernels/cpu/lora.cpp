#include "lora.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace loramux {
namespace {

// Bytes ahead of a walk that are asked for: more than a block of B's rows, which is not walked from end to end. The
// processor's own prefetching ends with each small page.
constexpr int64_t AHEAD = 6144;

// Into the second cache, which has more misses under way at once than the first.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + AHEAD, _MM_HINT_T1); }

// ---- v = A x ----------------------------------------------------------------------------------------------------

// The sums of four vectors' lanes.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  return across(a, b, c, d, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
}

// Of bf16: a row of activations, and the products with it.
struct Halves {
  using Row = const uint16_t*;
  using Value = uint16_t;
  static constexpr int TOGETHER = 2;  // rows of A

  static Row row(const Activations& x, int64_t r) { return x.half.get() + r * x.padded; }
  static float unit(const LoraSite&, int64_t) { return 1.0f; }

  // R rows of x by J rows of A. Each product has two sums, of the even and of the odd vectors of inputs.
  template <int R, int J>
  static void products(const uint16_t* a, const Row* x, int64_t in, float (*out)[R]) {
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
          prefetch(a + (i + h * 32) * J + j * 32);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const __m512bh row = (__m512bh)_mm512_loadu_si512(x[r] + i + h * 32);
          for (int j = 0; j < J; j++) sum[j][r][h] = _mm512_dpbf16_ps(sum[j][r][h], row, w[j]);
        }
      }
    }
    for (int h = 0; i < in; i += 32, h++) {
      const __mmask32 mask = first_of_32(in - i);
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
      for (int r = 0; r < 4; r++)
        each[r] = r < R ? _mm512_add_ps(sum[j][r % R][0], sum[j][r % R][1]) : _mm512_setzero_ps();
      alignas(16) float result[4];
      _mm_store_ps(result, totals(each[0], each[1], each[2], each[3]));
      for (int r = 0; r < R; r++) out[j][r] = result[r];
    }
  }
};

// The same of codes.
struct Codes {
  struct Row {
    const int8_t* codes;  // a group's lie ROWS * GROUP after those of the one before
    const float* units;
  };
  using Value = int8_t;
  static constexpr int TOGETHER = 4;

  static Row row(const Activations& x, int64_t r) {
    const int64_t groups = x.padded / GROUP;
    return {x.codes.get() + (r / ROWS * groups * ROWS + r % ROWS) * GROUP, x.units.get() + r * groups * 2};
  }
  static float unit(const LoraSite& site, int64_t j) { return site.units[j]; }

  // The sums of four neighbours of a group's products, times the units of the row's quarters.
  template <int R, int J>
  static void add_group(const __m256i* w, const Row* x, int64_t i, __m256 (*sum)[R]) {
    const __m256i halves = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    const __m256i none = _mm256_setzero_si256(), added = _mm256_set1_epi8(-128);  // 128 without a sign
    for (int r = 0; r < R; r++) {
      const __m256i row = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x[r].codes + i * ROWS));
      const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x[r].units + i / GROUP * 2));
      const __m256 unit = _mm256_permutevar8x32_ps((__m256)_mm256_castsi128_si256(two), halves);
      // Products want one operand without a sign: 128 is added to the codes of A, and taken off again here.
      const __m256i begin = _mm256_sub_epi32(none, _mm256_dpbusd_epi32(none, added, row));
      for (int j = 0; j < J; j++)
        sum[j][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_dpbusd_epi32(begin, w[j], row)), unit, sum[j][r]);
    }
  }

  template <int R, int J>
  static void products(const int8_t* a, const Row* x, int64_t in, float (*out)[R]) {
    const __m256i sign = _mm256_set1_epi8(-128);
    __m256 sum[J][R];
    for (int j = 0; j < J; j++)
      for (int r = 0; r < R; r++) sum[j][r] = _mm256_setzero_ps();
    __m256i w[J];
    int64_t i = 0;
    for (; i + GROUP <= in; i += GROUP) {
      for (int j = 0; j < J; j++)
        w[j] = _mm256_xor_si256(sign, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + j * in + i)));
      for (int j = 0; j < J; j += 2) prefetch(a + i * J + j * 32);
      add_group<R, J>(w, x, i, sum);
    }
    if (i < in) {
      for (int j = 0; j < J; j++)
        w[j] = _mm256_xor_si256(sign, _mm256_maskz_loadu_epi8(first_of_32(in - i), a + j * in + i));
      add_group<R, J>(w, x, i, sum);
    }
    for (int j = 0; j < J; j++)
      for (int r = 0; r < R; r++) {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sum[j][r]), _mm256_extractf128_ps(sum[j][r], 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        out[j][r] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
      }
  }
};

// v[r][j] times `factor`, of R rows.
template <class Form, int R>
void shrink_rows(const LoraSite& site, const typename Form::Row* x, int64_t in, float factor, float* const* v) {
  constexpr int J = Form::TOGETHER;
  const auto* a = static_cast<const typename Form::Value*>(site.a);
  const auto some = [&](auto count, int64_t j) {
    float dots[count][R];
    Form::template products<R, count>(a + j * in, x, in, dots);
    for (int i = 0; i < count; i++)
      for (int r = 0; r < R; r++) v[r][j + i] = dots[i][r] * (factor * Form::unit(site, j + i));
  };
  int64_t j = 0;
  for (; j + J <= site.rank; j += J) some(std::integral_constant<int, J>(), j);
  for (; j < site.rank; j++) some(std::integral_constant<int, 1>(), j);
}

// ---- z += B v ---------------------------------------------------------------------------------------------------

inline __m512 floats(const uint16_t* b, __mmask16 mask) { return bf16_to_float(_mm256_maskz_loadu_epi16(mask, b)); }

inline __m512 floats(const int8_t* b, __mmask16 mask) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, b)));
}

// R rows, J ranks: columns are walked along the rows of B.
template <int R, int J, class T>
inline void expand_tile(const T* b, int64_t columns, const float* const* v, float* const* y) {
  constexpr int LINE = 64 / sizeof(T);
  constexpr __mmask16 ALL = 0xffff;
  __m512 f[R][J];
  for (int r = 0; r < R; r++)
    for (int j = 0; j < J; j++) f[r][j] = _mm512_set1_ps(v[r][j]);
  int64_t c = 0;
  for (; c + 16 <= columns; c += 16) {
    __m512 sum[R];
    for (int r = 0; r < R; r++) sum[r] = _mm512_loadu_ps(y[r] + c);
    for (int l = 0; l + LINE <= J * 16; l += LINE) prefetch(b + c * J + l);
#pragma GCC unroll 8
    for (int j = 0; j < J; j++) {
      const __m512 w = floats(b + j * columns + c, ALL);
      for (int r = 0; r < R; r++) sum[r] = _mm512_fmadd_ps(w, f[r][j], sum[r]);
    }
    for (int r = 0; r < R; r++) _mm512_storeu_ps(y[r] + c, sum[r]);
  }
  if (c == columns) return;
  const __mmask16 mask = first_lanes(columns - c);
  for (int r = 0; r < R; r++) {
    __m512 sum = _mm512_maskz_loadu_ps(mask, y[r] + c);
    for (int j = 0; j < J; j++) sum = _mm512_fmadd_ps(floats(b + j * columns + c, mask), f[r][j], sum);
    _mm512_mask_storeu_ps(y[r] + c, mask, sum);
  }
}

template <int R, class T>
void expand_rows(const T* b, int64_t rank, int64_t out, const float* const* v, float* const* z) {
  constexpr int J = 4;
  const float* from[R];
  int64_t j = 0;
  for (; j + J <= rank; j += J) {
    for (int r = 0; r < R; r++) from[r] = v[r] + j;
    expand_tile<R, J>(b + j * out, out, from, z);
  }
  for (; j < rank; j++) {
    for (int r = 0; r < R; r++) from[r] = v[r] + j;
    expand_tile<R, 1>(b + j * out, out, from, z);
  }
}

// ---- a task -----------------------------------------------------------------------------------------------------

// The rows of a task, up to 4 at a time: f(the first, how many), which is known when it is compiled.
template <class F>
inline void by_fours(const UpdateTask& task, F&& f) {
  for (int r = task.first; r < task.last; r += 4) {
    switch (task.last - r) {
      case 1: f(r, std::integral_constant<int, 1>()); break;
      case 2: f(r, std::integral_constant<int, 2>()); break;
      case 3: f(r, std::integral_constant<int, 3>()); break;
      default: f(r, std::integral_constant<int, 4>());
    }
  }
}

// v of one entry of a mix at one site, behind each other; where they end.
template <class Form>
float* shrink(const UpdateTask& task, const Entry& entry, const LoraSite& site, const Activations& x, int64_t in,
              float* at) {
  const auto factor = static_cast<float>(entry.weight * site.scale);
  by_fours(task, [&](int first, auto count) {
    typename Form::Row rows[count];
    float* v[count];
    for (int r = 0; r < count; r++, at += site.rank)
      rows[r] = Form::row(x, task.mix->rows[static_cast<size_t>(first + r)]), v[r] = at;
    shrink_rows<Form, count>(site, rows, in, factor, v);
  });
  return at;
}

template <class Form>
const float* expand(const UpdateTask& task, const LoraSite& site, const Update& update, const float* at) {
  by_fours(task, [&](int first, auto count) {
    const float* v[count];
    float* z[count];
    for (int r = 0; r < count; r++, at += site.rank)
      z[r] = update.z + task.mix->rows[static_cast<size_t>(first + r)] * update.stride, v[r] = at;
    expand_rows<count>(static_cast<const typename Form::Value*>(site.b), site.rank, update.out, v, z);
  });
  return at;
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
            const Activations& x, int64_t in, float* ranks) {
  for (const Update& update : sites)
    for (int r = task.first; r < task.last; r++)
      std::memset(update.z + task.mix->rows[static_cast<size_t>(r)] * update.stride, 0, update.out * sizeof(float));
  for (const Entry& entry : task.mix->entries) {
    const LoraSite* slot = slots[static_cast<size_t>(entry.slot)];
    float* end = ranks;
    for (const Update& update : sites) {
      const LoraSite& site = slot[update.at];
      if (site.rank == 0) continue;
      end = site.coded() ? shrink<Codes>(task, entry, site, x, in, end) : shrink<Halves>(task, entry, site, x, in, end);
    }
    const float* v = ranks;
    for (const Update& update : sites) {
      const LoraSite& site = slot[update.at];
      if (site.rank == 0) continue;
      v = site.coded() ? expand<Codes>(task, site, update, v) : expand<Halves>(task, site, update, v);
    }
  }
}

}  // namespace loramux
