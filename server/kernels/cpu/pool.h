// Our own threads. A phase is n numbered pieces; every thread has a range of them and takes from others' ends when its
// own is done, so that a thread that the kernel has put aside holds nobody up but for the one piece that it is in.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace loramux {

class Pool {
 public:
  using Function = void (*)(void* context, int piece, int thread);

  explicit Pool(int threads);  // throws system_error if the system starts no more threads
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
    run_erased(n, [](void* context, int piece, int thread) { (*static_cast<F*>(context))(piece, thread); }, &f);
  }

  // Held by whoever runs phases; several callers take turns.
  std::mutex turn;

 private:
  struct alignas(128) Range {
    std::atomic<uint64_t> word{0};  // epoch << 32 | first << 16 | last
  };

  void end();
  void run_erased(int n, Function function, void* context);
  void work(int thread);
  void take_part(int thread, uint32_t epoch);

  std::vector<Range> ranges_;
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
  std::condition_variable wake_;  // of workers: there is a phase
  std::condition_variable over_;  // of the caller: the phase is done
};

}  // namespace loramux
