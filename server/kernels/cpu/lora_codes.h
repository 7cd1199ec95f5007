// Quantizes adapters to int8.
#pragma once
#include "target.h"

#include <cstdint>

#include "kernels.h"

namespace loramux {

// Quantizes some modules. Each rank's row of A and column of B has its own scale (largest magnitude / 127), so
// truncating or concatenating ranks changes no code. Returns -1, or the index of a module with non-finite values or
// scales. Throws bad_alloc.
int64_t encode(const LoraSource* modules, int64_t count);

}  // namespace loramux
