#include "lora.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace loramux {
namespace {

// Bytes ahead of a walk that are asked for where adapters are in bf16: more than a block of B's rows, which is not walked
// from end to end. The processor's own prefetching ends with each small page. In codes they are walked from end to end, which it
// sees: that is enough but for rows in their wide form, of which so little is computed with a line that the next is late.
constexpr int64_t AHEAD = 6144, AHEAD_OF_CODES = MATRIX_UNIT ? 4096 : 0;

// Into the second cache, which has more misses under way at once than the first.
template <int64_t BYTES>
inline void prefetch(const void* p) {
  if constexpr (BYTES > 0) _mm_prefetch(static_cast<const char*>(p) + BYTES, _MM_HINT_T1);
}

// ---- v = A x, and z += B v, in each form that adapters have --------------------------------------------------------

// The sums of four vectors' lanes.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  return across(a, b, c, d, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
}

// Adapters in bf16: beside a matrix of that.
struct Halves {
  using Row = const uint16_t*;

  static void set(const Activations& x, int64_t r, Row& row) { row = x.half.get() + r * x.padded; }

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
        __m512i w[J];
        for (int j = 0; j < J; j++) {
          w[j] = _mm512_loadu_si512(a + j * in + i + h * 32);
          prefetch<AHEAD>(a + (i + h * 32) * J + j * 32);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const __m512i row = _mm512_loadu_si512(x[r] + i + h * 32);
          for (int j = 0; j < J; j++) sum[j][r][h] = add_pairs(sum[j][r][h], row, w[j]);
        }
      }
    }
    for (int h = 0; i < in; i += 32, h++) {
      const __mmask32 mask = first_of_32(in - i);
      for (int j = 0; j < J; j++) {
        const __m512i w = _mm512_maskz_loadu_epi16(mask, a + j * in + i);
        for (int r = 0; r < R; r++) {
          const __m512i row = _mm512_maskz_loadu_epi16(mask, x[r] + i);
          sum[j][r][h] = add_pairs(sum[j][r][h], row, w);
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

  // v of R rows, behind each other; where they end.
  template <int R>
  static float* shrink(const LoraSite& site, const Row* x, int64_t in, float factor, float*, float* at) {
    const auto* a = static_cast<const uint16_t*>(site.a);
    const auto some = [&](auto count, int64_t j) {
      float dots[count][R];
      products<R, count>(a + j * in, x, in, dots);
      for (int i = 0; i < count; i++)
        for (int r = 0; r < R; r++) at[r * site.rank + j + i] = dots[i][r] * factor;
    };
    int64_t j = 0;
    for (; j + 2 <= site.rank; j += 2) some(std::integral_constant<int, 2>(), j);
    for (; j < site.rank; j++) some(std::integral_constant<int, 1>(), j);
    return at + R * site.rank;
  }

  // R rows, J ranks: columns are walked along the rows of B.
  template <int R, int J>
  static void add_ranks(const uint16_t* b, int64_t columns, const float* const* v, float* const* z) {
    __m512 f[R][J];
    for (int r = 0; r < R; r++)
      for (int j = 0; j < J; j++) f[r][j] = _mm512_set1_ps(v[r][j]);
    for (int64_t c = 0; c < columns; c += 16) {
      const __mmask16 mask = first_lanes(columns - c);
      __m512 sum[R];
      for (int r = 0; r < R; r++) sum[r] = _mm512_maskz_loadu_ps(mask, z[r] + c);
      for (int l = 0; l < J * 16; l += 32) prefetch<AHEAD>(b + c * J + l);
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) {
        const __m512 w = bf16_to_float(_mm256_maskz_loadu_epi16(mask, b + j * columns + c));
        for (int r = 0; r < R; r++) sum[r] = _mm512_fmadd_ps(w, f[r][j], sum[r]);
      }
      for (int r = 0; r < R; r++) _mm512_mask_storeu_ps(z[r] + c, mask, sum[r]);
    }
  }

  // z of R rows += B v; where their v ends.
  template <int R>
  static const float* expand(const LoraSite& site, int64_t out, const float* at, float* const* z) {
    constexpr int J = 4;
    const auto* b = static_cast<const uint16_t*>(site.b);
    const float* v[R];
    int64_t j = 0;
    for (; j + J <= site.rank; j += J) {
      for (int r = 0; r < R; r++) v[r] = at + r * site.rank + j;
      add_ranks<R, J>(b + j * out, out, v, z);
    }
    for (; j < site.rank; j++) {
      for (int r = 0; r < R; r++) v[r] = at + r * site.rank + j;
      add_ranks<R, 1>(b + j * out, out, v, z);
    }
    return at + R * site.rank;
  }
};

// Adapters in codes. Products want one operand without a sign, which is the adapter's: 128 is added to its codes, and
// taken off again by what a sum begins with.
struct Codes {
  struct Row {
    const int8_t* codes;  // a group's lie ROWS * GROUP after those of the one before
    const Quarter* quarters;
  };

  // A row in its wide form.
  struct Wide {
    const int8_t* codes;    // high ones of its first span
    int64_t low, span;      // bytes from these to the low ones, and from a span to the next one
    const int32_t* begins;
    float unit;
  };

  static void set(const Activations& x, int64_t r, Row& row) {
    const int64_t groups = x.padded / GROUP;
    row = {x.codes.get() + (r / ROWS * groups * ROWS + r % ROWS) * GROUP, x.quarters.get() + r * groups * 2};
  }
  static void set(const Activations& x, int64_t r, Wide& row) {
    const int64_t of = x.rows_of_tile, half = of * SPAN;
    row = {x.wide.get() + r / of * x.wide_codes() * of + r % of * SPAN, half, 2 * half, x.begins.get() + 2 * r,
           x.units.get()[r]};
  }

  // What ranks are computed by: as many at once as a vector has words.
  struct Sixteen {
    using Words = __m512i;
    using Floats = __m512;
    static Words load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static Words every(const void* p) { return broadcast_word(p); }
    static Words add(Words sum, Words w, Words x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static Floats add_scaled(Words x, float unit, Floats sum) {
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(unit), sum);
    }
    static Words both(Words x, Words y) { return _mm512_add_epi32(x, y); }
    static Floats joined(Words high, Words low, float unit) {
      const Floats sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
      return _mm512_mul_ps(sum, _mm512_set1_ps(unit));
    }
    static Floats factors(const float* units, int64_t ranks, float factor) {
      return _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(ranks), units), _mm512_set1_ps(factor));
    }
    static void store(float* to, int64_t ranks, Floats sum, Floats factor) {
      _mm512_mask_storeu_ps(to, first_lanes(ranks), _mm512_mul_ps(sum, factor));
    }
  };
  struct Eight {
    using Words = __m256i;
    using Floats = __m256;
    static Words load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Words every(const void* p) { return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float*>(p))); }
    static Words add(Words sum, Words w, Words x) { return _mm256_dpbusd_epi32(sum, w, x); }
    static Floats add_scaled(Words x, float unit, Floats sum) {
      return _mm256_fmadd_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(unit), sum);
    }
    static Words both(Words x, Words y) { return _mm256_add_epi32(x, y); }
    static Floats joined(Words high, Words low, float unit) {
      const Floats sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(256.0f), _mm256_cvtepi32_ps(low));
      return _mm256_mul_ps(sum, _mm256_set1_ps(unit));
    }
    static Floats factors(const float* units, int64_t ranks, float factor) {
      return _mm256_mul_ps(_mm256_maskz_loadu_ps(static_cast<__mmask8>(first_lanes(ranks)), units), _mm256_set1_ps(factor));
    }
    static void store(float* to, int64_t ranks, Floats sum, Floats factor) {
      _mm256_mask_storeu_ps(to, static_cast<__mmask8>(first_lanes(ranks)), _mm256_mul_ps(sum, factor));
    }
  };

  // R rows by a tile of A; where that ends. First and second quarters of groups have a sum each: one alone would wait for
  // itself. Nothing is asked for ahead: a tile is walked from end to end, which the processor sees.
  template <int R, class V>
  static const uint8_t* products(const uint8_t* a, const Row* x, int64_t in, typename V::Floats (&out)[R]) {
    const int8_t* codes[R];
    const Quarter* quarters[R];
    typename V::Floats sum[2][R];
    for (int r = 0; r < R; r++) {
      codes[r] = x[r].codes;
      quarters[r] = x[r].quarters;
      sum[0][r] = sum[1][r] = typename V::Floats{};
    }
    for (int64_t i = 0; i < in; i += GROUP) {
#pragma GCC unroll 2
      for (int q = 0; q < 2; q++) {
        typename V::Words dot[R];
        for (int r = 0; r < R; r++) dot[r] = V::every(&quarters[r][q].begin);
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++, a += sizeof(typename V::Words)) {
          const typename V::Words w = V::load(a);
          for (int r = 0; r < R; r++) dot[r] = V::add(dot[r], w, V::every(codes[r] + q * 16 + b * 4));
        }
        for (int r = 0; r < R; r++) sum[q][r] = V::add_scaled(dot[r], quarters[r][q].unit, sum[q][r]);
      }
      for (int r = 0; r < R; r++) codes[r] += ROWS * GROUP, quarters[r] += 2;
    }
    for (int r = 0; r < R; r++) out[r] = sum[0][r] + sum[1][r];
    return a;
  }

  // The same of rows in their wide form: whole numbers until the last input. One sum would wait for itself, so few rows have
  // several each.
  template <int R, class V>
  static const uint8_t* products(const uint8_t* a, const Wide* x, int64_t in, typename V::Floats (&out)[R]) {
    constexpr int SUMS = R == 1 ? 4 : R == 2 ? 2 : 1;
    typename V::Words high[R][SUMS] = {}, low[R][SUMS] = {};
    for (int r = 0; r < R; r++) high[r][0] = V::every(x[r].begins), low[r][0] = V::every(x[r].begins + 1);
    const int8_t* codes[R];
    for (int r = 0; r < R; r++) codes[r] = x[r].codes;
    for (int64_t i = 0; i < in; i += GROUP) {
#pragma GCC unroll 8
      for (int b = 0; b < GROUP / 4; b++, a += sizeof(typename V::Words)) {
        const typename V::Words w = V::load(a);
        prefetch<AHEAD_OF_CODES>(a);
        for (int r = 0; r < R; r++) {
          high[r][b % SUMS] = V::add(high[r][b % SUMS], w, V::every(codes[r] + b * 4));
          low[r][b % SUMS] = V::add(low[r][b % SUMS], w, V::every(codes[r] + x[r].low + b * 4));
        }
      }
      for (int r = 0; r < R; r++) codes[r] += i / GROUP % 2 == 0 ? GROUP : x[r].span - GROUP;
    }
    for (int r = 0; r < R; r++) {
      for (int s = 1; s < SUMS; s++) high[r][0] = V::both(high[r][0], high[r][s]), low[r][0] = V::both(low[r][0], low[r][s]);
      out[r] = V::joined(high[r][0], low[r][0], x[r].unit);
    }
    return a;
  }

  // A row's v as whole numbers of 16 bits, high * 256 + low, in a unit that makes the largest of them MOST_OF_TWO. `words`
  // has the unit, what sums of high and of low products begin with, and from HEAD on the high codes, then the low ones, four
  // ranks a word.
  static constexpr int64_t HEAD = 4;

  static int64_t groups(int64_t rank) { return (rank + 3) / 4; }
  static int64_t lows(int64_t rank) { return (rank + 15) / 16 * 4; }  // words from the high codes to the low ones
  static int64_t words(int64_t rank) { return HEAD + 2 * lows(rank); }

  static void split(const float* v, int64_t rank, float* words) {
    const float peak = peak_of(v, rank);
    const bool none = peak < LEAST_PEAK;
    const __m512 inverse = _mm512_set1_ps(none ? 0.0f : MOST_OF_TWO / peak);
    __m512i sum_high = _mm512_setzero_si512(), sum_low = sum_high;
    for (int64_t j = 0; j < rank; j += 16) {
      const __m512 x = _mm512_maskz_loadu_ps(first_lanes(rank - j), v + j);
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
      const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(code, 24), 24);
      const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(code, low), 8);
      sum_high = _mm512_add_epi32(sum_high, high);
      sum_low = _mm512_add_epi32(sum_low, low);
      float* to = words + HEAD + j / 4;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + lows(rank)), _mm512_cvtepi32_epi8(low));
    }
    const auto begin = [](__m512i sum) { return -128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)); };
    const uint32_t begins[2] = {begin(sum_high), begin(sum_low)};
    words[0] = none ? 0.0f : peak / MOST_OF_TWO;  // infinite or NaN if a value is
    std::memcpy(words + 1, begins, sizeof begins);
  }

  // The numbers of R rows, behind each other; where they end. `v` has room for their [R, rank] as float32.
  template <int R, class Row>
  static float* shrink(const LoraSite& site, const Row* x, int64_t in, float factor, float* v, float* at) {
    const auto* a = static_cast<const uint8_t*>(site.a);
    const auto tile = [&](auto form, int64_t j) {
      using V = decltype(form);
      typename V::Floats sum[R];
      a = products<R, V>(a, x, in, sum);
      const typename V::Floats factors = V::factors(site.units + j, site.rank - j, factor);
      for (int r = 0; r < R; r++) V::store(v + r * site.rank + j, site.rank - j, sum[r], factors);
    };
    for (int64_t j = 0; j < site.rank; j += 16)
      ranks_of_tile(site.rank - j) == 16 ? tile(Sixteen(), j) : tile(Eight(), j);
    for (int r = 0; r < R; r++, at += words(site.rank)) split(v + r * site.rank, site.rank, at);
    return at;
  }

  // z of R rows += B v, whole tiles of 16 columns; where their numbers end. B is walked from end to end.
  template <int R>
  static const float* expand(const LoraSite& site, int64_t out, const float* at, float* const* z) {
    const auto* b = static_cast<const uint8_t*>(site.b);
    const int64_t fours = groups(site.rank), to_low = lows(site.rank);
    const float* v[R];
    for (int r = 0; r < R; r++) v[r] = at + r * words(site.rank);
    for (int64_t c = 0; c < out; c += 16) {
      __m512i high[R], low[R];
      for (int r = 0; r < R; r++) high[r] = broadcast_word(v[r] + 1), low[r] = broadcast_word(v[r] + 2);
      for (int64_t g = HEAD; g < HEAD + fours; g++, b += 64) {
        const __m512i w = _mm512_loadu_si512(b);
        prefetch<AHEAD_OF_CODES>(b);
        for (int r = 0; r < R; r++) {
          high[r] = _mm512_dpbusd_epi32(high[r], w, broadcast_word(v[r] + g));
          low[r] = _mm512_dpbusd_epi32(low[r], w, broadcast_word(v[r] + to_low + g));
        }
      }
      for (int r = 0; r < R; r++) {
        const __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[r]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low[r]));
        _mm512_storeu_ps(z[r] + c, _mm512_fmadd_ps(sum, _mm512_set1_ps(v[r][0]), _mm512_loadu_ps(z[r] + c)));
      }
    }
    return at + R * words(site.rank);
  }
};

