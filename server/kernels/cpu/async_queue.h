// A thread that does what it is given, in the order of giving, while whoever gave it goes on: what makes the processors
// a device of their own.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "pool.h"

namespace loramux {

class AsyncQueue {
 public:
  explicit AsyncQueue(Pool& pool);  // throws system_error if the system starts no more threads
  ~AsyncQueue();                    // does what it was given, then ends
  AsyncQueue(const AsyncQueue&) = delete;
  AsyncQueue& operator=(const AsyncQueue&) = delete;

  // The number of a job, counted from 1. A job throws nothing. Throws bad_alloc, and the job is not given then.
  int64_t give(std::function<void()> job);

  // Returns when that job is done, or `enough`. Until then the calling thread, one at a time, is one of the pool's.
  void wait(int64_t number, const std::function<bool()>& enough = [] { return false; });

  // The last job that is done, 0 before the first.
  int64_t done() const { return done_.load(std::memory_order_acquire); }

 private:
  void work();

  Pool& pool_;
  std::mutex mutex_;  // of the jobs
  std::condition_variable wake_;
  std::deque<std::function<void()>> jobs_;
  std::atomic<int64_t> given_{0};
  std::atomic<int64_t> done_{0};
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace loramux
