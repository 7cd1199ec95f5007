#include "pool.h"

#include <algorithm>

namespace loramux {
namespace {

uint64_t pack(uint32_t epoch, int first, int last) {
  return static_cast<uint64_t>(epoch) << 32 | static_cast<uint64_t>(first) << 16 | static_cast<uint64_t>(last);
}

}  // namespace

Pool::Pool(int threads, bool guest)
    : ranges_(static_cast<size_t>(std::max(threads, 1))), guest_(guest && threads > 1) {
  const int own = guest_ ? threads - 1 : threads;
  try {
    for (int t = 1; t < own; t++) workers_.emplace_back([this, t] { work(t); });
  } catch (...) {
    end();
    throw;
  }
}

Pool::~Pool() { end(); }

void Pool::end() {
  {
    std::lock_guard<std::mutex> lock(park_);
    stopping_.store(true);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run_erased(int n, Function function, void* context) {
  constexpr int MOST = 0xffff;  // a range's ends have 16 bits
  if (n > MOST) {
    struct Part {
      Function function;
      void* context;
      int stride;
      int n;
    } part{function, context, (n + MOST - 1) / MOST, n};
    auto several = [](void* p, int piece, int thread) {
      auto* part = static_cast<Part*>(p);
      const int end = std::min(part->n, (piece + 1) * part->stride);
      for (int i = piece * part->stride; i < end; i++) part->function(part->context, i, thread);
    };
    run_erased((n + part.stride - 1) / part.stride, several, &part);
    return;
  }
  const int count = threads();
  const uint32_t epoch = epoch_.load(std::memory_order_relaxed) + 1;
  // Safe to overwrite: every piece of the last phase is done, so no thread can still claim one with this pair.
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
  take_part(0, epoch);
  for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; spins++) {
    if (spins < SPINS_BEFORE_SLEEPING) {
      pause();
      continue;
    }
    // Asleep and not yielding: who yields to a process of the idle class waits for the next tick of the kernel's clock,
    // who sleeps is awake, and back on its processor, as soon as the phase is over.
    std::unique_lock<std::mutex> lock(park_);
    waiting_.store(true, std::memory_order_seq_cst);
    over_.wait(lock, [&] { return pending_.load(std::memory_order_seq_cst) == 0; });
    waiting_.store(false, std::memory_order_relaxed);
    return;
  }
}

void Pool::wake_parked() {
  if (parked_.load(std::memory_order_seq_cst) == 0) return;
  std::lock_guard<std::mutex> lock(park_);
  wake_.notify_all();
}

void Pool::help_until(const std::function<bool()>& over) {
  uint32_t seen = epoch_.load(std::memory_order_acquire) - 1;  // there may be a phase under way
  const auto called = [&] { return over() || (guest_ && epoch_.load(std::memory_order_seq_cst) != seen); };
  while (!over()) {
    if (guest_) spin(called);
    if (!called()) {
      std::unique_lock<std::mutex> lock(park_);
      parked_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, called);
      parked_.fetch_sub(1, std::memory_order_seq_cst);
    }
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (!guest_ || epoch == seen) continue;
    seen = epoch;
    take_part(threads() - 1, epoch);
  }
}

void Pool::take_part(int thread, uint32_t epoch) {
  const int count = threads();
  for (int turn = 0; turn < count; turn++) {
    auto& range = ranges_[(thread + turn) % count].word;
    int done = 0;
    uint64_t word = range.load(std::memory_order_acquire);
    for (;;) {
      if (static_cast<uint32_t>(word >> 32) != epoch) break;
      const int first = static_cast<int>(word >> 16 & 0xffff);
      const int last = static_cast<int>(word & 0xffff);
      if (first >= last) break;
      const int piece = turn == 0 ? first : last - 1;
      const uint64_t rest = turn == 0 ? pack(epoch, first + 1, last) : pack(epoch, first, last - 1);
      const Function function = function_.load(std::memory_order_relaxed);
      void* const context = context_.load(std::memory_order_relaxed);
      if (!range.compare_exchange_weak(word, rest, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      function(context, piece, thread);
      done++;
      word = range.load(std::memory_order_acquire);
    }
    // Told once a range, as a line that two cores write for every piece costs more than a short piece; and before others'
    // ranges are looked at, which lie on lines of other cores.
    if (done == 0 || pending_.fetch_sub(done, std::memory_order_seq_cst) != done) continue;
    if (waiting_.load(std::memory_order_seq_cst)) {
      std::lock_guard<std::mutex> lock(park_);
      over_.notify_one();
    }
    return;
  }
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    const auto called = [&] { return stopping_.load() || epoch_.load(std::memory_order_seq_cst) != seen; };
    spin(called);
    if (!called()) {
      std::unique_lock<std::mutex> lock(park_);
      parked_.fetch_add(1, std::memory_order_seq_cst);
      wake_.wait(lock, called);
      parked_.fetch_sub(1, std::memory_order_seq_cst);
    }
    if (stopping_.load()) return;
    const uint32_t epoch = epoch_.load(std::memory_order_acquire);
    seen = epoch;
    take_part(thread, epoch);
  }
}

}  // namespace loramux
