// Low-rank updates of a step: which rows take which slots with what weight, and the two products.
// Whatever shares a step with a row, its own sums run over its own adapters in the order of its mix, each over the true
// rank, in float32.
#pragma once
#include "target.h"

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace loramux {

// One row's use of one slot: `offset` is where its rank products lie in the row's buffer of a site.
struct Use {
  int32_t row;
  float weight;
  int32_t offset;
};

struct SlotRows {
  int32_t slot;
  std::vector<Use> uses;
};

struct Entry {
  int32_t slot;
  int32_t offset;
};

// Rows of one mix; rows are counted within the block of rows that a plan is for.
struct MixRows {
  std::vector<Entry> entries;
  std::vector<int32_t> rows;
};

// The adapters of a block of rows.
struct LoraPlan {
  std::vector<SlotRows> slots;
  std::vector<MixRows> mixes;
  int64_t width = 0;  // ranks that the widest row needs at one site
  int64_t rows = 0;   // that have adapters

  bool any() const { return !mixes.empty(); }
};

// A piece of a shrink: uses first..last of a slot at one site.
struct ShrinkTask {
  int32_t slot, site;
  int32_t first, last;
};

// The tasks of `sites`, so that every slot's matrices are read by neighbouring tasks.
void plan_shrink(const LoraPlan& plan, const std::vector<const LoraSite*>& slots, int64_t layer,
                 const std::vector<int>& sites, std::vector<ShrinkTask>& tasks);

// Asks for the beginning of a site's A, which the next task walks.
void prefetch_site(const LoraSite& site, int64_t in);

// v[row * width + offset + j] = weight * scale * (A[j] . x[row]) for the uses of a task; x is bf16 [rows][padded].
void shrink(const LoraSite& site, const SlotRows& slot, int first, int last, const uint16_t* x, int64_t padded,
            int64_t in, float* v, int64_t width);

// A piece of an expansion: up to 4 of a mix's rows, some columns of one site.
struct ExpandTask {
  int32_t mix, site;
  int32_t first, last;
  int64_t column, columns;
};

// The tasks of `sites`, of which site s has out[s] columns. Few rows are cut into columns, for more threads.
void plan_expand(const LoraPlan& plan, const std::vector<const LoraSite*>& slots, int64_t layer,
                 const std::vector<int>& sites, const int64_t* out, std::vector<ExpandTask>& tasks);

// y[row * stride + c] += sum over a mix's entries and ranks of v[row * width + ...] * B[j][column + c], c below
// `columns`, for rows first..last of the mix (at most 4). `at` is the place of the site in a slot's table; y points at
// `column` of row 0. Entries and ranks are added one after the other, in their order.
void expand(const MixRows& mix, int64_t width, const std::vector<const LoraSite*>& slots, int64_t at, int first,
            int last, const float* v, float* y, int64_t stride, int64_t column, int64_t columns, int64_t out);

// The same for all rows of a plan.
void expand_all(const LoraPlan& plan, const std::vector<const LoraSite*>& slots, int64_t at, const float* v, float* y,
                int64_t stride, int64_t column, int64_t columns, int64_t out);

}  // namespace loramux
