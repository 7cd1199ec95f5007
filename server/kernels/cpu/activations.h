// Activations as products read them: int8 codes with what a span of them means, and bf16.
#pragma once
#include "target.h"

#include <atomic>
#include <cstdint>
#include <new>

namespace loramux {

// Memory that is aligned to a cache line and not initialised twice. `bytes` may be asked for by any thread.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { _mm_free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  // At least n elements; the content is lost if it grows, and is zero then. Throws bad_alloc.
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

constexpr int ROWS = 4;    // rows of a tile, and of a block of quantized activations
constexpr int GROUP = 32;  // inputs whose products are added up before they are scaled
constexpr int ROWS_OF_UNIT = 16;  // rows of a tile of the matrix unit at most
constexpr int FEW_ROWS = 3;        // with which 4-bit products are vector instructions' all the same
constexpr int SPAN = 64;   // inputs whose codes have units that differ by powers of two only
constexpr int SPANS_OF_SUMS = SPAN / (SPAN / GROUP);  // spans whose groups' sums fill one

// What a row says of a span of its inputs beside their codes. Each quarter's unit is the coarsest one halved as often as its
// inputs allow, so that a large input costs only the 15 beside it their last bits. Sums are shifted from one quarter's units
// into the next one's, which takes no time of the multipliers, unlike products with floats: of a group's first half into
// those of the second; of the first group into those of the second one, or of both into common ones. A word with [2]
// has one for each group. They travel between cores with the codes: each way to compute products has words of its own.
enum Floats : int {  // where groups' sums become floats
  SCALE,         // float: the unit of the last quarter's codes
  SIXTEENTH,     // float: the same for sums of codes with 16 times a weight's
  SUM,           // [2] float: of the inputs as their codes have them
  NIBBLE = 4,    // [2] int32: bits that sums are shifted up by before a second half with 16 times the weights' codes
  LEFT = 6,      // [2] int32: the same before one with the codes themselves,
  RIGHT = 8,     // [2] and down; one of the two is zero
  OFFSET = 10,   // [2] int32: what a sum begins with for weights with 128 added, in the first half's units
  JOIN_LEFT = 12,  // int32: bits that sums of the first group are shifted by, up
  JOIN_RIGHT,      // and down
  FLOATS_EACH
};
enum Pairs : int {  // where both groups' sums have 16 bits each, in one unit as fine as these let it be
  COMMON,          // float: that unit
  INPUTS,          // int16 [2]: eight times the sum of a group's inputs
  MIDDLE,          // [2] int32: what a sum begins with for weights with 8 added, half of the common unit among it
  HALF_UP = 4,     // [2] int32: as NIBBLE
  FIRST_DOWN = 6,  // int32: bits by which sums with 16 times the weights' codes are shifted down into the low 16 bits,
  SECOND_UP,       // and up into the high ones
  PAIRS_EACH
};
constexpr int FLOATS = FLOATS_EACH * ROWS, PAIRS = PAIRS_EACH * ROWS;  // words per block and span

// The unit of 16 inputs' codes, and what sums of their products begin with for an operand with 128 added.
struct Quarter {
  float unit;
  int32_t begin;
};

// What a row's wide form says of a span for products of few rows: of high codes and of low ones, of its first group and of
// the second one, the sum, and what sums of products with 16 times a weight's code less 8 begin with.
struct SpanSums {
  int32_t begin[2][2];
  int16_t inputs[2][2];
};

// Which forms somebody reads: codes, with floats or pairs, for products with matrices in codes, but wide ones where the matrix
// unit does them; wide ones, or else codes and quarters, for updates of adapters in codes; halves for both in bf16.
struct Forms {
  bool codes = false, quarters = false, floats = false, pairs = false, half = false, wide = false;

  Forms operator|(const Forms& o) const {
    return {codes || o.codes, quarters || o.quarters, floats || o.floats, pairs || o.pairs, half || o.half, wide || o.wide};
  }
};

// Activations [rows, k] in the forms that products read, inputs padded with zeros to a multiple of 64:
//   codes int8 [rows/4][kp/32][4][32], floats [rows/4][kp/64][FLOATS_EACH][4], pairs [rows/4][kp/64][PAIRS_EACH][4],
//   quarters [rows][kp/16], and bf16 [rows][kp];
//   wide int8 [rows/R][kp/64 + n][2][R][64], for the matrix unit: high codes and low ones, x = (256 high + low) unit, then
//   256ths of groups' sums, rounded, as such codes: two spans' by turns, and n as many spans as they take. And
//   units [rows], and begins [rows][2], what sums of products of either begin with for an operand with 128 added. R is 16, or
//   how many rows there is room for if these are fewer. Beside it sums [rows][kp/64] where that is FEW_ROWS at most.
struct Activations {
  Buffer<int8_t> codes;
  Buffer<float> floats, pairs;
  Buffer<Quarter> quarters;
  Buffer<uint16_t> half;
  Buffer<int8_t> wide;
  Buffer<float> units;
  Buffer<int32_t> begins;
  Buffer<SpanSums> sums;
  int64_t padded = 0, rows_of_tile = 0;
  bool few = false;  // whether there are sums
  Forms forms;

  // Spans of a row's wide form that have its groups' sums.
  int64_t spans_of_sums() const { return (padded / SPAN + SPANS_OF_SUMS - 1) / SPANS_OF_SUMS; }
  // Codes of a row there, high and low.
  int64_t wide_codes() const { return 2 * (padded + spans_of_sums() * SPAN); }

  void reserve(int64_t rows, int64_t k, Forms forms);
  // Inputs from..to of some rows (from a multiple of 64; to one too, or k); x points at input `from` of the first row.
  void set(int64_t row, int64_t rows, int64_t from, int64_t to, const float* x, int64_t stride);
  // The wide form of some rows, all inputs of them at once.
  void set_wide(int64_t row, int64_t rows, int64_t k, const float* x, int64_t stride);
  // Both, of whole rows.
  void set_rows(int64_t row, int64_t rows, int64_t k, const float* x, int64_t stride) {
    set(row, rows, 0, k, x, stride);
    if (forms.wide) set_wide(row, rows, k, x, stride);
  }
  // Asks for the codes of some rows, which other cores may just have written.
  void fetch(int64_t rows) const;
  int64_t bytes() const {
    return codes.bytes() + floats.bytes() + pairs.bytes() + quarters.bytes() + half.bytes() + wide.bytes() + units.bytes() +
           begins.bytes() + sums.bytes();
  }
};

}  // namespace loramux
