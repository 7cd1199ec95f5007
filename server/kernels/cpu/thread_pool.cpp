#include "thread_pool.h"

#include <algorithm>

namespace loramux {
namespace {

uint64_t pack(uint32_t epoch, int first, int last) {
  return static_cast<uint64_t>(epoch) << 32 | static_cast<uint64_t>(first) << 16 | static_cast<uint64_t>(last);
}

}  // namespace

ThreadPool::ThreadPool(int threads, bool use_waiting_thread)
    : ranges_(static_cast<size_t>(std::max(threads, 1))), use_waiting_thread_(use_waiting_thread && threads > 1) {
  const int own = use_waiting_thread_ ? threads - 1 : threads;
  try {
    for (int t = 1; t < own; t++) workers_.emplace_back([this, t] { work(t); });
  } catch (...) {
    end();
    throw;
  }
}

ThreadPool::~ThreadPool() { end(); }

void ThreadPool::end() {
  {
    std::lock_guard<std::mutex> lock(park_);
    stopping_.store(true);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::run_erased(int n, Function function, void* context) {
  constexpr int MAX_CHUNKS = 0xffff;  // ends of a range have 16 bits
  if (n > MAX_CHUNKS) {
    struct Part {
      Function function;
      void* context;
      int stride;
      int n;
    } part{function, context, (n + MAX_CHUNKS - 1) / MAX_CHUNKS, n};
    auto run_several = [](void* p, int chunk, int thread) {
      auto* part = static_cast<Part*>(p);
      const int end = std::min(part->n, (chunk + 1) * part->stride);
      for (int i = chunk * part->stride; i < end; i++) part->function(part->context, i, thread);
    };
    run_erased((n + part.stride - 1) / part.stride, run_several, &part);
    return;
  }
  const int count = threads();
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  // Safe to overwrite: every chunk of the last run is done, so no thread can claim one with these values.
  function_.store(function, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  pending_.store(n, std::memory_order_relaxed);
  for (int t = 0; t < count; t++) {
    const int first = static_cast<int>(static_cast<int64_t>(n) * t / count);
    const int last = static_cast<int>(static_cast<int64_t>(n) * (t + 1) / count);
    ranges_[t].word.store(pack(epoch, first, last), std::memory_order_release);
  }
  epoch_.store(epoch, std::memory_order_seq_cst);
  wake_parked();
  run_chunks(0, epoch);
  for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; spins++) {
    if (spins < SPINS_BEFORE_SLEEPING) {
      pause();
      continue;
    }
    // Sleeps rather than yields: a thread that yields to an idle-class process waits for the next timer tick.
    std::unique_lock<std::mutex> lock(park_);
    waiting_.store(true, std::memory_order_seq_cst);
    run_done_.wait(lock, [&] { return pending_.load(std::memory_order_seq_cst) == 0; });
    waiting_.store(false, std::memory_order_relaxed);
    return;
  }
}

void ThreadPool::wake_parked() {
  if (parked_.load(std::memory_order_seq_cst) == 0) return;
  std::lock_guard<std::mutex> lock(park_);
  wake_.notify_all();
}

void ThreadPool::work_until(const std::function<bool()>& done) {
  uint32_t seen = epoch_.load(std::memory_order_acquire) - 1;  // a run may be in progress
  const auto has_work = [&] {
    return done() || (use_waiting_thread_ && epoch_.load(std::memory_order_seq_cst) != seen);
  };
  while (!done()) {
    if (use_waiting_thread_) spin(has_work);
    if (!has_work()) {
      std::unique_lock<std::mutex> lock(park_);
      parked_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, has_work);
      parked_.fetch_sub(1, std::memory_order_seq_cst);
    }
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (!use_waiting_thread_ || epoch == seen) continue;
    seen = epoch;
    run_chunks(threads() - 1, epoch);
  }
}

void ThreadPool::run_chunks(int thread, uint32_t epoch) {
  const int count = threads();
  for (int offset = 0; offset < count; offset++) {
    auto& range = ranges_[(thread + offset) % count].word;
    int done = 0;
    uint64_t word = range.load(std::memory_order_acquire);
    for (;;) {
      if (static_cast<uint32_t>(word >> 32) != epoch) break;
      const int first = static_cast<int>(word >> 16 & 0xffff);
      const int last = static_cast<int>(word & 0xffff);
      if (first >= last) break;
      const int chunk = offset == 0 ? first : last - 1;
      const uint64_t rest = offset == 0 ? pack(epoch, first + 1, last) : pack(epoch, first, last - 1);
      const Function function = function_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      if (!range.compare_exchange_weak(word, rest, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      function(context, chunk, thread);
      done++;
      word = range.load(std::memory_order_acquire);
    }
    // Updates the counter once per range, before looking at other ranges: it shares a cache line with all threads.
    if (done == 0 || pending_.fetch_sub(done, std::memory_order_seq_cst) != done) continue;
    if (waiting_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(park_);
      run_done_.notify_one();
    }
    return;
  }
}

void ThreadPool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    const auto has_work = [&] { return stopping_.load() || epoch_.load(std::memory_order_seq_cst) != seen; };
    spin(has_work);
    if (!has_work()) {
      std::unique_lock<std::mutex> lock(park_);
      parked_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, has_work);
      parked_.fetch_sub(1, std::memory_order_seq_cst);
    }
    if (stopping_.load()) return;
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    seen = epoch;
    run_chunks(thread, epoch);
  }
}

}  // namespace loramux
