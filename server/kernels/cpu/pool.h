// Our own threads. A phase is n numbered pieces; every thread has a range of them and takes from others' ends when its
// own is done, so that a thread that the kernel has put aside holds nobody up but for the one piece that it is in.
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

class Pool {
 public:
  using Function = void (*)(void* context, int piece, int thread);

  // `threads` take part in a phase: the caller, the pool's own, and, if the pool has a `guest` and more than one thread,
  // one that is a thread of the pool only while it waits in `help_until`. Throws system_error if the system starts no
  // more threads.
  explicit Pool(int threads, bool guest = false);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(ranges_.size()); }

  // f(piece, thread) for every piece below n, each once; returns when all are done. One caller at a time.
  template <class F>
  void run(int n, F&& f) {
    if (n == 1 || threads() == 1) {
      for (int i = 0; i < n; i++) f(i, 0);
      return;
    }
    using Callable = std::remove_reference_t<F>;
    run_erased(n, [](void* context, int piece, int thread) { (*static_cast<Callable*>(context))(piece, thread); }, &f);
  }

  // Returns when `over`, which is looked at between phases and when `wake_parked` is called. The caller takes part in
  // phases until then if the pool has a guest, one caller at a time, and only waits if not. What it leaves undone when it
  // goes, others do.
  void help_until(const std::function<bool()>& over);

  // Something that is waited for may be over.
  void wake_parked();

  // Looks whether something is so for as long as a gap between two steps may take, where other processors go on.
  template <class F>
  void spin(F&& is_so) const {
    if (threads() == 1) return;
    for (int spins = 0; spins < SPINS_BEFORE_PARKING && !is_so(); spins++) pause();
  }

  // Held by whoever runs phases; several callers take turns.
  std::mutex turn;

 private:
  // Long enough to bridge the gap between two phases and the short ones that a single thread runs, short enough that
  // an idle server burns nothing that shows.
  static constexpr int SPINS_BEFORE_PARKING = 20000;
  static constexpr int SPINS_BEFORE_SLEEPING = 20000;

  struct alignas(128) Range {
    std::atomic<uint64_t> word{0};  // epoch << 32 | first << 16 | last
  };

  static void pause() { __builtin_ia32_pause(); }
  void end();
  void run_erased(int n, Function function, void* context);
  void work(int thread);
  void take_part(int thread, uint32_t epoch);

  std::vector<Range> ranges_;
  const bool guest_;
  std::vector<std::thread> workers_;
  // What a worker reads as a phase begins lies on one line.
  alignas(128) std::atomic<uint32_t> epoch_{0};
  std::atomic<Function> function_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(128) std::atomic<int> pending_{0};
  alignas(128) std::atomic<int> parked_{0};
  std::atomic<bool> stopping_{false};
  std::atomic<bool> waiting_{false};  // whether the caller sleeps until the phase is done
  std::mutex park_;
  std::condition_variable wake_;  // of workers and those who wait: there is a phase, or something may be over
  std::condition_variable over_;  // of the caller: the phase is done
};

}  // namespace loramux
