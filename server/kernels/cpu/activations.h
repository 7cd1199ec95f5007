// Activations quantized for the GEMM kernels: int8 codes with their scales, and bf16.
#pragma once
#include "target.h"

#include <atomic>
#include <cstdint>
#include <new>

namespace loramux {

// Cache-line aligned memory. Any thread may call `bytes`.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { _mm_free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  // Returns room for at least n elements. If the buffer grows, its content is replaced by zeros. Throws bad_alloc.
  T* reserve(int64_t n) {
    if (n > size_.load(std::memory_order_relaxed)) {
      _mm_free(data_);
      size_.store(0, std::memory_order_relaxed);
      data_ = static_cast<T*>(_mm_malloc(static_cast<size_t>(n) * sizeof(T), 64));
      if (data_ == nullptr) throw std::bad_alloc();
      __builtin_memset(data_, 0, static_cast<size_t>(n) * sizeof(T));
      size_.store(n, std::memory_order_relaxed);
    }
    return data_;
  }
  T* get() const { return data_; }
  int64_t bytes() const { return size_.load(std::memory_order_relaxed) * static_cast<int64_t>(sizeof(T)); }

 private:
  T* data_ = nullptr;
  std::atomic<int64_t> size_{0};
};

constexpr int ROWS = 4;       // rows of a tile, and of a block of quantized activations
constexpr int GROUP = 32;     // inputs whose int32 accumulators are scaled together
constexpr int AMX_ROWS = 16;  // most rows of an AMX tile
constexpr int FEW_ROWS = 3;   // most rows that the AMX build multiplies by vector instructions (4-bit weights)
constexpr int SPAN = 64;      // inputs whose quantization scales differ by powers of two only
constexpr int SPANS_PER_SUM_SPAN = SPAN / (SPAN / GROUP);  // spans whose group sums fill one span

// Parameters of a span for weights with float scales. Each quarter of a span (16 inputs) has its own scale: the
// coarsest one divided by a power of two, so that a large input only costs precision among the 15 next to it.
// Accumulators are shifted from one quarter's scale to the next one's: from the first half of a group to the second,
// and then from the first group to the second. [2]: one value per group.
enum FloatParam : int {
  SCALE,             // float: scale of the last quarter
  SCALE_16TH,        // float: SCALE / 16, for weight codes in the high nibble
  SUM,               // [2] float: sum of the dequantized inputs
  NIBBLE_SHIFT = 4,  // [2] int32: left shift before a second half whose weight codes are in the high nibble
  LEFT_SHIFT = 6,    // [2] int32: left shift before a second half otherwise
  RIGHT_SHIFT = 8,   // [2] int32: right shift; LEFT or RIGHT is zero
  OFFSET = 10,       // [2] int32: initial accumulator, for weights with 128 added, in the scale of the first half
  JOIN_LEFT = 12,    // int32: left shift of the first group's accumulator
  JOIN_RIGHT,        // int32: right shift of the first group's accumulator
  FLOAT_PARAM_COUNT
};
enum IntParam : int {  // parameters of a span for weights with integer scales: both groups' accumulators as int16 in one common scale
  COMMON_SCALE,  // float: the common scale
  INPUT_SUM,     // int16 [2]: eight times the sum of a group's inputs
  BEGIN,         // [2] int32: initial accumulator for weights with 8 added, plus half of the common scale for rounding
  HALF_SHIFT = 4,   // [2] int32: as NIBBLE_SHIFT
  FIRST_SHIFT = 6,  // int32: right shift of the first group's accumulator into the low 16 bits
  SECOND_SHIFT,     // int32: left shift of the second group's accumulator into the high 16 bits
  INT_PARAM_COUNT
};
constexpr int FLOAT_PARAMS = FLOAT_PARAM_COUNT * ROWS,
              INT_PARAMS = INT_PARAM_COUNT * ROWS;  // 32-bit values per block of rows and span

// The scale of 16 inputs, and the initial accumulator of their dot product with weights that have 128 added.
struct Quarter {
  float scale;
  int32_t begin;
};

// A span of a split16 row, for the GEMV kernels: per code (high, low) and group, the initial accumulator for weight
// codes in the high nibble with 8 added, and the sum of the activation codes.
struct SpanSums {
  int32_t begin[2][2];
  int16_t inputs[2][2];
};

// The formats of activations that some GEMM reads. Base weights read `codes` with `float_params` or `int_params`,
// `split16` with AMX, or `bf16`. Adapters in int8 read `split16`, or else `codes` with `quarters`; adapters in bf16
// read `bf16`.
struct ActivationFormats {
  bool codes = false, quarters = false, float_params = false, int_params = false, bf16 = false, split16 = false;

  ActivationFormats operator|(const ActivationFormats& o) const {
    return {codes || o.codes,           quarters || o.quarters, float_params || o.float_params,
            int_params || o.int_params, bf16 || o.bf16,         split16 || o.split16};
  }
};

// Activations [rows, k] in the formats that GEMMs read. Inputs are padded with zeros to kp, a multiple of 64.
//   codes         int8 [rows/4][kp/32][4][32]
//   float_params  [rows/4][kp/64][FLOAT_PARAM_COUNT][4]
//   int_params    [rows/4][kp/64][INT_PARAM_COUNT][4]
//   quarters      [rows][kp/16]
//   bf16          [rows][kp]
//   split16       int8 [rows/R][kp/64 + n][2][R][64]: x = (256 high + low) scale, high codes first. The last n spans
//                 hold the sums of groups divided by 256, quantized the same way. R is 16, or the number of reserved
//                 rows if that is smaller.
//   scales        float [rows], for split16
//   begins        int32 [rows][2]: initial accumulators of high and low codes for weights with 128 added
//   sums          [rows][kp/64], for split16 with at most FEW_ROWS rows
struct Activations {
  Buffer<int8_t> codes;
  Buffer<float> float_params, int_params;
  Buffer<Quarter> quarters;
  Buffer<uint16_t> bf16;
  Buffer<int8_t> split16;
  Buffer<float> scales;
  Buffer<int32_t> begins;
  Buffer<SpanSums> sums;
  int64_t padded = 0, tile_rows = 0;
  bool few = false;  // whether there are `sums`
  ActivationFormats formats;

  // Spans of a split16 row that hold group sums.
  int64_t sum_spans() const { return (padded / SPAN + SPANS_PER_SUM_SPAN - 1) / SPANS_PER_SUM_SPAN; }
  // Codes of a split16 row, high and low.
  int64_t split16_codes() const { return 2 * (padded + sum_spans() * SPAN); }

  void reserve(int64_t rows, int64_t k, ActivationFormats formats);
  // Quantizes inputs from..to of some rows. `from` is a multiple of 64, `to` too unless it is k. x points at input
  // `from` of the first row.
  void set(int64_t row, int64_t rows, int64_t from, int64_t to, const float* x, int64_t stride);
  // Quantizes whole rows to split16.
  void set_split16(int64_t row, int64_t rows, int64_t k, const float* x, int64_t stride);
  // Quantizes whole rows to all reserved formats.
  void set_rows(int64_t row, int64_t rows, int64_t k, const float* x, int64_t stride) {
    set(row, rows, 0, k, x, stride);
    if (formats.split16) set_split16(row, rows, k, x, stride);
  }
  // Prefetches the codes of some rows, which other cores may have written.
  void fetch(int64_t rows) const;
  int64_t bytes() const {
    return codes.bytes() + float_params.bytes() + int_params.bytes() + quarters.bytes() + bf16.bytes() +
           split16.bytes() + scales.bytes() + begins.bytes() + sums.bytes();
  }
};

}  // namespace loramux
