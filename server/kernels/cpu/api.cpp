// The C interface that bindings.py loads. Steps are validated here; other arguments are validated once, in Python.
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
#include "thread_pool.h"

using namespace loramux;

namespace {

// Row blocks, so that quantized activations stay in cache.
void linear(ThreadPool& pool, const Matrix& w, const float* x, int64_t rows, float* y) {
  std::lock_guard<std::mutex> lock(pool.mutex);
  constexpr int64_t BLOCK = 256, CHUNK = 4;
  Activations packed;
  packed.reserve(std::min(rows, BLOCK), w.k, formats_of(w));
  const int64_t tiles = w.tiles();
  std::vector<Buffer<float>> scratch(static_cast<size_t>(pool.threads()));
  for (auto& s : scratch) s.reserve(std::min(rows, BLOCK) * CHUNK * 16);
  for (int64_t start = 0; start < rows; start += BLOCK) {
    const int64_t count = std::min(BLOCK, rows - start);
    pool.run(static_cast<int>((count + ROWS - 1) / ROWS), [&](int chunk, int) {
      const int64_t first = chunk * ROWS, chunk_rows = std::min<int64_t>(ROWS, count - first);
      packed.set_rows(first, chunk_rows, w.k, x + (start + first) * w.k, w.k);
    });
    pool.run(static_cast<int>((tiles + CHUNK - 1) / CHUNK), [&](int chunk, int thread) {
      const int64_t first = chunk * CHUNK, last = std::min(tiles, first + CHUNK);
      float* at = y + start * w.n + first * 16;
      Prefetcher no_prefetch;
      if (last * 16 <= w.n) {
        multiply(w, first, last, packed, count, at, w.n, no_prefetch);
        return;
      }
      float* buffer = scratch[static_cast<size_t>(thread)].get();
      multiply(w, first, last, packed, count, buffer, CHUNK * 16, no_prefetch);
      for (int64_t r = 0; r < count; r++) std::copy_n(buffer + r * CHUNK * 16, w.n - first * 16, at + r * w.n);
    });
  }
}

// Whether f had enough memory. No exception leaves this library or a chunk of a pool run.
template <class F>
bool has_memory(F&& f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

// A model and the queue that runs its jobs in order. Memory that a job points to must stay valid until it is done.
struct ModelHandle {
  Model model;
  std::vector<int64_t> sampled;  // tokens of the last step's rows
  std::vector<int64_t> tokens;   // of a step that refers to sampled tokens
  AsyncQueue queue;              // destroyed first

  ModelHandle(const Config& config, const Layer* layers, const Matrix& embed, const Matrix& head, const float* norm,
              ThreadPool& pool)
      : model(config, layers, embed, head, norm, pool), queue(pool) {}

  Outcome run(Step step) {
    const auto is_placeholder = [](int64_t token) { return token < 0; };
    if (std::any_of(step.tokens, step.tokens + step.rows, is_placeholder)) {
      tokens.assign(step.tokens, step.tokens + step.rows);
      for (int64_t& token : tokens) {
        if (!is_placeholder(token)) continue;
        const auto row = static_cast<size_t>(-1 - token);
        if (row >= sampled.size()) return BAD_TOKEN;
        token = std::max<int64_t>(sampled[row], 0);  // a row that was not finite has no successor
      }
      step.tokens = tokens.data();
    }
    sampled.clear();
    const Outcome outcome = model.run(step);
    if (outcome == DONE) sampled.assign(step.argmax, step.argmax + step.logit_count);
    return outcome;
  }

  // Queues f and writes its result to `outcome`. Returns the job's number, 0 without memory.
  template <class F>
  int64_t submit(int32_t* outcome, F&& f) {
    int64_t number = 0;
    has_memory([&] {
      number = queue.submit([f = std::move(f), outcome]() mutable {
        *outcome = NO_MEMORY;
        has_memory([&] { *outcome = f(); });
      });
    });
    return number;
  }
};

}  // namespace

extern "C" {

// Null if threads or memory are lacking.
void* loramux_pool_new(int threads, bool use_waiting_thread) {
  try {
    return new ThreadPool(threads, use_waiting_thread);
  } catch (const std::exception&) {
    return nullptr;
  }
}
void loramux_pool_free(void* pool) { delete static_cast<ThreadPool*>(pool); }

// y [rows, n] = x [rows, k] times w, without bias. False without memory.
bool loramux_linear(void* pool, const Matrix* w, const float* x, int64_t rows, float* y) {
  return has_memory([&] { linear(*static_cast<ThreadPool*>(pool), *w, x, rows, y); });
}

// Sets gemm.h's eight_row_tiles and returns the old value, for tests and benchmarks. Not while a kernel runs.
bool loramux_eight_row_tiles(bool wanted) { return std::exchange(eight_row_tiles, wanted); }

// Rows `ids` of the matrix as float32 [count, k].
void loramux_embed(const Matrix* w, const int64_t* ids, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i++) dequantize_row(*w, ids[i], out + i * w->k);
}

// Quantizes the modules of an adapter. Returns how many succeeded before the first faulty one; -1 without memory.
int64_t loramux_encode_lora(const LoraSource* modules, int64_t count) {
  int64_t fault = -1;
  if (!has_memory([&] { fault = encode(modules, count); })) return -1;
  return fault < 0 ? count : fault;
}

// Null if threads or memory are lacking.
void* loramux_model_new(const Config* config, const Layer* layers, const Matrix* embed, const Matrix* head,
                        const float* norm, void* pool) {
  ModelHandle* handle = nullptr;
  try {
    has_memory(
        [&] { handle = new ModelHandle(*config, layers, *embed, *head, norm, *static_cast<ThreadPool*>(pool)); });
  } catch (const std::system_error&) {  // no thread
  }
  return handle;
}
void loramux_model_free(void* model) { delete static_cast<ModelHandle*>(model); }

void loramux_model_cache(void* model, uint16_t* cache, int64_t blocks, int64_t block_size, const float* cosine,
                         const float* sine, int64_t positions) {
  static_cast<ModelHandle*>(model)->model.set_cache(cache, blocks, block_size, cosine, sine, positions);
}

int64_t loramux_model_row_parallel_steps(void* model) {
  return static_cast<ModelHandle*>(model)->model.row_parallel_steps();
}
int64_t loramux_model_reduced_prefetch_steps(void* model) {
  return static_cast<ModelHandle*>(model)->model.reduced_prefetch_steps();
}
int64_t loramux_model_used_blocks(void* model) { return static_cast<ModelHandle*>(model)->model.used_blocks(); }

// Attention scratch bytes of a thread per token of context.
int64_t loramux_attention_bytes() { return AttentionScratch::BYTES_PER_TOKEN; }

int64_t loramux_block_bytes(const Config* config, int64_t block_size) {
  return config->layers * block_values(*config, block_size) * static_cast<int64_t>(sizeof(uint16_t));
}

// Asynchronous jobs. Each returns its number, 0 without memory, and writes `outcome` when it is done. `modules`
// [layers][MODULES] is copied; null clears the slot.
int64_t loramux_model_set_slot(void* model, int64_t slot, const LoraModule* modules, int32_t* outcome) {
  ModelHandle* handle = static_cast<ModelHandle*>(model);
  std::vector<LoraModule> own;
  if (modules != nullptr && !has_memory([&] { own.assign(modules, modules + handle->model.modules()); })) return 0;
  return handle->submit(outcome, [handle, slot, own = std::move(own)]() mutable {
    handle->model.set_slot(slot, std::move(own));
    return DONE;
  });
}
// A token below 0 stands for the token of row -1 - token of the step before, greedy or sampled.
int64_t loramux_model_step(void* model, const Step* step, int32_t* outcome) {
  ModelHandle* handle = static_cast<ModelHandle*>(model);
  return handle->submit(outcome, [handle, step = *step] { return handle->run(step); });
}
// tokens [rows] from logits [rows, vocab] of the step before; `params` is [rows].
int64_t loramux_model_sample(void* model, const float* logits, int64_t rows, const SamplingParams* params,
                             const int32_t* top_k, int32_t* tokens, int32_t* outcome) {
  ModelHandle* handle = static_cast<ModelHandle*>(model);
  return handle->submit(outcome, [=] {
    handle->model.sample(logits, rows, params, top_k, tokens);
    handle->sampled.assign(tokens, tokens + rows);
    return DONE;
  });
}
// Returns when the job is done. The calling thread, one at a time, computes with the pool until then.
void loramux_model_wait(void* model, int64_t number) { static_cast<ModelHandle*>(model)->queue.wait(number); }
// Returns when the step is done, or when its layers are or need at most `remaining` more nanoseconds. The caller
// computes too.
void loramux_model_wait_until_nearly_done(void* model, int64_t number, int64_t remaining) {
  ModelHandle* handle = static_cast<ModelHandle*>(model);
  const auto nearly_done = [&] {
    return handle->queue.done() == number - 1 && handle->model.remaining_ns() <= remaining;
  };
  handle->queue.wait(number, std::cref(nearly_done));
}
// The number of the last job that is done.
int64_t loramux_model_done(void* model) { return static_cast<ModelHandle*>(model)->queue.done(); }

int64_t loramux_model_bytes(void* model) { return static_cast<ModelHandle*>(model)->model.work_bytes(); }
// Nanoseconds per phase since the last call; see Phase in layer_runner.h.
void loramux_model_times(void* model, int64_t* out) { static_cast<ModelHandle*>(model)->model.take_times(out); }
}
