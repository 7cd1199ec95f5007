#include "lora.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace loramux {
namespace {

// Prefetch distance in bytes. The hardware prefetcher stops at page boundaries and does not follow blocks of B in bf16.
// Codes are read sequentially, which it follows; split16 rows do so little work per line that it is late.
constexpr int64_t PREFETCH_BYTES = 6144, CODES_PREFETCH_BYTES = HAS_AMX ? 4096 : 0;

// Into the L2 cache, which supports more outstanding misses than L1.
template <int64_t BYTES>
inline void prefetch(const void* p) {
  if constexpr (BYTES > 0) _mm_prefetch(static_cast<const char*>(p) + BYTES, _MM_HINT_T1);
}

// ---- v = A x and z += B v, for each format of adapters -----------------------------------

// Sums of the lanes of four vectors.
inline __m128 totals(__m512 a, __m512 b, __m512 c, __m512 d) {
  return reduce_lanes(a, b, c, d, [](__m512 x, __m512 y) { return _mm512_add_ps(x, y); });
}

// Adapters in bf16.
struct Bf16Lora {
  using Row = const uint16_t*;

  static void set(const Activations& x, int64_t r, Row& row) { row = x.bf16.get() + r * x.padded; }

  // R rows of x by J rows of A, with two accumulators each (even and odd vectors of inputs).
  template <int R, int J>
  static void shrink_tile(const uint16_t* a, const Row* x, int64_t in, float (*out)[R]) {
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
          prefetch<PREFETCH_BYTES>(a + (i + h * 32) * J + j * 32);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          const __m512i row = _mm512_loadu_si512(x[r] + i + h * 32);
          for (int j = 0; j < J; j++) sum[j][r][h] = dot_bf16(sum[j][r][h], row, w[j]);
        }
      }
    }
    for (int h = 0; i < in; i += 32, h++) {
      const __mmask32 mask = first_of_32(in - i);
      for (int j = 0; j < J; j++) {
        const __m512i w = _mm512_maskz_loadu_epi16(mask, a + j * in + i);
        for (int r = 0; r < R; r++) {
          const __m512i row = _mm512_maskz_loadu_epi16(mask, x[r] + i);
          sum[j][r][h] = dot_bf16(sum[j][r][h], row, w);
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

  // v of R rows, one after the other; returns their end.
  template <int R>
  static float* shrink(const LoraModule& module, const Row* x, int64_t in, float factor, float*, float* at) {
    const auto* a = static_cast<const uint16_t*>(module.a);
    const auto run_ranks = [&](auto count, int64_t j) {
      float dots[count][R];
      shrink_tile<R, count>(a + j * in, x, in, dots);
      for (int i = 0; i < count; i++)
        for (int r = 0; r < R; r++) at[r * module.rank + j + i] = dots[i][r] * factor;
    };
    int64_t j = 0;
    for (; j + 2 <= module.rank; j += 2) run_ranks(std::integral_constant<int, 2>(), j);
    for (; j < module.rank; j++) run_ranks(std::integral_constant<int, 1>(), j);
    return at + R * module.rank;
  }

  // R rows, J ranks: loops over the columns of B's rows.
  template <int R, int J>
  static void add_ranks(const uint16_t* b, int64_t columns, const float* const* v, float* const* z) {
    __m512 f[R][J];
    for (int r = 0; r < R; r++)
      for (int j = 0; j < J; j++) f[r][j] = _mm512_set1_ps(v[r][j]);
    for (int64_t c = 0; c < columns; c += 16) {
      const __mmask16 mask = first_lanes(columns - c);
      __m512 sum[R];
      for (int r = 0; r < R; r++) sum[r] = _mm512_maskz_loadu_ps(mask, z[r] + c);
      for (int l = 0; l < J * 16; l += 32) prefetch<PREFETCH_BYTES>(b + c * J + l);
#pragma GCC unroll 4
      for (int j = 0; j < J; j++) {
        const __m512 w = bf16_to_float(_mm256_maskz_loadu_epi16(mask, b + j * columns + c));
        for (int r = 0; r < R; r++) sum[r] = _mm512_fmadd_ps(w, f[r][j], sum[r]);
      }
      for (int r = 0; r < R; r++) _mm512_mask_storeu_ps(z[r] + c, mask, sum[r]);
    }
  }

  // z of R rows += B v; returns the end of their v.
  template <int R>
  static const float* expand(const LoraModule& module, int64_t out, const float* at, float* const* z) {
    constexpr int J = 4;
    const auto* b = static_cast<const uint16_t*>(module.b);
    const float* v[R];
    int64_t j = 0;
    for (; j + J <= module.rank; j += J) {
      for (int r = 0; r < R; r++) v[r] = at + r * module.rank + j;
      add_ranks<R, J>(b + j * out, out, v, z);
    }
    for (; j < module.rank; j++) {
      for (int r = 0; r < R; r++) v[r] = at + r * module.rank + j;
      add_ranks<R, 1>(b + j * out, out, v, z);
    }
    return at + R * module.rank;
  }
};

// Adapters in int8. vpdpbusd needs one unsigned operand: 128 is added to the adapter's codes and subtracted through the
// initial accumulator.
struct Int8Lora {
  struct Row {
    const int8_t* codes;  // of the first group; groups are ROWS * GROUP apart
    const Quarter* quarters;
  };

  // A split16 row.
  struct Split16Row {
    const int8_t* codes;  // high codes of the first span
    int64_t low, span;    // offsets of the low codes and of the next span
    const int32_t* begins;
    float scale;
  };

  static void set(const Activations& x, int64_t r, Row& row) {
    const int64_t groups = x.padded / GROUP;
    row = {x.codes.get() + (r / ROWS * groups * ROWS + r % ROWS) * GROUP, x.quarters.get() + r * groups * 2};
  }
  static void set(const Activations& x, int64_t r, Split16Row& row) {
    const int64_t of = x.tile_rows, half = of * SPAN;
    row = {x.split16.get() + r / of * x.split16_codes() * of + r % of * SPAN, half, 2 * half, x.begins.get() + 2 * r,
           x.scales.get()[r]};
  }

  // Vector operations on 16 or 8 ranks at once.
  struct Ranks16 {
    using Ints = __m512i;
    using Floats = __m512;
    static Ints load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static Ints broadcast(const void* p) { return broadcast32(p); }
    static Ints add(Ints sum, Ints w, Ints x) { return _mm512_dpbusd_epi32(sum, w, x); }
    static Floats add_scaled(Ints x, float scale, Floats sum) {
      return _mm512_fmadd_ps(_mm512_cvtepi32_ps(x), _mm512_set1_ps(scale), sum);
    }
    static Ints add(Ints x, Ints y) { return _mm512_add_epi32(x, y); }
    static Floats combine(Ints high, Ints low, float scale) {
      const Floats sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low));
      return _mm512_mul_ps(sum, _mm512_set1_ps(scale));
    }
    static Floats factors(const float* rank_scales, int64_t ranks, float factor) {
      return _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(ranks), rank_scales), _mm512_set1_ps(factor));
    }
    static void store(float* to, int64_t ranks, Floats sum, Floats factor) {
      _mm512_mask_storeu_ps(to, first_lanes(ranks), _mm512_mul_ps(sum, factor));
    }
  };
  struct Ranks8 {
    using Ints = __m256i;
    using Floats = __m256;
    static Ints load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
    static Ints broadcast(const void* p) {
      return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float*>(p)));
    }
    static Ints add(Ints sum, Ints w, Ints x) { return _mm256_dpbusd_epi32(sum, w, x); }
    static Floats add_scaled(Ints x, float scale, Floats sum) {
      return _mm256_fmadd_ps(_mm256_cvtepi32_ps(x), _mm256_set1_ps(scale), sum);
    }
    static Ints add(Ints x, Ints y) { return _mm256_add_epi32(x, y); }
    static Floats combine(Ints high, Ints low, float scale) {
      const Floats sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(256.0f), _mm256_cvtepi32_ps(low));
      return _mm256_mul_ps(sum, _mm256_set1_ps(scale));
    }
    static Floats factors(const float* rank_scales, int64_t ranks, float factor) {
      return _mm256_mul_ps(_mm256_maskz_loadu_ps(static_cast<__mmask8>(first_lanes(ranks)), rank_scales),
                           _mm256_set1_ps(factor));
    }
    static void store(float* to, int64_t ranks, Floats sum, Floats factor) {
      _mm256_mask_storeu_ps(to, static_cast<__mmask8>(first_lanes(ranks)), _mm256_mul_ps(sum, factor));
    }
  };

  // R rows by a tile of A; returns the tile's end. Quarters alternate between two accumulators, to hide latency.
  template <int R, class V>
  static const uint8_t* shrink_tile(const uint8_t* a, const Row* x, int64_t in, typename V::Floats (&out)[R]) {
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
        typename V::Ints dot[R];
        for (int r = 0; r < R; r++) dot[r] = V::broadcast(&quarters[r][q].begin);
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++, a += sizeof(typename V::Ints)) {
          const typename V::Ints w = V::load(a);
          for (int r = 0; r < R; r++) dot[r] = V::add(dot[r], w, V::broadcast(codes[r] + q * 16 + b * 4));
        }
        for (int r = 0; r < R; r++) sum[q][r] = V::add_scaled(dot[r], quarters[r][q].scale, sum[q][r]);
      }
      for (int r = 0; r < R; r++) codes[r] += ROWS * GROUP, quarters[r] += 2;
    }
    for (int r = 0; r < R; r++) out[r] = sum[0][r] + sum[1][r];
    return a;
  }

  // The same for split16 rows: integers over all inputs. Few rows use several accumulators each, to hide latency.
  template <int R, class V>
  static const uint8_t* shrink_tile(const uint8_t* a, const Split16Row* x, int64_t in, typename V::Floats (&out)[R]) {
    constexpr int SUMS = R == 1 ? 4 : R == 2 ? 2 : 1;
    typename V::Ints high[R][SUMS] = {}, low[R][SUMS] = {};
    for (int r = 0; r < R; r++) high[r][0] = V::broadcast(x[r].begins), low[r][0] = V::broadcast(x[r].begins + 1);
    const int8_t* codes[R];
    for (int r = 0; r < R; r++) codes[r] = x[r].codes;
    for (int64_t i = 0; i < in; i += GROUP) {
#pragma GCC unroll 8
      for (int b = 0; b < GROUP / 4; b++, a += sizeof(typename V::Ints)) {
        const typename V::Ints w = V::load(a);
        prefetch<CODES_PREFETCH_BYTES>(a);
        for (int r = 0; r < R; r++) {
          high[r][b % SUMS] = V::add(high[r][b % SUMS], w, V::broadcast(codes[r] + b * 4));
          low[r][b % SUMS] = V::add(low[r][b % SUMS], w, V::broadcast(codes[r] + x[r].low + b * 4));
        }
      }
      for (int r = 0; r < R; r++) codes[r] += i / GROUP % 2 == 0 ? GROUP : x[r].span - GROUP;
    }
    for (int r = 0; r < R; r++) {
      for (int s = 1; s < SUMS; s++)
        high[r][0] = V::add(high[r][0], high[r][s]), low[r][0] = V::add(low[r][0], low[r][s]);
      out[r] = V::combine(high[r][0], low[r][0], x[r].scale);
    }
    return a;
  }

  // A row's v as split16. Layout of `words`: the scale, the initial accumulators for high and low codes, and from HEAD
  // on the high codes, then the low ones, four ranks a word.
  static constexpr int64_t HEAD = 4;

  static int64_t groups(int64_t rank) { return (rank + 3) / 4; }
  static int64_t low_offset(int64_t rank) { return (rank + 15) / 16 * 4; }  // words from the high codes to the low ones
  static int64_t words(int64_t rank) { return HEAD + 2 * low_offset(rank); }

  static void split(const float* v, int64_t rank, float* words) {
    const float peak = max_magnitude(v, rank);
    const bool none = peak < MIN_PEAK;
    const __m512 inverse = _mm512_set1_ps(none ? 0.0f : SPLIT16_MAX / peak);
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
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + low_offset(rank)), _mm512_cvtepi32_epi8(low));
    }
    const auto begin = [](__m512i sum) { return -128u * static_cast<uint32_t>(_mm512_reduce_add_epi32(sum)); };
    const uint32_t begins[2] = {begin(sum_high), begin(sum_low)};
    words[0] = none ? 0.0f : peak / SPLIT16_MAX;  // infinite or NaN if a value is
    std::memcpy(words + 1, begins, sizeof begins);
  }

  // v of R rows as `words`, one after the other; returns their end. `v` is scratch for [R, rank] floats.
  template <int R, class Row>
  static float* shrink(const LoraModule& module, const Row* x, int64_t in, float factor, float* v, float* at) {
    const auto* a = static_cast<const uint8_t*>(module.a);
    const auto tile = [&](auto form, int64_t j) {
      using V = decltype(form);
      typename V::Floats sum[R];
      a = shrink_tile<R, V>(a, x, in, sum);
      const typename V::Floats factors = V::factors(module.rank_scales + j, module.rank - j, factor);
      for (int r = 0; r < R; r++) V::store(v + r * module.rank + j, module.rank - j, sum[r], factors);
    };
    for (int64_t j = 0; j < module.rank; j += 16)
      ranks_of_tile(module.rank - j) == 16 ? tile(Ranks16(), j) : tile(Ranks8(), j);
    for (int r = 0; r < R; r++, at += words(module.rank)) split(v + r * module.rank, module.rank, at);
    return at;
  }

  // z of R rows += B v in tiles of 16 columns; returns the end of their words.
  template <int R>
  static const float* expand(const LoraModule& module, int64_t out, const float* at, float* const* z) {
    const auto* b = static_cast<const uint8_t*>(module.b);
    const int64_t groups_of_4 = groups(module.rank), to_low = low_offset(module.rank);
    const float* v[R];
    for (int r = 0; r < R; r++) v[r] = at + r * words(module.rank);
    for (int64_t c = 0; c < out; c += 16) {
      __m512i high[R], low[R];
      for (int r = 0; r < R; r++) high[r] = broadcast32(v[r] + 1), low[r] = broadcast32(v[r] + 2);
      for (int64_t g = HEAD; g < HEAD + groups_of_4; g++, b += 64) {
        const __m512i w = _mm512_loadu_si512(b);
        prefetch<CODES_PREFETCH_BYTES>(b);
        for (int r = 0; r < R; r++) {
          high[r] = _mm512_dpbusd_epi32(high[r], w, broadcast32(v[r] + g));
          low[r] = _mm512_dpbusd_epi32(low[r], w, broadcast32(v[r] + to_low + g));
        }
      }
      for (int r = 0; r < R; r++) {
        const __m512 sum =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[r]), _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(low[r]));
        _mm512_storeu_ps(z[r] + c, _mm512_fmadd_ps(sum, _mm512_set1_ps(v[r][0]), _mm512_loadu_ps(z[r] + c)));
      }
    }
    return at + R * words(module.rank);
  }
};

