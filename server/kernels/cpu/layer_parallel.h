// Threads that take rows through the layers together: all of the pool's, or one alone. What one thread of several
// writes the others read, seven times a layer, and a line from another core takes as long as one from memory where the
// two share no cache; rows that a thread has to itself never leave it. The C++ twin of a layer of
// server/model/decoder.py.
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
#include "pool.h"
#include "model_state.h"

namespace loramux {

enum Phase { NORM, QKV, ATTENTION, OUT, GATE_UP, DOWN_PROJ, HEAD, PLAN, DRAW, PHASES };

inline int64_t now() {  // in nanoseconds
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

// Rows that go through a layer together.
struct RowBlock {
  int64_t first, count;
  LoraPlan plan;
};

class LayerParallel {
 public:
  // Of all threads of `pool`, or of the one that calls if it is null.
  LayerParallel(const ModelState& base, Pool* pool);

  // The blocks of a step that it takes, whole sequences; what is pointed at stays until the step is done. `stream` [rows
  // of the step, hidden] is what enters the first layer. Throws bad_alloc, as `layer` does.
  void begin(const Step& step, const std::vector<int32_t>& row_sequence, std::vector<RowBlock> blocks, float* stream);
  // How many lines of what the next layer reads are asked for at a time; fewer of them from here on, if there is a way to.
  int64_t ahead_pace() const { return ahead_pace_; }
  bool can_spare() const { return spared() < ahead_pace_; }
  void spare() { ahead_pace_ = spared(); }
  void layer(const Step& step, int64_t layer);
  int64_t bytes() const;
  const std::array<int64_t, PHASES>& times() const { return times_; }
  void forget_times() { times_.fill(0); }

 private:
  static constexpr int NO_UPDATE = -1;

  // What one product does with its result.
  struct Target {
    int site;
    float* out;  // [rows, stride]
    int64_t stride;
    bool add;  // to what is there; where not, `out` has room for whole tiles
  };

  template <class F>
  void run(int n, F&& f) {
    if (pool_ != nullptr) return pool_->run(n, std::forward<F>(f));
    for (int i = 0; i < n; i++) f(i, 0);
  }

  void reserve(const Step& step);
  void run_layer(const Step& step, int64_t layer, const RowBlock& block);
  void norm_rows(const RowBlock& block, const float* weight, int added, Activations& to);
  void products(int64_t layer, const RowBlock& block, const Activations& x, const std::vector<Target>& targets);
  void product_piece(const Matrix& w, const RowBlock& block, const Activations& x, const Target& target, int64_t first,
                     int64_t last, Aside& aside, int thread);
  int plan_updates(int64_t layer, const RowBlock& block, const std::vector<int>& sites);
  void update_piece(const Activations& x, int piece, int thread);
  const float* update_of(const RowBlock& block, int site, int64_t row) const;
  void widen(Activations& x, int64_t rows, int64_t k, const float* from);
  void gate_up(int64_t layer, const RowBlock& block);
  void down(int64_t layer, const RowBlock& block);
  void fetch_heads(int64_t row, int64_t head);
  void rotate_and_write(const Step& step, int64_t layer, const RowBlock& block, int64_t row, int64_t head);
  void attention(const Step& step, int64_t layer, const RowBlock& block);
  void attend_rows(const Step& step, int64_t layer, const RowBlock& block, int64_t sequence, int64_t head,
                   int64_t first, int64_t last, int thread, const uint16_t* const* following);
  void plan_ahead(const Step& step);
  bool worth_asking(int64_t rows) const;
  int64_t pace_ahead(int64_t rows) const;
  int64_t spared() const;
  void look_ahead(int64_t layer);
  Aside& aside_of(int thread, int update = NO_UPDATE);
  struct Ahead;
  void refill(Ahead& ahead) const;
  Lines lines_of_update(int32_t slot) const;
  void fetch_once(const Activations& x, int64_t rows, int thread);
  int64_t clock(Phase phase, int64_t since);

  const ModelState& base_;
  Pool* const pool_;
  const std::vector<int32_t>* row_sequence_ = nullptr;
  std::vector<RowBlock> blocks_;
  float* stream_ = nullptr;

  // The slots of the rows' adapters and the blocks of their cache; how many lines of them are asked for with a group of
  // inputs; which layer's are, -1 for none; and how often that has changed.
  std::vector<int32_t> ahead_slots_, ahead_blocks_;
  int64_t ahead_pace_ = 0, ahead_layer_ = -1, look_ = 0;
  std::vector<Update> updated_;  // the sites of the last updates, none if the layer's adapters have none of them
  std::vector<UpdateTask> update_tasks_;
  Buffer<float> qkv_;  // [block][q | k | v], each padded to whole tiles
  Buffer<uint16_t> query_;
  Buffer<float> seen_;                        // attention's result [block][heads * dim]
  Buffer<float> product_;                     // silu(gate) * up [block][intermediate], where it is wanted in its wide form
  std::array<Buffer<float>, SITES> updates_;  // [block][the site's outputs]
  Activations entering_, attended_, normed_, gated_;  // what q, k and v, o, gate and up, and down read
  // What a thread asks for beside its products: the adapters of the update that it comes to next, and then what the next
  // layer reads.
  struct Ahead : Aside {
    const LayerParallel* team = nullptr;
    int thread = 0;

    bool near = false;      // whether `lines` are the update's
    int64_t phase = 0;      // of the update
    int update = NO_UPDATE;
    const Entry* entry = nullptr;  // the first of its mix that is not asked for
    const Entry* end = nullptr;

    Lines far;          // of the next layer's, what was being asked for before
    int64_t look = 0;   // the last look ahead that it has begun with
    int64_t asked = 0;  // of its share of that one, slots and then blocks
    int64_t left = 0;   // lines that it may still ask for

    void refill() override { team->refill(*this); }
  };
  struct Local {
    AttentionScratch attention;
    Buffer<float> tile, rows, update;
    Ahead ahead;
    int64_t phase = 0;  // the last one in which this thread asked for its activations
  };
  std::vector<Local> local_;
  int64_t phase_ = 0;
  std::array<int64_t, PHASES> times_{};
};

}  // namespace loramux
