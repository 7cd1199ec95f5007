// One step of a decoder of the Llama family: the C++ twin of server/model/decoder.py, over packed weights, KV blocks
// and slots. Holds pointers into what Python keeps alive, and work buffers of its own.
#pragma once
#include "target.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "pool.h"
#include "autotune.h"
#include "model_state.h"
#include "sampling.h"
#include "layer_parallel.h"

namespace loramux {

class Model {
 public:
  Model(const Config& config, const Layer* layers, const Matrix& embed, const Matrix& head, const float* norm,
        Pool& pool);

  // `blocks` of `block_size` tokens, and the angles of `positions` positions.
  void set_cache(uint16_t* cache, int64_t blocks, int64_t block_size, const float* cosine, const float* sine,
                 int64_t positions);
  // `sites` is [layers][SITES]; none empty the slot. Allocates nothing.
  void set_slot(int64_t slot, std::vector<LoraSite> sites) { base_.set_slot(slot, std::move(sites)); }
  Outcome run(const Step& step);
  // Nanoseconds that the step under way has left by the pace of its layers, more than any if that is not known yet, none
  // once all layers are done. From any thread.
  int64_t left() const;
  // tokens [rows] of logits [rows, vocab]. Throws bad_alloc.
  void draw(const float* logits, int64_t rows, const Drawing* how, const int32_t* top_k, int32_t* tokens);
  int64_t sites() const { return base_.config.layers * SITES; }  // of a slot
  // From any thread: the blocks up to the highest one that a step has used, and the bytes of the work buffers.
  int64_t blocks_touched() const { return touched_; }
  int64_t work_bytes() const;
  int64_t steps_apart() const { return steps_apart_; }      // in which each thread took rows alone
  int64_t steps_sparing() const { return steps_sparing_; }  // in which less was asked for ahead than could have been
  void take_times(int64_t* out);  // without a step under way

 private:
  static constexpr size_t PACES = 6;     // powers of two
  static constexpr int64_t BLOCK = 256;  // rows: few enough that what passes between phases stays in cache
  // A block of the matrix unit's rows: of two threads each has one with 32 rows, and one of them two with 33.
  static constexpr int64_t APART = ROWS_OF_UNIT;

  Outcome check(const Step& step) const;
  LoraPlan plan_block(const Step& step, int64_t first, int64_t count) const;
  std::vector<RowBlock> blocks_of(const Step& step, int64_t first, int64_t last) const;
  std::vector<int64_t> costs_of(const Step& step) const;
  std::vector<int64_t> parts_of(const Step& step, const std::vector<int64_t>& costs) const;
  std::vector<LayerParallel*> deal(const Step& step, const std::vector<int64_t>& ends);
  void head(const Step& step);
  int64_t clock(Phase phase, int64_t since);

  ModelState base_;
  const Matrix embed_, head_;
  const float* const norm_;
  Pool& pool_;
  LayerParallel together_;
  std::deque<LayerParallel> alone_;  // one for each thread, none if there is one only
  // Of steps of more than i times APART rows: whether threads take rows alone (0) or together (1).
  std::array<Autotuner, BLOCK / APART> apart_;
  // Of steps of 2^i rows and more at paces of 2^j and more: whether what the next layer reads is asked for at that (0) or
  // sparingly (1).
  std::array<Autotuner, 64> sparing_[PACES];
  std::atomic<int64_t> touched_{0}, steps_apart_{0}, steps_sparing_{0};

  std::vector<int32_t> row_sequence_;
  Buffer<float> stream_;  // [rows][hidden]
  Activations normed_;    // the rows that logits are wanted of
  struct Local {
    Buffer<float> tile, rows;
    DrawScratch draw;
    std::vector<Peaks> peaks;  // of the logits that this thread has computed
  };
  std::vector<Local> local_;
  std::array<int64_t, PHASES> times_{};
  std::atomic<int64_t> layers_began_{0};  // when those of the step under way did
  std::atomic<int64_t> layers_done_{0};   // of it; 0 without a step
  std::atomic<int64_t> head_took_{0};     // in the last step that had logits
};

}  // namespace loramux
