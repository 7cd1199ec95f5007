// One step of a Llama-style decoder, as server/model/decoder.py defines it, over packed weights, KV cache blocks and
// adapter slots. Holds pointers to memory that Python keeps alive, and its own work buffers.
#pragma once
#include "target.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "thread_pool.h"
#include "autotune.h"
#include "model_data.h"
#include "sampling.h"
#include "layer_runner.h"

namespace loramux {

class Model {
 public:
  Model(const Config& config, const Layer* layers, const Matrix& embed, const Matrix& head, const float* norm,
        ThreadPool& pool);

  // Sets the KV cache and the rotary tables.
  void set_cache(uint16_t* cache, int64_t blocks, int64_t block_size, const float* cosine, const float* sine,
                 int64_t positions);
  // `modules` is [layers][MODULES]; empty clears the slot. Does not allocate.
  void set_slot(int64_t slot, std::vector<LoraModule> modules) { data_.set_slot(slot, std::move(modules)); }
  Outcome run(const Step& step);
  // Estimated nanoseconds until the running step ends: the maximum if unknown, 0 once all layers are done. Thread-safe.
  int64_t remaining_ns() const;
  // Samples tokens [rows] from logits [rows, vocab]. Throws bad_alloc.
  void sample(const float* logits, int64_t rows, const SamplingParams* params, const int32_t* top_k, int32_t* tokens);
  int64_t modules() const { return data_.config.layers * MODULES; }  // of a slot
  // Thread-safe: blocks up to the highest one used so far, and bytes of the work buffers.
  int64_t used_blocks() const { return used_blocks_; }
  int64_t work_bytes() const;
  int64_t row_parallel_steps() const { return row_parallel_steps_; }  // steps in which each thread ran its own rows
  int64_t reduced_prefetch_steps() const {
    return reduced_prefetch_steps_;
  }                               // steps that ran with a reduced prefetch rate
  void take_times(int64_t* out);  // only between steps

 private:
  static constexpr size_t RATES = 6;     // powers of two
  static constexpr int64_t BLOCK = 256;  // rows: few enough that activations between phases stay in cache
  // Rows per bucket of the row-parallel tuner.
  static constexpr int64_t ROW_BUCKET = AMX_ROWS;

  Outcome check(const Step& step) const;
  LoraPlan plan_block(const Step& step, int64_t first, int64_t count) const;
  std::vector<RowBlock> blocks_of(const Step& step, int64_t first, int64_t last) const;
  std::vector<int64_t> sequence_costs(const Step& step) const;
  std::vector<int64_t> split_rows(const Step& step, const std::vector<int64_t>& costs) const;
  std::vector<LayerRunner*> assign_rows(const Step& step, const std::vector<int64_t>& ends);
  void head(const Step& step);
  int64_t clock(Phase phase, int64_t since);

  ModelData data_;
  const Matrix embed_, head_;
  const float* const norm_;
  ThreadPool& pool_;
  LayerRunner parallel_;
  std::deque<LayerRunner> single_;  // one per thread; none with a single thread
  // By number of rows / ROW_BUCKET: whether each thread runs its own rows (0) or all run all rows (1).
  std::array<Autotuner, BLOCK / ROW_BUCKET> split_tuner_;
  // By log2 of prefetch rate and rows: whether to prefetch the next layer at the full (0) or the reduced rate (1).
  std::array<Autotuner, 64> rate_tuner_[RATES];
  std::atomic<int64_t> used_blocks_{0}, row_parallel_steps_{0}, reduced_prefetch_steps_{0};

  std::vector<int32_t> row_sequence_;
  Buffer<float> stream_;  // residual stream [rows][hidden]
  Activations head_in_;   // normed rows whose logits are wanted
  struct Local {
    Buffer<float> tile, rows;
    SamplerScratch sample;
    std::vector<RowMax> maxima;  // of the logits that this thread computed
  };
  std::vector<Local> local_;
  std::array<int64_t, PHASES> times_{};
  std::atomic<int64_t> layers_start_{0};  // start of the layers of the running step
  std::atomic<int64_t> layers_done_{0};   // of the running step; 0 between steps
  std::atomic<int64_t> head_time_{0};     // in the last step with logits
};

}  // namespace loramux
