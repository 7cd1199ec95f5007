// Adapters on their way into the codes that updates are computed with.
#pragma once
#include "target.h"

#include <cstdint>

#include "kernels.h"

namespace loramux {

// Codes and units of some modules. Each rank's row of A and column of B counts in a 127th of its largest value, so that
// ranks which are cut off or put beside others change no code. -1, or the index of a module with values that are not
// finite, or whose units are too large for a float. Throws bad_alloc.
int64_t encode(const LoraSource* modules, int64_t count);

}  // namespace loramux
