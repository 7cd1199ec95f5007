// GEMM of quantized activations with packed weights. A row's result is the same bits in every batch: groups are added
// in ascending order into one accumulator, whatever the tile, or as integers with AMX.
#pragma once
#include "target.h"

#include <cstdint>

#include "activations.h"
#include "kernels.h"

namespace loramux {

// Bytes of a tile's codes for a group of inputs.
constexpr int64_t bytes_of_group(int scheme) { return scheme == INT8 ? 512 : 256; }

inline ActivationFormats formats_of(const Matrix& w) {
  ActivationFormats formats;
  (w.scheme == NONE ? formats.bf16 : w.uses_amx() ? formats.split16 : formats.codes) = true;
  if (formats.codes) (w.has_int_scales() ? formats.int_params : formats.float_params) = true;
  return formats;
}

// Adjacent cache lines.
struct CacheLines {
  const char* at = nullptr;
  int64_t count = 0;
};

// Supplies memory to prefetch while a GEMM runs. GEMMs are bound by arithmetic, so they have bandwidth to spare: they
// prefetch `rate` lines with every group of inputs, or span with AMX.
struct Prefetcher {
  CacheLines lines;
  int64_t rate = 0;

  virtual ~Prefetcher() = default;
  // Called before a loop when `lines` is empty: puts the next lines there, if any.
  virtual void refill() {}
};

// Whether tiles have twice ROWS rows where so many are left. Results do not depend on it. It is a variable so that
// tests can run both.
extern bool eight_row_tiles;
// How many passes over the weights a GEMM with so many rows makes.
int64_t passes_over(int64_t rows);

// out[r, 16 * (t - first)] = row r of x times tile t of w, without bias. Rows of `out` have room for whole tiles.
void multiply(const Matrix& w, int64_t first_tile, int64_t last_tile, const Activations& x, int64_t rows, float* out,
              int64_t stride, Prefetcher& prefetcher);

// Dequantizes row `row` of the matrix to float [k].
void dequantize_row(const Matrix& w, int64_t row, float* out);

extern const float NF4_TABLE[16];

}  // namespace loramux
