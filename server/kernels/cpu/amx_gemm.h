// Products by a processor's matrix unit (AMX): 16 rows by 16 columns by 64 inputs an instruction, sums in whole numbers
// until the last input: of rows and inputs that are many they leave the unit, and come back, between runs of spans. That
// wants one unit for all of a row's activations and one for all of a column's weights. Both are whole numbers of 16 bits in
// these, two codes of 8 bits each, so a product is
//
//   y = round(sum of W[i] A[i] / 2^16) times 256 units of the column times the row's unit,
//
// which has one value however it is computed: rows are bit-equal in any batch, be they few enough to be multiplied by vector
// instructions, which takes them half of the time.
//
// Of a coarse matrix the weights are whole numbers of 8 bits, w[i] = floor(code[i] scale) + z, and one of 8 bits more for a
// group and column, r, so that
//
//   W[i] = 256 w[i] + r, but for the error of rounding,
//
// where the r of all groups are a few inputs more, with the sums of groups' activations. These have one way of being computed.
#pragma once
#include "target.h"

#include <cstdint>

#include "activations.h"
#include "gemm.h"
#include "kernels.h"

namespace loramux {

// `multiply` of a matrix in codes, with activations in their wide form; rows: 256 at most.
void multiply_by_unit(const Matrix& w, int64_t first_tile, int64_t last_tile, const Activations& x, int64_t rows,
                      float* out, int64_t stride, Aside& aside);

}  // namespace loramux
