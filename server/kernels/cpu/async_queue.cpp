#include "async_queue.h"

#include <utility>

namespace loramux {

AsyncQueue::AsyncQueue(ThreadPool& pool) : pool_(pool), thread_([this] { work(); }) {}

AsyncQueue::~AsyncQueue() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_.store(true);
  }
  wake_.notify_all();
  thread_.join();
}

int64_t AsyncQueue::submit(std::function<void()> job) {
  int64_t number;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(std::move(job));
    number = submitted_.load(std::memory_order_relaxed) + 1;
    submitted_.store(number, std::memory_order_release);
  }
  wake_.notify_one();
  return number;
}

void AsyncQueue::wait(int64_t number, const std::function<bool()>& stop) {
  const auto finished = [&] { return done_.load(std::memory_order_seq_cst) >= number || stop(); };
  pool_.work_until(std::cref(finished));  // no copy, which would allocate
}

void AsyncQueue::work() {
  for (int64_t started = 0;; started++) {
    // The next step usually follows soon.
    pool_.spin([&] { return submitted_.load(std::memory_order_acquire) != started || stopping_.load(); });
    std::function<void()> job;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stopping_.load() || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job();
    done_.store(started + 1, std::memory_order_seq_cst);
    pool_.wake_parked();
  }
}

}  // namespace loramux
