// Runs rows through decoder layers, as server/model/decoder.py defines them, with all threads of a pool or with the
// calling thread alone. Threads of a pool exchange activations seven times a layer through the caches; rows of a single
// thread stay in its own cache.
#pragma once
#include "target.h"

#include <array>
#include <chrono>
#include <cstdint>
#include <utility>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "kernels.h"
#include "lora.h"
#include "thread_pool.h"
#include "model_data.h"

namespace loramux {

enum Phase { NORM, QKV, ATTENTION, OUT, GATE_UP, DOWN_PROJ, HEAD, PLAN, DRAW, PHASES };

inline int64_t now() {  // nanoseconds
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

// Rows that go through a layer together.
struct RowBlock {
  int64_t first, count;
  LoraPlan plan;
};

class LayerRunner {
 public:
  // With all threads of `pool`, or the calling thread if it is null.
  LayerRunner(const ModelData& base, ThreadPool* pool);

  // Starts a step with these blocks of whole sequences. The arguments must stay valid until the step is done. `stream`
  // [rows of the step, hidden] is the input of the first layer. Throws bad_alloc, as `layer` does.
  void begin(const Step& step, const std::vector<int32_t>& row_sequence, std::vector<RowBlock> blocks, float* stream);
  // Lines of the next layer's data to prefetch per group of inputs. `reduce_rate` lowers it for the rest of the step.
  int64_t prefetch_rate() const { return prefetch_rate_; }
  bool can_reduce_rate() const { return reduced_rate() < prefetch_rate_; }
  void reduce_rate() { prefetch_rate_ = reduced_rate(); }
  void layer(const Step& step, int64_t layer);
  int64_t bytes() const;
  const std::array<int64_t, PHASES>& times() const { return times_; }
  void reset_times() { times_.fill(0); }

 private:
  static constexpr int NO_UPDATE = -1;

  // Where a GEMM's result goes.
  struct Output {
    int module;
    float* out;  // [rows, stride]
    int64_t stride;
    bool add;  // add to `out`; if false, `out` has room for whole tiles
  };

  template <class F>
  void run(int n, F&& f) {
    if (pool_ != nullptr) return pool_->run(n, std::forward<F>(f));
    for (int i = 0; i < n; i++) f(i, 0);
  }

  void reserve(const Step& step);
  void run_layer(const Step& step, int64_t layer, const RowBlock& block);
  void norm_rows(const RowBlock& block, const float* weight, int updated_module, Activations& to);
  void gemms(int64_t layer, const RowBlock& block, const Activations& x, const std::vector<Output>& outputs);
  void gemm_chunk(const Matrix& w, const RowBlock& block, const Activations& x, const Output& output, int64_t first,
                  int64_t last, Prefetcher& prefetcher, int thread);
  int plan_updates(int64_t layer, const RowBlock& block, const std::vector<int>& modules);
  void update_chunk(const Activations& x, int chunk, int thread);
  const float* update_of(const RowBlock& block, int module, int64_t row) const;
  void quantize_split16(Activations& x, int64_t rows, int64_t k, const float* from);
  void gate_up(int64_t layer, const RowBlock& block);
  void down(int64_t layer, const RowBlock& block);
  void prefetch_heads(int64_t row, int64_t head);
  void rotate_and_write(const Step& step, int64_t layer, const RowBlock& block, int64_t row, int64_t head);
  void attention(const Step& step, int64_t layer, const RowBlock& block);
  void attend_rows(const Step& step, int64_t layer, const RowBlock& block, int64_t sequence, int64_t head,
                   int64_t first, int64_t last, int thread, const uint16_t* const* next_blocks);
  void plan_prefetch(const Step& step);
  bool should_prefetch(int64_t rows) const;
  int64_t full_rate(int64_t rows) const;
  int64_t reduced_rate() const;
  void start_prefetch(int64_t layer);
  Prefetcher& prefetcher_for(int thread, int update = NO_UPDATE);
  struct LayerPrefetcher;
  void refill(LayerPrefetcher& prefetcher) const;
  CacheLines update_lines(int32_t slot) const;
  void prefetch_activations(const Activations& x, int64_t rows, int thread);
  int64_t clock(Phase phase, int64_t since);

  const ModelData& data_;
  ThreadPool* const pool_;
  const std::vector<int32_t>* row_sequence_ = nullptr;
  std::vector<RowBlock> blocks_;
  float* stream_ = nullptr;

  // The slots and cache blocks of this step; lines to prefetch per group of inputs; the layer to prefetch for, -1 for
  // none; a counter of changes of that layer.
  std::vector<int32_t> prefetch_slots_, prefetch_blocks_;
  int64_t prefetch_rate_ = 0, prefetch_layer_ = -1, prefetch_epoch_ = 0;
  std::vector<LoraUpdate> updated_modules_;  // modules of the last update, empty if no adapter has them
  std::vector<LoraTask> update_tasks_;
  Buffer<float> qkv_;  // [block][q | k | v], each padded to whole tiles
  Buffer<uint16_t> query_;
  Buffer<float> attention_out_;                   // [block][heads * dim]
  Buffer<float> mlp_hidden_;                      // silu(gate) * up [block][intermediate], for split16
  std::array<Buffer<float>, MODULES> updates_;    // [block][outputs of the module]
  Activations qkv_in_, o_in_, mlp_in_, down_in_;  // inputs of the linears
  // What a thread prefetches during GEMMs: first the adapters of its next update, then data of the next layer.
  struct LayerPrefetcher : Prefetcher {
    const LayerRunner* runner = nullptr;
    int thread = 0;

    bool for_update = false;  // whether `lines` belong to the next update
    int64_t phase = 0;        // phase of that update
    int update = NO_UPDATE;
    const MixEntry* entry = nullptr;  // first entry of its mix that is not prefetched yet
    const MixEntry* end = nullptr;

    CacheLines next_layer_lines;  // lines of the next layer, set aside for the update's
    int64_t epoch = 0;            // the value of prefetch_epoch_ at its start
    int64_t issued = 0;           // items of this thread's share already issued: slots, then blocks
    int64_t budget = 0;           // lines that may still be prefetched

    void refill() override { runner->refill(*this); }
  };
  struct Local {
    AttentionScratch attention;
    Buffer<float> tile, rows, update;
    LayerPrefetcher prefetcher;
    int64_t phase = 0;  // the last phase in which this thread prefetched activations
  };
  std::vector<Local> local_;
  int64_t phase_ = 0;
  std::array<int64_t, PHASES> times_{};
};

}  // namespace loramux
