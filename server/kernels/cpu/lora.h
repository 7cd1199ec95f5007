// Low-rank updates of a step: which rows take which slots with what weight, and what they add to a linear's output.
// Whatever shares a step with a row, its own sums run over its own adapters in the order of its mix, each over the true
// rank, in float32, and begin at zero: the whole is added to the base's product once.
#pragma once
#include "target.h"

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace loramux {

// The adapter in a slot; an empty one has no sites.
struct Slot {
  std::vector<LoraSite> sites;  // [layer][site]
  int64_t rank = 0;             // the highest
  uint32_t uses = 0;            // bit s: some layer has site s
  int64_t lines = 0;            // of what is asked for ahead of a layer, over all layers
};

struct Entry {
  int32_t slot;
  float weight;
};

// Rows of one mix; rows are counted within the block of rows that a plan is for.
struct MixRows {
  std::vector<Entry> entries;
  std::vector<int32_t> rows;
};

// The adapters of a block of rows.
struct LoraPlan {
  std::vector<MixRows> mixes;
  std::vector<uint8_t> mixed;  // [rows of the block]: whether a row has a mix
  uint32_t sites = 0;          // bit s: some adapter has site s in some layer
  int64_t rank = 0;            // the highest
};

// The update of one site, whose place in a slot's table is `at`, and where it goes: z [rows, stride] has `out` columns, and
// whole tiles of 16.
struct Update {
  int64_t at;
  float* z;
  int64_t stride, in, out;
};

// A piece of the updates of some sites: rows first..last of a mix.
struct UpdateTask {
  const MixRows* mix;  // of the plan
  int32_t first, last;
};

constexpr int UPDATE_ROWS = 8;   // rows of a task
constexpr int UPDATE_SITES = 3;  // that share one input

// The tasks of `sites`; none if no adapter of the plan has any of them.
void plan_updates(const LoraPlan& plan, const std::vector<Slot>& slots, const std::vector<Update>& sites,
                  std::vector<UpdateTask>& tasks);

// The floats of scratch memory that an update of such a rank takes.
int64_t update_floats(int64_t rank);

// z[row][c] = sum over a mix's entries and their ranks of weight * scale * (A[j] . x[row]) * B[j][c], at every site, for
// the rows of a task; columns from `out` on become anything. x is read in the form that the adapters have: codes and
// units, or bf16. An adapter's matrices for these sites lie one after the other, and are walked so. `scratch` is of
// `update_floats` of the highest rank.
void update(const UpdateTask& task, const std::vector<Slot>& slots, const std::vector<Update>& sites,
            const Activations& x, float* scratch);

}  // namespace loramux
