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

// On its way to the plane an element is its `place` in the box and its `fall`: w where <w, z> must fall, -w where it
// must rise. Two numbers, not a struct, of which compilers make vectors less readily.

AFD_HOST_DEVICE double plane_room(double place, double fall, double low, double high) {
  return fall > 0.0 ? place - low : high - place;
}

// Where it is after a move, still to be rounded and clamped.
AFD_HOST_DEVICE double plane_moved(double place, double fall, double move) {
  const double moved = fall > 0.0 ? place - move : place + move;
  return fall == 0.0 ? place : moved;
}

// Its part of what the distance is made of.
template <Norm kNorm>
AFD_HOST_DEVICE double plane_length(double place, double out) {
  const double u = out - place;
  return kNorm == Norm::l2 ? u * u : fabs(u);
}

AFD_HOST_DEVICE double lesser_of(double a, double b) { return a < b ? a : b; }
AFD_HOST_DEVICE double larger_of(double a, double b) { return a > b ? a : b; }

// --- Linf and L2 -----------------------------------------------------------------------------------------------------

// How far an element would go by itself; it goes so far or as far as its room.
template <Norm kNorm>
AFD_HOST_DEVICE double plane_reach(double t, double fall) {
  return kNorm == Norm::l2 ? t * fabs(fall) : t;
}

// Its part of the slope of sum |w| m.
template <Norm kNorm>
AFD_HOST_DEVICE double plane_slope(double fall, double reach, double room) {
  const double size = fabs(fall);
  return reach < room ? (kNorm == Norm::l2 ? size * size : size) : 0.0;
}

// Finds t.
class PlaneRoot {
 public:
  AFD_HOST_DEVICE_MEMBER explicit PlaneRoot(double need) : need_(need) {}

  // True while add() wants the sums at t().
  AFD_HOST_DEVICE_MEMBER bool searching() const { return searching_; }
  AFD_HOST_DEVICE_MEMBER double t() const { return t_; }

  AFD_HOST_DEVICE_MEMBER void add(double sum, double slope) {
    const double next = t_ + (need_ - sum) / slope;  // without a slope all have met their rooms
    searching_ = slope != slope_ && next > t_ && slope > 0.0;
    slope_ = slope;
    if (searching_) t_ = next;
  }

 private:
  double need_, t_ = 0.0, slope_ = -1.0;
  bool searching_ = true;
};

// --- L1 --------------------------------------------------------------------------------------------------------------

// Of all |w| that reach a probe: the sum of |w| room, and the least of them. And the largest of the others.
struct PlaneReaching {
  double sum, least, below;
};

constexpr double kLeastFloat = 1.401298464324817e-45;

// Finds the cut, in a bracket of the bits of |w|, which ascend as it does.
class PlaneCut {
 public:
  // From what reaches kLeastFloat, whose sum is at least `need`. The first probe is infinite, to learn of the largest.
  AFD_HOST_DEVICE_MEMBER PlaneCut(double need, PlaneReaching all)
      : need_(need), reaching_(all.sum), bottom_(bits_of(static_cast<float>(all.least))) {}

  // True while add() wants to know what reaches probe().
  AFD_HOST_DEVICE_MEMBER bool searching() const { return top_ - bottom_ > 1; }
  AFD_HOST_DEVICE_MEMBER double probe() const { return float_of(static_cast<int32_t>(probe_)); }

  AFD_HOST_DEVICE_MEMBER void add(PlaneReaching found) {
    if (found.sum >= need_) {
      bottom_ = bits_of(static_cast<float>(found.least));
      reaching_ = found.sum;
    } else {
      top_ = int64_t{bits_of(static_cast<float>(found.below))} + 1;
      beyond_ = found.sum;
    }
    next();
  }

  // When the search has ended: the cut, and how far those that tie for it must go together.
  AFD_HOST_DEVICE_MEMBER double cut() const { return float_of(static_cast<int32_t>(bottom_)); }
  AFD_HOST_DEVICE_MEMBER double tied_move() const { return (need_ - beyond_) / cut(); }

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

// How far the elements go: all their room above the cut, and a share of what they may where they tie for it, `together`
// being what one of them would have to go if it were alone.
struct PlaneSteepest {
  double cut, together, share;
};

AFD_HOST_DEVICE double plane_tied(PlaneSteepest steepest, double fall, double room) {
  return fabs(fall) == steepest.cut ? lesser_of(steepest.together, room) : 0.0;
}

AFD_HOST_DEVICE double plane_steepest_move(PlaneSteepest steepest, double fall, double room) {
  return fabs(fall) > steepest.cut ? room : steepest.share * plane_tied(steepest, fall, room);
}

namespace cpu {
void project_plane(const ProjectPlane& args, Launch launch);
}
namespace cuda {
int project_plane(const ProjectPlane& args, Launch launch);  // a cudaError_t
}

}  // namespace afd
