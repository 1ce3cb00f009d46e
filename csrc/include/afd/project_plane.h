// The nearest point to x within the box [low, high] on the plane {<w, z - at> + b = 0}: what FAB steps by (Croce & Hein
// 2020). Let `need` = |<w, x - at> + b| be how far off the plane x is. Every element may move by at most its room,
// towards the side of the box on which <w, z> falls (or rises) to the plane, and each unit of its move takes |w| off
// `need`. So the moves m >= 0 solve sum |w_i| m_i = need, with
//
//     Linf   m = min(t, room): all go equally far
//     L2     m = min(t |w|, room)
//     L1     m = room where |w| > cut, a share of it where |w| = cut, 0 where |w| < cut: the steepest go first
//
// In Linf and L2 the sum is concave and piecewise linear in t: Newton's method from t = 0 never overshoots, ends when
// no element has met its room since the last pass, and is exact then. Each pass divides what is still missing times the
// slope by at least 4 (as Dinkelbach's does), so that no input makes it crawl; five to ten passes serve an image. In L1
// the cut is one of the |w|: the sum over those that reach a probe narrows a bracket of their bits, and both ends jump
// to the next |w| that there is. Those that tie for the cut move alike in proportion to what they may, whatever their
// order. No pass sorts or stores anything, and sums are in double.
//
// A plane that no point of the box reaches: all go as far as their room, which is where the plane is nearest. A zero w
// has no plane, and x stays. What is not finite in x, w, at or b makes the sample NaN.
#pragma once

#include <cmath>

#include "afd/common.h"
#include "afd/project.h"

namespace afd {

struct ProjectPlane {
  const float* x;   // [samples, elements]; outside of the box it counts as the nearest point of the box
  const float* w;   // [planes, elements]; row i of x has plane i mod planes
  const float* b;   // [planes]
  const float* at;  // like w; null: the origin
  float* out;       // like x
  float* distance;  // [samples], from x to out in the norm
  int64_t samples, planes, elements;
  float low, high;
  Norm norm;
};

// Where one sample begins.
struct PlaneRow {
  const float* x;
  const float* w;
  const float* at;
  float* out;
  int64_t elements;
  float low, high;
};

AFD_HOST_DEVICE PlaneRow plane_row(const ProjectPlane& a, int64_t sample) {
  const int64_t first = sample * a.elements, of_plane = sample % a.planes * a.elements;
  return {a.x + first, a.w + of_plane, a.at ? a.at + of_plane : nullptr, a.out + first, a.elements, a.low, a.high};
}

// An element's part of <w, x - at>; NaN where x is not finite, even if it is weighed by 0.
AFD_HOST_DEVICE double plane_value(float x, float w, float at, float low, float high) {
  return static_cast<double>(w) * (static_cast<double>(clamped(x, low, high)) - at) + (x - x);
}

// An element on its way to the plane: its weight, and how far it may go.
struct PlaneElement {
  double size, room;
};

// `above`: whether <w, z> must fall.
AFD_HOST_DEVICE bool goes_down(float w, bool above) { return (w > 0.0f) == above; }

AFD_HOST_DEVICE PlaneElement plane_element(float x, float w, bool above, float low, float high) {
  const double place = clamped(x, low, high);
  return {fabs(static_cast<double>(w)), goes_down(w, above) ? place - low : high - place};
}

AFD_HOST_DEVICE float plane_moved(float x, float w, bool above, double move, float low, float high) {
  const float place = clamped(x, low, high);
  const double moved = goes_down(w, above) ? place - move : place + move;
  return w == 0.0f ? place : clamped(static_cast<float>(moved), low, high);
}

// An element's part of what the point's distance is made of.
template <Norm kNorm>
AFD_HOST_DEVICE double plane_length(float out, float x, float low, float high) {
  const double u = static_cast<double>(out) - clamped(x, low, high);
  return kNorm == Norm::l2 ? u * u : fabs(u);
}

// --- Linf and L2 -----------------------------------------------------------------------------------------------------

template <Norm kNorm>
AFD_HOST_DEVICE double plane_reach(double t, double size) {
  return kNorm == Norm::l2 ? t * size : t;
}

AFD_HOST_DEVICE double plane_move(double reach, double room) { return reach < room ? reach : room; }

template <Norm kNorm>
AFD_HOST_DEVICE double plane_slope(PlaneElement e, double reach) {
  return reach < e.room ? (kNorm == Norm::l2 ? e.size * e.size : e.size) : 0.0;
}

// Finds t, from sums of |w| m and of its slope.
class PlaneRoot {
 public:
  AFD_HOST_DEVICE_MEMBER explicit PlaneRoot(double need) : need_(need) {}

