// The nearest point to x_adv among the images that lie within eps of x and in the box [low, high]. Per sample, with
// u = x_adv - x and x inside the box:
//
//     Linf   clamp(clamp(x_adv, x - eps, x + eps), low, high)
//     L2     clamp(x + u * min(1, eps / |u|_2), low, high): first on the ball, then on the box, which only shortens
//     L1     x + sign(u) * min(max(|u| - lambda, 0), room), with room the distance from x to the box on u's side and
//            lambda >= 0 the root of sum = eps: the exact Euclidean projection on ball and box together (Croce & Hein,
//            "Mind the box", ICML 2021). See l1_threshold.h for the search.
//
// Linf goes by min and max against x -+ eps (as AutoAttack does), not through u, which would round once more. In L2 and
// L1, x + delta is rounded towards x, so that rounding never leaves the ball: a result is feasible and a second
// projection changes no bit of it. NaN in x_adv, x or eps stays visible: of its element in Linf, of its sample in L2
// and L1, where an infinite x_adv or x counts as NaN too.
#pragma once

#include <cmath>

#include "afd/common.h"

namespace afd {

struct Project {
  const float* x_adv;  // [samples, elements]
  const float* x;      // same
  float* out;          // same; may be x_adv itself
  int64_t samples, elements;
  PerSample eps;
  float low, high;
  Norm norm;
  double* workspace;  // CUDA only: see cuda::l2_workspace
};

AFD_HOST_DEVICE float clamped(float value, float low, float high) { return min_of(high, max_of(low, value)); }

AFD_HOST_DEVICE float project_linf_element(float x_adv, float x, float eps, float low, float high) {
  const float least = x - eps, most = x + eps;
  const float in_ball = min_of(most, max_of(least, x_adv));
  const float in_bounds = clamped(in_ball, low, high);
  return least == least ? in_bounds : least;
}

// x + delta, or its neighbour on x's side if rounding took it further from x than delta.
AFD_HOST_DEVICE float plus_towards(float x, float delta) {
  const float sum = x + delta;
  const bool overshot = fabsf(sum - x) > fabsf(delta);
  const int32_t bits = bits_of(sum);
  const int32_t rank = bits ^ ((bits >> 31) & 0x7fffffff);  // floats in ascending order have ascending ranks
  const int32_t nearer = rank + (delta > 0.0f ? -1 : 1);
  return float_of(overshot ? nearer ^ ((nearer >> 31) & 0x7fffffff) : bits);
}

// What u is multiplied by, given sum(u * u): 1 if the point is in the ball already, NaN if there is no answer. A few
// roundings short of eps / |u|, so that rounding each product cannot leave the ball.
AFD_HOST_DEVICE float l2_factor(double squares, float eps) {
  const double radius = eps;
  if (squares <= radius * radius && radius >= 0.0) return 1.0f;
  const double factor = radius / sqrt(squares) * (1.0 - 1.0 / (1 << 22));
  return static_cast<float>(squares < __builtin_huge_val() && radius >= 0.0 ? factor : __builtin_nan(""));
}

// For a factor other than 1; with 1, clamped(x_adv, low, high) keeps every bit.
AFD_HOST_DEVICE float project_l2_element(float x_adv, float x, float factor, float low, float high) {
  return clamped(plus_towards(x, (x_adv - x) * factor), low, high);
}

namespace cpu {
void project(const Project& args, Launch launch);
}
namespace cuda {
int project(const Project& args, Launch launch);  // a cudaError_t

// How many doubles of workspace an L2 projection or step needs; 0 where a sample fits on chip.
int64_t l2_workspace(int64_t samples, int64_t elements);
}  // namespace cuda

}  // namespace afd
