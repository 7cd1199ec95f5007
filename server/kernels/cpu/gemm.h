// Products of activations with packed matrices. A row's result depends on that row alone, bit for bit: its groups are
// added in ascending order, one accumulator, whatever the tile that it falls into, and whole numbers where the matrix unit
// adds them.
#pragma once
#include "target.h"

#include <cstdint>

#include "activations.h"
#include "kernels.h"

namespace loramux {

// Bytes of a tile's codes for a group of inputs, of the schemes with codes.
constexpr int64_t bytes_of_group(int scheme) { return scheme == INT8 ? 512 : 256; }

inline Forms forms_of(const Matrix& w) {
  Forms forms;
  (w.scheme == NONE ? forms.half : w.by_unit() ? forms.wide : forms.codes) = true;
  if (forms.codes) (w.in_pairs() ? forms.pairs : forms.floats) = true;
  return forms;
}

// Lines of 64 bytes that lie one after the other.
struct Lines {
  const char* at = nullptr;
  int64_t count = 0;
};

// Memory that something else will read soon. Products live on arithmetic and leave memory idle, so they ask for it on
// the side: for `pace` lines of it with every group of inputs that a walk over weights passes, and every span of the matrix
// unit's.
struct Aside {
  Lines lines;
  int64_t pace = 0;

  virtual ~Aside() = default;
  // Called before a walk when all lines have been asked for: puts the next ones there, if there are any.
  virtual void refill() {}
};

// Whether a walk over codes passes them with twice ROWS rows, as long as so many are left. A row's result is the
// same either way; it is data so that tests have both on any processor.
extern bool by_eight;
// How often so many rows are walked over.
int64_t walks_over(int64_t rows);

// out[r, 16 * (t - first)] = row r of x times tile t of w, no bias. Rows of `out` have room for whole tiles. What has
// been asked for is taken off `aside`.
void multiply(const Matrix& w, int64_t first_tile, int64_t last_tile, const Activations& x, int64_t rows, float* out,
              int64_t stride, Aside& aside);

// Row `row` of the matrix as floats [k].
void dequantize_row(const Matrix& w, int64_t row, float* out);

extern const float NF4_TABLE[16];

}  // namespace loramux