// ---- a task -----------------------------------------------------------------------------------------------------

constexpr int TOGETHER = 4;  // rows of a task that an adapter is walked for at once

// The rows of a task, up to that many at a time: f(the first, how many), which is known when it is compiled.
template <class F>
inline void by_fours(const UpdateTask& task, F&& f) {
  for (int r = task.first; r < task.last; r += TOGETHER) {
    switch (task.last - r) {
      case 1: f(r, std::integral_constant<int, 1>()); break;
      case 2: f(r, std::integral_constant<int, 2>()); break;
      case 3: f(r, std::integral_constant<int, 3>()); break;
      default: f(r, std::integral_constant<int, 4>());
    }
  }
}

// What B is multiplied by, of one entry of a mix at one site; where it ends.
template <class Form, class Row = typename Form::Row>
float* shrink(const UpdateTask& task, const Entry& entry, const LoraSite& site, const Activations& x, int64_t in,
              float* scratch, float* at) {
  const auto factor = static_cast<float>(entry.weight * site.scale);
  by_fours(task, [&](int first, auto count) {
    Row rows[count];
    for (int r = 0; r < count; r++) Form::set(x, task.mix->rows[static_cast<size_t>(first + r)], rows[r]);
    at = Form::template shrink<count>(site, rows, in, factor, scratch, at);
  });
  return at;
}

