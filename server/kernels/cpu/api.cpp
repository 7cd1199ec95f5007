// The C interface. Trusts its arguments but a step's, which change all the time and are checked here; the others
// engine/native_runner.py and kernels/cpu check once.
#include "target.h"

#include <algorithm>
#include <exception>
#include <functional>
#include <mutex>
#include <new>
#include <system_error>
#include <utility>
#include <vector>

#include "gemm.h"
#include "async_queue.h"
#include "lora_codes.h"
#include "model.h"
#include "pool.h"

using namespace loramux;

namespace {

// Blocks of rows, so that quantized activations stay in cache.
void linear(Pool& pool, const Matrix& w, const float* x, int64_t rows, float* y) {
  std::lock_guard<std::mutex> turn(pool.turn);
  constexpr int64_t BLOCK = 256, CHUNK = 4;
  Activations packed;
  packed.reserve(std::min(rows, BLOCK), w.k, forms_of(w));
  const int64_t tiles = w.tiles();
  std::vector<Buffer<float>> scratch(static_cast<size_t>(pool.threads()));
  for (auto& s : scratch) s.reserve(std::min(rows, BLOCK) * CHUNK * 16);
  for (int64_t start = 0; start < rows; start += BLOCK) {
    const int64_t count = std::min(BLOCK, rows - start);
    pool.run(static_cast<int>((count + ROWS - 1) / ROWS), [&](int piece, int) {
      const int64_t first = piece * ROWS, some = std::min<int64_t>(ROWS, count - first);
      packed.set_rows(first, some, w.k, x + (start + first) * w.k, w.k);
    });
    pool.run(static_cast<int>((tiles + CHUNK - 1) / CHUNK), [&](int piece, int thread) {
      const int64_t first = piece * CHUNK, last = std::min(tiles, first + CHUNK);
      float* at = y + start * w.n + first * 16;
      Aside nothing;
      if (last * 16 <= w.n) {
        multiply(w, first, last, packed, count, at, w.n, nothing);
        return;
      }
      float* local = scratch[static_cast<size_t>(thread)].get();
      multiply(w, first, last, packed, count, local, CHUNK * 16, nothing);
      for (int64_t r = 0; r < count; r++)
        std::copy_n(local + r * CHUNK * 16, w.n - first * 16, at + r * w.n);
    });
  }
}

// Whether there was memory for it: no exception leaves this library, nor a phase.
template <class F>
bool within_memory(F&& f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

// A model and the thread that runs it. Everything that changes the model once it serves is given to that thread, in
// order; what Python gave it points into has to stay until it is done.
struct Served {
  Model model;
  std::vector<int64_t> drawn;   // the tokens of the last step's rows of logits
  std::vector<int64_t> tokens;  // of a step that names some of those
  AsyncQueue launcher;            // ends first

  Served(const Config& config, const Layer* layers, const Matrix& embed, const Matrix& head, const float* norm,
         Pool& pool)
      : model(config, layers, embed, head, norm, pool), launcher(pool) {}

  Outcome run(Step step) {
    const auto promised = [](int64_t token) { return token < 0; };
    if (std::any_of(step.tokens, step.tokens + step.rows, promised)) {
      tokens.assign(step.tokens, step.tokens + step.rows);
      for (int64_t& token : tokens) {
        if (!promised(token)) continue;
        const auto row = static_cast<size_t>(-1 - token);
        if (row >= drawn.size()) return BAD_TOKEN;
        token = std::max<int64_t>(drawn[row], 0);  // nobody goes on from a row that was not finite
      }
      step.tokens = tokens.data();
    }
    drawn.clear();
    const Outcome outcome = model.run(step);
    if (outcome == DONE) drawn.assign(step.largest, step.largest + step.logit_count);
    return outcome;
  }

  // The job's number, 0 if there is no memory for it; what becomes of it goes to `outcome`.
  template <class F>
  int64_t give(int32_t* outcome, F&& f) {
    int64_t number = 0;
    within_memory([&] {
      number = launcher.give([f = std::move(f), outcome]() mutable {
        *outcome = NO_MEMORY;
        within_memory([&] { *outcome = f(); });
      });
    });
    return number;
  }
};

}  // namespace

extern "C" {

// Null if the system does not start so many threads, or has no memory for them.
void* loramux_pool_new(int threads, bool guest) {
  try {
    return new Pool(threads, guest);
  } catch (const std::exception&) {
    return nullptr;
  }
}
void loramux_pool_free(void* pool) { delete static_cast<Pool*>(pool); }

// y [rows, n] = x [rows, k] times w, no bias. False if there is no memory for it.
bool loramux_linear(void* pool, const Matrix* w, const float* x, int64_t rows, float* y) {
  return within_memory([&] { linear(*static_cast<Pool*>(pool), *w, x, rows, y); });
}

// Sets gemm.h's by_eight and answers what it was, for tests and measurements. Not while anything computes.
bool loramux_by_eight(bool wanted) { return std::exchange(by_eight, wanted); }

// Rows `ids` of the matrix as float32 [count, k].
void loramux_rows(const Matrix* w, const int64_t* ids, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) dequantize_row(*w, ids[i], out + i * w->k);
}

// Codes of adapters' modules: how many of the modules could be made, all that come before the first at fault; -1 without
// memory.
int64_t loramux_codes(const LoraSource* modules, int64_t count) {
  int64_t fault = -1;
  if (!within_memory([&] { fault = encode(modules, count); })) return -1;
  return fault < 0 ? count : fault;
}

// Null if there is no memory for it.
void* loramux_model_new(const Config* config, const Layer* layers, const Matrix* embed, const Matrix* head,
                        const float* norm, void* pool) {
  Served* served = nullptr;
  try {
    within_memory([&] { served = new Served(*config, layers, *embed, *head, norm, *static_cast<Pool*>(pool)); });
  } catch (const std::system_error&) {  // no more threads
  }
  return served;
}
void loramux_model_free(void* model) { delete static_cast<Served*>(model); }

void loramux_model_cache(void* model, uint16_t* cache, int64_t blocks, int64_t block_size, const float* cosine,
                         const float* sine, int64_t positions) {
  static_cast<Served*>(model)->model.set_cache(cache, blocks, block_size, cosine, sine, positions);
}

int64_t loramux_model_apart(void* model) { return static_cast<Served*>(model)->model.steps_apart(); }
int64_t loramux_model_sparing(void* model) { return static_cast<Served*>(model)->model.steps_sparing(); }
int64_t loramux_model_touched(void* model) { return static_cast<Served*>(model)->model.blocks_touched(); }

// Bytes that a thread attends with for each token of the context.
int64_t loramux_attending() { return AttentionScratch::EACH_TOKEN; }

int64_t loramux_block_bytes(const Config* config, int64_t block_size) {
  return config->layers * cache_halves(*config, block_size) * static_cast<int64_t>(sizeof(uint16_t));
}

// Jobs: each answers its number, 0 if there is no memory to take it, and `outcome` is written when it is done.
// `sites` is [layers][SITES] and copied; null empties the slot.
int64_t loramux_model_slot(void* model, int64_t slot, const LoraSite* sites, int32_t* outcome) {
  Served* served = static_cast<Served*>(model);
  std::vector<LoraSite> own;
  if (sites != nullptr && !within_memory([&] { own.assign(sites, sites + served->model.sites()); })) return 0;
  return served->give(outcome, [served, slot, own = std::move(own)]() mutable {
    served->model.set_slot(slot, std::move(own));
    return DONE;
  });
}
// A token below 0 is the one of row -1 - token of the step before: the largest of its logits, or what was drawn there.
int64_t loramux_model_step(void* model, const Step* step, int32_t* outcome) {
  Served* served = static_cast<Served*>(model);
  return served->give(outcome, [served, step = *step] { return served->run(step); });
}
// tokens [rows] of logits [rows, vocab], those of the step before; `how` is [rows] of Drawing.
int64_t loramux_model_draw(void* model, const float* logits, int64_t rows, const Drawing* how, const int32_t* top_k,
                           int32_t* tokens, int32_t* outcome) {
  Served* served = static_cast<Served*>(model);
  return served->give(outcome, [=] {
    served->model.draw(logits, rows, how, top_k, tokens);
    served->drawn.assign(tokens, tokens + rows);
    return DONE;
  });
}
// Returns when the job of that number is done; the calling thread, one at a time, computes with the others until then.
void loramux_model_wait(void* model, int64_t number) { static_cast<Served*>(model)->launcher.wait(number); }
// Returns when the step of that number is done, or has no more than `left` nanoseconds or the head to go. The caller
// computes too.
void loramux_model_linger(void* model, int64_t number, int64_t left) {
  Served* served = static_cast<Served*>(model);
  const auto planned = [&] { return served->launcher.done() == number - 1 && served->model.left() <= left; };
  served->launcher.wait(number, std::cref(planned));
}
// The last job that is done.
int64_t loramux_model_done(void* model) { return static_cast<Served*>(model)->launcher.done(); }

int64_t loramux_model_bytes(void* model) { return static_cast<Served*>(model)->model.work_bytes(); }
// Nanoseconds that each kind of phase has taken since the last call; see Phase in layer_parallel.h.
void loramux_model_times(void* model, int64_t* out) { static_cast<Served*>(model)->model.take_times(out); }
}