// ---- tasks -------------------------------------------------------------------------------

constexpr int ROW_BLOCK = 4;  // rows of a task that share a pass over an adapter

// Calls f(first, count) for up to ROW_BLOCK rows of a task at a time; count is a compile-time constant.
template <class F>
inline void for_row_blocks(const LoraTask& task, F&& f) {
  for (int r = task.first; r < task.last; r += ROW_BLOCK)
    dispatch<ROW_BLOCK>(task.last - r, [&](auto count) { f(r, count); });
}

// v of one mix entry and module; returns its end.
template <class Form, class Row = typename Form::Row>
float* shrink(const LoraTask& task, const MixEntry& entry, const LoraModule& module, const Activations& x, int64_t in,
              float* scratch, float* at) {
  const auto factor = static_cast<float>(entry.weight * module.scale);
  for_row_blocks(task, [&](int first, auto count) {
    Row rows[count];
    for (int r = 0; r < count; r++) Form::set(x, task.mix->rows[static_cast<size_t>(first + r)], rows[r]);
    at = Form::template shrink<count>(module, rows, in, factor, scratch, at);
  });
  return at;
}

template <class Form>
const float* expand(const LoraTask& task, const LoraModule& module, const LoraUpdate& update, const float* at) {
  for_row_blocks(task, [&](int first, auto count) {
    float* z[count];
    for (int r = 0; r < count; r++) z[r] = update.z + task.mix->rows[static_cast<size_t>(first + r)] * update.stride;
    at = Form::template expand<count>(module, update.out, at, z);
  });
  return at;
}

}  // namespace

