// Chooses the faster of two implementations of the same operation at run time.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

namespace loramux {

// Times both implementations alternately, then uses the one with the smaller median for a while. It measures again
// later, because the speed of a shared machine changes.
class Autotuner {
 public:
  // The implementation to use now, 0 or 1.
  int choice() const { return remaining_ > 0 ? best_ : static_cast<int>(trial_ % 2); }

  // Whether a choice has been made.
  bool settled() const { return remaining_ > 0; }

  // Records the time of the last run, in any unit that is comparable between runs.
  void record(double time) {
    if (remaining_ > 0) {
      remaining_--;
      return;
    }
    times_[trial_ % 2][trial_ / 2] = time;
    if (++trial_ < 2 * TRIALS) return;
    best_ = median(times_[1]) < median(times_[0]) ? 1 : 0;
    trial_ = 0;
    remaining_ = REUSE;
  }

 private:
  static constexpr size_t TRIALS = 25;  // of each; odd, so that the median is one of them
  static constexpr int64_t REUSE = 4000;
  using Times = std::array<double, TRIALS>;

  static double median(Times times) {
    std::nth_element(times.begin(), times.begin() + TRIALS / 2, times.end());
    return times[TRIALS / 2];
  }

  std::array<Times, 2> times_{};
  size_t trial_ = 0;
  int64_t remaining_ = 0;
  int best_ = 0;
};

}  // namespace loramux