  // True while add() wants the sums at t().
  AFD_HOST_DEVICE_MEMBER bool searching() const { return searching_; }
  AFD_HOST_DEVICE_MEMBER double t() const { return t_; }

  AFD_HOST_DEVICE_MEMBER void add(double sum, double slope) {
    const double next = t_ + (need_ - sum) / slope;  // not above t without a slope: all have met their rooms
    searching_ = slope != slope_ && next > t_ && slope > 0.0;
    slope_ = slope;
    if (searching_) t_ = next;
  }

 private:
  double need_, t_ = 0.0, slope_ = -1.0;
  bool searching_ = true;
};

// --- L1 --------------------------------------------------------------------------------------------------------------

AFD_HOST_DEVICE int32_t plane_key(float w) { return bits_of(w) & 0x7fffffff; }  // ascends with |w|

// Finds the cut, from the sum of |w| room over the keys that reach a probe, the least of these keys, and the largest of
// the others.
class PlaneCut {
 public:
  // From a pass at 1, of which `sum` is at least `need`. The first probe is above all keys, to learn of the largest.
  AFD_HOST_DEVICE_MEMBER PlaneCut(double need, double sum, int32_t least)
      : need_(need), reaching_(sum), bottom_(least) {}

  // True while add() wants the sum at probe().
  AFD_HOST_DEVICE_MEMBER bool searching() const { return top_ - bottom_ > 1; }
  AFD_HOST_DEVICE_MEMBER int32_t probe() const { return static_cast<int32_t>(probe_); }

  AFD_HOST_DEVICE_MEMBER void add(double sum, int32_t least, int32_t largest_below) {
    if (sum >= need_) {
      bottom_ = least;
      reaching_ = sum;
    } else {
      top_ = int64_t{largest_below} + 1;
      beyond_ = sum;
    }
    next();
  }

  // When the search has ended: the key of the cut, and how far those that tie for it must go together.
  AFD_HOST_DEVICE_MEMBER int32_t key() const { return static_cast<int32_t>(bottom_); }
  AFD_HOST_DEVICE_MEMBER double tied_move() const { return (need_ - beyond_) / float_of(key()); }

 private:
  AFD_HOST_DEVICE_MEMBER void next() {
    const int64_t width = top_ - bottom_;
    const double share = (reaching_ - need_) / (reaching_ - beyond_);  // NaN where room is infinite
    const bool halve = ++passes_ % 3 == 0 || !(share <= 1.0);
    const int64_t step = halve ? width / 2 : static_cast<int64_t>(share * static_cast<double>(width));
    probe_ = bottom_ + (step < 1 ? 1 : step < width ? step : width - 1);
  }

  double need_, reaching_, beyond_ = 0.0;  // what reaches the bottom is enough, what reaches the top is not
  int64_t bottom_, probe_ = 0x7f800000, top_ = probe_ + 1;
  int passes_ = 0;
};

// What one of those that tie may go, where none needs to go further than all of them together.
AFD_HOST_DEVICE double plane_tied(double room, double together) { return room < together ? room : together; }

AFD_HOST_DEVICE double plane_l1_move(int32_t key, int32_t cut, double room, double together, double share) {
  return key > cut ? room : key == cut ? share * plane_tied(room, together) : 0.0;
}

namespace cpu {
void project_plane(const ProjectPlane& args, Launch launch);
}
namespace cuda {
int project_plane(const ProjectPlane& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