void plan_updates(const LoraPlan& plan, const std::vector<Slot>& slots, const std::vector<LoraUpdate>& modules,
                  std::vector<LoraTask>& tasks) {
  tasks.clear();
  bool used = false;
  for (const MixRows& mix : plan.mixes)
    for (const MixEntry& entry : mix.entries)
      for (const LoraUpdate& module : modules)
        used = used || slots[static_cast<size_t>(entry.slot)].modules.data()[module.at].rank > 0;
  if (!used) return;
  for (const MixRows& mix : plan.mixes) {
    const int count = static_cast<int>(mix.rows.size());
    for (int first = 0; first < count; first += UPDATE_ROWS)
      tasks.push_back({&mix, first, std::min(count, first + UPDATE_ROWS)});
  }
}

int64_t update_floats(int64_t rank) {
  return ROW_BLOCK * rank + UPDATE_MODULES * UPDATE_ROWS * std::max(rank, Int8Lora::words(rank));
}

void update(const LoraTask& task, const std::vector<Slot>& slots, const std::vector<LoraUpdate>& modules,
            const Activations& x, float* scratch) {
  for (const LoraUpdate& update : modules)
    for (int r = task.first; r < task.last; r++)
      std::memset(update.z + task.mix->rows[static_cast<size_t>(r)] * update.stride, 0, update.stride * sizeof(float));
  for (const MixEntry& entry : task.mix->entries) {
    const LoraModule* slot = slots[static_cast<size_t>(entry.slot)].modules.data();
    int64_t rank = 0;
    for (const LoraUpdate& update : modules) rank = std::max(rank, slot[update.at].rank);
    float* const ranks = scratch + ROW_BLOCK * rank;
    float* end = ranks;
    for (const LoraUpdate& update : modules) {
      const LoraModule& module = slot[update.at];
      if (module.rank == 0) continue;
      end = !module.is_int8() ? shrink<Bf16Lora>(task, entry, module, x, update.in, scratch, end)
            : x.formats.split16
                ? shrink<Int8Lora, Int8Lora::Split16Row>(task, entry, module, x, update.in, scratch, end)
                : shrink<Int8Lora>(task, entry, module, x, update.in, scratch, end);
    }
    const float* v = ranks;
    for (const LoraUpdate& update : modules) {
      const LoraModule& module = slot[update.at];
      if (module.rank == 0) continue;
      v = module.is_int8() ? expand<Int8Lora>(task, module, update, v) : expand<Bf16Lora>(task, module, update, v);
    }
  }
}

}  // namespace loramux
