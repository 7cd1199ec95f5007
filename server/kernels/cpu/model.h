// One step of a decoder of the Llama family: the C++ twin of server/model/decoder.py, over packed weights, KV blocks
// and slots. Holds pointers into what Python keeps alive, and work buffers of its own.
#pragma once
#include "target.h"

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "kernels.h"
#include "lora.h"
#include "pool.h"
#include "sampling.h"

namespace loramux {

int64_t cache_halves(const Config& config, int64_t block_size);  // bf16 values of one block of one layer

class Model {
 public:
  enum Phase { NORM, QKV, ATTENTION, OUT, GATE_UP, DOWN_PROJ, HEAD, PLAN, DRAW, PHASES };

  Model(const Config& config, const Layer* layers, const Matrix& embed, const Matrix& head, const float* norm,
        Pool& pool);

  // `blocks` of `block_size` tokens, and the angles of `positions` positions.
  void set_cache(uint16_t* cache, int64_t blocks, int64_t block_size, const float* cosine, const float* sine,
                 int64_t positions);
  // `sites` is [layers][SITES]; none empty the slot. Allocates nothing.
  void set_slot(int64_t slot, std::vector<LoraSite> sites);
  Outcome run(const Step& step);
  // Nanoseconds that the step under way has left by the pace of its layers, more than any if that is not known yet. From
  // any thread.
  int64_t left() const;
  // tokens [rows] of logits [rows, vocab]. Throws bad_alloc.
  void draw(const float* logits, int64_t rows, const Drawing* how, const int32_t* top_k, int32_t* tokens);
  int64_t sites() const { return config_.layers * SITES; }  // of a slot
  int64_t blocks_touched() const { return touched_; }  // up to the highest one that a step has used
  int64_t work_bytes() const;
  void take_times(int64_t* out);

 private:
  // Rows that go through a layer together: few enough that what passes between phases stays in cache.
  static constexpr int64_t BLOCK = 256;
  static constexpr int NO_UPDATE = -1;

  struct RowBlock {
    int64_t first, count;
    LoraPlan plan;
  };

  // What one product does with its result.
  struct Target {
    const Matrix* w;
    int site;
    float* out;  // [rows, stride]
    int64_t stride;
    bool add;
  };

  Outcome check(const Step& step) const;
  void plan(const Step& step);
  LoraPlan plan_block(const Step& step, int64_t first, int64_t count) const;
  void reserve(const Step& step);
  void run_layer(const Step& step, int64_t layer, const RowBlock& block);
  void norm_rows(const RowBlock& block, const float* weight, int added);
  void products(int64_t layer, const RowBlock& block, const Activations& x, int64_t in,
                const std::vector<Target>& targets);
  void product_piece(const RowBlock& block, const Activations& x, const Target& target, int64_t first, int64_t last,
                     Aside& aside, int thread);
  int plan_updates(int64_t layer, const RowBlock& block, const std::vector<int>& sites);
  void update_piece(const Activations& x, int64_t in, int piece, int thread);
  const float* update_of(const RowBlock& block, int site, int64_t row) const;
  void gate_up(int64_t layer, const RowBlock& block);
  void down(int64_t layer, const RowBlock& block);
  void rotate_and_write(const Step& step, int64_t layer, const RowBlock& block, int64_t row, int64_t head);
  void attention(const Step& step, int64_t layer, const RowBlock& block);
  void attend_rows(const Step& step, int64_t layer, const RowBlock& block, int64_t sequence, int64_t head,
                   int64_t first, int64_t last, int thread, const uint16_t* const* following);
  void head(const Step& step);
  Cache cache_of(int64_t layer) const;
  void plan_ahead(const Step& step);
  int64_t pace_ahead(int64_t rows) const;
  void look_ahead(int64_t layer);
  Aside& aside_of(int thread, int update = NO_UPDATE);
  struct Ahead;
  void refill(Ahead& ahead) const;
  Lines lines_of_update(int32_t slot) const;
  void fetch_once(const Activations& x, int64_t rows, int thread);
  int64_t clock(Phase phase, int64_t since);

  const Config config_;
  const std::vector<Layer> layers_;
  const Matrix embed_, head_;
  const float* const norm_;
  Pool& pool_;
  std::vector<std::vector<LoraSite>> slot_sites_;
  std::vector<const LoraSite*> slots_;  // [slot] -> [layer][site]
  std::vector<int64_t> slot_rank_;      // the highest of a slot's ranks
  std::vector<uint32_t> slot_uses_;     // bit s: some layer has site s
  std::vector<int64_t> slot_lines_;     // of what is asked for ahead of a layer, over all layers
  bool any_half_ = false;               // some linear wants bf16 activations
  bool any_codes_ = false;

  uint16_t* cache_ = nullptr;
  int64_t blocks_ = 0, block_size_ = 16, positions_ = 0, touched_ = 0;
  const float* cosine_ = nullptr;
  const float* sine_ = nullptr;

  // The slots of a step's adapters and the blocks of its cache; how many lines of them are asked for with a group of
  // inputs; which layer's are, -1 for none; and how often that has changed.
  std::vector<int32_t> ahead_slots_, ahead_blocks_;
  const int64_t ahead_lines_;  // that a thread asks for, at most
  int64_t ahead_pace_ = 0, ahead_layer_ = -1, look_ = 0;
  std::vector<RowBlock> row_blocks_;
  std::vector<int32_t> row_sequence_;
  std::vector<Update> updated_;  // the sites of the last updates, none if the layer's adapters have none of them
  std::vector<UpdateTask> update_tasks_;
  Buffer<float> stream_;  // [rows][hidden]
  Buffer<float> qkv_;     // [block][q | k | v], each padded to whole tiles
  Buffer<uint16_t> query_;
  Buffer<float> seen_;  // attention's result [block][heads * dim]
  std::array<Buffer<float>, SITES> updates_;  // [block][the site's outputs]
  Activations normed_, attended_, gated_;
  // What a thread asks for beside its products: the adapters of the update that it comes to next, and then what the next
  // layer reads.
  struct Ahead : Aside {
    const Model* model = nullptr;
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

    void refill() override { model->refill(*this); }
  };
  struct Local {
    AttentionScratch attention;
    Buffer<float> tile, rows, ranks;
    DrawScratch draw;
    std::vector<Peaks> peaks;  // of the logits that this thread has computed
    Ahead ahead;
    int64_t phase = 0;  // the last one in which this thread asked for its activations
  };
  std::vector<Local> local_;
  int64_t phase_ = 0;
  std::array<int64_t, PHASES> times_{};
  std::atomic<int64_t> layers_began_{0};  // when those of the step under way did
  std::atomic<int64_t> layers_done_{0};   // of it; 0 without a step
  std::atomic<int64_t> head_took_{0};     // in the last step that had logits
};

}  // namespace loramux
