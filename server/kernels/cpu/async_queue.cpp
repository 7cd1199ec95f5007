#include "async_queue.h"

#include <utility>

namespace loramux {

AsyncQueue::AsyncQueue(Pool& pool) : pool_(pool), thread_([this] { work(); }) {}

AsyncQueue::~AsyncQueue() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true);
  }
  wake_.notify_all();
  thread_.join();
}

int64_t AsyncQueue::give(std::function<void()> job) {
  int64_t number;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(std::move(job));
    number = given_.load(std::memory_order_relaxed) + 1;
    given_.store(number, std::memory_order_release);
  }
  wake_.notify_one();
  return number;
}

void AsyncQueue::wait(int64_t number, const std::function<bool()>& enough) {
  const auto over = [&] { return done_.load(std::memory_order_seq_cst) >= number || enough(); };
  pool_.help_until(std::cref(over));  // a copy of it would take memory, which there may be none of
}

void AsyncQueue::work() {
  for (int64_t taken = 0;; taken++) {
    // A step that is read before the next is given is followed by it soon.
    pool_.spin([&] { return given_.load(std::memory_order_acquire) != taken || stopping_.load(); });
    std::function<void()> job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stopping_.load() || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job();
    done_.store(taken + 1, std::memory_order_seq_cst);
    pool_.wake_parked();
  }
}

}  // namespace loramux
