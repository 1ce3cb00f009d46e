// The threshold of the L1 projection without a sort. With u = x_adv - x and room the distance from x to the box on u's
// side, the sum of what is kept
//
//     f(lambda) = sum_i min(max(|u_i| - lambda, 0), room_i)
//
// falls from f(0) to f(max |u|) = 0, piecewise linearly; its slope is minus the number of elements that are neither cut
// to 0 nor to their room. One pass over the sample gives f and the slope, and Newton's method, kept inside a bracket,
// finds f(lambda) = eps in about five passes, fewer from a start that is known to be near. Far from the root it works
// on sqrt(f), which is straight where sizes are spread evenly and less bent than f elsewhere; where it stalls (the box
// makes f neither convex nor concave) the bracket is halved. The search ends on the feasible side, f <= eps, less than
// 1e-6 * eps away from it.
//
// f is the sum of the very floats that are then added to x. The first pass sums them in double; later ones may add four
// neighbours in float before (two roundings, which kDoubt covers), so what the search calls feasible is.
#pragma once

#include <cmath>

#include "afd/common.h"
#include "afd/project.h"

namespace afd {

// lambda as the sum of two floats: |u| - lambda keeps full precision where |u| is barely above lambda.
struct L1Cut {
  float head, tail;
};

AFD_HOST_DEVICE L1Cut l1_cut(double lambda) {
  const float head = static_cast<float>(lambda);
  return {head, static_cast<float>(lambda - static_cast<double>(head))};
}

AFD_HOST_DEVICE float l1_room(float u, float x, float low, float high) { return u > 0.0f ? high - x : x - low; }

// How far |u| is above lambda; nothing is kept of an element that is not.
AFD_HOST_DEVICE float l1_over(float size, L1Cut cut) { return (size - cut.head) - cut.tail; }

AFD_HOST_DEVICE float l1_excess(float over) { return over > 0.0f ? over : 0.0f; }

// One element's part of f, and whether it slopes.
struct L1Term {
  float kept;
  int sloping;
};

AFD_HOST_DEVICE L1Term l1_term(float over, float room) {
  const float excess = l1_excess(over);
  return {excess < room ? excess : room, (over > 0.0f) & (over < room)};
}

AFD_HOST_DEVICE L1Term l1_term_at(float x_adv, float x, L1Cut cut, float low, float high) {
  const float u = x_adv - x;
  return l1_term(l1_over(fabsf(u), cut), l1_room(u, x, low, high));
}

// Past its room an element is cut by the clamp: at the box's edge, not at a rounding of x + room.
AFD_HOST_DEVICE float project_l1_element(float x_adv, float x, L1Cut cut, float low, float high) {
  const float u = x_adv - x;
  return clamped(plus_towards(x, copysignf(l1_excess(l1_over(fabsf(u), cut)), u)), low, high);
}

class L1Threshold {
 public:
  // From a first pass: f and the number of sloping elements at lambda = `start`, and max |u|. Above 0, `start` must be
  // below the answer: sum > eps. The search ends with f in [(1 - tolerance) * eps, eps].
  AFD_HOST_DEVICE_MEMBER L1Threshold(float eps, double sum, int64_t sloping, float largest, double start = 0.0,
                                     double tolerance = 6e-7)
      : eps_(eps), tolerance_(tolerance), above_(largest), below_(start), probe_(start) {
    if (!(sum >= 0.0 && is_finite(largest) && eps_ >= 0.0)) {
      above_ = __builtin_nan("");
    } else if (sum <= eps_) {
      above_ = 0.0;
    } else if (eps_ > 0.0) {
      searching_ = true;
      add(sum, sloping);
    }
  }

  // True while add() wants the sum and slope at lambda().
  AFD_HOST_DEVICE_MEMBER bool searching() const { return searching_; }

  // The point to look at while searching; then the answer. 0: only the box cuts; NaN: there is no answer.
  AFD_HOST_DEVICE_MEMBER double lambda() const { return searching_ ? probe_ : above_; }

  AFD_HOST_DEVICE_MEMBER void add(double rounded_sum, int64_t sloping) {
    const double sum = rounded_sum + kDoubt * rounded_sum;
    const double off = sum - eps_, aim = eps_ - 0.5 * tolerance_ * eps_;
    const double needed = sum > 1.5 * aim ? 2.0 * (sum - sqrt(sum * aim)) : sum - aim;
    const double newton = probe_ + needed / static_cast<double>(sloping);  // infinite without a slope
    const bool too_far = off > 0.0;
    (too_far ? below_ : above_) = probe_;
    (too_far ? from_below_ : from_above_) = newton;
    if (!too_far && -off <= tolerance_ * eps_) {
      searching_ = false;
      return;
    }
    const double other = too_far ? from_above_ : from_below_;
    const bool stalled = fabs(off) > 0.5 * last_off_;
    last_off_ = fabs(off);
    ++passes_;
    if (inside(newton) && !stalled && passes_ < kPatience)
      probe_ = newton;
    else if (inside(other) && passes_ < kPatience)
      probe_ = other;
    else
      probe_ = passes_ < kPatience ? 0.5 * (below_ + above_) : middle_rank();
    searching_ = inside(probe_);
  }

 private:
  static constexpr double kDoubt = 1.3e-7;
  static constexpr int kPatience = 32;  // passes before plain bisection, which ends within another 64

  AFD_HOST_DEVICE_MEMBER bool inside(double point) const { return below_ < point && point < above_; }

  // Halves the number of doubles in the bracket, whatever their magnitudes.
  AFD_HOST_DEVICE_MEMBER double middle_rank() const {
    int64_t low, high;
    memcpy(&low, &below_, sizeof low);
    memcpy(&high, &above_, sizeof high);
    const int64_t middle = low + (high - low) / 2;
    double result;
    memcpy(&result, &middle, sizeof result);
    return result;
  }

  double eps_, tolerance_, above_, below_, probe_;          // f(below) > eps >= f(above)
  double from_below_ = kInfinity, from_above_ = kInfinity;  // Newton's next point from either end
  double last_off_ = kInfinity;
  int passes_ = 0;
  bool searching_ = false;
};

}  // namespace afd
