// GEMM with AMX: 16 rows by 16 columns by 64 inputs per instruction, accumulated as integers over all inputs. This
// needs one scale per row of activations and one per column of weights. Both are 16-bit integers, split into two 8-bit
// codes:
//
//   y = round(sum of W[i] A[i] / 2^16) times 256 times the column's scale times the row's scale.
//
// Integer sums have one value in any order, so the vector kernels for few rows give the same bits.
//
// With `Matrix::as_int8` a weight is 8 bits, w[i] = floor(code[i] scale) + z, and each group of a column has an 8-bit
// remainder r with W[i] = 256 w[i] + r up to rounding. The remainders of all groups are extra inputs, multiplied by the
// group sums of the activations.
#pragma once
#include "target.h"

#include <cstdint>

#include "activations.h"
#include "gemm.h"
#include "kernels.h"

namespace loramux {

// `multiply` for a quantized matrix with split16 activations; at most 256 rows.
void multiply_amx(const Matrix& w, int64_t first_tile, int64_t last_tile, const Activations& x, int64_t rows,
                  float* out, int64_t stride, Prefetcher& prefetcher);

}  // namespace loramux
