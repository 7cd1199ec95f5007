// Which of two ways to do the same work takes less time on this machine, found by turns. Knows nothing of the work.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>

namespace loramux {

// Both ways take turns for a while, and the one with the smaller median is kept for many times, until they take turns
// again: a machine that others share changes its pace.
class Autotuner {
 public:
  // The way to go now, 0 or 1.
  int way() const { return kept_ > 0 ? best_ : static_cast<int>(turn_ % 2); }

  // Whether it is known for now which that is.
  bool known() const { return kept_ > 0; }

  // What it took the way that was said last, in any unit that makes works of different sizes alike.
  void took(double time) {
    if (kept_ > 0) {
      kept_--;
      return;
    }
    times_[turn_ % 2][turn_ / 2] = time;
    if (++turn_ < 2 * TURNS) return;
    best_ = median(times_[1]) < median(times_[0]) ? 1 : 0;
    turn_ = 0;
    kept_ = KEPT;
  }

 private:
  static constexpr size_t TURNS = 25;  // of each way; with an odd number the median is one of them
  static constexpr int64_t KEPT = 4000;
  using Times = std::array<double, TURNS>;

  static double median(Times times) {
    std::nth_element(times.begin(), times.begin() + TURNS / 2, times.end());
    return times[TURNS / 2];
  }

  std::array<Times, 2> times_{};
  size_t turn_ = 0;
  int64_t kept_ = 0;
  int best_ = 0;
};

}  // namespace loramux
