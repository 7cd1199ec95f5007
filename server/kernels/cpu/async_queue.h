// A thread that runs submitted jobs in order, so that the caller can go on: the CPU used as an asynchronous device.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "thread_pool.h"

namespace loramux {

class AsyncQueue {
 public:
  explicit AsyncQueue(ThreadPool& pool);  // throws system_error if no thread can be started
  ~AsyncQueue();                          // runs what was submitted, then joins
  AsyncQueue(const AsyncQueue&) = delete;
  AsyncQueue& operator=(const AsyncQueue&) = delete;

  // Queues a job, which must not throw. Returns its number, counted from 1. Throws bad_alloc if it was not queued.
  int64_t submit(std::function<void()> job);

  // Returns when the job is done or `enough()` is true. Until then the calling thread, one at a time, works in the
  // pool.
  void wait(
      int64_t number, const std::function<bool()>& stop = [] { return false; });

  // The number of the last job that is done, 0 before the first.
  int64_t done() const { return done_.load(std::memory_order_acquire); }

 private:
  void work();

  ThreadPool& pool_;
  std::mutex mutex_;  // guards jobs_
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  std::atomic<int64_t> submitted_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace loramux