template <class Form>
const float* expand(const UpdateTask& task, const LoraSite& site, const Update& update, const float* at) {
  by_fours(task, [&](int first, auto count) {
    float* z[count];
    for (int r = 0; r < count; r++) z[r] = update.z + task.mix->rows[static_cast<size_t>(first + r)] * update.stride;
    at = Form::template expand<count>(site, update.out, at, z);
  });
  return at;
}

}  // namespace

void plan_updates(const LoraPlan& plan, const std::vector<Slot>& slots, const std::vector<Update>& sites,
                  std::vector<UpdateTask>& tasks) {
  tasks.clear();
  bool used = false;
  for (const MixRows& mix : plan.mixes)
    for (const Entry& entry : mix.entries)
      for (const Update& site : sites) used = used || slots[static_cast<size_t>(entry.slot)].sites.data()[site.at].rank > 0;
  if (!used) return;
  for (const MixRows& mix : plan.mixes) {
    const int count = static_cast<int>(mix.rows.size());
    for (int first = 0; first < count; first += UPDATE_ROWS)
      tasks.push_back({&mix, first, std::min(count, first + UPDATE_ROWS)});
  }
}

int64_t update_floats(int64_t rank) {
  return TOGETHER * rank + UPDATE_SITES * UPDATE_ROWS * std::max(rank, Codes::words(rank));
}

void update(const UpdateTask& task, const std::vector<Slot>& slots, const std::vector<Update>& sites,
            const Activations& x, float* scratch) {
  for (const Update& update : sites)
    for (int r = task.first; r < task.last; r++)
      std::memset(update.z + task.mix->rows[static_cast<size_t>(r)] * update.stride, 0, update.stride * sizeof(float));
  for (const Entry& entry : task.mix->entries) {
    const LoraSite* slot = slots[static_cast<size_t>(entry.slot)].sites.data();
    int64_t rank = 0;
    for (const Update& update : sites) rank = std::max(rank, slot[update.at].rank);
    float* const ranks = scratch + TOGETHER * rank;
    float* end = ranks;
    for (const Update& update : sites) {
      const LoraSite& site = slot[update.at];
      if (site.rank == 0) continue;
      end = !site.coded()  ? shrink<Halves>(task, entry, site, x, update.in, scratch, end)
            : x.forms.wide ? shrink<Codes, Codes::Wide>(task, entry, site, x, update.in, scratch, end)
                           : shrink<Codes>(task, entry, site, x, update.in, scratch, end);
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
