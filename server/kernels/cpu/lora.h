// LoRA updates of a step. A row's update runs over the adapters of its mix in order, each over its own rank, in float32
// and starting at zero; it is added to the base's result once. It does not depend on the other rows of the step.
#pragma once
#include "target.h"

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace loramux {

// The adapter in a slot; no modules if the slot is empty.
struct Slot {
  std::vector<LoraModule> modules;  // [layer][module]
  int64_t rank = 0;                 // the highest
  uint32_t uses = 0;                // bit s: some layer has module s
  int64_t cache_lines = 0;          // cache lines to prefetch for attention modules, over all layers
};

struct MixEntry {
  int32_t slot;
  float weight;
};

// The rows of one mix, counted from the start of the row block.
struct MixRows {
  std::vector<MixEntry> entries;
  std::vector<int32_t> rows;
};

// The adapters of a block of rows.
struct LoraPlan {
  std::vector<MixRows> mixes;
  std::vector<uint8_t> mixed;  // [rows of the block]: whether a row has a mix
  uint32_t modules = 0;        // bit s: some adapter has module s in some layer
  int64_t rank = 0;            // the highest
};

// The update of one module: `at` is its index in a slot's table; z [rows, stride] receives `out` columns, padded to
// tiles of 16.
struct LoraUpdate {
  int64_t at;
  float* z;
  int64_t stride, in, out;
};

// One task: rows first..last of a mix.
struct LoraTask {
  const MixRows* mix;  // points into the plan
  int32_t first, last;
};

constexpr int UPDATE_ROWS = 8;     // rows of a task
constexpr int UPDATE_MODULES = 3;  // most modules that share one input

// Lists the tasks for these modules; none if no adapter has any of them.
void plan_updates(const LoraPlan& plan, const std::vector<Slot>& slots, const std::vector<LoraUpdate>& modules,
                  std::vector<LoraTask>& tasks);

// Floats of scratch memory for an update of this rank.
int64_t update_floats(int64_t rank);

// z[row][c] = sum over a mix's adapters and their ranks of weight * scale * (A[j] . x[row]) * B[j][c], for every module
// and the rows of a task. Columns from `out` on are unspecified. x is read as int8 codes or bf16, like the adapter.
// `scratch` has `update_floats` of the highest rank.
void update(const LoraTask& task, const std::vector<Slot>& slots, const std::vector<LoraUpdate>& modules,
            const Activations& x, float* scratch);

}  // namespace loramux
