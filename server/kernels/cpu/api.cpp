// The C interface. Trusts its arguments but a step's, which change all the time and are checked here; the others
// engine/native_runner.py and kernels/cpu check once.
#include "target.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <exception>
#include <vector>

#include "gemm.h"
#include "model.h"
#include "pool.h"

using namespace loramux;

namespace {

// Blocks of rows, so that quantized activations stay in cache.
void linear(Pool& pool, const Matrix& w, const float* x, int64_t rows, float* y) {
  std::lock_guard<std::mutex> turn(pool.turn);
  constexpr int64_t BLOCK = 256, CHUNK = 4;
  Activations packed;
  packed.reserve(std::min(rows, BLOCK), w.k, w.scheme != NONE, w.scheme == NONE);
  const int64_t tiles = w.tiles();
  std::vector<Buffer<float>> scratch(static_cast<size_t>(pool.threads()));
  for (auto& s : scratch) s.reserve(std::min(rows, BLOCK) * CHUNK * 16);
  for (int64_t start = 0; start < rows; start += BLOCK) {
    const int64_t count = std::min(BLOCK, rows - start);
    pool.run(static_cast<int>((count + ROWS - 1) / ROWS), [&](int piece, int) {
      const int64_t first = piece * ROWS, some = std::min<int64_t>(ROWS, count - first);
      packed.set(first, some, 0, w.k, x + (start + first) * w.k, w.k);
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

// Whether there was memory for it: no exception leaves this library. Only the calling thread allocates.
template <class F>
bool within_memory(F&& f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

}  // namespace

extern "C" {

// Null if the system does not start so many threads, or has no memory for them.
void* loramux_pool_new(int threads) {
  try {
    return new Pool(threads);
  } catch (const std::exception&) {
    return nullptr;
  }
}
void loramux_pool_free(void* pool) { delete static_cast<Pool*>(pool); }

// y [rows, n] = x [rows, k] times w, no bias. False if there is no memory for it.
bool loramux_linear(void* pool, const Matrix* w, const float* x, int64_t rows, float* y) {
  return within_memory([&] { linear(*static_cast<Pool*>(pool), *w, x, rows, y); });
}

// Rows `ids` of the matrix as float32 [count, k].
void loramux_rows(const Matrix* w, const int64_t* ids, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) dequantize_row(*w, ids[i], out + i * w->k);
}

// Null if there is no memory for it.
void* loramux_model_new(const Config* config, const Layer* layers, const Matrix* embed, const Matrix* head,
                        const float* norm, void* pool) {
  Model* model = nullptr;
  within_memory([&] { model = new Model(*config, layers, *embed, *head, norm, *static_cast<Pool*>(pool)); });
  return model;
}
void loramux_model_free(void* model) { delete static_cast<Model*>(model); }

void loramux_model_cache(void* model, uint16_t* cache, int64_t blocks, int64_t block_size, const float* cosine,
                         const float* sine, int64_t positions) {
  static_cast<Model*>(model)->set_cache(cache, blocks, block_size, cosine, sine, positions);
}

int64_t loramux_model_touched(void* model) { return static_cast<Model*>(model)->blocks_touched(); }

int64_t loramux_block_bytes(const Config* config, int64_t block_size) {
  return config->layers * cache_halves(*config, block_size) * static_cast<int64_t>(sizeof(uint16_t));
}

// `sites` is [layers][SITES]; null empties the slot. False if there is no memory for it; the slot is empty then.
bool loramux_model_slot(void* model, int64_t slot, const LoraSite* sites) {
  return within_memory([&] { static_cast<Model*>(model)->set_slot(slot, sites); });
}

int32_t loramux_model_step(void* model, const Step* step) {
  Outcome outcome = NO_MEMORY;
  within_memory([&] { outcome = static_cast<Model*>(model)->run(*step); });
  return outcome;
}
// tokens [rows] of logits [rows, vocab]; `how` is [rows] of Drawing. False if there is no memory for it.
bool loramux_model_draw(void* model, const float* logits, int64_t rows, const Drawing* how, const int32_t* top_k,
                        int32_t* tokens) {
  return within_memory([&] { static_cast<Model*>(model)->draw(logits, rows, how, top_k, tokens); });
}
int64_t loramux_model_bytes(void* model) { return static_cast<Model*>(model)->work_bytes(); }
// Nanoseconds that each kind of phase has taken since the last call; see Model::Phase.
void loramux_model_times(void* model, int64_t* out) { static_cast<Model*>(model)->take_times(out); }
}
