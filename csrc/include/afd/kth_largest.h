// The k-th largest key of a sample without a sort, a histogram or memory: count how many keys reach a probe, and let
// the counts narrow a bracket. A probe is interpolated between the counts at the bracket's ends, every third one halves
// it; the search ends early when exactly k keys reach the probe, since then no smaller threshold selects fewer. About
// eight passes serve 3,072 random gradients and fifteen 150,528; a pass is a comparison an element.
//
// Keys are the magnitude bits of floats, which ascend as the magnitudes do. Key 0 (zero and NaN gradients) is never
// selected.
#pragma once

#include "afd/common.h"

namespace afd {

class KthLargest {
 public:
  // From a first pass: how many keys are not 0, and the largest.
  AFD_HOST_DEVICE_MEMBER KthLargest(int64_t k, int64_t nonzero, int32_t largest)
      : k_(k), reaching_(nonzero), top_(int64_t{largest} + 1) {
    next();
  }

  // True while add() wants the number of keys >= threshold().
  AFD_HOST_DEVICE_MEMBER bool searching() const { return searching_; }

  // The probe while searching; then the k-th largest key, or 1 if fewer than k are not 0.
  AFD_HOST_DEVICE_MEMBER int32_t threshold() const { return static_cast<int32_t>(searching_ ? probe_ : bottom_); }

  // How many keys reach the threshold that was found: k, or more with ties, or fewer with zeros.
  AFD_HOST_DEVICE_MEMBER int64_t reaching() const { return reaching_; }

  AFD_HOST_DEVICE_MEMBER void add(int64_t count) {
    if (count >= k_) {
      bottom_ = probe_;
      reaching_ = count;
    } else {
      top_ = probe_;
      reaching_top_ = count;
    }
    next();
  }

 private:
  AFD_HOST_DEVICE_MEMBER void next() {
    searching_ = reaching_ > k_ && top_ - bottom_ > 1;
    const int64_t width = top_ - bottom_;
    const double share = static_cast<double>(reaching_ - k_) / static_cast<double>(reaching_ - reaching_top_);
    const int64_t step = ++passes_ % 3 == 0 ? width / 2 : static_cast<int64_t>(share * static_cast<double>(width));
    probe_ = bottom_ + (step < 1 ? 1 : step < width ? step : width - 1);
  }

  int64_t k_, reaching_, top_;  // fewer than k keys reach top
  int64_t bottom_ = 1, probe_ = 1, reaching_top_ = 0;
  int passes_ = 0;
  bool searching_ = false;
};

}  // namespace afd
