// A thread pool with work stealing. `run` splits n chunks into a range per thread; a thread whose range is empty steals
// from the ends of the others' ranges.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace loramux {

class ThreadPool {
 public:
  using Function = void (*)(void* context, int chunk, int thread);

  // `threads` counts the caller of `run`, the pool's own threads and, with `use_waiting_thread` and more than one
  // thread, the thread that waits in `work_until`. Throws system_error if a thread cannot be started.
  explicit ThreadPool(int threads, bool use_waiting_thread = false);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return static_cast<int>(ranges_.size()); }

  // Calls f(chunk, thread) once for every chunk below n and returns when all are done. One caller at a time.
  template <class F>
  void run(int n, F&& f) {
    if (n == 1 || threads() == 1) {
      for (int i = 0; i < n; i++) f(i, 0);
      return;
    }
    using Callable = std::remove_reference_t<F>;
    run_erased(
        n, [](void* context, int chunk, int thread) { (*static_cast<Callable*>(context))(chunk, thread); }, &f);
  }

  // Returns when `done()` is true, which is checked between runs and after `wake_parked`. With `use_waiting_thread` the
  // calling thread, one at a time, runs chunks until then.
  void work_until(const std::function<bool()>& done);

  // Wakes parked threads so that they check their conditions.
  void wake_parked();

  // Spins until the condition holds, for at most the usual gap between two steps. With one thread it returns at once.
  template <class F>
  void spin(F&& condition) const {
    if (threads() == 1) return;
    for (int spins = 0; spins < SPINS_BEFORE_PARKING && !condition(); spins++) pause();
  }

  // Held by callers of `run`, which take turns.
  std::mutex mutex;

 private:
  // Long enough for the gap between two runs, short enough that an idle server uses no CPU time.
  static constexpr int SPINS_BEFORE_PARKING = 20000;
  static constexpr int SPINS_BEFORE_SLEEPING = 20000;

  struct alignas(128) Range {
    std::atomic<uint64_t> word{0};  // epoch << 32 | first << 16 | last
  };

  static void pause() { __builtin_ia32_pause(); }
  void end();
  void run_erased(int n, Function function, void* context);
  void work(int thread);
  void run_chunks(int thread, uint32_t epoch);

  std::vector<Range> ranges_;
  const bool use_waiting_thread_;
  std::vector<std::thread> workers_;
  // What a worker reads at the start of a run, on one cache line.
  alignas(128) std::atomic<uint32_t> epoch_{0};
  std::atomic<Function> function_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(128) std::atomic<int> pending_{0};
  alignas(128) std::atomic<int> parked_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> waiting_{false};  // whether the caller sleeps until the run is done
  std::mutex park_;
  std::condition_variable wake_;      // workers and waiting threads: there is a run, or `done` may be true
  std::condition_variable run_done_;  // the caller: the run is done
};

}  // namespace loramux
